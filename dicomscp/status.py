"""Status: how the gateway stands, told from what its processes leave under the root.

One report for the command `status` and for the page, whether serve runs or not.  Asking costs nobody else
anything: nothing is locked and nothing waited for.  What takes longer the more is held is asked again only
after a rest of twenty times what it took, so that however many ask, and however often, it stays a small share
of the machine; the rest is read each time.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import structlog
from pydicom.datadict import keyword_for_tag

from dicomscp.archive import journal
from dicomscp.archive.archive import rebuild_marker
from dicomscp.archive.index import Index
from dicomscp.archive.journal import Position, Progress
from dicomscp.errors import BusyError
from dicomscp.inbox import quarantined
from dicomscp.publisher import set_aside_studies
from dicomscp.telemetry import metrics, refusals
from dicomscp.telemetry.metrics import Received
from dicomscp.telemetry.rested import Rested

log = structlog.get_logger()

_CALLING_AES = 50  # those that sent last
_WINDOW_SECONDS = 5.0  # that a rate is taken over
_LOOK_SECONDS = 1.0
_LOOKS = 128


class Status:
    """The report on one root; safe to share between threads."""

    def __init__(
        self,
        root: Path,
        find_index: Callable[[], Index | None],
        *,
        reserve_bytes: int,
        attempts: int,
        listed: int,
    ) -> None:
        """*find_index* gives the index, or None where there is none yet; it may raise BusyError.

        A study is set aside after so many *attempts*.  Of each kind of trouble the last *listed* are told.
        """
        self._root, self._find_index = root, find_index
        self._reserve_bytes, self._attempts, self._listed = reserve_bytes, attempts, listed
        self._rates, self._lag = Rates(), Lag()
        self._held = Rested(self._indexed)
        self._set_aside = Rested(self._set_aside_studies)
        self._quarantined = Rested(lambda: quarantined(root / "quarantine", listed))

    def follow(self, stop: threading.Event) -> None:
        """Look at what comes in, each second, until *stop* is set: else neither rates nor lag are told."""
        while not stop.wait(_LOOK_SECONDS):
            try:
                self.look()
            except OSError as error:
                log.warning("status_not_followed", reason=str(error))

    def look(self) -> None:
        """Look at what came in until now."""
        self._rates.look(metrics.counted(self._root / "run" / "metrics").received)
        self._lag.look(_journals(self._root / "journal"))

    def report(self) -> dict[str, Any]:
        """What is held, queued, coming and wrong."""
        root, state = self._root, running(self._root)
        alive = bool(state and is_alive(int(state["pid"])))
        disk, journals = os.statvfs(root), _journals(root / "journal")
        taken = metrics.counted(root / "run" / "metrics")
        quarantined_files, last_quarantined = self._quarantined()
        set_aside, last_set_aside = self._set_aside()
        return {
            "root": str(root),
            "running": alive,
            "serve": state if alive else None,
            "parts": parts(root) if alive else [],
            "journal_waiting_bytes": sum(one.waiting_bytes for one in journals.values()),
            "journal_lag_seconds": self._lag.seconds(journals),
            "disk_free_bytes": disk.f_bavail * disk.f_frsize,
            "disk_size_bytes": disk.f_blocks * disk.f_frsize,
            "disk_reserve_bytes": self._reserve_bytes,
            "associations": _associations(root) if alive else 0,
            "calling_aes": self._calling_aes(taken.received),
            "refused": sum(taken.refused.values()),
            "rejected_associations": sum(taken.rejected.values()),
            "refusals": [
                {**one._asdict(), "first_at": _moment(one.first_at), "last_at": _moment(one.last_at)}
                for one in refusals.recent(root / "run" / "refusals", self._listed)
            ],
            "set_aside_studies": set_aside,
            "set_aside": last_set_aside,
            "quarantined": quarantined_files,
            "quarantine": [one._asdict() for one in last_quarantined],
            **self._held(),
        }

    def _calling_aes(self, received: Mapping[str, Received]) -> list[dict[str, Any]]:
        """What each calling AE sent since serve started; those that sent last come first."""
        rates = self._rates.told()
        latest = sorted(received.items(), key=lambda one: one[1].last_at, reverse=True)
        return [
            {
                "calling_ae": calling_ae,
                "instances": int(one.instances),
                "bytes": int(one.bytes),
                "last_at": _moment(one.last_at),
                **rates(calling_ae),
            }
            for calling_ae, one in latest[:_CALLING_AES]
        ]

    def _indexed(self) -> dict[str, Any]:
        """What the index says; nothing of one that is not there yet, of one that is away why."""
        try:
            index = self._find_index()
            if index is None:
                return {}
            told = {
                "held": index.counts()._asdict(),
                "due": index.count_due(),
                "extra_keys_not_askable": unknown_keys(index),
            }
        except BusyError as error:
            return {"index_away": str(error)}
        return told | ({"index_rebuilding": True} if rebuild_marker(self._root).exists() else {})

    def _set_aside_studies(self) -> tuple[int, list[dict[str, Any]]]:
        studies = set_aside_studies(self._root, self._attempts)
        names = ("study_uid", "attempts", "reason")
        return len(studies), [{name: one.get(name) for name in names} for one in studies[: self._listed]]


def unknown_keys(index: Index) -> list[str]:
    """The keywords of `index.extra_keys` that cannot be asked for until the index is made anew."""
    known = index.askable().extra
    unknown = frozenset[int]().union(*(tags - known[level] for level, tags in index.model.extra.items()))
    return sorted(map(keyword_for_tag, unknown))


class Rates:
    """How fast instances come: what was counted in the last seconds, the same for all who ask.

    Safe to share between threads.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._looks: deque[tuple[float, dict[str, Received]]] = deque()

    def look(self, received: Mapping[str, Received]) -> None:
        """By now so much has been *received* from each calling AE."""
        now = self._now()
        self._looks.append((now, dict(received)))
        while now - self._looks[0][0] > _WINDOW_SECONDS:
            self._looks.popleft()

    def told(self) -> Callable[[str], dict[str, float | None]]:
        """What gives the rates of each calling AE; None of them is known before the second look."""
        looks = list(self._looks)
        if len(looks) < 2 or self._now() - looks[-1][0] > _WINDOW_SECONDS:
            return lambda _: {"instances_per_second": None, "bytes_per_second": None}
        (began, first), (ended, last) = looks[0], looks[-1]

        def of(calling_ae: str) -> dict[str, float | None]:
            before, after = first.get(calling_ae, Received()), last.get(calling_ae, Received())
            seconds = ended - began
            return {
                "instances_per_second": round((after.instances - before.instances) / seconds, 1),
                "bytes_per_second": round((after.bytes - before.bytes) / seconds),
            }

        return of


