"""Beside: the questions of `find`, put to the gateway and to Orthanc and dcmqrscp, which hold the same.

The population is cut down to one instance a series, header alone.  Orthanc and dcmqrscp get these by C-STORE;
the gateway's index is made of them.  Whoever asks is the same for all, in turns within a round, over
connections that stay open.  What counts is the median, over rounds, of the ratio within a round, and only
where the answers are as many: dcmqrscp does not match ModalitiesInStudy, and has its own idea of accents.

dcmqrscp 3.6.7 holds 500 studies, a constant of its index, and dies of the next one: it and a gateway that
holds as many are asked apart.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dicomscp.archive.index import Arrival
from tests import peers
from tests.bench import archive, asker, population
from tests.bench.asker import Parameters, Spread
from tests.bench.lean_sender import Association, SenderError, encode_request
from tests.bench.report import Report, number
from tests.gateway import Gateway
from tests.processes import GoneError

GATEWAY = "dicomscp"
_C_FIND, _QIDO_RS = "C-FIND", "QIDO-RS"
_QRSCP_STUDIES = 500
_STEP = 5_000  # instances between lines of progress


class QrScp(peers.Peer):
    """DCMTK's dcmqrscp, a process an association, with as many studies as it can hold."""

    name = "dcmqrscp"
    program, package, ae_title = "dcmqrscp", peers.DCMTK, "QRSCP"

    def command(self) -> list[str | Path]:
        settings = self.directory / "dcmqrscp.cfg"
        quota = f"({_QRSCP_STUDIES}, 1024mb)"
        settings.write_text(
            f"NetworkTCPPort = {self.port}\nMaxPDUSize = {peers.MAX_PDU_BYTES}\nMaxAssociations = 16\n"
            "HostTable BEGIN\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
            f"AETable BEGIN\n{self.ae_title} {self.received} RW {quota} ANY\nAETable END\n"
        )
        return [peers.find_program(self.program) or self.program, "-c", settings]


class Turn(NamedTuple):
    """What a server did with the questions of one kind in one round."""

    protocol: str
    kind: str
    server: str
    round: int
    spread: Spread
    cpu_ms: float  # a question
    answers: int


Questions = Sequence[tuple[str, Sequence[Parameters]]]  # of each kind, by its name
Servers = dict[str, Gateway | peers.Peer]
Askers = dict[tuple[str, str], asker.Prepare]  # by protocol and server


def run(
    directory: Path,
    studies: int,
    rounds: int,
    questions_of: Callable[[int], Questions],
    report: Report,
) -> None:
    """Fill each peer, and a gateway, with so many *studies* or as many as it takes; ask both.

    *questions_of* makes the questions, none by a name with accents, for an archive of so many studies.
    """
    report.fact("beside", {"studies": studies})
    for kind, most in ((peers.Orthanc, studies), (QrScp, min(studies, _QRSCP_STUDIES))):
        if not kind.installed():
            report.left_out(f"{kind.name} is not installed (Debian package {kind.package})")
            continue
        folder = directory / f"beside-{kind.name}"
        with contextlib.ExitStack() as stack:
            try:
                peer = stack.enter_context(kind(folder / "peer"))
                arrivals = list(population.one_a_series(population.arrivals(most)))
                _store(peer, arrivals, report)
            except (GoneError, SenderError) as error:
                report.left_out(f"{kind.name} did not take {most:,} studies: {error}")
                continue
            beside = archive.Archive(folder / "gateway")
            archive.fill(beside, arrivals, report)
            gateway = stack.enter_context(Gateway(beside.folder, settings=beside.settings))
            servers: Servers = {GATEWAY: gateway, kind.name: peer}
            askers = _askers(stack, gateway, peer, report)
            turns = [
                turn
                for round_ in range(1, rounds + 1)
                for turn in _turns(round_, questions_of(most), servers, askers, report)
            ]
        _show(f"{most:,} studies, {len(arrivals):,} series", kind.name, turns, report)


