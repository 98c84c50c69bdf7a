"""Documents as gzip files under one folder, and the editions they come in.

An *edition* is what one publish of a study changes.  Its files are written beside their places and
shown by renaming them, leaves first, so a reader sees an old document or a new one and never part of
one.  Who publishes writes, syncs the file system, shows, and syncs again before recording that it
did: then not even a loss of power shows part of a document.

A document is a JSON array, or has arrays in it.  Its lines are deflated in *sections*, each apart from all
others and ended on a byte, so a section can stand in any document: copying it costs no deflating.  What
stands between sections is in stored blocks (RFC 1951 section 3.2.4); the CRC of a document is combined from
those of its parts.
"""

import contextlib
import os
import shutil
import struct
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from isal import isal_zlib

from dicomscp.disk import Disk

_LEVEL = 3  # measured on CT metadata: the size of zlib's level 4 at three times its speed
_STEP_BYTES = 1 << 18  # given to igzip at a time: what it makes of a section depends on where it is cut
_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # RFC 1952: deflate, no flags, no time, unknown system
_SEPARATOR = b",\n"
_STORED_BYTES = 0xFFFF  # at most, of a stored block


class Section(NamedTuple):
    """Lines that were deflated apart from all others; CRC-32 and size are of what they inflate to."""

    deflated: bytes
    crc: int
    size: int


def deflate(lines: Sequence[bytes]) -> Section:
    """The section of *lines*, at least one, with separators between them."""
    deflator = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -15)
    text = _SEPARATOR.join(lines)
    pieces = [
        deflator.compress(memoryview(text)[start : start + _STEP_BYTES])
        for start in range(0, len(text), _STEP_BYTES)
    ]
    pieces.append(deflator.flush(isal_zlib.Z_FULL_FLUSH))
    return Section(b"".join(pieces), zlib.crc32(text), len(text))


def inflate(section: Section) -> list[bytes] | None:
    """The lines of *section*; None if it is not what it was when it was deflated."""
    try:
        text = zlib.decompressobj(-15).decompress(section.deflated)
    except zlib.error:
        return None
    if len(text) != section.size or zlib.crc32(text) != section.crc:
        return None
    return text.split(_SEPARATOR)


class Writer:
    """One document in the making.  Use it with `with`: it is whole when that ends."""

    def __init__(self, file: BinaryIO, end: bytes | None = None) -> None:
        """Writes to *file* and closes it.  *end* ends the document; it is an array if that is None."""
        self._file = file
        self._end = end
        self._crc = self._size = 0
        self._at = self._file_crc = 0
        self._put(_HEADER)

    @property
    def file(self) -> tuple[int, int]:
        """Length and CRC-32 of the file as it stands."""
        return self._at, self._file_crc

    def add(self, section: Section, before: bytes | None = None) -> int:
        """Put *section* behind what is there; returns where in the file its deflated bytes begin.

        Between them stands *before*, or what separates the members of an array.
        """
        if before is None:
            before = _SEPARATOR if self._size else b"["
        for start in range(0, len(before), _STORED_BYTES):
            self._put_stored(before[start : start + _STORED_BYTES])
        start = self._at
        self._put(section.deflated)
        self._count(section.crc, section.size)
        return start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                end = (b"]" if self._size else b"[]") if self._end is None else self._end
                self._put_stored(end, final=True)
                self._put(struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))

    def _put_stored(self, text: bytes, *, final: bool = False) -> None:
        size = len(text)
        self._put(struct.pack("<BHH", final, size, size ^ 0xFFFF) + text)
        self._count(zlib.crc32(text), size)

    def _put(self, data: bytes) -> None:
        self._at += self._file.write(data)
        self._file_crc = zlib.crc32(data, self._file_crc)

    def _count(self, crc: int, size: int) -> None:
        self._crc = isal_zlib.crc32_combine(self._crc, crc, size)
        self._size += size


