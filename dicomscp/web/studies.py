"""Studies over HTTP (PS3.18): WADO-RS metadata, instances, frames and bulk data.

An edge: a resource reads the address and headers, asks the archive or the published tree in a
worker thread (both block), and writes the answer.  Nothing is transcoded: a representation that
names another transfer syntax than the stored one is not there (406).

Memory does not grow with what is asked for: a body of up to `WHOLE_BYTES` is sent at once, a larger one in
chunks read as the client takes them.  Its length is told in advance, so that a body that had to end early is
an error for the client and never a shorter answer; that of metadata in XML is not known, and the connection
breaks.  Bodies are copied to `bytes`: what lies mapped must not be looked at after its file was closed.

Validators: a held instance never changes, so its digest, with all else that the representation
depends on, is a strong ETag; a document has its own digest.  `no-cache` lets a client keep what it
has, and ask each time whether it still stands.
"""

import asyncio
import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dicomscp import __version__
from dicomscp.archive.archive import Archive, OpenInstance
from dicomscp.archive.index import Held
from dicomscp.dicom.bulk import (
    BulkValue,
    Encoded,
    Frame,
    FrameTable,
    Piece,
    bulk_value,
    frame_table,
    read_frame,
)
from dicomscp.dicom.elements import EXPLICIT_LITTLE, inflate, is_deflated
from dicomscp.dicom.identity import Buffer, InstanceKey
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.multipart import framed, part_head, part_type, tail
from dicomscp.dicom.xmlmodel import native_model
from dicomscp.errors import DamagedError, RefusedError
from dicomscp.study import layout
from dicomscp.web.documents import CHUNK_BYTES, Document, Documents
from dicomscp.web.exchange import WHOLE_BYTES, accepted, chunked, is_known, negotiate, uids_of
from dicomscp.web.media import (
    DICOM,
    DICOM_JSON,
    DICOM_XML,
    JSON,
    Offer,
    bulk_offers,
    byte_range,
    frame_offers,
    takes_gzip,
)
from dicomscp.web.problem import RETRY_SECONDS, Problem

_LOOK_SECONDS = 0.05
_MAX_FRAMES = 10_000  # numbers in one request
_STUDY = "/studies/{study}"
_SERIES = _STUDY + "/series/{series}"
_INSTANCE = _SERIES + "/instances/{instance}"
_VIEWER = (Offer(JSON),)
_PDF = Offer("application/pdf")
_PDF_POLICY = "default-src 'none'; frame-ancestors 'self'"  # the viewer shows it in a frame
_METADATA = (Offer(DICOM_JSON), Offer(JSON), Offer(DICOM_XML, multipart=True))


