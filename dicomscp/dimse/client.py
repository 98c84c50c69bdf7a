"""The SCU a person reaches for when a modality will not connect: C-ECHO, C-STORE, C-FIND.

`send` sends a file's dataset as it lies there, in its own transfer syntax: for each SOP class and transfer
syntax among the files one presentation context is proposed, with that syntax alone, so the peer either takes
the bytes or says that it does not.  Nothing is re-encoded.
"""

import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson
from pydicom.datadict import tag_for_keyword
from pydicom.uid import UID
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_items import (
    AbstractSyntaxSubItem,
    ApplicationContextItem,
    MaximumLengthSubItem,
    PresentationContextItemRQ,
    TransferSyntaxSubItem,
    UserInformationItem,
)

from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.elements import EXPLICIT_LITTLE, IMPLICIT_LITTLE
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.dimse import upper_layer
from dicomscp.dimse.query import (
    C_FIND_RQ,
    PENDING,
    PENDING_UNSUPPORTED_KEYS,
    QUERY_LEVEL,
    ROOTS,
    encode_identifier,
)
from dicomscp.dimse.storage import C_STORE_RQ, SUCCESS
from dicomscp.dimse.upper_layer import (
    AFFECTED_SOP_CLASS_UID,
    AFFECTED_SOP_UID,
    COMMAND_FIELD,
    DATA_SET_TYPE,
    ERROR_COMMENT,
    MESSAGE_ID,
    NO_DATA_SET,
    PRIORITY,
    STATUS,
    MalformedError,
    number,
    us,
)
from dicomscp.errors import ConfigError, RefusedError, UnreachableError

_VERIFICATION = "1.2.840.10008.1.1"
_C_ECHO_RQ = 0x0030
_MAX_CONTEXTS = 128  # odd numbers of a byte
_BATCH_FILES = 1000  # looked at before an association is asked for
_MAX_PDU_BYTES = 1 << 20  # ours, to a peer that takes any length
_RECEIVED_PDU_BYTES = 1 << 17
_MAX_MESSAGE_BYTES = 1 << 24  # of a response, which is short
_SEND_BYTES = 1 << 18
_META_BYTES = 1 << 16

# PS3.8 table 9-21, by source and diagnostic.
_REJECTIONS = {
    (1, 2): "it does not support the application context",
    (1, 3): "it does not know our calling AE title",
    (1, 7): "it does not know the called AE title",
    (2, 2): "it does not support the protocol version",
    (3, 1): "it is congested; try again later",
    (3, 2): "its limit of associations is reached; try again later",
}

# What is asked for when nothing is said.
_DEFAULT_KEYS = {
    "PATIENT": ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    "STUDY": (
        "StudyInstanceUID",
        "PatientName",
        "PatientID",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "StudyDescription",
        "ModalitiesInStudy",
    ),
    "SERIES": ("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription"),
    "IMAGE": ("SOPInstanceUID", "SOPClassUID", "InstanceNumber"),
}


class Peer(NamedTuple):
    """An AE elsewhere."""

    ae_title: str
    host: str
    port: int

    def __str__(self) -> str:
        """As `parse_peer` reads it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.ae_title}@{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file: *status* as the peer said, None if it was not asked."""

    path: Path
    status: int | None
    reason: str = ""
    size: int = 0

    @property
    def is_stored(self) -> bool:
        """Whether the peer has taken it; the warnings (B000, B006, B007) say that it has."""
        return self.status is not None and (self.status == SUCCESS or self.status >> 12 == 0xB)


def parse_peer(text: str) -> Peer:
    """The peer that AE@HOST:PORT names.  Raises ConfigError."""
    match = re.fullmatch(
        r"(?P<title>[^@\\]{1,16})@(\[(?P<v6>[^\]]+)\]|(?P<host>[^:@\[\]]+)):(?P<port>\d{1,5})", text
    )
    if match is None or not match["title"].strip() or not 0 < int(match["port"]) < 1 << 16:
        raise ConfigError(f"{text!r} is not AE@HOST:PORT, such as DICOMSCP@127.0.0.1:11112")
    return Peer(match["title"].strip(), match["v6"] or match["host"], int(match["port"]))


