"""Names of people (VR PN) as they are compared: folded, in parts, by their sound.

*Folding* takes away in what a name may be written otherwise and be the same, and is all that literal matching
allows; a folded name folds to itself.

    ＹＡＭＡＤＡ  width, ligatures, compatibility forms, by NFKC          yamada
    Müller Łęcki  case, and marks upon Latin, Greek and Cyrillic letters   muller lecki
    Søren Đặng    Latin letters with a stroke and ligatures, by a table    soren dang
    מֹשֶׁה مُحَمَّد     Hebrew points, Arabic vowel signs and tatweel           משה محمد
    ’ ʼ ´ ‐ –     one apostrophe and one hyphen                            ' -

What else is a letter stays one: kana keep their voicing marks (か is not が), Hangul syllables are composed,
ideographs are not simplified, hiragana are not katakana, Arabic letters keep hamza and madda.  No character
becomes a delimiter or wildcard that was none: a fullwidth ＾ or ＊ stays.

*Parts* are what stands between the delimiters of a name (= ^), commas, spaces, hyphens and full stops.
Apostrophes do not part: O'Brien is obrien.

*Sound* is Metaphone for parts in Latin letters, as far as English goes; parts in other scripts sound as they
are written.
"""

import re
import unicodedata
from functools import lru_cache

import jellyfish

_DELIMITERS = frozenset("=^*?\\")
_LONGEST_NAME = 64  # characters of a part that is remembered; whole names are no longer (PS3.5 table 6.2-1)
_MARKED_SCRIPTS = ("LATIN ", "GREEK ", "CYRILLIC ")
# Unicode does not decompose them.
_LATIN = str.maketrans(
    {
        "ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ŧ": "t", "ŋ": "n", "ı": "i", "ȷ": "j", "ƶ": "z",
        "æ": "ae", "œ": "oe", "þ": "th", "ɓ": "b", "ƀ": "b", "ɗ": "d", "ɖ": "d", "ƒ": "f", "ǥ": "g",
        "ɨ": "i", "ƙ": "k", "ĸ": "k", "ɉ": "j", "ɲ": "n", "ƴ": "y", "ɏ": "y", "ɇ": "e", "ɍ": "r", "ⱦ": "t",
        "‘": "'", "’": "'", "ʼ": "'", "ʹ": "'", "ʻ": "'", "`": "'", "´": "'", "׳": "'",
        "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "-", "―": "-", "−": "-", "־": "-",
        "\u0640": None,  # tatweel draws a word out
        "\u200b": None, "\u200c": None, "\u200d": None, "\u00ad": None, "\ufeff": None,  # nothing to be seen
    }
)  # fmt: skip
# Hebrew accents and points, Arabic vowel signs: written or not, the name is the same.
_POINTS = frozenset(
    chr(code)
    for first, last in ((0x0591, 0x05BD), (0x05BF, 0x05BF), (0x05C1, 0x05C2), (0x05C4, 0x05C5),
                        (0x05C7, 0x05C7), (0x064B, 0x0652), (0x0670, 0x0670))
    for code in range(first, last + 1)
)  # fmt: skip
_BETWEEN_PARTS = re.compile(r"[\s=^,.;/\\-]+")


def fold(text: str) -> str:
    """*text* as it is compared; equal for names that differ in case, accents, width and vowel signs alone."""
    if text.isascii():
        return text.lower().replace("`", "'")
    letters: list[str] = []
    is_marked_script = False
    for character in "".join(map(_decomposed, text)):
        if character in _POINTS:
            continue
        if not unicodedata.combining(character):
            is_marked_script = _is_of_marked_script(character)
        elif is_marked_script:
            continue
        letters.append(character)
    return unicodedata.normalize("NFC", "".join(letters).casefold().translate(_LATIN))


@lru_cache(maxsize=1 << 14)
def _decomposed(character: str) -> str:
    found = unicodedata.normalize("NFKD", character)
    is_told = ord(character) in _LATIN  # before its compatibility form would be something else
    return character if is_told or _DELIMITERS & set(found) else found


@lru_cache(maxsize=1 << 14)
def _is_of_marked_script(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_MARKED_SCRIPTS)


def name_parts(folded: str) -> list[str]:
    """The parts of a folded name, of all its component groups, in their order."""
    return [part for part in _BETWEEN_PARTS.split(folded.replace("'", "")) if part]


def sound(part: str) -> str:
    """What a folded part sounds like: upper case if it is of Latin letters, else the part itself."""
    if not (part.isascii() and part.isalpha()):
        return part
    return _metaphone(part) if len(part) <= _LONGEST_NAME else jellyfish.metaphone(part) or part


@lru_cache(maxsize=1 << 14)
def _metaphone(part: str) -> str:
    return jellyfish.metaphone(part) or part
