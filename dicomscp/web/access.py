"""Who may ask, decided before any resource is looked for.

    Authorization: Basic ...     users of a file (`web/users`)
    Authorization: Bearer ...    tokens of an issuer (`web/tokens`)

There are two scopes: *read* for what only asks (GET, HEAD, OPTIONS), *write* for every other method.
Neither holds the other: a device that stores need not see.  A few resources answer all, so that a service
manager needs no password.  A resource is open, never a path: which one a request is for is found as the
router finds it, so that whatever is set up to lie below an open one stays shut.

A verdict costs something on purpose (passwords) or by nature (signatures), so it is remembered for a while,
by a keyed digest of what was presented, together with the revision of that by which it was judged: who is
taken out of the users' file is out with the next request.  What many requests present at once is judged
once.  Nothing that was presented is kept, logged or told.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dicomscp.errors import DicomscpError
from dicomscp.telemetry.metrics import AccessMetrics
from dicomscp.web.problem import Problem, problem_of, response_of

log = structlog.get_logger()

READ, WRITE = "read", "write"
SCOPES = (READ, WRITE)
READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

REFUSED_SECONDS = 60.0
"""How long a refusal is remembered: a program with a wrong password repeats it hundreds of times."""

_REMEMBERED = 1024  # verdicts of each kind; an entry takes some 300 bytes
_LOG_SECONDS = 1.0  # at least between two lines about refusals of one address
_LOGGED_ADDRESSES = 1024


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who is let in: by which name, and for what."""

    name: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """*principal*, or why there is none, and for how long that may be remembered."""

    principal: Principal | None
    seconds: float
    reason: str = ""


def revision_of(path: Path) -> Hashable:
    """Another one when the file was changed, replaced or taken away."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def may_store(request: Request) -> bool:
    """Whether who asks may store, as far as that is known: nobody is asked on paths that are open to all."""
    return bool(request.scope.get("may_store", True))


class Scheme(Protocol):
    """One way to say who one is (RFC 9110 11.1)."""

    def challenge(self, problem: str) -> str:
        """The WWW-Authenticate field; *problem* is what was wrong with what was presented, or empty."""
        ...

    def revision(self) -> Hashable:
        """Changes when verdicts may.  Costs next to nothing."""
        ...

    async def judge(self, credentials: str) -> Verdict:
        """The verdict on *credentials*, which stood behind the scheme's name.

        Raises BusyError or UnreachableError if there can be none now.
        """
        ...


class OpenRoute(Route):
    """A resource that answers all, whether they say who they are or not."""


class Access:
    """Lets through who is known by one of *schemes*, which are keyed by their names in small letters.

    The application finds the name under `request.user`, and every line logged for a request has it as `user`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        schemes: Mapping[str, Scheme],
        routes: Sequence[BaseRoute] = (),
        metrics: AccessMetrics,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """*routes* are all that *app* has, in its order; what an `OpenRoute` of them answers is for all."""
        self._app, self._schemes, self._routes = app, dict(schemes), tuple(routes)
        self._open_routes = tuple(route for route in self._routes if isinstance(route, OpenRoute))
        self._metrics, self._now = metrics, now
        self._key = secrets.token_bytes(32)
        # Apart, so that whoever presents thousands of wrong ones drives out no right one.
        self._admitted, self._refused = _Remembered(now), _Remembered(now)
        self._judging: dict[bytes, asyncio.Task[Verdict]] = {}
        self._sparing = _Sparing(now)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # there is no answer of 401 to a WebSocket that every client reads
            await send({"type": "websocket.close", "code": 1008})

    def _is_open(self, scope: Scope) -> bool:
        """Whether the resource that will answer is open: the router takes the first that fits."""
        if not any(_fits(route, scope) for route in self._open_routes):  # as with nearly every request
            return False
        return isinstance(next(route for route in self._routes if _fits(route, scope)), OpenRoute)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = READ if scope["method"] in READING else WRITE
        try:
            principal = await self._principal(scope)
            if needed not in principal.scopes:
                raise self._lacks(scope, principal, needed)
        except _RefusalError as refusal:
            response = response_of(refusal.problem)
            for challenge in refusal.challenges:
                response.headers.append("www-authenticate", challenge)
            await response(scope, receive, send)
            return
        except DicomscpError as error:
            await response_of(problem_of(error))(scope, receive, send)
            return
        scope["user"], scope["may_store"] = principal.name, WRITE in principal.scopes
        with structlog.contextvars.bound_contextvars(user=principal.name):
            await self._app(scope, receive, send)

    async def _principal(self, scope: Scope) -> Principal:
        presented = Headers(scope=scope).getlist("authorization")
        if len(presented) > 1:
            raise _RefusalError(Problem(400, "A request says once who asks, in one Authorization header."))
        name, _, credentials = presented[0].strip().partition(" ") if presented else ("", "", "")
        scheme = self._schemes.get(name.lower())
        if scheme is None:
            known = " or ".join(one.capitalize() for one in self._schemes)
            raise self._unknown(f"Say who asks: Authorization is {known}.", "", name)
        verdict = await self._verdict(scope, scheme, name.lower(), credentials.strip())
        if verdict.principal is None:
            raise self._unknown(f"Access is refused: {verdict.reason}.", verdict.reason, name)
        return verdict.principal

    async def _verdict(self, scope: Scope, scheme: Scheme, name: str, credentials: str) -> Verdict:
        presented = f"{name} {scheme.revision()!r} {credentials}".encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(presented, key=self._key, digest_size=32).digest()
        verdict = self._admitted.get(digest) or self._refused.get(digest)
        if verdict is not None:
            return verdict
        judging = self._judging.get(digest)
        if judging is None:
            judging = asyncio.create_task(self._judge(scope, scheme, name, digest, credentials))
            self._judging[digest] = judging
            judging.add_done_callback(lambda task: self._judged(digest, task))
        return await asyncio.shield(judging)  # who goes away does not end it for others

    def _judged(self, digest: bytes, task: "asyncio.Task[Verdict]") -> None:
        del self._judging[digest]
        if not task.cancelled():
            task.exception()  # told to whoever still waits; nobody may

    async def _judge(
        self, scope: Scope, scheme: Scheme, name: str, digest: bytes, credentials: str
    ) -> Verdict:
        verdict = await scheme.judge(credentials)
        address = (scope.get("client") or ("",))[0]
        if verdict.principal is not None:
            self._admitted.put(digest, verdict)
            self._metrics.granted(name)
            log.info(
                "access_granted",
                user=verdict.principal.name,
                scopes=sorted(verdict.principal.scopes),
                scheme=name,
                address=address,
            )
        else:
            self._refused.put(digest, verdict)
            self._metrics.refused(name)
            if (unsaid := self._sparing.unsaid(address)) is not None:
                log.warning(
                    "access_refused", reason=verdict.reason, scheme=name, address=address, unsaid=unsaid
                )
        return verdict

    def _unknown(self, sentence: str, reason: str, presented: str) -> "_RefusalError":
        challenges = [
            scheme.challenge(reason if name == presented.lower() else "")
            for name, scheme in self._schemes.items()
        ]
        return _RefusalError(Problem(401, sentence), challenges)

    def _lacks(self, scope: Scope, principal: Principal, needed: str) -> "_RefusalError":
        self._metrics.refused("scope")
        log.warning("access_lacks_scope", user=principal.name, scope=needed, path=scope["path"])
        return _RefusalError(Problem(403, f"You are known here, but without the scope {needed!r}."))