class Studies:
    """The DICOMweb resources of one archive."""

    def __init__(
        self,
        archive: Archive,
        documents: Documents,
        *,
        base_url: str,
        wait_seconds: float,
        new_compiler: Callable[[], Compiler],
        request_publish: Callable[[str], None] | None,
    ) -> None:
        """*base_url* begins every link.

        *new_compiler* makes what compiles as documents are compiled, and remembers nothing.

        For a study that is held but not published yet, *request_publish* is told its UID, and its
        documents are waited for at most *wait_seconds*.
        """
        self._archive = archive
        self._documents = documents
        self._base_url = base_url.rstrip("/")
        self._wait_seconds = wait_seconds
        self._new_compiler = new_compiler
        self._request_publish = request_publish
        self._inflations = Inflations()
        self._tables = FrameTables()

    def routes(self) -> list[Route]:
        """All resources, under the path of the base URL."""
        base = urlsplit(self._base_url).path
        resources = {
            _STUDY: self.retrieve,
            _SERIES: self.retrieve,
            _INSTANCE: self.retrieve,
            f"{_STUDY}/metadata": self.metadata,
            f"{_STUDY}/ohif-dicom-json": self.viewer_document,
            f"{_SERIES}/metadata": self.metadata,
            f"{_INSTANCE}/metadata": self.instance_metadata,
            f"{_INSTANCE}/frames/{{frames}}": self.frames,
            f"{_STUDY}/bulkdata/{{series}}/{{instance}}/{{path:path}}": self.bulk_data,
        }
        routes = [Route(base + path, resource, methods=["GET"]) for path, resource in resources.items()]
        # Also where other servers have it, so that links to them hold.
        return [*routes, Route(f"{_STUDY}/ohif-dicom-json", self.viewer_document, methods=["GET"])]

    # Metadata, PS3.18 10.4.1.1.2

    async def metadata(self, request: Request) -> Response:
        """The published metadata of a study or series."""
        offer = negotiate(request, _METADATA, default=True)
        uids = uids_of(request)
        study_uid, series_uid = uids["study"], uids.get("series")
        if series_uid is None:
            relative = layout.study_metadata(study_uid)
        else:
            relative = layout.series_metadata(study_uid, series_uid)
        return await self._when_published(
            study_uid, series_uid, lambda: self._document(request, relative, offer)
        )

    async def _when_published(
        self, study_uid: str, series_uid: str | None, look: Callable[[], Response | None]
    ) -> Response:
        """What *look* finds, at once or within the wait for a study that was never published."""
        if answer := await to_thread.run_sync(look):
            return answer
        if not await to_thread.run_sync(self._archive.held, study_uid, series_uid):
            raise Problem(404, f"Nothing is held here of {_named(study_uid, series_uid)}.")
        if self._request_publish:
            await to_thread.run_sync(self._request_publish, study_uid)
        deadline = asyncio.get_running_loop().time() + self._wait_seconds
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
            if answer := await to_thread.run_sync(look):
                return answer
        sentence = f"Held, but not published yet: {_named(study_uid, series_uid)}. Ask again shortly."
        raise Problem(503, sentence, {"retry-after": str(RETRY_SECONDS)})

    def _document(self, request: Request, relative: str, offer: Offer) -> Response | None:
        document = self._documents.open(relative)
        if document is None:
            return None
        if offer.multipart:
            return _xml_document(request, document, offer)
        gzip = takes_gzip(request.headers.get("accept-encoding", ""))
        digest, inflated_size = document.fingerprint
        headers = {
            "content-type": offer.media_type,
            "etag": f'"{digest}-gzip"' if gzip else f'"{digest}"',
            "cache-control": "no-cache",
            "vary": "Accept, Accept-Encoding",
        }
        if gzip:
            headers["content-encoding"] = "gzip"
        with ExitStack() as unless_streamed:
            unless_streamed.callback(document.close)
            if is_known(request, headers["etag"]):
                return Response(status_code=304, headers=headers)
            size = document.size if gzip else inflated_size
            answer = _answer(request, headers, size, _closed_after(document, gzip=gzip))
            if isinstance(answer, StreamingResponse):
                unless_streamed.pop_all()
            return answer

    async def viewer_document(self, request: Request) -> Response:
        """The published document that the viewer opens a study with."""
        offer = negotiate(request, _VIEWER, default=True)
        study_uid = uids_of(request)["study"]
        relative = layout.study_viewer(study_uid)
        return await self._when_published(study_uid, None, lambda: self._document(request, relative, offer))

    async def instance_metadata(self, request: Request) -> Response:
        """The metadata of one instance, read from its file as the compiler reads it."""
        offer = negotiate(request, _METADATA, default=True)
        held = await to_thread.run_sync(self._held, _key(request))
        body = await to_thread.run_sync(self._instance_json, held)
        digest = hashlib.sha256(offer.media_type.encode() + body).hexdigest()
        headers = _headers(offer, digest)
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        if offer.multipart:
            body = b"".join(framed(digest, DICOM_XML, ([model] for model in _native_models([body]))))
        return Response(body, headers=headers)

    def _instance_json(self, held: Held) -> bytes:
        with self._archive.open(held) as instance:
            try:
                header = self._new_compiler().header(
                    instance.dataset,
                    instance.transfer_syntax_uid,
                    total_bytes=len(instance.dataset),
                    bulk_uri=layout.bulk_uri(self._base_url, held.key),
                    default_charset=instance.default_charset,
                )
            except RefusedError as error:
                raise DamagedError(f"A held instance cannot be read: {error}") from error
        return b"[{" + header.body + b"}]"

    # Instances, PS3.18 10.4.1.1.1

    async def retrieve(self, request: Request) -> Response:
        """The instances of a study, of a series, or one instance, as Part 10 files."""
        uids = uids_of(request)
        return await to_thread.run_sync(self._files, request, uids)

    def _files(self, request: Request, uids: dict[str, str]) -> Response:
        held = self._archive.held(uids["study"], uids.get("series"), uids.get("instance"))
        if not held:
            raise Problem(404, f"Nothing is held here of {_named(*uids.values())}.")
        syntaxes = {one.transfer_syntax_uid for one in held}
        offers = [
            Offer(DICOM, multipart=True, transfer_syntax_uid=syntaxes.pop() if len(syntaxes) == 1 else "")
        ]
        if "instance" in uids:
            offers.append(offers[0]._replace(multipart=False))
        offer = negotiate(request, offers)
        boundary = _digest(request, held)
        headers = _headers(offer, boundary)
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        if not offer.multipart:
            name = f"{layout.component(uids['instance'])}.dcm"
            headers["content-disposition"] = f'attachment; filename="{name}"'
            return _answer(request, headers, held[0].size, self._file(held[0]))
        size = sum(one.size + len(_part_head(one, boundary)) + 2 for one in held) + len(tail(boundary))
        return _answer(request, headers, size, chunked(self._file_parts(held, boundary)))

    def _file_parts(self, held: Iterable[Held], boundary: str) -> Iterator[bytes]:
        for one in held:
            yield _part_head(one, boundary)
            yield from self._file(one)
            yield b"\r\n"
        yield tail(boundary)

    def _file(self, held: Held) -> Iterator[bytes]:
        with self._archive.open(held) as instance, instance.path.open("rb") as file:
            if instance.size != held.size:
                raise DamagedError(
                    "A held instance is not of the size it was filed with; run `dicomscp verify`."
                )
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    # Frames and bulk data, PS3.18 10.4.1.1.6 and .5

    async def frames(self, request: Request) -> Response:
        """Frames of one instance, in the order asked for, in the transfer syntax they are stored in."""
        key, numbers = _key(request), _frame_numbers(request.path_params["frames"])
        return await to_thread.run_sync(self._frames, request, key, numbers)

    def _frames(self, request: Request, key: InstanceKey, numbers: Sequence[int]) -> Response:
        held = self._held(key)
        boundary = _digest(request, [held])
        with self._archive.open(held) as instance:
            dataset, table = self._frames_of(held, instance)
            first = _frame(dataset, table, numbers[0])
            offer = negotiate(request, frame_offers(first.transfer_syntax_uid, len(numbers)))
            headers = _headers(offer, boundary)
            if is_known(request, headers["etag"]):
                return Response(status_code=304, headers=headers)
            rest = (_frame(dataset, table, number).data for number in numbers[1:])
            size, pieces = _measured(_body(offer, boundary, chain((first.data,), rest)))
            if pieces is not None:
                return _answer(request, headers, size, iter(pieces))
        return _answer(request, headers, size, self._frame_chunks(held, offer, boundary, numbers))

    def _frame_chunks(
        self, held: Held, offer: Offer, boundary: str, numbers: Iterable[int]
    ) -> Iterator[bytes]:
        with self._archive.open(held) as instance:
            dataset, table = self._frames_of(held, instance)
            parts = (_frame(dataset, table, number).data for number in numbers)
            yield from chunked(_body(offer, boundary, parts))

    def _frames_of(self, held: Held, instance: OpenInstance) -> tuple[Encoded, FrameTable]:
        encoded = self._inflations.of(held, instance)
        return encoded, self._tables.of(held, encoded)

    async def bulk_data(self, request: Request) -> Response:
        """One value of one instance, as BulkDataURI names it; a byte range of it if it is a single part."""
        return await to_thread.run_sync(self._bulk, request, _key(request), request.path_params["path"])

    def _bulk(self, request: Request, key: InstanceKey, path: str) -> Response:
        held = self._held(key)
        boundary = _digest(request, [held])
        with self._archive.open(held) as instance:
            value = _bulk_value(self._inflations.of(held, instance), path)
            offers = bulk_offers(value.transfer_syntax_uid, value.count, value.media_type)
            offer = negotiate(request, offers)
            headers = _headers(offer, boundary)
            if offer == _PDF:
                headers["content-security-policy"] = _PDF_POLICY
            if is_known(request, headers["etag"]):
                return Response(status_code=304, headers=headers)
            whole, pieces = _measured(_body(offer, boundary, _parts(value, offer, path)))
            part, status = _wanted_part(request, headers, whole, offer)
            size = part.stop - part.start
            if size <= WHOLE_BYTES:
                body = pieces or _body(offer, boundary, _parts(value, offer, path))
                return _answer(request, headers, size, _cut(body, part), status)
        chunks = self._bulk_chunks(held, path, offer, boundary, part)
        return _answer(request, headers, size, chunks, status)

    def _bulk_chunks(
        self, held: Held, path: str, offer: Offer, boundary: str, part: slice
    ) -> Iterator[bytes]:
        with self._archive.open(held) as instance:
            value = _bulk_value(self._inflations.of(held, instance), path)
            yield from chunked(_cut(_body(offer, boundary, _parts(value, offer, path)), part))

    def _held(self, key: InstanceKey) -> Held:
        held = self._archive.held(*key)
        if not held:
            raise Problem(404, f"Nothing is held here of {_named(*key)}.")
        return held[0]


