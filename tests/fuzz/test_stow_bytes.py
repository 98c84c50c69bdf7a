"""Bytes of every kind through what reads the bodies of STOW-RS requests.

What is written is read again, equal, however it is cut; hostile bytes raise RefusedError and nothing else.
"""

import json
import re
from contextlib import suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicomscp.dicom.codestream import read_codestream
from dicomscp.dicom.dataset import BulkData, Elsewhere, composed, json_objects, read_json
from dicomscp.dicom.identity import read_identity
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.multipart import PartData, PartEnd, PartHead, PartReader
from dicomscp.dicom.xmlmodel import native_model, read_native_model
from dicomscp.errors import RefusedError

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

# Pieces that boundaries are made of, so that content comes near to one.
near_boundary = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"B", b"--B", b"\r\n--B", b" ", b"x", b"--B--"]),
    max_size=12,
).map(b"".join)
cuts = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def events(reader, body, sizes):
    """The events of *body*, cut into blocks of *sizes*, over and over."""
    at, number = 0, 0
    while at < len(body):
        size = sizes[number % len(sizes)]
        yield from reader.feed(body[at : at + size])
        at, number = at + size, number + 1
    yield from reader.close()


@fuzz
@given(st.lists(near_boundary, max_size=4), cuts)
def test_parts_written_are_read_however_they_are_cut(contents, sizes):
    contents = [content for content in contents if not is_ended_by(content)]
    body = b"".join(b"--B\r\nA: b\r\n\r\n" + content + b"\r\n" for content in contents) + b"--B--"
    found = []
    for event in events(PartReader("B"), body, sizes):
        if isinstance(event, PartHead):
            found.append(bytearray())
        elif isinstance(event, PartData):
            found[-1] += event.data
        else:
            assert isinstance(event, PartEnd)
    assert found == contents


def is_ended_by(content):
    """Whether *content* has a line that is a boundary."""
    return re.search(rb"\r\n--B(--|[ \t]*\r\n)", b"\r\n" + content + b"\r\n") is not None


@fuzz
@given(st.one_of(st.binary(max_size=300), near_boundary), cuts)
def test_any_bytes_are_parts_or_refused(body, sizes):
    def outcome(sizes):
        found = []
        try:
            for event in events(PartReader("B"), body, sizes):
                if isinstance(event, PartData) and found and isinstance(found[-1], bytes):
                    found[-1] += bytes(event.data)
                else:
                    found.append(bytes(event.data) if isinstance(event, PartData) else event)
        except RefusedError as error:
            found.append(str(error))
        return [one for one in found if not isinstance(one, bytes)], found[-1:] if not body else None

    assert outcome(sizes) == outcome([len(body) or 1])


texts = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\\^="), max_size=20
).map(lambda text: text.strip(" \0"))
tags = (
    st.integers(0x00280010, 0x7FDFFFFF)
    .filter(lambda tag: tag >> 16 & 1 == 0 and tag & 0xFFFF)
    .map("{:08X}".format)
)
values = st.one_of(
    st.fixed_dictionaries(
        {"vr": st.just("LO"), "Value": st.lists(texts.filter(bool), min_size=1, max_size=3)}
    ),
    st.fixed_dictionaries(
        {"vr": st.just("US"), "Value": st.lists(st.integers(0, 65535), min_size=1, max_size=3)}
    ),
    st.fixed_dictionaries(
        {"vr": st.just("FD"), "Value": st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1)}
    ),
    st.fixed_dictionaries({"vr": st.sampled_from(["SH", "OB", "SQ", "DS"])}),
)
items = st.dictionaries(tags, values, max_size=4)
attributes = st.dictionaries(
    tags,
    st.one_of(
        values, st.fixed_dictionaries({"vr": st.just("SQ"), "Value": st.lists(items, min_size=1, max_size=3)})
    ),
    max_size=6,
)
UIDS = {
    tag: {"vr": "UI", "Value": [uid]}
    for tag, uid in (
        ("00080016", "1.2.840.10008.5.1.4.1.1.7"),
        ("00080018", "1.2.3"),
        ("0020000D", "1"),
        ("0020000E", "1.2"),
    )
}


@fuzz
@given(attributes, st.booleans())
def test_metadata_written_are_read_again(said, as_xml):
    said = UIDS | said
    (text,) = json_objects(json.dumps([said]).encode())
    read = read_json(text)
    if as_xml:
        read = read_native_model(native_model(read).document)
    encoded = b"".join(composed(read, lambda _: (), lambda _: b"").pieces)
    assert read_identity(encoded, "1.2.840.10008.1.2.1", total_bytes=len(encoded)).key == (
        "1",
        "1.2",
        "1.2.3",
    )
    header = Compiler().header(encoded, "1.2.840.10008.1.2.1", total_bytes=len(encoded), bulk_uri="/b")
    found = json.loads(b"{" + header.body + b"}")
    found = {tag: value for tag, value in found.items() if tag not in ("00080005", "00083002")}
    assert found == dict(sorted(said.items()))


hostile = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["vr", "Value", "InlineBinary", "BulkDataURI", "Alphabetic"]), inner),
        st.dictionaries(st.sampled_from(["00100010", "00400555", "7FE00010", "00080018", "x"]), inner),
        st.fixed_dictionaries({"vr": st.sampled_from(["SQ", "PN", "US", "OB", "LO", "AT"]), "Value": inner}),
    ),
    max_leaves=12,
)


@fuzz
@given(st.one_of(hostile.map(json.dumps).map(str.encode), st.binary(max_size=100)), st.binary(max_size=200))
def test_any_metadata_are_a_dataset_or_refused(text, data):
    parts = [BulkData("image/jpeg", "", Elsewhere(0, len(data)))]
    with suppress(RefusedError):
        for one in json_objects(text):
            composed(
                read_json(one), lambda _: parts, lambda where: data[where.start : where.start + where.size]
            )


MARKUP = """<NativeDicomModel>|</NativeDicomModel>|<DicomAttribute tag="00400555" vr="SQ">
|<DicomAttribute tag="00090001" vr="LO" privateCreator="A">|</DicomAttribute>|<Item number="1">|</Item>
|<Value number="1">|</Value>|text|<PersonName number="1">|</PersonName>|<Alphabetic>|</Alphabetic>
|<FamilyName>|</FamilyName>|<BulkData uri="u"/>|&lt;|<!--""".replace("\n", "").split("|")


@fuzz
@given(st.lists(st.sampled_from(MARKUP), max_size=12))
def test_any_xml_is_a_model_or_refused(pieces):
    with suppress(RefusedError):
        found = read_native_model("".join(["<NativeDicomModel>", *pieces, "</NativeDicomModel>"]).encode())
        composed(found, lambda _: (), lambda _: b"")


@fuzz
@given(
    st.sampled_from([b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"]),
    st.one_of(
        st.binary(max_size=120),
        st.lists(
            st.sampled_from(
                [b"\xff\xc0", b"\xff\xda", b"\xff\xc3", b"\0\x0b", b"\1", b"\0", b"jp2c", b"\xff\x52"]
            )
        ).map(b"".join),
    ),
)
def test_any_image_header_is_read_or_refused(begins, data):
    with suppress(RefusedError):
        read_codestream(begins + data)
