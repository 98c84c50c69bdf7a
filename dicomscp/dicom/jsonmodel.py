"""Headers as DICOM JSON (PS3.18 Annex F), compiled from the encoded bytes.

A dataset is walked once, element by element, and each element becomes its *fragment*, the bytes

    "00080060":{"vr":"CS","Value":["CT"]}

Most elements of a series repeat from instance to instance, so two things are remembered.  *Fragments*, by the
element's encoded bytes; and *runs*, elements of the top level that stood one after another byte for byte
alike, by the bytes of all of them: one comparison gives their joined fragments.  The first instance makes
runs of all it has; where a later one differs they are split, and what stands still long enough is joined
again, so that of a series only what varies is compiled.

Both are functions of their key alone: of the bytes (tags, VRs, values, everything inside a sequence); of what
their *context* fixes (byte order, implicit or explicit, character set); where the VR is not written and not
in the standard's dictionary by tag alone, also of the resolved VR or the private creator, which for a run is
within it or compared beside it.  What depends on anything else (a link to bulk data, an enclosing dataset) is
never remembered, and what depends on other elements (US or SS) is in no run.  A header is the same, byte for
byte, whatever is remembered.

Choices that Annex F leaves open:

- DS and IS are JSON numbers with the very digits of the dataset: a reader of 64-bit floats gets the nearest
  there is, as by converting the text.  A whole number that such a float would turn into another (beyond 2^53)
  is a string of its digits, as are SV and UV beyond 53 bits.  What is no number by the VR's rules, or out of
  the range of a 64-bit float, stays the string it is, and is counted.
- NaN and infinities of FL and FD are the strings "NaN", "Infinity" and "-Infinity", as fo-dicom and dicom-rs
  write and read them.
- Text is UTF-8, so (0008,0005), where there is one, says ISO_IR 192.  Bytes that are no text are U+FFFD.
- Padding is dropped: trailing everywhere, leading where PS3.5 Table 6.2-1 calls it insignificant.
- Numbers and binary values of big endian datasets are given in little endian order.
- A VR that is not written is that of PS3.5 A.1: OW for pixel data that are not encapsulated, overlays, curves
  and waveforms, whatever their bits allocated (section 8.3).  US or SS follows Pixel Representation, of the
  item itself or the nearest dataset around it.
- Binary values (OB OD OF OL OV OW UN) longer than a bound, and pixel data of any length, are links to bulk
  data (BulkDataURI); all other values are in the header, however long.

What cannot be read as it should is read as far as it can be, and counted in `Header.warnings`: of a sequence
in which the dataset ends, the items that are there; of damage in an item, what stands before it.
"""

import struct
from base64 import b64encode
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import orjson

from dicomscp.dicom.charset import CharacterSet, character_set
from dicomscp.dicom.dictionary import is_creator, known_vr, public_vr
from dicomscp.dicom.elements import (
    BIG,
    ITEM,
    ITEM_END,
    LITTLE,
    LONG_VRS,
    MAX_DEPTH,
    NO_VR,
    SEQUENCE_END,
    SHORT_VRS,
    UNDEFINED,
    Buffer,
    Element,
    Encoding,
    PrefixError,
    declared_encoding,
    encoding_of,
    inflate,
    inner_encoding,
    is_deflated,
    item_encoding,
    read_element,
    read_item,
)
from dicomscp.dicom.values import BINARY_VRS, CONVERTERS, Circumstances, little_endian
from dicomscp.errors import RefusedError

__all__ = ["PIXEL_TAGS", "Compiler", "Header", "PrefixError"]

PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})

_CHARSET = 0x00080005
_AVAILABLE_TRANSFER_SYNTAX_UID = 0x00083002
_PIXEL_REPRESENTATION = 0x00280103
_LUT_DESCRIPTOR = 0x00283002
_UTF_8 = b'"00080005":{"vr":"CS","Value":["ISO_IR 192"]}'

_WINDOW = 64 << 10  # bytes copied at a time: a header without long values
_MAX_KEY_BYTES = 4096  # longer elements hardly ever repeat
_ENTRY_BYTES = 250  # what two bytes objects and their place in a dictionary cost beside their content
_MAX_NEXT = 64  # character sets that may follow one
_PIECE_BYTES = 350  # the same of an element in a run
_LESSON = 4  # instances of which one is learned from, as long as nothing changes
_MAX_PATIENCE = 8  # lessons
_MAX_PIECES = 256  # elements in a run: what it costs to split it
_MAX_TRACE = 8192  # elements of one dataset that may come into runs; real ones have some hundreds

_MALFORMED = "{} elements could not be read"
_CUT_SHORT = "the dataset is cut short"
_TOO_DEEP = "{} sequences nest too deep"
_BAD_CHARSET = "{} character sets are unknown"
_BAD_ENCODING = "the dataset is not encoded as its transfer syntax says"
_TOO_LARGE = "the dataset inflates past what is read"

_Part: TypeAlias = tuple[int, bytes, dict[int, bytes] | None]
"""First tag, members joined by commas, and the members by tag if they are a run."""

_Piece: TypeAlias = tuple[int, bytes, bytes, int, bytes | None]
"""An element that may be in a run: tag, encoded bytes, fragment (b"" if it has no place in the header); where
its VR depends on a private creator, the tag of that and its fragment, else 0 and None."""


