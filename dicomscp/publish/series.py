"""The documents of a series, made out of what stands and of what is new.

*Contents* say which instances each section of a series' documents has, and where it lies.  They are a
cache: what they say of a section holds if the bytes there have the CRC-32 that they say.  Whoever finds no
contents, or other bytes, asks for the lines of the instances again.

On disk: 32 hex digits of the SHA-256 of what follows, then JSON, places and members being arrays:

    [format, made by, study, series, [document, ...], [[closed, [place, ...], [member, ...]], ...]]
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import orjson

from dicomscp.disk import Disk
from dicomscp.publish.directory import Edition, Section, Writer, deflate, inflate
from dicomscp.study.compile import SECTION_BYTES, Lines, ends_section

_FORMAT = 2
_DIGEST = 32  # hex digits
_BLOCK_BYTES = 1 << 18
_MOST_INSTANCES = 1024  # of a section, and
_MOST_BYTES = 8 * SECTION_BYTES  # of its metadata: bounds on memory that chance hardly ever reaches


class Identity(NamedTuple):
    """What an instance's lines depend on beside settings: which variant, and the receipt it is held with."""

    sop_uid: str
    digest: str
    received_at: int


class Place(NamedTuple):
    """Where the deflated bytes of a section lie in a document, and what they and their text are."""

    offset: int
    length: int
    deflated_crc: int
    crc: int
    size: int


class Member(NamedTuple):
    """One instance of a section, the digest of its lines, and what is to be said of it."""

    identity: Identity
    lines: str
    warnings: tuple[str, ...]


class Part(NamedTuple):
    """One section of a series, and its place in each document; *closed* if it ends there in any case."""

    closed: bool
    places: tuple[Place, ...]
    members: tuple[Member, ...]


class Whole(NamedTuple):
    """A document's file as such: its length and CRC-32."""

    length: int
    crc: int


