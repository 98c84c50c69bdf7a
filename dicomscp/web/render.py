"""Rendered resources and thumbnails over HTTP (PS3.18 sections 10.4.1.1.3 and .4).

    .../rendered                      image/jpeg, image/png, image/gif
    .../frames/{frames}/rendered      likewise; several frames in parts, or as one animated GIF
    .../thumbnail                     the same types, small

An instance of several frames is shown by one of them as JPEG or PNG (the one that it calls representative,
else the first), by all as GIF, or in parts.  Of a series or study every frame is a part, with its own address
in Content-Location; one that cannot be rendered is a part that says so, in application/problem+json: a study
must not be lost for one instance.  What has no pixels is passed over; where nothing has any it is 404.
Of frames that an instance tells of and does not have, and of many in a row that cannot be rendered, one part
stands for the rest.  A thumbnail of a series is that of its middle instance, one of a study that of its first
series with pixels; of several frames the one called representative, else the middle one.  Whether what is
deflated has pixels is found by making it, in a child.

Encapsulated documents and videos are given as what they are, if what they say they are is in a list.  A
document is somebody's: it gets a policy that lets nothing in it run or be fetched, and none but our own pages
may frame it.

Images are made in children (`decoders`).  400 names the parameter that is wrong, 404 is what is not held or
has no pixels, 406 what no decoder here knows or what is broken, 413 what is larger than may be made, 500 what
its decoder died of, 503 with Retry-After too many requests at a time.

Validators: an image follows from the digest of the instance, the parameters, the media type and the versions
of what renders, which together are a strong ETag, compared before anything is rendered.  `no-cache` and not
`immutable`: an address names UIDs, not a digest, so another variant of the instance may come to be published
under it, and what was removed must not be shown on.  To ask again costs a 304.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from itertools import count, islice
from typing import NamedTuple
from urllib.parse import urlsplit

import PIL
import pydicom
import structlog
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Held
from dicomscp.dicom.bulk import BulkValue, frame_table, is_video
from dicomscp.dicom.elements import is_deflated
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.multipart import media_types, part_head, tail
from dicomscp.dicom.pixels import NoPixelsError, TooLargeError, is_decodable
from dicomscp.dicom.render import Function, Window
from dicomscp.errors import DamagedError, DicomscpError, RefusedError, RemovedError
from dicomscp.study import layout
from dicomscp.web.decoders import DecoderError, Decoders, Made, opened
from dicomscp.web.exchange import (
    INSTANCE,
    SERIES,
    STUDY,
    confined,
    digest_of,
    frame_numbers,
    headers_of,
    held_of,
    is_known,
    key_of,
    negotiate,
    passed_over,
    uids_of,
    warning,
)
from dicomscp.web.imaging import Picture, View, Which
from dicomscp.web.media import DOCUMENT_TYPES, Offer
from dicomscp.web.problem import PROBLEM_TYPE, Problem, response_of
from dicomscp.web.studies import Studies

log = structlog.get_logger()

IMAGES = ("image/jpeg", "image/png", "image/gif")
PARTS = ("image/jpeg", "image/png")
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "rendered": ("accept", "annotation", "charset", "iccprofile", "quality", "viewport", "window"),
    "thumbnail": ("accept", "charset", "viewport"),
}
ANNOTATIONS = ("patient", "technique")
"""What annotation may ask for (section 8.3.5.1.1); none of it is burned in."""
FUNCTIONS: Mapping[str, Function] = {
    "linear": "LINEAR",
    "linear-exact": "LINEAR_EXACT",
    "sigmoid": "SIGMOID",
}
MAX_SIDE = 16384
"""Of a viewport: more than any display has, and within what a JPEG can have."""
_DECIMAL = r"[+-]?(?:[0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})(?:[eE][+-]?[0-9]{1,2})?"

_THUMBNAIL = View(256, 256, enlarge=False)
_LOOKED_AT, _LOOKED_AT_IN_ALL = 16, 256  # instances of one series, and of all, in which pixels are looked for
_INFLATED = 4  # of them, those that are deflated
_FAILED_IN_A_ROW = 16  # frames of an instance that cannot be rendered: the rest is not tried
# What an encapsulated document is if it does not say so in words that we know, by SOP class.
_DOCUMENT_CLASSES: Mapping[str, str] = {
    "1.2.840.10008.5.1.4.1.1.104.1": "application/pdf",
    "1.2.840.10008.5.1.4.1.1.104.2": "text/xml",
    "1.2.840.10008.5.1.4.1.1.104.3": "model/stl",
    "1.2.840.10008.5.1.4.1.1.104.4": "model/obj",
    "1.2.840.10008.5.1.4.1.1.104.5": "model/mtl",
}
_DOCUMENT_VALUE, _PIXEL_VALUE = "00420011", "7FE00010"
_MADE_BY = f"{PIL.__version__} {pydicom.__version__}"


class Rendering:
    """The images of one archive."""

    def __init__(self, archive: Archive, decoders: Decoders, studies: Studies, *, base_url: str) -> None:
        """*base_url* begins every address; *studies* gives values as they are."""
        self._archive, self._decoders, self._studies = archive, decoders, studies
        self._base_url = base_url.rstrip("/")

    def routes(self) -> list[Route]:
        """The resources, under the path of the base URL."""
        base = urlsplit(self._base_url).path
        frames = INSTANCE + "/frames/{frames}"
        resources = {
            STUDY + "/rendered": self.all_rendered,
            SERIES + "/rendered": self.all_rendered,
            INSTANCE + "/rendered": self.rendered,
            frames + "/rendered": self.rendered,
            STUDY + "/thumbnail": self.thumbnail,
            SERIES + "/thumbnail": self.thumbnail,
            INSTANCE + "/thumbnail": self.thumbnail,
            frames + "/thumbnail": self.thumbnail,
        }
        return [Route(base + path, resource, methods=["GET"]) for path, resource in resources.items()]

    async def rendered(self, request: Request) -> Response:
        """One instance, or some of its frames."""
        asked = picture_of(request)
        named = request.path_params.get("frames")
        frames = tuple(frame_numbers(named)) if named else ()
        (held,) = await to_thread.run_sync(held_of, self._archive, *key_of(request))
        if is_document(held):
            return await to_thread.run_sync(self.document, request, held)
        offer = negotiate(request, image_offers(len(frames)))
        if offer.multipart:
            return await self._in_parts(request, [held], asked._replace(frames=frames), offer)
        which: Which = "all" if offer.media_type == "image/gif" and not frames else "representative"
        picture = asked._replace(media_type=offer.media_type, frames=frames, which=which)
        return await self.picture(request, held, picture, self._warned(request, "rendered"))

    async def all_rendered(self, request: Request) -> Response:
        """Every frame of every instance of a study or series, in parts."""
        asked = picture_of(request)
        held = await to_thread.run_sync(held_of, self._archive, *uids_of(request).values())
        offer = negotiate(request, [one for one in image_offers(0) if one.multipart])
        return await self._in_parts(request, held, asked, offer)

    async def thumbnail(self, request: Request) -> Response:
        """A small image of a study, a series, an instance or a frame."""
        view = viewport_of(_parameter(request, "viewport"), regions=False) or _THUMBNAIL
        named = request.path_params.get("frames")
        frames = tuple(frame_numbers(named)[:1]) if named else ()
        uids = uids_of(request)
        shown = self._shown_by(*uids.values())
        held = await to_thread.run_sync(next, shown, None)
        offer = negotiate(request, [one for one in image_offers(1) if not one.multipart])
        picture = Picture(offer.media_type, frames, "middle", view=view)
        while held:
            try:
                return await self.picture(request, held, picture, self._warned(request, "thumbnail"))
            except Problem as problem:
                goes_on = is_deflated(held.transfer_syntax_uid) or problem.status == HTTPStatus.NOT_FOUND
                if "instance" in uids or not goes_on:
                    raise
            held = await to_thread.run_sync(next, shown, None)
        raise Problem(404, "Nothing that is asked for has pixels.")

    async def picture(
        self, request: Request, held: Held, picture: Picture, also: Mapping[str, str]
    ) -> Response:
        """One image of *held*, with the headers *also*.  Raises Problem if it cannot be made."""
        digest = digest_of(request, [held], repr(picture), _MADE_BY)
        headers = headers_of(Offer(picture.media_type), digest) | dict(also)
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        made = await self._made(held, picture)
        headers["content-length"] = str(made.size)
        if request.method == "HEAD":
            return Response(headers=headers)
        return StreamingResponse(made.sent(), headers=headers)

    def document(self, request: Request, held: Held, wanted: str | None = None) -> Response:
        """The document or video that *held* encapsulates, as what it is; blocking.

        *wanted* are media ranges in place of those that the request accepts.
        """
        if is_video(held.transfer_syntax_uid):
            (_, *videos) = media_types(held.transfer_syntax_uid)
            return self._studies.value(
                request, held, _PIXEL_VALUE, lambda _: [Offer(one) for one in videos], wanted=wanted
            )
        of_class = _DOCUMENT_CLASSES[held.sop_class_uid]

        def offers(value: BulkValue) -> list[Offer]:
            return [Offer(value.media_type if value.media_type in DOCUMENT_TYPES else of_class)]

        return self._studies.value(request, held, _DOCUMENT_VALUE, offers, also=confined, wanted=wanted)

    async def _in_parts(
        self, request: Request, held: Sequence[Held], asked: Picture, offer: Offer
    ) -> Response:
        also = (repr(asked), offer.media_type, _MADE_BY)
        digest = await to_thread.run_sync(digest_of, request, held, *also)  # a study may have many
        headers = headers_of(offer, digest) | self._warned(request, "rendered")
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        parts = self._parts(held, asked._replace(media_type=offer.media_type))
        first = await anext(parts, None)
        if first is None:
            raise Problem(404, "Nothing that is asked for has pixels.")
        if request.method == "HEAD":
            await parts.aclose()
            return StreamingResponse(iter(()), headers=headers)
        return StreamingResponse(_framed(digest, first, parts), headers=headers)

    async def _parts(self, held: Sequence[Held], asked: Picture) -> AsyncGenerator["_Part"]:
        """A part a frame.  What is wrong with the first frame of the only instance is raised."""
        patient = False
        for one in held:
            if is_document(one):
                continue
            async for part in self._parts_of(one, asked, alone=len(held) == 1, patient=patient):
                yield part
                del part  # before the next is waited for, here as in `_parts_of`
                patient = True

    async def _parts_of(
        self, held: Held, asked: Picture, *, alone: bool, patient: bool
    ) -> AsyncGenerator["_Part"]:
        there: int | None = None
        last = failed = 0
        for number in asked.frames or count(1):
            if there is not None and number > last and not asked.frames:
                return
            location = f"{layout.instance_url(self._base_url, held.key)}/frames/{number}/rendered"
            try:
                made = await self._made(held, asked._replace(frames=(number,)), patient=patient)
            except Problem as problem:
                if there is None and (alone or problem.status == HTTPStatus.NOT_FOUND):
                    if alone:
                        raise
                    return
                yield _Part(PROBLEM_TYPE, location, bytes(response_of(problem).body))
                failed += 1
                if there is None or failed == _FAILED_IN_A_ROW:
                    return  # how many frames there are cannot be told, or the rest will fare no better
            else:
                there, failed = made.frames, 0
                last = made.there + (made.there < there)  # one part for those that are missing
                if missing := next((one for one in asked.frames if not 1 <= one <= there), None):
                    raise Problem(404, f"The instance has no frame {missing}.")
                part = _Part(asked.media_type, location, made)
                del made
                yield part
                del part
            patient = True

    def _shown_by(self, *uids: str) -> Iterator[Held]:
        """The instances that a thumbnail of what is named may be of, the first first; blocking.

        Those have pixels, or are deflated.  Raises Problem 404 if nothing is held there.
        """
        if len(uids) == len(InstanceKey._fields):
            yield from held_of(self._archive, *uids)
            return
        found = deflated = 0
        for held in islice(self._archive.middles(*uids, each=_LOOKED_AT), _LOOKED_AT_IN_ALL):
            found += 1
            is_maybe = is_deflated(held.transfer_syntax_uid)
            deflated += is_maybe
            if (is_maybe and deflated <= _INFLATED) or (not is_maybe and self._has_pixels(held)):
                yield held
        if not found:
            held_of(self._archive, *uids)

    def _has_pixels(self, held: Held) -> bool:
        """Whether *held*, which is not deflated, has pixels that can be decoded."""
        if not is_decodable(held.transfer_syntax_uid):
            return False
        try:
            with self._archive.open(held) as instance:
                return frame_table(instance.dataset, instance.transfer_syntax_uid).frames > 0
        except (RefusedError, RemovedError):
            return False
        except DamagedError as error:
            _log_damage(held, error)
            return False

    async def _made(self, held: Held, picture: Picture, *, patient: bool = False) -> Made:
        try:
            opening = partial(opened, self._archive, held, "picture", picture=picture)
            return await self._decoders.run(opening, patient=patient)
        except DamagedError as error:  # of which the others of a study know nothing
            _log_damage(held, error)
            raise problem_of_image(error) from error
        except (RefusedError, DecoderError) as error:
            raise problem_of_image(error) from error

    def _warned(self, request: Request, kind: str) -> dict[str, str]:
        """A Warning for what is asked for and not done (PS3.18 sections 8.3.5.1.1 and 8.3.5.1.5)."""
        asked = request.query_params
        names = [name for name in asked if name not in PARAMETERS[kind]]
        names += [
            name for name in ("iccprofile",) if name in PARAMETERS[kind] and asked.get(name, "no") != "no"
        ]
        told = list(passed_over(request, self._base_url, names).values())
        if kind == "rendered" and "annotation" in asked:
            values = " and ".join(asked["annotation"].split(","))
            sentence = f"The following annotation values are not supported: {values}"
            told.append(warning(request, self._base_url, sentence))
        return {"warning": ", ".join(told)} if told else {}


def _log_damage(held: Held, error: DamagedError) -> None:
    log.error("held_data_damaged", sop_uid=held.key.sop_uid, reason=str(error))


class _Part(NamedTuple):
    """One part of an answer; its address is where it can be had by itself."""

    media_type: str
    location: str
    body: bytes | Made


async def _framed(boundary: str, part: _Part | None, rest: AsyncIterator[_Part]) -> AsyncIterator[bytes]:
    """The body that *part* and the *rest* make; a part is let go before the next is waited for."""
    while part:
        yield part_head(boundary, part.media_type, part.location)
        if isinstance(part.body, Made):
            async for piece in part.body.sent():
                yield piece
        else:
            yield part.body
        yield b"\r\n"
        part = None
        part = await anext(rest, None)
    yield tail(boundary)


def problem_of_image(error: DicomscpError) -> Problem:
    """The answer to who asked for an image that *error* says cannot be made."""
    if isinstance(error, NoPixelsError):
        return Problem(404, str(error))
    if isinstance(error, TooLargeError):
        return Problem(413, str(error))
    return Problem(406 if isinstance(error, RefusedError) else 500, str(error))


def image_offers(frames: int) -> list[Offer]:
    """How so many frames can be had as images; 0 are all that an instance has."""
    single = [Offer(media_type) for media_type in IMAGES]
    parts = [Offer(media_type, multipart=True) for media_type in PARTS]
    return [*single, *parts] if frames < 2 else [*parts, Offer("image/gif")]


def is_document(held: Held) -> bool:
    """Whether *held* is given as what it encapsulates, and not as an image."""
    return held.sop_class_uid in _DOCUMENT_CLASSES or is_video(held.transfer_syntax_uid)


# What a request says, PS3.18 section 8.3.5


def picture_of(request: Request) -> Picture:
    """The image that the parameters ask for, its media type open.  Raises Problem 400."""
    _check_annotation(request)
    return Picture(
        "",
        window=_window(_parameter(request, "window")),
        view=viewport_of(_parameter(request, "viewport"), regions=True),
        quality=quality_of(_parameter(request, "quality"), "quality"),
    )


def _parameter(request: Request, name: str) -> str:
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise Problem(400, f"{name} is given more than once.")
    if values == [""]:
        raise Problem(400, f"{name} has no value.")
    return values[0] if values else ""


def _check_annotation(request: Request) -> None:
    """Section 8.3.5.1.1: what is no keyword is wrong; a keyword that is not supported is passed over."""
    text = _parameter(request, "annotation")
    if text and not set(text.split(",")) <= set(ANNOTATIONS):
        raise Problem(400, f"annotation is of these, with commas between: {', '.join(ANNOTATIONS)}.")


def _window(text: str) -> Window | None:
    """Section 8.3.5.1.4: center, width and function, all of them."""
    if not text:
        return None
    center, width, function = (*text.split(","), "", "")[:3]
    if text.count(",") != 2 or not (is_decimal(center) and is_decimal(width) and function in FUNCTIONS):
        functions = ", ".join(FUNCTIONS)
        raise Problem(400, f"window is center,width,function, the function being one of {functions}.")
    return usable_window(Window(float(center), float(width), FUNCTIONS[function]))


def usable_window(window: Window) -> Window:
    """*window*.  Raises Problem 400 if its width is none for its function (PS3.3 section C.11.2.1.2)."""
    if not window.is_usable:
        raise Problem(400, "The width of a linear window is at least 1, that of any other above 0.")
    return window


def viewport_of(text: str, *, regions: bool) -> View | None:
    """Section 8.3.5.1.3: vw,vh and, of images that are no thumbnails, sx,sy,sw,sh that may be left empty."""
    if not text:
        return None
    sides, region = text.split(",")[:2], text.split(",")[2:]
    if not all(map(is_side, sides)) or len(sides) != 2 or len(region) > (4 if regions else 0):
        more = " and then sx,sy,sw,sh, if any" if regions else ""
        raise Problem(400, f"viewport is vw,vh{more}; its sides are from 1 to {MAX_SIDE} pixels.")
    if not all(part == "" or is_decimal(part) for part in region):
        raise Problem(400, "The region in viewport, sx,sy,sw,sh, is of decimal numbers.")
    left, top, across, down = (float(part) if part else 0.0 for part in (*region, "", "", "", "")[:4])
    return View(int(sides[0]), int(sides[1]), left, top, across or None, down or None)


def quality_of(text: str, name: str) -> int | None:
    """Section 8.3.5.1.2."""
    if text and not re.fullmatch(r"[1-9][0-9]?|100", text, re.ASCII):
        raise Problem(400, f"{name} is a number from 1 to 100.")
    return int(text) if text else None


def is_side(text: str) -> bool:
    """Whether that is a side of a viewport."""
    return re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) is not None and 1 <= int(text) <= MAX_SIDE


def is_decimal(text: str) -> bool:
    """Whether that is a decimal number."""
    return re.fullmatch(_DECIMAL, text, re.ASCII) is not None
