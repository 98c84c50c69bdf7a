"""An ASGI application on Granian, in the calling process, on a socket of the caller's.

The socket is bound by whoever starts the part and outlives it: its port is known before anything
is served (port 0 included), and while the part is restarted connections queue instead of being
refused.  Granian by itself would bind with SO_REUSEPORT, and a second gateway on the same port
would silently take half of the requests.
"""

import asyncio
import contextlib
import os
import socket
import threading
from typing import Any

import structlog
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.net import SocketHolder  # type: ignore[attr-defined]
from granian.server.embed import Server
from starlette.types import ASGIApp

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


def bind(host: str, port: int) -> socket.socket:
    """A listening socket on *host*, an address or a name; port 0 takes a free one.

    The port taken is `getsockname()[1]`.  Raises OSError if the address cannot be had.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server((address[0], address[1]), family=family, backlog=BACKLOG)


def serve(app: ASGIApp, listening: socket.socket, stop: threading.Event, *, drain_seconds: float = 5) -> None:
    """Serve *app* on *listening* until *stop* is set, by a signal handler or another thread.

    Idle connections are then closed at once, and requests begun have *drain_seconds* to end.  When
    this returns nothing is answered any more; *listening* is still open.
    Raises RuntimeError if the server ended by itself.
    """
    asyncio.run(_serve(app, listening, stop, drain_seconds))


async def _serve(app: ASGIApp, listening: socket.socket, stop: threading.Event, drain_seconds: float) -> None:
    server = _Server(app, listening)
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

    def __init__(self, app: ASGIApp, listening: socket.socket) -> None:
        host, port = listening.getsockname()[:2]
        super().__init__(
            app,
            address=host,
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(),
            websockets=False,
            backlog=BACKLOG,
            log_level=LogLevels.error,
            log_dictconfig=_LOGGING,
        )
        self._listening = listening

    def _init_shared_socket(self) -> None:
        # Accepted connections inherit TCP_NODELAY.  Granian closes the descriptor that it is given.
        self._listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._shd = SocketHolder(os.dup(self._listening.fileno()), False, BACKLOG)  # type: ignore[call-arg,assignment]
