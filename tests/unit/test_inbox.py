"""The drop folder: what is whole is taken, what is not is kept with its reason, nothing else is touched."""

import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from dicomscp.archive.archive import Archive, Intake, Source
from dicomscp.archive.filing import Filing
from dicomscp.archive.index import Index
from dicomscp.dicom import part10
from dicomscp.dicom.part10 import Origin
from dicomscp.disk import Disk
from dicomscp.errors import BusyError, RefusedError
from dicomscp.inbox import Inbox, Quarantine, admit_file, quarantined
from tests.clock import Clock
from tests.databases import open_sqlite
from tests.processes import wait_until

SETTLE, RESCAN = 2.0, 10.0
NEVER = threading.Event()
IMPORT = Source(Origin.IMPORT, "", "")


class Gateway:
    """A real archive, and the inbox before it."""

    def __init__(self, root, archive=Archive):
        self.root = root
        self.engine = open_sqlite(root / "index.sqlite")
        self.index = Index(self.engine)
        self.intake = Intake(
            root,
            "inbox",
            Disk(),
            relaxed=True,
            reserve_bytes=0,
            max_variants=8,
            inline_bytes=128 << 10,
            segment_bytes=4 << 20,
        )
        self.archive = archive(root, self.index, intake=self.intake)
        self.clock = Clock()
        self.folder, self.quarantine = root / "inbox", root / "quarantine"
        self.folder.mkdir(exist_ok=True)
        self.inbox = self.make_inbox(now=self.clock)

    def make_inbox(self, **settings):
        return Inbox(
            self.folder,
            self.quarantine,
            self.archive,
            **{
                "settle_seconds": SETTLE,
                "rescan_seconds": RESCAN,
                "quarantine_max_bytes": 1 << 30,
                "quarantine_files": 1000,
                **settings,
            },
        )

    def after(self, seconds):
        """A turn of the inbox, so much later."""
        self.clock.now += seconds
        self.inbox.turn(NEVER)

    def settle(self):
        """What is there is noticed, and has settled."""
        self.after(RESCAN)
        self.after(SETTLE)

    def taken(self):
        """SOP Instance UIDs in custody."""
        filing = Filing(self.root, self.index, Disk(), segment_bytes=4 << 20)
        while filing.step().entries:
            pass
        filing.close()
        return {held.key.sop_uid for study in self.index.studies() for held in self.index.held(study)}

    def left(self):
        """What is in the inbox."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))

    def kept(self):
        """What is in the quarantine, and why."""
        return {
            path.name.removesuffix(".reason.txt"): path.read_text().splitlines()[-1].removeprefix("reason: ")
            for path in self.quarantine.glob("*.reason.txt")
        }


@pytest.fixture
def gateway(root):
    gateway = Gateway(root)
    yield gateway
    gateway.archive.close()
    gateway.engine.dispose()


@pytest.fixture
def sop_uid(ct_small):
    return part10.read_file_meta(ct_small.read_bytes()).sop_uid


def test_a_file_that_was_closed_is_taken_at_once(gateway, ct_small, sop_uid):
    shutil.copy(ct_small, gateway.folder / "a.dcm")
    gateway.inbox.closed("a.dcm")

    gateway.after(0)

    assert gateway.left() == []
    assert gateway.taken() == {sop_uid}


def test_what_is_held_are_the_bytes_of_the_dataset(gateway, ct_small, sop_uid):
    shutil.copy(ct_small, gateway.folder / "a.dcm")
    gateway.settle()
    gateway.taken()

    (held,) = gateway.index.known([sop_uid])[sop_uid]
    with gateway.archive.open(held) as instance:
        assert ct_small.read_bytes().endswith(bytes(instance.dataset))
        receipt = part10.read_file_meta(instance.path.read_bytes()).receipt
    assert (receipt.origin, receipt.calling_ae, receipt.called_ae) == (Origin.INBOX, "", "")


def test_without_events_a_file_is_taken_when_it_has_settled(gateway, ct_small):
    shutil.copy(ct_small, gateway.folder / "a.dcm")

    gateway.after(RESCAN)
    gateway.after(SETTLE / 2)
    assert gateway.left() == ["a.dcm"]

    gateway.after(SETTLE / 2)
    assert gateway.left() == []


def test_a_file_that_is_still_being_written_is_not_taken(gateway, ct_small, sop_uid):
    data, file = ct_small.read_bytes(), gateway.folder / "a.dcm"
    for length in range(1000, len(data), 10000):
        file.write_bytes(data[:length])
        gateway.after(SETTLE)
        assert gateway.left() == ["a.dcm"]

    file.write_bytes(data)
    gateway.settle()

    assert gateway.kept() == {}
    assert gateway.taken() == {sop_uid}


def test_a_file_that_is_closed_and_opened_again_is_judged_when_it_has_settled(gateway, ct_small, sop_uid):
    data, file = ct_small.read_bytes(), gateway.folder / "a.dcm"
    file.write_bytes(data[:1000])
    gateway.inbox.closed("a.dcm")
    gateway.after(0)
    assert gateway.left() == ["a.dcm"]

    file.write_bytes(data)
    gateway.inbox.closed("a.dcm")
    gateway.after(0)

    assert gateway.kept() == {}
    assert gateway.taken() == {sop_uid}


def test_a_hidden_name_settles_first_for_its_writer_will_rename_it(gateway, ct_small):
    shutil.copy(ct_small, gateway.folder / ".a.dcm.X8s3f")
    gateway.inbox.closed(".a.dcm.X8s3f")

    gateway.after(1)
    assert gateway.left() == [".a.dcm.X8s3f"]

    gateway.after(SETTLE)
    assert gateway.left() == []


def test_a_folder_that_was_moved_in_is_taken_with_all_below_and_removed(gateway, pydicom_files, sop_uid):
    folder = gateway.folder / "study" / "series"
    folder.mkdir(parents=True)
    shutil.copy(pydicom_files / "CT_small.dcm", folder / "1")
    shutil.copy(pydicom_files / "MR_small.dcm", folder.parent / "2")

    gateway.settle()
    assert len(gateway.taken()) == 2
    assert gateway.left() == ["study", "study/series"]

    for _ in range(20):
        gateway.after(RESCAN)
    assert gateway.left() == []


def test_a_folder_that_somebody_just_made_is_left_for_them_to_fill(gateway):
    (gateway.folder / "new").mkdir()

    gateway.settle()

    assert gateway.left() == ["new"]


def test_what_cannot_be_taken_is_kept_with_its_reason(gateway):
    (gateway.folder / "letters").mkdir()
    (gateway.folder / "letters" / "a.gz").write_bytes(b"\x1f\x8b" + bytes(1000))
    (gateway.folder / "empty").touch()

    gateway.settle()

    assert gateway.left() == ["letters"]
    assert (gateway.quarantine / "a.gz").read_bytes() == b"\x1f\x8b" + bytes(1000)
    time_line, file_line, reason_line = (gateway.quarantine / "a.gz.reason.txt").read_text().splitlines()
    assert time_line.startswith("time: 20")
    assert file_line == "file: letters/a.gz"
    assert reason_line == "reason: The file is not DICOM but gzip."
    assert "not DICOM" in gateway.kept()["empty"]
    assert gateway.taken() == set()


def test_what_is_in_the_quarantine_is_told_with_its_reasons_the_last_first(gateway):
    names = ["a", "b\nreason: made up", "c"]
    for number, name in enumerate(names):
        (gateway.folder / name).touch()
        gateway.settle()
        for path in gateway.quarantine.glob(f"{name}*.reason.txt"):
            os.utime(path, (number, number))

    count, last = quarantined(gateway.quarantine, 2)

    assert count == 3
    assert [one.file for one in last] == ["c", "b\nreason: made up"]
    assert {one.reason for one in last} == {gateway.kept()["a"]}
    assert all(one.time.startswith("20") for one in last)


def test_a_dataset_that_is_cut_short_is_kept_with_its_reason(gateway, ct_small):
    (gateway.folder / "a.dcm").write_bytes(ct_small.read_bytes()[:-100])

    gateway.settle()

    assert list(gateway.kept()) == ["a.dcm"]
    assert gateway.taken() == set()


def test_names_that_are_taken_long_or_no_text_are_kept_too(gateway):
    long = "x" * 255
    for folder in ("one", "two"):
        (gateway.folder / folder).mkdir()
        for name in ("same", "same.reason.txt", long, os.fsdecode(b"\xff\xfe")):
            (gateway.folder / folder / name).write_bytes(b"no")

    gateway.settle()

    files = [path for path in gateway.quarantine.iterdir() if path.read_bytes() == b"no"]
    assert len(files) == 8
    assert all(path.with_name(path.name + ".reason.txt").exists() for path in files)


@pytest.mark.parametrize("kind", ["link", "dangling", "folder link", "fifo", "socket"])
def test_links_and_other_things_are_not_followed_nor_opened(gateway, kind, tmp_path, ct_small, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(ct_small, outside / "a.dcm")
    thing = gateway.folder / "thing"
    if kind == "link":
        thing.symlink_to(outside / "a.dcm")
    elif kind == "dangling":
        thing.symlink_to(outside / "none")
    elif kind == "folder link":
        thing.symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(thing)
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            monkeypatch.chdir(gateway.folder)  # the path of a socket must be short
            listening.bind("thing")

    gateway.settle()

    assert gateway.left() == []
    assert gateway.kept() == {"thing": "This is not a regular file."}
    assert gateway.taken() == set()
    assert (outside / "a.dcm").read_bytes() == ct_small.read_bytes()


def test_a_folder_swapped_for_a_link_leads_nobody_outside(gateway, tmp_path, ct_small):
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder in (outside, gateway.folder / "f"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ct_small, folder / "a.dcm")
    gateway.after(RESCAN)
    shutil.rmtree(gateway.folder / "f")
    (gateway.folder / "f").symlink_to(outside)
    gateway.inbox.closed("f/a.dcm")
    gateway.inbox.closed("../../outside/a.dcm")

    gateway.after(SETTLE)

    assert gateway.taken() == set()
    assert (outside / "a.dcm").exists()


def test_a_folder_that_lies_too_deep_is_taken_all_the_same(gateway, ct_small, sop_uid):
    deep = gateway.folder.joinpath(*["d"] * 150)
    deep.mkdir(parents=True)
    shutil.copy(ct_small, deep / "a.dcm")

    for _ in range(10):
        gateway.after(SETTLE)

    assert gateway.taken() == {sop_uid}


def test_while_the_disk_is_below_its_reserve_files_stay_and_are_taken_later(gateway, ct_small, sop_uid):
    shutil.copy(ct_small, gateway.folder / "a.dcm")
    gateway.intake.reserve_bytes = 1 << 62
    gateway.settle()
    gateway.after(RESCAN)
    assert gateway.left() == ["a.dcm"]

    gateway.intake.reserve_bytes = 0
    gateway.after(60)

    assert gateway.left() == []
    assert gateway.kept() == {}
    assert gateway.taken() == {sop_uid}


def test_a_file_that_is_written_to_while_it_is_read_waits(root, ct_small, sop_uid):
    file = root / "inbox" / "a.dcm"

    class Growing(Archive):
        grows = True

        def receive(self, claim, source):
            if self.grows:
                with file.open("ab") as more:
                    more.write(b"more")
            return super().receive(claim, source)

    gateway = Gateway(root, Growing)
    shutil.copy(ct_small, file)
    gateway.settle()
    assert gateway.left() == ["a.dcm"]
    assert gateway.taken() == set()

    gateway.archive.grows = False
    shutil.copy(ct_small, file)
    gateway.settle()

    assert gateway.taken() == {sop_uid}


def test_a_file_that_fails_for_no_known_reason_is_put_away_after_some_tries(root, ct_small):
    class Failing(Archive):
        tries = 0

        def admit(self, reception, *, sync=True):
            self.tries += 1
            reception.discard()
            raise ZeroDivisionError

    gateway = Gateway(root, Failing)
    shutil.copy(ct_small, gateway.folder / "a.dcm")
    gateway.settle()
    assert gateway.left() == ["a.dcm"]

    for _ in range(10):
        gateway.after(60)

    assert gateway.archive.tries == 3
    assert gateway.kept() == {"a.dcm": "Taking the file failed several times; the gateway's log says how."}


def test_the_oldest_in_the_quarantine_goes_first(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    folder = os.open(source, os.O_RDONLY)
    quarantine = Quarantine(tmp_path / "quarantine", max_bytes=10_000, max_files=10)
    for number in range(11):
        (source / f"f{number}").write_bytes(bytes(10))
        quarantine.keep(folder, f"f{number}", f"f{number}", "no")
        time.sleep(0.005)  # the clock of the file system has to tell them apart
    os.close(folder)

    names = {path.name for path in (tmp_path / "quarantine").iterdir()}

    assert names == {f"f{n}{suffix}" for n in range(2, 11) for suffix in ("", ".reason.txt")}


def test_the_quarantine_is_bounded_in_bytes_also_when_it_is_found_full(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    folder = os.open(source, os.O_RDONLY)
    for number in range(10):
        (source / f"f{number}").write_bytes(bytes(1000))
        Quarantine(tmp_path / "quarantine", max_bytes=3000, max_files=100).keep(
            folder, f"f{number}", "", "no"
        )
    os.close(folder)

    kept = [path for path in (tmp_path / "quarantine").iterdir() if not path.name.endswith(".reason.txt")]

    assert 1 <= len(kept) <= 3
    assert sum(path.stat().st_size for path in kept) <= 3000


def test_a_file_larger_than_the_quarantine_is_left_where_it_is(gateway):
    gateway.inbox = gateway.make_inbox(now=gateway.clock, quarantine_max_bytes=100)
    (gateway.folder / "large").write_bytes(bytes(200))

    gateway.settle()
    gateway.after(RESCAN)

    assert gateway.left() == ["large"]
    assert list(gateway.quarantine.iterdir()) == []


def test_a_reason_left_by_a_crash_is_cleared_away(tmp_path):
    (tmp_path / "a.reason.txt").write_text("reason: no\n")
    (tmp_path / "b.reason.txt").write_text("reason: no\n")
    (tmp_path / "b").write_text("b")

    Quarantine(tmp_path, max_bytes=100, max_files=10)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.reason.txt"]


def test_an_inbox_on_another_file_system_is_emptied_into_the_quarantine_too(gateway, tmp_path):
    other = Path("/dev/shm") / f"dicomscp-test-{os.getpid()}"
    other.mkdir()
    try:
        assert other.stat().st_dev != gateway.root.stat().st_dev
        gateway.folder.rmdir()
        gateway.folder.symlink_to(other)  # the inbox itself may be a link: that is the operator's
        (other / "a").write_bytes(b"no DICOM")

        gateway.settle()

        assert list(other.iterdir()) == []
        assert (gateway.quarantine / "a").read_bytes() == b"no DICOM"
    finally:
        shutil.rmtree(other)


def test_a_running_inbox_takes_what_is_there_and_what_comes(gateway, pydicom_files):
    shutil.copy(pydicom_files / "CT_small.dcm", gateway.folder / "before")
    stop = threading.Event()
    inbox = gateway.make_inbox(settle_seconds=0.2, rescan_seconds=1)
    thread = threading.Thread(target=inbox.run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: gateway.left() == [], 10, "what was there to be taken")
        shutil.copy(pydicom_files / "MR_small.dcm", gateway.folder / "after")
        (gateway.folder / "bad").write_text("no DICOM")
        wait_until(lambda: gateway.left() == [], 10, "what came to be taken")
    finally:
        stop.set()
        thread.join(10)

    assert len(gateway.taken()) == 2
    assert list(gateway.kept()) == ["bad"]


@pytest.mark.parametrize("linked", [False, True])
def test_the_closed_event_makes_it_quick(gateway, ct_small, tmp_path, linked):
    if linked:  # the inbox itself may be elsewhere: that is the operator's to say
        (tmp_path / "elsewhere").mkdir()
        gateway.folder.rmdir()
        gateway.folder.symlink_to(tmp_path / "elsewhere")
    stop = threading.Event()
    inbox = gateway.make_inbox(settle_seconds=3600, rescan_seconds=3600)
    thread = threading.Thread(target=inbox.run, args=(stop,))
    thread.start()
    try:
        number = 0
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # the watch begins some time after run does
            number += 1
            shutil.copy(ct_small, gateway.folder / f"a{number}")
            time.sleep(0.05)
            if f"a{number}" not in gateway.left():
                break
    finally:
        stop.set()
        thread.join(10)

    assert f"a{number}" not in gateway.left()


def test_a_file_is_admitted_without_reading_it_into_memory_and_stays(gateway, ct_small, sop_uid):
    identity = admit_file(gateway.archive, ct_small, IMPORT)

    assert identity.key.sop_uid == sop_uid
    assert ct_small.exists()
    assert gateway.taken() == {sop_uid}


def test_a_file_of_ours_keeps_the_character_set_of_its_source(gateway, ct_small, tmp_path, sop_uid):
    meta = part10.read_file_meta(ct_small.read_bytes())
    receipt = part10.Receipt(1, Origin.C_STORE, "CT", "US", bytes(32), "ISO_IR 100")
    head = part10.file_meta(meta.sop_class_uid, meta.sop_uid, meta.transfer_syntax_uid, receipt)
    file = tmp_path / "ours.dcm"
    file.write_bytes(head + ct_small.read_bytes()[meta.dataset_offset :])

    admit_file(gateway.archive, file, IMPORT)
    gateway.taken()

    (held,) = gateway.index.known([sop_uid])[sop_uid]
    with gateway.archive.open(held) as instance:
        assert instance.default_charset == "ISO_IR 100"


def test_a_file_that_cannot_be_read_is_refused(gateway, tmp_path):
    with pytest.raises(RefusedError, match="cannot be read: Is a directory"):
        admit_file(gateway.archive, tmp_path, IMPORT)
    with pytest.raises(RefusedError, match="cannot be read: No such file"):
        admit_file(gateway.archive, tmp_path / "none", IMPORT)
    os.mkfifo(tmp_path / "pipe")  # to open one for reading would wait for a writer
    with pytest.raises(RefusedError, match="not a regular file"):
        admit_file(gateway.archive, tmp_path / "pipe", IMPORT)


def test_a_large_file_that_is_refused_at_its_end_leaves_nothing(gateway, ct_small, tmp_path):
    large = tmp_path / "large.dcm"
    before_pixels, pixel_data, _ = ct_small.read_bytes().partition(b"\xe0\x7f\x10\x00OW\0\0")
    large.write_bytes(before_pixels + pixel_data + (4 << 20).to_bytes(4, "little") + bytes(3 << 20))

    with pytest.raises(RefusedError, match="cut short"):
        admit_file(gateway.archive, large, IMPORT)

    assert gateway.taken() == set()


def test_that_the_archive_is_busy_is_said(gateway, ct_small):
    gateway.intake.reserve_bytes = 1 << 62

    with pytest.raises(BusyError):
        admit_file(gateway.archive, ct_small, IMPORT)
