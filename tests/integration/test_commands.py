"""The command line as a person uses it: each command is a process, what it says and its exit status."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pydicom
import pytest
from pynetdicom import AE

from tests.bench.instances import SIZES, Template
from tests.gateway import REPOSITORY, Gateway, run_command, wait_for_instances
from tests.integration.commands import Run
from tests.peers import DCMTK, Peer, PynetdicomScp, StoreScp, find_program, require
from tests.processes import command_of, descendants, session_of, wait_until

COMMANDS = [
    "serve", "check-config", "import", "remove", "status", "verify", "rebuild", "echo", "send", "find",
]  # fmt: skip
DONE, FAILED, MISCONFIGURED, INTERRUPTED = 0, 1, 2, 130

CT_STUDY = "1.3.6.1.4.1.5962.1.2.1.20040119072730.12322"
MR_STUDY = "1.3.6.1.4.1.5962.1.2.4.20040826185059.5457"
RT_STUDY = "1.22.333.4.555555.6.7777777777777777777777777777"
STUDIES = {"CT_small.dcm": CT_STUDY, "MR_small.dcm": MR_STUDY, "rtplan.dcm": RT_STUDY}
SYNTAXES = [
    "CT_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_RLE.dcm",
    "image_dfl.dcm",
]
SETTLE_SECONDS = 2


def run(*arguments: object, **environ: str) -> Run:
    """The command as a process of its own, to its end."""
    result = run_command(*arguments, **environ)
    assert "Traceback" not in result.stderr, result.stderr
    return Run(result.returncode, result.stdout, result.stderr)


def dataset_of(path: Path) -> bytes:
    """What follows group 2 in a Part 10 file."""
    data = path.read_bytes()
    return data[144 + int.from_bytes(data[140:144], "little") :]


def copy(names: list[str] | dict[str, str], source: Path, folder: Path) -> Path:
    """*folder*, made and filled with the files called *names*."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, folder / name)
    return folder


def documents(root: Path) -> dict[str, bytes]:
    """What is published, uncompressed."""
    tree = root / "dicomweb"
    return {str(path.relative_to(tree)): gzip.decompress(path.read_bytes()) for path in tree.rglob("*.gz")}


def counts(root: Path) -> dict[str, int]:
    """What the status says is held."""
    return json.loads(run("status", "--json", "--root", root).out)["held"]


# ── help and settings ────────────────────────────────────────────────────────────────────────────


def test_the_program_lists_its_commands():
    result = run("--help")

    assert result.status == DONE
    assert all(f"\n  {command} " in result.out for command in COMMANDS)


