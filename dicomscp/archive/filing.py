"""Filing: gives every journalled instance its name and its place in the index.

One process files.  It may be killed, or lose power, between any two steps: whatever was filed but
not settled is filed again from the journal, and a name is believed only if the bytes behind it are
what the receipt says.  Settling syncs the file system as a whole; only then are slots and segments
let go.

Removals are filed too, each alone: all before it is settled first, so that no arrival from before it
is filed again; then the variants it names leave; then it is settled itself.  Their files go when the
study's documents do not name them any more.
"""

import contextlib
import errno
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import orjson
import structlog

from dicomscp.archive import journal
from dicomscp.archive.index import Arrival, Held, Index, Named
from dicomscp.archive.journal import INLINE, REMOVE, Entry, JournalReader, Position
from dicomscp.archive.store import InstanceStore
from dicomscp.dicom import part10
from dicomscp.dicom.identity import InstanceKey, PrefixError, read_identity
from dicomscp.dicom.jsonmodel import Compiler, Header
from dicomscp.dicom.sameness import UNCOMPRESSED, same_values
from dicomscp.disk import Disk
from dicomscp.errors import DamagedError, DicomscpError, RefusedError
from dicomscp.study import layout

log = structlog.get_logger()

_BATCH_BYTES = 4 << 20
_ENTRY_BYTES = 512
_HEADER_BYTES = 1 << 16
_START, _END = Position(0, 0), Position(1 << 31, 0)
_FREE_SEGMENTS = 8
_UNSETTLED_SEGMENTS = 2
_REMOVED_AT_ONCE = 1000  # files between two settles; arrivals wait for that long


class Round(NamedTuple):
    """What one step did: entries read, variants among them that were not held, whether more waited.

    *changed* has the studies whose published instances changed, with their changes by now.  Those that
    *removals* changed are to be published at once.
    """

    entries: int
    arrivals: int
    changed: dict[str, int]
    more: bool
    removals: bool = False


@dataclass(slots=True)
class _Batch:
    """What one round files and indexes."""

    arrivals: list[Arrival] = field(default_factory=list)
    again: list[tuple[InstanceKey, bytes]] = field(default_factory=list)
    repaired: list[Arrival] = field(default_factory=list)
    positions: dict[str, Position] = field(default_factory=dict)
    variants: dict[str, list[Held]] = field(default_factory=lambda: defaultdict(list))
    size: int = 0


