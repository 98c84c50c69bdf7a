"""Daemon: builds the parts from Config, starts and stops them in order, and does what the commands ask.

`serve` supervises child processes, one a part.  A child gets its settings as JSON on its standard
input, which stays open while the supervisor lives: a child that reads its end is an orphan and ends
at once, as after a crash.  A child that is ready says so by a byte on its status pipe.
"""

import contextlib
import fcntl
import gzip
import ipaddress
import mmap
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import structlog

from dicomscp import __version__
from dicomscp.archive import journal, sqlite
from dicomscp.archive.archive import Archive, Intake, Removable, Source, rebuild_marker
from dicomscp.archive.disk import Disk
from dicomscp.archive.filing import Filing, arrival_of
from dicomscp.archive.index import Held, Index
from dicomscp.archive.store import intact_digest
from dicomscp.config import Config, is_loopback
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.part10 import Origin
from dicomscp.dimse.server import KnownAe, Listener, ListenerSettings
from dicomscp.errors import BusyError, ConfigError, DicomscpError
from dicomscp.inbox import Inbox, admit_file
from dicomscp.pipeline import Pipeline, Publisher, attempts
from dicomscp.study import layout
from dicomscp.telemetry import log as telemetry_log
from dicomscp.telemetry import metrics
from dicomscp.web import server as web_server
from dicomscp.web.app import WebSettings, create_app

log = structlog.get_logger()

Progress = Callable[[int, int | None, str], None]

_BACKOFF_SECONDS = (0.5, 30.0)
_STEADY_SECONDS = 60.0
_EXTEND_SECONDS = 5.0
_DIMSE_BACKLOG = 256
_REBUILD_BATCH = 500
_REMOVE_SECONDS = 120.0
_REMOVE_LOOK_SECONDS = 0.1


# ── serve: the supervisor ────────────────────────────────────────────────────────────────────────


def serve(config: Config) -> int:
    """Run the gateway until SIGTERM or SIGINT; returns the exit status.

    Raises ConfigError if an address cannot be had, BusyError if another serve has the root.
    """
    root = prepare_root(config)
    config = config.model_copy(update={"root": root})
    stop = threading.Event()
    with _root_lock(root) as lock, contextlib.ExitStack() as stack:
        dimse = stack.enter_context(_bind("dimse", config.dimse.host, config.dimse.port))
        web = stack.enter_context(_bind("web", config.web.host, config.web.port))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        _clear_run(root)
        if not (root / "index.sqlite").exists() and next((root / "instances").glob("*/*/*/*.dcm"), None):
            _mark_rebuilding(root)
        _index(config, read_only=False)  # made, or found unusable, before anybody is let in
        seats = Seats(root / "run" / "associations", 0, cells=config.dimse.listeners, limit=0)
        parts = _parts(config, dimse.fileno(), web.fileno(), lock)
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
                    web="http://{}:{}/".format(*web.getsockname()[:2]),
                    root=str(root),
                )
            supervisor.watch(stop)
        finally:
            _notify(b"STOPPING=1")
            supervisor.stop()
            (root / "run" / "state.json").unlink(missing_ok=True)
    log.info("stopped")
    return 0


@dataclass(slots=True)
class Part:
    """One child process and how it is started again."""

    name: str
    settings: dict[str, Any]
    stage: int  # parts end from the highest stage down
    waits: bool = False  # until the others are ready
    descriptors: tuple[int, ...] = ()
    cell: int | None = None
    process: "subprocess.Popen[bytes] | None" = None
    status: int = -1
    started: float = 0.0
    pause: float = _BACKOFF_SECONDS[0]
    restart_at: float = float("inf")