def echo(peer: Peer, *, calling_ae: str = "DICOMSCP", timeout_seconds: float = 30.0) -> float:
    """Seconds that a C-ECHO took, without the association's.  Raises UnreachableError."""
    contexts = [(_VERIFICATION, (IMPLICIT_LITTLE, EXPLICIT_LITTLE))]
    with _Requestor(peer, contexts, calling_ae=calling_ae, timeout_seconds=timeout_seconds) as association:
        began = time.perf_counter()
        association.request(association.context_of(_VERIFICATION), _C_ECHO_RQ, _VERIFICATION)
        status, reason, _ = association.response()
        if status != SUCCESS:
            raise UnreachableError(f"{peer} answers the C-ECHO with {status:04X} {reason}".rstrip())
        return time.perf_counter() - began


def send(
    paths: Iterable[Path],
    peer: Peer,
    *,
    calling_ae: str = "DICOMSCP",
    timeout_seconds: float = 60.0,
    progress: Callable[[Outcome], None] | None = None,
) -> Iterator[Outcome]:
    """Send each of *paths*, a file's dataset as it lies there; one outcome a file, not in their order.

    A file that cannot be read or is refused does not keep the others.  Raises UnreachableError once no
    association can be had.
    """
    remaining = iter(paths)
    while batch := list(islice(remaining, _BATCH_FILES)):
        for outcome in _send_batch(batch, peer, calling_ae, timeout_seconds):
            if progress is not None:
                progress(outcome)
            yield outcome


def find(
    peer: Peer,
    level: str,
    keys: Mapping[str, str],
    *,
    calling_ae: str = "DICOMSCP",
    timeout_seconds: float = 60.0,
) -> Iterator[dict[str, Any]]:
    """The matches of a C-FIND at *level*, each a DICOM JSON object.

    *keys* are by keyword or eight hexadecimal digits; empty values are asked for.  What one usually wants to
    know at the level is asked for besides.  Raises ConfigError for what is no key or level, UnreachableError,
    and RefusedError if the peer answers with a failure.
    """
    if level not in _DEFAULT_KEYS:
        raise ConfigError(f"{level!r} is not a level: {', '.join(_DEFAULT_KEYS)}")
    identifier = _identifier(level, keys)
    root = next(uid for uid, name in ROOTS.items() if name == ("PATIENT" if level == "PATIENT" else "STUDY"))
    contexts = [(root, (EXPLICIT_LITTLE, IMPLICIT_LITTLE))]
    with _Requestor(peer, contexts, calling_ae=calling_ae, timeout_seconds=timeout_seconds) as association:
        context_id = association.context_of(root)
        syntax = association.syntaxes[context_id]
        association.request(context_id, C_FIND_RQ, root, encode_identifier(identifier, syntax, ()))
        compiler = Compiler(cache_bytes=1 << 20)
        while True:
            status, reason, dataset = association.response()
            if status not in (PENDING, PENDING_UNSUPPORTED_KEYS):
                break
            header = compiler.header(dataset, syntax, total_bytes=len(dataset), bulk_uri="")
            header.fragments.pop(0x00083002, None)  # of files, not of answers
            match: dict[str, Any] = orjson.loads(b"{" + b",".join(header.fragments.values()) + b"}")
            yield match
        if status != SUCCESS:
            raise RefusedError(f"{peer} answers the C-FIND with {status:04X} {reason}".rstrip())


def _identifier(level: str, keys: Mapping[str, str]) -> dict[str, Any]:
    asked = dict.fromkeys(_DEFAULT_KEYS[level], "") | dict(keys)
    identifier: dict[str, Any] = {f"{QUERY_LEVEL:08X}": {"vr": "CS", "Value": [level]}}
    for name, value in asked.items():
        tag = int(name, 16) if re.fullmatch("[0-9A-Fa-f]{8}", name) else tag_for_keyword(name)
        if tag is None:
            raise ConfigError(f"{name!r} is neither a keyword of the standard nor eight hexadecimal digits")
        vr = public_vr(tag)
        identifier[f"{tag:08X}"] = {"vr": vr, "Value": _key_values(name, vr, value)}
    return identifier


def _key_values(name: str, vr: str, value: str) -> list[Any]:
    if not value:
        return []
    values = value.split("\\")
    if vr == "PN":
        return [
            dict(zip(("Alphabetic", "Ideographic", "Phonetic"), one.split("="), strict=False))
            for one in values
        ]
    if vr in ("US", "SS", "UL", "SL"):
        try:
            return [int(one) for one in values]
        except ValueError as error:
            raise ConfigError(f"{name}: {value!r} is not a number") from error
    return list(values)


