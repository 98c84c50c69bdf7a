"""How parts are told to end, and what they are handed."""

import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest

from dicomscp import config
from dicomscp.archive.journal import is_alive
from dicomscp.daemon import _Storing, local_offset, make_index, prepare_root
from dicomscp.dicom.matching import Level
from dicomscp.errors import BusyError
from tests.gateway import REPOSITORY

WAITING = """
import sys, threading
from dicomscp.daemon import _set_on
import signal
stop = threading.Event()
_set_on(stop, signal.SIGTERM)
print(flush=True)
while not stop.wait(1e-6):
    pass
"""


def test_a_signal_ends_a_loop_that_looks_at_its_event_all_the_time():
    """The handler meets the event's lock held: one that set it itself would now and then wait for ever."""
    processes = [
        subprocess.Popen([sys.executable, "-c", WAITING], cwd=REPOSITORY, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in processes:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    for process in processes:
        with process.stdout:
            assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("timezone", "month", "hours"),
    [("Europe/Berlin", 1, 1), ("Europe/Berlin", 7, 2), ("America/New_York", 7, -4), ("UTC", 7, 0)],
)
def test_a_time_zone_knows_its_summer(timezone, month, hours):
    moment = datetime(2020, month, 1, 12)  # noqa: DTZ001 - local time
    assert local_offset(timezone)(moment) == timedelta(hours=hours)


def test_without_a_time_zone_that_of_the_machine_is_taken():
    moment = datetime(2020, 7, 1, 12)  # noqa: DTZ001 - local time
    assert local_offset("")(moment) == moment.astimezone().utcoffset()


@pytest.mark.parametrize("timezone", ["", "Europe/Berlin"])
@pytest.mark.parametrize("here", ["America/New_York", "Asia/Tokyo"])
def test_the_ends_of_the_calendar_have_an_offset_in_every_zone(monkeypatch, timezone, here):
    """Devices that know no date write the first or the last that there is."""
    monkeypatch.setenv("TZ", here)
    time.tzset()
    try:
        for moment in (datetime.min, datetime.max):  # noqa: DTZ901 - local time
            assert abs(local_offset(timezone)(moment)) < timedelta(hours=15)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_index_knows_the_extra_keys_of_the_configuration(tmp_path):
    keys = {"index.extra_keys.series": ["KVP"], "index.extra_keys.instance": ["00201041"]}
    settings = config.load(None, {"root": str(tmp_path), **keys}, {})
    prepare_root(settings)
    index = make_index(settings, read_only=False)
    assert index.model.extra == {
        Level.PATIENT: frozenset(),
        Level.STUDY: frozenset(),
        Level.SERIES: {0x00180060},
        Level.IMAGE: {0x00201041},
    }


def test_the_web_servers_journal_is_made_when_something_is_stored(tmp_path):
    """Else a gateway on a full disk could not start, and nobody could read."""
    settings = config.load(None, {"root": str(tmp_path), "storage.segment_size": "1MiB"}, {})
    prepare_root(settings)
    make_index(settings, read_only=False)
    storing, journal = _Storing(settings), tmp_path / "journal"
    assert list(journal.iterdir()) == []
    journal.rmdir()
    journal.write_text("no folder")
    with pytest.raises(BusyError):
        storing()
    journal.unlink()
    archive = storing()
    assert storing() is archive
    (writer,) = [path for path in journal.iterdir() if path.name.startswith("web-")]
    assert is_alive(writer)
    storing.close()
    assert not is_alive(writer)
