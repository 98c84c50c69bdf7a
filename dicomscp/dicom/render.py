"""Frames as a display shows them, 8-bit grey or RGB, by the standard's pipeline (PS3.4 section N.2).

    decoded ─▶ modality LUT or rescale ─▶ VOI LUT or window ─▶ polarity ─▶ 8 bits

Of what tells the same twice, the functional groups of the frame (PS3.3 section C.7.6.16) win over those that
all frames share, and these over the dataset.  A VOI LUT is taken before a window, as pydicom and most viewers
do, and of several windows the first.  Grey without either is stretched from its least to its greatest value.
MONOCHROME1 and a Presentation LUT Shape of INVERSE both say that the least value is white: once, not twice.
Padding (C.7.5.1.1.2) is black and has no part in what is stretched.  Overlays, ICC profiles and the aspect
ratio of pixels are not applied.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from dicomscp.dicom.pixels import UNREADABLE, Array, Decoded, Pixels, number
from dicomscp.errors import RefusedError

Function = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]

_TABLE_VALUES = 1 << 16  # as many values are looked up; more are computed pixel by pixel


@dataclass(frozen=True, slots=True)
class Window:
    """What of the values is shown (PS3.3 section C.11.2.1.2)."""

    center: float
    width: float
    function: Function = "LINEAR"

    @property
    def is_usable(self) -> bool:
        """Whether the width is one that its function has a meaning for."""
        return self.width >= 1 if self.function == "LINEAR" else self.width > 0


class Extremes(NamedTuple):
    """The least and the greatest value, after rescaling, that is not padding."""

    least: float
    greatest: float


def render(
    pixels: Pixels, frame: int, window: Window | None = None, extremes: Extremes | None = None
) -> Array:
    """Frame number *frame* as unsigned 8-bit: rows x columns of grey, or rows x columns x 3 of RGB.

    *window* is in place of what the dataset tells, for grey.  Where there is neither, *extremes* are what is
    shown, or those of the frame.  Raises RefusedError for what cannot be decoded or has no such form.
    """
    decoded = pixels.decoded(frame)
    if decoded.photometric == "PALETTE COLOR":
        return _by_palette(decoded.array, pixels.header)
    if decoded.array.ndim == 3:
        return _colour(decoded, pixels.header)
    return _Grey(pixels.header, frame, decoded.array, little=pixels.little).shown(window, extremes)


def common_extremes(pixels: Pixels, frames: Iterable[int]) -> Extremes | None:
    """Those of all *frames* together, to show them alike; None if something else says what is shown."""
    found: list[Extremes] = []
    for frame in frames:
        decoded = pixels.decoded(frame)
        if decoded.array.ndim == 3 or decoded.photometric == "PALETTE COLOR":
            return None
        grey = _Grey(pixels.header, frame, decoded.array, little=pixels.little)
        if grey.voi is not None:
            return None
        found.append(grey.extremes())
    if not found:
        return None
    return Extremes(min(one.least for one in found), max(one.greatest for one in found))


class _Grey:
    """One frame of one sample a pixel."""

    def __init__(self, header: Dataset, frame: int, array: Array, *, little: bool) -> None:
        self._header, self._stored, self._little = header, array, little
        transformation = _macro(header, frame, "PixelValueTransformationSequence")
        self._modality = header if transformation is None else transformation
        voi = _macro(header, frame, "FrameVOILUTSequence")
        voi = header if voi is None else voi
        self.voi = _lut_of(voi, "VOILUTSequence", little=little) or _window_of(voi)
        """What the dataset says that is shown."""
        self._padding = _padding(header, array)

    def extremes(self) -> Extremes:
        values = self._stored if self._padding is None else self._stored[~self._padding]
        if not values.size:
            return Extremes(0, 0)
        if self._stored.dtype.kind == "f":
            values = values[np.isfinite(values)]
            ends = np.array([values.min(), values.max()]) if values.size else np.zeros(2)
        elif _lut_of(self._modality, "ModalityLUTSequence", little=self._little):
            ends = np.unique(values)  # a table need not go up
        else:
            ends = np.array([values.min(), values.max()])
        rescaled = self._rescaled(ends)
        return Extremes(float(rescaled.min()), float(rescaled.max()))

    def shown(self, window: Window | None, extremes: Extremes | None) -> Array:
        voi = window or self.voi or extremes or self.extremes()
        grey = self._looked_up(voi)
        if _is_inverse(self._header):
            grey = 255 - grey
        if self._padding is not None:
            grey[self._padding] = 0
        return grey

    def _looked_up(self, voi: "Window | _Lut | Extremes") -> Array:
        """The stored values through everything, by a table of those there can be if they are not too many."""
        stored = self._stored
        if stored.dtype.kind == "f" or not stored.size:
            return _levels(self._rescaled(stored), voi)
        least, greatest = int(stored.min()), int(stored.max())
        if greatest - least >= min(_TABLE_VALUES, max(stored.size, 256)):
            return _levels(self._rescaled(stored), voi)
        table = _levels(self._rescaled(np.arange(least, greatest + 1)), voi)
        return table[stored.astype(np.int64) - least]

    def _rescaled(self, values: Array) -> Array:
        """After the modality LUT, PS3.3 section C.11.1."""
        lut = _lut_of(self._modality, "ModalityLUTSequence", little=self._little)
        if lut is not None:
            return lut.of(values)
        slope, intercept = _first(self._modality, "RescaleSlope"), _first(self._modality, "RescaleIntercept")
        if slope in (None, 1.0) and intercept in (None, 0.0):
            return values
        return values * (1.0 if slope is None else slope) + (intercept or 0.0)


def _levels(values: Array, voi: "Window | _Lut | Extremes") -> Array:
    """*values* as levels from 0 to 255."""
    values = values.astype(np.float64)
    if isinstance(voi, Extremes):
        span = voi.greatest - voi.least
        shares = (values - voi.least) / span if span > 0 else np.zeros(values.shape)
    elif isinstance(voi, Window):
        shares = _windowed(values, voi)
    else:
        shares = voi.of(values) / voi.greatest
    levels = np.clip(np.nan_to_num(shares, nan=0.0), 0.0, 1.0) * 255.0
    return np.floor(levels + 0.5).astype(np.uint8)


def _windowed(values: Array, window: Window) -> Array:
    """As shares of the output range; below 0 and above 1 is outside the window (PS3.3 C.11.2.1.2)."""
    center, width = window.center, window.width
    if window.function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + np.exp(-4.0 * (values - center) / width))
    if window.function == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    if width == 1:
        return np.where(values <= center - 0.5, 0.0, 1.0)
    return (values - (center - 0.5)) / (width - 1.0) + 0.5


def _by_palette(array: Array, header: Dataset) -> Array:
    """PS3.3 section C.7.6.3.1.5 and .6, and C.7.9.2 for segmented tables.

    All entries are made first: those that say 16 bits and have 8 (some makers) are known by them all.
    """
    try:
        entries, first = (int(value) for value in header.RedPaletteColorLookupTableDescriptor[:2])
        table = apply_color_lut(np.arange(first, first + (entries or 1 << 16)), header)[..., :3]
        if table.dtype.itemsize > 1 and table.max() > 255:
            table = table >> 8
        return table.astype(np.uint8)[np.clip(array.astype(np.int64) - first, 0, len(table) - 1)]
    except UNREADABLE as error:
        raise RefusedError(f"The palette cannot be applied: {error}") from error


def _colour(decoded: Decoded, header: Dataset) -> Array:
    if decoded.photometric != "RGB" or decoded.array.shape[2] != 3:
        raise RefusedError(f"Pixels that are {decoded.photometric[:16]} cannot be rendered.")
    array = decoded.array
    if array.dtype.itemsize == 1:
        return array
    greatest = (1 << min(number(header, "BitsStored", 16), 32)) - 1
    return np.floor(np.clip(array / greatest, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _is_inverse(header: Dataset) -> bool:
    """Whether the least value is white (PS3.3 sections C.7.6.3.1.2 and C.11.6)."""
    return "MONOCHROME1" in str(header.get("PhotometricInterpretation")) or "INVERSE" in str(
        header.get("PresentationLUTShape")
    )


def _padding(header: Dataset, array: Array) -> Array | None:
    """Which pixels are padding; None if none are said to be."""
    value = _first(header, "PixelPaddingValue")
    if value is None or array.dtype.kind == "f":
        return None
    limit = _first(header, "PixelPaddingRangeLimit")
    least, greatest = sorted((value, value if limit is None else limit))
    padding: Array = (array >= least) & (array <= greatest)
    return padding if padding.any() and not padding.all() else None


def _macro(header: Dataset, frame: int, keyword: str) -> Dataset | None:
    """The item of that functional group macro for the frame (PS3.3 section C.7.6.16.1.1)."""
    try:
        of_frames = header.get("PerFrameFunctionalGroupsSequence") or ()
        shared = header.get("SharedFunctionalGroupsSequence") or ()
        own = of_frames[frame - 1 : frame]
        for group in (*own, *shared):
            if items := group.get(keyword):
                return Dataset(items[0])
    except UNREADABLE as error:
        raise RefusedError(f"The functional groups cannot be read: {error}") from error
    return None


class _Lut(NamedTuple):
    """A modality or VOI LUT (PS3.3 sections C.11.1.1 and C.11.2.1.1)."""

    entries: Array
    first: int
    greatest: int  # that an entry can be

    def of(self, values: Array) -> Array:
        """What the table has for *values*; those before and behind it have its ends."""
        places = np.rint(np.nan_to_num(values)).astype(np.int64) - self.first
        found: Array = self.entries[np.clip(places, 0, len(self.entries) - 1)]
        return found


def _lut_of(item: Dataset, keyword: str, *, little: bool) -> _Lut | None:
    """The first table of the sequence; None if there is none."""
    try:
        items = item.get(keyword) or ()
        if not items or items[0].get("LUTData") is None:
            return None
        told, first, bits = (int(value) for value in items[0].LUTDescriptor)
        count, data = (told & 0xFFFF) or 1 << 16, items[0].LUTData
        if isinstance(data, bytes):  # of bytes, where as many entries fit into no more
            words = np.dtype("u1" if len(data) <= count + count % 2 else "<u2" if little else ">u2")
            data = np.frombuffer(data, words, count=min(count, len(data) // words.itemsize))
        entries = np.atleast_1d(np.asarray(data)).astype(np.int64)
        if not len(entries) or not 1 <= bits <= 16:
            raise RefusedError("A lookup table is empty, or of entries that there cannot be.")
        return _Lut(entries, first, max((1 << bits) - 1, int(entries.max())))
    except UNREADABLE as error:
        raise RefusedError(f"A lookup table cannot be read: {error}") from error


def _window_of(item: Dataset) -> Window | None:
    center, width = _first(item, "WindowCenter"), _first(item, "WindowWidth")
    if center is None or width is None:
        return None
    told = str(item.get("VOILUTFunction")).strip()
    # A width below 1, as of doses in Gy, has no meaning in LINEAR: LINEAR_EXACT is what was meant.
    linear: Function = "LINEAR" if width >= 1 else "LINEAR_EXACT"
    functions: dict[str, Function] = {"LINEAR_EXACT": "LINEAR_EXACT", "SIGMOID": "SIGMOID"}
    window = Window(center, width, functions.get(told, linear))
    return window if window.is_usable else None


def _first(item: Dataset, keyword: str) -> float | None:
    """The first number of an element; None if there is none that is finite."""
    try:
        value = item.get(keyword)
        if value is not None and not isinstance(value, int | float | str | bytes):
            value = value[0] if len(value) else None
        found = float(value) if value not in (None, "") else None
    except UNREADABLE:
        return None
    return found if found is not None and np.isfinite(found) else None
