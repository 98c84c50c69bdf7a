"""The drop folder: what is put into it comes into custody by the same door as from an association.

    inbox/  ──▶ archive.receive, write, admit ──▶ removed from the inbox
       └──────▶ quarantine/<name> and <name>.reason.txt, if it cannot be taken

A file is ready when its writer closed it, or when its size and time have not changed for a while: a folder
that is moved in, or a network share, gives no event.  One that was closed is tried at once; if that fails it
is judged only after it settled too, because some programs close a file and open it again to go on.

Nothing outside the inbox is ever touched.  Each folder on the way to a file is opened within the one above it
and no link is followed, so whoever may write into the inbox cannot lead us out of it by swapping a folder for
a link.
"""

import contextlib
import errno
import heapq
import io
import itertools
import math
import os
import shutil
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import structlog
from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from dicomscp.archive.archive import Archive, Claim, Source
from dicomscp.dicom.identity import Identity
from dicomscp.dicom.part10 import Origin, read_file_meta
from dicomscp.errors import BusyError, RefusedError
from dicomscp.telemetry.metrics import InboxMetrics

log = structlog.get_logger()

_BLOCK = 1 << 20
_META_WITHIN = 1 << 16  # what read_file_meta needs to see
_TURN_SECONDS = 0.1
_LOOK_SECONDS = 0.5  # however many events there are
_AT_ONCE = 20_000  # files noted in one look; bounds memory, the rest is met in the next
_EMPTY_FOLDER_SECONDS = 60  # whoever makes a folder is given time to fill it
_RETRY_SECONDS, _RETRY_SECONDS_AT_MOST = 5.0, 300.0
_FAILURES = 3  # of a file that fails for a reason that we do not know
_DEPTH = 64  # folders below each other; each open walks down all of them
_REASON = ".reason.txt"
_NAME_BYTES = 200  # leaves room for a number and the suffix
_SOURCE = Source(Origin.INBOX, calling_ae="", called_ae="")

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def admit_file(archive: Archive, path: Path, source: Source, *, sync: bool = True) -> Identity:
    """Take custody of the instance in the Part 10 file at *path*, which stays as it is.

    The file is streamed: memory does not grow with it.  Raises RefusedError for what is no DICOM
    instance, no regular file, cannot be read or is being written to, and whatever `archive.receive`
    and `archive.admit` raise, to which *sync* goes.
    """
    try:
        file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise _unreadable(error) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise RefusedError("This is not a regular file.")
        try:
            return _admit(archive, file, source, sync=sync)
        except _ChangingError as error:
            raise RefusedError(str(error)) from error


class _ChangingError(BusyError):
    """The file may be taken once nobody writes to it."""


def _admit(archive: Archive, file: io.FileIO, source: Source, *, sync: bool = True) -> Identity:
    before = _Signature.of(os.fstat(file.fileno()))
    block = memoryview(bytearray(min(_BLOCK, max(_META_WITHIN, before.size))))
    first = block[: _fill(file, block)]
    meta = read_file_meta(first)
    if meta.receipt and not source.default_charset:  # a file of ours keeps what we knew of its source
        source = source._replace(default_charset=meta.receipt.default_charset)
    incoming = archive.receive(Claim(meta.sop_class_uid, meta.sop_uid, meta.transfer_syntax_uid), source)
    try:
        incoming.write(first[meta.dataset_offset :])
        while count := _fill(file, block):
            incoming.write(block[:count])
        _check_unchanged(file, before)
    except BaseException:
        incoming.discard()
        raise
    return archive.admit(incoming, sync=sync)


def _check_unchanged(file: io.FileIO, signature: "_Signature") -> None:
    if _Signature.of(os.fstat(file.fileno())) != signature:
        raise _ChangingError("The file is being written to.")


def _fill(file: io.FileIO, block: memoryview) -> int:
    """Read into *block* until it is full or the file ends."""
    filled = 0
    try:
        while filled < len(block) and (count := file.readinto(block[filled:])):
            filled += count
    except OSError as error:
        raise _unreadable(error) from error
    return filled


def _unreadable(error: OSError) -> RefusedError:
    return RefusedError(f"The file cannot be read: {error.strerror}.")


