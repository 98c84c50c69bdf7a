"""Bytes of every kind through the readers of dataset bytes.

What is written is read again, equal, in every encoding; hostile bytes are read in part or raise RefusedError
(or PrefixError where a prefix was given), and nothing else.
"""

import struct
from base64 import b64encode
from contextlib import suppress
from pathlib import Path

import orjson
import pydicom.data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dicomscp.dicom import bulk, part10
from dicomscp.dicom.identity import PrefixError, read_identity
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.errors import RefusedError
from tests.unit.dicom.encoding import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    JPEG_BASELINE,
    SEQUENCE_END,
    UNDEFINED,
    dataset,
    deflate,
    explicit,
    fragments,
    implicit,
    item,
    open_item,
)

FILES = Path(pydicom.data.__file__).parent / "test_files"
SYNTAXES = (EXPLICIT_LITTLE, IMPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED, JPEG_BASELINE)
NAMES = (
    "CT_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "MR_small_RLE.dcm",
    "nested_priv_SQ.dcm",
    "UN_sequence.dcm",
    "SC_rgb_rle_2frame.dcm",
    "rtplan.dcm",
    "image_dfl.dcm",
    "reportsi.dcm",
    "liver_1frame.dcm",
)
REAL = [(FILES / name).read_bytes()[:40_000] for name in NAMES]

INSTANCES = [
    data
    for name, data in zip(NAMES, REAL, strict=True)
    if name not in ("nested_priv_SQ.dcm", "UN_sequence.dcm")
]

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def every_reader(data, transfer_syntax_uid, compiler):
    """Give *data* to all that reads datasets; whatever they refuse, they refuse as agreed."""
    total = len(data)
    half = total // 2
    for given_bytes, total_bytes in (
        (data, total),
        (data, total + 1),
        (data[:half], total),
        (data[:half], half),
    ):
        with suppress(RefusedError, PrefixError):
            read_identity(given_bytes, transfer_syntax_uid, total_bytes=total_bytes, tail=bytes(data[-8:]))
        try:
            found = compiler.header(given_bytes, transfer_syntax_uid, total_bytes=total_bytes, bulk_uri="/b")
            paths = check_header(found)
        except (RefusedError, PrefixError):
            paths = []
    for path in [*paths[:20], "7FE00010", "00081140/1/00081150", "54000100/2/54001010"]:
        with suppress(RefusedError):
            list(bulk.bulk_value(data, transfer_syntax_uid, path).parts())
    with suppress(RefusedError):
        encoded = bulk.inflated(data, transfer_syntax_uid)
        table = bulk.frame_table(*encoded)
        assert table.frames <= min(table.told, 8 * len(encoded.dataset))
        for number in (1, 2, table.frames, table.told):
            with suppress(RefusedError):
                bulk.read_frame(encoded.dataset, table, number)


def check_header(header):
    """The header is JSON in ascending order; return the paths of its top-level links."""
    attributes = orjson.loads(b"{" + b",".join(header.fragments.values()) + b"}")
    assert list(attributes) == [f"{tag:08X}" for tag in sorted(header.fragments)]
    assert header.body == b",".join(header.fragments.values())
    assert all(len(attribute["vr"]) == 2 for attribute in attributes.values())
    return [attribute["BulkDataURI"][3:] for attribute in attributes.values() if "BulkDataURI" in attribute]


# --- hostile bytes ------------------------------------------------------------------------------------------


