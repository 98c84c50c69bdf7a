"""Instances in Explicit VR Little Endian: pydicom reads the same values, and the pixels it decodes itself."""

import tracemalloc
from io import BytesIO

import numpy as np
import pydicom
import pytest
from pydicom.pixels import pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicomscp.dicom.part10 import read_file_meta
from dicomscp.dicom.pixels import TooLargeError
from dicomscp.dicom.transcode import explicit_part10
from dicomscp.errors import RefusedError

# What decoding may change (PS3.5 sections 8.2 and A.4).
_OF_PIXELS = {
    "PixelData",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
}


def made(path, *, max_pixels=1 << 26):
    data = path.read_bytes()
    meta = read_file_meta(data)
    dataset = memoryview(data)[meta.dataset_offset :]
    pieces = explicit_part10(dataset, meta.transfer_syntax_uid, max_pixels=max_pixels)
    return b"".join(pieces)


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_implicit.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "image_dfl.dcm",
        "rtdose_1frame.dcm",
        "rtdose_rle.dcm",
        "examples_palette.dcm",
        "examples_jpeg2k.dcm",
        "examples_ybr_color.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_rle_2frame.dcm",
        "SC_rgb_small_odd.dcm",
        "reportsi.dcm",
        "test-SR.dcm",
        "GDCMJ2K_TextGBR.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_values_and_pixels_are_the_same(pydicom_files, name):
    (path,) = pydicom_files.rglob(name)
    stored, written = pydicom.dcmread(path, force=True), pydicom.dcmread(BytesIO(made(path)))

    assert written.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert written.file_meta.MediaStorageSOPInstanceUID == stored.SOPInstanceUID
    differing = {
        stored[tag].keyword for tag in stored.keys() | written.keys() if stored.get(tag) != written.get(tag)
    }
    assert {name for name in differing if name != ""} <= _OF_PIXELS | {"OverlayData"}
    if "PixelData" in stored:
        frames = range(int(stored.get("NumberOfFrames") or 1))
        for frame in frames:
            expected = pixel_array(stored, index=frame)
            np.testing.assert_array_equal(pixel_array(written, index=frame), expected)


@pytest.mark.filterwarnings("ignore")
def test_colour_stays_in_its_space_if_native_pixels_can_have_it(pydicom_files):
    for name, space in {
        "examples_ybr_color.dcm": "RGB",  # from YBR_FULL_422, subsampled
        "SC_ybr_full_422_uncompressed.dcm": "YBR_FULL_422",  # native as it is
        "SC_rgb_jpeg_dcmtk.dcm": "YBR_FULL",
        "examples_jpeg2k.dcm": "RGB",  # from YBR_RCT, transformed
    }.items():
        (path,) = pydicom_files.rglob(name)
        assert pydicom.dcmread(BytesIO(made(path))).PhotometricInterpretation == space, name


@pytest.mark.filterwarnings("ignore")
def test_what_stands_behind_the_pixels_stays(pydicom_files, tmp_path):
    dataset = pydicom.dcmread(next(pydicom_files.rglob("MR_small_RLE.dcm")))
    dataset.add_new(0xFFFCFFFC, "OB", b"\1\2")
    dataset.save_as(tmp_path / "padded.dcm")
    written = pydicom.dcmread(BytesIO(made(tmp_path / "padded.dcm")))
    assert written[0xFFFCFFFC].value == b"\1\2"


@pytest.mark.filterwarnings("ignore")
def test_words_of_big_endian_values_are_turned(pydicom_files, tmp_path):
    dataset = pydicom.dcmread(next(pydicom_files.rglob("MR_small_bigendian.dcm")))
    dataset.add_new("RedPaletteColorLookupTableData", "OW", b"\1\2\3\4")
    dataset.save_as(tmp_path / "big.dcm")
    written = pydicom.dcmread(BytesIO(made(tmp_path / "big.dcm")))
    assert written.RedPaletteColorLookupTableData == b"\2\1\4\3"


@pytest.mark.filterwarnings("ignore")
def test_what_may_be_of_bytes_or_of_words_is_of_words(pydicom_files, tmp_path):
    dataset = pydicom.dcmread(next(pydicom_files.rglob("MR_small_implicit.dcm")))
    dataset.add_new(0x50003000, "OW", b"\1\2")
    dataset.save_as(tmp_path / "curve.dcm")
    written = pydicom.dcmread(BytesIO(made(tmp_path / "curve.dcm")))
    assert (written[0x50003000].VR, written[0x50003000].value) == ("OW", b"\1\2")


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_made_is_told(pydicom_files, tmp_path):
    (path,) = pydicom_files.rglob("MR_small_RLE.dcm")
    with pytest.raises(TooLargeError):
        made(path, max_pixels=64)
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames = 2
    dataset.save_as(tmp_path / "short.dcm")
    with pytest.raises(RefusedError, match="frame 2"):
        made(tmp_path / "short.dcm")
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.55")  # JPEG, retired
    dataset.save_as(tmp_path / "unknown.dcm")
    with pytest.raises(RefusedError, match="cannot be decoded here"):
        made(tmp_path / "unknown.dcm")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_bigendian.dcm"])
def test_memory_does_not_grow_with_native_pixels(pydicom_files, tmp_path, name):
    dataset = pydicom.dcmread(next(pydicom_files.rglob(name)))
    dataset.NumberOfFrames, dataset.PixelData = 1000, dataset.PixelData * 1000
    dataset.save_as(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    meta = read_file_meta(data)
    tracemalloc.start()
    pieces = explicit_part10(
        memoryview(data)[meta.dataset_offset :], meta.transfer_syntax_uid, max_pixels=1 << 26
    )
    size = sum(map(len, pieces))
    assert tracemalloc.get_traced_memory()[1] < len(data) / 2
    tracemalloc.stop()
    assert size > len(dataset.PixelData)
    written = pydicom.dcmread(BytesIO(made(tmp_path / name)))
    np.testing.assert_array_equal(written.pixel_array[999], dataset.pixel_array[999])
