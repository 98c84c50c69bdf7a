"""Made instances: a CT series with the header of a real one, of any length, never sent before.

The header is that of pydicom's CT_small.dcm, 257 elements of a General Electric scanner, private ones too.
What differs between instances differs in real series as well: SOP Instance UID, Instance Number, Image
Position, Slice Location, times.  All have fixed length, so that an instance is its template with a few
replacements.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom import FileMetaDataset, Sequence
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import UID, EnhancedCTImageStorage, ExplicitVRLittleEndian

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT_VR_LITTLE_ENDIAN = str(ExplicitVRLittleEndian)

_STUDY_UID = "2.25." + "9" * 36
_FIRST_NUMBER = 10000
_PIXEL_DATA = b"\xe0\x7f\x10\x00OW"


@dataclass(frozen=True, slots=True)
class Size:
    """How large an instance is."""

    name: str
    rows: int


SIZES = {size.name: size for size in (Size("15 KB", 64), Size("0.5 MB", 512))}


def new_study_uid() -> str:
    """A Study Instance UID that nobody has; all have the same length."""
    return "2.25." + str(secrets.randbelow(9 * 10**35) + 10**35)


class Template:
    """What all made instances of one size have in common."""

    def __init__(self, size: Size) -> None:
        dataset = _dataset(size.rows)
        encoded = DicomBytesIO()
        encoded.is_little_endian, encoded.is_implicit_VR = True, False
        write_dataset(encoded, dataset)
        whole = encoded.getvalue()
        at = whole.index(_PIXEL_DATA)
        self._header, self._rest = whole[:at], whole[at:]
        self._file_meta = _file_meta(CT_IMAGE_STORAGE, dataset.SOPInstanceUID)

    def dataset(self, study_uid: str, number: int) -> bytes:
        """Instance *number*, from 1 to 89999, of the study's one series, in Explicit VR Little Endian."""
        head = self._header.replace(_STUDY_UID.encode(), study_uid.encode())
        for then, now in zip(_varying(study_uid, 0), _varying(study_uid, number), strict=True):
            head = head.replace(then, now)
        return head + self._rest

    def file(self, study_uid: str, number: int) -> bytes:
        """The same as a Part 10 file."""
        meta = self._file_meta.replace(sop_uid(_STUDY_UID, 0).encode(), sop_uid(study_uid, number).encode())
        return meta + self.dataset(study_uid, number)

    def write_series(self, directory: Path, count: int) -> str:
        """Put *count* files of a new study into *directory*; returns its UID."""
        directory.mkdir(parents=True, exist_ok=True)
        study_uid = new_study_uid()
        for number in range(1, count + 1):
            (directory / f"{number:05}.dcm").write_bytes(self.file(study_uid, number))
        return study_uid


def series_uid(study_uid: str) -> str:
    """The Series Instance UID of a made study's one series."""
    return f"{study_uid}.1"


def sop_uid(study_uid: str, number: int) -> str:
    """The SOP Instance UID of a made study's instance *number*."""
    return f"{study_uid}.1.{_FIRST_NUMBER + number}"


def enhanced_file(frames: int) -> bytes:
    """An Enhanced CT instance with *frames* functional groups of five macros each, as a Part 10 file."""
    dataset = _dataset(64)
    dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.NumberOfFrames = frames
    dataset.Rows = dataset.Columns = 16
    dataset.PixelData = bytes(frames * 16 * 16 * 2)
    dataset.SharedFunctionalGroupsSequence = Sequence([_shared_group()])
    dataset.PerFrameFunctionalGroupsSequence = Sequence([_frame_group(number) for number in range(frames)])
    encoded = DicomBytesIO()
    encoded.is_little_endian, encoded.is_implicit_VR = True, False
    write_dataset(encoded, dataset)
    return _file_meta(EnhancedCTImageStorage, dataset.SOPInstanceUID) + encoded.getvalue()


