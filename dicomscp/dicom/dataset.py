"""Datasets made out of metadata and bulk data (PS3.18 sections 8.6 and 10.5.1.4, annex F).

The attributes come as DICOM JSON, or as a Native DICOM Model that was read into the same form.  Elements are
written in Explicit VR Little Endian.  A dataset is a list of pieces: bytes, and values that lie elsewhere, so
that bulk data need not be in memory.

- DS and IS are written with the digits that they came with.
- Text is UTF-8 (F.2 has JSON so, whatever (0008,0005) says); where there is any beyond ASCII, or (0008,0005)
  is there, that becomes ISO_IR 192.
- Sequences and items have their lengths.
- What belongs to messages and not to datasets is left out: group 2, group lengths, and (0008,3002) Available
  Transfer Syntax UID, which answers have.
- Pixel data whose bulk data are compressed are encapsulated, one fragment a frame, behind an empty Basic
  Offset Table.  Of a JPEG or JPEG 2000 image, what its header tells of the pixels is added where the metadata
  do not have it (10.5.2).
- PNG and GIF, which have no transfer syntax, become native pixel data.  Where the metadata tell of these,
  they say what the image has: to say otherwise would make others of the pixels.

JSON is read one object of the array at a time, and what each may have in it is bounded before it is parsed:
a parser makes of three bytes an object of a hundred, and nothing else runs in the process meanwhile.
"""

import json
import re
import struct
from base64 import b64decode
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from dicomscp.dicom.codestream import Codestream, read_codestream
from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.elements import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    LONG_VRS,
    MAX_DEPTH,
    PIXEL_DATA,
    RLE,
    SEQUENCE_END_BYTES,
    SHORT_VRS,
    UNDEFINED,
    Encoding,
    element_head,
)
from dicomscp.dicom.identity import is_filable_syntax
from dicomscp.dicom.multipart import OCTET_STREAM
from dicomscp.dicom.values import BINARY_VRS
from dicomscp.errors import LimitError, RefusedError, TransferSyntaxError

Attributes: TypeAlias = Mapping[str, Mapping[str, Any]]
"""A DICOM JSON object, its numbers as text or numbers."""

_TAG = re.compile(r"[0-9A-F]{8}", re.ASCII)
_SOP_CLASS_UID, _SOP_UID = "00080016", "00080018"
_CHARSET = "00080005"
_NOT_OF_DATASETS = frozenset({0x00083002})
_NO_GROUPS = frozenset({0x0000, 0x0001, 0x0003, 0x0005, 0x0007, 0xFFFE, 0xFFFF})  # PS3.5 section 7.1
_CODESTREAM_HEAD_BYTES = 1 << 16
_NUMBERS = {
    "FL": "<f", "FD": "<d", "SL": "<l", "SS": "<h", "SV": "<q", "UL": "<L", "US": "<H", "UV": "<Q",
}  # fmt: skip
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_MAX_US = 0xFFFF
# In one instance, of objects and arrays, of colons, and of commas: what is parsed in half a second and takes
# 200 MiB at most.  100,000 attributes, as of 1,500 enhanced frames, have as many, or 500,000 contour points.
_MAX_CONTAINERS, _MAX_COLONS, _MAX_COMMAS = 200_000, 300_000, 1_500_000
_MAX_NESTED = 4 * MAX_DEPTH  # an item is in an array, in an attribute
# A brace, or a string in whole: one that never ends goes up to the end, so nothing is looked at twice.
_BRACE = re.compile(rb'([{}\[\]])|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_SPACE = b" \t\r\n"
_NO_ARRAY = "The metadata are no array of DICOM JSON objects."
_TOO_MUCH = "The metadata of an instance have more in them than is read. Send it as application/dicom."
_ENCODING = Encoding(explicit=True, little=True)
_NATIVE = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED})
# Media types whose transfer syntax the header of an image tells, and those that have one alone.
_IMAGES = frozenset({"image/jpeg", "image/jls", "image/jp2", "image/jpx", "image/jphc"})
TRANSFORMED = frozenset({"image/gif", "image/png"})
"""Media types of images that no transfer syntax has (PS3.18 table 10.5.2-1): what is stored is decoded."""

