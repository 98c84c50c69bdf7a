"""Power fails at any step of receiving, journalling, filing, indexing and settling.

A SIGKILL proves nothing here, because the page cache survives it.  So the steps of a real run are
recorded, states that a disk may legally keep after each are built, and the archive is opened on them.
"""

import contextlib
import itertools
import os
import random
import shutil
from pathlib import Path

import pydicom
import pytest
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomscp.archive import sqlite
from dicomscp.archive.archive import Archive, Claim, Intake, Source
from dicomscp.archive.filing import Filing
from dicomscp.archive.index import Index
from dicomscp.archive.store import intact_digest
from dicomscp.dicom.part10 import Origin
from dicomscp.disk import Disk
from dicomscp.errors import BusyError
from tests.crash.powerloss import Recorder, survivors
from tests.databases import open_sqlite

SEGMENT = 1 << 20
SOURCE = Source(Origin.C_STORE, "MODALITY", "DICOMSCP")
STATES = int(os.environ.get("DICOMSCP_TEST_STATES", "80"))
THOROUGH = "DICOMSCP_TEST_STATES" in os.environ


@pytest.fixture(scope="module")
def instances(pydicom_files):
    """Small and large datasets, one sent twice, one SOP Instance UID with two contents."""
    dataset = pydicom.dcmread(pydicom_files / "CT_small.dcm")
    made = []
    for number in range(10):
        dataset.SOPInstanceUID = f"1.2.3.4.{number}"
        dataset.SeriesInstanceUID = f"1.2.3.{number % 2}"
        dataset.StudyInstanceUID = "1.2.3"
        dataset.InstanceNumber = number
        dataset.PixelData = bytes([number]) * (
            200_000 if number % 3 == 0 else 1_500_000 if number == 7 else 8192
        )
        made.append((dataset.SOPInstanceUID, encoded(dataset)))
    made.append(made[4])
    dataset.SOPInstanceUID = "1.2.3.4.5"
    dataset.PatientComments = "another content under a held UID"
    made.append((dataset.SOPInstanceUID, encoded(dataset)))
    return made


def encoded(dataset):
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return buffer.getvalue()


def open_index(root):
    return Index(open_sqlite(root / "index.sqlite"), duplicates="first", retrieve_url="/dicomweb")


def open_archive(root, index, disk, role="listener-0"):
    intake = Intake(
        root,
        role,
        disk,
        relaxed=False,
        reserve_bytes=0,
        max_variants=8,
        inline_bytes=128 << 10,
        segment_bytes=SEGMENT,
    )
    return Archive(root, index, intake=intake, wait_seconds=0)


def send(archive, instance, *, sync=True):
    sop_uid, dataset = instance
    incoming = archive.receive(Claim("1.2.840.10008.5.1.4.1.1.2", sop_uid, "1.2.840.10008.1.2.1"), SOURCE)
    for start in range(0, len(dataset), 65536):
        incoming.write(memoryview(dataset)[start : start + 65536])
    archive.admit(incoming, sync=sync)


def copy_index(root, to):
    source = sqlite.open_engine(root / "index.sqlite", read_only=True)
    with source.connect() as connection:
        connection.exec_driver_sql("VACUUM INTO ?", (str(to),))
    source.dispose()


@pytest.fixture(scope="module")
def recording(tmp_path_factory, instances):
    """The steps of one run, when each instance was acknowledged, and the index as it was committed."""
    folder = tmp_path_factory.mktemp("recording")
    root = folder / "root"
    root.mkdir()
    disk = Recorder(root)
    index = open_index(root)
    archive = open_archive(root, index, disk)
    filing = Filing(root, index, disk, segment_bytes=SEGMENT)
    acknowledged, commits = [], []
    for number, instance in enumerate(instances):
        send(archive, instance)
        acknowledged.append((len(disk.steps), instance))
        if number % 2:
            filing.step()
            copy = folder / f"index-{number}.sqlite"
            copy_index(root, copy)
            commits.append((len(disk.steps), copy))
        if number % 5 == 4:
            filing.settle(wait=True)
    filing.settle(wait=True)
    archive.close()
    yield disk.steps, acknowledged, commits
    filing.close()
    shutil.rmtree(folder, ignore_errors=True)


def index_after(steps, commits, upto, rng, *, forgets=True):
    """An index that may be there: any commit since the last sync of everything, or that one.

    One elsewhere, where power did not fail, *forgets* nothing: it is ahead of the disk.
    """
    if not forgets:
        return max(((at, copy) for at, copy in commits if at <= upto), default=(0, None))[1]
    synced = max((n for n, step in enumerate(steps[:upto]) if step.kind == "sync_all"), default=-1)
    before = [copy for at, copy in commits if at <= synced]
    since = [copy for at, copy in commits if synced < at <= upto]
    choices = before[-1:] + since
    return rng.choice(choices) if choices else None