# ── C-STORE ──────────────────────────────────────────────────────────────────────────────────────


class _File(NamedTuple):
    path: Path
    sop_class_uid: str
    sop_uid: str
    transfer_syntax_uid: str
    dataset_offset: int
    size: int  # of the dataset


def _send_batch(
    paths: Sequence[Path], peer: Peer, calling_ae: str, timeout_seconds: float
) -> Iterator[Outcome]:
    files = []
    for path in paths:
        try:
            files.append(_look(path))
        except (RefusedError, OSError) as error:
            yield Outcome(path, None, getattr(error, "strerror", None) or str(error))
    while files:
        group = _of_one_association(files)
        contexts = list(dict.fromkeys((file.sop_class_uid, (file.transfer_syntax_uid,)) for file in group))
        done = 0
        with _Requestor(
            peer, contexts, calling_ae=calling_ae, timeout_seconds=timeout_seconds
        ) as association:
            for outcome in _send_group(association, group):
                done += 1
                yield outcome
        sent = set(group[:done])
        files = [file for file in files if file not in sent]


def _look(path: Path) -> _File:
    with path.open("rb") as file:
        meta = read_file_meta(file.read(_META_BYTES))
        size = os.fstat(file.fileno()).st_size - meta.dataset_offset
    return _File(path, meta.sop_class_uid, meta.sop_uid, meta.transfer_syntax_uid, meta.dataset_offset, size)


def _of_one_association(files: Sequence[_File]) -> list[_File]:
    """Those of *files* that the contexts of one association have room for."""
    contexts: set[tuple[str, str]] = set()
    group = []
    for file in files:
        context = (file.sop_class_uid, file.transfer_syntax_uid)
        if context in contexts or len(contexts) < _MAX_CONTEXTS:
            contexts.add(context)
            group.append(file)
    return group


def _send_group(association: "_Requestor", group: Sequence[_File]) -> Iterator[Outcome]:
    """An outcome for each of *group*, or fewer if the association is lost: then the last one says so."""
    for file in group:
        try:
            yield _send_file(association, file)
        except (UnreachableError, OSError) as error:
            association.abort()
            yield Outcome(file.path, None, str(error))
            return


def _send_file(association: "_Requestor", file: _File) -> Outcome:
    context_id = association.contexts.get((file.sop_class_uid, file.transfer_syntax_uid))
    if context_id is None:
        what = f"{UID(file.sop_class_uid).name} in {UID(file.transfer_syntax_uid).name}"
        return Outcome(file.path, None, f"the peer does not take {what}")
    command = association.command(context_id, C_STORE_RQ, file.sop_class_uid, file.sop_uid)
    with file.path.open("rb", buffering=0) as source:
        source.seek(file.dataset_offset)
        association.stream(context_id, command, source.read, file.size)
    status, reason, _ = association.response()
    return Outcome(file.path, status, reason, file.size)


# ── one association ──────────────────────────────────────────────────────────────────────────────


