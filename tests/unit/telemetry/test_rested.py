"""Rested: many who ask cost no more than one."""

import threading

from dicomscp.telemetry.rested import Rested
from tests.clock import Clock


def test_it_rests_twenty_times_what_the_answer_took():
    clock, asked = Clock(0.0), []

    def ask():
        asked.append(clock.now)
        clock.now += 0.5
        return len(asked)

    rested = Rested(ask, now=clock)
    answers = []
    for clock.now in (0, 1, 10.4, 10.5, 12):
        answers.append(rested())

    assert (answers, asked) == ([1, 1, 1, 2, 2], [0, 10.5])


def test_a_quick_answer_rests_for_the_least():
    clock, asked = Clock(0.0), []
    rested = Rested(lambda: asked.append(clock.now), least_seconds=1, now=clock)
    for clock.now in (0, 0.5, 0.9, 1, 1.5):
        rested()

    assert asked == [0, 1]


def test_a_failure_is_not_kept():
    answers = iter([ZeroDivisionError, 1])

    def ask():
        if (answer := next(answers)) is ZeroDivisionError:
            raise ZeroDivisionError
        return answer

    rested = Rested(ask, least_seconds=100)
    try:
        rested()
    except ZeroDivisionError:
        assert rested() == 1


def test_those_who_ask_together_are_answered_by_one_asking():
    asked, begun, go_on = [], threading.Event(), threading.Event()

    def ask():
        asked.append(1)
        begun.set()
        go_on.wait(10)
        return "answer"

    rested, answers = Rested(ask, least_seconds=100), []
    threads = [threading.Thread(target=lambda: answers.append(rested())) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait(10)
    go_on.set()
    for thread in threads:
        thread.join()

    assert (answers, asked) == (["answer"] * 8, [1])


def test_who_asks_meanwhile_is_given_the_last_answer():
    answers, begun, go_on = iter("ab"), threading.Event(), threading.Event()
    clock = Clock(0.0)

    def ask():
        answer = next(answers)
        if answer == "b":
            begun.set()
            go_on.wait(10)
        return answer

    rested, found = Rested(ask, least_seconds=1, now=clock), []
    assert rested() == "a"
    clock.now = 1
    asking = threading.Thread(target=lambda: found.append(rested()))
    asking.start()
    assert begun.wait(10)
    assert [rested(), rested()] == ["a", "a"]  # at once: nobody lets the other go on
    go_on.set()
    asking.join()
    assert (found, rested()) == (["b"], "b")
