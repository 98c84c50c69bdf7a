import hashlib
import re
import tracemalloc

import orjson
import pydicom
import pytest
from pydicom.encaps import generate_frames

from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.errors import RefusedError
from dicomscp.study import layout
from dicomscp.study.static import bulk_paths, instance_files
from tests.unit.dicom.encoding import (
    DEFLATED,
    EXPLICIT_LITTLE,
    JPEG_BASELINE,
    SEQUENCE_END,
    UNDEFINED,
    deflate,
    explicit,
    fragments,
    item,
)

KEY = InstanceKey("1.2", "1.2.3", "1.2.3.4")
FRAMES = "studies/1.2/series/1.2.3/instances/1.2.3.4/frames"
BULK = "studies/1.2/bulkdata/1.2.3/1.2.3.4"
RLE, H264 = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.102"
PIXELS = 0x7FE00010


def files(dataset, transfer_syntax_uid=EXPLICIT_LITTLE, paths=()):
    return {
        file.path: b"".join(file.pieces) for file in instance_files(KEY, dataset, transfer_syntax_uid, paths)
    }


def native(pixels, frames, *, length=None):
    return (
        explicit(0x00280008, "IS", str(frames))
        + explicit(0x00280010, "US", b"\2\0")
        + explicit(0x00280011, "US", b"\3\0")
        + explicit(0x00280100, "US", b"\x08\0")
        + explicit(PIXELS, "OB", pixels, length=length)
    )


def encapsulated(*parts, frames, before=b""):
    pixels = explicit(PIXELS, "OB", fragments(*parts), length=UNDEFINED)
    return explicit(0x00280008, "IS", str(frames)) + before + pixels


def unframed(body):
    """Content type and data of a body of one part, by what it says of itself alone."""
    boundary = body[2 : body.index(b"\r\n")]
    assert body.startswith(b"--" + boundary + b"\r\n")
    head, rest = body.split(b"\r\n\r\n", 1)
    data, end = rest[: -len(boundary) - 6], rest[-len(boundary) - 6 :]
    assert end == b"\r\n--" + boundary + b"--"
    return re.fullmatch(rb"--[0-9a-f]{64}\r\nContent-Type: (.*)", head)[1].decode(), data


def test_native_frames_are_files_that_gzip_makes_smaller():
    written = files(native(bytes(range(12)), 2))

    assert list(written) == [f"{FRAMES}/1.mht.gz", f"{FRAMES}/2.mht.gz"]
    octets = f"application/octet-stream; transfer-syntax={EXPLICIT_LITTLE}"
    assert [unframed(body) for body in written.values()] == [
        (octets, bytes(range(6))),
        (octets, bytes(range(6, 12))),
    ]


def test_compressed_frames_are_files_as_they_are():
    written = files(encapsulated(b"ab", b"cd", frames=2), RLE)

    assert list(written) == [f"{FRAMES}/1.mht", f"{FRAMES}/2.mht"]
    assert [unframed(body) for body in written.values()] == [
        (f"application/octet-stream; transfer-syntax={RLE}", b"ab"),
        (f"application/octet-stream; transfer-syntax={RLE}", b"cd"),
    ]


def test_equal_frames_are_equal_files_and_others_have_other_boundaries():
    one, two, three = files(encapsulated(b"ab", b"cd", b"ab", frames=3), RLE).values()
    (other,) = files(encapsulated(b"ab", frames=1), JPEG_BASELINE).values()
    (fragmented,) = files(encapsulated(b"a", b"b", frames=1), RLE).values()

    assert one == three == fragmented
    assert len({one[:66], two[:66], other[:66]}) == 3
    content_type = f"application/octet-stream; transfer-syntax={RLE}".encode()
    assert one[2:66].decode() == hashlib.sha256(content_type + b"ab").hexdigest()


def test_a_frame_may_hold_what_looks_like_a_boundary():
    content = b"\r\n--" + b"0" * 64 + b"--"

    assert unframed(files(encapsulated(content, frames=1), RLE)[f"{FRAMES}/1.mht"])[1] == content


def test_only_frames_that_are_there_in_whole_have_files():
    assert list(files(native(bytes(13), 3, length=18))) == [f"{FRAMES}/1.mht.gz", f"{FRAMES}/2.mht.gz"]
    cut = encapsulated(b"ab", b"cd", frames=9)[: -len(SEQUENCE_END) - 1]
    assert list(files(cut, RLE)) == [f"{FRAMES}/1.mht"]
    assert files(explicit(0x00080060, "CS", "SR")) == {}


def test_bulk_values_are_bare_bytes_where_their_link_leads():
    overlay = explicit(0x60003000, "OW", b"overlay!")
    waveform = explicit(0x54000100, "SQ", item() + item(explicit(0x54001010, "OW", b"wave")))
    paths = ["54000100/2/54001010", "60003000", "7FE00010"]
    written = files(waveform + overlay + native(bytes(6), 1), paths=paths)

    assert list(written) == [f"{FRAMES}/1.mht.gz", f"{BULK}/54000100/2/54001010", f"{BULK}/60003000"]
    assert list(written.values())[1:] == [b"wave", b"overlay!"]