class _Requestor:
    """An association that we asked for; use it with `with`, which releases it."""

    def __init__(
        self,
        peer: Peer,
        contexts: Sequence[tuple[str, Sequence[str]]],
        *,
        calling_ae: str,
        timeout_seconds: float,
    ) -> None:
        """Raises UnreachableError if there is no association to be had, saying why."""
        self._peer = peer
        self._open = False
        self._message_id = 0
        self.contexts: dict[tuple[str, str], int] = {}  # by abstract and transfer syntax
        self.syntaxes: dict[int, str] = {}
        self._pdu_bytes = _MAX_PDU_BYTES
        try:
            self._socket = socket.create_connection((peer.host, peer.port), timeout_seconds)
        except OSError as error:
            raise UnreachableError(f"{peer} cannot be reached: {error.strerror or error}") from error
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._send(_request(peer, contexts, calling_ae))
            self._accept(contexts, *self._read_pdu())
        except BaseException:
            self._socket.close()
            raise
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._release()
        else:
            self.abort()

    def context_of(self, abstract_syntax: str) -> int:
        """The context accepted for *abstract_syntax*.  Raises UnreachableError if there is none."""
        for (abstract, _), context_id in self.contexts.items():
            if abstract == abstract_syntax:
                return context_id
        raise UnreachableError(f"{self._peer} does not offer {UID(abstract_syntax).name}")

    def command(self, context_id: int, field: int, sop_class_uid: str, sop_uid: str = "") -> bytes:
        """The PDUs of the next request's command set."""
        self._message_id = self._message_id % 0xFFFF + 1
        elements = [
            (AFFECTED_SOP_CLASS_UID, _ui(sop_class_uid)),
            (COMMAND_FIELD, us(field)),
            (MESSAGE_ID, us(self._message_id)),
            (PRIORITY, us(0)),
            (DATA_SET_TYPE, us(NO_DATA_SET if field == _C_ECHO_RQ else 1)),
        ]
        if sop_uid:
            elements.append((AFFECTED_SOP_UID, _ui(sop_uid)))
        if field == _C_ECHO_RQ:
            elements.remove((PRIORITY, us(0)))
        encoded = upper_layer.encode_command(elements)
        return upper_layer.fragments(context_id, upper_layer.COMMAND, encoded, self._pdu_bytes)

    def request(self, context_id: int, field: int, sop_class_uid: str, dataset: bytes = b"") -> None:
        """Send a request whose dataset is at hand."""
        pdus = self.command(context_id, field, sop_class_uid)
        self._send(
            pdus + (upper_layer.fragments(context_id, 0, dataset, self._pdu_bytes) if dataset else b"")
        )

    def stream(self, context_id: int, pdus: bytes, read: Callable[[int], bytes], size: int) -> None:
        """Send *pdus*, then a dataset of *size* bytes as *read* gives it."""
        pending, left = [pdus], size
        while True:
            part = read(min(self._pdu_bytes - 6, left))
            left -= len(part)
            if not part and left:
                raise OSError("the file became shorter while it was sent")
            flags = 0 if left else upper_layer.LAST
            header = upper_layer.DATA_HEADER.pack(
                upper_layer.P_DATA_TF, len(part) + 6, len(part) + 2, context_id, flags
            )
            pending += [header, part]
            if not left or sum(map(len, pending)) >= _SEND_BYTES:
                self._send(b"".join(pending))
                pending = []
            if not left:
                return

    def response(self) -> tuple[int, str, bytes]:
        """Status, Error Comment and dataset of the next response."""
        command, dataset, expects = bytearray(), bytearray(), True
        while expects:
            pdu_type, pdu = self._read_pdu()
            if pdu_type != upper_layer.P_DATA_TF:
                self._fail(pdu_type, pdu)
            for flags, part in self._pdvs(pdu):
                (command if flags & upper_layer.COMMAND else dataset).extend(part)
                if flags & upper_layer.LAST:
                    expects = bool(flags & upper_layer.COMMAND) and self._has_dataset(command)
            if len(command) + len(dataset) > _MAX_MESSAGE_BYTES:
                raise UnreachableError(f"{self._peer} answers without end")
        elements = self._decoded(command)
        reason = elements.get(ERROR_COMMENT, b"").decode("latin-1").strip(" \0")
        return number(elements, STATUS), reason, bytes(dataset)

    def abort(self) -> None:
        """End it without a word more; harmless to repeat."""
        if self._open:
            self._open = False
            with suppress(OSError):
                self._socket.sendall(upper_layer.abort(upper_layer.SERVICE_USER))
            self._socket.close()

    def _release(self) -> None:
        if self._open:
            self._open = False
            with suppress(OSError, UnreachableError):
                self._send(upper_layer.PDU_HEADER.pack(upper_layer.A_RELEASE_RQ, 4) + bytes(4))
                self._read_pdu()
            self._socket.close()

    def _accept(self, contexts: Sequence[tuple[str, Sequence[str]]], pdu_type: int, pdu: bytes) -> None:
        if pdu_type != upper_layer.A_ASSOCIATE_ACCEPTED:
            self._fail(pdu_type, pdu)
        acceptance = A_ASSOCIATE_AC()
        try:
            acceptance.decode(pdu)
        except (ValueError, TypeError, LookupError, AssertionError, struct.error) as error:
            raise UnreachableError(f"{self._peer} accepts in a way that cannot be read") from error
        for item in acceptance.presentation_context:
            index, even = divmod(item.context_id or 0, 2)
            if item.result == upper_layer.ACCEPTED and even and index < len(contexts):
                self.syntaxes[item.context_id] = str(item.transfer_syntax)
                self.contexts[contexts[index][0], str(item.transfer_syntax)] = item.context_id
        for item in acceptance.user_information.user_data if acceptance.user_information else ():
            if isinstance(item, MaximumLengthSubItem) and item.maximum_length_received:
                self._pdu_bytes = max(min(item.maximum_length_received, _MAX_PDU_BYTES), 8)

    def _fail(self, pdu_type: int, pdu: bytes) -> None:
        """Say in words what came in place of what was waited for."""
        if pdu_type == upper_layer.A_ASSOCIATE_REJECTED:
            reason = _REJECTIONS.get((pdu[8], pdu[9]), f"result {pdu[7]}, source {pdu[8]}, reason {pdu[9]}")
            raise UnreachableError(f"{self._peer} rejects the association: {reason}")
        if pdu_type == upper_layer.A_ABORT:
            raise UnreachableError(f"{self._peer} aborts (source {pdu[8]}, reason {pdu[9]})")
        raise UnreachableError(f"{self._peer} sends a PDU of type {pdu_type:02X} out of turn")

    def _pdvs(self, pdu: bytes) -> Iterator[tuple[int, bytes]]:
        pos = 6
        while pos < len(pdu):
            if pos + 6 > len(pdu):
                raise UnreachableError(f"{self._peer} sends a malformed P-DATA-TF")
            length, _, flags = upper_layer.PDV_HEADER.unpack_from(pdu, pos)
            yield flags, pdu[pos + 6 : pos + 4 + length]
            pos += 4 + max(length, 2)

    def _has_dataset(self, command: bytearray) -> bool:
        return number(self._decoded(command), DATA_SET_TYPE) != NO_DATA_SET

    def _decoded(self, command: bytearray) -> dict[int, bytes]:
        try:
            elements = upper_layer.decode_command(bytes(command))
            number(elements, STATUS), number(elements, DATA_SET_TYPE)
        except MalformedError as error:
            raise UnreachableError(f"{self._peer} answers with a malformed {error}") from error
        return elements

    def _read_pdu(self) -> tuple[int, bytes]:
        header = self._read(6)
        pdu_type, length = upper_layer.PDU_HEADER.unpack(header)
        if length > _MAX_MESSAGE_BYTES or pdu_type > upper_layer.A_ABORT:
            raise UnreachableError(f"{self._peer} does not speak DICOM")
        return pdu_type, header + self._read(max(length, 4))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(size - len(data))
            except OSError as error:
                raise UnreachableError(f"{self._peer} does not answer: {error.strerror or error}") from error
            if not part:
                raise UnreachableError(f"{self._peer} closed the connection")
            data += part
        return bytes(data)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise UnreachableError(f"{self._peer} does not listen: {error.strerror or error}") from error


