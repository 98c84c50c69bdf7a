"""The acceptor's upper layer (PS3.8 section 9): bytes in, facts and bytes out; no socket, thread or clock.

    Sta2 awaiting a request ─▶ Sta3 awaiting our answer ─▶ Sta6 data transfer ─▶ Sta13 awaiting the close
                                                            └─▶ Sta8 awaiting our A-RELEASE-RP ─┘

`Acceptor.receive` is fed whatever the transport brought and yields what happened, in order; the caller
answers with the methods that return bytes to send, before it asks for the next fact.  A PDU need not fit into
what is fed: fragments of datasets are passed on as they come, as views of the bytes fed.  What the peer does
wrong ends in a `Violation` with the A-ABORT that table 9-10 asks for.

In Sta13 all that arrives is dropped unread: after a violation nobody knows where the next PDU begins.

Command sets (PS3.7 section 6.3) are implicit VR little endian, group 0000 only; they are kept as the encoded
values by element number.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_RELEASE_RP
from pynetdicom.pdu_items import (
    ApplicationContextItem,
    ImplementationClassUIDSubItem,
    ImplementationVersionNameSubItem,
    MaximumLengthSubItem,
    PresentationContextItemAC,
    SCP_SCU_RoleSelectionSubItem,
    SOPClassExtendedNegotiationSubItem,
    TransferSyntaxSubItem,
    UserInformationItem,
)

from dicomscp import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomscp.dicom.elements import IMPLICIT_LITTLE

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"

# PS3.8 9.3.8: who aborts, and why.
SERVICE_USER, SERVICE_PROVIDER = 0, 2
UNSPECIFIED, UNRECOGNIZED_PDU, UNEXPECTED_PDU, UNEXPECTED_PARAMETER, INVALID_PARAMETER = 0, 1, 2, 5, 6

# PS3.8 table 9-18: the result of one presentation context.
ACCEPTED, USER_REJECTION, ABSTRACT_SYNTAX_NOT_SUPPORTED, TRANSFER_SYNTAXES_NOT_SUPPORTED = 0, 1, 3, 4

# PS3.7 section E.1: elements of group 0000.
AFFECTED_SOP_CLASS_UID, REQUESTED_SOP_CLASS_UID, COMMAND_FIELD, MESSAGE_ID = 0x0002, 0x0003, 0x0100, 0x0110
MESSAGE_ID_RESPONDED_TO, PRIORITY, DATA_SET_TYPE = 0x0120, 0x0700, 0x0800
STATUS, OFFENDING_ELEMENT, ERROR_COMMENT = 0x0900, 0x0901, 0x0902
AFFECTED_SOP_UID = 0x1000
NO_DATA_SET, RESPONSE = 0x0101, 0x8000

A_ASSOCIATE_RQ, A_ASSOCIATE_ACCEPTED, A_ASSOCIATE_REJECTED, P_DATA_TF = 1, 2, 3, 4
A_RELEASE_RQ, A_RELEASED, A_ABORT = 5, 6, 7
COMMAND, LAST = 1, 2  # message control header, PS3.8 E.2

_MAX_REQUEST_BYTES = 1 << 20  # 128 contexts with every transfer syntax there is are 400 KiB
_MAX_COMMAND_BYTES = 1 << 16
# Some senders take the maximum for the PDV, without its header or the PDU's.
_PDU_ALLOWANCE = 1024
_DEFAULT_PEER_PDU_BYTES = 16384  # of a peer that does not say

PDU_HEADER = struct.Struct(">BxL")
PDV_HEADER = struct.Struct(">LBB")
DATA_HEADER = struct.Struct(">BxLLBB")
_ELEMENT = struct.Struct("<HHL")
_GROUP_LENGTH = struct.Struct("<HHLL")
_REQUEST = struct.Struct(">6xHxx16s16s32x")  # PDU header and fixed fields, PS3.8 table 9-11
_NOTHING = memoryview(b"")


class State(Enum):
    """Where an association stands, by the names of PS3.8 table 9-10."""

    AWAITING_REQUEST = "Sta2"
    AWAITING_ANSWER = "Sta3"
    ESTABLISHED = "Sta6"
    AWAITING_RELEASE = "Sta8"
    CLOSING = "Sta13"


class ProposedContext(NamedTuple):
    """A presentation context as the requestor proposes it."""

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


class ContextAnswer(NamedTuple):
    """Our answer to a presentation context; the transfer syntax is empty unless it is accepted."""

    context_id: int
    result: int
    abstract_syntax: str
    transfer_syntax_uid: str = ""


class Rejection(NamedTuple):
    """Why there is no association (PS3.8 table 9-21), and the reason in words."""

    result: int
    source: int
    diagnostic: int
    reason: str


@dataclass(frozen=True, slots=True)
class AssociateRequest:
    """The peer asks for an association; answer with `Acceptor.accept` or `Acceptor.reject`."""

    calling_ae: str
    called_ae: str
    protocol_version: int
    application_context: str
    contexts: tuple[ProposedContext, ...]
    roles: Mapping[str, tuple[bool, bool]]  # by SOP class: is the requestor SCU, is it SCP
    extended: Mapping[str, bytes]  # service class application information, by SOP class
    implementation: str


class Message(NamedTuple):
    """A command set; a dataset follows in fragments if *has_dataset*."""

    context_id: int
    command: dict[int, bytes]
    has_dataset: bool


class Fragment(NamedTuple):
    """The next bytes of the dataset of the message last announced; the view is good until the next fact."""

    data: memoryview
    last: bool


class ReleaseRequested(NamedTuple):
    """The peer is done; answer with `Acceptor.release`."""


class Aborted(NamedTuple):
    """The peer sent A-ABORT."""

    source: int
    reason: int


class Violation(NamedTuple):
    """The peer broke the protocol; *reply* is the A-ABORT to send, after which nothing more is read."""

    text: str
    reply: bytes


Fact = AssociateRequest | Message | Fragment | ReleaseRequested | Aborted | Violation


class MalformedError(Exception):
    """Bytes that are not what the protocol says they are."""


class Acceptor:
    """The accepting end of one association."""

    def __init__(self, max_pdu_bytes: int) -> None:
        """*max_pdu_bytes* is the longest P-DATA-TF, without its header, that the peer may send."""
        self.state = State.AWAITING_REQUEST
        self.max_pdu_bytes = max_pdu_bytes
        self.peer_max_pdu_bytes = _DEFAULT_PEER_PDU_BYTES
        self.contexts: dict[int, ContextAnswer] = {}
        self._titles = b""
        self._header = b""  # of a PDU or PDV, if the bytes fed ended in it
        self._pdu_left = 0  # bytes of the P-DATA-TF that is being read
        self._pdv_left = 0  # bytes of the fragment that is being read
        self._flags = 0
        self._pdu_type = 0  # of the PDU that is being collected, if any
        self._pdu_needs = 0
        self._collected = bytearray()
        self._message_context = 0  # while the peer is in a message
        self._awaits = COMMAND  # the kind of fragment that must come next
        self._command = bytearray()

    # ── bytes in ─────────────────────────────────────────────────────────────────────────────────

    def receive(self, data: memoryview) -> Iterator[Fact]:
        """What *data*, the next bytes of the peer, tell.

        The caller acts on each fact before it asks for the next one, and *data* stays as it is meanwhile.
        A measured hot path: one loop, entered once for each PDU, PDV and piece of a fragment.
        """
        pos, end = 0, 0 if self.is_closing else len(data)
        while pos < end:
            if self._pdv_left:  # DT-2: the rest of a fragment
                part = data[pos : pos + self._pdv_left]
                size = len(part)
                pos += size
                self._pdu_left -= size
                self._pdv_left -= size
                fact = self._part(part, not self._pdv_left)
            elif self._pdu_needs:
                part = data[pos : pos + self._pdu_needs]
                pos += len(part)
                fact = self._collect(part)
            else:
                held = len(self._header)
                header = self._header + data[pos : pos + 6 - held]
                if len(header) < 6:
                    self._header = header
                    return
                self._header = b""
                pos += 6 - held
                fact = self._pdv(header) if self._pdu_left else self._pdu(header)
            if fact is not None:
                yield fact
                if self.state is State.CLOSING:
                    return

    def _pdu(self, header: bytes) -> Fact | None:
        """A PDU begins."""
        pdu_type, length = PDU_HEADER.unpack(header)
        if pdu_type == P_DATA_TF and self.state is State.ESTABLISHED:
            if not 6 <= length <= self.max_pdu_bytes + _PDU_ALLOWANCE:
                return self._violation(INVALID_PARAMETER, f"P-DATA-TF of {length} bytes")
            self._pdu_left = length
            return None
        if not A_ASSOCIATE_RQ <= pdu_type <= A_ABORT:
            return self._violation(UNRECOGNIZED_PDU, f"unrecognized PDU type {pdu_type:02X}")
        if not self._expects(pdu_type):
            return self._violation(UNEXPECTED_PDU, f"PDU type {pdu_type:02X} in {self.state.value}")
        if length > (_MAX_REQUEST_BYTES if pdu_type == A_ASSOCIATE_RQ else 4) or length < 4:
            return self._violation(INVALID_PARAMETER, f"PDU type {pdu_type:02X} of {length} bytes")
        self._pdu_type, self._pdu_needs = pdu_type, length
        self._collected = bytearray(header)
        return None

    def _expects(self, pdu_type: int) -> bool:
        if pdu_type == A_ASSOCIATE_RQ:
            return self.state is State.AWAITING_REQUEST
        if pdu_type == A_RELEASE_RQ:
            return self.state is State.ESTABLISHED
        return pdu_type == A_ABORT

    def _collect(self, part: memoryview) -> Fact | None:
        """The next bytes of a PDU that is understood as a whole."""
        self._collected += part
        self._pdu_needs -= len(part)
        if self._pdu_needs:
            return None
        pdu = bytes(self._collected)
        self._collected = bytearray()
        if self._pdu_type == A_ABORT:  # AA-2, AA-3
            self.state = State.CLOSING
            return Aborted(pdu[8], pdu[9])
        if self._pdu_type == A_RELEASE_RQ:  # AR-2
            self.state = State.AWAITING_RELEASE
            return ReleaseRequested()
        try:
            request, self.peer_max_pdu_bytes = _decode_request(pdu)
        except MalformedError as error:
            return self._violation(INVALID_PARAMETER, str(error))
        self._titles = pdu[10:42]
        self.state = State.AWAITING_ANSWER  # AE-6
        return request

    def _pdv(self, header: bytes) -> Fact | None:
        """A presentation data value begins."""
        length, context_id, flags = PDV_HEADER.unpack(header)
        self._pdu_left -= 6
        self._pdv_left = length - 2
        self._flags = flags
        if self._pdv_left < 0 or self._pdv_left > self._pdu_left:
            return self._violation(INVALID_PARAMETER, f"PDV of {length} bytes does not fit its PDU")
        if context_id not in self.contexts:
            return self._violation(INVALID_PARAMETER, f"presentation context {context_id} was not accepted")
        if flags & COMMAND != self._awaits:
            text = "command inside a dataset" if flags & COMMAND else "dataset without a command"
            return self._violation(UNEXPECTED_PARAMETER, text)
        if self._message_context not in (0, context_id):
            return self._violation(UNEXPECTED_PARAMETER, "presentation context changes inside a message")
        self._message_context = context_id
        return None if self._pdv_left else self._part(_NOTHING, complete=True)

    def _part(self, part: memoryview, complete: bool) -> Fact | None:
        """The next bytes of a fragment; *complete* if they are its last."""
        last = complete and bool(self._flags & LAST)
        if not self._flags & COMMAND:
            if last:
                self._message_context, self._awaits = 0, COMMAND
            return Fragment(part, last)
        if not last or self._command:
            self._command += part
            if len(self._command) > _MAX_COMMAND_BYTES:
                return self._violation(INVALID_PARAMETER, f"command set over {_MAX_COMMAND_BYTES} bytes")
            if not last:
                return None
            part = memoryview(bytes(self._command))
            self._command = bytearray()
        return self._message(bytes(part))

    def _message(self, encoded: bytes) -> Fact:
        try:
            command = decode_command(encoded)
            has_dataset = number(command, DATA_SET_TYPE) != NO_DATA_SET
            number(command, COMMAND_FIELD)
        except MalformedError as error:
            # A command set is the business of the service user of PS3.8.
            self.state = State.CLOSING
            return Violation(str(error), abort(SERVICE_USER, UNSPECIFIED))
        message = Message(self._message_context, command, has_dataset)
        if has_dataset:
            self._awaits = 0
        else:
            self._message_context = 0
        return message

    def _violation(self, reason: int, text: str) -> Violation:
        """AA-1 before there is an association, else AA-8."""
        early = self.state is State.AWAITING_REQUEST
        self.state = State.CLOSING
        return Violation(text, abort(SERVICE_USER, UNSPECIFIED) if early else abort(SERVICE_PROVIDER, reason))

    # ── bytes out ────────────────────────────────────────────────────────────────────────────────

    def accept(
        self,
        answers: Sequence[ContextAnswer],
        *,
        roles: Mapping[str, tuple[bool, bool]],
        extended: Mapping[str, bytes],
    ) -> bytes:
        """The A-ASSOCIATE-AC; from now on datasets come in the contexts that *answers* accept (AE-7)."""
        self.state = State.ESTABLISHED
        self.contexts = {answer.context_id: answer for answer in answers if answer.result == ACCEPTED}
        pdu = A_ASSOCIATE_AC()
        information = UserInformationItem()
        information.user_data = [
            *identification(self.max_pdu_bytes),
            *(_role(sop_class_uid, scu, scp) for sop_class_uid, (scu, scp) in roles.items()),
            *(_extended(sop_class_uid, level) for sop_class_uid, level in extended.items()),
        ]
        contexts = (_context_item(answer) for answer in answers)
        pdu.variable_items = [ApplicationContextItem(), *contexts, information]
        encoded: bytes = pdu.encode()
        return encoded[:10] + self._titles + encoded[42:]  # the titles as they came, PS3.8 table 9-17

    def reject(self, rejection: Rejection) -> bytes:
        """The A-ASSOCIATE-RJ (AE-8)."""
        self.state = State.CLOSING
        pdu = A_ASSOCIATE_RJ()
        pdu.result, pdu.source, pdu.reason_diagnostic = rejection[:3]
        encoded: bytes = pdu.encode()
        return encoded

    def release(self) -> bytes:
        """The A-RELEASE-RP (AR-4)."""
        self.state = State.CLOSING
        encoded: bytes = A_RELEASE_RP().encode()
        return encoded

    def abort(self, source: int, reason: int = UNSPECIFIED) -> bytes:
        """An A-ABORT of ours (AA-1, AA-8)."""
        self.state = State.CLOSING
        return abort(source, reason)

    def message(self, context_id: int, command: bytes, dataset: bytes = b"") -> bytes:
        """The P-DATA-TF PDUs of a message to the peer, each within what it takes (DT-1)."""
        limit = self.peer_max_pdu_bytes
        encoded = fragments(context_id, COMMAND, command, limit)
        return encoded + fragments(context_id, 0, dataset, limit) if dataset else encoded

    @property
    def is_closing(self) -> bool:
        """Whether nothing that comes is of interest any more."""
        return self.state is State.CLOSING

    @property
    def in_message(self) -> bool:
        """Whether the peer has begun a message and not ended it."""
        return bool(self._message_context)


# ── command sets ─────────────────────────────────────────────────────────────────────────────────


def decode_command(encoded: bytes) -> dict[int, bytes]:
    """The values of a command set by element number.  Raises MalformedError."""
    command: dict[int, bytes] = {}
    pos, end = 0, len(encoded)
    unpack = _ELEMENT.unpack_from
    try:
        while pos < end:
            group, element, length = unpack(encoded, pos)
            pos += 8
            command[element] = encoded[pos : pos + length]
            pos += length
            if group:
                raise MalformedError(f"element of group {group:04X} in a command set")
    except struct.error as error:
        raise MalformedError("command set cut short") from error
    if pos != end:
        raise MalformedError("command set cut short")
    return command


def encode_command(elements: Iterable[tuple[int, bytes]]) -> bytes:
    """The command set of *elements*, which come in ascending order with values of even length."""
    body = b"".join([_ELEMENT.pack(0, element, len(value)) + value for element, value in elements])
    return _GROUP_LENGTH.pack(0, 0, 4, len(body)) + body


def number(command: Mapping[int, bytes], element: int) -> int:
    """The value of an element of VR US.  Raises MalformedError if it is missing or none."""
    value = command.get(element, b"")
    if len(value) != 2:
        raise MalformedError(f"command set without (0000,{element:04X})")
    return int.from_bytes(value, "little")


def uid(command: Mapping[int, bytes], element: int) -> str:
    """The value of an element of VR UI; empty if it is missing."""
    return command.get(element, b"").rstrip(b"\0 ").decode("latin-1")


def us(value: int) -> bytes:
    """A value of VR US."""
    return value.to_bytes(2, "little")


def fragments(context_id: int, kind: int, data: bytes, max_pdu_bytes: int) -> bytes:
    """*data* in P-DATA-TF PDUs of at most *max_pdu_bytes* (0: any length), the last one marked so."""
    size = len(data)
    step = max(max_pdu_bytes - 6, 2) if max_pdu_bytes else size
    if size <= step:
        return DATA_HEADER.pack(P_DATA_TF, size + 6, size + 2, context_id, kind | LAST) + data
    pdus = []
    for start in range(0, size, step):
        part = data[start : start + step]
        flags = kind | (LAST if start + step >= size else 0)
        pdus.append(DATA_HEADER.pack(P_DATA_TF, len(part) + 6, len(part) + 2, context_id, flags) + part)
    return b"".join(pdus)


# ── negotiation ──────────────────────────────────────────────────────────────────────────────────


def _decode_request(pdu: bytes) -> tuple[AssociateRequest, int]:
    """An A-ASSOCIATE-RQ, and the longest P-DATA-TF that its sender takes.

    Decoded here and not by pynetdicom, which gives up a request for one UID or name that is too long, and
    logs and warns of what it finds.  Items of types we do not know are skipped (PS3.8 9.3.1).
    """
    if len(pdu) < _REQUEST.size:
        raise MalformedError("A-ASSOCIATE-RQ cut short")
    version, called, calling = _REQUEST.unpack_from(pdu)
    application_context, contexts, information = "", [], bytes(4)
    for item_type, item in _items(pdu, _REQUEST.size):
        if item_type == 0x10:
            application_context = _text(item[4:])
        elif item_type == 0x20:
            contexts.append(_proposed(item))
        elif item_type == 0x50:
            information = item
    if len({context.context_id for context in contexts}) < len(contexts):
        raise MalformedError("presentation context ID used twice")
    max_pdu_bytes, roles, extended, implementation = _user_information(information)
    request = AssociateRequest(
        calling_ae=_text(calling),
        called_ae=_text(called),
        protocol_version=version,
        application_context=application_context,
        contexts=tuple(contexts),
        roles=roles,
        extended=extended,
        implementation=implementation,
    )
    return request, max_pdu_bytes


def _items(data: bytes, pos: int) -> Iterator[tuple[int, bytes]]:
    """The items of *data* from *pos*: type, and the whole with its header of four bytes."""
    while pos < len(data):
        end = pos + 4 + int.from_bytes(data[pos + 2 : pos + 4], "big")
        if end > len(data):
            raise MalformedError("item of an A-ASSOCIATE-RQ runs past its end")
        yield data[pos], data[pos:end]
        pos = end


def _proposed(item: bytes) -> ProposedContext:
    """A presentation context item, PS3.8 table 9-13."""
    context_id = item[4] if len(item) >= 8 else 0
    abstract_syntax, syntaxes = "", []
    for sub_type, sub_item in _items(item, 8):
        if sub_type == 0x30:
            abstract_syntax = _text(sub_item[4:])
        elif sub_type == 0x40:
            syntaxes.append(_text(sub_item[4:]))
    if context_id % 2 == 0 or not abstract_syntax:
        raise MalformedError("presentation context without odd ID and abstract syntax")
    return ProposedContext(context_id, abstract_syntax, tuple(syntaxes))


def _user_information(item: bytes) -> tuple[int, dict[str, tuple[bool, bool]], dict[str, bytes], str]:
    """Of the user information item (PS3.7 annex D.3.3) what we go by."""
    max_pdu_bytes, class_uid, version = _DEFAULT_PEER_PDU_BYTES, "", ""
    roles: dict[str, tuple[bool, bool]] = {}
    extended: dict[str, bytes] = {}
    for sub_type, sub_item in _items(item, 4):
        if sub_type == 0x51:
            max_pdu_bytes = _maximum_length(sub_item)
        elif sub_type == 0x52:
            class_uid = _text(sub_item[4:])
        elif sub_type == 0x54:
            sop_class_uid, scu, scp = _by_class(sub_item, 2)
            roles[sop_class_uid] = (bool(scu), bool(scp))
        elif sub_type == 0x55:
            version = _text(sub_item[4:])
        elif sub_type == 0x56:
            sop_class_uid, *information = _by_class(sub_item, 0)
            extended[sop_class_uid] = bytes(information)
    return max_pdu_bytes, roles, extended, f"{version} {class_uid}".strip()


def _maximum_length(item: bytes) -> int:
    if len(item) != 8:
        raise MalformedError("maximum length of other than four bytes")
    return int.from_bytes(item[4:], "big")


def _by_class(item: bytes, least: int) -> tuple[Any, ...]:
    """The SOP class of a sub-item, and the bytes after it, which are *least* or more."""
    end = 6 + int.from_bytes(item[4:6], "big")
    if len(item) < end + least:
        raise MalformedError("negotiation of a SOP class is cut short")
    rest = item[end : end + least] if least else item[end:]
    return _text(item[6:end]), *rest


def _text(value: bytes) -> str:
    """A title or UID; what is not printable in it is not let through to logs and files."""
    text = value.decode("latin-1").strip(" \0")
    return "".join(character if character.isprintable() else "?" for character in text)[:64]


def _context_item(answer: ContextAnswer) -> PresentationContextItemAC:
    syntax = TransferSyntaxSubItem()
    # There must be one; it means nothing in a context that is not accepted (PS3.8 9.3.3.2).
    syntax.transfer_syntax_name = answer.transfer_syntax_uid or IMPLICIT_LITTLE
    item = PresentationContextItemAC()
    item.presentation_context_id, item.result_reason = answer.context_id, answer.result
    item.transfer_syntax_sub_item = [syntax]
    return item


def identification(
    max_pdu_bytes: int,
) -> tuple[MaximumLengthSubItem, ImplementationClassUIDSubItem, ImplementationVersionNameSubItem]:
    """The items that every request and acceptance has: what we take at once, and who we are."""
    longest, implementation = MaximumLengthSubItem(), ImplementationClassUIDSubItem()
    version = ImplementationVersionNameSubItem()
    longest.maximum_length_received = max_pdu_bytes
    implementation.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    return longest, implementation, version


def _role(sop_class_uid: str, scu: bool, scp: bool) -> SCP_SCU_RoleSelectionSubItem:
    item = SCP_SCU_RoleSelectionSubItem()
    item.sop_class_uid, item.scu_role, item.scp_role = sop_class_uid, int(scu), int(scp)
    return item


def _extended(sop_class_uid: str, information: bytes) -> SOPClassExtendedNegotiationSubItem:
    item = SOPClassExtendedNegotiationSubItem()
    item.sop_class_uid, item.service_class_application_information = sop_class_uid, information
    return item


def abort(source: int, reason: int = UNSPECIFIED) -> bytes:
    """An A-ABORT PDU."""
    pdu = A_ABORT_RQ()
    pdu.source, pdu.reason_diagnostic = source, reason
    encoded: bytes = pdu.encode()
    return encoded
