"""Find: how long questions take, at the index and over loopback, of an archive that was made up.

The archive (`population`) is written into an index as filing writes it, and kept in the folder given with
`--index`, to be used again.  It has no instances, so only questions can be put to a gateway that serves it.
Each kind of question is asked with other values each time, in rounds; what counts is the 95th percentile of a
round, and of those the median over rounds.
"""

import contextlib
import gc
import http.client
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from sqlalchemy import update

from dicomscp.archive import sql, sqlite
from dicomscp.archive.index import Index
from dicomscp.archive.tables import study
from dicomscp.config import Config
from dicomscp.daemon import make_publisher
from dicomscp.dicom.matching import Level, query_from_parameters
from dicomscp.dimse import client
from tests.bench import population
from tests.bench.report import Report, Target, number
from tests.gateway import Gateway

_BATCH = 500  # arrivals in a transaction, as filing takes them
_PAGE = 100  # answers
_FACTS = "population.json"
_VERSION = 1  # of what the population is made of
# C-FIND has no limit, so it would give all; and its options are negotiated, not asked for.
_OF_QIDO = ("all", "*MIT*", "dates", "dates and times", "SMITH, fuzzy")
_MODALITIES = ("CT", "MR", "DX", "US", "MG", "PT", "SR")

Parameters = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Options:
    """How large the archive is, where it is kept, and how often each kind of question is asked."""

    directory: Path
    index: Path | None
    studies: int
    rounds: int
    questions: int


class Kind(NamedTuple):
    """A kind of question, as QIDO-RS puts it, and the milliseconds it may take."""

    name: str
    asked: list[Parameters]
    index_ms: float | None
    loopback_ms: float | None


def run(options: Options, report: Report) -> None:
    """Build the archive unless it is there; ask."""
    folder = (options.index or options.directory / "archive").resolve()
    facts = build(folder, options.studies, report)
    report.fact("archive", facts)
    sheet = report.sheet("The archive", "what", "figure")
    sheet.rows += [[name, number(figure)] for name, figure in facts.items()]
    _ingest(options, facts, report)
    index = _open(folder, report)
    gc.collect()
    gc.freeze()  # as a server does, or each question pays for going over the archive's names again
    kinds = _kinds(options)
    _ask("At the index", kinds, options, lambda asked: _find(index, asked), report, at="index")
    _paging(index, options, report)
    # What has no value for a key is not to match it: it would be most of what C-FIND answers here.
    with Gateway(folder, settings={"query.wait_seconds": 5, "query.match_unknown": False}) as gateway:
        _start_up(gateway, report)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", gateway.web_port)) as connection:
            _ask("QIDO-RS", kinds, options, lambda asked: _qido(connection, asked), report, at="loopback")
        with _association(gateway) as ask:
            narrow = [kind for kind in kinds if kind.name not in _OF_QIDO]
            _ask("C-FIND", narrow, options, ask, report, at="loopback")


# ── the archive ──────────────────────────────────────────────────────────────────────────────────


def build(folder: Path, studies: int, report: Report) -> dict[str, float]:
    """What building the index of so many studies under *folder* cost; it is built unless it is there."""
    facts_of = folder / _FACTS
    wanted = {"version": _VERSION, "studies": studies, "schema": int(sql.HEAD)}
    with contextlib.suppress(FileNotFoundError, ValueError):
        facts: dict[str, float] = json.loads(facts_of.read_text())
        if facts.items() >= wanted.items():
            return facts
    folder.mkdir(parents=True, exist_ok=True)
    facts_of.unlink(missing_ok=True)
    for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    engine = sqlite.open_engine(folder / "index.sqlite", read_only=False)
    index = Index(engine)
    instances, spent = 0, 0.0
    for batch in _batches(population.arrivals(studies)):
        began = time.process_time()
        index.apply(batch, {})
        spent += time.process_time() - began
        instances += len(batch)
        if instances % 50_000 < _BATCH:
            report.progress(f"{instances:,} instances, {spent / instances * 1e6:.0f} us of CPU each")
    # Nothing is due, for there is nothing to compile.
    make_publisher(Config(root=folder), index, folder / "dicomweb").adopt()
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(update(study).values(published=study.c.changes))
    index.make_durable()
    engine.dispose()
    size = (folder / "index.sqlite").stat().st_size
    facts = {
        **wanted,
        "instances": instances,
        "CPU us an instance": spent / instances * 1e6,
        "MB": size / 1e6,
    }
    facts_of.write_text(json.dumps(facts))
    return facts


