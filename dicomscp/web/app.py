"""The web application: who may ask, what is there, and how failures are told.

    /            studies, for people             /dicomweb/...  studies, for programs
    /changes     which were published since, for systems that follow
    /ohif/...    the viewer, if it is installed
    /healthz     this process answers            /metrics       Prometheus
    /readyz      the gateway does its work

Every request passes the guard, in this order: the Host header must be one that is ours (a page of
another site that rebinds its name to this machine is refused), then origins allowed by list get
their CORS headers, then the resource answers.  Whatever escapes a resource ends here: logged once,
told without internals.  Logs hold the path, never the query: people search by patient.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson
import prometheus_client
import structlog
from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import dicomscp
from dicomscp.archive.archive import Archive
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.errors import DamagedError, DicomscpError
from dicomscp.web.changes import Changes
from dicomscp.web.documents import Documents
from dicomscp.web.page import Page
from dicomscp.web.problem import Problem, problem_of, response_of
from dicomscp.web.search import Search
from dicomscp.web.studies import Studies
from dicomscp.web.viewer import Viewer, ViewerSettings

log = structlog.get_logger()

_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
}
_CORS_HEADERS = ("Accept", "Authorization", "Content-Type", "If-None-Match", "Range")
_CORS_EXPOSED = ("Content-Range", "ETag", "Retry-After", "Warning")
_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[0-9A-Za-z._-]+))(:[0-9]*)?", re.ASCII)
_SENTENCES = {
    404: "There is nothing at this address.",
    405: "This resource is there, but not for this method.",
}


@dataclass(frozen=True, slots=True)
class WebSettings:
    """What the application is told.

    *hosts*: names by which the gateway is reached, beside loopback names and addresses; "*" takes any.
    *cors_origins*: origins whose pages may read, such as "https://viewer.example.org"; "*" is any.
    *request_publish*: called from a worker thread with a study UID that somebody waits for.
    *max_results*, *empty_status*, *local*: of searches (`search.Search`).
    *inline_bytes*, *private_un*: as documents are made (`jsonmodel.Compiler`).
    *viewer*: where the viewer is, if it is to be served.
    *ready*: whether the gateway does its work, and facts about it.  *stopping*: whether it is to end.
    *metrics*: Prometheus text.
    """

    base_url: str = "/dicomweb"
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
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


def create_app(archive: Archive, settings: WebSettings, published: Path, state: Path) -> Starlette:
    """The application over *archive*, the documents at *published* and the studies' records at *state*."""
    documents = Documents(published)
    studies = Studies(
        archive,
        documents,
        base_url=settings.base_url,
        wait_seconds=settings.wait_seconds,
        new_compiler=partial(
            Compiler, cache_bytes=0, inline_bytes=settings.inline_bytes, private_un=settings.private_un
        ),
        request_publish=settings.request_publish,
    )
    search = Search(
        archive,
        base_url=settings.base_url,
        max_results=settings.max_results,
        empty_status=settings.empty_status,
        local=settings.local,
    )
    viewer = Viewer(settings.viewer) if settings.viewer else None
    page = Page(archive, state, settings.base_url, settings.ae_title, settings.version)
    return Starlette(
        routes=[
            Route("/", page.show, methods=["GET"]),
            *_probes(settings),
            *Changes(archive, settings.stopping).routes(),
            *search.routes(),
            *studies.routes(),
            *(viewer.routes() if viewer else ()),
        ],
        middleware=[Middleware(Guard, hosts=settings.hosts), *_cors(settings.cors_origins)],
        exception_handlers={Problem: _told, DicomscpError: _told, HTTPException: _told},
    )


def _cors(origins: tuple[str, ...]) -> list[Middleware]:
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "HEAD"),
            allow_headers=_CORS_HEADERS,
            expose_headers=_CORS_EXPOSED,
        )
    ]


def _probes(settings: WebSettings) -> list[Route]:
    async def health(_: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(_: Request) -> Response:
        done, facts = await to_thread.run_sync(settings.ready) if settings.ready else (True, {})
        return _json({"ready": done, **facts}, 200 if done else 503)

    async def metrics(_: Request) -> Response:
        text = await to_thread.run_sync(settings.metrics)
        return Response(text, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})

    endpoints = {"/healthz": health, "/readyz": ready, "/metrics": metrics}
    return [Route(path, endpoint, methods=["GET"]) for path, endpoint in endpoints.items()]


def _json(facts: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(facts), status, {"cache-control": "no-store"}, "application/json")


async def _told(request: Request, error: Exception) -> Response:
    """Failures that are expected, as problems; what a person must look at is logged."""
    if isinstance(error, DamagedError):
        log.error("held_data_damaged", path=request.scope["path"], reason=str(error))
    return response_of(_problem(error))


def _problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return Problem(error.status_code, _SENTENCES.get(error.status_code, error.detail), error.headers)
    if isinstance(error, DicomscpError):
        return problem_of(error)
    raise error


class Guard:
    """Every request's first and last resort: the Host header, security headers, and what escapes."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            problem = self._host_problem(Headers(scope=scope).getlist("host"))
            app = response_of(problem) if problem else self._app
            await app(scope, receive, answer.send)
        except Exception:  # one request is one unit of work
            log.exception("request_failed", method=scope["method"], path=scope["path"])
            if not answer.begun:
                sentence = "The gateway failed at this request; its log says why."
                await response_of(Problem(500, sentence))(scope, receive, answer.send)
            # Begun, it ends short of its Content-Length, and the client knows.

    def _host_problem(self, hosts: list[str]) -> Problem | None:
        written = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if written is None:
            return Problem(400, "A request names the host that it is for, once, in its Host header.")
        name = (written["address"] or written["name"]).lower().rstrip(".")
        if "*" in self._hosts or name in self._hosts or _is_local(name):
            return None
        log.warning("host_refused", host=name[:253])
        return Problem(
            421, "This gateway does not go by that host name. Its operator may add it to web.hosts."
        )


class _Answer:
    """The sending side of one request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)


def _is_local(name: str) -> bool:
    """An address or a loopback name: no other site can make a browser send these for its own name."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
