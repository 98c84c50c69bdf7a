"""Pipeline: the one writer of the index and of the published tree.

Two threads.  One files: it follows the journals, gives instances their names, applies them to the
index and settles.  The other publishes what the schedule says is due.  Everything either does may
be done again after a crash: what is due is read from the index, where a study's changes are counted
and compared with what was last published.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import structlog

from dicomscp.archive.filing import Filing, Round
from dicomscp.archive.index import Index
from dicomscp.errors import BusyError, DicomscpError
from dicomscp.publisher import Outcome, Publisher, publish_all
from dicomscp.study.schedule import Schedule
from dicomscp.telemetry.metrics import PipelineMetrics

log = structlog.get_logger()

_ROUND_SECONDS = 0.025
_LULL_SECONDS = 0.3
_SETTLE_SECONDS = 5.0
_RETRY_SECONDS, _RETRY_SECONDS_AT_MOST = 1.0, 60.0
_AWAY_SECONDS = 10.0  # between two tries while disk or index fail, at most
_DOUBLINGS = 10  # of a pause, which is longer than any by then; failures go on for days, and a float ends
_LOOK_SECONDS = 0.05
_FINISH_SECONDS = 0.1
_TELL_SECONDS = 2.0
_RECENT_SECONDS = 2.0
_FEW_INSTANCES = 1000  # take less than it takes to start processes
_BATCH = 16  # studies published together; what becomes due meanwhile waits for them


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
        make: Callable[[], Publisher],
        workers: int = 1,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """*make* makes what each of the *workers* publishes with that drain and republish start."""
        self._root, self._index, self._filing, self._publisher = root, index, filing, publisher
        self._metrics, self._make, self._workers, self._now = metrics, make, workers, now
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
        self._publisher.adopt()
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

    def file(self) -> Round:
        """File what is journalled now, one round of it, and go on settling when there is much.

        For whoever files while others still take in.  Raises OSError or our own errors if that cannot
        be done; then nothing of the round counts as done.
        """
        done = self._filing.step()
        if self._filing.is_full:
            self._filing.settle()
        return done

    def lag_bytes(self) -> int:
        """About how much is journalled and not yet filed; may be asked by another thread."""
        return self._filing.lag_bytes()

    def drain(self, progress: Callable[[int, int], None]) -> int:
        """File what is journalled, publish everything that is due now; returns how many studies failed.

        Studies are compiled by as many processes as there are *workers*.  Removals are finished, but for
        those in studies that failed.
        """
        self.recover()
        published, waiting = self._publish_due_now(progress)
        self._take_away()
        return waiting - published

    def finish_removals(self) -> None:
        """Publish the studies that something is leaving, and take away what no document names then."""
        self._take_away()
        self._publisher.publish(self._index.leaving_studies())
        self._take_away()

    def _take_away(self) -> None:
        """Take away all files of what left and no document names, and settle."""
        while self._index.left(1):
            self._filing.finish_removals()
        self._filing.settle(wait=True)

    def republish(self, progress: Callable[[int, int], None]) -> tuple[int, int]:
        """Publish every study anew, as `drain` does; returns how many were published, and how many not."""
        self._publisher.begin_anew()
        published, waiting = self._publish_due_now(progress)
        return published, waiting - published

    def _publish_due_now(self, progress: Callable[[int, int], None]) -> tuple[int, int]:
        """How many of how many studies were published."""
        waiting = [study_uid for study_uid, _ in self._index.due()]
        published = 0
        progress(0, len(waiting))
        workers = self._workers if self._index.due_instances() > _FEW_INSTANCES and len(waiting) > 1 else 1
        outcomes = publish_all(self._publisher, waiting, make=self._make, workers=workers)
        with contextlib.closing(outcomes):  # what *progress* raises ends it
            for done, outcome in enumerate(outcomes, 1):
                published += outcome.published
                progress(done, len(waiting))
        if waiting:
            self._publisher.publish_recent()
        return published, len(waiting)

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
        failures = 0
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
                stop.wait(_pause(failures, _AWAY_SECONDS))
                failures += 1
                continue
            failures = 0
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
                    asked.append(path.read_text(errors="replace"))
                    path.unlink()
        return asked

    def _run_publishing(self, stop: threading.Event) -> None:
        failures = 0
        while not stop.is_set():
            try:
                busy = self._publish_round()
            except (OSError, BusyError) as error:
                log.error("publishing_failed", reason=str(error))
                stop.wait(_pause(failures, _AWAY_SECONDS))
                failures += 1
                continue
            except Exception:  # one round is one unit of work; the next begins anew
                log.exception("publishing_failed")
                stop.wait(_RETRY_SECONDS)
                continue
            failures = 0
            if not busy:
                self._wake.wait(_LOOK_SECONDS)
                self._wake.clear()
        if self._recent_changed:
            try:
                self._publisher.publish_recent()
            except (OSError, DicomscpError) as error:  # the next start publishes it
                log.error("recent_studies_not_published", reason=str(error))

    def _publish_round(self) -> bool:
        """Publish what is due now; returns whether anything was."""
        now = self._now()
        with self._lock:
            due = [uid for uid in self._schedule.due(now) if self._failed_until.get(uid, 0.0) <= now]
            waiting = len(self._schedule)
        for outcome in self._publisher.publish(due[:_BATCH]):
            self._publish_ended(outcome)
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

    def _publish_ended(self, outcome: Outcome) -> None:
        """Note what became of a study: published or set aside it waits no more, else it is tried later."""
        study_uid = outcome.study_uid
        if not (outcome.published or outcome.set_aside):
            self._metrics.failed()
            failures = self._failures[study_uid] = self._failures.get(study_uid, 0) + 1
            self._failed_until[study_uid] = self._now() + _pause(failures, _RETRY_SECONDS_AT_MOST)
            return
        self._failed_until.pop(study_uid, None)
        self._failures.pop(study_uid, None)
        with self._lock:
            self._schedule.published(study_uid, outcome.changes, seconds=outcome.seconds, now=self._now())
        if outcome.published:
            log.info("study_published", study_uid=study_uid, seconds=round(outcome.seconds, 3))
            self._metrics.published(outcome.seconds)
            self._recent_changed = True


def _pause(failures: int, most: float) -> float:
    """How long to wait, *most* seconds at most, after a failure that so many came before without success."""
    return min(_RETRY_SECONDS * 2.0 ** min(failures, _DOUBLINGS), most)