def reopen(root):
    for name in ("journal", "incoming", "instances"):
        (root / name).mkdir(parents=True, exist_ok=True)
    index = open_index(root)
    filing = Filing(root, index, Disk(), segment_bytes=SEGMENT)
    catch_up(filing)
    return index, filing


def catch_up(filing):
    while filing.step().entries:
        pass
    filing.settle(wait=True)
    filing.clear_incoming()


def held(index, root):
    """Every variant that the index names, with its file whole."""
    found = set()
    for variants in index.known([f"1.2.3.4.{number}" for number in range(10)]).values():
        for one in variants:
            assert intact_digest(root / one.path) == one.digest, f"torn: {one.path}"
            found.add((one.key.sop_uid, one.digest))
    return found


def wanted(sent):
    import hashlib

    return {(sop_uid, hashlib.sha256(dataset).digest()) for sop_uid, dataset in sent}


@pytest.mark.parametrize("forgets", [True, False], ids=["index beside", "index elsewhere"])
def test_nothing_acknowledged_is_lost_and_nothing_torn_is_seen(recording, instances, tmp_path, forgets):
    steps, acknowledged, commits = recording
    rng = random.Random(20261121)
    points = sorted(rng.choices(range(1, len(steps) + 1), k=STATES // 2))
    for number, upto in enumerate(points):
        root = tmp_path / f"state-{number}"
        root.mkdir()
        survivors(steps, upto, root, rng)
        copy = index_after(steps, commits, upto, rng, forgets=forgets)
        if copy:
            shutil.copy(copy, root / "index.sqlite")
        index, filing = reopen(root)
        safe = wanted(instance for at, instance in acknowledged if at <= upto)
        assert safe <= held(index, root), f"state {number} after step {upto}"
        assert not list((root / "incoming").glob("listener-*")), "litter"
        retry = open_archive(root, index, Disk(), role="listener-1")
        for instance in instances:
            send(retry, instance)
        retry.close()
        catch_up(filing)
        assert held(index, root) == wanted(instances)
        filing.close()
        shutil.rmtree(root, ignore_errors=True)


def test_an_index_that_forgets_nothing_names_nothing_that_a_killed_writer_never_synced(tmp_path, instances):
    """It was written and not acknowledged, filed and indexed; then power fails where the files are."""
    root = tmp_path / "root"
    root.mkdir()
    disk = Recorder(root)
    index = open_index(root)
    archive = open_archive(root, index, disk)
    filing = Filing(root, index, disk, segment_bytes=SEGMENT)
    for instance in instances[:4]:
        send(archive, instance, sync=False)
    os.close(archive._intake.journal._lock)  # as a kill does it
    filing.step()
    copy_index(root, tmp_path / "elsewhere")
    assert held(index, root) == wanted(instances[:4])
    for seed in range(20):
        state = tmp_path / f"state-{seed}"
        state.mkdir()
        survivors(disk.steps, len(disk.steps), state, random.Random(seed))
        shutil.copy(tmp_path / "elsewhere", state / "index.sqlite")
        index_then, filing_then = reopen(state)
        assert held(index_then, state) == wanted(instances[:4])
        filing_then.close()
        shutil.rmtree(state)
    filing.close()


def test_what_was_indexed_without_an_answer_is_counted_once(root, instances):
    """The connection breaks behind a commit: what is filed again is the same arrival, not another one."""
    index = open_index(root)
    archive = open_archive(root, index, Disk())
    filing = Filing(root, Unanswered(index), Disk(), segment_bytes=SEGMENT)
    send(archive, instances[0])
    with pytest.raises(BusyError):
        filing.step()
    catch_up(filing)
    ((one,),) = index.known([instances[0][0]]).values()
    assert one.receipts == 1
    archive.close()
    filing.close()


class Unanswered:
    """An index of which the first commit comes through and its answer does not."""

    def __init__(self, index):
        self._index, self._left = index, 1

    def __getattr__(self, name):
        return getattr(self._index, name)

    def apply(self, *arguments):
        done = self._index.apply(*arguments)
        self._left -= 1
        if self._left == 0:
            raise BusyError("the connection is gone")
        return done


def made_for_it(path):
    """Slots and the first segment; the next segment is prepared by a thread of its own."""
    return path.startswith("incoming/") or path.endswith("0000000001.seg")


def test_success_is_said_after_the_slot_and_then_the_journal_were_synced(root, instances):
    disk = Recorder(root)
    index = open_index(root)
    archive = open_archive(root, index, disk)
    for large in (False, True):
        instance = next(one for one in instances if (len(one[1]) > 128 << 10) == large)
        before = len(disk.steps)
        send(archive, instance)
        ours = {step.inode for step in disk.steps if step.kind == "create" and made_for_it(step.path)}
        done = [s for s in disk.steps[before:] if s.kind in {"write", "sync"} and s.inode in ours]
        written = [step.inode for step in done if step.kind == "write"]
        synced = [step.inode for step in done if step.kind == "sync"]
        journal = done[-1].inode
        assert done[-1].kind == "sync"
        assert done[-2].kind == "write"
        assert done[-2].inode == journal
        assert set(written) <= set(synced) | {journal}
        if large:
            slot_synced = max(
                n for n, step in enumerate(done) if step.kind == "sync" and step.inode != journal
            )
            entry = max(n for n, step in enumerate(done) if step.kind == "write" and step.inode == journal)
            assert slot_synced < entry
    archive.close()


class Failing(Disk):
    """A disk on which the nth call fails, whatever it is."""

    def __init__(self, nth, code):
        self.left, self.code = nth, code

    def _count(self):
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))

    def __getattribute__(self, name):
        call = super().__getattribute__(name)
        counted = {
            "open", "open_direct", "write", "truncate", "sync", "sync_directory", "sync_all", "link",
            "rename", "make_directory",
        }  # fmt: skip
        if name not in counted:
            return call

        def failing(*arguments):
            self._count()
            return call(*arguments)

        return failing