class _Signature(NamedTuple):
    """What changes when a file is written to or replaced."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "_Signature":
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(slots=True)
class _Seen:
    """One thing in the inbox, for as long as it does not change."""

    signature: _Signature
    ready_at: float
    waits: int = 0
    failures: int = 0


class Inbox:
    """Takes in what is put into one folder; all but `closed` and `changed` is for one thread."""

    def __init__(
        self,
        folder: Path,
        quarantine: Path,
        archive: Archive,
        *,
        settle_seconds: float,
        rescan_seconds: float,
        quarantine_max_bytes: int,
        quarantine_files: int,
        metrics: InboxMetrics | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._archive, self._now = folder, archive, now
        self._settle_seconds, self._rescan_seconds = settle_seconds, rescan_seconds
        self._quarantine = Quarantine(quarantine, max_bytes=quarantine_max_bytes, max_files=quarantine_files)
        self._metrics = metrics or InboxMetrics()
        self._seen: dict[str, _Seen] = {}
        self._empty: dict[str, tuple[_Signature, float]] = {}  # folders, and since when
        self._looked_at = -math.inf
        self._wants_look = threading.Event()
        self._closed: deque[str] = deque(maxlen=_AT_ONCE)  # what falls out is met by a look

    def run(self, stop: threading.Event) -> None:
        """Take what is there and what comes, until *stop* is set; a file begun is finished."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._watched():
            while not stop.is_set():
                try:
                    self.turn(stop)
                except OSError as error:  # such as a share that is away
                    log.warning("inbox_unreadable", reason=str(error), again_seconds=self._rescan_seconds)
                    stop.wait(self._rescan_seconds)
                stop.wait(_TURN_SECONDS)

    def turn(self, stop: threading.Event) -> None:
        """Take everything that is ready now, unless *stop* is set."""
        root = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._take_closed(root, stop)
            elapsed = self._now() - self._looked_at
            if elapsed >= (_LOOK_SECONDS if self._wants_look.is_set() else self._rescan_seconds):
                self._look(root)
            for path, seen in list(self._seen.items()):
                if seen.ready_at <= self._now() and not stop.is_set():
                    self._take(root, path, seen, settled=True)
            self._remove_empty(root)
        finally:
            os.close(root)

    def closed(self, path: str) -> None:
        """Say that whoever wrote the file at *path*, relative to the inbox, has closed it."""
        # Programs that copy under a hidden name close before they rename: those settle first.
        if path.rpartition("/")[2].startswith(".") or path.startswith("../"):
            self.changed()
        else:
            self._closed.append(path)

    def changed(self) -> None:
        """Say that something came: the folder is looked through soon."""
        self._wants_look.set()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Events while inside; where there are none (too many folders, a share) the rescan does."""
        observer, folder = Observer(), self._folder.resolve()
        try:
            observer.schedule(_Events(self, folder), str(folder), recursive=True)
            observer.start()
        except OSError as error:
            log.warning("inbox_not_watched", reason=str(error), rescan_seconds=self._rescan_seconds)
            yield
            return
        try:
            yield
        finally:
            observer.stop()
            observer.join()

    # Looking

    def _look(self, root: int) -> None:
        """Note everything in the inbox, and since when it is as it is."""
        self._wants_look.clear()
        self._looked_at = self._now()
        files, self._seen = self._seen, {}
        empty, self._empty = self._empty, {}
        folders = [""]
        while folders and len(self._seen) < _AT_ONCE:
            folder = folders.pop()
            entries = self._entries(root, folder)
            for name, status in entries or ():
                path = f"{folder}/{name}".lstrip("/")
                if stat.S_ISDIR(status.st_mode):
                    folders.append(path)
                    if path.count("/") >= _DEPTH:
                        self._hoist(root, folders.pop())
                else:
                    self._seen[path] = self._known(files.get(path), _Signature.of(status))
            if entries == [] and folder:
                self._note_empty(root, folder, empty)
        if folders:
            self.changed()

    def _known(self, seen: _Seen | None, signature: _Signature) -> _Seen:
        if seen is not None and seen.signature == signature:
            return seen
        return _Seen(signature, self._now() + self._settle_seconds)

    def _entries(self, root: int, path: str) -> list[tuple[str, os.stat_result]] | None:
        """What lies in a folder, but not too much of it; None if it cannot be read."""
        found = []
        try:
            with _folder(root, path) as folder, os.scandir(folder) as entries:
                for entry in itertools.islice(entries, _AT_ONCE):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.name, entry.stat(follow_symlinks=False)))
        except OSError as error:
            # Gone, or swapped for what is no folder: met in the next look.
            if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                log.warning("inbox_folder_unreadable", reason=error.strerror)
            return None
        return found

    def _hoist(self, root: int, path: str) -> None:
        """Move a folder that lies too deep to the top, where the next look meets it."""
        with contextlib.suppress(OSError), _parent(root, path) as (folder, name):
            os.rename(name, f"{name[:200]}~{time.time_ns():x}", src_dir_fd=folder, dst_dir_fd=root)
            self.changed()

    def _note_empty(self, root: int, path: str, before: dict[str, tuple[_Signature, float]]) -> None:
        with contextlib.suppress(OSError), _folder(root, path) as folder:
            signature = _Signature.of(os.fstat(folder))
            known = before.get(path)
            self._empty[path] = known if known and known[0] == signature else (signature, self._now())

    def _remove_empty(self, root: int) -> None:
        for path, (_, since) in list(self._empty.items()):
            if self._now() - since >= _EMPTY_FOLDER_SECONDS:
                del self._empty[path]
                with contextlib.suppress(OSError), _parent(root, path) as (folder, name):
                    os.rmdir(name, dir_fd=folder)  # fails if it is empty no more

    # Taking

    def _take_closed(self, root: int, stop: threading.Event) -> None:
        while self._closed and not stop.is_set():
            path = self._closed.popleft()
            with contextlib.suppress(OSError), _parent(root, path) as (folder, name):
                signature = _Signature.of(os.stat(name, dir_fd=folder, follow_symlinks=False))
                seen = self._seen[path] = self._known(self._seen.get(path), signature)
                if not (seen.waits or seen.failures):
                    self._take(root, path, seen, settled=False)

    def _take(self, root: int, path: str, seen: _Seen, *, settled: bool) -> None:
        """Admit one file and remove it, or put it away; or leave it, to be tried later."""
        try:
            with _parent(root, path) as (folder, name):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if _Signature.of(status) != seen.signature:
                    self._seen[path] = self._known(None, _Signature.of(status))
                elif self._taken(folder, name, path, seen, settled=settled):
                    del self._seen[path]
        except (FileNotFoundError, NotADirectoryError):
            self._seen.pop(path, None)
        except OSError as error:  # it can be neither removed nor moved: left alone until it changes
            seen.ready_at = math.inf
            log.warning("inbox_file_stays", reason=error.strerror)
        except Exception:  # one file is one unit of work
            seen.failures += 1
            self._wait(seen)
            log.exception("inbox_file_failed", failures=seen.failures)

    def _taken(self, folder: int, name: str, path: str, seen: _Seen, *, settled: bool) -> bool:
        """Whether *name* has left the inbox.  Names are not logged: people put patients' names there."""
        began = self._now()
        try:
            identity = self._admit_within(folder, name, seen)
        except BusyError as error:
            self._wait(seen)
            log.warning("inbox_file_waits", reason=str(error), seconds=seen.ready_at - self._now())
            return False
        except RefusedError as error:
            if settled:
                self._quarantine.keep(folder, name, path, str(error))
                self._metrics.quarantined()
            return settled
        os.unlink(name, dir_fd=folder)
        self._metrics.received("", seen.signature.size, self._now() - began)
        log.debug("inbox_file_taken", sop_uid=identity.key.sop_uid)
        return True

    def _admit_within(self, folder: int, name: str, seen: _Seen) -> Identity:
        if seen.failures >= _FAILURES:
            raise RefusedError("Taking the file failed several times; the gateway's log says how.")
        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise RefusedError("This is not a regular file.")
        try:
            descriptor = os.open(name, _FILE, dir_fd=folder)
        except OSError as error:
            raise _unreadable(error) from error
        with io.FileIO(descriptor) as file:
            _check_unchanged(file, seen.signature)
            return _admit(self._archive, file, _SOURCE)

    def _wait(self, seen: _Seen) -> None:
        seconds = min(_RETRY_SECONDS * 2**seen.waits, _RETRY_SECONDS_AT_MOST)
        seen.waits += 1
        seen.ready_at = self._now() + seconds


