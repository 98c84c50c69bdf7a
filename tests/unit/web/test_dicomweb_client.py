"""What a client library that others wrote makes of the answers."""

import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from pydicom.encaps import generate_frames

from dicomscp.study import layout
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


def test_searches(client, ct):
    study_uid, series_uid, sop_uid = key(ct)
    found = client.search_for_studies(search_filters={"PatientID": ct.PatientID}, fields=["StudyDescription"])
    assert [study["0020000D"]["Value"] for study in found] == [[study_uid]]
    assert len(client.search_for_studies()) == 4
    assert len(client.search_for_studies(limit=1)) == 1
    assert client.search_for_series(study_uid)[0]["0020000E"]["Value"] == [series_uid]
    assert client.search_for_instances(study_uid, series_uid)[0]["00080018"]["Value"] == [sop_uid]
    assert client.search_for_studies(search_filters={"PatientID": "nobody"}) == []


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
