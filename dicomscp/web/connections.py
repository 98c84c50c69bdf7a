"""Connections that hang lose themselves; nobody else notices.

The server under us bounds how long the head of a request over HTTP/1 may take, and no more: a client that
sends a body byte by byte, does not take what it asked for, or opens an encrypted connection and says
nothing keeps it for ever, and there are only so many.  What each connection does is known to the kernel,
and what its requests wait for is known here, whatever the protocol above; so both are looked at, once a
second:

    a request waits for its client, who does nothing, or next to nothing     the connection is cut
    what was sent is not taken, or next to nothing of it                     cut
    no request is under way, and nothing moves                               closed
    no request is under way, and connections are getting scarce              closed, soon

How fast is "next to nothing": less than 1 KiB a second, over `stall_seconds`.

A connection is found by its descriptor among those of this process, because the server keeps it to itself,
and its requests by the client's address and port.  A descriptor is duplicated before it is looked at, so
that it is the same one that is then closed.
"""

import contextlib
import fcntl
import ipaddress
import os
import socket
import stat
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger()

LEAST_RATE = 1024  # bytes a second
HEAD_BYTES = 64 << 10
"""Of all header fields of a request: tokens with many roles take 8 KiB, a long query as much."""

_LOOK_SECONDS = 1.0
_CROWDED = 0.75  # of the connections there may be
_CROWDED_SECONDS = 5.0  # a client that means it has asked by then

# struct tcp_info of linux/tcp.h, which only grows at its end: state, milliseconds since data was sent and
# received last, bytes acknowledged and received.
_TCP_INFO_BYTES = 136
_STATE, _SENT_AGO, _RECEIVED_AGO, _ACKED = 0, 44, 52, 120
_ESTABLISHED, _CLOSE_WAIT = 1, 8
_ABORT = struct.pack("ii", 1, 0)  # close by RST: what nobody takes is not kept for minutes

Peer = tuple[str, int]


@dataclass(slots=True, eq=False)
class _Request:
    """One request under way, as far as it waits for its client."""

    waits_since: float | None = None
    received: int = 0
    body_began: float | None = None


@dataclass(slots=True)
class _Seen:
    """What is remembered of a connection between two looks."""

    active: float  # when a request began or ended last, or when it was first seen
    requests: list[_Request] = field(default_factory=list)
    acked: int = 0
    acked_since: float | None = None  # since when there is something to acknowledge


