"""Bulk values and frames, sliced out of a dataset without reading the rest.

Everything returned is a piece of the buffer given (a memoryview, so a mapped file is read only where it is
sent), except where bytes must change: big endian words are turned round, frames of single bits are moved to
the beginning of a byte, deflated datasets are inflated.

Who reads frames makes a *frame table* once (`frame_table`) and asks it for each (`read_frame`).  A table
holds positions only, so it serves every buffer with the same bytes.  Making it costs a walk over the header;
what a frame costs after that does not grow with the number of frames:

- native: arithmetic;
- encapsulated with an Extended or Basic Offset Table (PS3.5 A.4): the entries of that frame, looked up where
  they stand, and believed if they lead from item to item; nothing of the tables is copied;
- else, or where an entry leads nowhere: one scan over the items' headers, 8 bytes kept for each frame.

The scan takes one fragment for a frame if there are as many as frames are told of, else the fragments that
begin a codestream, else those that an incomplete table points at.  A video is one frame, whatever Number of
Frames says: its pictures have no borders that could be cut at.  Where Number of Frames is absent or no
number, or tells of more than there are, the frames that are there can be had.

Native frames are reported in explicit VR little endian, the one uncompressed form that PS3.18 section
8.7.3.3 knows.  The bulk value of encapsulated pixel data is not its value field but its bitstreams, one media
part a frame (PS3.18 section 8.7.3.3.2): the framing of fragments has no meaning outside of a dataset.
"""

import re
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from dicomscp.dicom.dictionary import is_creator, known_vr
from dicomscp.dicom.elements import (
    BIG_PIXELS,
    ENCAPSULATED_UNCOMPRESSED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    ITEM,
    ITEM_END,
    LITTLE,
    PIXEL_DATA,
    RLE,
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
from dicomscp.dicom.jsonmodel import PIXEL_TAGS
from dicomscp.dicom.values import little_endian
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
_DOCUMENT, _DOCUMENT_TYPE, _DOCUMENT_LENGTH = 0x00420011, 0x00420012, 0x00420015

_BLOCK_BYTES = 1 << 20  # of a value that is turned round: a multiple of any word

_TEXT_BYTES = 64  # PS3.5 Table 6.2-1: 16 of a code, 12 of an integer string, 64 of a private creator

_NATIVE = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, BIG_PIXELS})
# MPEG2, MPEG-4 AVC/H.264 and HEVC/H.265, their fragmentable kinds included (PS3.5 section 8.2.5 to 8.2.8).
_VIDEO = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in range(100, 109))
# Start of a JPEG or JPEG-LS image, of a JPEG 2000 codestream, of a JP2 file, of a JPEG XL file.
_STREAM_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ", b"\x00\x00\x00\x0cJXL ")
# Start of a JPEG XL codestream: too short to be looked for in other transfer syntaxes.
_JPEG_XL = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (110, 111, 112))
_JPEG_XL_START = b"\xff\x0a"
_RLE_HEADER = struct.Struct("<16L")
# Pixel data of undefined length, their VR written or not.
_ENCAPSULATED = re.compile(rb"\xe0\x7f\x10\x00(?:(OB|OW|UN)..)?\xff\xff\xff\xff", re.DOTALL)
_PIXEL_DATA_TAG = b"\xe0\x7f\x10\x00"


class Encoded(NamedTuple):
    """A dataset's bytes, not deflated, and how they are encoded."""

    dataset: Buffer
    transfer_syntax_uid: str


class Frame(NamedTuple):
    """One frame, as pieces to be sent one after another."""

    transfer_syntax_uid: str
    data: list[Piece]


@dataclass(frozen=True, slots=True)
class BulkValue:
    """The value behind a BulkDataURI, in little endian order.

    It has *count* media parts: one, or one a frame of encapsulated pixel data, whose bitstream is in
    *transfer_syntax_uid*.  Of an encapsulated document, *media_type* is what the dataset says that it is, and
    the last *padding* bytes are not part of it.
    """

    vr: str
    count: int
    transfer_syntax_uid: str
    _part: Callable[[int], list[Piece]]
    media_type: str = ""
    padding: int = 0

    def parts(self) -> Iterator[list[Piece]]:
        """The pieces of one part after another.  Raises RefusedError for one that is not whole."""
        return (self._part(number) for number in range(1, self.count + 1))

    @property
    def data(self) -> list[Piece]:
        """The pieces of all parts."""
        return [piece for part in self.parts() for piece in part]


