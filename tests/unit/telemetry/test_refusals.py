"""Refusals: told by each process, bounded, counted instead of repeated, and of no patient."""

import subprocess
import sys
import threading

import pytest

from dicomscp.telemetry import refusals
from dicomscp.telemetry.refusals import Refusal, Refusals, recent


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        self.now += 1
        return self.now


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "refusals"


@pytest.fixture
def noting(directory):
    """A function that makes what a part notes with; all are closed at the end."""
    made = []

    def of(part, clock=None):
        made.append(Refusals(directory / part, *([clock] if clock else [])))
        return made[-1]

    yield of
    for one in made:
        one.close()


def test_what_is_noted_is_told_and_the_same_again_is_counted(directory, noting):
    of = noting("listener-0", Clock())
    of.note("refused", "cut short", calling_ae="CT1", address="10.0.0.1")
    of.note("busy", "Disk below its reserve", calling_ae="CT1", address="10.0.0.1")
    of.note("refused", "cut short", calling_ae="CT1", address="10.0.0.1")

    assert recent(directory, 10) == [
        Refusal("CT1", "10.0.0.1", "refused", "cut short", 2, 1001, 1003),
        Refusal("CT1", "10.0.0.1", "busy", "Disk below its reserve", 1, 1002, 1002),
    ]
    assert len(recent(directory, 1)) == 1


def test_processes_are_told_together(directory, noting):
    clock = Clock()
    for part in ("listener-0", "listener-1", "web"):
        noting(part, clock).note("refused", "cut short", calling_ae="CT1")

    (told,) = recent(directory, 10)

    assert (told.times, told.first_at, told.last_at) == (3, 1001, 1003)


def test_a_part_that_is_restarted_counts_on(directory, noting):
    clock = Clock()
    for reason in ("one", "two"):
        noting("listener-0", clock).note("refused", reason)
    again = noting("listener-0", clock)
    again.note("refused", "one")
    for number in range(31):
        again.note("refused", f"other {number}")

    reasons = {told.reason: told.times for told in recent(directory, 100)}

    assert (len(reasons), reasons["one"]) == (32, 2)
    assert "two" not in reasons


def test_neither_senders_nor_reasons_make_a_file_grow(directory, noting):
    of = noting("listener-0", Clock())
    of.note("refused", "one")
    size = (directory / "listener-0").stat().st_size
    for number in range(10_000):
        of.note("refused", "x" * 10_000, calling_ae=f"AE{number}")

    assert (directory / "listener-0").stat().st_size == size <= 1 << 15
    told = recent(directory, 100)
    assert [one.calling_ae for one in told] == [f"AE{number}" for number in range(9999, 9999 - 32, -1)]
    assert len(told[0].reason) == 160


def test_neither_uids_nor_what_was_sent_is_told(directory, noting):
    of = noting("listener-0")
    of.note("refused", "UID cannot be filed: '1.2.840/Doe^John'")
    of.note("refused", 'UID cannot be filed: "it\'s /Doe^John"')
    of.note("refused", "The instance 1.2.840.10008.5.1.4 is the patient's, and isn't here")

    assert {one.reason for one in recent(directory, 10)} == {
        "UID cannot be filed: …",
        "The instance … is the patient's, and isn't here",
    }


@pytest.mark.parametrize("text", ["\0" * 200, "\U0001d54f" * 200, "\ud800" * 200, "line\nline", "\x1b[31m"])
def test_any_text_fits_and_can_be_printed(directory, noting, text):
    noting("listener-0").note("refused", text, calling_ae=text, address=text)

    (told,) = recent(directory, 10)

    assert told.reason.isprintable()
    assert len(told.reason) == min(len(text), 160)


def test_a_record_that_is_half_written_is_passed_over(directory, noting):
    of = noting("listener-0", Clock())
    of.note("refused", "one")
    of.note("refused", "two")
    with (directory / "listener-0").open("r+b") as file:
        file.seek(20)
        file.write(b"????")

    assert [told.reason for told in recent(directory, 10)] == ["two"]


def test_a_disk_that_takes_nothing_costs_the_telling_alone(tmp_path):
    (tmp_path / "refusals").touch()  # where the folder should be

    Refusals(tmp_path / "refusals" / "listener-0").note("refused", "one")

    assert recent(tmp_path / "refusals", 10) == []


def test_what_is_noted_by_many_threads_is_all_counted(directory, noting):
    of = noting("listener-0")

    def note():
        for number in range(200):
            of.note("refused", f"reason {number % 5}")

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(told.times for told in recent(directory, 10)) == 800


def test_a_reader_beside_a_writer_meets_whole_records_alone(directory):
    script = (
        "import sys; from pathlib import Path; from dicomscp.telemetry.refusals import Refusals\n"
        "of = Refusals(Path(sys.argv[1]))\n"
        "print(flush=True)\n"
        "for n in range(20_000): of.note('refused', 'x' * (n % 150), calling_ae=f'AE{n % 40}')\n"
    )
    path = directory / "listener-0"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        while writer.poll() is None:
            for told in recent(directory, 100):
                assert set(told.reason) <= {"x"}
                assert told.calling_ae.startswith("AE")
    assert writer.returncode == 0
    assert len(recent(directory, 100)) == 32


def test_a_new_run_begins_without_any(directory, noting):
    noting("listener-0").note("refused", "one")

    refusals.clean(directory)

    assert recent(directory, 10) == []
    assert list(directory.iterdir()) == []
