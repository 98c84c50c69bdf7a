"""Every real series we can get at: sent to the gateway as it runs, and read back by programs of others.

Two gateways hold the same files, one sent with DCMTK's storescu, the other with `dicomscp send`, which alone
sends a dataset's bytes as they are.  What is expected is what pydicom and DCMTK read in the files.
"""

import gzip
import itertools
import json
import subprocess
import time
from base64 import b64decode
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from pydicom.uid import ExplicitVRBigEndian, generate_uid
from pynetdicom import AE

from tests.conformance.readings import (
    DCM2JSON,
    PYDICOM,
    Deviation,
    differences,
    explanations,
    read_by_dcm2json,
    read_by_pydicom,
    split,
    with_bulk_values,
)
from tests.gateway import Gateway, wait_for_instances
from tests.integration import sources
from tests.integration.commands import send_all
from tests.integration.sources import PIXELS, Source, frames_of
from tests.peers import DCMTK, require
from tests.processes import wait_until

STORESCU, SEND = "storescu", "dicomscp send"
PUBLISH_SECONDS = 60
FRESH_SECONDS = 10  # generous: what it takes on a quiet machine, the benchmark says
TIMEZONE = "00080201"

# DCMTK 3.6.7 does not know these: HTJ2K, and deflated frames.
UNKNOWN_TO_DCMTK = {"1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.203", "1.2.840.10008.1.2.8.1"}
UNREADABLE_FOR_DCMTK = {"SC_rgb_jpeg.dcm"}  # implicit VR in its first elements, explicit after

# What storescu changes on the way; all else must be as it is in the file.
RE_ENCODING = (
    Deviation("S-padding", "it drops trailing padding", lambda it: it.ours is None and it.path == "FFFCFFFC"),
    Deviation(
        "S-odd",
        "it pads a value of odd length (PS3.5 7.1.1)",
        lambda it: (
            it.vrs == ("OB", "OB")
            and it.ours is not None
            and it.theirs is not None
            and len(theirs := b64decode(it.theirs["InlineBinary"])) % 2 == 1
            and b64decode(it.ours["InlineBinary"]) == theirs + b"\0"
        ),
    ),
)

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

    def bulk_value(self, uri: str) -> bytes:
        return self.gateway.get(uri, accept='application/octet-stream; transfer-syntax="*"')

    def patients(self) -> dict[str, set[str]]:
        """Studies by Patient ID, those alone whose files all say the same one."""
        by_study: dict[str, set[str]] = defaultdict(set)
        for source in itertools.chain.from_iterable(self.folders.values()):
            by_study[source.study_uid].add(source.patient_id)
        found: dict[str, set[str]] = defaultdict(set)
        for study_uid, (patient_id, *others) in by_study.items():
            if patient_id and not others:
                found[patient_id].add(study_uid)
        return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> sources.Stage:
    return sources.Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def folders(stage, pydicom_files, collection) -> dict[str, list[Source]]:
    """The sources by folder; those of the collection only if it is there."""
    found = {sources.PYDICOM: stage.add(sources.PYDICOM, pydicom_files)}
    if collection is not None:
        found |= {name: stage.add(name, collection / name) for name in sources.COLLECTION}
    return found


@contextmanager
def running(sender: str, folders: dict[str, list[Source]], directory: Path) -> Iterator[Held]:
    root = directory / "root"
    root.mkdir()
    with Gateway(root, settings={"pipeline.quiet_seconds": 0.5}) as gateway:
        yield Held(gateway, sender, folders)


@pytest.fixture(scope="module")
def by_storescu(folders, stage, tmp_path_factory) -> Iterator[Held]:
    require(STORESCU, DCMTK)
    readable = {name: list(filter(is_readable_for_dcmtk, found)) for name, found in folders.items()}
    with running(STORESCU, readable, tmp_path_factory.mktemp("storescu")) as held:
        for name in readable:
            send_with_storescu(held, stage.directory / name, name)
        wait_until_published(held)
        yield held


@pytest.fixture(scope="module")
def by_send(folders, stage, tmp_path_factory) -> Iterator[Held]:
    with running(SEND, folders, tmp_path_factory.mktemp("send")) as held:
        send_all(held.gateway, [stage.directory / name for name in folders])
        wait_until_published(held)
        yield held


@pytest.fixture(params=["by_storescu", "by_send"])
def held(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[sources.PYDICOM, *sources.COLLECTION])
def folder(request, folders):
    if request.param not in folders:
        request.getfixturevalue("shared_data")  # skips
    return request.param


def is_readable_for_dcmtk(source: Source) -> bool:
    name = source.path.name.partition("-")[2]
    return source.transfer_syntax_uid not in UNKNOWN_TO_DCMTK and name not in UNREADABLE_FOR_DCMTK


