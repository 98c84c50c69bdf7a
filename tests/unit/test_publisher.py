"""The publisher: an instance is compiled once, a bad one costs its study nothing else, a crash costs time."""

import gzip
import json
import multiprocessing
import os
import zlib
from functools import partial

import pydicom
import pytest

from dicomscp import daemon
from dicomscp.archive.archive import Claim, Source
from dicomscp.archive.filing import Filing, arrival_of
from dicomscp.config import Config
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.part10 import Origin, read_file_meta
from dicomscp.disk import Disk
from dicomscp.errors import BusyError
from dicomscp.publisher import Attempt, Documents, Publisher, attempts, publish_all
from dicomscp.study import layout
from tests.crash.test_powerloss import encoded
from tests.unit.test_pipeline import SEGMENT, Parts


class Counting(Compiler):
    """Knows which instances it compiled; fails at some, or ends the process there, as it is told."""

    def __init__(self, fails_at=None, dies_at=()):
        super().__init__()
        self.compiled, self.fails_at, self.dies_at = (), fails_at or {}, dies_at

    def header(self, *dataset, bulk_uri, **facts):
        sop_uid = bulk_uri.rpartition("/")[2]
        self.compiled += (sop_uid,)
        if sop_uid in self.dies_at:
            os._exit(137)
        if sop_uid in self.fails_at:
            raise self.fails_at[sop_uid]
        return super().header(*dataset, bulk_uri=bulk_uri, **facts)


class Held(Parts):
    """Studies that are held and indexed, to be published one by one."""

    def add(self, study_uid, *numbers):
        for number in numbers:
            self.admit(study_uid, number)
        while self.pipeline.recover():
            pass

    def remove(self, *place):
        self.archive.remove(self.archive.removable(*place), Disk())
        while self.pipeline.recover():
            pass

    def publish(self, study_uid, **options):
        """The compiler, and what became of the study."""
        compiler = options.setdefault("compiler", Counting())
        publisher = self.make_publisher(**options)
        (outcome,) = publisher.publish([study_uid])
        publisher.close()
        return compiler, outcome

    def metadata(self, study_uid):
        path = self.root / "dicomweb" / layout.study_metadata(study_uid)
        return json.loads(gzip.decompress(path.read_bytes()))

    def sop_uids(self, study_uid):
        return [one["00080018"]["Value"][0] for one in self.metadata(study_uid)]

    def state(self, study_uid):
        return json.loads((self.root / layout.state_path(study_uid)).read_bytes())

    def tree(self):
        return {
            str(path.relative_to(self.root / "dicomweb")): gzip.decompress(path.read_bytes())
            for path in sorted((self.root / "dicomweb").rglob("*.gz"))
        }

    def anew(self, study_uid):
        """The documents as the instances give them, with nothing to go by."""
        folder = self.root / "anew"
        publisher = Publisher(
            self.root,
            self.index,
            Disk(),
            folder,
            documents=Documents("/dicomweb", 1024),
            attempts=2,
            contents=folder,
        )
        publisher.compile(study_uid).edition.show()
        publisher.close()
        return {
            str(path.relative_to(folder)): gzip.decompress(path.read_bytes())
            for path in sorted(folder.rglob("*.gz"))
        }


@pytest.fixture
def held(root, ct_small):
    made = Held(root, ct_small)
    yield made
    made.close()


def test_one_instance_more_costs_the_reading_of_one(held):
    held.add("1.2", *range(100))
    assert len(held.publish("1.2")[0].compiled) == 100
    held.add("1.2", 100)
    compiler, outcome = held.publish("1.2")
    assert outcome.published
    assert compiler.compiled == ("1.2.1.100",)
    assert len(held.metadata("1.2")) == 101
    assert held.tree().items() >= held.anew("1.2").items()


def test_a_publish_of_what_did_not_change_reads_no_instance(held):
    held.add("1.2", 1, 2, 3)
    held.publish("1.2")
    before = held.state("1.2")
    assert held.publish("1.2")[0].compiled == ()
    assert held.state("1.2")["revision"] == before["revision"]


def test_the_state_says_how_things_stand(held):
    held.add("1.2", 1, 2)
    held.publish("1.2")
    state = held.state("1.2")
    assert (state["study_uid"], state["series"], state["instances"]) == ("1.2", 1, 2)
    assert (state["warnings"], state["warnings_count"]) == ([], 0)
    assert len(state["revision"]) == 64
    assert state["last_received_at"] <= state["published_at"]
    first = state["revision"]
    held.add("1.2", 3)
    held.publish("1.2")
    assert held.state("1.2")["revision"] != first


