"""Studies for the viewer: what comes with pydicom, each file a study of its own, and a few made of it.

Several of those files have the UIDs of one image in other encodings; here each has its own.  What a viewer
has to show is what pydicom decodes.
"""

import base64
import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.sequence import Sequence
from pydicom.uid import EncapsulatedPDFStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

# What is compared to the last bit, and with what name a person finds it in the list.
EXACT = {
    "CT_small.dcm": "CT",
    "MR_small.dcm": "MR explicit",
    "MR_small_implicit.dcm": "MR implicit",
    "MR_small_bigendian.dcm": "MR big endian",
    "MR_small_RLE.dcm": "MR RLE",
    "MR_small_jp2klossless.dcm": "MR JPEG 2000",
    "MR_small_jpeg_ls_lossless.dcm": "MR JPEG-LS",
    "image_dfl.dcm": "OT deflated",
    "SC_rgb_jpeg_gdcm.dcm": "SC JPEG lossless colour",
    "SC_rgb_rle_2frame.dcm": "SC RLE colour frames",
    "GDCMJ2K_TextGBR.dcm": "SC without modality",
    "examples_jpeg2k.dcm": "US JPEG 2000 colour",
    "examples_rgb_color.dcm": "US RGB",
    "examples_palette.dcm": "US palette",
    "JPEG2000.dcm": "NM JPEG 2000 lossy",
    "rtdose.dcm": "RT dose",
}
# Two decoders of lossy JPEG may round in two ways.
NEARLY = {"examples_ybr_color.dcm": "US frames JPEG"}
_SYNTAXES = "transfer-syntaxes/one-image-9-syntaxes"
# Of the collection, where there is one.  OHIF 3.13.2 shows some of it otherwise than pydicom and DCMTK.  Of
# JPEG lossless .70 it leaves out the last pixel of some images (ct-15-syntaxes), and decodes others wrongly
# (objects/sample-op.dcm).  Values of JPEG Extended of 12 bit are 15 too high, as DCMTK and the original say;
# pydicom decodes none.  It takes uncompressed YBR_FULL_422 (US-YBR_FULL_422-EVRLE.dcm) for three values a
# pixel, and waits for ever for a palette in segments (gdcm-US-ALOKA-16.dcm).
REAL = {
    "series-ct/philips-abdomen": "Real CT",
    "series-ct/siemens-gantrytilt": "Real CT tilted",
    "series-mr/philips-anat/IM-0001-0001-0001.dcm": "Real MR",
    f"{_SYNTAXES}/4.dcm": "Real MR RLE",
    f"{_SYNTAXES}/5.dcm": "Real MR JPEG lossless",
    f"{_SYNTAXES}/7.dcm": "Real MR JPEG-LS",
    f"{_SYNTAXES}/9.dcm": "Real MR JPEG 2000",
    "enhanced-multiframe/MOVEKNEE.dcm": "Real enhanced MR",
    "enhanced-multiframe/CT0012.explicit_little_endian.dcm": "Real enhanced CT",
    "series-nm/NM-MONO2-16-13x-heart": "Real NM frames",
    "series-us/US1_J2KR.dcm": "Real US JPEG 2000",
    "series-us/OBXXXX1A.dcm": "Real US palette",  # the name that pydicom's file has everywhere
    "series-us/no-pixel-spacing.dcm": "Real US RLE colour",
    "series-cr-dx-mg/RG3_J2KR.dcm": "Real CR JPEG 2000",
    "transfer-syntaxes/misc/TestPattern_JPEG-LS-Lossless.dcm": "Real JPEG-LS colour",
    "transfer-syntaxes/misc/TestPattern_JPEG-Lossless_RGB.dcm": "Real JPEG lossless colour",
    "objects/pdf.dcm": "Real PDF",
}
REAL_NEARLY = {"series-us/IM00001.fragmented_no_bot_jpeg_baseline.50.dcm": "Real US frames JPEG"}
PDF = (
    b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]>>endobj
trailer<</Root 1 0 R>>
%%EOF
%"""
    + b" a long remark, so that this is no value that stands in the metadata" * 20
)
SLICES, FRAMES = 4, 5

_TYPES = {
    "Uint8Array": "u1",
    "Uint8ClampedArray": "u1",
    "Int8Array": "i1",
    "Int16Array": "<i2",
    "Uint16Array": "<u2",
    "Float32Array": "<f4",
}


@dataclass
class Study:
    """A study, under a name that it has as its patient's."""

    name: str
    instances: list[Dataset] = field(default_factory=list)
    exact: bool = True

    @property
    def uid(self) -> str:
        return str(self.instances[0].StudyInstanceUID)

    @property
    def has_pixels(self) -> bool:
        return "PixelData" in self.instances[0]

    def frames(self) -> Iterator[tuple[tuple[str, int], np.ndarray, float, float]]:
        """Place, decoded values, and slope and intercept of each frame."""
        for instance in self.instances:
            values = decoded(instance)
            count = int(instance.get("NumberOfFrames") or 1)
            for number, frame in enumerate(values if count > 1 else [values], 1):
                yield (str(instance.SOPInstanceUID), number), frame, *_rescale(instance, number)


def decoded(instance: Dataset) -> np.ndarray:
    """What pydicom decodes; colours of a palette as 8 bit RGB."""
    values = instance.pixel_array
    if instance.PhotometricInterpretation == "PALETTE COLOR":
        return (apply_color_lut(values, instance) >> 8).astype("u1")
    return values


