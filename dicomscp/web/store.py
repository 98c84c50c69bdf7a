"""STOW-RS (PS3.18 section 10.5): instances come in over HTTP by the same door as from an association.

    POST {base}/studies            instances of any studies
    POST {base}/studies/{study}    instances of that study; others fail

    event loop: blocks of the body ─▶ worker thread: parts ─▶ archive.receive, write, admit ─▶ a sync a block

The event loop asks for bytes only when those before them have been taken, so a client is read as fast as its
instances can be kept, and holds a thread only while there is something to do.  Memory is a block, the head of
a part, and some hundred bytes an instance for the answer.  Metadata, with what is kept of each part of bulk
data, are held whole, to a bound, and parsed one instance at a time; the bulk data themselves wait in one file
without a name until the body has ended.  PNG and GIF, which no transfer syntax has, are decoded in a child
(`decoders`) as their instance is made.

What was admitted stays, whatever becomes of the rest.  A part that does not come to its end is kept nowhere:
a client that goes away and sends all again finds that what is held is the same.  No instance is named as
stored before it survives loss of power.

An instance fails by itself, as a C-STORE does, and the answer names each (PS3.18 annex I).  It has no place
for a sentence, so those go into Warning fields, as section 10.5.3.2 recommends.
"""

import asyncio
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

import orjson
import structlog
from anyio import CapacityLimiter, from_thread, to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomscp.archive.archive import Archive, Claim, Incoming, Source
from dicomscp.dicom.dataset import BulkData, Composed, Elsewhere, composed, json_objects, read_json
from dicomscp.dicom.elements import EXPLICIT_LITTLE
from dicomscp.dicom.identity import Identity, InstanceKey, is_filable, is_filable_syntax
from dicomscp.dicom.multipart import OCTET_STREAM, PartData, PartEnd, PartEvent, PartHead, PartReader, framed
from dicomscp.dicom.part10 import Origin, read_file_meta
from dicomscp.dicom.xmlmodel import Attributes, native_model, read_native_model
from dicomscp.errors import (
    BusyError,
    CrowdedError,
    DicomscpError,
    LimitError,
    MismatchError,
    RefusedError,
    TransferSyntaxError,
)
from dicomscp.study import layout
from dicomscp.telemetry.metrics import IntakeMetrics
from dicomscp.web.decoders import Decoders, Job, Made
from dicomscp.web.exchange import negotiate, service_url, uids_of, warning
from dicomscp.web.imaging import Picture
from dicomscp.web.media import DICOM, DICOM_JSON, DICOM_XML, JSON, ContentType, Offer, content_type
from dicomscp.web.problem import RETRY_SECONDS, Problem

log = structlog.get_logger()

OFFERS = (Offer(DICOM_JSON), Offer(JSON), Offer(DICOM_XML), Offer(DICOM_XML, multipart=True))
PAYLOADS = (DICOM, DICOM_JSON, DICOM_XML)

BLOCK_BYTES = 1 << 20
"""About what is handed to a thread at a time; what is admitted of it shares one sync."""

_META_WITHIN = 1 << 16  # what read_file_meta needs to see
_METADATA_BYTES = 32 << 20  # some tens of thousands of instances without bulk data
_BULK_BYTES = 256  # what a part of bulk data costs beside its header fields: as many as may be fit in
_DESCRIBED_AT_ONCE = 1  # metadata become objects of ten times their size
_MOST_IN_VAIN = 1000  # instances: others wait meanwhile, and whoever sends such things has the reason by then
_SENTENCES = 8  # different ones in Warning fields
_LOGGED = 100  # failures of a request that have a line each in the log
_CODINGS = ("identity", "gzip", "x-gzip")
_TAKEN_CODINGS = {"accept-encoding": "gzip, identity"}
_BOUNDARY = "dicomscp-store-instances-response"


# PS3.18 table I.2-2.  The first family that fits decides.  An instance of another study than the address has
# is A900: it is not what it was said to be.  B006 would tell of one that is stored.
_FAILURE_REASON = (
    (TransferSyntaxError, 0xC122),  # Referenced Transfer Syntax not supported
    (LimitError, 0xA700),  # Refused out of resources
    (CrowdedError, 0xA700),
    (MismatchError, 0xA900),  # Data Set does not match SOP Class
    (RefusedError, 0xC000),  # Cannot understand
    (BusyError, 0xA700),
    (DicomscpError, 0x0110),  # Processing failure
)
_UNFORESEEN = 0x0110
_UNFORESEEN_SENTENCE = "Unforeseen error in the gateway; its log says which."
_KINDS = {0xA900: "mismatch", 0xA700: "busy"}