class Inflations:
    """Deflated datasets, the last few of them inflated: viewers ask for their frames one by one."""

    def __init__(self, *, kept: int = 2) -> None:
        """Each takes at most `elements.MAX_INFLATED_BYTES`."""
        self._kept = kept
        self._inflated: OrderedDict[bytes, Encoded] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, held: Held, instance: OpenInstance) -> Encoded:
        """The dataset to read values and frames out of."""
        if not is_deflated(instance.transfer_syntax_uid):
            return Encoded(instance.dataset, instance.transfer_syntax_uid)
        with self._lock:  # also, two requests for one dataset inflate it once
            encoded = self._inflated.pop(held.digest, None) or _inflated(instance)
            self._inflated[held.digest] = encoded
            if len(self._inflated) > self._kept:
                self._inflated.popitem(last=False)
            return encoded


def _inflated(instance: OpenInstance) -> Encoded:
    try:
        dataset, whole = inflate(instance.dataset)
    except RefusedError as error:
        raise DamagedError(f"A held instance cannot be read: {error}") from error
    if not whole:
        raise Problem(404, "The deflated dataset is too large to be read in parts; retrieve the instance.")
    return Encoded(dataset, EXPLICIT_LITTLE)


class FrameTables:
    """Where the frames are of the instances last looked at: viewers ask for them one by one."""

    def __init__(self, *, kept: int = 256, kept_bytes: int = 64 << 20) -> None:
        """Tables of *kept* instances, what a few viewers have open, each of about 600 bytes.

        Those whose frames had to be scanned for take 8 bytes a frame more, all of them at most *kept_bytes*:
        eight million frames, where a large slide has some hundred thousand.
        """
        self._kept, self._kept_bytes = kept, kept_bytes
        self._tables: OrderedDict[tuple[bytes, str], _Tabled] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, held: Held, encoded: Encoded) -> FrameTable:
        """The table of the instance *held*, whose dataset is *encoded*."""
        key = (held.digest, encoded.transfer_syntax_uid)
        with self._lock:
            tabled = self._tables.pop(key, None) or _Tabled()
            self._tables[key] = tabled
        table = tabled.table_of(encoded)
        with self._lock:
            while len(self._tables) > self._kept or self._size() > self._kept_bytes:
                self._tables.popitem(last=False)
        return table

    def _size(self) -> int:
        return sum(tabled.size_bytes for tabled in self._tables.values())