# --- sending and waiting ------------------------------------------------------------------------------------


def send_with_storescu(held: Held, directory: Path, name: str) -> None:
    """Each file in its own transfer syntax; all that it can read must be taken."""
    profile = directory.with_name(f"{directory.name}.cfg")
    profile.write_text(storescu_profile(held.folders[name]))
    options = ["-v", "-nh", "+sd", "-xf", str(profile), "Own"]
    command = [STORESCU, *options, "127.0.0.1", str(held.gateway.port), str(directory)]
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
    for study_uid in studies_of(list(itertools.chain.from_iterable(held.folders.values()))):
        count = sum(map(len, held.expected(study_uid).values()))
        wait_for_instances(held.gateway, study_uid, count, PUBLISH_SECONDS)
        wait_for_metadata(held.gateway, f"/dicomweb/studies/{study_uid}/metadata", count)


def wait_for_metadata(gateway: Gateway, path: str, count: int) -> None:
    what = f"{count} instances in {path}"
    wait_until(lambda: len(gateway.get_json(path)) == count, PUBLISH_SECONDS, what)


def studies_of(found: Sequence[Source]) -> list[str]:
    return sorted({source.study_uid for source in found})


def series_of(found: Sequence[Source]) -> list[tuple[str, str]]:
    return sorted({source.key[:2] for source in found})


# --- QIDO-RS ------------------------------------------------------------------------------------------------


def values(found: Sequence[dict[str, Any]], tag: str) -> list[Any]:
    return [one[tag]["Value"][0] for one in found]


def test_every_study_series_and_instance_is_listed_and_counted(held, folder):
    for study_uid in studies_of(held.folders[folder]):
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


def test_a_series_sent_with_storescu_comes_back_with_the_pixels_of_its_files(by_storescu, folder):
    wrong = []
    found = by_storescu.folders[folder]
    retrieved = {
        instance.SOPInstanceUID: instance
        for uids in series_of(found)
        for instance in by_storescu.client.retrieve_series(*uids)
    }
    for source in found:
        sent, came = pydicom.dcmread(source.path, force=True), retrieved[source.sop_uid]
        for keyword in PIXELS:
            value = sent.get(keyword)
            if value is not None and len(value) % 2:
                value += b"\0"  # storescu pads, as PS3.5 7.1.1 wants it
            if came.get(keyword) not in (sent.get(keyword), value):
                wrong.append(f"{source.path.name}: {keyword}")

    assert wrong == []


def test_frames_come_back_of_files_that_had_to_be_given_uids(by_send):
    """Those that need none are sent as they are in test_round_trip."""
    wrong, count = [], 0
    for source in itertools.chain(*by_send.folders.values()):
        if source.path.is_symlink():
            continue
        if frames := frames_of(pydicom.dcmread(source.path, force=True)):
            numbers = list(range(1, len(frames) + 1))
            came = by_send.client.retrieve_instance_frames(*source.key, numbers)
            wrong += [f"{source.path.name}: frame {n}" for n in numbers if came[n - 1] != frames[n - 1]]
            count += len(frames)

    assert wrong == []
    assert count > 20


# --- C-FIND -------------------------------------------------------------------------------------------------


def find(held: Held, scratch: Path, model: str, level: str, keys: Mapping[str, str]) -> list[pydicom.Dataset]:
    """The matches that findscu writes down."""
    folder = scratch / f"{level}-{sum(1 for _ in scratch.iterdir())}"
    folder.mkdir()
    asked: list[str] = []
    for keyword, value in {"QueryRetrieveLevel": level, **keys}.items():
        asked += ["-k", f"{keyword}={value}"]
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


def test_findscu_finds_the_studies_of_both_roots(by_storescu, folder, tmp_path):
    study_uids = studies_of(by_storescu.folders[folder])
    keys = {"StudyInstanceUID": "\\".join(study_uids), "NumberOfStudyRelatedInstances": "", "PatientID": ""}
    found = find(by_storescu, tmp_path, "-S", "STUDY", keys)
    expected = {uid: sum(map(len, by_storescu.expected(uid).values())) for uid in study_uids}
    assert {one.StudyInstanceUID: one.NumberOfStudyRelatedInstances for one in found} == expected

    for patient_id, of_patient in by_storescu.patients().items():
        if asked := of_patient & set(study_uids):
            keys |= {"PatientID": patient_id, "StudyInstanceUID": "\\".join(sorted(asked))}
            found = find(by_storescu, tmp_path, "-P", "STUDY", keys)
            assert {one.StudyInstanceUID for one in found} == asked


