"""The requestor's side of the wire, byte by byte: what a test sends may be as wrong as it likes."""

import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Self

from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_items import (
    AbstractSyntaxSubItem,
    ApplicationContextItem,
    ImplementationClassUIDSubItem,
    MaximumLengthSubItem,
    PresentationContextItemRQ,
    SCP_SCU_RoleSelectionSubItem,
    SOPClassExtendedNegotiationSubItem,
    TransferSyntaxSubItem,
    UserInformationItem,
)

from dicomscp.dimse import upper_layer
from dicomscp.dimse.upper_layer import COMMAND, LAST

VERIFICATION = "1.2.840.10008.1.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
STUDY_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
RELEASE = bytes.fromhex("05000000000400000000")
CONTEXTS = ((1, CT, (EXPLICIT,)), (3, VERIFICATION, (IMPLICIT,)), (5, STUDY_FIND, (EXPLICIT,)))

Context = tuple[int, str, Sequence[str]]


def request(
    contexts: Iterable[Context] = CONTEXTS,
    *,
    calling_ae: str = "MODALITY",
    called_ae: str = "DICOMSCP",
    version: int = 1,
    application_context: str = "1.2.840.10008.3.1.1.1",
    max_pdu_bytes: int = 16384,
    roles: Iterable[tuple[str, int, int]] = (),
    extended: Iterable[tuple[str, bytes]] = (),
) -> bytes:
    """An A-ASSOCIATE-RQ."""
    pdu = A_ASSOCIATE_RQ()
    pdu.protocol_version, pdu.calling_ae_title, pdu.called_ae_title = version, calling_ae, called_ae
    name, information = ApplicationContextItem(), UserInformationItem()
    name.application_context_name = application_context
    longest, implementation = MaximumLengthSubItem(), ImplementationClassUIDSubItem()
    longest.maximum_length_received = max_pdu_bytes
    implementation.implementation_class_uid = "1.2.3.4"
    information.user_data = [longest, implementation, *map(_role, roles), *map(_extended, extended)]
    pdu.variable_items = [name, *map(_context, contexts), information]
    return pdu.encode()


def _context(context: Context) -> PresentationContextItemRQ:
    item, abstract = PresentationContextItemRQ(), AbstractSyntaxSubItem()
    item.presentation_context_id, abstract.abstract_syntax_name, syntaxes = context
    item.abstract_transfer_syntax_sub_items = [abstract]
    for syntax in syntaxes:
        transfer = TransferSyntaxSubItem()
        transfer.transfer_syntax_name = syntax
        item.abstract_transfer_syntax_sub_items.append(transfer)
    return item


def _role(role: tuple[str, int, int]) -> SCP_SCU_RoleSelectionSubItem:
    item = SCP_SCU_RoleSelectionSubItem()
    item.sop_class_uid, item.scu_role, item.scp_role = role
    return item


def _extended(extended: tuple[str, bytes]) -> SOPClassExtendedNegotiationSubItem:
    item = SOPClassExtendedNegotiationSubItem()
    item.sop_class_uid, item.service_class_application_information = extended
    return item


def pdu(pdu_type: int, body: bytes) -> bytes:
    """Any PDU."""
    return struct.pack(">BxL", pdu_type, len(body)) + body


def data(*pdvs: tuple[int, int, bytes]) -> bytes:
    """One P-DATA-TF of PDVs: context, message control header, bytes."""
    return pdu(
        4, b"".join(struct.pack(">LBB", len(part) + 2, cid, flags) + part for cid, flags, part in pdvs)
    )


def _ui(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)


def command(
    field: int, sop_class_uid: str, sop_uid: str = "", *, message_id: int = 7, dataset: bool = True
) -> bytes:
    """A request's command set."""
    elements = [
        (0x0002, _ui(sop_class_uid)),
        (0x0100, struct.pack("<H", field)),
        (0x0110, struct.pack("<H", message_id)),
        (0x0700, b"\0\0"),
        (0x0800, struct.pack("<H", 0 if dataset else 0x0101)),
    ]
    if sop_uid:
        elements.append((0x1000, _ui(sop_uid)))
    return upper_layer.encode_command(elements)


def cancel(message_id: int = 7) -> bytes:
    """A C-CANCEL-RQ."""
    return upper_layer.encode_command(
        [(0x0100, b"\xff\x0f"), (0x0120, struct.pack("<H", message_id)), (0x0800, b"\x01\x01")]
    )


ECHO = data((3, COMMAND | LAST, command(0x30, VERIFICATION, dataset=False)))


def store(
    dataset: bytes, sop_uid: str, *, sop_class_uid: str = CT, context_id: int = 1, step: int = 16000
) -> bytes:
    """A whole C-STORE request."""
    head = data((context_id, COMMAND | LAST, command(0x01, sop_class_uid, sop_uid)))
    return head + upper_layer.fragments(context_id, 0, dataset, step)


def find(identifier: bytes, *, context_id: int = 5, sop_class_uid: str = STUDY_FIND) -> bytes:
    """A whole C-FIND request."""
    head = data((context_id, COMMAND | LAST, command(0x20, sop_class_uid)))
    return head + data((context_id, LAST, identifier))


class Wire:
    """A connection to a listener."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> "Wire":
        self.socket.sendall(data)
        return self

    def associate(self, *args, **kwargs) -> A_ASSOCIATE_AC:
        """The acceptance of a request as `request` makes it."""
        self.send(request(*args, **kwargs))
        answer = self.pdu()
        assert answer[0] == 2, answer
        acceptance = A_ASSOCIATE_AC()
        acceptance.decode(answer)
        return acceptance

    def pdu(self) -> bytes:
        """The next PDU, empty at the end."""
        header = self._read(6)
        return header + self._read(int.from_bytes(header[2:], "big")) if header else b""

    def response(self) -> tuple[dict[int, bytes], bytes]:
        """The next response: command set and dataset."""
        command_set, dataset = b"", b""
        while True:
            answer = self.pdu()
            assert answer[0] == 4, answer
            pos = 6
            while pos < len(answer):
                length, _, flags = struct.unpack_from(">LBB", answer, pos)
                part = answer[pos + 6 : pos + 4 + length]
                pos += 4 + length
                if flags & COMMAND:
                    command_set += part
                else:
                    dataset += part
                if flags & LAST:
                    elements = upper_layer.decode_command(command_set)
                    if not flags & COMMAND or elements[0x0800] == b"\x01\x01":
                        return elements, dataset

    def status(self) -> tuple[int, str]:
        """Status and Error Comment of the next response."""
        elements, _ = self.response()
        return int.from_bytes(elements[0x0900], "little"), elements.get(0x0902, b"").decode().strip()

    def is_closed(self) -> bool:
        """Whether the listener closes, which is waited for."""
        return not self._read(1)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.socket.recv(size - len(data))
            except ConnectionResetError:
                part = b""
            if not part:
                assert not data, data
                return b""
            data += part
        return data
