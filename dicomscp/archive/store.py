"""Instance store: immutable Part 10 files, one for each variant of an instance, and the way there.

    incoming/<writer>/<n>                               slot: a name made and synced before it is needed
    instances/<xx>/<study>/<series>/<sop>.dcm           whole or absent, never changed

What has been received is linked to its name.  Linking, unlike renaming, fails if the name is taken,
so a resend can never replace what we hold.  Filing is not synced file by file: who files keeps the
journal entry until `Disk.sync_all` returned, and files again what a loss of power may have torn.
"""

import contextlib
import hashlib
import itertools
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from dicomscp.dicom import part10
from dicomscp.disk import BLOCK_BYTES, Buffer, Disk
from dicomscp.errors import BusyError, DicomscpError

log = structlog.get_logger()

_STAGE_BYTES = 1 << 20
_SLOTS_READY = 8


class Slots:
    """Files for one writer to receive into, whose names are already on stable storage."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        """Make slots in the folder *directory*, which is this writer's alone."""
        self.directory, self._disk = directory, disk
        self._lock = threading.Lock()
        self._ready: deque[Path] = deque()
        self._numbers = itertools.count(1)
        self._making = False
        disk.make_directory(directory)
        disk.sync_directory(directory.parent)
        self._make(_SLOTS_READY)

    def take(self) -> Path:
        """A slot that nobody else has.  Raises BusyError if none can be made."""
        with self._lock:
            if not self._ready:
                try:
                    self._make(_SLOTS_READY)
                except OSError as error:
                    raise BusyError(f"no slot can be made in incoming: {error.strerror}") from error
            path = self._ready.popleft()
            if len(self._ready) < _SLOTS_READY and not self._making:
                self._making = True
                threading.Thread(target=self._make_ahead, name="slots", daemon=True).start()
        return path

    def give_back(self, path: Path) -> None:
        """Nothing was kept in the slot: take its name away."""
        with contextlib.suppress(OSError):  # a start of the gateway clears what stays
            self._disk.unlink(path)

    def close(self) -> None:
        """Take away the slots that were not used."""
        with self._lock:
            while self._ready:
                self.give_back(self._ready.popleft())

    def _make_ahead(self) -> None:
        try:
            made = self._name(2 * _SLOTS_READY)
        except OSError as error:
            log.warning("slots_not_made", reason=error.strerror)
            made = []
        with self._lock:
            self._ready.extend(made)
            self._making = False

    def _make(self, count: int) -> None:
        self._ready.extend(self._name(count))

    def _name(self, count: int) -> list[Path]:
        made = []
        for _ in range(count):
            path = self.directory / str(next(self._numbers))
            self._disk.close(self._disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            made.append(path)
        self._disk.sync_directory(self.directory)
        return made


class Stage:
    """Page-aligned memory that an instance passes through on its way into a slot."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, _STAGE_BYTES)
        self.view = memoryview(self.map)


class Stages:
    """Stages to be used again, so that memory is bounded by what is received at one time."""

    def __init__(self) -> None:
        self._free: deque[Stage] = deque(maxlen=16)

    def take(self) -> Stage:
        """A stage that nobody else has."""
        with contextlib.suppress(IndexError):
            return self._free.pop()
        return Stage()

    def give_back(self, stage: Stage) -> None:
        """The stage is not looked at any more."""
        self._free.append(stage)


class Spool:
    """One dataset on its way in: first in memory, from *inline_bytes* on in a slot.

    Write what arrives, then hand it to `Archive.admit`, or discard it.  One thread at a time.
    """

    def __init__(
        self,
        *,
        meta: Callable[[], bytes],
        inline_bytes: int,
        slots: Slots,
        stages: Stages,
        disk: Disk,
        check_space: Callable[[], None],
    ) -> None:
        """*meta* gives what the file begins with; `sync` puts another of the same length in its place.

        *check_space* is asked before each block and raises BusyError if the disk is too full.
        """
        self.size = 0
        self.tail = b""
        self.slot: Path | None = None
        self._make_meta, self._inline_bytes = meta, inline_bytes
        self._meta_bytes = 0
        self._slots, self._stages, self._disk = slots, stages, disk
        self._check_space = check_space
        self._memory = bytearray()
        self._sha = hashlib.sha256()
        self._descriptor = -1
        self._head: Stage | None = None
        self._stage: Stage | None = None
        self._filled = 0
        self._offset = 0

    def write(self, data: Buffer) -> None:
        """Take the next bytes of the dataset.  Raises BusyError if the disk does not take them."""
        self._sha.update(data)
        self.size += len(data)
        if self._stage is not None:
            self._write_slot(data)
        elif self.size <= self._inline_bytes:
            self._memory += data
        else:
            self._open_slot()
            self._write_slot(self._memory)
            self._memory = bytearray()
            self._write_slot(data)
        self.tail = bytes(data[-8:]) if len(data) >= 8 else (self.tail + bytes(data))[-8:]

    def digest(self) -> bytes:
        """SHA-256 of the dataset."""
        return self._sha.digest()

    def prefix(self) -> Buffer:
        """The dataset's first bytes, all of them if they fit in memory."""
        if self._head is None:
            return self._memory
        start = self._meta_bytes
        return self._head.view[start : min(_STAGE_BYTES, start + self.size)]

    @contextlib.contextmanager
    def whole(self) -> Iterator[Buffer]:
        """The whole dataset, read back from the slot where it is not in memory.  Raises BusyError."""
        if self.slot is None:
            yield self._memory
            return
        try:
            self._write_last()
            with self.slot.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BusyError(f"the slot cannot be written: {error.strerror}") from error
        view = memoryview(mapped)[self._meta_bytes : self._meta_bytes + self.size]
        try:
            yield view
        finally:
            with contextlib.suppress(BufferError):  # an error's traceback may still look at it
                view.release()
                mapped.close()

    def sync(self, meta: bytes, *, relaxed: bool) -> None:
        """Complete the slot with *meta* and return once its bytes are durable.  Raises BusyError."""
        stage, head = self._stage, self._head
        if stage is None or head is None:
            return
        head.view[: len(meta)] = meta
        try:
            if stage is not head:
                self._disk.write(self._descriptor, [head.view[:BLOCK_BYTES]], 0)
            self._write_last()
            self._disk.truncate(self._descriptor, len(meta) + self.size)
            if not relaxed:
                self._disk.sync(self._descriptor)
        except OSError as error:
            raise BusyError(f"the slot cannot be written: {error.strerror}") from error
        finally:
            descriptor, self._descriptor = self._descriptor, -1
            self._disk.close(descriptor)

    def release(self) -> None:
        """Give the memory back; the slot stays."""
        for stage in {id(stage): stage for stage in (self._head, self._stage) if stage}.values():
            self._stages.give_back(stage)
        self._head = self._stage = None
        self._memory = bytearray()

    def discard(self) -> None:
        """Keep nothing."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self._disk.close(self._descriptor)
            self._descriptor = -1
        if self.slot is not None:
            self._slots.give_back(self.slot)
            self.slot = None
        self.release()

    def _write_last(self) -> None:
        whole = -(-self._filled // BLOCK_BYTES) * BLOCK_BYTES
        if self._stage is not None and whole:
            self._disk.write(self._descriptor, [self._stage.view[:whole]], self._offset)

    def _open_slot(self) -> None:
        self.slot = self._slots.take()
        try:
            self._descriptor = self._disk.open_direct(self.slot)
        except OSError as error:
            raise BusyError(f"the slot cannot be opened: {error.strerror}") from error
        self._head = self._stage = self._stages.take()
        meta = self._make_meta()
        self._head.view[: len(meta)] = meta
        self._filled = self._meta_bytes = len(meta)

    def _write_slot(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            stage = self._stage
            if stage is None:
                raise BusyError("the slot was lost")
            room = min(len(view), _STAGE_BYTES - self._filled)
            stage.view[self._filled : self._filled + room] = view[:room]
            self._filled += room
            view = view[room:]
            if self._filled == _STAGE_BYTES:
                self._flush(stage)

    def _flush(self, stage: Stage) -> None:
        self._check_space()
        try:
            self._disk.write(self._descriptor, [stage.view], self._offset)
        except OSError as error:
            raise BusyError(f"the slot cannot be written: {error.strerror}") from error
        self._offset += _STAGE_BYTES
        self._filled = 0
        if stage is self._head:
            self._stage = self._stages.take()


class InstanceStore:
    """The instances held under one root.  One process files; any may read."""

    def __init__(self, root: Path, disk: Disk) -> None:
        """The folders are made as they are needed."""
        self._root, self._disk = root, disk
        self._made: set[Path] = set()
        self._making = root / "incoming" / "filing" / "1"
        disk.make_directory(self._making.parent)
        disk.make_directory(root / "instances")

    def put(self, part10_file: Buffer, path: str) -> bool:
        """File the bytes of a whole Part 10 file as *path*; False if that name is taken."""
        self._write(part10_file)
        try:
            return self.link(self._making, path)
        finally:
            self._disk.unlink(self._making)

    def link(self, slot: Path, path: str) -> bool:
        """File the received *slot* as *path*; False if that name is taken.  The slot stays."""
        final = self._root / path
        self._make_directory(final.parent)
        try:
            self._disk.link(slot, final)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if final.parent.is_dir():
                raise
            self._made.clear()  # somebody took the folder away
            self._make_directory(final.parent)
            self._disk.link(slot, final)
        return True

    def remove(self, path: str) -> None:
        """Take the name *path* away, and the folders of series and study if they are empty then."""
        name = self._root / path
        self._disk.unlink(name)
        for folder in (name.parent, name.parent.parent):
            if not self._disk.remove_directory(folder):
                break
            self._made.discard(folder)

    def replace(self, part10_file: Buffer, path: str) -> None:
        """File the bytes of a whole Part 10 file as *path*, in place of what has that name."""
        self._write(part10_file)
        self._make_directory((self._root / path).parent)
        self._disk.rename(self._making, self._root / path)

    def replace_by_link(self, slot: Path, path: str) -> None:
        """File the received *slot* as *path*, in place of what has that name.  The slot stays."""
        self._disk.unlink(self._making)
        self._disk.link(slot, self._making)
        self._make_directory((self._root / path).parent)
        self._disk.rename(self._making, self._root / path)
        self._disk.unlink(self._making)  # renaming between two names of one file does nothing

    def digest_of(self, path: str) -> bytes | None:
        """The digest in the receipt of what is held as *path*, if its dataset is what was received.

        None if there is no such file or it is not whole, as after a loss of power.
        """
        try:
            return intact_digest(self._root / path)
        except (FileNotFoundError, DicomscpError):
            return None

    def claims(self, path: str) -> bytes | None:
        """The digest in the receipt of what is held as *path*, whole or not; None if there is none."""
        try:
            with (self._root / path).open("rb") as file:
                receipt = part10.read_file_meta(file.read(1 << 16)).receipt
        except (FileNotFoundError, DicomscpError):
            return None
        return receipt.digest if receipt else None

    def _write(self, part10_file: Buffer) -> None:
        self._disk.unlink(self._making)
        descriptor = self._disk.open(self._making, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            self._disk.write(descriptor, [part10_file], 0)
        finally:
            self._disk.close(descriptor)

    def _make_directory(self, directory: Path) -> None:
        if directory not in self._made:
            self._disk.make_directory(directory)
            if len(self._made) > 10_000:
                self._made.clear()
            self._made.add(directory)


def intact_digest(path: Path) -> bytes | None:
    """The digest of the receipt in the file at *path* if it fits the dataset's bytes, else None.

    Raises RefusedError if the file cannot be read as Part 10, FileNotFoundError if it is not there.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
        meta = part10.read_file_meta(head)
        if meta.receipt is None:
            return None
        sha = hashlib.sha256(head[meta.dataset_offset :])
        while block := file.read(_STAGE_BYTES):
            sha.update(block)
    return meta.receipt.digest if sha.digest() == meta.receipt.digest else None