class Supervisor:
    """Starts the parts in order, starts again what dies, ends all in reverse order."""

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
                if part.process is not None and part.process.poll() is not None:
                    self._bury(part, now)
                elif part.process is None and now >= part.restart_at:
                    self._spawn(part)
            if now - petted > 1:
                _notify(b"WATCHDOG=1")
                petted = now

    def stop(self) -> None:
        """Drain what receives, then end the rest; what does not end in time is killed."""
        for stage in sorted({part.stage for part in self._parts}, reverse=True):
            running = [part for part in self._parts if part.stage == stage and part.process]
            for part in running:
                if part.process is not None:
                    part.process.terminate()
            deadline = time.monotonic() + self._drain_seconds + 5
            for part in running:
                self._reap(part, deadline)

    def _reap(self, part: Part, deadline: float) -> None:
        process = part.process
        if process is None:
            return
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("part_killed", part=part.name)
            process.kill()
            process.wait()
        self._close(part)

    def _spawn(self, part: Part) -> None:
        ours, theirs = os.pipe()
        part.process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", "dicomscp.daemon", part.name, str(theirs)],
            stdin=subprocess.PIPE,
            pass_fds=(theirs, *part.descriptors),
        )
        os.close(theirs)
        part.status, part.started, part.restart_at = ours, time.monotonic(), float("inf")
        _write_line(part, orjson.dumps(part.settings))

    def _wait_ready(self, part: Part, stop: threading.Event) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(part.status, selectors.EVENT_READ)
            told = 0.0
            while not stop.is_set():
                if selector.select(0.1):
                    if os.read(part.status, 1):
                        return
                    raise DicomscpError(f"{part.name} ended before it was ready; see the log above")
                if time.monotonic() > told + _EXTEND_SECONDS:
                    _notify(b"EXTEND_TIMEOUT_USEC=30000000")
                    told = time.monotonic()

    def _bury(self, part: Part, now: float) -> None:
        """Note that a part died, and when it is to be started again."""
        code = part.process.returncode if part.process else None
        self._close(part)
        metrics.forget(Path(part.settings["root"]) / "run" / "metrics", part.name)
        if part.cell is not None:
            self._seats.clear(part.cell)
        if now - part.started > _STEADY_SECONDS:
            part.pause = _BACKOFF_SECONDS[0]
        part.restart_at = now + part.pause
        log.error("part_died", part=part.name, exit_status=code, restart_seconds=part.pause)
        part.pause = min(part.pause * 2, _BACKOFF_SECONDS[1])

    def _close(self, part: Part) -> None:
        if part.process is not None and part.process.stdin is not None:
            with contextlib.suppress(OSError):
                part.process.stdin.close()
            os.close(part.status)
            part.process = None


