"""The pipeline: one bad study blocks no other, and is tried a bounded number of times."""

import gzip
import json
import threading

import pydicom
import pytest
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomscp import config, daemon, upkeep
from dicomscp.archive.archive import Archive, Claim, Intake, Source
from dicomscp.archive.filing import Filing
from dicomscp.archive.index import Index
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.part10 import Origin
from dicomscp.disk import Disk
from dicomscp.pipeline import Pipeline, _pause
from dicomscp.publisher import Documents, Publisher, attempts
from dicomscp.telemetry.metrics import PipelineMetrics
from tests.databases import open_sqlite
from tests.processes import wait_until

SEGMENT = 1 << 20


class Parts:
    """What stands between an admitted instance and a published study, in one process."""

    def __init__(self, root, source, quiet_seconds=2, patience_seconds=30):
        self.root, self.source, self.has_run = root, source, False
        self.index = Index(open_sqlite(root / "index.sqlite"))
        intake = Intake(
            root,
            "listener-0",
            Disk(),
            relaxed=False,
            reserve_bytes=0,
            max_variants=8,
            inline_bytes=128 << 10,
            segment_bytes=SEGMENT,
        )
        self.archive = Archive(root, self.index, intake=intake)
        self.publisher = self.make_publisher()
        self.pipeline = Pipeline(
            root,
            self.index,
            Filing(root, self.index, Disk(), segment_bytes=SEGMENT),
            self.publisher,
            quiet_seconds=quiet_seconds,
            patience_seconds=patience_seconds,
            metrics=PipelineMetrics(),
            make=self.make_publisher,
        )

    def make_publisher(self, **options):
        given = {"documents": Documents("/dicomweb", 1024), "attempts": 2, **options}
        return Publisher(self.root, self.index, given.pop("disk", Disk()), self.root / "dicomweb", **given)

    def admit(self, study_uid, number):
        dataset = pydicom.dcmread(self.source)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, f"{study_uid}.1"
        dataset.SOPInstanceUID = f"{study_uid}.1.{number}"
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_dataset(buffer, dataset)
        claim = Claim(str(dataset.SOPClassUID), dataset.SOPInstanceUID, "1.2.840.10008.1.2.1")
        incoming = self.archive.receive(claim, Source(Origin.C_STORE, "SENDER", "DICOMSCP"))
        incoming.write(buffer.getvalue())
        self.archive.admit(incoming)

    def drain(self):
        return self.pipeline.drain(lambda *_: None)

    def published(self, study_uid):
        path = self.root / "dicomweb" / "studies" / study_uid / "metadata.gz"
        return len(json.loads(gzip.decompress(path.read_bytes()))) if path.is_file() else 0

    def close(self):
        self.archive.close()
        if not self.has_run:  # which closes it
            self.pipeline.close()


@pytest.fixture
def parts(root, ct_small):
    made = Parts(root, ct_small)
    yield made
    made.close()


def test_what_is_admitted_is_published(parts):
    for number in range(3):
        parts.admit("1.2.3", number)
    assert parts.drain() == 0
    assert parts.published("1.2.3") == 3
    assert list(parts.index.due()) == []
    assert attempts(parts.root) == []


def test_a_study_that_cannot_be_published_blocks_no_other_and_is_set_aside(parts):
    obstacle = parts.root / "dicomweb" / "studies" / "6.6.6"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("not a folder")
    parts.admit("6.6.6", 1)
    parts.admit("7.7.7", 1)
    assert [parts.drain() for _ in range(3)] == [1, 1, 1]
    assert parts.published("7.7.7") == 1
    assert [(one["study_uid"], one["attempts"]) for one in parts.publisher.set_aside()] == [("6.6.6", 2)]

    obstacle.unlink()
    assert parts.drain() == 1
    parts.admit("6.6.6", 2)
    assert parts.drain() == 0
    assert parts.published("6.6.6") == 2
    assert parts.publisher.set_aside() == []


def test_what_a_failed_publish_wrote_is_not_shown_by_the_next(parts):
    folder = parts.root / "dicomweb" / "studies" / "6.6.6"
    folder.mkdir(parents=True)
    (folder / ".index.json.gz.new").mkdir()  # the last document cannot be written
    parts.admit("6.6.6", 1)
    parts.admit("7.7.7", 1)
    assert parts.drain() == 1
    assert parts.published("7.7.7") == 1
    assert parts.published("6.6.6") == 0
    assert list(folder.rglob("*.gz")) == []