class Quarantine:
    """A bounded folder of files, each with the reason why it is there; the oldest goes first."""

    def __init__(self, folder: Path, *, max_bytes: int, max_files: int) -> None:
        self._folder, self._max_bytes, self._max_files = folder, max_bytes, max_files
        self._bytes = self._files = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for reason in folder.glob(f"*{_REASON}"):  # left by a crash before the file was moved
            if not os.path.lexists(str(reason).removesuffix(_REASON)) and not _reason_of(reason).exists():
                reason.unlink()
        self._trim()

    def keep(self, folder: int, name: str, path: str, reason: str) -> None:
        """Move *name* out of the open *folder*; *path* is what it was called, for people.

        Raises OSError, having moved nothing, if that is not possible or the file is larger than all
        that may be kept.
        """
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if status.st_size > self._max_bytes:
            raise OSError(errno.EFBIG, f"refused, and too large for the quarantine: {reason}")
        target = self._claim(name, path, reason)
        try:
            _move(folder, name, status, target)
        except OSError:
            _reason_of(target).unlink()
            raise
        log.warning("inbox_file_quarantined", reason=reason, size=status.st_size)
        self._files, self._bytes = self._files + 1, self._bytes + status.st_size
        if self._files > self._max_files or self._bytes > self._max_bytes:
            self._trim()

    def _claim(self, name: str, path: str, reason: str) -> Path:
        """A free name, taken by writing the reason beside it."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        text = f"time: {at}\nfile: {path}\nreason: {reason}\n".encode(errors="backslashreplace")
        short = name if len(os.fsencode(name)) <= _NAME_BYTES else name[: _NAME_BYTES // 4]
        for number in itertools.count():
            target = self._folder / (f"{short}~{number}" if number else short)
            if not os.path.lexists(target):
                with contextlib.suppress(FileExistsError), _reason_of(target).open("xb") as file:
                    file.write(text)
                    return target
        raise AssertionError

    def _trim(self) -> None:
        """Count what is there; if that is too much drop the oldest, and a tenth more, to count rarely."""
        kept = sorted(self._contents(), key=lambda item: item[1].st_ctime_ns)
        self._files, self._bytes = len(kept), sum(status.st_size for _, status in kept)
        if self._files <= self._max_files and self._bytes <= self._max_bytes:
            return
        dropped = 0
        for path, status in kept[:-1]:
            if self._files <= self._max_files * 0.9 and self._bytes <= self._max_bytes * 0.9:
                break
            path.unlink(missing_ok=True)
            _reason_of(path).unlink(missing_ok=True)
            self._files, self._bytes, dropped = self._files - 1, self._bytes - status.st_size, dropped + 1
        log.warning("quarantine_full", dropped_files=dropped, kept_files=self._files, kept_bytes=self._bytes)

    def _contents(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.iterdir():
            if not path.name.endswith(_REASON) or os.path.lexists(_reason_of(path)):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.lstat()


class Quarantined(NamedTuple):
    """A file in the quarantine: the path that it had in the inbox, when and why it was put away."""

    file: str
    time: str
    reason: str


def quarantined(folder: Path, most: int) -> tuple[int, list[Quarantined]]:
    """How many files the quarantine at *folder* has, and the last of them, at most so many."""
    reasons: list[tuple[int, Path]] = []
    for path in folder.glob(f"*{_REASON}"):
        with contextlib.suppress(FileNotFoundError):  # it went to make room
            reasons.append((path.lstat().st_mtime_ns, path))
    found = []
    for _, path in heapq.nlargest(most, reasons):
        with contextlib.suppress(FileNotFoundError):
            # What stands between the first and the last line is a path, and may have line ends.
            begin, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("\nfile: ")
            file, _, reason = rest.rpartition("\nreason: ")
            found.append(Quarantined(file, begin.removeprefix("time: "), reason.rstrip("\n")))
    return len(reasons), found


class _Events(FileSystemEventHandler):
    """What watchdog tells, told to the inbox; its threads call this."""

    def __init__(self, inbox: Inbox, folder: Path) -> None:
        self._inbox, self._folder = inbox, str(folder)

    def dispatch(self, event: FileSystemEvent) -> None:
        if isinstance(event, FileClosedEvent):
            self._inbox.closed(os.path.relpath(os.fsdecode(event.src_path), self._folder))
        elif isinstance(event, FileCreatedEvent | FileMovedEvent | DirCreatedEvent | DirMovedEvent):
            self._inbox.changed()


@contextlib.contextmanager
def _folder(root: int, path: str) -> Iterator[int]:
    """The folder at *path* below *root*, opened step by step, so that no link is followed."""
    folder = os.dup(root)
    try:
        for name in filter(None, path.split("/")):
            below = os.open(name, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def _parent(root: int, path: str) -> Iterator[tuple[int, str]]:
    """The folder that holds *path*, open, and the name that it has there."""
    above, _, name = path.rpartition("/")
    with _folder(root, above) as folder:
        yield folder, name


def _reason_of(path: Path) -> Path:
    return path.with_name(path.name + _REASON)


def _move(folder: int, name: str, status: os.stat_result, target: Path) -> None:
    try:
        os.rename(name, target, src_dir_fd=folder)
    except OSError as error:
        if error.errno != errno.EXDEV or not stat.S_ISREG(status.st_mode):
            raise
        # The inbox is a share or a disk of its own.
        with io.FileIO(os.open(name, _FILE, dir_fd=folder)) as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy, _BLOCK)
        os.unlink(name, dir_fd=folder)