_Returned = TypeVar("_Returned")


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """What the resources are told.

    *archive*: what receives, opened when it is first called; raises BusyError if it cannot be.
    *aside*: a folder on the archive's file system, for bulk data that wait for their instance.
    *max_requests*: bodies that are read at a time; *wait_seconds*: how long another one waits for its turn.
    *block_seconds*: within which a block, or what is left of the body, must have come.
    *calling_ae*: stands for the AE title that a sender over HTTP does not have.
    """

    archive: Callable[[], Archive]
    aside: Path
    metrics: IntakeMetrics
    max_requests: int = 8
    wait_seconds: float = 10.0
    block_seconds: float = 60.0
    max_body_bytes: int = 64 << 30
    max_part_bytes: int = 16 << 30
    max_parts: int = 100_000
    calling_ae: str = ""


class Store:
    """The resources by which instances are stored."""

    def __init__(self, settings: StoreSettings, decoders: Decoders, *, base_url: str) -> None:
        """*base_url* begins every link; *decoders* are for images that are not stored as they come."""
        self._settings, self._decoders, self._base_url = settings, decoders, base_url.rstrip("/")
        self._turns = asyncio.Semaphore(settings.max_requests)
        self._threads: CapacityLimiter | None = None
        self._describing = threading.Semaphore(_DESCRIBED_AT_ONCE)

    def routes(self) -> list[Route]:
        """Both resources, under the path of the base URL."""
        base = urlsplit(self._base_url).path
        return [Route(base + path, self.store, methods=["POST"]) for path in ("/studies", "/studies/{study}")]

    async def store(self, request: Request) -> Response:
        """Take the instances of the body, and answer what became of each."""
        offer = negotiate(request, OFFERS, default=True)
        study_uid = uids_of(request).get("study", "")
        payload, parts = self._payload(request)
        async with self._turn():
            archive = await self._blocking(self._settings.archive)
            await self._blocking(archive.check_space)
            door = _Door(archive, self._settings, study_uid)
            kept: _Instances | _Described = (
                _Instances(door)
                if payload == DICOM
                else _Described(
                    door,
                    payload,
                    str(request.url),
                    folder=self._settings.aside,
                    max_instances=self._settings.max_parts,
                    describing=self._describing,
                    decode=self._decoded,
                )
            )
            reception = Reception(parts, kept, door, self._settings)
            try:
                async for block in self._blocks(request):
                    if not await self._blocking(reception.feed, block):
                        break
                outcome = await self._blocking(reception.finish)
            except BaseException:
                # In a thread: one that still works for a cancelled request has the reception, and may wait
                # for this loop, where decoders are asked.
                await self._blocking(reception.close)
                raise
            return await self._blocking(self._answer, request, offer, outcome)

    def _payload(self, request: Request) -> "tuple[str, PartReader | WholeBody | Inflated]":
        """What the body has in it, and what reads its parts.  Raises Problem 400, 413 or 415."""
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in _CODINGS:
            raise Problem(415, "The only content coding of a body that is taken is gzip.", _TAKEN_CODINGS)
        field_said = request.headers.get("content-type", "")
        said = content_type(field_said)
        payload = _payload_of(said) if said else ""
        if said is None or payload not in PAYLOADS:
            sentence = (
                f"Content-Type is multipart/related with one of these as its type: {', '.join(PAYLOADS)}."
            )
            raise Problem(415, sentence, {"accept-post": "multipart/related"})
        if int(request.headers.get("content-length", "0")) > self._settings.max_body_bytes:
            raise Problem(413, _body_limit(self._settings))
        parts: PartReader | WholeBody = WholeBody(field_said)
        if said.media_type == "multipart/related":
            try:
                parts = PartReader(said.parameters.get("boundary", ""))
            except RefusedError as error:
                raise Problem(400, str(error)) from error
        return payload, parts if coding == "identity" else Inflated(parts, self._settings)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._settings.wait_seconds):
                await self._turns.acquire()
        except TimeoutError:
            sentence = "As many requests as may be are being stored. Send this one again shortly."
            raise Problem(503, sentence, {"retry-after": str(RETRY_SECONDS)}) from None
        try:
            yield
        finally:
            self._turns.release()

    async def _blocks(self, request: Request) -> AsyncIterator[bytes]:
        """The body.  Raises Problem 408 if it comes too slowly, 400, for nobody, if its end never will."""
        more = True
        while more:
            block = bytearray()
            try:
                async with asyncio.timeout(self._settings.block_seconds):
                    while more and len(block) < BLOCK_BYTES:
                        message = await request.receive()
                        if message["type"] == "http.disconnect":
                            log.warning("store_cut_short")
                            raise Problem(400, "The connection ended before the body did.")
                        block += message.get("body", b"")
                        more = message.get("more_body", False)
            except TimeoutError:
                log.warning("store_too_slow", block_seconds=self._settings.block_seconds)
                raise Problem(408, "The body came too slowly; send it again. What is held stays.") from None
            yield bytes(block)

    async def _blocking(self, call: Callable[..., _Returned], *arguments: Any) -> _Returned:
        """What *call* returns in a worker thread: none of those that answer questions."""
        if self._threads is None:  # it belongs to a running loop
            self._threads = CapacityLimiter(self._settings.max_requests)
        return await to_thread.run_sync(call, *arguments, limiter=self._threads)

    def _decoded(self, open_file: Callable[[], tuple[BinaryIO, Job]]) -> Made:
        """What a decoder makes; called in a worker thread, which waits for its turn and for the result."""
        return from_thread.run(partial(self._decoders.run, open_file, patient=True))

    def _answer(self, request: Request, offer: Offer, outcome: "Outcome") -> Response:
        if outcome.malformed and not outcome.stored:
            raise Problem(413 if outcome.too_large else 400, outcome.malformed)
        if not (outcome.stored or outcome.failed):
            raise Problem(400, "There is no instance in the body.")
        body = encoded(response_module(outcome, self._base_url), offer)
        headers = {
            "content-type": offer.content_type(_BOUNDARY),
            "cache-control": "no-store",
            "vary": "Accept",
        }
        if outcome.status == 503:
            headers["retry-after"] = str(RETRY_SECONDS)
        studies = {key.study_uid for _, key in outcome.stored}
        if len(studies) == 1:
            headers["location"] = layout.study_url(service_url(request, self._base_url), *studies)
        response = Response(body, outcome.status, headers)
        for sentence in outcome.sentences:
            response.headers.append("warning", warning(request, self._base_url, sentence))
        return response