def _store(peer: peers.Peer, arrivals: Sequence[Arrival], report: Report) -> None:
    """Send an instance for each of *arrivals*, on one association."""
    sop_class_uids = sorted({arrival.sop_class_uid for arrival in arrivals})
    contexts = {uid: 2 * number + 1 for number, uid in enumerate(sop_class_uids)}
    association = Association(peer.port, peer.ae_title, "BENCH", sop_class_uids)
    for count, arrival in enumerate(arrivals, 1):
        message_id = count & 0xFFFF
        request = encode_request(
            population.dataset(arrival),
            arrival.key.sop_uid,
            message_id,
            association.max_pdu_bytes,
            sop_class_uid=arrival.sop_class_uid,
            context_id=contexts[arrival.sop_class_uid],
        )
        association.store([request], message_id)
        if count % _STEP == 0:
            report.progress(f"{peer.name} has taken {count:,} of {len(arrivals):,} instances")
    association.release()


def _askers(stack: contextlib.ExitStack, gateway: Gateway, peer: peers.Peer, report: Report) -> Askers:
    """By both protocols, where the peer knows both."""
    askers = {
        (_C_FIND, one): stack.enter_context(asker.find(server.port, server.ae_title))
        for one, server in ((GATEWAY, gateway), (peer.name, peer))
    }
    if not isinstance(peer, peers.Orthanc):
        return askers
    if not peer.has_dicomweb():
        report.left_out(f"Orthanc has no DICOMweb (Debian package {peers.ORTHANC_WEB})")
        return askers
    askers[_QIDO_RS, GATEWAY] = stack.enter_context(asker.qido(gateway.web_port, "/dicomweb"))
    askers[_QIDO_RS, peer.name] = stack.enter_context(asker.qido(peer.http_port, "/dicom-web"))
    return askers


def _turns(
    round_: int, questions: Questions, servers: Servers, askers: Askers, report: Report
) -> Iterator[Turn]:
    """All kinds by each protocol, every server in turn, another one first in each round."""
    for kind, asked in questions:
        for protocol, server in sorted(askers, reverse=bool(round_ % 2)):
            asks = list(map(askers[protocol, server], asked))
            before = asker.used_seconds(servers[server])
            times, answers = zip(*map(asker.timed, asks), strict=True)
            cpu_ms = (asker.used_seconds(servers[server]) - before) * 1e3 / len(asks)
            turn = Turn(protocol, kind, server, round_, Spread.of(times), cpu_ms, sum(answers))
            told = f"p50 {turn.spread.p50:.2f} ms, p95 {turn.spread.p95:.2f} ms, {turn.answers} answers"
            report.progress(f"round {round_}: {protocol}, {kind}, {server}: {told}")
            yield turn


def _show(title: str, peer: str, turns: Sequence[Turn], report: Report) -> None:
    report.fact(f"beside {peer}, {title}", [turn._asdict() for turn in turns])
    sheet = report.sheet(
        f"{GATEWAY} beside {peer}, {title}: milliseconds, and {GATEWAY}'s to {peer}'s",
        *("question", "answers", f"{GATEWAY} p50", "p95", "CPU", f"{peer} p50", "p95", "CPU"),
        *("p50 to p50", "p95 to p95"),
    )
    for protocol, kind in dict.fromkeys((turn.protocol, turn.kind) for turn in turns):
        ours, theirs = (
            [turn for turn in turns if (turn.protocol, turn.kind, turn.server) == (protocol, kind, server)]
            for server in (GATEWAY, peer)
        )
        answers = list(dict.fromkeys((ours[0].answers, theirs[0].answers)))
        cells = [
            f"{statistics.median(column):.2f}"
            for of in (ours, theirs)
            for column in zip(*((*turn.spread, turn.cpu_ms) for turn in of), strict=True)
        ]
        ratios = [_ratio(ours, theirs, part) if len(answers) == 1 else "-" for part in Spread._fields]
        told = " / ".join(f"{count:,}" for count in answers)
        sheet.rows.append([f"{protocol}: {kind}", told, *cells, *ratios])


def _ratio(ours: Sequence[Turn], theirs: Sequence[Turn], part: str) -> str:
    """Of the two that were asked in the same round; a ratio below 1 says that we are faster."""
    ratios = [
        getattr(one.spread, part) / getattr(other.spread, part)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return f"{number(statistics.median(ratios))}x"
