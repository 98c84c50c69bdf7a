"""WADO-URI (PS3.18 section 9): one instance, named by parameters in place of a path.

    /wado?requestType=WADO&studyUID=...&seriesUID=...&objectUID=...&contentType=...

What it gives are the representations of WADO-RS: the instance as a Part 10 file (section 9.4), an image of
it, or the document that it encapsulates (section 9.5).  Without contentType the Accept header decides between
the file and images; who takes anything gets a JPEG (section 9.3).

Errors as the section has them: 400 for what is missing, not as it must be, or does not go together, and for a
frame that is not there, 404 for what is not held or has no pixels, 406 for what it cannot be given as.  To be
de-identified (`anonymize`), or shown as a presentation state says, is 406: answered otherwise than asked for,
it would do harm.
"""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Held
from dicomscp.dicom.identity import is_filable
from dicomscp.dicom.pixels import NoFrameError
from dicomscp.dicom.render import Window
from dicomscp.web.exchange import accepted, held_of, passed_over
from dicomscp.web.imaging import Picture, View, Which
from dicomscp.web.instances import Instances, dicom_offers
from dicomscp.web.media import DICOM, Offer, choose, ranges
from dicomscp.web.problem import Problem
from dicomscp.web.render import (
    IMAGES,
    MAX_SIDE,
    Rendering,
    is_decimal,
    is_document,
    is_side,
    quality_of,
    usable_window,
)

ADDRESS = "/wado"
UIDS = ("studyUID", "seriesUID", "objectUID")
FOR_FILES = ("transferSyntax",)
FOR_IMAGES = ("frameNumber", "imageQuality", "rows", "columns", "region", "windowCenter", "windowWidth")
REFUSED = ("anonymize", "presentationUID", "presentationSeriesUID")
PASSED_OVER = ("annotation", "imageAnnotation")
KNOWN = ("requestType", "contentType", "charset", *UIDS, *FOR_FILES, *FOR_IMAGES, *REFUSED, *PASSED_OVER)
"""Every parameter that is known."""


class WadoUri:
    """The one resource of WADO-URI."""

    def __init__(self, archive: Archive, instances: Instances, rendering: Rendering) -> None:
        self._archive, self._instances, self._rendering = archive, instances, rendering

    def routes(self) -> list[Route]:
        """The resource."""
        return [Route(ADDRESS, self.retrieve, methods=["GET"])]

    async def retrieve(self, request: Request) -> Response:
        """The instance as a file, or as an image or document."""
        told = _told(request)
        uids = _uids(told)
        _check_together(told)
        if named := [name for name in REFUSED if told.get(name)]:
            raise Problem(406, f"{named[0]} is not done here, and without it the answer would be another.")
        image = _image(told)
        (held,) = await to_thread.run_sync(held_of, self._archive, *uids)
        wanted = _wanted(request, told)
        offers = _offers(told, held)
        offer = choose(wanted, offers) if offers else None
        if is_document(held) and (offer is None or _takes_anything(told, wanted)):
            _check_absent(told, FOR_FILES, "a document")
            return await to_thread.run_sync(self._rendering.document, request, held, wanted)
        if offer is None:
            raise Problem(406, "The instance is not to be had as contentType and transferSyntax ask for.")
        if offer.media_type == DICOM:
            _check_absent(told, FOR_IMAGES, DICOM)
            response = await self._instances.give(request, [held], offer)
            if response.status_code in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                response.headers["content-type"] = DICOM  # without parameters here (section 9.1.3)
            return response
        _check_absent(told, FOR_FILES, offer.media_type)
        which: Which = "all" if offer.media_type == "image/gif" and not image.frames else "representative"
        picture = image._replace(media_type=offer.media_type, which=which)
        try:
            return await self._rendering.picture(request, held, picture, _warned(request, told))
        except Problem as problem:
            if isinstance(problem.__cause__, NoFrameError):  # section 9.5.2.1
                raise Problem(400, problem.detail) from problem
            raise


def _told(request: Request) -> dict[str, str]:
    """The parameters; each is given once."""
    told: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in told:
            raise Problem(400, f"{name} is given more than once.")
        told[name] = value.strip()
    if told.get("requestType") != "WADO":
        raise Problem(400, "requestType is WADO.")
    return told


def _uids(told: Mapping[str, str]) -> tuple[str, str, str]:
    study, series, sop = (told.get(name, "") for name in UIDS)
    for name, uid in zip(UIDS, (study, series, sop), strict=True):
        if not is_filable(uid):
            raise Problem(400, f"{name} is missing, or no UID.")
    return study, series, sop


