"""The pixels of an instance as numbers: its frames, decoded one by one.

Where frames lie is `bulk`'s business, and what their bitstreams mean that of pydicom and the decoders it
knows: GDCM (JPEG, lossless JPEG, JPEG-LS, JPEG 2000), CharLS (JPEG-LS), OpenJPEG (JPEG 2000 and HTJ2K),
libjpeg-turbo in Pillow (JPEG of 8 bits) and pydicom's own (RLE).  So a frame costs its own size, whatever
else the instance has.

Decoders are C, and what they read came from outside: whoever calls this is a process that may die.  Memory
beyond what the attributes tell (a bitstream may tell of another size) is for that process to bound.
"""

import struct
import warnings
from typing import Any, NamedTuple

import gdcm
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pack_bits
from pydicom.uid import UID

from dicomscp.dicom.bulk import FrameTable, before_pixels, frame_table, inflated, is_video, read_frame
from dicomscp.dicom.elements import (
    DEFLATED_FRAMES,
    ENCAPSULATED_UNCOMPRESSED,
    EXPLICIT_LITTLE,
    JPEG_EXTENDED,
    Buffer,
    encoding_of,
    inflate,
)
from dicomscp.errors import RefusedError

Array = npt.NDArray[Any]

# By the tag of the pixel data: its keyword, and its bits where Bits Allocated does not tell them.
_KINDS = {
    0x7FE00008: ("FloatPixelData", 32),
    0x7FE00009: ("DoubleFloatPixelData", 64),
    0x7FE00010: ("PixelData", 0),
}
# Colour that native pixel data cannot have: it becomes RGB.
_NOT_NATIVE = frozenset({"YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420"})

UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What pydicom and the decoders raise of what they cannot read."""


class NoPixelsError(RefusedError):
    """The instance has no pixel data, or none that are images, or not the frame that is asked for."""


class NoFrameError(NoPixelsError):
    """The instance has pixels, and not the frame that is asked for."""


class TooLargeError(RefusedError):
    """What is asked for is more than may be made of it."""


class Decoded(NamedTuple):
    """One frame, rows x columns or rows x columns x samples, its colour as *photometric* says."""

    array: Array
    photometric: str


def is_decodable(transfer_syntax_uid: str) -> bool:
    """Whether frames stored in that transfer syntax can be decoded."""
    if transfer_syntax_uid in (DEFLATED_FRAMES, ENCAPSULATED_UNCOMPRESSED):
        return True
    try:
        return bool(get_decoder(UID(transfer_syntax_uid)).is_available)
    except NotImplementedError:  # what pydicom says of a transfer syntax that it has no decoder for
        return False


class Pixels:
    """The frames of one dataset and what its *header* says of them; for one thread at a time.

    *little*: whether words in binary values of the header are in little endian order.
    """

    def __init__(self, dataset: Buffer, transfer_syntax_uid: str, *, max_pixels: int) -> None:
        """A frame may have at most *max_pixels*.

        Raises NoPixelsError if there is no frame, RefusedError if the dataset cannot be read.
        """
        self._dataset, self._syntax = inflated(dataset, transfer_syntax_uid)
        self._table: FrameTable = frame_table(self._dataset, self._syntax)
        if not self._table.frames:
            raise NoPixelsError("The instance has no pixels.")
        if is_video(self._syntax):
            raise NoPixelsError("The instance is a video, which has no frames to be had one by one.")
        view, tag = before_pixels(self._dataset, self._syntax)
        self.header = read_header(view, self._syntax)
        self.little = encoding_of(view, self._syntax).little
        self._options = _described(self.header, tag)
        rows, columns = self._options["rows"], self._options["columns"]
        if rows * columns > max_pixels:
            raise TooLargeError(
                f"A frame has {columns} x {rows} pixels, and at most {max_pixels} may be decoded."
            )

    @property
    def frames(self) -> int:
        """How many frames the instance tells of."""
        return self._table.told

    @property
    def there(self) -> int:
        """How many of them the pixel data hold, the first ones."""
        return min(self._table.told, self._table.frames)

    def decoded(self, frame: int, *, raw: bool = False) -> Decoded:
        """Frame number *frame*, counted from 1; colour as RGB, unless *raw* leaves it as it was encoded.

        Raises RefusedError if the frame is not there in whole, or cannot be decoded.
        """
        syntax, data = self._frame(frame)
        if syntax == JPEG_EXTENDED and self._options["bits_stored"] > 8:
            return self._of_12_bits(frame, data)
        if syntax != EXPLICIT_LITTLE:
            data = encapsulate([data], has_bot=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decoder = get_decoder(UID(syntax))
                array, told = decoder.as_array(data, index=0, raw=raw, **self._options)
        except NotImplementedError as error:  # what pydicom says of a syntax that it has no decoder for
            raise RefusedError(f"Frames in transfer syntax {syntax} cannot be decoded here.") from error
        except UNREADABLE as error:
            reason = "no decoder reads it" if isinstance(error, RuntimeError) else first_line(error)
            raise RefusedError(f"Frame {frame} cannot be decoded: {reason}.") from error
        return Decoded(array, str(told["photometric_interpretation"]))

    def native(self, frame: int) -> tuple[bytes, str]:
        """The frame as native pixel data in little endian order have it, and its photometric interpretation.

        That is the stored one, or RGB for colour that is subsampled or transformed.  Raises as `decoded`.
        """
        syntax, data = self._frame(frame)
        told = self._options["photometric_interpretation"]
        if syntax == EXPLICIT_LITTLE:
            return data, told
        array, photometric = self.decoded(frame, raw=told not in _NOT_NATIVE)
        if self._options["bits_allocated"] == 1:
            return bytes(pack_bits(array, pad=False)), photometric
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(), photometric

    def _of_12_bits(self, frame: int, data: bytes) -> Decoded:
        """A JPEG of 12 bits, which pydicom does not let GDCM decode; DCMTK has the same values for it."""
        told = self._options
        if told["samples_per_pixel"] != 1 or told["bits_allocated"] != 16:
            raise RefusedError(f"Frame {frame} is a JPEG of 12 bits in a form that nobody uses.")
        fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
        fragment.SetByteStringValue(data)
        fragments.AddFragment(fragment)
        element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
        element.SetValue(fragments.__ref__())
        image = gdcm.Image()
        image.SetNumberOfDimensions(2)
        image.SetDimensions((told["columns"], told["rows"], 1))
        image.SetDataElement(element)
        grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
        image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
        image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(JPEG_EXTENDED)))
        image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, told["pixel_representation"]))
        text = image.GetBuffer()
        if text is None:
            raise RefusedError(f"Frame {frame} cannot be decoded.")
        pixels = text.encode("utf-8", "surrogateescape")
        if len(pixels) != 2 * told["rows"] * told["columns"]:
            raise RefusedError(f"Frame {frame} is of another size than its attributes tell.")
        array = np.frombuffer(pixels, "<i2" if told["pixel_representation"] else "<u2")
        return Decoded(array.reshape(told["rows"], told["columns"]), told["photometric_interpretation"])

    def _frame(self, frame: int) -> tuple[str, bytes]:
        """The transfer syntax of a frame and its bytes, inflated if it is deflated by itself."""
        try:
            syntax, pieces = read_frame(self._dataset, self._table, frame)
        except RefusedError as error:
            raise NoFrameError(str(error)) from error
        data = b"".join(pieces)
        if syntax != DEFLATED_FRAMES:
            return syntax, data
        expected = self._frame_bytes()
        native, _ = inflate(data, expected + 1)
        if not expected <= len(native) <= expected + 1:
            raise RefusedError(f"Frame {frame} inflates to another size than its attributes tell.")
        return EXPLICIT_LITTLE, bytes(native[:expected])

    def _frame_bytes(self) -> int:
        told = self._options
        bits: int = told["rows"] * told["columns"] * told["samples_per_pixel"] * told["bits_allocated"]
        return (bits + 7) // 8


def read_header(view: memoryview, transfer_syntax_uid: str) -> Dataset:
    """The elements in *view* as pydicom has them.  Raises RefusedError if they cannot be read."""
    encoding = encoding_of(view, transfer_syntax_uid)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file: Any = DicomBytesIO(bytes(view))
            return read_dataset(file, not encoding.explicit, encoding.little)
    except UNREADABLE as error:
        raise RefusedError(f"The dataset cannot be read: {first_line(error)}") from error


def number(item: Dataset, keyword: str, default: int) -> int:
    """A whole number of *item*, or *default* where there is none."""
    try:
        value: Any = item.get(keyword)
        return default if value is None or value == "" else int(str(value))
    except UNREADABLE:
        return default


def _described(header: Dataset, tag: int) -> dict[str, Any]:
    """What a decoder is told of one frame."""
    keyword, bits = _KINDS[tag]
    allocated = bits or number(header, "BitsAllocated", 8)
    return {
        "rows": number(header, "Rows", 0),
        "columns": number(header, "Columns", 0),
        "number_of_frames": 1,
        "samples_per_pixel": number(header, "SamplesPerPixel", 1),
        "photometric_interpretation": str(header.get("PhotometricInterpretation") or "MONOCHROME2"),
        "planar_configuration": number(header, "PlanarConfiguration", 0),
        "bits_allocated": allocated,
        "bits_stored": bits or number(header, "BitsStored", allocated),
        "pixel_representation": number(header, "PixelRepresentation", 0),
        "pixel_keyword": keyword,
    }


def first_line(error: BaseException) -> str:
    """What *error* says, without the traces that pydicom writes behind it."""
    return str(error).partition("\n")[0][:200]