def inflated(dataset: Buffer, transfer_syntax_uid: str) -> Encoded:
    """The dataset to read values and frames out of.

    Who reads more than one of a deflated dataset keeps what is returned.  Raises RefusedError if it cannot be
    inflated, or is larger than what may be.
    """
    if not is_deflated(transfer_syntax_uid):
        return Encoded(dataset, transfer_syntax_uid)
    dataset, whole = inflate(dataset)
    if not whole:
        raise RefusedError("The deflated dataset is too large to be read in parts.")
    return Encoded(dataset, EXPLICIT_LITTLE)


def frame_table(dataset: Buffer, transfer_syntax_uid: str) -> "FrameTable":
    """Where the frames of *dataset*, which is not deflated (`inflated`), are; without pixel data, nowhere."""
    if is_deflated(transfer_syntax_uid):
        raise RefusedError("The frames of a deflated dataset are found once it is inflated.")
    return _frames(_top(dataset, transfer_syntax_uid), transfer_syntax_uid)


def early_table(prefix: Buffer, dataset_bytes: int, transfer_syntax_uid: str) -> "NativeFrames | None":
    """The frame table of a dataset of *dataset_bytes* if *prefix*, its first bytes, tells it; else None.

    It does of native pixel data that begin within it, are all there, and whose frames go out as they stand
    (`NativeFrames.span`).  Takes no longer than a walk of *prefix*.
    """
    if transfer_syntax_uid not in (IMPLICIT_LITTLE, EXPLICIT_LITTLE):
        return None
    level = _top(prefix, transfer_syntax_uid)
    description, element = _described(level)
    if element is None or element.length == UNDEFINED or element.end > dataset_bytes:
        return None
    table = _native(description, element, transfer_syntax_uid, dataset_bytes)
    return table if table.has_spans else None


def read_frame(dataset: Buffer, table: "FrameTable", number: int) -> Frame:
    """Frame *number*, counted from 1, of the *dataset* that *table* was made of.

    Raises RefusedError if there is no such frame, or not all of it.
    """
    _check_there(table, number)
    return Frame(table.transfer_syntax_uid, table.pieces(memoryview(dataset), number))


def frame_bytes(dataset: Buffer, table: "FrameTable", number: int) -> int:
    """The size of what `read_frame` gives, without turning or moving a byte.  Raises as that does."""
    _check_there(table, number)
    return table.frame_bytes(memoryview(dataset), number)


def _check_there(table: "FrameTable", number: int) -> None:
    if not 1 <= number <= table.told:
        raise RefusedError(f"The instance has no frame {number}.")
    if number > table.frames:
        there = f"the pixel data hold {table.frames}, and end before frame {number} does"
        raise RefusedError(f"The instance tells of {table.told} frames, but {there}.")


def before_pixels(dataset: Buffer, transfer_syntax_uid: str) -> tuple[memoryview, int]:
    """What stands in *dataset*, which is not deflated, before its pixel data, and the tag of these.

    Without pixel data that is all of it, and the tag is 0.
    """
    level = _top(dataset, transfer_syntax_uid)
    for element in level.elements():
        if element.tag in PIXEL_TAGS and element.length:
            return level.view[: element.start], element.tag
    return level.view, 0


def after_pixels(dataset: Buffer, transfer_syntax_uid: str) -> memoryview:
    """What stands behind the pixel data; costs a look at each of their fragments."""
    level, passed = _top(dataset, transfer_syntax_uid), False
    for element in level.elements():
        if passed:
            return level.view[element.start :]
        passed = element.tag in PIXEL_TAGS and element.length > 0
    return level.view[:0]


def bulk_value(dataset: Buffer, transfer_syntax_uid: str, path: str) -> BulkValue:
    """The value at *path*, which is a tag ("7FE00010"), or tag/item/tag in sequences, items counted from 1.

    Raises RefusedError if there is none, or not all of it.
    """
    dataset, transfer_syntax_uid = inflated(dataset, transfer_syntax_uid)
    level = _top(dataset, transfer_syntax_uid)
    *steps, last = _steps(path)
    for tag, number in zip(steps[::2], steps[1::2], strict=True):
        level = _item(level, tag, number)
    element, vr = _find(level, last)
    if vr == "SQ":
        raise _no_bulk_value()
    if element.end > len(level.view):
        raise _no_whole_value()
    if last in PIXEL_TAGS:
        return _pixel_value(level, element, vr, transfer_syntax_uid)
    if element.length == UNDEFINED:
        stream = EncapsulatedFrames(level.view, element, transfer_syntax_uid, stated=1)
        return _framed_value(level.view, vr, stream)
    value: Piece = level.view[element.value : element.end]
    if not level.encoding.little and element.vr != b"UN":
        value = little_endian(bytes(value), vr)
    media_type, padding = _document(level, value) if last == _DOCUMENT else ("", 0)
    return BulkValue(vr, 1, EXPLICIT_LITTLE, lambda _: [value], media_type, padding)


