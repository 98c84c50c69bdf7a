"""An archive in memory, with the doors that the DIMSE edge uses."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dicomscp.archive.archive import Claim, Source
from dicomscp.dicom.identity import Identity, read_identity
from dicomscp.dicom.matching import STANDARD, Query, matcher
from dicomscp.errors import BusyError, MismatchError


class MemoryIncoming:
    """A dataset on its way in; *limit* bytes fit."""

    def __init__(self, claim: Claim, source: Source, limit: int | None) -> None:
        self.claim, self.source, self._limit = claim, source, limit
        self.data = bytearray()
        self.discarded = False

    def write(self, data: memoryview) -> None:
        if self._limit is not None and len(self.data) + len(data) > self._limit:
            raise BusyError("No space left on device")
        self.data += data

    def discard(self) -> None:
        self.discarded = True


class MemoryArchive:
    """Holds datasets by SOP Instance UID, and answers queries from the *known* DICOM JSON objects."""

    def __init__(self, known: Iterable[dict[str, Any]] = (), *, limit: int | None = None) -> None:
        self.known, self.limit = list(known), limit
        self.model = STANDARD
        self.held: dict[str, bytes] = {}
        self.sources: list[Source] = []
        self.incoming: list[MemoryIncoming] = []
        self.fault: Exception | None = None  # what the next receive raises
        self.admit_fault: Exception | None = None
        self.gate = threading.Event()  # matches after the first wait for it
        self.gate.set()
        self.yielded = 0

    def receive(self, claim: Claim, source: Source) -> MemoryIncoming:
        if self.fault is not None:
            raise self.fault
        self.sources.append(source)
        self.incoming.append(MemoryIncoming(claim, source, self.limit))
        return self.incoming[-1]

    def admit(self, incoming: MemoryIncoming) -> Identity:
        if self.admit_fault is not None:
            raise self.admit_fault
        claim = incoming.claim
        identity = read_identity(
            bytes(incoming.data), claim.transfer_syntax_uid, total_bytes=len(incoming.data)
        )
        if (identity.key.sop_uid, identity.sop_class_uid) != (claim.sop_uid, claim.sop_class_uid):
            raise MismatchError("SOP Instance UID of dataset and request differ")
        self.held[claim.sop_uid] = bytes(incoming.data)
        return identity

    def find(self, query: Query, goes_on: Callable[[], bool] = lambda: True) -> Iterator[dict[str, Any]]:
        for one in filter(matcher(query), self.known):
            if not goes_on():  # before each page, as an archive asks
                return
            if self.yielded:
                assert self.gate.wait(10)
            self.yielded += 1
            yield one


def study(uid: str = "1.2.3", name: str = "Doe^John", **more: tuple[str, list[Any]]) -> dict[str, Any]:
    """A study as the index tells it; *more* attributes by tag, VR and values."""
    groups = dict(zip(("Alphabetic", "Ideographic", "Phonetic"), name.split("="), strict=False))
    known = {
        "00100010": {"vr": "PN", "Value": [groups]},
        "00100020": {"vr": "LO", "Value": ["4711"]},
        "0020000D": {"vr": "UI", "Value": [uid]},
        "00080061": {"vr": "CS", "Value": ["CT", "MR"]},
        "00201208": {"vr": "IS", "Value": [7]},
    }
    return known | {tag: {"vr": vr, "Value": values} for tag, (vr, values) in more.items()}


class Seats:
    """A count of associations of one process."""

    def __init__(self, limit: int = 100) -> None:
        self.limit, self.taken = limit, 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if self.taken >= self.limit:
                return False
            self.taken += 1
            return True

    def release(self) -> None:
        with self._lock:
            self.taken -= 1
