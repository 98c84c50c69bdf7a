"""The service file: what systemd makes of it, and what the program it starts needs of its sandbox."""

import configparser
import os
import re
import shlex
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from dicomscp import config
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


@pytest.fixture
def serving(tmp_path):
    """The gateway on free ports, started by *before* its command line, with its sd_notify socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(30)
        servers = []

        def start(*before):
            server = Server(
                [*before, sys.executable, "-m", "dicomscp", "serve", "--root", tmp_path / "root",
                 "--dimse-port", "0", "--web-port", "0"],
                tmp_path / "log",
                environ=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            servers.append(server)
            server.start((tmp_path / "root" / "run" / "state.json").exists, 60)
            return server

        yield start, notified
        for server in servers:
            server.stop()


def messages(notified, until):
    """What was notified, up to *until*."""
    found = []
    while not found or until not in found[-1]:
        found.append(notified.recv(4096).decode())
    return found


def test_it_says_when_it_is_ready_alive_and_stopping(serving):
    start, notified = serving
    server = start()

    assert messages(notified, "READY=1")
    assert messages(notified, "WATCHDOG=1")
    os.kill(server.pid, 15)
    assert messages(notified, "STOPPING=1")
    assert server.wait(30) == 0


_NO_WRITE_AND_EXECUTE = """
import ctypes, os, sys
# prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN), since Linux 6.3: what MemoryDenyWriteExecute= asks.
if ctypes.CDLL(None, use_errno=True).prctl(65, 1, 0, 0, 0) != 0:
    sys.stderr.write("PR_SET_MDWE: %s" % os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_it_runs_without_memory_that_is_written_and_executed(serving):
    start, notified = serving

    server = start(sys.executable, "-c", _NO_WRITE_AND_EXECUTE)

    assert messages(notified, "READY=1")
    os.kill(server.pid, 15)
    assert server.wait(30) == 0


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


def test_every_system_call_it_makes_is_one_that_the_service_allows(serving, service, tmp_path):
    analyze, strace = require("systemd-analyze", "systemd"), require("strace", "strace")
    start, notified = serving
    trace = tmp_path / "trace"

    server = start(strace, "-f", "-qq", "--signal=none", "-o", str(trace))
    messages(notified, "READY=1")
    state = (tmp_path / "root" / "run" / "state.json").read_text(encoding="utf-8")
    (pid,) = re.findall(r'"pid": ?(\d+)', state)
    (tmp_path / "root" / "inbox" / "x").write_text("no DICOM")
    wait_until(
        (tmp_path / "root" / "quarantine" / "x").exists, 60, "the inbox to look at what it cannot take"
    )
    os.kill(int(pid), 15)
    server.wait(60)

    made = set(
        re.findall(r"^\d+ +(\w+)\(", trace.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    )
    assert len(made) > 50
    assert made - allowed_calls(analyze, service["SystemCallFilter"]) == set()
