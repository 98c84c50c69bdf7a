"""Find: how long questions take, at the index and over loopback, of an archive that was made up.

The archive (`population`) is written into an index as filing writes it, and kept in the folder given with
`--index`, to be used again.  Each kind of question is asked with other values each time, in rounds; what
counts is the 95th percentile of a round, and of those the median over rounds.  What SQLite's file has is
read once before, as a gateway that has been asked for a while has it in memory.

    ingest     what arrivals cost that archive, and an empty one in turns
    index      questions, at the index itself
    paging     a page in the middle beside the first
    start      how long serve takes until it is ready
    loopback   questions by QIDO-RS and C-FIND
    sending    questions while four associations send (`sending`)
    beside     questions to Orthanc and dcmqrscp as well, of a smaller archive (`beside`)
"""

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

from dicomscp.archive.index import Arrival, Index
from dicomscp.dicom.matching import Level, Query, query_from_parameters
from tests.bench import archive, asker, beside, population, sending
from tests.bench.archive import Archive
from tests.bench.asker import PAGE, Parameters, Prepare, Spread
from tests.bench.report import Report, Target, number
from tests.gateway import Gateway

PARTS = ("ingest", "index", "paging", "start", "loopback", "sending", "beside")

_INDEX = "At the index"
_OF_GATEWAY = ("start", "loopback", "sending")
_FEW = 100  # answers
# C-FIND has no limit, so it would give all; and its options are negotiated, not asked for.
_OF_QIDO = ("all", "SMITH*", "*MIT*", "dates", "dates and times", "SMITH, fuzzy")
_NARROW = ("Study Instance UID", "Patient ID", "Accession Number", "SMITH^J*", "modality and dates")
_BESIDE = (*_NARROW, "dates", "*MITH^J*")
_MODALITIES = ("CT", "MR", "DX", "US", "MG", "PT", "SR")


@dataclass(frozen=True, slots=True)
class Options:
    """How large the archive is, where it is kept, and how often each kind of question is asked."""

    directory: Path
    index: Path | None
    database: str
    studies: int
    rounds: int
    questions: int
    instances: int
    beside: int
    only: tuple[str, ...]


class Kind(NamedTuple):
    """A kind of question, as QIDO-RS puts it, and the milliseconds it may take."""

    name: str
    asked: list[Parameters]
    index_ms: float | None
    loopback_ms: float | None


def run(options: Options, report: Report) -> None:
    """Build the archive unless it is there; ask."""
    here = options.directory.resolve()
    keep = options.index is not None and options.database != archive.TEMPORARY
    folder = options.index.resolve() if options.index and keep else here / "archive"
    if set(options.only) != {"beside"}:
        with archive.at(folder, options.database, keep=keep) as held:
            _of_large(held, options, report)
    if "beside" in options.only:
        beside.run(here, options.beside, options.rounds, lambda studies: _beside(studies, options), report)


def _of_large(held: Archive, options: Options, report: Report) -> None:
    """The parts that are about the large archive."""
    facts = archive.build(held, options.studies, report)
    report.fact("archive", {**facts, "backend": held.backend})
    sheet = report.sheet(f"The archive, in {held.backend}", "what", "figure")
    sheet.rows += [[name, number(figure)] for name, figure in facts.items()]
    if "ingest" in options.only:
        _ingest(held, options, report)
    kinds = _kinds(options.studies, options.questions)
    if {"index", "paging"} & set(options.only):
        _at_index(held, kinds, options, report)
    if set(_OF_GATEWAY) & set(options.only):
        with Gateway(held.folder, settings=held.settings) as gateway:
            _over_loopback(held, gateway, kinds, options, report)


def _at_index(held: Archive, kinds: Sequence[Kind], options: Options, report: Report) -> None:
    began = time.perf_counter()
    engine = held.open_engine(read_only=True)
    index = Index(engine)
    index.name()
    report.target(Target("opening the index", time.perf_counter() - began, 0.5, "s", at_most=True))
    held.read_through()
    gc.collect()
    gc.freeze()  # as a server does, or each question pays for going over the archive's names again
    if "index" in options.only:
        _ask(
            _INDEX,
            kinds,
            lambda asked: lambda: _find(index, asked),
            report,
            rounds=options.rounds,
            cpu=time.process_time,
        )
    if "paging" in options.only:
        _paging(index, options, report)
    engine.dispose()


