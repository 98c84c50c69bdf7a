"""C-FIND (PS3.4 annex C): an identifier becomes a query to the archive, each match a pending response.

What goes beyond the baseline is agreed for a SOP class when the association is opened (C.5.1.1).

Text goes back in the requestor's character set if that can carry it, else as UTF-8, and says so in
(0008,0005) unless it is plain ASCII (PS3.4 C.4.1.1.3).  Each response is made when the one before has been
sent, so a C-CANCEL stops a query in the middle, and memory does not grow with the number of matches.  While
nothing matches the archive asks now and then whether to go on, so a C-CANCEL is heard then, too.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache, lru_cache, partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias

import structlog
from pydicom.charset import convert_encodings, encode_string, python_encoding
from pydicom.valuerep import format_number_as_ds

from dicomscp.archive.archive import Archive
from dicomscp.dicom import charset, elements, matching
from dicomscp.dicom.dictionary import known_vr, public_vr
from dicomscp.dimse.storage import NOT_AUTHORIZED, SOP_CLASS_NOT_SUPPORTED, SUCCESS, response
from dicomscp.dimse.upper_layer import (
    AFFECTED_SOP_CLASS_UID,
    MESSAGE_ID,
    MESSAGE_ID_RESPONDED_TO,
    ContextAnswer,
    uid,
)
from dicomscp.errors import BusyError, RefusedError

C_FIND_RQ, C_CANCEL_RQ = 0x0020, 0x0FFF

# PS3.4 table C.4-1.
PENDING, PENDING_UNSUPPORTED_KEYS, CANCELLED = 0xFF00, 0xFF01, 0xFE00
OUT_OF_RESOURCES, NOT_THE_SOP_CLASS, UNABLE_TO_PROCESS = 0xA700, 0xA900, 0xC001

PATIENT_STUDY_ONLY = "1.2.840.10008.5.1.4.1.2.3.1"
ROOTS: dict[str, Literal["PATIENT", "STUDY"]] = {
    "1.2.840.10008.5.1.4.1.2.1.1": "PATIENT",
    "1.2.840.10008.5.1.4.1.2.2.1": "STUDY",
    PATIENT_STUDY_ONLY: "PATIENT",
}

CHARACTER_SET, QUERY_LEVEL = 0x00080005, 0x00080052
_RETRIEVE_AE_TITLE, _INSTANCE_AVAILABILITY = 0x00080054, 0x00080056
_TIMEZONE = 0x00080201
_UNICODE = "ISO_IR 192"
_CUT_SHORT = "The identifier is cut short"

# PS3.4 table C.5-1, by position; what is None (conversion to and from enhanced multi-frame) is not granted.
_SUB_FIELDS = ("relational", "combined", "fuzzy", "timezone", None, "empty", "multiple")

_PATIENT_STUDY_LEVELS = frozenset({matching.Level.PATIENT, matching.Level.STUDY})
_MAX_IDENTIFIER_BYTES = 1 << 20  # a list of 10,000 UIDs
# Those that (0008,0005) is about (PS3.5 section 6.1.2.2).
_TEXT_VRS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
_LINE_VRS = frozenset({"LT", "ST", "UT", "UR"})  # one value, whatever is in it
# What ends code extensions (PS3.5 section 6.1.2.5.3).
_LINE_ENDS = b"\t\n\f\r"
_DELIMITERS = {"PN": b"\\^=" + _LINE_ENDS, "LT": _LINE_ENDS, "ST": _LINE_ENDS, "UT": _LINE_ENDS}
_PIECES = re.compile("([\\\\^=\t\n\f\r])")  # of any VR: where nothing ends, ending does no harm
_GB_2312, _TO_GB_2312 = "iso_ir_58", b"\x1b$)A"
_NUMBERS = {
    "US": "H",
    "SS": "h",
    "UL": "L",
    "SL": "l",
    "FL": "f",
    "FD": "d",
    "UV": "Q",
    "SV": "q",
    "AT": "HH",
}
_MAX_DS = 16  # characters

Identifier = dict[int, tuple[str, Sequence[Any]]]
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answering:
    """How queries are answered.

    *match_unknown* lets keys match entities without a value (C.2.2.1.2); *local* is the offset from UTC, at a
    moment of local time, of what tells no time zone.
    """

    max_results: int = 10000
    match_unknown: bool = True
    local: Callable[[datetime], timedelta] = lambda _: timedelta(0)


def granted(asked: bytes) -> bytes:
    """What of the sub-fields *asked* for is agreed to, of the same length (C.5.1.1)."""
    return bytes(
        int(value == 1 and at < len(_SUB_FIELDS) and _SUB_FIELDS[at] is not None)
        for at, value in enumerate(asked)
    )


def options_of(sub_fields: bytes) -> matching.Options:
    """What the *sub_fields* that were granted mean; those that are missing are not."""
    names = (name for name, value in zip(_SUB_FIELDS, sub_fields, strict=False) if name and value)
    return matching.Options(**dict.fromkeys(names, True))


class Find:
    """One C-FIND request: its identifier goes to `write`, and `responses` answers it."""

    def __init__(
        self,
        archive: Archive,
        context: ContextAnswer,
        command: dict[int, bytes],
        *,
        authorised: bool,
        options: matching.Options,
        answering: Answering,
        listen: Callable[[], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        """*listen* is called while nothing is to be sent: what it hears may `cancel`."""
        self._archive, self._context, self._command = archive, context, command
        self._authorised, self._options, self._answering = authorised, options, answering
        self._listen, self._log = listen, log
        self._encoded = bytearray()
        self._too_long = False
        self._cancelled = False

    def write(self, data: memoryview) -> None:
        """Take the next bytes of the identifier."""
        self._too_long = self._too_long or len(self._encoded) + len(data) > _MAX_IDENTIFIER_BYTES
        if not self._too_long:
            self._encoded += data

    def cancel(self, command: Mapping[int, bytes]) -> None:
        """A C-CANCEL has come: if it is for this request, the next response is the last."""
        if command.get(MESSAGE_ID_RESPONDED_TO) == self._command[MESSAGE_ID]:
            self.give_up()

    def give_up(self) -> None:
        """Nobody waits for more: the next response is the last."""
        self._cancelled = True

    def responses(self) -> Iterator[tuple[bytes, bytes]]:
        """Command set and identifier of each response; the last has no identifier."""
        matches, limit = 0, self._answering.max_results
        command = cache(partial(response, self._command, dataset=True))
        end = _End(SUCCESS)
        try:
            for pending, dataset in self._pending():
                if self._cancelled:
                    break
                if matches == limit:
                    end = _End(OUT_OF_RESOURCES, f"More than {matches} matches; narrow the query")
                    break
                matches += 1
                yield command(pending), dataset
        except BusyError as error:
            end = _End(OUT_OF_RESOURCES, str(error))
        except (matching.IdentifierError, matching.BadValueError) as error:
            # What is quoted may be a patient's name or birth date: whoever asked is told it, and no log.
            is_private = isinstance(error, matching.BadValueError)
            end = _End(NOT_THE_SOP_CLASS, str(error), error.tags, is_private)
        except _RefusalError as error:
            end = _End(error.status, str(error))
        except RefusedError as error:
            end = _End(NOT_THE_SOP_CLASS, str(error))
        except Exception:  # noqa: BLE001 - one C-FIND is one unit of work
            self._log.exception("query_failed")
            end = _End(UNABLE_TO_PROCESS, "Unforeseen error in the gateway")
        if self._cancelled:
            end = _End(CANCELLED)  # no related fields, table C.4-1
        self._log.info(
            "query_answered",
            matches=matches,
            status=f"{end.status:04X}",
            reason="" if end.is_private else end.reason,
            offending=[f"({tag >> 16:04X},{tag & 0xFFFF:04X})" for tag in end.offending],
        )
        yield response(self._command, end.status, end.reason, offending=end.offending), b""

    def _pending(self) -> Iterator[tuple[int, bytes]]:
        """Status and encoded identifier of every match."""
        abstract_syntax = self._context.abstract_syntax
        if not self._authorised:
            raise _RefusalError(NOT_AUTHORIZED, "This AE may not query here")
        if uid(self._command, AFFECTED_SOP_CLASS_UID) != abstract_syntax:
            raise _RefusalError(SOP_CLASS_NOT_SUPPORTED, "The SOP Class is not that of the context")
        if self._too_long:
            raise RefusedError(f"The identifier is longer than {_MAX_IDENTIFIER_BYTES} bytes")
        syntax = self._context.transfer_syntax_uid
        identifier = decode_identifier(bytes(self._encoded), syntax)
        model = self._archive.model
        query = matching.query_from_identifier(
            identifier,
            root=ROOTS[abstract_syntax],
            model=model,
            options=self._options,
            matches_unknown=self._answering.match_unknown,
            local=self._answering.local,
        )
        lowest = query.below or query
        if abstract_syntax == PATIENT_STUDY_ONLY and lowest.level not in _PATIENT_STUDY_LEVELS:
            raise matching.IdentifierError(f"Level {lowest.level} is not of Patient/Study Only", QUERY_LEVEL)
        matched = {key.tag for key in lowest.keys}
        unsupported = _keys(identifier) - model.supported(query.level) - matched
        status = PENDING_UNSUPPORTED_KEYS if unsupported else PENDING
        own = {
            f"{QUERY_LEVEL:08X}": {"vr": "CS", "Value": [str(query.level)]},
            # Without a value (C.4.1.1.3.2): an AE that is named here supports C-MOVE or C-GET, and none does.
            f"{_RETRIEVE_AE_TITLE:08X}": {"vr": "AE"},
            f"{_INSTANCE_AVAILABILITY:08X}": {"vr": "CS", "Value": ["ONLINE"]},
        }
        # But for the time zone, which is not sent without a value (C.4.1.1.3.2).
        empty = {f"{tag:08X}": {"vr": public_vr(tag)} for tag in query.always - {_TIMEZONE}}
        terms, answer = _terms(identifier), matching.answerer(query)
        for found in self._found(query):
            yield status, encode_identifier(empty | answer(found) | own, syntax, terms)

    def _found(self, query: matching.Query) -> Iterator[Json]:
        """What matches, each once, and no more than one more than is answered."""
        limit = self._answering.max_results + 1
        if query.below is None:
            yield from islice(self._matching(query, limit), limit)
            return
        for identity in islice(self._identities(query.below, query.level), limit):
            yield from self._entity(query, identity)

    def _matching(self, query: matching.Query, limit: int | None = None) -> Iterator[Json]:
        """What matches: first that of which all that is asked for is known, then the rest (C.2.2.1.2).

        Many archives have thousands of studies without accession number, and the one that is sought would be
        the last, or cut off.
        """
        if not matching.may_be_unknown(query):
            yield from self._archive.find(replace(query, limit=limit), self._goes_on)
            return
        known = replace(query, matches_unknown=False)
        yield from self._archive.find(replace(known, limit=limit), self._goes_on)
        is_known = matching.matcher(known)
        yield from (one for one in self._archive.find(query, self._goes_on) if not is_known(one))

    def _identities(self, below: matching.Query, level: matching.Level) -> Iterator[tuple[matching.Key, ...]]:
        """What tells of each entity of *level* above what matches *below*, each once."""
        seen: set[bytes] = set()
        for one in self._matching(below):
            identity = matching.identity_keys(level, one)
            digest = hashlib.blake2b(repr(identity).encode(), digest_size=16).digest()
            if digest not in seen:  # keys themselves would take ten times the room
                seen.add(digest)
                yield identity

    def _entity(self, query: matching.Query, identity: tuple[matching.Key, ...]) -> Iterator[Json]:
        """The one that *identity* tells of, which namesakes with more groups in the name match as well."""
        returns = query.returns and query.returns | matching.identity_tags(query.level)
        asked = replace(query, keys=identity, returns=returns, matches_unknown=False)
        found = self._archive.find(asked, self._goes_on)
        same = (one for one in found if matching.identity_keys(query.level, one) == identity)
        return islice(same, 1)

    def _goes_on(self) -> bool:
        if not self._cancelled:
            self._listen()
        return not self._cancelled


class _End(NamedTuple):
    """The last response."""

    status: int
    reason: str = ""
    offending: tuple[int, ...] = ()
    is_private: bool = False


class _RefusalError(RefusedError):
    """The request is not answered, with a *status* of PS3.7 section C.5."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _keys(identifier: Identifier) -> frozenset[int]:
    """What is asked for: all but group lengths and what governs the request itself."""
    control = {CHARACTER_SET, QUERY_LEVEL, _RETRIEVE_AE_TITLE, _INSTANCE_AVAILABILITY, _TIMEZONE}
    return frozenset(tag for tag in identifier if tag & 0xFFFF and tag not in control)