def _fits(route: BaseRoute, scope: Scope) -> bool:
    """Whether *route* is for that path and method."""
    return route.matches(scope)[0] is Match.FULL


class _RefusalError(Exception):
    """A request that is answered here."""

    def __init__(self, problem: Problem, challenges: Sequence[str] = ()) -> None:
        super().__init__(problem.detail)
        self.problem, self.challenges = problem, challenges


class _Remembered:
    """Verdicts by digest, each until its time is over; the oldest makes room."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._verdicts: dict[bytes, tuple[float, Verdict]] = {}

    def get(self, digest: bytes) -> Verdict | None:
        until, verdict = self._verdicts.get(digest, (0.0, None))
        if verdict is not None and self._now() >= until:
            del self._verdicts[digest]
            return None
        return verdict

    def put(self, digest: bytes, verdict: Verdict) -> None:
        if len(self._verdicts) >= _REMEMBERED:
            del self._verdicts[next(iter(self._verdicts))]
        self._verdicts[digest] = self._now() + verdict.seconds, verdict


class _Sparing:
    """Whether to write a line about an address: a flood of refusals must not fill a disk with its log."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._said: dict[str, tuple[float, int]] = {}

    def unsaid(self, address: str) -> int | None:
        """How many were not written since the last line, or None if this is not to be written either."""
        at, unsaid = self._said.pop(address, (float("-inf"), 0))
        now = self._now()
        due = now - at >= _LOG_SECONDS
        if len(self._said) >= _LOGGED_ADDRESSES:
            del self._said[next(iter(self._said))]
        self._said[address] = (now, 0) if due else (at, unsaid + 1)
        return unsaid if due else None
