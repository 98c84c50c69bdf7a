"""Values of elements as the values of DICOM JSON attributes (PS3.18 section F.2).

A value is a function of its bytes and of its *circumstances*: byte order and character set.  What Annex F
leaves open, and what is not as its VR demands, is told in `jsonmodel`, whose rules these are.
"""

import math
import re
import struct
from array import array
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import orjson

from dicomscp.dicom.charset import CharacterSet, decode

BINARY_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})

BAD_TEXT = "{} texts hold bytes outside their character set"
BAD_NUMBER = "{} numbers are not as their VR demands"
BAD_LENGTH = "{} values have a length that does not fit their VR"
BAD_NAME = "{} person names have more than three component groups"

_MAX_SAFE_INTEGER = (1 << 53) - 1

# Most text can go into JSON as it is: printable, no quote, no backslash.  All character sets agree on these,
# as far as they are decoded here: JIS X 0201 differs from ASCII in backslash and tilde.
_PLAIN = re.compile(rb"[ !#-\[\]-}]*")
_PLAIN_OR_SEVERAL = re.compile(rb"[ !#-}]*")


class Circumstances(NamedTuple):
    """What the reading of a value depends on beside its VR."""

    little: bool
    charset: CharacterSet
    warn: Callable[[str], None]


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


def _array(values: list[str]) -> bytes:
    """*values* as JSON, empty ones null; b"" if there is but one and it is empty (section F.2.5)."""
    if len(values) == 1 and not values[0]:
        return b""
    return orjson.dumps([value or None for value in values])


def _plain_array(value: bytes, strip: Callable[[bytes, bytes], bytes]) -> bytes:
    """As `_array`, of values that can go into JSON as they are but for the spaces between."""
    values = [strip(part, b" ") for part in value.split(b"\\")]
    if all(values):
        return b'["' + b'","'.join(values) + b'"]'
    return b"[" + b",".join([b'"' + value + b'"' if value else b"null" for value in values]) + b"]"


def _codes(value: bytes, given: Circumstances, _vr: str) -> bytes:
    """Strings of the default repertoire; leading spaces mean nothing."""
    value = value.strip(b" \0")
    if _PLAIN.fullmatch(value):
        return b'["' + value + b'"]' if value else b""
    if _PLAIN_OR_SEVERAL.fullmatch(value):
        return _plain_array(value, bytes.strip)
    return _array([part.strip(" \0") for part in _latin_1(value, given).split("\\")])


def _spaced_codes(value: bytes, given: Circumstances, _vr: str) -> bytes:
    """As `_codes`; a leading space is part of the value."""
    value = value.rstrip(b" \0")
    if _PLAIN.fullmatch(value):
        return b'["' + value + b'"]' if value else b""
    if _PLAIN_OR_SEVERAL.fullmatch(value):
        return _plain_array(value, bytes.rstrip)
    return _array([part.rstrip(" \0") for part in _latin_1(value, given).split("\\")])


def _uri(value: bytes, given: Circumstances, _vr: str) -> bytes:
    return _array([_latin_1(value, given).rstrip(" \0")])


def _latin_1(value: bytes, given: Circumstances) -> str:
    if not value.isascii():
        given.warn(BAD_TEXT)
    return value.decode("latin-1")


def _texts(value: bytes, given: Circumstances, _vr: str) -> bytes:
    plain = value.strip(b" \0")
    if _PLAIN.fullmatch(plain):
        return b'["' + plain + b'"]' if plain else b""
    if _PLAIN_OR_SEVERAL.fullmatch(plain):
        return _plain_array(plain, bytes.strip)
    return _array([part.strip(" \0") for part in _decoded(value, given, b"\\\r\n\f\t").split("\\")])


def _spaced_texts(value: bytes, given: Circumstances, _vr: str) -> bytes:
    """As `_texts`; a leading space is part of the value."""
    plain = value.rstrip(b" \0")
    if _PLAIN_OR_SEVERAL.fullmatch(plain):
        return _plain_array(plain, bytes.rstrip) if plain else b""
    return _array([part.rstrip(" \0") for part in _decoded(value, given, b"\\\r\n\f\t").split("\\")])


def _paragraph(value: bytes, given: Circumstances, _vr: str) -> bytes:
    plain = value.rstrip(b" \0")
    if _PLAIN.fullmatch(plain):
        return b'["' + plain + b'"]' if plain else b""
    return _array([_decoded(value, given, b"\r\n\f\t").rstrip(" \0")])


def _decoded(value: bytes, given: Circumstances, delimiters: bytes) -> str:
    text, clean = decode(value, given.charset, delimiters)
    if not clean:
        given.warn(BAD_TEXT)
    return text


def _person_names(value: bytes, given: Circumstances, _vr: str) -> bytes:
    if _PLAIN.fullmatch(plain := value.rstrip(b" \0")) and b"=" not in plain:
        return b'[{"Alphabetic":"' + plain + b'"}]' if plain else b""
    names = []
    for name in _decoded(value, given, b"\\^=\r\n\f\t").split("\\"):
        parts = name.split("=")
        if len(parts) > 3:
            given.warn(BAD_NAME)
        groups = zip(_COMPONENT_GROUPS, parts, strict=False)
        names.append({group: text for group, part in groups if (text := part.rstrip(" \0"))} or None)
    return b"" if names == [None] else orjson.dumps(names)


