import gzip
import json
import re
from io import BytesIO
from urllib.parse import quote

import orjson
import pydicom
import pytest
from pydicom.encaps import generate_frames
from sqlalchemy import event

from dicomscp.archive.index import Named
from dicomscp.study import layout
from dicomscp.study.static import instance_files
from dicomscp.web.documents import CHUNK_BYTES
from dicomscp.web.exchange import WHOLE_BYTES
from dicomscp.web.studies import Inflations
from tests.unit.dicom.nativemodel import as_text, read
from tests.unit.web.held import LITTLE, SOURCES

XML = 'multipart/related; type="application/dicom+xml"'
FRAMES = 'multipart/related; type="application/octet-stream"; transfer-syntax=*'


def address(key, rest=""):
    return f"/dicomweb/studies/{key[0]}/series/{key[1]}/instances/{key[2]}{rest}"


def parts_of(response):
    """The parts of a multipart answer, each with its header block."""
    boundary = re.search("boundary=([^;]+)", response.headers["content-type"])[1].encode()
    assert response.content.endswith(b"\r\n--" + boundary + b"--")
    parts = response.content.split(b"--" + boundary)[1:-1]
    return [part[2:-2].split(b"\r\n\r\n", 1) for part in parts]


def large_dataset(rows=2048, frames=2):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    dataset.Rows = dataset.Columns = rows
    dataset.NumberOfFrames = frames
    pixels = bytes(range(256)) * (rows * rows * 2 * frames // 256)
    dataset.PixelData = pixels
    return dataset, pixels


# WADO-RS metadata


@pytest.mark.parametrize("level", ["study", "series"])
def test_published_metadata_is_sent_as_it_lies(gateway, level):
    key = gateway.archive.add_file("CT_small.dcm").key
    path = {"study": layout.study_metadata(key[0]), "series": layout.series_metadata(*key[:2])}[level]
    gateway.publish(path, [{"00080018": {"vr": "UI", "Value": [key[2]]}}])
    url = f"/dicomweb/{path.removesuffix('.gz')}"
    client = gateway.start()

    plain = client.get(url)
    zipped = client.get(url, headers={"accept-encoding": "gzip, br"})
    assert plain.json() == zipped.json() == [{"00080018": {"vr": "UI", "Value": [key[2]]}}]
    assert plain.headers["content-type"] == zipped.headers["content-type"] == "application/dicom+json"
    assert "content-encoding" not in plain.headers
    assert zipped.headers["content-encoding"] == "gzip"
    assert int(zipped.headers["content-length"]) == (gateway.published / path).stat().st_size
    for response in (plain, zipped):
        assert "Accept-Encoding" in response.headers["vary"]
        assert response.headers["cache-control"] == "no-cache"


def test_representations_have_etags_of_their_own_and_stand_until_republished(gateway):
    path = layout.study_metadata("1.2")
    gateway.publish(path, [{"1": 1}])
    client = gateway.start()
    url = "/dicomweb/studies/1.2/metadata"
    etags = {}
    for coding in ("identity", "gzip"):
        etags[coding] = client.get(url, headers={"accept-encoding": coding}).headers["etag"]
        for known in (etags[coding], f'"other", W/{etags[coding]}', "*"):
            again = client.get(url, headers={"accept-encoding": coding, "if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == etags[coding]
            assert "Accept-Encoding" in again.headers["vary"]
    assert etags["identity"] != etags["gzip"]
    assert client.get(url, headers={"if-none-match": etags["gzip"]}).status_code == 200

    gateway.publish(path, [{"2": 2}])
    changed = client.get(url, headers={"if-none-match": etags["identity"]})
    assert (changed.status_code, changed.json()) == (200, [{"2": 2}])


def test_head_tells_what_get_would(gateway):
    key = gateway.archive.add_file("CT_small.dcm").key
    gateway.publish(layout.study_metadata(key[0]), ["x" * 1000])
    client = gateway.start()
    for path in (f"/dicomweb/studies/{key[0]}/metadata", address(key), address(key, "/frames/1")):
        head, got = client.head(path), client.get(path)
        assert head.status_code == 200
        assert head.content == b""
        for name in ("content-length", "content-type", "etag"):
            assert head.headers[name] == got.headers[name], path


def test_a_large_document_is_streamed_whole(gateway):
    document = [f"{number:04}" * 50_000 for number in range(30)]
    gateway.publish(layout.study_metadata("1.2"), document)
    response = gateway.start().get("/dicomweb/studies/1.2/metadata")
    assert int(response.headers["content-length"]) > WHOLE_BYTES
    assert response.json() == document


def test_a_study_held_but_not_published_is_asked_for_and_waited_for(gateway):
    key = gateway.archive.add_file("CT_small.dcm").key
    asked = []

    def publish(study_uid):
        asked.append(study_uid)
        gateway.publish(layout.study_metadata(study_uid), [])

    response = gateway.start(request_publish=publish).get(f"/dicomweb/studies/{key[0]}/metadata")
    assert (response.status_code, response.json(), asked) == (200, [], [key[0]])


def test_the_wait_for_a_publish_is_bounded(gateway):
    key = gateway.archive.add_file("CT_small.dcm").key
    response = gateway.start(wait_seconds=0.1).get(f"/dicomweb/studies/{key[0]}/metadata")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert "not published yet" in response.json()["detail"]


def test_what_is_not_held_is_not_found(gateway):
    key = gateway.archive.add_file("CT_small.dcm").key
    gateway.publish(layout.study_metadata(key[0]), [])
    client = gateway.start()
    for path in (
        "/dicomweb/studies/9.9",
        "/dicomweb/studies/9.9/metadata",
        f"/dicomweb/studies/{key[0]}/series/9.9/metadata",
        address((*key[:2], "9.9")),
        address((*key[:2], "9.9"), "/metadata"),
        address((*key[:2], "9.9"), "/frames/1"),
        f"/dicomweb/studies/{key[0]}/bulkdata/{key[1]}/9.9/7FE00010",
        "/dicomweb/nothing",
    ):
        response = client.get(path)
        assert (response.status_code, response.headers["content-type"]) == (
            404,
            "application/problem+json",
        ), path
        assert response.json()["detail"]


def test_instance_metadata_is_read_from_the_file(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start()
    response = client.get(address(held.key, "/metadata"))
    (instance,) = response.json()
    assert instance["00080018"] == {"vr": "UI", "Value": [held.key.sop_uid]}
    assert instance["00083002"]["Value"] == [LITTLE]
    assert "00020010" not in instance
    bulk = client.get(instance["7FE00010"]["BulkDataURI"])
    assert bulk.content == pydicom.dcmread(SOURCES / "CT_small.dcm").PixelData
    again = client.get(address(held.key, "/metadata"), headers={"if-none-match": response.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize("level", ["study", "series"])
def test_metadata_in_xml_have_a_part_for_each_line_of_the_document(gateway, level):
    key = gateway.archive.add_file("CT_small.dcm").key
    path = {"study": layout.study_metadata(key[0]), "series": layout.series_metadata(*key[:2])}[level]
    numbers = ["-1024.50", "0.1", "1e3"]
    members = [b'{"00281052":{"vr":"DS","Value":[%b]}}' % number.encode() for number in numbers]
    gateway.publish_bytes(path, b"[" + b",\n".join(members) + b"]")
    client, url = gateway.start(), f"/dicomweb/{path.removesuffix('.gz')}"

    response = client.get(url, headers={"accept": XML, "accept-encoding": "gzip"})
    assert "content-encoding" not in response.headers
    parts = parts_of(response)
    assert {head for head, _ in parts} == {b"Content-Type: application/dicom+xml"}
    assert [read(body)["00281052"]["Value"] for _, body in parts] == [[number] for number in numbers]
    again = client.get(url, headers={"accept": XML, "if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = client.head(url, headers={"accept": XML})
    assert (head.content, head.headers["etag"]) == (b"", response.headers["etag"])
    assert "content-length" not in head.headers
    assert client.get(url).headers["etag"] != response.headers["etag"]


def test_large_metadata_in_xml_are_read_line_by_line(gateway):
    objects = [{"00104000": {"vr": "LT", "Value": [f"{number}" * 3 * CHUNK_BYTES]}} for number in range(9)]
    lines = b",\n".join(orjson.dumps(one) for one in objects)
    gateway.publish_bytes(layout.study_metadata("1.2"), b"[" + lines + b"]")
    response = gateway.start().get("/dicomweb/studies/1.2/metadata", headers={"accept": XML})
    assert [read(body) for _, body in parts_of(response)] == objects


def test_instance_metadata_in_xml_say_what_those_in_json_do(gateway):
    held = gateway.archive.add_file("MR_small_implicit.dcm")
    client, url = gateway.start(), address(held.key, "/metadata")
    of_json = client.get(url)
    response = client.get(url, headers={"accept": XML})
    ((head, body),) = parts_of(response)
    assert head == b"Content-Type: application/dicom+xml"
    (expected,) = json.loads(of_json.content, parse_float=str, parse_int=str)
    assert read(body) == as_text(expected)
    again = client.get(url, headers={"accept": XML, "if-none-match": response.headers["etag"]})
    assert again.status_code == 304
    assert of_json.headers["etag"] != response.headers["etag"]


def test_a_damaged_document_is_a_failure_for_a_person_to_look_at(gateway):
    gateway.publish(layout.study_metadata("1.2"), ["x" * 10_000])
    path = gateway.published / layout.study_metadata("1.2")
    path.write_bytes(path.read_bytes()[:-9])
    response = gateway.start().get("/dicomweb/studies/1.2/metadata")
    assert response.status_code == 500
    assert "verify" in response.json()["detail"]


# Addresses


def test_uids_in_addresses_are_checked_before_use(gateway):
    gateway.publish("secret.gz", ["secret"])
    client = gateway.start()
    for uid in ("1" * 65, "1%5C2", "1%202", "%00", "%C3%A9", "%FF"):
        response = client.get(f"/dicomweb/studies/{uid}/metadata")
        assert response.status_code == 400, uid
        assert "Study Instance UID" in response.json()["detail"]


@pytest.mark.parametrize("uid", ["..", "%2E%2E", "..%2F..%2Fsecret", "%2e%2e%2f%2e%2e%2fsecret", "....//"])
def test_no_address_leaves_the_tree(gateway, uid):
    gateway.publish("metadata.gz", ["secret"])
    gateway.publish("studies/metadata.gz", ["secret"])
    client = gateway.start()
    # A client resolves dots by itself: this one is told the path as raw bytes.
    url = client.base_url.copy_with(raw_path=f"/dicomweb/studies/{uid}/metadata".encode())
    response = client.get(url)
    assert response.status_code in (400, 404)
    assert b"secret" not in response.content


def test_a_uid_of_a_careless_device_is_reached_percent_encoded(gateway):
    with pydicom.config.disable_value_validation():
        dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
        dataset.StudyInstanceUID = "STUDY_%2F+?#"
        held = gateway.archive.add(dataset)
    path = address([quote(uid, safe="") for uid in held.key], "/frames/1")
    assert gateway.start().get(path).status_code == 200


# Instances


def test_an_instance_is_one_part_or_the_file_itself(gateway):
    held = gateway.archive.add_file("MR_small_implicit.dcm")
    file = (gateway.archive.root / held.path).read_bytes()
    client = gateway.start()

    response = client.get(
        address(held.key), headers={"accept": 'multipart/related; type="application/dicom"'}
    )
    ((head, body),) = parts_of(response)
    assert head == b"Content-Type: application/dicom; transfer-syntax=1.2.840.10008.1.2"
    assert body == file
    assert 'type="application/dicom"' in response.headers["content-type"]

    single = client.get(address(held.key), headers={"accept": "application/dicom"})
    assert single.headers["content-type"] == "application/dicom; transfer-syntax=1.2.840.10008.1.2"
    assert single.headers["content-disposition"].endswith(f'filename="{held.key.sop_uid}.dcm"')
    assert single.content == file
    assert pydicom.dcmread(BytesIO(single.content)).SOPInstanceUID == held.key.sop_uid


def test_an_instance_in_another_transfer_syntax_is_not_acceptable(gateway):
    held = gateway.archive.add_file("JPEG2000.dcm")
    client = gateway.start()
    accept = "application/dicom; transfer-syntax=1.2.840.10008.1.2.4.70"
    response = client.get(address(held.key), headers={"accept": accept})
    assert response.status_code == 406
    assert held.transfer_syntax_uid in response.json()["detail"]
    assert client.get(
        address(held.key), headers={"accept": "application/dicom; transfer-syntax=*"}
    ).is_success


def test_a_study_and_a_series_are_all_their_instances(gateway):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    files = []
    for number in range(30):
        dataset.SOPInstanceUID, dataset.InstanceNumber = f"1.2.3.{number}", number
        if number == 20:
            dataset.SeriesInstanceUID, dataset.SeriesNumber = "1.2.99", 99
        files.append((gateway.archive.root / gateway.archive.add(dataset).path).read_bytes())
    client = gateway.start()
    study = f"/dicomweb/studies/{dataset.StudyInstanceUID}"
    assert [body for _, body in parts_of(client.get(study))] == files
    assert [body for _, body in parts_of(client.get(f"{study}/series/1.2.99"))] == files[20:]
    assert client.get(study, headers={"accept": "application/dicom"}).status_code == 406


def test_a_large_instance_is_streamed(gateway):
    dataset, _ = large_dataset()
    held = gateway.archive.add(dataset)
    assert held.size > WHOLE_BYTES
    client = gateway.start()
    file = (gateway.archive.root / held.path).read_bytes()
    assert client.get(address(held.key), headers={"accept": "application/dicom"}).content == file
    ((_, body),) = parts_of(client.get(address(held.key)))
    assert body == file


def test_a_file_that_is_gone_is_told_before_anything_else_is(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    (gateway.archive.root / held.path).unlink()
    client = gateway.start()
    for rest in ("", "/metadata", "/frames/1"):
        response = client.get(address(held.key, rest))
        assert response.status_code == 500, rest
        assert str(gateway.archive.root) not in response.text


def test_a_file_that_goes_missing_on_the_way_cuts_the_answer(gateway):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    held = []
    for number in range(200):
        dataset.SOPInstanceUID, dataset.InstanceNumber = f"1.2.3.{number}", number
        held.append(gateway.archive.add(dataset))
    assert sum(one.size for one in held) > WHOLE_BYTES
    (gateway.archive.root / held[-1].path).unlink()
    client = gateway.start()
    with pytest.raises(Exception, match="peer closed connection without sending complete message body"):
        client.get(f"/dicomweb/studies/{dataset.StudyInstanceUID}")


def test_a_file_of_another_size_than_was_filed_is_not_served(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    with (gateway.archive.root / held.path).open("ab") as file:
        file.write(b"more")
    response = gateway.start().get(address(held.key))
    assert response.status_code == 500
    assert "verify" in response.json()["detail"]


# Frames


def test_a_native_frame_has_the_part_header_that_ohif_needs(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    response = gateway.start().get(address(held.key, "/frames/1"), headers={"accept": FRAMES})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(
        'multipart/related; type="application/octet-stream"; boundary='
    )
    ((head, body),) = parts_of(response)
    assert head == b"Content-Type: application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
    assert body == pydicom.dcmread(SOURCES / "CT_small.dcm").PixelData


def test_frames_come_in_the_order_asked_for(gateway):
    held = gateway.archive.add_file("SC_rgb_rle_2frame.dcm")
    dataset = pydicom.dcmread(SOURCES / "SC_rgb_rle_2frame.dcm")
    one, two = generate_frames(dataset.PixelData, number_of_frames=2)
    client = gateway.start()
    parts = parts_of(client.get(address(held.key, "/frames/2,1")))
    assert [body for _, body in parts] == [two, one]
    assert {head for head, _ in parts} == {
        b"Content-Type: application/octet-stream; transfer-syntax=1.2.840.10008.1.2.5"
    }


def test_a_compressed_frame_can_be_had_as_an_image(gateway):
    held = gateway.archive.add_file("JPEG2000.dcm")
    client, path = gateway.start(), address(held.key, "/frames/1")
    ((head, body),) = parts_of(client.get(path, headers={"accept": 'multipart/related; type="image/jp2"'}))
    assert head == f"Content-Type: image/jp2; transfer-syntax={held.transfer_syntax_uid}".encode()
    single = client.get(path, headers={"accept": "image/jp2"})
    assert single.headers["content-type"] == f"image/jp2; transfer-syntax={held.transfer_syntax_uid}"
    assert single.content == body
    refused = client.get(path, headers={"accept": "image/jpeg"})
    assert refused.status_code == 406


def test_a_single_part_is_for_those_who_ask_for_it(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start()
    single = client.get(address(held.key, "/frames/1"), headers={"accept": "application/octet-stream"})
    assert single.headers["content-type"] == f"application/octet-stream; transfer-syntax={LITTLE}"
    assert single.content == pydicom.dcmread(SOURCES / "CT_small.dcm").PixelData


@pytest.mark.parametrize(
    ("numbers", "status"),
    [("2", 404), ("0", 404), ("1,2", 404), ("one", 400), ("1,", 400), ("1,1", 400), ("1,01", 400)],
)
def test_frames_that_are_not_there_are_told_before_anything_is_sent(gateway, numbers, status):
    held = gateway.archive.add_file("CT_small.dcm")
    response = gateway.start().get(address(held.key, f"/frames/{numbers}"))
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


def test_what_the_client_has_is_not_sent_again(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start()
    bulk_path = f"/dicomweb/studies/{held.key[0]}/bulkdata/{held.key[1]}/{held.key[2]}/7FE00010"
    for path in (address(held.key), address(held.key, "/frames/1"), bulk_path):
        etag = client.get(path).headers["etag"]
        again = client.get(path, headers={"if-none-match": etag})
        assert (again.status_code, again.content) == (304, b""), path
        other = 'application/*, multipart/related;q=0.5; type="application/*"'
        assert client.get(path, headers={"accept": other}).headers["etag"] != etag


def test_many_frames_are_streamed(gateway):
    dataset, pixels = large_dataset(frames=3)
    held = gateway.archive.add(dataset)
    response = gateway.start().get(address(held.key, "/frames/3,1"))
    size = len(pixels) // 3
    assert [body for _, body in parts_of(response)] == [pixels[2 * size :], pixels[:size]]
    assert int(response.headers["content-length"]) == len(response.content) > WHOLE_BYTES


# Frames as files

GZIP = {"accept": FRAMES, "accept-encoding": "gzip"}


def publish_frames(gateway, held):
    """The frames of *held* as files, as they are published; the bytes of each file by its path."""
    with gateway.archive.open(held) as instance:
        files = instance_files(held.key, instance.dataset, held.transfer_syntax_uid, [])
        for path, pieces in files:
            body = b"".join(pieces)
            written = gateway.published / path
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(gzip.compress(body, mtime=0) if path.endswith(".gz") else body)


def held_series(archive, instances):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    for number in range(instances):
        dataset.SOPInstanceUID = f"1.2.3.{number}"
        dataset.PixelData = bytes([number]) * (128 * 128 * 2)
        yield archive.add(dataset)


def test_whoever_scrolls_is_answered_without_a_question_to_the_index(gateway):
    held = list(held_series(gateway.archive, 8))
    client = gateway.start()
    asked = []
    event.listen(gateway.archive.engine, "checkout", lambda *_: asked.append(1))
    questions = []
    for number, one in enumerate(held):
        response = client.get(address(one.key, "/frames/1"), headers={"accept": FRAMES})
        ((_, body),) = parts_of(response)
        assert body == bytes([number]) * (128 * 128 * 2)
        questions.append(len(asked))
        again = client.get(
            address(one.key, "/frames/1"),
            headers={"accept": FRAMES, "if-none-match": response.headers["etag"]},
        )
        assert again.status_code == 304
    assert questions[2:] == [questions[2]] * 6
    assert client.get(address(held[3].key, "/frames/2"), headers={"accept": FRAMES}).status_code == 404
    assert client.get(address(held[3].key, "/frames/1"), headers={"accept": "text/html"}).status_code == 406


def held_otherwise(archive):
    """Instances of one series whose frames take more than a look at the beginning of a file."""
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    pixels = dataset.PixelData
    dataset.SOPInstanceUID = "1.2.3.1"
    dataset.add_new(0x00091010, "OB", b"x" * 100_000)  # pixel data are far behind
    yield archive.add(dataset), pixels
    dataset.SOPInstanceUID = "1.2.3.2"
    del dataset[0x00091010]
    dataset.BitsAllocated, dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 1, 3, 3, 2
    dataset.PixelData = b"\xff\xff\x03\x00"
    yield archive.add(dataset), b"\xff\x01"  # the second begins within a byte
    dataset.SOPInstanceUID = "1.2.3.3"
    del dataset.PixelData
    yield archive.add(dataset), None


def test_a_frame_that_a_look_does_not_find_is_the_same_in_a_series_that_is_scrolled(gateway):
    first, second = held_series(gateway.archive, 2)
    others = list(held_otherwise(gateway.archive))
    client = gateway.start()
    for one in (first, second):
        client.get(address(one.key, "/frames/1"), headers={"accept": FRAMES})
    for held, expected in others:
        response = client.get(address(held.key, "/frames/1"), headers={"accept": FRAMES})
        if expected is None:
            assert response.status_code == 404
            continue
        ((_, body),) = parts_of(response)
        assert body == expected


@pytest.mark.parametrize("name", ["JPEG2000.dcm", "image_dfl.dcm", "ExplVR_BigEnd.dcm", "CT_small.dcm"])
def test_a_frame_is_the_same_however_often_it_is_asked_for(gateway, name):
    held = gateway.archive.add_file(name)
    client = gateway.start()
    answers = [client.get(address(held.key, "/frames/1"), headers={"accept": FRAMES}) for _ in range(4)]
    assert [one.status_code for one in answers] == [200] * 4
    assert len({(one.content, one.headers["etag"], one.headers["content-type"]) for one in answers}) == 1
    for _ in range(2):
        assert client.get(address(held.key, "/frames/0"), headers={"accept": FRAMES}).status_code == 404


def test_a_file_that_is_not_what_was_held_a_moment_ago_is_asked_for_anew(gateway):
    held = list(held_series(gateway.archive, 3))
    client = gateway.start()
    for one in held:
        assert client.get(address(one.key, "/frames/1"), headers={"accept": FRAMES}).status_code == 200
    path = gateway.archive.root / held[0].path
    (removed,) = gateway.archive.index.variants(*held[0].key)
    index = gateway.archive.index
    index.leave([Named(removed.key, removed.digest, removed.received_at, removed.receipts)], {}, index.name())
    path.unlink()
    for rest in ("", "/frames/1", "/metadata", "/rendered", "/frames/1/rendered"):
        response = client.get(address(held[0].key, rest))
        assert (response.status_code, rest) == (404, rest)
        assert "removed" in response.json()["detail"]

    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    dataset.SOPInstanceUID = held[1].key.sop_uid
    dataset.PixelData = b"\xff" * (128 * 128 * 2)
    (removed,) = index.variants(*held[1].key)
    index.leave([Named(removed.key, removed.digest, removed.received_at, removed.receipts)], {}, index.name())
    another = gateway.archive.add(dataset)
    assert another.path == held[1].path
    assert another.size == held[1].size
    response = client.get(address(another.key, "/frames/1"), headers={"accept": FRAMES})
    ((_, body),) = parts_of(response)
    assert body == dataset.PixelData


def test_a_frame_that_is_a_file_goes_out_as_it_lies(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    publish_frames(gateway, held)
    client, path = gateway.start(frame_files=True), address(held.key, "/frames/1")
    with client.stream("GET", path, headers=GZIP) as response:
        raw = b"".join(response.iter_raw())
    assert raw == (gateway.published / layout.frame_path(held.key, 1, compressed=False)).read_bytes()
    assert response.headers["content-encoding"] == "gzip"
    assert response.headers["vary"] == "Accept, Accept-Encoding"
    response = client.get(path, headers=GZIP)
    ((head, body),) = parts_of(response)
    assert head == b"Content-Type: application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
    assert body == pydicom.dcmread(SOURCES / "CT_small.dcm").PixelData
    again = client.get(path, headers=GZIP | {"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.head(path, headers=GZIP).status_code == 200


def test_a_compressed_frame_that_is_a_file_needs_no_gzip(gateway):
    held = gateway.archive.add_file("JPEG2000.dcm")
    publish_frames(gateway, held)
    client, path = gateway.start(frame_files=True), address(held.key, "/frames/1")
    response = client.get(path, headers={"accept": FRAMES})
    assert (
        response.content == (gateway.published / layout.frame_path(held.key, 1, compressed=True)).read_bytes()
    )
    assert "content-encoding" not in response.headers
    image = client.get(path, headers={"accept": "image/jp2"})
    assert image.content == parts_of(response)[0][1]
    assert client.get(path, headers={"accept": "image/jpeg"}).status_code == 406


def test_who_takes_no_gzip_gets_the_same_frame_out_of_the_instance(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    publish_frames(gateway, held)
    client, path = gateway.start(frame_files=True), address(held.key, "/frames/1")
    plain = client.get(path, headers={"accept": FRAMES})
    assert plain.headers["vary"] == "Accept, Accept-Encoding"
    filed = client.get(path, headers=GZIP)
    assert parts_of(plain) == parts_of(filed)
    assert plain.headers["etag"] != filed.headers["etag"]


def test_a_frame_without_a_file_is_read_out_of_the_instance(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    response = gateway.start(frame_files=True).get(address(held.key, "/frames/1"), headers=GZIP)
    assert parts_of(response)[0][1] == pydicom.dcmread(SOURCES / "CT_small.dcm").PixelData


@pytest.mark.parametrize(
    "spoil", [lambda data: b"", lambda data: b"no gzip", lambda data: gzip.compress(b"--x")]
)
def test_a_damaged_frame_file_is_said_to_be_damaged(gateway, spoil):
    held = gateway.archive.add_file("CT_small.dcm")
    publish_frames(gateway, held)
    path = gateway.published / layout.frame_path(held.key, 1, compressed=False)
    path.write_bytes(spoil(path.read_bytes()))
    response = gateway.start(frame_files=True).get(address(held.key, "/frames/1"), headers=GZIP)
    assert response.status_code == 500
    assert "verify" in response.json()["detail"]


# Ranges


@pytest.mark.parametrize("is_large", [False, True])
def test_an_instance_and_a_frame_alone_have_ranges(gateway, is_large):
    held = gateway.archive.add(large_dataset()[0]) if is_large else gateway.archive.add_file("CT_small.dcm")
    client = gateway.start()
    for rest, alone in (("", "application/dicom"), ("/frames/1", "application/octet-stream")):
        path, accept = address(held.key, rest), {"accept": alone}
        whole = client.get(path, headers=accept)
        size, etag = len(whole.content), whole.headers["etag"]
        assert (size > WHOLE_BYTES) is is_large
        assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
        for text, start, stop in (
            ("bytes=0-0", 0, 1),
            ("bytes=1000-", 1000, size),
            (f"bytes={size // 2}-{size // 2 + 9}", size // 2, size // 2 + 10),
            ("bytes=-7", size - 7, size),
            (f"bytes=0-{size}", 0, size),
        ):
            for condition in ({}, {"if-range": etag}):
                part = client.get(path, headers=accept | condition | {"range": text})
                assert part.status_code == 206, (rest, text)
                assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
                assert int(part.headers["content-length"]) == stop - start
                assert part.headers["etag"] == etag
                assert part.content == whole.content[start:stop]
        beyond = client.get(path, headers=accept | {"range": f"bytes={size}-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
        for passed_over in ({"range": "bytes=0-0", "if-range": '"other"'}, {"range": "bytes=0-1,3-4"}):
            assert client.get(path, headers=accept | passed_over).content == whole.content
        head = client.head(path, headers=accept | {"range": "bytes=0-0"})  # RFC 9110 14.2: of GET alone
        assert (head.status_code, int(head.headers["content-length"])) == (200, size)
        parts = client.get(path, headers={"range": "bytes=0-0"})
        assert (parts.status_code, "accept-ranges" in parts.headers) == (200, False)


def test_a_range_of_a_compressed_frame_is_of_its_bitstream(gateway):
    held = gateway.archive.add_file("JPEG2000.dcm")
    accept = {"accept": "image/jp2"}
    client = gateway.start()
    whole = client.get(address(held.key, "/frames/1"), headers=accept).content
    part = client.get(address(held.key, "/frames/1"), headers=accept | {"range": "bytes=2-9"})
    assert (part.status_code, part.content) == (206, whole[2:10])


# Bulk data


def test_bulk_data_is_a_single_part_or_multipart_and_has_ranges(gateway):
    dataset, pixels = large_dataset()
    held = gateway.archive.add(dataset)
    client = gateway.start()
    path = f"/dicomweb/studies/{held.key[0]}/bulkdata/{held.key[1]}/{held.key[2]}/7FE00010"

    whole = client.get(path)
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    assert whole.content == pixels
    ((head, body),) = parts_of(client.get(path, headers={"accept": FRAMES}))
    assert head == b"Content-Type: application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
    assert body == pixels

    for text, start, stop in (
        ("bytes=0-0", 0, 1),
        (f"bytes={CHUNK_BYTES - 1}-{CHUNK_BYTES}", CHUNK_BYTES - 1, CHUNK_BYTES + 1),
        ("bytes=1000-", 1000, len(pixels)),
        ("bytes=-7", len(pixels) - 7, len(pixels)),
    ):
        part = client.get(path, headers={"range": text})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(pixels)}"
        assert part.content == pixels[start:stop]

    beyond = client.get(path, headers={"range": f"bytes={len(pixels)}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(pixels)}")
    stale = client.get(path, headers={"range": "bytes=0-0", "if-range": '"other"'})
    assert stale.status_code == 200


def test_bulk_data_that_is_not_there_is_not_found(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start()
    for path in ("60003000", "00540016/1/00181078", "nonsense", ".."):
        url = f"/dicomweb/studies/{held.key[0]}/bulkdata/{held.key[1]}/{held.key[2]}/{path}"
        assert client.get(client.base_url.copy_with(raw_path=url.encode())).status_code == 404


def test_encapsulated_pixel_data_are_one_part_a_frame(gateway):
    held = gateway.archive.add_file("SC_rgb_rle_2frame.dcm")
    dataset = pydicom.dcmread(SOURCES / "SC_rgb_rle_2frame.dcm")
    client = gateway.start()
    path = f"/dicomweb/studies/{held.key[0]}/bulkdata/{held.key[1]}/{held.key[2]}/7FE00010"
    parts = parts_of(client.get(path))
    assert [body for _, body in parts] == list(generate_frames(dataset.PixelData, number_of_frames=2))
    assert {head for head, _ in parts} == {
        b"Content-Type: application/octet-stream; transfer-syntax=1.2.840.10008.1.2.5"
    }
    assert client.get(path, headers={"accept": "application/octet-stream"}).status_code == 406


@pytest.mark.parametrize(
    "name", ["image_dfl.dcm", "MR_small_bigendian.dcm", "liver_1frame.dcm", "MR_small_RLE.dcm"]
)
def test_pixel_data_and_frame_are_the_same_whatever_the_encoding(gateway, name):
    held = gateway.archive.add_file(name)
    client = gateway.start()
    (instance,) = client.get(address(held.key, "/metadata")).json()
    frame = client.get(address(held.key, "/frames/1"), headers={"accept": "application/octet-stream"})
    value = client.get(instance["7FE00010"]["BulkDataURI"], headers={"accept": "application/octet-stream"})
    assert frame.headers["content-type"] == value.headers["content-type"]
    assert value.content.rstrip(b"\0") == frame.content.rstrip(b"\0")
    dataset = pydicom.dcmread(SOURCES / name)
    if dataset.BitsAllocated > 1 and "RLE" not in name:
        dataset.convert_pixel_data()
        assert frame.content == dataset.pixel_array.astype(f"<u{dataset.BitsAllocated // 8}").tobytes()


def test_deflated_datasets_are_inflated_once_while_they_are_looked_at(gateway):
    held = gateway.archive.add_file("image_dfl.dcm")
    again = held._replace(digest=bytes(32))
    inflations = Inflations(kept=1)
    with gateway.archive.open(held) as instance:
        first = inflations.of(held, instance)
        assert first.transfer_syntax_uid == LITTLE
        assert inflations.of(held, instance).dataset is first.dataset
        assert inflations.of(again, instance).dataset is not first.dataset
        assert inflations.of(held, instance) == first


def test_a_deflated_dataset_that_went_bad_is_damage(gateway):
    held = gateway.archive.add_file("image_dfl.dcm")
    path = gateway.archive.root / held.path
    path.write_bytes(path.read_bytes()[:-500] + bytes(500))
    client = gateway.start()
    for rest in ("/frames/1", "/metadata"):
        assert client.get(address(held.key, rest)).status_code == 500, rest


def test_what_is_served_is_what_was_published_even_if_it_changes_meanwhile(gateway):
    gateway.publish(layout.study_metadata("1.2"), ["A" * 100])
    client = gateway.start()
    bodies = [["A" * 100], ["B" * 90_000], ["C" * 5_000_000]]
    for _ in range(5):
        for body in bodies:
            gateway.publish(layout.study_metadata("1.2"), body)
            response = client.get("/dicomweb/studies/1.2/metadata", headers={"accept-encoding": "gzip"})
            assert response.json() == body
            with client.stream("GET", "/dicomweb/studies/1.2/metadata") as begun:
                gateway.publish(layout.study_metadata("1.2"), ["D"])
                assert orjson.loads(b"".join(begun.iter_bytes())) == body
    assert gzip.decompress((gateway.published / layout.study_metadata("1.2")).read_bytes()) == b'["D"]'