class Header:
    """The attributes of one instance as DICOM JSON; compares by what it says.

    *warnings* count what could not be read as it should; they hold no values.
    """

    __slots__ = ("_fragments", "_parts", "warnings")

    def __init__(self, parts: Sequence[_Part], warnings: tuple[str, ...]) -> None:
        self._parts = parts
        self._fragments: dict[int, bytes] | None = None
        self.warnings = warnings

    @property
    def body(self) -> bytes:
        """The members of the instance's JSON object, tags ascending, joined by commas, without the braces.

        It is joined each time it is asked for: until then, what a series has in common is held once.
        """
        return b",".join([part[1] for part in self._parts])

    @property
    def texts(self) -> list[bytes]:
        """The body in pieces, of members joined by commas; what a series has in common is the same object."""
        return [part[1] for part in self._parts]

    @property
    def fragments(self) -> dict[int, bytes]:
        """The members by tag, ascending, to be changed at will: `body` does not follow."""
        if self._fragments is None:
            self._fragments = {}
            for tag, text, members in self._parts:
                if members is None:
                    self._fragments[tag] = text
                else:
                    self._fragments.update(members)
        return self._fragments

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Header) and self.body == other.body and self.warnings == other.warnings

    def __hash__(self) -> int:
        return hash((self.body, self.warnings))

    def __repr__(self) -> str:
        return f"Header({self.body!r}, {self.warnings!r})"


class Compiler:
    """Compiles headers, and remembers the fragments of earlier ones.  For one thread at a time.

    *cache_bytes* bounds what is remembered.  Binary values of up to *inline_bytes* are part of the header,
    longer ones and all pixel data are links to bulk data.  Private elements that an explicit VR dataset
    writes as UN are read by the dictionary if *private_un* is "parse", and left as they are if it is "keep";
    standard elements, private creators and UN of undefined length, which can only be a sequence (PS3.5
    section 6.2.2, note 2), are always read.
    """

    def __init__(
        self,
        *,
        cache_bytes: int = 64 << 20,
        inline_bytes: int = 1024,
        private_un: Literal["parse", "keep"] = "parse",
    ) -> None:
        self._compilation = _Compilation(
            _Cache(cache_bytes), inline_bytes, keep_private_un=private_un == "keep"
        )

    def header(
        self,
        dataset: Buffer,
        transfer_syntax_uid: str,
        *,
        total_bytes: int,
        bulk_uri: str,
        default_charset: str = "",
        wanted: frozenset[int] | None = None,
    ) -> Header:
        """The header of *dataset*, which may be a prefix of *total_bytes*: bulk values are not needed.

        *bulk_uri* is put before the path of a bulk value: "/7FE00010", or "/00540016/1/00181078" in a
        sequence.  *default_charset* is used for a dataset that declares no character set.  If *wanted* is
        given, only these attributes of the top level are compiled.

        Raises PrefixError if the prefix does not suffice, RefusedError if nothing can be read.
        """
        compilation = self._compilation
        too_large = False
        if is_deflated(transfer_syntax_uid):
            if len(dataset) < total_bytes:
                raise PrefixError
            dataset, whole = inflate(dataset)
            total_bytes = len(dataset)
            too_large = not whole
        encoding, as_declared = _encoding(bytes(dataset[:6]), transfer_syntax_uid)
        needed = None if wanted is None else _needed(wanted)
        for ascending in (True, False):
            compilation.begin(bulk_uri)
            if too_large:
                compilation.warn(_TOO_LARGE)
            if not as_declared:
                compilation.warn(_BAD_ENCODING)
            level = _Level(compilation.context(encoding, _named_charset(default_charset)), dataset)
            level.wanted = needed
            if compilation.compile(level, total_bytes, wanted, ascending=ascending):
                break  # else some tag is not above the one before it: once more, the plain way
        parts, fragments = level.parts, level.fragments
        if not fragments and not parts and wanted is None:
            raise RefusedError("The dataset holds no element that can be read.")
        if default_charset:
            fragments[_CHARSET] = _UTF_8
        fragments[_AVAILABLE_TRANSFER_SYNTAX_UID] = _available(transfer_syntax_uid)
        if wanted is None:
            parts += [(tag, fragment, None) for tag, fragment in fragments.items()]
        else:
            parts += [(tag, fragment, None) for tag, fragment in fragments.items() if tag in wanted]
        parts.sort()  # by tag: no two are equal
        return Header(parts, compilation.told())


@lru_cache(maxsize=1024)
def _encoding(first: bytes, transfer_syntax_uid: str) -> tuple[Encoding, bool]:
    """How a dataset is written whose *first* bytes these are, and whether that is as it should be."""
    encoding = encoding_of(first, transfer_syntax_uid)
    return encoding, encoding == declared_encoding(transfer_syntax_uid)


@lru_cache(maxsize=64)
def _available(transfer_syntax_uid: str) -> bytes:
    return b'"00083002":{"vr":"UI","Value":[' + orjson.dumps(transfer_syntax_uid) + b"]}"