# ── identifiers ──────────────────────────────────────────────────────────────────────────────────


def decode_identifier(encoded: bytes, transfer_syntax_uid: str) -> Identifier:
    """VR and values of every element: text, or the items of a sequence.  Raises RefusedError."""
    if elements.is_deflated(transfer_syntax_uid):
        inflated, whole = elements.inflate(encoded, _MAX_IDENTIFIER_BYTES)
        encoded = bytes(inflated)
        if not whole:
            raise RefusedError("The identifier inflates without end")
    encoding = elements.encoding_of(encoded, transfer_syntax_uid)
    try:
        raw, _ = _elements(encoded, 0, len(encoded), encoding)
    except elements.PrefixError as error:
        raise RefusedError(_CUT_SHORT) from error
    named = next((encoded[one.value : one.end] for one in raw if one.tag == CHARACTER_SET), b"")
    terms = tuple(term.strip(" \0") for term in named.decode("latin-1").split("\\"))
    texts = charset.character_set(terms if any(terms) else ())
    if not texts.known:
        name = "/".join(terms)[:32]
        raise matching.IdentifierError(f"Specific Character Set {name!r} is not supported", CHARACTER_SET)
    return {one.tag: _decoded(encoded, one, encoding, texts, 0) for one in raw}


def _elements(
    data: bytes, pos: int, end: int, encoding: elements.Encoding
) -> tuple[list[elements.Element], int]:
    """The elements from *pos* to *end* or an item delimiter, and where they end."""
    found = []
    while pos < end:
        element = elements.read_element(data, pos, encoding)
        if element.end > end:
            raise RefusedError(_CUT_SHORT)
        pos = element.end
        if element.tag == elements.ITEM_END:
            break
        found.append(element)
    return found, pos


