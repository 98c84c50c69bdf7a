"""Daemon: builds the parts from Config, starts and stops them in order.

`serve` supervises child processes, one a part.  A child holds one end of a pipe to the supervisor: when it
reads its end it is an orphan and ends at once, as after a crash.  When it is ready it says so there.
"""

import contextlib
import fcntl
import functools
import ipaddress
import mmap
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import structlog
from sqlalchemy import Engine

from dicomscp import __version__
from dicomscp.archive import sqlite
from dicomscp.archive.archive import Archive, Intake, rebuild_marker
from dicomscp.archive.filing import Filing
from dicomscp.archive.index import Index
from dicomscp.archive.rebuild import mark, mark_if_held, rebuild_index
from dicomscp.children import Child, Descriptor, start
from dicomscp.config import Config, is_loopback
from dicomscp.crew import cores
from dicomscp.dicom.matching import Level, Model, header_tag
from dicomscp.dimse.query import Answering
from dicomscp.dimse.server import KnownAe, Listener, ListenerSettings
from dicomscp.disk import Disk
from dicomscp.errors import BusyError, ConfigError, DamagedError, DicomscpError
from dicomscp.inbox import Inbox
from dicomscp.pipeline import Pipeline
from dicomscp.publisher import Documents, Publisher
from dicomscp.status import Status, is_alive, running, unknown_keys, write_parts, write_running
from dicomscp.telemetry import log as telemetry_log
from dicomscp.telemetry import metrics, refusals
from dicomscp.web import server as web_server
from dicomscp.web.access import Scheme
from dicomscp.web.app import WebSettings, create_app
from dicomscp.web.decoders import Decoders, Limits
from dicomscp.web.store import StoreSettings
from dicomscp.web.users import Users
from dicomscp.web.viewer import ViewerSettings, app_config, publish_site, read_settings

log = structlog.get_logger()

_BACKOFF_SECONDS = (0.5, 30.0)
_AWAY_SECONDS = 10.0  # at most between two looks for a database that is away
_STEADY_SECONDS = 60.0
_EXTEND_SECONDS = 5.0
_DIMSE_BACKLOG = 256
_LISTED = 20  # of each kind of trouble on the page; the log and the folders have them all
_FIRST_MOMENT, _LAST_MOMENT = datetime(1, 1, 3), datetime(9999, 12, 29)  # noqa: DTZ001 - of local time


# ── serve: the supervisor ────────────────────────────────────────────────────────────────────────


def serve(config: Config) -> int:
    """Run the gateway until SIGTERM or SIGINT; returns the exit status.

    Raises ConfigError if an address cannot be had, BusyError if another serve has the root.
    """
    if warning := check_web(config):
        log.warning("certificate_ends", reason=warning)
    root = prepare_root(config)
    config = config.model_copy(update={"root": root})
    stop = threading.Event()
    with root_lock(root) as lock, contextlib.ExitStack() as stack:
        dimse = stack.enter_context(_bind("dimse", config.dimse.host, config.dimse.port))
        web = stack.enter_context(_bind("web", config.web.host, config.web.port))
        _set_on(stop, signal.SIGTERM, signal.SIGINT)
        _clear_run(root)
        _publish_viewer(config)
        _make_or_find_index(config)
        seats = Seats(root / "run" / "associations", 0, cells=config.dimse.listeners, limit=0)
        parts = _parts(config, dimse, web, lock)
        supervisor = Supervisor(parts, seats, drain_seconds=config.drain_seconds)
        try:
            supervisor.start(stop)
            if not stop.is_set():
                _write_state(root, config, dimse, web)
                _notify(b"READY=1")
                log.info(
                    "ready",
                    ae_title=config.dimse.ae_title,
                    dimse="{}:{}".format(*dimse.getsockname()[:2]),
                    web="{}://{}:{}/".format(_transport(config).scheme, *web.getsockname()[:2]),
                    root=str(root),
                )
            supervisor.watch(stop)
        finally:
            _notify(b"STOPPING=1")
            supervisor.stop()
            (root / "run" / "state.json").unlink(missing_ok=True)
    log.info("stopped")
    return 0