def test_every_error_in_the_settings_is_told_at_once_with_its_key(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("""
drain_second = 3
[dimse]
ae_title = "A_TITLE_THAT_IS_TOO_LONG"
max_associations = 0
transfer_syntaxes = ["1.2.3"]
[[dimse.ae]]
title = "CT1"
addresses = ["10.1.2.300"]
[storage]
reserve = "much"
[web]
host = "0.0.0.0"
""")
    keys = [
        "drain_second",
        "dimse.ae_title",
        "dimse.max_associations",
        "dimse.transfer_syntaxes",
        "dimse.ae",
        "storage.reserve",
        "web.host",
        "web.port",
    ]

    for command in (["check-config"], ["serve", "--root", str(tmp_path / "root")]):
        result = run(*command, "--config", file, DICOMSCP_WEB__PORT="99999")

        assert (result.status, result.out) == (MISCONFIGURED, "")
        lines = result.err.splitlines()
        assert len(lines) == len(keys)
        for key in keys:
            assert [line for line in lines if re.search(rf": {re.escape(key)}[:\[]", line)], key
        assert [line for line in lines if "DICOMSCP_WEB__PORT" in line]
    assert not (tmp_path / "root").exists()


def test_a_file_of_settings_that_is_not_there_is_exit_status_2(tmp_path):
    result = run("check-config", "--config", tmp_path / "none.toml")

    assert (result.status, result.out) == (MISCONFIGURED, "")
    assert str(tmp_path / "none.toml") in result.err


# ── without serve ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def imported(tmp_path_factory, pydicom_files):
    """A root into which three studies were imported while no serve ran; tests work on copies."""
    folder = tmp_path_factory.mktemp("imported")
    result = run("import", "--root", folder / "root", copy(STUDIES, pydicom_files, folder / "in"))
    assert (result.status, result.out, result.err) == (DONE, "3 taken, 0 refused\n", "")
    return folder / "root"


@pytest.fixture
def copied(imported, tmp_path):
    """A copy of that root."""
    return Path(shutil.copytree(imported, tmp_path / "root", symlinks=True))


def test_an_import_without_serve_is_published_when_it_ends(imported):
    published = documents(imported)

    for study_uid in STUDIES.values():
        assert f"studies/{study_uid}/metadata.gz" in published
    listed = json.loads(published["studies/index.json.gz"])
    assert {study["0020000D"]["Value"][0] for study in listed} == set(STUDIES.values())


def test_an_import_takes_what_it_can_and_says_of_the_rest_why_not(tmp_path, pydicom_files):
    names = ["CT_small.dcm", "rtplan_truncated.dcm", "zipMR.gz"]
    folder = copy(names, pydicom_files, tmp_path / "in" / "deep")
    dicomdir = copy(["DICOMDIR"], pydicom_files / "dicomdirtests", tmp_path / "in")
    (folder / "letter.txt").write_text("Dear colleague")
    (folder / "empty.dcm").touch()
    (tmp_path / "outside").mkdir()
    shutil.copy(pydicom_files / "MR_small.dcm", tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    single = shutil.copy(pydicom_files / "rtplan.dcm", tmp_path / "one")

    result = run("import", "--json", "--root", tmp_path / "root", tmp_path / "in", single)

    assert result.status == FAILED
    report = json.loads(result.out)
    reasons = {Path(one["path"]).name: one["reason"] for one in report["refused"]}
    assert report["admitted"] == 2
    assert reasons.keys() == {"rtplan_truncated.dcm", "zipMR.gz", "DICOMDIR", "letter.txt", "empty.dcm"}
    assert "cut short" in reasons["rtplan_truncated.dcm"]
    assert "gzip" in reasons["zipMR.gz"].lower()
    assert "DICOMDIR" in reasons["DICOMDIR"]
    assert "not DICOM" in reasons["letter.txt"]
    assert reasons["empty.dcm"]
    assert len(result.err.splitlines()) == len(reasons)
    assert (dicomdir / "DICOMDIR").exists()


def test_a_path_that_is_not_there_is_wrong_usage(tmp_path):
    result = run("import", "--root", tmp_path / "root", tmp_path / "none")

    assert (result.status, result.out) == (MISCONFIGURED, "")
    assert "none" in result.err


def test_what_is_imported_again_changes_nothing(copied, pydicom_files):
    before = documents(copied)

    result = run("import", "--root", copied, pydicom_files / "CT_small.dcm")

    assert (result.status, result.out) == (DONE, "1 taken, 0 refused\n")
    assert documents(copied) == before
    held = counts(copied)
    assert (held["studies"], held["series"], held["instances"], held["variants"]) == (3, 3, 3, 3)


def test_the_status_of_what_does_not_run_says_so(imported):
    report = json.loads(run("status", "--json", "--root", imported).out)
    text = run("status", "--root", imported)

    assert (report["running"], report["serve"], report["associations"]) == (False, None, 0)
    assert (report["journal_waiting_bytes"], report["due"], report["set_aside"]) == (0, 0, [])
    assert report["disk_free_bytes"] > 0
    assert text.status == DONE
    assert re.search(r"^running +no$", text.out, re.MULTILINE)
    assert re.search(r"^held instances +3$", text.out, re.MULTILINE)


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_root_that_is_not_there_is_told_and_not_made(tmp_path, command):
    result = run(command, "--root", tmp_path / "none")

    assert (result.status, result.out) == (MISCONFIGURED, "")
    assert "does not exist" in result.err
    assert not (tmp_path / "none").exists()


# ── import with several processes ────────────────────────────────────────────────────────────────


def _tree(folder: Path, studies: int, instances: int) -> Path:
    """Made studies, each in a folder of its own."""
    template = Template(SIZES["15 KB"])
    for number in range(studies):
        template.write_series(folder / str(number), instances)
    return folder


class Importing:
    """An import that runs, in a session of its own; what it says is there when it has ended."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        command = [
            sys.executable,
            "-m",
            "dicomscp",
            "import",
            "--json",
            "--jobs",
            "2",
            "--root",
            root,
            folder,
        ]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def workers(self) -> list[int]:
        """The processes that read and journal."""
        return [pid for pid in descendants(self.process.pid) if "dicomscp worker" in command_of(pid)]

    def wait_until_filed(self, count: int) -> None:
        """Return once *count* instances have their names: others are still to be read."""
        instances = self.root / "instances"
        wait_until(lambda: sum(1 for _ in instances.rglob("*.dcm")) >= count, 60, "instances to be filed")

    def result(self) -> tuple[int, dict, str]:
        """Exit status, report, and what was said besides."""
        out, err = self.process.communicate(timeout=120)
        assert "Traceback" not in err, err
        return self.process.returncode, json.loads(out), err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        wait_until(lambda: not session_of(self.process.pid), 20, "its workers to end with it")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """So many files that an import of them can be met on its way."""
    folder = _tree(tmp_path_factory.mktemp("large") / "in", studies=4, instances=500)
    yield folder
    shutil.rmtree(folder)


def test_several_processes_take_everything_and_say_in_order_what_is_refused(tmp_path):
    folder = _tree(tmp_path / "in", studies=3, instances=100)
    letters = sorted(folder / str(number % 3) / f"letter-{number}" for number in range(30))
    for letter in letters:
        letter.write_text("Dear colleague")

    result = run("import", "--json", "--jobs", "3", "--root", tmp_path / "root", folder)

    assert result.status == FAILED
    report = json.loads(result.out)
    assert report["admitted"] == 300
    assert [one["path"] for one in report["refused"]] == list(map(str, letters))
    held = counts(tmp_path / "root")
    assert (held["studies"], held["instances"], held["variants"]) == (3, 300, 300)
    assert _findings(tmp_path / "root") == []
    assert not list((tmp_path / "root" / "journal").glob("import*"))


def test_a_process_that_is_killed_is_told_and_what_it_admitted_is_held(tmp_path, large):
    with Importing(tmp_path / "root", large) as importing:
        importing.wait_until_filed(50)
        os.kill(importing.workers()[0], signal.SIGKILL)
        status, report, err = importing.result()

    assert status == FAILED
    assert "SIGKILL" in report["stopped"]
    assert "Stopped at A worker process was ended by SIGKILL" in err
    assert report["admitted"] < 2000
    # It may have admitted more than it could say.
    assert counts(tmp_path / "root")["instances"] >= report["admitted"] >= 50
    assert run("import", "--root", tmp_path / "root", large).out == "2000 taken, 0 refused\n"
    assert counts(tmp_path / "root")["variants"] == 2000


def test_an_import_that_is_interrupted_ends_well_and_holds_what_it_says(tmp_path, large):
    with Importing(tmp_path / "root", large) as importing:
        importing.wait_until_filed(50)
        importing.process.send_signal(signal.SIGINT)
        status, report, err = importing.result()

    assert (status, report["stopped"]) == (INTERRUPTED, "interrupted")
    assert "Interrupted" in err
    assert 50 <= report["admitted"] < 2000
    assert run("rebuild", "--index", "--root", tmp_path / "root").out == (
        f"{report['admitted']} instances indexed, 0 studies published\n"
    )
    assert run("import", "--root", tmp_path / "root", large).out == "2000 taken, 0 refused\n"
    assert counts(tmp_path / "root")["variants"] == 2000


def test_an_import_that_is_killed_leaves_no_process_and_loses_nothing(tmp_path, large):
    with Importing(tmp_path / "root", large) as importing:
        importing.wait_until_filed(50)
        importing.process.kill()

    assert run("import", "--root", tmp_path / "root", large).out == "2000 taken, 0 refused\n"
    assert counts(tmp_path / "root")["variants"] == 2000


def test_a_disk_at_its_reserve_stops_an_import(tmp_path, large):
    result = run("import", "--json", "--root", tmp_path / "root", large, DICOMSCP_STORAGE__RESERVE="1000TiB")

    assert result.status == FAILED
    report = json.loads(result.out)
    assert (report["admitted"], report["refused"]) == (0, [])
    assert report["stopped"].startswith(str(large))
    assert "reserve" in report["stopped"]


def test_an_import_without_an_index_makes_it_from_all_that_is_held(copied, pydicom_files):
    before = documents(copied)
    for path in copied.glob("index.sqlite*"):
        path.unlink()

    assert run("import", "--root", copied, pydicom_files / "JPEG2000.dcm").status == DONE

    assert counts(copied)["instances"] == len(STUDIES) + 1
    assert before.keys() < documents(copied).keys()
    assert _findings(copied) == []


# ── verify ───────────────────────────────────────────────────────────────────────────────────────


def _instance(root: Path, study_uid: str) -> Path:
    (path,) = root.glob(f"instances/*/{study_uid}/*/*.dcm")
    path.chmod(0o600)
    return path


def _findings(root: Path, *options: str) -> list[str]:
    """What verify finds; its exit status says whether that is anything."""
    result = run("verify", "--json", *options, "--root", root)
    findings = json.loads(result.out)["findings"]
    assert result.status == (FAILED if findings else DONE)
    return findings


def test_verify_of_what_is_as_it_was_finds_nothing(imported):
    result = run("verify", "--root", imported)

    assert result == (DONE, "3 instances checked, 0 findings\n", "")


def test_verify_finds_instances_that_are_not_as_they_were_and_repairs_what_follows_from_them(copied):
    flipped, cut, missing = (_instance(copied, study_uid) for study_uid in (CT_STUDY, MR_STUDY, RT_STUDY))
    data = bytearray(flipped.read_bytes())
    data[-2000] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, 1000)
    missing.unlink()

    findings = _findings(copied)
    for path in (flipped, cut, missing):
        assert [finding for finding in findings if str(path.relative_to(copied)) in finding]
    left = _findings(copied, "--repair")

    for path in (flipped, cut):
        assert [finding for finding in left if str(path.relative_to(copied)) in finding]
    assert not [finding for finding in left if missing.name in finding]
    assert flipped.read_bytes() == data
    assert cut.stat().st_size == 1000
    assert not [text for text in documents(copied).values() if RT_STUDY.encode() in text]


def test_verify_finds_and_repairs_an_instance_that_is_not_in_the_index(copied, tmp_path, pydicom_files):
    assert run("import", "--root", tmp_path / "other", pydicom_files / "JPEG2000.dcm").status == DONE
    (orphan,) = (tmp_path / "other").glob("instances/*/*/*/*.dcm")
    name = orphan.relative_to(tmp_path / "other")
    (copied / name).parent.mkdir(parents=True)
    shutil.copy(orphan, copied / name)

    assert _findings(copied) == [f"{name}: is not in the index"]
    assert _findings(copied, "--repair") == []

    assert counts(copied)["instances"] == len(STUDIES) + 1
    assert f"studies/{name.parts[2]}/metadata.gz" in documents(copied)


def _change(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"CompressedSamples", b"Doe")))


def _publish_too_much(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b"[]"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    f"{CT_STUDY}/metadata.gz": _change,
    f"{CT_STUDY}/index.json.gz": Path.unlink,
    f"{MR_STUDY}/metadata.gz": lambda path: path.write_bytes(b"no gzip at all"),
    f"{RT_STUDY}/metadata.gz": lambda path: os.truncate(path, 500),
    f"{CT_STUDY}/series/1.2.3/metadata.gz": _publish_too_much,
    "1.2.3/metadata.gz": _publish_too_much,
    "index.json.gz": lambda path: path.write_bytes(gzip.compress(b"[]")),
}


def _names(finding: str, document: str) -> bool:
    """Whether a person who reads *finding* knows which *document* it is about."""
    study_uid, _, name = document.partition("/")
    return study_uid in finding and (name in finding or "is published but not held" in finding)


def test_verify_finds_documents_that_are_not_what_the_instances_give_and_repairs_them(copied):
    before = documents(copied)
    for name, damage in DAMAGES.items():
        damage(copied / "dicomweb" / "studies" / name)

    findings = _findings(copied)
    unseen = [name for name in DAMAGES if not any(_names(finding, name) for finding in findings)]
    assert unseen == []
    assert len(findings) == len(DAMAGES)
    assert _findings(copied, "--repair") == []

    assert documents(copied) == before


# ── rebuild ──────────────────────────────────────────────────────────────────────────────────────


def test_index_and_published_tree_are_each_rebuilt_to_the_same(copied):
    before = documents(copied)
    for path in copied.glob("index.sqlite*"):
        path.unlink()

    index = run("rebuild", "--index", "--root", copied)
    assert documents(copied) == before
    shutil.rmtree(copied / "dicomweb")
    published = run("rebuild", "--published", "--root", copied)

    assert index == (DONE, "3 instances indexed, 0 studies published\n", "")
    assert published == (DONE, "0 instances indexed, 3 studies published\n", "")
    assert documents(copied) == before
    assert _findings(copied) == []


def test_everything_is_rebuilt_from_the_instances_alone(copied):
    before = documents(copied)
    for path in copied.iterdir():
        if path.name != "instances":
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    result = run("rebuild", "--root", copied)

    assert result == (DONE, "3 instances indexed, 3 studies published\n", "")
    assert documents(copied) == before
    assert _findings(copied) == []


def test_what_cannot_be_rebuilt_is_said_and_the_rest_is_done(copied):
    path = _instance(copied, CT_STUDY)
    os.truncate(path, 1000)

    result = run("rebuild", "--root", copied)

    assert result.status == FAILED
    assert path.name in result.err
    published = documents(copied)
    assert {f"studies/{MR_STUDY}/metadata.gz", f"studies/{RT_STUDY}/metadata.gz"} <= published.keys()


# ── with serve ───────────────────────────────────────────────────────────────────────────────────


def _write_slowly(path: Path, data: bytes, stop: threading.Event) -> None:
    """In pieces, over longer than a file may be silent."""
    step = len(data) // 16 + 1
    with path.open("wb") as file:
        for start in range(0, len(data), step):
            file.write(data[start : start + step])
            file.flush()
            stop.wait(1.5 * SETTLE_SECONDS / 16)


@pytest.fixture(scope="module")
def serving(tmp_path_factory, pydicom_files):
    """A gateway that was down while files were put into its drop folder."""
    folder = tmp_path_factory.mktemp("serving")
    copy(["JPEG2000.dcm"], pydicom_files, folder / "root" / "inbox" / "while" / "down")
    settings = {
        "pipeline.quiet_seconds": 0.5,
        "inbox.settle_seconds": SETTLE_SECONDS,
        "inbox.rescan_seconds": 5,
    }
    with Gateway(folder / "root", settings=settings) as gateway:
        yield gateway
    shutil.rmtree(folder / "root")


@pytest.fixture(scope="module")
def dropped(serving, tmp_path_factory, pydicom_files):
    """What people put into its drop folder, all of it at the beginning."""
    inbox, outside = serving.root / "inbox", tmp_path_factory.mktemp("outside")
    copy(["MR_small.dcm"], pydicom_files, inbox)
    copy(["693_J2KI.dcm", "SC_rgb_rle.dcm"], pydicom_files, outside / "folder" / "deep")
    (outside / "folder").rename(inbox / "folder")
    (inbox / "letter.txt").write_text("Dear colleague")
    copy(["rtplan_truncated.dcm"], pydicom_files, inbox)
    shutil.copy(pydicom_files / "liver_1frame.dcm", outside / "linked.dcm")
    (inbox / "link.dcm").symlink_to(outside / "linked.dcm")
    (outside / "linked").mkdir()
    shutil.copy(pydicom_files / "liver_1frame.dcm", outside / "linked")
    (inbox / "link").symlink_to(outside / "linked")
    stop = threading.Event()
    slow = (pydicom_files / "examples_palette.dcm").read_bytes()
    writing = threading.Thread(target=_write_slowly, args=(inbox / "slow.dcm", slow, stop))
    writing.start()
    yield outside
    stop.set()
    writing.join()


def _study_of(path: Path) -> str:
    return str(pydicom.dcmread(path, specific_tags=["StudyInstanceUID"]).StudyInstanceUID)


def _quarantined(serving: Gateway, name: str) -> str:
    """The reason beside what was put away."""
    reason = serving.root / "quarantine" / f"{name}.reason.txt"
    wait_until(reason.exists, 20, f"{name} to be in the quarantine")
    wait_until(lambda: not os.path.lexists(serving.root / "inbox" / name), 10, f"{name} to leave the inbox")
    return reason.read_text()


def test_what_was_put_into_the_drop_folder_while_the_gateway_was_down_is_taken(
    serving, dropped, pydicom_files
):
    wait_for_instances(serving, _study_of(pydicom_files / "JPEG2000.dcm"), 1, 20)
    assert not (serving.root / "inbox" / "while" / "down" / "JPEG2000.dcm").exists()


@pytest.mark.parametrize("name", ["MR_small.dcm", "693_J2KI.dcm", "SC_rgb_rle.dcm", "examples_palette.dcm"])
def test_what_is_put_into_the_drop_folder_is_taken_once_it_is_whole_and_removed(
    serving, dropped, pydicom_files, name
):
    """A file, a folder that was moved in, a file written in pieces."""
    wait_for_instances(serving, _study_of(pydicom_files / name), 1, 20)

    inbox = serving.root / "inbox"
    left = "slow.dcm" if name == "examples_palette.dcm" else name
    wait_until(lambda: not list(inbox.rglob(left)), 10, f"{left} to be removed")
    (held,) = serving.root.glob(f"instances/*/{_study_of(pydicom_files / name)}/*/*.dcm")
    assert dataset_of(held) == dataset_of(pydicom_files / name)
    assert not list((serving.root / "quarantine").glob("slow*"))


def test_what_is_not_dicom_goes_to_the_quarantine_with_its_reason(serving, dropped):
    text = _quarantined(serving, "letter.txt")

    assert "file: letter.txt" in text
    assert "not DICOM" in text
    assert (serving.root / "quarantine" / "letter.txt").read_text() == "Dear colleague"
    assert serving.wait_for_event("inbox_file_quarantined")["reason"]


def test_what_was_cut_short_goes_there_too(serving, dropped, pydicom_files):
    assert "cut short" in _quarantined(serving, "rtplan_truncated.dcm")
    kept = serving.root / "quarantine" / "rtplan_truncated.dcm"
    assert kept.read_bytes() == (pydicom_files / "rtplan_truncated.dcm").read_bytes()


@pytest.mark.parametrize("name", ["link.dcm", "link"])
def test_a_link_is_not_followed(serving, dropped, pydicom_files, name):
    assert "not a regular file" in _quarantined(serving, name)
    assert (dropped / "linked.dcm").exists()
    assert (dropped / "linked" / "liver_1frame.dcm").exists()
    study = f"/dicomweb/studies?StudyInstanceUID={_study_of(pydicom_files / 'liver_1frame.dcm')}"
    assert serving.get_json(study) == []


def test_an_import_beside_serve_is_published_by_it(serving, pydicom_files):
    result = run("import", "--root", serving.root, pydicom_files / "rtplan.dcm")

    assert (result.status, result.out) == (DONE, "1 taken, 0 refused\n")
    document = serving.root / "dicomweb" / "studies" / STUDIES["rtplan.dcm"] / "metadata.gz"
    wait_until(document.exists, 20, "the study to be published")


def test_an_import_of_many_beside_serve_is_filed_by_it(serving, tmp_path):
    folder = _tree(tmp_path / "in", studies=2, instances=150)

    result = run("import", "--jobs", "2", "--root", serving.root, folder)

    assert (result.status, result.out) == (DONE, "300 taken, 0 refused\n")
    for number in range(2):
        wait_for_instances(serving, _study_of(folder / str(number) / "00001.dcm"), 150)


def test_two_imports_at_once_beside_serve_both_take_their_files(serving, pydicom_files):
    files = [pydicom_files / "rtdose.dcm", pydicom_files / "waveform_ecg.dcm"]

    with ThreadPoolExecutor(2) as executor:
        results = list(executor.map(lambda file: run("import", "--root", serving.root, file), files))

    assert {(result.status, result.out) for result in results} == {(DONE, "1 taken, 0 refused\n")}
    for file in files:
        wait_for_instances(serving, _study_of(file), 1)
    journals = serving.root / "journal"
    wait_until(lambda: not list(journals.glob("import*")), 20, "their journals to be passed and taken away")


def test_the_status_of_what_runs_says_so(serving):
    ae = AE("ASKS")
    ae.add_requested_context("1.2.840.10008.1.1")
    association = ae.associate("127.0.0.1", serving.port, ae_title=serving.ae_title)
    assert association.is_established
    report = json.loads(run("status", "--json", "--root", serving.root).out)
    association.release()
    text = run("status", "--root", serving.root)

    assert report["running"]
    assert report["serve"]["pid"] == serving.pid
    assert report["serve"]["dimse"]["port"] == serving.port
    assert report["associations"] == 1
    assert text.status == DONE
    assert re.search(r"^running +yes$", text.out, re.MULTILINE)


@pytest.mark.parametrize(
    "command", [["rebuild"], ["rebuild", "--index"], ["verify", "--repair"]], ids=" ".join
)
def test_what_needs_serve_stopped_is_refused_while_it_runs(serving, command):
    result = run(*command, "--root", serving.root)

    assert (result.status, result.out) == (FAILED, "")
    assert f"serve, pid {serving.pid}" in result.err


def test_a_second_serve_on_one_root_fails_at_once_and_names_the_first(serving):
    began = time.monotonic()
    result = run("serve", "--root", serving.root, "--dimse-port", "0", "--web-port", "0")

    assert time.monotonic() - began < 10
    assert (result.status, result.out) == (FAILED, "")
    assert f"serve, pid {serving.pid}" in result.err
    assert len(result.err.splitlines()) == 1


def test_a_serve_whose_port_is_taken_says_which(serving, tmp_path):
    result = run("serve", "--root", tmp_path / "root", "--dimse-port", serving.port, "--web-port", "0")

    assert (result.status, result.out) == (FAILED, "")  # a service manager may try again
    assert f"dimse.port: cannot listen on 127.0.0.1:{serving.port}" in result.err


# ── echo, send, find ─────────────────────────────────────────────────────────────────────────────


class QueryScp(Peer):
    """DCMTK's dcmqrscp, a small archive."""

    name = "dcmqrscp"
    program, package, ae_title = "dcmqrscp", DCMTK, "DCMQR"

    def command(self) -> list[str | Path]:
        settings = self.directory / "dcmqrscp.cfg"
        settings.write_text(
            f"NetworkTCPPort = {self.port}\nMaxPDUSize = 16384\nMaxAssociations = 16\n"
            "HostTable BEGIN\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
            f"AETable BEGIN\n{self.ae_title} {self.received} RW (200, 1024mb) ANY\nAETable END\n"
        )
        return [find_program(self.program) or self.program, "-c", settings]


def address(peer: Peer | Gateway, ae_title: str = "") -> str:
    """The peer as the command line names it."""
    return f"{ae_title or peer.ae_title}@127.0.0.1:{peer.port}"


@pytest.fixture(scope="module")
def archive_peer(tmp_path_factory):
    require(QueryScp.program, DCMTK)
    with QueryScp(tmp_path_factory.mktemp("dcmqrscp")) as peer:
        yield peer


def test_echo_says_whether_a_peer_is_there(serving, archive_peer):
    for peer in (serving, archive_peer):
        result = run("echo", address(peer))
        assert (result.status, result.err) == (DONE, "")
        assert re.fullmatch(rf"{re.escape(address(peer))} answers in \d+\.\d ms\n", result.out)


def test_echo_says_why_a_peer_does_not_answer(archive_peer):
    rejected = run("echo", address(archive_peer, "WRONG"))
    absent = run("echo", "DCMQR@127.0.0.1:1", "--timeout", "2")

    assert (rejected.status, absent.status) == (FAILED, FAILED)
    assert "called AE title" in rejected.err
    assert "cannot be reached" in absent.err
    assert (len(rejected.err.splitlines()), len(absent.err.splitlines())) == (1, 1)


def test_send_sends_the_bytes_of_each_file_in_its_own_syntax(tmp_path, pydicom_files):
    files = copy(SYNTAXES, pydicom_files, tmp_path / "in")

    with PynetdicomScp(tmp_path / "peer") as peer:
        result = run("send", address(peer), files)
        received = {dataset_of(path) for path in peer.files()}

    assert (result.status, result.err) == (DONE, "")
    assert result.out.startswith(f"{len(SYNTAXES)} sent, ")
    # One UID may be among them in several syntaxes: the last one stays.
    assert received <= {dataset_of(path) for path in files.iterdir()}
    assert len(received) == len({pydicom.dcmread(path).SOPInstanceUID for path in files.iterdir()})


def test_send_to_dcmtk_says_what_it_took_and_what_not(tmp_path, pydicom_files):
    require(StoreScp.program, DCMTK)
    files = copy(["CT_small.dcm", "MR_small.dcm", "JPEG2000.dcm"], pydicom_files, tmp_path / "in")
    (files / "letter.txt").write_text("Dear colleague")

    with StoreScp(tmp_path / "peer") as peer:
        result = run("send", "--json", address(peer), files)
        received = {str(pydicom.dcmread(path).StudyInstanceUID) for path in peer.files()}

    assert result.status == FAILED
    report = json.loads(result.out)
    reasons = {Path(one["path"]).name: one["reason"] for one in report["refused"]}
    # storescp takes uncompressed syntaxes alone.
    assert report["sent"] == 2
    assert reasons.keys() == {"JPEG2000.dcm", "letter.txt"}
    assert "does not take" in reasons["JPEG2000.dcm"]
    assert "not DICOM" in reasons["letter.txt"]
    assert received == {STUDIES["CT_small.dcm"], STUDIES["MR_small.dcm"]}


@pytest.fixture(scope="module")
def holding(serving, archive_peer, pydicom_files):
    """Both archives, after each has been sent a CT."""
    for peer in (serving, archive_peer):
        result = run("send", address(peer), pydicom_files / "CT_small.dcm")
        assert (result.status, result.err) == (DONE, "")
        assert result.out.startswith("1 sent, ")
    return serving, archive_peer


def test_find_finds_at_every_level_what_was_sent(holding, pydicom_files):
    ct = pydicom.dcmread(pydicom_files / "CT_small.dcm")
    series = [f"StudyInstanceUID={CT_STUDY}", f"SeriesInstanceUID={ct.SeriesInstanceUID}"]
    asked = {
        "PATIENT": (["PatientID=1CT1"], "00100020", "1CT1"),
        "STUDY": (series[:1], "0020000D", CT_STUDY),
        "SERIES": (series[:1], "0020000E", str(ct.SeriesInstanceUID)),
        "IMAGE": (series, "00080018", str(ct.SOPInstanceUID)),
    }
    for peer, levels in zip(holding, (asked, ["IMAGE"]), strict=True):
        for level in levels:
            keys, tag, value = asked[level]
            result = run("find", "--json", "--level", level, address(peer), *keys)
            assert (result.status, result.err) == (DONE, ""), (peer, level)
            (match,) = json.loads(result.out)
            assert match[tag]["Value"] == [value]


def test_find_prints_lines_for_people(holding):
    gateway, foreign = holding
    result = run("find", address(gateway), f"StudyInstanceUID={CT_STUDY}", "PatientName")
    nothing = run("find", address(foreign), "PatientID=NOBODY")

    assert (result.status, result.err) == (DONE, "")
    assert re.search(r"^PatientName +CompressedSamples\^CT1$", result.out, re.MULTILINE)
    assert result.out.endswith("\n1 found\n")
    assert nothing == (DONE, "0 found\n", "")


def test_dcmtk_finds_what_our_send_sent(holding):
    gateway, _ = holding
    findscu = require("findscu", DCMTK)
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={CT_STUDY}", "-k", "PatientName"]

    result = subprocess.run(
        [findscu, "-S", "-aec", "DICOMSCP", "127.0.0.1", str(gateway.port), *keys],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert result.returncode == 0
    assert "CompressedSamples^CT1" in result.stdout + result.stderr


def test_after_all_that_the_root_verifies_beside_serve(serving):
    result = run("verify", "--root", serving.root)

    assert result.status == DONE
    assert result.out.endswith(", 0 findings\n")


@pytest.mark.parametrize("command", [["rebuild", "--published"], ["remove", "--yes", "1.2.3"]], ids=" ".join)
def test_an_index_that_is_gone_is_made_anew_before_anything_is_asked_of_it(copied, command):
    """Else an empty one would take its place, and say for ever that nothing is held."""
    held = json.loads(run("status", "--root", copied, "--json").out)["held"]
    for path in copied.glob("index.sqlite*"):
        path.unlink()
    run(*command, "--root", copied)
    assert json.loads(run("status", "--root", copied, "--json").out)["held"] == held
    assert _findings(copied) == []


def _cut(index: Path) -> None:
    os.truncate(index, index.stat().st_size // 2)


def _blank(index: Path) -> None:
    index.write_bytes(b"\0" * 100 + index.read_bytes()[100:])


def _spoil_pages(index: Path) -> None:
    data = index.read_bytes()
    index.write_bytes(data[:4096] + b"\xff" * 40960 + data[4096 + 40960 :])


@pytest.mark.parametrize("damage", [_cut, _blank, _spoil_pages])
def test_a_damaged_index_is_made_anew_by_a_rebuild(copied, damage):
    held = json.loads(run("status", "--root", copied, "--json").out)["held"]
    damage(copied / "index.sqlite")
    assert run("rebuild", "--index", "--root", copied).status == DONE
    assert json.loads(run("status", "--root", copied, "--json").out)["held"] == held
    assert run("rebuild", "--published", "--root", copied).status == DONE
    assert _findings(copied) == []
