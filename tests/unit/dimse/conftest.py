"""A listener on a free port, in a thread of the test's process."""

import dataclasses
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from dicomscp.dimse.server import Listener, ListenerSettings
from tests.processes import wait_until
from tests.unit.dimse.held import MemoryArchive, Seats

Listen = Callable[..., "Listening"]


@dataclasses.dataclass
class Listening:
    """What is known of a listener under test."""

    port: int
    listener: Listener
    archive: MemoryArchive
    seats: Seats
    log: list[dict[str, Any]]
    thread: threading.Thread

    def events(self, name: str) -> list[dict[str, Any]]:
        """What was logged under *name* so far."""
        return [entry for entry in list(self.log) if entry["event"] == name]

    def logged(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        """The same, once there are *count*."""
        wait_until(lambda: len(self.events(name)) >= count, 10, f"{count} of {name}")
        return self.events(name)


@contextmanager
def listening(archive: MemoryArchive, seats: Seats, settings: ListenerSettings) -> Iterator[Listening]:
    with socket.socket() as sock, capture_logs() as log:
        sock.bind(("127.0.0.1", 0))
        sock.listen(256)
        listener = Listener(sock, settings, archive, seats=seats)  # type: ignore[arg-type]
        thread = threading.Thread(target=listener.serve)
        thread.start()
        yield Listening(sock.getsockname()[1], listener, archive, seats, log, thread)
        listener.drain(0)
        thread.join(20)
        assert not thread.is_alive()
        assert seats.taken == 0


@pytest.fixture
def listen() -> Iterator[Listen]:
    """A function that starts a listener: an archive, seats, and settings by name."""
    with ExitStack() as stack:

        def start(archive: MemoryArchive | None = None, *, seats: int = 100, **settings: Any) -> Listening:
            return stack.enter_context(
                listening(archive or MemoryArchive(), Seats(seats), ListenerSettings(**settings))
            )

        yield start


@pytest.fixture
def ct_dataset(ct_small: Path) -> bytes:
    """The dataset of a real CT instance, explicit VR little endian."""
    data = ct_small.read_bytes()
    return data[144 + struct.unpack_from("<L", data, 140)[0] :]


@pytest.fixture
def ct_uid() -> str:
    """Its SOP Instance UID."""
    return "1.3.6.1.4.1.5962.1.1.1.1.1.20040119072730.12322"
