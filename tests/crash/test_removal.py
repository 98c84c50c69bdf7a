"""Power fails, or a call fails, at any step of a life in which instances come, go and come again.

What was acknowledged after its removal was asked for is held.  What was removed and not sent since does
not come back.  Nothing torn is held, and no file is there that the index does not know.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest

from dicomscp.archive.archive import Archive, Removable
from dicomscp.archive.filing import Filing
from dicomscp.archive.index import Index, Publication
from dicomscp.archive.store import intact_digest
from dicomscp.disk import Disk
from dicomscp.errors import BusyError, DicomscpError
from tests.crash.powerloss import Recorder, survivors
from tests.crash.test_powerloss import (
    SEGMENT,
    Failing,
    catch_up,
    copy_index,
    encoded,
    every_call,
    index_after,
    open_archive,
    open_index,
    reopen,
    send,
)

STATES = int(os.environ.get("DICOMSCP_TEST_STATES", "80")) // 2
HISTORIES = range(2)
STUDY = "1.2.3"


class Event(NamedTuple):
    """Something that was asked for: when it began, when it was answered, or None if it was not."""

    kind: str
    instances: frozenset
    begun: int
    ended: int | None
    order: int  # of a removal, when the index was asked; what was sent behind that is not meant


class Life:
    """Sender, operator and gateway in one, with a record of what was promised to whom."""

    def __init__(self, root, disk, instances, index=None):
        self.root, self.disk, self.instances = root, disk, instances
        self.index = index or open_index(root)
        self.archive = open_archive(root, self.index, disk)
        self.filing = Filing(root, self.index, disk, segment_bytes=SEGMENT)
        self.descriptor = os.open(root, os.O_RDONLY)
        self.events = []
        self.order = 0
        self.asked = None

    @property
    def now(self):
        return len(getattr(self.disk, "steps", ()))

    def note(self, kind, instances, begun, order=None, *, answered=True):
        ended = self.now if answered else None
        self.events.append(Event(kind, frozenset(instances), begun, ended, order or self.order))

    def send(self, number):
        begun, answered = self.now, False
        self.order += 1
        try:
            send(self.archive, self.instances[number])
            answered = True
        finally:
            self.note("send", [identity(self.instances[number])], begun, answered=answered)

    def ask(self, numbers):
        """What an operator sees who wants the SOP Instance UIDs of these instances removed."""
        while self.filing.step().entries:
            pass
        sop_uids = {self.instances[number][0] for number in numbers}
        found = self.archive.removable(STUDY)
        self.order += 1
        variants = [one for one in found.variants if one.key.sop_uid in sop_uids]
        self.asked = self.order, Removable(found.asked, variants)

    def remove(self):
        if self.asked is None or not self.asked[1].variants:
            return
        (order, removable), self.asked = self.asked, None
        begun, answered = self.now, False
        try:
            self.archive.remove(removable, self.disk)
            answered = True
        finally:
            gone = [(one.key.sop_uid, one.digest) for one in removable.variants]
            self.note("remove", gone, begun, order, answered=answered)

    def step(self):
        self.filing.step()
        waiting = {one.path for one in self.index.leaving()} - {one.path for one in self.index.left(100)}
        assert all((self.root / path).exists() for path in waiting), "documents name a file that is gone"

    def settle(self):
        self.filing.settle(wait=True)

    def publish(self):
        """As the publisher does: documents are synced before it is recorded that they stand."""
        for study_uid, changes in list(self.index.due()):
            self.disk.sync_all(self.descriptor)
            self.index.mark_published(changes, shown(study_uid))

    def finish(self):
        self.filing.finish_removals()

    def close(self):
        self.archive.close()
        self.filing.close()
        os.close(self.descriptor)


def shown(study_uid):
    """That a study's documents stand; what they say is not looked at here."""
    return Publication(study_uid, "documents", 1, 1, 0)


def identity(instance):
    sop_uid, dataset = instance
    return sop_uid, hashlib.sha256(dataset).digest()


