"""Published documents follow from the variants held and their receipts, and from nothing else.

A gateway lives through whatever comes: arrivals, the same again, other contents under a held UID, removals,
a clock that jumps, publishes at any time, being killed at any call to the disk, restarts.  In the end it
holds what was acknowledged and not removed since, and its documents are those that a gateway gives that finds
the same files for the first time.
"""

import contextlib
import gzip
import hashlib
import itertools
import os
import re
import shutil
import threading
from pathlib import Path

import orjson
import pydicom
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydicom.data import get_testdata_file

from dicomscp.archive.archive import Archive, Claim, Intake, Source
from dicomscp.archive.filing import Filing, arrival_of
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.matching import STANDARD
from dicomscp.dicom.part10 import Origin, read_file_meta
from dicomscp.disk import Disk
from dicomscp.errors import BusyError
from dicomscp.publisher import Documents, Publisher
from dicomscp.study import layout
from tests.crash.test_powerloss import SEGMENT, encoded, open_index

EXAMPLES = int(os.environ.get("DICOMSCP_TEST_EXAMPLES", "8"))
STEPS = 40
CT = "1.2.840.10008.5.1.4.1.1.2"
STUDIES = ("1.2.3", "1.2.4")


CHANGES = {
    "open", "write", "sync", "sync_all", "sync_directory", "link", "rename", "exchange", "unlink", "truncate",
    "make_directory", "remove_directory",
}  # fmt: skip


class KilledError(BaseException):
    """The process is no more: nothing that it still does has an effect."""


class MortalDisk(Disk):
    """Kills at the nth call that changes something, and at every one after it."""

    def __init__(self):
        self.calls_left = None

    def __getattribute__(self, name):
        if name in CHANGES:
            object.__getattribute__(self, "_count")()
        return object.__getattribute__(self, name)

    def _count(self):
        if self.calls_left is None:
            return
        if self.calls_left <= 0:
            is_main = threading.current_thread() is threading.main_thread()
            raise KilledError if is_main else OSError(5, "killed")  # threads end without a word
        self.calls_left -= 1


