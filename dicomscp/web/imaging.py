"""Rendered frames as files of images, and images as frames, in the child that has the decoders, by Pillow.

What is shown of a frame, and how large, is a *view* (PS3.18 section 8.3.5.1.3): a region of it, scaled to fit
into a viewport without distortion.  A region that reaches beyond the image is black there.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from dicomscp.dicom.codestream import Codestream
from dicomscp.dicom.elements import EXPLICIT_LITTLE
from dicomscp.dicom.pixels import UNREADABLE, Pixels, TooLargeError, number
from dicomscp.dicom.render import Window, common_extremes, render
from dicomscp.errors import RefusedError, TransferSyntaxError

_FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/gif": "GIF"}
# Bit depths and colour types of PNG: of 16 bits Pillow gives 8 in colour, and in grey with transparency.
_DEEP_COLOUR = frozenset(bytes((16, colour_type)) for colour_type in (2, 4, 6))
_MODES = {"1": "L", "L": "L", "LA": "L", "I;16": "I;16"}  # else RGB
_UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_QUALITY = 90  # of JPEG unless it is asked for otherwise: no artefact that is seen at twice the size
_PNG_LEVEL = 4  # measured on CT: a tenth larger than 6 and in half the time
_FRAME_MILLISECONDS = 100  # where the instance does not tell
_LEAST_MILLISECONDS = 20  # less is shown as 100 by browsers


@dataclass(frozen=True, slots=True)
class View:
    """A viewport of *width* x *height* pixels, and the region to be shown in it.

    *left*, *top*, *across* and *down* are in pixels of the image, or shares of it if *is_relative*; None is
    up to the far edge.  Negative *across* or *down* turns the image over.  *enlarge*: a small image grows.
    """

    width: int
    height: int
    left: float = 0.0
    top: float = 0.0
    across: float | None = None
    down: float | None = None
    is_relative: bool = False
    enlarge: bool = True


Which = Literal["representative", "middle", "all"]


class Picture(NamedTuple):
    """An image to be made, of *frames*, or of the one that *which* says if none is named.

    representative: the one that the instance calls so, else the first; middle: likewise, else the middle one;
    all: every frame.  Several frames are an animated GIF.
    """

    media_type: str
    frames: tuple[int, ...] = ()
    which: Which = "representative"
    window: Window | None = None
    view: View | None = None
    quality: int | None = None


def samples_of(file: bytes, media_type: str, max_pixels: int) -> tuple[Codestream, int, Iterator[bytes]]:
    """What the samples of a PNG or GIF are, how many frames, and each frame; nothing is lost.

    PS3.18 section 10.5.2: colours of a palette become RGB, transparency is discarded, an animated GIF has its
    frames whole.  Raises TransferSyntaxError for what cannot be had without loss, TooLargeError for more than
    *max_pixels* in all, RefusedError for what is damaged.
    """
    kind = _FORMATS[media_type]
    if kind == "PNG" and file[24:26] in _DEEP_COLOUR:
        raise TransferSyntaxError("A PNG with 16 bits a colour or with transparency is not decoded here.")
    try:
        image = Image.open(BytesIO(file), formats=(kind,))
        frames = getattr(image, "n_frames", 1)
        mode = _MODES.get(image.mode, "RGB") if frames == 1 else "RGB"
    except _UNREADABLE_IMAGE as error:
        raise RefusedError(f"What is called a {kind} image cannot be read.") from error
    columns, rows = image.size
    if columns * rows * frames > max_pixels:
        raise TooLargeError(f"The image has more than {max_pixels} pixels.")
    samples, bits = (3, 8) if mode == "RGB" else (1, 16 if mode == "I;16" else 8)
    photometric = "RGB" if samples > 1 else "MONOCHROME2"
    described = Codestream(EXPLICIT_LITTLE, rows, columns, samples, bits, False, photometric)
    return described, frames, _samples(image, frames, mode)


def _samples(image: Image.Image, frames: int, mode: str) -> Iterator[bytes]:
    for frame in range(frames):
        try:
            image.seek(frame)
            # By way of RGBA a palette keeps the colours of what is transparent.
            shown = image.convert("RGBA") if mode == "RGB" and image.mode != "RGB" else image
            yield (shown if shown.mode == mode else shown.convert(mode)).tobytes()
        except _UNREADABLE_IMAGE as error:
            raise RefusedError("An image is damaged, or ends too early.") from error


def pictured(pixels: Pixels, picture: Picture, max_pixels: int) -> bytes:
    """The file of the image.  Raises RefusedError, and TooLargeError for more than *max_pixels* in all."""
    frames = picture.frames or _chosen(pixels, picture)
    columns, rows = number(pixels.header, "Columns", 0), number(pixels.header, "Rows", 0)
    size = _fitted(columns, rows, picture.view).size if picture.view else (columns, rows)
    if size[0] * size[1] * len(frames) > max_pixels:
        raise TooLargeError(
            f"The image would have more than {max_pixels} pixels; ask for fewer frames or a smaller viewport."
        )
    extremes = common_extremes(pixels, frames) if len(frames) > 1 and not picture.window else None
    first = _shown(render(pixels, frames[0], picture.window, extremes), picture.view, max_pixels)
    options: dict[str, Any] = {}
    if picture.media_type == "image/jpeg":
        # Colour at the resolution of the rest: stains and overlaid text are of coloured edges.
        options = {"quality": _QUALITY if picture.quality is None else picture.quality, "subsampling": 0}
    elif picture.media_type == "image/png":
        options = {"compress_level": _PNG_LEVEL}
    elif len(frames) > 1:
        others = (
            _shown(render(pixels, frame, picture.window, extremes), picture.view, max_pixels)
            for frame in frames[1:]
        )
        duration = _milliseconds(pixels)
        options = {"save_all": True, "append_images": others, "duration": duration, "loop": 0}
    buffer = BytesIO()
    try:
        first.save(buffer, _FORMATS[picture.media_type], **options)
    except UNREADABLE as error:
        raise RefusedError(f"The image cannot be written: {error}") from error
    return buffer.getvalue()


def _chosen(pixels: Pixels, picture: Picture) -> Sequence[int]:
    if picture.which == "all":
        return range(1, pixels.frames + 1)
    told = number(pixels.header, "RepresentativeFrameNumber", 0)
    if 1 <= told <= pixels.frames:
        return (told,)
    return ((pixels.there + 1) // 2,) if picture.which == "middle" else (1,)


class _Fitted(NamedTuple):
    """The region of an image that a view shows, as left, top, right and bottom, and how large it is shown."""

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    is_mirrored: bool
    is_upside_down: bool


def _fitted(columns: int, rows: int, view: View) -> _Fitted:
    scale = (columns, rows) if view.is_relative else (1, 1)
    left, top = view.left * scale[0], view.top * scale[1]
    across = columns - left if view.across is None else view.across * scale[0]
    down = rows - top if view.down is None else view.down * scale[1]
    width, height = abs(across), abs(down)
    box = (left, top, left + width, top + height)
    if (view.across is None and across <= 0) or (view.down is None and down <= 0) or not width * height:
        raise RefusedError("The region that is asked for has no pixels.")
    share = min(view.width / width, view.height / height)
    if not view.enlarge:
        share = min(share, 1.0)
    size = (max(1, round(width * share)), max(1, round(height * share)))
    return _Fitted(box, size, is_mirrored=across < 0, is_upside_down=down < 0)


def _shown(array: "np.typing.NDArray[Any]", view: View | None, max_pixels: int) -> Image.Image:
    image = Image.fromarray(array)
    if view is None:
        return image
    fitted = _fitted(image.width, image.height, view)
    box = fitted.box
    if box[0] < 0 or box[1] < 0 or box[2] > image.width or box[3] > image.height:
        image, box = _padded(image, box, max_pixels)
    image = image.resize(fitted.size, Image.Resampling.BICUBIC, box=box)
    if fitted.is_mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if fitted.is_upside_down else image


def _padded(
    image: Image.Image, box: tuple[float, float, float, float], max_pixels: int
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """*image* with as much black around it as *box* needs, and where *box* is then."""
    low = (min(0, int(np.floor(box[0]))), min(0, int(np.floor(box[1]))))
    high = (max(image.width, int(np.ceil(box[2]))), max(image.height, int(np.ceil(box[3]))))
    if (high[0] - low[0]) * (high[1] - low[1]) > max_pixels:
        raise TooLargeError("The region that is asked for is too far beyond the image.")
    padded = image.crop((*low, *high))
    return padded, (box[0] - low[0], box[1] - low[1], box[2] - low[0], box[3] - low[1])


def _milliseconds(pixels: Pixels) -> int:
    """How long each frame is shown (PS3.3 section C.7.6.5)."""
    told = _positive(pixels, "FrameTime")
    rate = _positive(pixels, "RecommendedDisplayFrameRate") or _positive(pixels, "CineRate")
    milliseconds = 1000 / rate if rate else told or _FRAME_MILLISECONDS
    return round(min(max(milliseconds, _LEAST_MILLISECONDS), 60_000))


def _positive(pixels: Pixels, keyword: str) -> float:
    try:
        value = float(pixels.header.get(keyword) or 0)
    except UNREADABLE:
        return 0.0
    return value if np.isfinite(value) and value > 0 else 0.0
