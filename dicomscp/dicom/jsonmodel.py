"""Headers as DICOM JSON (PS3.18 Annex F), compiled from the encoded bytes.

A dataset is walked once, element by element, and each element becomes its *fragment*, the bytes

    "00080060":{"vr":"CS","Value":["CT"]}

Most elements of a series repeat from instance to instance, so fragments are kept by the element's encoded
bytes and most elements cost two dictionary look-ups.  A fragment is a function of its key alone: of the
element's bytes (tag, VR, value, everything inside a sequence); of what its *context* fixes (byte order,
implicit or explicit, character set); where the VR is not written and not in the standard's dictionary by
tag alone, also of the resolved VR or the private creator.  What depends on anything else (a link to bulk
data, an enclosing dataset) is never kept.

Choices that Annex F leaves open:

- DS and IS are JSON numbers with the very digits of the dataset.  What is no number by the VR's rules, or is
  out of the range of a 64-bit float, stays a string, as do SV and UV beyond 53 bits.
- NaN and infinities of FL and FD are the strings "NaN", "Infinity" and "-Infinity", as fo-dicom and dicom-rs
  write and read them.
- Text is UTF-8, so (0008,0005), where there is one, says ISO_IR 192.
- Padding is dropped: trailing everywhere, leading where PS3.5 Table 6.2-1 calls it insignificant.
- Numbers and binary values of big endian datasets are given in little endian order.

What cannot be read as it should is read as far as it can be, and counted in `Header.warnings`.
"""

import math
import re
import struct
from array import array
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from dicomscp.dicom.charset import CharacterSet, character_set, decode
from dicomscp.dicom.dictionary import is_creator, known_vr
from dicomscp.dicom.elements import (
    BIG,
    ITEM,
    ITEM_END,
    LITTLE,
    MAX_DEPTH,
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
from dicomscp.errors import RefusedError

__all__ = ["BINARY_VRS", "PIXEL_TAGS", "Compiler", "Header", "PrefixError", "little_endian"]

BINARY_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})

_CHARSET = 0x00080005
_AVAILABLE_TRANSFER_SYNTAX_UID = 0x00083002
_PIXEL_REPRESENTATION = 0x00280103
_LUT_DESCRIPTOR = 0x00283002
_UTF_8 = b'"00080005":{"vr":"CS","Value":["ISO_IR 192"]}'

_WINDOW = 64 << 10  # bytes copied at a time: a header without long values
_MAX_KEY_BYTES = 4096  # longer elements hardly ever repeat
_ENTRY_BYTES = 250  # what two bytes objects and their place in a dictionary cost beside their content
_MAX_SAFE_INTEGER = (1 << 53) - 1

_MALFORMED = "{} elements could not be read"
_CUT_SHORT = "the dataset is cut short"
_TOO_DEEP = "{} sequences nest too deep"
_BAD_TEXT = "{} texts hold bytes outside their character set"
_BAD_NUMBER = "{} numbers are not as their VR demands"
_BAD_LENGTH = "{} values have a length that does not fit their VR"
_BAD_CHARSET = "{} character sets are unknown"
_BAD_ENCODING = "the dataset is not encoded as its transfer syntax says"
_TOO_LARGE = "the dataset inflates past what is read"


@dataclass(frozen=True, slots=True)
class Header:
    """The attributes of one instance as DICOM JSON.

    *fragments* are by tag, ascending: `b"{" + b",".join(fragments.values()) + b"}"` is the instance.
    *warnings* count what could not be read as it should; they hold no values.
    """

    fragments: dict[int, bytes]
    warnings: tuple[str, ...]

    @property
    def body(self) -> bytes:
        """The members joined, without braces."""
        return b",".join(self.fragments.values())


