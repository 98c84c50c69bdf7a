"""Serve: DICOMweb requests a second, of the gateway, of Orthanc, and of nginx with the same bytes as files.

All hold one series of large instances and a number of studies of one small instance.  nginx is the bound: the
gateway's published metadata and a frame's bytes as plain files; it knows no search.
"""

import contextlib
import gzip
import json
import statistics
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests import peers
from tests.bench import lean_sender
from tests.bench.instances import new_study_uid, series_uid, sop_uid
from tests.bench.load import requests_per_second
from tests.bench.report import Report, number
from tests.bench.store import GATEWAY, ORTHANC, Receiver, bring_up, wait_published
from tests.gateway import Gateway

NGINX = peers.Nginx.name
SERVERS = (GATEWAY, ORTHANC, NGINX)

_JSON = ("Accept: application/dicom+json", "Accept-Encoding: gzip")
_PLAIN_JSON = ("Accept: application/dicom+json",)
_FRAME = ('Accept: multipart/related; type="application/octet-stream"',)
_LARGE, _SMALL = "0.5 MB", "15 KB"


@dataclass(frozen=True, slots=True)
class Options:
    """What is held, how hard it is asked for, and where the data goes."""

    directory: Path
    rounds: int
    instances: int
    studies: int
    connections: int
    seconds: float
    servers: tuple[str, ...]


class Question(NamedTuple):
    """What is asked; *path* is below the root of DICOMweb."""

    name: str
    path: str
    headers: tuple[str, ...]
    file: str | None  # what nginx is asked for in its place


class Place(NamedTuple):
    """Where a server answers."""

    port: int
    root: str


def run(options: Options, report: Report) -> None:
    """Fill the servers, then ask them in turns."""
    with contextlib.ExitStack() as stack:
        receivers = bring_up(stack, options.directory, options.servers, report)
        study_uid = new_study_uid()
        for name, receiver in receivers.items():
            _fill(receiver, study_uid, options)
            report.progress(f"{name} holds {options.instances} + {options.studies} instances")
        places = _places(receivers, report)
        if NGINX in options.servers and peers.Nginx.installed():
            nginx = stack.enter_context(
                _nginx(options.directory / "nginx", _series_metadata(places, study_uid))
            )
            places[NGINX] = Place(nginx.port, "")
        elif NGINX in options.servers:
            report.left_out(f"nginx is not installed (Debian package {peers.NGINX})")
        questions = _questions(study_uid)
        rates = _ask(questions, places, options, report)
    _summarize(questions, rates, report)


def _fill(receiver: Receiver, study_uid: str, options: Options) -> None:
    lean_sender.send(receiver.port, receiver.ae_title, _LARGE, [study_uid], options.instances)
    study_uids = [new_study_uid() for _ in range(options.studies)]
    for uid in study_uids:
        lean_sender.send_one(receiver.port, receiver.ae_title, _SMALL, uid)
    if isinstance(receiver, Gateway):
        wait_published(receiver, [study_uid], options.instances)
        wait_published(receiver, study_uids, 1)


def _places(receivers: dict[str, Any], report: Report) -> dict[str, Place]:
    places = {}
    if GATEWAY in receivers:
        places[GATEWAY] = Place(receivers[GATEWAY].web_port, "/dicomweb")
    if ORTHANC in receivers and peers.Orthanc.has_dicomweb():
        places[ORTHANC] = Place(receivers[ORTHANC].http_port, "/dicom-web")
    elif ORTHANC in receivers:
        report.left_out(f"Orthanc has no DICOMweb (Debian package {peers.ORTHANC_WEB})")
    return places


def _nginx(directory: Path, document: bytes) -> peers.Nginx:
    """One that has the metadata, both ways, and a frame."""
    nginx = peers.Nginx(directory)
    nginx.received.mkdir(parents=True)
    (nginx.received / "frame").write_bytes(bytes(512 * 512 * 2))
    (nginx.received / "metadata").write_bytes(document)
    (nginx.received / "metadata.gz").write_bytes(gzip.compress(document, 6))
    return nginx


def _series_metadata(places: dict[str, Place], study_uid: str) -> bytes:
    """The document that nginx is to serve, from whoever holds it; the gateway comes first."""
    if not places:
        return json.dumps([{"00080018": {"vr": "UI", "Value": [study_uid]}}] * 1000).encode()
    port, root = next(iter(places.values()))
    url = f"http://127.0.0.1:{port}{root}/studies/{study_uid}/series/{series_uid(study_uid)}/metadata"
    request = urllib.request.Request(url, headers={"Accept": "application/dicom+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def _questions(study_uid: str) -> list[Question]:
    series = f"/studies/{study_uid}/series/{series_uid(study_uid)}"
    frame = f"{series}/instances/{sop_uid(study_uid, 7)}/frames/1"
    return [
        Question("series metadata, gzip", f"{series}/metadata", _JSON, "/metadata.gz"),
        Question("series metadata, identity", f"{series}/metadata", _PLAIN_JSON, "/metadata"),
        Question("frame of 0.5 MB", frame, _FRAME, "/frame"),
        Question("study search, 100 answers", "/studies?limit=100", _PLAIN_JSON, None),
        Question("study search by UID", f"/studies?StudyInstanceUID={study_uid}", _PLAIN_JSON, None),
    ]


def _ask(
    questions: list[Question], places: dict[str, Place], options: Options, report: Report
) -> dict[tuple[str, str], list[float]]:
    rates: dict[tuple[str, str], list[float]] = {}
    for round_ in range(1, options.rounds + 1):
        for question in questions:
            for name, (port, root) in places.items():
                path = question.file if name == NGINX else root + question.path
                if path is None:
                    continue
                found = requests_per_second(
                    port, path, question.headers, connections=options.connections, seconds=options.seconds
                )
                rates.setdefault((question.name, name), []).append(found["rate"])
                told = f"{number(found['rate'])}/s of {found['bytes']:,} bytes"
                report.progress(f"round {round_}: {question.name}, {name}: {told}")
    return rates


def _summarize(questions: list[Question], rates: dict[tuple[str, str], list[float]], report: Report) -> None:
    names = [name for name in SERVERS if any(server == name for _, server in rates)]
    report.fact(
        "requests_per_second",
        {f"{question}, {server}": values for (question, server), values in rates.items()},
    )
    sheet = report.sheet("Requests answered a second, median of rounds", "what", *names)
    for question in questions:
        cells = [
            statistics.median(rates[question.name, name]) if (question.name, name) in rates else None
            for name in names
        ]
        sheet.rows.append([question.name, *("-" if cell is None else number(cell) for cell in cells)])
