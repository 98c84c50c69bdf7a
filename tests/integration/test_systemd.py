"""The service file: what systemd makes of it, and what the program it starts needs of its sandbox."""

import configparser
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest

from dicomscp import config
from dicomscp.dimse import client
from tests.peers import require
from tests.processes import Server, wait_until

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd" / "dicomscp.service"
SHIPPED = ROOT / "conf" / "dicomscp.toml"
EXPOSURE = 1.2  # as systemd/README.md says


@pytest.fixture(scope="module")
def service():
    """The settings of [Service], each with the list of its values."""
    found = defaultdict(list)
    section = ""
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return dict(found)


def one(service, name):
    (value,) = service[name]
    return value


def test_the_unit_is_well_formed():
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(UNIT)

    assert parser.sections() == ["Unit", "Service", "Install"]


def test_systemd_understands_every_line():
    analyze = require("systemd-analyze", "systemd")

    run = subprocess.run(
        [analyze, "verify", "--man=no", str(UNIT)], capture_output=True, text=True, check=False, timeout=60
    )

    # The program itself is not installed where the unit says.
    complaints = [line for line in run.stderr.splitlines() if "is not executable" not in line]
    assert [line for line in complaints if "dicomscp.service" in line] == []


def test_the_sandbox_is_as_tight_as_it_can_be():
    analyze = require("systemd-analyze", "systemd")

    run = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    (exposure,) = re.findall(r"Overall exposure level for dicomscp.service: ([0-9.]+)", run.stdout)
    assert float(exposure) <= EXPOSURE, run.stdout


def test_it_stops_after_the_drain_and_starts_again_unless_misconfigured(service):
    drain_seconds = config.load(SHIPPED, {}, {}).drain_seconds

    assert one(service, "KillMode") == "mixed"
    assert int(one(service, "TimeoutStopSec")) >= drain_seconds + 15
    assert one(service, "Restart") == "on-failure"
    assert one(service, "RestartPreventExitStatus") == "2"
    assert int(one(service, "WatchdogSec")) > 30


def test_it_runs_as_its_own_user_in_its_own_directory(service):
    root = config.load(SHIPPED, {}, {}).root

    assert one(service, "User") == "dicomscp"
    assert root == Path("/var/lib") / one(service, "StateDirectory")
    assert one(service, "StateDirectoryMode") == "0700"
    assert one(service, "UMask") == "0077"
    assert (ROOT / "systemd" / "dicomscp.sysusers").read_text(encoding="utf-8").startswith("u dicomscp ")


def test_its_command_line_is_one_that_we_understand(service):
    program, command, *options = shlex.split(one(service, "ExecStart"))

    assert Path(program).name == "dicomscp"
    assert (command, options) == ("serve", ["--config", "/etc/dicomscp/dicomscp.toml"])


class Service:
    """The gateway on free ports, as systemd would start it, and what it says by sd_notify."""

    def __init__(self, folder, *before):
        self.root = folder / "root"
        self._messages = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        serve = [sys.executable, "-m", "dicomscp", "serve", "--root", self.root]
        self.server = Server(
            [*before, *serve, "--dimse-port", "0", "--web-port", "0"],
            folder / "log",
            environ=os.environ | {"NOTIFY_SOCKET": str(folder / "notify"), "PYTHONPATH": str(ROOT)},
        )

    def start(self):
        self.server.start(lambda: self.said("READY=1"), 120)

    def said(self, message):
        """Whether *message* was heard by now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._messages += self._socket.recv(4096, socket.MSG_DONTWAIT).decode().splitlines()
        return message in self._messages

    def stop(self):
        """The exit status after SIGTERM."""
        os.kill(json.loads((self.root / "run" / "state.json").read_bytes())["pid"], signal.SIGTERM)
        wait_until(lambda: self.said("STOPPING=1") and not self.server.running, 60, "serve to end")
        return self.server.wait(1)

    def close(self):
        self.server.stop()
        self._socket.close()


@pytest.fixture
def service_of(tmp_path):
    services = []

    def start(*before):
        services.append(Service(tmp_path, *before))
        services[-1].start()
        return services[-1]

    yield start
    for service in services:
        service.close()


def test_it_says_when_it_is_ready_alive_and_stopping(service_of):
    gateway = service_of()

    wait_until(lambda: gateway.said("WATCHDOG=1"), 30, "a sign of life")
    assert gateway.stop() == 0


_NO_WRITE_AND_EXECUTE = """
import ctypes, os, sys
# prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN), since Linux 6.3: what MemoryDenyWriteExecute= asks.
if ctypes.CDLL(None, use_errno=True).prctl(65, 1, 0, 0, 0) != 0:
    sys.stderr.write("PR_SET_MDWE: %s" % os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_it_runs_without_memory_that_is_written_and_executed(service_of):
    gateway = service_of(sys.executable, "-c", _NO_WRITE_AND_EXECUTE)

    assert gateway.stop() == 0


# What libraries try, and do without when the filter refuses it: SQLite, as root, to give its files away;
# granian's allocator to choose a memory node.
_DONE_WITHOUT = {"fchown", "mbind"}


def allowed_calls(analyze, filters):
    """The system calls that the filters leave, each taken in its order, groups resolved."""

    def resolve(name):
        if not name.startswith("@"):
            return {name}
        listed = subprocess.run([analyze, "syscall-filter", name], capture_output=True, text=True, check=True)
        lines = [line.strip() for line in listed.stdout.splitlines()[1:]]
        return set().union(*(resolve(line) for line in lines if line and not line.startswith("#")))

    allowed = resolve("@default")  # implied by a list of what is allowed
    for line in filters:
        names = set().union(*(resolve(name) for name in line.removeprefix("~").split()))
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed


def _use(gateway, files):
    """Let every part do what it is there for, instances of any size included."""
    state = json.loads((gateway.root / "run" / "state.json").read_bytes())
    outcomes = list(client.send(files, client.Peer("DICOMSCP", "127.0.0.1", state["dimse"]["port"])))
    assert [outcome.status for outcome in outcomes] == [0] * len(files)
    (gateway.root / "inbox" / "x").write_text("no DICOM")
    quarantined = gateway.root / "quarantine" / "x"
    wait_until(lambda: gateway.said("READY=1") and quarantined.exists(), 60, "the inbox to look at a file")
    published = gateway.root / "dicomweb" / "studies"
    wait_until(
        lambda: len(list(published.glob("*/metadata.gz"))) == len(files), 60, "the studies to be published"
    )
    with urllib.request.urlopen(
        f"http://127.0.0.1:{state['web']['port']}/dicomweb/studies", timeout=30
    ) as answer:
        assert len(json.load(answer)) == len(files)


def test_every_system_call_it_makes_is_one_that_the_service_allows(
    service_of, service, tmp_path, pydicom_files
):
    analyze, strace = require("systemd-analyze", "systemd"), require("strace", "strace")
    trace = tmp_path / "trace"

    refuse = f"inject={','.join(_DONE_WITHOUT)}:error=EPERM"
    gateway = service_of(strace, "-f", "-qq", "--signal=none", "-o", str(trace), "-e", refuse)
    _use(gateway, [pydicom_files / name for name in ("CT_small.dcm", "examples_rgb_color.dcm")])
    assert gateway.stop() == 0

    made = set(
        re.findall(r"^\d+ +(\w+)\(", trace.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    )
    assert len(made) > 50
    assert made - allowed_calls(analyze, service["SystemCallFilter"]) <= _DONE_WITHOUT
