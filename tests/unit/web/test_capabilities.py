"""The Retrieve Capabilities Transaction: PS3.18 section 8.9 and annex H."""

import xml.etree.ElementTree as ET

import pytest
from starlette.routing import Route

from dicomscp.dicom.matching import STANDARD
from dicomscp.web import capabilities
from dicomscp.web.app import WebSettings, create_app
from dicomscp.web.capabilities import methods
from tests.unit.web.held import FilledArchive
from tests.unit.web.storing import StoringArchive

WADL = "{http://wadl.dev.java.net/2009/02}"
OURS = "/studies/{study}/ohif-dicom-json"  # the viewer's, which the standard does not know
BULK_DATA = "/studies/{study}/bulkdata/{series}/{instance}/{path:path}"


@pytest.fixture
def archive(tmp_path):
    archive = FilledArchive(tmp_path)
    yield archive
    archive.engine.dispose()


@pytest.mark.parametrize("stores", [False, True])
def test_what_is_described_is_what_there_is(tmp_path, stores):
    """Table H-1: every resource with its methods; bulk data have addresses that nobody has to know."""
    archive = StoringArchive(tmp_path)
    settings = WebSettings(store=archive.settings() if stores else None)
    app = create_app(archive.archive, settings, tmp_path / "dicomweb", tmp_path / "state")
    there = {
        (route.path.removeprefix("/dicomweb"), method)
        for route in app.routes
        if isinstance(route, Route) and route.path.startswith("/dicomweb/")
        for method in route.methods - {"HEAD", "OPTIONS"}
    }
    archive.close()
    described = {(one.path, one.verb) for one in methods(STANDARD, stores=stores)}
    assert there - {(OURS, "GET"), (BULK_DATA, "GET")} == described - {("/{bulkdata}", "GET")}
    assert {(OURS, "GET"), (BULK_DATA, "GET")} <= there
    ids = [one.id for one in methods(STANDARD, stores=stores)]
    assert len(set(ids)) == len(ids)


def test_the_description_is_wadl_or_json(gateway):
    client = gateway.start()
    for path in ("/dicomweb/", "/dicomweb"):
        answer = client.options(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, capabilities.WADL)
    (resources,) = ET.fromstring(answer.content)
    assert resources.attrib["base"] == f"{gateway.url}/dicomweb/"
    found = {element.attrib["id"]: element for element in resources.iter(f"{WADL}method")}
    assert set(found) == {one.id for one in methods(STANDARD, stores=False)}
    names = {one.attrib["name"] for one in found["SearchForStudySeries"].iter(f"{WADL}param")}
    assert {"fuzzymatching", "limit", "SeriesInstanceUID", "Modality"} <= names
    types = [one.attrib["mediaType"] for one in found["RetrieveInstance"].iter(f"{WADL}representation")]
    assert types == ['multipart/related; type="application/dicom"', "application/dicom"]
    steps = [one.attrib["path"] for one in resources.findall(f"{WADL}resource")]
    assert steps == ["studies", "series", "instances", "{bulkdata}"]

    answer = client.options("/dicomweb/", headers={"accept": "application/json"})
    assert answer.headers["content-type"] == "application/json"
    (tree,) = answer.json()["application"]["resources"]
    assert [one["path"] for one in tree["resource"]] == steps


def test_it_is_asked_for_as_other_resources_are(gateway):
    client = gateway.start()
    etag = client.options("/dicomweb/").headers["etag"]
    assert client.options("/dicomweb/", headers={"if-none-match": etag}).status_code == 304
    assert client.options("/dicomweb/", headers={"accept": "text/html"}).status_code == 406
    assert client.get("/dicomweb/").status_code == 405


def test_where_instances_are_stored_it_is_told_how(archive):
    """With the media types of request and response."""
    (found,) = [one for one in methods(archive.model, stores=True) if one.id == "StoreInstances"]
    assert 'multipart/related; type="application/dicom+json"' in found.takes
    assert found.gives[0] == "application/dicom+json"