class Seats:
    """How many associations are open in all listeners, in memory that they share.

    A listener counts in a cell of its own; the supervisor clears the cell of one that died.
    """

    def __init__(self, path: Path, cell: int, *, cells: int, limit: int) -> None:
        """Count in *cell* of the file *path*; `take` keeps the sum of all *cells* within *limit*."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._descriptor, 8 * max(cells, 1))
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


def _parts(config: Config, dimse: int, web: int, lock: int) -> list[Part]:
    settings = orjson.loads(config.model_dump_json())
    settings["root"] = str(config.root.resolve())
    listeners = [
        Part(
            f"listener-{cell}", settings | {"cell": cell, "socket": dimse}, 2, descriptors=(dimse,), cell=cell
        )
        for cell in range(config.dimse.listeners)
    ]
    inbox = [Part("inbox", settings, 2)] if config.inbox.enabled else []
    return [
        Part("pipeline", settings | {"lock": lock}, 0, descriptors=(lock,)),
        Part("web", settings | {"socket": web}, 1, waits=True, descriptors=(web,)),
        *listeners,
        *inbox,
    ]


def _write_line(part: Part, line: bytes) -> None:
    stdin = part.process.stdin if part.process else None
    if stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it died already, which is seen elsewhere
            stdin.write(line + b"\n")
            stdin.flush()


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
        "web": {"host": config.web.host, "port": web.getsockname()[1]},
    }
    making = root / "run" / ".state.json.new"
    making.write_bytes(orjson.dumps(state, option=orjson.OPT_INDENT_2))
    making.replace(root / "run" / "state.json")


def _clear_run(root: Path) -> None:
    """What an earlier life left in run/ means nothing now."""
    for name in ("associations", "state.json"):
        (root / "run" / name).unlink(missing_ok=True)
    metrics.clean(root / "run" / "metrics")
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
def _root_lock(root: Path) -> Iterator[int]:
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
            pid = (_running(root) or {}).get("pid")
            alive = isinstance(pid, int) and _is_alive(pid)
            if alive or time.monotonic() > deadline:
                who = f"by serve, pid {pid}" if alive else "by another command of dicomscp"
                raise BusyError(f"{root} is in use {who}") from None
            time.sleep(0.05)
        else:
            return


def _running(root: Path) -> dict[str, Any] | None:
    """What run/state.json says, or None if there is none."""
    try:
        state = orjson.loads((root / "run" / "state.json").read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    return state if isinstance(state, dict) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _flocked(descriptor: int) -> Iterator[None]:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def _index(config: Config, *, read_only: bool) -> Index:
    engine = sqlite.open_engine(config.root / "index.sqlite", read_only=read_only)
    return Index(engine, duplicates=config.storage.duplicates, retrieve_url=config.publish.base_url)


def _intake(config: Config, role: str, sync_failed: Callable[[], None]) -> Intake:
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


def _archive(config: Config, intake: Intake | None = None) -> Archive:
    return Archive(
        config.root,
        _index(config, read_only=True),
        intake=intake,
        wait_seconds=config.query.wait_seconds,
    )


def _pipeline(config: Config) -> Pipeline:
    index, disk = _index(config, read_only=False), Disk()
    publisher = _publisher(config, index, config.root / "dicomweb")
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
    )


def _publisher(config: Config, index: Index, folder: Path) -> Publisher:
    return Publisher(
        config.root,
        index,
        Disk(),
        folder,
        base_url=config.publish.base_url,
        inline_bytes=config.publish.inline_max,
        attempts=config.pipeline.attempts,
    )


@dataclass(frozen=True, slots=True)
class Life:
    """What a part is told by the supervisor that started it."""

    config: Config
    settings: dict[str, Any]
    stop: threading.Event
    status: int

    def ready(self) -> None:
        """Tell the supervisor that the part does its work."""
        os.write(self.status, b"R")


def _run_pipeline(life: Life) -> None:
    os.nice(5)  # receiving comes first; what this costs is lag, which is shown
    pipeline = _pipeline(life.config)
    _mend_index(life.config)
    filed = pipeline.recover()
    if filed:
        log.info("recovered", instances=filed)
    life.ready()
    pipeline.run(life.stop)


def _mark_rebuilding(root: Path) -> None:
    """From now on the index is not whole, until it has been made anew."""
    marker = rebuild_marker(root)
    marker.touch()
    Disk().sync_directory(marker.parent)


def _mend_index(config: Config) -> None:
    """Make the index anew if it was taken away, or if making it anew was cut short."""
    if rebuild_marker(config.root).exists():
        log.warning("index_rebuilding", reason="it is missing, or was not finished")
        report = RebuildReport()
        _rebuild_index(config, report, lambda *_: None)
        log.warning("index_rebuilt", instances=report.instances, unreadable=len(report.unreadable))


def _run_listener(life: Life) -> None:
    config, cell = life.config, int(life.settings["cell"])
    counting = metrics.ListenerMetrics()
    archive = _archive(config, _intake(config, f"listener-{cell}", counting.sync_failed))
    seats = Seats(
        config.root / "run" / "associations",
        cell,
        cells=config.dimse.listeners,
        limit=config.dimse.max_associations,
    )
    listener = Listener(
        socket.socket(fileno=life.settings["socket"]),
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


def _listener_settings(config: Config) -> ListenerSettings:
    dimse = config.dimse
    return ListenerSettings(
        ae_title=dimse.ae_title,
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
        max_results=config.query.max_results,
    )


def _run_web(life: Life) -> None:
    config = life.config
    asked = config.root / "run" / "asked"

    def request_publish(study_uid: str) -> None:
        making = asked / f".{threading.get_ident()}"
        making.write_text(study_uid)
        making.replace(asked / f"{threading.get_ident()}")

    def ready() -> tuple[bool, dict[str, Any]]:
        state = _running(config.root) or {}
        return bool(state), {key: state[key] for key in ("started_at", "version") if key in state}

    app = create_app(
        _archive(config),
        WebSettings(
            base_url=config.publish.base_url,
            hosts=config.web.hosts,
            cors_origins=config.web.cors_origins,
            wait_seconds=config.web.wait_seconds,
            max_results=config.web.max_results,
            ae_title=config.dimse.ae_title,
            request_publish=request_publish,
            ready=ready,
            metrics=lambda: metrics.exposition(config.root / "run" / "metrics"),
        ),
        config.root / "dicomweb",
        config.root / "state",
    )
    life.ready()
    listening = socket.socket(fileno=life.settings["socket"])
    web_server.serve(app, listening, life.stop, drain_seconds=min(5.0, config.drain_seconds))


def _run_inbox(life: Life) -> None:
    config = life.config
    counting = metrics.InboxMetrics()
    archive = _archive(config, _intake(config, "inbox", counting.sync_failed))
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


_RUN = {"pipeline": _run_pipeline, "listener": _run_listener, "web": _run_web, "inbox": _run_inbox}


def run_part(name: str, status: int) -> int:
    """Run one part as the supervisor's child until it is told to end."""
    settings = orjson.loads(_read_line())
    config = Config.model_validate({key: settings[key] for key in Config.model_fields})
    os.umask(0o077)
    telemetry_log.configure(config.log.level, config.log.format, part=name)
    metrics.share(config.root / "run" / "metrics", name)
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the supervisor decides
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=_end_with_supervisor, name="orphan", daemon=True).start()

    _RUN[name.partition("-")[0]](Life(config, settings, stop, status))
    return 0


