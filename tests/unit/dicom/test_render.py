"""What is rendered, against the standard's formulas and pydicom's own pipeline."""

import math
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.pixels import pixel_array
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from dicomscp.dicom.part10 import read_file_meta
from dicomscp.dicom.pixels import NoPixelsError, Pixels, TooLargeError
from dicomscp.dicom.render import Window, common_extremes, render
from dicomscp.errors import RefusedError

LITTLE = "1.2.840.10008.1.2.1"
MOST = 1 << 26


def opened(path):
    """The pixels of a file, or None if there are none, or none that can be decoded."""
    data = path.read_bytes()
    try:
        meta = read_file_meta(data)
        pixels = Pixels(memoryview(data)[meta.dataset_offset :], meta.transfer_syntax_uid, max_pixels=MOST)
        pixels.decoded(1)
    except RefusedError:
        return None
    return pixels


def grey(values, *, dtype="<i2", **attributes):
    """An instance of one frame or, of three dimensions, of several."""
    array = np.asarray(values, dtype)
    dataset = Dataset()
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = array.shape[-2:]
    if array.ndim > 2:
        dataset.NumberOfFrames = len(array)
    bits = 8 * array.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(array.dtype.kind == "i")
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = array.tobytes()
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    return dataset


def pixels_of(dataset, *, max_pixels=MOST):
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return Pixels(buffer.getvalue(), LITTLE, max_pixels=max_pixels)


def shown(values, window=None, **attributes):
    return render(pixels_of(grey(values, **attributes)), 1, window).tolist()


# The functions of PS3.3 section C.11.2.1.2, with the examples that the section gives


@pytest.mark.parametrize(
    ("window", "values", "levels"),
    [
        # C.11.2.1.2.1: c=2048, w=4096 is the identity of 12 bits
        (Window(2048, 4096), [0, 2048, 4095], [0, 128, 255]),
        (Window(2048, 1), [2047, 2048], [0, 255]),
        (Window(0, 100), [-50, -49, 0, 49, 50], [0, 3, 129, 255, 255]),
        (Window(0, 100, "LINEAR_EXACT"), [-50, 0, 50], [0, 128, 255]),
        (Window(0, 0.5, "LINEAR_EXACT"), [-1, 0, 1], [0, 128, 255]),
        (Window(10, 20, "SIGMOID"), [-100, 0, 10, 20, 120], [0, 30, 128, 225, 255]),
    ],
)
def test_a_window_is_what_its_function_says(window, values, levels):
    assert shown([values], window) == [levels]
    told = {"WindowCenter": window.center, "WindowWidth": window.width, "VOILUTFunction": window.function}
    assert shown([values], **told) == [levels]


def test_every_level_is_that_of_the_formula():
    values, window = np.arange(-2000, 3000).reshape(50, 100), Window(40.5, 401)
    rendered = np.array(shown(values, window, RescaleSlope=2, RescaleIntercept=-1000))
    for value, level in zip(values.ravel(), rendered.ravel(), strict=True):
        x, c, w = 2 * int(value) - 1000, window.center, window.width
        if x <= c - 0.5 - (w - 1) / 2:
            expected = 0
        elif x > c - 0.5 + (w - 1) / 2:
            expected = 255
        else:
            expected = math.floor(((x - (c - 0.5)) / (w - 1) + 0.5) * 255 + 0.5)
        assert level == expected


def test_the_first_of_several_windows_is_shown_and_an_unusable_one_is_not():
    values = [[0, 50, 100]]
    assert shown(values, WindowCenter=[50, 20], WindowWidth=[100, 10]) == shown(values, Window(50, 100))
    # of doses, whose width of less than 1 LINEAR has no meaning for
    assert shown([[0, 1]], WindowCenter=0.5, WindowWidth=0.5) == [[0, 255]]
    assert shown(values, WindowCenter=50, WindowWidth=0) == [[0, 128, 255]]
    assert shown(values, WindowCenter=50, WindowWidth=-5) == [[0, 128, 255]]