class Filing:
    """The one that files; not safe to share between threads."""

    def __init__(
        self,
        root: Path,
        index: Index,
        disk: Disk,
        *,
        segment_bytes: int,
        sync_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """File what is journalled under *root*.

        Segments of *segment_bytes* are used again; *sync_failed* is told of each settle that failed.
        """
        self._root, self._index, self._disk = root, index, disk
        self._segment_bytes = segment_bytes
        self._store = InstanceStore(root, disk)
        self._compiler = Compiler()
        self._readers: dict[str, JournalReader] = {}
        self._applied: dict[str, Position] = {}
        self._slots: list[Path] = []
        self._settling: tuple[Future[None], dict[str, Position], list[Path]] | None = None
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="settle")
        self._root_descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._unsettled = False
        self._doubtful: dict[str, Position] = {}
        self._indexed: dict[str, Position] = {}
        self._index_doubtful = self._commit_doubtful = False
        self._synced: set[str] = set()  # journals of writers that are gone
        self._may_leave = True
        self._sync_failed = sync_failed

    def step(self) -> Round:
        """File and index what is next.

        Raises OSError, or what the index raises, if that cannot be done; then nothing counts as
        done, and the next call begins where this one did.
        """
        readers = self._look()
        removers = [reader for reader in readers if reader.has_removals]
        removed = self._remove(removers)
        if removed is not None:
            return removed
        done = self._take_in([reader for reader in readers if not reader.has_removals])
        return done if done.entries else self._remove(removers) or done

    def _take_in(self, readers: list[JournalReader]) -> Round:
        """File and index the arrivals that are next."""
        batch = _Batch()
        entries = 0
        changed: dict[str, int] = {}
        before = {reader: reader.position for reader in readers}
        slots = len(self._slots)
        try:
            for reader in before:
                entries += self._read(reader, batch)
            if batch.arrivals or batch.again or batch.repaired:
                changed = self._index.apply(batch.arrivals, batch.positions, batch.again, batch.repaired)
        except BaseException:
            self._commit_doubtful = True  # the connection may have broken behind it
            for reader, position in before.items():
                reader.position = position
            del self._slots[slots:]  # they have no other name yet
            raise
        for reader in before:
            self._applied[reader.name] = reader.position
            reader.mark_applied(reader.position)
        return Round(entries, len(batch.arrivals), changed, more=batch.size >= _BATCH_BYTES)

    def _read(self, reader: JournalReader, batch: _Batch) -> int:
        """File what is next in one journal."""
        entries = reader.read(alive=reader.alive(), limit_bytes=_BATCH_BYTES)
        batch.size += sum(len(entry.body) + _ENTRY_BYTES for entry in entries)
        if entries:
            known = self._index.known([str(entry.head["sop"]) for entry in entries], leaving=True)
            for sop_uid, variants in known.items():
                batch.variants.setdefault(sop_uid, list(variants))
            doubtful, indexed = self._doubtful[reader.name], self._indexed.get(reader.name, _START)
            for entry in entries:
                self._file(entry, batch, doubtful=entry.end <= doubtful, counted=entry.end <= indexed)
        batch.positions[reader.name] = reader.position
        return len(entries)

    def _remove(self, readers: list[JournalReader]) -> Round | None:
        """Apply the removals that are next; None if there are none, or not yet.

        They wait until all that an earlier life left is filed anew, for it cannot be settled before.
        """
        waiting = []
        for reader in readers:
            if self._has_more(reader, alive=reader.alive()):
                waiting.append(reader)
            else:  # a question waits for no writer that was killed before its first entry
                reader.mark_applied(reader.position)
        if not waiting or not self._filed_anew:
            return None
        self._settle_all()
        reader = waiting[0]
        position, applied = reader.position, self._applied.get(reader.name, reader.position)
        changed: dict[str, int] = {}
        try:
            entries = reader.read(alive=reader.alive(), limit_bytes=_BATCH_BYTES)
            for entry in entries:
                changed |= self._leave(entry, {reader.name: reader.position})
            self._applied[reader.name] = reader.position
            self._may_leave = True
            reader.mark_applied(reader.position)
            self._settle_all()  # the journal goes with it if its writer is gone
        except BaseException:  # it is read again: then it is told again which studies it changed
            reader.position, self._applied[reader.name] = position, applied
            raise
        return Round(len(entries), 0, changed, more=True, removals=True)

    def _leave(self, entry: Entry, positions: Mapping[str, Position]) -> dict[str, int]:
        """Let what *entry* names leave, if it is still as it was when the index was asked."""
        if entry.kind != REMOVE:
            log.error("entry_unknown", kind=entry.kind)
            return {}
        named = _named(entry.head)
        changed = self._index.leave(named, positions, str(entry.head["index"]))
        if changed:
            log.info("removal_applied", study_uid=str(entry.head["study"]), named=len(named))
        else:  # all came again since, or the index was made anew
            log.warning("removal_void", study_uid=str(entry.head["study"]), named=len(named))
        return changed

    def finish_removals(self) -> set[str]:
        """Take the files away of some of what left, where no document names it any more.

        Returns the studies of which more is leaving; what they wait for is to be published.  Raises
        OSError, or what the index raises, if it cannot be done; it is done again at the next call.
        """
        if not self._may_leave:
            return set()
        left = self._index.left(_REMOVED_AT_ONCE)
        if left:
            for held in left:
                self._take_away(held)
            self._settle_all()
            self._index.forget_left(left)
            self._unsettled = True
            log.info("removal_finished", variants=len(left))
        waiting = self._index.leaving_studies()
        self._may_leave = bool(waiting)
        return set(waiting)

    def _take_away(self, held: Held) -> None:
        """Take the file of *held* away, unless it is all there is of another variant.

        After a loss of power another one may have its name, filed there when this row was not known to be
        there again, and filed anew under a name of its own since.
        """
        claimed = self._store.claims(held.path)
        if claimed in {None, held.digest} or self._holds(held.key, claimed):
            self._store.remove(held.path)
        else:
            log.error("removed_file_is_another", sop_uid=held.key.sop_uid)

    def _holds(self, key: InstanceKey, digest: bytes | None) -> bool:
        """Whether a variant of that *digest* is held, and stands whole on the disk."""
        variants = self._index.known([key.sop_uid]).get(key.sop_uid, ())
        return any(
            one.key == key and one.digest == digest and self._store.digest_of(one.path) == digest
            for one in variants
        )

    @property
    def settled(self) -> bool:
        """Whether nothing filed waits to be settled."""
        return not self._unsettled and self._settling is None

    @property
    def caught_up(self) -> bool:
        """Whether all that was journalled before this life is in the index."""
        return all(self._is_past(reader) for reader in self._readers.values())

    @property
    def _filed_anew(self) -> bool:
        """The same, of arrivals alone."""
        return all(self._is_past(reader) for reader in self._readers.values() if not reader.has_removals)

    def _is_past(self, reader: JournalReader) -> bool:
        """Whether everything is read that the journal held when it was first looked at."""
        before = self._doubtful[reader.name]
        return not self._has_more(reader) if before == _END else reader.position >= before

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be settled that receivers may soon need its segments."""
        return any(
            self._applied.get(name, reader.settled).number - reader.settled.number > _UNSETTLED_SEGMENTS
            for name, reader in self._readers.items()
        )

    def settle(self, *, wait: bool = False) -> bool:
        """Go on settling: begin a sync if one is needed, let go of what the last one covered.

        With *wait*, return when all that was filed before the call is settled.  A sync that fails
        lets go of nothing, and what it did not cover is filed again; then this returns False.
        """
        if not self._finish(wait=wait):
            return False
        if self._index_doubtful:
            self._index.make_durable()
            self._index_doubtful = False
        if self.settled:
            self._forget_dead()
        elif self._settling is None:
            positions = dict(self._applied)
            slots, self._slots = self._slots, []
            self._unsettled = False
            future = self._syncer.submit(self._disk.sync_all, self._root_descriptor)
            self._settling = (future, positions, slots)
            if wait:
                return self._finish(wait=True)
        return True

    def _settle_all(self) -> None:
        """Settle all that is filed, with every name made or taken away until now.  Raises OSError."""
        self._unsettled = True
        settled = self.settle(wait=True)
        behind = [
            reader
            for name, reader in self._readers.items()
            if reader.settled < self._applied.get(name, _START)
        ]
        if not settled or behind:
            raise OSError(errno.EIO, "what was filed could not be settled")

    def lag_bytes(self) -> int:
        """About how much is journalled and not yet in the index; may be asked by another thread."""
        total = 0
        for reader in list(self._readers.values()):
            with contextlib.suppress(ValueError, FileNotFoundError):  # it is closed, a segment used again
                total += reader.unapplied_bytes()
        return total

    def clear_incoming(self) -> None:
        """Take away the slots of writers that are gone; call once everything is filed and settled."""
        there = list((self._root / "incoming").iterdir())  # before the journals: those are made first
        living = {path.name for path in journal.writers(self._root / "journal")}
        for directory in there:
            if directory.name not in living and directory.name != "filing":
                self._remove_directory(directory)

    def close(self) -> None:
        """Settle, and let go of the journals."""
        with contextlib.suppress(OSError, DicomscpError):  # what is not settled is filed at the next start
            self.settle(wait=True)
        self._syncer.shutdown()
        for reader in self._readers.values():
            reader.close()
        os.close(self._root_descriptor)

    def _look(self) -> list[JournalReader]:
        """The readers of all journals there are.

        What a journal holds unsettled when it is first looked at was perhaps filed in an earlier
        life, whose syncs may have failed or been cut short: it is filed anew.
        """
        there = journal.writers(self._root / "journal")
        new = [directory for directory in there if directory.name not in self._readers]
        if new or self._commit_doubtful:
            self._indexed |= self._index.positions()
            self._commit_doubtful = False
        for directory in new:
            reader = JournalReader(directory)
            self._readers[directory.name] = reader
            self._doubtful[directory.name] = reader.synced() if reader.alive() else _END
        readers = [self._readers[directory.name] for directory in there]
        for reader in readers:
            if reader.name not in self._synced and not reader.alive():
                self._sync_journal(reader)
        return readers

    def _sync_journal(self, reader: JournalReader) -> None:
        """Let what a writer that is gone has written survive loss of power, whether it came to that or not.

        It is applied as it is found, and the index may be one that forgets nothing.
        """
        for segment in reader.segments():
            descriptor = self._disk.open(segment, os.O_RDONLY)
            try:
                self._disk.sync(descriptor)
            finally:
                self._disk.close(descriptor)
        self._synced.add(reader.name)

    def _file(self, entry: Entry, batch: _Batch, *, doubtful: bool, counted: bool) -> None:
        """Give the instance of *entry* its name, unless it is the same as one held.

        *counted* says that the index knows of this very entry.
        """
        head = entry.head
        key = InstanceKey(str(head["study"]), str(head["series"]), str(head["sop"]))
        digest = bytes.fromhex(str(head["digest"]))
        slot = None if entry.kind == INLINE else self._root / str(head["slot"])
        self._unsettled = True
        if slot is not None:
            self._slots.append(slot)
        variants = batch.variants[key.sop_uid]
        same = next((held for held in variants if held.key == key and held.digest == digest), None)
        if same is not None and same.leaving is not None:
            if self._put_again(entry, slot, same.path):
                variants.remove(same)
                self._arrived(entry, key, digest, same.path, batch)
            return
        if same is not None:
            self._keep_whole(entry, slot, same, batch, doubtful=doubtful)
        same = same or next((held for held in variants if self._is_same(held, key, entry, slot)), None)
        if same is not None:
            if not counted:
                batch.again.append((key, same.digest))
            return
        path = self._place(entry, slot, key, digest, {held.path for held in variants}, doubtful=doubtful)
        if path is None:
            log.error(
                "instance_not_filed",
                sop_uid=key.sop_uid,
                reason="its slot is gone; it was refused, or taken away"
                if slot
                else "both its names are taken",
            )
            return
        self._arrived(entry, key, digest, path, batch)

    def _keep_whole(
        self, entry: Entry, slot: Path | None, same: Held, batch: _Batch, *, doubtful: bool
    ) -> None:
        """See to it that what is held of the *same* as came is whole on the disk.

        The file's receipt stays the one that the index has: only the entry that it was filed from may put
        it anew, or another one if it is gone or damaged; then the index takes over that one's receipt.
        """
        if self._store.digest_of(same.path) != same.digest:
            if self._put_again(entry, slot, same.path):
                log.warning("instance_repaired", sop_uid=same.key.sop_uid)
                batch.repaired.append(self._arrival(entry, same.key, same.digest, same.path))
        elif doubtful and same.received_at == entry.head["received_at"]:
            self._put_again(entry, slot, same.path)

    def _arrived(self, entry: Entry, key: InstanceKey, digest: bytes, path: str, batch: _Batch) -> None:
        """The instance of *entry* is filed as *path*: have it indexed."""
        arrival = self._arrival(entry, key, digest, path)
        batch.arrivals.append(arrival)
        variants = batch.variants[key.sop_uid]
        variants.append(
            Held(
                key, arrival.sop_class_uid, arrival.transfer_syntax_uid, path, digest,
                arrival.received_at, arrival.size,
            )
        )  # fmt: skip
        held_now = sum(one.leaving is None for one in variants)
        if held_now > 1:
            log.warning("variant_held", variants=held_now, study_uid=key.study_uid, sop_uid=key.sop_uid)

    def _place(
        self,
        entry: Entry,
        slot: Path | None,
        key: InstanceKey,
        digest: bytes,
        taken: set[str],
        *,
        doubtful: bool,
    ) -> str | None:
        """File under the first name that is free or stands for this instance; None if there are no bytes.

        Its own name comes first if it was filed under that before and not indexed: what had the other
        name then may be gone.
        """
        names = (layout.instance_path(key), layout.instance_path(key, digest))
        for path in names[::-1] if (self._root / names[1]).exists() else names:
            if path in taken:
                continue
            if self._put(entry, slot, path):
                return path
            intact = self._store.digest_of(path) == digest
            if intact and not doubtful:
                return path
            if intact or self._store.claims(path) in {None, digest}:
                return path if self._put_again(entry, slot, path) or intact else None
        return None

    def _put_again(self, entry: Entry, slot: Path | None, path: str) -> bool:
        """File in place of what an earlier life filed, which the disk may not have kept.

        A slot that is gone was settled before; then what stands stays.
        """
        if slot is None:
            self._store.replace(entry.body, path)
            return True
        if not slot.exists():
            return False
        self._store.replace_by_link(slot, path)
        return True

    def _put(self, entry: Entry, slot: Path | None, path: str) -> bool:
        if slot is None:
            return self._store.put(entry.body, path)
        try:
            return self._store.link(slot, path)
        except FileNotFoundError:
            return False

    def _arrival(self, entry: Entry, key: InstanceKey, digest: bytes, path: str) -> Arrival:
        head = entry.head
        offset, size = int(str(head["dataset_offset"])), int(str(head["size"]))
        syntax, charset = str(head["syntax"]), str(head["charset"])
        try:
            if entry.kind == INLINE:
                dataset = entry.body[offset:]
                header = self._compiler.header(
                    dataset, syntax, total_bytes=len(dataset), bulk_uri="", default_charset=charset,
                    wanted=self._index.model.index_tags,
                )  # fmt: skip
                attributes: Mapping[int, bytes] = header.fragments
            else:
                attributes = read_attributes(self._compiler, self._root / path, self._index.model.index_tags)
        except (RefusedError, DamagedError) as error:
            log.warning("header_unreadable", sop_uid=key.sop_uid, reason=str(error))
            attributes = bare_attributes(key, str(head["class"]))
        return Arrival(
            key, str(head["class"]), syntax, digest, int(str(head["received_at"])), str(head["calling_ae"]),
            path, size, attributes,
        )  # fmt: skip

    def _is_same(self, held: Held, key: InstanceKey, entry: Entry, slot: Path | None) -> bool:
        """Whether what came is what is held in another uncompressed encoding."""
        if held.key != key or held.leaving is not None:
            return False
        syntax = str(entry.head["syntax"])
        if not {syntax, held.transfer_syntax_uid} <= UNCOMPRESSED:
            return False
        offset = int(str(entry.head["dataset_offset"]))
        with contextlib.ExitStack() as stack:
            try:
                ours = stack.enter_context(_mapped(self._root / held.path))
                theirs = entry.body if slot is None else stack.enter_context(_mapped(slot))
                held_offset = part10.read_file_meta(ours[:_HEADER_BYTES]).dataset_offset
                return same_values(ours[held_offset:], held.transfer_syntax_uid, theirs[offset:], syntax)
            except (FileNotFoundError, DamagedError, RefusedError):
                return False

    def _finish(self, *, wait: bool) -> bool:
        """Let go of what a sync covered that has ended; False if it failed."""
        if self._settling is None:
            return True
        future, positions, slots = self._settling
        if not wait and not future.done():
            return True
        self._settling = None
        error = future.exception()
        if error is not None:
            self._file_again(error)
            return False
        for name, position in positions.items():
            reader = self._readers.get(name)
            if reader is not None:
                for segment in reader.mark_settled(position, self._disk):
                    self._recycle(segment, damaged=reader.is_damaged(segment))
        for slot in slots:
            self._disk.unlink(slot)
        if self.settled:
            self._forget_dead()
        return True

    def _file_again(self, error: BaseException) -> None:
        """A sync failed: what it did not cover is read and filed again from the journal.

        The index's own log may have lost pages too, so it is written out in full.
        """
        log.error("settle_failed", reason=str(error))
        self._sync_failed()
        self._slots = []  # filing again finds them again
        os.close(self._root_descriptor)
        self._root_descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._applied.clear()
        self._index_doubtful = True

    def _forget_dead(self) -> None:
        """Everything filed is settled: the journals of writers that are gone, read to their end, may go."""
        for reader in list(self._readers.values()):
            if not reader.alive() and not self._has_more(reader):
                self._forget(reader)

    def _has_more(self, reader: JournalReader, *, alive: bool = False) -> bool:
        """Whether an entry follows; if none does, the reader stands where one would."""
        position = reader.position
        more = bool(reader.read(alive=alive, limit_bytes=1))
        if more:
            reader.position = position
        return more

    def _forget(self, reader: JournalReader) -> None:
        """A writer is gone and all it wrote is settled: take its journal and its slots away."""
        self._index.forget_position(reader.name)  # first: it may be away, and then all is done again
        for segment in reader.segments():
            self._recycle(segment, damaged=reader.is_damaged(segment))
        self._synced.discard(reader.name)
        for known in (self._readers, self._applied, self._doubtful, self._indexed):
            known.pop(reader.name, None)
        reader.close()
        self._remove_directory(self._root / "incoming" / reader.name)
        self._remove_directory(reader.directory)

    def _recycle(self, segment: Path, *, damaged: bool) -> None:
        kept = self._root / "journal" / ("damaged" if damaged else "free")
        self._disk.make_directory(kept)
        whole = segment.stat().st_size == self._segment_bytes
        if damaged or (whole and sum(1 for _ in kept.iterdir()) < _FREE_SEGMENTS):
            self._disk.rename(segment, kept / f"{segment.parent.name}-{segment.name}")
        else:
            self._disk.unlink(segment)

    def _remove_directory(self, directory: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            for path in directory.iterdir():
                self._disk.unlink(path)
            directory.rmdir()


def read_attributes(compiler: Compiler, path: Path, wanted: frozenset[int]) -> Mapping[int, bytes]:
    """The *wanted* attributes of the held file at *path*, as DICOM JSON fragments."""
    return read_header(compiler, path, bulk_uri="", wanted=wanted).fragments


def read_header(
    compiler: Compiler, path: Path, *, bulk_uri: str, wanted: frozenset[int] | None = None
) -> Header:
    """The header of the held file at *path*.

    Reads its first 64 KiB, more only if the header is longer.  Raises DamagedError if it is not
    there, RefusedError if nothing of it can be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            data = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise DamagedError(f"a held instance is missing: {path.name}") from error
    meta = part10.read_file_meta(data)
    charset = meta.receipt.default_charset if meta.receipt else ""
    offset = meta.dataset_offset
    total = size - offset
    try:
        return compiler.header(
            memoryview(data)[offset:], meta.transfer_syntax_uid, total_bytes=total, bulk_uri=bulk_uri,
            default_charset=charset, wanted=wanted,
        )  # fmt: skip
    except PrefixError:
        with _mapped(path) as whole:
            return compiler.header(
                whole[offset:], meta.transfer_syntax_uid, total_bytes=total, bulk_uri=bulk_uri,
                default_charset=charset, wanted=wanted,
            )  # fmt: skip


