"""Rebuild: makes the index anew from the instances alone.

While `state/index-rebuilding` is there the index is not whole, and questions are answered with "busy".
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dicomscp.archive.archive import rebuild_marker
from dicomscp.archive.disk import Disk
from dicomscp.archive.filing import arrival_of
from dicomscp.archive.index import Index
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.errors import DicomscpError

_BATCH = 500


@dataclass(slots=True)
class Rebuilt:
    """How many instances are in the index, and which could not be read and why."""

    instances: int = 0
    unreadable: list[str] = field(default_factory=list)


def mark_rebuilding(root: Path) -> None:
    """From now on the index is not whole, until it has been made anew."""
    marker = rebuild_marker(root)
    marker.touch()
    Disk().sync_directory(marker.parent)


def rebuild_index(root: Path, index: Index, progress: Callable[[int, int], None]) -> Rebuilt:
    """Make *index* anew from what is held under *root*; cut short, it is begun again by the next call."""
    rebuilt, compiler = Rebuilt(), Compiler()
    mark_rebuilding(root)
    index.clear()
    paths = sorted((root / "instances").glob("*/*/*/*.dcm"))
    batch = []
    for done, path in enumerate(paths):
        progress(done, len(paths))
        try:
            batch.append(arrival_of(compiler, root, str(path.relative_to(root))))
        except DicomscpError as error:
            rebuilt.unreadable.append(f"{path}: {error}")
        if len(batch) == _BATCH:
            index.apply(batch, {})
            batch.clear()
    index.apply(batch, {})
    index.make_durable()
    rebuild_marker(root).unlink()
    rebuilt.instances = len(paths) - len(rebuilt.unreadable)
    progress(len(paths), len(paths))
    return rebuilt
