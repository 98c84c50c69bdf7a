import pydicom
import pytest
from sqlalchemy import event

from dicomscp.errors import BusyError
from dicomscp.web.lately import Lately
from tests.clock import Clock
from tests.unit.web.held import SOURCES, FilledArchive


@pytest.fixture
def archive(tmp_path):
    return FilledArchive(tmp_path)


@pytest.fixture
def clock():
    return Clock()


def add_series(archive, series_uid, instances):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    dataset.SeriesInstanceUID = series_uid
    held = []
    for number in range(1, instances + 1):
        dataset.SOPInstanceUID = f"{series_uid}.{number}"
        held.append(archive.add(dataset))
    return held


def test_a_series_is_known_from_its_second_frame_on_for_a_second(archive, clock):
    first, second, third = add_series(archive, "1.2", 3)
    lately = Lately(archive, now=clock)
    assert lately.of(first.key) is None
    lately.asked_for(first)
    assert lately.of(second.key) is None
    clock.now += 0.9
    lately.asked_for(second)
    assert [lately.of(one.key) for one in (first, second, third)] == [first, second, third]
    clock.now += 0.9
    assert lately.of(third.key) == third
    clock.now += 0.2
    assert lately.of(third.key) is None


def test_frames_asked_for_now_and_then_are_asked_of_the_index_one_by_one(archive, clock):
    first, second = add_series(archive, "1.2", 2)
    lately = Lately(archive, now=clock)
    for one in (first, second, first, second):
        lately.asked_for(one)
        clock.now += 1.1
        assert lately.of(one.key) is None
    lately.asked_for(first)
    lately.asked_for(second)
    assert lately.of(first.key) == first


def test_who_goes_on_looking_is_known_again_from_the_next_frame_on(archive, clock):
    first, second = add_series(archive, "1.2", 2)
    lately = Lately(archive, now=clock)
    lately.asked_for(first)
    lately.asked_for(second)
    clock.now += 1.5
    assert lately.of(first.key) is None
    lately.asked_for(first)
    assert lately.of(second.key) == second


class Meanwhile(FilledArchive):
    """Lets something happen before it answers what is held of a series."""

    def held(self, *uids, limit=None):
        if limit is not None:
            self.meanwhile()
        return super().held(*uids, limit=limit)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_old_is_given_while_the_index_is_asked_nor_after_it_failed(tmp_path, clock, fails):
    archive = Meanwhile(tmp_path)
    archive.meanwhile = lambda: None
    first, second = add_series(archive, "1.2", 2)
    lately = Lately(archive, now=clock)
    lately.asked_for(first)
    lately.asked_for(second)
    clock.now += 1.1
    seen = []

    def meanwhile():
        seen.append(lately.of(first.key))
        lately.asked_for(first)  # somebody else does not ask as well
        if fails:
            raise BusyError("not now")

    archive.meanwhile = meanwhile
    lately.asked_for(first)
    assert seen == [None]
    assert lately.of(first.key) == (None if fails else first)
    archive.meanwhile = lambda: None
    lately.asked_for(second)
    assert lately.of(first.key) == first


def test_what_comes_meanwhile_is_known_a_second_later(archive, clock):
    (first,) = add_series(archive, "1.2", 1)
    lately = Lately(archive, now=clock)
    lately.asked_for(first)
    lately.asked_for(first)
    _, second = add_series(archive, "1.2", 2)
    assert lately.of(second.key) is None
    clock.now += 0.5
    lately.asked_for(second)
    assert lately.of(second.key) is None
    clock.now += 0.6
    lately.asked_for(second)
    assert lately.of(second.key) == second


def test_a_large_series_is_not_kept_and_not_asked_for_again_and_again(archive, clock):
    held = add_series(archive, "1.2", 3)
    lately = Lately(archive, most_instances=2, now=clock)
    for one in held:
        lately.asked_for(one)
    assert [lately.of(one.key) for one in held] == [None] * 3
    asked = []
    event.listen(archive.engine, "checkout", lambda *_: asked.append(1))
    for _ in range(59):
        clock.now += 0.9
        lately.asked_for(held[0])
    assert not asked


def test_so_many_series_are_kept(archive, clock):
    series = [add_series(archive, f"1.{number}", 1)[0] for number in range(1, 4)]
    lately = Lately(archive, kept_series=2, now=clock)
    for one in series:
        lately.asked_for(one)
        lately.asked_for(one)
    assert [lately.of(one.key) for one in series] == [None, *series[1:]]


def test_what_is_leaving_does_not_have_its_series_asked_for(archive, clock):
    (first,) = add_series(archive, "1.2", 1)
    lately = Lately(archive, now=clock)
    for _ in range(3):
        lately.asked_for(first._replace(leaving=1))
    assert lately.of(first.key) is None
