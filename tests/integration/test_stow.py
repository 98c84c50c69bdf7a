"""STOW-RS on the real gateway, by clients that others wrote; what it said was stored outlives a kill."""

import json
import subprocess
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from dicomweb_client import DICOMwebClient

from dicomscp.dicom.part10 import Origin, read_file_meta
from tests.gateway import Gateway, wait_for_instances
from tests.peers import npm_package, require

CONFORMANCE = Path(__file__).parents[1] / "conformance"
CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with Gateway(tmp_path_factory.mktemp("stow") / "root") as gateway:
        yield gateway


def instances(ct_small, study_uid, numbers):
    """Datasets of one study."""
    made = []
    for number in numbers:
        dataset = pydicom.dcmread(ct_small)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, f"{study_uid}.1"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{study_uid}.1.{number}"
        dataset.InstanceNumber = number
        made.append(dataset)
    return made


def encoded(dataset):
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def dataset_of(file):
    return file[read_file_meta(file).dataset_offset :]


def retrieved(gateway, dataset):
    path = f"/dicomweb/studies/{dataset.StudyInstanceUID}/series/{dataset.SeriesInstanceUID}"
    return gateway.get(f"{path}/instances/{dataset.SOPInstanceUID}", accept="application/dicom")


def test_dicomweb_client_of_python_stores_and_is_answered(gateway, ct_small):
    client = DICOMwebClient(gateway.url("/dicomweb"), chunk_size=50_000)  # larger bodies come chunked
    sent = instances(ct_small, "1.2.826.1", range(1, 4))
    answer = client.store_instances(sent, study_instance_uid="1.2.826.1")
    assert [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence] == [
        one.SOPInstanceUID for one in sent
    ]
    assert {item.ReferencedSOPClassUID for item in answer.ReferencedSOPSequence} == {CT_IMAGE_STORAGE}
    assert answer.RetrieveURL == "/dicomweb/studies/1.2.826.1"
    assert "FailedSOPSequence" not in answer
    wait_for_instances(gateway, "1.2.826.1", 3)
    for one in sent:
        assert dataset_of(retrieved(gateway, one)) == dataset_of(encoded(one))
    metadata = client.retrieve_study_metadata("1.2.826.1")  # it is published as others are
    assert len(metadata) == 3
    with pytest.raises(OSError, match="409"):
        client.store_instances(sent, study_instance_uid="1.2.3")


def test_dicomweb_client_of_npm_stores_and_is_answered(gateway, ct_small, tmp_path):
    """It is what OHIF uploads by."""
    sent = instances(ct_small, "1.2.826.2", range(1, 4))
    files = [tmp_path / str(number) for number in range(3)]
    for file, dataset in zip(files, sent, strict=True):
        file.write_bytes(encoded(dataset))
    command = [require("node", "nodejs"), CONFORMANCE / "store.js", npm_package("dicomweb-client").parent]
    run = subprocess.run(
        [*command, gateway.url("/dicomweb"), "1.2.826.2", *files],
        capture_output=True,
        check=True,
        timeout=60,
        text=True,
    )
    *stored, refused = json.loads(run.stdout)
    for answer in stored:
        items = answer["body"]["00081199"]["Value"]
        assert [item["00081155"]["Value"] for item in items] == [[one.SOPInstanceUID] for one in sent]
    assert refused == {"status": 409}
    wait_for_instances(gateway, "1.2.826.2", 3)
    for one, file in zip(sent, files, strict=True):
        assert dataset_of(retrieved(gateway, one)) == dataset_of(file.read_bytes())


def test_curl_stores_one_file_as_it_lies(gateway, ct_small, tmp_path):
    (dataset,) = instances(ct_small, "1.2.826.3", [1])
    file = tmp_path / "one"
    file.write_bytes(encoded(dataset))
    command = [require("curl", "curl"), "--silent", "--fail", "--data-binary", f"@{file}"]
    for accept in ("application/dicom+json", "application/dicom+xml"):
        fields = ["-H", "Content-Type: application/dicom", "-H", f"Accept: {accept}"]
        run = subprocess.run(
            [*command, *fields, gateway.url("/dicomweb/studies")], capture_output=True, check=True, timeout=60
        )
        assert b"1.2.826.3.1.1" in run.stdout
    wait_for_instances(gateway, "1.2.826.3", 1)
    assert dataset_of(retrieved(gateway, dataset)) == dataset_of(file.read_bytes())


def test_what_was_answered_as_stored_outlives_a_kill_of_everything(gateway, ct_small):
    client = DICOMwebClient(gateway.url("/dicomweb"))
    sent = instances(ct_small, "1.2.826.4", range(1, 31))
    answer = client.store_instances(sent)
    gateway.kill()
    assert len(answer.ReferencedSOPSequence) == 30
    gateway.start()
    wait_for_instances(gateway, "1.2.826.4", 30)
    for one in sent[::10]:
        file = retrieved(gateway, one)
        assert dataset_of(file) == dataset_of(encoded(one))
        receipt = read_file_meta(file).receipt
        assert (receipt.origin, receipt.calling_ae) == (Origin.STOW_RS, "STOW-RS")
    text = gateway.get("/metrics").decode()
    assert 'dicomscp_received_instances_total{calling_ae="STOW-RS"}' not in text  # counts of this life
    client = DICOMwebClient(gateway.url("/dicomweb"))
    client.store_instances(sent[:1])
    text = gateway.get("/metrics").decode()
    assert 'dicomscp_received_instances_total{calling_ae="STOW-RS"} 1.0' in text