def _varying(study_uid: str, number: int) -> tuple[bytes, ...]:
    """What tells instance *number* from the others, as it is encoded."""
    z = f"{number / 10 - 475.7:011.6f}"
    time = f"{11 + number // 3600 % 12:02}{number // 60 % 60:02}{number % 60:02}.250000 ".encode()
    return (
        sop_uid(study_uid, number).encode(),
        b"\x20\x00\x13\x00IS\x06\x00" + f"{_FIRST_NUMBER + number} ".encode(),
        f"-158.135803\\-179.035797\\{z} ".encode(),
        b"\x20\x00\x41\x10DS\x0c\x00" + f"{z} ".encode(),
        b"\x08\x00\x32\x00TM\x0e\x00" + time,
        b"\x08\x00\x33\x00TM\x0e\x00" + time,
    )


def _dataset(rows: int) -> Dataset:
    """CT_small with *rows* squared pixels, its varying elements those of instance 0."""
    dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
    pixels = np.frombuffer(dataset.PixelData, "<i2").reshape(dataset.Rows, dataset.Columns)
    times = -(-rows // dataset.Rows)
    dataset.PixelData = np.tile(pixels, (times, times))[:rows, :rows].tobytes()
    dataset.Rows = dataset.Columns = rows
    del dataset.DataSetTrailingPadding  # pixel data come last, as nearly always
    dataset.StudyInstanceUID = _STUDY_UID
    dataset.SeriesInstanceUID = series_uid(_STUDY_UID)
    dataset.FrameOfReferenceUID = f"{_STUDY_UID}.2"
    dataset.SOPInstanceUID = sop_uid(_STUDY_UID, 0)
    dataset.InstanceNumber = str(_FIRST_NUMBER)
    z = f"{-475.7:011.6f}"
    dataset.ImagePositionPatient = ["-158.135803", "-179.035797", z]
    dataset.SliceLocation = z
    dataset.AcquisitionTime = dataset.ContentTime = "110000.250000"
    return dataset


def _file_meta(sop_class_uid: str, instance_uid: str) -> bytes:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = UID(sop_class_uid)
    meta.MediaStorageSOPInstanceUID = UID(instance_uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID("2.25.1")
    encoded = DicomBytesIO()
    write_file_meta_info(encoded, meta)
    return bytes(128) + b"DICM" + encoded.getvalue()


def _one(**elements: object) -> Sequence:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return Sequence([item])


def _shared_group() -> Dataset:
    group = Dataset()
    group.PixelMeasuresSequence = _one(SliceThickness="5.0", PixelSpacing=["0.661468", "0.661468"])
    group.PlaneOrientationSequence = _one(ImageOrientationPatient=["1", "0", "0", "0", "1", "0"])
    group.PixelValueTransformationSequence = _one(
        RescaleIntercept="-1024", RescaleSlope="1", RescaleType="HU"
    )
    return group


def _frame_group(number: int) -> Dataset:
    group = Dataset()
    time = f"{7 + number // 3600:02}{number // 60 % 60:02}{number % 60:02}.000000"
    group.FrameContentSequence = _one(
        FrameAcquisitionNumber=1,
        FrameReferenceDateTime="20040119072730.000000",
        FrameAcquisitionDateTime=f"20040119{time}",
        FrameAcquisitionDuration=1000.0,
        DimensionIndexValues=[1, number + 1],
        StackID="1",
        InStackPositionNumber=number + 1,
    )
    group.PlanePositionSequence = _one(
        ImagePositionPatient=["-158.135803", "-179.035797", f"{number * 1.25:.6f}"]
    )
    group.FrameVOILUTSequence = _one(WindowCenter="40", WindowWidth="400")
    group.CTExposureSequence = _one(
        ExposureTimeInms=1601.0, XRayTubeCurrentInmA=170.0 + number % 7, ExposureInmAs=170.0
    )
    group.CTImageFrameTypeSequence = _one(
        FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        PixelPresentation="MONOCHROME",
        VolumetricProperties="VOLUME",
        VolumeBasedCalculationTechnique="NONE",
    )
    return group
