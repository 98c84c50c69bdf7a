"""Journal: what was taken into custody, in the order in which each writer took it.

    journal/<writer>/lock           held by flock(2) while the writer lives
    journal/<writer>/synced         position up to which entries are durable    } 8 bytes each, shared
    journal/<writer>/applied        position up to which they are in the index  } memory, not durable
    journal/<writer>/settled        position up to which nothing needs the journal any more, synced
    journal/<writer>/<number>.seg   segment
    journal/free/<name>.seg         segment to be used again
    journal/damaged/<name>.seg      segment in which bytes changed that were synced

A writer is one process in one life: its name ends in random digits and is never used again, so a
position (writer, segment number, offset) means one place for ever.  A writer appends to segments
whose blocks are already written, so that a sync has no metadata to write; they are recycled for that
reason.  Entries carry a checksum seeded with the segment's salt, so bytes of an earlier use never
pass for entries.

    segment header   "DSCPSEG1", number u64, salt 16 bytes, CRC-32 of the writer's name
                     and these u32, zeros to 64 bytes
    entry            length u32, CRC-32 u32 of salt and what follows up to the body, head length u32,
                     kind u8, 3 zero bytes; head (JSON); body; zeros to a multiple of 8

Nothing is ever appended behind the end of an earlier life, so a torn tail is cut by never being
continued.  Entries that stand intact behind bytes that are not are read all the same, and told of.
An entry whose sender was refused may still be read: it is then held, which a resend finds.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import orjson
import structlog

from dicomscp.disk import Buffer, Disk
from dicomscp.errors import BusyError

log = structlog.get_logger()

INLINE = 1
"""Kind of an entry whose body is the whole Part 10 file."""
SLOT = 2
"""Kind of an entry whose file was received into a slot, which the head names."""
REMOVE = 3
"""Kind of an entry that names variants to be removed; such entries have journals of their own."""
REMOVER = "remove"
"""Role of the writers of those."""

_MAGIC = b"DSCPSEG1"
_HEADER = struct.Struct("<8sQ16s")
_HEADER_BYTES = 64
_ENTRY = struct.Struct("<IIIB3x")
_ZEROS = bytes(1 << 20)
_HEAD = b'{"study":'


class Position(NamedTuple):
    """A place in one writer's journal."""

    number: int
    offset: int

    @property
    def word(self) -> int:
        """The position as one 64-bit word, which rises with it."""
        return self.number << 32 | self.offset

    @classmethod
    def of_word(cls, word: int) -> Self:
        """The position that *word* stands for."""
        return cls(word >> 32, word & 0xFFFFFFFF)


class Entry(NamedTuple):
    """One entry as read back; *body* is valid until its reader reads on."""

    kind: int
    head: dict[str, object]
    body: memoryview
    end: Position


