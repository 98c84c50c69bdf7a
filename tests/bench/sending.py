"""Sending: questions to a gateway while it receives on four associations, beside each of the two alone.

The gateway serves the large archive, so every instance that comes goes into its index.  A question waits for
what was acknowledged before it, so what it takes shows how far filing is behind.  What was sent is removed in
the end, as an operator does it.  What counts is the median over rounds.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from tests.bench import asker, lean_sender, probe
from tests.bench.archive import Archive
from tests.bench.asker import Asking, Parameters, Spread
from tests.bench.instances import new_study_uid
from tests.bench.report import Report, Target, number
from tests.bench.store import wait_published
from tests.gateway import Gateway, run_command, wait_for_instances
from tests.processes import GoneError

_ASSOCIATIONS, _SIZE = 4, "15 KB"
_INDEX_SECONDS = 60
_LEAST_RATE, _MOST_MS = 0.5, 500.0  # beyond them one of the two is starved


class Sent(NamedTuple):
    """What came of sending: instances acknowledged a second, seconds from the last until all are found."""

    rate: float
    indexed_seconds: float


class Round(NamedTuple):
    """One round: each alone, then both at once; questions by protocol."""

    sent: Sent
    asked: Mapping[str, Spread]
    sent_while_asked: Sent
    asked_while_sent: Mapping[str, Spread]


def run(
    archive: Archive,
    gateway: Gateway,
    questions: Sequence[Sequence[Parameters]],
    report: Report,
    *,
    rounds: int,
    instances: int,
) -> None:
    """Send *instances* on each association, ask *questions*, of each kind in turn, and do both at once."""
    mixed = [asked for together in itertools.zip_longest(*questions) for asked in together if asked]
    study_uids: list[str] = []
    taken = []
    try:
        for round_ in range(1, rounds + 1):
            taken.append(_round(gateway, mixed, instances, study_uids))
            report.progress(f"round {round_}: {_line(taken[-1])}")
    finally:
        _remove(archive, study_uids)
    _show(taken, report)


def _round(gateway: Gateway, questions: list[Parameters], instances: int, study_uids: list[str]) -> Round:
    sent, seconds = _send(gateway, instances, study_uids)
    _settle(gateway, study_uids, instances)
    with _asking(gateway, questions) as asked:
        time.sleep(seconds)  # as long as it takes to send
    with _asking(gateway, questions) as asked_while_sent:
        sent_while_asked, _ = _send(gateway, instances, study_uids)
    _settle(gateway, study_uids, instances)
    return Round(sent, _spreads(asked), sent_while_asked, _spreads(asked_while_sent))


def _send(gateway: Gateway, instances: int, study_uids: list[str]) -> tuple[Sent, float]:
    """A study on each association; returns when the index has all, with the seconds that it took to send."""
    new = [new_study_uid() for _ in range(_ASSOCIATIONS)]
    study_uids += new
    sent = lean_sender.send(gateway.port, gateway.ae_title, _SIZE, new, instances)
    for study_uid in new:
        wait_for_instances(gateway, study_uid, instances, _INDEX_SECONDS)
    return Sent(sent["rate"], time.monotonic() - sent["ended"]), sent["seconds"]


def _settle(gateway: Gateway, study_uids: Sequence[str], instances: int) -> None:
    """What comes next is not to pay for what was sent: it is published, and the disk has it."""
    wait_published(gateway, study_uids[-_ASSOCIATIONS:], instances)
    probe.flush(gateway.root)


@contextlib.contextmanager
def _asking(gateway: Gateway, questions: Sequence[Parameters]) -> Iterator[dict[str, Asking]]:
    """By each protocol at once, one question after the other, for as long."""
    with contextlib.ExitStack() as stack:
        prepares = {
            "C-FIND": stack.enter_context(asker.find(gateway.port, gateway.ae_title)),
            "QIDO-RS": stack.enter_context(asker.qido(gateway.web_port, "/dicomweb")),
        }
        yield {
            protocol: stack.enter_context(Asking([prepare(asked) for asked in questions]))
            for protocol, prepare in prepares.items()
        }


def _spreads(asked: Mapping[str, Asking]) -> dict[str, Spread]:
    """Raises GoneError if a protocol has not answered once."""
    if starved := [protocol for protocol, asking in asked.items() if not asking.times]:
        raise GoneError(f"no question was answered while instances were sent: {', '.join(starved)}")
    return {protocol: Spread.of(asking.times) for protocol, asking in asked.items()}


def _line(one: Round) -> str:
    asked = (
        f"{protocol} p95 {alone.p95:.1f} ms alone, {one.asked_while_sent[protocol].p95:.1f} while sent"
        for protocol, alone in one.asked.items()
    )
    sent = f"{number(one.sent.rate)} instances/s alone, {number(one.sent_while_asked.rate)} while asked"
    return "; ".join((sent, *asked))


def _remove(archive: Archive, study_uids: Sequence[str]) -> None:
    """Let the archive be what it was."""
    environ = {"DICOMSCP_INDEX__URL": archive.url} if archive.url else {}
    if study_uids:
        removed = run_command("remove", "--root", archive.folder, "--yes", *study_uids, **environ)
        if removed.returncode:
            raise GoneError(f"what was sent could not be removed: {removed.stderr.strip()[-500:]}")


def _show(taken: Sequence[Round], report: Report) -> None:
    report.fact("sending", [_facts(one) for one in taken])
    sheet = report.sheet(
        f"{_ASSOCIATIONS} associations send instances of {_SIZE} and questions are asked, medians of rounds",
        *("what", "alone", "both at once"),
    )

    def row(what: str, figures: Callable[[Sent, Mapping[str, Spread]], float]) -> float:
        """What of each alone, and of both at once; that of both is returned."""
        alone = statistics.median(figures(one.sent, one.asked) for one in taken)
        both = statistics.median(figures(one.sent_while_asked, one.asked_while_sent) for one in taken)
        sheet.rows.append([what, number(alone), number(both)])
        return both

    row("instances a second", lambda sent, _: sent.rate)
    row("seconds from the last until all are found", lambda sent, _: sent.indexed_seconds)
    rate = statistics.median(one.sent_while_asked.rate / one.sent.rate for one in taken)
    report.target(Target("rate of sending while questions are asked, to alone", rate, _LEAST_RATE))
    for protocol in taken[0].asked:
        row(f"{protocol}, p50 in ms", partial(_p50, protocol))
        p95 = row(f"{protocol}, p95 in ms", partial(_p95, protocol))
        report.target(Target(f"{protocol} while sending, p95", p95, _MOST_MS, "ms", at_most=True))


def _p50(protocol: str, _: Sent, asked: Mapping[str, Spread]) -> float:
    return asked[protocol].p50


def _p95(protocol: str, _: Sent, asked: Mapping[str, Spread]) -> float:
    return asked[protocol].p95


def _facts(one: Round) -> dict[str, object]:
    def plain(value: Sent | Mapping[str, Spread]) -> dict[str, object]:
        if isinstance(value, Sent):
            return value._asdict()
        return {protocol: spread._asdict() for protocol, spread in value.items()}

    return {name: plain(value) for name, value in one._asdict().items()}