@st.composite
def damaged(draw):
    """A real file with some of its bytes changed, left out, doubled or put in."""
    data = bytearray(draw(st.sampled_from(REAL)))
    start = draw(st.sampled_from([0, 120, 300]))
    for _ in range(draw(st.integers(1, 6))):
        if len(data) < 2:
            break
        at = draw(st.integers(min(start, len(data) - 1), len(data) - 1))
        kind = draw(st.sampled_from(["flip", "replace", "cut", "delete", "insert", "length"]))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "replace":
            patch = draw(st.binary(min_size=1, max_size=12))
            data[at : at + len(patch)] = patch
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(
                st.sampled_from([SEQUENCE_END, item(), open_item(), b"\xff" * 4, b"\x1b$B", b"\\"])
            )
        else:
            data[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xfe\xff\xff\xff"]))
    return bytes(data)


@fuzz
@given(damaged())
def test_damaged_files_are_read_in_part_or_refused(data):
    try:
        meta = part10.read_file_meta(data)
    except RefusedError:
        return
    every_reader(memoryview(data)[meta.dataset_offset :], meta.transfer_syntax_uid, Compiler())


@fuzz
@given(st.binary(max_size=400), st.sampled_from(SYNTAXES))
@example(b"", EXPLICIT_LITTLE)
@example(SEQUENCE_END, EXPLICIT_LITTLE)
@example(b"\x08\x00\x05\x00CS\xff\xff", EXPLICIT_LITTLE)
@example(explicit(0x7FE00010, "OB", fragments(table=b"\xff" * 4), length=UNDEFINED), JPEG_BASELINE)
@example(explicit(0x00280008, "IS", "9" * 5000) + explicit(0x7FE00010, "OB", b"ab"), EXPLICIT_LITTLE)
def test_any_bytes_are_read_in_part_or_refused(data, transfer_syntax_uid):
    every_reader(data, transfer_syntax_uid, Compiler())
    with suppress(RefusedError):
        part10.read_file_meta(data)


@fuzz
@given(st.binary(max_size=300))
def test_any_bytes_deflated_are_read_in_part_or_refused(data):
    every_reader(deflate(dataset() + data), DEFLATED, Compiler())


_ELEMENT_PARTS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                explicit(0x00080005, "CS", "ISO 2022 IR 87"),
                explicit(0x00081140, "SQ", length=UNDEFINED),
                explicit(0x00091010, "UN", length=UNDEFINED),
                explicit(0x7FE00010, "OB", length=UNDEFINED),
                explicit(0x00280103, "US", b"\1\0"),
                implicit(0x00280120, b"\xff\xff"),
                implicit(0x00081140, length=UNDEFINED),
                implicit(0x00090010, b"GEMS_IDEN_01"),
                item(length=UNDEFINED),
                item(),
                SEQUENCE_END,
                b"\xfe\xff\x0d\xe0\0\0\0\0",
            ]
        ),
        st.binary(max_size=16),
    ),
    max_size=40,
)


@fuzz
@given(_ELEMENT_PARTS, st.sampled_from([EXPLICIT_LITTLE, IMPLICIT_LITTLE]))
def test_pieces_of_framing_in_any_order_are_read_in_part_or_refused(parts, transfer_syntax_uid):
    every_reader(b"".join(parts), transfer_syntax_uid, Compiler())


@fuzz
@given(st.lists(damaged(), min_size=2, max_size=6))
def test_what_is_remembered_of_damaged_files_changes_no_header(files):
    compiler = Compiler(cache_bytes=200_000)
    for data in [*files, *files]:
        try:
            meta = part10.read_file_meta(data)
            rest = data[meta.dataset_offset :]
            expected = Compiler(cache_bytes=0).header(
                rest, meta.transfer_syntax_uid, total_bytes=len(rest), bulk_uri="/b"
            )
        except RefusedError:
            continue
        found = compiler.header(rest, meta.transfer_syntax_uid, total_bytes=len(rest), bulk_uri="/b")
        assert found == expected


# --- what is remembered -----------------------------------------------------------------------------------

# Elements whose JSON depends on others, and those they depend on; tag, VR, values they may have.
_ELEMENTS = (
    (0x00080000, "UL", [b"\x0c\0\0\0", b"\x10\0\0\0"]),
    (0x00080001, "UL", [b"\0\0\0\0"]),
    (0x00080005, "CS", [b"ISO_IR 100", b"ISO_IR 144", b"ISO_IR 192", b"\\ISO 2022 IR 87 ", b"", b"NONE"]),
    (0x00080018, "UI", [b"1.2.3\0", b"1.2.4\0", b"1.2.34"]),
    (0x00080060, "CS", [b"CT", b"MR"]),
    (0x00082111, "ST", [b"\xc4\xd6", b'a"b', b""]),
    (0x00083002, "UI", [b"1.2.840.10008.1.2.1\0"]),
    (0x00083010, "UI", [b"1.2\0", b"1.3\0"]),
    (0x00090010, "LO", [b"GEMS_IDEN_01", b"SOMEBODY", b""]),
    (0x00091001, "LO", [b"GE_GENESIS_FF ", b"x "]),
    (0x00091027, "SL", [b"\1\0\0\0", b"\2\0\0\0"]),
    (0x00091030, "SH", [b"\xc4 "]),
    (0x00100010, "PN", [b"A^B ", b"\xc4^B=C", b"\x1b$B;3ED\x1b(B^\\D"]),
    (0x00189810, "US", [b"\xff\xff", b"\1\0"]),
    (0x00200013, "IS", [b"1 ", b"2 ", b"10", b"x "]),
    (0x00280103, "US", [b"\0\0", b"\1\0", b""]),
    (0x00280106, "US", [b"\xff\xff", b"\1\0"]),
    (0x00283002, "US", [b"\1\0\0\0\x10\0", b"\2\0\0\0\x10\0"]),
    (0x00283006, "US", [b"\1\0", b"\1\0\2\0"]),
    (0x00420011, "OB", [bytes(10), bytes(200), bytes(5000)]),
    (0x7FE00010, "OW", [bytes(4), bytes(8)]),
)
_HEADS = ("written", "written", "written", "UN", "nested")
_ELEMENT = st.tuples(st.integers(0, len(_ELEMENTS) - 1), st.integers(0, 5), st.sampled_from(_HEADS))
_CHANGES = st.sampled_from(["value"] * 6 + ["leave out", "put in", "move", "double"])