class Lag:
    """For how long what was received is not in the index.  Safe to share between threads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._looks: deque[tuple[float, dict[str, Position]]] = deque()  # of which not all is applied
        self._has_looked = False

    def look(self, journals: Mapping[str, Progress]) -> None:
        """By now the journals are so far."""
        with self._lock:
            self._has_looked = True
            self._looks.append((self._now(), {name: one.synced for name, one in journals.items()}))
            if len(self._looks) > _LOOKS:  # it lags for long: every second one tells it well enough
                self._looks = deque(list(self._looks)[::2])
        self.seconds(journals)

    def seconds(self, journals: Mapping[str, Progress]) -> float | None:
        """How long ago, to a second, that came which is not yet in the index, as far as *journals* are now.

        0 if nothing waits.  None before the first look.
        """

        def is_applied(name: str, synced: Position) -> bool:
            now = journals.get(name)
            return now is None or not now.waiting_bytes or now.applied >= synced

        with self._lock:
            while self._looks and all(is_applied(*one) for one in self._looks[0][1].items()):
                self._looks.popleft()
            if not self._has_looked:
                return None
            return round(self._now() - self._looks[0][0], 1) if self._looks else 0.0


# ── what run/ says ───────────────────────────────────────────────────────────────────────────────


def running(root: Path) -> dict[str, Any] | None:
    """What run/state.json says, or None if there is none."""
    state = _read(root / "run" / "state.json")
    return state if isinstance(state, dict) else None


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_parts(root: Path, told: list[dict[str, Any]]) -> None:
    """Put into run/parts.json how the parts of the serve that runs are, for `parts`."""
    _write(root / "run" / "parts.json", told)


def parts(root: Path) -> list[dict[str, Any]]:
    """The parts of the serve that runs, each with its name and whether it is alive."""
    told = _read(root / "run" / "parts.json")
    return told if isinstance(told, list) else []


def write_running(root: Path, state: dict[str, Any]) -> None:
    """Put *state* into run/state.json, for `running`."""
    _write(root / "run" / "state.json", state)


def _write(path: Path, told: object) -> None:
    making = path.with_name(f".{path.name}.new")
    making.write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    making.replace(path)


def _read(path: Path) -> object:
    try:
        return orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


def _associations(root: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        data = (root / "run" / "associations").read_bytes()
        return sum(memoryview(data).cast("Q"))
    return 0


def _journals(folder: Path) -> dict[str, Progress]:
    """How far the journals of all writers are."""
    found = {}
    for directory in journal.writers(folder):
        with contextlib.suppress(FileNotFoundError):  # settled and gone meanwhile
            found[directory.name] = journal.progress(directory)
    return found


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