_ROWS_AND_KIND = frozenset(
    {0x00280002, 0x00280006, 0x00280008, 0x00280010, 0x00280011, 0x00280100, 0x00280103}
)
_PHOTOMETRIC, _NUMBER_OF_FRAMES = 0x00280004, 0x00280008
_DEFAULTS = dict.fromkeys(("image/dicom-rle", "image/x-dicom-rle"), RLE)


class Elsewhere(NamedTuple):
    """Bytes that lie elsewhere."""

    start: int
    size: int


Piece: TypeAlias = bytes | Elsewhere


class BulkData(NamedTuple):
    """One part of bulk data; *transfer_syntax_uid* is empty where the part does not say it.

    *image* describes native samples, of one frame or several, that an image was decoded to.
    """

    media_type: str
    transfer_syntax_uid: str
    where: Elsewhere
    image: Codestream | None = None


class Composed(NamedTuple):
    """One dataset: its bytes in order, and what it is."""

    sop_class_uid: str
    sop_uid: str
    transfer_syntax_uid: str
    pieces: list[Piece]


def json_objects(text: bytes) -> Iterator[bytes]:
    """The objects of a DICOM JSON array, or one object alone, each to be read by `read_json`.

    Memory is that of one of them.  Raises LimitError at one that has too much in it: then the end of it is
    not looked for; RefusedError where it is seen, at the latest behind the last, that this is no such array.
    """
    text = text.removeprefix(BOM_UTF8).strip(_SPACE)
    outside = int(text[:1] == b"[")  # as deep do the objects stand
    depth = containers = start = count = 0
    behind = outside  # the last object, or the bracket before the first
    for found in _BRACE.finditer(text):
        brace = found[1]
        if brace in (b"{", b"["):
            depth, containers = depth + 1, containers + 1
            if depth == outside + 1:
                start, containers = found.start(1), 1
                between = text[behind:start].strip(_SPACE)
                if brace == b"[" or between != (b"," if count else b"") or (count and not outside):
                    raise RefusedError(_NO_ARRAY)
            if containers > _MAX_CONTAINERS or depth > _MAX_NESTED:
                raise LimitError(_TOO_MUCH)
        elif brace:
            depth -= 1
            if depth == outside:
                behind, count = found.end(), count + 1
                _check_marks(text, start, behind)
                yield text[start:behind]
    if text[behind:].strip(_SPACE) != (b"]" if outside else b"") or not (outside or count == 1):
        raise RefusedError(_NO_ARRAY)


def _check_marks(text: bytes, start: int, end: int) -> None:
    """Raise LimitError for more members and values there, in one object, than are parsed."""
    if text.count(b":", start, end) > _MAX_COLONS or text.count(b",", start, end) > _MAX_COMMAS:
        raise LimitError(_TOO_MUCH)


