import mmap
import os
import struct
import warnings
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.encaps import encapsulate_extended, generate_frames

from dicomscp.dicom.bulk import bulk_value, frame_bytes, frame_table, inflated, read_frame
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.errors import RefusedError
from tests.unit.dicom.encoding import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    JPEG_BASELINE,
    SEQUENCE_END,
    UNDEFINED,
    big,
    deflate,
    explicit,
    fragments,
    implicit,
    item,
    open_item,
)

PIXELS = 0x7FE00010
H264 = "1.2.840.10008.1.2.4.102"
RLE = "1.2.840.10008.1.2.5"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
JPEG = b"\xff\xd8\xff\xe0"


def image(
    pixels, *, frames=1, rows=2, columns=3, bits=8, samples=1, photometric="MONOCHROME2", write=explicit
):
    """An image without UIDs; *pixels* is the encoded element."""
    order = ">" if write is big else "<"

    def number(tag, value):
        encoded = struct.pack(order + "H", value)
        return write(tag, encoded) if write is implicit else write(tag, "US", encoded)

    def text(tag, vr, value):
        return write(tag, value) if write is implicit else write(tag, vr, value)

    return (
        number(0x00280002, samples)
        + text(0x00280004, "CS", photometric)
        + (text(0x00280008, "IS", str(frames)) if frames is not None else b"")
        + number(0x00280010, rows)
        + number(0x00280011, columns)
        + number(0x00280100, bits)
        + pixels
    )


def encapsulated(*parts, table=b"", frames, before=b""):
    return image(
        before + explicit(PIXELS, "OB", fragments(*parts, table=table), length=UNDEFINED), frames=frames
    )


def read(data, number, transfer_syntax_uid=EXPLICIT_LITTLE):
    data, transfer_syntax_uid = inflated(data, transfer_syntax_uid)
    return read_frame(data, frame_table(data, transfer_syntax_uid), number)


def frame(data, number, transfer_syntax_uid=EXPLICIT_LITTLE):
    return b"".join(read(data, number, transfer_syntax_uid).data)


def number_of_frames(data, transfer_syntax_uid):
    return frame_table(*inflated(data, transfer_syntax_uid)).frames


def frames(data, transfer_syntax_uid=EXPLICIT_LITTLE):
    """All frames, by one table."""
    data, transfer_syntax_uid = inflated(data, transfer_syntax_uid)
    table = frame_table(data, transfer_syntax_uid)
    found = []
    for number in range(1, table.frames + 1):
        try:
            size = frame_bytes(data, table, number)
        except RefusedError:
            size = -1
        found.append(b"".join(read_frame(data, table, number).data))
        assert len(found[-1]) == size
    return found


# --- native frames ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "transfer_syntax_uid", "pixels"),
    [
        (explicit, EXPLICIT_LITTLE, explicit(PIXELS, "OB", bytes(range(18)))),
        (implicit, IMPLICIT_LITTLE, implicit(PIXELS, bytes(range(18)))),
    ],
)
def test_native_frames_are_slices_of_the_buffer(write, transfer_syntax_uid, pixels):
    data = memoryview(image(pixels, frames=3, write=write))
    found = read(data, 2, transfer_syntax_uid)

    assert found.transfer_syntax_uid == EXPLICIT_LITTLE
    assert b"".join(found.data) == bytes(range(6, 12))
    assert all(isinstance(piece, memoryview) and piece.obj is data.obj for piece in found.data)
    assert number_of_frames(data, transfer_syntax_uid) == 3


def test_a_frame_is_read_out_of_a_mapped_file():
    data = image(explicit(PIXELS, "OB", bytes(range(12))), frames=2)
    with mmap.mmap(-1, len(data)) as mapped:
        mapped[:] = data
        found = read(mapped, 2, EXPLICIT_LITTLE)
        assert b"".join(found.data) == bytes(range(6, 12))
        for piece in found.data:
            piece.release()


@pytest.mark.parametrize(("bits", "typecode", "vr"), [(16, "H", "OW"), (32, "I", "OW"), (64, "Q", "OW")])
def test_big_endian_words_are_turned_round(bits, typecode, vr):
    values = list(range(1, 13))
    stored = struct.pack(f">12{typecode}", *values)
    data = image(big(PIXELS, vr, stored), frames=2, bits=bits, write=big)

    assert frames(data, EXPLICIT_BIG) == [
        struct.pack(f"<6{typecode}", *values[:6]),
        struct.pack(f"<6{typecode}", *values[6:]),
    ]
    assert read(data, 1, EXPLICIT_BIG).transfer_syntax_uid == EXPLICIT_LITTLE


def test_big_endian_bytes_in_words_are_turned_round_even_where_a_frame_begins_inside_a_word():
    # 3 frames of 3 bytes in OW: the words of the value are turned, not those of the frame.
    stored = bytes([2, 1, 4, 3, 6, 5, 8, 7, 0, 9])
    data = image(big(PIXELS, "OW", stored), frames=3, rows=1, write=big)

    assert frames(data, EXPLICIT_BIG) == [b"\1\2\3", b"\4\5\6", b"\7\x08\x09"]


def test_big_endian_bytes_stay_as_they_are():
    data = image(big(PIXELS, "OB", bytes(range(6))), write=big)

    assert frames(data, EXPLICIT_BIG) == [bytes(range(6))]