@st.composite
def series(draw):
    """Encoded datasets that have much in common and differ in anything: values, presence, order, encoding."""
    order, write, syntax = draw(
        st.sampled_from([("<", "e", EXPLICIT_LITTLE), ("<", "i", IMPLICIT_LITTLE), (">", "e", EXPLICIT_BIG)])
    )
    left_out = draw(st.sets(st.integers(0, len(_ELEMENTS) - 1), max_size=12))
    kept = [(number, 0, draw(st.sampled_from(_HEADS))) for number in range(len(_ELEMENTS))]
    kept = [one for one in kept if one[0] not in left_out]
    found = []
    for change in draw(st.lists(_CHANGES, min_size=2, max_size=12)):
        at, new = draw(st.integers(0, len(kept) - 1)), draw(_ELEMENT)
        told = kept
        if change == "value":
            told = kept = [*kept[:at], (kept[at][0], *new[1:]), *kept[at + 1 :]]
        elif change == "leave out":
            told = [*kept[:at], *kept[at + 1 :]]
        elif change == "put in":
            told = kept = sorted({one[0]: one for one in [*kept, new]}.values())
        elif change == "move":
            told = [*kept[:at], *kept[at + 1 :], kept[at]]
        else:
            told = [*kept[:at], (kept[at][0], *new[1:]), *kept[at:]]
        found += [b"".join(_encoded(*one, order, write) for one in each) for each in (kept, told, kept)]
    return syntax, found


def _encoded(number, value, head, order, write):
    tag, vr, values = _ELEMENTS[number]
    data = values[value % len(values)]

    def one(tag, vr, data):
        return implicit(tag, data, order=order) if write == "i" else explicit(tag, vr, data, order=order)

    if head == "nested":
        inner = item(one(tag, vr, data) + one(0x00280106, "US", b"\2\0"), order=order)
        return one(0x00081140 if tag < 0x00200000 else 0x00400275, "SQ", inner)
    return one(tag, "UN" if head == "UN" else vr, data)


@fuzz
@given(series(), st.sampled_from([0, 3_000, 64 << 20]), st.booleans())
def test_what_is_remembered_of_a_series_changes_no_header(made, cache_bytes, some):
    syntax, datasets = made
    wanted = frozenset({0x00080005, 0x00080018, 0x00091027, 0x00100010, 0x00280106}) if some else None
    shared = Compiler(cache_bytes=cache_bytes)
    for default_charset in ("", "ISO_IR 126"):
        for data in datasets * 2:
            options = {"total_bytes": len(data), "bulk_uri": f"/{len(data)}", "wanted": wanted}
            options["default_charset"] = default_charset
            try:
                expected = Compiler(cache_bytes=0).header(data, syntax, **options)
            except RefusedError:
                continue
            found = shared.header(data, syntax, **options)
            assert found == expected
            check_header(found)
            if some:
                assert set(found.fragments) <= wanted


@fuzz
@given(st.sampled_from(INSTANCES), st.data())
def test_a_prefix_tells_what_the_whole_tells_or_asks_for_more(data, draw):
    meta = part10.read_file_meta(data)
    whole = data[meta.dataset_offset :]
    prefix = whole[: draw.draw(st.integers(0, len(whole)))]
    for read in (read_identity, Compiler().header):
        options = {"total_bytes": len(whole)} | ({} if read is read_identity else {"bulk_uri": ""})
        try:
            expected = read(whole, meta.transfer_syntax_uid, **options)
        except RefusedError:
            continue
        with suppress(PrefixError):
            assert read(prefix, meta.transfer_syntax_uid, **options) == expected


