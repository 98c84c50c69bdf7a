"""The journal: what is synced is read back, what is not is never taken for an entry."""

import hashlib
import threading

import pytest

from dicomscp.archive import journal
from dicomscp.archive.journal import INLINE, SLOT, JournalReader, JournalWriter, Position
from dicomscp.disk import Disk
from dicomscp.errors import BusyError

SEGMENT = 1 << 16


class FailingDisk(Disk):
    """A disk whose syncs or writes fail when told to."""

    fail_sync = fail_write = False

    def sync(self, descriptor):
        if self.fail_sync:
            raise OSError(5, "Input/output error")
        super().sync(descriptor)

    def write(self, descriptor, buffers, offset):
        if self.fail_write:
            raise OSError(5, "Input/output error")
        super().write(descriptor, buffers, offset)


def writer(folder, disk=None, role="listener-0", **options):
    return JournalWriter(
        folder, role, disk or Disk(), segment_bytes=SEGMENT, relaxed=options.get("relaxed", False)
    )


def inline(number, size=100):
    body = bytes([number % 256]) * size
    head = {"study": "1.2.3", "n": number, "digest": hashlib.sha256(body).hexdigest(), "dataset_offset": 0}
    return INLINE, head, (body,)


def numbers(entries):
    return [entry.head["n"] for entry in entries]


def test_what_is_synced_is_read_back_in_order(tmp_path):
    writing = writer(tmp_path)
    for number in range(50):
        writing.sync(writing.append(*inline(number)))
    reader = JournalReader(writing.directory)
    entries = reader.read(alive=True, limit_bytes=1 << 20)
    assert numbers(entries) == list(range(50))
    assert bytes(entries[7].body) == bytes([7]) * 100
    assert reader.read(alive=True, limit_bytes=1 << 20) == []


def test_who_only_looks_is_told_how_far_a_journal_is_and_leaves_nothing_behind(tmp_path):
    writing = writer(tmp_path)
    for number in range(2000):  # several segments
        ticket = writing.append(*inline(number))
    writing.sync(ticket)
    (writing.directory / "applied").unlink()
    before = sorted(writing.directory.iterdir())

    progress = journal.progress(writing.directory)

    assert progress.synced == (ticket.segment.number, ticket.end)
    assert progress.applied == (0, 0)
    assert sorted(writing.directory.iterdir()) == before
    reader = JournalReader(writing.directory)
    assert progress.waiting_bytes == reader.unapplied_bytes() > 2000 * 100
    while entries := reader.read(alive=True, limit_bytes=1 << 16):
        reader.mark_applied(entries[-1].end)
        told = journal.progress(writing.directory)
        assert told == (reader.synced(), entries[-1].end, reader.unapplied_bytes())
    assert told.waiting_bytes == 0
    reader.close()
    assert journal.progress(tmp_path / "gone").waiting_bytes == 0


def test_of_a_living_writer_nothing_is_seen_before_it_is_synced(tmp_path):
    writing = writer(tmp_path)
    ticket = writing.append(*inline(1))
    reader = JournalReader(writing.directory)
    assert reader.read(alive=True, limit_bytes=1 << 20) == []
    writing.sync(ticket)
    assert numbers(reader.read(alive=True, limit_bytes=1 << 20)) == [1]


def test_entries_go_on_over_many_segments(tmp_path):
    writing = writer(tmp_path)
    seen = []
    reader = JournalReader(writing.directory)
    for number in range(200):
        writing.sync(writing.append(*inline(number, 5000)))
        if number % 30 == 0:
            seen += numbers(reader.read(alive=True, limit_bytes=1 << 30))
    while more := reader.read(alive=True, limit_bytes=1 << 30):
        seen += numbers(more)
    assert seen == list(range(200))


def test_an_entry_larger_than_a_segment_gets_one_of_its_own(tmp_path):
    writing = writer(tmp_path)
    writing.sync(writing.append(*inline(1)))
    writing.sync(writing.append(*inline(2, 3 * SEGMENT)))
    writing.sync(writing.append(*inline(3)))
    reader, seen = JournalReader(writing.directory), []
    while more := reader.read(alive=True, limit_bytes=1 << 30):
        seen += numbers(more)
    assert seen == [1, 2, 3]