def _over_loopback(
    held: Archive, gateway: Gateway, kinds: Sequence[Kind], options: Options, report: Report
) -> None:
    if "start" in options.only:
        _start_up(gateway, report)
    if "loopback" in options.only:
        ask = functools.partial(
            _ask, report=report, rounds=options.rounds, cpu=functools.partial(asker.used_seconds, gateway)
        )
        with asker.qido(gateway.web_port, "/dicomweb") as prepare:
            ask("QIDO-RS", kinds, prepare)
        with asker.find(gateway.port, gateway.ae_title) as prepare:
            ask("C-FIND", [kind for kind in kinds if kind.name not in _OF_QIDO], prepare)
    if "sending" in options.only:
        narrow = [kind.asked for kind in kinds if kind.name in _NARROW]
        sending.run(held, gateway, narrow, report, rounds=options.rounds, instances=options.instances)


def _ingest(held: Archive, options: Options, report: Report) -> None:
    """What arrivals cost an empty index, beside what they cost this one, batch by batch in turns.

    Cost is processor time, which others' work leaves alone, where this process does all the work.
    """
    clock = time.perf_counter if held.url else time.process_time
    some = max(300, options.studies // 100)
    new = list(population.arrivals(some, start=options.studies))
    ratios = []
    engine = held.open_engine(read_only=False)
    archive.take_back(engine, new)  # which an earlier run left, if it was cut short
    for round_ in range(options.rounds):
        with held.empty_beside(options.directory / f"empty{round_}") as empty:
            other = empty.open_engine(read_only=False)
            of_empty, of_this = _apply_in_turns(Index(other), Index(engine), new, clock)
            other.dispose()
        archive.take_back(engine, new)
        ratios.append(of_empty / of_this)
        told = ", ".join(f"{took / len(new) * 1e6:.0f} us" for took in (of_empty, of_this))
        report.progress(f"an arrival at the empty index, at this one: {told}")
    engine.dispose()
    report.fact("ingest, empty to this", ratios)
    name = f"ingest with {options.studies:,} studies, to the speed of an empty index"
    report.target(Target(name, statistics.median(ratios), 0.8))


def _apply_in_turns(
    empty: Index, full: Index, arrivals: Sequence[Arrival], clock: Callable[[], float]
) -> list[float]:
    """The seconds that each took for all *arrivals*."""
    took = [0.0, 0.0]
    for turn, batch in enumerate(archive.batches(arrivals)):
        for at in ((0, 1), (1, 0))[turn % 2]:
            began = clock()
            (empty, full)[at].apply(batch, {})
            took[at] += clock() - began
    return took


def _beside(studies: int, options: Options) -> list[tuple[str, list[Parameters]]]:
    kinds = _kinds(studies, min(options.questions, _FEW), accents=False)
    return [(kind.name, kind.asked) for kind in kinds if kind.name in _BESIDE]


# ── questions ────────────────────────────────────────────────────────────────────────────────────


def _kinds(studies: int, questions: int, *, accents: bool = True) -> list[Kind]:
    """Questions of each kind about an archive of so many *studies*, none of them twice if it is large.

    Without *accents* by name only for names that all servers find.
    """
    chance = random.Random("questions")
    some = population.some_studies(studies, questions)
    families = population.family_names()[:questions]
    prefixes = population.name_prefixes(studies, questions, _FEW, accents=accents)
    days = chance.choices(range(population.DAYS - 400), k=questions)
    spans = [_of_days(day, chance.choice((0, 6, 30, 365))) for day in days]
    modalities = chance.choices(_MODALITIES, k=questions)
    few = population.spans(studies, modalities, _FEW)
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
        Kind("SMITH^J*", [[("PatientName", f"{prefix}*")] for prefix in prefixes], 5, 20),
        Kind(
            "modality and dates",
            [
                [("ModalitiesInStudy", modality), ("StudyDate", _span(*span))]
                for modality, span in zip(modalities, few, strict=True)
            ],
            5,
            20,
        ),
        Kind("SMITH*", [[("PatientName", f"{name.upper()}*")] for name in families], 5, 20),
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
        Kind("*MITH^J*", [[("PatientName", f"*{prefix[1:]}*")] for prefix in prefixes], 200, 200),
        Kind("*MIT*", [[("PatientName", f"*{part}*")] for part in parts], 200, 200),
        Kind("*MIT*, none", [[("PatientName", f"*{part}qx*")] for part in parts[:50]], 200, 200),
        Kind("all", [[]] * min(50, questions), None, None),
    ]


