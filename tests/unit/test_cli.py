"""The command line: what is said, where, and with which exit status."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from dicomscp import __version__, cli
from dicomscp.web import users
from tests.bench.instances import SIZES, Template
from tests.certificates import certified
from tests.processes import Server
from tests.unit.web.packages import package

PROJECT = Path(__file__).parents[2]
COMMANDS = [
    "serve", "check-config", "password", "import", "remove", "status", "verify", "rebuild", "viewer",
    "echo", "send", "find",
]  # fmt: skip
VIEWER_COMMANDS = ["viewer install", "viewer status", "viewer remove"]
DONE, FAILED, MISCONFIGURED = 0, 1, 2
CT_STUDY = "1.3.6.1.4.1.5962.1.2.1.20040119072730.12322"


def run(*arguments, **environ):
    """What the command does as a process, standard output and standard error apart."""
    return subprocess.run(
        [sys.executable, "-m", "dicomscp", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(PROJECT)} | environ,
    )


def invoke(*arguments, env=None, typed=None):
    """The same within this process, for what neither logs nor takes long."""
    return CliRunner(env=env).invoke(cli.cli, [str(argument) for argument in arguments], input=typed)


def test_the_commands_are_listed_in_the_order_of_use():
    result = invoke("--help")

    listed = re.findall(r"^  ([a-z-]+) +[A-Z]", result.output.partition("Commands:")[2], re.MULTILINE)
    assert listed == COMMANDS


@pytest.mark.parametrize("command", [*(one for one in COMMANDS if one != "viewer"), *VIEWER_COMMANDS])
def test_every_command_says_how_it_is_used(command):
    result = invoke(*command.split(), "--help")

    assert result.exit_code == DONE
    assert "--config FILE" in result.output
    assert "--root DIR" in result.output


def test_the_viewer_is_installed_told_of_and_removed(tmp_path):
    source, root = tmp_path / "ohif.tgz", ("--root", tmp_path / "root")
    integrity = package(source)

    assert invoke("viewer", "status", *root).exit_code == FAILED
    refused = invoke("viewer", "install", source, *root)
    assert (refused.exit_code, integrity in refused.output) == (FAILED, True)
    assert invoke("viewer", "install", source, "--integrity", integrity, *root).exit_code == DONE
    told = json.loads(invoke("viewer", "status", "--json", *root).stdout)
    assert (told["installed"]["integrity"], told["base_path"]) == (integrity, "/ohif")
    assert (tmp_path / "root/viewer/site/index.html.gz").is_file()
    assert [invoke("viewer", "remove", *root).exit_code for _ in range(2)] == [DONE, FAILED]
    assert invoke("viewer", "install", source, "--version", "3.12.0", *root).exit_code == MISCONFIGURED


def test_the_version_is_said():
    assert invoke("--version").output == f"dicomscp {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["import"], ["import", "/none"], ["serve", "--dimse-port", "x"]]
)
def test_wrong_usage_is_exit_status_2(arguments):
    assert invoke(*arguments).exit_code == MISCONFIGURED


def test_a_good_configuration_is_said_to_be_good():
    result = invoke("check-config", "--config", PROJECT / "conf" / "dicomscp.toml")

    assert result.exit_code == DONE
    assert result.output == (
        "The configuration is good: AE DICOMSCP on 0.0.0.0:11112, web on 127.0.0.1:8080, "
        "root /var/lib/dicomscp\n"
    )


def test_every_error_in_the_configuration_is_one_line_and_exit_status_2(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text('dran_seconds = 1\n[web]\nhost = "0.0.0.0"\n')

    result = invoke("check-config", env={"DICOMSCP_CONFIG": str(file)})

    assert result.exit_code == MISCONFIGURED
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first == f"dicomscp: {file}: dran_seconds: unknown key; did you mean drain_seconds?"
    assert second.startswith(f"dicomscp: {file}: web.host: is reached by other machines")


def test_a_configuration_that_is_wrong_ends_serve_before_it_begins(tmp_path):
    result = run("serve", "--root", tmp_path / "root", "--web-host", "0.0.0.0")

    assert result.returncode == MISCONFIGURED
    assert result.stderr.startswith("dicomscp: command line: web.host: ")
    assert not (tmp_path / "root").exists()


def test_a_password_is_read_from_standard_input_and_lets_in(tmp_path):
    environ = {"DICOMSCP_WEB__USERS_FILE": str(tmp_path / "users")}
    typed = "a good password\nrest\n"
    result = invoke("password", "anna", "--scope", "read,write", env=environ, typed=typed)
    assert (result.exit_code, result.output) == (
        DONE,
        "anna has a new password and may read and write; a new user\n",
    )
    user = users.read(tmp_path / "users")["anna"]
    assert user.principal.scopes == {"read", "write"}
    assert user.has("a good password")

    result = invoke("password", "anna", env=environ, typed="another password\n")
    assert result.output == "anna has a new password and may read\n"
    assert users.read(tmp_path / "users")["anna"].has("another password")

    assert invoke("password", "anna", "--remove", env=environ).exit_code == DONE
    assert users.read(tmp_path / "users") == {}
    assert invoke("password", "anna", "--remove", env=environ).exit_code == FAILED


def test_a_password_is_typed_twice_at_a_terminal_and_not_shown(tmp_path):
    """A pseudo-terminal, for whether letters are echoed is the terminal's doing."""
    ours, theirs = pty.openpty()
    environ = os.environ | {"DICOMSCP_WEB__USERS_FILE": str(tmp_path / "users"), "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [sys.executable, "-m", "dicomscp", "password", "anna"],
        env=environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as command:
        shown = b""
        for typed in (b"a good password\n", b"a good password\n"):
            before = shown.count(b":")
            while shown.count(b":") <= before:
                shown += os.read(ours, 1024)
            os.write(ours, typed)
        assert command.wait(60) == DONE
    os.close(theirs)
    with contextlib.suppress(OSError):  # nobody is left at the other side
        while more := os.read(ours, 1024):
            shown += more
    os.close(ours)
    assert b"a good password" not in shown
    assert users.read(tmp_path / "users")["anna"].has("a good password")


def test_what_a_password_cannot_be_is_said(tmp_path):
    environ = {"DICOMSCP_WEB__USERS_FILE": str(tmp_path / "users")}
    asks = [
        ({}, ["password", "anna"], "long enough\n", MISCONFIGURED, "web.users_file names no file"),
        (environ, ["password", "anna"], "short\n", MISCONFIGURED, "at least 8 characters"),
        (environ, ["password", "an:na"], "long enough\n", MISCONFIGURED, "without a colon"),
        (environ, ["password", "anna", "--scope", "all"], "", MISCONFIGURED, "is not read, write"),
        (environ, ["password", "anna", "--remove"], "", MISCONFIGURED, "cannot be read"),
    ]
    for env, arguments, typed, status, sentence in asks:
        result = invoke(*arguments, env=env, typed=typed)
        assert result.exit_code == status
        assert sentence in result.output
    assert not (tmp_path / "users").exists()


def test_files_that_the_web_server_lives_by_are_looked_at(tmp_path):
    certificate_file, key_file = certified(tmp_path, ends=timedelta(days=5))
    file = tmp_path / "web.toml"
    file.write_text(
        f'[web]\nusers_file = "{tmp_path}/users"\ncertificate_file = "{certificate_file}"\n'
        f'key_file = "{key_file}"\n'
    )
    result = invoke("check-config", "--config", file)
    assert result.exit_code == MISCONFIGURED
    assert "web.users_file" in result.stderr

    users.set_password(tmp_path / "users", "anna", ["read"], "a good password", cost=users.Cost(10, 8, 1))
    result = invoke("check-config", "--config", file)
    assert result.exit_code == DONE
    assert "renew it and restart" in result.stderr
    assert "The configuration is good" in result.stdout

    key_file.write_text("none")
    (tmp_path / "users").chmod(0o666)
    result = invoke("check-config", "--config", file)
    assert result.exit_code == MISCONFIGURED
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == ["web.users_file", "web.key_file"]


def test_settings_of_the_viewer_are_looked_at(tmp_path):
    file, settings = tmp_path / "gateway.toml", tmp_path / "viewer.json"
    file.write_text(f'[viewer]\nsettings = "{settings}"\n[web]\nusers_file = "{tmp_path}/none"\n')
    for text, told in (
        (None, "cannot be read"),
        ("[1]", "not a JSON object"),
        ('{"dataSources": 1}', "list"),
    ):
        if text is not None:
            settings.write_text(text)
        result = invoke("check-config", "--config", file)
        assert result.exit_code == MISCONFIGURED
        users_line, viewer_line = result.stderr.splitlines()
        assert "web.users_file" in users_line
        assert "viewer.settings" in viewer_line
        assert told in viewer_line
    settings.write_text('{"showStudyList": false}')
    (tmp_path / "gateway.toml").write_text(f'[viewer]\nsettings = "{settings}"\n')
    assert invoke("check-config", "--config", file).exit_code == DONE


def test_all_settings_in_force_are_one_json_object():
    result = invoke("check-config", "--json", "--root", "/x", env={"DICOMSCP_DIMSE__PORT": "104"})

    settings = json.loads(result.output)
    assert (settings["root"], settings["dimse"]["port"], settings["storage"]["reserve"]) == (
        "/x",
        104,
        1 << 30,
    )


def test_what_takes_long_is_a_line_at_times_away_from_a_terminal(capsys):
    seconds = iter([7.0, 8.0, 9.0, 9.5, 11.0])
    lines = cli._Lines(now=lambda: next(seconds))
    lines(1, 5000, "importing")
    lines(100, 5000, "importing")
    lines(201, 5000, "importing")
    lines(250, 5000, "importing")
    lines(3, None, "looking")

    captured = capsys.readouterr()
    assert captured.err == ("importing: 201 of 5000, 100/s, 48 s left\nlooking: 3, total not known yet\n")
    assert captured.out == ""


def test_a_rate_is_that_of_the_last_seconds():
    pace = cli._Pace()
    for second in range(20):
        pace.reached(1000 * second, second)
    assert pace.text(39_000) == "1000/s, 20 s left"

    for second in range(20, 40):
        pace.reached(19_000 + 5 * (second - 19), second)
    assert pace.text(39_000) == "5.0/s, 1 h 6 min left"
    assert pace.text(None) == "5.0/s, total not known yet"


def test_noting_the_pace_often_does_not_take_more_memory():
    pace = cli._Pace()
    for number in range(100_000):
        pace.reached(number, number / 1000)

    assert len(pace._seen) < 100
    assert pace.text(None) == "1000/s, total not known yet"


def test_what_goes_on_at_a_terminal_is_a_bar_with_rate_and_time_left(tmp_path):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    folder = tmp_path / "in"
    Template(SIZES["15 KB"]).write_series(folder, 400)
    command = [sys.executable, "-m", "dicomscp", "import", "--root", str(tmp_path / "root"), str(folder)]
    with subprocess.Popen(
        command, stderr=follower, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(PROJECT)}
    ) as process:
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other side has closed it
            while piece := os.read(leader, 1 << 16):
                shown += piece
        os.close(leader)
        out = process.stdout.read()

    assert (process.returncode, out) == (DONE, b"400 taken, 0 refused\n")
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown)  # without colours
    assert re.search(rb"importing .* \d+/400 +[\d.]+/s, .*\d s left", text)