def test_without_a_window_the_least_is_black_and_the_greatest_white():
    assert shown([[10, 20, 30]]) == [[0, 128, 255]]
    assert shown([[7, 7]]) == [[0, 0]]
    assert shown([[10, 20, 30]], RescaleSlope=-1, RescaleIntercept=0) == [[255, 128, 0]]


def test_white_is_the_least_once_however_often_it_is_said():
    for told in (
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ):
        assert shown([[0, 100]], **told) == [[255, 0]]
    assert shown([[0, 100]], PresentationLUTShape="IDENTITY") == [[0, 255]]


def test_padding_is_black_and_stretches_nothing():
    assert shown([[-2000, 0, 50, 100]], PixelPaddingValue=-2000) == [[0, 0, 128, 255]]
    told = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1000}
    assert shown([[-2000, -1500, 0, 100]], **told) == [[0, 0, 0, 255]]
    inverse = {"PixelPaddingValue": 0, "PhotometricInterpretation": "MONOCHROME1"}
    assert shown([[0, 50, 100]], **inverse) == [[0, 255, 0]]
    assert shown([[5, 5]], PixelPaddingValue=5) == [[0, 0]]


def lut(first, entries, bits):
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", "OW", np.array(entries, "<u2" if bits > 8 else "u1").tobytes())
    return item


def test_a_voi_lut_is_taken_before_a_window():
    told = {
        "VOILUTSequence": Sequence([lut(10, [0, 1000, 4095], 12)]),
        "WindowCenter": 0,
        "WindowWidth": 1,
        "PixelRepresentation": 0,
    }
    levels = [0, 0, round(1000 / 4095 * 255), 255, 255]
    assert shown([[0, 10, 11, 12, 500]], dtype="<u2", **told) == [levels]
    assert shown([[0, 10, 11, 12, 500]], Window(11, 4, "LINEAR_EXACT"), dtype="<u2", **told) == [
        [0, 64, 128, 191, 255]
    ]


def test_entries_of_a_lut_may_be_bytes():
    told = {"VOILUTSequence": Sequence([lut(10, [0, 64, 255], 8)]), "PixelRepresentation": 0}
    assert shown([[9, 11, 12]], dtype="<u2", **told) == [[0, 64, 255]]


def test_a_modality_lut_is_taken_in_place_of_a_rescale():
    item = lut(0, [300, 100, 200], 16)
    item.ModalityLUTType = "US"
    told = {"ModalityLUTSequence": Sequence([item]), "PixelRepresentation": 0}
    assert shown([[0, 1, 2]], dtype="<u2", **told) == [[255, 0, 128]]


def functional_group(center=None, slope=None):
    group = Dataset()
    if center is not None:
        voi = Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 10
        group.FrameVOILUTSequence = Sequence([voi])
    if slope is not None:
        transformation = Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, 0
        group.PixelValueTransformationSequence = Sequence([transformation])
    return group


def test_functional_groups_of_the_frame_win_over_shared_ones_and_these_over_the_dataset():
    frames = [[[0, 10, 20, 30]]] * 3
    dataset = grey(frames, WindowCenter=1000, WindowWidth=10, RescaleSlope=7, RescaleIntercept=0)
    dataset.SharedFunctionalGroupsSequence = Sequence([functional_group(center=20, slope=1)])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(
        [functional_group(), functional_group(center=10), functional_group(slope=0.5)]
    )
    pixels = pixels_of(dataset)
    assert [render(pixels, frame).tolist() for frame in (1, 2, 3)] == [
        [[0, 0, 142, 255]],
        [[0, 142, 255, 255]],
        [[0, 0, 0, 0]],
    ]


def test_frames_are_shown_alike_if_they_are_asked_to():
    pixels = pixels_of(grey([[[0, 10]], [[5, 20]]]))
    extremes = common_extremes(pixels, (1, 2))
    assert extremes == (0, 20)
    assert render(pixels, 1, extremes=extremes).tolist() == [[0, 128]]
    windowed = pixels_of(grey([[[0, 10]], [[5, 20]]], WindowCenter=5, WindowWidth=10))
    assert common_extremes(windowed, (1, 2)) is None


