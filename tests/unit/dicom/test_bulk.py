import mmap
import struct

import numpy as np
import pydicom
import pytest
from pydicom.encaps import generate_frames

from dicomscp.dicom.bulk import bulk_value, frame_table, inflated, read_frame
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
    return [b"".join(read_frame(data, table, number).data) for number in range(1, table.frames + 1)]


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


def test_number_of_frames_left_out_or_nonsense_is_one():
    for frames_told in (None, "", "0", "-3", "many"):
        assert (
            number_of_frames(image(explicit(PIXELS, "OB", bytes(6)), frames=frames_told), EXPLICIT_LITTLE)
            == 1
        )


def test_one_frame_without_a_size_is_the_whole_value():
    assert frames(explicit(PIXELS, "OB", b"abcd")) == [b"abcd"]


@pytest.mark.parametrize("number", [-1, 0, 3, 10**9])
def test_a_frame_that_is_not_there_is_refused(number):
    with pytest.raises(RefusedError, match="no frame"):
        frame(image(explicit(PIXELS, "OB", bytes(12)), frames=2), number)


def test_frames_past_the_end_of_the_pixel_data_are_refused():
    data = image(explicit(PIXELS, "OB", bytes(12)), frames=1000)

    assert frame(data, 2) == bytes(6)
    for number in (3, 1000):
        with pytest.raises(RefusedError, match="end before"):
            frame(data, number)
    with pytest.raises(RefusedError, match="end before"):
        frame(data[:-3], 2)


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


def test_fragments_that_cannot_be_told_apart_are_refused():
    data = encapsulated(b"a1", b"a2", b"b1", frames=2)

    with pytest.raises(RefusedError, match="cannot be told"):
        frame(data, 1, RLE)


def test_a_video_is_one_frame():
    data = encapsulated(b"abcd", b"ef", frames=300)

    assert frames(data, H264) == frames(data, H264 + ".1") == [b"abcdef"]


def test_encapsulated_pixel_data_without_an_end_have_no_frames():
    data = encapsulated(b"abcd", frames=1)[: -len(SEQUENCE_END)]

    assert number_of_frames(data, JPEG_BASELINE) == 0


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
    with pytest.raises(RefusedError):
        value(explicit(0x00420011, "OB", b"%PDF")[:-1], "00420011")


# --- real files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "SC_rgb_rle_2frame.dcm",
        "SC_rgb_small_odd_big_endian.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
        "examples_ybr_color.dcm",
        "image_dfl.dcm",
        "liver_1frame.dcm",
        "rtdose.dcm",
        "rtdose_expb.dcm",
        "rtdose_rle.dcm",
        "JPEG2000-embedded-sequence-delimiter.dcm",
    ],
)
def test_frames_of_real_files_are_pydicoms(pydicom_files, name):
    file = (pydicom_files / name).read_bytes()
    meta = read_file_meta(file)
    found = frames(memoryview(file)[meta.dataset_offset :], meta.transfer_syntax_uid)

    reference = pydicom.dcmread(pydicom_files / name)
    count = int(reference.get("NumberOfFrames", 1))
    if reference["PixelData"].is_undefined_length:
        assert found == list(generate_frames(reference.PixelData, number_of_frames=count))
        return
    stored = reference.PixelData
    if meta.transfer_syntax_uid == EXPLICIT_BIG:
        word = max(2, reference.BitsAllocated // 8)
        stored = b"".join(stored[at : at + word][::-1] for at in range(0, len(stored), word))
    assert len(found) == count
    assert stored.startswith(b"".join(found))
    assert len(stored) - len(b"".join(found)) < 2
