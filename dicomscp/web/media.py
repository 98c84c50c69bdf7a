"""Which representation a client gets, and what it says of one it sends: pure functions.

A client names media ranges in Accept; a resource makes offers, the preferred one first.  Each offer has the
weight of the most specific range that fits it, so what is excluded (q=0) or less wanted by name stays so
beside `*/*` (RFC 9110 section 12.5.1).  The heaviest offer is chosen; among several, the one whose range was
named first, then the resource's own preference.

Both spellings in use are read: `multipart/related; type="image/jls"; transfer-syntax=*`, quoted or not, and
the transfer syntax inside the quotes (`type="image/jls; transfer-syntax=..."`).  Parameters that no
representation here has are passed over: who gets less than was asked for sees it by Content-Type.

A member of the list that is malformed is as if it were not there: RFC 9110 does not make that an error, and
viewers send lists of which the rest is good.  If nothing is left of the list, nothing in it is acceptable
(406); a list without any member asks for nothing, and is answered as if there were none.  Of a list the first
64 members are read, of a member 64 parameters: a header of 60 KiB would cost all who are served a pause.

OHIF reads a single part that arrives in pieces wrongly: so multipart is what frames are offered as first.
Whole values are asked for with */* by those who want nothing but their bytes: so those are offered as a
single part first.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from dicomscp.dicom.multipart import media_types, part_type

DICOM = "application/dicom"
DICOM_JSON = "application/dicom+json"
DICOM_XML = "application/dicom+xml"
JSON = "application/json"

# What (0042,0012) names: PDF and CDA (PS3.3 section C.24.2), STL, OBJ and MTL (section A.85.1), and what else
# senders call these.
DOCUMENT_TYPES = frozenset(
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

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 5.6.2
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PIECE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')
_MEDIA_TYPE = re.compile(rf"({_NAME})/({_NAME})", re.ASCII)
# A media type is no token, and stands here without quotes all the same.
_PARAMETER = re.compile(rf'\s*;\s*(?:({_NAME})\s*=\s*({_QUOTED}|[^\s;,"]+))?', re.ASCII)
_WEIGHT = re.compile(r"0(\.[0-9]*)?|1(\.0*)?", re.ASCII)
_READ = 64  # members of a list, parameters of a member; browsers and viewers send some ten
_REMEMBERED = 64  # headers as they came, for clients repeat theirs; each has 64 KiB at most


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
    charset: str = ""

    def fits(self, offer: Offer) -> bool:
        """Whether *offer* is what the range asks for."""
        anything = self.media_type == "*/*" and not self.multipart
        return (
            (anything or self.multipart == offer.multipart)
            and _type_fits(self.media_type, offer.media_type)
            and self.transfer_syntax_uid in ("", "*", offer.transfer_syntax_uid)
            and self.charset in ("", "utf-8", "utf8", "*")
        )

    @property
    def specificity(self) -> tuple[int, int]:
        """How much of what it fits the range names; the most specific one that fits decides."""
        wildcards = self.media_type.count("*") - self.multipart
        return -wildcards, int(self.transfer_syntax_uid not in ("", "*"))


def _type_fits(wanted: str, offered: str) -> bool:
    if wanted.endswith("/*"):
        return wanted == "*/*" or offered.startswith(wanted[:-1])
    return wanted == offered


@lru_cache(maxsize=_REMEMBERED)
def ranges(accept: str) -> tuple[Range, ...]:
    """The media ranges of an Accept header as they are listed; what cannot be read is left out."""
    found = (_range(piece[0].strip()) for piece in islice(_PIECE.finditer(accept), _READ))
    return tuple(one for one in found if one)


def _range(text: str) -> Range | None:
    begun = _MEDIA_TYPE.match(text)
    parameters = _parameters(text[begun.end() :]) if begun else None
    if begun is None or parameters is None or begun[1] == "*" != begun[2]:
        return None
    quality = parameters.pop("q", "1")
    if not _WEIGHT.fullmatch(quality):
        return None
    media_type, multipart = begun[0].lower(), begun[1].lower() == "multipart"
    if multipart and media_type not in ("multipart/related", "multipart/*"):
        return None  # a kind of multipart that nothing here is
    if multipart:
        # "multipart/related" alone leaves the type of its parts open (PS3.18 section 8.7.1 names no default).
        media_type, _, inner = parameters.get("type", "*/*").partition(";")
        media_type = media_type.strip().lower()
        parameters = (_parameters(f";{inner}") or {}) | parameters
    return Range(
        media_type,
        multipart,
        parameters.get("transfer-syntax", ""),
        float(quality),
        parameters.get("charset", "").lower(),
    )


def _parameters(text: str) -> dict[str, str] | None:
    """The parameters that *text* is a list of, each behind a semicolon; None if it is none, or a long one."""
    found: dict[str, str] = {}
    position = 0
    for _ in range(_READ):
        parameter = _PARAMETER.match(text, position)
        if parameter is None:
            break
        if parameter[1]:
            found.setdefault(parameter[1].lower(), _unquoted(parameter[2]))
        position = parameter.end()
    return None if text[position:].strip() else found


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


def choose(accept: str, offers: Sequence[Offer]) -> Offer | None:
    """The offer to answer with, or None if *accept* fits none; an empty *accept* takes the first."""
    return _choice(accept, tuple(offers))


@lru_cache(maxsize=_REMEMBERED)
def _choice(accept: str, offers: tuple[Offer, ...]) -> Offer | None:
    if not accept.strip(" \t,"):
        return offers[0]
    wanted = ranges(accept)
    weighed = [(_weight(offer, wanted), offer) for offer in offers]
    (quality, _), best = max(weighed, key=lambda pair: pair[0])
    return best if quality > 0 else None


def _weight(offer: Offer, wanted: Sequence[Range]) -> tuple[float, int]:
    """How much *offer* is wanted, and, negated, the place of the range that says so."""
    fitting = [(one.specificity, -place) for place, one in enumerate(wanted) if one.fits(offer)]
    if not fitting:
        return 0.0, 0
    _, place = max(fitting)
    return wanted[-place].quality, place


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
    if document_type in DOCUMENT_TYPES:
        offers += [Offer(document_type), Offer(document_type, True)]
    return offers


@lru_cache(maxsize=_REMEMBERED)
def takes_gzip(accept_encoding: str) -> bool:
    """Whether that Accept-Encoding takes gzip; an empty one means identity."""
    return _is_taken(accept_encoding, ("gzip", "x-gzip", "*"))


def accepts_utf_8(charsets: str) -> bool:
    """Whether that list of character sets has UTF-8 in it."""
    return _is_taken(charsets, ("utf-8", "utf8", "*"))


def _is_taken(listed: str, names: Sequence[str]) -> bool:
    """Whether the first of *names* that is *listed* has a weight."""
    weights = {
        name.strip().lower(): (_parameters(f";{rest}") or {}).get("q", "1")
        for name, _, rest in (piece.partition(";") for piece in listed.split(",", _READ)[:_READ])
    }
    weight = next((weights[name] for name in names if name in weights), "0")
    return _WEIGHT.fullmatch(weight) is not None and float(weight) > 0


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


class ContentType(NamedTuple):
    """What a Content-Type field says, its names in lower case."""

    media_type: str
    parameters: dict[str, str]


def content_type(field: str) -> ContentType | None:
    """What the Content-Type *field* says; None if it cannot be read."""
    begun = _MEDIA_TYPE.match(field)
    parameters = _parameters(field[begun.end() :]) if begun else None
    if begun is None or parameters is None:
        return None
    return ContentType(begun[0].lower(), parameters)
