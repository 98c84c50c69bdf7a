"""Documents of a series: what stands is taken over, and what they say depends on the instances alone."""

import gzip
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomscp.disk import Disk
from dicomscp.publish.directory import Edition
from dicomscp.publish.series import (
    Contents,
    Identity,
    Made,
    Names,
    read_contents,
    sections,
    write_contents,
    write_series,
)
from dicomscp.study.compile import SECTION_BYTES, Lines

NAMES = Names("metadata.gz", "instances/index.json.gz", "ohif-dicom-json.gz")
EMPTY = Contents("test", "1.2", "1.2.3")


def identity(number, received_at=0):
    return Identity(f"1.2.3.{number}", f"{number:064x}", received_at)


def made(one, size=1000):
    """What the compiler would give: a long line that differs from instance to instance, and a short one."""
    noise = hashlib.sha256(repr(one).encode()).hexdigest()
    return Made(
        Lines(
            f'{{"{one.sop_uid}":"{noise * (size // 64)}"}}'.encode(),
            f'{{"{one.sop_uid}"}}'.encode(),
            f'{{"viewed":"{noise}"}},{{"viewed":2}}'.encode(),
        ),
        ("odd",) if int(noise, 16) % 5 == 0 else (),
    )


class Tree:
    """A published series, and which instances the compiler was asked for."""

    def __init__(self, folder, size=1000):
        self.folder, self.size = folder, size
        self.path = folder / "state" / "series.contents"
        self.asked = []

    def make(self, one):
        self.asked.append(one)
        return made(one, self.size)

    def publish(self, wanted, make=None):
        self.asked.clear()
        edition = Edition(self.folder, Disk())
        contents = write_series(edition, NAMES, read_contents(self.path, EMPTY), wanted, make or self.make)
        edition.show()
        write_contents(self.path, contents, Disk())
        return contents

    def texts(self):
        return [gzip.decompress((self.folder / name).read_bytes()) for name in NAMES]

    def bytes(self):
        return [(self.folder / name).read_bytes() for name in NAMES]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def expected(wanted, size=1000):
    return [b"[" + b",\n".join(made(one, size).lines[column] for one in wanted) + b"]" for column in range(3)]


def test_one_instance_more_costs_the_compiling_of_one(tree):
    wanted = [identity(number) for number in range(5000)]
    tree.publish(wanted)
    assert len(tree.asked) == 5000
    for at in (5000, 0, 2500):
        wanted.insert(at, identity(10_000 + at))
        tree.publish(wanted)
        assert tree.asked == [identity(10_000 + at)]
        assert tree.texts() == expected(wanted)


def test_what_did_not_change_is_not_written(tree):
    wanted = [identity(number) for number in range(200)]
    first = tree.publish(wanted)
    before = [(tree.folder / name).stat().st_ino for name in NAMES]
    assert tree.publish(wanted) == first
    assert tree.asked == []
    assert [(tree.folder / name).stat().st_ino for name in NAMES] == before


def test_an_instance_that_goes_costs_nothing(tree):
    wanted = [identity(number) for number in range(300)]
    tree.publish(wanted)
    del wanted[7], wanted[100:150], wanted[-1]
    tree.publish(wanted)
    assert tree.asked == []
    assert tree.texts() == expected(wanted)


def test_another_receipt_is_compiled_anew(tree):
    wanted = [identity(number) for number in range(100)]
    tree.publish(wanted)
    wanted[50] = identity(50, received_at=1)
    tree.publish(wanted)
    assert tree.asked == [wanted[50]]
    assert tree.texts() == expected(wanted)


def test_an_instance_that_cannot_be_made_is_left_out_and_asked_for_again(tree):
    wanted = [identity(number) for number in range(50)]
    tree.publish(wanted, lambda one: None if one == wanted[3] else tree.make(one))
    assert tree.texts() == expected(wanted[:3] + wanted[4:])
    tree.publish(wanted)
    assert tree.asked == [wanted[3]]
    assert tree.texts() == expected(wanted)