def _payload_of(said: ContentType) -> str:
    """The media type of what is stored; multipart of no type has Part 10 files, as some clients send them."""
    if said.media_type != "multipart/related":
        return said.media_type
    return said.parameters.get("type", DICOM).partition(";")[0].strip().lower()


def _body_limit(settings: StoreSettings) -> str:
    return f"The body has more than {settings.max_body_bytes} bytes (web.store.max_body). Send it in several."


class WholeBody:
    """A body that is one part, told as a multipart body is."""

    def __init__(self, content_type: str) -> None:
        self._head = PartHead({"content-type": content_type})
        self._begun = False

    def feed(self, block: bytes) -> Iterator[PartEvent]:
        """What the next bytes tell."""
        if block and not self._begun:
            self._begun = True
            yield self._head
        if block:
            yield PartData(memoryview(block))

    def close(self) -> Iterator[PartEvent]:
        """What the end of the body tells: the part is whole, if there was a byte."""
        return iter((PartEnd(),) if self._begun else ())


class Inflated:
    """A body with the content coding gzip (RFC 9110 8.4.1.3), told as what is in it is."""

    def __init__(self, parts: PartReader | WholeBody, settings: StoreSettings) -> None:
        self._parts, self._settings = parts, settings
        self._inflator = zlib.decompressobj(wbits=31)
        self._size = 0

    def feed(self, block: bytes) -> Iterator[PartEvent]:
        """What the next bytes tell.  Raises RefusedError where they are no gzip, or no multipart body."""
        is_full = True
        while block or is_full:  # what a block inflates to may be many
            try:
                data = self._inflator.decompress(block, BLOCK_BYTES)
            except zlib.error as error:
                raise RefusedError("The body is not gzip, as Content-Encoding says it is.") from error
            if self._inflator.unused_data:
                raise RefusedError("The body goes on behind the end of what is gzip in it.")
            block, is_full = self._inflator.unconsumed_tail, len(data) == BLOCK_BYTES
            self._size += len(data)
            if self._size > self._settings.max_body_bytes:
                raise LimitError(_body_limit(self._settings))
            yield from self._parts.feed(data)

    def close(self) -> Iterator[PartEvent]:
        """What the end of the body tells.  Raises RefusedError if the end of the gzip file is missing."""
        if not self._inflator.eof:
            raise RefusedError("The body ends too early: it is cut short.")
        return self._parts.close()