def _batches(arrivals: Iterator[population.Arrival]) -> Iterator[list[population.Arrival]]:
    while batch := list(itertools.islice(arrivals, _BATCH)):
        yield batch


def _ingest(options: Options, facts: dict[str, float], report: Report) -> None:
    """What the same arrivals cost in an empty index, beside what they cost on average while it grew."""
    folder = options.directory / "empty"
    folder.mkdir()
    index = Index(sqlite.open_engine(folder / "index.sqlite", read_only=False))
    arrivals, spent = population.arrivals(max(1, options.studies // 50)), []
    for batch in _batches(arrivals):
        began = time.process_time()
        index.apply(batch, {})
        spent.append((time.process_time() - began) / len(batch))
    ratio = statistics.mean(spent) * 1e6 / facts["CPU us an instance"]
    report.target(Target("ingest, the empty index's cost to the average while it grew", ratio, 0.8))


def _open(folder: Path, report: Report) -> Index:
    began = time.perf_counter()
    index = Index(sqlite.open_engine(folder / "index.sqlite", read_only=True))
    index.name()
    opened = time.perf_counter() - began
    report.target(Target("opening the index", opened, 0.5, "s", at_most=True))
    return index


# ── questions ────────────────────────────────────────────────────────────────────────────────────


def _kinds(options: Options) -> list[Kind]:
    """Questions of each kind, none of them twice if the archive is large."""
    chance = random.Random("questions")
    some = population.some_studies(options.studies, options.questions)
    families = population.family_names()[: options.questions]
    days = chance.choices(range(population.DAYS - 400), k=options.questions)
    spans = [_span(day, chance.choice((0, 6, 30, 365))) for day in days]
    modalities = chance.choices(_MODALITIES, k=options.questions)
    parts = [name[1:4].lower() for name in families]
    return [
        Kind("Study Instance UID", [[("StudyInstanceUID", one.study_uid)] for one in some], 5, 20),
        Kind("Patient ID", [[("PatientID", one.patient.id)] for one in some], 5, 20),
        Kind(
            "Accession Number",
            [[("AccessionNumber", one.accession_number)] for one in some if one.accession_number],
            5,
            20,
        ),
        Kind("SMITH*", [[("PatientName", f"{name.upper()}*")] for name in families], 5, 20),
        Kind(
            "modality and dates",
            [
                [("ModalitiesInStudy", modality), ("StudyDate", span)]
                for modality, span in zip(modalities, spans, strict=True)
            ],
            5,
            20,
        ),
        Kind("dates", [[("StudyDate", span)] for span in spans], None, None),
        Kind(
            "dates and times",
            [[("StudyDate", span), ("StudyTime", "0700-1600")] for span in spans],
            None,
            None,
        ),
        Kind(
            "SMITH, fuzzy",
            [[("PatientName", name), ("fuzzymatching", "true")] for name in families],
            20,
            20,
        ),
        Kind("*MIT*", [[("PatientName", f"*{part}*")] for part in parts], 200, 200),
        Kind("*MIT*, none", [[("PatientName", f"*{part}qx*")] for part in parts[:50]], 200, 200),
        Kind("all", [[]] * min(50, options.questions), None, None),
    ]


def _span(day: int, days: int) -> str:
    first = population.FIRST_DAY + timedelta(days=day)
    return f"{first:%Y%m%d}-{first + timedelta(days=days):%Y%m%d}"


def _find(index: Index, asked: Parameters) -> int:
    query, _ = query_from_parameters(Level.STUDY, asked, max_results=_PAGE)
    return len(list(index.find(query)))


def _qido(connection: http.client.HTTPConnection, asked: Parameters) -> int:
    """The answers to a request of QIDO-RS, over a connection that is kept."""
    parameters = "&".join(f"{name}={quote(value)}" for name, value in [*asked, ("limit", str(_PAGE))])
    connection.request("GET", f"/dicomweb/studies?{parameters}", headers={"Accept": "application/dicom+json"})
    response = connection.getresponse()
    body = response.read()
    if response.status not in (200, 204):
        raise RuntimeError(f"QIDO-RS: status {response.status}: {body[:200]!r}")
    return len(json.loads(body)) if body else 0


@contextlib.contextmanager
def _association(gateway: Gateway) -> Iterator[Callable[[Parameters], int]]:
    """What asks by C-FIND, all on one association; there all answers are given."""
    peer = client.Peer(gateway.ae_title, "127.0.0.1", gateway.port)
    root = next(uid for uid, name in client.ROOTS.items() if name == "STUDY")
    contexts = [(root, (client._EXPLICIT, client._IMPLICIT))]
    with client._Requestor(peer, contexts, calling_ae="BENCH", timeout_seconds=60) as association:
        context_id = association.context_of(root)
        syntax = association.syntaxes[context_id]

        def ask(asked: Parameters) -> int:
            identifier = client._identifier("STUDY", dict(asked))
            encoded = client.encode_identifier(identifier, syntax, ())
            association.request(context_id, client.C_FIND_RQ, root, encoded)
            answers = 0
            while association.response()[0] in (client.PENDING, client.PENDING_UNSUPPORTED_KEYS):
                answers += 1
            return answers

        yield ask


def _ask(
    title: str,
    kinds: Sequence[Kind],
    options: Options,
    ask: Callable[[Parameters], int],
    report: Report,
    *,
    at: str,
) -> None:
    """Ask all kinds in rounds; the median over rounds of each percentile goes into the report."""
    took: dict[str, list[list[float]]] = {kind.name: [] for kind in kinds}
    answers: dict[str, list[int]] = {kind.name: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            times = []
            for asked in kind.asked:
                began = time.perf_counter()
                answers[kind.name].append(ask(asked))
                times.append((time.perf_counter() - began) * 1e3)
            took[kind.name].append(sorted(times))
    sheet = report.sheet(f"{title}, milliseconds", "question", "answers", "median", "p95")
    for kind in kinds:
        p50, p95 = (statistics.median(_at(times, part) for times in took[kind.name]) for part in (0.5, 0.95))
        mean = statistics.mean(answers[kind.name])
        sheet.rows.append([kind.name, f"{mean:.1f}", f"{p50:.2f}", f"{p95:.2f}"])
        report.progress(f"{title}: {kind.name}: median {p50:.2f} ms, p95 {p95:.2f} ms, {mean:.1f} answers")
        report.fact(f"{title}: {kind.name}", {"p50_ms": p50, "p95_ms": p95, "answers": mean})
        bound = kind.index_ms if at == "index" else kind.loopback_ms
        if bound is not None:
            report.target(Target(f"{title}: {kind.name}, p95", p95, bound, "ms", at_most=True))


def _at(times: Sequence[float], part: float) -> float:
    return times[min(len(times) - 1, int(len(times) * part))]


def _paging(index: Index, options: Options, report: Report) -> None:
    """A page in the middle beside the first one, in turns."""
    middle = options.studies // 2
    for name, asked, offset in (
        ("all", [], middle),
        ("DX", [("ModalitiesInStudy", "DX")], min(middle, options.studies // 4)),
    ):
        query, _ = query_from_parameters(Level.STUDY, asked, max_results=_PAGE)
        first, later = [], []
        for _ in range(20 * options.rounds):
            for times, one in ((first, query), (later, replace(query, offset=offset))):
                began = time.perf_counter()
                if len(list(index.find(one))) != _PAGE:
                    raise RuntimeError(f"there is no page of {name} at {offset}")
                times.append(time.perf_counter() - began)
        ratio = statistics.median(later) / statistics.median(first)
        report.target(Target(f"page of {name} at {offset:,} to the first", ratio, 3, at_most=True))


def _start_up(gateway: Gateway, report: Report) -> None:
    """How long serve takes until it is ready when all it reads is in the page cache."""
    gateway.stop()
    began = time.perf_counter()
    gateway.start()
    report.target(Target("start-up of serve", time.perf_counter() - began, 3, "s", at_most=True))
    report.fact("cores", os.cpu_count())
