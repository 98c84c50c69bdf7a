"""Studies over HTTP (PS3.18): WADO-RS metadata, frames and bulk data.

An edge: a resource reads the address and headers, asks the archive or the published tree in a
worker thread (both block), and writes the answer.  Frames go out as they are stored, or natively in
Explicit VR Little Endian if that is asked for by its UID: then a child decodes them (`decoders`).  Any other
transfer syntax is not there (406).

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
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain, repeat
from typing import Literal
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dicomscp import __version__
from dicomscp.archive.archive import Archive, Glance, OpenInstance
from dicomscp.archive.index import Held
from dicomscp.dicom.bulk import (
    BulkValue,
    Encoded,
    Frame,
    FrameTable,
    NativeFrames,
    Piece,
    bulk_value,
    early_table,
    frame_bytes,
    frame_table,
    read_frame,
)
from dicomscp.dicom.elements import EXPLICIT_LITTLE, inflate, is_deflated
from dicomscp.dicom.identity import Buffer, InstanceKey
from dicomscp.dicom.multipart import OCTET_STREAM, framed, part_head, tail
from dicomscp.dicom.pixels import TooLargeError, is_decodable
from dicomscp.errors import DamagedError, RefusedError
from dicomscp.study import layout
from dicomscp.web.decoders import Decoders, Made, opened
from dicomscp.web.documents import CHUNK_BYTES, Document, Documents
from dicomscp.web.exchange import (
    INSTANCE,
    SERIES,
    STUDY,
    WHOLE_BYTES,
    answer,
    chunked,
    confined,
    cut,
    digest_of,
    frame_numbers,
    headers_of,
    held_of,
    is_known,
    key_of,
    name_of,
    negotiate,
    only_as_stored,
    uids_of,
    wanted_part,
)
from dicomscp.web.lately import Lately
from dicomscp.web.media import (
    DICOM_JSON,
    DICOM_XML,
    JSON,
    Offer,
    bulk_offers,
    frame_offers,
    takes_gzip,
)
from dicomscp.web.metadata import Metadata, is_small, native_models
from dicomscp.web.problem import RETRY_SECONDS, Problem

_LOOK_SECONDS = 0.05
_CODED = {"vary": "Accept, Accept-Encoding"}
_VIEWER = (Offer(JSON),)
METADATA = (Offer(DICOM_JSON), Offer(JSON), Offer(DICOM_XML, multipart=True))
"""How metadata can be had, the default first (PS3.18 table 10.4.4-1)."""


class Studies:
    """The DICOMweb resources of one archive."""

    def __init__(
        self,
        archive: Archive,
        documents: Documents,
        decoders: Decoders,
        *,
        base_url: str,
        wait_seconds: float,
        inline_bytes: int = 1024,
        private_un: Literal["parse", "keep"] = "parse",
        request_publish: Callable[[str], None] | None,
        frame_files: bool = False,
    ) -> None:
        """*base_url* begins every link.  *frame_files*: frames are published as files, and given as these.

        *inline_bytes* and *private_un* are those by which documents are compiled (`jsonmodel.Compiler`).

        For a study that is held but not published yet, *request_publish* is told its UID, and its
        documents are waited for at most *wait_seconds*.
        """
        self._archive = archive
        self._documents = documents
        self._decoders = decoders
        self._base_url = base_url.rstrip("/")
        self._wait_seconds = wait_seconds
        self._inline_bytes = inline_bytes
        self._private_un: Literal["parse", "keep"] = private_un
        self._request_publish = request_publish
        self._frame_files = frame_files
        self._inflations = Inflations()
        self._tables = FrameTables()
        self._lately = Lately(archive)

    def routes(self) -> list[Route]:
        """All resources, under the path of the base URL."""
        base = urlsplit(self._base_url).path
        resources = {
            f"{INSTANCE}/frames/{{frames}}": self.frames,  # asked for most, so looked at first
            f"{SERIES}/metadata": self.metadata,
            f"{STUDY}/metadata": self.metadata,
            f"{STUDY}/ohif-dicom-json": self.viewer_document,
            f"{INSTANCE}/metadata": self.instance_metadata,
            f"{STUDY}/bulkdata/{{series}}/{{instance}}/{{path:path}}": self.bulk_data,
        }
        routes = [Route(base + path, resource, methods=["GET"]) for path, resource in resources.items()]
        # Also where other servers have it, so that links to them hold.
        return [*routes, Route(f"{STUDY}/ohif-dicom-json", self.viewer_document, methods=["GET"])]

    # Metadata, PS3.18 10.4.1.1.2

    async def metadata(self, request: Request) -> Response:
        """The published metadata of a study or series."""
        offer = negotiate(request, METADATA, default=True)
        uids = uids_of(request)
        study_uid, series_uid = uids["study"], uids.get("series")
        if series_uid is None:
            relative = layout.study_metadata(study_uid)
        else:
            relative = layout.series_metadata(study_uid, series_uid)
        return await self._published(request, study_uid, series_uid, relative, offer)

    async def _published(
        self, request: Request, study_uid: str, series_uid: str | None, relative: str, offer: Offer
    ) -> Response:
        if found := self._document_at_once(request, relative, offer):
            return found
        return await self._when_published(
            study_uid, series_uid, lambda: self._document(request, relative, offer)
        )

    async def _when_published(
        self, study_uid: str, series_uid: str | None, look: Callable[[], Response | None]
    ) -> Response:
        """What *look* finds, at once or within the wait for a study that was never published."""
        if found := await to_thread.run_sync(look):
            return found
        if not await to_thread.run_sync(self._archive.held, study_uid, series_uid):
            raise Problem(404, f"Nothing is held here of {name_of(study_uid, series_uid)}.")
        if self._request_publish:
            await to_thread.run_sync(self._request_publish, study_uid)
        deadline = asyncio.get_running_loop().time() + self._wait_seconds
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
            if found := await to_thread.run_sync(look):
                return found
        sentence = f"Held, but not published yet: {name_of(study_uid, series_uid)}. Ask again shortly."
        raise Problem(503, sentence, {"retry-after": str(RETRY_SECONDS)})

    def _document_at_once(self, request: Request, relative: str, offer: Offer) -> Response | None:
        """The document as it lies, or a 304, if nothing has to be waited for: in the event loop."""
        if offer.multipart or request.method == "HEAD":
            return None
        document = self._documents.open_known(relative)
        if document is None:
            return None
        with closing(document):
            gzip, headers = _document_headers(request, document, offer)
            if is_known(request, headers["etag"]):
                return Response(status_code=304, headers=headers)
            body = document.at_once() if gzip else None
        return None if body is None else Response(body, headers=headers)

    def _document(self, request: Request, relative: str, offer: Offer) -> Response | None:
        document = self._documents.open(relative)
        if document is None:
            return None
        if offer.multipart:
            return _xml_document(request, document, offer)
        gzip, headers = _document_headers(request, document, offer)
        with ExitStack() as unless_streamed:
            unless_streamed.callback(document.close)
            if is_known(request, headers["etag"]):
                return Response(status_code=304, headers=headers)
            size = document.size if gzip else document.fingerprint.size
            response = answer(request, headers, size, _closed_after(document, gzip=gzip))
            if isinstance(response, StreamingResponse):
                unless_streamed.pop_all()
            return response

    async def viewer_document(self, request: Request) -> Response:
        """The published document that the viewer opens a study with."""
        offer = negotiate(request, _VIEWER, default=True)
        study_uid = uids_of(request)["study"]
        return await self._published(request, study_uid, None, layout.study_viewer(study_uid), offer)

    async def instance_metadata(self, request: Request) -> Response:
        """The metadata of one instance, read from its file as the compiler reads it."""
        offer = negotiate(request, METADATA, default=True)
        (held,) = await to_thread.run_sync(held_of, self._archive, *key_of(request))
        small, wanted = await to_thread.run_sync(self._wanted_metadata, held, offer)
        boundary = digest_of(request, [held], repr(wanted))
        headers = headers_of(offer, boundary)
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        try:
            made: bytes | Made
            if small:
                made = await to_thread.run_sync(self._metadata_of, held, wanted)
            else:
                opening = partial(opened, self._archive, held, "metadata", metadata=wanted)
                made = await self._decoders.run(opening)
        except TooLargeError as error:
            raise Problem(413, f"The metadata of this instance are too large to be made. {error}") from error
        except RefusedError as error:
            raise DamagedError(f"A held instance cannot be read: {error}") from error
        size = made.size if isinstance(made, Made) else len(made)
        headers["content-length"] = str(_size_of(offer, boundary, [size]))
        if request.method == "HEAD":
            return Response(headers=headers)
        return StreamingResponse(_metadata_pieces(made, offer, boundary), headers=headers)

    def _wanted_metadata(self, held: Held, offer: Offer) -> tuple[bool, Metadata]:
        """Whether the header of *held* is small, and how its metadata are made."""
        bulk_uri = layout.bulk_uri(self._base_url, held.key)
        with self._archive.open(held) as instance:
            return is_small(instance.dataset, instance.transfer_syntax_uid), Metadata(
                bulk_uri,
                instance.default_charset,
                self._inline_bytes,
                self._private_un,
                is_xml=offer.multipart,
            )

    def _metadata_of(self, held: Held, wanted: Metadata) -> bytes:
        with self._archive.open(held) as instance:
            return wanted.of(instance.dataset, instance.transfer_syntax_uid)

    # Frames and bulk data, PS3.18 10.4.1.1.6 and .5

    async def frames(self, request: Request) -> Response:
        """Frames of one instance, in the order asked for, as they are stored or natively.

        A byte range of one that is stored so, if it is a single part.
        """
        key, numbers = key_of(request), frame_numbers(request.path_params["frames"])
        filed = await self._frame_file(request, key, numbers)
        if filed is not None:
            return filed
        if at_once := self._frame_at_once(request, key, numbers):
            return at_once
        found = await to_thread.run_sync(self._frames, request, key, numbers)
        return found if isinstance(found, Response) else await self._native(request, *found, numbers)

    async def _frame_file(
        self, request: Request, key: InstanceKey, numbers: Sequence[int]
    ) -> Response | None:
        """One frame as it was published, if it was, and that is how it is asked for."""
        if not self._frame_files or len(numbers) > 1 or request.method == "HEAD":
            return None
        gzip = takes_gzip(request.headers.get("accept-encoding", ""))
        file = self._documents.open_frame(key, numbers[0], gzip=gzip)
        if file is None:
            return None
        with closing(file):
            if file.size > WHOLE_BYTES:
                return None
            body = file.at_once()
            if body is None:
                body = await to_thread.run_sync(file.whole)
        boundary, transfer_syntax_uid = file.head(body)
        offer = negotiate(request, _frame_offers(transfer_syntax_uid, 1))
        if offer != Offer(OCTET_STREAM, True, transfer_syntax_uid):
            return None
        headers = headers_of(offer, boundary) | _CODED
        if file.deflated:
            headers |= {"etag": f'"{boundary}-gzip"', "content-encoding": "gzip"}
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    def _frame_at_once(self, request: Request, key: InstanceKey, numbers: Sequence[int]) -> Response | None:
        """One native frame if nothing has to be waited for: in the event loop."""
        held = self._lately.of(key) if len(numbers) == 1 else None
        glance = self._archive.glance(held) if held else None
        if held is None or glance is None:
            return None
        with glance:
            table = self._tables.early(held, glance)
            if table is None or not 1 <= numbers[0] <= table.frames:
                return None
            boundary, (start, stop) = digest_of(request, [held]), table.span(numbers[0])
            offer = negotiate(request, _frame_offers(table.transfer_syntax_uid, 1))
            headers = headers_of(offer, boundary) | (_CODED if self._frame_files else {})
            if is_known(request, headers["etag"]):
                return Response(status_code=304, headers=headers)
            part, status = wanted_part(request, headers, _size_of(offer, boundary, [stop - start]), offer)
            data = glance.read(start, stop)
        if data is None:
            return None
        body = cut(_body(offer, boundary, [[data]]), part)
        return answer(request, headers, part.stop - part.start, body, status)

    def _frames(
        self, request: Request, key: InstanceKey, numbers: Sequence[int]
    ) -> Response | tuple[Held, Offer]:
        """The frames as they are stored, or what they are to be decoded from and for."""
        (held,) = held_of(self._archive, *key)
        found = self._stored_frames(request, held, numbers)
        self._lately.asked_for(held)
        return found

    def _stored_frames(
        self, request: Request, held: Held, numbers: Sequence[int]
    ) -> Response | tuple[Held, Offer]:
        boundary = digest_of(request, [held])
        coded = _CODED if self._frame_files else {}
        with self._archive.open(held) as instance:
            dataset, table = self._frames_of(held, instance)
            first = _frame(dataset, table, numbers[0])
            offer = negotiate(request, _frame_offers(first.transfer_syntax_uid, len(numbers)))
            headers = headers_of(offer, boundary) | coded
            if is_known(request, headers["etag"]):
                return Response(status_code=304, headers=headers)
            size = _size_of(offer, boundary, (_frame_bytes(dataset, table, number) for number in numbers))
            if offer.transfer_syntax_uid != first.transfer_syntax_uid:
                return held, offer
            part, status = wanted_part(request, headers, size, offer)
            if size <= WHOLE_BYTES:
                rest = (_frame(dataset, table, number).data for number in numbers[1:])
                body = _body(offer, boundary, chain((first.data,), rest))
                return answer(request, headers, part.stop - part.start, cut(body, part), status)
        chunks = self._frame_chunks(held, offer, boundary, numbers, part)
        return answer(request, headers, part.stop - part.start, chunks, status)

    async def _native(self, request: Request, held: Held, offer: Offer, numbers: Sequence[int]) -> Response:
        """The frames decoded, one at a time; all have the size of the first, so the length is known."""
        boundary = digest_of(request, [held])
        headers = headers_of(offer, boundary)
        first = await self._decoded(held, numbers[0], patient=False)
        size = _size_of(offer, boundary, repeat(first.size, len(numbers)))
        headers["content-length"] = str(size)
        if request.method == "HEAD":
            return Response(headers=headers)
        pieces = self._native_pieces(held, numbers, first, offer, boundary)
        del first  # before the next is waited for
        if size <= WHOLE_BYTES:
            return Response(b"".join([piece async for piece in pieces]), headers=headers)
        return StreamingResponse(pieces, headers=headers)

    async def _native_pieces(
        self, held: Held, numbers: Sequence[int], made: Made | None, offer: Offer, boundary: str
    ) -> AsyncIterator[bytes]:
        """The body, of which *made* is the first frame."""
        for frame in numbers:
            made = made or await self._decoded(held, frame, patient=True)
            if offer.multipart:
                yield part_head(boundary, offer.part_type())
            for piece in made.chunks(CHUNK_BYTES):
                yield piece
            made = None  # before the next is waited for
            if offer.multipart:
                yield b"\r\n"
        if offer.multipart:
            yield tail(boundary)

    async def _decoded(self, held: Held, frame: int, *, patient: bool) -> Made:
        try:
            opening = partial(opened, self._archive, held, "frame", frame=frame)
            return await self._decoders.run(opening, patient=patient)
        except RefusedError as error:
            raise only_as_stored(error) from error

    def _frame_chunks(
        self, held: Held, offer: Offer, boundary: str, numbers: Iterable[int], part: slice
    ) -> Iterator[bytes]:
        with self._archive.open(held) as instance:
            dataset, table = self._frames_of(held, instance)
            parts = (_frame(dataset, table, number).data for number in numbers)
            yield from chunked(cut(_body(offer, boundary, parts), part))

    def _frames_of(self, held: Held, instance: OpenInstance) -> tuple[Encoded, FrameTable]:
        encoded = self._inflations.of(held, instance)
        return encoded, self._tables.of(held, encoded)

    async def bulk_data(self, request: Request) -> Response:
        """One value of one instance, as BulkDataURI names it; a byte range of it if it is a single part."""
        return await to_thread.run_sync(self._bulk, request, key_of(request), request.path_params["path"])

    def _bulk(self, request: Request, key: InstanceKey, path: str) -> Response:
        (held,) = held_of(self._archive, *key)
        return self.value(request, held, path, _bulk_offers, also=confined)

    def value(
        self,
        request: Request,
        held: Held,
        path: str,
        offers_of: Callable[[BulkValue], list[Offer]],
        *,
        also: Callable[[Offer], Mapping[str, str]] = lambda _: {},
        wanted: str | None = None,
    ) -> Response:
        """The value at *path* of *held* as one of its offers, with the headers *also*; blocking.

        *wanted* are media ranges in place of those that the request accepts.
        """
        boundary = digest_of(request, [held])
        with self._archive.open(held) as instance:
            value = _bulk_value(self._inflations.of(held, instance), path)
            offer = negotiate(request, offers_of(value), wanted=wanted)
            headers = headers_of(offer, boundary) | dict(also(offer))
            if is_known(request, headers["etag"]):
                return Response(status_code=304, headers=headers)
            whole, pieces = _measured(_body(offer, boundary, _parts(value, offer, path)))
            part, status = wanted_part(request, headers, whole, offer)
            size = part.stop - part.start
            if size <= WHOLE_BYTES:
                body = pieces or _body(offer, boundary, _parts(value, offer, path))
                return answer(request, headers, size, cut(body, part), status)
        chunks = self._bulk_chunks(held, path, offer, boundary, part)
        return answer(request, headers, size, chunks, status)

    def _bulk_chunks(
        self, held: Held, path: str, offer: Offer, boundary: str, part: slice
    ) -> Iterator[bytes]:
        with self._archive.open(held) as instance:
            value = _bulk_value(self._inflations.of(held, instance), path)
            yield from chunked(cut(_body(offer, boundary, _parts(value, offer, path)), part))


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
            self._trim()
        return table

    def early(self, held: Held, glance: Glance) -> NativeFrames | None:
        """The table, if it was made before or can be of what *glance* shows, and has spans; never waits."""
        key = (held.digest, held.transfer_syntax_uid)
        with self._lock:
            tabled = self._tables.get(key) or _Tabled()
        table = tabled.table
        if table is None:
            table = tabled.table = early_table(glance.prefix, glance.dataset_bytes, held.transfer_syntax_uid)
            if table is None:
                return None
            with self._lock:
                self._tables[key] = tabled
                self._trim()
        return table if isinstance(table, NativeFrames) and table.has_spans else None

    def _trim(self) -> None:
        while len(self._tables) > self._kept or self._size() > self._kept_bytes:
            self._tables.popitem(last=False)

    def _size(self) -> int:
        return sum(tabled.size_bytes for tabled in self._tables.values())


class _Tabled:
    """A frame table, made by the first who asks; who asks meanwhile waits, and for this one alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.table: FrameTable | None = None

    def table_of(self, encoded: Encoded) -> FrameTable:
        with self._lock:
            if self.table is None:
                self.table = frame_table(*encoded)
            return self.table

    @property
    def size_bytes(self) -> int:
        return self.table.size_bytes if self.table else 0


