"""Searching for studies, series and instances (QIDO-RS; PS3.18 sections 8.3.4 and 10.6).

An edge: parameters become a `Query`, its matches an array of DICOM JSON or a part of XML each.

Memory does not grow with the number of matches.  An answer of up to `WHOLE_BYTES` is made before anything
is sent: it has a length and a strong ETag, and what fails has a status of its own.  A larger one is sent as
it is read, a page of the index at a time, so it has neither; if it has to end early the connection breaks,
and what came of it is neither an array nor a multipart body.  A search that nobody waits for any more ends.

How many matches remain is counted to a bound: `MOST_REMAINING` means as many or more.  Warnings are worded,
and not quoted, as PS3.18 has them, each on a line of its own and without commas, at which others may be cut.
"""

import asyncio
import hashlib
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dicomscp.archive.archive import Archive
from dicomscp.dicom.identity import Buffer
from dicomscp.dicom.matching import OPTIONS, Level, Query, narrowed, query_from_parameters
from dicomscp.dicom.multipart import framed
from dicomscp.dicom.xmlmodel import native_model
from dicomscp.web.exchange import WHOLE_BYTES, chunked, is_known, negotiate, uids_of, warning
from dicomscp.web.media import DICOM_JSON, DICOM_XML, JSON, Offer, accepts_utf_8
from dicomscp.web.problem import Problem

MOST_REMAINING = 10_000
"""Nobody pages further to know more; counting costs about a page for each thousand."""

MOST_IGNORED = 8
"""Parameters that are named as ignored; of more their number is told: clients and proxies bound headers."""

OFFERS = (Offer(DICOM_JSON), Offer(JSON), Offer(DICOM_XML, multipart=True))
"""How results can be had, the default first (PS3.18 table 10.6.4-1)."""

PARAMETERS = ("accept", "charset", "includefield", "limit", "offset", *OPTIONS)
"""What can be asked beside attributes (PS3.18 table 10.6.1-5)."""

RESOURCES = {
    "/studies": Level.STUDY,
    "/studies/{study}/series": Level.SERIES,
    "/studies/{study}/series/{series}/instances": Level.IMAGE,
    "/studies/{study}/instances": Level.IMAGE,
    "/series": Level.SERIES,
    "/instances": Level.IMAGE,
}
"""What can be searched, and for what (PS3.18 table 10.6.1-1)."""


_UNWATCHED_SECONDS = 0.1  # longer than most searches take; that much may be done for nobody


class Search:
    """The search resources of one archive."""

    def __init__(
        self,
        archive: Archive,
        *,
        base_url: str,
        max_results: int,
        empty_status: int,
        local: Callable[[datetime], timedelta],
    ) -> None:
        """A search gives at most *max_results*.

        One that finds nothing is answered with *empty_status*: 200, an empty array, or 204, nothing at all.
        *local* is the offset from UTC, at a moment of local time, of what tells no time zone.
        """
        self._archive = archive
        self._base_url = base_url.rstrip("/")
        self._max_results = max_results
        self._empty_status = empty_status
        self._local = local

    def routes(self) -> list[Route]:
        """All resources, under the path of the base URL."""
        base = urlsplit(self._base_url).path
        return [
            Route(base + path, self._resource(level), methods=["GET"]) for path, level in RESOURCES.items()
        ]

    def _resource(self, level: Level) -> Callable[[Request], Awaitable[Response]]:
        async def search(request: Request) -> Response:
            gone = threading.Event()
            with _watched(request, gone):
                return await to_thread.run_sync(self._answer, request, level, gone)

        return search

    def _answer(self, request: Request, level: Level, gone: threading.Event) -> Response:
        """The answer; what is given once whoever asked is *gone*, nobody reads."""
        offer = negotiate(request, OFFERS, default=True)
        query, ignored = self._asked(request, level)
        told = ignored[:MOST_IGNORED]
        if len(ignored) > MOST_IGNORED:
            told.append(f"{len(ignored) - MOST_IGNORED} more parameters were ignored")
        found = self._archive.find(query, lambda: not gone.is_set())
        matches = _Matches((narrowed(one, query.parts) for one in found), offer)
        begun, ended = _begun(matches)
        if matches.replaced and ended:
            told.append(f"{matches.replaced} characters that XML cannot hold are given as U+FFFD")
        if remaining := self._remaining(query, len(begun) if ended else None, gone):
            told.append(f"There are {remaining} additional results that can be requested")
        answer = (
            self._whole(request, offer, begun) if ended else _streamed(request, offer, chain(begun, matches))
        )
        for sentence in told:
            answer.headers.append("warning", warning(request, self._base_url, sentence))
        return answer

    def _asked(self, request: Request, level: Level) -> tuple[Query, list[str]]:
        params = [pair for pair in request.query_params.multi_items() if pair[0] not in ("accept", "charset")]
        if not accepts_utf_8(",".join(request.query_params.getlist("charset")) or "*"):
            raise Problem(400, "charset has utf-8 in its list, or is left out: nothing else is written here.")
        uids = uids_of(request)
        return query_from_parameters(
            level,
            params,
            study_uid=uids.get("study"),
            series_uid=uids.get("series"),
            max_results=self._max_results,
            model=self._archive.model,
            local=self._local,
        )

    def _remaining(self, query: Query, given: int | None, gone: threading.Event) -> int:
        """How many matches lie behind those that are given, counted to the bound."""
        limit = query.limit or 0
        if given is not None and given < limit:
            return 0
        end = query.offset + limit
        return max(self._archive.count(query, end + MOST_REMAINING, lambda: not gone.is_set()) - end, 0)

    def _whole(self, request: Request, offer: Offer, matches: list[bytes]) -> Response:
        digest = hashlib.sha256(offer.content_type().encode())
        for match in matches:
            digest.update(hashlib.sha256(match).digest())
        boundary = digest.hexdigest()[:40]
        headers = {"etag": f'"{boundary}"', **_HEADERS}
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        if not matches and self._empty_status == 204:
            return Response(status_code=204, headers=headers)
        if matches or not offer.multipart:
            headers["content-type"] = offer.content_type(boundary)
        body = b"".join(_body(offer, boundary, matches))
        headers["content-length"] = str(len(body))
        return Response(b"" if request.method == "HEAD" else body, headers=headers)


