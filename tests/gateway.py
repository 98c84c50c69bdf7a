"""The real gateway, as an operator runs it: `python -m dicomscp serve` in a process of its own.

Ports are free ones that the gateway chose and wrote into run/state.json.  Settings go in by a TOML file or by
the environment (`{"storage.durability": "relaxed"}`), as they do in production; nothing is imported from it.
"""

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.processes import GoneError, Server, alive, command_of, descendants, wait_until

REPOSITORY = Path(__file__).resolve().parents[1]

_SETTINGS = {"storage.segment_size": "4MiB"}  # three are written in full before it is ready
_START_SECONDS = 60
_STOP_SECONDS = 60
_KILL_SECONDS = 10
_PARTS = re.compile(r"dicomscp (pipeline|web|inbox|listener-\d+|worker)")


def run_command(*arguments: object, **environ: str) -> "subprocess.CompletedProcess[str]":
    """`dicomscp` with *arguments* to its end, without the settings of whoever runs the tests."""
    return subprocess.run(
        [sys.executable, "-m", "dicomscp", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=REPOSITORY,
        env=_inherited() | environ,
    )


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DICOMSCP_")}


class Gateway:
    """A gateway over *root*; as a context manager it runs inside and is stopped after.

    It may be started again over the same root, after `stop` or `kill`.  What it logs is appended to *log*,
    one JSON object a line.  *wrapper* is put before the command, such as strace and its options.
    *certificate* is that of its web server, if it speaks HTTPS.
    """

    def __init__(
        self,
        root: Path,
        *,
        settings: Mapping[str, object] | None = None,
        config: Path | None = None,
        arguments: Sequence[str] = (),
        wrapper: Sequence[str] = (),
        certificate: Path | None = None,
    ) -> None:
        self.root = root.resolve()
        self.log = self.root.with_name(f"{self.root.name}.log")
        self._settings = _SETTINGS | dict(settings or {})
        self._wrapper = list(wrapper)
        self._command = [sys.executable, "-m", "dicomscp", "serve", "--root", str(self.root)]
        self._command += ["--config", str(config)] if config else []
        self._command += ["--dimse-port", "0", "--web-port", "0", *arguments]
        self._server: Server | None = None
        self._state: dict[str, Any] = {}
        self._log_start = 0
        self.context = ssl.create_default_context(cafile=certificate) if certificate else None

    def start(self, seconds: float = _START_SECONDS) -> Self:
        """Return once it is ready: it says so, and both ports answer.  GoneError, with its log, if not."""
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._state = {}
        self._server = Server(
            [*self._wrapper, *self._command], self.log, environ=self._environ(), directory=REPOSITORY
        )
        self._server.start(self._is_ready, seconds)
        return self

    def stop(self, seconds: float = _STOP_SECONDS) -> int:
        """Ask it to end, as systemd does; its exit status.  GoneError if it does not; then it was killed."""
        if self._server is None:
            raise GoneError("the gateway was not started")
        with contextlib.suppress(ProcessLookupError):
            if self._server.running:
                os.kill(self.pid, signal.SIGTERM)
        try:
            return self._server.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill all of its processes at once and return when none is left.  Harmless to repeat."""
        if self._server is not None:
            self._server.stop(0)

    def kill_part(self, name: str) -> int:
        """Kill the process of the part called *name*, such as "pipeline"; the pid that it had."""
        pid = self.parts()[name]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid), _KILL_SECONDS, f"{name} to be gone")
        return pid

    @property
    def running(self) -> bool:
        """Whether the supervisor runs."""
        return self._server is not None and self._server.running

    @property
    def pid(self) -> int:
        """The supervisor's."""
        if self._server is None:
            raise GoneError("the gateway was not started")
        return int(self._state.get("pid", self._server.pid))

    @property
    def port(self) -> int:
        """Where associations are accepted."""
        return int(self._state["dimse"]["port"])

    @property
    def web_port(self) -> int:
        """Where the web server answers."""
        return int(self._state["web"]["port"])

    @property
    def ae_title(self) -> str:
        """The AE title it goes by."""
        return str(self._state["dimse"]["ae_title"])

    def url(self, path: str = "/") -> str:
        """The address of *path* on its web server."""
        return f"{self._state['web']['scheme']}://127.0.0.1:{self.web_port}{path}"

    def get(self, path: str, *, accept: str = "*/*", seconds: float = 30) -> bytes:
        """The body of a 200 or 204.  Raises urllib.error.HTTPError for 4xx and 5xx."""
        request = urllib.request.Request(self.url(path), headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=seconds, context=self.context) as answer:
            return bytes(answer.read())

    def get_json(self, path: str, *, seconds: float = 30) -> Any:
        """The document at *path*; an empty list for 204, which is QIDO-RS for no match."""
        body = self.get(path, accept="application/dicom+json, application/json", seconds=seconds)
        return json.loads(body) if body else []

    def processes(self) -> dict[int, str]:
        """Every process of it by pid, with the part it belongs to, such as "supervisor" or "listener-0"."""
        names = {self.pid: "supervisor"}
        for pid in descendants(self.pid):
            part = _PARTS.fullmatch(" ".join(command_of(pid)).strip())
            names[pid] = part[1] if part else "supervisor"
        return names

    def parts(self) -> dict[str, int]:
        """The pid of each part's first process, by name."""
        found: dict[str, int] = {}
        for pid, name in self.processes().items():
            found.setdefault(name, pid)
        return found

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What it has logged since it was started, or those events called *name*."""
        if not self.log.exists():
            return []
        lines = self.log.read_bytes()[self._log_start :].decode(errors="replace").splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [event for event in events if name in (None, event.get("event"))]

    def wait_for_event(self, name: str, seconds: float = 10, **facts: object) -> dict[str, Any]:
        """The first event called *name* with *facts*, waited for.  Raises GoneError after *seconds*."""
        found: list[dict[str, Any]] = []

        def logged() -> bool:
            found[:] = [event for event in self.events(name) if facts.items() <= event.items()]
            return bool(found)

        wait_until(logged, seconds, f"the event {name} {facts or ''}")
        return found[0]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._server is not None and self._server.running:
            self.stop()
        else:
            self.kill()

    def _environ(self) -> dict[str, str]:
        named = {
            f"DICOMSCP_{key.upper().replace('.', '__')}": _written(value)
            for key, value in self._settings.items()
        }
        return {**_inherited(), "DICOMSCP_LOG__FORMAT": "json", "PYTHONUNBUFFERED": "1", **named}

    def _is_ready(self) -> bool:
        return self._reads_state() and bool(self.events("ready")) and self._web_answers()

    def _reads_state(self) -> bool:
        """Take over run/state.json, unless it is of an earlier life."""
        if self._server is None:
            return False
        try:
            state = json.loads((self.root / "run" / "state.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return False
        if state["pid"] != self._server.pid and state["pid"] not in descendants(self._server.pid):
            return False
        self._state = state
        return True

    def _web_answers(self) -> bool:
        with (
            contextlib.suppress(OSError),  # URLError and HTTPError are such
            urllib.request.urlopen(self.url("/readyz"), timeout=5, context=self.context) as answer,
        ):
            return bool(answer.read())
        return False


def wait_for_instances(gateway: Gateway, study_uid: str, count: int, seconds: float = 30) -> float:
    """Return once QIDO-RS counts *count* instances in the study, with the seconds that it took."""
    path = f"/dicomweb/studies?StudyInstanceUID={study_uid}&includefield=00201208"

    def counted() -> bool:
        with contextlib.suppress(urllib.error.HTTPError):
            studies = gateway.get_json(path)
            return bool(studies) and studies[0].get("00201208", {}).get("Value", [0])[0] >= count
        return False

    began = time.monotonic()
    wait_until(counted, seconds, f"{count} instances of {study_uid} in the index")
    return time.monotonic() - began


def _written(value: object) -> str:
    """A setting as the environment has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)