def read_json(text: bytes) -> Attributes:
    """The DICOM JSON object that *text* is; numbers with the digits they have there.  Raises RefusedError."""
    try:
        found = json.loads(text.decode(), parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"The metadata are not JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise RefusedError("The metadata are no DICOM JSON object.")
    return found


def _not_decoded(part: BulkData) -> BulkData:
    raise TransferSyntaxError(f"{part.media_type} has no transfer syntax, and is not decoded")


def composed(
    attributes: Attributes,
    bulk: Callable[[str], Sequence[BulkData]],
    read: Callable[[Elsewhere], bytes],
    decoded: Callable[[BulkData], BulkData] = _not_decoded,
) -> Composed:
    """The dataset that *attributes* are, with the parts of *bulk* data that each URI in them names.

    *read* is called for the heads of compressed images, *decoded* for the samples of those that are
    `TRANSFORMED`.  Raises RefusedError, naming the element, and what these raise.
    """
    making = _Making(bulk, read, decoded)
    elements = making.dataset(attributes, 0)
    uids = [_uid(attributes, tag) for tag in (_SOP_CLASS_UID, _SOP_UID)]
    return Composed(uids[0], uids[1], making.transfer_syntax_uid, elements)


def _uid(attributes: Attributes, tag: str) -> str:
    values = attributes.get(tag, {}).get("Value") or [""]
    return values[0].strip() if isinstance(values[0], str) else ""


def _check_sequence(vr: str, attribute: Mapping[str, Any]) -> None:
    if vr == "SQ" and not {"BulkDataURI", "InlineBinary"}.isdisjoint(attribute):
        raise RefusedError("a sequence has its items in Value")


class _Making:
    """One dataset while it is made."""

    def __init__(
        self,
        bulk: Callable[[str], Sequence[BulkData]],
        read: Callable[[Elsewhere], bytes],
        decoded: Callable[[BulkData], BulkData],
    ) -> None:
        self._bulk, self._read, self._decoded = bulk, read, decoded
        self._beyond_ascii = False
        self._described: dict[int, list[Piece]] = {}
        self._is_native = False
        self.transfer_syntax_uid = EXPLICIT_LITTLE

    def dataset(self, attributes: Attributes, depth: int) -> list[Piece]:
        """The pieces of a dataset or item, its elements in the order of their tags."""
        elements: dict[int, list[Piece]] = {}
        for name, attribute in attributes.items():
            tag = _tag(name)
            if tag >> 16 != 0x0002 and tag & 0xFFFF and tag not in _NOT_OF_DATASETS:
                if tag >> 16 in _NO_GROUPS:
                    raise _within(tag, RefusedError("no element of a dataset has this tag"))
                elements[tag] = self._element(tag, attribute, depth)
        if depth == 0:
            if self._is_native:
                self._check_described(elements)
            elements = self._described | elements
        if _CHARSET in attributes or (self._beyond_ascii and depth == 0):
            elements[int(_CHARSET, 16)] = _framed(int(_CHARSET, 16), "CS", [b"ISO_IR 192"])
        return [piece for tag in sorted(elements) for piece in elements[tag]]

    def _element(self, tag: int, attribute: object, depth: int) -> list[Piece]:
        try:
            vr, attribute = _vr(tag, attribute)
            _check_sequence(vr, attribute)
            if "BulkDataURI" in attribute:
                return self._from_bulk(tag, vr, attribute["BulkDataURI"], depth)
            return _framed(tag, vr, self._value(vr, attribute, depth))
        except RefusedError as error:
            raise _within(tag, error) from error

    def _value(self, vr: str, attribute: Mapping[str, Any], depth: int) -> list[Piece]:
        if "InlineBinary" in attribute:
            return [_binary(attribute["InlineBinary"])]
        values = attribute.get("Value") or []
        if not isinstance(values, list):
            raise RefusedError("its Value is no array")
        if vr == "SQ":
            return self._items(values, depth + 1)
        if not values:
            return []
        if vr in BINARY_VRS:
            raise RefusedError(f"a value of {vr} is InlineBinary or bulk data")
        if vr in _NUMBERS:
            return [b"".join(_number(vr, value) for value in values)]
        if vr == "AT":
            return [b"".join(struct.pack("<HH", *divmod(_tag(value), 1 << 16)) for value in values)]
        text = "\\".join(_name(value) if vr == "PN" else _text(value) for value in values)
        self._beyond_ascii |= not text.isascii()
        try:
            return [(text.strip() if vr == "UI" else text).encode()]
        except UnicodeEncodeError as error:
            raise RefusedError("its text has half of a character in it") from error

    def _items(self, items: list[Any], depth: int) -> list[Piece]:
        if depth >= MAX_DEPTH:
            raise RefusedError(f"it nests deeper than {MAX_DEPTH} levels")
        pieces: list[Piece] = []
        for item in items:
            if item is not None and not isinstance(item, dict):
                raise RefusedError("an item is no JSON object")
            content = self.dataset(item or {}, depth)
            pieces += [_item(_size(content)), *content]
        return pieces

    def _from_bulk(self, tag: int, vr: str, uri: object, depth: int) -> list[Piece]:
        parts = self._bulk(uri) if isinstance(uri, str) else ()
        if not parts:
            raise RefusedError("no part of the body is its bulk data")
        if tag == PIXEL_DATA and any(map(_is_compressed, parts)):
            if depth:
                raise TransferSyntaxError("only pixel data of the dataset itself may be compressed")
            if all(part.media_type in TRANSFORMED and not part.transfer_syntax_uid for part in parts):
                return self._native([self._decoded(part) for part in parts])
            return self._encapsulated(parts)
        if len(parts) > 1:
            raise RefusedError("several parts are its bulk data")
        if tag == PIXEL_DATA and parts[0].transfer_syntax_uid == EXPLICIT_BIG:
            raise TransferSyntaxError("bulk data are little endian (PS3.18 section 10.5.1.4)")
        return _framed(tag, vr, [parts[0].where])

    def _native(self, parts: Sequence[BulkData]) -> list[Piece]:
        """Pixel data that were decoded, of parts with one frame or several; what they are is noted."""
        image = parts[0].image
        if image is None or any(part.image != image for part in parts):
            raise RefusedError("its frames are not all of one size and kind")
        self._described, self._is_native = _described(image), True
        if not self._described:
            raise RefusedError("the image has more rows or columns than an instance can tell")
        frame_bytes = image.rows * image.columns * image.samples * (1 if image.bits <= 8 else 2)
        frames = sum(part.where.size for part in parts) // frame_bytes
        if frames > 1:
            self._described[_NUMBER_OF_FRAMES] = _framed(_NUMBER_OF_FRAMES, "IS", [str(frames).encode()])
        return _framed(PIXEL_DATA, "OB" if image.bits <= 8 else "OW", [part.where for part in parts])

    def _check_described(self, elements: Mapping[int, list[Piece]]) -> None:
        """Raise RefusedError if *elements* say otherwise of native pixels than the image has them."""
        for tag in sorted(self._described.keys() & elements.keys()):
            has, said = (_value_of(tag, one[tag]) for one in (self._described, elements))
            is_grey = has.startswith(b"MONOCHROME") and said in (b"MONOCHROME1", b"MONOCHROME2")
            if said != has and (tag in _ROWS_AND_KIND or (tag == _PHOTOMETRIC and not is_grey)):
                raise _within(tag, RefusedError("it says otherwise than the image that is its pixel data"))

    def _encapsulated(self, parts: Sequence[BulkData]) -> list[Piece]:
        """Pixel data, a fragment a part; what the first image says of them is noted."""
        images = [self._image(part) for part in parts]
        said = {
            part.transfer_syntax_uid
            or (image.transfer_syntax_uid if image else _DEFAULTS.get(part.media_type, ""))
            for part, image in zip(parts, images, strict=True)
        }
        (self.transfer_syntax_uid,) = said if len(said) == 1 else ("",)
        if not is_filable_syntax(self.transfer_syntax_uid) or self.transfer_syntax_uid in _NATIVE:
            raise TransferSyntaxError("one transfer syntax for all frames is neither said nor seen")
        if images[0]:
            self._described = _described(images[0])
        pieces: list[Piece] = [struct.pack("<HH2sxxL", 0x7FE0, 0x0010, b"OB", UNDEFINED), _item(0)]
        for part, image in zip(parts, images, strict=True):
            start, size = (image.start, image.size) if image else (0, None)
            size = part.where.size - start if size is None else size
            if size > part.where.size - start:
                raise RefusedError("a compressed image is cut short")
            pieces += [_item(size + size % 2), Elsewhere(part.where.start + start, size), b"\0" * (size % 2)]
        return [*pieces, SEQUENCE_END_BYTES]

    def _image(self, part: BulkData) -> Codestream | None:
        """What a JPEG or JPEG 2000 image says of itself; None for what is none, such as a video."""
        if part.media_type != OCTET_STREAM and part.media_type not in _IMAGES:
            return None
        head = self._read(Elsewhere(part.where.start, min(part.where.size, _CODESTREAM_HEAD_BYTES)))
        try:
            return read_codestream(head)
        except RefusedError:
            if part.transfer_syntax_uid:  # who says how it is encoded need not be understood
                return None
            raise


def _value_of(tag: int, element: Sequence[Piece]) -> bytes:
    """The value of one of the elements that describe pixels, text without spaces around it."""
    value = b"".join(piece for piece in element[1:] if isinstance(piece, bytes))
    return value.strip(b" ") if tag in (_PHOTOMETRIC, _NUMBER_OF_FRAMES) else value


def _is_compressed(part: BulkData) -> bool:
    if part.transfer_syntax_uid:
        return part.transfer_syntax_uid not in _NATIVE
    return part.media_type != OCTET_STREAM


def _described(image: Codestream) -> dict[int, list[Piece]]:
    """The elements of the Image Pixel Description Macro (PS3.3 section C.7.6.3.1) that *image* tells."""
    allocated = 8 if image.bits <= 8 else 16 if image.bits <= 16 else 32
    numbers = {
        0x00280002: image.samples,
        0x00280010: image.rows,
        0x00280011: image.columns,
        0x00280100: allocated,
        0x00280101: image.bits,
        0x00280102: image.bits - 1,
        0x00280103: int(image.signed),
    }
    if image.samples > 1:
        numbers[0x00280006] = 0
    if max(numbers.values()) > _MAX_US:  # no element can say it
        return {}
    elements = {tag: _framed(tag, "US", [struct.pack("<H", number)]) for tag, number in numbers.items()}
    elements[0x00280004] = _framed(0x00280004, "CS", [image.photometric_interpretation.encode()])
    return elements


def _vr(tag: int, attribute: object) -> tuple[str, dict[str, Any]]:
    """The VR that *attribute* says, or that the standard has; and the attribute."""
    if not isinstance(attribute, dict):
        raise RefusedError("it is no JSON object")
    vr = attribute.get("vr") or public_vr(tag).split()[0]
    if not isinstance(vr, str) or not vr.isascii() or vr.encode() not in SHORT_VRS | LONG_VRS:
        raise RefusedError("its VR is none")
    return vr, attribute


def _item(size: int) -> bytes:
    if size >= UNDEFINED:
        raise RefusedError("it is longer than an element can be")
    return struct.pack("<HHL", 0xFFFE, 0xE000, size)


def _size(pieces: Sequence[Piece]) -> int:
    return sum(piece.size if isinstance(piece, Elsewhere) else len(piece) for piece in pieces)


def _framed(tag: int, vr: str, value: list[Piece]) -> list[Piece]:
    """The element, its value padded to an even length (PS3.5 section 7.1.1)."""
    size = _size(value)
    padding = b"" if size % 2 == 0 else b"\0" if vr in BINARY_VRS or vr == "UI" else b" "
    size += len(padding)
    if size >= UNDEFINED:
        raise RefusedError("it is longer than an element can be")
    head, length = element_head(tag, vr, _ENCODING)
    if length.size == 2 and size > 0xFFFF:
        head, length = element_head(tag, "UN", _ENCODING)
    return [head + length.pack(size), *value, padding]


def _tag(name: object) -> int:
    if not isinstance(name, str) or not _TAG.fullmatch(name):
        raise RefusedError("a tag is not eight hexadecimal digits")
    return int(name, 16)


def _binary(value: object) -> bytes:
    try:
        text = value.encode("ascii") if isinstance(value, str) else b"?"
        return b64decode(text.translate(None, _SPACE), validate=True)
    except ValueError as error:
        raise RefusedError("its InlineBinary is not base64") from error


def _number(vr: str, value: object) -> bytes:
    """One binary number; those of JSON come as their digits."""
    text = _text(value)
    try:
        return struct.pack(_NUMBERS[vr], float(text) if vr in ("FL", "FD") else int(text))
    except (ValueError, OverflowError, struct.error) as error:
        raise RefusedError(f"a value is no number that {vr} has") from error


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RefusedError("a value is neither text nor a number")
    return value


def _name(value: object) -> str:
    """A person's name as its component groups make it (PS3.18 section F.2.2)."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, dict):
        raise RefusedError("a name is no JSON object")
    return "=".join(_text(value.get(group)) for group in _GROUPS).rstrip("=")


def _within(tag: int, error: RefusedError) -> RefusedError:
    """*error*, saying in which element; those of items say it already."""
    named = f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
    said = str(error)
    return type(error)(f"{named}{said}" if said.startswith("(") else f"{named}: {said}.")