def _pixel_value(level: "_Level", element: Element, vr: str, transfer_syntax_uid: str) -> BulkValue:
    """Of native pixel data the whole value field, whatever frames it holds."""
    table = _frames(level, transfer_syntax_uid)
    if isinstance(table, EncapsulatedFrames):
        return _framed_value(level.view, vr, table)
    value: Piece = level.view[element.value : element.end]
    if table.word_bytes > 1:
        value = _turned_words(level.view[element.value : element.end], table.word_bytes)
    return BulkValue(vr, 1, table.transfer_syntax_uid, lambda _: [value])


def _framed_value(view: memoryview, vr: str, table: "EncapsulatedFrames") -> BulkValue:
    if not table.frames:
        raise _no_bulk_value()
    return BulkValue(vr, table.frames, table.transfer_syntax_uid, lambda number: table.pieces(view, number))


def _document(level: "_Level", value: Piece) -> tuple[str, int]:
    """The MIME type of an encapsulated document, and how much of *value* pads it to an even length."""
    found = {element.tag: element for element in level.elements() if element.tag >> 16 == 0x0042}
    media_type = level.text(found[_DOCUMENT_TYPE]).lower() if _DOCUMENT_TYPE in found else ""
    length = level.number(found[_DOCUMENT_LENGTH]) if _DOCUMENT_LENGTH in found else None
    if length == len(value) - 1:
        return media_type, 1
    # Devices leave the length away, and a zero byte after it is what makes XML unreadable.
    padded = media_type.endswith("xml") and bytes(value[-1:]) == b"\0" and length != len(value)
    return media_type, int(padded)


def _top(dataset: Buffer, transfer_syntax_uid: str) -> "_Level":
    view = memoryview(dataset)
    return _Level(view, 0, len(view), encoding_of(view, transfer_syntax_uid))


def _no_bulk_value() -> RefusedError:
    return RefusedError("The instance has no such bulk data.")


def _no_whole_value() -> RefusedError:
    return RefusedError("The dataset ends before this value does.")


def _cut_short(number: int) -> RefusedError:
    return RefusedError(f"The pixel data end before frame {number} does.")


@dataclass(frozen=True, slots=True)
class _Level:
    """A dataset, or an item whose end is known or shown by its delimiter."""

    view: memoryview
    start: int
    end: int
    encoding: Encoding
    depth: int = 0

    def elements(self) -> Iterator[Element]:
        """Its elements, as far as they can be read.

        The end of encapsulated pixel data of the top level is sought, fragment by fragment, only if an
        element after them is asked for; theirs is given as the end of the dataset.
        """
        pos = self.start
        while pos < self.end:
            pixels = self._encapsulated(pos)
            if pixels is not None:
                yield pixels
            try:
                element = read_element(self.view, pos, self.encoding, self.depth)
            except (PrefixError, RefusedError):
                return
            if pixels is None:
                if element.tag == ITEM_END and self.depth:
                    return
                yield element
            pos = element.end

    def _encapsulated(self, pos: int) -> Element | None:
        """The encapsulated pixel data at *pos* of the top level, if that is what stands there."""
        if self.depth or self.view[pos : pos + 4] != _PIXEL_DATA_TAG:
            return None
        head = _ENCAPSULATED.match(bytes(self.view[pos : pos + 12]))
        if head is None:
            return None
        return Element(PIXEL_DATA, head[1] or b"", pos, pos + head.end(), UNDEFINED, self.end)

    def number(self, element: Element) -> int | None:
        """The number in *element*, which is of 16 or 32 bits; None if it is empty."""
        value = self.view[element.value : element.value + (4 if element.length == 4 else 2)]
        return int.from_bytes(value, "little" if self.encoding.little else "big") if len(value) else None

    def text(self, element: Element) -> str:
        """The code or number string in *element*; no more of it than any may have."""
        end = min(element.end, element.value + _TEXT_BYTES)
        return bytes(self.view[element.value : end]).decode("latin-1").strip(" \0")


