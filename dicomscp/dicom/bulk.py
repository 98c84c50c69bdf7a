"""Bulk values and frames, sliced out of a dataset without reading the rest.

Everything returned is a piece of the buffer given (a memoryview, so a mapped file is read only where it is
sent), except where bytes must change: big endian words are turned round, frames of single bits are moved to
the beginning of a byte, deflated datasets are inflated.  Who reads more than one frame of a deflated
dataset inflates it once (`elements.inflate`) and gives the result as explicit VR little endian.

Native frames are reported in explicit VR little endian, the one uncompressed form that PS3.18 section
8.7.3.3 knows.  Encapsulated frames are found by the Extended Offset Table, else by the Basic Offset Table
(PS3.5 A.4), else by counting: one frame, one fragment a frame, or the fragments that begin a JPEG or JPEG
2000 codestream.  A table that does not point at items is passed over.  A video is one frame, whatever
Number of Frames says: its pictures have no borders that could be cut at.

The bulk value of encapsulated pixel data is not its value field but its bitstreams, one media part a frame
(PS3.18 section 8.7.3.3.2): the framing of fragments has no meaning outside of a dataset.
"""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from dicomscp.dicom.dictionary import is_creator, known_vr
from dicomscp.dicom.elements import (
    EXPLICIT_LITTLE,
    ITEM,
    ITEM_END,
    UNDEFINED,
    Buffer,
    Element,
    Encoding,
    PrefixError,
    encoding_of,
    inflate,
    inner_encoding,
    is_deflated,
    item_encoding,
    read_element,
    read_item,
)
from dicomscp.dicom.jsonmodel import PIXEL_TAGS, little_endian
from dicomscp.errors import RefusedError

Piece = bytes | memoryview

_PATH = re.compile(r"[0-9A-F]{8}(?:/[1-9][0-9]{0,8}/[0-9A-F]{8}){0,64}", re.ASCII)

_SAMPLES_PER_PIXEL, _PHOTOMETRIC_INTERPRETATION, _NUMBER_OF_FRAMES = 0x00280002, 0x00280004, 0x00280008
_ROWS, _COLUMNS, _BITS_ALLOCATED = 0x00280010, 0x00280011, 0x00280100
_FLOAT_PIXELS, _DOUBLE_PIXELS = 0x7FE00008, 0x7FE00009
_EXTENDED_OFFSETS, _EXTENDED_LENGTHS = 0x7FE00001, 0x7FE00002
_DESCRIPTION = frozenset(
    {
        _SAMPLES_PER_PIXEL,
        _PHOTOMETRIC_INTERPRETATION,
        _NUMBER_OF_FRAMES,
        _ROWS,
        _COLUMNS,
        _BITS_ALLOCATED,
        _EXTENDED_OFFSETS,
        _EXTENDED_LENGTHS,
    }
)

# MPEG2, MPEG-4 AVC/H.264 and HEVC/H.265, their fragmentable kinds included (PS3.5 section 8.2.5 to 8.2.8).
_VIDEO = tuple(f"1.2.840.10008.1.2.4.{number}" for number in range(100, 109))
# Start of a JPEG or JPEG-LS image, of a JPEG 2000 codestream, of a JP2 file.
_STREAM_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")