def _named(head: Mapping[str, object]) -> list[Named]:
    """The variants that the head of a removal names."""
    rows = head["variants"]
    if not isinstance(rows, list):
        return []
    return [
        Named(InstanceKey(study_uid, series_uid, sop_uid), bytes.fromhex(digest), received_at, receipts)
        for study_uid, series_uid, sop_uid, digest, received_at, receipts in rows
    ]


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise DamagedError(f"a held instance is empty: {path.name}")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = memoryview(mapping)
    try:
        yield view
    finally:
        with contextlib.suppress(BufferError):  # a slice still looked at keeps the memory until it goes
            view.release()
            mapping.close()


def bare_attributes(key: InstanceKey, sop_class_uid: str) -> dict[int, bytes]:
    """The attributes that the identity alone gives, ascending."""
    values = {
        0x00080016: sop_class_uid,
        0x00080018: key.sop_uid,
        0x0020000D: key.study_uid,
        0x0020000E: key.series_uid,
    }
    return {
        tag: b'"%08X":%b' % (tag, orjson.dumps({"vr": "UI", "Value": [value]}))
        for tag, value in values.items()
    }


def arrival_of(compiler: Compiler, root: Path, path: str, wanted: frozenset[int]) -> Arrival:
    """What the index is told of the file held as *path* under *root*, from the file alone.

    If the *wanted* attributes are the same, it is what it was told when the instance came.  Raises
    DamagedError if the file is missing or carries no receipt of ours, RefusedError if it is not an instance
    that could have come.
    """
    file = root / path
    with file.open("rb", buffering=0) as opened:
        head, size = opened.read(_HEADER_BYTES), os.fstat(opened.fileno()).st_size
        tail = os.pread(opened.fileno(), 8, max(0, size - 8))
    meta = part10.read_file_meta(head)
    if meta.receipt is None:
        raise DamagedError(f"no receipt in {path}: it was not filed by this program")
    offset, syntax = meta.dataset_offset, meta.transfer_syntax_uid
    try:
        identity = read_identity(memoryview(head)[offset:], syntax, total_bytes=size - offset, tail=tail)
    except PrefixError:
        with _mapped(file) as whole:
            identity = read_identity(whole[offset:], syntax, total_bytes=size - offset)
    try:
        attributes = read_attributes(compiler, file, wanted)
    except RefusedError as error:
        log.warning("header_unreadable", sop_uid=identity.key.sop_uid, reason=str(error))
        attributes = bare_attributes(identity.key, identity.sop_class_uid)
    return Arrival(
        identity.key, identity.sop_class_uid, syntax, meta.receipt.digest, meta.receipt.received_at,
        meta.receipt.calling_ae, path, size, attributes,
    )  # fmt: skip