class Contents(NamedTuple):
    """What the documents of a series are made of, and what their files are.

    *made_by* names the compiler and its settings: lines that another one made are not used.
    """

    made_by: str
    study_uid: str
    series_uid: str
    documents: tuple[Whole, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def members(self) -> Iterator[Member]:
        """All instances, in order."""
        return (member for part in self.parts for member in part.members)


class Made(NamedTuple):
    """The lines of an instance, and what is to be said of it."""

    lines: Lines
    warnings: tuple[str, ...]


class Names(NamedTuple):
    """The documents of a series, relative to the published tree; without *viewer* there is none for it."""

    metadata: str
    listed: str
    viewer: str | None = None

    @property
    def present(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in self if name is not None)


def read_contents(path: Path, empty: Contents) -> Contents:
    """What stands at *path* of the series and the maker of *empty*; *empty* if that cannot be had."""
    with suppress(OSError, TypeError, ValueError):  # not to be read, torn, or of another format
        data = path.read_bytes()
        form, *of, documents, parts = orjson.loads(data[_DIGEST:])
        if [form, *of] == [_FORMAT, *empty[:3]] and data[:_DIGEST] == _hex(data[_DIGEST:]):
            return empty._replace(
                documents=tuple(Whole(*one) for one in documents), parts=tuple(_part(*part) for part in parts)
            )
    return empty


def _part(closed: bool, places: list[list[int]], members: list[tuple[str, str, int, str, list[str]]]) -> Part:
    return Part(
        closed,
        tuple(Place(*place) for place in places),
        tuple(
            Member(Identity(sop_uid, digest, received_at), lines, tuple(warnings))
            for sop_uid, digest, received_at, lines, warnings in members
        ),
    )


def write_contents(path: Path, contents: Contents, disk: Disk) -> None:
    """Put *contents* at *path*: whole, unless power is lost before the next sync."""
    parts = [
        [
            part.closed,
            [list(place) for place in part.places],
            [[*member.identity, member.lines, member.warnings] for member in part.members],
        ]
        for part in contents.parts
    ]
    documents = [list(one) for one in contents.documents]
    data = orjson.dumps([_FORMAT, *contents[:3], documents, parts])
    disk.make_directory(path.parent)
    making = path.with_name(f".{path.name}.new")
    making.write_bytes(_hex(data) + data)
    disk.rename(making, path)


def _hex(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest()[:_DIGEST].encode()


def write_series(
    edition: Edition,
    names: Names,
    standing: Contents,
    wanted: Sequence[Identity],
    make: Callable[[Identity], Made | None],
) -> Contents:
    """Write the documents of the instances *wanted*, in that order; returns what they are made of.

    Lines that stand, by what *standing* says, are taken from there; *make* is asked for the others, and
    leaves an instance out by None.  Documents that would say what they say are not written.  Memory is
    bounded by some sections and the longest line.  Raises OSError, and what *make* raises.
    """
    with _Standing(edition.folder, names, standing) as there:
        if [member.identity for member in standing.members] == list(wanted) and there.is_whole():
            return standing
        with ExitStack() as whole:
            documents = [whole.enter_context(edition.document(name)) for name in names.present]
            parts = tuple(_Making(there, make, documents, wanted).parts())
    return standing._replace(documents=tuple(Whole(*one.file) for one in documents), parts=parts)


def sections(edition: Edition, names: Names, contents: Contents, name: str) -> Iterator[Section]:
    """The sections of the document *name* of the series, as they will be read once *edition* is shown."""
    which = names.present.index(name)
    with edition.place(name).open("rb") as file:
        for part in contents.parts:
            section = _read(file, part.places[which])
            if section is None:  # it was whole when it was written or looked at, a moment ago
                raise OSError(f"a document changed while it was read: {name}")
            yield section


class _Making:
    """The documents of one series in the making."""

    def __init__(
        self,
        standing: "_Standing",
        make: Callable[[Identity], Made | None],
        documents: Sequence[Writer],
        wanted: Sequence[Identity],
    ) -> None:
        self._standing, self._make = standing, make
        self._documents = documents
        self._wanted = wanted
        self._at = 0
        self._ahead: tuple[Member, Lines] | None = None  # made already; begins the next section

    def parts(self) -> Iterator[Part]:
        """Write section after section."""
        while self._at < len(self._wanted):
            stands = None if self._ahead else self._standing.part_at(self._wanted, self._at)
            if stands:
                part, found = stands
                yield self._put(part.closed, part.members, found)
                self._at += len(part.members)
                continue
            closed, gathered = self._gather()
            if gathered:
                columns = zip(*(lines.present for _, lines in gathered), strict=True)
                members = tuple(member for member, _ in gathered)
                yield self._put(closed, members, [deflate(column) for column in columns])

    def _gather(self) -> tuple[bool, list[tuple[Member, Lines]]]:
        """The instances of the next section, and whether it ends whatever comes behind it."""
        gathered: list[tuple[Member, Lines]] = []
        size = 0
        while self._at < len(self._wanted):
            one = self._ahead or self._one(self._wanted[self._at])
            self._ahead = None
            if one is None:
                self._at += 1
                continue
            member, lines = one
            if gathered and lines.longest >= SECTION_BYTES:
                self._ahead = one  # a long line stands alone, so that it is never inflated for others
                return False, gathered
            gathered.append(one)
            self._at += 1
            size += lines.longest
            if ends_section(member.identity.sop_uid, lines.longest):
                return True, gathered
            if size >= _MOST_BYTES or len(gathered) == _MOST_INSTANCES:
                return False, gathered
        return False, gathered

    def _one(self, identity: Identity) -> tuple[Member, Lines] | None:
        if stands := self._standing.lines(identity):
            return stands
        made = self._make(identity)
        return made and (Member(identity, _digest(made.lines), made.warnings), made.lines)

    def _put(self, closed: bool, members: tuple[Member, ...], found: Sequence[Section]) -> Part:
        places = tuple(map(_place, self._documents, found))
        return Part(closed, places, members)


def _digest(lines: Lines) -> str:
    return hashlib.sha256(b"\n".join(lines.present)).hexdigest()[:_DIGEST]


def _place(document: Writer, section: Section) -> Place:
    start = document.add(section)
    return Place(start, len(section.deflated), zlib.crc32(section.deflated), section.crc, section.size)


def _whole(file: BinaryIO) -> Whole:
    length = crc = 0
    while block := os.pread(file.fileno(), _BLOCK_BYTES, length):
        length += len(block)
        crc = zlib.crc32(block, crc)
    return Whole(length, crc)


def _read(file: BinaryIO, place: Place) -> Section | None:
    """The section at *place*; None if other bytes lie there."""
    deflated = os.pread(file.fileno(), place.length, place.offset)
    if len(deflated) != place.length or zlib.crc32(deflated) != place.deflated_crc:
        return None
    return Section(deflated, place.crc, place.size)


class _Standing:
    """What stands of a series: sections as they lie, and lines out of them."""

    def __init__(self, folder: Path, names: Names, contents: Contents) -> None:
        self._folder, self._names, self._contents = folder, names, contents
        self._files = ExitStack()
        self._open: tuple[BinaryIO, ...] = ()
        self._first = {part.members[0].identity: part for part in contents.parts}
        self._places = {
            member.identity: (part, at) for part in contents.parts for at, member in enumerate(part.members)
        }
        self._inflated: tuple[Part, list[Lines] | None] | None = None

    def __enter__(self) -> Self:
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._contents.parts:
                self._open = tuple(
                    self._files.enter_context((self._folder / name).open("rb"))
                    for name in self._names.present
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def is_whole(self) -> bool:
        """Whether all documents are what the contents say."""
        return bool(self._open) and tuple(map(_whole, self._open)) == self._contents.documents

    def part_at(self, wanted: Sequence[Identity], at: int) -> tuple[Part, list[Section]] | None:
        """What stands and is what a section of *wanted* from *at* on would be, in each document."""
        part = self._first.get(wanted[at])
        if part is None:
            return None
        end = at + len(part.members)
        if not part.closed and end < len(wanted):
            return None
        if [member.identity for member in part.members] != list(wanted[at:end]):
            return None
        found = self._sections(part)
        return (part, found) if found else None

    def lines(self, identity: Identity) -> tuple[Member, Lines] | None:
        """The instance, if its lines stand."""
        part, at = self._places.get(identity, (None, 0))
        if part is None:
            return None
        if self._inflated is None or self._inflated[0] is not part:
            self._inflated = part, self._inflate(part)
        lines = self._inflated[1]
        if lines is None or _digest(lines[at]) != part.members[at].lines:
            return None
        return part.members[at], lines[at]

    def _sections(self, part: Part) -> list[Section] | None:
        """The section in each document; None if other bytes lie there in one of them."""
        found = [_read(file, place) for file, place in zip(self._open, part.places, strict=False)]
        whole = [section for section in found if section is not None]
        return whole if whole and len(whole) == len(self._names.present) else None

    def _inflate(self, part: Part) -> list[Lines] | None:
        found = self._sections(part)
        if found is None:
            return None
        columns = [inflate(section) for section in found]
        if not all(column is not None and len(column) == len(part.members) for column in columns):
            return None
        return [Lines(*present) for present in zip(*filter(None, columns), strict=True)]