# What is answered


def _document_headers(request: Request, document: Document, offer: Offer) -> tuple[bool, dict[str, str]]:
    """Whether *document* goes out as it lies, in gzip, and the headers of the answer."""
    gzip = takes_gzip(request.headers.get("accept-encoding", ""))
    digest = document.fingerprint.digest
    headers = {
        "content-type": offer.media_type,
        "etag": f'"{digest}-gzip"' if gzip else f'"{digest}"',
        "cache-control": "no-cache",
        **_CODED,
    }
    if gzip:
        headers["content-encoding"] = "gzip"
    return gzip, headers


def _frame_offers(transfer_syntax_uid: str, frames: int) -> list[Offer]:
    """Frames as they are stored, and natively if they are not and can be decoded."""
    offers = frame_offers(transfer_syntax_uid, frames)
    if transfer_syntax_uid != EXPLICIT_LITTLE and is_decodable(transfer_syntax_uid):
        offers += frame_offers(EXPLICIT_LITTLE, frames)
    return offers


def _bulk_offers(value: BulkValue) -> list[Offer]:
    return bulk_offers(value.transfer_syntax_uid, value.count, value.media_type)


def _closed_after(document: Document, *, gzip: bool) -> Iterator[bytes]:
    """The bytes of *document*, which is closed when they are read or given up."""
    with closing(document):
        yield from document.compressed() if gzip else document.inflated()