_COMPONENT_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def _decimals(value: bytes, given: Circumstances, _vr: str) -> bytes:
    return _number_array(value, given, _PLAIN_DECIMALS, _decimal)


def _integers(value: bytes, given: Circumstances, _vr: str) -> bytes:
    return _number_array(value, given, _PLAIN_INTEGERS, _integer)


def _number_array(
    value: bytes,
    given: Circumstances,
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
            given.warn(BAD_NUMBER)
            digits = orjson.dumps(part.decode("latin-1"))
        values.append(digits)
    return b"[" + b",".join(values) + b"]"


# What can go into JSON as it stands, several values at once: most of what there is.
_PLAIN_DECIMAL = rb"-?(?:0|[1-9]\d{0,14})(?:\.\d{1,99})?(?:[eE][+-]?\d\d?)?"
_PLAIN_INTEGER = rb"-?(?:0|[1-9]\d{0,14})"
_PLAIN_DECIMALS = re.compile(rb"%b(?:\\%b)*" % (_PLAIN_DECIMAL, _PLAIN_DECIMAL))
_PLAIN_INTEGERS = re.compile(rb"%b(?:\\%b)*" % (_PLAIN_INTEGER, _PLAIN_INTEGER))
_DECIMAL = re.compile(rb"([+-]?)(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?")


def _decimal(part: bytes) -> bytes | None:
    """The DS *part* as a JSON number with the same digits; None if it is none, or beyond a 64-bit float.

    A whole number that a 64-bit float would change is a string of them.
    """
    match = _DECIMAL.fullmatch(part)
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, fraction, exponent = match.groups()
    number = float(part)
    if not math.isfinite(number) or (not number and (whole + (fraction or b"")).strip(b"0")):
        return None
    whole = whole.lstrip(b"0") or b"0"
    text = (b"-" if sign == b"-" else b"") + whole
    if (
        len(whole) > 15
        and not exponent
        and not (fraction or b"").strip(b"0")
        and f"{number:.0f}" != text.decode()
    ):
        return b'"' + text + b'"'
    text += b"." + fraction if fraction else b""
    return text + (b"e" + exponent if exponent else b"")


def _integer(part: bytes) -> bytes | None:
    """The IS *part* as a JSON number; None if it is no whole number that one carries."""
    match = _DECIMAL.fullmatch(part)
    if match is None or match[4] or not match[2] or (match[3] or b"").strip(b"0") or len(match[2]) > 20:
        return None
    number = int(match[1] + match[2])
    return b"%d" % number if abs(number) <= _MAX_SAFE_INTEGER else None


def _tags(value: bytes, given: Circumstances, _vr: str) -> bytes:
    numbers = _unpacked(value, given, "HH", 4)
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return orjson.dumps([f"{group:04X}{number:04X}" for group, number in pairs]) if numbers else b""


def _numbers(value: bytes, given: Circumstances, vr: str) -> bytes:
    typecode, size = _FORMATS[vr]
    if len(value) == size:  # by far the most
        order: Literal["little", "big"] = "little" if given.little else "big"
        return b"[%d]" % int.from_bytes(value, order, signed=typecode.islower())
    numbers = _unpacked(value, given, typecode, size)
    return orjson.dumps(numbers) if numbers else b""


def _long_numbers(value: bytes, given: Circumstances, vr: str) -> bytes:
    numbers = _unpacked(value, given, *_FORMATS[vr])
    values = [number if abs(number) <= _MAX_SAFE_INTEGER else str(number) for number in numbers]
    return orjson.dumps(values) if values else b""


def _floats(value: bytes, given: Circumstances, vr: str) -> bytes:
    numbers = _unpacked(value, given, *_FORMATS[vr])
    if all(map(math.isfinite, numbers)):
        return orjson.dumps(numbers) if numbers else b""
    return orjson.dumps([number if math.isfinite(number) else _not_finite(number) for number in numbers])


def _not_finite(number: float) -> str:
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def _unpacked(value: bytes, given: Circumstances, typecodes: str, size: int) -> tuple[Any, ...]:
    """The numbers in *value*; bytes that make no whole number are left out."""
    count, rest = divmod(len(value), size)
    if rest:
        given.warn(BAD_LENGTH)
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
CONVERTERS: Mapping[str, Callable[[bytes, Circumstances, str], bytes]] = (
    dict.fromkeys(("AE", "CS"), _codes)
    | dict.fromkeys(("AS", "DA", "DT", "TM", "UI"), _spaced_codes)
    | dict.fromkeys(("LO", "SH"), _texts)
    | dict.fromkeys(("LT", "ST", "UT"), _paragraph)
    | dict.fromkeys(("SL", "SS", "UL", "US"), _numbers)
    | dict.fromkeys(("SV", "UV"), _long_numbers)
    | dict.fromkeys(("FD", "FL"), _floats)
    | {"AT": _tags, "DS": _decimals, "IS": _integers, "PN": _person_names, "UC": _spaced_texts, "UR": _uri}
)
"""By VR, what makes the JSON array of the values; b"" if there are none."""
