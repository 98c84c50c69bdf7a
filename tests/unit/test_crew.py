"""Worker processes that share one stream: what comes back, what is on the way, how they end."""

import contextlib
import functools
import itertools
import os
import signal

import pytest

from dicomscp.crew import Count, share
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.errors import BusyError, RefusedError
from tests.processes import descendants, wait_until

HARMLESS = signal.SIGCHLD


def each(function):
    """What lets a worker apply *function*, of a module that it can import too, to each item."""
    return functools.partial(contextlib.nullcontext, functools.partial(map, function))


def test_every_item_of_a_long_stream_gives_one_result():
    assert sorted(share(map(str, range(5000)), each(int), jobs=2)) == list(range(5000))


def test_several_processes_work_and_none_is_left():
    before = set(descendants(os.getpid()))

    groups = set(share([0] * 3000, each(os.getpgid), jobs=2))

    assert len(groups) == 2
    assert os.getpgid(0) not in groups
    assert set(descendants(os.getpid())) == before


def test_few_items_start_one_process():
    assert len(set(share([0] * 3, each(os.getpgid), jobs=8))) == 1


def test_an_empty_stream_starts_none():
    results = share([], functools.partial(read_file_meta, b""), jobs=8)  # a worker could not begin

    assert list(results) == []


def test_what_is_on_the_way_is_bounded():
    taken = 0

    def stream():
        nonlocal taken
        for number in range(5000):
            taken += 1
            yield number

    for done, _ in enumerate(share(stream(), each(abs), jobs=2)):
        assert taken - done <= 2 * 2 * 64 + 64


def test_once_it_is_to_stop_no_item_is_begun_and_what_was_made_comes():
    done = set()
    for result in share(itertools.count(), each(abs), jobs=2, stop=lambda: len(done) >= 100):
        assert result not in done
        done.add(result)

    assert 100 <= len(done) < 100 + 2 * 2 * 64 + 64


def test_a_stream_that_is_left_ends_its_workers():
    before = set(descendants(os.getpid()))
    results = share(itertools.count(), each(abs), jobs=2)
    next(results)

    results.close()

    assert set(descendants(os.getpid())) == before


def test_a_worker_that_is_killed_is_told_and_ends_the_rest():
    made = []
    items = itertools.chain([HARMLESS] * 100, [signal.SIGKILL], itertools.repeat(HARMLESS))

    with pytest.raises(BusyError, match="was ended by SIGKILL"):
        made.extend(share(items, each(signal.raise_signal), jobs=2))


def test_a_worker_that_cannot_begin_says_why():
    with pytest.raises(RefusedError, match="not DICOM"):
        list(share([1], functools.partial(read_file_meta, b"Dear colleague"), jobs=2))


def test_a_count_is_known_once_it_is_made():
    gate = itertools.repeat(None, 1000)
    count = Count(gate)

    wait_until(lambda: count.total is not None, 10, "the items to be counted")
    assert count.total == 1000
