"""`dicomscp remove` as an operator uses it: beside a gateway that receives the same study, and alone."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import threading
import time

import pydicom
import pytest

from tests.gateway import REPOSITORY, Gateway
from tests.integration.commands import run_here
from tests.integration.test_commands import DONE, FAILED, MISCONFIGURED, run
from tests.integration.test_kill import Sending
from tests.processes import wait_until

STUDY = "1.2.826.0.1.3680043.8.498.78"
COUNT = 48
QUICK = {"pipeline.quiet_seconds": 0.5, "pipeline.patience_seconds": 2}


@pytest.fixture(scope="module")
def folder(pydicom_files, tmp_path_factory):
    """One study in two series, a file an instance; every eighth is large enough for a slot."""
    source = (pydicom_files / "CT_small.dcm").read_bytes()
    made = tmp_path_factory.mktemp("study")
    for number in range(COUNT):
        dataset = pydicom.dcmread(io.BytesIO(source))
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = STUDY, f"{STUDY}.{number % 2}"
        dataset.SOPInstanceUID = f"{STUDY}.{number % 2}.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = number
        if number % 8 == 0:
            dataset.Rows = dataset.Columns = 256
            dataset.PixelData = bytes([number]) * (256 * 256 * 2)
        dataset.save_as(made / f"{dataset.SOPInstanceUID}.dcm")
    return made


@pytest.fixture
def gateway(tmp_path):
    with Gateway(tmp_path / "root", settings=QUICK) as running:
        yield running


def send(gateway, folder, files):
    """What storescu says was acknowledged of *files*, one association."""
    links = folder / str(time.monotonic_ns())
    links.mkdir()
    for file in files:
        (links / file.name).symlink_to(file)
    sending = Sending(gateway.port, links)
    sending.start()
    sending.join(120)
    return sending.acknowledged


def uids(objects):
    return {one["00080018"]["Value"][0] for one in objects}


def held(gateway):
    return uids(gateway.get_json(f"/dicomweb/instances?StudyInstanceUID={STUDY}&limit=1000"))


def published(gateway):
    path = gateway.root / "dicomweb" / "studies" / STUDY / "metadata.gz"
    return uids(json.loads(gzip.decompress(path.read_bytes()))) if path.is_file() else set()


def listed(gateway):
    """How many instances the list of the newest studies counts, which is written after the documents."""
    path = gateway.root / "dicomweb" / "studies" / "index.json.gz"
    studies = json.loads(gzip.decompress(path.read_bytes())) if path.is_file() else []
    return sum(study["00201208"]["Value"][0] for study in studies)


def on_disk(gateway):
    return {path.stem for path in (gateway.root / "instances").rglob("*.dcm")}


def status(gateway):
    return json.loads(run_here("status", "--json", "--root", gateway.root).out)


def is_idle(gateway):
    now = status(gateway)
    return now["journal_waiting_bytes"] == now["held"]["leaving"] == now["due"] == 0


def wait_until_idle(gateway):
    wait_until(lambda: is_idle(gateway), 90, "all to be filed, published and taken away")


def found(gateway):
    """The SOP Instance UIDs that a C-FIND finds."""
    peer = f"{gateway.ae_title}@127.0.0.1:{gateway.port}"
    answers = set()
    for series_uid in (f"{STUDY}.0", f"{STUDY}.1"):
        keys = [f"StudyInstanceUID={STUDY}", f"SeriesInstanceUID={series_uid}", "SOPInstanceUID="]
        answer = run_here("find", peer, "--level", "IMAGE", "--json", *keys, "--root", gateway.root)
        assert answer.status == DONE, answer.err
        answers |= uids(json.loads(answer.out))
    return answers


def assert_agreed(gateway):
    """Documents, QIDO-RS, C-FIND and disk say the same, and verify finds nothing."""
    everything = held(gateway)
    assert published(gateway) == everything
    assert found(gateway) == everything
    assert on_disk(gateway) == everything
    wait_until(lambda: listed(gateway) == len(everything), 10, "the list of the newest studies")
    verified = run_here("verify", "--root", gateway.root)
    assert verified.status == DONE, verified.out
    return everything


def remove(gateway, *places):
    return run("remove", "--yes", "--json", "--root", gateway.root, *places)


@contextlib.contextmanager
def noted_when_journalled(gateway):
    """Gives a list that gets the moment when a removal has said what goes; what comes from then on stays."""
    before, noted, ended = set((gateway.root / "journal").iterdir()), [], threading.Event()

    def is_there():
        return ended.is_set() or any(
            path.name.startswith("remove-") for path in {*(gateway.root / "journal").iterdir()} - before
        )

    def note():
        wait_until(is_there, 120, "the removal to be journalled")
        noted.append(time.monotonic())

    noting = threading.Thread(target=note)
    noting.start()
    try:
        yield noted
    finally:
        ended.set()
        noting.join()


def test_what_is_sent_again_while_its_study_is_removed_is_held(gateway, folder, tmp_path):
    files = sorted(folder.iterdir())
    names = {file.stem for file in files}
    assert send(gateway, tmp_path, files) == names
    wait_until(lambda: published(gateway) == names, 60, "the study to be published")
    batches, over = [], threading.Event()

    def resend():
        for start in range(0, 1000 * COUNT, 12):
            begun, at = time.monotonic(), start % COUNT
            batches.append((begun, send(gateway, tmp_path, files[at : at + 12])))
            if over.is_set():
                return

    sender = threading.Thread(target=resend)
    sender.start()
    removed = 0
    for _ in range(3):
        with noted_when_journalled(gateway) as noted:
            result = remove(gateway, STUDY)
        assert result.status in {DONE, FAILED}
        removed += json.loads(result.out)["removed"]
    (asked,) = noted
    wait_until(lambda: any(begun > asked for begun, _ in [*batches]), 60, "something to be sent again")
    over.set()
    sender.join(120)
    wait_until_idle(gateway)

    again = set().union(*(acknowledged for begun, acknowledged in batches if begun > asked))
    assert again
    assert removed
    assert again <= assert_agreed(gateway)

    left = len(held(gateway))
    result = remove(gateway, STUDY)
    assert (result.status, json.loads(result.out)["removed"]) == (DONE, left)
    assert assert_agreed(gateway) == set()
    assert not (gateway.root / "dicomweb" / "studies" / STUDY).exists()
    assert send(gateway, tmp_path, files[:4]) == {file.stem for file in files[:4]}
    wait_until_idle(gateway)
    assert assert_agreed(gateway) == {file.stem for file in files[:4]}


def test_a_series_and_an_instance_are_removed_and_the_rest_stays(gateway, folder, tmp_path):
    files = sorted(folder.iterdir())
    names = {file.stem for file in files}
    send(gateway, tmp_path, files)
    one = f"{STUDY}.1.1"
    result = remove(gateway, f"{STUDY}/{STUDY}.0", f"{STUDY}/{STUDY}.1/{one}", "9.9.9")
    assert result.status == FAILED
    assert json.loads(result.out) == {"removed": COUNT // 2 + 1, "kept": 0, "leaving": 0, "absent": ["9.9.9"]}
    assert result.err == "9.9.9: nothing is held there\n"
    wait_until_idle(gateway)
    assert assert_agreed(gateway) == {name for name in names if name.startswith(f"{STUDY}.1.")} - {one}


@pytest.mark.parametrize("all_at_once", [False, True], ids=["the pipeline", "the gateway"])
def test_a_removal_goes_on_after_a_kill(gateway, folder, tmp_path, all_at_once):
    files = sorted(folder.iterdir())
    for moment in ("journalled", "leaving"):
        send(gateway, tmp_path, files)
        wait_until_idle(gateway)
        command = [sys.executable, "-m", "dicomscp", "remove", "--yes", "--root", gateway.root, STUDY]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as removing:
            if moment == "journalled":
                wait_until(lambda: any((gateway.root / "journal").glob("remove-*")), 30, "the entry")
            else:
                wait_until(lambda: held(gateway) == set(), 30, "it to leave")
            if all_at_once:
                gateway.kill()
                gateway.start()
            else:
                gateway.kill_part("pipeline")
            assert removing.communicate(timeout=150)[0] == f"{COUNT} removed\n".encode()
            assert removing.returncode == DONE
        wait_until_idle(gateway)
        assert assert_agreed(gateway) == set()


def test_without_serve_the_command_does_it_itself(folder, tmp_path):
    root = tmp_path / "root"
    assert run_here("import", "--root", root, folder).status == DONE
    result = run("remove", "--root", root, STUDY)
    assert result.status == MISCONFIGURED
    assert "--yes" in result.err
    result = run("remove", "--yes", "--root", root, STUDY)
    assert (result.status, result.out) == (DONE, f"{COUNT} removed\n")
    assert list((root / "instances").rglob("*.dcm")) == list((root / "journal").glob("remove-*")) == []
    assert not (root / "dicomweb" / "studies" / STUDY).exists()
    assert run_here("verify", "--root", root).status == DONE
    result = run("remove", "--yes", "--root", root, STUDY)
    assert (result.status, result.out) == (FAILED, "0 removed\n")


@pytest.mark.parametrize("place", ["", "1.2/", "1/2/3/4", "1.2/ /3", "x" * 65])
def test_a_place_that_is_none_is_told(tmp_path, place):
    result = run("remove", "--yes", "--root", tmp_path, place)
    assert result.status == MISCONFIGURED
    assert "STUDY/SERIES/SOP" in result.err


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("n", COUNT)])
def test_on_a_terminal_it_says_what_would_go_and_asks(folder, tmp_path, answer, left):
    root = tmp_path / "root"
    assert run_here("import", "--root", root, folder).status == DONE
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "dicomscp", "remove", "--root", root, STUDY]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=theirs, stdout=-1, stderr=-1) as removing:
        os.write(ours, f"{answer}\n".encode())
        out, err = removing.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert f"Remove {COUNT} instances of 2 series in 1 studies".encode() in err
    assert out == f"{COUNT - left} removed\n".encode()
    assert removing.returncode == (FAILED if left else DONE)
    assert len(list((root / "instances").rglob("*.dcm"))) == left
