"""Media types of values and frames, and how parts of multipart/related are framed (PS3.18 section 8.7).

OHIF takes a frame's transfer syntax from its part's header alone, knows that header only as `Content-Type`,
and where the response tells no boundary, as a file does not, takes the first line for it: so that is how
every part is framed, whoever sends it.

What others send is read by RFC 2046 section 5.1.1: text before the first part and after the last is passed
over, white space may follow a boundary, header fields may be folded.  Lines end with CRLF.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from dicomscp.dicom.elements import DEFLATED_FRAMES, JPEG_EXTENDED, RLE, Buffer
from dicomscp.errors import RefusedError

OCTET_STREAM = "application/octet-stream"

_MPEG2 = ("video/mpeg",)
_MPEG4 = ("video/mp4",)
# PS3.18 Table 8.7.3-2 and -5: the media types of a frame or video in a compressed transfer syntax.  Clients
# made before the table settled ask for image/x-dicom-rle.
_COMPRESSED = (
    {
        "1.2.840.10008.1.2.4.50": ("image/jpeg",),
        JPEG_EXTENDED: ("image/jpeg",),
        "1.2.840.10008.1.2.4.57": ("image/jpeg",),
        "1.2.840.10008.1.2.4.70": ("image/jpeg",),
        "1.2.840.10008.1.2.4.80": ("image/jls",),
        "1.2.840.10008.1.2.4.81": ("image/jls",),
        "1.2.840.10008.1.2.4.90": ("image/jp2",),
        "1.2.840.10008.1.2.4.91": ("image/jp2",),
        "1.2.840.10008.1.2.4.92": ("image/jpx",),
        "1.2.840.10008.1.2.4.93": ("image/jpx",),
        "1.2.840.10008.1.2.4.110": ("image/jxl",),
        "1.2.840.10008.1.2.4.111": ("image/jxl",),
        "1.2.840.10008.1.2.4.112": ("image/jxl",),
        "1.2.840.10008.1.2.4.201": ("image/jphc",),
        "1.2.840.10008.1.2.4.202": ("image/jphc",),
        "1.2.840.10008.1.2.4.203": ("image/jphc",),
        RLE: ("image/dicom-rle", "image/x-dicom-rle"),
        DEFLATED_FRAMES: ("application/x-deflate",),
    }
    | {f"1.2.840.10008.1.2.4.{number}{kind}": _MPEG2 for number in (100, 101) for kind in ("", ".1")}
    | {f"1.2.840.10008.1.2.4.{number}{kind}": _MPEG4 for number in range(102, 109) for kind in ("", ".1")}
)
IMAGE_TYPES = tuple(
    dict.fromkeys(one for types in _COMPRESSED.values() if types not in (_MPEG2, _MPEG4) for one in types)
)
VIDEO_TYPES = (*_MPEG2, *_MPEG4)
"""The media types of all compressed frames, and of all videos."""


def media_types(transfer_syntax_uid: str) -> tuple[str, ...]:
    """What frames, or a video, in that transfer syntax are, the most general first."""
    return (OCTET_STREAM, *_COMPRESSED.get(transfer_syntax_uid, ()))


def part_type(media_type: str, transfer_syntax_uid: str) -> str:
    """The Content-Type of one part; without *transfer_syntax_uid* it is the media type alone."""
    return f"{media_type}; transfer-syntax={transfer_syntax_uid}" if transfer_syntax_uid else media_type


def part_head(boundary: str, content_type: str, location: str = "") -> bytes:
    """What stands before the data of a part; CRLF and the next head or the tail come after it.

    *location* is the address of the part by itself, for whoever has to tell parts apart.
    """
    named = f"\r\nContent-Location: {location}" if location else ""
    return f"--{boundary}\r\nContent-Type: {content_type}{named}\r\n\r\n".encode()


def tail(boundary: str) -> bytes:
    """What closes a body, after the CRLF of the last part."""
    return f"--{boundary}--".encode()


def framed(boundary: str, content_type: str, parts: Iterable[Iterable[Buffer]]) -> Iterator[Buffer]:
    """The body that *parts*, each in pieces and all of one type, make."""
    for part in parts:
        yield part_head(boundary, content_type)
        yield from part
        yield b"\r\n"
    yield tail(boundary)


_MAX_BOUNDARY = 200  # RFC 2046 has 70
_MAX_HEAD_BYTES = 16 << 10  # a part has three or four header fields
_MAX_PREAMBLE_BYTES = 64 << 10
_BOUNDARY = re.compile(r"[\x20-\x7e]*[\x21-\x7e]", re.ASCII)
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:[ \t]*([^\r\n\0]*)")
_FOLD = re.compile(rb"\r\n[ \t]+")
_AFTER_BOUNDARY = re.compile(rb"--|[ \t]{0,64}\r\n")
_UNDECIDED = re.compile(rb"-?|[ \t]{0,64}\r?")  # before the rest of it has come
_BEFORE_CONTENT = b"\r\n\r\n"


class PartHead(NamedTuple):
    """A part begins: its header fields by their names in lower case, the first of each name."""

    fields: dict[str, str]


class PartData(NamedTuple):
    """The next bytes of the part, to be used before the next event is asked for."""

    data: memoryview


class PartEnd(NamedTuple):
    """The part is whole."""


PartEvent: TypeAlias = PartHead | PartData | PartEnd


class PartReader:
    """A multipart body, fed in blocks of any size, as the events of its parts.

    Memory is that of a block and a header.  What begins like a boundary and goes on otherwise is content.
    """

    def __init__(self, boundary: str) -> None:
        """Raises RefusedError for what cannot be a boundary."""
        if not 0 < len(boundary) <= _MAX_BOUNDARY or not _BOUNDARY.fullmatch(boundary):
            raise RefusedError(
                "The boundary of the body is missing, too long, or has characters it cannot have."
            )
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        self._pending = b"\r\n"  # of a boundary that the body begins with
        self._passed_over = 0
        self._in_head = self._in_part = self._ended = False

    def feed(self, block: bytes) -> Iterator[PartEvent]:
        """What the next bytes tell.  Raises RefusedError where they are no multipart body."""
        data, at = self._pending + block, 0
        while not self._ended:
            if self._in_head:
                end = data.find(_BEFORE_CONTENT, at, at + _MAX_HEAD_BYTES)
                if end < 0:
                    break
                yield PartHead(_fields(data[at:end]))
                at, self._in_head, self._in_part = end + len(_BEFORE_CONTENT), False, True
                continue
            found = data.find(self._delimiter, at)
            if found < 0:  # the end may be the beginning of a boundary
                upto = max(at, len(data) - len(self._delimiter) + 1)
                yield from self._content(memoryview(data)[at:upto])
                at = upto
                break
            after = found + len(self._delimiter)
            boundary = _AFTER_BOUNDARY.match(data, after)
            if boundary is None and not _UNDECIDED.fullmatch(data, after):  # content that begins like one
                yield from self._content(memoryview(data)[at:after])
                at = after
                continue
            yield from self._content(memoryview(data)[at:found])
            at = found
            if boundary is None:
                break
            if self._in_part:
                yield PartEnd()
            self._ended = boundary[0] == b"--"
            # The line end of the boundary is that before the first field.
            at, self._in_head, self._in_part = boundary.end() - 2, True, False
        if self._in_head and not self._ended and len(data) - at >= _MAX_HEAD_BYTES:
            raise RefusedError("The header of a part is longer than 16 KiB.")
        self._pending = b"" if self._ended else data[at:]

    def close(self) -> Iterator[PartEvent]:
        """What the end of the body tells: nothing.

        Raises RefusedError unless its closing boundary came: the last part may be cut short.
        """
        if not self._ended:
            raise RefusedError("The body ends without its closing boundary: it is cut short.")
        return iter(())

    def _content(self, data: memoryview) -> Iterator[PartData]:
        if self._in_part:
            if data:
                yield PartData(data)
            return
        self._passed_over += len(data)
        if self._passed_over > _MAX_PREAMBLE_BYTES:
            raise RefusedError("The body does not begin with the boundary that Content-Type names.")


def _fields(head: bytes) -> dict[str, str]:
    """The fields in *head*, each behind a line end."""
    fields: dict[str, str] = {}
    for line in _FOLD.sub(b" ", head).split(b"\r\n")[1:]:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise RefusedError("A part has a header field that is none.")
        fields.setdefault(field[1].decode("ascii").lower(), field[2].decode("latin-1").strip(" \t"))
    return fields
