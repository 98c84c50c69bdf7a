"""C-STORE (PS3.4 annex B, PS3.7 section 9.1.1): a dataset is passed on to the archive as it comes.

What goes wrong is answered at the end of the dataset, never before: the sender is heard out, the rest of its
dataset dropped.
"""

import struct
import time
from collections.abc import Sequence

import structlog

from dicomscp.archive.archive import Archive, Claim, Incoming, Source
from dicomscp.dimse.upper_layer import (
    AFFECTED_SOP_CLASS_UID,
    AFFECTED_SOP_UID,
    COMMAND_FIELD,
    DATA_SET_TYPE,
    ERROR_COMMENT,
    MESSAGE_ID,
    MESSAGE_ID_RESPONDED_TO,
    NO_DATA_SET,
    OFFENDING_ELEMENT,
    RESPONSE,
    STATUS,
    ContextAnswer,
    encode_command,
    uid,
    us,
)
from dicomscp.errors import BusyError, CrowdedError, DicomscpError, MismatchError, RefusedError
from dicomscp.telemetry.metrics import ListenerMetrics

C_STORE_RQ = 0x0001
SUCCESS = 0x0000
SOP_CLASS_NOT_SUPPORTED, NOT_AUTHORIZED = 0x0122, 0x0124  # PS3.7 section C.5

# PS3.4 table B.2-1.  The first family that fits decides.
_STATUS = (
    (CrowdedError, 0xA700),  # Out of resources
    (MismatchError, 0xA900),  # Data Set does not match SOP Class
    (RefusedError, 0xC000),  # Cannot understand
    (BusyError, 0xA700),  # Out of resources
    (DicomscpError, 0xA700),
)
_UNFORESEEN = 0xA700  # the instance may be taken another time; its sender must not think it has been
_KINDS = {0xA900: "mismatch", 0xA700: "busy"}
_COMMENT_CHARACTERS = 64  # VR LO


def status_of(error: DicomscpError) -> int:
    """The status that *error* is answered with."""
    return next(status for family, status in _STATUS if isinstance(error, family))


def comment(text: str) -> bytes:
    """*text* as the value of an Error Comment: 64 characters of ASCII, no backslash."""
    value = text.replace("\\", "/").encode("ascii", "replace")[:_COMMENT_CHARACTERS]
    return value if len(value) % 2 == 0 else value + b" "


def response(
    command: dict[int, bytes],
    status: int,
    error: str = "",
    *,
    dataset: bool = False,
    offending: Sequence[int] = (),
) -> bytes:
    """The command set that answers *command*; *error* says why, where it is not a success.

    *offending* are the tags of the elements that are to blame.
    """
    elements = (
        [(AFFECTED_SOP_CLASS_UID, command[AFFECTED_SOP_CLASS_UID])]
        if AFFECTED_SOP_CLASS_UID in command
        else []
    )
    elements += [
        (COMMAND_FIELD, us(int.from_bytes(command[COMMAND_FIELD], "little") | RESPONSE)),
        (MESSAGE_ID_RESPONDED_TO, command[MESSAGE_ID]),
        (DATA_SET_TYPE, us(0x0001 if dataset else NO_DATA_SET)),
        (STATUS, us(status)),
    ]
    if offending:
        tags = b"".join(struct.pack("<HH", tag >> 16, tag & 0xFFFF) for tag in offending)
        elements.append((OFFENDING_ELEMENT, tags))
    if error:
        elements.append((ERROR_COMMENT, comment(error)))
    if AFFECTED_SOP_UID in command:
        elements.append((AFFECTED_SOP_UID, command[AFFECTED_SOP_UID]))
    return encode_command(elements)


class Store:
    """One C-STORE request: its dataset goes to `write`, and `finish` answers it.

    None of these raises: what fails is in the status.  Memory does not grow with the instance.
    """

    def __init__(
        self,
        archive: Archive,
        context: ContextAnswer,
        command: dict[int, bytes],
        source: Source,
        *,
        authorised: bool,
        address: str,
        metrics: ListenerMetrics,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.status, self.reason, self.size = SUCCESS, "", 0
        self._archive, self._command, self._source = archive, command, source
        self._address, self._metrics, self._log = address, metrics, log
        self._incoming: Incoming | None = None
        self._sop_uid = uid(command, AFFECTED_SOP_UID)
        sop_class_uid = uid(command, AFFECTED_SOP_CLASS_UID)
        if not authorised:
            self._refuse(NOT_AUTHORIZED, "This AE may not store here")
        elif not sop_class_uid or not self._sop_uid:
            self._refuse(0xC000, "The request names no SOP Class or SOP Instance")
        elif sop_class_uid != context.abstract_syntax:
            self._refuse(SOP_CLASS_NOT_SUPPORTED, "The SOP Class is not that of the context")
        else:
            claim = Claim(sop_class_uid, self._sop_uid, context.transfer_syntax_uid)
            try:
                self._incoming = archive.receive(claim, source)
            except Exception as error:  # noqa: BLE001 - one C-STORE is one unit of work
                self._fail(error)

    def write(self, data: memoryview) -> None:
        """Take the next bytes of the dataset."""
        self.size += len(data)
        if self._incoming is not None:
            try:
                self._incoming.write(data)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(error)

    def finish(self) -> bytes:
        """The dataset is whole: the response, Success only once the archive has taken custody."""
        began = time.perf_counter()
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            try:
                self._archive.admit(incoming)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(error)
        if self.status == SUCCESS:
            self._metrics.received(self._source.calling_ae, self.size, time.perf_counter() - began)
            self._log.debug("instance_stored", sop_uid=self._sop_uid, size=self.size)
        else:
            self._metrics.refused(
                _KINDS.get(self.status, "refused"),
                self.reason,
                calling_ae=self._source.calling_ae,
                address=self._address,
            )
            self._log.warning(
                "instance_refused", sop_uid=self._sop_uid, status=f"{self.status:04X}", reason=self.reason
            )
        return response(self._command, self.status, self.reason)

    def discard(self) -> None:
        """The association ended within the dataset: keep nothing of it."""
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None

    def _refuse(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason

    def _fail(self, error: Exception) -> None:
        """Keep nothing, and answer *error* at the end."""
        if isinstance(error, DicomscpError):
            self._refuse(status_of(error), str(error))
        else:
            self._log.exception("instance_failed", sop_uid=self._sop_uid, exc_info=error)
            self._refuse(_UNFORESEEN, "Unforeseen error in the gateway; resend later")
        self.discard()