def test_floats_are_shown_and_what_is_no_number_is_black():
    dataset = grey([[0, 1]])
    del dataset.PixelData
    dataset.BitsAllocated = 32
    dataset.FloatPixelData = np.array([0.25, 0.75], "<f4").tobytes()
    assert render(pixels_of(dataset), 1).tolist() == [[0, 255]]
    dataset.FloatPixelData = np.array([np.nan, 0.5], "<f4").tobytes()
    assert render(pixels_of(dataset), 1, Window(0.25, 1, "LINEAR_EXACT")).tolist() == [[0, 191]]


def test_colour_of_more_than_8_bits_is_scaled():
    dataset = grey(np.zeros((1, 2)), dtype="<u2", PhotometricInterpretation="RGB")
    dataset.SamplesPerPixel, dataset.PlanarConfiguration, dataset.BitsStored = 3, 0, 12
    dataset.PixelData = np.array([0, 2048, 4095, 4095, 0, 1], "<u2").tobytes()
    assert render(pixels_of(dataset), 1).tolist() == [[[0, 128, 255], [255, 0, 0]]]


def test_what_is_no_image_is_told():
    with pytest.raises(NoPixelsError):
        pixels_of(Dataset())
    with pytest.raises(TooLargeError, match="2 x 1 pixels"):
        pixels_of(grey([[1, 2]]), max_pixels=1)
    with pytest.raises(RefusedError, match="no frame 2"):
        render(pixels_of(grey([[1, 2]])), 2)
    hsv = grey(np.zeros((1, 2)), dtype="<u1", PhotometricInterpretation="HSV")
    hsv.SamplesPerPixel, hsv.PlanarConfiguration, hsv.PixelData = 3, 0, bytes(6)
    with pytest.raises(RefusedError, match="HSV"):
        render(pixels_of(hsv), 1)


# pydicom's files through pydicom's own functions


def reference(path, frame):
    """The frame by pydicom alone, as levels that are not rounded; None for what it has no pipeline for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        array = pixel_array(dataset, index=frame - 1)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            return apply_color_lut(array, dataset) / 257
        if array.ndim == 3:
            return array / ((1 << dataset.BitsStored) - 1) * 255
        if "PerFrameFunctionalGroupsSequence" in dataset or "PixelPaddingValue" in dataset:
            return None
        values = apply_modality_lut(array, dataset).astype(float)
        if "VOILUTSequence" in dataset:
            (lut,) = dataset.VOILUTSequence
            levels = apply_voi_lut(values.astype(int), dataset) / ((1 << lut.LUTDescriptor[2]) - 1) * 255
        elif "WindowCenter" in dataset:
            windowed = apply_voi_lut(values, dataset)
            bits = dataset.BitsStored
            low, high = 0, (1 << bits) - 1
            if dataset.PixelRepresentation:
                low, high = -(1 << bits - 1), (1 << bits - 1) - 1
            slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
            low, high = low * slope + intercept, high * slope + intercept
            levels = (windowed - low) / (high - low) * 255
        else:
            levels = (values - values.min()) / max(values.max() - values.min(), 1e-9) * 255
    return 255 - levels if dataset.PhotometricInterpretation == "MONOCHROME1" else levels


def test_files_are_shown_as_pydicom_computes_them(pydicom_files):
    compared = 0
    for path in sorted(pydicom_files.rglob("*.dcm")):
        pixels = opened(path)
        if pixels is None or path.name.startswith("rtdose_expb"):  # its words: see the test against DCMTK
            continue
        frame = (pixels.frames + 1) // 2
        try:
            expected = reference(path, frame)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            continue  # pydicom wants more of a file than we do
        if expected is None:
            continue
        difference = np.abs(render(pixels, frame).astype(float) - expected)
        assert difference.max() <= 1.01, path.name
        compared += 1
    assert compared >= 45
