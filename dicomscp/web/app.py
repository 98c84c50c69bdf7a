"""The web application: who may ask, what is there, and how failures are told.

    /            studies, for people             /dicomweb/...  studies, for programs
    /wado        instances and images, by WADO-URI
    /status      how the gateway stands
    /changes     which were published since, for systems that follow
    /ohif/...    the viewer, if it is installed
    /healthz     this process answers            /metrics       Prometheus
    /readyz      the gateway does its work

Every request passes the guard, in this order: the Host header must be one that is ours (a page of another
site that rebinds its name to this machine is refused), then origins allowed by list get their CORS headers
and their preflights an answer, then who asks is looked at (`web/access`, if anybody is to be asked), then
the resource answers.  Whatever escapes a resource ends here: logged once, told without internals.  Logs
hold the path, never the query: people search by patient.

A browser sends what it has of us (cookies it has none, but passwords, and the loopback address) with
requests that pages of others make.  They cannot read the answers; that they cannot store either is seen to
here.  Pages of listed origins can do what ours can: read, store, show images, and documents in frames.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import orjson
import prometheus_client
import structlog
from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import dicomscp
from dicomscp.archive.archive import Archive
from dicomscp.errors import DamagedError, DicomscpError
from dicomscp.telemetry.metrics import CONTENT_TYPE, AccessMetrics
from dicomscp.web.access import READING, Access, OpenRoute, Scheme
from dicomscp.web.capabilities import Capabilities
from dicomscp.web.changes import Changes
from dicomscp.web.connections import HEAD_BYTES
from dicomscp.web.decoders import Decoders, Limits
from dicomscp.web.documents import Documents
from dicomscp.web.instances import Instances
from dicomscp.web.page import Page
from dicomscp.web.problem import Problem, problem_of, response_of
from dicomscp.web.render import Rendering
from dicomscp.web.search import Search
from dicomscp.web.store import Store, StoreSettings
from dicomscp.web.studies import Studies
from dicomscp.web.viewer import Viewer, ViewerSettings
from dicomscp.web.wado_uri import WadoUri

log = structlog.get_logger()

_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_OUR_FRAMES = b"frame-ancestors 'self'"
_CORS_HEADERS = ("Accept", "Authorization", "Content-Type", "If-None-Match", "If-Range", "Range")
_CORS_METHODS = ("GET", "HEAD", "POST")
_CORS_EXPOSED = ("Accept-Ranges", "Content-Range", "ETag", "Location", "Retry-After", "Warning")
_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[0-9A-Za-z._-]+))(:[0-9]*)?", re.ASCII)
_WITHOUT_CONTENT = frozenset({"GET", "HEAD", "OPTIONS", "DELETE", "TRACE"})
_LAST = {"connection": "close"}  # what follows on the connection may be part of it
_SENTENCES = {
    404: "There is nothing at this address.",
    405: "This resource is there, but not for this method.",
}


@dataclass(frozen=True, slots=True)
class WebSettings:
    """What the application is told.

    *hosts*: names by which the gateway is reached, beside loopback names and addresses; "*" takes any.
    *cors_origins*: origins whose pages may ask, such as "https://viewer.example.org"; "*" is any.
    *schemes*: how people say who they are (`access.Access`); with none nobody is asked.  With "bearer" alone
    nobody is asked for the viewer's files, which have nothing of what is held: browsers ask for pages without
    a token.
    *request_publish*: called from a worker thread with a study UID that somebody waits for.
    *max_results*, *empty_status*, *local*: of searches (`search.Search`).
    *inline_bytes*, *private_un*: as documents are made (`jsonmodel.Compiler`).
    *viewer*: where the viewer is, if it is to be served.
    *ready*: whether the gateway does its work, and facts about it.  *stopping*: whether it is to end.
    *metrics*: Prometheus text.  *status*: how the gateway stands, as `dicomscp status --json` says it; {} is
    not told.  *viewer_url*: where the study of a UID can be viewed, if not in *viewer*; None if nowhere.
    *store*: how instances are stored; without it they are not.
    *frame_files*: frames are published as files.
    """

    base_url: str = "/dicomweb"
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    wait_seconds: float = 10.0
    max_results: int = 1000
    empty_status: int = 200
    local: Callable[[datetime], timedelta] = lambda _: timedelta(0)
    inline_bytes: int = 1024
    private_un: Literal["parse", "keep"] = "parse"
    ae_title: str = "DICOMSCP"
    version: str = dicomscp.__version__
    request_publish: Callable[[str], None] | None = None
    viewer: ViewerSettings | None = None
    ready: Callable[[], tuple[bool, dict[str, Any]]] | None = None
    stopping: Callable[[], bool] = lambda: False
    metrics: Callable[[], bytes] = prometheus_client.generate_latest
    store: StoreSettings | None = None
    status: Callable[[], Mapping[str, Any]] = dict
    viewer_url: Callable[[str], str | None] = lambda _: None
    frame_files: bool = False


def create_app(
    archive: Archive,
    settings: WebSettings,
    published: Path,
    state: Path,
    decoders: Decoders | None = None,
) -> Starlette:
    """The application over *archive*, the documents at *published* and the studies' records at *state*.

    *decoders*, which the caller closes, are for pixels that are not given as they are stored; without them
    the application has its own, whose children end with this process.
    """
    decoders = decoders or Decoders(Limits())
    documents = Documents(published)
    studies = Studies(
        archive,
        documents,
        decoders,
        base_url=settings.base_url,
        wait_seconds=settings.wait_seconds,
        inline_bytes=settings.inline_bytes,
        private_un=settings.private_un,
        request_publish=settings.request_publish,
        frame_files=settings.frame_files,
    )
    instances = Instances(archive, decoders, base_url=settings.base_url)
    rendering = Rendering(archive, decoders, studies, base_url=settings.base_url)
    search = Search(
        archive,
        base_url=settings.base_url,
        max_results=settings.max_results,
        empty_status=settings.empty_status,
        local=settings.local,
    )
    capabilities = Capabilities(
        lambda: archive.model, base_url=settings.base_url, stores=settings.store is not None
    )
    store = Store(settings.store, decoders, base_url=settings.base_url).routes() if settings.store else []
    viewer = (
        Viewer(settings.viewer, is_open=settings.schemes.keys() == {"bearer"}) if settings.viewer else None
    )
    page = Page(
        archive,
        state,
        settings.base_url,
        ae_title=settings.ae_title,
        version=settings.version,
        status=settings.status,
        viewer_url=viewer.study_url if viewer else settings.viewer_url,
    )
    routes = [
        *studies.routes(),  # first: they are looked at in this order, and viewers ask for every frame
        *search.routes(),
        *page.routes(),
        *_probes(settings),
        *Changes(archive, settings.stopping).routes(),
        *capabilities.routes(),
        *instances.routes(),
        *rendering.routes(),
        *WadoUri(archive, instances, rendering).routes(),
        *store,
        *(viewer.routes() if viewer else ()),  # last: nothing of ours is behind it
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Guard, hosts=settings.hosts, origins=settings.cors_origins),
            *_cors(settings.cors_origins),
            *_access(settings, routes),
        ],
        exception_handlers={Problem: _told, DicomscpError: _told, HTTPException: _told},
    )
    # Nothing has moved; and where browsers find us, behind a proxy and below its path, is not known here.
    app.router.redirect_slashes = False
    return app


def _cors(origins: tuple[str, ...]) -> list[Middleware]:
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=_CORS_METHODS,
            allow_headers=_CORS_HEADERS,
            # A page that is listed may use the password that its reader has given the browser for us.
            allow_credentials="*" not in origins,
            expose_headers=_CORS_EXPOSED,
        )
    ]


def _access(settings: WebSettings, routes: Sequence[Route]) -> list[Middleware]:
    if not settings.schemes:
        return []
    return [Middleware(Access, schemes=settings.schemes, routes=routes, metrics=AccessMetrics())]


def _probes(settings: WebSettings) -> list[Route]:
    async def health(_: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(_: Request) -> Response:
        done, facts = await to_thread.run_sync(settings.ready) if settings.ready else (True, {})
        return _json({"ready": done, **facts}, 200 if done else 503)

    async def metrics(_: Request) -> Response:
        text = await to_thread.run_sync(settings.metrics)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return [
        OpenRoute("/healthz", health, methods=["GET"]),
        OpenRoute("/readyz", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]


def _json(facts: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(facts), status, {"cache-control": "no-store"}, "application/json")


async def _told(request: Request, error: Exception) -> Response:
    """Failures that are expected, as problems; what a person must look at is logged."""
    if isinstance(error, DamagedError):
        log.error("held_data_damaged", path=request.scope["path"], reason=str(error))
    problem = _problem(error)
    if problem.status == HTTPStatus.METHOD_NOT_ALLOWED:  # of one route; others may have the same address
        problem.headers = {"allow": ", ".join(sorted(_methods_at(request.scope)))}
    return response_of(problem)


def _methods_at(scope: Scope) -> set[str]:
    matching = (route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE)
    return {method for route in matching for method in route.methods or ()}


def _problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return Problem(error.status_code, _SENTENCES.get(error.status_code, error.detail), error.headers)
    if isinstance(error, DicomscpError):
        return problem_of(error)
    raise error


class Guard:
    """Every request's first and last resort: its form, its host, security headers, and what escapes."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._origins = frozenset(origins)
        headers, self._frames = dict(_SECURITY_HEADERS), b""
        if self._origins:
            # Images are asked for without an Origin to go by: whoever shows one of ours cannot look into it.
            headers[b"cross-origin-resource-policy"] = b"cross-origin"
            self._frames = b" ".join((_OUR_FRAMES, *(one.encode() for one in sorted(self._origins))))
        self._headers = tuple(headers.items())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, self._headers, self._frames)
        try:
            problem = self._problem(scope)
            app = response_of(problem) if problem else self._app
            await app(scope, receive, answer.send)
        except Exception:  # one request is one unit of work
            log.exception(
                "request_failed", method=scope["method"], path=scope["path"], user=scope.get("user")
            )
            if not answer.begun:
                sentence = "The gateway failed at this request; its log says why."
                await response_of(Problem(500, sentence))(scope, receive, answer.send)
            # Begun, it ends short of its Content-Length, and the client knows.

    def _problem(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
            return Problem(431, f"The header fields of a request take at most {HEAD_BYTES >> 10} KiB.")
        if problem := self._host_problem(headers.getlist("host")):
            return problem
        return self._content_problem(scope["method"], headers) or self._origin_problem(
            scope["method"], headers
        )

    def _content_problem(self, method: str, headers: Headers) -> Problem | None:
        """Content whose length others might see otherwise: so requests are smuggled (RFC 9112 11.2)."""
        codings = ",".join(headers.getlist("transfer-encoding")).lower()
        if codings not in {"", "chunked"}:  # RFC 9112 6.1
            return Problem(501, "Content is transferred as it is, or in chunks.", _LAST)
        if method in _WITHOUT_CONTENT and (codings or headers.get("content-length", "0") != "0"):
            return Problem(413, "This method takes no content.", _LAST)
        return None

    def _host_problem(self, hosts: list[str]) -> Problem | None:
        written = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if written is None:
            return Problem(400, "A request names the host that it is for, once, in its Host header.")
        if self._is_ours(_host_name(written)):
            return None
        log.warning("host_refused", host=_host_name(written)[:253])
        return Problem(
            421, "This gateway does not go by that host name. Its operator may add it to web.hosts."
        )

    def _is_ours(self, name: str) -> bool:
        return "*" in self._hosts or name in self._hosts or _is_local(name)

    def _origin_problem(self, method: str, headers: Headers) -> Problem | None:
        """A page of elsewhere that would have its reader's browser store something."""
        origin = headers.get("origin")
        if method in READING or origin is None or "*" in self._origins or origin in self._origins:
            return None
        scheme, _, place = origin.partition("://")
        written = _HOST.fullmatch(place) if scheme in {"http", "https"} else None
        # A proxy may speak to us by another name, or without encryption, than browsers to it.
        if written and (place == headers["host"] or _host_name(written) in self._hosts):
            return None
        log.warning("origin_refused", origin=origin[:253])
        return Problem(
            403, "Pages of this origin may not store. The gateway's operator may add it to web.cors_origins."
        )


class _Answer:
    """The sending side of one request.

    It has *headers* where it does not say otherwise, and *frames*, if any, where our own pages may frame it.
    """

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]], frames: bytes) -> None:
        self._send, self._headers, self._frames = send, headers, frames
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = message["headers"] = list(message.get("headers", ()))
            named = {name for name, _ in headers}  # which are in lower case (ASGI)
            headers += [pair for pair in self._headers if pair[0] not in named]
            if self._frames:
                message["headers"] = [self._widened(*pair) for pair in headers]
        await self._send(message)

    def _widened(self, name: bytes, value: bytes) -> tuple[bytes, bytes]:
        is_policy = name == b"content-security-policy"
        return name, value.replace(_OUR_FRAMES, self._frames) if is_policy else value


def _host_name(written: re.Match[str]) -> str:
    return (written["address"] or written["name"]).lower().rstrip(".")


@lru_cache(maxsize=64)
def _is_local(name: str) -> bool:
    """An address or a loopback name: no other site can make a browser send these for its own name."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