# What becomes of the instances


class Failure(NamedTuple):
    """An instance that was not stored, and why; without UIDs where they are not known."""

    reason: int  # table I.2-2
    sop_class_uid: str = ""
    sop_uid: str = ""


@dataclass(slots=True)
class Outcome:
    """What became of the instances of one request."""

    stored: list[tuple[str, InstanceKey]] = field(default_factory=list)  # with SOP classes
    failed: list[Failure] = field(default_factory=list)
    sentences: dict[str, None] = field(default_factory=dict)  # why, for people: the first few
    malformed: str = ""  # why the body could not be read to its end
    busy: int = 0  # failed, and may be taken another time
    too_large: int = 0

    @property
    def status(self) -> int:
        """That of table 10.5.3-1; where all failed for a reason that RFC 9110 has a status for, that."""
        if self.stored:
            return 202 if self.failed else 200
        if self.busy == len(self.failed):
            return 503
        return 413 if self.too_large == len(self.failed) else 409

    def fail(self, error: Exception, sop_class_uid: str = "", sop_uid: str = "") -> Failure:
        """Note that an instance was not stored because of *error*."""
        known = isinstance(error, DicomscpError)
        reason = next(
            (reason for family, reason in _FAILURE_REASON if isinstance(error, family)), _UNFORESEEN
        )
        named = is_filable(sop_class_uid) and is_filable(sop_uid)
        failure = Failure(reason, sop_class_uid, sop_uid) if named else Failure(reason)
        self.failed.append(failure)
        self.busy += isinstance(error, BusyError)
        self.too_large += isinstance(error, LimitError)
        if len(self.sentences) < _SENTENCES:
            self.sentences[f"{reason:04X} {error if known else _UNFORESEEN_SENTENCE}"] = None
        return failure


def response_module(outcome: Outcome, base_url: str) -> dict[str, Any]:
    """The Store Instances Response Module (PS3.18 table I.1-1) as a DICOM JSON object."""
    studies = {key.study_uid for _, key in outcome.stored}
    module = {
        "00081190": _value("UR", layout.study_url(base_url, *studies)) if len(studies) == 1 else {"vr": "UR"}
    }
    named = [one for one in outcome.failed if one.sop_uid]
    others = [one for one in outcome.failed if not one.sop_uid]
    if named:
        items = [
            _reference(one.sop_class_uid, one.sop_uid) | {"00081197": _value("US", one.reason)}
            for one in named
        ]
        module["00081198"] = {"vr": "SQ", "Value": items}
    if outcome.stored:
        items = [
            _reference(sop_class_uid, key.sop_uid)
            | {"00081190": _value("UR", layout.instance_url(base_url, key))}
            for sop_class_uid, key in outcome.stored
        ]
        module["00081199"] = {"vr": "SQ", "Value": items}
    if others:
        module["0008119A"] = {"vr": "SQ", "Value": [{"00081197": _value("US", one.reason)} for one in others]}
    return module


def _reference(sop_class_uid: str, sop_uid: str) -> dict[str, Any]:
    return {"00081150": _value("UI", sop_class_uid), "00081155": _value("UI", sop_uid)}


def _value(vr: str, value: str | int) -> dict[str, Any]:
    return {"vr": vr, "Value": [value]}


def encoded(module: dict[str, Any], offer: Offer) -> bytes:
    """*module* as it is offered."""
    if offer.media_type != DICOM_XML:
        return orjson.dumps(module)
    document = native_model(module).document
    return b"".join(framed(_BOUNDARY, DICOM_XML, [[document]])) if offer.multipart else document


# What comes in


class _Admitted(NamedTuple):
    identity: Identity
    size: int
    began: float


