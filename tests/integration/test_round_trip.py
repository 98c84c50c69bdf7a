"""Real files as they are, not a byte changed: sent, and read back in every way that WADO-RS has.

`dicomscp send` sends a dataset's bytes as they lie in the file.  Files that share a SOP Instance UID go each
to a gateway of their own.  What is expected is pydicom's reading; dicomweb-client asks for all but the raw
bytes of an instance, which it has no way to give.
"""

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient
from pydicom.datadict import keyword_for_tag
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import MediaStorageDirectoryStorage

from tests.conformance import outcomes
from tests.conformance.readings import DAMAGED
from tests.gateway import Gateway
from tests.integration.commands import send
from tests.integration.sources import frames_of
from tests.processes import wait_until

PUBLISH_SECONDS = 60
FILED_UNDER = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
# Pixel data of undefined length without items, on which pydicom fails; a blank VR: it takes it for implicit.
# Of these two the bytes are compared, and that the client gets what we say of them.
MISREAD = {"GH177_D_CLUNIE_CT1_IVRLE_BigEndian_undefined_length.dcm", "GH179A.dcm"}
SETTINGS = {
    "pipeline.quiet_seconds": 0.2,
    "dimse.listeners": 1,
    "inbox.enabled": False,
    "publish.inline_max": 64,  # makes links of many values that are short
}
INSTANCE = "/dicomweb/studies/{}/series/{}/instances/{}"
_FLOAT_PIXELS = ("FloatPixelData", "DoubleFloatPixelData")
WORDS = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")  # real files are odd in many ways


@dataclass
class Trip:
    """What became of all files: what was compared, and what was not the same."""

    sent: set[Path] = field(default_factory=set)
    refused: dict[Path, str] = field(default_factory=dict)
    compared: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def compare(self, what: str, where: str, came: object, expected: object) -> None:
        self.compared[what] += 1
        if came != expected:
            self.wrong[what].append(where)


@pytest.fixture(scope="module")
def files(collection) -> list[Path]:
    """Each once, though both collections may have it."""
    paths = outcomes.pydicoms_files() + (outcomes.collection_files(collection) if collection else [])
    return list({hashlib.sha256(path.read_bytes()).digest(): path for path in paths}.values())


@pytest.fixture(scope="module")
def trip(files, tmp_path_factory) -> Trip:
    """All of it: a gateway for each layer, the next one starting while one is read."""
    made = Trip()
    layers = outcomes.layered({path: outcomes.sop_uid_of(path) for path in files})
    with ThreadPoolExecutor(1) as starting, ThreadPoolExecutor(1) as stopping:
        directories = [tmp_path_factory.mktemp("layer") for _ in layers]
        stopped = []
        for layer, gateway in zip(layers, ahead(starting, directories), strict=True):
            try:
                there_and_back(gateway, layer, made)
            finally:
                stopped.append(stopping.submit(gateway.stop))
        assert [status.result() for status in stopped] == [0] * len(layers)
    return made


def ahead(pool: ThreadPoolExecutor, directories: Sequence[Path]) -> Iterator[Gateway]:
    """A gateway in each of *directories*, started while the one before it is used."""
    following = pool.submit(started, directories[0])
    for directory in directories[1:]:
        gateway, following = following.result(), pool.submit(started, directory)
        yield gateway
    yield following.result()


def started(directory: Path) -> Gateway:
    root = directory / "root"
    root.mkdir()
    return Gateway(root, settings=SETTINGS).start()


def there_and_back(gateway: Gateway, layer: Sequence[Path], trip: Trip) -> None:
    report = send(gateway, layer)
    refused = {Path(one["path"]): one["reason"] for one in report["refused"]}
    trip.refused |= refused
    sent = [path for path in layer if path not in refused]
    assert report["sent"] == len(sent)
    trip.sent.update(sent)
    with requests.Session() as session:
        session.trust_env = False  # else each request looks through the environment for a proxy
        read_back(gateway, session, sent, trip)