def test_findscu_finds_every_series_and_instance(by_storescu, folder, tmp_path):
    found = by_storescu.folders[folder]
    for study_uid in studies_of(found):
        keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": ""}
        series = find(by_storescu, tmp_path, "-S", "SERIES", keys)
        assert sorted(one.SeriesInstanceUID for one in series) == sorted(by_storescu.expected(study_uid))
    for study_uid, series_uid in series_of(found):
        keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid, "SOPInstanceUID": ""}
        instances = find(by_storescu, tmp_path, "-S", "IMAGE", keys)
        expected = sorted(by_storescu.expected(study_uid)[series_uid])
        assert sorted(one.SOPInstanceUID for one in instances) == expected


def test_findscu_finds_every_patient_once(by_storescu, tmp_path):
    found = find(by_storescu, tmp_path, "-P", "PATIENT", {"PatientID": "", "PatientName": ""})
    patient_ids = [one.PatientID for one in found if one.PatientID]
    assert by_storescu.patients().keys() <= set(patient_ids)
    assert len(set(patient_ids)) == len(patient_ids)


def test_names_come_back_in_the_character_set_that_was_asked_for(by_storescu, shared_data, tmp_path):
    wrong = []
    for source, dataset in charset_sources(by_storescu):
        own = "\\".join(np.atleast_1d(dataset.get("SpecificCharacterSet") or ""))
        for charset in {own, "ISO_IR 192"}:
            keys = {"SpecificCharacterSet": charset, "StudyInstanceUID": source.study_uid, "PatientName": ""}
            (found,) = find(by_storescu, tmp_path, "-S", "STUDY", keys)
            if found.PatientName != dataset.PatientName:
                wrong.append((source.path.name, charset, str(found.PatientName), str(dataset.PatientName)))

    assert wrong == []


def test_a_study_is_found_by_a_name_in_any_script(by_storescu, shared_data, tmp_path):
    wrong = []
    for source, dataset in charset_sources(by_storescu):
        keys = {
            "SpecificCharacterSet": "ISO_IR 192",
            "PatientName": str(dataset.PatientName),
            "StudyInstanceUID": "",
        }
        found = find(by_storescu, tmp_path, "-S", "STUDY", keys)
        search = {"PatientName": str(dataset.PatientName), "limit": "1000"}
        over_http = by_storescu.client.search_for_studies(search_filters=search)
        if source.study_uid not in {one.StudyInstanceUID for one in found}:
            wrong.append((source.path.name, "C-FIND"))
        if source.study_uid not in values(over_http, "0020000D"):
            wrong.append((source.path.name, "QIDO-RS"))

    assert wrong == []


def charset_sources(held: Held) -> list[tuple[Source, pydicom.FileDataset]]:
    """Those whose name is the name of their study, because no other file of it says another."""
    read = [(source, pydicom.dcmread(source.path)) for source in held.folders["charsets"]]
    names = defaultdict(set)
    for source, dataset in read:
        names[source.study_uid].add(str(dataset.get("PatientName", "")))
    found = [
        (one, dataset)
        for one, dataset in read
        if len(names[one.study_uid]) == 1 and dataset.get("PatientName")
    ]
    assert len(found) > 8
    return found


# --- Metadata -----------------------------------------------------------------------------------------------


