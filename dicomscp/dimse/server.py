"""The DIMSE listener: who may open an association, and the conversation on it.

One thread accepts, one serves each association, blocking: read into one reused buffer, hand the bytes to
the upper layer, act on the facts, send each answer at once.  Two socket options carry the speed with senders
that leave Nagle's algorithm on: TCP_NODELAY sends our answer at once, and TCP_QUICKACK, which the kernel
takes back and is therefore set again after each read, acknowledges the first half of a request on which the
sender waits before it sends the second.

What an association costs is bounded: a thread, a buffer, what the archive keeps of one dataset; how long it
may take to ask (ARTIM, PS3.8 9.1.5), to be silent, and to last, too.  Each is logged once, when it ends.
"""

import ipaddress
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple, Protocol

import structlog
from pydicom._uid_dict import UID_dictionary
from pynetdicom import AllStoragePresentationContexts

from dicomscp.archive.archive import Archive, Source
from dicomscp.dicom.elements import DEFLATED, EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE
from dicomscp.dicom.identity import is_filable_syntax, is_regular
from dicomscp.dicom.part10 import Origin
from dicomscp.dimse.query import C_CANCEL_RQ, C_FIND_RQ, ROOTS, Answering, Find, granted, options_of
from dicomscp.dimse.storage import C_STORE_RQ, SUCCESS, Store, response
from dicomscp.dimse.upper_layer import (
    ABSTRACT_SYNTAX_NOT_SUPPORTED,
    ACCEPTED,
    APPLICATION_CONTEXT,
    COMMAND_FIELD,
    MESSAGE_ID,
    RESPONSE,
    SERVICE_PROVIDER,
    SERVICE_USER,
    TRANSFER_SYNTAXES_NOT_SUPPORTED,
    USER_REJECTION,
    Aborted,
    Acceptor,
    AssociateRequest,
    ContextAnswer,
    Fact,
    Fragment,
    Message,
    Rejection,
    ReleaseRequested,
    Violation,
    number,
)
from dicomscp.telemetry.metrics import ListenerMetrics

log = structlog.get_logger()

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_BUFFER_BYTES = 1 << 18
# Responses of a query that are sent at once: a cancel is heard behind them.
_GATHERED_BYTES, _GATHERED_SECONDS = 16 << 10, 0.005
_WAITING = 64  # connections beyond the associations: to be rejected, about to ask, closing
_ACCEPT_WAKE_SECONDS = 0.1  # how soon a drain is noticed while nobody connects
_EXHAUSTED_SECONDS = 0.1  # pause when the process has no descriptors or threads left
_CLOSE_SECONDS = 5.0  # for the peer to close first, so that our last PDU reaches it
_END_SECONDS = 10.0  # for associations to end after they were told so

_RELEASED = "released"

_C_ECHO_RQ = 0x0030
_UNRECOGNIZED_OPERATION = 0x0211  # PS3.7 section C.5

_VERIFICATION = "1.2.840.10008.1.1"
_DICOM_ROOT = "1.2.840.10008."
_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."
_STORAGE = frozenset(str(context.abstract_syntax) for context in AllStoragePresentationContexts)
# Storage classes of objects that belong to no study, and so have no place here.
_NO_STUDY = ("1.2.840.10008.5.1.4.1.1.200.", "1.2.840.10008.5.1.4.1.1.201.")

_PLAIN = (EXPLICIT_LITTLE, IMPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED)
# Encapsulated, and nothing is lost: JPEG lossless, JPEG-LS, JPEG 2000, HTJ2K, JPEG XL, RLE, deflated frames.
_LOSSLESS = frozenset(
    "1.2.840.10008.1.2." + suffix
    for suffix in ("1.98", "4.57", "4.70", "4.80", "4.90", "4.92", "4.110", "4.201", "4.202", "5", "8.1")
)

# PS3.4 section B.3.1: storage level 2 (full), signatures kept bit by bit (3), no element is coerced.
_FULL_STORAGE = bytes((2, 0, 3, 0, 0, 0))