@lru_cache(maxsize=64)
def _needed(wanted: frozenset[int]) -> frozenset[int]:
    """*wanted* and what it takes to read them: the character set, the creators of private elements."""
    return wanted | {_CHARSET} | {tag & 0xFFFF0000 | tag >> 8 & 0xFF for tag in wanted if tag >> 16 & 1}


@lru_cache(maxsize=256)
def _named_charset(value: str) -> CharacterSet:
    """The character set that *value* of (0008,0005) names."""
    return character_set(tuple(term.strip(" \0") for term in value.split("\\")))


class _Run:
    """Elements of the top level that stood one after another, byte for byte alike, in several instances."""

    __slots__ = ("creators", "first", "head", "key", "last", "part", "pieces")

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self.pieces = pieces
        self.key = b"".join([piece[1] for piece in pieces])
        self.head = self.key[:4]
        self.first, self.last = pieces[0][0], pieces[-1][0]
        members = {piece[0]: piece[2] for piece in pieces if piece[2]}
        self.part: _Part | None = None
        if members:
            self.part = (self.first, b",".join(members.values()), members)
        # Creators before the run that VRs within it depend on, with their fragments.
        self.creators = {
            piece[3]: piece[4] for piece in pieces if piece[3] and not self.first <= piece[3] < piece[0]
        }

    def size(self) -> int:
        """What it costs in memory, about."""
        text = 0 if self.part is None else len(self.part[1])
        return 2 * (len(self.key) + text) + _PIECE_BYTES * len(self.pieces)


class _Seam:
    """A place where datasets came to differ: what stands there must stay alike before it may join a run."""

    __slots__ = ("calm", "key", "patience")

    def __init__(self) -> None:
        self.calm = 0
        self.patience = 0
        self.key: bytes | None = None

    def part(self) -> None:
        """It differed once more: it will have to stay alike for longer."""
        self.calm = 0
        self.patience = min(max(2 * self.patience, 1), _MAX_PATIENCE)

    def is_settled(self, key: bytes | None) -> bool:
        if key != self.key:
            self.key = key
            self.part()
        else:
            self.calm += 1
        return self.calm >= self.patience


class _Runs:
    """The runs of one context, one for each tag that one begins with.

    The first instance makes one run of all its elements.  Where a later one differs, the run is split, and
    what stands there is compiled by itself; what has stood still for some instances is joined again.
    """

    __slots__ = ("by_head", "seams", "size", "unlearned")

    def __init__(self) -> None:
        self.by_head: dict[bytes, _Run] = {}
        self.seams: dict[bytes, _Seam] = {}
        self.size = 0
        self.unlearned = _LESSON  # instances since the last that was learned from

    def put(self, run: _Run) -> None:
        self.drop(run.head)
        self.by_head[run.head] = run
        self.size += run.size()

    def drop(self, head: bytes) -> None:
        if (run := self.by_head.pop(head, None)) is not None:
            self.size -= run.size()

    def fitting(self, run: _Run, data: bytes, pos: int, level: "_Level") -> "_Run | None":
        """As much of *run* as *data* has at *pos*; that becomes a run, and so does what comes after."""
        if any(level.find(tag) != fragment for tag, fragment in run.creators.items()):
            self.drop(run.head)
            return None
        if data.startswith(run.key, pos):
            return run
        alike = 0
        for piece in run.pieces:
            if not data.startswith(piece[1], pos):
                break
            pos += len(piece[1])
            alike += 1
        self.drop(run.head)
        self.unlearned = _LESSON
        self.seams.setdefault(run.pieces[alike][1][:4], _Seam()).part()
        if rest := run.pieces[alike + 1 :]:
            self.put(_Run(rest))
        if not alike:
            return None
        run = _Run(run.pieces[:alike])
        self.put(run)
        return run

    def learn(self, trace: "Iterable[_Run | _Piece | None]") -> None:
        """Join what stood one after another in an instance; None is where nothing joins."""
        self.unlearned = 0
        stretch: list[_Run | _Piece] = []
        last = size = 0
        for part in trace:
            if part is None:
                self._join(stretch)
                stretch = []
                continue
            if isinstance(part, _Run):
                head, key, first, end, pieces = part.head, None, part.first, part.last, len(part.pieces)
            else:
                key, first, pieces = part[1], part[0], 1
                head, end = key[:4], first
            seam = self.seams.get(head)
            settled = seam is None or seam.is_settled(key)
            parted = size + pieces > _MAX_PIECES
            # Where a dataset may have none, these are put in.
            parted = parted or last < _CHARSET < first or last < _AVAILABLE_TRANSFER_SYNTAX_UID < first
            if not settled or parted or not stretch:
                self._join(stretch)
                stretch, size = [], 0
            if settled or key is None:
                stretch.append(part)
                size += pieces
            last = end
        self._join(stretch)

    def _join(self, stretch: "list[_Run | _Piece]") -> None:
        if not stretch or (len(stretch) == 1 and isinstance(stretch[0], _Run)):
            return
        pieces: list[_Piece] = []
        for part in stretch:
            if isinstance(part, _Run):
                self.drop(part.head)
                pieces += part.pieces
            else:
                pieces.append(part)
        self.put(_Run(pieces))


