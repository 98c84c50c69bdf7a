"""Pipeline: the one writer of the index and of the published tree.

Two threads.  One files: it follows the journals, gives instances their names, applies them to the
index and settles.  The other publishes what the schedule says is due.  Everything either does may
be done again after a crash: what is due is read from the index, where a study's changes are counted
and compared with what was last published.
"""

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import orjson
import structlog

from dicomscp.archive.disk import Disk
from dicomscp.archive.filing import Filing, Round, read_header
from dicomscp.archive.index import Held, Index
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.matching import Level, Query
from dicomscp.errors import BusyError, DamagedError, DicomscpError, RefusedError
from dicomscp.publish.directory import Directory
from dicomscp.study import layout
from dicomscp.study.compile import Document, Member, SeriesSummary, compile_series, compile_study, study_order
from dicomscp.study.schedule import Schedule
from dicomscp.telemetry.metrics import PipelineMetrics

log = structlog.get_logger()

_ROUND_SECONDS = 0.025
_LULL_SECONDS = 0.3
_SETTLE_SECONDS = 5.0
_RETRY_SECONDS, _RETRY_SECONDS_AT_MOST = 1.0, 60.0
_LOOK_SECONDS = 0.05
_FINISH_SECONDS = 0.1
_TELL_SECONDS = 2.0
_RECENT_STUDIES = 1000
_RECENT_SECONDS = 2.0
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Publisher:
    """Compiles studies and publishes them; one thread at a time."""

    def __init__(
        self,
        root: Path,
        index: Index,
        disk: Disk,
        folder: Path,
        *,
        base_url: str,
        inline_bytes: int,
        attempts: int,
    ) -> None:
        """Publish under *folder* what is held under *root*.

        Binary values up to *inline_bytes* stand in documents.  After *attempts* a study is set aside.
        """
        self._root, self._index, self._disk = root, index, disk
        self._base_url, self._attempts = base_url, attempts
        self._compiler = Compiler(inline_bytes=inline_bytes)
        self._directory = Directory(folder)
        disk.make_directory(root / "state" / "attempts")
        self._root_descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def publish(self, study_uid: str, changes: int) -> bool:
        """Publish the study as it is held now and record that *changes* of it are published.

        Returns False if it is set aside because compiling it failed, or ended the process, too often.
        Raises what went wrong otherwise; a disk that is full or fails for a while does not count.
        """
        attempt = self._root / layout.attempt_path(study_uid)
        failed = _attempts(attempt, changes)
        if failed >= self._attempts:
            return False
        self._record_attempt(attempt, study_uid, changes, failed + 1)
        try:
            revision, warnings, counts = self.write(study_uid)
            self._show_synced()
        except (BusyError, OSError) as error:
            if isinstance(error, BusyError) or error.errno in _PASSING:
                self._record_attempt(attempt, study_uid, changes, failed)  # not the study's fault
            raise
        self._write_state(study_uid, changes, revision, warnings, counts)
        self._disk.sync_all(self._root_descriptor)
        self._index.mark_published(study_uid, changes)
        self._disk.unlink(attempt)
        return True

    def show(self) -> None:
        """Let what was written be read."""
        self._directory.show()

    def clear(self) -> None:
        """Withdraw everything, and forget what failed."""
        self._directory.clear()
        for path in (self._root / "state" / "attempts").glob("*.json"):
            path.unlink()

    def publish_recent(self) -> None:
        """Publish the list of the newest studies."""
        query = Query(Level.STUDY, (), None, _RECENT_STUDIES)
        self._directory.forget()
        body = b",\n".join(orjson.dumps(study) for study in self._index.find(query))
        self._directory.write(layout.STUDIES_INDEX, [b"[", body, b"]"])
        self._show_synced()

    def set_aside(self) -> list[dict[str, object]]:
        """The studies that are not compiled any more until something of them arrives."""
        return [record for record in attempts(self._root) if _count(record) >= self._attempts]

    def _show_synced(self) -> None:
        """Let what was written be read, once not even a loss of power can show part of it."""
        self._disk.sync_all(self._root_descriptor)
        self._directory.show()

    def free_bytes(self) -> int:
        """What may still be written under the root."""
        return self._disk.free_bytes(self._root)

    def close(self) -> None:
        """Let go of the root."""
        os.close(self._root_descriptor)

    def write(self, study_uid: str) -> tuple[str, list[str], dict[str, int]]:
        """Write the study's documents beside their places; returns their revision, warnings and counts.

        The revision is SHA-256 over the documents, so equal studies have equal ones everywhere.
        What an earlier call wrote and nobody showed, because it failed, is forgotten.
        """
        self._directory.forget()
        held = self._index.held(study_uid)
        if not held:
            self._directory.withdraw(layout.study_directory(study_uid), layout.study_index(study_uid))
            return "", [], {"series": 0, "instances": 0}
        warnings: list[str] = []
        digests: list[bytes] = []
        summaries: list[SeriesSummary] = []
        by_series: dict[str, list[Held]] = {}
        for one in held:
            by_series.setdefault(one.key.series_uid, []).append(one)
        for series_uid, instances in by_series.items():
            members = list(self._members(instances, warnings))
            if members:
                summary, documents = compile_series(study_uid, series_uid, members, self._base_url)
                summaries.append(summary)
                digests += [self._put(document) for document in documents]
        summaries = study_order(summaries)
        series_index, study_index = compile_study(study_uid, summaries, self._base_url)
        digests.append(self._put(series_index))
        metadata = Document(layout.study_metadata(study_uid), self._study_metadata(study_uid, summaries))
        digests.append(self._put(metadata))
        digests.append(self._put(study_index))
        names = {layout.component(summary.series_uid) for summary in summaries}
        self._directory.keep_only(f"{layout.study_directory(study_uid)}/series", names)
        counts = {"series": len(summaries), "instances": sum(one.instances for one in summaries)}
        revision = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
        return revision, warnings, counts

    def _members(self, instances: list[Held], warnings: list[str]) -> Iterator[Member]:
        for one in instances:
            try:
                fragments, doubts = read_header(
                    self._compiler,
                    self._root / one.path,
                    bulk_uri=layout.bulk_uri(self._base_url, one.key),
                )
            except (DamagedError, RefusedError) as error:
                log.error("instance_not_published", sop_uid=one.key.sop_uid, reason=str(error))
                warnings.append(f"{one.key.sop_uid}: {error}")
                continue
            warnings.extend(f"{one.key.sop_uid}: {doubt}" for doubt in doubts)
            yield Member(one.key, fragments)

    def _put(self, document: Document) -> bytes:
        return self._directory.write(document.path, document.body)

    def _study_metadata(self, study_uid: str, summaries: list[SeriesSummary]) -> Iterator[bytes]:
        """The arrays of all series, read back one after another, as one array."""
        opening = b"["
        for summary in summaries:
            held_back = b""
            for piece in self._directory.read(layout.series_metadata(study_uid, summary.series_uid)):
                whole = held_back + piece
                if opening and whole:
                    whole = opening + whole[1:]
                    opening = b""
                yield whole[:-1]
                held_back = whole[-1:]
            opening = b",\n"
        yield b"]"

    def _record_attempt(self, path: Path, study_uid: str, changes: int, count: int) -> None:
        record = orjson.dumps({"study_uid": study_uid, "changes": changes, "attempts": count})
        descriptor = self._disk.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            self._disk.write(descriptor, [record], 0)
            self._disk.truncate(descriptor, len(record))
            self._disk.sync(descriptor)
        finally:
            self._disk.close(descriptor)
        if count == 1:
            self._disk.sync_directory(path.parent)

    def _write_state(
        self, study_uid: str, changes: int, revision: str, warnings: list[str], counts: dict[str, int]
    ) -> None:
        path = self._root / layout.state_path(study_uid)
        self._disk.make_directory(path.parent)
        state = {
            "study_uid": study_uid,
            "revision": revision,
            "changes": changes,
            **counts,
            "published_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "warnings": warnings[:100],
            "warnings_count": len(warnings),
        }
        making = path.with_name(f".{path.name}.new")
        making.write_bytes(orjson.dumps(state, option=orjson.OPT_INDENT_2))
        making.replace(path)