class _Door:
    """The archive's door for one request: what goes through it, and what became of that."""

    def __init__(self, archive: Archive, settings: StoreSettings, study_uid: str) -> None:
        """Instances of another study than *study_uid* fail, unless it is empty."""
        self.outcome = Outcome()
        self._archive, self._settings, self._study_uid = archive, settings, study_uid
        self._source = Source(Origin.STOW_RS, settings.calling_ae, "")
        self._admitted: list[_Admitted] = []
        self._unlogged = 0
        self.unsynced_bytes = 0

    def check_space(self) -> None:
        """Raise BusyError while the disk is below its reserve."""
        self._archive.check_space()

    def receive(
        self, sop_class_uid: str, sop_uid: str, transfer_syntax_uid: str, default_charset: str = ""
    ) -> Incoming:
        """Begin to receive an instance.  Raises as `archive.receive`, and TransferSyntaxError."""
        if not is_filable_syntax(transfer_syntax_uid):
            raise TransferSyntaxError(
                f"No instance is held in the transfer syntax {transfer_syntax_uid[:64]!r}."
            )
        claim = Claim(sop_class_uid, sop_uid, transfer_syntax_uid, self._study_uid)
        return self._archive.receive(claim, self._source._replace(default_charset=default_charset))

    def admit(self, incoming: Incoming, size: int) -> None:
        """Take an instance of *size* bytes; `settle` says if it is stored.  Raises as `archive.admit`."""
        began = time.perf_counter()
        self._admitted.append(_Admitted(self._archive.admit(incoming, sync=False), size, began))
        self.unsynced_bytes += size

    def fail(self, error: Exception, sop_class_uid: str = "", sop_uid: str = "") -> None:
        """Note that an instance was not stored because of *error*; the first of a request are logged."""
        reason = str(error) if isinstance(error, DicomscpError) else _UNFORESEEN_SENTENCE
        failure = self.outcome.fail(error, sop_class_uid, sop_uid)
        kind = _KINDS.get(failure.reason, "refused")
        self._settings.metrics.refused(kind, reason, calling_ae=self._settings.calling_ae)
        if len(self.outcome.failed) > _LOGGED:
            self._unlogged += 1
            return
        if not isinstance(error, DicomscpError):
            log.error("instance_failed", sop_uid=sop_uid, exc_info=error)
        status = f"{failure.reason:04X}"
        log.warning("instance_refused", sop_uid=failure.sop_uid, status=status, reason=reason)

    def close(self) -> None:
        """Log how many failures had no line of their own."""
        if self._unlogged:
            log.warning("instances_refused", more=self._unlogged)
            self._unlogged = 0

    def settle(self) -> None:
        """Make durable what this thread has admitted: then it is stored."""
        admitted, self._admitted, self.unsynced_bytes = self._admitted, [], 0
        if not admitted:
            return
        try:
            self._archive.sync()
        except BusyError as error:
            for one in admitted:
                self.fail(error, one.identity.sop_class_uid, one.identity.key.sop_uid)
            return
        now = time.perf_counter()
        for identity, size, began in admitted:
            self.outcome.stored.append((identity.sop_class_uid, identity.key))
            self._settings.metrics.received(self._settings.calling_ae, size, now - began)
            log.debug("instance_stored", sop_uid=identity.key.sop_uid, size=size)


class _Part(Protocol):
    """One part on its way in."""

    def write(self, data: memoryview) -> None:
        """Take its next bytes."""

    def end(self) -> None:
        """It is whole."""

    def discard(self) -> None:
        """Keep nothing of it."""

    def fail(self, error: Exception) -> None:
        """It is not taken because of *error*: keep nothing of it, and note that."""


