"""Attributes that configuration adds to what can be asked for: of what arrives, and of what is held."""

import pytest

from dicomscp.archive.archive import Archive, Claim, Intake, Source
from dicomscp.archive.filing import Filing
from dicomscp.archive.index import Index
from dicomscp.archive.rebuild import rebuild_index
from dicomscp.dicom.matching import Level, Model, Query, header_tag, query_from_parameters
from dicomscp.dicom.part10 import Origin, read_file_meta
from dicomscp.disk import Disk
from tests.databases import open_sqlite

SEGMENT = 4 << 20
MODEL = Model(
    {
        Level.STUDY: [header_tag("PatientAddress"), header_tag("AdmittingDate")],
        Level.SERIES: [header_tag("KVP"), header_tag("ScanOptions")],
        Level.IMAGE: [header_tag("SliceLocation")],
    }
)
ASKED = (
    (Level.SERIES, ("KVP", "120"), ("KVP", "100")),
    (Level.SERIES, ("ScanOptions", "HELICAL*"), ("ScanOptions", "AXIAL")),
    (Level.IMAGE, ("SliceLocation", "-77.2040634155"), ("SliceLocation", "77")),
    (Level.IMAGE, ("KVP", "1.2e2"), ("KVP", "0")),
)


@pytest.fixture
def life(root, request):
    """Opens the index under *root* with a model, and what files into it."""

    def open_index(model):
        engine = open_sqlite(root / "index.sqlite")
        request.addfinalizer(engine.dispose)
        return Index(engine, model=model)

    return open_index


def store(root, index, path, *, inline_bytes):
    intake = Intake(
        root,
        "listener-0",
        Disk(),
        relaxed=True,
        reserve_bytes=0,
        max_variants=8,
        inline_bytes=inline_bytes,
        segment_bytes=SEGMENT,
    )
    archive = Archive(root, index, intake=intake, wait_seconds=0)
    data = path.read_bytes()
    meta = read_file_meta(data)
    incoming = archive.receive(
        Claim(meta.sop_class_uid, meta.sop_uid, meta.transfer_syntax_uid), Source(Origin.C_STORE, "CT", "US")
    )
    incoming.write(data[meta.dataset_offset :])
    archive.admit(incoming)
    filing = Filing(root, index, Disk(), segment_bytes=SEGMENT)
    while filing.step().entries:
        pass
    filing.settle()
    filing.close()
    archive.close()


def count(index, level, parameter):
    query, warnings = query_from_parameters(level, [parameter], max_results=10, model=index.askable())
    assert not warnings
    return len(list(index.find(query)))


@pytest.mark.parametrize("inline_bytes", [1 << 20, 0])
def test_what_arrives_is_found_by_extra_keys(root, life, ct_small, inline_bytes):
    index = life(MODEL)
    store(root, index, ct_small, inline_bytes=inline_bytes)
    for level, right, wrong in ASKED:
        assert (count(index, level, right), count(index, level, wrong)) == (1, 0), right
    (series,) = index.find(Query(Level.SERIES, (), frozenset({header_tag("KVP")}), None))
    assert series == {"00180060": {"vr": "DS", "Value": [120.0]}}


def test_what_is_held_is_found_by_them_once_the_index_is_made_anew(root, life, ct_small):
    (root / "state").mkdir()
    store(root, life(Model()), ct_small, inline_bytes=1 << 20)
    index = life(MODEL)
    level, right, _ = ASKED[0]
    store(root, index, ct_small, inline_bytes=1 << 20)
    _, (warning,) = query_from_parameters(level, [right], max_results=10, model=index.askable())
    assert "KVP" in warning  # of what is held the index cannot say, so it does not say no
    rebuild_index(root, index, jobs=1, progress=lambda *_: None)
    assert count(index, level, right) == 1
    (study_uid,) = index.studies()
    plain = life(Model()).snapshot(study_uid)
    assert index.snapshot(study_uid) == plain  # documents do not depend on what can be asked for
    assert plain.study["0020000D"]["Value"] == [study_uid]