@dataclass(slots=True)
class Edition:
    """What one publish of a study changes, written and not yet shown; may go from process to process.

    Documents name files, so files are shown first: folders of them, each whole in one step.  One thread at a
    time.  Methods raise OSError; until `show`, what stood still stands.
    """

    folder: Path
    disk: Disk
    _written: deque[str] = field(default_factory=deque)
    _folders: deque[str] = field(default_factory=deque)
    _kept: deque[tuple[str, frozenset[str]]] = field(default_factory=deque)
    _dropped: deque[str] = field(default_factory=deque)

    def document(self, path: str, end: bytes | None = None) -> Writer:
        """Begin the document to be read at *path*, relative to the folder; *end* is for the `Writer`."""
        final = self.folder / path
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self._open(_making(final))
        self._written.append(path)
        return Writer(file, end)

    def place(self, path: str) -> Path:
        """Where the bytes of a document are that will be read at *path*: new ones, or those that stand."""
        final = self.folder / path
        return _making(final) if path in self._written else final

    def files(self, path: str) -> None:
        """Begin the folder *path* of files anew: what it held is replaced by what is put into it now."""
        making = _making(self.folder / path)
        if making.is_dir():
            shutil.rmtree(making)
        self._folders.append(path)

    def file(self, folder: str, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write *pieces*, to be read as *name* in *folder*, which was begun; as gzip if *name* says so."""
        path = _making(self.folder / folder) / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._open(path) as file:
            file.writelines(_gzip(pieces) if name.endswith(".gz") else pieces)

    def withhold(self, path: str) -> None:
        """Once all is shown, remove the document at *path*, if there is one."""
        self._dropped.append(path)

    def keep_only(self, path: str, names: Collection[str]) -> None:
        """Once all is shown, remove the folders under *path* that are not among *names*."""
        self._kept.append((path, frozenset(names)))

    def show(self) -> None:
        """Let everything written be read: files, documents in the order in which they were begun.

        Then what is not kept is removed.
        """
        while self._folders:
            self._show_files(self.folder / self._folders[0])
            self._folders.popleft()
        while self._written:
            final = self.folder / self._written[0]
            if _same_file(_making(final), final):
                self.disk.unlink(_making(final))
            else:
                self.disk.rename(_making(final), final)
            self._written.popleft()
        while self._kept:
            self._remove_others(*self._kept[0])
            self._kept.popleft()
        while self._dropped:
            self.disk.unlink(self.folder / self._dropped[0])
            self._dropped.popleft()

    def forget(self) -> None:
        """Take away what was written and not shown, as far as the disk lets us."""
        with contextlib.suppress(OSError):
            while self._written:
                self.disk.unlink(_making(self.folder / self._written.pop()))
            while self._folders:
                shutil.rmtree(_making(self.folder / self._folders.pop()), ignore_errors=True)
        self._kept.clear()
        self._dropped.clear()

    def withdraw(self, path: str, *first: str) -> None:
        """Remove the folder *path*, the documents *first*, which name others, before the rest."""
        for name in first:
            self.disk.unlink(self.folder / name)
        if (self.folder / path).is_dir():
            shutil.rmtree(self.folder / path)

    def _open(self, path: Path) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        return os.fdopen(self.disk.open(path, flags), "wb")

    def _show_files(self, final: Path) -> None:
        making = _making(final)
        if making.is_dir():
            self.disk.exchange(making, final)
        elif final.is_dir():
            self.disk.rename(final, making)  # nothing is in its place
        if making.is_dir():
            shutil.rmtree(making)

    def _remove_others(self, path: str, names: Collection[str]) -> None:
        folder = self.folder / path
        for child in folder.iterdir() if folder.is_dir() else ():
            if child.is_dir() and child.name not in names:
                shutil.rmtree(child)


def _making(final: Path) -> Path:
    return final.with_name(f".{final.name}.new")


def _gzip(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    deflator = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -15)
    crc = size = 0
    yield _HEADER
    for piece in _stepped(pieces):
        crc = zlib.crc32(piece, crc)
        size += len(piece)
        yield deflator.compress(piece)
    yield deflator.flush()
    yield struct.pack("<II", crc, size & 0xFFFFFFFF)


def _stepped(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """*pieces* cut anew into steps of one size."""
    pending = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), _STEP_BYTES):
            pending += view[start : start + _STEP_BYTES]
            if len(pending) >= _STEP_BYTES:
                yield bytes(pending[:_STEP_BYTES])
                del pending[:_STEP_BYTES]
    yield bytes(pending)


def _same_file(one: Path, other: Path) -> bool:
    try:
        if one.stat().st_size != other.stat().st_size:
            return False
        with one.open("rb") as first, other.open("rb") as second:
            while True:
                chunk = first.read(_STEP_BYTES)
                if chunk != second.read(_STEP_BYTES):
                    return False
                if not chunk:
                    return True
    except FileNotFoundError:
        return False