def _decoded(
    data: bytes,
    element: elements.Element,
    encoding: elements.Encoding,
    texts: charset.CharacterSet,
    depth: int,
) -> tuple[str, Sequence[Any]]:
    undefined = element.length == elements.UNDEFINED
    vr = known_vr(element.tag, element.vr, undefined_length=undefined, creator="")[:2]
    if vr == "SQ":
        return vr, list(_items(data, element, encoding, texts, depth + 1))
    return vr, _values(vr, data[element.value : element.end], texts, encoding.little)


def _items(
    data: bytes,
    sequence: elements.Element,
    encoding: elements.Encoding,
    texts: charset.CharacterSet,
    depth: int,
) -> Iterator[Identifier]:
    if depth > elements.MAX_DEPTH:
        raise RefusedError("The identifier nests too deep")
    pos, end = sequence.value, sequence.end
    inner = elements.inner_encoding(sequence.vr, encoding)
    while pos < end:
        try:
            tag, length = elements.read_item(data, pos, inner.little)
            if tag == elements.SEQUENCE_END:
                return
            pos += 8
            after = end if length == elements.UNDEFINED else pos + length
            if tag != elements.ITEM or after > end:
                raise RefusedError(_CUT_SHORT)
            own = elements.item_encoding(data, pos, inner)
            found, pos = _elements(data, pos, after, own)
            yield {one.tag: _decoded(data, one, own, texts, depth) for one in found}
        except elements.PrefixError as error:
            raise RefusedError(_CUT_SHORT) from error


