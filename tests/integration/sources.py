"""Real files, laid out so that all can be sent to one gateway and each be told from every other.

A collection of real files has some SOP Instance UIDs several times (one image in nine encodings), and some of
its images lack a UID that filing needs.  Of several files under one UID the first keeps it; the others, and
those that lack a UID, get UIDs made from their bytes, so a file has the same UIDs wherever it lies.  All the
rest is linked as it is.  What a source says of itself is pydicom's reading; nothing here asks our own.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    UID,
    ColorPaletteStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HangingProtocolStorage,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from tests.conformance.readings import DAMAGED

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
PYDICOM = "pydicom"
COLLECTION = (
    "series-ct/philips-abdomen",
    "series-ct/ge-sliceincrement",
    "series-ct/siemens-gantrytilt",
    "series-mr/ge-anat",
    "series-mr/ge-dti-noext",
    "series-mr/hitachi-anat",
    "series-mr/nih-ge-fmri",
    "series-mr/nih-siemens-mosaic",
    "series-mr/philips-anat",
    "series-pt",
    "series-us",
    "series-xa",
    "series-cr-dx-mg",
    "series-nm",
    "studies-mixed",
    "enhanced-multiframe",
    "transfer-syntaxes",
    "charsets",
    "objects",
    "multi-patient",
)

# An index of a medium, and what belongs to no study.
_NOT_FILED = (MediaStorageDirectoryStorage, HangingProtocolStorage, ColorPaletteStorage)


@dataclass(frozen=True, slots=True)
class Source:
    """A file that holds an instance."""

    path: Path
    study_uid: str
    series_uid: str
    sop_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    patient_id: str

    @property
    def key(self) -> tuple[str, str, str]:
        """As an address has it."""
        return self.study_uid, self.series_uid, self.sop_uid


class Stage:
    """A folder that fills with what is to be sent; in it a folder for each that is added."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._first: dict[str, str] = {}  # SOP Instance UID -> digest of the file that keeps it

    def add(self, name: str, folder: Path) -> list[Source]:
        """Stage the instances below *folder* under *name*; a file that is there twice is one source."""
        target = self.directory / name
        target.mkdir(parents=True)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in DAMAGED]
        found = [source for path in files if (source := self._stage(path, target))]
        return list({source.key: source for source in found}.values())

    def _stage(self, path: Path, target: Path) -> Source | None:
        dataset = _read(path)
        if dataset is None or dataset.file_meta.get("MediaStorageSOPClassUID") in _NOT_FILED:
            return None
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        uids = self._uids(dataset, digest)
        if not uids.get("SOPClassUID"):
            return None
        staged = target / f"{digest[:6]}-{path.name}"
        if all(dataset.get(keyword) == uid for keyword, uid in uids.items()):
            staged.symlink_to(path)
        else:
            _write(dataset, uids, staged)
        return Source(
            path=staged,
            study_uid=uids["StudyInstanceUID"],
            series_uid=uids["SeriesInstanceUID"],
            sop_uid=uids["SOPInstanceUID"],
            sop_class_uid=uids["SOPClassUID"],
            transfer_syntax_uid=_transfer_syntax(dataset),
            patient_id=str(dataset.get("PatientID") or ""),
        )

    def _uids(self, dataset: pydicom.Dataset, digest: str) -> dict[str, str]:
        """Those that it is filed under; no SOP Class UID if nothing says one."""
        made = f"2.25.{int(digest, 16)}"
        sop_uid = dataset.get("SOPInstanceUID") or made
        is_first = self._first.setdefault(sop_uid, digest) == digest
        return {
            "StudyInstanceUID": dataset.get("StudyInstanceUID") or f"{made}.1",
            "SeriesInstanceUID": dataset.get("SeriesInstanceUID") or f"{made}.2",
            "SOPInstanceUID": sop_uid if is_first else made,
            "SOPClassUID": dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID"),
        }


def _read(path: Path) -> pydicom.Dataset | None:
    """The dataset, its values not yet read; None if it is none."""
    try:
        return pydicom.dcmread(path, force=path.suffix == ".dcm")
    except InvalidDicomError:
        return None


def _write(dataset: pydicom.Dataset, uids: dict[str, str], path: Path) -> None:
    for keyword, uid in uids.items():
        setattr(dataset, keyword, uid)
    dataset.file_meta.TransferSyntaxUID = UID(_transfer_syntax(dataset))
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    pydicom.dcmwrite(path, dataset)


def _transfer_syntax(dataset: pydicom.Dataset) -> str:
    """As the file says, or as pydicom found it to be written."""
    is_implicit, is_little_endian = dataset.original_encoding
    written = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
    return str(
        dataset.file_meta.get("TransferSyntaxUID", written if is_little_endian else ExplicitVRBigEndian)
    )


def number_of_frames(dataset: pydicom.Dataset) -> int:
    stated = str(dataset.get("NumberOfFrames") or 1)
    return int(stated) if stated.isdigit() else 1  # "1A" is in one of the files


def native_frames(dataset: pydicom.Dataset) -> list[bytes]:
    """Little endian, each from a byte on, cut out of the pixel data by what PS3.5 and PS3.3 say of them."""
    count = number_of_frames(dataset)
    bits = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated
    if dataset.PhotometricInterpretation == "YBR_FULL_422":
        bits = bits * 2 // 3
    element = next(dataset[keyword] for keyword in PIXELS if keyword in dataset)
    data = element.value
    if dataset.BitsAllocated == 1:
        cells = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        frames = (cells[bits * number : bits * (number + 1)] for number in range(count))
        return [np.packbits(frame, bitorder="little").tobytes() for frame in frames]
    if dataset.original_encoding == (False, False) and element.VR != "OB":
        word = max(2, dataset.BitsAllocated // 8)
        data = np.frombuffer(data, f">u{word}").astype(f"<u{word}").tobytes()
    size = bits // 8
    return [data[size * number : size * (number + 1)] for number in range(count)]


def frames_of(dataset: pydicom.Dataset) -> list[bytes]:
    if not any(dataset.get(keyword) for keyword in PIXELS):
        return []
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        return list(generate_frames(dataset.PixelData, number_of_frames=number_of_frames(dataset)))
    return native_frames(dataset)
