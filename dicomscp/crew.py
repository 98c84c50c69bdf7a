"""Crew: worker processes that share the items of one stream among them.

    items ─▶ chunks ─▶ worker, worker, ... ─▶ results, in the order in which they are made

A worker is started when there is an item for it and nobody idle; to start one costs as much as many
items, so the first starts alone, and each that has answered lets two more be started.  All it has of us
is one socket: no lock, no journal, no terminal.  It ends at once when the socket does, so none
outlives us.  What is on the way is bounded, whatever the length of the stream.
"""

import contextlib
import itertools
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

from dicomscp.children import start
from dicomscp.errors import BusyError, DicomscpError
from dicomscp.telemetry import log as telemetry_log

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Iterable[Item]], Iterable[Result]]
Begin = Callable[[], AbstractContextManager[Work[Item, Result]]]

_AHEAD = 2  # chunks that a worker has: one in hand and one to go on with
_FIRST_CHUNK, _LARGEST_CHUNK = 4, 64  # items
_CHUNK_SECONDS = 0.05  # what a chunk should take; each costs us about 0.1 ms
_LOOK_SECONDS = 0.1


def cores() -> int:
    """How many processes can work at the same time."""
    return len(os.sched_getaffinity(0))


def share(
    items: Iterable[Item],
    begin: Begin[Item, Result],
    *,
    jobs: int,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """What at most *jobs* workers make of *items*, in no order.

    In each worker *begin*, a function that can be pickled, is entered once and gives what turns some
    items at a time into as many results.  Once *stop* says so no item is begun; results of those under
    way still come.  Raises, after the results of all others, what *begin* raised of our own errors, or
    BusyError if a worker died; what became of the items that it had is not known.
    """
    crew = _Crew(begin, jobs)
    try:
        stream = iter(items)
        more = True
        while more or crew.is_busy:
            while more and not crew.failure and not stop() and crew.has_room:
                chunk = list(itertools.islice(stream, crew.chunk))
                more = bool(chunk)
                if chunk:
                    crew.give(chunk)
            if more and (crew.failure or stop()):
                more = False
                crew.finish()
            yield from crew.take()
        crew.finish()
        crew.wait()
    finally:
        crew.close()
    if crew.failure:
        raise crew.failure


class _Crew(Generic[Item, Result]):
    """The workers of one stream."""

    def __init__(self, begin: Begin[Item, Result], jobs: int) -> None:
        self._begin, self._jobs = begin, jobs
        self._workers: dict[Connection[Any, Any], _Worker] = {}
        self._ended: list[_Worker] = []
        self.chunk = _FIRST_CHUNK
        self.failure: DicomscpError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether results are still to come."""
        return any(worker.owes for worker in self._workers.values())

    @property
    def has_room(self) -> bool:
        """Whether a chunk more may be given."""
        return self._may_start or any(worker.owes < _AHEAD for worker in self._workers.values())

    @property
    def _may_start(self) -> bool:
        answered = sum(worker.has_answered for worker in self._workers.values())
        return len(self._workers) < min(self._jobs, 1 + 2 * answered)

    def give(self, chunk: list[Item]) -> None:
        """Give *chunk* to whoever has least, to a new worker if nobody is idle."""
        worker = min(self._workers.values(), key=lambda worker: worker.owes, default=None)
        if worker is None or (worker.owes and self._may_start):
            worker = _Worker(self._begin)
            self._workers[worker.connection] = worker
        worker.give(chunk)

    def take(self) -> Iterator[Result]:
        """The results that have come; waits a little for the first."""
        ready = wait(list(self._workers), _LOOK_SECONDS)
        for worker in [self._workers[connection] for connection in self._workers if connection in ready]:
            try:
                said = worker.connection.recv()
            except (EOFError, OSError):
                self._part_with(worker)
                continue
            if isinstance(said, DicomscpError):
                self._part_with(worker, said)
                continue
            worker.owes -= 1
            worker.has_answered = True
            results, seconds = said
            if results:
                fitting = int(len(results) * _CHUNK_SECONDS / max(seconds, 1e-6))
                self.chunk = max(1, min(fitting, 2 * self.chunk, _LARGEST_CHUNK))
            yield from results

    def _part_with(self, worker: "_Worker", failure: DicomscpError | None = None) -> None:
        """A worker has ended: as it was told to, or because of *failure*, or for a reason of its own."""
        self._ended.append(self._workers.pop(worker.connection))
        worker.process.join()
        if failure is None and (worker.process.exitcode or worker.owes):
            failure = BusyError(f"A worker process {worker.end()}")
        self.failure = self.failure or failure

    def finish(self) -> None:
        """Let nobody begin an item more."""
        for worker in self._workers.values():
            worker.give(None)

    def wait(self) -> None:
        """Return once all have ended by themselves."""
        for worker in list(self._workers.values()):
            self._part_with(worker)

    def close(self) -> None:
        """End who has not ended yet."""
        for worker in (*self._workers.values(), *self._ended):
            worker.connection.close()
            worker.process.join()


class _Worker:
    """One worker, seen from us."""

    def __init__(self, begin: Begin[Any, Any]) -> None:
        self.connection, theirs = Pipe()
        self.owes = 0  # replies
        self.has_answered = False
        with theirs:
            self.process = start("worker", _work, theirs, telemetry_log.settings(), begin)

    def give(self, chunk: list[Any] | None) -> None:
        """Give it a chunk to work on, or None for the end."""
        self.owes += chunk is not None
        self._send(chunk)

    def end(self) -> str:
        """How it ended."""
        self.process.join()
        status = self.process.exitcode or 0
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def _send(self, message: object) -> None:
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # its end is met when it is listened to
            self.connection.send(message)


class Count:
    """How many items a stream has, counted beside the work on another stream of the same items."""

    def __init__(self, items: Iterable[object]) -> None:
        self.total: int | None = None
        """None while it is not known."""
        self._items = items
        threading.Thread(target=self._count, name="count", daemon=True).start()

    def _count(self) -> None:
        with contextlib.suppress(OSError):  # who works on them meets it too, and says so
            self.total = sum(1 for _ in self._items)


# ── in the worker ────────────────────────────────────────────────────────────────────────────────


def _work(
    connection: "Connection[Any, Any]", settings: tuple[Any, ...] | None, begin: Begin[Any, Any]
) -> None:
    """Work on what comes by *connection*, until its end."""
    if settings:
        telemetry_log.configure(*settings, part="worker")
    chunks: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
    finish = threading.Event()
    threading.Thread(target=_listen, args=(connection, chunks, finish), name="listen", daemon=True).start()
    try:
        with begin() as work:
            for chunk in iter(chunks.get, None):
                began = time.monotonic()
                results = list(work(itertools.takewhile(lambda _: not finish.is_set(), chunk)))
                connection.send((results, time.monotonic() - began))
    except DicomscpError as error:
        connection.send(error)
        sys.exit(1)


def _listen(
    connection: "Connection[Any, Any]", chunks: "queue.SimpleQueue[list[Any] | None]", finish: threading.Event
) -> None:
    """Take what comes as it comes, so that who sends it never waits for who works on it."""
    try:
        while (chunk := connection.recv()) is not None:
            chunks.put(chunk)
    except (EOFError, OSError):  # nobody is there any more
        os._exit(1)
    finish.set()
    chunks.put(None)