def promised(events, upto=None):
    """What must be held, and what must be gone, of a life that was cut short behind step *upto*."""
    seen = [event for event in events if upto is None or event.begun <= upto]
    held, gone = set(), set()
    for one in {one for event in seen for one in event.instances}:
        sends = [event for event in seen if event.kind == "send" and one in event.instances]
        removals = [event for event in seen if event.kind == "remove" and one in event.instances]
        acknowledged = [event.order for event in sends if done(event, upto)]
        if acknowledged and all(event.order < acknowledged[-1] for event in removals):
            held.add(one)
        last = max((event.order for event in sends), default=0)
        if any(event.order > last and done(event, upto) for event in removals):
            gone.add(one)
    return held, gone


def done(event, upto):
    return event.ended is not None and (upto is None or event.ended <= upto)


def check(root, index, events, upto, *, forgot=False):
    """*forgot* says that the index was lost, and with it what was asked of it."""
    held, gone = promised(events, upto)
    there = {}
    for variants in index.known({one[0] for event in events for one in event.instances}).values():
        for one in variants:
            assert intact_digest(root / one.path) == one.digest, f"torn: {one.path}"
            there[one.key.sop_uid, one.digest] = one.path
    assert held <= there.keys(), "acknowledged and lost"
    if not forgot:
        assert not gone & there.keys(), "removed and come back"
    on_disk = {str(path.relative_to(root)) for path in (root / "instances").rglob("*.dcm")}
    assert on_disk == set(there.values()), "files and index differ"
    folders = {path for path in (root / "instances").glob("*/*/*") if not any(path.iterdir())}
    assert not folders, "empty folders"


def finish(root, index, filing):
    """Go on until nothing is left to do."""
    catch_up(filing)
    for study_uid, changes in list(index.due()):
        index.mark_published(changes, shown(study_uid))
    while filing.finish_removals():
        pass
    filing.settle(wait=True)
    assert index.leaving() == []


@pytest.fixture(scope="module")
def instances(pydicom_files):
    """Small and large datasets, and SOP Instance UIDs with a second content."""
    import pydicom

    dataset = pydicom.dcmread(pydicom_files / "CT_small.dcm")
    dataset.StudyInstanceUID = STUDY
    made = []
    for number in range(6):
        dataset.SOPInstanceUID = f"{STUDY}.4.{number}"
        dataset.SeriesInstanceUID = f"{STUDY}.{number % 2}"
        dataset.PixelData = bytes([number]) * (200_000 if number % 3 == 0 else 2048)
        for comment in ("one content", "another content")[: 1 + number % 2]:
            dataset.PatientComments = comment
            made.append((dataset.SOPInstanceUID, encoded(dataset)))
    return made


def live(life, rng, operations):
    """Do what *rng* says, what sends and removes being likely to meet."""
    count = len(life.instances)
    for _ in range(operations):
        what = rng.choices(
            ["send", "ask", "remove", "step", "settle", "publish", "finish"], [8, 3, 4, 4, 1, 2, 2]
        )[0]
        if what == "send":
            life.send(rng.randrange(count))
        elif what == "ask":
            life.ask(rng.sample(range(count), 3))
        else:
            getattr(life, what)()
        yield what


class Watched(Index):
    """An index of which a copy is kept behind each transaction."""

    def watch(self, life, folder):
        self.life, self.folder, self.commits = life, folder, []

    def keep(self):
        copy = self.folder / f"index-{len(self.commits)}.sqlite"
        copy_index(self.life.root, copy)
        self.commits.append((self.life.now, copy))

    def apply(self, *arguments):
        changed = super().apply(*arguments)
        self.keep()
        return changed

    def leave(self, *arguments):
        changed = super().leave(*arguments)
        self.keep()
        return changed

    def forget_left(self, variants):
        super().forget_left(variants)
        self.keep()

    def mark_published(self, changes, publication):
        super().mark_published(changes, publication)
        self.keep()


@pytest.mark.parametrize("seed", HISTORIES)
def test_power_may_fail_at_any_step(tmp_path, instances, seed):
    rng = random.Random(20261125 + seed)
    root = tmp_path / "root"
    root.mkdir()
    disk = Recorder(root)
    index = Watched(open_index(root)._engine)
    life = Life(root, disk, instances, index)
    index.watch(life, tmp_path)
    for _ in live(life, rng, 60):
        pass
    steps, commits = list(disk.steps), list(index.commits)
    kinds = {step.kind for step in steps}
    assert kinds >= {"unlink", "link", "sync_all"}
    assert {event.kind for event in life.events} == {"send", "remove"}
    finish(root, index, life.filing)
    check(root, index, life.events, None)
    life.close()
    for upto in sorted(rng.choices(range(1, len(steps) + 1), k=STATES)):
        state = tmp_path / "state"
        state.mkdir()
        survivors(steps, upto, state, rng)
        copy = index_after(steps, commits, upto, rng)
        if copy:
            shutil.copy(copy, state / "index.sqlite")
        index_then, filing = reopen(state)
        finish(state, index_then, filing)
        check(state, index_then, life.events, upto, forgot=copy is None)
        filing.close()
        shutil.rmtree(state)