class _Tabled:
    """A frame table, made by the first who asks; who asks meanwhile waits, and for this one alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table: FrameTable | None = None

    def table_of(self, encoded: Encoded) -> FrameTable:
        with self._lock:
            if self._table is None:
                self._table = frame_table(*encoded)
            return self._table

    @property
    def size_bytes(self) -> int:
        return self._table.size_bytes if self._table else 0


# What a request says


def _key(request: Request) -> InstanceKey:
    uids = uids_of(request)
    return InstanceKey(uids["study"], uids["series"], uids["instance"])


def _named(study_uid: str, series_uid: str | None = None, sop_uid: str | None = None) -> str:
    if sop_uid:
        return f"instance {sop_uid} of series {series_uid} of study {study_uid}"
    return f"series {series_uid} of study {study_uid}" if series_uid else f"study {study_uid}"


def _frame_numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text, re.ASCII) or text.count(",") >= _MAX_FRAMES:
        raise Problem(400, "Frames are numbers from 1, separated by commas.")
    return [int(number) for number in text.split(",")]


def _wanted_part(request: Request, headers: dict[str, str], size: int, offer: Offer) -> tuple[slice, int]:
    """Which of *size* bytes are wanted, and the status to give them; *headers* get what belongs to it."""
    if offer.multipart:
        return slice(0, size), 200
    headers["accept-ranges"] = "bytes"
    part = byte_range(request.headers.get("range", ""), size)
    if part is None or request.headers.get("if-range", headers["etag"]) != headers["etag"]:
        return slice(0, size), 200
    if part.start == part.stop:
        raise Problem(416, f"The value has {size} bytes.", {"content-range": f"bytes */{size}"})
    headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
    return part, 206


# What is answered


def _closed_after(document: Document, *, gzip: bool) -> Iterator[bytes]:
    """The bytes of *document*, which is closed when they are read or given up."""
    with closing(document):
        yield from document.compressed() if gzip else document.inflated()


def _xml_document(request: Request, document: Document, offer: Offer) -> Response:
    """The metadata that *document* holds, each instance as a Native DICOM Model; its length is not known."""
    name = f"{__version__}\n{document.fingerprint.digest}\n{DICOM_XML}"
    boundary = hashlib.sha256(name.encode()).hexdigest()
    headers = _headers(offer, boundary)
    if is_known(request, headers["etag"]):
        document.close()
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        document.close()
        return StreamingResponse(iter(()), headers=headers)
    models = ([model] for model in _native_models(_lines(_closed_after(document, gzip=False))))
    return StreamingResponse(chunked(framed(boundary, DICOM_XML, models)), headers=headers)


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that *pieces* make together."""
    begun: list[bytes] = []
    for piece in pieces:
        first, *lines = piece.split(b"\n")
        begun.append(first)
        for line in lines:
            yield b"".join(begun)
            begun = [line]
    yield b"".join(begun)


