"""Upkeep: what the commands do with a root, whether serve runs or not: import, status, verify, rebuild.

Parts come from `daemon`, which alone turns Config into them; what is said to people is `cli`'s.
"""

import contextlib
import functools
import gzip
import hashlib
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dicomscp.archive.archive import Archive, Removable, Source
from dicomscp.archive.index import Held, Index
from dicomscp.archive.rebuild import held_paths, rebuild_index, study_folders, study_paths
from dicomscp.archive.store import intact_digest
from dicomscp.config import Config
from dicomscp.crew import Count, Work, cores, share
from dicomscp.daemon import (
    make_archive,
    make_index,
    make_intake,
    make_pipeline,
    make_publisher,
    make_status,
    mend_index,
    prepare_root,
    root_lock,
    set_index_aside,
)
from dicomscp.dicom.part10 import Origin
from dicomscp.disk import Disk
from dicomscp.errors import BusyError, ConfigError, DamagedError, DicomscpError
from dicomscp.inbox import admit_file
from dicomscp.pipeline import Pipeline
from dicomscp.study import layout

_REMOVE_SECONDS = 120.0  # in which nothing goes, before it is left to serve
_REMOVE_LOOK_SECONDS = 0.1
_BLOCK_BYTES = 1 << 18
_LISTED = 1000  # of each kind of trouble in a report

Progress = Callable[[int, int | None, str], None]
"""Told how many of how many things are done, if that is known yet, and what is done with them."""

_LAG_BYTES = 64 << 20  # journalled and not yet filed; what is admitted more waits
_LAG_LOOK_FILES = 32
_ROUND_SECONDS = 0.1  # between rounds of filing: larger ones cost less


# ── import ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class ImportReport:
    """What became of the files given to an import; refusals are in the order of their paths."""

    admitted: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    unpublished: int = 0
    stopped: str = ""
    interrupted: bool = False


class _Outcome(NamedTuple):
    """What became of one file: taken if there is no reason; *is_busy* if no other would be taken either."""

    path: str
    reason: str = ""
    is_busy: bool = False