class FailingAll(Failing):
    """The same for what takes names away."""

    def __getattribute__(self, name):
        call = object.__getattribute__(self, name)
        if name not in {"unlink", "remove_directory"}:
            return super().__getattribute__(name)

        def failing(*arguments):
            self._count()
            return call(*arguments)

        return failing


@pytest.mark.parametrize("stops", [False, True], ids=["goes on", "stops"])
def test_any_call_may_fail_once(tmp_path, instances, stops):
    """A history that ends with a resend of what was removed, each call of it failing in turn."""
    plan = [
        "send 0", "send 1", "send 2", "step", "settle", "publish",
        "ask 0 1", "send 1", "remove", "step", "publish", "finish", "send 0", "step",
        "ask 0 1 2", "remove", "step", "send 2", "step", "publish", "finish", "settle",
    ]  # fmt: skip
    calls, failed = every_call(first=stops), True
    while failed:
        nth = next(calls)
        root = tmp_path / "root"
        root.mkdir()
        disk = FailingAll(nth, 5)
        events = run(root, disk, instances, plan, stops=stops)
        failed = disk.left <= 0
        index, filing = reopen(root)
        finish(root, index, filing)
        check(root, index, events, None)
        filing.close()
        shutil.rmtree(root)
    assert nth > 80


def run(root, disk, instances, plan, *, stops):
    """Follow *plan* on *disk*; with *stops*, filing ends when a call fails, and another life goes on."""
    try:
        life = Life(root, disk, instances)
    except OSError:
        return []
    for operation in plan:
        name, *numbers = operation.split()
        given = {"send": lambda n: [int(n[0])], "ask": lambda n: [[int(one) for one in n]]}
        arguments = given[name](numbers) if name in given else []
        try:
            getattr(life, name)(*arguments)
        except (OSError, DicomscpError):
            if stops:
                life.filing.close()
                life.filing = Filing(root, life.index, disk, segment_bytes=SEGMENT)
    try:
        life.close()
    except OSError:
        life.filing.close()
    return life.events


# ── a resend and a removal that meet ─────────────────────────────────────────────────────────────


@pytest.fixture
def life(root, instances):
    made = Life(root, Disk(), instances)
    yield made
    made.close()


def go_on(life):
    """The gateway is killed, and another life of it begins; what was written is there."""
    life.filing._syncer.shutdown()
    life.filing = Filing(life.root, life.index, life.disk, segment_bytes=SEGMENT)


@pytest.mark.parametrize("large", [False, True], ids=["in the journal", "in a slot"])
@pytest.mark.parametrize("killed", range(-1, 6))
@pytest.mark.parametrize("resent", range(5))
def test_what_is_sent_again_after_its_removal_was_asked_for_is_held(life, instances, resent, killed, large):
    """Sent again before or behind each step of the removal, the gateway killed before any of them."""
    number = next(n for n, one in enumerate(instances) if (len(one[1]) > 128 << 10) == large)
    life.send(number)
    for step in (life.step, life.settle, life.publish):
        step()
    life.ask([number])
    for at, step in enumerate((life.remove, life.step, life.publish, life.finish, life.step)):
        if at == killed:
            go_on(life)
        if at == resent:
            life.send(number)
        step()
    if killed == 5:
        go_on(life)
    finish(life.root, life.index, life.filing)
    check(life.root, life.index, life.events, None)
    (held,) = life.index.held(STUDY)
    assert identity(instances[number]) == (held.key.sop_uid, held.digest)


@pytest.mark.parametrize("killed", range(-1, 6))
def test_what_is_not_sent_again_is_gone_for_good(life, killed):
    for number in (0, 1, 2):
        life.send(number)
    life.send(0)
    life.ask([0, 1])
    for at, step in enumerate((life.remove, life.step, life.publish, life.finish, life.settle)):
        if at == killed:
            go_on(life)
        step()
    if killed == 5:
        go_on(life)
    finish(life.root, life.index, life.filing)
    check(life.root, life.index, life.events, None)
    left = {identity(life.instances[number])[0] for number in (0, 1)}
    assert left.isdisjoint(held.key.sop_uid for held in life.index.held(STUDY))