def _native_models(lines: Iterable[bytes]) -> Iterator[bytes]:
    """A document for each object in the *lines* of an array, its numbers with the digits they have there."""
    for line in lines:
        for found in json.loads(b"[%b]" % line.strip(b"[], "), parse_float=str, parse_int=str):
            yield native_model(found).document


def _digest(request: Request, held: Iterable[Held]) -> str:
    """A name for what is asked for of *held*: a strong validator, and a boundary that content cannot hold.

    Instances cannot contain a digest over their own digests.
    """
    digest = hashlib.sha256(f"{__version__}\n{request.scope['path']}\n{accepted(request)}\n".encode())
    for one in held:
        digest.update(one.digest)
    return digest.hexdigest()[:40]


def _headers(offer: Offer, digest: str) -> dict[str, str]:
    return {
        "content-type": offer.content_type(digest),
        "etag": f'"{digest}"',
        "cache-control": "no-cache",
        "vary": "Accept",
    }


def _answer(
    request: Request, headers: dict[str, str], size: int, pieces: Iterator[Buffer], status: int = 200
) -> Response:
    """A response with a body of *size* bytes; blocking.

    The first of many chunks is read here, so what is missing from the start has its own status.
    """
    headers = {**headers, "content-length": str(size)}
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    if size <= WHOLE_BYTES:
        return Response(b"".join(pieces), status, headers)
    chunks = (bytes(piece) for piece in pieces)
    return StreamingResponse(chain((next(chunks),), chunks), status, headers)


def _frame(encoded: Encoded, table: FrameTable, number: int) -> Frame:
    try:
        return read_frame(encoded.dataset, table, number)
    except RefusedError as error:
        raise Problem(404, f"Frame {number} cannot be had: {error}") from error


def _bulk_value(dataset: Encoded, path: str) -> BulkValue:
    try:
        return bulk_value(*dataset, path)
    except RefusedError as error:
        raise Problem(404, f"There is no value at {path}: {error}") from error


def _parts(value: BulkValue, offer: Offer, path: str) -> Iterator[list[Piece]]:
    """The parts of *value*; a document that is sent as what it is ends where it ends."""
    padding = value.padding if offer.media_type == value.media_type else 0
    try:
        for part in value.parts():
            yield [piece[: len(piece) - padding] for piece in part] if padding else part
    except RefusedError as error:
        raise Problem(404, f"The value at {path} is not whole: {error}") from error


def _part_head(held: Held, boundary: str) -> bytes:
    return part_head(boundary, part_type(DICOM, held.transfer_syntax_uid))


def _body(offer: Offer, boundary: str, parts: Iterable[Iterable[Buffer]]) -> Iterator[Buffer]:
    """The body that *parts* make; without multipart there is one of them."""
    if offer.multipart:
        return framed(boundary, offer.part_type(), parts)
    return chain.from_iterable(parts)


def _measured(pieces: Iterable[Buffer]) -> tuple[int, list[Buffer] | None]:
    """The length of all *pieces*, and the pieces unless they are more than is kept whole."""
    size = 0
    kept: list[Buffer] = []
    for piece in pieces:
        size += len(piece)
        if size <= WHOLE_BYTES:
            kept.append(piece)
    return size, kept if size <= WHOLE_BYTES else None


def _cut(pieces: Iterable[Buffer], part: slice) -> Iterator[Buffer]:
    """That part, whose start and stop are set, of all *pieces* together."""
    position = 0
    for piece in pieces:
        yield memoryview(piece)[max(part.start - position, 0) : max(part.stop - position, 0)]
        position += len(piece)
