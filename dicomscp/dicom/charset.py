"""Text in the character sets of (0008,0005) (PS3.3 section C.12.1.1.2, PS3.5 section 6.1).

pydicom's tables say which Python codec stands for which defined term and escape sequence; the decoding is
ours, after ISO 2022: G0 holds the bytes below 0x80, G1 those above, an escape sequence designates one of
them, and a delimiter brings both back to the first value of (0008,0005).

What devices send is read as they meant it: terms are recognised whatever separates their parts
("ISO-IR 100"), escape sequences are obeyed even if their set was not declared, and bytes beyond the default
repertoire are taken as Latin-1.  A text with such bytes, or with bytes that stand for nothing (U+FFFD), is
reported as not clean.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from pydicom.charset import CODES_TO_ENCODINGS, STAND_ALONE_ENCODINGS, python_encoding

_DEFAULT = python_encoding[""]
_ESCAPE = b"\x1b"
_TO_ASCII = {b"\x1b(B", b"\x1b(J"}  # JIS X 0201 Romaji differs from ASCII in two glyphs only
# 94x94 sets in G0.  ISO-2022-JP-2 knows both, and Python's codec wants to see the escape sequence.
_MULTIBYTE_G0 = {b"\x1b$B": b"\x1b$B", b"\x1b$@": b"\x1b$B", b"\x1b$(D": b"\x1b$(D"}
_G1 = {
    code: codec
    for code, codec in CODES_TO_ENCODINGS.items()
    if code not in _TO_ASCII and code not in _MULTIBYTE_G0
}
_ESCAPES = re.compile(b"(" + b"|".join(re.escape(code) for code in (*_TO_ASCII, *_MULTIBYTE_G0, *_G1)) + b")")


def _plain(term: str) -> str:
    return re.sub(r"[^0-9A-Z]", "", term.upper())


_CODECS = {_plain(term): codec for term, codec in python_encoding.items()}
_CODECS |= {"UTF8": python_encoding["ISO_IR 192"], "ISO2022IR58": "gb2312", "ISO202258": "gb2312"}
_STAND_ALONE = {_plain(term) for term in STAND_ALONE_ENCODINGS}


class CharacterSet(NamedTuple):
    """What (0008,0005) says of the text that follows."""

    codec: str  # of the first value
    escapes: bool  # whether code extensions may be obeyed
    known: bool  # whether all its terms are the standard's


@lru_cache(maxsize=256)
def character_set(terms: tuple[str, ...]) -> CharacterSet:
    """The character set that the values of (0008,0005) name; unknown ones are the default repertoire."""
    plain = [_plain(term) for term in terms] or [""]
    known = all(term in _CODECS for term in plain)
    return CharacterSet(_CODECS.get(plain[0], _DEFAULT), plain[0] not in _STAND_ALONE, known)


def decode(value: bytes, charset: CharacterSet, delimiters: bytes) -> tuple[str, bool]:
    """The text of *value*, and whether it is clean: no byte had to be guessed at.

    *delimiters* are the bytes that end a code extension: those between values and components, and line ends.
    """
    if _ESCAPE in value and charset.escapes:
        return _decode_extended(value, charset.codec, delimiters)
    return _decode_run(value, charset.codec)


def _decode_run(run: bytes, codec: str) -> tuple[str, bool]:
    if codec == _DEFAULT:
        return run.decode(_DEFAULT), run.isascii()
    try:
        return run.decode(codec), True
    except UnicodeDecodeError:
        return run.decode(codec, "replace"), False


def _decode_extended(value: bytes, base: str, delimiters: bytes) -> tuple[str, bool]:
    text, clean = [], True
    g0, g1 = b"", base
    for part in _ESCAPES.split(value):
        if part in _TO_ASCII:
            g0 = b""
        elif part in _MULTIBYTE_G0:
            g0 = _MULTIBYTE_G0[part]
        elif part in _G1:
            g1 = "gb2312" if _G1[part] == "iso_ir_58" else _G1[part]
        else:
            pieces, g0, g1 = _by_state(part, g0, g1, base, delimiters)
            for run, codec in pieces:
                decoded, run_clean = _decode_run(run, codec)
                text.append(decoded)
                clean = clean and run_clean
    return "".join(text), clean and "\x1b" not in "".join(text)


def _by_state(
    run: bytes, g0: bytes, g1: str, base: str, delimiters: bytes
) -> tuple[list[tuple[bytes, str]], bytes, str]:
    """*run*, which holds no known escape sequence, by the codec of its parts, and the state after it."""
    if g0:  # a delimiter's byte may be half of a character: text shall be back in ASCII before one
        return [(g0 + run, "iso2022_jp_2")], g0, g1
    at = next((at for at, byte in enumerate(run) if byte in delimiters), None)
    if at is None:
        return [(run, g1)], g0, g1
    return [(run[:at], g1), (run[at:], base)], g0, base