def test_a_report_is_lines_for_people():
    report = {
        "running": True,
        "serve": None,
        "disk_free_bytes": 3 << 30,
        "held": {"studies": 1, "series": 0, "bytes": 10},
        "set_aside": [{"study": "1.2", "attempts": 3, "bytes": 2048, "last_at": None, "file": "a\x1b[2J"}],
    }

    assert list(cli._flat(report)) == [
        ("running", "yes"),
        ("serve", "-"),
        ("disk free", "3.0 GiB"),
        ("held studies", "1"),
        ("held series", "0"),
        ("held in all", "10 bytes"),
        ("set aside", "1"),
        ("", "study 1.2, attempts 3, bytes 2.0 KiB, last at -, file a�[2J"),
    ]


def test_files_are_imported_the_rest_is_refused_with_its_reason(tmp_path, ct_small):
    (tmp_path / "in").mkdir()
    shutil.copy(ct_small, tmp_path / "in" / "ct.dcm")
    (tmp_path / "in" / "letter.txt").write_text("Dear colleague")

    result = run("import", "--root", tmp_path / "root", tmp_path / "in")

    assert result.returncode == FAILED
    assert result.stdout == "1 taken, 1 refused\n"
    assert result.stderr == f"{tmp_path}/in/letter.txt: The file is not DICOM.\n"
    assert (tmp_path / "in" / "ct.dcm").exists()


