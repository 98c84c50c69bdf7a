"""DICOM JSON objects as the Native DICOM Model in XML and back (PS3.19 section A.1; PS3.18 F.1 maps the two).

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

What is read is bounded before it is parsed, for four bytes of XML make an element that takes a hundred times
as many; and it is in one of the encodings that every parser has (XML 1.0 section 4.3.3, and ISO 8859-1).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias
from xml.parsers import expat

from pydicom.datadict import keyword_for_tag

from dicomscp.errors import LimitError, RefusedError

Attributes: TypeAlias = Mapping[str, Mapping[str, Any]]
"""A DICOM JSON object: by tag, as eight upper-case hex digits, VR and value."""

_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>'
    '<NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM" xml:space="preserve">'
)
_TAIL = "</NativeDicomModel>"
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_COMPONENTS = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")

_MAX_NODES = 200  # an attribute and an item are two; datasets nest at most 64 levels
_MAX_GAP = 100  # values without content between two that have some
# Of tags that begin or end an element, and of equals signs, of which each XML attribute has one.  100,000
# DICOM attributes with a value have as many.
_MAX_MARKS = 1_000_000
_ENCODINGS = frozenset({"utf-8", "utf-16", "iso-8859-1", "us-ascii"})

# XML 1.0, production 2 (Char), turned round.
_NO_CHARACTER = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# A parser makes one line feed of any line end, and in an attribute a space of any white space.
_ESCAPED = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}
)
_NUMBER = re.compile("[0-9]{1,9}", re.ASCII)
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


class _Node:
    """One XML element."""

    __slots__ = ("attributes", "children", "name", "text")

    def __init__(self, name: str, attributes: dict[str, str]) -> None:
        self.name, self.attributes = name, attributes
        self.children: list[_Node] = []
        self.text: list[str] = []


def read_native_model(document: bytes) -> dict[str, dict[str, Any]]:
    """The attributes that a Native DICOM Model has, as a DICOM JSON object, its numbers as text.

    A private element is put into the block of its creator, or into a new one.  Raises RefusedError, of it
    LimitError for what has more in it than is read.
    """
    root = _parsed(document)
    if root.name != "NativeDicomModel":
        raise RefusedError("The metadata are no Native DICOM Model.")
    return _read_dataset(root)


def _parsed(document: bytes) -> _Node:
    """The root element; names have no namespace.  A document type, which entities come from, is refused."""
    if document.count(b"<") + document.count(b"=") > _MAX_MARKS:
        raise LimitError(
            "The metadata of an instance have more in them than is read. Send it as application/dicom."
        )
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True  # or each reference to a character is a text of its own
    top = _Node("", {})
    open_nodes = [top]

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(open_nodes) > _MAX_NODES:
            raise RefusedError("The metadata nest too deep.")
        node = _Node(name.rpartition(" ")[2], attributes)
        open_nodes[-1].children.append(node)
        open_nodes.append(node)

    def content(text: str) -> None:
        open_nodes[-1].text.append(text)

    def refuse(*_: object) -> None:
        raise RefusedError("The metadata have a document type, which is not read.")

    def declared(_version: str, encoding: str | None, _standalone: int) -> None:
        if (encoding or "utf-8").lower() not in _ENCODINGS:
            raise RefusedError("The metadata are in an encoding that is not read; UTF-8 is.")

    parser.StartElementHandler, parser.StartDoctypeDeclHandler = start, refuse
    parser.EndElementHandler = lambda _: open_nodes.pop()
    parser.CharacterDataHandler, parser.XmlDeclHandler = content, declared
    try:
        parser.Parse(document, True)
    except expat.ExpatError as error:
        raise RefusedError(f"The metadata are not XML: {error}.") from error
    return top.children[0]


def _read_dataset(node: _Node) -> dict[str, dict[str, Any]]:
    public: dict[str, dict[str, Any]] = {}
    private: list[tuple[str, str, dict[str, Any]]] = []
    for child in node.children:
        if child.name == "DicomAttribute":
            tag, creator = child.attributes.get("tag", ""), child.attributes.get("privateCreator")
            attribute = _read_attribute(child)
            if creator is None:
                public[tag] = attribute
            else:
                private.append((tag, creator, attribute))
    for tag, creator, attribute in private:
        public[f"{tag[:4]}{_block(public, tag[:4], creator)}{tag[6:]}"] = attribute
    return public


def _block(attributes: dict[str, dict[str, Any]], group: str, creator: str) -> str:
    """The block that *creator* reserved in *group*; without one, the first that is free is reserved."""
    blocks = [f"{number:02X}" for number in range(0x10, 0x100)]
    for block in blocks:
        if attributes.get(f"{group}00{block}", {}).get("Value") == [creator]:
            return block
    free = next((block for block in blocks if f"{group}00{block}" not in attributes), None)
    if free is None:
        raise RefusedError("A group has no block left for private elements.")
    attributes[f"{group}00{free}"] = {"vr": "LO", "Value": [creator]}
    return free


def _read_attribute(node: _Node) -> dict[str, Any]:
    attribute: dict[str, Any] = {"vr": node.attributes.get("vr", "")}
    values: dict[int, Any] = {}
    for child in node.children:
        text = "".join(child.text)
        if child.name == "BulkData":
            attribute["BulkDataURI"] = child.attributes.get("uri") or child.attributes.get("uuid", "")
        elif child.name == "InlineBinary":
            attribute["InlineBinary"] = text
        elif child.name in _READ_VALUE:
            values[_number_of(child, len(values))] = _READ_VALUE[child.name](child)
    if values:
        attribute["Value"] = [values.get(number) for number in range(1, max(values) + 1)]
    return attribute


def _number_of(node: _Node, before: int) -> int:
    """Which value it is; without a number the next one.  A number that few values lead to is none."""
    number = node.attributes.get("number", str(before + 1))
    if not (_NUMBER.fullmatch(number) and 0 < int(number) <= before + _MAX_GAP):
        raise RefusedError("A value has a number that it cannot have.")
    return int(number)


def _read_name(node: _Node) -> dict[str, str]:
    groups: dict[str, str] = {}
    for group in node.children:
        components = {child.name: "".join(child.text) for child in group.children}
        groups[group.name] = "^".join(components.get(name, "") for name in _COMPONENTS).rstrip("^")
    return groups


_READ_VALUE: dict[str, Callable[[_Node], Any]] = {
    "Value": lambda node: "".join(node.text) or None,
    "Item": _read_dataset,
    "PersonName": _read_name,
}
