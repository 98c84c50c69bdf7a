"""Archive: the one door by which an instance comes into custody, and the questions asked of what is held.

`admit` returns once the instance's bytes and its journal entry are on stable storage, in this order:
the slot's bytes (if it was too large for the entry), then the entry.  Giving it its name and putting
it into the index follow from the journal, in another process (`filing`).  So does removing: `remove`
returns once the removal is journalled.
"""

import contextlib
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import structlog

from dicomscp.archive.index import Feed, Held, Index
from dicomscp.archive.journal import INLINE, REMOVE, REMOVER, SLOT, JournalWriter, Ticket, Word, writer_names
from dicomscp.archive.store import Slots, Spool, Stages
from dicomscp.dicom import part10
from dicomscp.dicom.elements import is_deflated
from dicomscp.dicom.identity import Identity, InstanceKey, PrefixError, is_filable, read_identity
from dicomscp.dicom.matching import STUDY_UID, Key, Level, Model, Query, UIDList
from dicomscp.disk import Disk, read_at_once
from dicomscp.errors import (
    BusyError,
    CrowdedError,
    DamagedError,
    DicomscpError,
    MismatchError,
    RefusedError,
    RemovedError,
)
from dicomscp.study import layout

log = structlog.get_logger()

_SPACE_LOOK_SECONDS = 0.2
_SEEN_SOP_UIDS = 100_000
_REMOVED_AT_ONCE = 1000  # variants in one entry: about 200 KB, and one short transaction
_REMOVER_SEGMENT_BYTES = 1 << 20
_GLANCE_BYTES = 32 << 10  # most headers; to walk them takes 10 ms at the very worst
_INFLATING = 2  # deflated datasets at a time: each may take 16 MiB to be recognised


class Claim(NamedTuple):
    """What a sender says it sends; it need not say of which study."""

    sop_class_uid: str
    sop_uid: str
    transfer_syntax_uid: str
    study_uid: str = ""


class Source(NamedTuple):
    """Where an instance comes from; *default_charset* is for datasets that declare none."""

    origin: part10.Origin
    calling_ae: str
    called_ae: str
    default_charset: str = ""


class Incoming:
    """One dataset on its way in, with what its sender claims of it."""

    def __init__(self, claim: Claim, source: Source, spool: Spool) -> None:
        self.claim, self.source, self._spool = claim, source, spool

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the dataset.  Raises BusyError if the disk does not take them."""
        self._spool.write(data)

    def discard(self) -> None:
        """Keep nothing; harmless after all else."""
        self._spool.discard()


class Intake:
    """What a process needs to take instances in: a journal of its own, slots, limits."""

    def __init__(
        self,
        root: Path,
        role: str,
        disk: Disk,
        *,
        relaxed: bool,
        reserve_bytes: int,
        max_variants: int,
        inline_bytes: int,
        segment_bytes: int,
        sync_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """*relaxed* answers Success for what is written, not synced: loss of power may lose it."""
        self.root, self.disk, self.relaxed = root, disk, relaxed
        self.reserve_bytes, self.max_variants, self.inline_bytes = reserve_bytes, max_variants, inline_bytes
        for name in ("journal", "incoming"):
            disk.make_directory(root / name)
        disk.sync_directory(root)
        self.journal = JournalWriter(
            root / "journal",
            role,
            disk,
            segment_bytes=segment_bytes,
            relaxed=relaxed,
            sync_failed=sync_failed,
        )
        self.slots = Slots(root / "incoming" / self.journal.name, disk)
        self.stages = Stages()
        self._looked = -1.0
        self._free = 0

    def check_space(self) -> None:
        """Raise BusyError if less than the reserve is free."""
        now = time.monotonic()
        if now - self._looked > _SPACE_LOOK_SECONDS:
            self._free = self.disk.free_bytes(self.root)
            self._looked = now
        if self._free < self.reserve_bytes:
            raise BusyError("Disk below its reserve; resend later")

    def close(self) -> None:
        """Sync and end the journal, take unused slots away."""
        self.journal.close()
        self.slots.close()


class Removable(NamedTuple):
    """Variants as they were when the index of the name *asked* was asked for them."""

    asked: str
    variants: list[Held]


class _Unsynced(threading.local):
    """What a thread has admitted without sync: what others sync says nothing of it."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []


class Glance:
    """A held file as far as the page cache has it, for who cannot wait for the disk.  Use it with `with`."""

    def __init__(self, file: FileIO, dataset_offset: int, dataset_bytes: int, prefix: memoryview) -> None:
        """*prefix* has the first bytes of the dataset, which has *dataset_bytes* in all."""
        self._file, self._offset = file, dataset_offset
        self.dataset_bytes, self.prefix = dataset_bytes, prefix

    def read(self, start: int, stop: int) -> bytearray | None:
        """The bytes of the dataset from *start* to *stop*; None if they are not there, or too many."""
        return read_at_once(self._file.fileno(), stop - start, self._offset + start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Archive:
    """All instances held under one root; safe to share between threads."""

    def __init__(
        self,
        root: Path,
        index: Index,
        *,
        intake: Intake | None = None,
        wait_seconds: float = 5.0,
        now: Callable[[], int] = time.time_ns,
    ) -> None:
        """Without *intake* nothing can be received.

        A question waits at most *wait_seconds* until what was synced when it came is in the index.  *now* is
        in nanoseconds since 1970.
        """
        self._root, self._index, self._intake = root, index, intake
        self._journals, self._rebuilding = root / "journal", rebuild_marker(root)
        self._wait_seconds, self._now = wait_seconds, now
        self._inflating = threading.Semaphore(_INFLATING)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._words: dict[str, tuple[Word, Word]] = {}
        self._unsynced = _Unsynced()

    @property
    def model(self) -> Model:
        """The attributes that can be asked for.  Raises BusyError if the index cannot be read now."""
        return self._index.askable()

    def check_space(self) -> None:
        """Raise BusyError while the disk is below its reserve."""
        self._taking().check_space()

    def receive(self, claim: Claim, source: Source) -> Incoming:
        """Begin to receive a dataset: write to what is returned, then `admit` it.

        Raises BusyError while the disk is below its reserve, RefusedError for a UID that cannot be filed.
        """
        intake = self._taking()
        for uid in (claim.sop_class_uid, claim.sop_uid):
            if not is_filable(uid):
                raise RefusedError(f"UID cannot be filed: {uid[:64]!r}")
        intake.check_space()

        def placeholder() -> bytes:
            return _meta(claim, source, 0, bytes(32))

        spool = Spool(
            meta=placeholder,
            inline_bytes=intake.inline_bytes,
            slots=intake.slots,
            stages=intake.stages,
            disk=intake.disk,
            check_space=intake.check_space,
        )
        return Incoming(claim, source, spool)

    def admit(self, incoming: Incoming, *, sync: bool = True) -> Identity:
        """Take custody: once this returns, the instance survives loss of power and Success may be said.

        Without *sync* that holds only once the same thread's `sync` has returned, which it may call for many.
        On any error nothing is kept.  Raises RefusedError if the dataset cannot be read or is cut
        short, MismatchError if it is not what was claimed, CrowdedError if too many variants of it are
        held, BusyError if the disk does not take it.
        """
        spool = incoming._spool  # noqa: SLF001 - what is incoming is the archive's own
        try:
            identity = self._identify(spool, incoming.claim)
            self._check_variants(identity.key, spool)
            self._journal(spool, incoming, identity, sync=sync)
        except BaseException:
            spool.discard()
            raise
        spool.release()
        return identity

    def sync(self) -> None:
        """Return once what this thread admitted without sync survives loss of power.

        Raises BusyError if that cannot be said of all of it.
        """
        tickets, self._unsynced.tickets = self._unsynced.tickets, []
        for ticket in tickets:
            self._taking().journal.sync(ticket)

    def find(self, query: Query, goes_on: Callable[[], bool] = lambda: True) -> Iterator[dict[str, Any]]:
        """The matches of *query*, each a DICOM JSON object, in a stable order.

        *goes_on* is asked now and then, however long nothing matches; if it says no, nothing more comes.

        Everything acknowledged before the call is seen, unless the pipeline lags beyond the wait.
        Raises BusyError while the index is being rebuilt: it would say no to what is held.
        """
        self._check_index()
        self.wait_until_applied()
        return self._index.find(query, goes_on)

    def count(self, query: Query, bound: int, goes_on: Callable[[], bool] = lambda: True) -> int:
        """How many objects match *query*, whatever its limit and offset; never more than *bound*.

        Of what is seen, and raises, as `find`; 0 if it was not to go on.
        """
        self._check_index()
        self.wait_until_applied()
        return self._index.count(query, bound, goes_on)

    def newest(self, limit: int) -> list[dict[str, Any]]:
        """The studies that changed last, at most *limit*, the latest first, as `find` gives them.

        As they are in the index now: nothing is waited for.  Raises BusyError while it is being rebuilt.
        """
        self._check_index()
        uids = self._index.newest(limit)
        if not uids:
            return []
        query = Query(Level.STUDY, (Key(STUDY_UID, "UI", UIDList(tuple(uids))),), returns=None, limit=limit)
        place = {uid: number for number, uid in enumerate(uids)}
        return sorted(self._index.find(query), key=lambda found: place[found[f"{STUDY_UID:08X}"]["Value"][0]])

    def feed(self, since: str, limit: int) -> Feed:
        """The studies published behind the token *since*, at most *limit*; from the first if it is "".

        Raises RefusedError for what is no token, BusyError while the index is being rebuilt.
        """
        self._check_index()
        return self._index.feed(since, limit)

    def held(
        self,
        study_uid: str,
        series_uid: str | None = None,
        sop_uid: str | None = None,
        *,
        limit: int | None = None,
    ) -> list[Held]:
        """The published variant of each instance there, in published order, at most *limit*.

        Before it says that there is none, everything acknowledged before the call is waited for.  An
        instance that is being removed is listed nowhere, but found by all of its UIDs until its file goes:
        documents may still name it.  Then it is *leaving*, and it is not in custody any more.
        """
        found = self._index.held(study_uid, series_uid, sop_uid, limit=limit)
        if not found:
            self._check_index()
        if not found and self.wait_until_applied():
            found = self._index.held(study_uid, series_uid, sop_uid, limit=limit)
        if not found and series_uid is not None and sop_uid is not None:
            found = self._index.leaving_of(InstanceKey(study_uid, series_uid, sop_uid))[:1]
        return found

    def middles(self, study_uid: str, series_uid: str | None = None, *, each: int) -> Iterator[Held]:
        """Instances that show what a study or series is of: those nearest to the middle of a series.

        One series after the other in published order, of each at most *each*, the nearest first.  Each is
        read when it is come to; waits as `held` does before there is none.
        """
        found = False
        for held in self._index.middles(study_uid, series_uid, each):
            found = True
            yield held
        if not found:
            self._check_index()
            if self.wait_until_applied():
                yield from self._index.middles(study_uid, series_uid, each)

    def removable(
        self, study_uid: str, series_uid: str | None = None, sop_uid: str | None = None
    ) -> Removable:
        """Every variant held there, published or not, for `remove`.

        Raises BusyError if not everything acknowledged before the call is in the index in time.
        """
        self._check_index()
        if not self.wait_until_applied():
            raise BusyError("The index lags behind what is received; ask again later")
        asked = self._index.name()  # first: if the index is made anew in between, nothing fits
        return Removable(asked, self._index.variants(study_uid, series_uid, sop_uid))

    def remove(self, removable: Removable, disk: Disk) -> None:
        """Have what is *removable* removed: once this returns, that survives loss of power.

        From documents first, then from the disk, by whoever files.  What is received again after it was
        asked for stays, even if it is the same.  Raises BusyError if the disk does not take it; then some
        of it may be removed all the same.
        """
        variants = removable.variants
        try:
            journal = JournalWriter(
                self._root / "journal", REMOVER, disk, segment_bytes=_REMOVER_SEGMENT_BYTES, relaxed=False
            )
        except OSError as error:
            raise BusyError(f"the removal cannot be journalled: {error.strerror}") from error
        try:
            for start in range(0, len(variants), _REMOVED_AT_ONCE):
                head = _removal_head(variants[start : start + _REMOVED_AT_ONCE], removable.asked)
                journal.sync(journal.append(REMOVE, head, ()))
        finally:
            journal.close()

    def open(self, held: Held) -> "OpenInstance":
        """The instance's file, to be closed by the caller.

        Raises DamagedError if it is not there or is not what was filed, RemovedError if it has been removed
        since *held* was told.
        """
        path = self._root / held.path
        try:
            return OpenInstance(path)
        except DamagedError as error:
            if path.exists() or self._is_held(held):
                raise
            raise _removed(path) from error

    def _is_held(self, held: Held) -> bool:
        there = self._index.known([held.key.sop_uid]).get(held.key.sop_uid, [])
        return any(one.path == held.path for one in there)

    def glance(self, held: Held) -> Glance | None:
        """The instance's file if its beginning is in the page cache, to be closed by the caller; never waits.

        None also if what is there is not *held*, of which an earlier question may have told.
        """
        try:
            file = FileIO(self._root / held.path)
        except OSError:
            return None
        begun = read_at_once(file.fileno(), min(held.size, _GLANCE_BYTES))
        if begun:
            with contextlib.suppress(RefusedError):
                meta = part10.read_file_meta(begun)
                if meta.receipt and meta.receipt.digest == held.digest:
                    offset = meta.dataset_offset
                    return Glance(file, offset, held.size - offset, memoryview(begun)[offset:])
        file.close()
        return None

    def wait_until_applied(self) -> bool:
        """Return once everything synced before the call is in the index; False if that took too long."""
        deadline = time.monotonic() + self._wait_seconds
        waiting = [(applied, synced.load()) for synced, applied in self._journal_words()]
        while waiting := [(applied, target) for applied, target in waiting if applied.load() < target]:
            if time.monotonic() > deadline:
                log.warning("index_lags", writers=len(waiting))
                return False
            time.sleep(0.002)
        return True

    def close(self) -> None:
        """End this process's journal."""
        if self._intake:
            self._intake.close()

    def _check_index(self) -> None:
        if self._rebuilding.exists():
            raise BusyError("The index is being rebuilt; ask again later")

    def _taking(self) -> Intake:
        if self._intake is None:
            raise BusyError("This part of the gateway does not receive")
        return self._intake

    def _identify(self, spool: Spool, claim: Claim) -> Identity:
        if is_deflated(claim.transfer_syntax_uid):
            with self._inflating:
                return self._read_identity(spool, claim)
        return self._read_identity(spool, claim)

    def _read_identity(self, spool: Spool, claim: Claim) -> Identity:
        try:
            identity = read_identity(
                spool.prefix(), claim.transfer_syntax_uid, total_bytes=spool.size, tail=spool.tail
            )
        except PrefixError:
            with spool.whole() as dataset:
                identity = read_identity(dataset, claim.transfer_syntax_uid, total_bytes=spool.size)
        if identity.key.sop_uid != claim.sop_uid:
            raise MismatchError("SOP Instance UID of dataset and request differ")
        if identity.sop_class_uid != claim.sop_class_uid:
            raise MismatchError("SOP Class UID of dataset and request differ")
        if claim.study_uid not in ("", identity.key.study_uid):
            raise MismatchError("Study Instance UID of dataset and request differ")
        return identity

    def _check_variants(self, key: InstanceKey, spool: Spool) -> None:
        """Bound the variants of one SOP Instance UID; what is held already is never too many.

        A UID that this process has not seen lately and that has no file where it belongs is new: the
        index is not asked.  So a process may pass the bound by one for each time it forgets.  Nor does the
        bound hold while the index cannot be asked: custody comes first.
        """
        sop_uid = key.sop_uid
        if sop_uid not in self._seen and not (self._root / layout.instance_path(key)).exists():
            self._seen[sop_uid] = None
            if len(self._seen) > _SEEN_SOP_UIDS:
                self._seen.popitem(last=False)
            return
        self._seen[sop_uid] = None
        try:
            known = self._index.known([sop_uid])
        except DicomscpError as error:
            log.warning("variants_not_counted", sop_uid=sop_uid, reason=str(error))
            return
        digests = {held.digest for held in known.get(sop_uid, ())}
        if len(digests) >= self._taking().max_variants and spool.digest() not in digests:
            raise CrowdedError("Too many variants held of this SOP Instance")

    def _journal(self, spool: Spool, incoming: Incoming, identity: Identity, *, sync: bool) -> None:
        intake, source, claim = self._taking(), incoming.source, incoming.claim
        received_at = self._now() // 1000
        digest = spool.digest()
        meta = _meta(claim, source, received_at, digest)
        head: dict[str, object] = {
            "study": identity.key.study_uid,
            "series": identity.key.series_uid,
            "sop": identity.key.sop_uid,
            "class": identity.sop_class_uid,
            "syntax": claim.transfer_syntax_uid,
            "digest": digest.hex(),
            "received_at": received_at,
            "calling_ae": source.calling_ae,
            "charset": source.default_charset,
            "dataset_offset": len(meta),
            "size": len(meta) + spool.size,
        }
        if spool.slot is None:
            ticket = intake.journal.append(INLINE, head, (meta, spool.prefix()))
        else:
            spool.sync(meta, relaxed=intake.relaxed)
            head["slot"] = str(spool.slot.relative_to(self._root))
            ticket = intake.journal.append(SLOT, head, ())
        if sync:
            intake.journal.sync(ticket)
        else:
            self._unsynced.tickets.append(ticket)

    def _journal_words(self) -> list[tuple[Word, Word]]:
        there = writer_names(self._journals)
        for name in self._words.keys() - set(there):
            self._words.pop(name, None)
        for name in there:
            if name not in self._words:
                directory = self._journals / name
                with contextlib.suppress(FileNotFoundError):  # drained and gone meanwhile
                    self._words[name] = (
                        Word(directory / "synced"),
                        Word(directory / "applied"),
                    )
        return list(self._words.values())


def rebuild_marker(root: Path) -> Path:
    """The file that is there while the index is not whole."""
    return root / "state" / "index-rebuilding"


class OpenInstance:
    """A held file, mapped: bytes are read from disk as they are looked at.  Use it with `with`."""

    def __init__(self, path: Path) -> None:
        """Raises DamagedError if the file is missing or is not the Part 10 file that was filed."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DamagedError(f"a held instance cannot be read: {path.name}") from error
        self._view = memoryview(self._map)
        try:
            meta = part10.read_file_meta(self._view[: 1 << 16])
        except RefusedError as error:
            self.close()
            raise DamagedError(f"a held instance is not as it was filed: {path.name}") from error
        self.transfer_syntax_uid = meta.transfer_syntax_uid
        self.dataset_offset = meta.dataset_offset
        self.default_charset = meta.receipt.default_charset if meta.receipt else ""
        self.dataset = self._view[meta.dataset_offset :]

    def reopened(self) -> BinaryIO:
        """The file itself, to be closed by the caller.  Raises RemovedError if it has been removed since."""
        try:
            return self.path.open("rb")
        except FileNotFoundError as error:
            raise _removed(self.path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; bytes of it that somebody still looks at stay until they are let go."""
        with contextlib.suppress(BufferError):
            if hasattr(self, "dataset"):
                self.dataset.release()
            self._view.release()
            self._map.close()


def _removed(path: Path) -> RemovedError:
    return RemovedError(f"This instance has been removed meanwhile: {path.stem}")


def _meta(claim: Claim, source: Source, received_at: int, digest: bytes) -> bytes:
    receipt = part10.Receipt(
        received_at, source.origin, source.calling_ae, source.called_ae, digest, source.default_charset
    )
    return part10.file_meta(claim.sop_class_uid, claim.sop_uid, claim.transfer_syntax_uid, receipt)


def _removal_head(variants: Sequence[Held], asked: str) -> dict[str, object]:
    named = [[*one.key, one.digest.hex(), one.received_at, one.receipts] for one in variants]
    return {"study": variants[0].key.study_uid, "index": asked, "variants": named}