def metadata_of(held: Held, found: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """By SOP Instance UID, from the metadata of the series."""
    series = (held.client.retrieve_series_metadata(*uids) for uids in series_of(found))
    return {values([one], "00080018")[0]: one for one in itertools.chain.from_iterable(series)}


def test_metadata_is_what_pydicom_and_dcm2json_read_in_the_files(by_storescu, by_send, folder, tmp_path):
    dcm2json = require("dcm2json", DCMTK)
    found = by_send.folders[folder]
    published = [(held, metadata_of(held, held.folders[folder])) for held in (by_storescu, by_send)]
    wrong: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.map(lambda source: read_by_dcm2json(dcm2json, source.path, tmp_path), found)
        for source, of_dcm2json in zip(found, theirs, strict=True):
            readings = ((read_by_pydicom(source.path), PYDICOM), (of_dcm2json, DCM2JSON))
            for held, metadata in published:
                if source in held.folders[folder]:
                    wrong += not_explained(held, source, metadata[source.sop_uid], readings)

    assert wrong == []


def not_explained(
    held: Held,
    source: Source,
    metadata: dict[str, Any],
    readings: Sequence[tuple[dict[str, Any] | None, tuple[Deviation, ...]]],
) -> list[str]:
    dataset, syntax = split(source.path.read_bytes())
    ours = with_bulk_values(metadata, dataset, syntax, held.bulk_value)
    wrong: list[str] = []
    for theirs, deviations in readings:
        if theirs is not None:
            found = differences(ours, theirs, big_endian=syntax == ExplicitVRBigEndian)
            by_sender = RE_ENCODING if held.sender == STORESCU else ()
            _, unexplained = explanations(found, deviations + by_sender)
            wrong += [f"{held.sender} {source.path.name} {one}" for one in unexplained]
    return wrong


def test_published_files_are_what_is_served(by_send, folder):
    tree = by_send.gateway.root / "dicomweb"
    for study_uid in studies_of(by_send.folders[folder]):
        study = f"studies/{study_uid}"
        series = [f"{study}/series/{series_uid}" for series_uid in by_send.expected(study_uid)]
        for place in (study, *series):
            served = by_send.gateway.get(f"/dicomweb/{place}/metadata", accept="application/dicom+json")
            assert gzip.decompress((tree / place / "metadata.gz").read_bytes()) == served
        lists = {f"studies?StudyInstanceUID={study_uid}": study, f"{study}/series": f"{study}/series"}
        lists |= {f"{place}/instances": f"{place}/instances" for place in series}
        for query, place in lists.items():
            published = json.loads(gzip.decompress((tree / place / "index.json.gz").read_bytes()))
            answered = by_send.gateway.get_json(f"/dicomweb/{query}")
            for one, other in zip(published, answered, strict=True):  # in the same order, published say more
                said = {tag: value for tag, value in other.items() if "Value" in value}
                if place.endswith("/instances"):  # its own in the list, its study's in an answer
                    said.pop(TIMEZONE, None)
                assert said.items() <= one.items()


# --- The newcomer's way, and how soon -----------------------------------------------------------------------


def test_storescu_with_no_options_sends_a_series_that_is_found_at_once(shared_data, root):
    directory = shared_data / "series-ct" / "philips-abdomen"
    with Gateway(root) as gateway:
        to = ["127.0.0.1", str(gateway.port)]
        subprocess.run([require(STORESCU, DCMTK), *to, "+sd", "+r", directory], check=True, timeout=60)
        client = DICOMwebClient(gateway.url("/dicomweb"))
        (study,) = client.search_for_studies()
        assert study["00201208"]["Value"] == [8]
        retrieved = {one.SOPInstanceUID: one for one in client.retrieve_study(values([study], "0020000D")[0])}

    assert len(retrieved) == 8
    for path in directory.iterdir():
        dataset = pydicom.dcmread(path)
        assert retrieved[dataset.SOPInstanceUID].PixelData == dataset.PixelData


def test_an_acknowledged_instance_is_retrieved_at_once(by_send, ct_small):
    dataset = pydicom.dcmread(ct_small)
    dataset.StudyInstanceUID, dataset.SOPInstanceUID = generate_uid(), generate_uid()
    key = dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID
    scu = AE()
    scu.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = scu.associate("127.0.0.1", by_send.gateway.port)
    try:
        assert association.send_c_store(dataset).Status == 0
        retrieved = by_send.client.retrieve_instance(*key)
        metadata = by_send.client.retrieve_study_metadata(dataset.StudyInstanceUID)
    finally:
        association.release()

    assert retrieved.PixelData == dataset.PixelData
    assert values(metadata, "00080018") == [dataset.SOPInstanceUID]


def test_300_instances_are_found_at_once_and_published_within_seconds(ct_small, root, tmp_path):
    dataset = pydicom.dcmread(ct_small)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    sent = tmp_path / "sent"
    sent.mkdir()
    for number in range(1, 301):
        dataset.InstanceNumber = number
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.save_as(sent / f"{number}.dcm")
    keys = {"StudyInstanceUID": dataset.StudyInstanceUID, "SeriesInstanceUID": dataset.SeriesInstanceUID}
    metadata = "/dicomweb/studies/{}/series/{}/metadata".format(*keys.values())

    with Gateway(root, settings={"pipeline.quiet_seconds": 2}) as gateway:
        report = send_all(gateway, [sent])
        began = time.monotonic()
        held = Held(gateway, SEND, {})
        found = find(held, tmp_path, "-S", "IMAGE", keys | {"SOPInstanceUID": ""})
        file = (
            gateway.root / "dicomweb" / metadata.removeprefix("/dicomweb/").replace("metadata", "metadata.gz")
        )
        wait_until(file.exists, FRESH_SECONDS, f"{file}")
        seconds = time.monotonic() - began
        entries = gateway.get_json(metadata)

    print(f"300 instances: published {seconds:.2f} s after `dicomscp send` had ended")
    assert report["sent"] == 300
    assert len({one.SOPInstanceUID for one in found}) == 300
    assert [values([one], "00200013")[0] for one in entries] == list(range(1, 301))
    assert seconds < FRESH_SECONDS
