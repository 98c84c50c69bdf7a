import pytest

from dicomscp.dicom.multipart import OCTET_STREAM, framed, media_types, part_type


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
