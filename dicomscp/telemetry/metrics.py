"""Metrics, declared once; each process counts for itself, and the web server adds them up.

    run/metrics/counter_<part>.db ...    one file a kind and a part, mapped into memory

Files are named by part, not by process id as prometheus_client would: a part that is restarted counts on,
and a part that dies often leaves no more files than one that lives.  Names are dicomscp_<noun>_<unit>.
Labels are of bounded number and never hold a UID.
"""

import os
import threading
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from dicomscp.telemetry.refusals import Refusals

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client looks
_KINDS = ("counter", "gauge_livesum", "gauge_max", "histogram")
_FILE_BYTES = 1 << 18  # several times what all metrics of a process take
_RECEIVED = {
    "dicomscp_received_instances": "instances",
    "dicomscp_received_bytes": "bytes",
    "dicomscp_last_received_timestamp_seconds": "last_at",
}
_CALLING_AES = 64  # distinct in a process; what calls after them is "other"
_STORE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
_PUBLISH_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def clean(directory: Path) -> None:
    """Begin at zero: what an earlier run left in *directory* goes.  Before any process shares it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in directory.glob("*.db"):
        file.unlink()


def share(directory: Path, part: str) -> None:
    """Keep this process's metrics in *directory*, as those of *part*.

    Called before any metric is made; without it they live and end with the process.  No two living
    processes may be the same part.  A *part* has no underscore in its name.
    """
    if "_" in part:
        raise ValueError(f"part has an underscore: {part}")
    try:
        for kind in _KINDS:
            _allocate(directory / f"{kind}_{part}.db")
    except OSError:  # the disk is full: what this process counts is not told, all else goes on
        return
    os.environ[_DIRECTORY_VARIABLE] = str(directory)
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: part)  # type: ignore[no-untyped-call] # not annotated there


def _allocate(path: Path) -> None:
    """Have the disk's blocks for a file before it is mapped: a hole is a SIGBUS once the disk is full."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, _FILE_BYTES)
    finally:
        os.close(descriptor)


def forget(directory: Path, part: str) -> None:
    """Take away what *part*, which has ended, said of the present; what it counted stays."""
    for file in directory.glob(f"gauge_live*_{part}.db"):
        file.unlink(missing_ok=True)


def exposition(directory: Path) -> bytes:
    """All processes' metrics, added up, in Prometheus' text format."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call] # not annotated there
    return generate_latest(registry)


class Received(NamedTuple):
    """What came from one calling AE since the gateway started, and when last, in seconds since 1970."""

    instances: float = 0.0
    bytes: float = 0.0
    last_at: float = 0.0


class Counted(NamedTuple):
    """What all processes together took in since the gateway started, and what they did not, by why."""

    received: dict[str, Received]
    refused: dict[str, int]
    rejected: dict[str, int]


def counted(directory: Path) -> Counted:
    """What the processes that share *directory* have counted of what comes in, by calling AE and kind."""
    files = [str(path) for kind in ("counter", "gauge_max") for path in directory.glob(f"{kind}_*.db")]
    found = Counted({}, {}, {})
    for metric in MultiProcessCollector.merge(files):  # type: ignore[no-untyped-call] # not annotated there
        for sample in metric.samples:
            labels, value = sample.labels, sample.value
            if field := _RECEIVED.get(metric.name):
                before = found.received.get(labels["calling_ae"], Received())
                found.received[labels["calling_ae"]] = before._replace(**{field: value})
            elif metric.name == "dicomscp_refused_instances":
                found.refused[labels["kind"]] = int(value)
            elif metric.name == "dicomscp_rejected_associations":
                found.rejected[labels["reason"]] = int(value)
    return found


def _counter(name: str, what: str, *labels: str) -> Counter:
    return Counter(f"dicomscp_{name}", what, labels, registry=None)


def _sync_errors() -> Counter:
    return _counter("sync_errors", "Syncs and writes of journal, slots and settles that failed.")


def _gauge(name: str, what: str) -> Gauge:
    gauge = Gauge(f"dicomscp_{name}", what, registry=None, multiprocess_mode="livesum")
    gauge.set(0)  # a part that is restarted does not go on with what it had open
    return gauge


class _OfAe(NamedTuple):
    """The metrics of one calling AE."""

    instances: Counter
    bytes: Counter
    last_at: Gauge


class IntakeMetrics:
    """What a process that takes instances in counts: listeners, drop folder, web."""

    def __init__(self, refusals: Refusals | None = None) -> None:
        """What is not taken is noted in *refusals*, too, with its reason."""
        self._refusals = refusals
        self._instances = _counter("received_instances", "Instances taken into custody.", "calling_ae")
        self._bytes = _counter("received_bytes", "Bytes of datasets taken into custody.", "calling_ae")
        self._last_at = Gauge(
            "dicomscp_last_received_timestamp_seconds",
            "When an instance was last taken into custody.",
            ("calling_ae",),
            registry=None,
            multiprocess_mode="max",
        )
        self._refused = _counter("refused_instances", "Instances not taken, by why.", "kind")
        self._seconds = Histogram(
            "dicomscp_store_seconds",
            "From the last byte of an instance until it is durable.",
            buckets=_STORE_BUCKETS,
            registry=None,
        )
        self._sync_errors = _sync_errors()
        self._known: dict[str, _OfAe] = {}
        self._lock = threading.Lock()

    def received(self, calling_ae: str, size: int, seconds: float) -> None:
        """One instance of *size* bytes is in custody, *seconds* after its last byte came."""
        of_ae = self._known.get(calling_ae) or self._of(calling_ae)
        of_ae.instances.inc()
        of_ae.bytes.inc(size)
        of_ae.last_at.set_to_current_time()
        self._seconds.observe(seconds)

    def refused(self, kind: str, reason: str, *, calling_ae: str = "", address: str = "") -> None:
        """One instance was not taken; *kind* is the error's family: refused, mismatch, busy."""
        self._refused.labels(kind).inc()
        self._note(kind, reason, calling_ae, address)

    def sync_failed(self) -> None:
        """One sync or write failed."""
        self._sync_errors.inc()

    def _note(self, kind: str, reason: str, calling_ae: str, address: str) -> None:
        if self._refusals is not None:
            self._refusals.note(kind, reason, calling_ae=calling_ae, address=address)

    def _of(self, calling_ae: str) -> _OfAe:
        with self._lock:
            name = calling_ae if len(self._known) < _CALLING_AES else "other"
            of_ae = _OfAe(self._instances.labels(name), self._bytes.labels(name), self._last_at.labels(name))
            if name == calling_ae:
                self._known[name] = of_ae
            return of_ae