def test_pixels_in_a_sequence_are_bulk_values():
    icon = explicit(0x00880200, "SQ", item(explicit(PIXELS, "OB", fragments(b"ic", b"on"), length=UNDEFINED)))
    written = files(icon + encapsulated(b"ab", frames=1), RLE, ["00880200/1/7FE00010", "7FE00010"])

    assert list(written) == [f"{FRAMES}/1.mht", f"{BULK}/00880200/1/7FE00010"]
    assert written[f"{BULK}/00880200/1/7FE00010"] == b"icon"


@pytest.mark.parametrize("paths", [[], ["7FE00010"]])
def test_a_video_is_a_bulk_value_and_no_frame(paths):
    assert files(encapsulated(b"ab", b"cd", frames=300), H264, paths) == {f"{BULK}/7FE00010": b"abcd"}


@pytest.mark.parametrize(
    "path", ["60003000", "54000100/3/54001010", "../../x", "7fe00010", "54000100", "00420011"]
)
def test_a_value_that_is_not_there_or_not_whole_has_no_file(path):
    dataset = explicit(0x54000100, "SQ", item(explicit(0x54001010, "OW", b"wave")))
    dataset += explicit(0x00420011, "OB", b"%PDF")[:-1]

    assert files(dataset, paths=[path]) == {}


def test_a_deflated_dataset_is_inflated():
    written = files(deflate(explicit(0x60003000, "OW", b"ov") + native(bytes(6), 1)), DEFLATED, ["60003000"])

    assert unframed(written[f"{FRAMES}/1.mht.gz"])[1] == bytes(6)
    assert written[f"{BULK}/60003000"] == b"ov"
    with pytest.raises(RefusedError):
        files(b"no deflated bytes", DEFLATED)


def test_memory_is_that_of_one_piece():
    frame = bytes(8 << 20)
    dataset = encapsulated(*[frame] * 8, frames=8)
    largest = 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for file in instance_files(KEY, dataset, RLE, ["7FE00010"]):
            for piece in file.pieces:
                largest = max(largest, len(bytes(piece)))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()

    assert largest == 1 << 20
    assert peak < 3 << 20


def test_paths_are_those_of_the_links_in_a_header():
    text = '"BulkDataURI":"/b/60003000"'  # in a value, where quotes are escaped
    dataset = (
        explicit(0x00081030, "LO", text)
        + explicit(0x00420011, "OB", bytes(9000))
        + explicit(0x54000100, "SQ", item(explicit(0x54001010, "OW", bytes(2000))))
        + native(bytes(6), 1)
    )
    uri = layout.bulk_uri("/dicomweb", KEY)
    header = Compiler().header(dataset, EXPLICIT_LITTLE, total_bytes=len(dataset), bulk_uri=uri)
    encoded = b",".join(header.fragments.values())
    links = re.findall(r"'BulkDataURI': '([^']*)'", str(orjson.loads(b"{%b}" % encoded)))

    assert bulk_paths(encoded, uri) == ["00420011", "54000100/1/54001010", "7FE00010"]
    assert [f"{uri}/{path}" for path in bulk_paths(encoded, uri)] == links
    assert bulk_paths(encoded, "/elsewhere") == []


@pytest.mark.parametrize("name", ["SC_rgb_rle_2frame.dcm", "JPEG2000.dcm", "examples_overlay.dcm"])
def test_files_of_real_instances_hold_what_pydicom_reads(pydicom_files, name):
    file, reference = (pydicom_files / name).read_bytes(), pydicom.dcmread(pydicom_files / name)
    meta = read_file_meta(file)
    dataset = memoryview(file)[meta.dataset_offset :]
    header = Compiler().header(
        dataset, meta.transfer_syntax_uid, total_bytes=len(dataset), bulk_uri=layout.bulk_uri("/d", KEY)
    )
    paths = bulk_paths(b",".join(header.fragments.values()), layout.bulk_uri("/d", KEY))
    written = files(dataset, meta.transfer_syntax_uid, paths)

    frames = [unframed(body)[1] for path, body in written.items() if path.startswith(FRAMES)]
    if reference["PixelData"].is_undefined_length:
        count = int(reference.get("NumberOfFrames") or 1)
        assert frames == list(generate_frames(reference.PixelData, number_of_frames=count))
    else:
        assert frames == [reference.PixelData]
    values = {f"{BULK}/{path}": value_at(reference, path) for path in paths if path != "7FE00010"}
    assert {path: body for path, body in written.items() if path.startswith(BULK)} == values


def value_at(dataset, path):
    *steps, last = path.split("/")
    for tag, number in zip(steps[::2], steps[1::2], strict=True):
        dataset = dataset[int(tag, 16)].value[int(number) - 1]
    return dataset[int(last, 16)].value
