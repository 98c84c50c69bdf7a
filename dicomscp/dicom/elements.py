"""Where the elements of an encoded dataset begin and end (PS3.5 section 7).

Everything here works on positions in a buffer and copies nothing, so it serves whole datasets, prefixes and
mapped files alike.  Bytes that run out are always a PrefixError: only the caller knows whether more exist
(give them) or not (the dataset was cut short).

What devices get wrong, and every reader of ours forgives in the same way:

- the byte order or VR encoding is not that of the transfer syntax: the first element tells (`encoding_of`);
- single elements or items of an explicit VR dataset are in implicit VR (`unknown_vr`);
- UN of undefined length holds implicit VR little endian items (PS3.5 section 6.2.2, note 2).
"""

import struct
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from dicomscp.errors import RefusedError

if TYPE_CHECKING:
    from mmap import mmap

Buffer: TypeAlias = "bytes | bytearray | memoryview | mmap"

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
RLE = "1.2.840.10008.1.2.5"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
# GE's private syntax for its own archives: implicit VR, only the pixels in big endian order.
BIG_PIXELS = "1.2.840.113619.5.2"

# JPIP Referenced Deflate and HTJ2K JPIP Referenced Deflate deflate the whole dataset too (PS3.5 A.7, A.11).
_DEFLATED = frozenset({DEFLATED, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})
_IMPLICIT = frozenset({IMPLICIT_LITTLE, BIG_PIXELS})

# PS3.5 Tables 7.1-1 and 7.1-2.
LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())

UNDEFINED = 0xFFFFFFFF
MAX_DEPTH = 64  # the deepest real object nests about ten levels
MAX_INFLATED_BYTES = 256 << 20  # what one deflated dataset may cost in memory
_INFLATE_BYTES = 1 << 18

ITEM = 0xFFFEE000
ITEM_END = 0xFFFEE00D
SEQUENCE_END = 0xFFFEE0DD
SEQUENCE_END_BYTES = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"

PIXEL_DATA = 0x7FE00010

NO_VR = b"\0\0"  # what stands for the VR in a delimiter without length
_BLANK_VRS = frozenset({b"  ", b"??", b"--"})


class PrefixError(Exception):
    """The bytes given end before the answer: give more of them, or all."""


class Encoding(NamedTuple):
    """How the elements of a dataset are written."""

    explicit: bool
    little: bool


@lru_cache(maxsize=4096)
def element_head(tag: int, vr: str, encoding: Encoding) -> tuple[bytes, struct.Struct]:
    """What stands before the length of an element, and how that is written (PS3.5 section 7.1).

    A value that is too long for a length of two bytes is written as one of UN (section 6.2.2, note 6).
    """
    order = "<" if encoding.little else ">"
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    if not encoding.explicit:
        return head, struct.Struct(f"{order}L")
    if vr.encode() in LONG_VRS:
        return head + vr.encode() + b"\0\0", struct.Struct(f"{order}L")
    return head + vr.encode(), struct.Struct(f"{order}H")


class Reader(NamedTuple):
    """The unpackers of one byte order; each takes a buffer and a position."""

    explicit: struct.Struct  # group, element, VR, 16-bit length
    implicit: struct.Struct  # group, element, 32-bit length
    ulong: struct.Struct


LITTLE = Reader(struct.Struct("<HH2sH"), struct.Struct("<HHL"), struct.Struct("<L"))
BIG = Reader(struct.Struct(">HH2sH"), struct.Struct(">HHL"), struct.Struct(">L"))


class Element(NamedTuple):
    """One element: its value is `data[value:end]`, framing included if the length is undefined."""

    tag: int
    vr: bytes  # b"" where none is written
    start: int
    value: int
    length: int  # may be UNDEFINED
    end: int


def is_deflated(transfer_syntax_uid: str) -> bool:
    """Whether the whole dataset is deflated."""
    return transfer_syntax_uid in _DEFLATED