def _read_line() -> bytes:
    """The first line of standard input, unbuffered: a thread goes on to wait for its end."""
    line = b""
    while not line.endswith(b"\n") and (piece := os.read(0, 1 << 16)):
        line += piece
    return line


def _end_with_supervisor() -> None:
    while os.read(0, 1 << 16):
        pass
    os._exit(1)


# ── what the commands ask ────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class ImportReport:
    """What became of the files given to an import."""

    admitted: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    unpublished: int = 0
    stopped: str = ""


def import_paths(config: Config, paths: Sequence[Path], progress: Progress) -> ImportReport:
    """Take the files at and under *paths* into custody; publish them too if no serve is running.

    When the disk does not take more, `stopped` says so, and what was admitted until then stays.
    """
    root = prepare_root(config)
    config = config.model_copy(update={"root": root})
    report = ImportReport()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_root_lock(root))
        except BusyError:
            alone = False
        else:
            alone = True
        if alone:
            _index(config, read_only=False)  # made, if this is the first that is done with the root
        archive = _archive(config, _intake(config, "import", lambda: None))
        try:
            _admit_all(archive, list(_files(paths)), report, progress)
        finally:
            archive.close()
        if alone:
            pipeline = _pipeline(config)
            report.unpublished = pipeline.drain(lambda done, total: progress(done, total, "publishing"))
            pipeline.close()
    return report


@dataclass(slots=True)
class Found:
    """What may be removed, and the places where nothing is held."""

    removable: list[Removable] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def variants(self) -> list[Held]:
        """All of it, each variant once."""
        found = {(one.key, one.digest): one for each in self.removable for one in each.variants}
        return list(found.values())