@dataclass(frozen=True, slots=True)
class BulkValue:
    """The value behind a BulkDataURI, in little endian order.

    *parts* has one list of pieces for each media part: one, or one a frame of encapsulated pixel data, whose
    bitstream is in *transfer_syntax_uid*.
    """

    vr: str
    parts: list[list[Piece]]
    transfer_syntax_uid: str = EXPLICIT_LITTLE

    @property
    def data(self) -> list[Piece]:
        """The pieces of all parts."""
        return [piece for part in self.parts for piece in part]


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, as pieces to be sent one after another."""

    transfer_syntax_uid: str
    data: list[Piece]


def bulk_value(dataset: Buffer, transfer_syntax_uid: str, path: str) -> BulkValue:
    """The value at *path*, which is a tag ("7FE00010"), or tag/item/tag in sequences, items counted from 1.

    Raises RefusedError if there is none, or not all of it.
    """
    level = _top(dataset, transfer_syntax_uid)
    *steps, last = _steps(path)
    for tag, number in zip(steps[::2], steps[1::2], strict=True):
        level = _item(level, tag, number)
    element, vr = _find(level, last)
    if vr == "SQ" or element.end > len(level.view):
        raise _no_bulk_value()
    pixels = _Pixels.of(level) if element.tag in PIXEL_TAGS else None
    if element.length == UNDEFINED:
        frames = 1 if pixels is None or _is_video(transfer_syntax_uid) else pixels.frames
        stream = _Fragments(level.view, element, {} if pixels is None else pixels.described)
        parts = [stream.frame(number, frames) for number in range(1, frames + 1)]
        return BulkValue(vr, parts, transfer_syntax_uid)
    value = level.view[element.value : element.end]
    if level.encoding.little or element.vr == b"UN":
        return BulkValue(vr, [[value]])
    if pixels is not None:
        return BulkValue(vr, [[_turned_words(value, pixels.word_bytes)]])
    return BulkValue(vr, [[little_endian(bytes(value), vr)]])


def number_of_frames(dataset: Buffer, transfer_syntax_uid: str) -> int:
    """How many frames `read_frame` knows of: 0 without pixel data, 1 for a video."""
    pixels = _Pixels.of(_top(dataset, transfer_syntax_uid))
    if pixels is None:
        return 0
    return 1 if _is_video(transfer_syntax_uid) else pixels.frames


def read_frame(dataset: Buffer, transfer_syntax_uid: str, number: int) -> Frame:
    """Frame *number*, counted from 1.  Raises RefusedError if there is no such frame, or not all of it."""
    level = _top(dataset, transfer_syntax_uid)
    pixels = _Pixels.of(level)
    frames = 0
    if pixels is not None:
        frames = 1 if _is_video(transfer_syntax_uid) else pixels.frames
    if pixels is None or not 1 <= number <= frames:
        raise RefusedError(f"The instance has no frame {number}.")
    if pixels.element.length == UNDEFINED:
        stream = _Fragments(level.view, pixels.element, pixels.described)
        return Frame(transfer_syntax_uid, stream.frame(number, frames))
    return Frame(EXPLICIT_LITTLE, [_native_frame(level.view, pixels, number)])


def _top(dataset: Buffer, transfer_syntax_uid: str) -> "_Level":
    if is_deflated(transfer_syntax_uid):
        dataset, whole = inflate(dataset)
        if not whole:
            raise RefusedError("The deflated dataset is too large to be read in parts.")
    view = memoryview(dataset)
    return _Level(view, 0, len(view), encoding_of(view, transfer_syntax_uid))


def _no_bulk_value() -> RefusedError:
    return RefusedError("The instance has no such bulk data.")


@dataclass(frozen=True, slots=True)
class _Level:
    """A dataset, or an item whose end is known or shown by its delimiter."""

    view: memoryview
    start: int
    end: int
    encoding: Encoding
    depth: int = 0

    def elements(self) -> Iterator[Element]:
        """Its elements, as far as they can be read."""
        pos = self.start
        while pos < self.end:
            try:
                element = read_element(self.view, pos, self.encoding, self.depth)
            except (PrefixError, RefusedError):
                return
            if element.tag == ITEM_END and self.depth:
                return
            yield element
            pos = element.end


def _steps(path: str) -> list[int]:
    """The tags (hexadecimal) and item numbers of *path* in turn; it begins and ends with a tag."""
    if not _PATH.fullmatch(path):
        raise _no_bulk_value()
    return [int(part, 10 if at % 2 else 16) for at, part in enumerate(path.split("/"))]


def _find(level: _Level, tag: int) -> tuple[Element, str]:
    """The last element with *tag*, as the header has it, and its VR."""
    found: Element | None = None
    creators: dict[int, str] = {}
    for element in level.elements():
        if is_creator(element.tag):
            text = bytes(level.view[element.value : element.end])
            creators[element.tag] = text.decode("latin-1").strip(" \0")
        if element.tag == tag:
            found = element
    if found is None:
        raise _no_bulk_value()
    creator = creators.get(tag & 0xFFFF0000 | tag >> 8 & 0xFF, "")
    undefined_length = found.length == UNDEFINED
    vr = known_vr(tag, found.vr, undefined_length=undefined_length, creator=creator)
    return found, vr if len(vr) == 2 else "OB" if undefined_length else "OW"


def _item(level: _Level, tag: int, number: int) -> _Level:
    element, vr = _find(level, tag)
    encoding = inner_encoding(element.vr, level.encoding)
    pos = element.value
    for count in range(1, number + 1 if vr == "SQ" else 0):
        try:
            item, length = read_item(level.view, pos, encoding.little)
        except PrefixError:
            break
        pos += 8
        if item != ITEM or pos > element.end:
            break
        inner = item_encoding(level.view, pos, encoding)
        end = element.end if length == UNDEFINED else pos + length
        here = _Level(level.view, pos, min(end, element.end), inner, level.depth + 1)
        if count == number:
            return here
        pos = end if length != UNDEFINED else _after(here)
    raise _no_bulk_value()


def _after(item: _Level) -> int:
    """Where the item of undefined length ends, its delimiter included."""
    pos = item.start
    for element in item.elements():
        pos = element.end
    return pos + 8


@dataclass(frozen=True, slots=True)
class _Pixels:
    """Pixel data and what describes them."""

    element: Element
    little: bool
    described: dict[int, bytes]

    @classmethod
    def of(cls, level: _Level) -> "_Pixels | None":
        """Those of *level*, by a walk that ends there; None if there are none."""
        described: dict[int, bytes] = {}
        for element in level.elements():
            if element.tag in _DESCRIPTION:
                described[element.tag] = bytes(level.view[element.value : element.end])
            elif element.tag in PIXEL_TAGS and element.length:
                return cls(element, level.encoding.little, described)
        return None

    def number(self, tag: int, default: int) -> int:
        value = self.described.get(tag, b"")[:2]
        return int.from_bytes(value, "little" if self.little else "big") if value else default

    @property
    def frames(self) -> int:
        try:
            return max(1, int(self.described.get(_NUMBER_OF_FRAMES, b"1").strip(b" \0")))
        except ValueError:
            return 1

    @property
    def bits_allocated(self) -> int:
        return self.number(_BITS_ALLOCATED, 8)

    @property
    def word_bytes(self) -> int:
        """How many bytes are turned round together: none in OB, 16 bits or a longer pixel cell in OW."""
        if self.little or self.element.vr == b"OB":
            return 1
        return {_FLOAT_PIXELS: 4, _DOUBLE_PIXELS: 8}.get(self.element.tag, max(2, self.bits_allocated // 8))

    @property
    def frame_bits(self) -> int:
        samples = self.number(_SAMPLES_PER_PIXEL, 1)
        photometric = self.described.get(_PHOTOMETRIC_INTERPRETATION, b"").strip(b" \0")
        if photometric in (b"YBR_FULL_422", b"YBR_PARTIAL_422"):
            samples = 2  # one pair of colours to two pixels (PS3.3 section C.7.6.3.1.2)
        return self.number(_ROWS, 0) * self.number(_COLUMNS, 0) * samples * self.bits_allocated


def _native_frame(view: memoryview, pixels: _Pixels, number: int) -> Piece:
    element, bits = pixels.element, pixels.frame_bits
    if not bits and pixels.frames == 1:
        bits = 8 * element.length
    first, last = (number - 1) * bits, number * bits
    end = element.value + (last + 7) // 8
    if not bits or end > min(element.end, len(view)):
        raise RefusedError(f"The pixel data end before frame {number} does.")
    piece = _in_order(view, element, (element.value + first // 8, end), pixels.word_bytes)
    if first % 8 or last % 8:
        return _shifted(piece, first % 8, bits)
    return piece


def _in_order(view: memoryview, element: Element, span: tuple[int, int], word: int) -> Piece:
    """The bytes of *span*, the words that they are in having been turned round."""
    start, end = span
    if word == 1:
        return view[start:end]
    low = start - (start - element.value) % word
    high = min(end + (element.value - end) % word, element.end)
    return _turned_words(view[low:high], word)[start - low : end - low]


def _turned_words(value: memoryview, word: int) -> bytes:
    words = array({2: "H", 4: "I", 8: "Q"}.get(word, "B"))
    whole = len(value) - len(value) % words.itemsize
    words.frombytes(value[:whole])
    words.byteswap()
    return words.tobytes() + bytes(value[whole:])


def _shifted(piece: Piece, skip: int, bits: int) -> bytes:
    """*bits* of *piece* from bit *skip* on; the first pixel is the lowest bit (PS3.5 section 8.1.1)."""
    number = int.from_bytes(piece, "little") >> skip
    return (number & (1 << bits) - 1).to_bytes((bits + 7) // 8, "little")


def _is_video(transfer_syntax_uid: str) -> bool:
    return transfer_syntax_uid.removesuffix(".1") in _VIDEO


class _Fragments:
    """The items of an encapsulated value (PS3.5 A.4): an offset table, then fragments."""

    def __init__(self, view: memoryview, element: Element, described: dict[int, bytes]) -> None:
        self._view = view
        self._end = element.end
        # Whoever found the element has seen its items, so here and below they can be read.
        tag, length = read_item(view, element.value, little=True)
        self._start = element.value + 8 + (length if tag == ITEM else 0)
        self._table = bytes(view[element.value + 8 : self._start])
        self._offsets = described.get(_EXTENDED_OFFSETS, b"")
        self._lengths = described.get(_EXTENDED_LENGTHS, b"")
        self._all: list[Piece] | None = None

    def frame(self, number: int, frames: int) -> list[Piece]:
        """The fragments of frame *number* of *frames*."""
        if frames == 1:
            return self._fragments()
        found = self._by_extended_table(number) or self._by_table(number, frames)
        if found:
            return found
        fragments = self._fragments()
        if len(fragments) == frames:
            return [fragments[number - 1]]
        return _by_stream_starts(fragments, number, frames)

    def _fragments(self) -> list[Piece]:
        if self._all is None:
            self._all = list(self._between(self._start, self._end))
        return self._all

    def _between(self, pos: int, stop: int) -> Iterator[memoryview]:
        while pos < stop:
            tag, length = read_item(self._view, pos, little=True)
            if tag != ITEM or length == UNDEFINED:
                return
            yield self._view[pos + 8 : pos + 8 + length]
            pos += 8 + length

    def _item_length(self, pos: int) -> int:
        """The length of the item at *pos*; -1 if there is none."""
        if not self._start <= pos <= self._end - 8:
            return -1
        tag, length = read_item(self._view, pos, little=True)
        return length if tag == ITEM else -1

    def _by_extended_table(self, number: int) -> list[Piece]:
        """The one fragment that (7FE0,0001) and (7FE0,0002) point at; none if they point at no item."""
        if min(len(self._offsets), len(self._lengths)) < 8 * number:
            return []
        pos = self._start + _entry(self._offsets, number, 8)
        length = _entry(self._lengths, number, 8)
        return [self._view[pos + 8 : pos + 8 + length]] if length <= self._item_length(pos) else []

    def _by_table(self, number: int, frames: int) -> list[Piece]:
        """The fragments up to the next offset; none if the table does not point at an item."""
        if len(self._table) < 4 * frames:
            return []
        pos = self._start + _entry(self._table, number, 4)
        stop = self._start + _entry(self._table, number + 1, 4) if number < frames else self._end
        return list(self._between(pos, min(stop, self._end))) if self._item_length(pos) >= 0 else []


def _entry(table: bytes, number: int, size: int) -> int:
    return int.from_bytes(table[(number - 1) * size : number * size], "little")


def _by_stream_starts(fragments: list[Piece], number: int, frames: int) -> list[Piece]:
    starts = [at for at, piece in enumerate(fragments) if bytes(piece[:8]).startswith(_STREAM_STARTS)]
    if len(starts) != frames:
        raise RefusedError("Which fragments make a frame cannot be told.")
    starts.append(len(fragments))
    return fragments[starts[number - 1] : starts[number]]