def test_the_feed_moves_with_the_revision(held):
    held.add("1.2", 1)
    held.publish("1.2")
    token = held.index.feed("", 10).token
    held.publish("1.2")
    assert held.index.feed(token, 10).publications == []
    held.add("1.2", 2)
    held.publish("1.2")
    (one,) = held.index.feed(token, 10).publications
    assert (one.study_uid, one.instances, one.revision) == ("1.2", 2, held.state("1.2")["revision"])


def test_a_study_of_which_nothing_is_left_is_withdrawn(held):
    held.add("1.2", 1)
    held.add("1.3", 1)
    held.publish("1.2")
    held.publish("1.3")
    held.remove("1.2")
    _, outcome = held.publish("1.2")
    assert outcome.published
    assert not (held.root / "dicomweb" / layout.study_directory("1.2")).exists()
    assert not (held.root / layout.state_path("1.2")).exists()
    assert not (held.root / layout.contents_directory("1.2")).exists()
    recent = json.loads(gzip.decompress((held.root / "dicomweb" / layout.STUDIES_INDEX).read_bytes()))
    assert [one["0020000D"]["Value"] for one in recent] == [["1.3"]]
    assert [one.revision for one in held.index.feed("", 10).publications][-1] == ""


def test_an_instance_at_which_the_compiler_fails_is_published_with_its_uids(held):
    held.add("1.2", 1, 2, 3)
    _, outcome = held.publish("1.2", compiler=Counting({"1.2.1.2": ValueError("a bug")}))
    assert outcome.published
    assert held.sop_uids("1.2") == ["1.2.1.1", "1.2.1.2", "1.2.1.3"]
    assert len(held.metadata("1.2")[1]) == 4
    assert held.state("1.2")["warnings"] == ["1.2.1.2: its header could not be compiled (ValueError)"]


def test_an_instance_whose_file_is_gone_is_left_out_and_tried_again(held):
    held.add("1.2", 1, 2)
    (gone, _) = held.index.held("1.2")
    (held.root / gone.path).rename(held.root / "aside")
    assert held.publish("1.2")[1].published
    assert len(held.metadata("1.2")) == 1
    assert "not published" in held.state("1.2")["warnings"][0]
    (held.root / "aside").rename(held.root / gone.path)
    compiler, _ = held.publish("1.2")
    assert compiler.compiled == (gone.key.sop_uid,)
    assert len(held.metadata("1.2")) == 2
    assert held.state("1.2")["warnings"] == []


def receipt_of(held, one):
    return read_file_meta((held.root / one.path).read_bytes()).receipt


def test_a_resend_repairs_an_instance_and_what_is_published_of_it(held):
    held.add("1.2", 1, 2)
    held.publish("1.2")
    (damaged, _) = held.index.held("1.2")
    data = bytearray((held.root / damaged.path).read_bytes())
    data[-1] ^= 1
    (held.root / damaged.path).write_bytes(data)
    held.add("1.2", 1)
    (repaired, _) = held.index.held("1.2")
    assert receipt_of(held, repaired).received_at == repaired.received_at > damaged.received_at
    assert [uid for uid, _ in held.index.due()] == ["1.2"]
    assert held.publish("1.2")[0].compiled == (repaired.key.sop_uid,)


def test_a_resend_that_is_filed_again_after_a_crash_leaves_the_first_receipt(held):
    """Else the file and the index would say different things, and a rebuild would publish others."""
    held.admit("1.2", 1)
    held.pipeline.file()
    held.admit("1.2", 1)
    held.pipeline.file()
    again = Filing(held.root, held.index, Disk(), segment_bytes=SEGMENT)  # nothing was settled
    assert again.step().entries == 2
    again.close()
    (one,) = held.index.held("1.2")
    assert receipt_of(held, one).received_at == one.received_at


def test_an_instance_whose_header_cannot_be_read_is_the_same_after_a_rebuild(held):
    """A deflated stream that is damaged behind what is looked at before it is taken."""
    dataset = pydicom.dcmread(held.source)
    dataset.StudyInstanceUID, dataset.SOPInstanceUID = "1.2", "1.2.9"
    dataset.PixelData = os.urandom(1 << 20) * 20
    deflator = zlib.compressobj(wbits=-15)
    deflated = deflator.compress(encoded(dataset)) + deflator.flush()
    claim = Claim(str(dataset.SOPClassUID), "1.2.9", "1.2.840.10008.1.2.1.99")
    incoming = held.archive.receive(claim, Source(Origin.C_STORE, "SENDER", "DICOMSCP"))
    incoming.write(deflated[:-4096] + b"\xff" * 4096)
    held.archive.admit(incoming)
    held.add("1.2")
    held.publish("1.2")
    assert held.sop_uids("1.2") == ["1.2.9"]
    assert "deflated dataset" in held.state("1.2")["warnings"][0]

    (there,) = held.index.held("1.2")
    again = arrival_of(Compiler(), held.root, there.path, held.index.model.index_tags)
    held.index.clear()
    held.index.apply([again], {})
    assert held.index.held("1.2") == [there]