class Pipeline:
    """Runs filing and publishing until told to stop."""

    def __init__(
        self,
        root: Path,
        index: Index,
        filing: Filing,
        publisher: Publisher,
        *,
        quiet_seconds: float,
        patience_seconds: float,
        metrics: PipelineMetrics,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._index, self._filing, self._publisher = root, index, filing, publisher
        self._metrics, self._now = metrics, now
        self._schedule = Schedule(quiet_seconds=quiet_seconds, patience_seconds=patience_seconds)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._recent_changed, self._recent_at = True, now() - _RECENT_SECONDS
        self._asked = root / "run" / "asked"
        self._failed_until: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._told_at = 0.0

    def recover(self) -> int:
        """File and settle what was left by lives before this one; returns how many instances that were.

        Until this returns nothing may be answered: a name may stand for torn bytes.
        """
        filed = 0
        while (done := self._filing.step()).entries:
            filed += done.arrivals
            if self._filing.caught_up:  # living writers go on meanwhile
                break
            self._filing.settle()
        self._filing.settle(wait=True)
        self._filing.clear_incoming()
        now = self._now()
        with self._lock:
            for study_uid, changes in self._index.due():
                self._schedule.arrived(study_uid, changes, now)
        return filed

    def run(self, stop: threading.Event) -> None:
        """File and publish until *stop* is set, then settle."""
        publishing = threading.Thread(target=self._run_publishing, args=(stop,), name="publish")
        publishing.start()
        try:
            self._run_filing(stop)
        finally:
            stop.set()
            self._wake.set()
            publishing.join()
            self.close()

    def drain(self, progress: Callable[[int, int], None]) -> int:
        """File what is journalled, publish everything that is due now; returns how many studies failed.

        Removals are finished, but for those in studies that failed.
        """
        self.recover()
        failed = 0
        waiting = list(self._index.due())
        for done, (study_uid, changes) in enumerate(waiting):
            progress(done, len(waiting))
            failed += not self._publish(study_uid, changes)
        if waiting:
            self._publisher.publish_recent()
        progress(len(waiting), len(waiting))
        self._take_away()
        return failed

    def finish_removals(self) -> None:
        """Publish the studies that something is leaving, and take away what no document names then."""
        self._take_away()
        for study_uid, changes in self._index.changes(self._index.leaving_studies()).items():
            self._publish(study_uid, changes)
        self._take_away()

    def _take_away(self) -> None:
        """Take away all files of what left and no document names, and settle."""
        while self._index.left(1):
            self._filing.finish_removals()
        self._filing.settle(wait=True)

    def republish(self, progress: Callable[[int, int], None]) -> int:
        """Publish every study anew; returns how many were published."""
        self._publisher.clear()
        self._index.mark_unpublished()
        waiting = list(self._index.due())
        published = 0
        for done, (study_uid, changes) in enumerate(waiting):
            progress(done, len(waiting))
            published += self._publish(study_uid, changes)
        self._publisher.publish_recent()
        progress(len(waiting), len(waiting))
        return published

    def close(self) -> None:
        """Let go of journals and root; nothing may be called after."""
        self._filing.close()
        self._publisher.close()

    def _run_filing(self, stop: threading.Event) -> None:
        """File in rounds, and settle in the lulls between arrivals.

        A round costs some, whatever it files: pausing between rounds makes them larger.  A settle
        makes receivers wait for the disk, so while they are busy it waits too, but not for long.
        """
        settled = busy = finished = self._now()
        while not stop.is_set():
            try:
                done = self._filing.step()
                self._note(done)
                now = self._now()
                busy = now if done.entries else busy
                if now - busy > _LULL_SECONDS or now - settled > _SETTLE_SECONDS or self._filing.is_full:
                    self._filing.settle()
                    settled = now
                if now - finished > _FINISH_SECONDS:
                    finished = now
                    self._hurry(self._filing.finish_removals())
            except (OSError, DicomscpError) as error:
                log.error("filing_failed", reason=str(error))
                stop.wait(_RETRY_SECONDS)
                continue
            if not done.more:
                stop.wait(_ROUND_SECONDS)

    def _note(self, done: Round) -> None:
        if done.changed:
            now = self._now()
            with self._lock:
                for study_uid, changes in done.changed.items():
                    self._schedule.arrived(study_uid, changes, now)
        self._hurry([*self._take_asked(), *(done.changed if done.removals else ())])
        if done.entries:
            self._metrics.applied(done.entries)

    def _hurry(self, study_uids: Collection[str]) -> None:
        """Somebody waits for these studies, or something is leaving them: if they wait, they are due now."""
        with self._lock:
            for study_uid in study_uids:
                self._schedule.asked(study_uid)
        if study_uids:
            self._wake.set()

    def _take_asked(self) -> list[str]:
        """Studies that somebody waits for, named by files that the web puts there."""
        asked = []
        with contextlib.suppress(FileNotFoundError):
            for path in self._asked.iterdir():
                if not path.name.startswith("."):
                    asked.append(path.read_text())
                    path.unlink()
        return asked

    def _run_publishing(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                busy = self._publish_round(stop)
            except Exception:  # one round is one unit of work; the next begins anew
                log.exception("publishing_failed")
                stop.wait(_RETRY_SECONDS)
                continue
            if not busy:
                self._wake.wait(_LOOK_SECONDS)
                self._wake.clear()
        if self._recent_changed:
            self._publisher.publish_recent()

    def _publish_round(self, stop: threading.Event) -> bool:
        """Publish what is due now; returns whether anything was."""
        with self._lock:
            due = [(uid, self._schedule.seq(uid)) for uid in self._schedule.due(self._now())]
            waiting = len(self._schedule)
        for study_uid, changes in due:
            if stop.is_set():
                break
            self._publish_due(study_uid, changes)
        if self._recent_changed and self._now() - self._recent_at > _RECENT_SECONDS:
            self._publisher.publish_recent()
            self._recent_changed, self._recent_at = False, self._now()
        if self._now() > self._told_at + _TELL_SECONDS:
            self._told_at = self._now()
            self._metrics.now(
                lag_bytes=self._filing.lag_bytes(),
                due=waiting,
                set_aside=len(self._publisher.set_aside()),
                disk_free_bytes=self._publisher.free_bytes(),
            )
        return bool(due)

    def _publish_due(self, study_uid: str, changes: int) -> None:
        if self._failed_until.get(study_uid, 0.0) > self._now():
            self._wake.wait(_LOOK_SECONDS)
            return
        began = self._now()
        if self._publish(study_uid, changes):
            self._failed_until.pop(study_uid, None)
            self._failures.pop(study_uid, None)
            with self._lock:
                self._schedule.published(study_uid, changes, seconds=self._now() - began, now=self._now())
            self._recent_changed = True
            self._metrics.published(self._now() - began)

    def _publish(self, study_uid: str, changes: int) -> bool:
        """Publish one study; a failure is recorded and costs no other study anything."""
        began = self._now()
        try:
            if self._publisher.publish(study_uid, changes):
                log.info("study_published", study_uid=study_uid, seconds=round(self._now() - began, 3))
                return True
            log.error("study_set_aside", study_uid=study_uid)
            with self._lock:
                self._schedule.published(study_uid, changes)
        except Exception:  # one study is one unit of work; it is tried again, and counted
            log.exception("study_not_published", study_uid=study_uid)
            self._metrics.failed()
            failures = self._failures[study_uid] = self._failures.get(study_uid, 0) + 1
            pause = min(_RETRY_SECONDS * 2**failures, _RETRY_SECONDS_AT_MOST)
            self._failed_until[study_uid] = self._now() + pause
        return False


def attempts(root: Path) -> list[dict[str, object]]:
    """The compiles that were begun and not ended."""
    folder = root / "state" / "attempts"
    return [_read(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def _attempts(path: Path, changes: int) -> int:
    """How often compiling this very state of the study failed."""
    record = _read(path)
    return _count(record) if record.get("changes") == changes else 0


def _count(record: dict[str, object]) -> int:
    count = record.get("attempts")
    return count if isinstance(count, int) else 0


def _read(path: Path) -> dict[str, object]:
    try:
        record = orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}