# ── who may do what ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class KnownAe:
    """An AE that is listed; without *networks* it may call from anywhere."""

    title: str
    networks: tuple[Network, ...] = ()
    store: bool = True
    find: bool = False
    default_character_set: str = ""


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """What a listener goes by.

    Without *known_aes* anybody may verify and store; else only those listed may open an association.
    *open_find* lets anybody query as long as none is listed.  *transfer_syntaxes* are all that is accepted,
    the preferred first; if empty, all that can be filed, and no sender is made to compress with loss.
    *private_sop_classes* are prefixes of UIDs that are storage whatever *unknown_sop_classes* says.
    """

    called_ae_titles: tuple[str, ...] = ()
    known_aes: tuple[KnownAe, ...] = ()
    max_associations: int = 64
    max_pdu_bytes: int = 131072
    idle_seconds: float = 60.0
    association_seconds: float = 86400.0
    accept_seconds: float = 30.0
    transfer_syntaxes: tuple[str, ...] = ()
    unknown_sop_classes: Literal["accept", "reject"] = "accept"
    private_sop_classes: tuple[str, ...] = ()
    open_find: bool = True
    answering: Answering = field(default_factory=Answering)


class Seats(Protocol):
    """The gateway's count of open associations."""

    def take(self) -> bool:
        """Count one more; False if there are as many as may be."""

    def release(self) -> None:
        """Count one less."""


class Service(Enum):
    """What a presentation context is for."""

    VERIFICATION = _C_ECHO_RQ
    STORAGE = C_STORE_RQ
    FIND = C_FIND_RQ


class Negotiated(NamedTuple):
    """Our side of an association: answers to the contexts, roles, and extended negotiation."""

    answers: tuple[ContextAnswer, ...]
    roles: dict[str, tuple[bool, bool]]
    extended: dict[str, bytes]


def admit(request: AssociateRequest, address: str, settings: ListenerSettings) -> KnownAe | Rejection:
    """The AE that asks, or why it gets no association (PS3.8 table 9-21)."""
    if not request.protocol_version & 1:
        return Rejection(1, 2, 2, "protocol version not supported")
    if request.application_context != APPLICATION_CONTEXT:
        return Rejection(1, 1, 2, "application context not supported")
    titles = settings.called_ae_titles
    if titles and request.called_ae not in titles:
        return Rejection(1, 1, 7, "called AE title not recognized")
    if not settings.known_aes:
        return KnownAe(request.calling_ae, store=True, find=settings.open_find)
    for known in settings.known_aes:
        if known.title == request.calling_ae and _within(address, known.networks):
            return known
    titled = any(known.title == request.calling_ae for known in settings.known_aes)
    return Rejection(1, 1, 3, f"calling AE title not recognized{' from this address' * titled}")


def _within(address: str, networks: Sequence[Network]) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return not networks or any((mapped or ip) in network for network in networks)


def service_of(abstract_syntax: str, settings: ListenerSettings) -> Service | None:
    """What we do in a context of *abstract_syntax*; None: nothing.

    Storage is what pynetdicom's tables say, what the dictionary calls storage (retired and industrial
    classes) except of objects without a study, and, if so set, what nobody knows.
    """
    if abstract_syntax == _VERIFICATION:
        return Service.VERIFICATION
    if abstract_syntax in ROOTS:
        return Service.FIND
    if abstract_syntax in _STORAGE or any(
        f"{abstract_syntax}.".startswith(f"{prefix.rstrip('.')}.") for prefix in settings.private_sop_classes
    ):
        return Service.STORAGE
    known = UID_dictionary.get(abstract_syntax)
    if known:
        storage = abstract_syntax.startswith(_STORAGE_ROOT) and "Storage" in known[0]
        return Service.STORAGE if storage and not abstract_syntax.startswith(_NO_STUDY) else None
    other_service = abstract_syntax.startswith(_DICOM_ROOT) and not abstract_syntax.startswith(_STORAGE_ROOT)
    accept = settings.unknown_sop_classes == "accept" and is_regular(abstract_syntax)
    return Service.STORAGE if accept and not other_service else None


def choose_transfer_syntax(service: Service, proposed: Sequence[str], settings: ListenerSettings) -> str:
    """The one of *proposed* that we prefer; empty if there is none we take."""
    if service is not Service.STORAGE:
        return next((syntax for syntax in _PLAIN if syntax in proposed), "")
    if settings.transfer_syntaxes:
        return next((syntax for syntax in settings.transfer_syntaxes if syntax in proposed), "")
    filable = [syntax for syntax in proposed if is_filable_syntax(syntax)]
    return min(filable, key=_preference, default="")


