import hashlib
import zlib

import pytest

from dicomscp.dicom.identity import InstanceKey, PrefixError, is_filable, is_regular, read_identity
from dicomscp.errors import RefusedError
from tests.unit.dicom.encoding import (
    CT_CLASS,
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    JPEG_BASELINE,
    SEQUENCE_END,
    UNDEFINED,
    big,
    dataset,
    deflate,
    explicit,
    fragments,
    implicit,
    item,
    open_item,
    uids,
)

KEY = InstanceKey("1", "1.2", "1.2.3")
PIXELS = 0x7FE00010


def identity(data, transfer_syntax_uid=EXPLICIT_LITTLE, **options):
    return read_identity(data, transfer_syntax_uid, **{"total_bytes": len(data), **options})


@pytest.mark.parametrize(
    ("write", "transfer_syntax_uid"),
    [(explicit, EXPLICIT_LITTLE), (big, EXPLICIT_BIG), (implicit, IMPLICIT_LITTLE)],
)
@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_an_identity_is_read_in_every_encoding(write, transfer_syntax_uid, buffer):
    found = identity(buffer(dataset(write=write)), transfer_syntax_uid)

    assert found.key == KEY
    assert found.sop_class_uid == CT_CLASS
    assert found.transfer_syntax_uid == transfer_syntax_uid


def test_an_identity_is_read_from_a_deflated_dataset():
    assert identity(deflate(dataset()), DEFLATED).key == KEY


def test_the_bytes_are_believed_and_not_the_transfer_syntax_they_are_sent_under():
    assert identity(dataset(write=implicit), EXPLICIT_LITTLE).key == KEY
    assert identity(dataset(), IMPLICIT_LITTLE).key == KEY
    assert identity(dataset(write=big), EXPLICIT_LITTLE).key == KEY
    assert identity(dataset(), EXPLICIT_BIG).key == KEY


def test_uids_are_read_without_their_padding_and_only_at_the_top_level():
    inner = dataset(sop_uid="9.9")
    reference = explicit(0x00081140, "SQ", open_item(inner) + SEQUENCE_END, length=UNDEFINED)
    sop, study = uids(sop_uid="1.2.3 ")

    assert identity(sop + reference + study).key == KEY


def test_a_prefix_with_the_headers_is_as_good_as_the_whole():
    whole = dataset(explicit(PIXELS, "OW", bytes(100_000)))

    assert read_identity(whole[:4096], EXPLICIT_LITTLE, total_bytes=len(whole)).key == KEY


def test_a_prefix_that_ends_before_the_last_elements_is_not_enough():
    whole = dataset(explicit(PIXELS, "OW", bytes(100_000)), explicit(0xFFFCFFFC, "OB", b"\0\0"))

    for end in (0, 7, 30, 60, 4096):
        with pytest.raises(PrefixError):
            read_identity(whole[:end], EXPLICIT_LITTLE, total_bytes=len(whole))


def test_encapsulated_pixel_data_cut_by_the_prefix_end_where_the_tail_says():
    pixels = explicit(PIXELS, "OB", fragments(bytes(50_000), bytes(50_000)), length=UNDEFINED)
    whole = dataset(pixels)

    found = read_identity(whole[:4096], JPEG_BASELINE, total_bytes=len(whole), tail=whole[-8:])
    assert found.key == KEY
    with pytest.raises(PrefixError):
        read_identity(whole[:4096], JPEG_BASELINE, total_bytes=len(whole), tail=b"\0" * 8)


def test_the_tail_proves_nothing_for_a_sequence():
    sequence = explicit(0x00081140, "SQ", open_item(bytes(0)) * 1000 + SEQUENCE_END, length=UNDEFINED)
    whole = dataset(sequence)

    with pytest.raises(PrefixError):
        read_identity(whole[:4096], EXPLICIT_LITTLE, total_bytes=len(whole), tail=whole[-8:])


def test_a_dataset_cut_short_anywhere_is_refused():
    sequence = explicit(
        0x00081140, "SQ", open_item(explicit(0x00081150, "UI", "1.2")) + SEQUENCE_END, length=UNDEFINED
    )
    whole = dataset(sequence, explicit(PIXELS, "OW", b"\1" * 64))
    at_elements = {len(dataset()), len(dataset(sequence))}

    for end in set(range(1, len(whole))) - at_elements:
        with pytest.raises(RefusedError):
            identity(whole[:end])


def test_zeros_after_the_last_element_are_padding():
    for count in range(1, 40):
        assert identity(dataset() + bytes(count)).key == KEY