def _steps(path: str) -> list[int]:
    """The tags (hexadecimal) and item numbers of *path* in turn; it begins and ends with a tag."""
    if not _PATH.fullmatch(path):
        raise _no_bulk_value()
    return [int(part, 10 if at % 2 else 16) for at, part in enumerate(path.split("/"))]


def _find(level: _Level, tag: int) -> tuple[Element, str]:
    """The last element with *tag*, as the header has it, and its VR.

    What stands behind encapsulated pixel data is looked at only for what does not stand before them: there
    may be a hundred thousand fragments between.
    """
    found: Element | None = None
    creators: dict[int, str] = {}
    for element in level.elements():
        if is_creator(element.tag):
            creators[element.tag] = level.text(element)
        if element.tag == tag:
            found = element
        if found and element.tag == PIXEL_DATA and element.length == UNDEFINED and not level.depth:
            break
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


class _Description:
    """What the attributes before pixel data say of them."""

    def __init__(self, level: _Level, elements: dict[int, Element]) -> None:
        self._level, self._elements = level, elements

    def number(self, tag: int, default: int) -> int:
        found = self._level.number(self._elements[tag]) if tag in self._elements else None
        return default if found is None else found & 0xFFFF

    @property
    def stated_frames(self) -> int | None:
        """Number of Frames, or None if there is none, or none that can be."""
        if _NUMBER_OF_FRAMES not in self._elements:
            return None
        text = self._level.text(self._elements[_NUMBER_OF_FRAMES])
        return int(text) if re.fullmatch(r"\+?0*[1-9][0-9]{0,9}", text, re.ASCII) else None

    def table(self, tag: int) -> "_Offsets | None":
        """The 64-bit numbers in that element, which must be whole."""
        element = self._elements.get(tag)
        if element is None or element.end > len(self._level.view) or element.length == UNDEFINED:
            return None
        return _Offsets(element.value, 8, element.length // 8)

    def word_bytes(self, element: Element, transfer_syntax_uid: str) -> int:
        """How many bytes are turned round together: none in OB, 16 bits or a longer pixel cell in OW."""
        if element.vr == b"OB" or (self._level.encoding.little and transfer_syntax_uid != BIG_PIXELS):
            return 1
        if element.tag != PIXEL_DATA:
            return _default_bits(element.tag) // 8
        return max(2, self.number(_BITS_ALLOCATED, 8) // 8)

    def frame_bits(self, element: Element, stated: int) -> int:
        """How many bits one of *stated* native frames has; 0 if it is not told."""
        bits = self.number(_BITS_ALLOCATED, _default_bits(element.tag))
        pixel_bits = self.number(_ROWS, 0) * self.number(_COLUMNS, 0) * bits
        samples = self.number(_SAMPLES_PER_PIXEL, 1)
        whole = pixel_bits * samples
        photometric = _PHOTOMETRIC_INTERPRETATION
        told = self._level.text(self._elements[photometric]) if photometric in self._elements else ""
        if told in ("YBR_FULL_422", "YBR_PARTIAL_422") and abs(8 * element.length - whole * stated) > 8:
            # One pair of colours to two pixels (PS3.3 section C.7.6.3.1.2), unless all that are told of are
            # there in full: a converter that does not subsample may leave the name as it was.
            return pixel_bits * 2
        return whole


def _default_bits(tag: int) -> int:
    return {_FLOAT_PIXELS: 32, _DOUBLE_PIXELS: 64}.get(tag, 8)


def _frames(level: _Level, transfer_syntax_uid: str) -> "FrameTable":
    """The frames of *level*, by a walk that ends at its pixel data."""
    description, element = _described(level)
    if element is None:
        return NativeFrames(0, 0, transfer_syntax_uid, 0, 0, 0, 1)
    return _frames_of(level, description, element, transfer_syntax_uid)


def _described(level: _Level) -> tuple[_Description, Element | None]:
    """The pixel data of *level*, and what stands before them about them."""
    described: dict[int, Element] = {}
    for element in level.elements():
        if element.tag in _DESCRIPTION:
            described[element.tag] = element
        elif element.tag in PIXEL_TAGS and element.length:
            return _Description(level, described), element
    return _Description(level, described), None


def _frames_of(
    level: _Level, description: _Description, element: Element, transfer_syntax_uid: str
) -> "FrameTable":
    view, stated = level.view, description.stated_frames
    if element.length == UNDEFINED or (
        transfer_syntax_uid not in _NATIVE and _are_items(view, element.value, element.end)
    ):
        return EncapsulatedFrames(
            view,
            element,
            transfer_syntax_uid,
            stated=stated,
            offsets=description.table(_EXTENDED_OFFSETS),
            lengths=description.table(_EXTENDED_LENGTHS),
        )
    # One bitstream that nobody has put into an item.
    is_stream = transfer_syntax_uid not in _NATIVE and _begins_stream(
        view, element.value, transfer_syntax_uid
    )
    return _native(description, element, transfer_syntax_uid, len(view), is_stream=is_stream)


def _native(
    description: _Description,
    element: Element,
    transfer_syntax_uid: str,
    dataset_bytes: int,
    *,
    is_stream: bool = False,
) -> "NativeFrames":
    word_bytes = description.word_bytes(element, transfer_syntax_uid)
    stated, syntax = description.stated_frames, EXPLICIT_LITTLE
    bits = description.frame_bits(element, stated or 1)
    if is_stream:
        bits, stated, syntax = 0, 1, transfer_syntax_uid
    if not bits and (stated or 1) == 1:
        bits = 8 * element.length
    size = min(element.end, dataset_bytes) - element.value
    if element.end > dataset_bytes:
        size -= size % word_bytes  # a word that is cut cannot be turned round
    there = 8 * size // bits if bits else 0
    told = stated or max(1, 8 * element.length // bits if bits else 0)
    return NativeFrames(told, min(told, there), syntax, element.value, element.end, bits, word_bytes)


@dataclass(frozen=True, slots=True)
class NativeFrames:
    """Frames of one size, one after another, *told* of in all, of which *frames* are there in whole."""

    told: int
    frames: int
    transfer_syntax_uid: str
    _value: int
    _end: int
    _bits: int
    word_bytes: int

    @property
    def size_bytes(self) -> int:
        """What the table costs beside a fixed part."""
        return 0

    @property
    def has_spans(self) -> bool:
        """Whether frames are whole bytes, as they stand."""
        return self.word_bytes == 1 and not self._bits % 8

    def span(self, number: int) -> tuple[int, int]:
        """Where frame *number*, one of *frames*, begins and ends in the dataset, if there are spans."""
        size = self._bits // 8
        return self._value + (number - 1) * size, self._value + number * size

    def pieces(self, view: memoryview, number: int) -> list[Piece]:
        """Frame *number*, one of *frames*."""
        first, last = (number - 1) * self._bits, number * self._bits
        start, end = self._value + first // 8, self._value + (last + 7) // 8
        piece = self._in_order(view, start, end)
        return [_shifted(piece, first % 8, self._bits)] if first % 8 or last % 8 else [piece]

    def frame_bytes(self, _view: memoryview, _number: int) -> int:
        """The size of any frame: a last byte that is not full is one."""
        return (self._bits + 7) // 8

    def value(self, view: memoryview) -> tuple[int, Iterator[bytes]]:
        """The size of the whole value, whatever frames it holds, and it in blocks.

        Raises RefusedError if it is not all there.
        """
        if self._end > len(view):
            raise _no_whole_value()
        starts = range(self._value, self._end, _BLOCK_BYTES)
        blocks = (self._in_order(view, start, min(start + _BLOCK_BYTES, self._end)) for start in starts)
        return self._end - self._value, map(bytes, blocks)

    def _in_order(self, view: memoryview, start: int, end: int) -> Piece:
        """The bytes from *start* to *end*, the words that they are in having been turned round."""
        word = self.word_bytes
        if word == 1:
            return view[start:end]
        low = start - (start - self._value) % word
        high = min(end + (self._value - end) % word, self._end)
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


class _Offsets(NamedTuple):
    """A table of numbers, where it stands."""

    at: int
    size: int
    entries: int

    def entry(self, view: memoryview, number: int) -> int:
        """Entry *number*, counted from 1; -1 past the last."""
        at = self.at + (number - 1) * self.size
        return int.from_bytes(view[at : at + self.size], "little") if number <= self.entries else -1


class EncapsulatedFrames:
    """Frames in the items of an encapsulated value (PS3.5 A.4): an offset table, then fragments.

    *told* of in all, of which *frames* are to be had, each if it is whole.  A scan, once it was needed, is
    kept; threads that need it at the same time each make it.
    """

    def __init__(
        self,
        view: memoryview,
        element: Element,
        transfer_syntax_uid: str,
        *,
        stated: int | None,
        offsets: _Offsets | None = None,
        lengths: _Offsets | None = None,
    ) -> None:
        """Scans the headers of the items of *element*, and that only if no table serves *stated* frames."""
        self._syntax = transfer_syntax_uid
        self._end = min(element.end, len(view))
        self._first, self._basic = _first_fragment(view, element.value, self._end, transfer_syntax_uid)
        self._extended, self._lengths = offsets, lengths
        self._starts: array[int] | None = None
        self.told = 1 if is_video(transfer_syntax_uid) else stated or 0
        self.frames = self._count(view)
        self.told = self.told or max(1, self.frames)

    @property
    def transfer_syntax_uid(self) -> str:
        """Of each frame; one of the encapsulated uncompressed syntax is what it would be natively."""
        return EXPLICIT_LITTLE if self._syntax == ENCAPSULATED_UNCOMPRESSED else self._syntax

    @property
    def size_bytes(self) -> int:
        """What the table costs beside a fixed part: 8 bytes a frame once it was scanned for."""
        return 8 * len(self._starts or ())

    def pieces(self, view: memoryview, number: int) -> list[Piece]:
        """The fragments of frame *number*, one of *frames*.  Raises RefusedError if it is not whole."""
        found = self._by_table(view, number)
        if found is None and self.told == 1:
            found = self._between(view, number, self._first, None)
        if found is None:
            found = self._by_scan(view, number)
        return found

    def frame_bytes(self, view: memoryview, number: int) -> int:
        """The size of frame *number*, one of *frames*.  Raises RefusedError if it is not whole."""
        return sum(map(len, self.pieces(view, number)))

    def _count(self, view: memoryview) -> int:
        if _item_length(view, self._first, self._first, self._end) < 0:
            return 0
        if self.told == 1 or self._table() is not None:
            return self.told
        starts = self._scanned(view)
        return min(self.told or len(starts), len(starts) - 1) if starts else self.told

    def _table(self) -> _Offsets | None:
        """The table that has an entry for each frame, if there is one."""
        if (
            self._extended
            and self._extended.entries >= self.told
            and (self.told > 1 or self._extended.entries == 1)
        ):
            return self._extended
        return self._basic if 1 < self.told <= self._basic.entries else None

    def _by_table(self, view: memoryview, number: int) -> list[Piece] | None:
        """The fragments that the table points at; None without one, or if it leads to no items."""
        table = self._table()
        if table is None:
            return None
        offset, following = table.entry(view, number), table.entry(view, number + 1)
        before = table.entry(view, number - 1) if number > 1 else -1
        # The first frame begins with the first fragment, and no frame is where another is: else a small file
        # could hold a large frame many times.
        if table.entry(view, 1) or not before < offset or -1 < following <= offset:
            return None
        pos, stop = self._first + offset, None if following < 0 else self._first + following
        if table is self._extended and self._lengths:
            item, length = self._item_length(view, pos), self._lengths.entry(view, number)
            end = self._end if stop is None else min(stop, self._end)
            if item >= 0 and item - 1 <= length <= item and pos + 8 + item <= end:
                return [view[pos + 8 : pos + 8 + length]]
        return self._between(view, number, pos, stop)

    def _between(self, view: memoryview, number: int, pos: int, stop: int | None) -> list[Piece] | None:
        """The fragments from *pos* to *stop*, or to the last; None if there are none, or *stop* is in one."""
        found: list[Piece] = []
        while stop is None or pos < stop:
            length = self._item_length(view, pos)
            if length < 0:
                break
            if pos + 8 + length > self._end:
                raise _cut_short(number)
            found.append(view[pos + 8 : pos + 8 + length])
            pos += 8 + length
        return found if found and stop in (None, pos) else None

    def _by_scan(self, view: memoryview, number: int) -> list[Piece]:
        starts = self._scanned(view)
        if not starts:
            raise RefusedError("Which fragments make a frame cannot be told.")
        found = None
        if number < len(starts):
            found = self._between(view, number, starts[number - 1], starts[number])
        if found is None:
            raise _cut_short(number)
        return found

    def _item_length(self, view: memoryview, pos: int) -> int:
        return _item_length(view, pos, self._first, self._end)

    def _scanned(self, view: memoryview) -> "array[int]":
        """Where frames begin, and where the last ends; empty if that cannot be told."""
        if self._starts is None:
            self._starts = self._scan(view)
        return self._starts

    def _scan(self, view: memoryview) -> "array[int]":
        """As `_scanned`.  One plain loop: measured, 0.4 us a fragment of a file in memory."""
        fragments, heads = array("Q"), LITTLE.implicit.unpack_from
        pos, last = self._first, self._end - 8
        while pos <= last:
            group, element, length = heads(view, pos)
            if group != 0xFFFE or element != 0xE000 or length == UNDEFINED:
                break
            fragments.append(pos)
            pos += 8 + length
        starts = self._grouped(view, fragments)
        if starts:
            starts.append(pos)
        return starts

    def _grouped(self, view: memoryview, fragments: "array[int]") -> "array[int]":
        """Those of *fragments* that begin a frame; none if that cannot be told."""
        if len(fragments) == self.told:
            return fragments
        if self.told and (pointed := self._pointed_at(view, fragments)):
            return pointed
        begins = array("Q", (pos for pos in fragments if _begins_stream(view, pos + 8, self._syntax)))
        if begins and begins[0] == fragments[0]:
            return begins
        if not self.told:
            return fragments[:1]
        return fragments if len(fragments) < self.told else array("Q")

    def _pointed_at(self, view: memoryview, fragments: "array[int]") -> "array[int]":
        """The fragments that all entries of the Basic Offset Table point at in turn; none if one does not."""
        entries = array("Q")
        rest = iter(fragments)
        for number in range(1, min(self._basic.entries, len(fragments)) + 1):
            entries.append(self._first + self._basic.entry(view, number))
            if entries[-1] not in rest:  # which goes on from the last one found
                return array("Q")
        return entries if entries and entries[0] == self._first else array("Q")


FrameTable: TypeAlias = NativeFrames | EncapsulatedFrames
"""Where the frames of one dataset are, and how many; to be used through `read_frame`."""


def _first_fragment(view: memoryview, value: int, end: int, transfer_syntax_uid: str) -> tuple[int, _Offsets]:
    """Where the item of the first fragment in an encapsulated value begins, and the Basic Offset Table."""
    length = _item_length(view, value, value, end)
    if length < 0 or value + 8 + length > end:
        return end, _Offsets(value, 4, 0)
    if _begins_stream(view, value + 8, transfer_syntax_uid):  # the table has been left out
        return value, _Offsets(value, 4, 0)
    return value + 8 + length, _Offsets(value + 8, 4, length // 4)


def _item_length(view: memoryview, pos: int, first: int, end: int) -> int:
    """The length of the item at *pos*, which may pass *end*; -1 if none is there."""
    if not first <= pos <= end - 8:
        return -1
    tag, length = read_item(view, pos, little=True)
    return length if tag == ITEM and length != UNDEFINED else -1


def _are_items(view: memoryview, value: int, end: int) -> bool:
    """Whether a value of defined length looks like an offset table and a fragment after it."""
    end = min(end, len(view))
    first, _ = _first_fragment(view, value, end, "")
    return _item_length(view, first, value, end) >= 0


def _begins_stream(view: memoryview, pos: int, transfer_syntax_uid: str) -> bool:
    """Whether what stands at *pos* can only be the beginning of a frame's bitstream."""
    if transfer_syntax_uid == RLE:
        return _begins_rle(bytes(view[pos : pos + 64]))
    head = bytes(view[pos : pos + 8])
    return head.startswith(_STREAM_STARTS) or (
        transfer_syntax_uid in _JPEG_XL and head.startswith(_JPEG_XL_START)
    )


def _begins_rle(header: bytes) -> bool:
    """Whether that is an RLE header (PS3.5 G.5): up to 15 segments, the first behind the header."""
    if len(header) < 64:
        return False
    count, *offsets = _RLE_HEADER.unpack(header)
    used = offsets[:count]
    return 1 <= count <= 15 and used[0] == 64 and all(map(int.__lt__, used, used[1:]))


def is_video(transfer_syntax_uid: str) -> bool:
    """Whether pixel data in that transfer syntax are one stream, whatever Number of Frames says."""
    return transfer_syntax_uid.removesuffix(".1") in _VIDEO
