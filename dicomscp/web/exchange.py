"""What requests for DICOMweb resources say, and how large answers are cut: the same for all of them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import quote, urlsplit

from starlette.requests import Request

from dicomscp.dicom.identity import Buffer, is_filable
from dicomscp.web.documents import CHUNK_BYTES
from dicomscp.web.media import Offer, choose, ranges
from dicomscp.web.problem import Problem

WHOLE_BYTES = 4 * 1024 * 1024
"""The largest body that is held in memory; a native frame of 1024 x 1024 x 16 bit has half of it."""

_UID_NAMES = {"study": "Study", "series": "Series", "instance": "SOP"}


def accepted(request: Request) -> str:
    """The media ranges that are accepted: those of the query parameter, which stands for the header, if any.

    Several header lines are one list (RFC 9110 section 5.3).
    """
    return _named(request) or ", ".join(request.headers.getlist("accept"))


def _named(request: Request) -> str:
    """The media types of the accept parameter (PS3.18 section 8.3.3.1)."""
    text = ", ".join(request.query_params.getlist("accept"))
    # A plus stands for itself in PS3.18 and for a space in forms; between letters there is never a space.
    return re.sub("(?<=[A-Za-z]) (?=[A-Za-z])", "+", text)


def negotiate(request: Request, offers: Sequence[Offer], *, default: bool = False) -> Offer:
    """The representation asked for; raises Problem 406 if it is not among the *offers*, preferred one first.

    With *default*, a parameter that names none of them gets the first, as PS3.18 section 8.3.3.1 has it for
    resources with a default media type.  It has no wildcards: raises Problem 400 for one.
    """
    named = _named(request)
    if any("*" in one.media_type and not one.multipart for one in ranges(named)):
        raise Problem(400, "accept, as a parameter, names media types without wildcards (PS3.18 8.3.3.1).")
    offer = choose(accepted(request), offers)
    if offer is None and default and named:
        return offers[0]
    if offer is None:
        offered = ", ".join(one.content_type("...") for one in offers)
        raise Problem(406, f"This is not to be had as asked for in Accept. It is offered as: {offered}")
    return offer


def uids_of(request: Request) -> dict[str, str]:
    """The UIDs of the address by name.  An address is outside input: each is checked before use."""
    found = {name: request.path_params[name] for name in _UID_NAMES if name in request.path_params}
    for name, uid in found.items():
        if not is_filable(uid):
            sentence = "is at most 64 printable ASCII characters without slash or backslash."
            raise Problem(400, f"The {_UID_NAMES[name]} Instance UID in the address {sentence}")
    return found


def service_url(request: Request, base_url: str) -> str:
    """The base URL of the service, as whoever asks sees it."""
    if urlsplit(base_url).netloc:
        return base_url
    return f"{request.url.scheme}://{request.url.netloc}{base_url}"


def header_text(text: str) -> str:
    """*text*, which may quote what was sent, as a header field can hold it."""
    return quote(text, safe=" !#$&'()*+./:;=?@_-[]~")


def is_known(request: Request, etag: str) -> bool:
    """Whether the client says that it has this representation (RFC 9110 13.1.2)."""
    listed = ",".join(request.headers.getlist("if-none-match"))
    known = [one.strip().removeprefix("W/") for one in listed.split(",")]
    return etag in known or "*" in known


def chunked(pieces: Iterable[Buffer]) -> Iterator[bytes]:
    """*pieces* as chunks of nearly equal size: each chunk costs a turn of a worker thread."""
    pending = bytearray()
    for piece in pieces:
        for start in range(0, len(piece), CHUNK_BYTES):
            pending += piece[start : start + CHUNK_BYTES]
            if len(pending) >= CHUNK_BYTES:
                yield bytes(pending)
                pending.clear()
    if pending:
        yield bytes(pending)