# --- write, read, equal -------------------------------------------------------------------------------------

_TEXT = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\^="), min_size=1, max_size=12
)
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}
_RANGES = {"H": (0, 2**16 - 1), "h": (-(2**15), 2**15 - 1), "I": (0, 2**32 - 1), "i": (-(2**31), 2**31 - 1)}
_RANGES |= {"Q": (0, 2**53 - 1), "q": (-(2**53) + 1, 2**53 - 1)}


@st.composite
def attribute(draw, items):
    """VR, value to be written, and what the JSON must say."""
    kind = draw(
        st.sampled_from(
            ["text", "number", "binary", "sequence"] if items is not None else ["text", "number", "binary"]
        )
    )
    if kind == "text":
        values = draw(st.lists(_TEXT, max_size=4))
        vr = draw(st.sampled_from(["LO", "SH", "CS", "AE", "UC"]))
        return vr, values, {"vr": vr, "Value": values} if values else {"vr": vr}
    if kind == "binary":
        value = draw(st.binary(max_size=8).map(lambda value: value * 8))
        return "OB", value, value
    if kind == "sequence":
        found = draw(st.lists(items, max_size=3))
        return "SQ", found, {"vr": "SQ", "Value": [one[1] for one in found]} if found else {"vr": "SQ"}
    vr = draw(st.sampled_from(sorted(_NUMBERS)))
    if vr in ("FL", "FD"):
        number = st.floats(allow_nan=False, allow_infinity=False, width=32 if vr == "FL" else 64)
    else:
        number = st.integers(*_RANGES[_NUMBERS[vr]])
    values = draw(st.lists(number, max_size=4))
    return vr, values, {"vr": vr, "Value": values} if values else {"vr": vr}


def attributes(items):
    tags = st.integers(0x00111000, 0x001110FF)
    return st.dictionaries(tags, attribute(items), max_size=6).map(
        lambda found: (found, {f"{tag:08X}": found[tag][2] for tag in sorted(found)})
    )


datasets = st.recursive(attributes(None), attributes, max_leaves=12)


def written(found, order, *, undefined_length):
    """The dataset in explicit VR, sequences and items with or without delimiters."""
    out = []
    for tag, (vr, value, _) in sorted(found.items()):
        if vr == "SQ":
            content = b"".join(
                item(written(one, order, undefined_length=undefined_length), order=order)
                if not undefined_length
                else item(written(one, order, undefined_length=True), length=UNDEFINED, order=order)
                + implicit(0xFFFEE00D, order=order)
                for one, _ in value
            )
            if undefined_length:
                content += implicit(0xFFFEE0DD, order=order)
            out.append(
                explicit(tag, vr, content, length=UNDEFINED if undefined_length else None, order=order)
            )
        elif vr in _NUMBERS:
            out.append(
                explicit(tag, vr, struct.pack(f"{order}{len(value)}{_NUMBERS[vr]}", *value), order=order)
            )
        elif vr == "OB":
            out.append(explicit(tag, vr, value, order=order))
        else:
            out.append(explicit(tag, vr, "\\".join(value), order=order))
    return b"".join(out)


def as_json(expected):
    """*expected* as JSON has it: bytes as base64, numbers as JSON reads them."""
    if isinstance(expected, bytes):
        return {"vr": "OB", "InlineBinary": b64encode(expected).decode()} if expected else {"vr": "OB"}
    if isinstance(expected, dict):
        return {key: as_json(value) for key, value in expected.items()}
    return [as_json(value) for value in expected] if isinstance(expected, list) else expected


@fuzz
@given(datasets, st.booleans())
def test_what_is_written_is_read_in_every_encoding(found, undefined_length):
    attributes_written, expected = found
    for order, syntax in (("<", EXPLICIT_LITTLE), (">", EXPLICIT_BIG), ("<", DEFLATED)):
        first = explicit(0x00080060, "CS", "OT", order=order)
        data = first + written(attributes_written, order, undefined_length=undefined_length)
        data = deflate(data) if syntax == DEFLATED else data
        header = Compiler().header(data, syntax, total_bytes=len(data), bulk_uri="")
        told = orjson.loads(b"{" + b",".join(header.fragments.values()) + b"}")
        del told["00080060"], told["00083002"]
        assert told == as_json(expected)
        assert header.warnings == ()
