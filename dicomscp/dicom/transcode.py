"""An instance in Explicit VR Little Endian, whatever transfer syntax it is held in.

Values stay what they are; pixels are decoded frame by frame, so that memory does not grow with their number.
Colour that is subsampled or transformed (YBR_FULL_422, YBR_ICT, YBR_RCT) becomes RGB, for native pixel data
have no such thing; all else stays in the colour space that it has.  The file has no receipt: what is sent is
not what was received.
"""

import struct
import warnings
from collections.abc import Iterator

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import dcmwrite, write_dataset
from pydicom.uid import UID

from dicomscp import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomscp.dicom.bulk import NativeFrames, after_pixels, before_pixels, frame_table, inflated
from dicomscp.dicom.elements import EXPLICIT_LITTLE, UNDEFINED, Buffer, encoding_of
from dicomscp.dicom.pixels import UNREADABLE, Pixels, TooLargeError, first_line, read_header
from dicomscp.dicom.values import little_endian
from dicomscp.errors import RefusedError

_BINARY_WORDS = frozenset({"OW", "OL", "OF", "OD", "OV"})
_HEAD = struct.Struct("<HH2sHL")


def explicit_part10(dataset: Buffer, transfer_syntax_uid: str, *, max_pixels: int) -> Iterator[bytes]:
    """The Part 10 file of *dataset* in Explicit VR Little Endian, in pieces.

    Raises RefusedError, at any piece, if the dataset cannot be read or a frame cannot be decoded, and
    TooLargeError for a frame of more than *max_pixels*.
    """
    encoded = inflated(dataset, transfer_syntax_uid)
    view, tag = before_pixels(*encoded)
    header = _little(read_header(view, encoded.transfer_syntax_uid), view, encoded.transfer_syntax_uid)
    if not tag:
        yield _file(header)
        return
    table = frame_table(*encoded)
    if isinstance(table, NativeFrames) and table.transfer_syntax_uid == EXPLICIT_LITTLE:
        length, pixels = table.value(memoryview(encoded.dataset))
    else:
        decoding = Pixels(*encoded, max_pixels=max_pixels)
        first, photometric = decoding.native(1)
        length = len(first) * decoding.frames
        pixels = _frames(decoding, first)
        _describe(header, photometric)
    if length + 1 >= UNDEFINED:
        raise TooLargeError("The pixels are more than native pixel data can have.")
    yield _file(header)
    vr = {0x7FE00008: b"OF", 0x7FE00009: b"OD"}.get(tag)
    if vr is None:
        vr = b"OW" if int(header.get("BitsAllocated") or 8) > 8 else b"OB"
    yield _HEAD.pack(tag >> 16, tag & 0xFFFF, vr, 0, length + length % 2)
    yield from pixels
    yield bytes(length % 2)
    behind = after_pixels(*encoded)
    if len(behind):
        rest = read_header(behind, encoded.transfer_syntax_uid)
        yield _written(_little(rest, behind, encoded.transfer_syntax_uid))


def _frames(decoding: Pixels, first: bytes) -> Iterator[bytes]:
    yield first
    for frame in range(2, decoding.frames + 1):
        data, _ = decoding.native(frame)
        if len(data) != len(first):
            raise RefusedError(f"Frame {frame} is of another size than the first.")
        yield data


def _describe(header: Dataset, photometric: str) -> None:
    """Let *header* tell of native pixel data."""
    header.PhotometricInterpretation = photometric
    if "PlanarConfiguration" in header:
        header.PlanarConfiguration = 0
    for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if keyword in header:
            del header[keyword]


def _little(dataset: Dataset, view: memoryview, transfer_syntax_uid: str) -> Dataset:
    """*dataset* with the words of its binary values in little endian order; pydicom turns all others.

    What may be OB or OW by the dictionary and was sent without VR, such as curves, is OW (PS3.5 annex A.1).
    """
    encoding = encoding_of(view, transfer_syntax_uid)
    if encoding.explicit and encoding.little:
        return dataset
    for element in dataset.iterall():
        if element.VR == "OB or OW":
            element.VR = "OW"
        if not encoding.little and element.VR in _BINARY_WORDS and element.value:
            element.value = little_endian(element.value, element.VR)
    return dataset


def _file(header: Dataset) -> bytes:
    meta = FileMetaDataset()  # which pydicom completes with the UIDs of the dataset
    meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    header.file_meta = meta
    return _written(header, meta=True)


def _written(dataset: Dataset, *, meta: bool = False) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if meta:
                dcmwrite(buffer, dataset, implicit_vr=False, little_endian=True, enforce_file_format=True)
            else:
                write_dataset(buffer, dataset)
    except UNREADABLE as error:
        raise RefusedError(f"The dataset cannot be written anew: {first_line(error)}") from error
    return buffer.getvalue()
