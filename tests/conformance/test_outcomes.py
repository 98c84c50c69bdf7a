"""What becomes of every real file is what docs/outcomes.md says, and nothing of it is unexplained."""

from collections import Counter

import pytest

from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.errors import RefusedError
from tests.conformance import outcomes
from tests.conformance.readings import DAMAGED, DCM2JSON, PYDICOM, split
from tests.peers import missed, require

WRITE_ANEW = "; if that is meant: python -m tests.conformance.outcomes ../shared/data > docs/outcomes.md"


@pytest.fixture(scope="module")
def judged(collection, tmp_path_factory):
    paths = outcomes.pydicoms_files() + (outcomes.collection_files(collection) if collection else [])
    return outcomes.judged(paths, require("dcm2json", "dcmtk"), tmp_path_factory.mktemp("outcomes"))


@pytest.fixture(params=[outcomes.PYDICOMS_TITLE, outcomes.COLLECTION_TITLE])
def title(request):
    return request.param


@pytest.fixture
def found(title, judged, collection, request):
    """The outcomes of the files of one collection, by path in it."""
    if title == outcomes.PYDICOMS_TITLE:
        return outcomes.below(outcomes.pydicoms_folder(), judged)
    return outcomes.below(collection or request.getfixturevalue("shared_data"), judged)


def test_every_file_is_published_as_others_read_it_or_refused(found, title):
    kinds = Counter(one.kind for one in found.values())
    wrong = {path: one.told for path, one in found.items() if one.kind not in outcomes.KINDS}

    assert wrong == {}
    assert len(found) > (700 if title == outcomes.COLLECTION_TITLE else 180)
    assert kinds[outcomes.REFUSED] < len(found) / 5


def test_every_reason_explains_some_file(judged, shared_data):
    seen = frozenset[str]().union(*(one.codes for one in judged.values()))

    assert {one.code for one in (*PYDICOM, *DCM2JSON)} - seen == set()


def test_the_document_says_so(found, title):
    document = outcomes.DOCUMENT.read_text(encoding="utf-8")
    head = outcomes.head(outcomes.versions(require("dcm2json", "dcmtk")))
    made_with = outcomes.made_with(document)
    if made_with not in head:
        # Not a difference of ours: who has other readers is told, and CI keeps the table up to date.
        missed(f"docs/outcomes.md was made with {made_with}; other versions may read otherwise")

    assert document.startswith(head), "the legend" + WRITE_ANEW
    rows = outcomes.section(title, found)
    missing = sorted(set(rows.splitlines()) - set(document.splitlines()))
    assert rows in document, "\n".join(["it does not say:", *missing]) + WRITE_ANEW


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_a_damaged_file_is_read_in_part_or_refused(shared_data, name):
    (path, *_) = shared_data.rglob(name)
    dataset, syntax = split(path.read_bytes())
    try:
        header = Compiler().header(dataset, syntax, total_bytes=len(dataset), bulk_uri="")
    except RefusedError:
        return
    assert header.fragments
    assert header.warnings or name == "GH179A.dcm"