@dataclass(slots=True)
class RemoveReport:
    """What became of the variants that were to be removed.

    Those received again since they were found are *kept*; of those *leaving*, documents or files are
    still there, and go when serve comes to it.
    """

    removed: int = 0
    kept: int = 0
    leaving: int = 0


def find_removable(config: Config, places: Sequence[Sequence[str]], progress: Progress) -> Found:
    """What is held at *places*, each a study, series or instance by its UIDs.

    Raises BusyError if it cannot be said now.
    """
    config = _owned(_existing(config))
    _drain_alone(config, progress)
    archive = _archive(config)
    found = Found()
    for place in places:
        removable = archive.removable(*place)
        if removable.variants:
            found.removable.append(removable)
        else:
            found.absent.append("/".join(place))
    return found


def remove(config: Config, found: Found, progress: Progress) -> RemoveReport:
    """Remove what was *found*; works beside a running serve, and without one.

    Returns when it is gone from documents and disk, or when that takes too long.
    """
    config = _owned(_existing(config))
    archive, variants = _archive(config), found.variants
    for removable in found.removable:
        archive.remove(removable, Disk())
    applied = _finish_removing(config, archive, variants, progress)
    known = _index(config, read_only=True).known({one.key.sop_uid for one in variants}, leaving=True)
    there = {(one.key, one.digest): one for those in known.values() for one in those}
    ends = [there.get((one.key, one.digest)) for one in variants]
    held = sum(one is not None and one.leaving is None for one in ends)
    report = RemoveReport(removed=ends.count(None), kept=held if applied else 0)
    report.leaving = len(ends) - report.removed - report.kept
    return report


def _finish_removing(config: Config, archive: Archive, variants: Sequence[Held], progress: Progress) -> bool:
    """Return when nothing of *variants* is leaving, or that takes too long; False if it has not begun."""
    index = _index(config, read_only=True)
    studies = {one.key.study_uid for one in variants}
    deadline = time.monotonic() + _REMOVE_SECONDS
    applied = False
    while not _drain_alone(config, progress):
        applied = applied or archive.wait_until_applied()
        leaving = [one for one in index.leaving() if one.key.study_uid in studies]
        if (applied and not leaving) or time.monotonic() > deadline:
            return applied
        progress(len(variants) - len(leaving), len(variants), "removing")
        time.sleep(_REMOVE_LOOK_SECONDS)
    return True


def _drain_alone(config: Config, progress: Progress) -> bool:
    """File, publish and remove what waits, if nobody else is there to do it; False if somebody is."""
    if rebuild_marker(config.root).exists():
        raise BusyError("The index is not whole: start serve, or rebuild it, and ask again")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_root_lock(config.root))
        except BusyError:
            return False
        pipeline = _pipeline(config)
        pipeline.drain(lambda done, total: progress(done, total, "publishing"))
        pipeline.close()
    return True


def _owned(config: Config) -> Config:
    """The same settings.  Raises ConfigError for another user's root: serve could not read our journal."""
    owner = config.root.stat().st_uid
    if owner != os.geteuid():
        raise ConfigError(f"root: {config.root} belongs to user {owner}; run this as that user")
    return config


def _admit_all(archive: Archive, files: list[Path], report: ImportReport, progress: Progress) -> None:
    for done, path in enumerate(files):
        progress(done, len(files), "importing")
        try:
            admit_file(archive, path, Source(Origin.IMPORT, "", ""))
        except BusyError as error:
            report.stopped = f"{path}: {error}"
            return
        except DicomscpError as error:
            report.refused.append((str(path), str(error)))
        else:
            report.admitted += 1
    progress(len(files), len(files), "importing")


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(
                child for child in path.rglob("*") if child.is_file() and not child.is_symlink()
            )
        else:
            yield path


