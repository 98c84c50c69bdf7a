"""What a compressed image says of itself: its transfer syntax and the attributes that describe its pixels.

PS3.18 section 10.5.2 lets a client store image/jpeg and image/jp2 without the attributes of the Image Pixel
Description Macro; a media type alone does not say whether anything was lost.  Only headers are read, nothing
is decoded.  JPEG (ISO/IEC 10918-1), JPEG-LS (14495-1), JPEG 2000 (15444-1) and HTJ2K (15444-15).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from dicomscp.errors import RefusedError, TransferSyntaxError

_SYNTAX_ROOT = "1.2.840.10008.1.2.4."
_SOF = {0xC0: "50", 0xC1: "51", 0xC2: "55", 0xC3: "70", 0xF7: "80"}
_LOSSY = (0xC0, 0xC1, 0xC2)
_OTHER_PROCESSES = frozenset(range(0xC5, 0xD0)) - {0xC8, 0xCC}
_SOS, _APP14 = 0xDA, 0xEE
_JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
_SIZ, _CAP, _COD, _SOT = 0xFF51, 0xFF50, 0xFF52, 0xFF90
_CUT_SHORT = "A compressed image ends within its header."


class Codestream(NamedTuple):
    """One compressed image, which begins at *start* of its file and has *size* bytes, or None: to the end."""

    transfer_syntax_uid: str
    rows: int
    columns: int
    samples: int
    bits: int
    signed: bool
    photometric_interpretation: str
    start: int = 0
    size: int | None = None


def read_codestream(data: bytes) -> Codestream:
    """What the image that *data* begins with says.

    Raises RefusedError if it is cut short, TransferSyntaxError if it is none that is known.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _read_jpeg(data)
        if data[:4] == b"\xff\x4f\xff\x51":
            return _read_jpeg_2000(data, 0, None)
        if data[:12] == _JP2_SIGNATURE:
            return _read_jpeg_2000(data, *_codestream_box(data))
    except (struct.error, IndexError) as error:
        raise RefusedError(_CUT_SHORT) from error
    raise TransferSyntaxError("A compressed image is neither JPEG, JPEG-LS nor JPEG 2000.")


class _Frame(NamedTuple):
    """What the frame header of a JPEG image says; *sampling* is that of its first component."""

    marker: int
    bits: int
    rows: int
    columns: int
    samples: int
    sampling: int


def _read_jpeg(data: bytes) -> Codestream:
    frame, adobe_transform, selection = None, -1, 0
    for marker, pos in _segments(data):
        if marker in _SOF:
            bits, rows, columns, samples, _, sampling = struct.unpack_from(">BHHBBB", data, pos)
            frame = _Frame(marker, bits, rows, columns, samples, sampling)
        elif marker == _APP14 and data[pos : pos + 5] == b"Adobe":
            adobe_transform = data[pos + 11]
        elif marker == _SOS:  # lossless: the predictor; JPEG-LS: how much may be lost
            selection = data[pos + 1 + 2 * data[pos]]
        elif marker in _OTHER_PROCESSES:
            raise TransferSyntaxError("A JPEG image is of a process that DICOM does not have.")
    if frame is None:
        raise RefusedError("A JPEG image has no frame header.")
    suffix = {(0xC3, False): "57", (0xF7, True): "81"}.get(
        (frame.marker, selection == 1 if frame.marker == 0xC3 else selection > 0), _SOF[frame.marker]
    )
    photometric = "MONOCHROME2" if frame.samples == 1 else "RGB"
    if frame.samples == 3 and frame.marker in _LOSSY and adobe_transform != 0:
        photometric = "YBR_FULL_422" if frame.sampling >> 4 > 1 else "YBR_FULL"
    return Codestream(
        _SYNTAX_ROOT + suffix, frame.rows, frame.columns, frame.samples, frame.bits, False, photometric
    )


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The marker segments up to the first scan, and where what they hold begins."""
    pos, marker = 2, 0
    while marker != _SOS:
        mark, marker, length = struct.unpack_from(">BBH", data, pos)
        if mark != 0xFF:
            raise RefusedError("A JPEG image is damaged.")
        if marker == 0xFF:  # padding
            pos += 1
            continue
        yield marker, pos + 4
        pos += 2 + length


def _codestream_box(data: bytes) -> tuple[int, int | None]:
    """Start and size of the contiguous codestream in a JP2 file."""
    pos = 0
    while True:
        length, kind = struct.unpack_from(">L4s", data, pos)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, pos + 8)
            head = 16
        if kind == b"jp2c":
            return pos + head, length - head if length else None
        if length < head:
            raise RefusedError("A JPEG 2000 file is damaged.")
        pos += length


def _read_jpeg_2000(data: bytes, start: int, size: int | None) -> Codestream:
    right, bottom, left, top = struct.unpack_from(">4L", data, start + 8)
    samples, depth = struct.unpack_from(">HB", data, start + 40)
    pos, high_throughput = start + 2, False
    while True:
        marker, length = struct.unpack_from(">HH", data, pos)
        if marker == _CAP:
            high_throughput = bool(struct.unpack_from(">L", data, pos + 4)[0] & 0x00020000)
        elif marker == _COD:
            break
        elif marker == _SOT or marker < 0xFF00:
            raise RefusedError("A JPEG 2000 image has no coding style.")
        pos += 2 + length
    transforms, reversible = data[pos + 8], data[pos + 13] == 1
    suffix = ("203", "201")[reversible] if high_throughput else ("91", "90")[reversible]
    photometric = "MONOCHROME2"
    if samples > 1:
        photometric = ("YBR_RCT" if reversible else "YBR_ICT") if transforms else "RGB"
    bits, signed = (depth & 0x7F) + 1, bool(depth & 0x80)
    return Codestream(
        _SYNTAX_ROOT + suffix, bottom - top, right - left, samples, bits, signed, photometric, start, size
    )