class Reception:
    """The body of one request, in blocks, on its way into the archive; one thread at a time."""

    def __init__(
        self,
        parts: "PartReader | WholeBody | Inflated",
        kept: "_Instances | _Described",
        door: _Door,
        settings: StoreSettings,
    ) -> None:
        self._parts, self._kept, self._door, self._settings = parts, kept, door, settings
        self._lock = threading.Lock()  # a request that is cancelled is closed while its thread still runs
        self._part: _Part | None = None
        self._size = self._part_size = self._count = 0

    def feed(self, block: bytes) -> bool:
        """Take the next bytes of the body; False if no more are wanted.

        Of the instances that end in them each is held, and survives loss of power, or has failed.
        """
        return self._take(self._parts.feed, block)

    def finish(self) -> Outcome:
        """The body has ended, and the reception with it: what became of all that was in it."""
        if not self._door.outcome.malformed and self._take(self._parts.close):
            with self._lock:
                try:
                    self._kept.finish()
                finally:
                    self._door.settle()
        self.close()
        return self._door.outcome

    def close(self) -> None:
        """Keep nothing of what was begun; harmless after all else.

        Waits for a thread that is busy with the reception, so an event loop does not call it.
        """
        with self._lock:
            self._drop()
            self._kept.close()
            self._door.close()

    def _take(self, tell: Callable[..., Iterator[PartEvent]], *blocks: bytes) -> bool:
        outcome = self._door.outcome
        with self._lock:
            try:
                self._size += sum(map(len, blocks))
                if self._size > self._settings.max_body_bytes:
                    raise LimitError(_body_limit(self._settings))
                for event in tell(*blocks):
                    self._on(event)
            except RefusedError as error:
                self._drop()
                outcome.malformed = str(error)
                self._door.fail(error)
            finally:
                self._door.settle()
        return not outcome.malformed

    def _on(self, event: PartEvent) -> None:
        if isinstance(event, PartHead):
            self._count += 1
            if self._count > self._settings.max_parts:
                raise LimitError(
                    f"The body has more than {self._settings.max_parts} parts (web.store.max_parts)."
                )
            self._part, self._part_size = self._kept.part(event.fields), 0
        elif self._part is not None:  # else it has failed already, and its rest is passed over
            try:
                self._of_part(self._part, event)
            except Exception as error:  # noqa: BLE001 - one instance is one unit of work, as one C-STORE is
                self._part.fail(error)
                self._part = None

    def _of_part(self, part: _Part, event: PartData | PartEnd) -> None:
        if isinstance(event, PartEnd):
            part.end()
            self._part = None
            return
        part.write(event.data)  # first, so that what is too large is known by its UIDs
        self._part_size += len(event.data)
        if self._part_size > self._settings.max_part_bytes:
            limit = self._settings.max_part_bytes
            raise LimitError(f"A part has more than {limit} bytes (web.store.max_part).")

    def _drop(self) -> None:
        if self._part is not None:
            self._part.discard()
            self._part = None


# Part 10 files


class _Instances:
    """Parts that are Part 10 files: each goes to the archive as it comes."""

    def __init__(self, door: _Door) -> None:
        self._door = door

    def part(self, fields: dict[str, str]) -> _Part:
        """What takes the part that begins with *fields*."""
        return _Instance(self._door, fields.get("content-type", DICOM))

    def finish(self) -> None:
        """The body has ended."""

    def close(self) -> None:
        """Give back what was needed."""


class _Instance:
    """One Part 10 file: its dataset is received byte for byte, its meta information made anew."""

    def __init__(self, door: _Door, said: str) -> None:
        self._door, self._said = door, content_type(said)
        self._head, self._size = bytearray(), 0
        self._uids = ("", "")
        self._incoming: Incoming | None = None

    def write(self, data: memoryview) -> None:
        if self._incoming is not None:
            self._incoming.write(data)
            self._size += len(data)
            return
        self._head += data
        if len(self._head) >= _META_WITHIN:
            self._begin()

    def end(self) -> None:
        if self._incoming is None:
            self._begin()
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            self._door.admit(incoming, self._size)

    def discard(self) -> None:
        self._head = bytearray()
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None

    def fail(self, error: Exception) -> None:
        self.discard()
        self._door.fail(error, *self._uids)

    def _begin(self) -> None:
        if self._said is None or self._said.media_type not in (DICOM, "application/octet-stream"):
            raise RefusedError("A part is no application/dicom, which the body is said to have.")
        head, self._head = bytes(self._head), bytearray()
        meta = read_file_meta(head)
        self._uids = meta.sop_class_uid, meta.sop_uid
        charset = meta.receipt.default_charset if meta.receipt else ""  # of a file that was ours
        self._incoming = self._door.receive(*self._uids, meta.transfer_syntax_uid, charset)
        dataset = memoryview(head)[meta.dataset_offset :]
        self._incoming.write(dataset)
        self._size = len(dataset)


# Metadata and bulk data