def status(config: Config) -> dict[str, Any]:
    """What is held, queued and wrong, whether serve runs or not."""
    config = _existing(config)
    root = config.root
    running = _running(root)
    alive = bool(running and _is_alive(int(running["pid"])))
    waiting = 0
    for directory in journal.writers(root / "journal"):
        with contextlib.suppress(FileNotFoundError):  # settled and gone meanwhile
            reader = journal.JournalReader(directory)
            waiting += reader.unapplied_bytes()
            reader.close()
    report: dict[str, Any] = {
        "root": str(root),
        "running": alive,
        "serve": running if alive else None,
        "journal_waiting_bytes": waiting,
        "disk_free_bytes": Disk().free_bytes(root),
        "disk_reserve_bytes": int(config.storage.reserve),
        "associations": _associations(root) if alive else 0,
        "set_aside": [
            one for one in attempts(root) if int(str(one.get("attempts", 0))) >= config.pipeline.attempts
        ],
        "quarantined": len(list((root / "quarantine").glob("**/*.reason.txt"))),
    }
    if (root / "index.sqlite").exists():
        index = _index(config, read_only=True)
        report |= {"held": index.counts()._asdict(), "due": len(list(index.due()))}
    return report


def _existing(config: Config) -> Config:
    """The settings with the root's full path.  Raises ConfigError if nothing was ever kept there."""
    root = config.root.resolve()
    if not (root / "instances").is_dir():
        raise ConfigError(f"root: {root} does not exist or was never served from; check --root")
    return config.model_copy(update={"root": root})