def test_an_attempt_is_on_record_before_the_compile_begins(parts):
    parts.admit("1.2.3", 1)
    parts.drain()
    parts.admit("1.2.3", 2)
    parts.pipeline.recover()
    seen = []

    class Looking(Compiler):
        def header(self, *dataset, **facts):
            seen.extend(attempts(parts.root))
            return super().header(*dataset, **facts)

    publisher = parts.make_publisher(compiler=Looking())
    ((study_uid, changes),) = parts.index.due()
    (outcome,) = publisher.publish([study_uid])
    publisher.close()
    assert outcome.published
    assert [(one["study_uid"], one["changes"], one["attempts"]) for one in seen] == [("1.2.3", changes, 1)]
    assert attempts(parts.root) == []


def test_an_instance_may_be_asked_for_as_soon_as_it_is_admitted(parts):
    parts.admit("1.2.3", 1)
    while parts.pipeline.recover():
        pass
    (held,) = parts.archive.held("1.2.3")
    with parts.archive.open(held) as opened:
        assert opened.dataset_offset > 132
        assert len(opened.dataset) == held.size - opened.dataset_offset


def remove(parts, *place):
    found = parts.archive.removable(*place)
    parts.archive.remove(found, Disk())
    return len(found.variants)


def test_what_is_removed_goes_from_documents_and_disk(parts):
    for number in range(3):
        parts.admit("1.2.3", number)
    parts.admit("7.7.7", 1)
    parts.drain()
    assert remove(parts, "1.2.3", "1.2.3.1", "1.2.3.1.1") == 1
    assert parts.drain() == 0
    assert remove(parts, "7.7.7") == 1
    assert parts.drain() == 0
    assert (parts.published("1.2.3"), parts.published("7.7.7")) == (2, 0)
    left = sorted(path.stem for path in (parts.root / "instances").rglob("*.dcm"))
    assert left == ["1.2.3.1.0", "1.2.3.1.2"]
    assert list((parts.root / "instances").glob("*/7.7.7")) == []
    assert list(parts.index.studies()) == ["1.2.3"]


def test_while_its_study_cannot_be_published_what_was_removed_keeps_its_file(parts):
    parts.admit("6.6.6", 1)
    parts.admit("6.6.6", 2)
    parts.drain()
    index_document = parts.root / "dicomweb" / "studies" / "6.6.6" / "index.json.gz"
    index_document.unlink()
    index_document.mkdir()  # the last document cannot be put in its place
    remove(parts, "6.6.6", "6.6.6.1", "6.6.6.1.1")
    assert parts.drain() == 1
    (leaving,) = parts.index.leaving()
    assert (parts.root / leaving.path).exists()
    index_document.rmdir()
    parts.pipeline.finish_removals()
    assert parts.index.leaving() == []
    assert not (parts.root / leaving.path).exists()
    assert parts.published("6.6.6") == 1


def test_a_running_pipeline_publishes_at_once_what_something_is_leaving(root, ct_small):
    """Neither quiet nor patience, which are of arrivals, is waited for."""
    parts = Parts(root, ct_small, quiet_seconds=3600, patience_seconds=3600)
    parts.admit("1.2.3", 1)
    parts.admit("1.2.3", 2)
    parts.drain()
    stop = threading.Event()
    running = threading.Thread(target=parts.pipeline.run, args=(stop,))
    running.start()
    try:
        remove(parts, "1.2.3", "1.2.3.1", "1.2.3.1.1")
        gone = parts.root / "instances"
        wait_until(lambda: len(list(gone.rglob("*.dcm"))) == 1, 30, "the file to go")
        assert parts.published("1.2.3") == 1
    finally:
        stop.set()
        running.join()
        parts.has_run = True
        parts.close()


def test_what_is_leaving_is_no_finding_and_a_rebuild_finishes_it_first(parts):
    settings = config.load(None, {"root": str(parts.root)}, {})
    daemon.prepare_root(settings)
    for number in range(3):
        parts.admit("1.2.3", number)
    parts.admit("7.7.7", 1)
    parts.drain()
    remove(parts, "1.2.3", "1.2.3.1", "1.2.3.1.1")
    while parts.pipeline._filing.step().entries:
        pass
    assert remove(parts, "7.7.7") == 1
    while parts.pipeline._filing.step().entries:
        pass
    assert len(parts.index.leaving()) == 2
    assert upkeep.status(settings)["held"]["leaving"] == 2
    assert upkeep.verify(settings, repair=False, progress=lambda *_: None).findings == []

    report = upkeep.rebuild(settings, index=True, published=True, progress=lambda *_: None)
    assert (report.instances, report.studies) == (2, 1)
    assert parts.index.leaving() == []
    assert sorted(path.stem for path in (parts.root / "instances").rglob("*.dcm")) == [
        "1.2.3.1.0",
        "1.2.3.1.2",
    ]
    assert upkeep.verify(settings, repair=False, progress=lambda *_: None).findings == []


def test_pauses_grow_to_a_bound_however_long_failures_go_on():
    assert [_pause(failures, 10) for failures in (0, 1, 2, 3, 4, 100_000)] == [1, 2, 4, 8, 10, 10]