class _Described:
    """Parts that are metadata, and bulk data that these name: made into instances when all have come."""

    def __init__(
        self,
        door: _Door,
        payload: str,
        address: str,
        *,
        folder: Path,
        max_instances: int,
        describing: threading.Semaphore,
        decode: Callable[[Callable[[], tuple[BinaryIO, Job]]], Made],
    ) -> None:
        """*payload* is the media type of the metadata.

        *address* is what relative URIs are relative to (RFC 2557 section 5).  *decode* does the job that what
        it is given opens a file for.
        """
        self.door, self._payload, self._address, self._describing = door, payload, address, describing
        self._decode, self._max_instances = decode, max_instances
        self.aside = _Aside(folder, door.check_space)
        self.texts: deque[bytearray] = deque()
        self._kept_bytes = 0
        self.bulk: dict[str, list[BulkData]] = {}
        self.lost: dict[str, Exception] = {}
        self._unused: set[str] = set()

    def part(self, fields: dict[str, str]) -> _Part:
        """What takes the part that begins with *fields*."""
        said = content_type(fields.get("content-type", self._payload))
        if said is None:
            raise RefusedError("A part has a Content-Type that cannot be read.")
        if said.media_type == self._payload:
            return _Text(self)
        self.keep(_BULK_BYTES + sum(map(len, fields.values())))
        return _Bulk(self, self._absolute(fields.get("content-location", "")), said)

    def keep(self, size: int) -> None:
        """Count *size* bytes that are held until the body has ended.  Raises LimitError for too many."""
        self._kept_bytes += size
        if self._kept_bytes > _METADATA_BYTES:
            raise LimitError(
                f"The metadata of a request have more than {_METADATA_BYTES} bytes. Send several."
            )

    def finish(self) -> None:
        """Make the instances, and pass each to the archive."""
        self._unused = {*self.bulk, *self.lost}
        with self._describing:
            in_vain = 0
            for text in self._instances():
                in_vain = 0 if self._store(text) else in_vain + 1
                if in_vain == _MOST_IN_VAIN:
                    sentence = f"{in_vain} instances in a row cannot be stored; the rest was not looked at."
                    self.door.fail(LimitError(sentence))
                    break
                if self.door.unsynced_bytes >= BLOCK_BYTES:
                    self.door.settle()
        for uri in self._unused:
            self.door.fail(
                self.lost.get(uri) or RefusedError(f"No metadata name the bulk data {uri[-64:]!r}.")
            )

    def close(self) -> None:
        """Give back what was needed."""
        self.aside.close()

    def _instances(self) -> Iterator[bytes]:
        """The metadata of each instance, not parsed yet."""
        count = 0
        while self.texts:
            try:
                for one in self._split(bytes(self.texts.popleft())):
                    count += 1
                    if count > self._max_instances:
                        limit = f"{self._max_instances} instances (web.store.max_parts)"
                        raise LimitError(f"The metadata tell of more than {limit}.")
                    yield one
            except RefusedError as error:
                self.door.fail(error)

    def _split(self, text: bytes) -> Iterable[bytes]:
        return json_objects(text) if self._payload == DICOM_JSON else (text,)

    def _store(self, text: bytes) -> bool:
        """Whether the instance that *text* tells of went in."""
        uids = ("", "")
        try:
            attributes = read_json(text) if self._payload == DICOM_JSON else read_native_model(text)
            uids = _uids_of(attributes)
            self._pass_on(composed(attributes, self._find, self.aside.read, self._decoded))
        except Exception as error:  # noqa: BLE001 - one instance is one unit of work, as one C-STORE is
            self.door.fail(error, *uids)
            return False
        return True

    def _absolute(self, uri: str) -> str:
        try:
            return urljoin(self._address, uri)
        except ValueError as error:
            raise RefusedError("A URI of bulk data is none.") from error

    def _find(self, uri: str) -> list[BulkData]:
        absolute = self._absolute(uri)
        self._unused.discard(absolute)
        if absolute in self.lost:
            raise self.lost[absolute]
        return self.bulk.get(absolute, [])

    def _decoded(self, part: BulkData) -> BulkData:
        """The samples of an image, put aside too."""
        made = self._decode(partial(self.aside.image, part))
        start = self.aside.size
        for piece in made.chunks(BLOCK_BYTES):
            self.aside.write(memoryview(piece))
        return BulkData(OCTET_STREAM, EXPLICIT_LITTLE, Elsewhere(start, made.size), made.image)

    def _pass_on(self, made: Composed) -> None:
        incoming = self.door.receive(made.sop_class_uid, made.sop_uid, made.transfer_syntax_uid)
        size = 0
        try:
            for piece in made.pieces:
                for data in self.aside.blocks(piece) if isinstance(piece, Elsewhere) else (piece,):
                    incoming.write(data)
                    size += len(data)
        except BaseException:
            incoming.discard()
            raise
        self.door.admit(incoming, size)