class Compiler:
    """Compiles headers, and remembers the fragments of earlier ones.  For one thread at a time.

    *cache_bytes* bounds what is remembered.  Binary values of up to *inline_bytes* are part of the header,
    longer ones and all pixel data are links to bulk data.
    """

    def __init__(self, *, cache_bytes: int = 64 << 20, inline_bytes: int = 1024) -> None:
        self._cache = _Cache(cache_bytes)
        self._inline_bytes = inline_bytes

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
        compilation = _Compilation(self._cache, self._inline_bytes, bulk_uri)
        if is_deflated(transfer_syntax_uid):
            if len(dataset) < total_bytes:
                raise PrefixError
            dataset, whole = inflate(dataset)
            total_bytes = len(dataset)
            if not whole:
                compilation.warn(_TOO_LARGE)
        level = _Level(
            encoding_of(dataset, transfer_syntax_uid),
            character_set(tuple(default_charset.split("\\"))),
            dataset,
            wanted=wanted if wanted is None else _needed(wanted),
        )
        if level.encoding != declared_encoding(transfer_syntax_uid):
            compilation.warn(_BAD_ENCODING)
        compilation.compile(level, memoryview(dataset), total_bytes)
        if not level.fragments and wanted is None:
            raise RefusedError("The dataset holds no element that can be read.")
        fragments = level.fragments
        if default_charset:
            fragments[_CHARSET] = _UTF_8
        fragments[_AVAILABLE_TRANSFER_SYNTAX_UID] = (
            b'"00083002":{"vr":"UI","Value":[' + orjson.dumps(transfer_syntax_uid) + b"]}"
        )
        if wanted is not None:
            fragments = {tag: fragment for tag, fragment in fragments.items() if tag in wanted}
        return Header(dict(sorted(fragments.items())), compilation.told())


def _needed(wanted: frozenset[int]) -> frozenset[int]:
    """*wanted* and what it takes to read them: the character set, the creators of private elements."""
    return wanted | {_CHARSET} | {tag & 0xFFFF0000 | tag >> 8 & 0xFF for tag in wanted if tag >> 16 & 1}