def _terms(identifier: Identifier) -> tuple[str, ...]:
    values = identifier.get(CHARACTER_SET, ("CS", ()))[1]
    return tuple(values) if any(values) else ()


def _values(vr: str, value: bytes, texts: charset.CharacterSet, little: bool) -> list[str]:
    if vr in _NUMBERS:
        code = ("<" if little else ">") + _NUMBERS[vr]
        usable = len(value) - len(value) % struct.calcsize(code)
        return [
            "".join(f"{number:04X}" for number in numbers) if vr == "AT" else str(numbers[0])
            for numbers in struct.iter_unpack(code, value[:usable])
        ]
    text = value.decode("latin-1")
    if vr in _TEXT_VRS:
        text, clean = charset.decode(value, texts, _DELIMITERS.get(vr, b"\\" + _LINE_ENDS))
        if not clean:
            raise matching.IdentifierError(
                "The identifier's text is not of its Specific Character Set", CHARACTER_SET
            )
    text = text.rstrip(" \0")
    if not text:
        return []
    return [text] if vr in _LINE_VRS else [part.strip(" ") for part in text.split("\\")]


def encode_identifier(dataset: Json, transfer_syntax_uid: str, terms: Sequence[str]) -> bytes:
    """A DICOM JSON object as a dataset, in the character set that *terms* name if that carries it."""
    form = elements.Encoding(
        explicit=transfer_syntax_uid != elements.IMPLICIT_LITTLE,
        little=transfer_syntax_uid != elements.EXPLICIT_BIG,
    )
    try:
        encoded = _dataset(dataset, form, _ascii)
    except UnicodeEncodeError:
        used = carrier("".join(_texts(dataset)), tuple(terms))
        named = {f"{CHARACTER_SET:08X}": {"vr": "CS", "Value": list(used)}}
        encode = _utf_8 if used == (_UNICODE,) else partial(_extended, _encodings(used))
        encoded = _dataset({**dataset, **named}, form, encode)
    if not elements.is_deflated(transfer_syntax_uid):
        return encoded
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = deflater.compress(encoded) + deflater.flush()
    return deflated + b"\0" * (len(deflated) % 2)  # PS3.5 section A.5


