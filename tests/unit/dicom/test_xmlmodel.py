"""The Native DICOM Model, read back by a reader of its own and beside what DCMTK makes of the same file."""

import json
import subprocess
from base64 import b64encode
from pathlib import Path
from xml.etree import ElementTree as ET

import pydicom.data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.dicom.xmlmodel import native_model
from tests.unit.dicom.nativemodel import NUMBERS, as_text, read, read_dataset

DATA = Path(pydicom.data.__file__).parent
FILES = [
    *(
        DATA / "test_files" / f"{name}.dcm"
        for name in ("CT_small", "MR_small", "rtplan", "rtdose", "test-SR")
    ),
    *(DATA / "test_files" / f"{name}.dcm" for name in ("reportsi", "liver_1frame", "examples_ybr_color")),
    *(DATA / "charset_files" / f"{name}.dcm" for name in ("chrArab", "chrGreek", "chrI2", "chrRuss")),
]


# ── any object is read back as it was ────────────────────────────────────────────────────────────

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: not any((ord(c) < 32 and c not in "\t\n\r") or ord(c) in (0xFFFE, 0xFFFF) for c in text)
)
PART = st.text(st.sampled_from("Aé<&山ﾔ ' -"), max_size=4)
NAME = st.lists(PART, min_size=1, max_size=5).map("^".join).map(lambda name: name.rstrip("^"))
PERSON = st.fixed_dictionaries({}, optional=dict.fromkeys(["Alphabetic", "Ideographic", "Phonetic"], NAME))
VALUES = {
    "LO": TEXT,
    "LT": TEXT,
    "UI": st.just("1.2.3"),
    "AT": st.just("00100010"),
    "DS": st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(["1e99999", "-0.50"]),
    "IS": st.integers(-(2**31), 2**31 - 1),
    "FD": st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(["NaN", "-Infinity"]),
    "UV": st.sampled_from([0, "18446744073709551615"]),
    "PN": PERSON.map(lambda name: {group: text for group, text in name.items() if text} or None),
}
TAGS = {
    "LO": ["00080070", "00101000", "00091001", "00091102"],
    "LT": ["00104000", "0009100A"],
    "UI": ["00081150"],
    "AT": ["00280009"],
    "DS": ["00281052", "00091011"],
    "IS": ["00200013"],
    "FD": ["00189313"],
    "UV": ["00720083"],
    "PN": ["00100010", "00091020"],
}
CREATORS = {"00090010": {"vr": "LO", "Value": ["ACME <1>"]}, "00090011": {"vr": "LO", "Value": ['A "&"\tB']}}
LINK = st.fixed_dictionaries({"vr": st.just("OW"), "BulkDataURI": st.sampled_from(['/a?b=1&c="2"', "x"])})
INLINE = st.fixed_dictionaries(
    {"vr": st.just("OB"), "InlineBinary": st.binary(min_size=1).map(b64encode).map(bytes.decode)}
)


def element(vr):
    value = VALUES[vr]
    values = st.lists(value if vr == "LT" else value | st.none(), max_size=3)
    return values.map(lambda values: {"vr": vr, "Value": values} if values else {"vr": vr})


def dataset(items):
    optional = {tag: element(vr) for vr, tags in TAGS.items() for tag in tags}
    sequence = st.lists(items, max_size=2).map(
        lambda found: {"vr": "SQ", **({"Value": found} if found else {})}
    )
    optional |= {"7FE00010": LINK, "00091012": INLINE, "00400275": sequence, "00091030": sequence}
    return st.fixed_dictionaries({}, optional=optional).map(
        lambda found: dict(sorted((CREATORS | found).items()))
    )


OBJECTS = st.recursive(st.just({}), dataset, max_leaves=3)


@given(OBJECTS)
@settings(deadline=None)
def test_what_is_read_back_is_what_was_written(attributes):
    encoded = native_model(attributes)

    assert read(encoded.document) == as_text(attributes)
    assert encoded.replaced == 0


# ── rules, one by one ────────────────────────────────────────────────────────────────────────────


def content(attributes):
    document = native_model(attributes).document.decode()
    return document[document.index('preserve">') + 10 : document.rindex("</NativeDicomModel>")]