@pytest.mark.parametrize(
    ("tag", "vr", "typecode", "bits"), [(0x7FE00008, "OF", "f", 32), (0x7FE00009, "OD", "d", 64)]
)
def test_float_pixel_data_have_frames_too(tag, vr, typecode, bits):
    values = [0.5 * number for number in range(12)]
    little = image(explicit(tag, vr, struct.pack(f"<12{typecode}", *values)), frames=2, bits=bits)
    large = image(big(tag, vr, struct.pack(f">12{typecode}", *values)), frames=2, bits=bits, write=big)
    expected = [struct.pack(f"<6{typecode}", *values[:6]), struct.pack(f"<6{typecode}", *values[6:])]

    assert frames(little) == frames(large, EXPLICIT_BIG) == expected


def test_colours_shared_by_two_pixels_make_a_frame_smaller():
    pixels = explicit(PIXELS, "OB", bytes(range(16)))
    data = image(pixels, frames=2, rows=2, columns=2, samples=3, photometric="YBR_FULL_422")

    assert frames(data) == [bytes(range(8)), bytes(range(8, 16))]


def test_colours_said_to_be_shared_may_be_there_in_full():
    pixels = explicit(PIXELS, "OB", bytes(range(24)))
    data = image(pixels, frames=2, rows=2, columns=2, samples=3, photometric="YBR_FULL_422")

    assert frames(data) == [bytes(range(12)), bytes(range(12, 24))]


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 3), (5, 7), (4, 4), (1, 1)])
@pytest.mark.parametrize("write", [explicit, big])
def test_frames_of_single_bits_begin_at_a_byte(rows, columns, write):
    count = 5
    pixels = np.random.default_rng(7).integers(0, 2, (count, rows * columns), dtype=np.uint8)
    stored = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    stored += b"\0" * (len(stored) % 2)
    if write is big:
        stored = b"".join(stored[at : at + 2][::-1] for at in range(0, len(stored), 2))
    element = write(PIXELS, "OW", stored)
    data = image(element, frames=count, rows=rows, columns=columns, bits=1, write=write)

    expected = [np.packbits(one_frame, bitorder="little").tobytes() for one_frame in pixels]
    assert frames(data, EXPLICIT_BIG if write is big else EXPLICIT_LITTLE) == expected


def test_a_deflated_frame_is_inflated():
    data = deflate(image(explicit(PIXELS, "OB", bytes(range(12))), frames=2))

    assert frames(data, DEFLATED) == [bytes(range(6)), bytes(range(6, 12))]
    assert read(data, 1, DEFLATED).transfer_syntax_uid == EXPLICIT_LITTLE


@pytest.mark.parametrize("told", [None, "", "0", "-3", "many", "1A"])
@pytest.mark.parametrize(("size", "count"), [(6, 1), (7, 1), (12, 2), (17, 2), (5, 0)])
def test_if_number_of_frames_is_absent_or_nonsense_the_frames_that_are_there_count(told, size, count):
    data = image(explicit(PIXELS, "OB", bytes(range(size))), frames=told)

    assert frames(data) == [bytes(range(6 * at, 6 * at + 6)) for at in range(count)]
    with pytest.raises(RefusedError, match=r"no frame|end before"):
        frame(data, count + 1)


def test_of_fewer_frames_told_than_there_are_those_told_of_count():
    assert frames(image(explicit(PIXELS, "OB", bytes(range(18))), frames=2)) == [
        bytes(range(6)),
        bytes(range(6, 12)),
    ]


def test_one_frame_without_a_size_is_the_whole_value():
    assert frames(explicit(PIXELS, "OB", b"abcd")) == [b"abcd"]


@pytest.mark.parametrize("number", [-1, 0, 3, 10**9])
def test_a_frame_that_is_not_there_is_refused(number):
    with pytest.raises(RefusedError, match="no frame"):
        frame(image(explicit(PIXELS, "OB", bytes(12)), frames=2), number)


def test_frames_past_the_end_of_the_pixel_data_are_refused():
    data = image(explicit(PIXELS, "OB", bytes(12)), frames=1000)

    assert frame(data, 2) == bytes(6)
    assert number_of_frames(data, EXPLICIT_LITTLE) == 2
    for number in (3, 1000):
        with pytest.raises(
            RefusedError, match=f"tells of 1000 frames, .* hold 2, and end before frame {number}"
        ):
            frame(data, number)
    with pytest.raises(RefusedError, match="no frame 1001"):
        frame(data, 1001)


@pytest.mark.parametrize("declared", [12, 13, 18])
def test_of_truncated_pixel_data_the_whole_frames_can_be_had(declared):
    data = image(explicit(PIXELS, "OB", bytes(range(11)), length=declared), frames=2)

    assert frames(data) == [bytes(range(6))]
    with pytest.raises(RefusedError, match="end before frame 2"):
        frame(data, 2)


def test_a_word_that_is_cut_is_not_turned_round():
    stored = bytes([2, 1, 4, 3, 6])  # the last word, of which byte 5 comes first, is cut
    data = image(big(PIXELS, "OW", stored, length=10), frames=2, rows=1, columns=5, write=big)

    assert frames(data, EXPLICIT_BIG) == []
    data = image(big(PIXELS, "OW", stored, length=10), frames=2, rows=1, columns=4, write=big)
    assert frames(data, EXPLICIT_BIG) == [b"\1\2\3\4"]


def test_an_odd_last_byte_belongs_to_the_frame():
    data = image(explicit(PIXELS, "OB", bytes(range(15))), frames=5, rows=1)

    assert frames(data) == [bytes(range(3 * at, 3 * at + 3)) for at in range(5)]