def test_nesting_without_end_is_refused():
    deep = b"".join(
        explicit(0x00081140, "SQ", length=UNDEFINED) + item(length=UNDEFINED) for _ in range(2000)
    )

    with pytest.raises(RefusedError, match="deeper"):
        identity(dataset(deep))


def test_an_element_of_undefined_length_without_items_is_refused():
    with pytest.raises(RefusedError, match="items"):
        identity(dataset(explicit(PIXELS, "OB", bytes(64), length=UNDEFINED)))


def test_un_of_undefined_length_is_walked_as_implicit_vr():
    inner = open_item(implicit(0x00091001, b"AB") + implicit(0x00091002, b"LO\x08\x00AAAA"))
    private = explicit(0x00091010, "UN", inner + SEQUENCE_END, length=UNDEFINED)
    sop, study = uids()

    assert identity(sop + private + study).key == KEY


def test_an_implicit_item_in_an_explicit_dataset_is_walked():
    inner = open_item(implicit(0x00081150, b"1.2\0") + implicit(0x00081155, b"1.22"))
    sop, study = uids()
    sequence = explicit(0x00081140, "SQ", inner + SEQUENCE_END, length=UNDEFINED)

    assert identity(sop + sequence + study).key == KEY


@pytest.mark.parametrize(
    "element",
    [
        explicit(0x00280120, "  ", b"\0\0"),
        explicit(0x00280120, "??", b"\0\0"),
        explicit(0x00280120, "ZZ", b"\0\0"),
        b"\x28\x00\x20\x01ZZ\0\0\x04\0\0\0abcd",
        implicit(0x00280120, b"\0\0"),
    ],
    ids=["blank", "questions", "unknown, 16 bits", "unknown, 32 bits", "none"],
)
def test_an_element_of_no_known_vr_is_walked_over(element):
    sop, study = uids()

    assert identity(sop + element + study + element).key == KEY


@pytest.mark.parametrize("tag", [0x00080016, 0x00080018, 0x0020000D, 0x0020000E])
@pytest.mark.parametrize("uid", ["", " ", "../../etc", "a\\b", "1.2\x07", "1" * 65, "1 2", "1.2.\xe9"])
def test_a_uid_that_cannot_be_filed_is_refused(tag, uid):
    with pytest.raises(RefusedError, match="UID"):
        identity(dataset(explicit(tag, "UI", uid)))


def test_a_dataset_without_uids_is_refused_by_name():
    sop, study = uids()

    with pytest.raises(RefusedError, match="no SOP Class UID"):
        identity(study)
    with pytest.raises(RefusedError, match="no Study Instance UID"):
        identity(sop)
    with pytest.raises(RefusedError):
        identity(b"")


def test_deflated_bytes_that_do_not_inflate_or_are_cut_short_are_refused():
    data = deflate(dataset(explicit(PIXELS, "OW", hashlib.sha512(b"noise").digest() * 8)))

    with pytest.raises(RefusedError, match="inflated"):
        identity(b"\xff" * 64, DEFLATED)
    with pytest.raises(RefusedError, match="cut short"):
        identity(data[:-20], DEFLATED)
    with pytest.raises(RefusedError, match="cut short"):
        identity(deflate(dataset()[:-3]), DEFLATED)
    with pytest.raises(PrefixError):
        identity(data[:100], DEFLATED, total_bytes=len(data))


def test_a_deflated_dataset_may_be_larger_than_the_bound_if_its_uids_are_within():
    data = deflate(dataset(explicit(PIXELS, "OW", bytes(1_000_000))))

    assert identity(data, DEFLATED, max_inflated_bytes=10_000).key == KEY
    sop, study = uids()
    bomb = deflate(sop + explicit(0x00090010, "OB", bytes(1_000_000)) + study)
    with pytest.raises(RefusedError, match="inflates past"):
        identity(bomb, DEFLATED, max_inflated_bytes=10_000)


def test_a_zlib_stream_is_no_deflated_dataset():
    with pytest.raises(RefusedError):
        identity(zlib.compress(dataset()), DEFLATED)


def test_regular_uids_can_name_files_and_filable_ones_can_be_held():
    for uid in ("1", "1.2.840.10008", "0.0", "2.25." + "9" * 59, "01.2"):
        assert is_regular(uid)
        assert is_filable(uid)
    for uid in ("1..2", ".1", "1.", "1.a", "-1", "\u0661", "CON"):
        assert not is_regular(uid)
    for uid in ("1..2", "abc", "1.2-3", "~"):
        assert is_filable(uid)
    for uid in ("", "1" * 65, "..\\1", "a/b", "1 2", "\x7f", "\u0661"):
        assert not is_filable(uid)
        assert not is_regular(uid)
