"""Every real series we can get at: sent to the gateway as it runs, and read back by programs of others.

Two gateways hold the same files, one sent with DCMTK's storescu, the other with `dicomscp send`, which alone
sends a dataset's bytes as they are.  What is expected is what pydicom and DCMTK read in the files.
"""

import gzip
import itertools
import json
import re
import subprocess
import sys
import time
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from pydicom.encaps import generate_frames
from pydicom.uid import ExplicitVRBigEndian, generate_uid

from tests.conformance.test_dicom_json import (
    DCM2JSON,
    PYDICOM,
    differences,
    encapsulated_pixels,
    links,
    read_by_dcm2json,
    read_by_pydicom,
    split,
    unexplained,
)
from tests.gateway import REPOSITORY, Gateway
from tests.integration import sources
from tests.integration.sources import Source
from tests.peers import DCMTK, require
from tests.processes import wait_until

STORESCU, SEND = "storescu", "dicomscp send"
PUBLISH_SECONDS = 60
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
FRESH_SECONDS = 10  # generous: what it takes on a quiet machine, the benchmark says

# DCMTK 3.6.7 does not know these: HTJ2K, and deflated frames.
UNKNOWN_TO_DCMTK = {"1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.203", "1.2.840.10008.1.2.8.1"}
UNREADABLE_FOR_DCMTK = {"SC_rgb_jpeg.dcm"}  # implicit VR in its first elements, explicit after

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")  # real files are odd in many ways


@dataclass
class Held:
    """A gateway, and what it was sent."""

    gateway: Gateway
    sender: str
    folders: dict[str, list[Source]]
    client: DICOMwebClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = DICOMwebClient(self.gateway.url("/dicomweb"))

    def expected(self, study_uid: str) -> dict[str, set[str]]:
        """The SOP Instance UIDs of a study by Series Instance UID; folders share studies."""
        found: dict[str, set[str]] = defaultdict(set)
        for source in itertools.chain.from_iterable(self.folders.values()):
            if source.study_uid == study_uid:
                found[source.series_uid].add(source.sop_uid)
        return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> sources.Stage:
    return sources.Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def folders(stage, pydicom_files, request) -> dict[str, list[Source]]:
    """The sources by folder; those of the collection only if it is there."""
    found = {sources.PYDICOM: stage.add(sources.PYDICOM, pydicom_files)}
    with suppress(pytest.skip.Exception):
        collection = request.getfixturevalue("shared_data")
        found |= {name: stage.add(name, collection / name) for name in sources.COLLECTION}
    return found


@pytest.fixture(scope="module", params=[STORESCU, SEND])
def held(request, folders, stage, tmp_path_factory) -> Iterator[Held]:
    if request.param == STORESCU:
        require(STORESCU, DCMTK)
        folders = {name: list(filter(is_readable_for_dcmtk, found)) for name, found in folders.items()}
    root = tmp_path_factory.mktemp("gateway") / "root"
    root.mkdir()
    with Gateway(root, settings={"pipeline.quiet_seconds": 0.5}) as gateway:
        held = Held(gateway, request.param, folders)
        if request.param == STORESCU:
            for name in folders:
                send_with_storescu(held, stage.directory / name, name)
        else:
            send(gateway, [stage.directory / name for name in folders])
        wait_until_published(held)
        yield held


@pytest.fixture(params=[sources.PYDICOM, *sources.COLLECTION])
def folder(request, held) -> list[Source]:
    if request.param not in held.folders:
        request.getfixturevalue("shared_data")  # skips
    return held.folders[request.param]


def is_readable_for_dcmtk(source: Source) -> bool:
    name = source.path.name.partition("-")[2]
    return source.transfer_syntax_uid not in UNKNOWN_TO_DCMTK and name not in UNREADABLE_FOR_DCMTK


# --- sending and waiting ------------------------------------------------------------------------------------


def send(gateway: Gateway, paths: Sequence[Path]) -> dict[str, Any]:
    peer = f"{gateway.ae_title}@127.0.0.1:{gateway.port}"
    command = [sys.executable, "-m", "dicomscp", "send", "--json", peer, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, check=False, cwd=REPOSITORY, timeout=120)
    assert run.returncode == 0, run.stderr.decode()
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def send_with_storescu(held: Held, directory: Path, name: str) -> None:
    """Each file in its own transfer syntax; what is not sent is not what the test is about, but is counted."""
    profile = directory.with_name(f"{directory.name}.cfg")
    profile.write_text(storescu_profile(held.folders[name]))
    command = [
        STORESCU,
        "-v",
        "-nh",
        "+sd",
        "-xf",
        profile,
        "Own",
        "127.0.0.1",
        str(held.gateway.port),
        directory,
    ]
    run = subprocess.run(command, capture_output=True, check=False, timeout=120)
    stored = run.stdout.count(b"Received Store Response (Success)")
    stored += run.stderr.count(b"Received Store Response (Success)")
    assert stored >= len(held.folders[name]), run.stdout + run.stderr