def carrier(text: str, terms: tuple[str, ...]) -> tuple[str, ...]:
    """The Specific Character Set for *text*: none for ASCII, *terms* if they carry it, else UTF-8."""
    if text.isascii():
        return ()
    if not terms or any(term not in python_encoding for term in terms):
        return (_UNICODE,)
    encodings = _encodings(terms)
    if not all(any(_carries(character, encoding) for encoding in encodings) for character in set(text)):
        return (_UNICODE,)
    # Not every combination of code extensions that pydicom writes can be read again.
    read = charset.decode(_extended(encodings, text), charset.character_set(terms), _DELIMITERS["PN"])
    return terms if read == (text, True) else (_UNICODE,)


def _encodings(terms: tuple[str, ...]) -> list[str]:
    """Python's codecs for *terms*."""
    return convert_encodings(list(terms) or [""])


@lru_cache(maxsize=4096)
def _carries(character: str, encoding: str) -> bool:
    try:
        # The default repertoire is ASCII, not all of what Python calls iso8859.
        character.encode("ascii" if encoding == "iso8859" else encoding)
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: object) -> Iterator[str]:
    """Every string in a DICOM JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


_Encode: TypeAlias = Callable[[str], bytes]


def _dataset(dataset: Json, form: elements.Encoding, encode: _Encode) -> bytes:
    """The elements of *dataset*; a plain loop, for it is run for each match."""
    parts: list[bytes] = []
    for key in sorted(dataset):
        element = dataset[key]
        vr, values = element["vr"], element.get("Value", ())
        if _is_misframed(key, vr):
            vr, values = ("UN", ()) if vr == "SQ" else ("SQ", ())
        value = _value(vr, values, form, encode)
        head, length = elements.element_head(int(key, 16), vr, form)
        if length.size == 2 and len(value) > 0xFFFF:
            head, length = elements.element_head(int(key, 16), "UN", form)
        parts += (head, length.pack(len(value)), value)
    return b"".join(parts)


@lru_cache(maxsize=4096)
def _is_misframed(key: str, vr: str) -> bool:
    """Whether a sequence was written where none is, or text for one: no reader of implicit VR copes."""
    known = public_vr(int(key, 16))
    return known != "UN" and (known == "SQ") != (vr == "SQ")


def _value(vr: str, values: Sequence[Any], form: elements.Encoding, encode: _Encode) -> bytes:
    if vr == "SQ":
        return b"".join(_item(item, form, encode) for item in values)
    if vr in _NUMBERS:
        code = ("<" if form.little else ">") + _NUMBERS[vr]
        return b"".join(struct.pack(code, *_numbers(vr, value)) for value in values if value is not None)
    encoded = b"\\".join([encode(_text(vr, value)) for value in values])
    return encoded + (b"\0" if vr == "UI" else b" ") if len(encoded) % 2 else encoded


def _item(item: Json, form: elements.Encoding, encode: _Encode) -> bytes:
    body = _dataset(item, form, encode)
    return struct.pack("<HHL" if form.little else ">HHL", 0xFFFE, 0xE000, len(body)) + body


def _ascii(text: str) -> bytes:
    return text.encode("ascii")


def _utf_8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _extended(encodings: list[str], text: str) -> bytes:
    """One value, piece by piece, for what delimits ends a code extension (PS3.5 section 6.1.2.5.3)."""
    return b"".join(_escaped(encodings, piece) for piece in _PIECES.split(text) if piece)


def _escaped(encodings: list[str], piece: str) -> bytes:
    encoded: bytes = encode_string(piece, encodings)
    # The one code extension that pydicom writes without its escape sequence.
    is_bare = _GB_2312 in encodings[1:] and encoded == piece.encode(_GB_2312, "replace")
    return _TO_GB_2312 + encoded if is_bare and not encoded.isascii() else encoded


def _numbers(vr: str, value: Any) -> tuple[Any, ...]:
    if vr == "AT":
        return int(value[:4], 16), int(value[4:], 16)
    if isinstance(value, str):  # beyond what JSON numbers hold
        return (float(value) if vr in ("FL", "FD") else int(value),)
    return (value,)


def _text(vr: str, value: Any) -> str:
    if value is None:
        return ""
    if vr == "PN":
        groups = (value.get(group, "") for group in ("Alphabetic", "Ideographic", "Phonetic"))
        return "=".join(groups).rstrip("=")
    if isinstance(value, float) and len(str(value)) > _MAX_DS:
        return format_number_as_ds(value)
    return str(value)
