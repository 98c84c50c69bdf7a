"""Publisher: compiles studies out of what is held, and publishes their documents.

    index ─▶ snapshot ─▶ lines of each instance ─▶ edition, written ─▶ synced ─▶ shown ─▶ synced ─▶ recorded

Everything may be done again after a crash: what is recorded is durable before, and what was written and
not recorded is written anew.

An attempt is on disk before a compile begins and is taken away after it.  It names the instance that is
being compiled, without a sync, which outlives the process though not the machine: an instance at which
the process ended twice is published with its UIDs alone.  That is the one way in which documents depend on
more than what is held; a rebuild or another version of this program tries again.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
import structlog

from dicomscp import __version__
from dicomscp.archive.archive import OpenInstance
from dicomscp.archive.filing import bare_attributes, read_header
from dicomscp.archive.index import OF_STUDY, Held, Index, Publication, Snapshot
from dicomscp.crew import Work, share
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.jsonmodel import Compiler, Header
from dicomscp.dicom.matching import Level, Query
from dicomscp.disk import Disk
from dicomscp.errors import BusyError, DamagedError, DicomscpError, RefusedError
from dicomscp.publish.directory import Edition, deflate
from dicomscp.publish.series import (
    Contents,
    Identity,
    Made,
    Names,
    read_contents,
    sections,
    write_contents,
    write_series,
)
from dicomscp.study import layout
from dicomscp.study.compile import Lines, lines
from dicomscp.study.static import bulk_paths, instance_files
from dicomscp.study.viewer import CLOSING, SERIES_END, Entries, series_head, study_head

log = structlog.get_logger()

_RECENT_STUDIES = 1000
_WARNINGS_SHOWN = 100
_BATCH = 32  # studies that share two syncs
_MOST_SUSPECTS = 16  # instances of one study that may end the process before it is set aside
_SOP_UID_BYTES = 64
_COMPILED = "/"  # no UID that is held has one
_MOST_FILES = 250_000  # of one instance: more than slides have, and less than fills a disk with names
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_MOST_DEATHS = 20  # of processes, before what they had is left for the next time


class Documents(NamedTuple):
    """How documents are made.

    *base_url* begins every link in them; binary values up to *inline_bytes* stand in them.  Private elements
    written as UN are read as *private_un* says (`Compiler`).  With *frames* "files" every frame and bulk
    value is a file beside them, too.  With *preload* the viewer has a document of each study.
    """

    base_url: str
    inline_bytes: int
    private_un: Literal["parse", "keep"] = "parse"
    frames: Literal["range", "files"] = "range"
    preload: bool = True

    @property
    def made_by(self) -> str:
        """Names all that documents depend on beside what is held."""
        return orjson.dumps([__version__, *self]).decode()


class Compiled(NamedTuple):
    """A study's documents, written and not yet shown, and what is to be recorded of them.

    *contents* are those of its series, in order; there are none of a study of which nothing is held.
    """

    study_uid: str
    changes: int
    edition: Edition
    revision: str
    contents: list[Contents]
    warnings: list[str]
    last_received_at: int
    seconds: float

    @property
    def instances(self) -> int:
        """How many stand in the documents."""
        return sum(len(part.members) for contents in self.contents for part in contents.parts)


class Outcome(NamedTuple):
    """What became of one study that was to be published: its documents show *changes* of it if it was."""

    study_uid: str
    changes: int
    published: bool
    set_aside: bool = False
    seconds: float = 0.0


@dataclass(slots=True)
class _Work:
    """A study that is being compiled."""

    edition: Edition
    attempt: "Attempt | None"
    warnings: list[str] = field(default_factory=list)  # of what is left out

    @property
    def suspects(self) -> Collection[str]:
        """Instances whose headers are not to be compiled."""
        return self.attempt.suspects if self.attempt is not None else ()


class Publisher:
    """Compiles studies and publishes them; one thread at a time."""

    def __init__(
        self,
        root: Path,
        index: Index,
        disk: Disk,
        folder: Path,
        *,
        documents: Documents,
        attempts: int,
        contents: Path | None = None,
        compiler: Compiler | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Publish under *folder* what is held under *root*.

        After *attempts* a study is set aside.  What documents are made of is kept under *contents*, beside
        the states of studies if that is None.  *compiler* is one that compiles as *documents* says.  *now* is
        in seconds since 1970.
        """
        self._root, self._index, self._disk, self._folder = root, index, disk, folder
        self._documents, self._attempts, self._now = documents, attempts, now
        self._contents = contents or root
        self._compiler = compiler or Compiler(
            inline_bytes=documents.inline_bytes, private_un=documents.private_un
        )
        self._entries = Entries(documents.base_url)
        disk.make_directory(root / "state" / "attempts")
        self._root_descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    # Whole publishes

    def publish(self, study_uids: Iterable[str]) -> list[Outcome]:
        """Publish these studies as they are held now, and record it; what fails is logged.

        One of which an attempt came to no end is published after the others and alone: if it ends the
        process again, it takes none with it.
        """
        begun = {uid: (self._root / layout.attempt_path(uid)).exists() for uid in study_uids}
        outcomes = self.finish([self.attempt(uid) for uid, is_repeated in begun.items() if not is_repeated])
        for study_uid in (uid for uid, is_repeated in begun.items() if is_repeated):
            outcomes += self.finish([self.attempt(study_uid, alone=True)])
        return outcomes

    def attempt(self, study_uid: str, *, alone: bool = False) -> Compiled | Outcome:
        """The study's documents, to be finished; or what became of the attempt.

        It counts as one, unless what failed is a disk or an index that may do later.  Once the study is
        compiled it does not count that the process ends, unless the study is *alone*.
        """
        began = time.monotonic()
        edition = Edition(self._folder, self._disk)
        attempt = None
        changes = 0
        try:
            snapshot = self._index.snapshot(study_uid)
            changes = snapshot.changes
            attempt = Attempt(self._root, self._disk, study_uid, changes)
            if attempt.count >= self._attempts:
                log.error("study_set_aside", study_uid=study_uid, reason=attempt.reason)
                return Outcome(study_uid, changes, published=False, set_aside=True)
            attempt.begin()
            if attempt.is_repeated:
                self._sweep(study_uid)
            compiled = self._compile(study_uid, snapshot, edition, attempt)
            attempt.compiled(alone=alone)
        except Exception as error:  # one study is one unit of work; it is tried again, and counted
            if not isinstance(error, OSError | DicomscpError):
                log.exception("compile_failed", study_uid=study_uid)
            self._failed(study_uid, error, attempt)
            edition.forget()
            return Outcome(study_uid, changes, published=False, seconds=time.monotonic() - began)
        return compiled._replace(seconds=time.monotonic() - began)

    def finish(self, attempted: Sequence[Compiled | Outcome]) -> list[Outcome]:
        """Show and record what was compiled, with two syncs in all."""
        outcomes = [one for one in attempted if isinstance(one, Outcome)]
        waiting = [one for one in attempted if isinstance(one, Compiled)]
        if not waiting:
            return outcomes
        published: list[Compiled] = []
        began = time.monotonic()
        try:
            self._sync()
            if not all(one.contents for one in waiting):
                self.publish_recent()
            shown = [one for one in waiting if self._shown(one)]
            self._sync()
        except (OSError, DicomscpError) as error:  # of the disk or the index: no study's own
            for one in waiting:
                self._failed(one.study_uid, error, Attempt(self._root, self._disk, one.study_uid))
                one.edition.forget()
        else:
            published = [one for one in shown if self._recorded(one)]
        each = (time.monotonic() - began) / len(waiting)
        return outcomes + [
            Outcome(one.study_uid, one.changes, published=one in published, seconds=one.seconds + each)
            for one in waiting
        ]

    def _failed(self, study_uid: str, error: Exception, attempt: "Attempt | None") -> None:
        """Say that a publish failed; it counts as an attempt unless what failed may do later."""
        passing = isinstance(error, BusyError) or _is_passing(error)
        if attempt is not None:
            attempt.fail(_reason(error), excused=passing)
        log.error("study_not_published", study_uid=study_uid, reason=_reason(error))

    def excuse(self, study_uids: Iterable[str]) -> None:
        """Attempts at these studies that were begun and came to no end do not count."""
        for study_uid in study_uids:
            attempt = Attempt(self._root, self._disk, study_uid)
            if attempt.is_repeated:
                attempt.fail("interrupted", excused=True)

    def publish_recent(self) -> None:
        """Publish the list of the newest studies that have documents."""
        found = list(self._index.find(Query(Level.STUDY, (), OF_STUDY, _RECENT_STUDIES)))
        standing = self._index.announced([study["0020000D"]["Value"][0] for study in found])
        listed = [orjson.dumps(one) for one in found if one["0020000D"]["Value"][0] in standing]
        edition = Edition(self._folder, self._disk)
        with edition.document(layout.STUDIES_INDEX) as document:
            if listed:
                document.add(deflate(listed))
        self._sync()
        edition.show()

    def compile(self, study_uid: str) -> Compiled:
        """The study's documents as its instances give them, beside their places; nothing is recorded."""
        return self._compile(
            study_uid, self._index.snapshot(study_uid), Edition(self._folder, self._disk), None
        )

    def adopt(self) -> None:
        """Documents that were made in another way than this one makes them are due."""
        self._index.publish_as(self._documents.made_by)

    def begin_anew(self) -> None:
        """Withdraw everything: from now on every study is due, and what failed is forgotten."""
        self._index.mark_unpublished()
        self._index.make_durable()
        shutil.rmtree(self._folder / "studies", ignore_errors=True)
        for path in (self._root / "state").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        self._disk.make_directory(self._root / "state" / "attempts")

    def set_aside(self) -> list[dict[str, object]]:
        """The studies that are not compiled any more until something of them arrives."""
        return set_aside_studies(self._root, self._attempts)

    def free_bytes(self) -> int:
        """What may still be written under the root."""
        return self._disk.free_bytes(self._root)

    def close(self) -> None:
        """Let go of the root."""
        os.close(self._root_descriptor)

    def _sync(self) -> None:
        self._disk.sync_all(self._root_descriptor)

    # Compiling

    def _compile(
        self, study_uid: str, snapshot: Snapshot, edition: Edition, attempt: "Attempt | None"
    ) -> Compiled:
        if snapshot.study is None:
            return Compiled(study_uid, snapshot.changes, edition, "", [], [], 0, 0.0)
        work = _Work(edition, attempt)
        contents = [
            self._compile_series(work, study_uid, series_uid, held)
            for series_uid, held in groupby(snapshot.held, key=lambda one: one.key.series_uid)
        ]
        self._write_index(edition, layout.series_index(study_uid), snapshot.series)
        with edition.document(layout.study_metadata(study_uid)) as document:
            for one in contents:
                names = self._names(one)
                for section in sections(edition, names, one, names.metadata):
                    document.add(section)
        self._write_viewer(edition, study_uid, snapshot, contents)
        self._write_index(edition, layout.study_index(study_uid), [snapshot.study])
        self._keep(edition, study_uid, contents)
        said = [
            f"{member.identity.sop_uid}: {warning}"
            for one in contents
            for member in one.members
            for warning in member.warnings
        ]
        return Compiled(
            study_uid,
            snapshot.changes,
            edition,
            _revision(snapshot, contents),
            contents,
            work.warnings + said,
            max(one.received_at for one in snapshot.held),
            0.0,
        )

    def _write_index(self, edition: Edition, path: str, objects: Iterable[Mapping[str, Any]]) -> None:
        with edition.document(path) as document:
            document.add(deflate([orjson.dumps(one) for one in objects]))

    def _write_viewer(
        self, edition: Edition, study_uid: str, snapshot: Snapshot, contents: Sequence[Contents]
    ) -> None:
        """Write the document that the viewer opens the study with, or have it taken away."""
        path = layout.study_viewer(study_uid)
        if not self._documents.preload or snapshot.study is None or not any(one.parts for one in contents):
            edition.withhold(path)
            for one in contents:
                if not self._documents.preload:
                    edition.withhold(layout.series_viewer(study_uid, one.series_uid))
            return
        objects = {one["0020000E"]["Value"][0]: one for one in snapshot.series}
        instances = sum(len(part.members) for one in contents for part in one.parts)
        before = study_head(snapshot.study, instances, self._documents.base_url)
        with edition.document(path, CLOSING) as document:
            for one in contents:
                names = self._names(one)
                head: bytes | None = before + series_head(objects[one.series_uid])
                for section in sections(edition, names, one, names.viewer or ""):
                    document.add(section, head)
                    head, before = None, SERIES_END + b",\n"

    def _keep(self, edition: Edition, study_uid: str, contents: Sequence[Contents]) -> None:
        """Have taken away, once all is shown, what belongs to no series and no instance of the study."""
        study = layout.study_directory(study_uid)
        has_files = self._documents.frames == "files"
        series = {layout.component(one.series_uid): one for one in contents}
        edition.keep_only(f"{study}/series", series)
        edition.keep_only(f"{study}/bulkdata", series if has_files else ())
        for name, one in series.items():
            instances = {layout.component(member.identity.sop_uid) for member in one.members if has_files}
            edition.keep_only(f"{study}/series/{name}/instances", instances)
            edition.keep_only(f"{study}/bulkdata/{name}", instances)

    def _compile_series(
        self, work: "_Work", study_uid: str, series_uid: str, held: Iterable[Held]
    ) -> Contents:
        empty = Contents(self._documents.made_by, study_uid, series_uid)
        standing = read_contents(self._contents / layout.contents_path(study_uid, series_uid), empty)
        wanted = {_identity(one): one for one in held}

        def make(identity: Identity) -> Made | None:
            if work.attempt is not None:
                work.attempt.at(identity.sop_uid)
            try:
                return self._made(work, wanted[identity])
            except DamagedError as error:
                log.error("instance_not_published", sop_uid=identity.sop_uid, reason=str(error))
                work.warnings.append(f"{identity.sop_uid}: not published: {error}")
                return None

        return write_series(work.edition, self._names(empty), standing, list(wanted), make)

    def _names(self, contents: Contents) -> Names:
        """The documents of a series."""
        of = contents.study_uid, contents.series_uid
        viewer = layout.series_viewer(*of) if self._documents.preload else None
        return Names(layout.series_metadata(*of), layout.instances_index(*of), viewer)

    def _made(self, work: "_Work", held: Held) -> Made:
        """The lines of an instance; with its UIDs alone if its header cannot be compiled.

        Raises DamagedError if its file is missing or cannot be read from the disk.
        """
        if held.key.sop_uid in work.suspects:
            return self._bare(work.edition, held, "the process ended twice while its header was compiled")
        try:
            uri = layout.bulk_uri(self._documents.base_url, held.key)
            header = read_header(self._compiler, self._root / held.path, bulk_uri=uri)
            warnings = header.warnings + self._files_written(work.edition, held, header)
        except RefusedError as error:
            return self._bare(work.edition, held, str(error))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedError(f"the disk cannot read its file: {error.strerror}") from error
        except (DicomscpError, MemoryError):
            raise
        except Exception as error:  # one header is one unit of work; its study is published without it
            log.exception("header_not_compiled", study_uid=held.key.study_uid, sop_uid=held.key.sop_uid)
            return self._bare(
                work.edition, held, f"its header could not be compiled ({type(error).__name__})"
            )
        return Made(self._lines(held.key, header.texts, header.fragments), warnings)

    def _lines(self, key: InstanceKey, texts: Sequence[bytes], fragments: Mapping[int, bytes]) -> Lines:
        made = lines(key, b",".join(texts), fragments, self._documents.base_url)
        return (
            made._replace(viewer=self._entries.of(key, texts, fragments)) if self._documents.preload else made
        )

    def _files_written(self, edition: Edition, held: Held, header: Header) -> tuple[str, ...]:
        """Write the frames and bulk values of an instance, in place of those of another variant of it.

        Returns what is to be said of them.
        """
        if self._documents.frames != "files":
            return ()
        folders = self._begin_files(edition, held)
        paths = bulk_paths(header.body, layout.bulk_uri(self._documents.base_url, held.key))
        try:
            with OpenInstance(self._root / held.path) as instance:
                files = instance_files(held.key, instance.dataset, instance.transfer_syntax_uid, paths)
                for number, (path, pieces) in enumerate(files):
                    if number == _MOST_FILES:
                        return (f"only its first {_MOST_FILES} frames are published as files",)
                    folder = next(folder for folder in folders if path.startswith(f"{folder}/"))
                    edition.file(folder, path.removeprefix(f"{folder}/"), pieces)
        except RefusedError as error:
            return (f"its frames are not published as files: {error}",)
        return ()

    def _begin_files(self, edition: Edition, held: Held) -> tuple[str, str]:
        """The folders of an instance's frames and bulk values, begun anew."""
        folders = layout.instance_directory(held.key), layout.bulk_directory(held.key)
        for folder in folders:
            edition.files(folder)
        return folders

    def _bare(self, edition: Edition, held: Held, warning: str) -> Made:
        if self._documents.frames == "files":  # none of another variant stay
            self._begin_files(edition, held)
        fragments = bare_attributes(held.key, held.sop_class_uid)
        return Made(self._lines(held.key, list(fragments.values()), fragments), (warning,))

    # Showing and recording

    def _shown(self, compiled: Compiled) -> bool:
        """Let a study's documents be read, and note what they are made of; False if that failed."""
        try:
            if compiled.contents:
                compiled.edition.show()
                self._note(compiled)
            else:
                self._withdraw(compiled)
        except OSError as error:
            if _is_passing(error):
                raise
            self._failed(compiled.study_uid, error, Attempt(self._root, self._disk, compiled.study_uid))
            compiled.edition.forget()
            return False
        return True

    def _note(self, compiled: Compiled) -> None:
        """Keep what documents that are shown are made of, for the next time, and the study's state."""
        directory = self._contents / layout.contents_directory(compiled.study_uid)
        names = {f"{layout.component(one.series_uid)}.contents" for one in compiled.contents}
        for path in list(directory.iterdir()) if directory.is_dir() else ():
            if path.name not in names:  # of a series that is gone
                path.unlink()
        for one in compiled.contents:
            write_contents(
                self._contents / layout.contents_path(one.study_uid, one.series_uid), one, self._disk
            )
        path = self._root / layout.state_path(compiled.study_uid)
        making = path.with_name(f".{path.name}.new")
        self._disk.make_directory(path.parent)
        making.write_bytes(orjson.dumps(self._state(compiled), option=orjson.OPT_INDENT_2))
        self._disk.rename(making, path)

    def _state(self, compiled: Compiled) -> dict[str, Any]:
        return {
            "study_uid": compiled.study_uid,
            "revision": compiled.revision,
            "changes": compiled.changes,
            "series": len(compiled.contents),
            "instances": compiled.instances,
            "last_received_at": _timestamp(compiled.last_received_at / 1e6),
            "published_at": _timestamp(self._now()),
            "warnings": compiled.warnings[:_WARNINGS_SHOWN],
            "warnings_count": len(compiled.warnings),
        }

    def _withdraw(self, compiled: Compiled) -> None:
        """Take a study's documents away, those that name others first, and what was noted of them."""
        directory = layout.study_directory(compiled.study_uid)
        compiled.edition.withdraw(
            directory,
            layout.study_index(compiled.study_uid),
            layout.study_metadata(compiled.study_uid),
            layout.study_viewer(compiled.study_uid),
            layout.series_index(compiled.study_uid),
        )
        state = self._root / layout.state_path(compiled.study_uid)
        state.unlink(missing_ok=True)
        shutil.rmtree(self._contents / layout.contents_directory(compiled.study_uid), ignore_errors=True)

    def _recorded(self, compiled: Compiled) -> bool:
        """Record in the index that a study's documents stand; False if that failed."""
        attempt = Attempt(self._root, self._disk, compiled.study_uid)
        published = Publication(
            compiled.study_uid,
            compiled.revision,
            len(compiled.contents),
            compiled.instances,
            int(self._now() * 1e6),
        )
        try:
            self._index.mark_published(compiled.changes, published)
            attempt.end()
        except (OSError, DicomscpError) as error:
            self._failed(compiled.study_uid, error, attempt)
            return False
        return True

    def _sweep(self, study_uid: str) -> None:
        """Take away what an attempt that was cut short wrote beside documents."""
        for path in list((self._folder / layout.study_directory(study_uid)).rglob(".*.new")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _identity(held: Held) -> Identity:
    return Identity(held.key.sop_uid, held.digest.hex(), held.received_at)


def _revision(snapshot: Snapshot, contents: Sequence[Contents]) -> str:
    """SHA-256 over what the documents say, each under its place."""
    digest = hashlib.sha256(orjson.dumps([snapshot.study, snapshot.series]))
    for one in contents:
        digest.update(f"\n{one.series_uid}\n".encode())
        digest.update("".join(member.lines for member in one.members).encode())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """What a person is told of an error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _is_passing(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _PASSING


# ── attempts ─────────────────────────────────────────────────────────────────────────────────────


class Attempt:
    """The record that a study is being compiled: there until it is published.

    `state/attempts/<study>.json` is synced; beside it `<study>.at`, which is not, holds the SOP Instance
    UID that is being compiled, or that all are.
    """

    def __init__(self, root: Path, disk: Disk, study_uid: str, changes: int | None = None) -> None:
        """What is on record of the study; `count` is how often this count of *changes* of it was tried.

        Without *changes* that is the count on record.
        """
        self._path = root / layout.attempt_path(study_uid)
        self._at_path = self._path.with_suffix(".at")
        record = _read(self._path)
        self._disk, self._study_uid = disk, study_uid
        self._changes = record.get("changes") if changes is None else changes
        self.is_repeated = bool(record)
        self._recorded = _count(record) if record.get("changes") == self._changes else 0
        self.count = self._recorded
        self.reason = str(record.get("reason", ""))
        self.suspects = [str(one) for one in _list(record.get("suspects"))]
        self._ended_at = self._where_it_ended()
        if self._ended_at == _COMPILED:
            self._ended_at, self.count = "", max(0, self.count - 1)
        elif self._ended_at and self._ended_at == record.get("ended_at") and self._may_suspect():
            self.suspects.append(self._ended_at)
            self.count = 0
        self._descriptor = -1

    def begin(self) -> None:
        """Put it on record that the study is compiled; durable when this returns."""
        self.count = self._recorded = self.count + 1
        self.reason = "the process ended while it was compiled"
        self._write()
        self._descriptor = self._disk.open(self._at_path, os.O_WRONLY | os.O_CREAT)
        self.at("")

    def at(self, sop_uid: str) -> None:
        """This instance is being compiled now."""
        os.pwrite(self._descriptor, sop_uid.encode().ljust(_SOP_UID_BYTES), 0)

    def compiled(self, *, alone: bool) -> None:
        """All instances are: whatever ends the process now was not this study, unless it is *alone*."""
        self.at("" if alone else _COMPILED)
        self._close()

    def fail(self, reason: str, *, excused: bool) -> None:
        """The attempt that was begun is over; it does not count if it is *excused*."""
        self._close()
        self.reason = reason
        with contextlib.suppress(OSError):  # then it counts, and the record gives another reason
            self._at_path.unlink(missing_ok=True)
            self.count = self._recorded - excused
            self._write()

    def end(self) -> None:
        """The study is published."""
        self._close()
        self._disk.unlink(self._at_path)
        self._disk.unlink(self._path)

    def _may_suspect(self) -> bool:
        return self._ended_at not in self.suspects and len(self.suspects) < _MOST_SUSPECTS

    def _where_it_ended(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._at_path.read_text(errors="replace").strip()
        return ""

    def _write(self) -> None:
        record = orjson.dumps(
            {
                "study_uid": self._study_uid,
                "changes": self._changes,
                "attempts": self.count,
                "reason": self.reason,
                "ended_at": self._ended_at,
                "suspects": self.suspects,
            }
        )
        descriptor = self._disk.open(self._path, os.O_WRONLY | os.O_CREAT)
        try:
            self._disk.write(descriptor, [record], 0)
            self._disk.truncate(descriptor, len(record))
            self._disk.sync(descriptor)
        finally:
            self._disk.close(descriptor)
        if not self.is_repeated:
            self._disk.sync_directory(self._path.parent)

    def _close(self) -> None:
        if self._descriptor >= 0:
            self._disk.close(self._descriptor)
            self._descriptor = -1


def attempts(root: Path) -> list[dict[str, object]]:
    """The compiles that were begun and not ended."""
    folder = root / "state" / "attempts"
    return [_read(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def set_aside_studies(root: Path, most: int) -> list[dict[str, object]]:
    """The records of the studies that were tried *most* times."""
    return [record for record in attempts(root) if _count(record) >= most]


def _count(record: dict[str, object]) -> int:
    count = record.get("attempts")
    return count if isinstance(count, int) else 0


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _read(path: Path) -> dict[str, object]:
    try:
        record = orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


# ── on all cores ─────────────────────────────────────────────────────────────────────────────────


def publish_all(
    publisher: Publisher,
    study_uids: Iterable[str],
    *,
    make: Callable[[], Publisher],
    workers: int,
) -> Generator[Outcome, None, None]:
    """Publish these studies, compiled by as many processes, each with what *make* makes.

    *publisher* alone shows and records.  If a process dies, what it had is tried again, within the bounds
    that hold for every attempt.  *make* must be picklable.  Raises what *make* raises of our own errors.
    """
    waiting = iter(study_uids)
    if workers == 1:
        while batch := list(islice(waiting, _BATCH)):
            yield from publisher.publish(batch)
        return
    given: dict[str, None] = {}
    for _ in range(_MOST_DEATHS):
        stream = chain(list(given), waiting)
        given.clear()
        attempted: list[Compiled | Outcome] = []
        try:
            for one in share(_noting(stream, given), partial(_compiling, make), jobs=workers):
                del given[one.study_uid]
                attempted.append(one)
                if len(attempted) >= _BATCH:
                    yield from publisher.finish(attempted)
                    attempted.clear()
        except BusyError as error:
            log.error("compiling_interrupted", studies=len(given), reason=str(error))
        except BaseException:  # who asked wants no more, or nobody can compile: no failure of the studies
            publisher.finish(attempted)
            publisher.excuse(given)
            raise
        yield from publisher.finish(attempted)
        if not given:
            return
    for study_uid in given:
        yield Outcome(study_uid, 0, published=False)


def _noting(study_uids: Iterable[str], given: dict[str, None]) -> Iterator[str]:
    for study_uid in study_uids:
        given[study_uid] = None
        yield study_uid


@contextlib.contextmanager
def _compiling(make: Callable[[], Publisher]) -> Iterator[Work[str, Compiled | Outcome]]:
    publisher = make()

    def compile_some(study_uids: Iterable[str]) -> list[Compiled | Outcome]:
        return [publisher.attempt(study_uid) for study_uid in study_uids]

    try:
        yield compile_some
    finally:
        publisher.close()
