"""DICOM JSON objects as the Native DICOM Model in XML (PS3.19 section A.1; PS3.18 F.1 maps the two).

One object makes one document in UTF-8.  No white space is added: `xml:space="preserve"` makes it content.

- A private element has its creator in `privateCreator` and, in its tag, 00 for the block that the creator
  reserved.  If the creator is not among the attributes given, the block is all there is to tell by: the tag
  is given as it stands.  The elements that reserve blocks stand among the others.  Of two blocks that one
  creator reserved nothing tells the elements apart: the model has no place for it.
- Empty values between others are empty elements: each value keeps its number.
- The components of a name each have an element; what follows a fifth stays with it, carets and all, so a
  name that has more than it may is not cut.  Empty components and groups have none.
- Numbers are written as JSON has them; those that come as text, with the very digits they came with.
- XML 1.0 cannot hold control characters and the like, not even escaped: each becomes U+FFFD, and is counted.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from pydicom.datadict import keyword_for_tag

Attributes: TypeAlias = Mapping[str, Mapping[str, Any]]
"""A DICOM JSON object: by tag, as eight upper-case hex digits, VR and value."""

_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>'
    '<NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM" xml:space="preserve">'
)
_TAIL = "</NativeDicomModel>"
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_COMPONENTS = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")

# XML 1.0, production 2 (Char), turned round.
_NO_CHARACTER = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# A parser makes one line feed of any line end, and in an attribute a space of any white space.
_ESCAPED = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}
)
_TO_ESCAPE = re.compile('[&<>"\t\n\r]')


class Encoded(NamedTuple):
    """A document, and how many characters in it stand for some that XML cannot hold."""

    document: bytes
    replaced: int


def native_model(attributes: Attributes) -> Encoded:
    """The Native DICOM Model of *attributes*, in the order in which they are given."""
    pieces = [_HEAD]
    _dataset(attributes, pieces)
    pieces.append(_TAIL)
    text, replaced = _NO_CHARACTER.subn("\ufffd", "".join(pieces))
    return Encoded(text.encode(), replaced)


def _dataset(attributes: Attributes, pieces: list[str]) -> None:
    for tag, attribute in attributes.items():
        vr = attribute["vr"]
        pieces.append(f'<DicomAttribute {_named(tag, _creator(tag, attributes))} vr="{vr}">')
        if "BulkDataURI" in attribute:
            pieces.append(f'<BulkData uri="{_escaped(attribute["BulkDataURI"])}"/>')
        elif "InlineBinary" in attribute:
            pieces.append(f"<InlineBinary>{attribute['InlineBinary']}</InlineBinary>")
        elif vr == "SQ":
            _items(attribute.get("Value", ()), pieces)
        elif vr == "PN":
            pieces += map(_person_name, *_numbered(attribute.get("Value", ())))
        else:
            pieces += map(_value, *_numbered(attribute.get("Value", ())))
        pieces.append("</DicomAttribute>")


def _numbered(values: Sequence[Any]) -> tuple[range, Sequence[Any]]:
    return range(1, len(values) + 1), values


def _items(items: Sequence[Attributes | None], pieces: list[str]) -> None:
    for number, item in enumerate(items, 1):
        pieces.append(f'<Item number="{number}">')
        _dataset(item or {}, pieces)
        pieces.append("</Item>")


def _value(number: int, value: Any) -> str:
    return f'<Value number="{number}">{"" if value is None else _escaped(str(value))}</Value>'


def _person_name(number: int, value: Mapping[str, str] | None) -> str:
    groups = ((group, _components((value or {}).get(group) or "")) for group in _GROUPS)
    content = "".join(f"<{group}>{name}</{group}>" for group, name in groups if name)
    return f'<PersonName number="{number}">{content}</PersonName>'


def _components(group: str) -> str:
    parts = group.split("^", len(_COMPONENTS) - 1)
    return "".join(
        f"<{name}>{_escaped(part)}</{name}>" for name, part in zip(_COMPONENTS, parts, strict=False) if part
    )


def _escaped(text: str) -> str:
    return text.translate(_ESCAPED) if _TO_ESCAPE.search(text) else text


def _creator(tag: str, attributes: Attributes) -> str | None:
    """The creator of the block that *tag* is in; None if it is in none, or not told."""
    if tag[3] not in "13579BDF" or tag[4:6] == "00":
        return None
    values = attributes.get(f"{tag[:4]}00{tag[4:6]}", {}).get("Value") or (None,)
    return values[0] if isinstance(values[0], str) else None


@lru_cache(maxsize=8192)
def _named(tag: str, creator: str | None) -> str:
    """The XML attributes that say which element it is."""
    if creator is not None:
        return f'tag="{tag[:4]}00{tag[6:]}" privateCreator="{_escaped(creator)}"'
    keyword = keyword_for_tag(int(tag, 16))
    return f'tag="{tag}" keyword="{keyword}"' if keyword else f'tag="{tag}"'
