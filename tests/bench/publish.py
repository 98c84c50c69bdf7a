"""Publish: what it costs to bring documents up to date, as a series arrives and at its end.

All in one process and by the gateway's own parts: instances come in by the archive's door, are filed and
indexed, and published as the schedule says.  A live series is played on a clock of its own, at the pace of a
scanner; what is compared is the processor time that publishing took, in all, beside one publish at the end.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dicomscp.archive import sqlite
from dicomscp.archive.archive import Archive, Claim, Intake, Source
from dicomscp.archive.filing import Filing
from dicomscp.archive.index import Index
from dicomscp.dicom.part10 import Origin
from dicomscp.disk import Disk
from dicomscp.publisher import Documents, Outcome, Publisher
from dicomscp.study.schedule import Schedule
from tests.bench.instances import (
    CT_IMAGE_STORAGE,
    EXPLICIT_VR_LITTLE_ENDIAN,
    SIZES,
    Template,
    new_study_uid,
    sop_uid,
)
from tests.bench.report import Report, Target, number

_SOURCE = Source(Origin.C_STORE, "BENCH", "DICOMSCP")
_SIZE = SIZES["15 KB"]
_QUIET_SECONDS, _PATIENCE_SECONDS = 2.0, 30.0  # as they are by default
_LIVE_SECONDS = 600.0
_BATCH = 500
_ONE_MORE_SECONDS = 0.5  # a tenth of what reading the others again would take
_MEGABYTES = 256.0  # far below what the headers of the largest study take


@dataclass(frozen=True, slots=True)
class Options:
    """How long the series are, how often each is measured, and where roots go."""

    directory: Path
    rounds: int
    series: int
    live: int
    long: int
    largest: int


class Gateway:
    """What stands between the door and the published tree, in one process."""

    def __init__(self, root: Path) -> None:
        for name in ("run", "state"):
            (root / name).mkdir(parents=True)
        self.index = Index(sqlite.open_engine(root / "index.sqlite", read_only=False))
        intake = Intake(
            root,
            "bench",
            Disk(),
            relaxed=True,  # what a sync costs is measured elsewhere
            reserve_bytes=0,
            max_variants=8,
            inline_bytes=128 << 10,
            segment_bytes=32 << 20,
        )
        self._archive = Archive(root, self.index, intake=intake)
        self._filing = Filing(root, self.index, Disk(), segment_bytes=32 << 20)
        self.publisher = Publisher(
            root, self.index, Disk(), root / "dicomweb", documents=Documents("/dicomweb", 1024), attempts=3
        )
        self._template = Template(_SIZE)

    def take(self, study_uid: str, numbers: Iterable[int]) -> int:
        """Take in instances, up to the index; returns how often the study has changed by then."""
        changes = 0
        for instance in numbers:
            claim = Claim(CT_IMAGE_STORAGE, sop_uid(study_uid, instance), EXPLICIT_VR_LITTLE_ENDIAN)
            incoming = self._archive.receive(claim, _SOURCE)
            incoming.write(self._template.dataset(study_uid, instance))
            self._archive.admit(incoming)
        while (done := self._filing.step()).entries:
            changes = done.changed.get(study_uid, changes)
        return changes

    def publish(self, study_uid: str) -> Outcome:
        """Publish the study as it is."""
        (outcome,) = self.publisher.publish([study_uid])
        if not outcome.published:
            raise RuntimeError("the study was not published; see the log above")
        return outcome

    def close(self) -> None:
        """Give all back."""
        self._archive.close()
        self._filing.close()
        self.publisher.close()


@contextmanager
def _gateway(options: Options, name: str) -> Iterator[Gateway]:
    gateway = Gateway(options.directory / name)
    try:
        yield gateway
    finally:
        gateway.close()


def run(options: Options, report: Report) -> None:
    """Measure one series, one that arrives live, one instance more, and memory."""
    sheet = report.sheet("Publishing", "what", "measured", "spread")
    whole = [_timed(options, n, options.series) for n in range(options.rounds)]
    _tell(report, sheet.rows, f"a series of {options.series}: compile, deflate, sync, show", whole, "s")
    report.target(
        Target(f"a series of {options.series} published", statistics.median(whole), 1.0, " s", at_most=True)
    )
    more = _one_more(options)
    what = f"one instance more in a series of {options.long}"
    _tell(report, sheet.rows, what, more, "s")
    report.target(Target(what, statistics.median(more), _ONE_MORE_SECONDS, " s", at_most=True))
    ratios = [_live(options, n, report) for n in range(options.rounds)]
    what = f"{options.live} instances over {_LIVE_SECONDS:.0f} s, beside one publish at the end"
    _tell(report, sheet.rows, what, ratios, "x")
    report.target(Target(what, statistics.median(ratios), 3.0, "x", at_most=True))
    megabytes = _in_a_process(_largest, options)
    what = f"memory to publish a study of {options.largest}"
    _tell(report, sheet.rows, what, [megabytes], "MB more")
    report.target(Target(what, megabytes, _MEGABYTES, " MB", at_most=True))


def _tell(report: Report, rows: list[list[str]], what: str, figures: list[float], unit: str) -> None:
    spread = f"{number(min(figures))} to {number(max(figures))}" if len(figures) > 1 else ""
    rows.append([what, f"{number(statistics.median(figures))} {unit}", spread])
    report.fact(what, figures)
    report.progress(f"{what}: {rows[-1][1]}")


def _timed(options: Options, turn: int, count: int) -> float:
    with _gateway(options, f"series-{turn}") as gateway:
        study_uid = new_study_uid()
        gateway.take(study_uid, range(1, count + 1))
        began = time.perf_counter()
        gateway.publish(study_uid)
        return time.perf_counter() - began


def _one_more(options: Options) -> list[float]:
    with _gateway(options, "long") as gateway:
        study_uid = new_study_uid()
        gateway.take(study_uid, range(1, options.long + 1))
        gateway.publish(study_uid)
        seconds = []
        for turn in range(options.rounds):
            gateway.take(study_uid, [options.long + 1 + turn])
            began = time.perf_counter()
            gateway.publish(study_uid)
            seconds.append(time.perf_counter() - began)
    return seconds


def _live(options: Options, turn: int, report: Report) -> float:
    """Processor time of publishing a series while it arrives, over that of publishing it once."""
    with _gateway(options, f"live-{turn}") as gateway:
        study_uid = new_study_uid()
        seconds, publishes = _play(gateway, study_uid, options.live)
    with _gateway(options, f"once-{turn}") as gateway:
        study_uid = new_study_uid()
        gateway.take(study_uid, range(1, options.live + 1))
        began = time.process_time()
        gateway.publish(study_uid)
        once = time.process_time() - began
    report.progress(f"live: {publishes} publishes, {seconds:.3f} s; once: {once:.3f} s")
    return seconds / once


def _play(gateway: Gateway, study_uid: str, count: int) -> tuple[float, int]:
    """Processor seconds spent publishing, and how often it was published."""
    schedule = Schedule(quiet_seconds=_QUIET_SECONDS, patience_seconds=_PATIENCE_SECONDS)
    spent, publishes, pending = 0.0, 0, []
    pace = _LIVE_SECONDS / count
    for instance in range(1, count + 1):
        now = instance * pace
        pending.append(instance)
        schedule.arrived(study_uid, instance, now)
        if instance == count:
            now += _LIVE_SECONDS
        if schedule.due(now):
            gateway.take(study_uid, pending)
            pending.clear()
            began = time.process_time()
            outcome = gateway.publish(study_uid)
            spent += time.process_time() - began
            publishes += 1
            schedule.published(study_uid, instance, seconds=outcome.seconds, now=now + outcome.seconds)
    return spent, publishes


def _largest(options: Options) -> float:
    """How many megabytes publishing takes beyond what was in use before."""
    with _gateway(options, "largest") as gateway:
        study_uid = new_study_uid()
        for first in range(1, options.largest + 1, _BATCH):
            gateway.take(study_uid, range(first, min(first + _BATCH, options.largest + 1)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gateway.publish(study_uid)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _in_a_process(work: Callable[[Options], float], options: Options) -> float:
    """The figure of *work*, done in a process of its own: peaks of memory never fall."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (options,))