def _associations(root: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        data = (root / "run" / "associations").read_bytes()
        return sum(memoryview(data).cast("Q"))
    return 0


@dataclass(slots=True)
class VerifyReport:
    """What verify found."""

    checked: int = 0
    findings: list[str] = field(default_factory=list)
    repaired: int = 0


@dataclass(slots=True)
class RebuildReport:
    """What rebuild made."""

    instances: int = 0
    studies: int = 0
    unreadable: list[str] = field(default_factory=list)


def rebuild(config: Config, *, index: bool, published: bool, progress: Progress) -> RebuildReport:
    """Make the index, the published tree, or both anew from the instances alone.

    Raises BusyError while serve runs.
    """
    config = _existing(config)
    root = prepare_root(config)
    report = RebuildReport()
    with _root_lock(root):
        pipeline = _pipeline(config)
        pipeline.recover()
        pipeline.finish_removals()
        if index:
            _rebuild_index(config, report, progress)
        if published:
            report.studies = pipeline.republish(lambda done, total: progress(done, total, "publishing"))
        pipeline.close()
    return report


def _rebuild_index(config: Config, report: RebuildReport, progress: Progress) -> None:
    index, compiler = _index(config, read_only=False), Compiler()
    marker = rebuild_marker(config.root)
    _mark_rebuilding(config.root)
    index.clear()
    paths = sorted((config.root / "instances").glob("*/*/*/*.dcm"))
    batch = []
    for done, path in enumerate(paths):
        progress(done, len(paths), "indexing")
        try:
            batch.append(arrival_of(compiler, config.root, str(path.relative_to(config.root))))
        except DicomscpError as error:
            report.unreadable.append(f"{path}: {error}")
        if len(batch) == _REBUILD_BATCH:
            index.apply(batch, {})
            batch.clear()
    index.apply(batch, {})
    index.make_durable()
    marker.unlink()
    report.instances = len(paths) - len(report.unreadable)
    progress(len(paths), len(paths), "indexing")


def verify(config: Config, *, repair: bool, progress: Progress) -> VerifyReport:
    """Compare instances with their receipts, the index with the instances, documents with both.

    With *repair* what is derived is made again; that needs serve stopped, else BusyError.
    """
    config = _existing(config)
    root = prepare_root(config)
    report = VerifyReport()
    with contextlib.ExitStack() as stack:
        if repair:
            stack.enter_context(_root_lock(root))
            pipeline = _pipeline(config)
            pipeline.drain(lambda done, total: progress(done, total, "catching up"))
            pipeline.close()
        index = _index(config, read_only=True)
        indexed = {held.path: held for study in index.studies() for held in index.variants(study)}
        leaving = {held.path for held in index.leaving()}
        on_disk = {str(p.relative_to(root)): p for p in sorted((root / "instances").glob("*/*/*/*.dcm"))}
        for done, (path, file) in enumerate(on_disk.items()):
            progress(done, len(on_disk), "verifying")
            if path not in leaving:
                _verify_instance(path, file, indexed.get(path), report)
        report.findings += [f"{path}: is in the index but not on disk" for path in indexed.keys() - on_disk]
        progress(len(on_disk), len(on_disk), "verifying")
        report.findings += _verify_published(config, index, progress)
    if repair and report.findings:
        before = len(report.findings)
        rebuild(config, index=True, published=True, progress=progress)
        again = verify(config, repair=False, progress=progress)
        again.repaired = before - len(again.findings)
        return again
    return report


def _verify_instance(path: str, file: Path, held: Any, report: VerifyReport) -> None:
    report.checked += 1
    try:
        digest = intact_digest(file)
    except FileNotFoundError:  # removed since it was listed
        report.checked -= 1
        return
    except DicomscpError as error:
        report.findings.append(f"{path}: cannot be read: {error}")
        return
    if digest is None:
        report.findings.append(f"{path}: its dataset is not what was received")
    elif held is None:
        report.findings.append(f"{path}: is not in the index")
    elif held.digest != digest:
        report.findings.append(f"{path}: the index says it is another instance")


def _verify_published(config: Config, index: Index, progress: Progress) -> Iterator[str]:
    """Where the published tree is not what compiling the instances now gives."""
    tree = config.root / "dicomweb"
    due = {study_uid for study_uid, _ in index.due()}
    studies = list(index.studies())
    held = {layout.component(study_uid) for study_uid in {*studies, *index.leaving_studies()}}
    for folder in sorted((tree / "studies").iterdir()) if (tree / "studies").is_dir() else ():
        if folder.is_dir() and folder.name not in held:
            yield f"studies/{folder.name}: is published but not held"
    with tempfile.TemporaryDirectory(dir=config.root / "run", prefix="verify-") as folder_name:
        again = Path(folder_name)
        publisher = _publisher(config, index, again)
        for done, study_uid in enumerate(studies):
            progress(done, len(studies), "comparing documents")
            if study_uid not in due:
                publisher.write(study_uid)
                publisher.show()
                directory = layout.study_directory(study_uid)
                yield from _differences(tree / directory, again / directory, directory)
                shutil.rmtree(again / directory, ignore_errors=True)
        publisher.publish_recent()
        if not due and studies:
            recent = Path(layout.STUDIES_INDEX)
            if _content(tree / recent) != _content(again / recent):
                yield f"{recent}: is not what the instances give"
        publisher.close()
    progress(len(studies), len(studies), "comparing documents")


def _differences(published: Path, compiled: Path, directory: str) -> Iterator[str]:
    there = {path.relative_to(published): path for path in published.rglob("*.gz")}
    here = {path.relative_to(compiled): path for path in compiled.rglob("*.gz")}
    for name in sorted(there.keys() | here.keys()):
        if name not in there:
            yield f"{directory}/{name}: is not published"
        elif name not in here:
            yield f"{directory}/{name}: is published and should not be"
        elif _content(there[name]) != _content(here[name]):
            yield f"{directory}/{name}: is not what the instances give"


def _content(path: Path) -> bytes | None:
    """The uncompressed bytes of a document; None if there is none, or it is damaged."""
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        return None


def main() -> int:
    """Run one part: the entry that the supervisor uses."""
    return run_part(sys.argv[1], int(sys.argv[2]))


if __name__ == "__main__":
    sys.exit(main())