def storescu_profile(found: Sequence[Source]) -> str:
    """One presentation context for each SOP class and transfer syntax, with that syntax alone."""
    syntaxes = sorted({source.transfer_syntax_uid for source in found})
    pairs = sorted({(source.sop_class_uid, source.transfer_syntax_uid) for source in found})
    lines = ["[[TransferSyntaxes]]"]
    for number, syntax in enumerate(syntaxes):
        lines += [f"[Syntax{number}]", f"TransferSyntax1 = {syntax}"]
    lines += ["[[PresentationContexts]]", "[All]"]
    for number, (sop_class_uid, syntax) in enumerate(pairs, 1):
        lines.append(f"PresentationContext{number} = {sop_class_uid}\\Syntax{syntaxes.index(syntax)}")
    return "\n".join([*lines, "[[Profiles]]", "[Own]", "PresentationContexts = All", ""])


def wait_until_published(held: Held) -> None:
    for study_uid in {source.study_uid for source in itertools.chain.from_iterable(held.folders.values())}:
        count = sum(map(len, held.expected(study_uid).values()))
        path = f"/dicomweb/studies/{study_uid}/metadata"
        wait_until(
            lambda path=path, count=count: len(held.gateway.get_json(path)) == count,
            PUBLISH_SECONDS,
            f"{count} instances in {path}",
        )


def studies_of(found: Sequence[Source]) -> list[str]:
    return sorted({source.study_uid for source in found})


def series_of(found: Sequence[Source]) -> list[tuple[str, str]]:
    return sorted({source.key[:2] for source in found})


# --- QIDO-RS ------------------------------------------------------------------------------------------------


def values(found: Sequence[dict[str, Any]], tag: str) -> list[Any]:
    return [one[tag]["Value"][0] for one in found]


def test_every_study_series_and_instance_is_listed_and_counted(held, folder):
    for study_uid in studies_of(folder):
        expected = held.expected(study_uid)
        (study,) = held.client.search_for_studies(search_filters={"StudyInstanceUID": study_uid})
        series = held.client.search_for_series(study_uid)
        instances = held.client.search_for_instances(study_uid)

        assert study["00201206"]["Value"] == [len(expected)]
        assert study["00201208"]["Value"] == [sum(map(len, expected.values()))]
        assert dict(zip(values(series, "0020000E"), values(series, "00201209"), strict=True)) == {
            series_uid: len(sop_uids) for series_uid, sop_uids in expected.items()
        }
        assert sorted(values(instances, "00080018")) == sorted(itertools.chain(*expected.values()))


# --- Instances and frames -----------------------------------------------------------------------------------


def number_of_frames(dataset: pydicom.Dataset) -> int:
    stated = str(dataset.get("NumberOfFrames") or 1)
    return int(stated) if stated.isdigit() else 1  # "1A" is in one of the files