def test_a_failing_disk_does_not_count(held):
    held.add("1.2", 1)
    for _ in range(5):
        _, outcome = held.publish(
            "1.2", compiler=Counting({"1.2.1.1": OSError(28, "No space left on device")})
        )
        assert not outcome.published
        assert not outcome.set_aside
    assert held.publish("1.2")[1].published


def test_other_failures_count_until_the_study_is_set_aside(held):
    held.add("1.2", 1)
    outcomes = [held.publish("1.2", compiler=Counting({"1.2.1.1": MemoryError()}))[1] for _ in range(3)]
    assert [one.set_aside for one in outcomes] == [False, False, True]
    assert [(one["study_uid"], one["attempts"]) for one in attempts(held.root)] == [("1.2", 2)]
    held.add("1.2", 2)
    assert held.publish("1.2")[1].published
    assert attempts(held.root) == []


def die_at(held, sop_uid):
    """Publish in a process of its own that ends, as if it were killed, at an instance."""

    def run():
        _, outcome = held.publish("1.2", compiler=Counting(dies_at=[sop_uid]))
        os._exit(0 if outcome.published else 1)

    return in_a_process(run)


def in_a_process(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def test_frames_and_bulk_values_are_files_if_that_is_asked_for(held):
    def publish(frames):
        publisher = Publisher(
            held.root,
            held.index,
            Disk(),
            held.root / "dicomweb",
            documents=Documents("/dicomweb", 16, frames=frames),
            attempts=2,
        )
        publisher.adopt()
        (outcome,) = publisher.publish(["1.2"])
        publisher.close()
        assert outcome.published

    def files():
        study = held.root / "dicomweb" / layout.study_directory("1.2")
        return sorted(
            str(path.relative_to(study))
            for path in study.rglob("*")
            if path.is_file() and ({"bulkdata", "frames"} & set(path.parts))
        )

    held.add("1.2", 1, 2)
    publish("files")
    there = files()
    assert [f"series/1.2.1/instances/1.2.1.{n}/frames/1.mht.gz" for n in (1, 2)] == there[-2:]
    assert "bulkdata/1.2.1/1.2.1.1/00431029" in there
    body = gzip.decompress((held.root / "dicomweb/studies/1.2" / there[-1]).read_bytes())
    with pydicom.dcmread(held.source) as dataset:
        assert dataset.PixelData in body
        assert (held.root / "dicomweb/studies/1.2/bulkdata/1.2.1/1.2.1.1/00431029").read_bytes() == dataset[
            0x00431029
        ].value
    held.remove(*held.index.held("1.2")[0].key)
    publish("files")
    assert files() == [name for name in there if "1.2.1.2" in name]
    publish("range")
    assert files() == []


def test_the_viewer_has_a_document_of_each_study_unless_it_is_not_asked_for(held):
    def publish(*, preload):
        publisher = Publisher(
            held.root,
            held.index,
            Disk(),
            held.root / "dicomweb",
            documents=Documents("/dicomweb", 1024, preload=preload),
            attempts=2,
        )
        publisher.adopt()
        (outcome,) = publisher.publish(["1.2"])
        publisher.close()
        assert outcome.published

    def viewed():
        return {name: text for name, text in held.tree().items() if "ohif" in name}

    held.add("1.2", 1, 2)
    publish(preload=True)
    one, series = viewed().values()
    (study,) = json.loads(one)["studies"]
    assert study["StudyInstanceUID"] == "1.2"
    assert study["series"][0]["instances"] == json.loads(series)
    assert [entry["metadata"]["SOPInstanceUID"] for entry in json.loads(series)] == ["1.2.1.1", "1.2.1.2"]
    publish(preload=False)
    assert viewed() == {}
    publish(preload=True)
    assert list(viewed().values()) == [one, series]
    for sop_uid in ("1.2.1.1", "1.2.1.2"):
        held.remove("1.2", "1.2.1", sop_uid)
    publish(preload=True)
    assert viewed() == {}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_an_instance_at_which_the_process_ended_twice_is_published_with_its_uids(held):
    held.add("1.2", 1, 2, 3)
    assert [die_at(held, "1.2.1.2") for _ in range(3)] == [137, 137, 0]
    assert held.sop_uids("1.2") == ["1.2.1.1", "1.2.1.2", "1.2.1.3"]
    assert len(held.metadata("1.2")[1]) == 4
    assert "ended twice" in held.state("1.2")["warnings"][0]
    assert attempts(held.root) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_studies_that_are_published_with_one_that_ends_the_process_are_not_set_aside(held):
    for study_uid in ("1.1", "1.2", "1.3"):
        held.add(study_uid, 1)

    def publish():
        publisher = held.make_publisher(compiler=Counting(dies_at=["1.3.1.1"]), attempts=1)
        outcomes = publisher.publish(["1.1", "1.2", "1.3"])
        os._exit(sum(outcome.published for outcome in outcomes))

    assert [in_a_process(publish) for _ in range(2)] == [137, 2]
    assert [(one["study_uid"], one["reason"]) for one in attempts(held.root)] == [
        ("1.3", "the process ended while it was compiled")
    ]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_ending_once_at_each_of_two_instances_convicts_neither(held):
    held.add("1.2", 1, 2, 3)
    assert [die_at(held, uid) for uid in ("1.2.1.2", "1.2.1.3")] == [137, 137]
    assert Attempt(held.root, Disk(), "1.2", 3).suspects == []


def test_what_a_killed_process_wrote_beside_documents_is_swept(held):
    held.add("1.2", 1)
    folder = held.root / "dicomweb" / layout.study_directory("1.2")
    folder.mkdir(parents=True)
    (folder / ".metadata.gz.new").write_bytes(b"half")
    (folder / ".other.gz.new").write_bytes(b"half")
    Attempt(held.root, Disk(), "1.2", 1).begin()
    assert held.publish("1.2")[1].published
    assert list(folder.rglob(".*")) == []


def test_a_crash_at_any_step_costs_only_time(held):
    """Each write, name and sync fails in turn; the next try publishes what one without a failure does."""
    held.add("1.2", *range(30))
    held.publish("1.2")
    held.add("1.2", *range(30, 40))
    wanted = held.anew("1.2")
    for step in range(1, 1000):
        disk = FailingDisk(step)
        publisher = Publisher(
            held.root,
            held.index,
            disk,
            held.root / "dicomweb",
            documents=Documents("/dicomweb", 1024),
            attempts=9,
        )
        (outcome,) = publisher.publish(["1.2"])
        publisher.close()
        if outcome.published:
            break
        assert disk.steps <= 0
    assert 4 < step < 50
    assert held.tree().items() >= wanted.items()
    assert list(held.index.due()) == []


class FailingDisk(Disk):
    """Fails at one call, the nth, of those that change something."""

    def __init__(self, steps):
        self.steps = steps

    def _step(self):
        self.steps -= 1
        if self.steps == 0:
            raise OSError(5, "Input/output error")

    def open(self, path, flags):
        self._step()
        return super().open(path, flags)

    def write(self, descriptor, buffers, offset):
        self._step()
        super().write(descriptor, buffers, offset)

    def sync(self, descriptor):
        self._step()
        super().sync(descriptor)

    def sync_all(self, descriptor):
        self._step()
        super().sync_all(descriptor)

    def sync_directory(self, path):
        self._step()
        super().sync_directory(path)


def test_studies_are_compiled_by_several_processes(held):
    for study in range(12):
        held.add(f"1.{study}", 1, 2)
    make = partial(daemon.publisher_process, Config(root=held.root))
    outcomes = list(
        publish_all(held.make_publisher(), [uid for uid, _ in held.index.due()], make=make, workers=2)
    )
    assert len(outcomes) == 12
    assert all(outcome.published for outcome in outcomes)
    assert list(held.index.due()) == []
    assert attempts(held.root) == []
    wanted = {}
    for study in range(12):
        wanted |= held.anew(f"1.{study}")
    assert held.tree().items() >= wanted.items()


class BusyIndex:
    """An index that answers, and takes nothing."""

    def __init__(self, index, *refused):
        self._index, self._refused = index, refused

    def __getattr__(self, name):
        if name in self._refused:
            raise BusyError("the index cannot be used now")
        return getattr(self._index, name)


@pytest.mark.parametrize("refused", ["snapshot", "mark_published"])
def test_an_index_that_is_busy_costs_no_study_an_attempt(held, refused):
    held.add("1.2", 1)
    index, held.index = held.index, BusyIndex(held.index, refused)
    for _ in range(5):
        _, outcome = held.publish("1.2")
        assert (outcome.published, outcome.set_aside) == (False, False)
    held.index = index
    assert held.publish("1.2")[1].published


def test_a_disk_that_is_full_before_a_compile_costs_no_attempt(held):
    held.add("1.2", 1)
    for step in range(1, 4):
        _, outcome = held.publish("1.2", disk=FailingDisk(step), attempts=1)
        assert (outcome.published, outcome.set_aside) == (False, False)
    assert held.publish("1.2")[1].published