class Word:
    """A 64-bit number in a file, shared between processes; a store or load is never torn."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Raises FileNotFoundError unless the file is there or is to be created."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if os.fstat(descriptor).st_size < 8:
                os.pwrite(descriptor, bytes(8), 0)  # a hole would be filled, or not, when it is stored to
            self._map = mmap.mmap(descriptor, 8)
        finally:
            os.close(descriptor)
        self._view = memoryview(self._map).cast("Q")

    def load(self) -> int:
        """The number as it stands."""
        return self._view[0]

    def store(self, value: int) -> None:
        """Let all processes see *value*."""
        self._view[0] = value

    def close(self) -> None:
        """Give the memory back."""
        self._view.release()
        self._map.close()


@dataclass(slots=True)
class _Segment:
    number: int
    salt: bytes
    descriptor: int
    path: Path
    size: int
    end: int = _HEADER_BYTES
    synced: int = _HEADER_BYTES
    failed: bool = False


class Ticket(NamedTuple):
    """What was appended and is to be synced."""

    segment: _Segment
    end: int


class JournalWriter:
    """The one writer of one journal; safe to share between threads.

    Between `append` and the return of `sync` an entry may be lost, after it not.  Threads that sync
    at the same time share one sync.
    """

    def __init__(
        self,
        journal: Path,
        role: str,
        disk: Disk,
        *,
        segment_bytes: int,
        relaxed: bool,
        sync_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a new journal for *role* under the folder *journal*.

        With *relaxed*, `sync` returns when the bytes are written, not synced.  *sync_failed* is told of
        every write and sync that fails.
        """
        self.name = f"{role}-{secrets.token_hex(6)}"
        self._journal, self._disk = journal, disk
        self._segment_bytes, self._relaxed = segment_bytes, relaxed
        self._condition = threading.Condition()
        self._syncing = False
        self._preparing = threading.Lock()
        self._closed = False
        self._next: _Segment | None = None
        self._number = 0
        self._sync_failed = sync_failed
        self.directory = self._make_home()
        self._segment = self._prepare()
        self._synced = Word(self.directory / "synced")
        self._synced.store(Position(self._segment.number, _HEADER_BYTES).word)
        self._prepare_ahead()

    def append(self, kind: int, head: dict[str, object], body: Sequence[Buffer]) -> Ticket:
        """Write an entry behind all others.  Raises BusyError if the disk does not take it."""
        encoded = orjson.dumps(head)
        head_bytes = len(encoded)
        length = _ENTRY.size + head_bytes + sum(map(len, body))
        padding = -length % 8
        with self._condition:
            segment = self._room_for(length + padding)
            checked = struct.pack("<IB3x", head_bytes, kind) + encoded
            crc = zlib.crc32(checked, zlib.crc32(segment.salt + struct.pack("<I", length)))
            try:
                self._disk.write(
                    segment.descriptor,
                    [struct.pack("<II", length, crc), checked, *body, _ZEROS[:padding]],
                    segment.end,
                )
            except OSError as error:
                self._fail(segment)
                raise BusyError(f"the journal cannot be written: {error.strerror}") from error
            segment.end += length + padding
            return Ticket(segment, segment.end)

    def sync(self, ticket: Ticket) -> None:
        """Return once the entry of *ticket* is durable.  Raises BusyError if that cannot be said of it."""
        segment, end = ticket
        with self._condition:
            while segment.synced < end and not segment.failed:
                if self._syncing:
                    self._condition.wait()
                else:
                    self._sync_now(segment)
            if segment.synced < end:
                raise BusyError("the journal could not be synced")

    def close(self) -> None:
        """End this life: what was appended is synced, the lock given up."""
        with self._condition, self._preparing:
            self._closed = True
            if not self._segment.failed:
                self._sync_now(self._segment)
            self._disk.close(self._segment.descriptor)
            if self._next:
                self._disk.close(self._next.descriptor)
                self._next = None
            self._synced.close()
            os.close(self._lock)

    def _make_home(self) -> Path:
        """Make the writer's folder so that it is never seen without its lock held."""
        making = self._journal / f".{self.name}"
        self._disk.make_directory(making)
        self._lock = os.open(making / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ("synced", "applied", "settled"):
            Word(making / name, create=True).close()
        self._disk.sync_directory(making)
        home = self._journal / self.name
        self._disk.rename(making, home)
        self._disk.sync_directory(self._journal)
        return home

    def _room_for(self, length: int) -> _Segment:
        if self._segment.failed or self._segment.end + length > self._segment.size:
            self._rotate(length)
        return self._segment

    def _rotate(self, length: int) -> None:
        """Go on in the next segment; the present one is whole and synced before, or failed."""
        old = self._segment
        while self._syncing or (not old.failed and old.synced < old.end):
            if self._syncing:
                self._condition.wait()
            else:
                self._sync_now(old)
            if self._segment is not old:  # somebody else was faster
                self._room_for(length)
                return
        try:
            with self._preparing:
                following, self._next = self._next, None
                if following is None or _HEADER_BYTES + length > following.size:
                    following = self._prepare(_HEADER_BYTES + length)
        except OSError as error:
            raise BusyError(f"no journal segment can be made: {error.strerror}") from error
        self._disk.close(old.descriptor)
        self._segment = following
        self._synced.store(Position(following.number, _HEADER_BYTES).word)
        self._prepare_ahead()

    def _sync_now(self, segment: _Segment) -> None:
        """Sync *segment* up to its end; called with the condition held, which is let go meanwhile."""
        upto = segment.end
        self._syncing = True
        self._condition.release()
        try:
            if not self._relaxed:
                self._disk.sync(segment.descriptor)
        except OSError as error:
            log.error("journal_sync_failed", segment=segment.path.name, reason=error.strerror)
            failed = True
        else:
            failed = False
        finally:
            self._condition.acquire()
            self._syncing = False
            self._condition.notify_all()
        if failed:
            self._fail(segment)
        elif not segment.failed:
            segment.synced = upto
            if segment is self._segment:
                self._synced.store(Position(segment.number, upto).word)

    def _fail(self, segment: _Segment) -> None:
        """Never trust *segment* again: wipe what was not acknowledged, go on in another."""
        self._sync_failed()
        segment.failed = True
        with contextlib.suppress(OSError):  # what cannot be wiped is read, and held though it was refused
            self._disk.write(segment.descriptor, [bytes(segment.end - segment.synced)], segment.synced)

    def _prepare_ahead(self) -> None:
        threading.Thread(target=self._prepare_next, name="journal-prepare", daemon=True).start()

    def _prepare_next(self) -> None:
        with self._preparing:
            if self._next is None and not self._closed:
                try:
                    self._next = self._prepare()
                except OSError as error:
                    log.warning("segment_not_prepared", reason=error.strerror)

    def _prepare(self, least: int = 0) -> _Segment:
        """Make the following segment: blocks written, header and name synced."""
        self._number += 1
        path = self.directory / f"{self._number:010d}.seg"
        size = max(self._segment_bytes, least)
        if not self._take_free(path, size):
            self._write_zeros(path, size)
        descriptor = self._disk.open(path, os.O_RDWR)
        salt = secrets.token_bytes(16)
        header = _HEADER.pack(_MAGIC, self._number, salt)
        header += struct.pack("<I", zlib.crc32(header, zlib.crc32(self.name.encode())))
        self._disk.write(descriptor, [header.ljust(_HEADER_BYTES, b"\0")], 0)
        self._disk.sync(descriptor)
        self._disk.sync_directory(self.directory)
        return _Segment(self._number, salt, descriptor, path, os.fstat(descriptor).st_size)

    def _take_free(self, path: Path, size: int) -> bool:
        free = self._journal / "free"
        self._disk.make_directory(free)
        for candidate in free.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another writer took it
                if candidate.stat().st_size == size:
                    self._disk.rename(candidate, path)
                    return True
        return False

    def _write_zeros(self, path: Path, size: int) -> None:
        descriptor = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            for offset in range(0, size, len(_ZEROS)):
                self._disk.write(descriptor, [_ZEROS[: size - offset]], offset)
        finally:
            self._disk.close(descriptor)


class JournalReader:
    """Reads the journal of one writer, living or dead, from where it was settled.

    Of a living writer only what it has synced is seen; of a dead one all that is intact.
    """

    def __init__(self, directory: Path) -> None:
        """Read the journal in *directory*."""
        self.directory = directory
        self.name = directory.name
        self._synced = Word(directory / "synced", create=True)
        self._applied = Word(directory / "applied", create=True)
        self.position = self.settled = _settled(directory)
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._salt = b""
        self._number = 0
        self._damaged: set[int] = set()

    @property
    def has_removals(self) -> bool:
        """Whether this is a journal of removals; such a journal has nothing else."""
        return self.name.startswith(f"{REMOVER}-")

    def alive(self) -> bool:
        """Whether the writer still holds its lock."""
        return is_alive(self.directory)

    def synced(self) -> Position:
        """Where a living writer's durable entries end."""
        return Position.of_word(self._synced.load())

    def read(self, *, alive: bool, limit_bytes: int) -> list[Entry]:
        """The next entries, about *limit_bytes* of them at most; `position` moves behind the last.

        Entries of an earlier call are no longer valid.
        """
        synced = self.synced()
        if alive and synced <= self.position:
            return []
        entries: list[Entry] = []
        for number in self._numbers():
            if number < self.position.number or (alive and number > synced.number):
                continue
            if not self._map_segment(number):
                continue
            end = synced.offset if alive and number == synced.number else None
            for entry in self._scan(self.position.offset, end):
                entries.append(entry)
                self.position = entry.end
                limit_bytes -= len(entry.body) + 512
                if limit_bytes <= 0:
                    return entries
            if end is not None and self.position.offset < end:
                self._tell_damage(number, self.position.offset, end)
                self.position = Position(number, end)
            if entries:
                break
        return entries

    def mark_applied(self, position: Position) -> None:
        """Let questions know that everything before *position* is in the index."""
        self._applied.store(position.word)

    def mark_settled(self, position: Position, disk: Disk) -> list[Path]:
        """Never read before *position* again; returns the segments that nobody needs any more.

        The mark is durable when this returns.  Raises OSError; then nothing is marked.
        """
        if position != self.settled:
            descriptor = disk.open(self.directory / "settled", os.O_RDWR | os.O_CREAT)
            try:
                disk.write(descriptor, [position.word.to_bytes(8, "little")], 0)
                disk.sync(descriptor)
            finally:
                disk.close(descriptor)
            self.settled = position
        return [self._segment_path(number) for number in self._numbers() if number < position.number]

    def segments(self) -> list[Path]:
        """All segments that are there."""
        return [self._segment_path(number) for number in self._numbers()]

    def is_damaged(self, segment: Path) -> bool:
        """Whether bytes of *segment* changed after they were synced."""
        return int(segment.stem) in self._damaged

    def unapplied_bytes(self) -> int:
        """About how much of what the writer synced is not in the index."""
        return _between(self.directory, Position.of_word(self._applied.load()), self.synced())

    def close(self) -> None:
        """Give the memory back."""
        self._unmap()
        self._synced.close()
        self._applied.close()

    def _unmap(self) -> None:
        if self._view is not None and self._map is not None:
            with contextlib.suppress(BufferError):  # an entry is still looked at: its memory goes with it
                self._view.release()
                self._map.close()
        self._view = self._map = None

    def _segment_path(self, number: int) -> Path:
        return self.directory / f"{number:010d}.seg"

    def _numbers(self) -> list[int]:
        return _numbers(self.directory)

    def _map_segment(self, number: int) -> bool:
        """Look at segment *number*; False if it was never begun or is not whole."""
        if number != self._number or self._view is None:
            self._unmap()
            with self._segment_path(number).open("rb") as file:
                if os.fstat(file.fileno()).st_size < _HEADER_BYTES:
                    return False
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._view = memoryview(self._map)
            self._number = number
            magic, written, self._salt = _HEADER.unpack_from(self._view)
            (crc,) = struct.unpack_from("<I", self._view, _HEADER.size)
            if (
                magic != _MAGIC
                or written != number
                or crc != zlib.crc32(self._view[: _HEADER.size], zlib.crc32(self.name.encode()))
            ):
                self._unmap()
                return False
        if number > self.position.number or self.position.offset < _HEADER_BYTES:
            self.position = Position(number, _HEADER_BYTES)
        return True

    def _scan(self, offset: int, end: int | None) -> Iterator[Entry]:
        """The intact entries from *offset* to *end*, or to the end of the segment."""
        mapped = self._map
        if mapped is None:
            return
        stop = len(mapped) if end is None else min(end, len(mapped))
        while offset + _ENTRY.size <= stop:
            entry = self._entry_at(offset)
            if entry is None:
                found = self._next_intact(offset, stop)
                if found is None:
                    return
                self._tell_damage(self._number, offset, found)
                offset = found
                continue
            offset = entry.end.offset
            yield entry

    def _entry_at(self, offset: int) -> Entry | None:
        view = self._view
        if view is None or offset + _ENTRY.size > len(view):
            return None
        length, crc, head_bytes, kind = _ENTRY.unpack_from(view, offset)
        body = offset + _ENTRY.size + head_bytes
        finish = offset + length
        if length < _ENTRY.size + head_bytes or finish > len(view):
            return None
        seed = zlib.crc32(self._salt + struct.pack("<I", length))
        if zlib.crc32(view[offset + 8 : body], seed) != crc:
            return None
        head = orjson.loads(view[offset + _ENTRY.size : body])
        if kind == INLINE and not _digest_fits(head, view[body:finish]):
            return None
        return Entry(kind, head, view[body:finish], Position(self._number, finish + -finish % 8))

    def _next_intact(self, offset: int, stop: int) -> int | None:
        """Where the next intact entry behind *offset* begins; found by what every head begins with."""
        mapped = self._map
        at = offset + _ENTRY.size
        while mapped is not None and (at := mapped.find(_HEAD, at + 1, stop)) >= 0:
            candidate = at - _ENTRY.size
            if candidate % 8 == 0 and self._entry_at(candidate) is not None:
                return candidate
        return None

    def _tell_damage(self, number: int, start: int, end: int) -> None:
        log.error("journal_damaged", writer=self.name, segment=number, offset=start, bytes=end - start)
        self._damaged.add(number)


def _digest_fits(head: dict[str, object], part10: memoryview) -> bool:
    dataset = part10[int(str(head["dataset_offset"])) :]
    return hashlib.sha256(dataset).hexdigest() == head["digest"]


def is_alive(directory: Path) -> bool:
    """Whether the writer of the journal in *directory* still holds its lock."""
    try:
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


_OTHER_FOLDERS = frozenset({"free", "damaged"})


def writers(journal: Path) -> list[Path]:
    """The folders of all writers, living and dead, under the folder *journal*."""
    return [journal / name for name in writer_names(journal)]


def writer_names(journal: Path) -> list[str]:
    """The names of those folders, in order; each question asks for them."""
    try:
        names = os.listdir(journal)  # noqa: PTH208 - a Path a name takes longer than all the rest
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name[0] != "." and name not in _OTHER_FOLDERS)