def _publish_viewer(config: Config) -> None:
    """Let other web servers find the viewer as we serve it; on a full disk we receive all the same."""
    try:
        publish_site(viewer_settings(config))
    except BusyError as error:
        log.error("viewer_not_published", reason=str(error))


def _make_or_find_index(config: Config) -> None:
    """See to it that there is an index before anybody is let in; one that cannot be read is made anew.

    A server of PostgreSQL that is away is not waited for: what receives needs it not, and the pipeline waits.
    """
    try:
        _see_to_index(config)
    except DamagedError as error:
        log.error("index_set_aside", reason=str(error))
        set_index_aside(config)
        _see_to_index(config)
    except BusyError as error:
        if not config.index.url:
            raise
        log.error("index_away", reason=str(error))


def _see_to_index(config: Config) -> None:
    """Make or migrate the index, and let go of it: parts have connections of their own."""
    engine = _open_engine(config, read_only=False)
    try:
        index = _index(config, engine)
        if unknown := unknown_keys(index):
            log.warning("extra_keys_not_askable", keys=unknown, mend="dicomscp rebuild --index")
    finally:
        engine.dispose()


def _set_on(stop: threading.Event, *numbers: signal.Signals) -> None:
    """Set *stop* when one of these signals comes.

    A handler runs within whatever the main thread does, which may be holding the event's own lock: it must
    not set it.  So the signal is written to a pipe, and a thread that reads it does.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        os.read(reading, 1)
        stop.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()


@dataclass(slots=True)
class Part:
    """One child process and how it is started again."""

    name: str
    config: Config
    run: "Callable[[Life], None]"
    stage: int  # parts end from the highest stage down
    waits: bool = False  # until the others are ready
    given: Any = None  # what it has of the supervisor's
    cell: int | None = None
    child: Child | None = None
    pipe: "Connection[Any, Any] | None" = None
    started: float = 0.0
    started_at: str = ""
    deaths: int = 0
    exit_status: int | None = None  # of the last that died
    pause: float = _BACKOFF_SECONDS[0]
    restart_at: float = float("inf")


class Supervisor:
    """Starts the parts in order, starts again what dies, ends all in reverse order.

    run/parts.json says how each of them is.
    """

    def __init__(self, parts: Sequence[Part], seats: "Seats", *, drain_seconds: float) -> None:
        """*parts* in the order in which they start."""
        self._parts, self._seats, self._drain_seconds = parts, seats, drain_seconds

    def start(self, stop: threading.Event) -> None:
        """Return once every part is ready, or *stop* is set.  Raises DicomscpError if one ends instead.

        What receives does not wait for what answers: filing what an earlier life left may take time.
        """
        for later in (False, True):
            starting = [part for part in self._parts if part.waits == later]
            for part in starting:
                self._spawn(part)
            for part in starting:
                self._wait_ready(part, stop)
            if stop.is_set():
                return

    def watch(self, stop: threading.Event) -> None:
        """Start again, with growing pauses, what dies; return when *stop* is set."""
        petted = 0.0
        while not stop.wait(0.1):
            now = time.monotonic()
            for part in self._parts:
                if part.child is not None and part.child.exitcode is not None:
                    self._bury(part, now)
                elif part.child is None and now >= part.restart_at:
                    self._start_again(part, now)
            if now - petted > 1:
                _notify(b"WATCHDOG=1")
                petted = now

    def stop(self) -> None:
        """Drain what receives, then end the rest; what does not end in time is killed."""
        for stage in sorted({part.stage for part in self._parts}, reverse=True):
            running = [part for part in self._parts if part.stage == stage]
            for part in running:
                if part.child is not None:
                    part.child.terminate()
            deadline = time.monotonic() + self._drain_seconds + 5
            for part in running:
                self._reap(part, deadline)

    def _reap(self, part: Part, deadline: float) -> None:
        if part.child is None:
            return
        part.child.join(max(0.1, deadline - time.monotonic()))
        if part.child.exitcode is None:
            log.error("part_killed", part=part.name)
            part.child.kill()
            part.child.join()
        self._close(part)

    def _spawn(self, part: Part) -> None:
        """Start a part.  Raises BusyError if there is no room for a process."""
        pipe, theirs = Pipe()
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.callback(pipe.close)
            part.child = start(part.name, run_part, part.name, part.config, part.run, part.given, theirs)
            unless_started.pop_all()
        part.pipe, part.started, part.restart_at = pipe, time.monotonic(), float("inf")
        part.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._tell()

    def _start_again(self, part: Part, now: float) -> None:
        try:
            self._spawn(part)
        except BusyError as error:
            part.restart_at = now + part.pause
            log.error("part_not_started", part=part.name, reason=str(error), retry_seconds=part.pause)
            part.pause = min(part.pause * 2, _BACKOFF_SECONDS[1])

    def _wait_ready(self, part: Part, stop: threading.Event) -> None:
        told = 0.0
        while part.pipe is not None and not stop.is_set():
            if part.pipe.poll(0.1):
                try:
                    part.pipe.recv_bytes()
                except (EOFError, ConnectionResetError):
                    raise DicomscpError(f"{part.name} ended before it was ready; see the log above") from None
                return
            if time.monotonic() > told + _EXTEND_SECONDS:
                _notify(b"EXTEND_TIMEOUT_USEC=30000000")
                told = time.monotonic()

    def _bury(self, part: Part, now: float) -> None:
        """Note that a part died, and when it is to be started again."""
        code = part.exit_status = part.child.exitcode if part.child else None
        part.deaths += 1
        self._close(part)
        self._tell()
        metrics.forget(part.config.root / "run" / "metrics", part.name)
        if part.cell is not None:
            self._seats.clear(part.cell)
        if now - part.started > _STEADY_SECONDS:
            part.pause = _BACKOFF_SECONDS[0]
        part.restart_at = now + part.pause
        log.error("part_died", part=part.name, exit_status=code, restart_seconds=part.pause)
        part.pause = min(part.pause * 2, _BACKOFF_SECONDS[1])

    def _tell(self) -> None:
        """Say how the parts are; a disk that is full keeps what was said before."""
        told = [
            {
                "name": part.name,
                "alive": part.child is not None,
                "started_at": part.started_at,
                "deaths": part.deaths,
                "exit_status": part.exit_status,
            }
            for part in self._parts
        ]
        try:
            write_parts(self._parts[0].config.root, told)
        except OSError as error:
            log.warning("parts_not_told", reason=str(error))

    def _close(self, part: Part) -> None:
        if part.child is not None and part.pipe is not None:
            part.child.close()
            part.pipe.close()
        part.child = part.pipe = None


class Seats:
    """How many associations are open in all listeners, in memory that they share.

    A listener counts in a cell of its own; the supervisor clears the cell of one that died.
    """

    def __init__(self, path: Path, cell: int, *, cells: int, limit: int) -> None:
        """Count in *cell* of the file *path*; `take` keeps the sum of all *cells* within *limit*."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self._descriptor, 0, 8 * max(cells, 1))  # a hole is a SIGBUS on a full disk
        self._map = mmap.mmap(self._descriptor, 8 * max(cells, 1))
        self._counts = memoryview(self._map).cast("Q")
        self._cell, self._limit = cell, limit
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Count one association more; False if that is one too many for the gateway."""
        with self._lock, _flocked(self._descriptor):
            if sum(self._counts) >= self._limit:
                return False
            self._counts[self._cell] += 1
            return True

    def release(self) -> None:
        """Count one association less."""
        with self._lock:
            self._counts[self._cell] -= 1

    def clear(self, cell: int) -> None:
        """Forget what a listener counted that is gone."""
        self._counts[cell] = 0

    def taken(self) -> int:
        """How many associations are open."""
        return sum(self._counts)


def _parts(config: Config, dimse: socket.socket, web: socket.socket, lock: int) -> list[Part]:
    config = config.model_copy(update={"root": config.root.resolve()})
    listeners = [
        Part(f"listener-{cell}", config, _run_listener, 2, given=(dimse, cell), cell=cell)
        for cell in range(config.dimse.listeners)
    ]
    inbox = [Part("inbox", config, _run_inbox, 2)] if config.inbox.enabled else []
    return [
        Part("pipeline", config, _run_pipeline, 0, given=Descriptor(lock)),
        Part("web", config, _run_web, 1, waits=True, given=web),
        *listeners,
        *inbox,
    ]


@contextlib.contextmanager
def _bind(part: str, host: str, port: int) -> Iterator[socket.socket]:
    try:
        if part == "web":
            listening = web_server.bind(host, port)
        else:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            listening = socket.create_server((host, port), family=family, backlog=_DIMSE_BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(f"{part}.host: {host} is no address of this machine: {error.strerror}") from error
    except OSError as error:
        raise BusyError(
            f"{part}.port: cannot listen on {host}:{port}: {error.strerror}; "
            "stop what listens there or choose another port"
        ) from error
    with listening:
        yield listening


def _write_state(root: Path, config: Config, dimse: socket.socket, web: socket.socket) -> None:
    state = {
        "pid": os.getpid(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "dimse": {
            "ae_title": config.dimse.ae_title,
            "host": config.dimse.host,
            "port": dimse.getsockname()[1],
        },
        "web": {
            "scheme": _transport(config).scheme,
            "host": config.web.host,
            "port": web.getsockname()[1],
        },
    }
    write_running(root, state)


def _clear_run(root: Path) -> None:
    """What an earlier life left in run/ means nothing now."""
    for name in ("associations", "state.json", "parts.json"):
        (root / "run" / name).unlink(missing_ok=True)
    metrics.clean(root / "run" / "metrics")
    refusals.clean(root / "run" / "refusals")
    asked = root / "run" / "asked"
    asked.mkdir(mode=0o700, exist_ok=True)
    for path in asked.iterdir():
        path.unlink()


def _notify(message: bytes) -> None:
    """Tell systemd, if it started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifying,
        contextlib.suppress(OSError),  # a manager that does not listen is not our failure
    ):
        notifying.sendto(message, socket.MSG_DONTWAIT, address)


