"""Rendered frames against DCMTK, which computes them by its own code: within one level of grey."""

import subprocess

import numpy as np
import pytest
from PIL import Image

from dicomscp.dicom import render
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.dicom.pixels import Pixels
from dicomscp.errors import RefusedError
from tests.peers import DCMTK, require

# Where DCMTK 3.6.7 does otherwise, and why.
_OTHERWISE = {
    "rtdose_expb.dcm": "big endian words of 32 bits are turned as two of 16 there",
    "rtdose_expb_1frame.dcm": "the same",
    "IM-0001-0170-0001.dcm": "functional groups are not looked at there",
    "RI6XDosiGap.dcm": "a linear window of a width below 1 shows nothing there",
    "seg_image_ct_binary.dcm": "least and greatest are those of all frames there",
    "seg_image_sm_control_labelmap.dcm": "padding is a value like others there",
    "D_CLUNIE_CT1_RLE_FRAGS.dcm": "the same",
}
_STUDIES_LIKE_OTHERS = 12  # of long series, every so manieth file is taken


def files(pydicom_files, collection):
    yield from sorted(pydicom_files.rglob("*.dcm"))
    if collection:
        for number, path in enumerate(sorted(one for one in collection.rglob("*") if one.is_file())):
            is_of_many = (
                path.parent.parent.name in {"series-mr", "series-ct"} or "studies-mixed" in path.parts
            )
            if path.suffix not in {".md", ".tsv"} and not (is_of_many and number % _STUDIES_LIKE_OTHERS):
                yield path


def opened(path):
    data = path.read_bytes()
    try:
        meta = read_file_meta(data)
        pixels = Pixels(memoryview(data)[meta.dataset_offset :], meta.transfer_syntax_uid, max_pixels=1 << 26)
        return pixels, render.render(pixels, (pixels.frames + 1) // 2)
    except RefusedError:
        return None


def asked(pixels, frame):
    """What DCMTK is to show: what the dataset says of that it takes only if told to."""
    decoded = pixels.decoded(frame)
    if decoded.array.ndim == 3 or decoded.photometric == "PALETTE COLOR":
        return []
    window = render._Grey(pixels.header, frame, decoded.array, little=pixels.little).voi
    if window is None:
        return ["+Wm"]
    if not isinstance(window, render.Window):
        return ["+Wl", "1"]
    options = ["+Ww", str(window.center), str(window.width)]
    return options + (["+Wfs"] if window.function == "SIGMOID" else [])


@pytest.fixture(scope="module")
def dcmj2pnm():
    return require("dcmj2pnm", DCMTK)


def test_frames_are_as_dcmtk_shows_them(dcmj2pnm, pydicom_files, collection, tmp_path):
    compared, wrong = 0, []
    for path in files(pydicom_files, collection):
        found = None if path.name in _OTHERWISE else opened(path)
        if found is None:
            continue
        pixels, rendered = found
        frame, image = (pixels.frames + 1) // 2, tmp_path / "image.pnm"
        command = [dcmj2pnm, "-q", "+op", "-O", "+F", str(frame), *asked(pixels, frame), path, image]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            continue  # a transfer syntax that it does not know, or a file that it does not take
        with Image.open(image) as opened_image:
            theirs = np.array(opened_image).astype(int)
        if theirs.ndim > rendered.ndim:
            theirs = theirs[..., 0]
        difference = np.abs(theirs - rendered)
        padding = render._padding(pixels.header, pixels.decoded(frame).array)
        if padding is not None:  # which is shown there as any other value
            difference = difference[~padding]
        if difference.max(initial=0) > 1:
            wrong.append((path.name, int(difference.max())))
        compared += 1
    assert not wrong, wrong
    assert compared >= (150 if collection else 40)


@pytest.mark.parametrize("window", [(40, 400), (300, 1500.5), (-600, 80)])
def test_windows_are_as_dcmtk_shows_them(dcmj2pnm, ct_small, window, tmp_path):
    pixels, _ = opened(ct_small)
    image = tmp_path / "image.pnm"
    center, width = window
    subprocess.run([dcmj2pnm, "-q", "+op", "-O", "+Ww", str(center), str(width), ct_small, image], check=True)
    with Image.open(image) as theirs:
        difference = np.array(theirs).astype(int) - render.render(pixels, 1, render.Window(center, width))
    assert np.abs(difference).max() <= 1
