"""PS3.18 asked of the real gateway by clients that others wrote: every transaction, and each of ANSWERS.

One gateway serves all; what is sent stays there.
"""

import base64
import json
import subprocess
from pathlib import Path

import pydicom
import pytest
from dicomweb_client import DICOMwebClient

from dicomscp.dicom.part10 import read_file_meta
from tests.conformance.dicomweb import ANSWERS
from tests.gateway import Gateway, wait_for_instances
from tests.peers import npm_package, require

PNG = b"\x89PNG"
PYTHON_S, NPM_S, CURL_S = "1.2.826.31", "1.2.826.32", "1.2.826.33"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    settings = {"pipeline.quiet_seconds": 0.1}
    with Gateway(tmp_path_factory.mktemp("dicomweb") / "root", settings=settings) as gateway:
        yield gateway


def instance(ct_small, study_uid):
    """An instance of a study of its own."""
    dataset = pydicom.dcmread(ct_small)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, f"{study_uid}.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{study_uid}.1.1"
    return dataset


def test_the_client_of_python_does_every_transaction(gateway, ct_small):
    client = DICOMwebClient(gateway.url("/dicomweb"))
    sent = instance(ct_small, PYTHON_S)
    place = (PYTHON_S, f"{PYTHON_S}.1", f"{PYTHON_S}.1.1")
    for study_uid in (None, PYTHON_S):
        answer = client.store_instances([sent], study_instance_uid=study_uid)
        assert [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence] == [place[2]]

    def found(tag, results):
        return [one[tag]["Value"][0] for one in results]

    only = {"search_filters": {"StudyInstanceUID": PYTHON_S}}
    assert found("0020000D", client.search_for_studies(**only)) == [place[0]]
    assert found("0020000E", client.search_for_series(**only)) == [place[1]]
    assert found("0020000E", client.search_for_series(PYTHON_S)) == [place[1]]
    assert found("00080018", client.search_for_instances(**only)) == [place[2]]
    for scope in (place[:1], place[:2]):
        assert found("00080018", client.search_for_instances(*scope)) == [place[2]]

    metadata = client.retrieve_instance_metadata(*place)
    assert client.retrieve_study_metadata(PYTHON_S) == [metadata]
    assert client.retrieve_series_metadata(*place[:2]) == [metadata]
    assert client.retrieve_study(PYTHON_S) == client.retrieve_series(*place[:2]) == [sent]
    assert client.retrieve_instance(*place) == sent
    (pixels,) = client.retrieve_bulkdata(gateway.url(metadata["7FE00010"]["BulkDataURI"]))
    (frame,) = client.retrieve_instance_frames(*place, [1])
    assert pixels == frame == sent.PixelData
    shown = client.retrieve_instance_rendered(*place, media_types=("image/png",))
    assert shown.startswith(PNG)
    assert client.retrieve_instance_frames_rendered(*place, [1], media_types=("image/png",)) == shown


def test_the_client_of_npm_does_every_transaction(gateway, ct_small, tmp_path):
    sent = instance(ct_small, NPM_S)
    sent.save_as(tmp_path / "one")
    file = (tmp_path / "one").read_bytes()
    modules = npm_package("dicomweb-client").parent
    script = Path(__file__).with_suffix(".js").with_name("dicomweb.js")
    run = subprocess.run(
        [require("node", "nodejs"), script, modules, gateway.url("").rstrip("/"), gateway.url("/dicomweb"),
         tmp_path / "one", NPM_S, f"{NPM_S}.1", f"{NPM_S}.1.1"],
        capture_output=True, check=True, timeout=120, text=True,
    )  # fmt: skip
    given = json.loads(run.stdout)
    assert {name: one for name, one in given.items() if isinstance(one, dict) and "error" in one} == {}

    for name in ("storeInstances", "storeInstancesOfStudy"):
        assert json.loads(given.pop(name))["00081199"]["Value"][0]["00081155"]["Value"] == [f"{NPM_S}.1.1"]
    for name, tag in (
        ("searchForStudies", "0020000D"),
        ("searchForSeries", "0020000E"),
        ("searchForSeriesOfStudy", "0020000E"),
        ("searchForInstances", "00080018"),
        ("searchForInstancesOfStudy", "00080018"),
        ("searchForInstancesOfSeries", "00080018"),
    ):
        (found,) = given.pop(name)
        assert found[tag]["Value"][0].startswith(NPM_S), name
    metadata = [given.pop(f"retrieve{level}Metadata") for level in ("Study", "Series", "Instance")]
    assert metadata == [metadata[0]] * 3

    def bytes_of(one):
        return base64.b64decode((one[0] if isinstance(one, list) else one)["bytes"])

    given = {name: bytes_of(one) for name, one in given.items()}
    for name in ("retrieveStudy", "retrieveSeries", "retrieveInstance"):
        assert dataset_of(given.pop(name)) == dataset_of(file), name
    for name in ("retrieveInstanceFrames", "retrieveBulkData"):
        assert given.pop(name) == sent.PixelData, name
    assert set(given) == {
        f"retrieveInstance{frames}{kind}" for frames in ("", "Frames") for kind in ("Rendered", "Thumbnail")
    }
    assert {name for name, image in given.items() if not image.startswith(PNG)} == set()


def dataset_of(file):
    return file[read_file_meta(file).dataset_offset :]


def test_curl_is_answered_as_the_table_says(gateway, ct_small, tmp_path):
    """All requests by one curl, which says of each answer its status and media type."""
    sent = instance(ct_small, CURL_S)
    sent.save_as(tmp_path / "one")
    DICOMwebClient(gateway.url("/dicomweb")).store_instances([sent])
    wait_for_instances(gateway, CURL_S, 1)
    place = {"study": CURL_S, "series": f"{CURL_S}.1", "instance": f"{CURL_S}.1.1", "frames": "1"}
    place |= {"base": "/dicomweb", "workitem": "1.2.3", "file": str(tmp_path / "one")}
    place["bulkdata"] = f"/dicomweb/studies/{CURL_S}/bulkdata/{CURL_S}.1/{CURL_S}.1.1/7FE00010"
    asked = []
    for answer in ANSWERS:
        verb, _, path = answer.request.partition(" ")
        lines = [
            f'url = "{gateway.url(path.format_map(place))}"',
            "head" if verb == "HEAD" else f'request = "{verb}"',
            *(f'header = "{field}"' for field in answer.fields),
            *([f'data-binary = "{answer.body.format_map(place)}"'] if answer.body else []),
            f'output = "{tmp_path / "out"}"',
            'write-out = "%{http_code} %{content_type}\\n"',
        ]
        asked.append("\n".join(lines))
    (tmp_path / "curl").write_text("\nnext\n".join(asked) + "\n")
    command = [require("curl", "curl"), "--silent", "--disable", "--config", tmp_path / "curl"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    wrong = []
    for answer, told in zip(ANSWERS, run.stdout.splitlines(), strict=True):
        status, _, media_type = told.partition(" ")
        if int(status) != answer.status or media_type.partition("; boundary")[0] != answer.media_type:
            wrong.append(f"{answer.request} {answer.fields}: {told}, not {answer.status} {answer.media_type}")
    assert wrong == []
