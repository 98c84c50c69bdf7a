"""Asker: puts questions to a server by C-FIND and QIDO-RS, whoever it is, and tells how long answers took.

A question is one of QIDO-RS, without its limit; by C-FIND the same is asked as keys to be matched, beside
those that answers are to have.  Each is encoded before the clock starts; it stops when the last answer has
been read, which is counted and not decoded.  TCP_QUICKACK is set, for some servers wait for an
acknowledgement between two parts of an answer.
"""

import contextlib
import http.client
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self, TypeAlias
from urllib.parse import quote

from pydicom.datadict import tag_for_keyword

from dicomscp.dicom.dictionary import public_vr
from dicomscp.dimse.query import encode_identifier
from tests.bench.instances import EXPLICIT_VR_LITTLE_ENDIAN
from tests.bench.lean_sender import STATUS, Association, SenderError, encode_request
from tests.gateway import Gateway
from tests.peers import Peer
from tests.processes import cpu_seconds

Parameters: TypeAlias = list[tuple[str, str]]
Ask: TypeAlias = Callable[[], int]  # ask once; the number of answers
Prepare: TypeAlias = Callable[[Parameters], Ask]  # encode a question

PAGE = 100  # answers of QIDO-RS; C-FIND gives all

_STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
_PENDING = (0xFF00, 0xFF01)
_ANSWERED = (
    "StudyInstanceUID",
    "PatientName",
    "PatientID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "StudyDescription",
    "ModalitiesInStudy",
)
_TIMEOUT_SECONDS = 60


class Spread(NamedTuple):
    """Of times in milliseconds: the median and the 95th percentile."""

    p50: float
    p95: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Spread":
        """Of at least one."""
        ordered = sorted(times)
        return cls(*(ordered[min(len(ordered) - 1, int(len(ordered) * part))] for part in (0.5, 0.95)))


def timed(ask: Ask) -> tuple[float, int]:
    """The milliseconds that it took, and the number of answers."""
    began = time.perf_counter()
    answers = ask()
    return (time.perf_counter() - began) * 1e3, answers


def used_seconds(server: Gateway | Peer) -> float:
    """The processor time that its living processes have used, in steps of 10 ms."""
    return sum(map(cpu_seconds, server.processes() if isinstance(server, Gateway) else server.pids()))


@contextlib.contextmanager
def find(port: int, called_ae: str) -> Iterator[Prepare]:
    """What asks by C-FIND, all on one association.  Asking raises SenderError if it ends without success."""
    association = Association(port, called_ae, "BENCH", (_STUDY_ROOT_FIND,))
    numbers = itertools.cycle(range(1, 1 << 16))

    def prepare(asked: Parameters) -> Ask:
        identifier = encode_identifier(_identifier(asked), EXPLICIT_VR_LITTLE_ENDIAN, ())
        pdus = encode_request(
            identifier, "", next(numbers), association.max_pdu_bytes, sop_class_uid=_STUDY_ROOT_FIND
        )
        return lambda: _ask_find(association, pdus)

    yield prepare
    association.release()


def _ask_find(association: Association, pdus: bytes) -> int:
    association.send(pdus)
    answers = 0
    while (status := association.response().get(STATUS)) in _PENDING:
        answers += 1
    if status != 0:
        raise SenderError(f"C-FIND: status {status}")
    return answers


def _identifier(asked: Parameters) -> dict[str, dict[str, object]]:
    identifier: dict[str, dict[str, object]] = {"00080052": {"vr": "CS", "Value": ["STUDY"]}}
    for keyword, value in (dict.fromkeys(_ANSWERED, "") | dict(asked)).items():
        tag = tag_for_keyword(keyword)
        if tag is None:
            raise ValueError(f"{keyword} is no keyword, so C-FIND cannot ask for it")
        vr = public_vr(tag)
        found = {"Alphabetic": value} if vr == "PN" else value
        identifier[f"{tag:08X}"] = {"vr": vr, "Value": [found] if value else []}
    return identifier


@contextlib.contextmanager
def qido(port: int, root: str) -> Iterator[Prepare]:
    """What asks by QIDO-RS for the first `PAGE` studies, below *root*, over a connection that is kept.

    It is made anew for what is asked behind the last preparation: some servers end one that rests for a
    second.  Asking raises SenderError for any status but 200 and 204.
    """
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_SECONDS)) as to:

        def prepare(asked: Parameters) -> Ask:
            to.close()
            # Orthanc takes parameters as they stand.
            parameters = [
                f"{name}={quote(value, safe='*^')}" for name, value in [*asked, ("limit", str(PAGE))]
            ]
            path = f"{root}/studies?{'&'.join(parameters)}"
            return lambda: _ask_qido(to, path)

        yield prepare


def _ask_qido(connection: http.client.HTTPConnection, path: str) -> int:
    try:
        if connection.sock is None:
            connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        connection.request("GET", path, headers={"Accept": "application/dicom+json"})
        response = connection.getresponse()
        body = response.read()
    except (http.client.HTTPException, OSError) as error:
        raise SenderError(f"QIDO-RS: {path}: {error!r}") from error
    if response.status not in (200, 204):
        raise SenderError(f"QIDO-RS: {path}: status {response.status}: {body[:200]!r}")
    return body.count(b'"0020000D"')  # each study has one


class Asking:
    """Asks the same questions in turn, one after the other, in a thread, from `with` until it is left."""

    def __init__(self, questions: Sequence[Ask]) -> None:
        self.times: list[float] = []  # milliseconds, of questions that were answered in time
        self._questions = questions
        self._enough = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        at = 0
        while not self._enough.is_set():
            try:
                took, _ = timed(self._questions[at % len(self._questions)])
            except Exception as error:  # noqa: BLE001 - of this thread's one unit of work; told by who waits
                self._failure = error
                return
            at += 1
            self.times.append(took)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
