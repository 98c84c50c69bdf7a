"""Upkeep: what the commands do with a root, whether serve runs or not: import, status, verify, rebuild.

Parts come from `daemon`, which alone turns Config into them; what is said to people is `cli`'s.
"""

import contextlib
import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dicomscp.archive import journal
from dicomscp.archive.archive import Archive, Source
from dicomscp.archive.disk import Disk
from dicomscp.archive.index import Index
from dicomscp.archive.rebuild import rebuild_index
from dicomscp.archive.store import intact_digest
from dicomscp.config import Config
from dicomscp.daemon import (
    is_alive,
    make_archive,
    make_index,
    make_intake,
    make_pipeline,
    make_publisher,
    prepare_root,
    publisher_process,
    root_lock,
    running,
)
from dicomscp.dicom.part10 import Origin
from dicomscp.errors import BusyError, ConfigError, DicomscpError
from dicomscp.inbox import admit_file
from dicomscp.publisher import attempts
from dicomscp.study import layout

Progress = Callable[[int, int | None, str], None]


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
            stack.enter_context(root_lock(root))
        except BusyError:
            alone = False
        else:
            alone = True
        if alone:
            make_index(config, read_only=False)  # made, if this is the first that is done with the root
        archive = make_archive(config, make_intake(config, "import", lambda: None))
        try:
            _admit_all(archive, list(_files(paths)), report, progress)
        finally:
            archive.close()
        if alone:
            pipeline = make_pipeline(config)
            report.unpublished = pipeline.drain(
                lambda done, total: progress(done, total, "publishing"),
                make=partial(publisher_process, config),
                workers=os.cpu_count() or 1,
            )
            pipeline.close()
    return report


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
    state = running(root)
    alive = bool(state and is_alive(int(state["pid"])))
    waiting = 0
    for directory in journal.writers(root / "journal"):
        with contextlib.suppress(FileNotFoundError):  # settled and gone meanwhile
            reader = journal.JournalReader(directory)
            waiting += reader.unapplied_bytes()
            reader.close()
    report: dict[str, Any] = {
        "root": str(root),
        "running": alive,
        "serve": state if alive else None,
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
        index = make_index(config, read_only=True)
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
    with root_lock(root):
        pipeline = make_pipeline(config)
        pipeline.recover()
        if index:
            made = rebuild_index(
                root,
                make_index(config, read_only=False),
                lambda done, total: progress(done, total, "indexing"),
            )
            report.instances, report.unreadable = made.instances, made.unreadable
        if published:
            report.studies = pipeline.republish(
                lambda done, total: progress(done, total, "publishing"),
                make=partial(publisher_process, config),
                workers=os.cpu_count() or 1,
            )
        pipeline.close()
    return report


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
            pipeline = make_pipeline(config)
            pipeline.drain(
                lambda done, total: progress(done, total, "catching up"),
                make=partial(publisher_process, config),
                workers=os.cpu_count() or 1,
            )
            pipeline.close()
        index = make_index(config, read_only=True)
        indexed = {held.path: held for study in index.studies() for held in index.variants(study)}
        on_disk = {str(p.relative_to(root)): p for p in sorted((root / "instances").glob("*/*/*/*.dcm"))}
        for done, (path, file) in enumerate(on_disk.items()):
            progress(done, len(on_disk), "verifying")
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
    held = {layout.component(study_uid) for study_uid in studies}
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
