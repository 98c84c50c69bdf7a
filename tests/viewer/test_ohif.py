"""OHIF in a real Chromium, over a real gateway: what it decodes is what pydicom decodes, bit for bit.

One gateway, one installation, one browser serve all tests; the studies come by DCMTK's storescu.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from playwright.sync_api import BrowserContext

from dicomscp.dicom.part10 import read_file_meta
from tests.gateway import Gateway, run_command, wait_for_instances
from tests.integration.test_series import storescu_profile
from tests.peers import DCMTK, NGINX, StaticNginx, missed, require
from tests.viewer.browser import CHROMIUM, FETCH_PACKAGE, PACKAGE, Ohif, chromium, new_context
from tests.viewer.studies import PDF, Study, as_drawn, of_drawn, sha256, studies, write

# Real devices do not keep to the letter of the standard, and pydicom says so.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

SCREENSHOTS = os.environ.get("DICOMSCP_TEST_SCREENSHOTS", "")
_SHOWN = ("CT series", "US palette", "US frames JPEG", "Enhanced CT")
_ROUNDING = 4  # of 255
_SLOW = {"offline": False, "latency": 20, "downloadThroughput": 500_000, "uploadThroughput": 500_000}


@pytest.fixture(scope="module")
def held(pydicom_files, collection) -> list[Study]:
    return studies(pydicom_files, collection)


@pytest.fixture(scope="module")
def gateway(held, tmp_path_factory) -> Iterator[Gateway]:
    if not PACKAGE.is_file():
        missed(f"no package of OHIF ({FETCH_PACKAGE})")
    folder = tmp_path_factory.mktemp("ohif")
    installed = run_command("viewer", "install", PACKAGE, "--root", folder / "root")
    assert installed.returncode == 0, installed.stderr
    settings = {"pipeline.quiet_seconds": 0.2, "publish.frames": "files"}
    with Gateway(folder / "root", settings=settings) as running:
        send(running, held, folder)
        yield running


def send(gateway: Gateway, held: list[Study], folder: Path) -> None:
    storescu = require("storescu", DCMTK)
    files = folder / "files"
    files.mkdir()
    write(held, files)
    instances = [instance for study in held for instance in study.instances]
    contexts = [
        SimpleNamespace(
            sop_class_uid=str(one.SOPClassUID), transfer_syntax_uid=str(one.file_meta.TransferSyntaxUID)
        )
        for one in instances
    ]
    profile = folder / "profile.cfg"
    profile.write_text(storescu_profile(contexts))
    command = [storescu, "-xf", profile, "Own", "+sd", "127.0.0.1", str(gateway.port), files]
    sent = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    for study in held:
        wait_for_instances(gateway, study.uid, len(study.instances))
        gateway.get_json(f"/dicomweb/studies/{study.uid}/metadata")


@pytest.fixture(scope="module")
def context() -> Iterator[BrowserContext]:
    require(CHROMIUM, CHROMIUM)
    with chromium() as browser:
        yield new_context(browser)


@pytest.fixture
def ohif(context, gateway) -> Iterator[Ohif]:
    ohif = Ohif(context, gateway.url("/ohif/"))
    yield ohif
    ohif.close()


def check_pixels(ohif: Ohif, held: list[Study]) -> None:
    """Every frame of every study has the values that pydicom decodes."""
    shown = [study for study in held if study.has_pixels]
    whole = [str(one.SOPInstanceUID) for study in shown if not study.exact for one in study.instances]
    found = ohif.pixels([study.uid for study in shown], whole)
    wrong = []
    for study in shown:
        for place, values, slope, intercept in study.frames():
            if (frame := found.pop(place, None)) is None:
                wrong.append(f"{study.name}, frame {place[1]}: not there")
                continue
            wanted = as_drawn(values, frame.type, slope, intercept, scaled=frame.scaled)
            if study.exact and frame.sha256 != sha256(wanted):
                wrong.append(f"{study.name}, frame {place[1]}: other pixels, {frame.type}")
            elif not study.exact and _most_apart(of_drawn(frame.data, frame.type), wanted) > _ROUNDING:
                wrong.append(f"{study.name}, frame {place[1]}: other pixels, by more than rounding")
    assert wrong == []
    assert found == {}


def check_documents(ohif: Ohif, held: list[Study]) -> None:
    """The browser is given every PDF as it is in its instance."""
    for study in held:
        if not study.has_pixels:
            given = ohif.bytes_at(ohif.show_document(study.uid))
            assert given.rstrip(b"\0") == study.instances[0].EncapsulatedDocument.rstrip(b"\0"), study.name


def show(ohif: Ohif, held: list[Study], source: str) -> None:
    """Draw some studies, and take their pictures; all of them if somebody wants to look at pictures."""
    for study in held:
        if study.has_pixels and (SCREENSHOTS or study.name in _SHOWN):
            ohif.show(study.uid)
            picture(ohif, f"{source}-{study.name}")


def _most_apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).max())


def picture(ohif: Ohif, name: str) -> None:
    """A screenshot for a person to look at, if one wants to."""
    if SCREENSHOTS:
        ohif.screenshot(Path(SCREENSHOTS) / f"{name}.png")


def test_the_list_has_every_study_and_a_filter_in_the_address_holds(ohif, held):
    ohif.page.goto(f"{ohif.base.rstrip('/')}?patientName=JPEG")

    for name in ("MR JPEG 2000", "MR JPEG-LS", "US frames JPEG"):
        ohif.page.get_by_text(name, exact=True).first.wait_for()
    assert ohif.page.get_by_text("PDF", exact=True).count() == 0
    picture(ohif, "list-filtered")
    ohif.page.goto(ohif.base)
    for study in held:
        ohif.page.get_by_text(study.name, exact=True).first.wait_for()
    picture(ohif, "list")
    assert ohif.complaints == []


def test_pixels_are_those_of_pydicom_by_dicomweb(ohif, held, gateway):
    ohif.open(f"viewer?StudyInstanceUIDs={','.join(study.uid for study in held)}", [one.uid for one in held])

    check_pixels(ohif, held)
    show(ohif, held, "dicomweb")
    check_documents(ohif, held)
    picture(ohif, "dicomweb-PDF")
    assert ohif.complaints == []


def test_frames_that_come_slowly_are_whole(ohif, held, context):
    wanted = [study for study in held if study.name in ("CT series", "OT deflated", "US RGB")]
    context.new_cdp_session(ohif.page).send("Network.emulateNetworkConditions", _SLOW)

    ohif.open(f"viewer?StudyInstanceUIDs={','.join(one.uid for one in wanted)}", [one.uid for one in wanted])

    check_pixels(ohif, wanted)
    assert ohif.complaints == []


def test_pixels_are_those_of_pydicom_by_dicom_json(ohif, held, gateway):
    asked = "dicomweb/studies/{}/ohif-dicom-json"
    documents = [gateway.get_json(f"/{asked.format(study.uid)}") for study in held]
    every = {"studies": [one for document in documents for one in document["studies"]]}
    # The app opens one document; that all studies are looked at in one page, one has all of them.
    ohif.page.route(gateway.url("/all.json"), lambda route: route.fulfill(json=every))

    ohif.open("viewer/dicomjson?url=/all.json", [study.uid for study in held])

    check_pixels(ohif, held)
    show(ohif, held, "dicomjson")
    check_documents(ohif, held)
    assert not [one for one in ohif.requests if "/metadata" in one or "/series?" in one]
    assert ohif.complaints == []


def test_one_document_opens_one_study(ohif, held):
    (study,) = [one for one in held if one.name == "Enhanced CT"]

    ohif.open(f"viewer/dicomjson?url=../../studies/{study.uid}/ohif-dicom-json", [study.uid])

    check_pixels(ohif, [study])
    assert ohif.complaints == []


def test_a_file_is_stored_by_its_button(ohif, gateway, ct_small, tmp_path):
    dataset = pydicom.dcmread(ct_small)
    dataset.StudyInstanceUID, dataset.PatientName = "1.2.826.77", "Stored^By hand"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.826.77.1"
    dataset.save_as(tmp_path / "one.dcm")

    ohif.page.goto(ohif.base)
    ohif.page.get_by_role("button", name="Upload", exact=True).click()
    ohif.page.locator("input[type=file]:not([webkitdirectory])").set_input_files(tmp_path / "one.dcm")
    ohif.page.get_by_text("Completed!", exact=True).wait_for()
    wait_for_instances(gateway, "1.2.826.77", 1)
    ohif.page.get_by_role("button", name="Close").first.click()
    ohif.page.get_by_text("Stored, By hand").first.wait_for()

    address = f"/dicomweb/studies/1.2.826.77/series/{dataset.SeriesInstanceUID}/instances/1.2.826.77.1"
    stored = gateway.get(address, accept="application/dicom")
    assert stored.endswith(dataset_of((tmp_path / "one.dcm").read_bytes()))
    assert ohif.complaints == []


def dataset_of(file: bytes) -> bytes:
    return file[read_file_meta(file).dataset_offset :]


@pytest.fixture(scope="module")
def nginx(gateway, tmp_path_factory) -> Iterator[StaticNginx]:
    require("nginx", NGINX)
    with StaticNginx(tmp_path_factory.mktemp("nginx"), gateway.root) as running:
        yield running


def test_nginx_serves_what_is_published_without_us(context, nginx, held):
    ohif = Ohif(context, f"http://127.0.0.1:{nginx.port}/ohif/")
    ohif.open(f"viewer?StudyInstanceUIDs={','.join(one.uid for one in held)}", [one.uid for one in held])

    check_pixels(ohif, held)
    show(ohif, held, "nginx")
    check_documents(ohif, held)
    (document,) = [study for study in held if study.name == "PDF"]
    ohif.open(f"viewer/dicomjson?url=/studies/{document.uid}/ohif-dicom-json", [document.uid])
    assert ohif.bytes_at(ohif.show_document(document.uid)) == PDF
    assert ohif.complaints == []
    ohif.close()
