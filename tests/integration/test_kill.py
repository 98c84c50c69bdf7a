"""Any process, or all at once, is killed in the middle of a send: nothing acknowledged is lost."""

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pydicom
import pytest

from tests.gateway import Gateway
from tests.integration.commands import run_here
from tests.peers import DCMTK, require
from tests.processes import alive, wait_until

STUDY = "1.2.826.0.1.3680043.8.498.77"
COUNT = 96


@pytest.fixture(scope="module")
def folder(pydicom_files, tmp_path_factory):
    """One study in two series, a file an instance; every eighth is large enough for a slot."""
    source = (pydicom_files / "CT_small.dcm").read_bytes()
    made = tmp_path_factory.mktemp("study")
    for number in range(COUNT):
        dataset = pydicom.dcmread(io.BytesIO(source))
        dataset.StudyInstanceUID = STUDY
        dataset.SeriesInstanceUID = f"{STUDY}.{number % 2}"
        dataset.SOPInstanceUID = f"{STUDY}.{number % 2}.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = number
        if number % 8 == 0:
            dataset.Rows = dataset.Columns = 512
            dataset.PixelData = bytes([number]) * (512 * 512 * 2)
        dataset.save_as(made / f"{dataset.SOPInstanceUID}.dcm")
    return made


class Sending(threading.Thread):
    """DCMTK's storescu, which says of each instance whether it was acknowledged, until the peer is gone."""

    def __init__(self, port, folder):
        super().__init__()
        storescu = require("storescu", DCMTK)
        files = sorted(folder.iterdir())
        self.command = [storescu, "-v", "-aec", "DICOMSCP", "127.0.0.1", str(port), *files]
        self.acknowledged = set()

    def run(self):
        sending = ""
        with subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            for line in run.stdout:
                if "Sending file: " in line:
                    sending = Path(line.split("Sending file: ")[1].strip()).stem
                elif "Received Store Response (Success)" in line:
                    self.acknowledged.add(sending)

    def wait_for(self, count, *, or_ended=False):
        def enough():
            return len(self.acknowledged) >= count or (or_ended and not self.is_alive())

        wait_until(enough, 60, f"{count} instances to be acknowledged")


def held(gateway):
    found = gateway.get_json(f"/dicomweb/studies/{STUDY}/instances?limit=1000")
    return {one["00080018"]["Value"][0] for one in found}


def published(gateway):
    path = gateway.root / "dicomweb" / "studies" / STUDY / "metadata.gz"
    if not path.is_file():
        return set()
    return {one["00080018"]["Value"][0] for one in json.loads(gzip.decompress(path.read_bytes()))}


def documents(root):
    tree = root / "dicomweb"
    return {
        str(path.relative_to(tree)): hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        for path in sorted(tree.rglob("*.gz"))
    }


def check_complete(gateway, folder, acknowledged):
    """Everything acknowledged is there; the rest is sent again; all is published as rebuild makes it."""
    assert acknowledged <= held(gateway)
    again = Sending(gateway.port, folder)
    again.start()
    again.join(120)
    everything = {path.stem for path in folder.iterdir()}
    assert again.acknowledged == everything
    assert held(gateway) == everything
    wait_until(lambda: published(gateway) == everything, 60, "the study to be published whole")
    assert gateway.stop() == 0
    before = documents(gateway.root)
    rebuilt = run_here("rebuild", "--root", gateway.root)
    assert rebuilt.status == 0, rebuilt.err
    assert documents(gateway.root) == before
    verified = run_here("verify", "--root", gateway.root)
    assert verified.status == 0, verified.out


@pytest.mark.parametrize("killed", [["listener-0", "listener-1"], ["pipeline", "web", "inbox"]])
def test_parts_are_killed_and_started_again(tmp_path, folder, killed):
    with Gateway(tmp_path / "root", settings={"pipeline.quiet_seconds": 0.5}) as gateway:
        parts = set(gateway.parts())
        sending = Sending(gateway.port, folder)
        sending.start()
        for number, name in enumerate(killed, 1):
            if sending.is_alive():
                sending.wait_for(number * COUNT // 5, or_ended=True)
            gateway.kill_part(name)
            gateway.wait_for_event("part_died", part=name)
        sending.join(120)
        if "pipeline" in killed:
            assert len(sending.acknowledged) == COUNT
        wait_until(lambda: set(gateway.parts()) == parts, 30, "all parts to run again")
        check_complete(gateway, folder, sending.acknowledged)


def test_all_processes_are_killed_at_once(tmp_path, folder):
    gateway = Gateway(tmp_path / "root", settings={"pipeline.quiet_seconds": 0.5})
    try:
        acknowledged = set()
        for fraction in (5, 3):
            gateway.start()
            assert acknowledged <= (held(gateway) if acknowledged else set())
            sending = Sending(gateway.port, folder)
            sending.start()
            sending.wait_for(COUNT // fraction)
            gateway.kill()
            sending.join(120)
            acknowledged |= sending.acknowledged
        gateway.start()
        check_complete(gateway, folder, acknowledged)
    finally:
        gateway.kill()


def test_parts_do_not_outlive_a_killed_supervisor(tmp_path, folder):
    gateway = Gateway(tmp_path / "root").start()
    pids = gateway.processes()
    sending = Sending(gateway.port, folder)
    sending.start()
    sending.wait_for(10)
    os.kill(gateway.pid, signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in pids), 10, "every part to end")
    sending.join(60)
    gateway.kill()
    with Gateway(tmp_path / "root") as again:
        assert sending.acknowledged <= held(again)
        check_complete(again, folder, sending.acknowledged)


def test_an_orderly_stop_finishes_what_was_begun(tmp_path, folder):
    gateway = Gateway(tmp_path / "root").start()
    sending = Sending(gateway.port, folder)
    sending.start()
    sending.wait_for(COUNT // 4)
    assert gateway.stop() == 0
    sending.join(60)
    assert len(sending.acknowledged) == COUNT
    left = [path for path in (gateway.root / "incoming").rglob("*") if path.is_file()]
    assert left == []


def test_an_index_that_is_taken_away_and_a_pipeline_that_dies_leave_every_study_whole(tmp_path, folder):
    """The pipeline makes it anew from the instances, and all others ask the new one."""
    with Gateway(tmp_path / "root", settings={"pipeline.quiet_seconds": 0.5}) as gateway:
        first = Sending(gateway.port, folder)
        first.start()
        first.join(120)
        assert held(gateway) == first.acknowledged
        for path in gateway.root.glob("index.sqlite*"):
            path.unlink()
        gateway.kill_part("pipeline")
        gateway.wait_for_event("index_rebuilt")
        check_complete(gateway, folder, first.acknowledged)