def native_frames(dataset: pydicom.Dataset) -> list[bytes]:
    """Little endian, each from a byte on, cut out of the pixel data by what PS3.5 and PS3.3 say of them."""
    count = number_of_frames(dataset)
    bits = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated
    if dataset.PhotometricInterpretation == "YBR_FULL_422":
        bits = bits * 2 // 3
    element = next(dataset[keyword] for keyword in PIXELS if keyword in dataset)
    data = element.value
    if dataset.BitsAllocated == 1:
        cells = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        frames = (cells[bits * number : bits * (number + 1)] for number in range(count))
        return [np.packbits(frame, bitorder="little").tobytes() for frame in frames]
    if dataset.original_encoding == (False, False) and element.VR != "OB":
        word = max(2, dataset.BitsAllocated // 8)
        data = np.frombuffer(data, f">u{word}").astype(f"<u{word}").tobytes()
    size = bits // 8
    return [data[size * number : size * (number + 1)] for number in range(count)]


def frames_of(source: Source, dataset: pydicom.Dataset) -> list[bytes]:
    if not any(keyword in dataset for keyword in PIXELS):
        return []
    if pydicom.uid.UID(source.transfer_syntax_uid).is_encapsulated:
        return list(generate_frames(dataset.PixelData, number_of_frames=number_of_frames(dataset)))
    return native_frames(dataset)


def test_instances_and_frames_come_back_with_the_pixels_that_were_sent(held, folder):
    wrong = []
    for source in folder:
        dataset = pydicom.dcmread(source.path, force=True)
        retrieved = held.client.retrieve_instance(*source.key)
        wrong += [
            f"{source.path.name}: {keyword}"
            for keyword in PIXELS
            if dataset.get(keyword) != retrieved.get(keyword)
        ]
        frames = frames_of(source, dataset)
        if frames:
            numbers = list(range(1, len(frames) + 1))
            came = held.client.retrieve_instance_frames(*source.key, numbers)
            wrong += [f"{source.path.name}: frame {n}" for n in numbers if came[n - 1] != frames[n - 1]]

    assert wrong == []


def test_a_dataset_comes_back_byte_for_byte(held, folder):
    if held.sender == STORESCU:
        return
    for source in folder:
        path = "/dicomweb/studies/{}/series/{}/instances/{}".format(*source.key)
        came = held.gateway.get(path, accept='application/dicom; transfer-syntax="*"')
        assert split(came) == split(source.path.read_bytes()), source.path.name


# --- C-FIND -------------------------------------------------------------------------------------------------


def find(
    held: Held, scratch: Path, model: str, level: str, keys: dict[str, str | bytes]
) -> list[pydicom.Dataset]:
    """The matches that findscu writes down."""
    folder = scratch / f"{level}-{sum(1 for _ in scratch.iterdir())}"
    folder.mkdir()
    asked: list[str | bytes] = []
    for keyword, value in {"QueryRetrieveLevel": level, **keys}.items():
        text = value if isinstance(value, bytes) else value.encode()
        asked += ["-k", keyword.encode() + b"=" + text]
    peer = ["127.0.0.1", str(held.gateway.port)]
    run = subprocess.run(
        [require("findscu", DCMTK), model, "-X", "-od", folder, *asked, *peer],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert b"E: " not in run.stderr, run.stderr
    return [pydicom.dcmread(path, force=True) for path in sorted(folder.iterdir())]


def test_findscu_finds_the_studies_of_both_roots(held, folder, tmp_path):
    returned = {"NumberOfStudyRelatedInstances": "", "PatientID": ""}
    uids = {"StudyInstanceUID": "\\".join(studies_of(folder))}
    found = find(held, tmp_path, "-S", "STUDY", uids | returned)
    expected = {uid: sum(map(len, held.expected(uid).values())) for uid in studies_of(folder)}
    assert {one.StudyInstanceUID: one.NumberOfStudyRelatedInstances for one in found} == expected

    for patient_id in {one.PatientID for one in found if one.PatientID}:
        of_patient = find(held, tmp_path, "-P", "STUDY", uids | returned | {"PatientID": patient_id})
        assert of_patient == [one for one in found if one.PatientID == patient_id]


def test_findscu_finds_every_series_and_instance(held, folder, tmp_path):
    for study_uid in studies_of(folder):
        expected = held.expected(study_uid)
        found = find(held, tmp_path, "-S", "SERIES", {"StudyInstanceUID": study_uid, "SeriesInstanceUID": ""})
        assert sorted(one.SeriesInstanceUID for one in found) == sorted(expected)
    for study_uid, series_uid in series_of(folder):
        keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid, "SOPInstanceUID": ""}
        found = find(held, tmp_path, "-S", "IMAGE", keys)
        assert {one.SOPInstanceUID for one in found} == held.expected(study_uid)[series_uid]
        assert len(found) == len(held.expected(study_uid)[series_uid])


def test_findscu_finds_every_patient(held, folder, tmp_path):
    found = find(held, tmp_path, "-P", "PATIENT", {"PatientID": "", "PatientName": ""})
    patient_ids = {one.PatientID or "" for one in found}
    assert patient_ids_of(folder) <= patient_ids
    assert len(found) == len(patient_ids)


# --- Names in every character set ---------------------------------------------------------------------------

# --- Metadata -----------------------------------------------------------------------------------------------


def with_bulk_values(
    held: Held, metadata: dict[str, Any], dataset: bytes, transfer_syntax_uid: str
) -> dict[str, Any]:
    """The metadata of an instance with what it links to fetched; encapsulated pixel data are left out."""
    if pixels := encapsulated_pixels(dataset, transfer_syntax_uid):
        del metadata[f"{pixels.tag:08X}"]
    for attribute in links(metadata):
        value = held.gateway.get(
            attribute.pop("BulkDataURI"), accept='application/octet-stream; transfer-syntax="*"'
        )
        attribute["InlineBinary"] = b64encode(value).decode()
    return metadata


def test_metadata_is_what_pydicom_and_dcm2json_read_in_the_files(held, folder, tmp_path):
    metadata = {
        values([one], "00080018")[0]: one
        for study_uid, series_uid in series_of(folder)
        for one in held.client.retrieve_series_metadata(study_uid, series_uid)
    }
    dcm2json = require("dcm2json", DCMTK)
    paths = [source.path for source in folder]
    wrong: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        of_dcm2json = pool.map(lambda path: read_by_dcm2json(dcm2json, path, tmp_path), paths)
        for source, theirs in zip(folder, of_dcm2json, strict=True):
            dataset, syntax = split(source.path.read_bytes())
            ours = with_bulk_values(held, metadata[source.sop_uid], dataset, syntax)
            for reading, deviations in ((read_by_pydicom(source.path), PYDICOM), (theirs, DCM2JSON)):
                if reading is not None:
                    found = differences(ours, reading, big_endian=syntax == ExplicitVRBigEndian)
                    wrong += unexplained(source.path.name, found, deviations, set())

    assert wrong == []
