"""Rebuild: makes the index anew from the instances alone.

    instances/ ─▶ paths ─▶ workers: arrivals ─▶ the one writer of the index

While `state/index-rebuilding` is there the index is not whole, and questions are answered with "busy".
Paths and arrivals stream: memory grows with the widest folder, not with the archive.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dicomscp.archive.archive import rebuild_marker
from dicomscp.archive.filing import arrival_of
from dicomscp.archive.index import Arrival, Index
from dicomscp.crew import Count, Work, share
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.disk import Disk
from dicomscp.errors import DicomscpError

_BATCH = 500


@dataclass(slots=True)
class Rebuilt:
    """How many instances are in the index, and which could not be read and why."""

    instances: int = 0
    unreadable: list[str] = field(default_factory=list)


def mark_if_held(root: Path) -> None:
    """If there are instances, an index that is new is not whole, until it has been made out of them."""
    if next(held_paths(root), None):
        mark(root)


def mark(root: Path) -> None:
    """The index is not whole from now on, until it has been made anew."""
    marker = rebuild_marker(root)
    marker.touch()
    Disk().sync_directory(marker.parent)


def rebuild_index(
    root: Path, index: Index, *, jobs: int, progress: Callable[[int, int | None], None]
) -> Rebuilt:
    """Make *index* anew from what is held under *root*, its files read by *jobs* processes.

    Cut short, it is begun again by the next call.  Raises BusyError if a process of them dies.
    """
    mark(root)
    index.clear()
    rebuilt, count = Rebuilt(), Count(held_paths(root))
    batch: list[Arrival] = []
    reading = functools.partial(_reading, root, index.model.index_tags)
    for done, made in enumerate(share(held_paths(root), reading, jobs=jobs)):
        progress(done, count.total)
        if isinstance(made, str):
            rebuilt.unreadable.append(made)
            continue
        batch.append(made)
        if len(batch) == _BATCH:
            rebuilt.instances += _apply(index, batch)
    rebuilt.instances += _apply(index, batch)
    index.make_durable()
    rebuild_marker(root).unlink()
    rebuilt.unreadable.sort()
    total = rebuilt.instances + len(rebuilt.unreadable)
    progress(total, total)
    return rebuilt


def held_paths(root: Path) -> Iterator[str]:
    """The path under *root* of every instance file there, folder by folder in order."""
    for above in study_folders(root):
        yield from study_paths(root, above)


def study_folders(root: Path) -> Iterator[str]:
    """The path under *root* of the folder of every study there, in order."""
    for shard in _folders(root, "instances"):
        yield from _folders(root, shard)


def study_paths(root: Path, folder: str) -> Iterator[str]:
    """The path under *root* of every instance file of the study in *folder*, in order."""
    for series in _folders(root, folder):
        with os.scandir(root / series) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(".dcm"))
        for name in names:
            yield f"{series}/{name}"


def _folders(root: Path, above: str) -> Iterator[str]:
    with os.scandir(root / above) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    for name in names:
        yield f"{above}/{name}"


def _apply(index: Index, batch: list[Arrival]) -> int:
    """Put *batch* into the index and empty it; returns how many that were."""
    count = len(batch)
    index.apply(batch, {})
    batch.clear()
    return count


@contextlib.contextmanager
def _reading(root: Path, wanted: frozenset[int]) -> Iterator[Work[str, Arrival | str]]:
    """What turns each path into its arrival, or into why it cannot be read."""
    compiler = Compiler()

    def read(path: str) -> Arrival | str:
        try:
            return arrival_of(compiler, root, path, wanted)
        except (DicomscpError, OSError) as error:
            return f"{root / path}: {error}"

    yield lambda paths: map(read, paths)