@pytest.mark.parametrize("stops", [False, True], ids=["goes on", "stops"])
@pytest.mark.parametrize("code", [5, 28], ids=["EIO", "ENOSPC"])
def test_every_call_may_fail_once_and_nothing_acknowledged_is_lost(tmp_path, instances, code, stops):
    calls = every_call(first=(code == 5) ^ stops)
    failed = True
    while failed:
        nth = next(calls)
        root = tmp_path / str(nth)
        root.mkdir()
        acknowledged, failed = run_with_failure(root, instances[:8], Failing(nth, code), stops=stops)
        index, filing = reopen(root)
        assert wanted(acknowledged) <= held(index, root), f"call {nth}"
        filing.close()
        shutil.rmtree(root, ignore_errors=True)
    assert nth > 60


def every_call(*, first):
    """The calls to fail one after the other; unless more is asked for every other one, *first* or second.

    So a call fails in one of two variants of a test.
    """
    return itertools.count(1 if first or THOROUGH else 2, 1 if THOROUGH else 2)


def run_with_failure(root, instances, disk, *, stops):
    """Send and file on *disk*; returns what was acknowledged, and whether the failure came.

    With *stops*, filing ends in good order when a call fails, and another life of it goes on.
    """
    index, acknowledged = open_index(root), []
    try:
        archive = open_archive(root, index, disk)
        filing = Filing(root, index, disk, segment_bytes=SEGMENT)
    except OSError:
        return [], True
    for number, instance in enumerate(instances):
        try:
            send(archive, instance)
            acknowledged.append(instance)
        except BusyError:
            pass
        try:
            filing.step()
            filing.settle(wait=number % 2 == 1)
        except OSError:
            if stops:
                filing.close()
                filing = Filing(root, index, disk, segment_bytes=SEGMENT)
    with contextlib.suppress(OSError):
        archive.close()
    filing.close()
    return acknowledged, disk.left <= 0


def test_a_resend_of_what_is_gone_from_the_disk_or_damaged_is_kept(root, instances):
    index = open_index(root)
    archive = open_archive(root, index, Disk())
    filing = Filing(root, index, Disk(), segment_bytes=SEGMENT)
    small, large = instances[1], instances[0]
    for damage in (Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"rot")):
        for instance in (small, large):
            send(archive, instance)
        catch_up(filing)
        for variants in index.known([small[0], large[0]]).values():
            damage(root / variants[0].path)
        for instance in (small, large):
            send(archive, instance)
        catch_up(filing)
        assert held(index, root) == wanted([small, large])
    archive.close()
    filing.close()


def test_after_a_failed_settle_nothing_is_let_go_before_it_is_filed_again(root, instances):
    class Disturbed(Disk):
        fail = False

        def sync_all(self, descriptor):
            if self.fail:
                raise OSError(5, "Input/output error")
            super().sync_all(descriptor)

    disk = Disturbed()
    index = open_index(root)
    archive = open_archive(root, index, disk)
    filing = Filing(root, index, disk, segment_bytes=SEGMENT)
    send(archive, instances[0])
    filing.step()
    disk.fail = True
    filing.settle(wait=False)
    send(archive, instances[3])
    filing.step()
    filing.settle(wait=True)
    disk.fail = False
    slots = [path for path in (root / "incoming").glob("listener-*/*") if path.stat().st_size]
    assert len(slots) == 2
    for path in (root / "instances").rglob("*.dcm"):
        path.unlink()  # what the page cache showed was never on the disk
    catch_up(filing)
    assert held(index, root) == wanted([instances[0], instances[3]])
    assert not [path for path in (root / "incoming").glob("listener-*/*") if path.stat().st_size]
    archive.close()
    filing.close()
