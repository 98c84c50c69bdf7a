"""Instances of the series that are being looked at, as the index had them within the last second.

A viewer that scrolls asks for frame after frame of a series.  To hand each question to another thread, and
to ask the index for one instance, costs several times what the frame does.  So once two frames of a series
are asked for within a second, what is held of all of it is asked for, and stands for a second: then a frame
of native pixel data that lies in the page cache is answered without waiting for anything.

Documents, which name the frames that are asked for, lag as long, unless `pipeline.quiet_seconds` is less.
What is not known here is asked of the index, as ever.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Held
from dicomscp.dicom.identity import InstanceKey
from dicomscp.errors import DicomscpError

_FRESH_SECONDS = 1.0
_LARGE_SECONDS = 60.0  # a series of too many instances is not asked for again so soon


class _Known(NamedTuple):
    """What is held of a series, by SOP Instance UID, and until when that is to be relied on."""

    until: float
    held: Mapping[str, Held]


@dataclass(slots=True)
class _Series:
    asked: float  # when a frame of it was asked for last, of those that were not answered from here
    known: _Known
    is_being_asked: bool = False


class Lately:
    """What is held of a few series; safe to share between threads."""

    def __init__(
        self,
        archive: Archive,
        *,
        most_instances: int = 2000,
        kept_series: int = 16,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """A series of *most_instances* takes the index 10 ms; each instance that is kept takes 600 bytes.

        *now* is in seconds from whenever.
        """
        self._archive, self._now = archive, now
        self._most_instances, self._kept_series = most_instances, kept_series
        self._series: OrderedDict[tuple[str, str], _Series] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, key: InstanceKey) -> Held | None:
        """The instance as it was held within the last second, if that is known here; waits for nothing."""
        series = self._series.get((key.study_uid, key.series_uid))
        if series is None:
            return None
        known = series.known
        return known.held.get(key.sop_uid) if known.until >= self._now() else None

    def asked_for(self, held: Held) -> None:
        """A frame of *held*, unknown to `of`, was asked for; blocking, it may ask for the whole series."""
        series = self._to_be_asked(held)
        if series is None:
            return
        known = series.known
        try:
            # If the index cannot tell now, it is asked for each frame, and says so to whoever waits for that.
            with contextlib.suppress(DicomscpError):
                known = self._ask(held.key)
        finally:
            with self._lock:
                series.known, series.is_being_asked = known, False

    def _to_be_asked(self, held: Held) -> _Series | None:
        """The series of *held*, marked, if it is to be asked for."""
        name, now = (held.key.study_uid, held.key.series_uid), self._now()
        with self._lock:
            series = self._series.pop(name, None) or _Series(now - 2 * _FRESH_SECONDS, _Known(0.0, {}))
            self._series[name] = series
            if len(self._series) > self._kept_series:
                self._series.popitem(last=False)
            is_looked_at = now - max(series.asked, series.known.until) < _FRESH_SECONDS
            series.asked = now
            is_known = series.known.until >= now
            if is_known or series.is_being_asked or not is_looked_at or held.leaving is not None:
                return None
            series.is_being_asked = True
            return series

    def _ask(self, key: InstanceKey) -> _Known:
        now = self._now()  # before the answer, which may take long
        found = self._archive.held(key.study_uid, key.series_uid, limit=self._most_instances + 1)
        if len(found) > self._most_instances:
            return _Known(now + _LARGE_SECONDS, {})
        return _Known(now + _FRESH_SECONDS, {one.key.sop_uid: one for one in found})