class Progress(NamedTuple):
    """How far a journal is: what is durable, what of that is in the index, and about how much is not."""

    synced: Position
    applied: Position
    waiting_bytes: int


def progress(directory: Path) -> Progress:
    """How far the journal in *directory* is; for who only looks: nothing is made, as a reader would.

    Raises FileNotFoundError if it, or a segment of it, goes meanwhile.
    """
    synced = Position.of_word(_word(directory / "synced"))
    applied = Position.of_word(_word(directory / "applied"))
    return Progress(synced, applied, _between(directory, applied, synced))


def _word(path: Path) -> int:
    """What a `Word` there says; 0 before there is one."""
    try:
        return int.from_bytes(path.read_bytes(), sys.byteorder)
    except FileNotFoundError:
        return 0


def _numbers(directory: Path) -> list[int]:
    return sorted(int(path.stem) for path in directory.glob("*.seg"))


def _between(directory: Path, applied: Position, synced: Position) -> int:
    """About how many bytes of entries lie between two places in a journal."""
    if synced.number == applied.number:
        return max(0, synced.offset - applied.offset)
    whole = [number for number in _numbers(directory) if applied.number <= number < synced.number]
    between = sum((directory / f"{number:010d}.seg").stat().st_size for number in whole)
    return max(0, between - applied.offset) + synced.offset - _HEADER_BYTES


def _settled(directory: Path) -> Position:
    """The durable mark, or the very beginning if there is none."""
    try:
        data = (directory / "settled").read_bytes()
    except FileNotFoundError:
        data = b""
    return Position.of_word(int.from_bytes(data[:8], "little") if len(data) >= 8 else 0)