def test_frames_of_twelve_bits_a_pixel_begin_at_a_byte():
    pixels = [[0x123, 0x456, 0x789], [0xABC, 0xDEF, 0x012]]
    stream = sum(value << 12 * at for at, value in enumerate([*pixels[0], *pixels[1]])).to_bytes(10, "little")
    data = image(explicit(PIXELS, "OW", stream), frames=2, rows=1, bits=12)

    assert frames(data) == [
        sum(value << 12 * at for at, value in enumerate(row)).to_bytes(5, "little") for row in pixels
    ]


def test_the_size_of_several_frames_must_be_told():
    data = explicit(0x00280008, "IS", "2") + explicit(PIXELS, "OB", b"abcd")

    assert number_of_frames(data, EXPLICIT_LITTLE) == 0
    with pytest.raises(RefusedError, match="tells of 2 frames"):
        frame(data, 1)


def test_ge_has_its_pixels_alone_in_big_endian_order():
    stored = struct.pack(">6H", *range(6))
    data = image(implicit(PIXELS, stored), bits=16, write=implicit)

    assert frames(data, "1.2.840.113619.5.2") == [struct.pack("<6H", *range(6))]
    assert value(data, "7FE00010", "1.2.840.113619.5.2") == ("OW", struct.pack("<6H", *range(6)))


def test_without_pixel_data_there_are_no_frames():
    for data in (image(b""), image(explicit(PIXELS, "OB")), b"", b"garbage" * 9):
        assert number_of_frames(data, EXPLICIT_LITTLE) == 0
        with pytest.raises(RefusedError):
            frame(data, 1)


# --- encapsulated frames ------------------------------------------------------------------------------------


def test_one_frame_is_all_fragments():
    data = encapsulated(b"abcd", b"ef", b"gh", frames=1)

    assert frames(data, JPEG_BASELINE) == [b"abcdefgh"]
    assert read(data, 1, JPEG_BASELINE).transfer_syntax_uid == JPEG_BASELINE


def test_one_fragment_a_frame_needs_no_table():
    assert frames(encapsulated(b"ab", b"cdef", b"gh", frames=3), RLE) == [b"ab", b"cdef", b"gh"]


def test_the_basic_offset_table_says_which_fragments_make_a_frame():
    table = struct.pack("<3L", 0, 10, 10 + 12 + 10)
    data = encapsulated(b"ab", b"cdef", b"gh", b"ij", b"kl", table=table, frames=3)

    assert frames(data, JPEG_BASELINE) == [b"ab", b"cdefgh", b"ijkl"]


@pytest.mark.parametrize(
    "table", [struct.pack("<2L", 0, 3), struct.pack("<2L", 10**6, 10**9), struct.pack("<L", 0), b"x"]
)
def test_a_basic_offset_table_that_points_at_nothing_is_passed_over(table):
    assert frames(encapsulated(b"ab", b"cd", table=table, frames=2), JPEG_BASELINE) == [b"ab", b"cd"]


def test_the_extended_offset_table_gives_the_exact_length():
    offsets = explicit(0x7FE00001, "OV", struct.pack("<2Q", 0, 12))
    lengths = explicit(0x7FE00002, "OV", struct.pack("<2Q", 3, 2))
    data = encapsulated(b"abc\0", b"de", frames=2, before=offsets + lengths)

    assert frames(data, JPEG_BASELINE) == [b"abc", b"de"]


@pytest.mark.parametrize(
    ("offsets", "lengths"), [((0, 5), (4, 2)), ((0, 12), (99, 99)), ((2**63, 2**64 - 1), (1, 1))]
)
def test_an_extended_offset_table_that_points_at_nothing_is_passed_over(offsets, lengths):
    tables = explicit(0x7FE00001, "OV", struct.pack("<2Q", *offsets)) + explicit(
        0x7FE00002, "OV", struct.pack("<2Q", *lengths)
    )

    assert frames(encapsulated(b"abcd", b"ef", frames=2, before=tables), JPEG_BASELINE) == [b"abcd", b"ef"]