def inflate(data: Buffer, max_bytes: int = MAX_INFLATED_BYTES) -> tuple[bytearray, bool]:
    """The dataset in deflated *data*, at most *max_bytes* of it, and whether that is all.

    Memory stays within what is returned.  Raises RefusedError if it does not inflate or is cut short.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    dataset, view = bytearray(), memoryview(data)
    try:
        for start in range(0, len(view), _INFLATE_BYTES):
            pending: Buffer = view[start : start + _INFLATE_BYTES]
            while len(pending) and not inflater.eof:
                dataset += inflater.decompress(pending, min(_INFLATE_BYTES, max_bytes - len(dataset)))
                pending = inflater.unconsumed_tail
                if len(dataset) >= max_bytes:
                    return dataset, inflater.eof
        while not inflater.eof and (piece := inflater.decompress(b"", _INFLATE_BYTES)):
            dataset += piece  # what zlib had taken in and not yet given out: less than a block
    except zlib.error as error:
        raise RefusedError(f"The deflated dataset cannot be inflated ({error}).") from error
    if not inflater.eof:
        raise RefusedError("The deflated dataset is cut short.")
    return dataset, True


def declared_encoding(transfer_syntax_uid: str) -> Encoding:
    """How a dataset in this transfer syntax should be written (once inflated)."""
    return Encoding(transfer_syntax_uid not in _IMPLICIT, transfer_syntax_uid != EXPLICIT_BIG)


def encoding_of(dataset: Buffer, transfer_syntax_uid: str) -> Encoding:
    """How *dataset* (inflated) is really written, the transfer syntax being what it should be."""
    explicit, little = declared_encoding(transfer_syntax_uid)
    first = bytes(dataset[:6])
    if len(first) < 6:
        return Encoding(explicit, little)
    # Datasets begin in a group near 0x0008, so the zero byte of the first group shows the order.
    if first[0] == 0 < first[1] <= 0x28:
        little = False
    elif first[1] == 0 < first[0] <= 0x28:
        little = True
    return Encoding(is_vr(first[4:6]), little)


def is_vr(two: bytes) -> bool:
    """Whether *two* bytes can be a VR: capital letters (a length that looks so would be over 16 KiB)."""
    return two in SHORT_VRS or two in LONG_VRS or (two.isalpha() and two.isupper())


def read_element(
    data: Buffer, pos: int, encoding: Encoding, depth: int = 0, ends: dict[int, int] | None = None
) -> Element:
    """The element at *pos*.

    Its end may lie past the bytes given if its length is defined.  *ends* remembers where values of undefined
    length in *data* end, so that who descends into them does not pay for each level again.

    Raises PrefixError if the bytes run out before the end is known, RefusedError if it is not framed as an
    element.
    """
    reader = LITTLE if encoding.little else BIG
    try:
        group, number, vr, length = reader.explicit.unpack_from(data, pos)
        value = pos + 8
        if vr in SHORT_VRS and encoding.explicit:  # by far the most
            return Element._make((group << 16 | number, vr, pos, value, length, value + length))
        if not encoding.explicit:
            vr, length = b"", reader.ulong.unpack_from(data, pos + 4)[0]
        elif vr in LONG_VRS:
            length = reader.ulong.unpack_from(data, value)[0]
            value += 4
        else:
            vr, length, value = unknown_vr(data, pos, vr, length, reader)
    except struct.error as error:
        raise PrefixError from error
    end = value + length
    if length == UNDEFINED and (not vr or vr in LONG_VRS):
        end = -1 if ends is None else ends.get(value, -1)
        if end < 0:
            end = skip_items(data, value, inner_encoding(vr, encoding), depth, ends)
    return Element(group << 16 | number, vr, pos, value, length, end)


def unknown_vr(data: Buffer, pos: int, vr: bytes, length: int, reader: Reader) -> tuple[bytes, int, int]:
    """VR, length and position of the value of an element at *pos* whose VR is none that we know.

    Letters are a VR of the future, whose length PS3.5 section 6.2 fixes to 32 bits after two reserved bytes,
    or a mistake; blanks are a mistake with a length of 16 bits; all else is an element in implicit VR.
    """
    if vr in _BLANK_VRS or (is_vr(vr) and length):
        return b"UN", length, pos + 8
    if is_vr(vr):
        return b"UN", reader.ulong.unpack_from(data, pos + 8)[0], pos + 12
    return b"", reader.ulong.unpack_from(data, pos + 4)[0], pos + 8


def inner_encoding(vr: bytes, encoding: Encoding) -> Encoding:
    """How the items inside an element of undefined length are written."""
    return Encoding(explicit=False, little=True) if vr == b"UN" else encoding


def item_encoding(data: Buffer, pos: int, encoding: Encoding) -> Encoding:
    """How the item whose elements begin at *pos* is written: implicit VR occurs in explicit datasets."""
    if not encoding.explicit or is_vr(bytes(data[pos + 4 : pos + 6])):
        return encoding
    return Encoding(explicit=False, little=encoding.little)


def read_item(data: Buffer, pos: int, little: bool) -> tuple[int, int]:
    """Tag and length of the item or delimiter at *pos*; PrefixError if the bytes run out."""
    try:
        group, number, length = (LITTLE if little else BIG).implicit.unpack_from(data, pos)
    except struct.error as error:
        raise PrefixError from error
    return group << 16 | number, length


def skip_items(
    data: Buffer, pos: int, encoding: Encoding, depth: int = 0, ends: dict[int, int] | None = None
) -> int:
    """Where the items that begin at *pos* and the sequence delimiter after them end.

    Serves sequences and encapsulated pixel data alike.
    """
    if depth >= MAX_DEPTH:
        raise RefusedError(f"The dataset nests deeper than {MAX_DEPTH} levels.")
    start = pos
    while True:
        tag, length = read_item(data, pos, encoding.little)
        pos += 8
        if tag == SEQUENCE_END:
            if ends is not None:
                ends[start] = pos
            return pos
        if tag != ITEM:
            raise RefusedError("An element of undefined length holds something else than items.")
        pos = pos + length if length != UNDEFINED else _skip_item(data, pos, encoding, depth + 1, ends)


def _skip_item(data: Buffer, pos: int, encoding: Encoding, depth: int, ends: dict[int, int] | None) -> int:
    """Where the item of undefined length whose elements begin at *pos* ends, its delimiter included.

    One plain loop, and `read_element` for what is not plain: a frame of an enhanced multi-frame image is some
    thirty elements.
    """
    encoding = item_encoding(data, pos, encoding)
    reader = LITTLE if encoding.little else BIG
    explicit_head, implicit_head = reader.explicit.unpack_from, reader.implicit.unpack_from
    explicit = encoding.explicit
    while True:
        try:
            if explicit:
                group, number, vr, length = explicit_head(data, pos)
                if vr in SHORT_VRS:
                    pos += 8 + length
                    continue
                if group == 0xFFFE and number == 0xE00D and vr == NO_VR and not length:
                    return pos + 8
            else:
                group, number, length = implicit_head(data, pos)
                if length != UNDEFINED:
                    pos += 8 + length
                    if group << 16 | number == ITEM_END:
                        return pos
                    continue
        except struct.error as error:
            raise PrefixError from error
        element = read_element(data, pos, encoding, depth, ends)
        pos = element.end
        if element.tag == ITEM_END:
            return pos
