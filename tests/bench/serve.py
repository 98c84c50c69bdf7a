"""Serve: DICOMweb, by the gateway, by Orthanc, and by nginx with the gateway's published files.

    requests   metadata, frames and searches, in requests a second
    ohif       a CT of large slices in OHIF, from its first request for data to correct pixels (`slices`)

There are two gateways: one as it is by default, that reads frames out of the Part 10 files, and one that
publishes them as files.  nginx serves the tree of the second with the shipped configuration; it is the bound,
and knows no search.  Each answers with what it has by default, but nginx with one worker: that is one process
of the gateway, and of Orthanc as many threads as it likes (50).

Servers take turns within a round; what counts is the median, over rounds, of the ratio within a round.
Orthanc deflates frames for whoever takes gzip, which costs it more than it saves here: what is asked of ours
as browsers ask is compared with the faster of its two ways.  Beside the rate stands the processor time that a
request took the server, and how busy each of those who asked was: near 1, it was not the server that bounded
the rate.
"""

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests import peers
from tests.bench import lean_sender, slices
from tests.bench.asker import used_seconds
from tests.bench.instances import new_study_uid, series_uid, sop_uid
from tests.bench.load import requests_per_second
from tests.bench.report import Report, Target, number
from tests.bench.store import ORTHANC, Receiver, bring_up, wait_published
from tests.gateway import Gateway

GATEWAY, FILES, NGINX = "dicomscp", "dicomscp, frames as files", peers.StaticNginx.name
SERVERS = (GATEWAY, FILES, ORTHANC, NGINX)
PARTS = ("requests", "ohif")

_JSON = ("Accept: application/dicom+json",)
_FRAME = ("Accept: multipart/related; type=application/octet-stream; transfer-syntax=*",)
_CODED = ("Accept-Encoding: gzip, deflate, br",)  # as browsers say it
_LARGE, _SMALL = "0.5 MB", "15 KB"
_FILED = {"publish.frames": "files"}


@dataclass(frozen=True, slots=True)
class Options:
    """What is held, how hard it is asked for, and where the data goes."""

    directory: Path
    rounds: int
    instances: int
    studies: int
    connections: int
    seconds: float
    openings: int
    servers: tuple[str, ...]
    only: tuple[str, ...]


class Question(NamedTuple):
    """What is asked; *path* is below the root of DICOMweb."""

    name: str
    path: str
    headers: tuple[str, ...]
    servers: tuple[str, ...] = SERVERS


class Place(NamedTuple):
    """Where a server answers."""

    server: Gateway | peers.Peer
    port: int
    root: str


class Turn(NamedTuple):
    """What a server did with a question in one round."""

    question: str
    server: str
    round: int
    rate: float
    bytes: float
    cpu_ms: float
    asker_busy: float


def run(options: Options, report: Report) -> None:
    """Measure what *options* ask for."""
    if "requests" in options.only:
        _requests(options, report)
    if "ohif" in options.only:
        slices.run(options.directory, options.instances, options.openings, report)


def _requests(options: Options, report: Report) -> None:
    """Fill the servers, then ask them in turns."""
    with contextlib.ExitStack() as stack:
        receivers = bring_up(stack, options.directory, options.servers, report)
        if FILES in options.servers or NGINX in options.servers:
            gateway = Gateway(options.directory / "files", settings=_FILED)
            receivers[FILES] = stack.enter_context(gateway)
        study_uid = new_study_uid()
        for name, receiver in receivers.items():
            _fill(receiver, study_uid, options)
            report.progress(f"{name} holds {options.instances} + {options.studies} instances")
        places = _places(receivers, report)
        if NGINX in options.servers and peers.StaticNginx.installed():
            nginx = stack.enter_context(peers.StaticNginx(options.directory / "nginx", gateway.root))
            places[NGINX] = Place(nginx, nginx.port, "/dicomweb")
        elif NGINX in options.servers:
            report.left_out(f"nginx is not installed (Debian package {peers.NGINX})")
        turns = list(_turns(_questions(study_uid), places, options, report))
    _summarize(turns, report)
    _judge(turns, report)


def _fill(receiver: Receiver, study_uid: str, options: Options) -> None:
    lean_sender.send(receiver.port, receiver.ae_title, _LARGE, [study_uid], options.instances)
    study_uids = [new_study_uid() for _ in range(options.studies)]
    for uid in study_uids:
        lean_sender.send_one(receiver.port, receiver.ae_title, _SMALL, uid)
    if isinstance(receiver, Gateway):
        wait_published(receiver, [study_uid], options.instances)
        wait_published(receiver, study_uids, 1)