_HEADERS = {"cache-control": "no-cache", "vary": "Accept"}


@contextmanager
def _watched(request: Request, gone: threading.Event) -> Iterator[None]:
    """Set *gone* once nobody waits for the answer: a search for what there is not may take long.

    Most are answered before anybody is listened to, which would cost more than they do.
    """
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    loop = asyncio.get_running_loop()
    later = loop.call_later(_UNWATCHED_SECONDS, lambda: watching.append(loop.create_task(watch())))
    try:
        yield
    finally:
        later.cancel()
        for one in watching:
            one.cancel()


class _Matches(Iterator[bytes]):
    """Objects as they are offered; *replaced* counts the characters that could not be."""

    def __init__(self, found: Iterator[dict[str, Any]], offer: Offer) -> None:
        self._found, self._as_xml = found, offer.multipart
        self.replaced = 0

    def __next__(self) -> bytes:
        found = next(self._found)
        if not self._as_xml:
            # A copy: what orjson gives keeps the room in which it was made, several times its length.
            return bytes(memoryview(orjson.dumps(found)))
        encoded = native_model(found)
        self.replaced += encoded.replaced
        return encoded.document


def _begun(matches: Iterator[bytes]) -> tuple[list[bytes], bool]:
    """The first of *matches*, and whether they are all, as they are unless they are more than is kept."""
    begun, size = [], 0
    for match in matches:
        begun.append(match)
        size += len(match)
        if size > WHOLE_BYTES:
            return begun, False
    return begun, True


def _streamed(request: Request, offer: Offer, matches: Iterable[bytes]) -> Response:
    boundary = secrets.token_hex(20)  # what is not known yet cannot be looked at for one that is not in it
    headers = {"content-type": offer.content_type(boundary), **_HEADERS}
    body = iter(()) if request.method == "HEAD" else chunked(_body(offer, boundary, matches))
    return StreamingResponse(body, headers=headers)


def _body(offer: Offer, boundary: str, matches: Iterable[bytes]) -> Iterator[Buffer]:
    if not offer.multipart:
        return _array(matches)
    # A multipart body has a part at least (RFC 2046 section 5.1.1): of nothing it is empty.
    parts = ([match] for match in matches)
    first = next(parts, None)
    return iter(()) if first is None else framed(boundary, offer.part_type(), chain((first,), parts))


def _array(matches: Iterable[bytes]) -> Iterator[bytes]:
    separator = b"["
    for match in matches:
        yield separator + match
        separator = b","
    yield b"]" if separator == b"," else b"[]"
