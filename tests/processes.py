"""Processes as /proc has them, and servers that are started and ended by pid.

Nothing here finds a process by name: what is ended is what was started, or descends from it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_POLL_SECONDS = 0.01
_KILL_SECONDS = 10


class GoneError(Exception):
    """A server did not come up, ended, or did not do in time what was waited for."""


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Return once *condition* holds.  Raises GoneError, naming *what*, after *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise GoneError(f"waited {seconds:g} s in vain: {what}")
        time.sleep(_POLL_SECONDS)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether somebody listens on *port* of 127.0.0.1.  Connects and leaves, as a port probe does."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ...; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def descendants(pid: int) -> Iterator[int]:
    """The processes below *pid*, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        found = sorted(children.get(waiting.pop(), ()))
        yield from found
        waiting += found


def session_of(leader: int) -> list[int]:
    """The living processes of the session that *leader* began, the leader itself gone or not."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in found if (fields := _stat(pid)) and int(fields[3]) == leader and alive(pid)]


def command_of(pid: int) -> list[str]:
    """The command line; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def cpu_seconds(pid: int) -> float:
    """User and system time that all threads of the process have used, in steps of a tick (10 ms)."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) * _TICK_SECONDS if fields else 0.0


def peak_rss_bytes(pid: int) -> int:
    """The most memory that was resident since the start, or since `reset_peak_rss`."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def reset_peak_rss(pid: int) -> None:
    """Let the peak begin anew at what is resident now."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


class Server:
    """A server program in a session of its own, so that a Ctrl-C at the terminal reaches us and not it.

    What it writes, to either stream, is in the file *log*.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        environ: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self._environ = None if environ is None else dict(environ)
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the program that was started."""
        if self._process is None:
            raise GoneError(f"{self.command[0]} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self, ready: Callable[[], object], seconds: float) -> None:
        """Start it and return once *ready* holds.  GoneError if it ends or takes longer than *seconds*."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environ,
                cwd=self._directory,
                start_new_session=True,
            )
        try:
            wait_until(lambda: not self.running or ready(), seconds, f"{self.command[0]} to be ready")
        except BaseException as error:
            self.stop(0)
            if isinstance(error, GoneError):
                raise GoneError(f"{error}{self._tail()}") from error
            raise
        if not self.running:
            self.stop(0)
            raise GoneError(f"{self.command[0]} ended with status {self._process.returncode}{self._tail()}")

    def wait(self, seconds: float) -> int:
        """Its exit status once it has ended.  Raises GoneError after *seconds*."""
        if self._process is None:
            raise GoneError(f"{self.command[0]} was not started")
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise GoneError(f"{self.command[0]} runs on after {seconds:g} s{self._tail()}") from error

    def stop(self, seconds: float = 10) -> None:
        """End it, and kill what is left of its session after *seconds*: none runs when this returns.

        Harmless to repeat.
        """
        if self._process is None:
            return
        if self.running and seconds:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        # The leader's pid names the group, and nothing else, while one member lives; the leader may be gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        wait_until(
            lambda: not session_of(self.pid), _KILL_SECONDS, f"the session of {self.command[0]} to end"
        )

    def _tail(self) -> str:
        text = self.log.read_text(errors="replace")[-2000:].strip() if self.log.exists() else ""
        return f"; it wrote:\n{text}" if text else ""