def test_the_receipt_of_what_is_sent_again_is_the_new_one(life):
    life.send(1)
    life.ask([1])
    life.remove()
    life.step()
    (before,) = life.index.leaving()
    life.send(1)
    life.step()
    (held,) = life.index.held(STUDY)
    assert held.received_at > before.received_at
    assert held.path == before.path
    assert received_at(life.root / held.path) == held.received_at


def received_at(path):
    from dicomscp.dicom import part10

    return part10.read_file_meta(path.read_bytes()[: 1 << 16]).receipt.received_at


def test_a_file_that_is_not_what_left_is_not_taken_away(life, instances):
    life.send(1)
    life.send(0)
    life.step()
    life.ask([1])
    life.remove()
    life.step()
    (leaving,) = life.index.leaving()
    (other,) = life.index.held(STUDY)
    shutil.copy(life.root / other.path, life.root / leaving.path)
    life.publish()
    life.finish()
    assert life.index.leaving() == []
    assert (life.root / leaving.path).exists()


def test_a_removal_waits_until_what_an_earlier_life_left_is_filed_anew(life):
    """Else that would be filed behind the removal, and come back."""
    for number in range(4):
        life.send(number)
    life.ask([0, 1, 2, 3])
    life.remove()
    go_on(life)
    first = life.filing.step()
    assert (first.removals, first.entries) == (False, 4)
    assert len(life.index.variants(STUDY)) == 4
    assert life.filing.step().removals
    assert life.index.variants(STUDY) == []


def test_what_is_leaving_can_still_be_opened_by_its_full_address(life):
    life.send(1)
    life.step()
    (held,) = life.index.held(STUDY)
    life.ask([1])
    life.remove()
    life.step()
    assert life.archive.held(STUDY) == life.archive.held(STUDY, held.key.series_uid) == []
    (leaving,) = life.archive.held(*held.key)
    assert leaving.leaving is not None
    with life.archive.open(leaving) as opened:
        assert hashlib.sha256(opened.dataset).digest() == held.digest
    life.publish()
    life.finish()
    assert life.archive.held(*held.key) == []


def test_variants_that_leave_make_room_for_others(root, instances):
    life = Life(root, Disk(), instances)
    life.archive._intake.max_variants = 1
    one, other = (n for n, instance in enumerate(instances) if instance[0] == f"{STUDY}.4.1")
    life.send(one)
    life.step()
    with pytest.raises(DicomscpError, match="Too many variants"):
        life.send(other)
    life.ask([one])
    life.remove()
    life.step()
    life.send(other)
    life.step()
    with pytest.raises(DicomscpError, match="Too many variants"):
        life.send(one)
    finish(root, life.index, life.filing)
    check(root, life.index, life.events, None)
    life.close()


def test_nothing_is_removable_while_the_index_lags(life):
    life.send(0)
    with pytest.raises(BusyError, match="lags"):
        Archive(life.root, life.index, wait_seconds=0).removable(STUDY)


def test_nobody_waits_for_a_removal_that_was_killed_before_it_named_anything(life):
    killed = subprocess.run([sys.executable, "-c", BEGIN_A_REMOVAL, life.root / "journal"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not life.archive.wait_until_applied()

    life.step()

    assert life.archive.wait_until_applied()


BEGIN_A_REMOVAL = """
import os, pathlib, signal, sys
from dicomscp.archive.journal import JournalWriter
from dicomscp.disk import Disk

JournalWriter(pathlib.Path(sys.argv[1]), "remove", Disk(), segment_bytes=1 << 16, relaxed=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_removal_that_the_disk_does_not_take_removes_nothing(life):
    class Full(Disk):
        def open(self, path, flags):
            raise OSError(28, "No space left on device")

    life.send(0)
    life.step()
    life.settle()
    found = life.archive.removable(STUDY)
    with pytest.raises(BusyError, match="journalled"):
        life.archive.remove(found, Full())
    finish(life.root, life.index, life.filing)
    assert len(life.index.held(STUDY)) == 1