def test_a_dead_writer_is_read_up_to_its_torn_tail(tmp_path):
    writing = writer(tmp_path)
    ends = [writing.append(*inline(number)).end for number in range(4)]
    path = writing.directory / "0000000001.seg"
    writing.close()
    with path.open("r+b") as file:
        file.seek(ends[2] + 40)
        file.write(b"torn")
    assert not journal.is_alive(writing.directory)
    assert numbers(JournalReader(writing.directory).read(alive=False, limit_bytes=1 << 20)) == [0, 1, 2]


def test_a_torn_body_ends_the_segment_too(tmp_path):
    writing = writer(tmp_path)
    ends = [writing.append(*inline(number, 4000)).end for number in range(2)]
    writing.close()
    with (writing.directory / "0000000001.seg").open("r+b") as file:
        file.seek(ends[1] - 50)
        file.write(b"torn")
    assert numbers(JournalReader(writing.directory).read(alive=False, limit_bytes=1 << 20)) == [0]


def test_entries_behind_a_damaged_one_are_read_and_the_segment_is_told_of(tmp_path):
    writing = writer(tmp_path)
    ends = [writing.append(*inline(number)).end for number in range(5)]
    path = writing.directory / "0000000001.seg"
    writing.close()
    with path.open("r+b") as file:
        file.seek(ends[1] + 40)
        file.write(b"rot")
    reader = JournalReader(writing.directory)
    assert numbers(reader.read(alive=False, limit_bytes=1 << 20)) == [0, 1, 3, 4]
    assert reader.is_damaged(path)


def test_damage_in_what_a_living_writer_synced_does_not_stop_the_reading(tmp_path):
    writing = writer(tmp_path)
    ticket = None
    for number in range(3):
        ticket = writing.append(*inline(number))
    writing.sync(ticket)
    with (writing.directory / "0000000001.seg").open("r+b") as file:
        file.seek(ticket.end - 20)
        file.write(b"rot")
    reader = JournalReader(writing.directory)
    assert numbers(reader.read(alive=True, limit_bytes=1 << 20)) == [0, 1]
    assert reader.position == Position(1, ticket.end)
    writing.sync(writing.append(*inline(9)))
    assert numbers(reader.read(alive=True, limit_bytes=1 << 20)) == [9]


def test_bytes_of_an_earlier_use_never_pass_for_entries(tmp_path):
    old = writer(tmp_path)
    for number in range(100):
        old.append(*inline(number))
    old.close()
    free = tmp_path / "free"
    free.mkdir(exist_ok=True)
    for path in old.directory.glob("*.seg"):
        path.rename(free / path.name)
    new = writer(tmp_path)
    new.sync(new.append(*inline(7)))
    new.close()
    assert (new.directory / "0000000001.seg").stat().st_size == SEGMENT
    assert numbers(JournalReader(new.directory).read(alive=False, limit_bytes=1 << 20)) == [7]


def test_a_settled_position_is_never_read_again(tmp_path):
    writing = writer(tmp_path)
    for number in range(30):
        writing.sync(writing.append(*inline(number, 5000)))
    reader = JournalReader(writing.directory)
    while reader.read(alive=True, limit_bytes=1 << 30):
        pass
    freed = reader.mark_settled(reader.position, Disk())
    assert [path.name for path in freed] == [
        f"{number:010d}.seg" for number in range(1, reader.position.number)
    ]
    writing.sync(writing.append(*inline(99)))
    assert numbers(JournalReader(writing.directory).read(alive=True, limit_bytes=1 << 20)) == [99]


def test_after_a_failed_sync_the_segment_is_never_trusted_again(tmp_path):
    disk, told = FailingDisk(), []
    writing = JournalWriter(
        tmp_path,
        "listener-0",
        disk,
        segment_bytes=SEGMENT,
        relaxed=False,
        sync_failed=lambda: told.append(1),
    )
    writing.sync(writing.append(*inline(1)))
    first = writing.append(*inline(2))
    second = writing.append(*inline(3))
    disk.fail_sync = True
    with pytest.raises(BusyError):
        writing.sync(first)
    disk.fail_sync = False
    with pytest.raises(BusyError):
        writing.sync(second)
    assert told == [1]
    after = writing.append(*inline(4))
    assert after.segment.number > first.segment.number
    writing.sync(after)
    reader, seen = JournalReader(writing.directory), []
    while more := reader.read(alive=True, limit_bytes=1 << 20):
        seen += numbers(more)
    assert seen == [1, 4]