# ── the root ─────────────────────────────────────────────────────────────────────────────────────


def prepare_root(config: Config) -> Path:
    """The root, made if it is missing, for our user alone.  Raises ConfigError if it cannot be."""
    os.umask(0o077)
    root = config.root.resolve()
    try:
        for name in ("", "run", "state", "incoming", "instances", "journal", "dicomweb"):
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (root, *root.parents[:-1]):
            Disk().sync_directory(folder)
    except PermissionError as error:
        if not root.is_dir() or not os.access(root, os.W_OK):
            raise ConfigError(f"root: {root} cannot be used: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(f"root: {root} cannot be used: {error.strerror}") from error
    devices = {(root / name).stat().st_dev for name in ("", "incoming", "instances", "journal", "dicomweb")}
    if len(devices) > 1:
        raise ConfigError(
            f"root: everything under {root} must be on one file system, so that one sync covers it; "
            "mount the disk at the root itself"
        )
    return root


@contextlib.contextmanager
def root_lock(root: Path) -> Iterator[int]:
    """Hold the root's lock.  Raises BusyError naming who has it.

    The pipeline inherits it, so that no second one can begin while the first still writes.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock_or_name_holder(root, descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_or_name_holder(root: Path, descriptor: int) -> None:
    deadline = time.monotonic() + 3  # a serve that was killed leaves its parts a moment longer
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = (running(root) or {}).get("pid")
            alive = isinstance(pid, int) and is_alive(pid)
            if alive or time.monotonic() > deadline:
                who = f"by serve, pid {pid}" if alive else "by another command of dicomscp"
                raise BusyError(f"{root} is in use {who}") from None
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def _flocked(descriptor: int) -> Iterator[None]:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def make_index(config: Config, *, read_only: bool) -> Index:
    """The index of the root; unless *read_only* it is made if it is missing, or migrated.

    One that is made lacks what is held already, so it is marked to be made out of the instances before
    anybody can ask it.  Raises BusyError, DamagedError and ConfigError as the database's `open_engine`.
    """
    return _index(config, _open_engine(config, read_only=read_only))


def _index(config: Config, engine: Engine) -> Index:
    return Index(
        engine,
        duplicates=config.storage.duplicates,
        retrieve_url=config.publish.base_url,
        model=_model(config),
    )


def _model(config: Config) -> Model:
    extra = config.index.extra_keys
    by_level = {Level.STUDY: extra.study, Level.SERIES: extra.series, Level.IMAGE: extra.instance}
    return Model({level: map(header_tag, names) for level, names in by_level.items()})


def _open_engine(config: Config, *, read_only: bool) -> Engine:
    incomplete = functools.partial(mark_if_held, config.root)
    if not config.index.url:
        return sqlite.open_engine(config.root / "index.sqlite", read_only=read_only, incomplete=incomplete)
    from dicomscp.archive import postgres  # noqa: PLC0415 - psycopg takes long to import

    return postgres.open_engine(
        config.index.url,
        read_only=read_only,
        root_name=root_name(config.root),
        password_file=config.index.password_file,
        incomplete=incomplete,
    )


def set_index_aside(config: Config) -> None:
    """Put an index that cannot be read, or is another version's, out of the way: it is to be made anew.

    Raises ConfigError if it is another root's.
    """
    mark(config.root)
    if config.index.url:
        from dicomscp.archive import postgres  # noqa: PLC0415 - psycopg takes long to import

        postgres.drop(
            config.index.url, root_name=root_name(config.root), password_file=config.index.password_file
        )
    else:
        sqlite.set_aside(config.root / "index.sqlite")


def root_name(root: Path) -> str:
    """A random name that the root gets when first asked for, so that a database can tell roots apart."""
    path = root / "state" / "root-name"
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        disk, name = Disk(), secrets.token_hex(8)
        making = path.with_name(f".root-name-{name}")
        descriptor = disk.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            disk.write(descriptor, [name.encode()], 0)
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        with contextlib.suppress(FileExistsError):  # another process was first
            disk.link(making, path)
        disk.unlink(making)
        disk.sync_directory(path.parent)
        return path.read_text(encoding="ascii")


def make_intake(config: Config, role: str, sync_failed: Callable[[], None]) -> Intake:
    """A journal and slots of its own for *role*, to be closed by the caller."""
    return Intake(
        config.root,
        role,
        Disk(),
        relaxed=config.storage.durability == "relaxed",
        reserve_bytes=config.storage.reserve,
        max_variants=config.storage.max_variants,
        inline_bytes=config.storage.inline_max,
        segment_bytes=config.storage.segment_size,
        sync_failed=sync_failed,
    )


def make_archive(config: Config, intake: Intake | None = None) -> Archive:
    """The archive under the root; the index must be there."""
    return Archive(
        config.root,
        make_index(config, read_only=True),
        intake=intake,
        wait_seconds=config.query.wait_seconds,
    )


def make_status(config: Config, *, listed: int) -> Status:
    """What reports how the gateway under the root stands, with the last *listed* of each kind of trouble."""
    index: Index | None = None

    def find_index() -> Index | None:
        nonlocal index
        if index is None and (config.index.url or (config.root / "index.sqlite").exists()):
            index = make_index(config, read_only=True)
        return index

    return Status(
        config.root,
        find_index,
        reserve_bytes=config.storage.reserve,
        attempts=config.pipeline.attempts,
        listed=listed,
    )


def make_pipeline(config: Config, *, jobs: int = 1) -> Pipeline:
    """The pipeline, to be closed by the caller, who has the root locked.  It drains with *jobs* processes."""
    index, disk = make_index(config, read_only=False), Disk()
    publisher = make_publisher(config, index, config.root / "dicomweb")
    counting = metrics.PipelineMetrics()
    filing = Filing(
        config.root,
        index,
        disk,
        segment_bytes=config.storage.segment_size,
        sync_failed=counting.sync_failed,
    )
    return Pipeline(
        config.root,
        index,
        filing,
        publisher,
        quiet_seconds=config.pipeline.quiet_seconds,
        patience_seconds=config.pipeline.patience_seconds,
        metrics=counting,
        make=functools.partial(publisher_process, config),
        workers=jobs,
    )


def make_publisher(config: Config, index: Index, folder: Path, *, contents: Path | None = None) -> Publisher:
    """What publishes under *folder*; what documents are made of is kept under *contents*, or the root."""
    return Publisher(
        config.root,
        index,
        Disk(),
        folder,
        documents=Documents(
            config.publish.base_url,
            config.publish.inline_max,
            config.publish.private_un,
            config.publish.frames,
            config.viewer.preload,
        ),
        attempts=config.pipeline.attempts,
        contents=contents,
    )


def publisher_process(config: Config) -> Publisher:
    """What a process that compiles for another one begins with."""
    return make_publisher(config, make_index(config, read_only=True), config.root / "dicomweb")


@dataclass(frozen=True, slots=True)
class Life:
    """What a part is told by the supervisor that started it."""

    config: Config
    given: Any
    stop: threading.Event
    supervisor: "Connection[Any, Any]"

    def ready(self) -> None:
        """Tell the supervisor that the part does its work."""
        self.supervisor.send_bytes(b"ready")


def _run_pipeline(life: Life) -> None:
    os.nice(5)  # receiving comes first; what this costs is lag, which is shown
    pipeline, filed = _ready_pipeline(life)
    if filed:
        log.info("recovered", instances=filed)
    life.ready()
    pipeline.run(life.stop)


def _ready_pipeline(life: Life) -> tuple[Pipeline, int]:
    """The pipeline with all filed that earlier lives left, and how many instances that were.

    While the index cannot be had it is tried again, for as long as it takes: others receive meanwhile.
    """
    pause = _BACKOFF_SECONDS[0]
    while True:
        try:
            with contextlib.ExitStack() as unless_ready:
                pipeline = make_pipeline(life.config)
                unless_ready.callback(pipeline.close)
                mend_index(life.config)  # workers have our priority
                filed = pipeline.recover()
                unless_ready.pop_all()
                return pipeline, filed
        except BusyError as error:
            log.error("index_awaited", reason=str(error), retry_seconds=pause)
            if life.stop.wait(pause):
                sys.exit(0)
            pause = min(pause * 2, _AWAY_SECONDS)


def mend_index(config: Config, progress: Callable[[int, int | None], None] = lambda *_: None) -> None:
    """Make the index anew if it was taken away, or if making it anew was cut short."""
    if rebuild_marker(config.root).exists():
        log.warning("index_rebuilding", reason="it is missing, or was not finished")
        index = make_index(config, read_only=False)
        made = rebuild_index(config.root, index, jobs=cores(), progress=progress)
        log.warning("index_rebuilt", instances=made.instances, unreadable=len(made.unreadable))


def _run_listener(life: Life) -> None:
    config = life.config
    listening, cell = life.given
    counting = metrics.ListenerMetrics(_refusals(config, f"listener-{cell}"))
    archive = make_archive(config, make_intake(config, f"listener-{cell}", counting.sync_failed))
    seats = Seats(
        config.root / "run" / "associations",
        cell,
        cells=config.dimse.listeners,
        limit=config.dimse.max_associations,
    )
    listener = Listener(
        listening,
        _listener_settings(config),
        archive,
        seats=seats,
        metrics=counting,
    )

    def drain() -> None:
        life.stop.wait()
        listener.drain(config.drain_seconds)

    threading.Thread(target=drain, name="drain", daemon=True).start()
    life.ready()
    listener.serve()
    archive.close()


def _refusals(config: Config, part: str) -> refusals.Refusals:
    """Where *part* tells what it refuses."""
    return refusals.Refusals(config.root / "run" / "refusals" / part)


def _listener_settings(config: Config) -> ListenerSettings:
    dimse = config.dimse
    return ListenerSettings(
        called_ae_titles=dimse.called_ae_titles,
        known_aes=tuple(
            KnownAe(
                title=ae.title,
                networks=tuple(ipaddress.ip_network(address) for address in ae.addresses),
                store=ae.store,
                find=ae.find,
                default_character_set=ae.default_character_set,
            )
            for ae in dimse.ae
        ),
        max_associations=dimse.max_associations,
        max_pdu_bytes=dimse.max_pdu_bytes,
        idle_seconds=dimse.idle_seconds,
        association_seconds=dimse.association_seconds,
        accept_seconds=dimse.accept_seconds,
        transfer_syntaxes=dimse.transfer_syntaxes,
        unknown_sop_classes=dimse.unknown_sop_classes,
        private_sop_classes=dimse.private_sop_classes,
        open_find=is_loopback(dimse.host),
        answering=Answering(
            config.query.max_results, config.query.match_unknown, local_offset(config.query.timezone)
        ),
    )


def local_offset(timezone: str) -> Callable[[datetime], timedelta]:
    """The offset from UTC at a moment told in *timezone*, by its IANA name; "" is this machine's."""
    zone = ZoneInfo(timezone) if timezone else None

    def offset(moment: datetime) -> timedelta:
        # Devices write 0001-01-01 and 9999-12-31, which in UTC may be in no calendar.
        moment = min(max(moment, _FIRST_MOMENT), _LAST_MOMENT)
        local = moment.replace(tzinfo=zone) if zone else moment.astimezone()
        return local.utcoffset() or timedelta(0)

    return offset


def _run_web(life: Life) -> None:
    config = life.config
    asked = config.root / "run" / "asked"
    schemes = make_schemes(config)

    def request_publish(study_uid: str) -> None:
        making = asked / f".{threading.get_ident()}"
        making.write_text(study_uid)
        making.replace(asked / f"{threading.get_ident()}")

    def ready() -> tuple[bool, dict[str, Any]]:
        state = running(config.root) or {}
        return bool(state), {key: state[key] for key in ("started_at", "version") if key in state}

    decoders = Decoders(
        Limits(
            processes=config.render.processes,
            waiting=config.render.waiting,
            seconds=config.render.seconds,
            memory_bytes=config.render.memory,
            result_bytes=config.render.result_max,
            max_pixels=config.render.max_pixels,
        )
    )
    storing = _Storing(config)
    status = make_status(config, listed=_LISTED)
    threading.Thread(target=status.follow, args=(life.stop,), name="rates", daemon=True).start()
    app = create_app(
        make_archive(config),
        WebSettings(
            base_url=config.publish.base_url,
            hosts=config.web.hosts,
            cors_origins=config.web.cors_origins,
            schemes=schemes,
            wait_seconds=config.web.wait_seconds,
            max_results=config.web.max_results,
            empty_status=config.web.empty_search,
            local=local_offset(config.query.timezone),
            inline_bytes=config.publish.inline_max,
            private_un=config.publish.private_un,
            ae_title=config.dimse.ae_title,
            request_publish=request_publish,
            viewer=viewer_settings(config),
            ready=ready,
            stopping=life.stop.is_set,
            metrics=lambda: metrics.exposition(config.root / "run" / "metrics"),
            store=_store_settings(config, storing) if config.web.store.enabled else None,
            status=status.report,
            frame_files=config.publish.frames == "files",
        ),
        config.root / "dicomweb",
        config.root / "state",
        decoders,
    )
    life.ready()
    web_server.serve(
        app,
        life.given,
        life.stop,
        drain_seconds=min(5.0, config.drain_seconds),
        transport=_transport(config),
    )
    decoders.close()
    storing.close()


def _transport(config: Config) -> web_server.Transport:
    web = config.web
    return web_server.Transport(
        certificate_file=web.certificate_file,
        key_file=web.key_file,
        max_connections=web.max_connections,
        idle_seconds=web.idle_seconds,
        stall_seconds=web.stall_seconds,
    )


def check_web(config: Config) -> str:
    """Whether the files that the web server and the viewer live by will do; what to warn of, or empty.

    Raises ConfigError with a line for each that will not.
    """
    wrong: list[str] = []
    warning = ""
    try:
        make_schemes(config)
    except ConfigError as error:
        wrong.append(str(error))
    try:
        warning = _check_certificate(config)
    except ConfigError as error:
        wrong.append(str(error))
    try:
        app_config(viewer_settings(config))
    except ConfigError as error:
        wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return warning


def _check_certificate(config: Config) -> str:
    web = config.web
    if web.certificate_file is None or web.key_file is None:
        return ""
    from dicomscp.web.certificate import check_certificate  # noqa: PLC0415 - cryptography takes long to import

    return check_certificate(web.certificate_file, web.key_file, datetime.now(UTC))


def make_schemes(config: Config) -> dict[str, Scheme]:
    """How people say who they are.  Raises ConfigError if what they are known by cannot be used."""
    schemes: dict[str, Scheme] = {}
    if config.web.users_file is not None:
        schemes["basic"] = Users(config.web.users_file)
    if (tokens := config.web.tokens).keys:
        from dicomscp.web.tokens import Keys, Rules, Tokens  # noqa: PLC0415 - cryptography takes long to import

        rules = Rules(
            issuer=tokens.issuer,
            audience=tokens.audience,
            algorithms=tokens.algorithms,
            scope_claim=tokens.scope_claim,
            read=tokens.read,
            write=tokens.write,
            leeway_seconds=tokens.leeway_seconds,
        )
        schemes["bearer"] = Tokens(Keys(tokens.keys), rules)
    return schemes


def _store_settings(config: Config, storing: "_Storing") -> StoreSettings:
    store = config.web.store
    return StoreSettings(
        archive=storing,
        aside=config.root / "incoming",
        metrics=storing.metrics,
        max_requests=store.max_requests,
        wait_seconds=config.web.wait_seconds,
        block_seconds=store.block_seconds,
        max_body_bytes=store.max_body,
        max_part_bytes=store.max_part,
        max_parts=store.max_parts,
        calling_ae=store.calling_ae,
    )


class _Storing:
    """The archive that the web server stores into, with its journal made when the first instance comes.

    So a gateway whose disk is full starts and answers, and one that nobody stores into by HTTP has no journal
    more.  Safe to share between threads.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._archive: Archive | None = None
        self.metrics = metrics.IntakeMetrics(_refusals(config, "web"))

    def __call__(self) -> Archive:
        """The archive.  Raises BusyError if its journal cannot be made now."""
        with self._lock:
            if self._archive is None:
                try:
                    intake = make_intake(self._config, "web", self.metrics.sync_failed)
                except OSError as error:
                    raise BusyError(f"No journal can be made: {error.strerror}") from error
                self._archive = make_archive(self._config, intake)
            return self._archive

    def close(self) -> None:
        """End the journal, if there is one."""
        with self._lock:
            if self._archive is not None:
                self._archive.close()


def viewer_settings(config: Config) -> ViewerSettings:
    """What the viewer is told.  Raises ConfigError if the operator's settings for it cannot be read."""
    return ViewerSettings(
        config.root,
        config.viewer.base_path,
        config.publish.base_url,
        read_settings(config.viewer.settings),
        config.viewer.preload,
        config.web.store.enabled,
    )


def _run_inbox(life: Life) -> None:
    config = life.config
    counting = metrics.InboxMetrics()
    archive = make_archive(config, make_intake(config, "inbox", counting.sync_failed))
    inbox = Inbox(
        config.root / "inbox",
        config.root / "quarantine",
        archive,
        settle_seconds=config.inbox.settle_seconds,
        rescan_seconds=config.inbox.rescan_seconds,
        quarantine_max_bytes=config.inbox.quarantine_max,
        quarantine_files=config.inbox.quarantine_files,
        metrics=counting,
    )
    life.ready()
    inbox.run(life.stop)
    archive.close()


def run_part(
    name: str,
    config: Config,
    run: Callable[[Life], None],
    given: object,
    supervisor: "Connection[Any, Any]",
) -> None:
    """Run one part as the supervisor's child until it is told to end."""
    os.umask(0o077)
    telemetry_log.configure(config.log.level, config.log.format, part=name)
    metrics.share(config.root / "run" / "metrics", name)
    stop = threading.Event()
    _set_on(stop, signal.SIGTERM)
    threading.Thread(target=_end_with, args=(supervisor,), name="orphan", daemon=True).start()
    run(Life(config, given, stop, supervisor))


def _end_with(supervisor: "Connection[Any, Any]") -> None:
    """End at once when the supervisor is gone; it never says anything."""
    with contextlib.suppress(EOFError, OSError):
        supervisor.recv_bytes()
    os._exit(1)
