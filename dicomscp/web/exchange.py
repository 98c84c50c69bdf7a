"""What requests for DICOMweb resources say, and how they are answered: the same for all of them."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from urllib.parse import quote, urlsplit

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dicomscp import __version__
from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Held
from dicomscp.dicom.identity import Buffer, InstanceKey, is_filable
from dicomscp.errors import RefusedError
from dicomscp.web.documents import CHUNK_BYTES
from dicomscp.web.media import DOCUMENT_TYPES, Offer, byte_range, choose, ranges
from dicomscp.web.problem import Problem

STUDY = "/studies/{study}"
SERIES = STUDY + "/series/{series}"
INSTANCE = SERIES + "/instances/{instance}"

WHOLE_BYTES = 4 * 1024 * 1024
"""The largest body that is held in memory; a native frame of 1024 x 1024 x 16 bit has half of it."""

_MAX_FRAMES = 10_000  # numbers in one request
PDF_POLICY = "default-src 'none'; frame-ancestors 'self'"
"""For a PDF, which the viewer shows in a frame.

Browsers show none in a sandbox; their own viewers run nothing of a PDF in the origin that it came from.
"""
_SANDBOX = "style-src 'unsafe-inline'; sandbox"

_UID_NAMES = {"study": "Study", "series": "Series", "instance": "SOP"}


def accepted(request: Request) -> str:
    """The media ranges that are accepted: those of the query parameter, which stands for the header, if any.

    Several header lines are one list (RFC 9110 section 5.3).
    """
    return _named(request) or ", ".join(request.headers.getlist("accept"))


def _named(request: Request) -> str:
    """The media types of the accept parameter (PS3.18 section 8.3.3.1)."""
    if not request.scope["query_string"]:
        return ""
    text = ", ".join(request.query_params.getlist("accept"))
    # A plus stands for itself in PS3.18 and for a space in forms; between letters there is never a space.
    return re.sub("(?<=[A-Za-z]) (?=[A-Za-z])", "+", text)


def negotiate(
    request: Request, offers: Sequence[Offer], *, default: bool = False, wanted: str | None = None
) -> Offer:
    """The representation asked for; raises Problem 406 if it is not among the *offers*, preferred one first.

    *wanted* are media ranges in place of those that the request accepts.

    With *default*, a parameter that names none of them gets the first, as PS3.18 section 8.3.3.1 has it for
    resources with a default media type.  It has no wildcards: raises Problem 400 for one.
    """
    named = _named(request)
    if any("*" in one.media_type and not one.multipart for one in ranges(named)):
        raise Problem(400, "accept, as a parameter, names media types without wildcards (PS3.18 8.3.3.1).")
    offer = choose(accepted(request) if wanted is None else wanted, offers)
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


def warning(request: Request, base_url: str, sentence: str) -> str:
    """A Warning field that says *sentence*, which may quote what was sent."""
    return quote(f"299 {service_url(request, base_url)}: {sentence}", safe=" !#$&'()*+./:;=?@_-[]~")


def passed_over(request: Request, base_url: str, names: Iterable[str]) -> dict[str, str]:
    """The header that says which parameters were not looked at; none if there are no *names*."""
    listed = " and ".join(sorted(names))
    told = f"The following parameters were passed over: {listed}"
    return {"warning": warning(request, base_url, told)} if listed else {}


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


def key_of(request: Request) -> InstanceKey:
    """The instance that the address names."""
    uids = uids_of(request)
    return InstanceKey(uids["study"], uids["series"], uids["instance"])


def name_of(study_uid: str, series_uid: str | None = None, sop_uid: str | None = None) -> str:
    """What those UIDs name, in words."""
    if sop_uid:
        return f"instance {sop_uid} of series {series_uid} of study {study_uid}"
    return f"series {series_uid} of study {study_uid}" if series_uid else f"study {study_uid}"


def held_of(archive: Archive, *uids: str) -> list[Held]:
    """What is held under those UIDs; blocking.  Raises Problem 404 if it is nothing."""
    held = archive.held(*uids)
    if not held:
        raise Problem(404, f"Nothing is held here of {name_of(*uids)}.")
    return held


def only_as_stored(error: RefusedError) -> Problem:
    """The answer to who asked for pixels in another transfer syntax, which *error* says cannot be made."""
    return Problem(406, f"It can be had only as it is stored. {error}")


def frame_numbers(text: str) -> list[int]:
    """The frames that the address lists.

    Raises Problem 400 if it is no list, or too long a one, or names one twice (PS3.18 table 10.4.1-1).
    """
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text, re.ASCII) or text.count(",") >= _MAX_FRAMES:
        raise Problem(400, "Frames are numbers from 1, separated by commas.")
    numbers = [int(number) for number in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise Problem(400, "Frames are named once each.")
    return numbers


def wanted_part(request: Request, headers: dict[str, str], size: int, offer: Offer) -> tuple[slice, int]:
    """Which of *size* bytes are wanted, and the status to give them; *headers* get what belongs to it.

    Of an *offer* of several parts all are.  HEAD tells of the whole (RFC 9110 14.2).
    """
    if offer.multipart:
        return slice(0, size), 200
    headers["accept-ranges"] = "bytes"
    part = byte_range(request.headers.get("range", ""), size) if request.method == "GET" else None
    if part is None or request.headers.get("if-range", headers["etag"]) != headers["etag"]:
        return slice(0, size), 200
    if part.start == part.stop:
        raise Problem(416, f"There are {size} bytes of it.", {"content-range": f"bytes */{size}"})
    headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
    return part, 206


def cut(pieces: Iterable[Buffer], part: slice) -> Iterator[Buffer]:
    """That part, whose start and stop are set, of all *pieces* together; none is looked at behind it."""
    position = 0
    for piece in pieces:
        if wanted := memoryview(piece)[max(part.start - position, 0) : max(part.stop - position, 0)]:
            yield wanted
        position += len(piece)
        if position >= part.stop:
            return


def digest_of(request: Request, held: Iterable[Held], *also: str) -> str:
    """A name for what is asked for of *held*: a strong validator, and a boundary that content cannot hold.

    Instances cannot contain a digest over their own digests.  *also* is what else the answer depends on.
    """
    asked = "\n".join((__version__, request.scope["path"], accepted(request), *also, ""))
    digest = hashlib.sha256(asked.encode())
    for one in held:
        digest.update(one.digest)
    return digest.hexdigest()[:40]


def headers_of(offer: Offer, digest: str) -> dict[str, str]:
    """The headers of an answer that is *offer*, of which *digest* is the name."""
    return {
        "content-type": offer.content_type(digest),
        "etag": f'"{digest}"',
        "cache-control": "no-cache",
        "vary": "Accept",
    }


def confined(offer: Offer) -> dict[str, str]:
    """The header with the policy for a document that somebody has sent us; none if *offer* is no document."""
    if offer.media_type not in DOCUMENT_TYPES:
        return {}
    policy = PDF_POLICY if offer.media_type == "application/pdf" else f"{PDF_POLICY}; {_SANDBOX}"
    return {"content-security-policy": policy}


def answer(
    request: Request, headers: dict[str, str], size: int, pieces: Iterator[Buffer], status: int = 200
) -> Response:
    """A response with a body of *size* bytes; blocking.

    The first of many chunks is read here, so what is missing from the start has its own status.
    """
    headers = {**headers, "content-length": str(size)}
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    if size <= WHOLE_BYTES:
        return Response(b"".join(pieces), status, headers)
    chunks = (bytes(piece) for piece in pieces)
    return StreamingResponse(chain((next(chunks),), chunks), status, headers)
