"""Which representation a client gets: pure functions.

A client names media ranges in Accept; a resource makes offers, the preferred one first.  The
range with the highest q that fits any offer decides, and among offers that fit it, the first.
Both spellings in use are read: `multipart/related; type="image/jls"; transfer-syntax=*`, quoted or
not, and the transfer syntax inside the quotes (`type="image/jls; transfer-syntax=..."`).

OHIF reads a single part that arrives in pieces wrongly: so multipart is what frames are offered as
first.  Whole values are asked for with */* by those who want nothing but their bytes: so those are
offered as a single part first.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dicomscp.dicom.multipart import media_types, part_type

DICOM = "application/dicom"
DICOM_JSON = "application/dicom+json"
JSON = "application/json"

# What (0042,0012) names: PDF and CDA (PS3.3 section C.24.2), STL, OBJ and MTL (section A.85.1), and what else
# senders call these.
_DOCUMENT_TYPES = frozenset(
    {
        "application/pdf",
        "application/sla",
        "application/xml",
        "model/mtl",
        "model/obj",
        "model/stl",
        "text/xml",
    }
)

_PIECE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')
_PARAMETER = re.compile(r'(?:[^;"]|"(?:[^"\\]|\\.)*"?)+')


class Offer(NamedTuple):
    """One representation that a resource can give."""

    media_type: str
    multipart: bool = False
    transfer_syntax_uid: str = ""

    def content_type(self, boundary: str = "") -> str:
        """The Content-Type of the response."""
        if self.multipart:
            return f'multipart/related; type="{self.media_type}"; boundary={boundary}'
        return self.part_type()

    def part_type(self) -> str:
        """The Content-Type of one part."""
        return part_type(self.media_type, self.transfer_syntax_uid)


@dataclass(frozen=True, slots=True)
class Range:
    """One media range of an Accept header."""

    media_type: str
    multipart: bool
    transfer_syntax_uid: str
    quality: float

    def fits(self, offer: Offer) -> bool:
        """Whether *offer* is what the range asks for."""
        anything = self.media_type == "*/*" and not self.multipart
        return (
            (anything or self.multipart == offer.multipart)
            and _type_fits(self.media_type, offer.media_type)
            and self.transfer_syntax_uid in ("", "*", offer.transfer_syntax_uid)
        )


def _type_fits(wanted: str, offered: str) -> bool:
    if wanted.endswith("/*"):
        return wanted == "*/*" or offered.startswith(wanted[:-1])
    return wanted == offered


def ranges(accept: str) -> list[Range]:
    """The media ranges of an Accept header, the most wanted first; what cannot be read is left out."""
    found = (_range(piece) for piece in _PIECE.findall(accept))
    return sorted((r for r in found if r and r.quality > 0), key=lambda r: -r.quality)


def _range(text: str) -> Range | None:
    media_type, *rest = (part.strip() for part in _PARAMETER.findall(text) or [""])
    media_type = media_type.lower()
    if "/" not in media_type:
        return None
    parameters = _parameters(rest)
    multipart = media_type.startswith("multipart/")
    if multipart:
        media_type, *inner = parameters.get("type", "*/*").split(";")
        parameters = {**_parameters(inner), **parameters}
    return Range(
        media_type.strip().lower(),
        multipart,
        parameters.get("transfer-syntax", ""),
        _quality(parameters.get("q", "1")),
    )


def _parameters(texts: Sequence[str]) -> dict[str, str]:
    pairs = (text.partition("=") for text in texts)
    return {name.strip().lower(): value.strip().strip('"') for name, _, value in pairs}


def _quality(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0


def choose(accept: str, offers: Sequence[Offer]) -> Offer | None:
    """The offer to answer with, or None if *accept* fits none; an empty *accept* takes the first."""
    if not accept.strip():
        return offers[0]
    return next((offer for wanted in ranges(accept) for offer in offers if wanted.fits(offer)), None)


def frame_offers(transfer_syntax_uid: str, frames: int) -> list[Offer]:
    """How frames stored in that transfer syntax can be had: their bytes are never transcoded."""
    types = media_types(transfer_syntax_uid)
    offers = [Offer(media_type, True, transfer_syntax_uid) for media_type in types]
    if frames == 1:
        offers += [Offer(media_type, False, transfer_syntax_uid) for media_type in types]
    return offers


def bulk_offers(transfer_syntax_uid: str, parts: int, document_type: str = "") -> list[Offer]:
    """How a value of so many *parts* can be had, that of an encapsulated document also as what it says it is.

    A document comes from outside and may call itself anything: what a browser would run is not offered.
    """
    offers = sorted(frame_offers(transfer_syntax_uid, parts), key=lambda offer: offer.multipart)
    if document_type in _DOCUMENT_TYPES:
        offers += [Offer(document_type), Offer(document_type, True)]
    return offers


def takes_gzip(accept_encoding: str) -> bool:
    """Whether that Accept-Encoding takes gzip; an empty one means identity."""
    for piece in accept_encoding.split(","):
        coding, *rest = (part.strip() for part in piece.split(";"))
        if coding.lower() in ("gzip", "x-gzip", "*"):
            return _quality(_parameters(rest).get("q", "1")) > 0
    return False


def byte_range(header: str, size: int) -> slice | None:
    """The one range that a Range header asks of *size* bytes; its start and stop are set.

    None means the whole: no range, several, or one that cannot be read (RFC 9110 14.2).  A range
    that lies outside is returned empty.
    """
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,19})-(\d{0,19})\s*", header, re.ASCII)
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return slice(max(size - int(last), 0), size)
    start = int(first)
    end = int(last) + 1 if last else size
    if last and end <= start:
        return None
    return slice(min(start, size), min(end, size))