def _of_days(day: int, days: int) -> str:
    first = population.FIRST_DAY + timedelta(days=day)
    return _span(first, first + timedelta(days=days))


def _span(first: date, last: date) -> str:
    return f"{first:%Y%m%d}-{last:%Y%m%d}"


def _find(index: Index, asked: Parameters) -> int:
    query, _ = query_from_parameters(Level.STUDY, asked, max_results=PAGE)
    return _page(index, query)


def _ask(
    title: str,
    kinds: Sequence[Kind],
    prepare: Prepare,
    report: Report,
    *,
    rounds: int,
    cpu: Callable[[], float],
) -> None:
    """Ask all kinds in rounds; the median over rounds of each percentile goes into the report.

    *cpu* tells the seconds of processor time that whoever answers has used: others' work leaves that alone.
    """
    spreads: dict[str, list[Spread]] = {kind.name: [] for kind in kinds}
    spent: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    answers: dict[str, list[int]] = {}
    for _ in range(rounds):
        for kind in kinds:
            asks = list(map(prepare, kind.asked))
            began = cpu()
            times, counts = zip(*map(asker.timed, asks), strict=True)
            spent[kind.name].append((cpu() - began) * 1e3 / len(asks))
            spreads[kind.name].append(Spread.of(times))
            answers[kind.name] = list(counts)
    sheet = report.sheet(f"{title}, milliseconds", "question", "answers", "most", "median", "p95", "CPU")
    for kind in kinds:
        p50, p95 = map(statistics.median, zip(*spreads[kind.name], strict=True))
        mean, most = statistics.mean(answers[kind.name]), max(answers[kind.name])
        used = statistics.median(spent[kind.name])
        sheet.rows.append([kind.name, f"{mean:.1f}", f"{most:,}", f"{p50:.2f}", f"{p95:.2f}", f"{used:.2f}"])
        report.progress(f"{title}: {kind.name}: median {p50:.2f} ms, p95 {p95:.2f} ms, {mean:.1f} answers")
        figures = {"p50_ms": p50, "p95_ms": p95, "cpu_ms": used, "answers": mean, "most": most}
        report.fact(f"{title}: {kind.name}", figures)
        bound = kind.index_ms if title == _INDEX else kind.loopback_ms
        if bound is not None:
            report.target(Target(f"{title}: {kind.name}, p95", p95, bound, "ms", at_most=True))


def _paging(index: Index, options: Options, report: Report) -> None:
    """A page in the middle beside the first one, in turns."""
    middle = options.studies // 2
    for name, asked, offset in (
        ("all", [], middle),
        ("DX", [("ModalitiesInStudy", "DX")], min(middle, options.studies // 4)),
    ):
        query, _ = query_from_parameters(Level.STUDY, asked, max_results=PAGE)
        first, later = (
            functools.partial(_page, index, one) for one in (query, replace(query, offset=offset))
        )
        if later() != PAGE:
            report.left_out(f"the page of {name} at {offset:,}: so few studies have none")
            continue
        took = [(asker.timed(first)[0], asker.timed(later)[0]) for _ in range(20 * options.rounds)]
        of_first, of_later = map(statistics.median, zip(*took, strict=True))
        report.fact(f"page of {name} at {offset:,}", {"first_ms": of_first, "later_ms": of_later})
        ratio = of_later / of_first
        report.target(Target(f"page of {name} at {offset:,} to the first", ratio, 3, at_most=True))


def _page(index: Index, query: Query) -> int:
    return len(list(index.find(query)))


def _start_up(gateway: Gateway, report: Report) -> None:
    """How long serve takes until it is ready when all it reads is in the page cache."""
    gateway.stop()
    began = time.perf_counter()
    gateway.start()
    report.target(Target("start-up of serve", time.perf_counter() - began, 3, "s", at_most=True))
