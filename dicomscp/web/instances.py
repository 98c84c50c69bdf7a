"""Instances over HTTP (PS3.18 section 10.4.1.1.1): Part 10 files, as they are stored or as asked for.

As stored, they are read out of their files while the client takes them.  In Explicit VR Little Endian, which
is made when it is asked for by its UID and every instance asked for can be, each is made in a child
(`decoders`) and held in memory, one at a time.  Anything else is 406.  An instance that is no part can be had
in byte ranges.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from functools import partial
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Held
from dicomscp.dicom.bulk import is_video
from dicomscp.dicom.elements import BIG_PIXELS, DEFLATED, EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE
from dicomscp.dicom.multipart import part_head, part_type, tail
from dicomscp.dicom.pixels import is_decodable
from dicomscp.errors import DamagedError, RefusedError
from dicomscp.study import layout
from dicomscp.web.decoders import Decoders, Made, opened
from dicomscp.web.documents import CHUNK_BYTES
from dicomscp.web.exchange import (
    INSTANCE,
    SERIES,
    STUDY,
    answer,
    chunked,
    cut,
    digest_of,
    headers_of,
    held_of,
    is_known,
    negotiate,
    only_as_stored,
    uids_of,
    wanted_part,
)
from dicomscp.web.media import DICOM, Offer

_UNCOMPRESSED = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED, BIG_PIXELS})


class Instances:
    """The instances of one archive, to be retrieved whole."""

    def __init__(self, archive: Archive, decoders: Decoders, *, base_url: str) -> None:
        """*base_url* begins every address."""
        self._archive, self._decoders = archive, decoders
        self._base = urlsplit(base_url.rstrip("/")).path

    def routes(self) -> list[Route]:
        """The resources, under the path of the base URL."""
        return [
            Route(self._base + path, self.retrieve, methods=["GET"]) for path in (STUDY, SERIES, INSTANCE)
        ]

    async def retrieve(self, request: Request) -> Response:
        """The instances of a study, of a series, or one instance, as Part 10 files."""
        uids = uids_of(request)
        held, offers = await to_thread.run_sync(self._found, uids)
        return await self.give(request, held, negotiate(request, offers))

    def _found(self, uids: Mapping[str, str]) -> tuple[list[Held], list[Offer]]:
        """What is held there and how it can be had; blocking, for a study may have many instances."""
        held = held_of(self._archive, *uids.values())
        return held, dicom_offers(held, single="instance" in uids)

    async def give(self, request: Request, held: list[Held], offer: Offer, *also: str) -> Response:
        """*held* as *offer*, one of `dicom_offers`; *also* is what else of the request it depends on."""
        boundary = await to_thread.run_sync(digest_of, request, held, offer.part_type(), *also)
        headers = headers_of(offer, boundary)
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        if not offer.multipart:
            name = f"{layout.component(held[0].key.sop_uid)}.dcm"
            headers["content-disposition"] = f'attachment; filename="{name}"'
        if all(_is_given_as_stored(one, offer) for one in held):
            return await to_thread.run_sync(self._stored, request, held, offer, headers, boundary)
        if offer.multipart:
            return await self._transcoded(request, held, headers, boundary)
        made = await self.explicit(held[0])
        part, status = wanted_part(request, headers, made.size, offer)
        pieces = cut(made.chunks(CHUNK_BYTES), part)
        return answer(request, headers, part.stop - part.start, pieces, status)

    def _stored(
        self, request: Request, held: list[Held], offer: Offer, headers: dict[str, str], boundary: str
    ) -> Response:
        if not offer.multipart:
            part, status = wanted_part(request, headers, held[0].size, offer)
            return answer(request, headers, part.stop - part.start, self._file(held[0], part), status)
        size = sum(one.size + len(_part_head(one, boundary)) + 2 for one in held) + len(tail(boundary))
        return answer(request, headers, size, chunked(self._file_parts(held, boundary)))

    def _file_parts(self, held: Iterable[Held], boundary: str) -> Iterator[bytes]:
        for one in held:
            yield _part_head(one, boundary)
            yield from self._file(one)
            yield b"\r\n"
        yield tail(boundary)

    def _file(self, held: Held, part: slice | None = None) -> Iterator[bytes]:
        """The file of *held*, or that part, whose start and stop are set."""
        start, stop = (part.start, part.stop) if part else (0, held.size)
        with self._archive.open(held) as instance, instance.reopened() as file:
            if instance.size != held.size:
                raise DamagedError(
                    "A held instance is not of the size it was filed with; run `dicomscp verify`."
                )
            file.seek(start)
            while chunk := file.read(min(CHUNK_BYTES, stop - file.tell())):
                yield chunk

    async def _transcoded(
        self, request: Request, held: list[Held], headers: dict[str, str], boundary: str
    ) -> Response:
        """Without its length.  If the first cannot be made that has its status; later the connection ends."""
        if request.method == "HEAD":
            return StreamingResponse(iter(()), headers=headers)
        first = await self._made(held[0], patient=False)
        return StreamingResponse(self._made_parts(held, first, boundary), headers=headers)

    async def _made_parts(self, held: list[Held], first: Made | None, boundary: str) -> AsyncIterator[bytes]:
        head = part_head(boundary, part_type(DICOM, EXPLICIT_LITTLE))
        for at, one in enumerate(held):
            yield head
            made = first if at == 0 else await self._made(one, patient=True)
            first = None
            async for piece in iterate_in_threadpool(made.chunks(CHUNK_BYTES) if made else self._file(one)):
                yield piece
            del made  # before the next is waited for
            yield b"\r\n"
        yield tail(boundary)

    async def _made(self, held: Held, *, patient: bool) -> Made | None:
        """*held* in Explicit VR Little Endian; None if it is that already."""
        if held.transfer_syntax_uid == EXPLICIT_LITTLE:
            return None
        return await self.explicit(held, patient=patient)

    async def explicit(self, held: Held, *, patient: bool = False) -> Made:
        """The Part 10 file of *held* in Explicit VR Little Endian.  Raises Problem 406 if it cannot be."""
        try:
            return await self._decoders.run(partial(opened, self._archive, held, "file"), patient=patient)
        except RefusedError as error:
            raise only_as_stored(error) from error


def dicom_offers(held: Iterable[Held], *, single: bool) -> list[Offer]:
    """How *held* can be had as Part 10 files; not in parts too if it is a *single* one."""
    syntaxes = {one.transfer_syntax_uid for one in held}
    made = EXPLICIT_LITTLE if all(map(is_transcodable, syntaxes)) else ""
    stored = next(iter(syntaxes)) if len(syntaxes) == 1 else ""
    offers = []
    for syntax in dict.fromkeys((stored, made) if made else (stored,)):
        offers.append(Offer(DICOM, multipart=True, transfer_syntax_uid=syntax))
        if single:
            offers.append(Offer(DICOM, transfer_syntax_uid=syntax))
    return offers


def is_transcodable(transfer_syntax_uid: str) -> bool:
    """Whether what is stored in that transfer syntax can be made Explicit VR Little Endian."""
    if transfer_syntax_uid in _UNCOMPRESSED:
        return True
    return not is_video(transfer_syntax_uid) and is_decodable(transfer_syntax_uid)


def _is_given_as_stored(held: Held, offer: Offer) -> bool:
    return offer.transfer_syntax_uid in ("", held.transfer_syntax_uid)


def _part_head(held: Held, boundary: str) -> bytes:
    return part_head(boundary, part_type(DICOM, held.transfer_syntax_uid))