def read_back(gateway: Gateway, session: requests.Session, sent: Sequence[Path], trip: Trip) -> None:
    # Some UIDs are none.
    client = DICOMwebClient(gateway.url("/dicomweb"), session=session, permissive_uid=True)
    metadata = published(gateway, client, sent)
    viewed = viewer_entries(gateway, client)
    for path in sent:
        of_instance = metadata[outcomes.sop_uid_of(path)]
        key = tuple(of_instance[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018"))
        trip.compare("metadata", path.name, client.retrieve_instance_metadata(*key), of_instance)
        came = gateway.get(INSTANCE.format(*key), accept='application/dicom; transfer-syntax="*"')
        trip.compare("bytes", path.name, dataset_of(came), dataset_of(path.read_bytes()))
        if path.name not in MISREAD:
            expected = pydicom.dcmread(path, force=True)
            compare_instance(client, path, key, expected, trip)
            compare_values(client, path, of_instance, expected, trip)
        trip.compare("viewer", path.name, viewed[key[2]], expected_entry(of_instance))


def published(gateway: Gateway, client: DICOMwebClient, sent: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The metadata of all series by SOP Instance UID, once every instance is in them."""

    def complete() -> bool:
        states = (gateway.root / "state").glob("??/*.json")
        return sum(json.loads(path.read_bytes())["instances"] for path in states) == len(sent)

    wait_until(complete, PUBLISH_SECONDS, f"{len(sent)} published instances")
    series = client.search_for_series()
    uids = [(one["0020000D"]["Value"][0], one["0020000E"]["Value"][0]) for one in series]
    entries = [one for both in uids for one in client.retrieve_series_metadata(*both)]
    found = {one["00080018"]["Value"][0]: one for one in entries}
    assert len(found) == len(entries) == len(sent)
    return found


def viewer_entries(gateway: Gateway, client: DICOMwebClient) -> dict[str, dict[str, Any]]:
    """What the viewer's documents first say of each instance, by its SOP Instance UID."""
    found: dict[str, dict[str, Any]] = {}
    for study in client.search_for_studies():
        document = gateway.get_json(f"/studies/{study['0020000D']['Value'][0]}/ohif-dicom-json")
        for series in document["studies"][0]["series"]:
            for entry in series["instances"]:
                found.setdefault(entry["metadata"]["SOPInstanceUID"], entry["metadata"])
    for entry in found.values():
        for link in ("EncapsulatedDocument", "PixelData"):  # what a browser shows; no attribute of the header
            entry.pop(link, None)
    return found


def expected_entry(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata by keyword, for those who read values alone."""
    made = {}
    for tag, attribute in metadata.items():
        keyword, values = keyword_for_tag(tag), attribute.get("Value")
        if not keyword or keyword in ("EncapsulatedDocument", "PixelData", *_FLOAT_PIXELS):
            continue
        if attribute["vr"] == "SQ" and values:
            made[keyword] = [expected_entry(item) for item in values]
        elif attribute["vr"] == "PN" and values:
            names = [next(filter(None, (one or {}).values()), "") for one in values]
            made[keyword] = names if len(names) > 1 else names[0]
        elif values:
            made[keyword] = values if len(values) > 1 else values[0]
        elif links := {
            name: attribute[name] for name in ("BulkDataURI", "InlineBinary") if name in attribute
        }:
            made[keyword] = links
    return {keyword: value for keyword, value in made.items() if value is not None}


def dataset_of(file: bytes) -> bytes:
    """What follows the file meta information."""
    stream = io.BytesIO(file)
    read_preamble(stream, force=True)
    _read_file_meta_info(stream)
    return file[stream.tell() :]


def compare_instance(
    client: DICOMwebClient, path: Path, key: tuple[str, str, str], expected: pydicom.Dataset, trip: Trip
) -> None:
    retrieved = client.retrieve_instance(*key)
    trip.compare("elements", path.name, list(retrieved.keys()), list(expected.keys()))
    if frames := frames_of(expected):
        numbers = list(range(1, len(frames) + 1))
        answers = client.retrieve_instance_frames(*key, numbers)
        for number, one, other in zip(numbers, answers, frames, strict=True):
            trip.compare("frames", f"{path.name}, frame {number}", one, other)


def compare_values(
    client: DICOMwebClient, path: Path, metadata: dict[str, Any], dataset: pydicom.Dataset, trip: Trip
) -> None:
    """Every value that the metadata link to, those in sequences too."""
    for place, attribute in linked(metadata):
        came = client.retrieve_bulkdata(urljoin(client.base_url, attribute["BulkDataURI"]))
        expected = value_at(dataset, place, attribute["vr"])
        trip.compare(
            "values in sequences" if len(place) > 1 else "values", f"{path.name} {place}", came, expected
        )


def linked(
    item: dict[str, Any], place: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """The attributes that link to a value, each with where it is: tag, item, tag and so on, items from 0."""
    for tag, attribute in item.items():
        here = (*place, int(tag, 16))
        if "BulkDataURI" in attribute:
            yield here, attribute
        if attribute["vr"] == "SQ":
            for number, inner in enumerate(attribute.get("Value", [])):
                yield from linked(inner, (*here, number))


def value_at(dataset: pydicom.Dataset, place: Sequence[int], vr: str) -> list[bytes]:
    """The value in little endian order; of encapsulated pixel data one a frame."""
    *way, last = place
    level = dataset
    for tag, number in zip(way[::2], way[1::2], strict=True):
        level = level[tag].value[number]
    element = level.get_item(last)
    if pydicom.tag.Tag(last) == 0x7FE00010 and level["PixelData"].is_undefined_length:
        return frames_of(level)
    value = element.value
    if not dataset.original_encoding[1] and element.VR != "UN":
        word = WORDS.get(vr, 1)
        if last == 0x7FE00010 and vr == "OW":
            word = max(2, level.BitsAllocated // 8)
        value = np.frombuffer(value, f">u{word}").astype(f"<u{word}").tobytes()
    return [value]


# --- what must hold -----------------------------------------------------------------------------------------


def can_be_filed(path: Path) -> bool:
    """Whether it is whole, and has the UIDs that an instance is filed under, as pydicom reads it."""
    if path.name in MISREAD:
        return True
    if path.name in DAMAGED or path.suffix in {".gz", ".icc"}:
        return False
    dataset = pydicom.dcmread(path, force=True, specific_tags=list(FILED_UNDER))
    meta = getattr(dataset, "file_meta", {})
    is_directory = meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
    return not is_directory and all(dataset.get(keyword) for keyword in FILED_UNDER)


def test_what_can_be_filed_is_taken_and_all_else_refused_with_a_reason(trip, files, collection):
    assert trip.sent == set(filter(can_be_filed, files))
    assert trip.sent | trip.refused.keys() == set(files)
    assert all(trip.refused.values())
    assert len(trip.sent) > (700 if collection else 150)


def counted(trip: Trip, what: str) -> int:
    assert trip.wrong[what] == []
    return trip.compared[what]


def test_a_dataset_comes_back_byte_for_byte(trip):
    assert counted(trip, "bytes") == len(trip.sent)


def test_dicomweb_client_retrieves_every_instance_and_its_metadata(trip):
    assert counted(trip, "elements") >= len(trip.sent) - len(MISREAD)
    assert counted(trip, "metadata") == len(trip.sent)


def test_every_frame_is_the_frame_of_the_file(trip, collection):
    assert counted(trip, "frames") > (1000 if collection else 150)


def test_every_bulk_data_uri_gives_the_value_of_the_file(trip, collection):
    assert counted(trip, "values") > (500 if collection else 100)
    assert counted(trip, "values in sequences") > (10 if collection else 2)


def test_the_viewers_documents_say_what_the_metadata_say(trip):
    assert counted(trip, "viewer") == len(trip.sent)
