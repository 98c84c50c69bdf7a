"""Media types of values and frames, and how parts of multipart/related are framed (PS3.18 section 8.7).

OHIF takes a frame's transfer syntax from its part's header alone, knows that header only as `Content-Type`,
and where the response tells no boundary, as a file does not, takes the first line for it: so that is how
every part is framed, whoever sends it.
"""

from collections.abc import Iterable, Iterator

from dicomscp.dicom.elements import Buffer

OCTET_STREAM = "application/octet-stream"

_MPEG2 = ("video/mpeg",)
_MPEG4 = ("video/mp4",)
# PS3.18 Table 8.7.3-2 and -5: the media types of a frame or video in a compressed transfer syntax.  Clients
# made before the table settled ask for image/x-dicom-rle.
_COMPRESSED = (
    {
        "1.2.840.10008.1.2.4.50": ("image/jpeg",),
        "1.2.840.10008.1.2.4.51": ("image/jpeg",),
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
        "1.2.840.10008.1.2.5": ("image/dicom-rle", "image/x-dicom-rle"),
        "1.2.840.10008.1.2.8.1": ("application/x-deflate",),
    }
    | {f"1.2.840.10008.1.2.4.{number}{kind}": _MPEG2 for number in (100, 101) for kind in ("", ".1")}
    | {f"1.2.840.10008.1.2.4.{number}{kind}": _MPEG4 for number in range(102, 109) for kind in ("", ".1")}
)


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
