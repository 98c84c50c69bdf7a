"""Status: rates and lag from two looks, and a report of what stands under a root."""

import time

import orjson
import pytest

from dicomscp import config, upkeep
from dicomscp.archive.journal import Position, Progress
from dicomscp.daemon import make_index, make_status, prepare_root
from dicomscp.status import Lag, Rates, running, write_parts, write_running
from dicomscp.telemetry.metrics import Received
from dicomscp.telemetry.refusals import Refusals
from tests.clock import Clock


@pytest.fixture
def clock():
    return Clock(100.0)


@pytest.fixture
def settings(tmp_path):
    settings = config.load(None, {"root": str(tmp_path / "root")}, {})
    prepare_root(settings)
    return settings


# Rates


def test_a_rate_is_a_difference_over_the_last_seconds(clock):
    rates = Rates(clock)
    for clock.now, instances in ((100, 0), (101, 10), (102, 30), (107, 40)):
        rates.look({"CT1": Received(instances, instances * 1000, clock.now)})

    assert rates.told()("CT1") == {"instances_per_second": 2.0, "bytes_per_second": 2000}  # since 102


def test_an_ae_that_was_not_there_before_began_at_nothing(clock):
    rates = Rates(clock)
    rates.look({})
    clock.now += 2
    rates.look({"CT1": Received(5, 500, 101)})

    assert rates.told()("CT1") == {"instances_per_second": 2.5, "bytes_per_second": 250}
    assert rates.told()("MR1") == {"instances_per_second": 0, "bytes_per_second": 0}


def test_no_rate_is_told_without_two_looks_or_of_long_ago(clock):
    unknown = {"instances_per_second": None, "bytes_per_second": None}
    rates = Rates(clock)
    assert rates.told()("CT1") == unknown
    rates.look({"CT1": Received(5, 500, 100)})
    assert rates.told()("CT1") == unknown
    clock.now += 1
    rates.look({"CT1": Received(6, 600, 101)})
    assert rates.told()("CT1")["instances_per_second"] == 1
    clock.now += 60
    assert rates.told()("CT1") == unknown


# Lag


def journals(synced, applied):
    return {"listener-0-1": Progress(Position(1, synced), Position(1, applied), synced - applied)}


def test_lag_is_the_age_of_what_is_not_applied(clock):
    lag = Lag(clock)
    lag.look(journals(100, 100))
    assert lag.seconds(journals(200, 100)) == 0  # it came since the last look
    clock.now += 1
    lag.look(journals(200, 100))
    clock.now += 3
    lag.look(journals(500, 150))
    assert lag.seconds(journals(500, 150)) == 3
    clock.now += 1
    assert lag.seconds(journals(600, 200)) == 1  # what came with the second look still waits
    assert lag.seconds(journals(600, 600)) == 0


def test_what_is_settled_and_gone_does_not_wait(clock):
    lag = Lag(clock)
    lag.look(journals(200, 100))
    clock.now += 1
    assert lag.seconds({}) == 0


def test_a_new_segment_without_entries_is_no_lag(clock):
    lag, behind = Lag(clock), {"a": Progress(Position(2, 64), Position(1, 1000), 0)}
    lag.look(behind)
    clock.now += 5
    assert lag.seconds(behind) == 0


def test_lag_is_not_known_before_the_first_look_and_told_in_bounded_memory(clock):
    lag = Lag(clock)
    assert lag.seconds(journals(200, 100)) is None
    for clock.now in range(100, 2100):
        lag.look(journals(200 + clock.now, 100))
    assert lag.seconds(journals(200, 100)) == 1999
    assert len(lag._looks) <= 128


# The report


def test_a_root_that_nobody_serves_is_reported_too(settings):
    report = upkeep.status(settings)

    assert (report["running"], report["serve"], report["parts"], report["associations"]) == (
        False,
        None,
        [],
        0,
    )
    assert (report["journal_waiting_bytes"], report["journal_lag_seconds"]) == (0, None)
    assert (report["set_aside"], report["quarantine"], report["refusals"]) == ([], [], [])
    assert report["disk_size_bytes"] > report["disk_free_bytes"] > 0
    assert "held" not in report


def test_command_and_page_tell_the_same(settings):
    make_index(settings, read_only=False)
    root = settings.root
    write_running(root, {"pid": 1, "version": "1"})
    write_parts(root, [{"name": "web", "alive": True, "started_at": "", "deaths": 0, "exit_status": None}])
    refusing = Refusals(root / "run" / "refusals" / "listener-0", lambda: 0.0)
    refusing.note("busy", "full", calling_ae="CT1", address="10.0.0.1")
    refusing.close()
    (root / "quarantine").mkdir()
    (root / "quarantine" / "a.reason.txt").write_text(
        "time: 2026-01-01T00:00:00+00:00\nfile: a\nreason: no\n"
    )
    (root / "state" / "attempts").mkdir()
    for number, attempts in enumerate((1, settings.pipeline.attempts)):
        record = {"study_uid": f"1.{number}", "attempts": attempts, "reason": "it failed", "changes": 1}
        (root / "state" / "attempts" / f"{number}.json").write_bytes(orjson.dumps(record))

    report = make_status(settings, listed=20).report()

    for told in (report, upkeep.status(settings)):
        del told["disk_free_bytes"]
    assert upkeep.status(settings).items() >= report.items()
    assert report["running"] is True
    assert report["parts"][0]["name"] == "web"
    assert report["refusals"] == [
        {
            "calling_ae": "CT1",
            "address": "10.0.0.1",
            "kind": "busy",
            "reason": "full",
            "times": 1,
            "first_at": "1970-01-01T00:00:00+00:00",
            "last_at": "1970-01-01T00:00:00+00:00",
        }
    ]
    assert report["quarantine"] == [{"file": "a", "time": "2026-01-01T00:00:00+00:00", "reason": "no"}]
    assert (report["quarantined"], report["set_aside_studies"]) == (1, 1)
    assert report["set_aside"] == [
        {"study_uid": "1.1", "attempts": settings.pipeline.attempts, "reason": "it failed"}
    ]
    assert (report["held"]["studies"], report["due"]) == (0, 0)


def test_of_much_trouble_the_last_is_listed_and_all_is_counted(settings):
    (settings.root / "quarantine").mkdir()
    for number in range(30):
        path = settings.root / "quarantine" / f"{number}.reason.txt"
        path.write_text(f"time: 2026-01-01T00:00:00+00:00\nfile: {number}\nreason: no\n")

    report = make_status(settings, listed=5).report()

    assert (report["quarantined"], len(report["quarantine"])) == (30, 5)


def test_what_grows_is_not_asked_for_each_time(settings):
    make_index(settings, read_only=False)
    status = make_status(settings, listed=20)
    status.report()
    began = time.process_time()
    for _ in range(100):
        status.report()

    assert time.process_time() - began < 2  # seconds; asking the index alone a hundred times takes longer


def test_a_state_that_is_no_state_is_none(tmp_path):
    (tmp_path / "run").mkdir()
    for text in ("", "[]", "{"):
        (tmp_path / "run" / "state.json").write_text(text)
        assert running(tmp_path) is None
