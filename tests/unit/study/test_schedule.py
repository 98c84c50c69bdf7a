"""When a study is due."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomscp.study.schedule import SHARE, Schedule


@pytest.fixture
def schedule():
    return Schedule(quiet_seconds=2, patience_seconds=30)


def test_a_study_is_due_once_it_was_quiet(schedule):
    schedule.arrived("1.2", seq=1, now=0)
    assert schedule.due(now=1.9) == []
    assert schedule.due(now=2) == ["1.2"]


def test_every_arrival_puts_quiet_off(schedule):
    schedule.arrived("1.2", seq=1, now=0)
    schedule.arrived("1.2", seq=2, now=1.5)
    assert schedule.due(now=3) == []
    assert schedule.due(now=3.5) == ["1.2"]


def test_a_study_that_never_rests_is_due_when_its_patience_ends(schedule):
    for second in range(31):
        assert schedule.due(now=second) == []
        schedule.arrived("1.2", seq=second, now=second)
        if second == 29:
            break
    assert schedule.due(now=30) == ["1.2"]


def test_an_arrival_during_the_compile_is_not_lost(schedule):
    schedule.arrived("1.2", seq=1, now=0)
    schedule.arrived("1.2", seq=2, now=5)
    schedule.published("1.2", upto=1)
    assert schedule.due(now=7) == ["1.2"]


def test_what_is_published_is_due_no_more(schedule):
    schedule.arrived("1.2", seq=1, now=0)
    schedule.published("1.2", upto=1)
    assert schedule.due(now=100) == []
    assert len(schedule) == 0


def test_patience_grows_with_what_a_publish_costs(schedule):
    schedule.arrived("1.2", seq=1, now=0)
    schedule.arrived("1.2", seq=2, now=30)
    schedule.published("1.2", upto=1, seconds=10, now=40)
    for second in range(40, 241):
        schedule.arrived("1.2", seq=second, now=second)
    assert schedule.due(now=239.9) == []
    assert schedule.due(now=40 + 10 / SHARE) == ["1.2"]


def test_a_study_that_is_quiet_between_arrivals_rests_too(schedule):
    """Else each arrival of a slow study would cost a publish."""
    schedule.arrived("1.2", seq=1, now=0)
    schedule.published("1.2", upto=1, seconds=1, now=3)
    schedule.arrived("1.2", seq=2, now=5)
    assert schedule.due(now=22.9) == []
    assert schedule.due(now=3 + 1 / SHARE) == ["1.2"]


def test_what_somebody_waits_for_does_not_rest(schedule):
    schedule.arrived("1.2", seq=1, now=0)
    schedule.published("1.2", upto=1, seconds=10, now=3)
    schedule.arrived("1.2", seq=2, now=5)
    schedule.asked("1.2")
    assert schedule.due(now=5) == ["1.2"]


def test_what_somebody_waits_for_is_due_at_once(schedule):
    schedule.arrived("1.2", seq=1, now=0)
    schedule.asked("1.2")
    schedule.asked("1.3")
    assert schedule.due(now=0) == ["1.2"]


def test_the_longest_waiting_comes_first(schedule):
    schedule.arrived("1.9", seq=1, now=0)
    schedule.arrived("1.1", seq=2, now=1)
    assert schedule.due(now=10) == ["1.9", "1.1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10)), max_size=30))
def test_whatever_arrived_is_due_in_the_end(steps):
    schedule = Schedule(quiet_seconds=2, patience_seconds=30)
    now = 0.0
    for seq, (study_uid, pause) in enumerate(steps):
        now += pause
        schedule.arrived(study_uid, seq, now)
    assert set(schedule.due(now + 30)) == {study_uid for study_uid, _ in steps}