def test_what_was_imported_is_in_the_status_and_can_be_verified_and_rebuilt(tmp_path, ct_small):
    root = tmp_path / "root"
    result = run("import", "--json", "--root", root, ct_small)
    assert (result.returncode, json.loads(result.stdout)) == (
        DONE,
        {"admitted": 1, "refused": [], "stopped": ""},
    )

    status = json.loads(run("status", "--json", DICOMSCP_ROOT=str(root)).stdout)
    assert status["running"] is False
    assert status["held"]["instances"] == 1

    for command in ("rebuild", "verify"):
        result = run(command, "--root", root)
        assert (result.returncode, result.stderr) == (DONE, "")
    assert result.stdout == "1 instances checked, 0 findings\n"

    (instance,) = (root / "instances").rglob("*.dcm")
    data = bytearray(instance.read_bytes())
    data[-5000] ^= 1  # in the pixel data
    instance.write_bytes(data)
    result = run("verify", "--json", "--root", root)
    assert result.returncode == FAILED
    (finding,) = json.loads(result.stdout)["findings"]
    assert finding.startswith(str(instance.relative_to(root)))


def test_status_of_a_root_that_is_not_there_is_an_error(tmp_path):
    result = run("status", "--root", tmp_path / "none")

    assert result.returncode == MISCONFIGURED
    assert result.stderr.startswith("dicomscp: root: ")


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """A running gateway: its root and its address as a peer."""
    folder = tmp_path_factory.mktemp("serving")
    state = folder / "root" / "run" / "state.json"
    server = Server(
        [
            sys.executable,
            "-m",
            "dicomscp",
            "serve",
            "--root",
            folder / "root",
            "--dimse-port",
            "0",
            "--web-port",
            "0",
        ],
        folder / "log",
        environ=os.environ | {"PYTHONPATH": str(PROJECT)},
    )
    server.start(state.exists, 60)
    yield folder / "root", "DICOMSCP@127.0.0.1:{}".format(json.loads(state.read_text())["dimse"]["port"])
    server.stop()