def _request(peer: Peer, contexts: Sequence[tuple[str, Sequence[str]]], calling_ae: str) -> bytes:
    pdu = A_ASSOCIATE_RQ()
    try:
        pdu.called_ae_title, pdu.calling_ae_title = peer.ae_title, calling_ae
    except ValueError as error:
        raise ConfigError(f"not an AE title: {error}") from error
    information = UserInformationItem()
    information.user_data = list(upper_layer.identification(_RECEIVED_PDU_BYTES))
    items = [_context(2 * index + 1, *context) for index, context in enumerate(contexts)]
    pdu.variable_items = [ApplicationContextItem(), *items, information]
    encoded: bytes = pdu.encode()
    return encoded


def _context(context_id: int, abstract_syntax: str, syntaxes: Sequence[str]) -> PresentationContextItemRQ:
    abstract = AbstractSyntaxSubItem()
    abstract.abstract_syntax_name = abstract_syntax
    item = PresentationContextItemRQ()
    item.presentation_context_id = context_id
    item.abstract_transfer_syntax_sub_items = [abstract]
    for syntax in syntaxes:
        transfer = TransferSyntaxSubItem()
        transfer.transfer_syntax_name = syntax
        item.abstract_transfer_syntax_sub_items.append(transfer)
    return item


def _ui(uid: str) -> bytes:
    value = uid.encode("latin-1", "replace")
    return value if len(value) % 2 == 0 else value + b"\0"