@pytest.mark.parametrize("start", [b"\xff\xd8\xff\xe0", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "])
def test_without_a_table_a_frame_begins_where_a_codestream_does(start):
    data = encapsulated(start + b"a1", b"a2", start + b"b1", start + b"c1", b"c2", b"c3", frames=3)

    assert frames(data, JPEG_BASELINE) == [start + b"a1a2", start + b"b1", start + b"c1c2c3"]


def test_jpeg_xl_has_a_start_of_its_own():
    data = encapsulated(b"\xff\x0aa1", b"a2", b"\xff\x0ab1", frames=2)

    assert frames(data, "1.2.840.10008.1.2.4.110") == [b"\xff\x0aa1a2", b"\xff\x0ab1"]
    with pytest.raises(RefusedError, match="cannot be told"):
        frame(data, 1, JPEG_BASELINE)


def test_fragments_that_cannot_be_told_apart_are_refused():
    data = encapsulated(b"a1", b"a2", b"b1", frames=2)

    with pytest.raises(RefusedError, match="cannot be told"):
        frame(data, 1, RLE)


def test_a_video_is_one_frame():
    data = encapsulated(b"abcd", b"ef", frames=300)

    assert frames(data, H264) == frames(data, H264 + ".1") == [b"abcdef"]


def test_pixel_data_without_a_delimiter_at_their_end_have_their_frames():
    data = encapsulated(b"abcd", b"ef", frames=2)[: -len(SEQUENCE_END)]

    assert frames(data, JPEG_BASELINE) == [b"abcd", b"ef"]
    assert frames(encapsulated(b"abcd", b"ef", frames=1)[: -len(SEQUENCE_END)], RLE) == [b"abcdef"]


@pytest.mark.parametrize("table", [b"", struct.pack("<3L", 0, 14, 28)])
@pytest.mark.parametrize(
    ("cut", "there"), [(0, 3), (1, 2), (6, 2), (7, 2), (13, 2), (14, 2), (15, 1), (28, 1), (29, 0), (42, 0)]
)
def test_of_truncated_encapsulated_pixel_data_the_whole_frames_can_be_had(table, cut, there):
    parts = [JPEG + b"a1", JPEG + b"b1", JPEG + b"c1"]
    data = encapsulated(*parts, table=table, frames=3)[: -len(SEQUENCE_END)]
    data = data[: len(data) - cut]
    found = frame_table(data, JPEG_BASELINE)

    for number in range(1, there + 1):
        assert b"".join(read_frame(data, found, number).data) == parts[number - 1]
    for number in range(there + 1, 4):
        with pytest.raises(RefusedError, match=f"end before frame {number} does"):
            read_frame(data, found, number)


def test_a_single_frame_cut_short_is_refused():
    with pytest.raises(RefusedError, match="end before frame 1"):
        frame(encapsulated(b"abcd", b"efgh", frames=1)[: -len(SEQUENCE_END) - 1], 1, JPEG_BASELINE)


@pytest.mark.parametrize("content", [item(), item(b"\0\0\0\0"), b"", b"garbage!", SEQUENCE_END])
def test_pixel_data_without_fragments_hold_no_frames(content):
    for ending in (SEQUENCE_END, b""):
        data = image(explicit(PIXELS, "OB", content + ending, length=UNDEFINED), frames=1)

        assert number_of_frames(data, JPEG_BASELINE) == 0
        with pytest.raises(RefusedError, match="hold 0"):
            frame(data, 1, JPEG_BASELINE)
        with pytest.raises(RefusedError, match="no such bulk data"):
            bulk_value(data, JPEG_BASELINE, "7FE00010")


def test_items_of_a_defined_length_are_frames_too():
    content = fragments(b"ab", b"cd")[: -len(SEQUENCE_END)]
    data = image(explicit(PIXELS, "OB", content), frames=2)

    assert frames(data, RLE) == [b"ab", b"cd"]
    assert [b"".join(part) for part in bulk_value(data, RLE, "7FE00010").parts()] == [b"ab", b"cd"]


def test_native_pixels_in_a_compressed_transfer_syntax_are_native_frames():
    data = image(explicit(PIXELS, "OB", bytes(range(12))), frames=2)

    assert frames(data, JPEG_BASELINE) == [bytes(range(6)), bytes(range(6, 12))]
    assert read(data, 1, JPEG_BASELINE).transfer_syntax_uid == EXPLICIT_LITTLE


def test_a_codestream_outside_of_items_is_one_frame():
    data = image(explicit(PIXELS, "OB", JPEG + b"abcdefgh"), frames=1)

    assert frames(data, JPEG_BASELINE) == [JPEG + b"abcdefgh"]
    assert read(data, 1, JPEG_BASELINE).transfer_syntax_uid == JPEG_BASELINE


def test_frames_may_have_unequal_numbers_of_fragments():
    table = struct.pack("<3L", 0, 40, 50)
    data = encapsulated(b"a1", b"a2", b"a3", b"a4", b"b1", b"c1", b"c2", table=table, frames=3)

    assert frames(data, RLE) == [b"a1a2a3a4", b"b1", b"c1c2"]


@pytest.mark.parametrize(
    "offsets",
    [(0, 10, 19), (0, 10, 21), (0, 10, 10), (0, 0, 0), (10, 20, 30), (0, 10, 2**32 - 8)],
)
def test_a_basic_offset_table_with_a_wrong_entry_does_no_harm(offsets):
    data = encapsulated(b"ab", b"cd", b"ef", table=struct.pack("<3L", *offsets), frames=3)

    assert frames(data, RLE) == [b"ab", b"cd", b"ef"]


def test_a_wrong_entry_harms_those_frames_alone_that_nothing_else_shows():
    table = struct.pack("<4L", 0, 20, 33, 60)
    data = encapsulated(*(b"%d" % number for number in range(10, 18)), table=table, frames=4)

    assert frame(data, 1, RLE) == b"1011"
    assert frame(data, 4, RLE) == b"1617"
    for number in (2, 3):
        with pytest.raises(RefusedError, match="cannot be told"):
            frame(data, number, RLE)


def test_a_table_that_is_too_short_still_shows_the_frames_that_it_points_at():
    data = encapsulated(b"a1", b"a2", b"b1", b"b2", table=struct.pack("<2L", 0, 20), frames=3)

    assert frames(data, RLE) == [b"a1a2", b"b1b2"]
    with pytest.raises(RefusedError, match=r"tells of 3 frames, .* hold 2"):
        frame(data, 3, RLE)


def test_the_basic_offset_table_may_have_been_left_out():
    data = image(
        explicit(PIXELS, "OB", item(JPEG + b"a") + item(JPEG + b"b") + SEQUENCE_END, length=UNDEFINED)
    )

    assert frames(data, JPEG_BASELINE) == [JPEG + b"a" + JPEG + b"b"]


@pytest.mark.parametrize("told", [None, "0", "many"])
def test_without_a_number_of_frames_each_codestream_is_one(told):
    parts = [JPEG + b"a1", b"a2", JPEG + b"b1"]
    # Writers that give each fragment an entry are not believed: the standard takes an absent number for 1.
    table = struct.pack("<3L", 0, 14, 24)

    assert frames(encapsulated(*parts, frames=told), JPEG_BASELINE) == [JPEG + b"a1a2", JPEG + b"b1"]
    assert frames(encapsulated(*parts[:2], table=table[:8], frames=told), JPEG_BASELINE) == [JPEG + b"a1a2"]
    assert frames(encapsulated(b"a1", b"a2", frames=told), JPEG_BASELINE) == [b"a1a2"]


def test_more_frames_told_than_there_are():
    parts = [JPEG + b"a1", b"a2", JPEG + b"b1"]

    assert frames(encapsulated(*parts, frames=5), JPEG_BASELINE) == [JPEG + b"a1a2", JPEG + b"b1"]
    assert frames(encapsulated(b"a", b"b", frames=2**31), RLE) == [b"a", b"b"]
    with pytest.raises(RefusedError, match=r"tells of 5 frames, .* hold 2, and end before frame 4"):
        frame(encapsulated(*parts, frames=5), 4, JPEG_BASELINE)


def test_of_more_codestreams_than_frames_told_the_first_ones_count():
    parts = [JPEG + b"a1", b"a2", JPEG + b"b1", JPEG + b"c1"]

    assert frames(encapsulated(*parts, frames=2), JPEG_BASELINE) == [JPEG + b"a1a2", JPEG + b"b1"]


def test_an_rle_header_begins_a_frame():
    one, two = (struct.pack("<16L", 2, 64, 70, *[0] * 13) + name * 6 for name in (b"a", b"b"))

    assert frames(encapsulated(one, b"a2", two, frames=2), RLE) == [one + b"a2", two]


def test_one_frame_may_be_in_many_fragments():
    parts = [bytes([number % 256]) * 2 for number in range(1000)]

    assert frames(encapsulated(*parts, frames=1), JPEG_BASELINE) == [b"".join(parts)]


@pytest.mark.parametrize("lengths", [(3, 2), (4, 3), (99, 0)])
def test_an_extended_offset_table_is_believed_as_far_as_its_lengths_can_be(lengths):
    tables = explicit(0x7FE00001, "OV", struct.pack("<2Q", 0, 12)) + explicit(
        0x7FE00002, "OV", struct.pack("<2Q", *lengths)
    )
    expected = [
        b"abcd"[: lengths[0] if lengths[0] < 5 else 4],
        b"efgh"[: lengths[1] if lengths[1] > 2 else 4],
    ]

    assert frames(encapsulated(b"abcd", b"efgh", frames=2, before=tables), JPEG_BASELINE) == expected


def test_an_extended_offset_table_alone_shows_frames_of_several_fragments():
    tables = explicit(0x7FE00001, "OV", struct.pack("<2Q", 0, 20))

    assert frames(encapsulated(b"a1", b"a2", b"b1", frames=2, before=tables), RLE) == [b"a1a2", b"b1"]


@pytest.mark.parametrize("offsets", [(0, 0, 0), (0, 12, 12), (0, 12, 20)])
def test_no_frame_is_where_another_is(offsets):
    inner = item(b"in")  # an item in the data of another
    parts = [b"abcd", inner + b"..", b"efgh"]
    tables = explicit(0x7FE00001, "OV", struct.pack("<3Q", *offsets)) + explicit(
        0x7FE00002, "OV", struct.pack("<3Q", 4, 12 if offsets[2] == 12 else 4, 2 if offsets[2] == 20 else 4)
    )

    found = frames(encapsulated(*parts, frames=3, before=tables), RLE)
    assert found[:2] == parts[:2]
    assert sum(map(len, found)) <= sum(map(len, parts))


def test_one_frame_ends_where_its_length_says():
    tables = explicit(0x7FE00001, "OV", struct.pack("<Q", 0)) + explicit(
        0x7FE00002, "OV", struct.pack("<Q", 3)
    )

    assert frames(encapsulated(b"abc\0", frames=1, before=tables), JPEG_BASELINE) == [b"abc"]


def test_encapsulated_uncompressed_frames_are_native_ones():
    uncompressed = "1.2.840.10008.1.2.1.98"
    data = encapsulated(b"abcdef", b"ghijkl", frames=2)

    assert frames(data, uncompressed) == [b"abcdef", b"ghijkl"]
    assert read(data, 1, uncompressed).transfer_syntax_uid == EXPLICIT_LITTLE


def test_a_deflated_frame_is_sent_as_it_lies():
    one, two = (deflate(bytes([number]) * 32) for number in range(2))
    data = encapsulated(one, two + b"\0" * (len(two) % 2), frames=2)

    assert frames(data, DEFLATED_FRAMES) == [one, two + b"\0" * (len(two) % 2)]
    assert read(data, 1, DEFLATED_FRAMES).transfer_syntax_uid == DEFLATED_FRAMES


# Data that cannot be taken for the beginning of a codestream or an item.
fragment = (
    st.integers(0, 5).flatmap(lambda size: st.binary(min_size=2 * size, max_size=2 * size)).map(b"..".__add__)
)


@given(
    st.lists(st.lists(fragment, min_size=1, max_size=4), min_size=1, max_size=6),
    st.sampled_from(["basic", "extended", "none"]),
)
def test_frames_are_what_was_put_in(parts, kind):
    if kind == "none":
        parts = [[b"".join(one)] for one in parts]
    flat = [piece for one in parts for piece in one]
    sizes = [sum(8 + len(piece) for piece in one) for one in parts]
    offsets = [sum(sizes[:at]) for at in range(len(parts))]
    table = struct.pack(f"<{len(parts)}L", *offsets) if kind == "basic" else b""
    before = (
        explicit(0x7FE00001, "OV", struct.pack(f"<{len(parts)}Q", *offsets)) if kind == "extended" else b""
    )
    data = encapsulated(*flat, table=table, frames=len(parts), before=before)

    assert frames(data, RLE) == [b"".join(one) for one in parts]


@given(st.lists(fragment, min_size=1, max_size=6), st.booleans(), st.integers(0, 120))
def test_wherever_a_file_is_cut_the_frames_that_can_be_had_are_right(parts, with_table, cut):
    offsets = [sum(8 + len(one) for one in parts[:at]) for at in range(len(parts))]
    table = struct.pack(f"<{len(parts)}L", *offsets) if with_table else b""
    data = encapsulated(*parts, table=table, frames=len(parts))
    data = data[: max(0, len(data) - cut)]
    found = frame_table(data, RLE)

    had = {}
    for number in range(1, len(parts) + 1):
        with suppress(RefusedError):
            had[number] = b"".join(read_frame(data, found, number).data)
    assert had == dict(enumerate(parts[: len(had)], 1))
    whole = sum(
        offset + 8 + len(one) + cut <= sum(8 + len(one) for one in parts) + 8
        for offset, one in zip(offsets, parts, strict=True)
    )
    assert len(had) == whole


def test_frames_of_a_deflated_dataset_are_sought_once_it_is_inflated():
    with pytest.raises(RefusedError, match="once it is inflated"):
        frame_table(deflate(image(explicit(PIXELS, "OB", bytes(6)))), DEFLATED)


# --- bounded work -------------------------------------------------------------------------------------------

WIDE, MANY = 100_000, 100_000  # bytes a frame, frames


@pytest.fixture
def mapped(tmp_path):
    """A file of these pieces, each at its position, mapped; what lies between is a hole."""
    path = tmp_path / "sparse"

    def mapped(pieces, size):
        with path.open("wb") as file:
            for position, piece in pieces:
                file.seek(position)
                file.write(piece)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
            # What was just written would be mapped along with what is read beside it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapping.madvise(mmap.MADV_RANDOM)  # so that only what is read counts
        return mapping

    def pages_read():
        """How many pages of the mapping this process has looked at."""
        lines = Path("/proc/self/smaps").read_text().splitlines()
        (at,) = [at for at, line in enumerate(lines) if line.endswith(str(path))]
        (rss,) = [line for line in lines[at : at + 12] if line.startswith("Rss:")]
        return int(rss.split()[1]) * 1024 // mmap.PAGESIZE

    mapped.pages_read = pages_read
    return mapped


def probed(mapped, start, places, size, transfer_syntax_uid):
    """A table of a large file, and how many pages it and a frame of it took; *places* are whole frames."""
    pieces = [(position, item(b"%08d" % number, length=WIDE)) for number, position in places.items()]
    data = mapped([(0, start), *pieces], size)
    pages = [mapped.pages_read()]
    table = frame_table(data, transfer_syntax_uid)
    pages.append(mapped.pages_read())
    for number in places:
        found = read_frame(data, table, number)
        assert [bytes(piece[:8]) for piece in found.data] == [b"%08d" % number]
        assert len(found.data[0]) == WIDE
        pages.append(mapped.pages_read())
    return table, [after - before for before, after in pairwise(pages)]


@pytest.mark.parametrize("extended", [False, True])
def test_a_frame_by_table_costs_a_few_pages_of_ten_gigabytes(mapped, extended):
    wide, many = WIDE + 8, MANY if extended else 40_000  # 32-bit offsets end at 4 GiB
    offsets = [wide * at for at in range(many)]
    before = b""
    if extended:
        before = explicit(0x7FE00001, "OV", struct.pack(f"<{many}Q", *offsets)) + explicit(
            0x7FE00002, "OV", struct.pack(f"<{many}Q", *[WIDE] * many)
        )
    basic = item(b"" if extended else struct.pack(f"<{many}L", *offsets))
    start = image(before + explicit(PIXELS, "OB", basic, length=UNDEFINED), frames=many)
    places = {number: len(start) + wide * (number - 1) for number in (1, 2, many // 2, many)}

    table, (making, *reading) = probed(mapped, start, places, len(start) + wide * many, JPEG_BASELINE)

    assert (table.frames, table.size_bytes) == (many, 0)
    # The header; then an item's header and an entry in each table, and what the kernel maps beside them.
    assert making < 32
    assert max(reading) < 32


def test_a_native_frame_costs_nothing_but_itself(mapped):
    size = 1000 * 1000 * MANY // 1000
    start = image(explicit(PIXELS, "OW", b"", length=size), frames=1000, rows=1000, columns=100)
    data = mapped([(0, start)], len(start) + size)
    table = frame_table(data, EXPLICIT_LITTLE)
    before = mapped.pages_read()

    assert len(read_frame(data, table, 999).data[0]) == 100_000
    assert before < 32
    assert mapped.pages_read() == before


def test_a_bulk_value_before_pixel_data_does_not_cost_a_walk_over_the_fragments(mapped):
    icc = explicit(0x00282000, "OB", b"profile!")
    # The first fragment is followed by a hole, which is no item: a walk would fail there.
    start = icc + image(explicit(PIXELS, "OB", item() + item(b"ab"), length=UNDEFINED), frames=9)
    data = mapped([(0, start)], len(start) + 10**9)

    assert value(data, "00282000") == ("OB", b"profile!")


def test_what_stands_behind_encapsulated_pixel_data_is_found():
    padding = explicit(0xFFFCFFFC, "OB", b"padding!")

    assert value(encapsulated(b"ab", b"cd", frames=2) + padding, "FFFCFFFC", RLE) == ("OB", b"padding!")


def test_frames_are_scanned_for_once():
    data = bytearray(encapsulated(*(struct.pack("<L", number) for number in range(MANY)), frames=MANY))
    table = frame_table(data, RLE)
    first = data.index(item(struct.pack("<L", 0)))
    data[first : first + 12] = bytes(12)  # so that another scan would end here

    assert (table.frames, table.size_bytes) == (MANY, 8 * (MANY + 1))
    for number in (2, MANY // 2, MANY):
        assert read_frame(data, table, number).data == [struct.pack("<L", number - 1)]


def test_a_table_found_wrong_is_scanned_for_once():
    parts = [struct.pack("<L", number) for number in range(100)]
    data = bytearray(encapsulated(*parts, table=struct.pack("<100L", *range(1, 101)), frames=100))
    table = frame_table(data, RLE)
    assert table.size_bytes == 0
    assert read_frame(data, table, 3).data == [parts[2]]
    first = data.index(item(parts[0]) + item(parts[1]))
    data[first : first + 12] = bytes(12)

    assert read_frame(data, table, 100).data == [parts[99]]
    assert table.size_bytes == 8 * 101


# --- bulk values --------------------------------------------------------------------------------------------


def value(data, path, transfer_syntax_uid=EXPLICIT_LITTLE):
    found = bulk_value(data, transfer_syntax_uid, path)
    return found.vr, b"".join(found.data)


def test_a_bulk_value_is_a_slice_of_the_buffer():
    data = explicit(0x00420011, "OB", b"%PDF")
    found = bulk_value(data, EXPLICIT_LITTLE, "00420011")

    assert (found.vr, bytes(found.data[0])) == ("OB", b"%PDF")
    assert found.data[0].obj is data


@pytest.mark.parametrize(
    ("vr", "word"), [("OB", 1), ("OW", 2), ("OF", 4), ("OL", 4), ("OD", 8), ("OV", 8), ("US", 2), ("FD", 8)]
)
def test_big_endian_bulk_values_are_turned_round(vr, word):
    stored = bytes(range(16))
    expected = b"".join(stored[at : at + word][::-1] for at in range(0, 16, word))

    assert value(big(0x00420011, vr, stored), "00420011", EXPLICIT_BIG) == (vr, expected)


def test_big_endian_pixel_data_are_turned_by_the_pixel_cell():
    data = image(big(PIXELS, "OW", bytes(range(24))), bits=32, write=big)
    expected = b"".join(bytes(range(24))[at : at + 4][::-1] for at in range(0, 24, 4))

    assert value(data, "7FE00010", EXPLICIT_BIG) == ("OW", expected)


@pytest.mark.parametrize("wrap", [item, open_item])
@pytest.mark.parametrize("undefined_length", [False, True])
def test_a_path_leads_into_items(wrap, undefined_length):
    def sequence(tag, *items):
        content = b"".join(items)
        if undefined_length:
            return explicit(tag, "SQ", content + SEQUENCE_END, length=UNDEFINED)
        return explicit(tag, "SQ", content)

    waveform = [explicit(0x54001010, "OW", text) for text in (b"aa", b"bb", b"cc")]
    inner = sequence(0x54000100, wrap(waveform[1]), wrap(waveform[2]))
    data = sequence(0x54000100, wrap(waveform[0]), wrap(), wrap(inner)) + explicit(0x7FE00010, "OB", b"pp")

    assert value(data, "54000100/1/54001010") == ("OW", b"aa")
    assert value(data, "54000100/3/54000100/1/54001010") == ("OW", b"bb")
    assert value(data, "54000100/3/54000100/2/54001010") == ("OW", b"cc")
    for path in ("54000100/2/54001010", "54000100/4/54001010", "54000100/3/54000100/3/54001010"):
        with pytest.raises(RefusedError, match="no such bulk data"):
            value(data, path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "7FE00010/",
        "7fe00010",
        "0x7FE00010",
        "54000100",
        "54000100/0/54001010",
        "54000100/1",
        "../7FE00010",
        "00420012",
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path):
    data = explicit(0x54000100, "SQ", item(explicit(0x54001010, "OW", b"aa"))) + explicit(PIXELS, "OB", b"ab")

    with pytest.raises(RefusedError):
        value(data, path)


def test_implicit_and_unknown_vrs_are_looked_up():
    known = implicit(0x00290010, b"SIEMENS CSA HEADER") + implicit(0x00291010, b"csa!")

    assert value(known, "00291010", IMPLICIT_LITTLE) == ("OB", b"csa!")
    assert value(implicit(PIXELS, b"ab"), "7FE00010", IMPLICIT_LITTLE) == ("OW", b"ab")
    assert value(explicit(0x00291010, "UN", b"ab"), "00291010") == ("UN", b"ab")


def test_encapsulated_pixel_data_are_one_part_a_frame_without_framing():
    found = bulk_value(encapsulated(b"ab", b"cd", frames=2), JPEG_BASELINE, "7FE00010")

    assert found.vr == "OB"
    assert found.transfer_syntax_uid == JPEG_BASELINE
    assert [b"".join(part) for part in found.parts()] == [b"ab", b"cd"]
    icon = explicit(0x00880200, "SQ", item(explicit(PIXELS, "OB", fragments(b"ab", b"cd"), length=UNDEFINED)))
    assert value(icon, "00880200/1/7FE00010", JPEG_BASELINE) == ("OB", b"abcd")


def test_a_stray_delimiter_hides_nothing():
    data = explicit(0x00080060, "CS", "OT") + SEQUENCE_END + explicit(0x00420011, "OB", b"%PDF")

    assert value(data, "00420011") == ("OB", b"%PDF")


def test_a_path_into_what_holds_no_items_is_refused():
    for content in (b"nonsense", item()[:4]):
        with pytest.raises(RefusedError):
            value(explicit(0x54000100, "SQ", content), "54000100/1/54001010")


def test_a_deflated_bulk_value_is_inflated():
    assert value(deflate(explicit(0x00420011, "OB", b"%PDF")), "00420011", DEFLATED) == ("OB", b"%PDF")


def test_a_bulk_value_cut_short_is_refused():
    with pytest.raises(RefusedError, match="ends before this value does"):
        value(explicit(0x00420011, "OB", b"%PDF")[:-1], "00420011")


# --- real files ---------------------------------------------------------------------------------------------

# As pydicom reads them, but: padding of more than a byte, and pixel data that end in the midst of a frame.
FEWER_BYTES = {"MR_small_padded.dcm", "MR_truncated.dcm"}
# Number of Frames is "1A", and there are as many as in rtdose.dcm; it has bytes that no text may have.
NO_NUMBER = {"badVR.dcm"}


def reference_frames(path):
    """The frames of a file as pydicom finds them; None if it finds no pixel data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, force=True)
        names = [name for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if name in dataset]
        if not names or not dataset[names[0]].value:
            return None
        element = dataset[names[0]]
        count = 1 if path.name in NO_NUMBER else int(dataset.get("NumberOfFrames") or 1)
    if element.is_undefined_length:
        return list(generate_frames(element.value, number_of_frames=count))
    stored = element.value
    if dataset.file_meta.get("TransferSyntaxUID") == EXPLICIT_BIG and element.VR != "OB":
        word = max(2, dataset.BitsAllocated // 8)
        stored = b"".join(stored[at : at + word][::-1] for at in range(0, len(stored), word))
    if dataset.get("BitsAllocated") == 1:
        bits = np.unpackbits(np.frombuffer(stored, np.uint8), bitorder="little")
        size = dataset.Rows * dataset.Columns
        return [
            np.packbits(bits[at : at + size], bitorder="little").tobytes()
            for at in range(0, size * count, size)
        ]
    size = len(stored) // count
    return [stored[at : at + size] for at in range(0, size * count, size)]


def assert_frames_are_pydicoms(path):
    """Whether there is anything to compare."""
    file = path.read_bytes()
    expected = reference_frames(path)
    if expected is None:
        return False
    try:
        meta = read_file_meta(file)
    except RefusedError:  # it is no instance
        return False
    found = frames(memoryview(file)[meta.dataset_offset :], meta.transfer_syntax_uid)
    if path.name in FEWER_BYTES:
        expected = [] if path.name == "MR_truncated.dcm" else [expected[0][: len(found[0])]]
    if path.name in NO_NUMBER:
        expected, found = [b"".join(expected)], [b"".join(found)]
    for one, two in zip(found, expected, strict=True):
        # pydicom counts the byte that makes the last of several frames even.
        assert two.startswith(one), path
        assert len(two) - len(one) < 2, path
    return True


def test_frames_of_all_files_that_come_with_pydicom_are_pydicoms(pydicom_files):
    paths = [path for path in sorted(pydicom_files.glob("*.dcm")) if path.stat().st_size < 1 << 20]

    assert sum(map(assert_frames_are_pydicoms, paths)) > 60


@pytest.mark.parametrize("folder", ["transfer-syntaxes", "enhanced-multiframe"])
def test_frames_of_collected_files_are_pydicoms(shared_data, folder):
    paths = [
        path
        for path in sorted((shared_data / folder).rglob("*.dcm"))
        if path.name != "emri_small_jpeg_2k_lossless_too_short.dcm"  # pydicom gives up
    ]

    assert sum(map(assert_frames_are_pydicoms, paths)) >= 0.9 * len(paths) > 5


def test_a_collected_file_without_a_delimiter_has_its_frames(shared_data):
    folder = shared_data / "transfer-syntaxes" / "misc"
    files = [(folder / f"emri_small_jpeg_2k_lossless{rest}.dcm").read_bytes() for rest in ("", "_too_short")]
    whole, cut = (
        frames(memoryview(file)[read_file_meta(file).dataset_offset :], "1.2.840.10008.1.2.4.90")
        for file in files
    )

    assert len(cut) == 10
    assert cut == whole


def test_an_extended_offset_table_of_pydicoms_is_read(pydicom_files):
    dataset = pydicom.dcmread(pydicom_files / "SC_rgb_rle_2frame.dcm")
    parts = [one + b"\0" * (len(one) % 2) for one in generate_frames(dataset.PixelData, number_of_frames=2)]
    data, offsets, lengths = encapsulate_extended(parts)
    tables = explicit(0x7FE00001, "OV", offsets) + explicit(0x7FE00002, "OV", lengths)
    encoded = image(tables + explicit(PIXELS, "OB", data + SEQUENCE_END, length=UNDEFINED), frames=2)

    assert frames(encoded, RLE) == parts
    assert frame_table(encoded, RLE).size_bytes == 0
