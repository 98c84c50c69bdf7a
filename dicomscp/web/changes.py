"""The change feed: which studies were published since, for systems that follow.

    GET /changes?since=TOKEN&limit=N&wait=SECONDS

    {"changes": [{"study_uid", "revision", "series", "instances", "published_at"}, ...],
     "next": TOKEN, "more": false, "reset": false}

Each study stands once, where it last changed; a *revision* of null says that its documents were withdrawn.
Who keeps `next` and asks with it as *since* misses nothing, and may see a study again.  *reset* says that
the token is of another time (the index was made anew): the answer begins with the first study, and what it
and the pages after it do not name is not published any more.

A revision is the SHA-256 of what the documents say: equal on every node that holds the same instances and
is set up in the same way, and another one as soon as any document of the study changes.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Feed, Publication
from dicomscp.web.problem import Problem

_LIMIT, _LIMIT_AT_MOST = 100, 1000  # studies of about 200 bytes each
_WAIT_AT_MOST = 60.0  # less than proxies wait
_WAITING_AT_MOST = 32  # each asks the index twice a second
_LOOK_SECONDS = 0.5


class Changes:
    """The feed of one archive."""

    def __init__(self, archive: Archive, stopping: Callable[[], bool]) -> None:
        """Who waits is answered once the gateway is *stopping*, and when too many wait already."""
        self._archive, self._stopping = archive, stopping
        self._waiting = 0

    def routes(self) -> list[Route]:
        """The one resource there is."""
        return [Route("/changes", self.changes, methods=["GET"])]

    async def changes(self, request: Request) -> Response:
        """The studies published behind a token; waits for one if there is none and *wait* is given."""
        since = request.query_params.get("since", "")
        limit = min(_LIMIT_AT_MOST, int(_number(request, "limit", _LIMIT)))
        if not limit:
            raise Problem(400, "limit is a number of studies, at least 1.")
        seconds = min(_WAIT_AT_MOST, _number(request, "wait", 0))
        feed = await to_thread.run_sync(self._archive.feed, since, limit)
        if not feed.publications and not feed.reset and self._waiting < _WAITING_AT_MOST:
            feed = await self._next(feed, limit, seconds)
        body = orjson.dumps(_told(feed))
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")

    async def _next(self, feed: Feed, limit: int, seconds: float) -> Feed:
        """What comes behind *feed* within *seconds*."""
        deadline = asyncio.get_running_loop().time() + seconds
        self._waiting += 1
        try:
            while not feed.publications and not feed.reset and not self._stopping():
                if asyncio.get_running_loop().time() >= deadline:
                    break
                await asyncio.sleep(_LOOK_SECONDS)
                feed = await to_thread.run_sync(self._archive.feed, feed.token, limit)
        finally:
            self._waiting -= 1
        return feed


def _number(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Problem(400, f"{name} is a whole number.")
    return float(text)


def _told(feed: Feed) -> dict[str, Any]:
    return {
        "changes": [_change(one) for one in feed.publications],
        "next": feed.token,
        "more": feed.more,
        "reset": feed.reset,
    }


def _change(one: Publication) -> dict[str, Any]:
    return {
        "study_uid": one.study_uid,
        "revision": one.revision or None,
        "series": one.series,
        "instances": one.instances,
        "published_at": datetime.fromtimestamp(one.published_at / 1e6, UTC).isoformat(
            timespec="milliseconds"
        ),
    }
