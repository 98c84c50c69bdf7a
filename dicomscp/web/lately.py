"""Instances of the series that are being looked at, as the index had them within the last second.

A viewer that scrolls asks for frame after frame of a series.  To hand each question to another thread, and
to ask the index for one instance, costs several times what the frame does.  So once two frames of a series
are asked for within a second, what is held of all of it is asked for, and stands for a second: then a frame
whose file lies in the page cache is answered without waiting for anything.

A second is less than documents lag, and those are what names the frames that are asked for.  What is not
known here is asked of the index, as ever.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Held
from dicomscp.dicom.identity import InstanceKey

_FRESH_SECONDS = 1.0
_LARGE_SECONDS = 60.0  # a series of too many instances is not asked for again so soon


@dataclass(slots=True)
class _Series:
    asked: float  # when a frame of it was asked for last, of those that were not answered from here
    until: float = 0.0  # when what stands here is not to be relied on any more
    held: Mapping[str, Held] = field(default_factory=dict)


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
        if series is None or series.until < self._now():
            return None
        return series.held.get(key.sop_uid)

    def asked_for(self, held: Held) -> None:
        """A frame of *held* was asked for and `of` did not know it; blocking, asks for its series if need be.

        Raises BusyError if the index cannot be asked now.
        """
        study_uid, series_uid, _ = held.key
        now = self._now()
        with self._lock:
            series = self._series.pop((study_uid, series_uid), None) or _Series(
                asked=now - 2 * _FRESH_SECONDS
            )
            self._series[study_uid, series_uid] = series
            if len(self._series) > self._kept_series:
                self._series.popitem(last=False)
            is_looked_at = now - series.asked < _FRESH_SECONDS
            series.asked = now
            if not is_looked_at or series.until > now or held.leaving is not None:
                return
            series.until = now + _FRESH_SECONDS  # whoever comes meanwhile does not ask, too
        found = self._archive.held(study_uid, series_uid)
        if len(found) > self._most_instances:
            found, series.until = [], now + _LARGE_SECONDS
        series.held = {one.key.sop_uid: one for one in found}