def import_paths(
    config: Config,
    paths: Sequence[Path],
    progress: Progress,
    *,
    jobs: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> ImportReport:
    """Take the files at and under *paths* into custody; file and publish them too if no serve is running.

    *jobs* processes, by default one a core, read and journal.  When the disk does not take more, or
    one of them dies, `stopped` says so; once *interrupted* says so, nothing more is begun.  What was
    admitted until then stays.
    """
    root = prepare_root(config)
    config = config.model_copy(update={"root": root})
    importing = _Import(config, paths, progress, jobs=jobs or cores(), interrupted=interrupted)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(root_lock(root))
        except BusyError:
            importing.admit()
        else:
            pipeline = _own_pipeline(stack, config, progress, jobs=importing.jobs)
            importing.admit_and_file(pipeline)
            importing.publish(pipeline)
    return importing.report()


class _Import:
    """One import: what is given to the workers, and what comes back."""

    def __init__(
        self,
        config: Config,
        paths: Sequence[Path],
        progress: Progress,
        *,
        jobs: int,
        interrupted: Callable[[], bool],
    ) -> None:
        self._config, self._paths, self._progress = config, paths, progress
        self.jobs, self._interrupted = jobs, interrupted
        self._admitted = self._unpublished = 0
        self._filing_failed = False
        self._refused: list[tuple[str, str]] = []
        self._stopped: list[str] = []  # several processes may meet a full disk

    def admit(self, waits: Callable[[], bool] = lambda: False) -> None:
        """Admit all files; none is begun while *waits* says so."""
        files = _files(self._paths, self._config.root, lambda *refusal: self._refused.append(refusal))
        count = Count(_files(self._paths, self._config.root, lambda *_: None))
        outcomes = share(
            self._held_back(files, waits),
            functools.partial(_admitting, self._config),
            jobs=self.jobs,
            stop=self._stops,
        )
        done = 0
        try:
            for done, outcome in enumerate(outcomes, 1):
                self._note(outcome)
                self._progress(done, count.total, "importing")
        except BusyError as error:
            self._stopped.append(str(error))

    def admit_and_file(self, pipeline: Pipeline) -> None:
        """Admit all files while *pipeline* files what is journalled, so that the journal stays small."""
        ended = threading.Event()

        filing = threading.Thread(target=self._file, args=(pipeline, ended), name="filing")
        filing.start()
        try:
            self.admit(lambda: pipeline.lag_bytes() > _LAG_BYTES and filing.is_alive() and not self._stops())
        finally:
            ended.set()
            filing.join()

    def publish(self, pipeline: Pipeline) -> None:
        """Publish what is due, unless filing failed."""

        def told(done: int, total: int) -> None:
            if self._interrupted():
                raise KeyboardInterrupt
            self._progress(done, total, "publishing")

        with contextlib.suppress(KeyboardInterrupt):
            if not self._filing_failed and not self._interrupted():
                self._unpublished = pipeline.drain(told)

    def report(self) -> ImportReport:
        """What became of it all."""
        stopped = min(self._stopped, default="")
        refused = sorted(self._refused)
        return ImportReport(self._admitted, refused, self._unpublished, stopped, self._interrupted())

    def _stops(self) -> bool:
        return bool(self._stopped) or self._interrupted()

    def _note(self, outcome: _Outcome) -> None:
        if outcome.is_busy:
            self._stopped.append(f"{outcome.path}: {outcome.reason}")
        elif outcome.reason:
            self._refused.append((outcome.path, outcome.reason))
        else:
            self._admitted += 1

    def _held_back(self, files: Iterator[str], waits: Callable[[], bool]) -> Iterator[str]:
        for number, path in enumerate(files):
            while number % _LAG_LOOK_FILES == 0 and waits():
                time.sleep(_ROUND_SECONDS)
            yield path

    def _file(self, pipeline: Pipeline, ended: threading.Event) -> None:
        """File until all workers have ended and nothing is left, or somebody wants to leave."""
        try:
            while not self._interrupted():
                is_last = ended.is_set()
                done = pipeline.file()
                if is_last and not done.entries:
                    return
                if not done.more:
                    ended.wait(_ROUND_SECONDS)
        except (OSError, DicomscpError) as error:
            self._filing_failed = True
            self._stopped.append(f"filing: {error}")


@contextlib.contextmanager
def _admitting(config: Config) -> Iterator[Work[str, _Outcome]]:
    """What takes files into custody by a journal of its own, some with one sync."""
    source = Source(Origin.IMPORT, "", "")
    archive = make_archive(config, make_intake(config, "import", lambda: None))

    def admit(path: str) -> _Outcome:
        try:
            admit_file(archive, Path(path), source, sync=False)
        except DicomscpError as error:
            return _Outcome(path, str(error), isinstance(error, BusyError))
        return _Outcome(path)

    def admit_some(paths: Iterable[str]) -> list[_Outcome]:
        outcomes = [admit(path) for path in paths]
        try:
            archive.sync()
        except BusyError as error:
            return [one if one.reason else _Outcome(one.path, str(error), is_busy=True) for one in outcomes]
        return outcomes

    try:
        yield admit_some
    finally:
        archive.close()


def _files(paths: Sequence[Path], root: Path, refuse: Callable[[str, str], None]) -> Iterator[str]:
    """The files at and under *paths*, as they come; links below are not followed, *root* is not entered."""
    for path in paths:
        if not path.is_dir():
            yield str(path)
        elif path.samefile(root):
            refuse(str(path), "This is where the gateway itself keeps everything.")
        else:
            yield from _files_under(str(path), root, refuse)


def _files_under(folder: str, root: Path, refuse: Callable[[str, str], None]) -> Iterator[str]:
    above = [_entries(folder, refuse)]  # open folders, each within the one before
    while above:
        entry = next(above[-1], None)
        if entry is None:
            above.pop()
        elif entry.is_dir(follow_symlinks=False):
            if entry.name != root.name or not Path(entry.path).samefile(root):
                above.append(_entries(entry.path, refuse))
        elif entry.is_file(follow_symlinks=False):
            yield entry.path


def _entries(folder: str, refuse: Callable[[str, str], None]) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        refuse(folder, f"The folder cannot be read: {error.strerror}.")


# ── remove ───────────────────────────────────────────────────────────────────────────────────────


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
    _take_away_alone(config, progress)
    archive = make_archive(config)
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

    Returns when it is gone from documents and disk, or when that does not go on.
    """
    config = _owned(_existing(config))
    archive, variants = make_archive(config), found.variants
    for removable in found.removable:
        archive.remove(removable, Disk())
    applied = _finish_removing(config, archive, variants, progress)
    known = make_index(config, read_only=True).known({one.key.sop_uid for one in variants}, leaving=True)
    there = {(one.key, one.digest): one for those in known.values() for one in those}
    ends = [there.get((one.key, one.digest)) for one in variants]
    held = sum(one is not None and one.leaving is None for one in ends)
    report = RemoveReport(removed=ends.count(None), kept=held if applied else 0)
    report.leaving = len(ends) - report.removed - report.kept
    return report


def _finish_removing(config: Config, archive: Archive, variants: Sequence[Held], progress: Progress) -> bool:
    """Return when nothing of *variants* is leaving, or that does not go on; False if it has not begun."""
    index = make_index(config, read_only=True)
    studies = {one.key.study_uid for one in variants}
    deadline, applied, least = time.monotonic() + _REMOVE_SECONDS, False, len(variants)
    while not _take_away_alone(config, progress):
        applied = applied or archive.wait_until_applied()
        leaving = sum(n for study_uid, n in index.leaving_studies().items() if study_uid in studies)
        if applied and leaving < least:
            deadline, least = time.monotonic() + _REMOVE_SECONDS, leaving
        if (applied and not leaving) or time.monotonic() > deadline:
            return applied
        progress(max(0, len(variants) - leaving), len(variants), "removing")
        time.sleep(_REMOVE_LOOK_SECONDS)
    return True


def _take_away_alone(config: Config, progress: Progress) -> bool:
    """Do what serve does of removals, if nobody else is there to do it; False if somebody is."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(root_lock(config.root))
        except BusyError:
            return False
        pipeline = _own_pipeline(stack, config, progress)
        pipeline.recover()
        pipeline.finish_removals()
    return True


def _own_pipeline(
    stack: contextlib.ExitStack, config: Config, progress: Progress, *, jobs: int | None = None
) -> Pipeline:
    """The pipeline, to be closed by *stack*, over an index that is whole; the caller has the root's lock."""
    pipeline = make_pipeline(config, jobs=jobs or cores())
    stack.callback(pipeline.close)
    mend_index(config, lambda done, total: progress(done, total, "indexing"))
    return pipeline


def _owned(config: Config) -> Config:
    """The same settings.  Raises ConfigError for another user's root: serve could not read our journal."""
    owner = config.root.stat().st_uid
    if owner != os.geteuid():
        raise ConfigError(f"root: {config.root} belongs to user {owner}; run this as that user")
    return config


# ── status ───────────────────────────────────────────────────────────────────────────────────────


def status(config: Config) -> dict[str, Any]:
    """What is held, queued and wrong, whether serve runs or not."""
    return make_status(_existing(config), listed=_LISTED).report()


def _existing(config: Config) -> Config:
    """The settings with the root's full path.  Raises ConfigError if nothing was ever kept there."""
    root = config.root.resolve()
    if not (root / "instances").is_dir():
        raise ConfigError(f"root: {root} does not exist or was never served from; check --root")
    return config.model_copy(update={"root": root})


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
    unpublished: int = 0
    unreadable: list[str] = field(default_factory=list)


def rebuild(
    config: Config, *, index: bool, published: bool, progress: Progress, jobs: int | None = None
) -> RebuildReport:
    """Make the index, the published tree, or both anew from the instances alone.

    *jobs* processes, by default one a core, read the instances.  Raises BusyError while serve runs.
    """
    config = _existing(config)
    root = prepare_root(config)
    report = RebuildReport()
    with root_lock(root), contextlib.ExitStack() as stack:
        if index:
            pipeline = _recovered(stack, config, jobs or cores())
        else:
            pipeline = _own_pipeline(stack, config, progress, jobs=jobs)
            pipeline.recover()
        pipeline.finish_removals()
        if index:
            made = rebuild_index(
                root,
                make_index(config, read_only=False),
                jobs=jobs or cores(),
                progress=lambda done, total: progress(done, total, "indexing"),
            )
            report.instances, report.unreadable = made.instances, made.unreadable
        if published:
            report.studies, report.unpublished = pipeline.republish(
                lambda done, total: progress(done, total, "publishing")
            )
    return report


def _recovered(stack: contextlib.ExitStack, config: Config, jobs: int) -> Pipeline:
    """The pipeline, all that is journalled filed; an index that cannot be read, or another's, is set aside.

    It need not be mended, for it is to be made anew.
    """
    try:
        with contextlib.ExitStack() as unless_damaged:
            pipeline = make_pipeline(config, jobs=jobs)
            unless_damaged.callback(pipeline.close)
            pipeline.recover()
            stack.push(unless_damaged.pop_all())
    except (DamagedError, ConfigError):
        set_index_aside(config)
        pipeline = make_pipeline(config, jobs=jobs)
        stack.callback(pipeline.close)
        pipeline.recover()
    return pipeline


def verify(config: Config, *, repair: bool, progress: Progress) -> VerifyReport:
    """Compare instances with their receipts, the index with the instances, documents with both.

    With *repair* what is derived is made again; that needs serve stopped, else BusyError.
    """
    config = _existing(config)
    root = prepare_root(config)
    report = VerifyReport()
    with contextlib.ExitStack() as stack:
        if repair:
            stack.enter_context(root_lock(root))
            with contextlib.ExitStack() as closing:
                pipeline = _own_pipeline(closing, config, progress)
                pipeline.drain(lambda done, total: progress(done, total, "catching up"))
        index = make_index(config, read_only=True)
        _verify_instances(root, index, report, progress)
        report.findings += _verify_published(config, index, progress)
    if repair and report.findings:
        before = len(report.findings)
        rebuild(config, index=True, published=True, progress=progress)
        again = verify(config, repair=False, progress=progress)
        again.repaired = before - len(again.findings)
        return again
    return report


def _verify_instances(root: Path, index: Index, report: VerifyReport, progress: Progress) -> None:
    """Compare all files with their receipts and with the index, study by study."""
    count = Count(held_paths(root))
    findings: list[str] = []
    files = _held_and_indexed(root, index, findings.append)
    for finding in share(files, functools.partial(_comparing, root), jobs=cores()):
        report.checked += 1
        progress(report.checked, count.total, "verifying")
        if finding:
            findings.append(finding)
    report.findings += sorted(findings)


def _held_and_indexed(
    root: Path, index: Index, tell: Callable[[str], None]
) -> Iterator[tuple[str, bytes | None]]:
    """The path of every file that is held, and the digest that the index has for it, if any.

    Tells of what is in the index alone.
    """
    known = set()
    leaving = {held.path for held in index.leaving()}
    for study_uid in index.studies():
        indexed = {held.path: held.digest for held in index.variants(study_uid)}
        folder = next((str(Path(path).parents[1]) for path in indexed), "")
        known.add(folder)
        for path in study_paths(root, folder) if folder and (root / folder).is_dir() else ():
            if path not in leaving:
                yield path, indexed.pop(path, None)
        for path in indexed:
            tell(f"{path}: is in the index but not on disk")
    for folder in study_folders(root):
        if folder not in known:
            yield from ((path, None) for path in study_paths(root, folder) if path not in leaving)


@contextlib.contextmanager
def _comparing(root: Path) -> Iterator[Work[tuple[str, bytes | None], str]]:
    """What says how each file differs from its receipt or the index; nothing if it does not."""

    def compare(file: tuple[str, bytes | None]) -> str:
        path, indexed = file
        try:
            digest = intact_digest(root / path)
        except FileNotFoundError:  # removed since it was listed
            return ""
        except (DicomscpError, OSError) as error:
            return f"{path}: cannot be read: {error}"
        if digest is None:
            return f"{path}: its dataset is not what was received"
        if indexed is None:
            return f"{path}: is not in the index"
        return f"{path}: the index says it is another instance" if indexed != digest else ""

    yield lambda files: map(compare, files)


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
        publisher = make_publisher(config, index, again, contents=again)
        for done, study_uid in enumerate(studies):
            progress(done, len(studies), "comparing documents")
            if study_uid not in due:
                publisher.compile(study_uid).edition.show()
                directory = layout.study_directory(study_uid)
                differences = list(_differences(tree / directory, again / directory, directory))
                if differences and study_uid not in dict(index.due()):  # something may have arrived meanwhile
                    yield from differences
                shutil.rmtree(again / directory, ignore_errors=True)
        publisher.publish_recent()
        if not due and studies:
            recent = Path(layout.STUDIES_INDEX)
            if _content(tree / recent) != _content(again / recent):
                yield f"{recent}: is not what the instances give"
        publisher.close()
    progress(len(studies), len(studies), "comparing documents")


def _differences(published: Path, compiled: Path, directory: str) -> Iterator[str]:
    there, here = _files_of(published), _files_of(compiled)
    for name in sorted(there.keys() | here.keys()):
        if name not in there:
            yield f"{directory}/{name}: is not published"
        elif name not in here:
            yield f"{directory}/{name}: is published and should not be"
        elif _content(there[name]) != _content(here[name]):
            yield f"{directory}/{name}: is not what the instances give"


def _files_of(folder: Path) -> dict[Path, Path]:
    """What can be read under *folder*, by its place there."""
    return {
        path.relative_to(folder): path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def _content(path: Path) -> bytes | None:
    """The SHA-256 of what is published as *path*, uncompressed; None if there is none, or it is damaged."""
    digest = hashlib.sha256()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except (OSError, EOFError, zlib.error):
        return None
    return digest.digest()
