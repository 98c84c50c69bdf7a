"""Store: how many C-STORE requests a second are acknowledged, by the gateway durably, by others as they do.

Receivers take turns within a round, and every turn sends instances that nobody has seen.  Between turns what
the disk still owes is written out, and the gateway is waited for until it has published: no turn pays for
another.  A target is judged by the median, over rounds, of the ratio within a round.
"""

import contextlib
import functools
import gzip
import itertools
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests import peers
from tests.bench import lean_sender, probe
from tests.bench.instances import SIZES, Template, new_study_uid
from tests.bench.report import Report, Target, number
from tests.gateway import Gateway, wait_for_instances
from tests.processes import GoneError, reset_peak_rss, wait_until

GATEWAY, RELAXED, STORESCP, FORK = (
    "dicomscp",
    "dicomscp relaxed",
    peers.StoreScp.name,
    peers.ForkingStoreScp.name,
)
ORTHANC, PYNETDICOM = peers.Orthanc.name, peers.PynetdicomScp.name
RECEIVERS = (GATEWAY, RELAXED, STORESCP, FORK, ORTHANC, PYNETDICOM)
STUDIES = ("lean", "storescu", "freshness", "memory", "syncs")

_PEERS = (peers.StoreScp, peers.ForkingStoreScp, peers.Orthanc, peers.PynetdicomScp)
_PUBLISH_SECONDS = 120
_STORESCU_ROUNDS = 3
_WARM_BYTES = 3 << 30
_MULTIFRAME_BYTES = 10**9
_FRESH_INSTANCES = 300
_TRACED_INSTANCES = 50


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, how often, and where the data goes."""

    directory: Path
    rounds: int
    instances: int
    sizes: tuple[str, ...]
    associations: tuple[int, ...]
    only: tuple[str, ...]
    receivers: tuple[str, ...]


class Case(NamedTuple):
    """What is sent, and how."""

    sender: str
    size: str
    associations: int


class Turn(NamedTuple):
    """What one receiver did with one case in one round."""

    case: Case
    receiver: str
    round: int
    rate: float
    p50_ms: float | None
    p99_ms: float | None
    cpu_ms: dict[str, float]


class Sent(NamedTuple):
    """What a sender did; it may not know the latency of each request."""

    study_uids: list[str]
    rate: float
    p50_ms: float | None
    p99_ms: float | None


Receiver = Gateway | peers.Peer
Receivers = dict[str, Receiver]


def run(options: Options, report: Report) -> None:
    """Measure what *options* ask for."""
    _disk(options, report)
    report.progress(f"{probe.warm_memory(_WARM_BYTES) >> 20} MiB of memory touched")
    with contextlib.ExitStack() as stack:
        receivers = bring_up(stack, options.directory, options.receivers, report)
        turns = _Turns(options, receivers, report)
        try:
            turns.take()
        finally:  # what was measured before a failure, or a Ctrl-C, is shown all the same
            _summarize(turns.taken, options, report)
        gateway = receivers.get(GATEWAY)
        if isinstance(gateway, Gateway):
            if "freshness" in options.only:
                _freshness(gateway, options, report)
            if "memory" in options.only:
                _memory(gateway, report)
    if "syncs" in options.only and GATEWAY in options.receivers:
        _syncs(options, report)


def bring_up(
    stack: contextlib.ExitStack, directory: Path, wanted: Iterable[str], report: Report
) -> Receivers:
    """Start the receivers called *wanted*; what is not installed or does not start is named and left out."""
    made: list[tuple[str, Receiver]] = [
        (GATEWAY, Gateway(directory / "gateway")),
        (RELAXED, Gateway(directory / "relaxed", settings={"storage.durability": "relaxed"})),
        *((peer.name, peer(directory / peer.name.replace(" ", ""))) for peer in _PEERS),
    ]
    receivers: Receivers = {}
    for name, receiver in [(name, receiver) for name, receiver in made if name in wanted]:
        if isinstance(receiver, peers.Peer) and not receiver.installed():
            report.left_out(f"{name} is not installed (Debian package {receiver.package})")
            continue
        try:
            receiver.start()
            stack.push(receiver)
            receivers[name] = receiver
        except GoneError as error:
            report.left_out(f"{name} did not start: {error}")
        else:
            report.progress(f"{name} listens on {receiver.port}")
    return receivers


def _disk(options: Options, report: Report) -> None:
    directory = options.directory / "disk"
    directory.mkdir()
    costs = probe.disk_costs(directory)
    report.fact("disk_ms", costs)
    sheet = report.sheet("This disk, median milliseconds", "what", "ms")
    sheet.rows += [[name, f"{cost:.3f}"] for name, cost in costs.items()]
    report.progress("; ".join(f"{name}: {cost:.3f} ms" for name, cost in costs.items()))


# ── turns ────────────────────────────────────────────────────────────────────────────────────────


class _Turns:
    """Takes the turns, and keeps what came of them."""

    def __init__(self, options: Options, receivers: Receivers, report: Report) -> None:
        self._options, self._receivers, self._report = options, receivers, report
        self._templates = {size: Template(SIZES[size]) for size in options.sizes}
        self.taken: list[Turn] = []

    def take(self) -> None:
        """All cases, every receiver in turn, round after round."""
        cases = self._cases()
        for number_of_round in range(1, self._options.rounds + 1):
            for case in cases:
                for name in _rotated(list(self._receivers), number_of_round):
                    if _takes(case, name, number_of_round):
                        self.taken.append(self._turn(case, name, number_of_round))
                        self._report.progress(_line(self.taken[-1]))

    def _cases(self) -> list[Case]:
        senders = [sender for sender in ("storescu", "lean") if sender in self._options.only]
        if "storescu" in senders and not peers.find_program("storescu"):
            self._report.left_out(f"storescu is not installed (Debian package {peers.DCMTK})")
            senders.remove("storescu")
        return list(
            itertools.starmap(
                Case, itertools.product(senders, self._options.sizes, self._options.associations)
            )
        )

    def _turn(self, case: Case, name: str, number_of_round: int) -> Turn:
        receiver = self._receivers[name]
        each = _count(case, self._options.instances)
        probe.flush(self._options.directory)
        before = probe.Usage.of(receiver) if isinstance(receiver, Gateway) else None
        send = self._send_lean if case.sender == "lean" else self._send_storescu
        study_uids, rate, p50_ms, p99_ms = send(case, receiver, each)
        cpu_ms: dict[str, float] = {}
        if isinstance(receiver, Gateway) and before is not None:
            wait_published(receiver, study_uids, each)
            used = probe.Usage.of(receiver).since(before)
            cpu_ms = {kind: seconds * 1e3 / each / case.associations for kind, seconds in used.items()}
        elif isinstance(receiver, peers.Peer) and name != ORTHANC:  # whose index names its files
            _empty(receiver.received)
        return Turn(case, name, number_of_round, rate, p50_ms, p99_ms, cpu_ms)

    def _send_lean(self, case: Case, receiver: Receiver, each: int) -> Sent:
        study_uids = [new_study_uid() for _ in range(case.associations)]
        sent = lean_sender.send(receiver.port, receiver.ae_title, case.size, study_uids, each)
        return Sent(study_uids, sent["rate"], sent["p50_ms"], sent["p99_ms"])

    def _send_storescu(self, case: Case, receiver: Receiver, each: int) -> Sent:
        folders = [self._options.directory / "send" / str(number) for number in range(case.associations)]
        study_uids = [self._templates[case.size].write_series(folder, each) for folder in folders]
        probe.flush(self._options.directory)
        rate = _storescu(receiver, folders, each)
        shutil.rmtree(self._options.directory / "send")
        return Sent(study_uids, rate, None, None)


def _takes(case: Case, name: str, number_of_round: int) -> bool:
    """Not those that take one association at a time; and the sender that is slow, and steady, less often."""
    concurrent = name != STORESCP or case.associations == 1
    return concurrent and (case.sender == "lean" or number_of_round <= _STORESCU_ROUNDS)


def _rotated(names: list[str], by: int) -> list[str]:
    """Another one is first in each round."""
    by %= max(len(names), 1)
    return names[by:] + names[:by]


def _count(case: Case, instances: int) -> int:
    """Instances an association: fewer of the large, for the disk's sake; fewer for a sender that waits."""
    small = case.size == "15 KB"
    count = instances if small else instances // 2
    if case.sender == "storescu":
        count = min(count, 60 if small else 100)
    return max(1, count if case.associations == 1 else count // 2)


def _storescu(receiver: Receiver, folders: list[Path], each: int) -> float:
    """The rate of the packaged storescu, its start included, one a folder.  Raises GoneError if one fails."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(_sender(receiver, folder)) for folder in folders]
        for sender in senders:
            output, _ = sender.communicate(timeout=300)
            if sender.returncode or output:
                raise GoneError(
                    f"storescu: status {sender.returncode}: {output.decode(errors='replace')[-500:]}"
                )
    return each * len(folders) / (time.monotonic() - began)


@contextlib.contextmanager
def _sender(receiver: Receiver, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = ["storescu", "-aec", receiver.ae_title, "127.0.0.1", str(receiver.port), "+sd", str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _line(turn: Turn) -> str:
    latency = f", p50 {turn.p50_ms:.2f} ms, p99 {turn.p99_ms:.2f} ms" if turn.p50_ms and turn.p99_ms else ""
    sender, size, associations = turn.case
    what = f"{sender}, {size} x {associations}, {turn.receiver}"
    return f"round {turn.round}: {what}: {number(turn.rate)}/s{latency}"


# ── what the turns say ───────────────────────────────────────────────────────────────────────────


def _summarize(turns: list[Turn], options: Options, report: Report) -> None:
    if not turns:
        return
    report.fact("turns", [{**turn._asdict(), "case": turn.case._asdict()} for turn in turns])
    sheet = report.sheet(
        "Instances acknowledged a second, median of rounds; times the gateway's",
        *("sender, size x associations", *(name for name in RECEIVERS if name in options.receivers)),
    )
    for case in dict.fromkeys(turn.case for turn in turns):
        cells = [_cell(turns, case, name) for name in sheet.columns[1:]]
        sheet.rows.append([f"{case.sender}, {case.size} x {case.associations}", *cells])
    _show_latency(turns, report)
    _show_cpu(turns, report)
    _judge(turns, options, report)


def _cell(turns: list[Turn], case: Case, name: str) -> str:
    rates = [turn.rate for turn in turns if turn.case == case and turn.receiver == name]
    if not rates:
        return "-"
    text = number(statistics.median(rates))
    found = ratio(turns, case, name, GATEWAY)
    return text if found is None or name == GATEWAY else f"{text} ({found:.2f}x)"


def ratio(turns: list[Turn], case: Case, one: str, other: str) -> float | None:
    """The median over rounds of *one*'s rate by *other*'s; None if they never ran side by side."""
    rates = {(turn.receiver, turn.round): turn.rate for turn in turns if turn.case == case}
    ratios = [
        rate / rates[other, round_]
        for (receiver, round_), rate in rates.items()
        if receiver == one and (other, round_) in rates
    ]
    return statistics.median(ratios) if ratios else None


def _show_latency(turns: list[Turn], report: Report) -> None:
    sheet = report.sheet(
        "Lean sender, milliseconds from request to response", "size x associations, receiver", "p50", "p99"
    )
    for case, name in dict.fromkeys(
        (turn.case, turn.receiver) for turn in turns if turn.case.sender == "lean"
    ):
        of = [turn for turn in turns if (turn.case, turn.receiver) == (case, name)]
        p50, p99 = (
            statistics.median(column) for column in zip(*((t.p50_ms, t.p99_ms) for t in of), strict=True)
        )
        sheet.rows.append([f"{case.size} x {case.associations}, {name}", f"{p50:.2f}", f"{p99:.2f}"])


def _show_cpu(turns: list[Turn], report: Report) -> None:
    """Processor time until published, by part; a tick is 10 ms, so small figures are coarse."""
    measured = [turn for turn in turns if turn.cpu_ms]
    kinds = sorted({kind for turn in measured for kind in turn.cpu_ms})
    if not measured:
        return
    sheet = report.sheet(
        "CPU milliseconds an instance, until published", "sender, size x associations", *kinds
    )
    for case, name in dict.fromkeys((turn.case, turn.receiver) for turn in measured):
        of = [turn.cpu_ms for turn in measured if (turn.case, turn.receiver) == (case, name)]
        medians = [f"{statistics.median(cpu.get(kind, 0.0) for cpu in of):.3f}" for kind in kinds]
        sheet.rows.append([f"{case.sender}, {case.size} x {case.associations}, {name}", *medians])


def _judge(turns: list[Turn], options: Options, report: Report) -> None:
    """The ratios that the gateway is to reach."""
    for size in options.sizes:
        small = size == "15 KB"
        wanted = [
            (Case("storescu", size, 1), GATEWAY, STORESCP, 10.0),
            (Case("lean", size, 1), GATEWAY, ORTHANC, 4.0),
            (Case("lean", size, 1), GATEWAY, FORK, 0.8 if small else 0.7),
            (Case("lean", size, 4), GATEWAY, FORK, 1.2),
            (Case("lean", size, 1), RELAXED, FORK, 1.5),
        ]
        for case, one, other, least in wanted:
            if case.sender in options.only and case.associations in options.associations:
                name = f"{case.sender}, {size} x {case.associations}: {one} / {other}"
                report.target(Target(name, ratio(turns, case, one, other), least))


# ── the gateway alone ────────────────────────────────────────────────────────────────────────────


def published(gateway: Gateway, study_uid: str) -> int:
    """How many instances the published study has; 0 before it is published."""
    path = gateway.root / "dicomweb" / "studies" / study_uid / "metadata.gz"
    try:
        return gzip.decompress(path.read_bytes()).count(b'"00080018"')
    except FileNotFoundError:
        return 0


def _is_published(gateway: Gateway, study_uid: str, count: int) -> bool:
    return published(gateway, study_uid) >= count


def wait_published(gateway: Gateway, study_uids: Iterable[str], each: int) -> None:
    """Return once each of the studies is published with *each* instances."""
    for study_uid in study_uids:
        wait_until(
            functools.partial(_is_published, gateway, study_uid, each),
            _PUBLISH_SECONDS,
            f"{each} instances of {study_uid} to be published",
        )


def _freshness(gateway: Gateway, options: Options, report: Report) -> None:
    """Seconds from the last Success until the index counts all, and until the study is published."""
    indexed, visible = [], []
    for _ in range(min(options.rounds, 3)):
        study_uid = new_study_uid()
        sent = lean_sender.send(gateway.port, gateway.ae_title, "15 KB", [study_uid], _FRESH_INSTANCES)
        wait_for_instances(gateway, study_uid, _FRESH_INSTANCES)
        indexed.append(time.monotonic() - sent["ended"])
        wait_published(gateway, [study_uid], _FRESH_INSTANCES)
        visible.append(time.monotonic() - sent["ended"])
        report.progress(f"last Success to index {indexed[-1]:.3f} s, to published {visible[-1]:.2f} s")
    report.fact("freshness", {"indexed_seconds": indexed, "published_seconds": visible})
    told = f"last of {_FRESH_INSTANCES} Successes"
    report.target(
        Target(f"{told} until all are found by QIDO-RS", statistics.median(indexed), 0.2, "s", at_most=True)
    )
    report.target(
        Target(f"{told} until the metadata is published", statistics.median(visible), 3.0, "s", at_most=True)
    )


def _memory(gateway: Gateway, report: Report) -> None:
    """The peak of the listeners while they receive one very large instance."""
    for pid in probe.listeners(gateway):
        reset_peak_rss(pid)
    study_uid = new_study_uid()
    seconds = lean_sender.send_multiframe(gateway.port, gateway.ae_title, study_uid, _MULTIFRAME_BYTES)
    peak = probe.listener_rss_mb(gateway)
    report.progress(f"1 GB multi-frame: {seconds:.1f} s, listener's peak {peak:.0f} MB")
    report.fact("multiframe", {"seconds": seconds, "listener_peak_mb": peak})
    report.target(Target("1 GB multi-frame: listener's peak RSS", peak, 150.0, "MB", at_most=True))
    wait_published(gateway, [study_uid], 1)


def _syncs(options: Options, report: Report) -> None:
    """Every sync of a gateway under strace, while instances arrive and until they are published."""
    if not peers.find_program("strace"):
        report.left_out("syncs an instance: strace is not installed (Debian package strace)")
        return
    counts = {}
    for size in options.sizes:
        for associations in options.associations:
            counts[f"{size} x {associations}"] = _count_syncs(options.directory, size, associations, report)
    report.fact("syncs_per_instance", counts)
    kinds = sorted({kind for found in counts.values() for kind in found})
    sheet = report.sheet("Syncs an instance, until published", "call, folder", *counts)
    for kind in kinds:
        sheet.rows.append([kind, *(f"{found.get(kind, 0.0):.2f}" for found in counts.values())])


def _count_syncs(directory: Path, size: str, associations: int, report: Report) -> dict[str, float]:
    root, output = directory / "traced", directory / "strace"
    try:
        with Gateway(root, wrapper=probe.strace_command(output)) as gateway:
            study_uids = [new_study_uid() for _ in range(associations)]
            began = time.time()
            lean_sender.send(gateway.port, gateway.ae_title, size, study_uids, _TRACED_INSTANCES)
            wait_published(gateway, study_uids, _TRACED_INSTANCES)
            ended = time.time()
        found = probe.syncs(output, root.resolve(), began, ended)
    except GoneError as error:
        report.left_out(f"syncs an instance, {size} x {associations}: {error}")
        return {}
    finally:
        shutil.rmtree(root, ignore_errors=True)
        output.unlink(missing_ok=True)
    report.progress(f"syncs of {associations * _TRACED_INSTANCES} instances of {size}: {dict(found)}")
    return {kind: count / associations / _TRACED_INSTANCES for kind, count in sorted(found.items())}