def test_a_peer_that_is_there_answers_the_echo(serving):
    _, peer = serving

    result = run("echo", peer)

    assert result.returncode == DONE, result.stderr
    assert re.fullmatch(rf"{re.escape(peer)} answers in \d+\.\d ms\n", result.stdout)


def test_a_peer_that_is_not_there_is_one_line_and_exit_status_1():
    result = run("echo", "PACS@127.0.0.1:1", "--timeout", "2")

    assert result.returncode == FAILED
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("dicomscp: PACS@127.0.0.1:1 cannot be reached")


def test_a_peer_that_is_no_address_is_wrong_usage():
    result = run("echo", "localhost:104")

    assert result.returncode == MISCONFIGURED
    assert "AE@HOST:PORT" in result.stderr


def test_files_are_sent_as_they_are_the_rest_is_said_and_what_was_sent_is_found(
    serving, tmp_path, pydicom_files
):
    _, peer = serving
    for name in ("CT_small.dcm", "MR_small.dcm"):
        shutil.copy(pydicom_files / name, tmp_path / name)
    (tmp_path / "letter.txt").write_text("Dear colleague")

    result = run("send", peer, tmp_path)

    assert result.returncode == FAILED
    assert re.fullmatch(r"2 sent, \d+\.\d KiB in \d+\.\d s \(.*/s, .*/s\); 1 not\n", result.stdout)
    assert result.stderr == f"{tmp_path}/letter.txt: The file is not DICOM.\n"

    result = run("send", "--json", peer, tmp_path / "CT_small.dcm")
    sent = json.loads(result.stdout)
    assert (result.returncode, sent["sent"], sent["refused"]) == (DONE, 1, [])

    result = run("find", peer, "PatientID=1CT1", "StudyDescription")
    assert (result.returncode, result.stderr) == (DONE, "")
    assert re.search(r"^PatientName +CompressedSamples\^CT1$", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("\n1 found\n")

    (match,) = json.loads(
        run("find", "--json", "--level", "series", peer, f"StudyInstanceUID={CT_STUDY}").stdout
    )
    assert match["00080060"] == {"vr": "CS", "Value": ["CT"]}


def test_a_key_that_is_none_is_wrong_usage(serving):
    result = run("find", serving[1], "PatientNam=DOE")

    assert result.returncode == MISCONFIGURED
    assert "'PatientNam'" in result.stderr


def test_a_second_serve_on_one_root_fails_at_once_and_names_the_first(serving):
    root, _ = serving
    pid = json.loads((root / "run" / "state.json").read_text())["pid"]

    result = run("serve", "--root", root, "--dimse-port", "0", "--web-port", "0")

    assert result.returncode == FAILED
    assert f"pid {pid}" in result.stderr


def test_beside_a_running_serve_import_works_and_rebuild_is_refused(serving, pydicom_files):
    root, peer = serving

    assert run("import", "--root", root, pydicom_files / "rtplan.dcm").returncode == DONE
    result = run("rebuild", "--root", root)

    assert result.returncode == FAILED
    assert "is in use by serve" in result.stderr
    assert run("find", peer, "PatientID=id00001").stdout.endswith("1 found\n")


def test_status_of_a_running_serve_says_so(serving):
    status = json.loads(run("status", "--json", "--root", serving[0]).stdout)

    assert status["running"] is True
    assert run("status", "--root", serving[0]).returncode == DONE