class _Context:
    """What fixes, together with its bytes, what an element says: and all that is known of such elements."""

    __slots__ = ("charset", "encoding", "given", "next", "old", "runs", "young")

    def __init__(self, encoding: Encoding, charset: CharacterSet, warn: Callable[[str], None]) -> None:
        self.encoding = encoding
        self.charset = charset
        self.given = Circumstances(encoding.little, charset, warn)
        self.young: dict[Hashable, bytes] = {}  # fragments by key
        self.old: dict[Hashable, bytes] = {}
        self.runs: dict[frozenset[int] | None, _Runs] = {}  # by what is wanted
        self.next: dict[bytes, _Context] = {}  # by what (0008,0005) says then


class _Cache:
    """What all contexts may remember.

    Fragments are kept in two generations: the young one takes what is new or asked for again; when it has
    grown to its bound, it becomes the old one, and what was old and not asked for is dropped.  Runs are
    dropped together; they are soon made again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_runs_bytes = max_bytes // 4
        self._max_young_bytes = max_bytes * 3 // 8
        self._young_bytes = 0
        self.contexts: dict[tuple[Encoding, CharacterSet], _Context] = {}

    def get(self, context: _Context, key: Hashable, size: int) -> bytes | None:
        """The fragment of *key*, of *size* bytes, if it is known."""
        fragment = context.young.get(key)
        if fragment is None and (fragment := context.old.get(key)) is not None:
            self.put(context, key, size, fragment)
        return fragment

    def put(self, context: _Context, key: Hashable, size: int, fragment: bytes) -> None:
        context.young[key] = fragment
        self._young_bytes += size + len(fragment) + _ENTRY_BYTES
        if self._young_bytes > self._max_young_bytes:
            self._young_bytes = 0
            for each in self.contexts.values():
                each.old, each.young = each.young, {}

    def learn(self, runs: _Runs, trace: "list[_Run | _Piece | None]") -> None:
        """Let *runs* learn from an instance, within the bound."""
        runs.unlearned += 1
        if runs.unlearned < _LESSON or not self._max_runs_bytes:
            return
        runs.learn(trace)
        if self._runs_bytes() > self._max_runs_bytes:
            for context in self.contexts.values():
                context.runs = {}

    def _runs_bytes(self) -> int:
        return sum(
            runs.size + _ENTRY_BYTES * len(runs.seams)
            for context in self.contexts.values()
            for runs in context.runs.values()
        )


class _Level:
    """A dataset on the way: the top level, or an item of a sequence."""

    __slots__ = (
        "ascending", "context", "data", "depth", "encoding", "ended", "ends", "fragments", "last", "number",
        "parent", "parts", "runs", "sequence", "signed", "signed_sought", "start", "trace", "wanted",
    )  # fmt: skip

    def __init__(
        self, context: _Context, data: Buffer, parent: "_Level | None" = None, start: int = 0
    ) -> None:
        self.context = context
        self.encoding = context.encoding
        self.data = data
        self.start = start  # where its elements begin in data
        self.parent = parent
        self.sequence = self.number = 0  # the tag of what it is an item of, and which item
        self.wanted: frozenset[int] | None = None
        self.fragments: dict[int, bytes] = {}
        self.ended = False  # its delimiter has been met, or it cannot be read on
        self.signed: bool | None = None  # its own Pixel Representation
        self.signed_sought = False
        self.trace: list[_Run | _Piece | None] | None = None
        self.runs = _NO_RUNS
        self.depth: int = 0 if parent is None else parent.depth + 1
        # Of undefined lengths in what is being walked.
        self.ends: dict[int, int] = {} if parent is None else parent.ends
        if parent is None:
            # Runs, in the order of the dataset as long as that ascends.
            self.parts: list[_Part] = []
            self.last = -1
            self.ascending = True

    def path(self) -> str:
        """Of the item, for links to bulk data."""
        if self.parent is None:
            return ""
        return f"{self.parent.path()}/{self.sequence:08X}/{self.number}"

    def find(self, tag: int) -> bytes | None:
        """The fragment of *tag*, if there was one."""
        fragment = self.fragments.get(tag)
        if fragment is None and self.parent is None:
            # The last run that begins at it or before.
            at = bisect_right(self.parts, tag, key=itemgetter(0))
            members = self.parts[at - 1][2] if at else None
            fragment = members.get(tag) if members is not None else None
        return fragment


_NO_RUNS = _Runs()


class _Compilation:
    """One header in the making, again and again."""

    def __init__(self, cache: _Cache, inline_bytes: int, *, keep_private_un: bool) -> None:
        self._cache = cache
        self._inline_bytes = inline_bytes
        self._keep_private_un = keep_private_un
        self.begin("")

    def begin(self, bulk_uri: str) -> None:
        self._bulk_uri = bulk_uri
        self._warnings: dict[str, int] = {}
        # Counts what makes a fragment depend on more than its key: whoever sees it rise keeps nothing.
        self._impure = 0
        self._wanted: frozenset[int] | None = None

    def warn(self, what: str) -> None:
        self._warnings[what] = self._warnings.get(what, 0) + 1
        self._impure += 1

    def told(self) -> tuple[str, ...]:
        return tuple(what.format(count) for what, count in sorted(self._warnings.items()))

    def context(self, encoding: Encoding, charset: CharacterSet) -> _Context:
        context = self._cache.contexts.get((encoding, charset))
        if context is None:
            context = _Context(encoding, charset, self.warn)
            self._cache.contexts[encoding, charset] = context
        return context

    def compile(self, level: _Level, total: int, wanted: frozenset[int] | None, *, ascending: bool) -> bool:
        """Fill *level*, the top level of *total* bytes.

        With *ascending*, runs serve, and False is returned if some element had to come before one that had
        been met: then nothing counts.
        """
        self._wanted = wanted
        if ascending:
            level.trace = []
        self._enter_context(level, level.context)
        self._compile_windows(level, memoryview(level.data), total)
        if not level.ascending:
            return False
        self._learn(level)
        return True

    def _learn(self, level: _Level) -> None:
        if level.trace is not None and level.ascending:
            self._cache.learn(level.runs, level.trace)
            level.trace = []

    def _enter_context(self, level: _Level, context: _Context) -> None:
        level.context = context
        if level.trace is not None:
            runs = context.runs.get(self._wanted)
            if runs is None:
                runs = context.runs[self._wanted] = _Runs()
            level.runs = runs

    def _compile_windows(self, level: _Level, view: memoryview, total: int) -> None:
        """Window by window; an element that does not fit into one is read alone."""
        pos = 0
        while pos < len(view) and not level.ended:
            window = bytes(view[pos : pos + _WINDOW])
            level.ends = {}
            pos += self._walk(level, window, 0, len(window))
            if pos == len(view) or level.ended:
                break
            try:
                pos = self._long_element(level, view, pos, total)
            except RefusedError:
                self.warn(_MALFORMED)
                level.ended = True
            except PrefixError:
                if level.wanted is None or not _is_past(level, view, pos):
                    raise
                return
        if pos < total and len(view) < total and not level.ended:
            raise PrefixError

    def _long_element(self, level: _Level, view: memoryview, pos: int, total: int) -> int:
        """Compile the element at *pos*, which crosses the end of a window; return its end."""
        if level.trace is not None:
            level.trace.append(None)
        ends: dict[int, int] = {}
        try:
            element = read_element(view, pos, level.encoding, ends=ends)
        except PrefixError:
            if len(view) < total:
                raise
            if any(view[pos:]):
                self.warn(_CUT_SHORT)
                self._what_is_left(level, view, pos)
            return len(view)
        if element.end > total:
            self.warn(_CUT_SHORT)
            if len(view) == total:
                self._what_is_left(level, view, pos)
        if _is_listed(element.tag, level.wanted):
            self._compile_alone(level, view, element, total, ends)
        if len(view) < element.end < total:
            raise PrefixError
        return min(element.end, total)

    def _what_is_left(self, level: _Level, view: memoryview, pos: int) -> None:
        """Compile the items, as far as they are there, of a sequence at *pos* in which the dataset ends."""
        size = len(view) - pos
        ends = {pos + 8: len(view), pos + 12: len(view)}  # wherever its value begins
        try:
            element = read_element(view, pos, level.encoding, ends=ends)
        except PrefixError:
            return
        vr, _ = self._vr(level, element.tag, element.vr, element.length)
        if vr == "SQ" and _is_listed(element.tag, level.wanted):
            level.ends = {}
            there = Element(element.tag, element.vr, 0, element.value - pos, element.length, size)
            self._place(level, element.tag, self._fragment(level, there, vr, bytes(view[pos:])))

    def _compile_alone(
        self, level: _Level, view: memoryview, element: Element, total: int, ends: dict[int, int]
    ) -> None:
        vr, _ = self._vr(level, element.tag, element.vr, element.length)
        if self._is_bulk(element.tag, vr, element.length):
            self._place(
                level, element.tag, _opening(element.tag, vr) + self._bulk_link(level, element.tag) + b"}"
            )
        elif element.end <= len(view):
            chunk = bytes(view[element.start : element.end])
            level.ends = {start - element.start: end - element.start for start, end in ends.items()}
            self._element(level, chunk, 0, len(chunk))
            level.ends = {}
        elif len(view) < total:
            raise PrefixError

    def _place(self, level: _Level, tag: int, fragment: bytes, piece: _Piece | None = None) -> None:
        """Give *tag* its *fragment*, which is a function of *piece* if there is one."""
        level.fragments[tag] = fragment
        if level.trace is not None:
            if len(level.trace) < _MAX_TRACE:
                level.trace.append(piece)
            if tag <= level.last:
                level.ascending = False
            level.last = tag

    def _walk(self, level: _Level, data: bytes, pos: int, end: int) -> int:
        """Compile the elements of *data* from *pos*; return where the first stands that ends past *end*."""
        if level.encoding.explicit:
            return self._walk_explicit(level, data, pos, end)
        return self._walk_implicit(level, data, pos, end)

    def _walk_explicit(  # noqa: C901, PLR0912 -- one plain loop: a step costs as much as a call
        self, level: _Level, data: bytes, pos: int, end: int
    ) -> int:
        """As `_walk`."""
        reader = LITTLE if level.encoding.little else BIG
        head, long_length = reader.explicit.unpack_from, reader.ulong.unpack_from
        fragments, wanted, trace = level.fragments, level.wanted, level.trace
        runs, context = level.runs.by_head, level.context
        get = context.young.get
        last = end - 8
        while pos <= last:
            if runs:
                run = runs.get(data[pos : pos + 4])
                if run is not None and (stop := self._follow(level, run, data, pos)) > pos:
                    pos = stop
                    continue
            group, number, vr, length = head(data, pos)
            if vr in SHORT_VRS:
                value = pos + 8
            elif vr in LONG_VRS and pos + 12 <= end:
                value = pos + 12
                length = long_length(data, pos + 8)[0]
            elif group == 0xFFFE and number == 0xE00D and vr == NO_VR and not length and level.depth:
                level.ended = True
                return pos + 8
            else:
                value, length = -1, UNDEFINED
            stop = value + length if length != UNDEFINED else level.ends.get(value, end + 1)
            tag = group << 16 | number
            if stop > end:
                if length != UNDEFINED:
                    return pos
            elif number and tag != _CHARSET and 2 < group < 0xFFFE:
                if wanted is not None and tag not in wanted:
                    self._pass_by(level, tag, data, pos, stop)
                    pos = stop
                    continue
                if trace is None and stop - pos <= _MAX_KEY_BYTES:
                    fragment = get(data[pos:stop])
                    if fragment is not None:
                        fragments[tag] = fragment
                        pos = stop
                        continue
                self._compile(level, Element._make((tag, vr, pos, value, length, stop)), data)
                pos = stop
                continue
            stop = self._element_or_stop(level, data, pos, end)
            if stop == pos or level.ended:
                return stop
            pos = stop
            if level.context is not context:
                runs, context, trace = level.runs.by_head, level.context, level.trace
                get = context.young.get
        return pos

    def _walk_implicit(  # noqa: C901 -- the same loop for the other framing
        self, level: _Level, data: bytes, pos: int, end: int
    ) -> int:
        """As `_walk`; the key of a private element also names its creator."""
        head = (LITTLE if level.encoding.little else BIG).implicit.unpack_from
        fragments, wanted, trace = level.fragments, level.wanted, level.trace
        runs, context = level.runs.by_head, level.context
        get = context.young.get
        last = end - 8
        while pos <= last:
            if runs:
                run = runs.get(data[pos : pos + 4])
                if run is not None and (stop := self._follow(level, run, data, pos)) > pos:
                    pos = stop
                    continue
            group, number, length = head(data, pos)
            value = pos + 8
            stop = value + length if length != UNDEFINED else level.ends.get(value, end + 1)
            tag = group << 16 | number
            if stop > end:
                if length != UNDEFINED:
                    return pos
            elif number and tag != _CHARSET and 2 < group < 0xFFFE:
                if wanted is not None and tag not in wanted:
                    self._pass_by(level, tag, data, pos, stop)
                    pos = stop
                    continue
                if trace is None and stop - pos <= _MAX_KEY_BYTES:
                    key: Hashable = data[pos:stop]
                    if group & 1 and number > 0xFF:
                        key = (fragments.get(group << 16 | number >> 8), key)
                    fragment = get(key)
                    if fragment is not None:
                        fragments[tag] = fragment
                        pos = stop
                        continue
                self._compile(level, Element._make((tag, b"", pos, value, length, stop)), data)
                pos = stop
                continue
            stop = self._element_or_stop(level, data, pos, end)
            if stop == pos or level.ended:
                return stop
            pos = stop
            if level.context is not context:
                runs, context, trace = level.runs.by_head, level.context, level.trace
                get = context.young.get
        return pos

    def _follow(self, level: _Level, run: _Run, data: bytes, pos: int) -> int:
        """Take over as much of *run* as *data* has at *pos*; return where that ends."""
        if run.creators or not data.startswith(run.key, pos):
            fitting = level.runs.fitting(run, data, pos, level)
            if fitting is None:
                return pos
            run = fitting
        if run.part is not None:
            level.parts.append(run.part)
        if run.first <= level.last:
            level.ascending = False
        level.last = run.last
        if level.trace is not None and len(level.trace) < _MAX_TRACE:
            level.trace.append(run)
        return pos + len(run.key)

    def _pass_by(self, level: _Level, tag: int, data: bytes, pos: int, stop: int) -> None:
        """Note an element that has no place in the header."""
        if level.trace is not None:
            if len(level.trace) < _MAX_TRACE:
                piece = (tag, data[pos:stop], b"", 0, None)
                level.trace.append(piece if stop - pos <= _MAX_KEY_BYTES else None)
            if tag <= level.last:
                level.ascending = False
            level.last = tag

    def _element_or_stop(self, level: _Level, data: bytes, pos: int, end: int) -> int:
        """The end of the element at *pos*, compiled, or *pos* if it does not end within *end*."""
        try:
            return self._element(level, data, pos, end)
        except PrefixError:
            return pos
        except RefusedError:
            self.warn(_MALFORMED)
            level.ended = True
            return pos

    def _element(self, level: _Level, data: bytes, pos: int, end: int) -> int:
        element = read_element(data, pos, level.encoding, level.depth, level.ends)
        if element.end > end:
            raise PrefixError
        if not _is_listed(element.tag, level.wanted):
            level.ended = element.tag == ITEM_END and level.parent is not None
            self._pass_by(level, element.tag, data, pos, element.end)
        elif element.tag == _CHARSET:
            self._enter_charset(level, data[element.value : element.end])
        else:
            self._compile(level, element, data)
        return element.end

    def _compile(  # noqa: C901 -- run for every element that is in no run: one plain piece
        self, level: _Level, element: Element, data: bytes
    ) -> None:
        """Compile *element* of *data*, or find it among those known."""
        tag, written, start, _, length, end = element
        creator, creator_fragment, ambiguous = 0, None, False
        vr = _VRS.get(written)
        if vr is None:
            if tag >> 16 & 1 and not is_creator(tag):
                creator = tag & 0xFFFF0000 | tag >> 8 & 0xFF
                creator_fragment = level.find(creator)
            vr, ambiguous = self._vr(level, tag, written, length)
        size = end - start
        if size > _MAX_KEY_BYTES:
            self._place(level, tag, self._fragment(level, element, vr, data))
            return
        encoded = data[start:end]
        key: Hashable = encoded
        if ambiguous:
            key = (vr, encoded)
        elif creator:
            key = (creator_fragment, encoded)
        impure = self._impure
        seam = level.runs.seams.get(encoded[:4]) if level.trace is not None else None
        if seam is not None and seam.patience == _MAX_PATIENCE:  # hardly worth remembering
            fragment = self._fragment(level, element, vr, data)
        elif (known := self._cache.get(level.context, key, size)) is not None:
            fragment = known
        else:
            fragment = self._fragment(level, element, vr, data)
            if self._impure == impure:
                self._cache.put(level.context, key, size, fragment)
        if level.trace is None:
            level.fragments[tag] = fragment
        elif (
            self._impure == impure
            and not ambiguous
            and tag != _AVAILABLE_TRANSFER_SYNTAX_UID  # ours takes its place
            and (self._wanted is None or tag in self._wanted)
        ):
            self._place(level, tag, fragment, (tag, encoded, fragment, creator, creator_fragment))
        else:
            self._place(level, tag, fragment)

    def _vr(self, level: _Level, tag: int, written: bytes, length: int) -> tuple[str, bool]:
        """The VR of an element, and whether it depends on other elements."""
        if not written and not tag >> 16 & 1 and length != UNDEFINED:
            vr = public_vr(tag)
            if len(vr) == 2:
                return vr, False
        unwritten = written in (b"", b"UN")
        undefined_length = length == UNDEFINED
        if (
            self._keep_private_un
            and written == b"UN"
            and tag >> 16 & 1
            and not (is_creator(tag) or undefined_length)
        ):
            return "UN", False
        creator = _creator(level, tag) if unwritten else ""
        vr = known_vr(tag, written, undefined_length=undefined_length, creator=creator)
        if len(vr) == 2:
            return vr, False
        if vr == "OB or OW":
            return "OB" if undefined_length else "OW", False
        if vr == "US or SS":
            return "SS" if self._is_signed(level) else "US", True
        if vr == "US or OW":  # PS3.3 section C.11.1.1.1: a LUT of one entry is a number
            return "US" if _first_number(level, _LUT_DESCRIPTOR) == 1 else "OW", True
        return "OW" if vr == "US or SS or OW" else "UN", False

    def _is_signed(self, level: _Level) -> bool:
        """Pixel Representation of *level*, or else of what it is in."""
        nearest: _Level | None = level
        while nearest is not None:
            if (signed := _own_signedness(nearest)) is not None:
                return signed
            nearest = nearest.parent
            self._impure += 1
        return False

    def _enter_charset(self, level: _Level, value: bytes) -> None:
        self._place(level, _CHARSET, _UTF_8)
        if not value.strip(b" \0\\"):
            return
        self._learn(level)
        context = level.context.next.get(value)
        if context is None:
            context = self.context(level.encoding, _named_charset(value.decode("latin-1")))
            if len(level.context.next) < _MAX_NEXT:
                level.context.next[value] = context
        self._enter_context(level, context)
        if not context.charset.known:
            self.warn(_BAD_CHARSET)

    def _is_bulk(self, tag: int, vr: str, length: int) -> bool:
        if not length:
            return False
        return tag in PIXEL_TAGS or (vr in BINARY_VRS and length > self._inline_bytes)

    def _fragment(self, level: _Level, element: Element, vr: str, data: bytes) -> bytes:
        tag, written, _, start, length, end = element
        opening = _opening(tag, vr)
        if not length:
            return opening + b"}"
        converter = CONVERTERS.get(vr)
        if converter is not None and tag not in PIXEL_TAGS:
            given = level.context.given
            if written == b"UN" and not given.little:
                given = given._replace(little=True)
            values = converter(data[start:end], given, vr)
            return opening + b',"Value":' + values + b"}" if values else opening + b"}"
        if vr == "SQ":
            return self._sequence(level, element, opening, data)
        if self._is_bulk(tag, vr, length):
            return opening + self._bulk_link(level, tag) + b"}"
        binary = data[start:end]
        if not level.encoding.little and written != b"UN":
            binary = little_endian(binary, vr)
        return opening + b',"InlineBinary":"' + b64encode(binary) + b'"}'

    def _bulk_link(self, level: _Level, tag: int) -> bytes:
        self._impure += 1
        return b',"BulkDataURI":' + orjson.dumps(f"{self._bulk_uri}{level.path()}/{tag:08X}")

    def _sequence(self, level: _Level, element: Element, opening: bytes, data: bytes) -> bytes:
        """The fragment of a sequence; what cannot be read of its items is warned of and left out."""
        if level.depth + 1 >= MAX_DEPTH:
            self.warn(_TOO_DEEP)
            return opening + b"}"
        encoding, pos, stop = inner_encoding(element.vr, level.encoding), element.value, element.end
        out = [opening + b',"Value":[']
        number = 0
        while pos < stop:
            try:
                tag, length = read_item(data, pos, encoding.little)
            except PrefixError:
                tag, length = 0, 0
            pos += 8
            if tag != ITEM:
                if tag != SEQUENCE_END:
                    self.warn(_MALFORMED)
                break
            number += 1
            end = stop if length == UNDEFINED else pos + length
            item = self._item(level, data, pos, encoding)
            item.sequence, item.number = element.tag, number
            reached = self._walk(item, data, pos, min(end, stop))
            out.append(b"{" if number == 1 else b",{")
            out.append(b",".join(_ascending(item.fragments)))
            out.append(b"}")
            if length != UNDEFINED and reached != end:
                self.warn(_MALFORMED)
            elif length == UNDEFINED and not item.ended:
                self.warn(_MALFORMED)
                break  # nobody knows where the next begins
            pos = reached if length == UNDEFINED else end
        if number == 0:
            return opening + b"}"
        out.append(b"]}")
        return b"".join(out)

    def _item(self, level: _Level, data: bytes, pos: int, encoding: Encoding) -> _Level:
        """The item of a sequence in *level* whose elements begin at *pos*, in *encoding* or another."""
        item = _Level(level.context, data, level, pos)
        if not encoding.explicit or data[pos + 4 : pos + 6] not in SHORT_VRS:
            encoding = item_encoding(data, pos, encoding)
        if encoding != level.encoding:
            item.context, item.encoding = self.context(encoding, level.context.charset), encoding
        return item


_VRS = {vr: vr.decode("ascii") for vr in SHORT_VRS | LONG_VRS if vr != b"UN"}


@lru_cache(maxsize=8192)
def _opening(tag: int, vr: str) -> bytes:
    return b'"%08X":{"vr":"%b"' % (tag, vr.encode("ascii"))


def _is_listed(tag: int, wanted: frozenset[int] | None) -> bool:
    """Whether an element has a place in the header, as commands, group 2, lengths and delimiters have not."""
    return bool(tag & 0xFFFF) and tag >> 16 not in (0, 2, 0xFFFE) and (wanted is None or tag in wanted)


def _is_past(level: _Level, view: memoryview, pos: int) -> bool:
    """Whether the element at *pos*, in ascending order, comes after all that is wanted."""
    tag = bytes(view[pos : pos + 4])
    if len(tag) < 4 or not level.wanted:
        return False
    group, number = struct.unpack("<HH" if level.encoding.little else ">HH", tag)
    return bool(group << 16 | number > max(level.wanted))


def _ascending(fragments: dict[int, bytes]) -> Iterable[bytes]:
    tags = list(fragments)
    return fragments.values() if tags == sorted(tags) else [fragments[tag] for tag in sorted(tags)]


def _creator(level: _Level, tag: int) -> str:
    """The private creator of the block that *tag* is in; "" if there is none."""
    if not tag >> 16 & 1:
        return ""
    value = _values(level.find(tag & 0xFFFF0000 | tag >> 8 & 0xFF))
    return value[0] if value and isinstance(value[0], str) else ""


def _values(fragment: bytes | None) -> list[Any]:
    if fragment is None:
        return []
    (attribute,) = orjson.loads(b"{" + fragment + b"}").values()
    values: list[Any] = attribute.get("Value", [])
    return values


def _first_number(level: _Level, tag: int) -> Any:
    return next(iter(_values(level.find(tag))), None)


def _own_signedness(level: _Level) -> bool | None:
    """Whether Pixel Representation of *level* itself says signed; None if it says nothing."""
    if level.signed is None and not level.signed_sought:
        level.signed_sought = True
        representation = _first_number(level, _PIXEL_REPRESENTATION)
        if representation is None:
            representation = _look_ahead(level, _PIXEL_REPRESENTATION)
        level.signed = None if representation is None else representation != 0
    return level.signed


def _look_ahead(level: _Level, wanted: int) -> int | None:
    """The first 16-bit number of an element that may stand after the one being compiled."""
    pos, tag = level.start, 0
    try:
        while tag < wanted:
            # Of the top level, data is the dataset, while ends are those of a part of it.
            ends = None if level.parent is None else level.ends
            element = read_element(level.data, pos, level.encoding, level.depth, ends)
            tag, pos = element.tag, element.end
            if tag == wanted and element.length >= 2:
                value = bytes(level.data[element.value : element.value + 2])
                return int.from_bytes(value, "little" if level.encoding.little else "big")
    except (PrefixError, RefusedError):
        return None  # then it is told by nobody, and warned of where it is read
    return None