def _preference(transfer_syntax_uid: str) -> int:
    """Explicit little endian, compressed without loss, other plain ones, compressed with loss."""
    if transfer_syntax_uid in _LOSSLESS:
        return 1
    plain = (EXPLICIT_LITTLE, "", IMPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED)
    return plain.index(transfer_syntax_uid) if transfer_syntax_uid in plain else len(plain)


def negotiate(request: AssociateRequest, settings: ListenerSettings) -> Negotiated:
    """Our answers to what *request* proposes; the requestor is SCU everywhere, the default role."""
    answers, roles, extended = [], {}, {}
    for context_id, abstract_syntax, proposed in request.contexts:
        service = service_of(abstract_syntax, settings)
        scu, _ = role = request.roles.get(abstract_syntax, (True, False))
        syntax = choose_transfer_syntax(service, proposed, settings) if service else ""
        result = ACCEPTED
        if service is None:
            result = ABSTRACT_SYNTAX_NOT_SUPPORTED
        elif not scu:  # it would only serve, as for C-GET
            result = USER_REJECTION
        elif not syntax:
            result = TRANSFER_SYNTAXES_NOT_SUPPORTED
        answers.append(ContextAnswer(context_id, result, abstract_syntax, syntax if not result else ""))
        if result == ACCEPTED and abstract_syntax in request.roles:
            roles[abstract_syntax] = (role[0], False)
        asked = request.extended.get(abstract_syntax, b"")
        if result == ACCEPTED and service is Service.STORAGE and abstract_syntax in request.extended:
            extended[abstract_syntax] = _FULL_STORAGE
        elif result == ACCEPTED and service is Service.FIND and asked:
            extended[abstract_syntax] = granted(asked)
    return Negotiated(tuple(answers), roles, extended)


# ── the listener ─────────────────────────────────────────────────────────────────────────────────


class Listener:
    """Accepts associations on a listening socket, which may be shared with other processes."""

    def __init__(
        self,
        sock: socket.socket,
        settings: ListenerSettings,
        archive: Archive,
        *,
        seats: Seats,
        metrics: ListenerMetrics | None = None,
    ) -> None:
        self.settings, self.archive = settings, archive
        self.seats, self.metrics = seats, metrics or ListenerMetrics()
        self._socket = sock
        self._open: set[Association] = set()
        self._lock = threading.Lock()
        self._deadline: float | None = None

    def serve(self) -> None:
        """Accept until `drain` is called; return once no association is open."""
        # Blocking, so that the kernel deals connections out in turn to the processes that wait for one.
        self._socket.setblocking(True)
        _set_timeout(self._socket, socket.SO_RCVTIMEO, _ACCEPT_WAKE_SECONDS)
        while self._deadline is None:
            try:
                connection, address = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                log.warning("accept_failed", reason=str(error))
                time.sleep(_EXHAUSTED_SECONDS)
                continue
            self._begin(connection, address[0])
        self._finish(self._deadline)

    def drain(self, seconds: float) -> None:
        """Accept no more; what is open may finish within *seconds*, then it is aborted.

        Returns at once; `serve` returns when all has ended.  May be called from a signal handler.
        """
        self._deadline = time.monotonic() + seconds

    @property
    def draining(self) -> bool:
        """Whether no association is accepted any more."""
        return self._deadline is not None

    def forget(self, association: "Association") -> None:
        """An association is over."""
        with self._lock:
            self._open.discard(association)

    def _begin(self, connection: socket.socket, address: str) -> None:
        association = Association(self, connection, address)
        with self._lock:
            crowded = len(self._open) >= self.settings.max_associations + _WAITING
            self._open.add(association)
        if crowded:
            self._refuse(association, "too many connections")
            return
        try:
            threading.Thread(target=association.run, name=f"association {address}", daemon=True).start()
        except RuntimeError as error:
            self._refuse(association, str(error))

    def _refuse(self, association: "Association", reason: str) -> None:
        log.warning("connection_refused", address=association.address, reason=reason)
        self.metrics.rejected("connections", reason, address=association.address)
        association.close()

    def _finish(self, deadline: float) -> None:
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            left = list(self._open)
        for association in left:
            association.end()
        deadline = time.monotonic() + _END_SECONDS
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        log.info("drained", aborted=len(left), left=len(self._open))