def _xml_document(request: Request, document: Document, offer: Offer) -> Response:
    """The metadata that *document* holds, each instance as a Native DICOM Model; its length is not known."""
    name = f"{__version__}\n{document.fingerprint.digest}\n{DICOM_XML}"
    boundary = hashlib.sha256(name.encode()).hexdigest()
    headers = headers_of(offer, boundary)
    if is_known(request, headers["etag"]):
        document.close()
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        document.close()
        return StreamingResponse(iter(()), headers=headers)
    models = ([model] for model in native_models(_lines(_closed_after(document, gzip=False))))
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


async def _metadata_pieces(made: bytes | Made, offer: Offer, boundary: str) -> AsyncIterator[bytes]:
    pieces = made.chunks(CHUNK_BYTES) if isinstance(made, Made) else [made]
    for piece in _body(offer, boundary, [pieces]):
        yield bytes(piece)


def _frame(encoded: Encoded, table: FrameTable, number: int) -> Frame:
    try:
        return read_frame(encoded.dataset, table, number)
    except RefusedError as error:
        raise _no_frame(number, error) from error


def _frame_bytes(encoded: Encoded, table: FrameTable, number: int) -> int:
    try:
        return frame_bytes(encoded.dataset, table, number)
    except RefusedError as error:
        raise _no_frame(number, error) from error


def _no_frame(number: int, error: RefusedError) -> Problem:
    return Problem(404, f"Frame {number} cannot be had: {error}")


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


def _body(offer: Offer, boundary: str, parts: Iterable[Iterable[Buffer]]) -> Iterator[Buffer]:
    """The body that *parts* make; without multipart there is one of them."""
    if offer.multipart:
        return framed(boundary, offer.part_type(), parts)
    return chain.from_iterable(parts)


def _size_of(offer: Offer, boundary: str, sizes: Iterable[int]) -> int:
    """The length of the body that parts of *sizes* make."""
    if not offer.multipart:
        return sum(sizes)
    around = len(part_head(boundary, offer.part_type())) + len(b"\r\n")
    return sum(around + size for size in sizes) + len(tail(boundary))


def _measured(pieces: Iterable[Buffer]) -> tuple[int, list[Buffer] | None]:
    """The length of all *pieces*, and the pieces unless they are more than is kept whole."""
    size = 0
    kept: list[Buffer] = []
    for piece in pieces:
        size += len(piece)
        if size <= WHOLE_BYTES:
            kept.append(piece)
    return size, kept if size <= WHOLE_BYTES else None