class ListenerMetrics(IntakeMetrics):
    """What a listener counts besides."""

    def __init__(self, refusals: Refusals | None = None) -> None:
        super().__init__(refusals)
        self._open = _gauge("open_associations", "Associations open now.")
        self._accepted = _counter("accepted_associations", "Associations accepted.")
        self._rejected = _counter("rejected_associations", "Associations rejected, by why.", "reason")
        self._aborted = _counter("aborted_associations", "Associations that ended otherwise than by release.")

    def opened(self) -> None:
        """An association was accepted."""
        self._accepted.inc()
        self._open.inc()

    def ended(self, *, released: bool) -> None:
        """An association that was opened is no more."""
        self._open.dec()
        if not released:
            self._aborted.inc()

    def rejected(self, kind: str, reason: str, *, calling_ae: str = "", address: str = "") -> None:
        """An association was rejected; *kind* is one of a few phrases, *reason* says it in full."""
        self._rejected.labels(kind).inc()
        self._note("rejected", reason, calling_ae, address)


class InboxMetrics(IntakeMetrics):
    """What the drop folder counts besides."""

    def __init__(self) -> None:
        super().__init__()
        self._quarantined = _counter("quarantined_files", "Files put into the quarantine.")

    def quarantined(self) -> None:
        """A file was put into the quarantine."""
        self._quarantined.inc()


class AccessMetrics:
    """What the web server counts of who asks."""

    def __init__(self) -> None:
        self._granted = _counter("granted_accesses", "Credentials found right, by scheme.", "scheme")
        self._refused = _counter(
            "refused_accesses", "Credentials found wrong, by scheme; or right ones without a scope.", "kind"
        )

    def granted(self, scheme: str) -> None:
        """Credentials were found right; they are not looked at again for a while."""
        self._granted.labels(scheme).inc()

    def refused(self, kind: str) -> None:
        """Credentials were found wrong; *kind* is a scheme, or "scope"."""
        self._refused.labels(kind).inc()


class PipelineMetrics:
    """What the pipeline counts, and what it knows of the whole."""

    def __init__(self) -> None:
        self._indexed = _counter("indexed_instances", "Journal entries applied to the index.")
        self._lag = _gauge("journal_lag_bytes", "Journal that is synced and not yet applied.")
        self._due = _gauge("due_studies", "Studies that wait to be published.")
        self._set_aside = _gauge("set_aside_studies", "Studies whose publishing failed too often.")
        self._disk_free = _gauge("disk_free_bytes", "Free space under the root.")
        self._published = _counter("published_studies", "Times a study was published.")
        self._failed = _counter("failed_publishes", "Times publishing a study failed.")
        self._seconds = Histogram(
            "dicomscp_publish_seconds",
            "To compile and publish one study.",
            buckets=_PUBLISH_BUCKETS,
            registry=None,
        )
        self._sync_errors = _sync_errors()

    def applied(self, entries: int) -> None:
        """*entries* of the journal are in the index."""
        self._indexed.inc(entries)

    def published(self, seconds: float) -> None:
        """A study was published."""
        self._published.inc()
        self._seconds.observe(seconds)

    def failed(self) -> None:
        """Publishing a study failed."""
        self._failed.inc()

    def sync_failed(self) -> None:
        """A settle failed."""
        self._sync_errors.inc()

    def now(self, *, lag_bytes: int, due: int, set_aside: int, disk_free_bytes: int) -> None:
        """How things stand."""
        self._lag.set(lag_bytes)
        self._due.set(due)
        self._set_aside.set(set_aside)
        self._disk_free.set(disk_free_bytes)