def test_after_a_failed_write_the_journal_goes_on_in_another_segment(tmp_path):
    disk = FailingDisk()
    writing = writer(tmp_path, disk)
    writing.sync(writing.append(*inline(1)))
    disk.fail_write = True
    with pytest.raises(BusyError):
        writing.append(*inline(2))
    disk.fail_write = False
    writing.sync(writing.append(*inline(3)))
    reader, seen = JournalReader(writing.directory), []
    while more := reader.read(alive=True, limit_bytes=1 << 20):
        seen += numbers(more)
    assert seen == [1, 3]


def test_threads_that_sync_at_one_time_share_syncs_and_lose_nothing(tmp_path):
    class Counting(Disk):
        syncs = 0

        def sync(self, descriptor):
            self.syncs += 1
            super().sync(descriptor)

    disk = Counting()
    writing = JournalWriter(tmp_path, "listener-0", disk, segment_bytes=1 << 20, relaxed=False)
    before = disk.syncs
    threads = [
        threading.Thread(
            target=lambda base=base: [
                writing.sync(writing.append(*inline(base + k, 3000))) for k in range(100)
            ]
        )
        for base in range(0, 800, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert disk.syncs - before < 800
    reader, seen = JournalReader(writing.directory), []
    while more := reader.read(alive=True, limit_bytes=1 << 30):
        seen += numbers(more)
    assert sorted(seen) == list(range(800))


def test_a_relaxed_journal_never_waits_for_the_disk(tmp_path):
    disk = FailingDisk()
    writing = writer(tmp_path, disk, relaxed=True)
    disk.fail_sync = True
    writing.sync(writing.append(*inline(1)))
    assert numbers(JournalReader(writing.directory).read(alive=True, limit_bytes=1 << 20)) == [1]


def test_a_writer_is_never_seen_without_its_lock(tmp_path):
    stop = threading.Event()
    dead = []

    def look():
        while not stop.is_set():
            dead.extend(path for path in journal.writers(tmp_path) if not journal.is_alive(path))

    looking = threading.Thread(target=look)
    looking.start()
    alive = [writer(tmp_path, role=f"import-{number}") for number in range(20)]
    stop.set()
    looking.join()
    assert not dead
    assert len({one.name for one in alive}) == 20


def test_an_entry_of_another_kind_carries_no_body(tmp_path):
    writing = writer(tmp_path)
    writing.sync(writing.append(SLOT, {"n": 1, "slot": "incoming/x/1"}, ()))
    (entry,) = JournalReader(writing.directory).read(alive=True, limit_bytes=1 << 20)
    assert (entry.kind, entry.head["slot"], bytes(entry.body)) == (SLOT, "incoming/x/1", b"")


def test_positions_order_as_their_words():
    earlier, later = Position(1, 4000), Position(2, 64)
    assert earlier < later
    assert earlier.word < later.word
    assert Position.of_word(later.word) == later


def test_a_journal_that_is_closed_at_once_leaves_nothing_to_be_made(tmp_path):
    for _ in range(20):
        writing = writer(tmp_path, role="remove")
        writing.sync(writing.append(journal.REMOVE, {"study": "1.2.3", "n": 1}, ()))
        writing.close()
        made = {path.name for path in writing.directory.glob("*.seg")}
        for thread in threading.enumerate():
            if thread.name == "journal-prepare":
                thread.join()
        assert {path.name for path in writing.directory.glob("*.seg")} == made
        reader = JournalReader(writing.directory)
        assert reader.has_removals
        (entry,) = reader.read(alive=False, limit_bytes=1 << 20)
        assert (entry.kind, entry.head["n"]) == (journal.REMOVE, 1)
        reader.close()
