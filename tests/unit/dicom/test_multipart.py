import pytest

from dicomscp.dicom.multipart import (
    OCTET_STREAM,
    PartData,
    PartEnd,
    PartHead,
    PartReader,
    framed,
    media_types,
    part_type,
)
from dicomscp.errors import RefusedError


def test_a_body_is_framed_as_ohif_reads_it():
    content_type = part_type(OCTET_STREAM, "1.2.840.10008.1.2.1")

    assert b"".join(framed("B", content_type, [[b"ab", b"c"], []])) == (
        b"--B\r\nContent-Type: application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1\r\n\r\nabc\r\n"
        b"--B\r\nContent-Type: application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1\r\n\r\n\r\n"
        b"--B--"
    )


def test_a_part_without_a_transfer_syntax_is_its_media_type_alone():
    assert part_type("application/pdf", "") == "application/pdf"


@pytest.mark.parametrize(
    ("transfer_syntax_uid", "types"),
    [
        ("1.2.840.10008.1.2.1", ()),
        ("1.2.840.10008.1.2.4.90", ("image/jp2",)),
        ("1.2.840.10008.1.2.4.107.1", ("video/mp4",)),
        ("1.2.3", ()),
    ],
)
def test_octets_are_the_most_general_media_type(transfer_syntax_uid, types):
    assert media_types(transfer_syntax_uid) == (OCTET_STREAM, *types)


# Reading (RFC 2046 section 5.1.1)


def parts_of(body, *, boundary="B", size=None):
    """The parts of *body*, fed in blocks of *size*: the fields of each, and its data."""
    reader, parts, ended = PartReader(boundary), [], 0
    for start in range(0, len(body), size or len(body) or 1):
        for event in reader.feed(body[start : start + (size or len(body))]):
            if isinstance(event, PartHead):
                assert len(parts) == ended
                parts.append((event.fields, bytearray()))
            elif isinstance(event, PartData):
                parts[-1][1].extend(event.data)
            else:
                ended += 1
                assert isinstance(event, PartEnd)
                assert len(parts) == ended
    assert list(reader.close()) == []
    return [(fields, bytes(data)) for fields, data in parts]


@pytest.mark.parametrize("size", [None, 1, 2, 3, 5])
@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (b"--B\r\nA: b\r\n\r\nxy\r\n--B--", [({"a": "b"}, b"xy")]),
        (b"\r\n--B\r\nA: b\r\n\r\nxy\r\n--B--\r\n", [({"a": "b"}, b"xy")]),
        (b"preamble\r\n--B\r\n\r\nx\r\n--B--\r\nepilogue --B", [({}, b"x")]),
        (b"--B\r\n\r\nx\r\n--B--\r\n" + b"epilogue\n" * 3000, [({}, b"x")]),
        (b"--B \t\r\n\r\nx\r\n--B\t \r\n\r\ny\r\n--B--", [({}, b"x"), ({}, b"y")]),
        (b"--B\r\n\r\n\r\n--B--", [({}, b"")]),
        (b"--B--", []),
        (b"--B\r\nA : b \r\nA: c\r\nD:\r\n\r\nx\r\n--B--", [({"a": "b", "d": ""}, b"x")]),
        (b"--B\r\nA: b;\r\n\t c=d\r\n\r\nx\r\n--B--", [({"a": "b; c=d"}, b"x")]),
        (b"--B\r\n\r\nx\r\n--BB\r\n--\r\r\n\r\n--B--", [({}, b"x\r\n--BB\r\n--\r\r\n")]),
        (b"--B\r\n\r\nx\r\n--B -\r\n--B--", [({}, b"x\r\n--B -")]),
        (b"--B\r\n\r\n\r\n-\r\n--\r\n--B--", [({}, b"\r\n-\r\n--")]),
    ],
)
def test_parts_are_read_however_the_body_is_cut(body, parts, size):
    assert parts_of(body, size=size) == parts


@pytest.mark.parametrize("size", [None, 1, 100])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "closing boundary"),
        (b"text", "closing boundary"),
        (b"--B\n\nx\n--B--", "closing boundary"),
        (b"--B\r\n\r\nx\r\n--B\r\n", "closing boundary"),
        (b"--B\r\n\r\nx\r\n--B-", "closing boundary"),
        (b"--B\r\nno field\r\n\r\nx\r\n--B--", "header field"),
        (b"--B\r\n: no name\r\n\r\nx\r\n--B--", "header field"),
        (b"--B\r\nA: \0\r\n\r\nx\r\n--B--", "header field"),
        (b"--B\r\nA: " + b"b" * (20 << 10) + b"\r\n\r\nx\r\n--B--", "longer than"),
        (b"--B\r\n" + b"A: b\r\n" * (4 << 10) + b"\r\nx\r\n--B--", "longer than"),
        (b"x" * (80 << 10) + b"\r\n--B\r\n\r\nx\r\n--B--", "does not begin"),
    ],
)
def test_what_is_no_multipart_body_is_refused(body, said, size):
    with pytest.raises(RefusedError, match=said):
        parts_of(body, size=size)


@pytest.mark.parametrize("boundary", ["", "b" * 201, "a\r\nb", "a ", "ä"])
def test_what_cannot_be_a_boundary_is_refused(boundary):
    with pytest.raises(RefusedError, match="boundary"):
        PartReader(boundary)