def _places(receivers: Mapping[str, Receiver], report: Report) -> dict[str, Place]:
    places = {}
    for name, receiver in receivers.items():
        if isinstance(receiver, Gateway):
            places[name] = Place(receiver, receiver.web_port, "/dicomweb")
        elif isinstance(receiver, peers.Orthanc) and receiver.has_dicomweb():
            places[name] = Place(receiver, receiver.http_port, "/dicom-web")
        else:
            report.left_out(f"{name} has no DICOMweb (Debian package {peers.ORTHANC_WEB})")
    return places


def _questions(study_uid: str) -> list[Question]:
    series = f"/studies/{study_uid}/series/{series_uid(study_uid)}"
    frame = f"{series}/instances/{sop_uid(study_uid, 7)}/frames/1"
    searching = (GATEWAY, ORTHANC)
    return [
        Question(_METADATA, f"{series}/metadata", (*_JSON, *_CODED)),
        Question("series metadata, no gzip", f"{series}/metadata", _JSON),
        Question(_ONE_FRAME, frame, (*_FRAME, *_CODED)),
        Question(_WHOLE_FRAME, frame, _FRAME),
        Question(_LIST, "/studies?limit=100", (*_JSON, *_CODED), searching),
        Question(_ONE_STUDY, f"/studies?StudyInstanceUID={study_uid}", (*_JSON, *_CODED), searching),
    ]


_METADATA, _ONE_FRAME, _WHOLE_FRAME = "series metadata", "frame of 0.5 MB", "frame of 0.5 MB, no gzip"
_LIST, _ONE_STUDY = "study search, 100 answers", "study search by UID"
_TARGETS = (  # a question, who is to answer it so many times as often as whom, and by what questions that one
    (_METADATA, GATEWAY, 100.0, ORTHANC, (_METADATA,)),
    (_METADATA, GATEWAY, 0.4, NGINX, (_METADATA,)),
    (_ONE_FRAME, GATEWAY, 2.0, ORTHANC, (_ONE_FRAME, _WHOLE_FRAME)),
    (_ONE_FRAME, FILES, 4.0, ORTHANC, (_ONE_FRAME, _WHOLE_FRAME)),
    (_LIST, GATEWAY, 5.0, ORTHANC, (_LIST,)),
    (_ONE_STUDY, GATEWAY, 5.0, ORTHANC, (_ONE_STUDY,)),
)


def _turns(
    questions: list[Question], places: Mapping[str, Place], options: Options, report: Report
) -> Iterator[Turn]:
    for round_ in range(1, options.rounds + 1):
        for question in questions:
            for name in (name for name in places if name in question.servers):
                turn = _turn(question, name, places[name], round_, options)
                told = f"{number(turn.rate)}/s of {turn.bytes:,} bytes, {number(turn.cpu_ms)} ms of processor"
                report.progress(f"round {round_}: {question.name}, {name}: {told}")
                yield turn


def _turn(question: Question, name: str, place: Place, round_: int, options: Options) -> Turn:
    used = used_seconds(place.server)
    found = requests_per_second(
        place.port,
        place.root + question.path,
        question.headers,
        connections=options.connections,
        seconds=options.seconds,
    )
    cpu_ms = (used_seconds(place.server) - used) * 1e3 / found["answered"]
    return Turn(question.name, name, round_, found["rate"], found["bytes"], cpu_ms, found["busy"])


def _summarize(turns: list[Turn], report: Report) -> None:
    report.fact("requests", [turn._asdict() for turn in turns])
    names = list(dict.fromkeys(turn.server for turn in turns))
    sheets = {
        "Requests answered a second, median of rounds": lambda turn: turn.rate,
        "Processor time of the server a request, milliseconds": lambda turn: turn.cpu_ms,
        "How busy whoever asked was": lambda turn: turn.asker_busy,
    }
    for title, figure in sheets.items():
        sheet = report.sheet(title, "what", *names)
        for question in dict.fromkeys(turn.question for turn in turns):
            found = [[figure(turn) for turn in turns if turn[:2] == (question, name)] for name in names]
            sheet.rows.append([question, *(number(statistics.median(one)) if one else "-" for one in found)])


def _judge(turns: list[Turn], report: Report) -> None:
    rounds = sorted({turn.round for turn in turns})
    rates = {(turn.question, turn.server, turn.round): turn.rate for turn in turns}
    for question, ours, target, other, its_questions in _TARGETS:
        ratios = [
            rates[question, ours, round_] / max(rates[one, other, round_] for one in its_questions)
            for round_ in rounds
            if {(question, ours, round_), *((one, other, round_) for one in its_questions)} <= rates.keys()
        ]
        name = f"{question}, {ours} to {other}"
        report.fact(name, ratios)
        report.target(Target(name, statistics.median(ratios) if ratios else None, target))
