"""An ASGI application on Granian, in the calling process, on a socket of the caller's.

The socket is bound by whoever starts the part and outlives it: its port is known before anything
is served (port 0 included), and while the part is restarted connections queue instead of being
refused.  Granian by itself would bind with SO_REUSEPORT, and a second gateway on the same port
would silently take half of the requests.

With a certificate it speaks TLS 1.2 and 1.3, and HTTP/2 to whoever offers it (ALPN); without one HTTP/1.1
alone, for only proxies would speak HTTP/2 unencrypted, and disagreeing about where a request ends is how
they are deceived.
"""

import asyncio
import contextlib
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.net import SocketHolder  # type: ignore[attr-defined]
from granian.server.embed import Server
from starlette.types import ASGIApp

from dicomscp.web.connections import HEAD_BYTES, Connections

log = structlog.get_logger()

BACKLOG = 1024

# Errors of the server itself go to the program's log; incremental, so that the handlers which the
# program has set up stay as they are.
_LOGGING: dict[str, Any] = {
    "incremental": True,
    "handlers": {},
    "formatters": {},
    "loggers": {"_granian": {"propagate": True}},
}


# The head of a request over HTTP/1, and pieces of a body; the application's guard judges all heads alike.
_BUFFER_BYTES = 128 << 10
# OHIF asks for up to 100 things at once; what is over waits at the client.  Each may hold an open file.
_STREAMS = 100


@dataclass(frozen=True, slots=True)
class Transport:
    """How HTTP is spoken, and what clients may take of us (`connections.Connections`)."""

    certificate_file: Path | None = None
    key_file: Path | None = None
    max_connections: int = 512
    idle_seconds: float = 60
    stall_seconds: float = 30

    @property
    def scheme(self) -> str:
        """As addresses have it."""
        return "https" if self.certificate_file else "http"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket on *host*, an address or a name; port 0 takes a free one.

    The port taken is `getsockname()[1]`.  Raises OSError if the address cannot be had.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server((address[0], address[1]), family=family, backlog=BACKLOG)


_LOOPBACK = Transport()


def serve(
    app: ASGIApp,
    listening: socket.socket,
    stop: threading.Event,
    *,
    drain_seconds: float = 5,
    transport: Transport = _LOOPBACK,
) -> None:
    """Serve *app* on *listening* until *stop* is set, by a signal handler or another thread.

    Certificate and key must have been looked at (`certificate.check_certificate`).

    Idle connections are then closed at once, and requests begun have *drain_seconds* to end.  When
    this returns nothing is answered any more; *listening* is still open.
    Raises RuntimeError if the server ended by itself.
    """
    connections = Connections(
        at_most=transport.max_connections,
        idle_seconds=transport.idle_seconds,
        stall_seconds=transport.stall_seconds,
    )
    watching = threading.Thread(
        target=connections.watch, args=(listening, stop), name="web-connections", daemon=True
    )
    watching.start()
    server = _Server(connections.noting(app), listening, transport)
    asyncio.run(_serve(server, stop, drain_seconds))
    watching.join()


async def _serve(server: "_Server", stop: threading.Event, drain_seconds: float) -> None:
    serving = asyncio.create_task(server.serve())
    asked = asyncio.create_task(_when_set(stop))
    await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
    if not asked.done():
        raise RuntimeError("the web server ended by itself") from serving.exception()
    server.stop()  # type: ignore[no-untyped-call]
    _, late = await asyncio.wait({serving}, timeout=drain_seconds)
    if late:
        log.warning("web_requests_cut", drain_seconds=drain_seconds)


async def _when_set(event: threading.Event) -> None:
    loop, reached = asyncio.get_running_loop(), asyncio.Event()

    def wait() -> None:
        event.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(reached.set)

    threading.Thread(target=wait, name="web-stop", daemon=True).start()
    await reached.wait()


class _Server(Server):
    """Granian's embedded server on a socket that exists already."""

    def __init__(self, app: ASGIApp, listening: socket.socket, transport: Transport) -> None:
        host, port = listening.getsockname()[:2]
        super().__init__(
            app,
            address=host,
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.auto if transport.certificate_file else HTTPModes.http1,
            http1_settings=HTTP1Settings(
                # Also how long a connection may be without a request.
                header_read_timeout=round(transport.idle_seconds * 1000),
                max_buffer_size=_BUFFER_BYTES,
            ),
            http2_settings=HTTP2Settings(max_headers_size=HEAD_BYTES, max_concurrent_streams=_STREAMS),
            ssl_cert=transport.certificate_file,
            ssl_key=transport.key_file,
            ssl_protocol_min=SSLProtocols.tls12,
            websockets=False,
            backlog=BACKLOG,
            backpressure=transport.max_connections,
            log_level=LogLevels.error,
            log_dictconfig=_LOGGING,
        )
        self._listening = listening

    def _init_shared_socket(self) -> None:
        # Accepted connections inherit TCP_NODELAY.  Granian closes the descriptor that it is given.
        self._listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._shd = SocketHolder(os.dup(self._listening.fileno()), False, BACKLOG)  # type: ignore[call-arg,assignment]
