"""Probes: what a sync costs on this disk, which syncs and how much processor time a gateway spends."""

import mmap
import os
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.gateway import Gateway
from tests.processes import cpu_seconds, peak_rss_bytes

_WRITE_BYTES = 15 * 1024
_SYNC_CALLS = "fsync,fdatasync,syncfs,sync,sync_file_range,msync"
_SYNC_LINE = re.compile(r"(\d+\.\d+) (fsync|fdatasync|syncfs|sync|sync_file_range|msync)\((?:\d+<([^>]*)>)?")


def strace_command(output: Path) -> list[str]:
    """What is put before a command, so that every sync of it and of its children is written to *output*."""
    trace = ["-f", "--seccomp-bpf", "-qq", "-ttt", "-y", "-e", f"trace={_SYNC_CALLS}", "-o", str(output)]
    return ["strace", *trace]


def syncs(output: Path, root: Path, began: float, ended: float) -> Counter[str]:
    """The syncs between two times of the wall clock, by call and by the folder under *root* they were for."""
    found: Counter[str] = Counter()
    for line in output.read_text(errors="replace").splitlines():
        match = _SYNC_LINE.search(line)
        if match and began <= float(match[1]) <= ended:
            found[f"{match[2]} {_place(match[3] or '', root)}"] += 1
    return found


def _place(path: str, root: Path) -> str:
    """The folder below the root; of journal and incoming, with the kind of writer, as in journal/listener."""
    try:
        first, *more = Path(path.removesuffix("(deleted)").strip()).relative_to(root).parts or ("root",)
    except ValueError:
        return "elsewhere"
    writer = more[0].partition("-")[0] if more and first in ("journal", "incoming") else ""
    return f"{first}/{writer}" if writer else first


def disk_costs(directory: Path, repeats: int = 200) -> dict[str, float]:
    """Median milliseconds of what a durable store is made of, on the file system of *directory*."""
    written = directory / "written"
    written.write_bytes(bytes(_WRITE_BYTES * repeats))
    data = os.urandom(_WRITE_BYTES)
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
        with written.open("r+b", buffering=0) as file:
            os.fdatasync(file.fileno())
            append = _timed(repeats, lambda number: _append(file.fileno(), data, number))
        new_file = _timed(repeats, lambda number: _new_file(directory, data, number))
        named = _timed(repeats, lambda number: _new_name(directory, data, number + repeats, folder))
    finally:
        os.close(folder)
    for path in directory.iterdir():
        path.unlink()
    return {
        "15 KB into a written file, fdatasync": append,
        "15 KB into a new file, fdatasync": new_file,
        "15 KB into a new file, fdatasync, fsync of its folder": named,
    }


def _append(descriptor: int, data: bytes, number: int) -> None:
    os.pwrite(descriptor, data, number * len(data))
    os.fdatasync(descriptor)


def _new_file(directory: Path, data: bytes, number: int) -> None:
    descriptor = os.open(directory / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, data)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _new_name(directory: Path, data: bytes, number: int, folder: int) -> None:
    _new_file(directory, data, number)
    os.fsync(folder)


def _timed(repeats: int, action: Callable[[int], object]) -> float:
    times = []
    for number in range(repeats):
        began = time.perf_counter()
        action(number)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def flush(directory: Path) -> None:
    """Write out what the file system still holds back: the next turn is not to pay for the last."""
    subprocess.run(["sync", "-f", str(directory)], check=False)


def warm_memory(max_bytes: int) -> int:
    """Touch *max_bytes*, at most a quarter of what is available, and give it back; what was touched.

    In a virtual machine a page that the host has not backed yet costs its first user microseconds: whoever
    writes files first would pay for the page cache of those who come after.
    """
    wanted = min(max_bytes, os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE // 4)
    with mmap.mmap(-1, wanted) as memory:
        for at in range(0, wanted, mmap.PAGESIZE):
            memory[at] = 1
    return wanted


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor time by kind of part, as it stood."""

    seconds: dict[str, float]

    @classmethod
    def of(cls, gateway: Gateway) -> "Usage":
        """What the gateway's processes have used."""
        seconds: dict[str, float] = {}
        for pid, name in gateway.processes().items():
            kind = kind_of(name)
            seconds[kind] = seconds.get(kind, 0.0) + cpu_seconds(pid)
        return cls(seconds)

    def since(self, earlier: "Usage") -> dict[str, float]:
        """Seconds used by each kind of part since *earlier*."""
        return {kind: value - earlier.seconds.get(kind, 0.0) for kind, value in self.seconds.items()}


def kind_of(part: str) -> str:
    """The part's name without a number: all listeners are "listener"."""
    return part.rstrip("0123456789").rstrip("-")


def listeners(gateway: Gateway) -> Iterator[int]:
    """The pids of the listeners."""
    return (pid for pid, name in gateway.processes().items() if kind_of(name) == "listener")


def listener_rss_mb(gateway: Gateway) -> float:
    """The largest peak of resident memory among the listeners, in 10**6 bytes."""
    return max((peak_rss_bytes(pid) for pid in listeners(gateway)), default=0) / 1e6