def test_warnings_stay_with_what_stands(tree):
    wanted = [identity(number) for number in range(60)]
    told = [member.warnings for member in tree.publish(wanted).members]
    assert any(told)
    again = tree.publish([*wanted, identity(1000)])
    assert [member.warnings for member in again.members][:60] == told


def spoil(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [300, -300])
def test_a_damaged_document_is_made_anew_where_it_is_damaged(tree, name, at):
    wanted = [identity(number) for number in range(500)]
    tree.publish(wanted)
    spoil(tree.folder / name, at)
    tree.publish([*wanted, identity(501)])
    assert 1 < len(tree.asked) < 250
    assert tree.texts() == expected([*wanted, identity(501)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [5, 12, -2])
def test_a_document_damaged_around_its_sections_is_put_together_anew(tree, name, at):
    wanted = [identity(number) for number in range(100)]
    tree.publish(wanted)
    spoil(tree.folder / name, at)
    tree.publish(wanted)
    assert tree.asked == []
    assert tree.texts() == expected(wanted)


@pytest.mark.parametrize("at", [0, 40, 5000, -1])
def test_damaged_contents_say_nothing(tree, at):
    wanted = [identity(number) for number in range(100)]
    tree.publish(wanted)
    spoil(tree.path, at)
    tree.publish(wanted)
    assert tree.asked == wanted
    assert tree.texts() == expected(wanted)


@pytest.mark.parametrize(
    "other", [("other", "1.2", "1.2.3"), ("test", "1.9", "1.2.3"), ("test", "1.2", "1.9")]
)
def test_contents_of_another_maker_or_series_say_nothing(tree, other):
    tree.publish([identity(1)])
    assert read_contents(tree.path, EMPTY).parts
    assert not read_contents(tree.path, Contents(*other)).parts


def test_contents_without_documents_say_nothing(tree):
    wanted = [identity(number) for number in range(100)]
    tree.publish(wanted)
    (tree.folder / NAMES.metadata).unlink()
    tree.publish(wanted)
    assert tree.asked == wanted


def test_documents_that_were_never_noted_are_not_mistaken_for_those_that_were(tree):
    """As after a crash between showing documents and noting what they are made of."""
    wanted = [identity(number) for number in range(300)]
    tree.publish(wanted)
    noted = tree.path.read_bytes()
    tree.publish([identity(1000), *wanted])
    tree.path.write_bytes(noted)
    tree.publish([identity(1000), *wanted, identity(1001)])
    assert tree.texts() == expected([identity(1000), *wanted, identity(1001)])


def test_a_long_line_has_a_section_for_itself(tmp_path):
    sizes = {"1.2.3.5": 4 * SECTION_BYTES}
    tree = Tree(tmp_path)

    def make(one):
        tree.asked.append(one)
        return made(one, sizes.get(one.sop_uid, 100))

    contents = tree.publish([identity(number) for number in range(10)], make)
    assert [len(part.members) for part in contents.parts if part.places[0].size > SECTION_BYTES] == [1]


def test_the_sections_of_a_series_can_be_read_before_they_are_shown(tree):
    wanted = [identity(number) for number in range(100)]
    edition = Edition(tree.folder, Disk())
    contents = write_series(edition, NAMES, EMPTY, wanted, tree.make)
    assert sum(section.size for section in sections(edition, NAMES, contents, NAMES.metadata)) > 90_000
    edition.show()
    assert sum(section.size for section in sections(edition, NAMES, contents, NAMES.metadata)) > 90_000


numbers = st.lists(st.integers(0, 200), unique=True, max_size=120)


@given(steps=st.lists(numbers, min_size=1, max_size=4), size=st.sampled_from([64, 1000, 60_000]))
def test_documents_are_the_same_whatever_stood_before(steps, size, tmp_path_factory):
    """Text and sections follow from the instances, not from the way there."""
    tree = Tree(tmp_path_factory.mktemp("tree"), size)
    for step in steps:
        tree.publish([identity(number) for number in step])
    wanted = [identity(number) for number in steps[-1]]
    fresh = Tree(tmp_path_factory.mktemp("fresh"), size)
    fresh.publish(wanted)
    assert tree.texts() == expected(wanted, size)
    assert tree.bytes() == fresh.bytes()