def test_a_name_is_taken_apart_in_order_and_what_is_empty_is_left_out():
    name = {"Phonetic": "や^た", "Alphabetic": "Yamada^Tarou^^Dr^", "Ideographic": "山田^太郎"}
    assert content({"00100010": {"vr": "PN", "Value": [name, None]}}) == (
        '<DicomAttribute tag="00100010" keyword="PatientName" vr="PN"><PersonName number="1">'
        "<Alphabetic><FamilyName>Yamada</FamilyName><GivenName>Tarou</GivenName><NamePrefix>Dr</NamePrefix></Alphabetic>"
        "<Ideographic><FamilyName>山田</FamilyName><GivenName>太郎</GivenName></Ideographic>"
        "<Phonetic><FamilyName>や</FamilyName><GivenName>た</GivenName></Phonetic>"
        '</PersonName><PersonName number="2"></PersonName></DicomAttribute>'
    )


def test_a_name_with_more_components_than_there_are_loses_none():
    assert "<NameSuffix>E^F</NameSuffix>" in content(
        {"00100010": {"vr": "PN", "Value": [{"Alphabetic": "A^B^C^D^E^F"}]}}
    )


def test_the_block_of_a_private_element_is_not_sent():
    block = {"vr": "LO", "Value": ["ACME"]}
    assert content({"00090012": block, "00091234": {"vr": "LO"}}) == (
        '<DicomAttribute tag="00090012" vr="LO"><Value number="1">ACME</Value></DicomAttribute>'
        '<DicomAttribute tag="00090034" privateCreator="ACME" vr="LO"></DicomAttribute>'
    )


@pytest.mark.parametrize(
    "creator", [{}, {"00090012": {"vr": "LO"}}, {"00090012": {"vr": "LO", "Value": [None]}}]
)
def test_a_private_element_of_nobody_keeps_its_tag(creator):
    assert '<DicomAttribute tag="00091234" vr="UN">' in content(creator | {"00091234": {"vr": "UN"}})


def test_a_creator_counts_in_its_own_item_only():
    inside = {"vr": "SQ", "Value": [{"00091234": {"vr": "LO"}}]}
    assert 'tag="00091234"' in content({"00090012": {"vr": "LO", "Value": ["ACME"]}, "00400275": inside})


@pytest.mark.parametrize("character", ["\0", "\x0b", "\x1b", "\x1f", "\ufffe", "\uffff"])
def test_what_xml_cannot_hold_is_replaced_and_counted(character):
    encoded = native_model({"00104000": {"vr": "LT", "Value": [f"a{character}b{character}"]}})

    assert encoded.replaced == 2
    assert read(encoded.document)["00104000"]["Value"] == ["a\ufffdb\ufffd"]


# ── the same file by DCMTK ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dcmtk_writes_the_same(path):
    command = ["dcm2xml", "--native-format", "--use-xml-namespace", "--encode-base64", "--convert-to-utf8"]
    run = subprocess.run([*command, path], capture_output=True, check=False)
    assert run.returncode == 0
    theirs = comparable(read_dataset(ET.fromstring(run.stdout)))
    ours = comparable(read(native_model(header_of(path)).document))

    assert ours == theirs
    assert len(ours) > 5


def header_of(path):
    data = path.read_bytes()
    meta = read_file_meta(data)
    encoded = data[meta.dataset_offset :]
    header = Compiler().header(encoded, meta.transfer_syntax_uid, total_bytes=len(encoded), bulk_uri="/b")
    return json.loads(b"{%b}" % header.body, parse_float=str, parse_int=str)


def comparable(attributes):
    """*attributes* without what the two programs do differently on purpose.

    They differ in which binary values are linked, and DCMTK writes those of 16-bit words with their bytes
    swapped, singles with nine digits, and a name of nothing but carets as empty.  We say that text is UTF-8
    now, and in which transfer syntax an instance is to be had.
    """
    return {
        tag: comparable_attribute(attribute)
        for tag, attribute in attributes.items()
        if tag not in ("00080005", "00083002") and attribute["vr"] not in ("OB", "OW", "UN", "OB or OW")
    }


def comparable_attribute(attribute):
    if attribute["vr"] == "SQ":
        return [comparable(item) for item in attribute.get("Value", ())]
    if attribute["vr"] in NUMBERS:
        return [value and f"{float(value):.8g}" for value in attribute.get("Value", ())]
    values = [value.strip() if isinstance(value, str) else value for value in attribute.get("Value", ())]
    return [] if values == [None] else values