class _Cache:
    """Fragments by context and key, in two generations.

    The young one takes what is new or asked for again; when it has grown to half of the bound, it becomes the
    old one, and what was old and not asked for is dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        self._half = max_bytes // 2
        self._bytes = 0
        self._young: dict[Hashable, dict[Hashable, bytes]] = {}
        self._old: dict[Hashable, dict[Hashable, bytes]] = {}

    def table(self, context: Hashable) -> dict[Hashable, bytes]:
        """The young fragments of *context*: what is found there is right for ever, what is not may be old."""
        table = self._young.get(context)
        if table is None:
            self._bytes += _ENTRY_BYTES * 4
            table = self._young[context] = {}
        return table

    def get(self, context: Hashable, key: Hashable, size: int) -> bytes | None:
        """The fragment of *key*, of *size* bytes, if it is known."""
        fragment = self.table(context).get(key)
        if fragment is None and context in self._old:
            fragment = self._old[context].get(key)
            if fragment is not None:
                self.put(context, key, size, fragment)
        return fragment

    def put(self, context: Hashable, key: Hashable, size: int, fragment: bytes) -> None:
        self.table(context)[key] = fragment
        self._bytes += size + len(fragment) + _ENTRY_BYTES
        if self._bytes > self._half:
            self._old, self._young, self._bytes = self._young, {}, 0


@dataclass(slots=True, eq=False)
class _Level:
    """A dataset on the way: the top level, or an item of a sequence."""

    encoding: Encoding
    charset: CharacterSet
    data: Buffer
    start: int = 0  # where its elements begin in data
    parent: "_Level | None" = None
    path: str = ""  # of the item, for links to bulk data
    depth: int = 0
    wanted: frozenset[int] | None = None
    fragments: dict[int, bytes] = field(default_factory=dict)
    context: tuple[Encoding, CharacterSet] = field(init=False)
    ended: bool = False  # its delimiter has been met, or it cannot be read on
    signed: bool | None = None  # its own Pixel Representation
    signed_sought: bool = False
    ends: dict[int, int] = field(default_factory=dict)  # of undefined lengths in what is being walked

    def __post_init__(self) -> None:
        self.context = (self.encoding, self.charset)


class _Compilation:
    """One header in the making."""

    def __init__(self, cache: _Cache, inline_bytes: int, bulk_uri: str) -> None:
        self._cache = cache
        self._inline_bytes = inline_bytes
        self._bulk_uri = bulk_uri
        self._warnings: Counter[str] = Counter()
        # Counts what makes a fragment depend on more than its key: whoever sees it rise keeps nothing.
        self._impure = 0

    def warn(self, what: str) -> None:
        self._warnings[what] += 1
        self._impure += 1

    def told(self) -> tuple[str, ...]:
        return tuple(what.format(count) for what, count in sorted(self._warnings.items()))

    def compile(self, level: _Level, view: memoryview, total: int) -> None:
        """Fill *level* from *view*, window by window; an element that does not fit into one is read alone."""
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
        try:
            element = read_element(view, pos, level.encoding)
        except PrefixError:
            if len(view) < total:
                raise
            if any(view[pos:]):
                self.warn(_CUT_SHORT)
            return len(view)
        if element.end > total:
            self.warn(_CUT_SHORT)
        if _is_listed(element.tag, level.wanted):
            self._compile_alone(level, view, element, total)
        if len(view) < element.end < total:
            raise PrefixError
        return min(element.end, total)

    def _compile_alone(self, level: _Level, view: memoryview, element: Element, total: int) -> None:
        vr, _ = self._vr(level, element)
        if self._is_bulk(element, vr):
            body = self._bulk_link(level, element.tag)
            level.fragments[element.tag] = self._fragment(element.tag, vr, body)
        elif element.end <= len(view):
            chunk = bytes(view[element.start : element.end])
            level.ends = {}
            self._element(level, chunk, 0, len(chunk))
        elif len(view) < total:
            raise PrefixError

    def _walk(self, level: _Level, data: bytes, pos: int, end: int) -> int:
        """Compile the elements of *data* from *pos*; return where the first stands that ends past *end*."""
        if level.encoding.explicit:
            return self._walk_explicit(level, data, pos, end)
        return self._walk_implicit(level, data, pos, end)

    def _walk_explicit(self, level: _Level, data: bytes, pos: int, end: int) -> int:
        """As `_walk`.  Measured: the plain loop over what is known already costs 0.35 us an element."""
        head = (LITTLE if level.encoding.little else BIG).explicit.unpack_from
        fragments, wanted = level.fragments, level.wanted
        context = level.context
        get = self._cache.table(context).get
        last = end - 8
        while pos <= last:
            group, number, vr, length = head(data, pos)
            stop = pos + 8 + length
            if vr in SHORT_VRS and stop <= end:
                tag = group << 16 | number
                if wanted is not None and tag not in wanted:
                    pos = stop
                    continue
                fragment = get(data[pos:stop])
                if fragment is not None:
                    fragments[tag] = fragment
                    pos = stop
                    continue
            stop = self._element_or_stop(level, data, pos, end)
            if stop == pos or level.ended:
                return stop
            pos = stop
            if level.context is not context:
                context = level.context
                get = self._cache.table(context).get
        return pos

    def _walk_implicit(self, level: _Level, data: bytes, pos: int, end: int) -> int:
        """As `_walk_explicit`; the key of a private element also names its creator."""
        head = (LITTLE if level.encoding.little else BIG).implicit.unpack_from
        fragments, wanted = level.fragments, level.wanted
        context = level.context
        get = self._cache.table(context).get
        last = end - 8
        while pos <= last:
            group, number, length = head(data, pos)
            stop = pos + 8 + length
            if length <= _MAX_KEY_BYTES and stop <= end:
                tag = group << 16 | number
                if wanted is not None and tag not in wanted:
                    pos = stop
                    continue
                key: Hashable = data[pos:stop]
                if group & 1 and number > 0xFF:
                    key = (fragments.get(group << 16 | number >> 8), key)
                fragment = get(key)
                if fragment is not None:
                    fragments[tag] = fragment
                    pos = stop
                    continue
            stop = self._element_or_stop(level, data, pos, end)
            if stop == pos or level.ended:
                return stop
            pos = stop
            if level.context is not context:
                context = level.context
                get = self._cache.table(context).get
        return pos

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
        tag = element.tag
        if element.end > end:
            raise PrefixError
        if not _is_listed(tag, level.wanted):
            level.ended = tag == ITEM_END and level.parent is not None
            return element.end
        if tag == _CHARSET:
            self._enter_charset(level, data[element.value : element.end])
            return element.end
        vr, ambiguous = self._vr(level, element)
        size = element.end - pos
        if size > _MAX_KEY_BYTES:
            level.fragments[tag] = self._fragment(tag, vr, self._body(level, element, vr, data))
            return element.end
        key: Hashable = data[pos : element.end]
        if ambiguous:
            key = (vr, key)
        elif element.vr in (b"", b"UN") and tag >> 16 & 1 and not is_creator(tag):
            key = (_creator_fragment(level, tag), key)
        fragment = self._cache.get(level.context, key, size)
        if fragment is None:
            impure = self._impure
            fragment = self._fragment(tag, vr, self._body(level, element, vr, data))
            if self._impure == impure:
                self._cache.put(level.context, key, size, fragment)
        level.fragments[tag] = fragment
        return element.end

    def _vr(self, level: _Level, element: Element) -> tuple[str, bool]:
        """The VR of *element*, and whether it depends on other elements."""
        unwritten = element.vr in (b"", b"UN")
        undefined_length = element.length == UNDEFINED
        creator = _creator(level, element.tag) if unwritten else ""
        vr = known_vr(element.tag, element.vr, undefined_length=undefined_length, creator=creator)
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
        level.fragments[_CHARSET] = _UTF_8
        terms = tuple(term.strip(" \0") for term in value.decode("latin-1").split("\\"))
        if not any(terms):
            return
        level.charset = character_set(terms)
        level.context = (level.encoding, level.charset)
        if not level.charset.known:
            self.warn(_BAD_CHARSET)

    def _is_bulk(self, element: Element, vr: str) -> bool:
        if not element.length:
            return False
        return element.tag in PIXEL_TAGS or (vr in BINARY_VRS and element.length > self._inline_bytes)

    def _fragment(self, tag: int, vr: str, body: bytes) -> bytes:
        return b'"%08X":{"vr":"%b"%b}' % (tag, vr.encode("ascii"), body)

    def _body(self, level: _Level, element: Element, vr: str, data: bytes) -> bytes:
        """What follows the VR in the fragment of *element*."""
        if not element.length:
            return b""
        if vr == "SQ":
            items = self._items(level, element, data)
            return b',"Value":[' + b",".join(items) + b"]" if items else b""
        if self._is_bulk(element, vr):
            return self._bulk_link(level, element.tag)
        value = data[element.value : element.end]
        little = level.encoding.little or element.vr == b"UN"
        if vr in BINARY_VRS:
            return b',"InlineBinary":"' + b64encode(value if little else little_endian(value, vr)) + b'"'
        values = _CONVERTERS[vr](value, _Circumstances(little, level.charset, self.warn), vr)
        return b',"Value":' + values if values else b""

    def _bulk_link(self, level: _Level, tag: int) -> bytes:
        self._impure += 1
        return b',"BulkDataURI":' + orjson.dumps(f"{self._bulk_uri}{level.path}/{tag:08X}")

    def _items(self, level: _Level, element: Element, data: bytes) -> list[bytes]:
        """The items of a sequence; what cannot be read of them is warned of and left out."""
        if level.depth + 1 >= MAX_DEPTH:
            self.warn(_TOO_DEEP)
            return []
        encoding = inner_encoding(element.vr, level.encoding)
        items: list[bytes] = []
        pos = element.value
        while pos < element.end:
            try:
                tag, length = read_item(data, pos, encoding.little)
            except PrefixError:
                tag, length = 0, 0
            pos += 8
            if tag != ITEM:
                if tag != SEQUENCE_END:
                    self.warn(_MALFORMED)
                break
            end = element.end if length == UNDEFINED else pos + length
            item = _Level(
                item_encoding(data, pos, encoding),
                level.charset,
                data,
                pos,
                level,
                f"{level.path}/{element.tag:08X}/{len(items) + 1}",
                level.depth + 1,
                ends=level.ends,
            )
            stop = self._walk(item, data, pos, min(end, element.end))
            if (length == UNDEFINED and not item.ended) or (length != UNDEFINED and stop != end):
                self.warn(_MALFORMED)
            pos = stop if length == UNDEFINED else end
            items.append(b"{" + b",".join(_ascending(item.fragments)) + b"}")
        return items


def little_endian(value: bytes, vr: str) -> bytes:
    """The big endian *value* of *vr* with the bytes of its words turned round."""
    typecode = _WORDS.get(vr)
    if typecode is None:
        return value
    words = array(typecode)
    whole = len(value) - len(value) % words.itemsize
    words.frombytes(value[:whole])
    words.byteswap()
    return words.tobytes() + value[whole:]


_WORDS = (
    dict.fromkeys(("AT", "OW", "SS", "US"), "H")
    | dict.fromkeys(("FL", "OF", "OL", "SL", "UL"), "I")
    | dict.fromkeys(("FD", "OD", "OV", "SV", "UV"), "Q")
)


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


def _creator_fragment(level: _Level, tag: int) -> bytes | None:
    return level.fragments.get(tag & 0xFFFF0000 | tag >> 8 & 0xFF)


def _creator(level: _Level, tag: int) -> str:
    """The private creator of the block that *tag* is in; "" if there is none."""
    if not tag >> 16 & 1:
        return ""
    value = _values(_creator_fragment(level, tag))
    return value[0] if value and isinstance(value[0], str) else ""


def _values(fragment: bytes | None) -> list[Any]:
    if fragment is None:
        return []
    (attribute,) = orjson.loads(b"{" + fragment + b"}").values()
    values: list[Any] = attribute.get("Value", [])
    return values


def _first_number(level: _Level, tag: int) -> Any:
    return next(iter(_values(level.fragments.get(tag))), None)


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


class _Circumstances(NamedTuple):
    """What the reading of a value depends on beside its VR."""

    little: bool
    charset: CharacterSet
    warn: Callable[[str], None]


def _array(values: list[str]) -> bytes:
    """*values* as JSON, empty ones null; b"" if there is but one and it is empty (section F.2.5)."""
    if len(values) == 1 and not values[0]:
        return b""
    return orjson.dumps([value or None for value in values])


def _codes(value: bytes, given: _Circumstances, vr: str) -> bytes:
    """Strings of the default repertoire."""
    if not value.isascii():
        given.warn(_BAD_TEXT)
    text = value.decode("latin-1")
    if vr == "UR":
        return _array([text.rstrip(" \0")])
    if vr in _LEADING_SPACE_COUNTS:
        return _array([part.rstrip(" \0") for part in text.split("\\")])
    return _array([part.strip(" \0") for part in text.split("\\")])


def _texts(value: bytes, given: _Circumstances, vr: str) -> bytes:
    text = _decoded(value, given, b"\\\r\n\f\t")
    if vr == "UC":
        return _array([part.rstrip(" \0") for part in text.split("\\")])
    return _array([part.strip(" \0") for part in text.split("\\")])


def _paragraph(value: bytes, given: _Circumstances, _vr: str) -> bytes:
    return _array([_decoded(value, given, b"\r\n\f\t").rstrip(" \0")])


def _decoded(value: bytes, given: _Circumstances, delimiters: bytes) -> str:
    text, clean = decode(value, given.charset, delimiters)
    if not clean:
        given.warn(_BAD_TEXT)
    return text


def _person_names(value: bytes, given: _Circumstances, _vr: str) -> bytes:
    names = []
    for name in _decoded(value, given, b"\\^=\r\n\f\t").split("\\"):
        groups = zip(_COMPONENT_GROUPS, name.split("="), strict=False)
        names.append({group: text for group, part in groups if (text := part.rstrip(" \0"))} or None)
    return b"" if names == [None] else orjson.dumps(names)


def _decimals(value: bytes, given: _Circumstances, _vr: str) -> bytes:
    return _number_array(value, given, _PLAIN_DECIMALS, _decimal)


def _integers(value: bytes, given: _Circumstances, _vr: str) -> bytes:
    return _number_array(value, given, _PLAIN_INTEGERS, _integer)


def _number_array(
    value: bytes,
    given: _Circumstances,
    plain: re.Pattern[bytes],
    number: Callable[[bytes], bytes | None],
) -> bytes:
    value = value.strip(b" \0")
    if plain.fullmatch(value):
        return b"[" + value.replace(b"\\", b",") + b"]"
    parts = [part.strip(b" \0") for part in value.split(b"\\")]
    if parts == [b""]:
        return b""
    values = []
    for part in parts:
        digits = number(part) if part else b"null"
        if digits is None:
            given.warn(_BAD_NUMBER)
            digits = orjson.dumps(part.decode("latin-1"))
        values.append(digits)
    return b"[" + b",".join(values) + b"]"


_COMPONENT_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_LEADING_SPACE_COUNTS = frozenset({"AS", "DA", "DT", "TM", "UI"})
# What can go into JSON as it stands, several values at once: most of what there is.
_PLAIN_DECIMAL = rb"-?(?:0|[1-9]\d{0,99})(?:\.\d{1,99})?(?:[eE][+-]?\d\d?)?"
_PLAIN_INTEGER = rb"-?(?:0|[1-9]\d{0,14})"
_PLAIN_DECIMALS = re.compile(rb"%b(?:\\%b)*" % (_PLAIN_DECIMAL, _PLAIN_DECIMAL))
_PLAIN_INTEGERS = re.compile(rb"%b(?:\\%b)*" % (_PLAIN_INTEGER, _PLAIN_INTEGER))
_DECIMAL = re.compile(rb"([+-]?)(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?")


def _decimal(part: bytes) -> bytes | None:
    """The DS *part* as a JSON number with the same digits; None if it is none, or beyond a 64-bit float."""
    match = _DECIMAL.fullmatch(part)
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, fraction, exponent = match.groups()
    number = float(part)
    if not math.isfinite(number) or (not number and (whole + (fraction or b"")).strip(b"0")):
        return None
    text = (b"-" if sign == b"-" else b"") + (whole.lstrip(b"0") or b"0")
    text += b"." + fraction if fraction else b""
    return text + (b"e" + exponent if exponent else b"")


def _integer(part: bytes) -> bytes | None:
    """The IS *part* as a JSON number; None if it is no whole number that one carries."""
    match = _DECIMAL.fullmatch(part)
    if match is None or match[4] or not match[2] or (match[3] or b"").strip(b"0") or len(match[2]) > 20:
        return None
    number = int(match[1] + match[2])
    return b"%d" % number if abs(number) <= _MAX_SAFE_INTEGER else None


def _tags(value: bytes, given: _Circumstances, _vr: str) -> bytes:
    numbers = _unpacked(value, given, "HH", 4)
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return orjson.dumps([f"{group:04X}{number:04X}" for group, number in pairs]) if numbers else b""


def _numbers(value: bytes, given: _Circumstances, vr: str) -> bytes:
    numbers = _unpacked(value, given, *_FORMATS[vr])
    return orjson.dumps(numbers) if numbers else b""


def _long_numbers(value: bytes, given: _Circumstances, vr: str) -> bytes:
    numbers = _unpacked(value, given, *_FORMATS[vr])
    values = [number if abs(number) <= _MAX_SAFE_INTEGER else str(number) for number in numbers]
    return orjson.dumps(values) if values else b""


def _floats(value: bytes, given: _Circumstances, vr: str) -> bytes:
    numbers = _unpacked(value, given, *_FORMATS[vr])
    if all(map(math.isfinite, numbers)):
        return orjson.dumps(numbers) if numbers else b""
    return orjson.dumps([number if math.isfinite(number) else _not_finite(number) for number in numbers])


def _not_finite(number: float) -> str:
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def _unpacked(value: bytes, given: _Circumstances, typecodes: str, size: int) -> tuple[Any, ...]:
    """The numbers in *value*; bytes that make no whole number are left out."""
    count, rest = divmod(len(value), size)
    if rest:
        given.warn(_BAD_LENGTH)
    order = "<" if given.little else ">"
    return struct.unpack(f"{order}{count * len(typecodes)}{typecodes[0]}", value[: count * size])


_FORMATS = {
    "FD": ("d", 8),
    "FL": ("f", 4),
    "SL": ("l", 4),
    "SS": ("h", 2),
    "SV": ("q", 8),
    "UL": ("L", 4),
    "US": ("H", 2),
    "UV": ("Q", 8),
}
_CONVERTERS: Mapping[str, Callable[[bytes, _Circumstances, str], bytes]] = (
    dict.fromkeys(("AE", "AS", "CS", "DA", "DT", "TM", "UI", "UR"), _codes)
    | dict.fromkeys(("LO", "SH", "UC"), _texts)
    | dict.fromkeys(("LT", "ST", "UT"), _paragraph)
    | dict.fromkeys(("SL", "SS", "UL", "US"), _numbers)
    | dict.fromkeys(("SV", "UV"), _long_numbers)
    | dict.fromkeys(("FD", "FL"), _floats)
    | {"AT": _tags, "DS": _decimals, "IS": _integers, "PN": _person_names}
)