def _set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """As `settimeout`, but kept by the kernel: no poll before each read."""
    whole = int(seconds)
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, int((seconds - whole) * 1e6)))


@dataclass(slots=True)
class _Counts:
    stored: int = 0
    refused: int = 0
    size: int = 0
    queries: int = 0
    echoes: int = 0
    began: float = field(default_factory=time.monotonic)


class Association:
    """One connection, from its first byte to its close."""

    def __init__(self, listener: Listener, sock: socket.socket, address: str) -> None:
        self.address = address
        self._listener, self._socket, self._settings = listener, sock, listener.settings
        self._upper = Acceptor(self._settings.max_pdu_bytes)
        self._services: dict[int, Service] = {}
        self._ae = KnownAe("")
        self._source = Source(Origin.C_STORE, "", "")
        self._operation: Store | Find | _Status = _Status({})  # whose dataset is coming
        self._context_id = 0  # of the operation
        self._answers: Iterator[tuple[bytes, bytes]] | None = None  # of a query
        self._finding: Find | None = None
        self._agreed: Mapping[str, bytes] = {}  # extended negotiation, by SOP class
        self._gathered = bytearray()  # responses that are not sent yet
        self._fault: OSError | None = None  # of the connection, met while a query looked for more
        self._heard: deque[Fact] = deque()  # while a query was under way, and not yet acted on
        self._counts = _Counts()
        self._received = 0
        self._seated = False
        self._how = ""
        self._is_said = False
        self._ending = threading.Event()
        self._log = log.bind(address=address)

    def run(self) -> None:
        """Serve the association until it ends, however it does; nothing is raised and nothing left open."""
        try:
            self._prepare()
            self._converse()
        except OSError as error:
            self._how = self._how or f"connection lost: {error.strerror or error}"
        except Exception:  # noqa: BLE001 - one association is one unit of work
            self._log.exception("association_failed")
            self._how = "unforeseen error"
            with suppress(OSError):
                self._socket.sendall(self._upper.abort(SERVICE_USER))
        finally:
            if isinstance(self._operation, Store):
                self._operation.discard()
            self._leave()
            with suppress(OSError):
                self._await_close()
            self.close()

    def close(self) -> None:
        """Give the connection up."""
        self._socket.close()
        self._listener.forget(self)

    def end(self) -> None:
        """Abort from another thread, as soon as what it does allows."""
        self._ending.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def _prepare(self) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        _set_timeout(self._socket, socket.SO_RCVTIMEO, self._settings.accept_seconds)
        _set_timeout(self._socket, socket.SO_SNDTIMEO, self._settings.idle_seconds)

    def _converse(self) -> None:
        """Read and act until the association is over.  Hot: entered once for each read."""
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        upper, receive, set_option = self._upper, self._socket.recv_into, self._socket.setsockopt
        while self._heard or not upper.is_closing:
            if self._heard:
                self._act(self._heard.popleft())
                continue
            if self._answers is not None and not self._is_readable():
                self._answer()
                continue
            try:
                size = receive(buffer)
            except BlockingIOError:
                self._time_out("silent for too long")
                return
            if not size:
                self._lost()
                return
            set_option(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            self._received += size
            for fact in upper.receive(buffer[:size]):
                self._act(fact)
            if upper.is_closing:
                return
            if self._ending.is_set():
                self._lost()
                return
            if self._is_overdue():
                self._time_out("open for too long")
                return

    def _listen(self) -> None:
        """Hear what the peer says while a query has nothing to answer: a C-CANCEL, above all.

        Anything else waits until the query is through, and no more is heard until then.
        """
        try:
            self._send_gathered()  # what is next may take long
            self._hear()
        except OSError as error:  # which would be taken for one of the query's
            self._fault = error
            if self._finding is not None:
                self._finding.give_up()

    def _hear(self) -> None:
        while not self._heard and self._finding is not None and self._is_readable():
            data = memoryview(bytearray(_BUFFER_BYTES))
            size = self._socket.recv_into(data)
            self._received += size
            if not size or self._ending.is_set():
                self._finding.give_up()
                return
            for fact in self._upper.receive(data[:size]):
                if isinstance(fact, Message) and number(fact.command, COMMAND_FIELD) == C_CANCEL_RQ:
                    self._act(fact)
                    continue
                self._heard.append(fact)
                if isinstance(fact, ReleaseRequested | Aborted | Violation):
                    self._finding.give_up()

    def _is_readable(self) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def _is_overdue(self) -> bool:
        limit = self._settings.association_seconds if self._seated else self._settings.accept_seconds
        return time.monotonic() > self._counts.began + limit

    def _time_out(self, how: str) -> None:
        """What came too late ends the association; before there is one, only the connection (AA-2)."""
        self._how = how
        if self._seated:
            self._abort(SERVICE_PROVIDER)

    def _lost(self) -> None:
        """There is nothing more to read."""
        self._how = "the gateway stops" if self._ending.is_set() else "closed by the peer without release"
        if self._ending.is_set() and self._seated:
            self._abort(SERVICE_PROVIDER)

    def _abort(self, source: int) -> None:
        self._send(self._upper.abort(source))

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except BlockingIOError as error:
            raise OSError("the peer does not read") from error

    # ── facts ────────────────────────────────────────────────────────────────────────────────────

    def _act(self, fact: Fact) -> None:
        """Do what *fact* asks for.  Hot: the commonest come first."""
        if isinstance(fact, Fragment):
            self._operation.write(fact.data)
            if fact.last:
                self._complete()
        elif isinstance(fact, Message):
            self._begin(fact)
        elif isinstance(fact, AssociateRequest):
            self._answer_request(fact)
        elif isinstance(fact, ReleaseRequested):
            self._how = _RELEASED
            self._leave()
            self._send(self._upper.release())
        elif isinstance(fact, Aborted):
            self._how = f"aborted by the peer (source {fact.source}, reason {fact.reason})"
        elif isinstance(fact, Violation):
            self._how = fact.text
            self._send(fact.reply)

    def _answer_request(self, request: AssociateRequest) -> None:
        self._log = log.bind(address=self.address, calling_ae=request.calling_ae, called_ae=request.called_ae)
        ae = admit(request, self.address, self._settings)
        if isinstance(ae, KnownAe):
            ae = self._seat() or ae
        if isinstance(ae, Rejection):
            self._is_said = True
            self._listener.metrics.rejected(
                ae.reason.partition(":")[0], ae.reason, calling_ae=request.calling_ae, address=self.address
            )
            self._log.warning("association_rejected", reason=ae.reason, result=ae[:3])
            self._send(self._upper.reject(ae))
            return
        self._ae = ae
        self._source = Source(Origin.C_STORE, request.calling_ae, request.called_ae, ae.default_character_set)
        answers, roles, self._agreed = negotiate(request, self._settings)
        reply = self._upper.accept(answers, roles=roles, extended=self._agreed)
        self._services = {
            context_id: service
            for context_id, answer in self._upper.contexts.items()
            if (service := service_of(answer.abstract_syntax, self._settings))
        }
        _set_timeout(self._socket, socket.SO_RCVTIMEO, self._settings.idle_seconds)
        self._log.debug("association_accepted", implementation=request.implementation, contexts=len(answers))
        self._send(reply)

    def _seat(self) -> Rejection | None:
        """Take a seat, or say why there is none."""
        if self._listener.draining:
            return Rejection(2, 3, 1, "temporary congestion: the gateway stops")
        if not self._listener.seats.take():
            return Rejection(2, 3, 2, "local limit exceeded: too many associations")
        self._seated = True
        self._listener.metrics.opened()
        return None

    def _begin(self, message: Message) -> None:
        """A command set has come: begin its operation, and answer it if no dataset follows."""
        context_id, command, has_dataset = message
        command_field = number(command, COMMAND_FIELD)
        if command_field == C_CANCEL_RQ:
            if self._finding is not None:
                self._finding.cancel(command)
            return
        if command_field & RESPONSE or len(command.get(MESSAGE_ID, b"")) != 2:
            self._how = f"command {command_field:04X} is no request"
            self._abort(SERVICE_USER)
            return
        # A new request before the last is answered: one after the other.  Nothing is listened to meanwhile,
        # because what came with this one is still to be acted on.
        self._finding = None
        while self._answers is not None:
            self._answer()
        if self._upper.is_closing:
            return
        self._context_id = context_id
        self._operation = self._operation_of(context_id, command_field, command)
        if not has_dataset:
            self._complete()

    def _operation_of(
        self, context_id: int, command_field: int, command: dict[int, bytes]
    ) -> "Store | Find | _Status":
        service, context = self._services[context_id], self._upper.contexts[context_id]
        if command_field != service.value:
            return _Status(command)
        if service is Service.STORAGE:
            return Store(
                self._listener.archive,
                context,
                command,
                self._source,
                authorised=self._ae.store,
                address=self.address,
                metrics=self._listener.metrics,
                log=self._log,
            )
        if service is Service.FIND:
            return Find(
                self._listener.archive,
                context,
                command,
                authorised=self._ae.find,
                options=options_of(self._agreed.get(context.abstract_syntax, b"")),
                answering=self._settings.answering,
                listen=self._listen,
                log=self._log,
            )
        self._counts.echoes += 1
        return _Status(command, SUCCESS)

    def _complete(self) -> None:
        """The operation has its dataset."""
        operation, self._operation = self._operation, _Status({})
        if isinstance(operation, Find):
            self._counts.queries += 1
            self._finding, self._answers = operation, operation.responses()
            return
        reply = operation.finish()
        if isinstance(operation, Store):
            if operation.status == SUCCESS:
                self._counts.stored += 1
                self._counts.size += operation.size
            else:
                self._counts.refused += 1
        self._send(self._upper.message(self._context_id, reply))

    def _answer(self) -> None:
        """Send the next responses of the query under way, some at once.

        Each send costs a system call, and a turn of the interpreter among the threads that receive.
        """
        until = time.monotonic() + _GATHERED_SECONDS
        while self._answers is not None and len(self._gathered) < _GATHERED_BYTES:
            answer = next(self._answers, None)
            if answer is None or self._upper.is_closing:
                self._answers = self._finding = None
                break
            self._gathered += self._upper.message(self._context_id, *answer)
            if time.monotonic() >= until:
                break
        if self._fault is not None:
            raise self._fault
        self._send_gathered()
        if self._is_overdue():
            self._heard.clear()
            self._time_out("open for too long")

    def _send_gathered(self) -> None:
        if self._gathered and not self._upper.is_closing:
            self._send(bytes(self._gathered))
        self._gathered.clear()

    # ── the end ──────────────────────────────────────────────────────────────────────────────────

    def _leave(self) -> None:
        """Give the seat back and say how it went, once."""
        if self._is_said:
            return
        self._is_said = True
        if not self._seated:
            self._log.info("connection_without_association", how=self._how, size=self._received)
            return
        released, counts = self._how == _RELEASED, self._counts
        self._listener.seats.release()
        self._listener.metrics.ended(released=released)
        write = self._log.info if released else self._log.warning
        write(
            "association_ended",
            how=self._how,
            stored=counts.stored,
            refused=counts.refused,
            size=counts.size,
            queries=counts.queries,
            echoes=counts.echoes,
            seconds=round(time.monotonic() - counts.began, 3),
            cut_short=self._upper.in_message,
        )

    def _await_close(self) -> None:
        """Sta13: let the peer close first, for bytes that come after our close would cost it our last PDU."""
        self._socket.shutdown(socket.SHUT_WR)
        seconds = min(self._settings.accept_seconds, _CLOSE_SECONDS)
        _set_timeout(self._socket, socket.SO_RCVTIMEO, seconds)
        deadline = time.monotonic() + seconds
        scrap = bytearray(1 << 16)
        while time.monotonic() < deadline and not self._ending.is_set() and self._socket.recv_into(scrap):
            pass


class _Status:
    """A request of which only the status is of interest: an echo, or what the context is not for."""

    def __init__(self, command: Mapping[int, bytes], status: int = _UNRECOGNIZED_OPERATION) -> None:
        self._command, self._status = dict(command), status

    def write(self, data: memoryview) -> None:
        """Drop the dataset."""

    def finish(self) -> bytes:
        """The response."""
        return response(self._command, self._status)