def _uids_of(attributes: Attributes) -> tuple[str, str]:
    """SOP Class and Instance UID, where they are told as they should be."""
    found = []
    for tag in ("00080016", "00080018"):
        attribute = attributes.get(tag)
        values = attribute.get("Value") if isinstance(attribute, dict) else None
        uid = values[0] if isinstance(values, list) and values else ""
        found.append(uid.strip() if isinstance(uid, str) else "")
    return found[0], found[1]


class _Text:
    """One part that is metadata, held in memory."""

    def __init__(self, described: "_Described") -> None:
        self._described, self._text = described, bytearray()

    def write(self, data: memoryview) -> None:
        self._described.keep(len(data))
        self._text += data

    def end(self) -> None:
        self._described.texts.append(self._text)

    def discard(self) -> None:
        self._text = bytearray()

    def fail(self, error: Exception) -> None:
        self.discard()
        self._described.door.fail(error)


class _Bulk:
    """One part that is bulk data, put aside until its instance is made."""

    def __init__(self, described: "_Described", uri: str, said: ContentType) -> None:
        self._described, self._uri, self._said = described, uri, said
        self._start = described.aside.size

    def write(self, data: memoryview) -> None:
        self._described.aside.write(data)

    def end(self) -> None:
        where = Elsewhere(self._start, self._described.aside.size - self._start)
        syntax = self._said.parameters.get("transfer-syntax", "")
        part = BulkData(self._said.media_type, syntax, where)
        self._described.bulk.setdefault(self._uri, []).append(part)

    def discard(self) -> None:
        self._described.aside.size = self._start

    def fail(self, error: Exception) -> None:
        self.discard()
        self._described.lost[self._uri] = error  # the instance that it belongs to fails of it


class _Aside:
    """A file without a name: it is gone with whoever has it open."""

    def __init__(self, folder: Path, check_space: Callable[[], None]) -> None:
        """*check_space* raises BusyError if the disk is too full."""
        self._folder, self._check_space = folder, check_space
        self._descriptor = -1
        self.size = 0

    def write(self, data: memoryview) -> None:
        """Put *data* behind what is there.  Raises BusyError if the disk does not take it."""
        self._check_space()
        try:
            if self._descriptor < 0:
                with TemporaryFile(dir=self._folder) as file:
                    self._descriptor = os.dup(file.fileno())
            while data:
                written = os.pwrite(self._descriptor, data, self.size)
                self.size, data = self.size + written, data[written:]
        except OSError as error:
            raise BusyError(f"Bulk data cannot be put aside: {error.strerror}") from error

    def read(self, where: Elsewhere) -> bytes:
        """The bytes there.  Raises BusyError if the disk does not give them."""
        data = b""
        try:
            while len(data) < where.size:
                piece = os.pread(self._descriptor, where.size - len(data), where.start + len(data))
                if not piece:
                    raise BusyError("Bulk data that were put aside are gone")
                data += piece
        except OSError as error:
            raise BusyError(f"Bulk data cannot be read back: {error.strerror}") from error
        return data

    def image(self, part: BulkData) -> tuple[BinaryIO, Job]:
        """The file, for reading alone, and the job to decode the image that *part* is."""
        job = Job("samples", part.where.start, size=part.where.size, picture=Picture(part.media_type))
        return Path(f"/proc/self/fd/{self._descriptor}").open("rb"), job

    def blocks(self, where: Elsewhere) -> Iterator[bytes]:
        """The bytes there, in blocks."""
        for start in range(where.start, where.start + where.size, BLOCK_BYTES):
            yield self.read(Elsewhere(start, min(BLOCK_BYTES, where.start + where.size - start)))

    def close(self) -> None:
        """Give the file back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