def as_drawn(
    values: np.ndarray, array_type: str, slope: float, intercept: float, *, scaled: bool
) -> np.ndarray:
    """*values* as an array of JavaScript's *array_type* has them."""
    wanted = values.ravel()
    if scaled:
        wanted = wanted.astype("f8") * slope + intercept
    return wanted.astype(_TYPES[array_type])


def of_drawn(data: str, array_type: str) -> np.ndarray:
    """The array that *data*, base64, is the bytes of."""
    return np.frombuffer(base64.b64decode(data), _TYPES[array_type])


def sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def studies(pydicom_files: Path, collection: Path | None) -> list[Study]:
    """All of them."""
    found = [_study(name, [pydicom_files / file]) for file, name in EXACT.items()]
    found += [_study(name, [pydicom_files / file], exact=False) for file, name in NEARLY.items()]
    found += [_ct_series(pydicom_files), _enhanced_ct(pydicom_files), _pdf(pydicom_files)]
    if collection:
        for file, name in (REAL | REAL_NEARLY).items():
            path = collection / file
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            found.append(_study(name, files, exact=file in REAL))
    return found


def write(found: list[Study], folder: Path) -> None:
    """All instances as files in *folder*."""
    for study in found:
        for instance in study.instances:
            instance.save_as(folder / f"{instance.SOPInstanceUID}.dcm")


def _study(name: str, files: list[Path], *, exact: bool = True) -> Study:
    instances = [_own(pydicom.dcmread(file), name, number) for number, file in enumerate(files)]
    return Study(name, instances, exact)


def _own(instance: Dataset, name: str, number: int) -> Dataset:
    """*instance* as the one of that *number* of the study called *name*."""
    instance.StudyInstanceUID = generate_uid(entropy_srcs=[name, "study"])
    instance.SeriesInstanceUID = generate_uid(entropy_srcs=[name, "series"])
    instance.SOPInstanceUID = generate_uid(entropy_srcs=[name, str(number)])
    instance.file_meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID
    instance.PatientName, instance.PatientID = name, name
    instance.StudyDate = "20260101"
    return instance


def _ct_series(pydicom_files: Path) -> Study:
    """Slices of 0.5 MB, each other pixels: large enough to come in pieces over a slow line."""
    slices = []
    for number in range(SLICES):
        one = pydicom.dcmread(pydicom_files / "CT_small.dcm")
        pixels = np.kron(one.pixel_array, np.ones((4, 4), "<i2")) + number
        one.Rows, one.Columns = pixels.shape
        one.PixelData, one.InstanceNumber = pixels.tobytes(), number + 1
        one.PixelSpacing = [value / 4 for value in one.PixelSpacing]
        one.ImagePositionPatient = [-158.1, -179.0, -75.7 + 5 * number]
        slices.append(_own(one, "CT series", number))
    return Study("CT series", slices)


def _enhanced_ct(pydicom_files: Path) -> Study:
    """An Enhanced CT each of whose frames has its own place and its own rescaling."""
    one = pydicom.dcmread(pydicom_files / "CT_small.dcm")
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    pixels, shared = one.pixel_array, Dataset()
    one.PixelData = b"".join((pixels + number).tobytes() for number in range(FRAMES))
    one.NumberOfFrames = FRAMES
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = one.PixelSpacing, 5
    orientation.ImageOrientationPatient = one.ImageOrientationPatient
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    one.SharedFunctionalGroupsSequence = Sequence([shared])
    one.PerFrameFunctionalGroupsSequence = Sequence([_frame_groups(number) for number in range(FRAMES)])
    for name in ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient"):
        delattr(one, name)
    return Study("Enhanced CT", [_own(one, "Enhanced CT", 0)])


def _frame_groups(number: int) -> Dataset:
    groups, position, rescale = Dataset(), Dataset(), Dataset()
    position.ImagePositionPatient = [-158.1, -179.0, -75.7 + 5 * number]
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1000 - number, "HU"
    groups.PlanePositionSequence = Sequence([position])
    groups.PixelValueTransformationSequence = Sequence([rescale])
    return groups


def _pdf(pydicom_files: Path) -> Study:
    source = pydicom.dcmread(pydicom_files / "CT_small.dcm", stop_before_pixels=True)
    one = Dataset()
    for name in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"):
        setattr(one, name, source.get(name, ""))
    one.file_meta = deepcopy(source.file_meta)
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = EncapsulatedPDFStorage
    one.Modality, one.MIMETypeOfEncapsulatedDocument = "DOC", "application/pdf"
    one.EncapsulatedDocument, one.EncapsulatedDocumentLength = PDF + b"\0" * (len(PDF) % 2), len(PDF)
    one.add_new(0x00420011, "OB", one.EncapsulatedDocument)
    return Study("PDF", [_own(one, "PDF", 0)])


def _rescale(instance: Dataset, number: int) -> tuple[float, float]:
    """Slope and intercept of a frame: of its functional groups, or of all frames."""
    if "DoseGridScaling" in instance:
        return float(instance.DoseGridScaling), 0.0
    for groups in (_groups(instance, "PerFrame", number - 1), _groups(instance, "Shared", 0)):
        if "PixelValueTransformationSequence" in groups:
            transformation = groups.PixelValueTransformationSequence[0]
            return float(transformation.RescaleSlope), float(transformation.RescaleIntercept)
    return float(instance.get("RescaleSlope") or 1), float(instance.get("RescaleIntercept") or 0)


def _groups(instance: Dataset, whose: str, number: int) -> Dataset:
    groups = instance.get(f"{whose}FunctionalGroupsSequence")
    return groups[number] if groups else Dataset()