class Connections:
    """Those of one listening socket.  Requests are noted in the event loop, `look` runs in a thread."""

    def __init__(
        self,
        *,
        at_most: int = 512,
        idle_seconds: float = 60,
        stall_seconds: float = 30,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._at_most, self._idle_seconds, self._stall_seconds = at_most, idle_seconds, stall_seconds
        self._now = now
        self._seen: dict[Peer, _Seen] = {}
        self._lock = threading.Lock()

    def noting(self, app: ASGIApp) -> ASGIApp:
        """*app*, with its requests noted."""

        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not scope.get("client"):
                await app(scope, receive, send)
                return
            host, port = scope["client"]
            request, seen = self._begin((_canonical(host), int(port)))
            try:
                await app(scope, self._receiving(request, receive), self._sending(request, send))
            finally:
                with self._lock:
                    seen.active = self._now()
                    seen.requests.remove(request)

        return noted

    def _begin(self, peer: Peer) -> tuple[_Request, _Seen]:
        now = self._now()
        request = _Request()
        with self._lock:
            seen = self._seen.setdefault(peer, _Seen(now))
            seen.active = now
            seen.requests.append(request)
        return request, seen

    def _receiving(self, request: _Request, receive: Receive) -> Receive:
        ended = False

        async def receiving() -> Message:
            nonlocal ended
            if ended:  # what is waited for now is that the client goes away
                return await receive()
            request.waits_since = self._now()
            if request.body_began is None:
                request.body_began = request.waits_since
            message = await receive()
            request.waits_since = None
            request.received += len(message.get("body", b""))
            if not message.get("more_body"):
                ended = True
                request.body_began = None
            return message

        return receiving

    def _sending(self, request: _Request, send: Send) -> Send:
        async def sending(message: Message) -> None:
            request.waits_since = self._now()
            await send(message)
            request.waits_since = None

        return sending

    def watch(self, listening: socket.socket, stop: threading.Event) -> None:
        """Look at the connections of *listening* once a second until *stop* is set."""
        while not stop.wait(_LOOK_SECONDS):
            self.look(listening)

    def look(self, listening: socket.socket) -> None:
        """Close what hangs now."""
        now = self._now()
        found = _connections(listening.getsockname()[1])
        try:
            with self._lock:
                for peer in self._seen.keys() - found.keys():
                    if not self._seen[peer].requests:
                        del self._seen[peer]
                crowded = len(found) >= self._at_most * _CROWDED
                ending = [
                    (peer, connection, reason, cut)
                    for peer, connection in found.items()
                    for reason, cut in self._reasons(
                        self._seen.setdefault(peer, _Seen(now)), connection, now, crowded=crowded
                    )
                ]
            for peer, connection, reason, cut in ending:
                log.info("connection_closed", address=peer[0], reason=reason)
                _end(connection, cut=cut)
        finally:
            for connection in found.values():
                connection.close()

    def _reasons(
        self, seen: _Seen, connection: socket.socket, now: float, *, crowded: bool
    ) -> Iterator[tuple[str, bool]]:
        """Why the connection is to end, if it is, and whether by a cut."""
        info = _info(connection)
        if info is None:
            return
        untaken = _unsent(connection)
        if self._stalled(seen, now) or self._untaken(seen, info.acked, untaken, now):
            yield "stalled", True
        elif not seen.requests and not untaken:
            asked_ago = now - seen.active
            if crowded and asked_ago >= _CROWDED_SECONDS:
                yield "crowded", False
            elif min(asked_ago, info.quiet_seconds) >= self._idle_seconds:
                yield "idle", False

    def _stalled(self, seen: _Seen, now: float) -> bool:
        """Whether a request waits for its client and has done so too long, or a body comes too slowly."""
        return any(
            (request.waits_since is not None and now - request.waits_since >= self._stall_seconds)
            or (
                request.body_began is not None
                and request.waits_since is not None
                and (taken := now - request.body_began) >= self._stall_seconds
                and request.received < LEAST_RATE * taken
            )
            for request in seen.requests
        )

    def _untaken(self, seen: _Seen, acked: int, untaken: int, now: float) -> bool:
        """Whether what was sent is not taken, or too slowly."""
        if not untaken:
            seen.acked_since = None
        elif seen.acked_since is None or acked - seen.acked >= LEAST_RATE * self._stall_seconds:
            seen.acked, seen.acked_since = acked, now
        return seen.acked_since is not None and now - seen.acked_since >= self._stall_seconds


@dataclass(frozen=True, slots=True)
class _Info:
    acked: int
    quiet_seconds: float


def _connections(port: int) -> dict[Peer, socket.socket]:
    """The accepted connections to *port* by their clients, as duplicates that the caller closes."""
    found: dict[Peer, socket.socket] = {}
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # it was closed meanwhile
            continue
        peer = _peer(connection, port)
        # A number that was free again may be that of a duplicate of ours.
        if peer is None or found.setdefault(peer, connection) is not connection:
            connection.close()
    return found


def _peer(connection: socket.socket, port: int) -> Peer | None:
    """The client of a connection to *port*, or None if it is none."""
    if connection.family not in {socket.AF_INET, socket.AF_INET6} or connection.type != socket.SOCK_STREAM:
        return None
    try:
        if connection.getsockname()[1] != port:
            return None
        host, peer_port = connection.getpeername()[:2]
    except OSError:  # it listens, or is not connected any more
        return None
    return _canonical(host), peer_port


@lru_cache(maxsize=1024)
def _canonical(host: str) -> str:
    """An address in one form, whoever wrote it."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _info(connection: socket.socket) -> _Info | None:
    """What the kernel knows of an open connection; None of one that is ending."""
    try:
        raw: Any = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return None
    if raw[_STATE] not in {_ESTABLISHED, _CLOSE_WAIT}:
        return None
    sent_ago, received_ago = (struct.unpack_from("I", raw, at)[0] for at in (_SENT_AGO, _RECEIVED_AGO))
    return _Info(struct.unpack_from("Q", raw, _ACKED)[0], min(sent_ago, received_ago) / 1000)


def _unsent(connection: socket.socket) -> int:
    """Bytes that were written and that the client's machine has not taken yet."""
    raw = fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", raw)[0])


def _end(connection: socket.socket, *, cut: bool) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        if cut:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        connection.shutdown(socket.SHUT_RDWR)