def datasets():
    """Instances of two studies that disagree on much.

    Each SOP Instance UID has three contents, one of them in the other study.
    """
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    dataset.PixelData = bytes(16 * 16 * 2)
    dataset.Rows = dataset.Columns = 16
    made = []
    for number, variant in itertools.product(range(6), range(3)):
        dataset.StudyInstanceUID = STUDIES[(number % 2 + variant // 2) % 2]
        dataset.SeriesInstanceUID = f"{dataset.StudyInstanceUID}.{number % 3}"
        dataset.SOPInstanceUID = f"9.{number}"
        dataset.SeriesNumber = number % 3 if number else None
        dataset.InstanceNumber = 7 - number if number % 4 else None
        dataset.PatientName = f"NAME^{variant}" if number % 2 else ""
        dataset.StudyDescription = f"{number}-{variant}" if variant else ""
        dataset.add_new(0x00091010, "LO", "TEST")
        dataset.add_new(0x00091001, "OB", bytes([variant]) * 100)
        if variant == 1:  # what is a value elsewhere is a sequence with one here
            dataset[0x00091001].VR = "SQ"
            dataset[0x00091001].value = [pydicom.Dataset()]
            dataset[0x00091001].value[0].add_new(0x00420011, "OB", bytes(100))
        dataset.PatientComments = "x" * 10_000 if (number, variant) == (5, 1) else "short"
        made.append((dataset.SOPInstanceUID, encoded(dataset)))
    return made


DATASETS = datasets()


def digest_of(number):
    sop_uid, dataset = DATASETS[number]
    return sop_uid, hashlib.sha256(dataset).digest()


class Gateway:
    """One gateway in one process, and what its senders and operators were told."""

    def __init__(self, root, inline_bytes=8 << 10, frames="range"):
        self.root, self.inline_bytes, self.frames = root, inline_bytes, frames
        (root / "run").mkdir(parents=True)
        (root / "state").mkdir()
        self.clock = 1_000_000_000_000_000_000
        self.held = set()  # what must be: acknowledged, and not removed since
        self.perhaps = set()  # what may be: the sender was told nothing
        self.ended_at = set()  # instances at whose compilation it was killed
        self.disk = None
        self.start()

    def now(self):
        self.clock += 1_000_000
        return self.clock

    def start(self):
        self.disk = MortalDisk()
        self.index = open_index(self.root)
        self.intake = Intake(
            self.root,
            "listener-0",
            self.disk,
            relaxed=False,
            reserve_bytes=0,
            max_variants=8,
            inline_bytes=self.inline_bytes,
            segment_bytes=SEGMENT,
        )
        self.archive = Archive(self.root, self.index, intake=self.intake, wait_seconds=0, now=self.now)
        self.filing = Filing(self.root, self.index, self.disk, segment_bytes=SEGMENT)
        self.publisher = Publisher(
            self.root,
            self.index,
            self.disk,
            self.root / "dicomweb",
            documents=Documents("/dicomweb", 64, frames=self.frames),
            attempts=1000,  # who is killed all the time is not to be set aside
            now=lambda: self.clock / 1e9,
        )

    def kill(self):
        """End as a killed process does: locks and descriptors go, nothing is written."""
        self.disk.calls_left = 0
        for close in (self.archive.close, self.filing.close, self.publisher.close):
            with contextlib.suppress(KilledError, OSError):
                close()
        self.give_up_locks()
        self.index._engine.dispose()
        self.lose_where_it_ended_again()

    def give_up_locks(self):
        """Of every journal that it wrote, one in the making too."""
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if re.fullmatch(rf"{self.root}/journal/[^/]+/lock", str(descriptor.readlink())):
                    os.close(int(descriptor.name))

    def lose_where_it_ended_again(self):
        """That is never synced.  Kept twice, an instance is published with its UIDs alone: another story."""
        for path in (self.root / "state/attempts").glob("*.at"):
            where = path.read_text().strip()
            if where in self.ended_at and where.startswith("9."):
                path.unlink()
            self.ended_at.add(where)

    def send(self, number):
        one = digest_of(number)
        self.perhaps.add(one)
        sop_uid, dataset = DATASETS[number]
        source = Source(Origin.C_STORE, "MODALITY", "DICOMSCP")
        incoming = self.archive.receive(Claim(CT, sop_uid, "1.2.840.10008.1.2.1"), source)
        incoming.write(dataset)
        self.archive.admit(incoming)
        self.held.add(one)

    def file(self):
        return self.filing.step().entries

    def file_all(self):
        while self.file():
            pass

    def publish(self):
        outcomes = self.publisher.publish([uid for uid, _ in self.index.due()])
        assert all(outcome.published for outcome in outcomes)

    def finish_removals(self):
        self.filing.finish_removals()

    def remove(self, *place):
        self.file_all()
        removable = self.archive.removable(*place)
        named = {(one.key.sop_uid, one.digest) for one in removable.variants}
        if named:
            self.held -= named
            self.perhaps |= named
            self.archive.remove(removable, self.disk)
            self.perhaps -= named

    def settle(self):
        self.filing.settle(wait=True)

    def come_to_rest(self):
        """Nothing is left to be filed, published or taken away."""
        self.file_all()
        while self.publish() or self.filing.finish_removals() or list(self.index.due()):
            pass
        self.publisher.publish_recent()
        self.settle()
        self.filing.clear_incoming()

    def documents(self):
        return documents_of(self.root / "dicomweb")


def documents_of(folder):
    """All that is published, uncompressed."""
    return {
        str(path.relative_to(folder)): gzip.decompress(path.read_bytes())
        if path.suffix == ".gz"
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def put(files, root, order=1):
    """Put Part 10 files with our receipts where a gateway keeps its own; returns what an index is told."""
    compiler = Compiler()
    arrivals = []
    for file in files[::order]:
        meta = read_file_meta(file)
        header = compiler.header(
            file[meta.dataset_offset :],
            meta.transfer_syntax_uid,
            total_bytes=len(file) - meta.dataset_offset,
            bulk_uri="",
        ).fragments
        path = root / place_of(root, header, meta.receipt.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
        arrivals.append(arrival_of(compiler, root, str(path.relative_to(root)), STANDARD.index_tags))
    return arrivals


def found_anew(files, root, *, order=1, frames="range"):
    """The documents of a gateway that finds these files, Part 10 with our receipts, for the first time.

    *order* 1 or -1: in which they are indexed, and which variant of several gets the plain name.
    """
    index = open_index(root)
    (root / "run").mkdir()
    arrivals = put(files, root, order)
    for start in range(0, len(arrivals), 4):
        index.apply(arrivals[start : start + 4], {})
    publisher = Publisher(
        root,
        index,
        Disk(),
        root / "dicomweb",
        documents=Documents("/dicomweb", 64, frames=frames),
        attempts=1,
    )
    assert all(outcome.published for outcome in publisher.publish([uid for uid, _ in index.due()]))
    publisher.publish_recent()
    publisher.close()
    index._engine.dispose()
    return documents_of(root / "dicomweb")


def place_of(root, header, digest):
    uids = [orjson.loads(b"{%b}" % header[tag]) for tag in (0x0020000D, 0x0020000E, 0x00080018)]
    key = layout.InstanceKey(*(next(iter(one.values()))["Value"][0] for one in uids))
    plain = layout.instance_path(key)
    return layout.instance_path(key, digest) if (root / plain).exists() else plain


def files_of(root):
    return [path.read_bytes() for path in sorted((root / "instances").rglob("*.dcm"))]


numbers = st.integers(0, len(DATASETS) - 1)
places = st.one_of(
    st.sampled_from([(uid,) for uid in STUDIES]),
    st.builds(lambda study, n: (study, f"{study}.{n}"), st.sampled_from(STUDIES), st.integers(0, 2)),
    st.builds(
        lambda study, n: (study, f"{study}.{n % 3}", f"9.{n}"), st.sampled_from(STUDIES), st.integers(0, 5)
    ),
)


class Life(RuleBasedStateMachine):
    """What may happen to one gateway."""

    folder: Path  # where it lives

    @initialize(inline=st.sampled_from([0, 8 << 10, 1 << 20]), frames=st.sampled_from(["range", "files"]))
    def begin(self, inline, frames):
        self.root = self.folder / f"{next(self.names)}"
        self.gateway = Gateway(self.root / "gateway", inline, frames)

    names = itertools.count()

    @rule(number=numbers)
    def send(self, number):
        self.gateway.send(number)

    @rule(some=st.lists(numbers, min_size=2, max_size=8))
    def send_some(self, some):
        for number in some:
            self.gateway.send(number)

    @rule()
    def file(self):
        self.gateway.file()

    @rule()
    def settle(self):
        self.gateway.settle()

    @rule()
    def publish(self):
        self.gateway.publish()

    @rule()
    def finish_removals(self):
        self.gateway.finish_removals()

    @rule(place=places)
    def remove(self, place):
        self.gateway.remove(*place)

    @rule(seconds=st.sampled_from([-86400, -3, 5, 86400]))
    def the_clock_jumps(self, seconds):
        self.gateway.clock += seconds * 1_000_000_000

    @rule()
    def restart(self):
        self.gateway.kill()
        self.gateway.start()

    @rule(
        what=st.sampled_from(["send", "file_all", "settle", "publish", "finish_removals", "remove"]),
        calls=st.integers(0, 40),
        number=numbers,
        place=places,
    )
    def be_killed(self, what, calls, number, place):
        arguments = {"send": (number,), "remove": place}.get(what, ())
        self.gateway.disk.calls_left = calls
        with contextlib.suppress(KilledError, BusyError):
            getattr(self.gateway, what)(*arguments)
        self.gateway.kill()
        self.gateway.start()

    @precondition(lambda self: hasattr(self, "gateway"))
    @invariant()
    def readers_see_whole_documents_and_what_they_name(self):
        tree = self.gateway.root / "dicomweb"
        for path in tree.rglob("[!.]*.gz"):
            text = gzip.decompress(path.read_bytes())
            if path.suffixes == [".mht", ".gz"]:
                continue
            of_study = path.name == "ohif-dicom-json.gz" and path.parent.parent == tree / "studies"
            assert isinstance(orjson.loads(text), dict if of_study else list)
            for named in re.findall(rb'"url":"wadors:/dicomweb/([^"]*)"', text):
                if self.gateway.frames == "files":
                    assert (tree / f"{named.decode()}.mht.gz").is_file(), "an entry names what is not there"
            for named in re.findall(rb'"BulkDataURI":"/dicomweb/([^"]*)"', text):
                if self.gateway.frames == "files" and not named.endswith(b"7FE00010"):
                    assert (tree / named.decode()).is_file(), "a document names what is not there"

    def teardown(self):
        if not hasattr(self, "gateway"):
            return
        gateway = self.gateway
        gateway.come_to_rest()
        files = files_of(gateway.root)
        held = {(meta.sop_uid, meta.receipt.digest) for meta in map(read_file_meta, files)}
        assert gateway.held <= held, "acknowledged and lost"
        assert held <= gateway.held | gateway.perhaps, "removed and come back"
        documents = gateway.documents()
        gateway.kill()
        for order in (1, -1):
            anew = found_anew(files, make(self.root / f"anew{order}"), order=order, frames=gateway.frames)
            assert documents.keys() == anew.keys()
            assert documents == anew
        shutil.rmtree(self.root)


def make(folder):
    folder.mkdir(parents=True)
    return folder


def test_documents_follow_from_what_is_held_whatever_happened(tmp_path):
    Life.folder = tmp_path
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize="DICOMSCP_TEST_EXAMPLES" not in os.environ,  # a red run tells of the change
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("seed", range(2))
def test_two_gateways_that_each_got_half_and_send_each_other_theirs_publish_the_same(tmp_path, seed):
    """Without conflicting contents: then receipts decide nothing, and the datasets are all that counts."""
    halves = [range(seed, len(DATASETS), 6), range(3 + seed, len(DATASETS), 6)]  # one content of each UID
    gateways = [Gateway(tmp_path / str(n)) for n in range(2)]
    for gateway, half in zip(gateways, halves, strict=True):
        for number in half:
            gateway.send(number)
        gateway.come_to_rest()
    assert gateways[0].documents() != gateways[1].documents()
    for gateway, half in zip(gateways, halves[::-1], strict=True):
        gateway.clock += 5_000_000_000
        for number in reversed(half):
            gateway.send(number)
            if number % 2:
                gateway.file_all()
                gateway.publish()
        gateway.come_to_rest()
    first, second = (gateway.documents() for gateway in gateways)
    for gateway in gateways:
        gateway.kill()
    assert len(first) > 8
    assert first == second


def test_two_gateways_that_exchange_files_publish_the_same_of_conflicting_contents_too(tmp_path):
    """Receipts travel with the files, so both publish the variant that was received first anywhere."""
    gateways = [Gateway(tmp_path / str(n)) for n in range(2)]
    for turn, gateway in enumerate(gateways):
        for number in range(turn, len(DATASETS), 2):
            gateway.clock += 7_000_000_000 * (number % 5 - 2)
            gateway.send(number)
        gateway.come_to_rest()
    files = [files_of(gateway.root) for gateway in gateways]
    assert gateways[0].documents() != gateways[1].documents()
    for gateway, theirs in zip(gateways, files[::-1], strict=True):
        gateway.index.apply(put(theirs, gateway.root), {})
        gateway.come_to_rest()
    one, other = (gateway.documents() for gateway in gateways)
    for gateway in gateways:
        gateway.kill()
    assert len(files_of(gateways[0].root)) == len(DATASETS)
    assert one == other == found_anew(files[1] + files[0], make(tmp_path / "anew"))
