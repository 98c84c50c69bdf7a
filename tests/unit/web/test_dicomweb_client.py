"""What a client library that others wrote makes of the answers."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from pydicom.encaps import generate_frames

from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.study import layout
from dicomscp.study.static import instance_files
from tests.unit.web.held import SOURCES


@pytest.fixture
def client(gateway):
    for name in ("CT_small.dcm", "MR_small_implicit.dcm", "JPEG2000.dcm", "SC_rgb_rle_2frame.dcm"):
        gateway.archive.add_file(name)
    gateway.start()
    return DICOMwebClient(f"{gateway.url}/dicomweb")


@pytest.fixture
def ct():
    return pydicom.dcmread(SOURCES / "CT_small.dcm")


def key(dataset):
    return dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID


def test_searches_of_all_resources_with_all_parameters(client, ct, caplog):
    study_uid, series_uid, sop_uid = key(ct)
    searches = {
        client.search_for_studies: (("0020000D", study_uid), [()]),
        client.search_for_series: (("0020000E", series_uid), [(), (study_uid,)]),
        client.search_for_instances: (("00080018", sop_uid), [(), (study_uid,), (study_uid, series_uid)]),
    }
    for search, ((tag, uid), scopes) in searches.items():
        for scope in scopes:
            found = search(
                *scope,
                fuzzymatching=False,
                limit=1,
                offset=0,
                fields=["StudyDescription", "00104000"],
                search_filters={"PatientID": ct.PatientID, "00100010": "*CT1"},
                get_remaining=True,
            )
            assert [one[tag]["Value"] for one in found] == [[uid]], (search, scope)
            assert {"00081030"} <= found[0].keys()
            assert search(*scope, search_filters={"PatientID": "nobody"}) == []
    assert len(client.search_for_studies()) == 4
    assert not caplog.messages
    assert len(client.search_for_studies(limit=3)) == 3
    assert "There are 1 additional results that can be requested" in caplog.text
    pages = [client.search_for_studies(limit=3, offset=offset) for offset in (0, 3, 6)]
    assert [len(page) for page in pages] == [3, 1, 0]
    assert client.search_for_studies(limit=3, get_remaining=True) == pages[0] + pages[1]


def test_a_search_without_matches_where_that_has_no_content(gateway):
    gateway.start(empty_status=204)
    client = DICOMwebClient(f"{gateway.url}/dicomweb")
    assert client.search_for_studies() == []
    assert client.search_for_series("1.2", get_remaining=True) == []


def test_metadata(client, gateway, ct):
    study_uid, series_uid, _sop_uid = key(ct)
    metadata = client.retrieve_instance_metadata(*key(ct))
    read = pydicom.Dataset.from_json({tag: e for tag, e in metadata.items() if "BulkDataURI" not in e})
    assert read.PatientName == ct.PatientName
    gateway.publish(layout.study_metadata(study_uid), [metadata])
    gateway.publish(layout.series_metadata(study_uid, series_uid), [metadata])
    assert client.retrieve_study_metadata(study_uid) == [metadata]
    assert client.retrieve_series_metadata(study_uid, series_uid) == [metadata]


def test_instances(client, ct):
    study_uid, series_uid, _ = key(ct)
    one = client.retrieve_instance(*key(ct))
    assert one.PixelData == ct.PixelData
    assert [i.SOPInstanceUID for i in client.retrieve_series(study_uid, series_uid)] == [ct.SOPInstanceUID]
    (streamed,) = client.iter_study(study_uid)
    assert streamed == one
    named = client.retrieve_instance(*key(ct), media_types=(("application/dicom", "1.2.840.10008.1.2.1"),))
    assert named == one


@pytest.mark.parametrize(
    "media_types", [None, ("application/octet-stream",), (("application/octet-stream", "*"),)]
)
def test_native_frames(client, ct, media_types):
    assert client.retrieve_instance_frames(*key(ct), [1], media_types=media_types) == [ct.PixelData]


@pytest.mark.parametrize(
    "media_types", [None, (("application/octet-stream", "*"),), (("image/x-dicom-rle", "*"),)]
)
def test_compressed_frames(client, media_types):
    dataset = pydicom.dcmread(SOURCES / "SC_rgb_rle_2frame.dcm")
    frames = list(generate_frames(dataset.PixelData, number_of_frames=2))
    assert client.retrieve_instance_frames(*key(dataset), [1, 2], media_types=media_types) == frames


def test_an_image_type(client):
    dataset = pydicom.dcmread(SOURCES / "JPEG2000.dcm")
    (frame,) = client.retrieve_instance_frames(*key(dataset), [1], media_types=("image/jp2",))
    assert frame == next(generate_frames(dataset.PixelData, number_of_frames=1))


def test_bulk_data(client, gateway, ct):
    metadata = client.retrieve_instance_metadata(*key(ct))
    url = gateway.url + metadata["7FE00010"]["BulkDataURI"]
    assert client.retrieve_bulkdata(url) == [ct.PixelData]
    assert client.retrieve_bulkdata(url, media_types=("application/octet-stream",)) == [ct.PixelData]


class Unlabelled(SimpleHTTPRequestHandler):
    """A static server that knows one rule, and no boundary."""

    def guess_type(self, path):
        return "multipart/related"

    def log_message(self, *facts):
        pass


def test_bulk_data_on_a_static_server(tmp_path, pydicom_files):
    file = (pydicom_files / "examples_overlay.dcm").read_bytes()
    meta = read_file_meta(file)
    dataset = memoryview(file)[meta.dataset_offset :]
    key = InstanceKey("1.2", "1.3", "1.4")
    for path, pieces in instance_files(key, dataset, meta.transfer_syntax_uid, ["60003000"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"".join(pieces))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Unlabelled, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            uri = f"{layout.bulk_uri(url, key)}/60003000"
            (overlay,) = DICOMwebClient(url).retrieve_bulkdata(uri)
        finally:
            server.shutdown()
            thread.join()

    assert overlay == pydicom.dcmread(pydicom_files / "examples_overlay.dcm")[0x60003000].value


def test_images_of_instances_frames_and_series(client, ct):
    window = {"window": "40,400,linear", "viewport": "64,64"}
    for retrieve in (
        partial(client.retrieve_instance_rendered, *key(ct)),
        partial(client.retrieve_instance_frames_rendered, *key(ct), [1]),
    ):
        for media_type, starts in (("image/jpeg", b"\xff\xd8\xff"), ("image/png", b"\x89PNG")):
            image = retrieve(media_types=(media_type,), params=window)
            assert image.startswith(starts)