def _wanted(request: Request, told: Mapping[str, str]) -> str:
    """The media types that are wanted: those that contentType lists, else those of the Accept header."""
    if not told.get("contentType"):
        return accepted(request)
    # A plus stands for itself in PS3.18 and for a space in forms.
    wanted = re.sub("(?<=[A-Za-z]) (?=[A-Za-z])", "+", told["contentType"])
    listed = ranges(wanted)
    if not listed:
        raise Problem(400, "contentType lists media types, such as application/dicom or image/jpeg.")
    if any(one.transfer_syntax_uid or one.charset for one in listed):
        raise Problem(400, "contentType has no parameters; transferSyntax and charset are their own.")
    return wanted


def _takes_anything(told: Mapping[str, str], wanted: str) -> bool:
    """Whether nothing is said of what is wanted: then it is shown, if it can be (section 9.3)."""
    return not (told.get("contentType") or told.get("transferSyntax")) and wanted.strip() in ("", "*/*")


def _offers(told: Mapping[str, str], held: Held) -> list[Offer]:
    """How *held* is given, but for documents as what they are: as a file, and as an image."""
    syntax = told.get("transferSyntax", "")
    if syntax and not re.fullmatch(r"[0-9.]{1,64}|\*", syntax, re.ASCII):
        raise Problem(400, "transferSyntax is a UID, or * for any.")
    files = [
        offer
        for offer in dicom_offers([held], single=True)
        if not offer.multipart and syntax in ("", "*", offer.transfer_syntax_uid)
    ]
    if (syntax and not told.get("contentType")) or is_document(held):
        return files
    images = [Offer(media_type) for media_type in IMAGES]
    return [*files, *images] if told.get("contentType") else [*images, *files]


def _check_together(told: Mapping[str, str]) -> None:
    """Raise Problem 400 for parameters of which one alone may be there (section 9.5.2.2)."""
    if (told.get("windowCenter") or told.get("windowWidth")) and (
        told.get("presentationUID") or told.get("presentationSeriesUID")
    ):
        raise Problem(400, "A window does not go with a presentation state.")


def _check_absent(told: Mapping[str, str], names: Iterable[str], media_type: str) -> None:
    """Raise Problem 400 if one of *names* is told, which have no meaning for *media_type*."""
    if given := [name for name in names if told.get(name)]:
        raise Problem(400, f"{given[0]} does not go with {media_type}.")


def _image(told: Mapping[str, str]) -> Picture:
    """The image that the parameters of section 9.5.1.2 ask for, its media type open."""
    frame = told.get("frameNumber", "")
    if frame and not re.fullmatch(r"0*[1-9][0-9]{0,8}", frame, re.ASCII):
        raise Problem(400, "frameNumber is one number, from 1.")
    return Picture(
        "",
        (int(frame),) if frame else (),
        window=_window(told),
        view=_view(told),
        quality=quality_of(told.get("imageQuality", ""), "imageQuality"),
    )


def _window(told: Mapping[str, str]) -> Window | None:
    center, width = told.get("windowCenter", ""), told.get("windowWidth", "")
    if not center and not width:
        return None
    if not (is_decimal(center) and is_decimal(width)):
        raise Problem(400, "windowCenter and windowWidth are decimal numbers, and given together.")
    return usable_window(Window(float(center), float(width)))


def _view(told: Mapping[str, str]) -> View | None:
    """The region, and rows and columns to fit into, one of which may be left to the other."""
    region, rows, columns = (told.get(name, "") for name in ("region", "rows", "columns"))
    if any(side and not is_side(side) for side in (rows, columns)):
        raise Problem(400, f"rows and columns are whole numbers from 1 to {MAX_SIDE}.")
    if not (region or rows or columns):
        return None
    left, top, right, bottom = _shares(region)
    return View(
        int(columns or MAX_SIDE),
        int(rows or MAX_SIDE),
        left,
        top,
        right - left,
        bottom - top,
        is_relative=True,
        enlarge=bool(rows or columns),
    )


def _shares(region: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom as shares of the image (section 9.5.1.2.5)."""
    if not region:
        return 0.0, 0.0, 1.0, 1.0
    parts = region.split(",")
    if len(parts) == 4 and all(map(is_decimal, parts)):
        left, top, right, bottom = map(float, parts)
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return left, top, right, bottom
    raise Problem(400, "region is xmin,ymin,xmax,ymax, each from 0.0 to 1.0, and not empty.")


def _warned(request: Request, told: Mapping[str, str]) -> dict[str, str]:
    """A Warning for what is asked for and not done."""
    names = (name for name in told if name not in KNOWN or (name in PASSED_OVER and told[name]))
    return passed_over(request, ADDRESS, names)
