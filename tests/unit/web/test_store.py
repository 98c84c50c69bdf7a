"""STOW-RS, PS3.18 section 10.5: what is stored, what is answered, and what becomes of everything else."""

import asyncio
import errno
import gzip
import itertools
import json
import os
import socket
import struct
import threading
import zlib
from contextlib import closing
from io import BytesIO

import httpx
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import dcmwrite
from structlog.testing import capture_logs

from dicomscp.archive.archive import Claim, Source
from dicomscp.dicom.dataset import read_json
from dicomscp.dicom.part10 import Origin, Receipt, file_meta, read_file_meta
from dicomscp.dicom.xmlmodel import native_model
from dicomscp.disk import Disk
from dicomscp.errors import BusyError, RefusedError
from dicomscp.web.app import WebSettings, create_app
from dicomscp.web.decoders import Decoders, Limits
from dicomscp.web.server import bind, serve
from dicomscp.web.store import BLOCK_BYTES
from tests.processes import peak_rss_bytes, reset_peak_rss, wait_until
from tests.unit.dicom.nativemodel import as_text, read
from tests.unit.web.held import SOURCES
from tests.unit.web.storing import BOUNDARY, StoringArchive, multipart, said

CT = (SOURCES / "CT_small.dcm").read_bytes()
MR = (SOURCES / "MR_small.dcm").read_bytes()
SOP_INSTANCE = "00080018"
RETRIEVE_URL, FAILED, REFERENCED, OTHERS = "00081190", "00081198", "00081199", "0008119A"
FAILURE_REASON, SOP_CLASS_UID, SOP_UID = "00081197", "00081150", "00081155"
# Of these pydicom reads what is there, and some of it is not.
CUT_SHORT = {
    "GH179B.dcm",
    "MR_truncated.dcm",
    "emri_small_jpeg_2k_lossless_too_short.dcm",
    "rtplan_truncated.dcm",
}
STUDY_UID = pydicom.dcmread(SOURCES / "CT_small.dcm").StudyInstanceUID


class FailingDisk(Disk):
    """A disk whose next syncs, or writes, fail when told to."""

    def __init__(self):
        self.syncs, self.fail_syncs, self.crash, self.free, self.looked = [], False, False, 1 << 40, 0

    def sync(self, descriptor):
        self.syncs.append(descriptor)
        if self.fail_syncs:
            raise OSError(errno.EIO, "Input/output error")
        super().sync(descriptor)

    def open_direct(self, path):
        if self.crash:
            raise ValueError("a defect")
        return super().open_direct(path)

    def free_bytes(self, path):
        self.looked += 1
        return self.free


class Storing:
    """The application on a real server, over an archive that receives."""

    def __init__(self, root):
        self.root, self.threads = root, []
        self.stop = threading.Event()
        self.disk = FailingDisk()
        self.archive = None

    def start(self, *, reserve_bytes=0, inline_bytes=64 << 10, max_variants=3, web=None, **settings):
        self.archive = StoringArchive(
            self.root,
            self.disk,
            reserve_bytes=reserve_bytes,
            inline_bytes=inline_bytes,
            max_variants=max_variants,
        )
        self.decoders = Decoders(Limits())
        app = create_app(
            self.archive.archive,
            WebSettings(store=self.archive.settings(**settings), **(web or {})),
            self.root / "dicomweb",
            self.root / "state",
            self.decoders,
        )
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(
            target=serve, args=(app, self.socket, self.stop), kwargs={"drain_seconds": 2}
        )
        self.thread.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        return self

    def post(self, body, fields=None, *, study_uid="", **more):
        address = "/dicomweb/studies" + (f"/{study_uid}" if study_uid else "")
        return self.client.post(address, content=body, headers={**(fields or said()), **more})

    def begin(self, body, length, fields=None):
        """A connection on which *body* was sent, of *length* bytes that are promised."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        fields = {**(fields or said()), "host": "localhost"}
        if length is not None:
            fields["content-length"] = length
        lines = [f"{name}: {value}" for name, value in fields.items()]
        head = "\r\n".join(["POST /dicomweb/studies HTTP/1.1", *lines, "", ""])
        connection.sendall(head.encode() + body)
        return connection

    def dataset_of(self, item):
        """The bytes of the dataset that the item of a response says is stored."""
        answer = self.client.get(item[RETRIEVE_URL]["Value"][0], headers={"accept": "application/dicom"})
        return dataset_of(answer.content)

    def end(self):
        if self.archive:
            self.client.close()
            self.stop.set()
            self.thread.join(20)
            assert not self.thread.is_alive()
            self.socket.close()
            self.decoders.close()
            self.archive.close()


@pytest.fixture
def storing(tmp_path):
    storing = Storing(tmp_path)
    yield storing
    storing.end()


def dataset_of(file):
    return file[read_file_meta(file).dataset_offset :]


def instance(number=1, *, study_uid="1.2", size=0, syntax="1.2.840.10008.1.2.1"):
    """A Part 10 file of its own."""
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, f"{study_uid}.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{study_uid}.1.{number}"
    if size:
        dataset.PixelData = bytes(size)
    buffer = DicomBytesIO()
    dcmwrite(buffer, dataset)
    return buffer.getvalue().replace(b"1.2.840.10008.1.2.1\0", syntax.encode().ljust(20, b"\0"), 1)


def items(answer, sequence):
    return answer.json().get(sequence, {}).get("Value", [])


def reasons(answer, sequence=FAILED):
    return [item[FAILURE_REASON]["Value"][0] for item in items(answer, sequence)]


# What is stored


def test_all_instances_are_stored_byte_for_byte_and_named(storing):
    """Table 10.5.3-1: 200; table I.1-1: what the response names."""
    storing.start()
    answer = storing.post(multipart([CT, MR]))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/dicom+json")
    assert answer.json().keys() == {RETRIEVE_URL, REFERENCED}
    assert answer.json()[RETRIEVE_URL] == {"vr": "UR"}  # of two studies there is none
    assert "location" not in answer.headers
    storing.archive.file()
    for item, sent in zip(items(answer, REFERENCED), (CT, MR), strict=True):
        dataset = pydicom.dcmread(DicomBytesIO(sent), specific_tags=["SOPClassUID", "SOPInstanceUID"])
        assert item[SOP_CLASS_UID]["Value"] == [dataset.SOPClassUID]
        assert item[SOP_UID]["Value"] == [dataset.SOPInstanceUID]
        assert storing.dataset_of(item) == dataset_of(sent)


def test_where_all_are_of_one_study_the_response_says_where_that_is(storing):
    storing.start()
    answer = storing.post(multipart([CT]), study_uid=STUDY_UID)
    assert answer.status_code == 200
    assert answer.json()[RETRIEVE_URL] == {"vr": "UR", "Value": [f"/dicomweb/studies/{STUDY_UID}"]}
    assert answer.headers["location"] == f"http://127.0.0.1:{storing.port}/dicomweb/studies/{STUDY_UID}"


def test_the_receipt_says_by_which_door_it_came(storing):
    storing.start(calling_ae="UPLOADS")
    storing.post(multipart([CT]))
    storing.archive.file()
    (path,) = (storing.root / "instances").rglob("*.dcm")
    receipt = read_file_meta(path.read_bytes()).receipt
    assert (receipt.origin, receipt.calling_ae, receipt.called_ae) == (Origin.STOW_RS, "UPLOADS", "")


def test_one_instance_may_be_the_whole_body(storing):
    storing.start()
    answer = storing.post(CT, {"content-type": "application/dicom"})
    assert answer.status_code == 200
    storing.archive.file()
    assert storing.dataset_of(items(answer, REFERENCED)[0]) == dataset_of(CT)


def check_files(folder, files):
    """Whatever of *files* is an instance is stored, and comes back with the same bytes; how many are.

    Of those that have one SOP Instance UID each goes into an archive of its own: what is held already has
    a say in what becomes of the next.
    """
    stored, waiting = 0, files
    while waiting:
        root = folder / str(len(waiting))
        root.mkdir()
        storing = Storing(root)
        try:
            taken, waiting = store_files(storing.start(), waiting)
        finally:
            storing.end()
        stored += taken
    return stored


def store_files(storing, files):
    """How many are stored, and those that have the UID of one before."""
    sent, waiting = {}, []
    for path in files:
        try:
            sop_uid = read_file_meta(path.read_bytes()).sop_uid
        except RefusedError:
            sop_uid = path.name
        waiting.append(path) if sop_uid in sent else sent.update({sop_uid: path})
    paths, stored = list(sent.values()), {}
    for start in range(0, len(paths), 16):
        answer = storing.post(multipart([path.read_bytes() for path in paths[start : start + 16]]))
        assert answer.status_code in (200, 202, 409), answer.text
        stored |= {item[SOP_UID]["Value"][0]: item for item in items(answer, REFERENCED)}
    storing.archive.file()
    for sop_uid, path in sent.items():
        if sop_uid in stored:
            assert storing.dataset_of(stored[sop_uid]) == dataset_of(path.read_bytes()), path
        else:
            assert path.name in CUT_SHORT or not is_instance(path.read_bytes()), path
    return len(stored), waiting


def is_instance(data):
    """Whether *data* has what an instance must have to be filed, read by pydicom."""
    try:
        dataset = pydicom.dcmread(DicomBytesIO(data), stop_before_pixels=True)
    except (InvalidDicomError, EOFError):
        return False
    names = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    return all(dataset.get(name) for name in names)


def test_every_readable_file_of_pydicom_comes_back_with_the_same_dataset(tmp_path):
    assert check_files(tmp_path, sorted(SOURCES.rglob("*.dcm"))) > 60


def test_every_readable_file_of_the_collection_does(tmp_path, shared_data):
    files = [path for path in sorted(shared_data.rglob("*")) if path.is_file() and path.suffix != ".tsv"]
    assert check_files(tmp_path, files) > 0


@pytest.mark.parametrize("inline_bytes", [0, 1 << 20])
def test_a_part_goes_by_the_journal_or_by_a_slot(storing, inline_bytes):
    storing.start(inline_bytes=inline_bytes)
    sent = [instance(1), instance(2, size=3 * BLOCK_BYTES + 2), instance(3)]
    answer = storing.post(multipart(sent))
    assert answer.status_code == 200
    storing.archive.file()
    for item, file in zip(items(answer, REFERENCED), sent, strict=True):
        assert storing.dataset_of(item) == dataset_of(file)


def test_a_body_may_come_in_chunks_of_any_size(storing):
    storing.start()
    body = multipart([instance(1), instance(2)])
    for size in (100, 1 << 18):
        pieces = (body[start : start + size] for start in range(0, len(body), size))
        answer = storing.post(pieces)  # without Content-Length: Transfer-Encoding is chunked
        assert answer.status_code == 200
        assert len(items(answer, REFERENCED)) == 2


def test_the_same_sent_again_is_stored_again(storing):
    """Success for what is held already, as for a C-STORE; nothing changes."""
    storing.start()
    assert [storing.post(multipart([CT])).status_code for _ in range(3)] == [200] * 3
    storing.archive.file()
    assert len(list((storing.root / "instances").rglob("*.dcm"))) == 1


# What is not stored


def test_an_instance_that_fails_is_named_and_the_others_are_stored(storing):
    """Table 10.5.3-1: 202; table I.1-1: Failed SOP Sequence and Other Failures Sequence."""
    storing.start()
    cut = instance(1)[:-100]
    answer = storing.post(
        multipart([cut, b"no DICOM", instance(2), b"", instance(3, syntax="1.2.840.10008.1.2.7.1")])
    )
    assert answer.status_code == 202
    assert [item[SOP_UID]["Value"] for item in items(answer, REFERENCED)] == [["1.2.1.2"]]
    assert [item[SOP_UID]["Value"] for item in items(answer, FAILED)] == [["1.2.1.1"], ["1.2.1.3"]]
    assert {tuple(item) for item in items(answer, FAILED)} == {(SOP_CLASS_UID, SOP_UID, FAILURE_REASON)}
    assert reasons(answer) == [0xC000, 0xC122]
    assert reasons(answer, OTHERS) == [0xC000, 0xC000]
    warnings = answer.headers.get_list("warning")
    assert any("C000 The dataset is cut short" in warning for warning in warnings), warnings
    assert all(warning.startswith(f"299 http://127.0.0.1:{storing.port}/dicomweb: ") for warning in warnings)


def test_the_study_of_the_address_is_that_of_each_instance(storing):
    """Section 10.5.1.1.1: each representation shall have the same Study Instance UID; 10.5.3.1: else 409."""
    storing.start()
    answer = storing.post(multipart([instance(1, study_uid="1.2")]), study_uid="1.3")
    assert (answer.status_code, reasons(answer)) == (409, [0xA900])
    assert answer.json()[RETRIEVE_URL] == {"vr": "UR"}
    answer = storing.post(
        multipart([instance(1, study_uid="1.2"), instance(1, study_uid="1.3")]), study_uid="1.3"
    )
    assert (answer.status_code, reasons(answer)) == (202, [0xA900])
    storing.archive.file()
    assert storing.client.get("/dicomweb/studies/1.2").status_code == 404
    assert storing.client.get("/dicomweb/studies/1.3").status_code == 200


def test_too_many_variants_of_an_instance(storing):
    storing.start()
    statuses = []
    for size in (2, 4, 6, 8):
        answer = storing.post(multipart([instance(1, size=size)]))
        storing.archive.file()
        statuses.append((answer.status_code, reasons(answer)))
    assert statuses == [(200, [])] * 3 + [(409, [0xA700])]
    assert storing.post(multipart([instance(1, size=2)])).status_code == 200


# Malformed bodies


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"--" + BOUNDARY.encode() + b"--\r\n", id="no part"),
        pytest.param(multipart([CT]).replace(b"\r\n", b"\n"), id="line feeds alone"),
        pytest.param(multipart([CT]).replace(BOUNDARY.encode(), b"another"), id="another boundary"),
        pytest.param(multipart([CT])[: -len(BOUNDARY) - 8], id="no closing boundary"),
        pytest.param(multipart([CT], heads=["no field\r\n"]), id="no header field"),
        pytest.param(multipart([CT], heads=["a: " + "b" * (17 << 10) + "\r\n"]), id="giant header"),
        pytest.param(multipart([CT])[:2000], id="cut short"),
    ],
)
def test_a_body_without_a_whole_part_is_a_bad_request(storing, body):
    """Table 10.5.3-1: 400, unable to store any instances due to bad syntax."""
    storing.start()
    answer = storing.post(body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json()["detail"]
    storing.archive.file()
    assert not list((storing.root / "instances").rglob("*.dcm"))
    assert not storing.archive.slots()


def test_what_came_whole_before_a_body_broke_off_is_stored(storing):
    storing.start()
    answer = storing.post(multipart([instance(1), instance(2)])[:-60])
    assert answer.status_code == 202
    assert [item[SOP_UID]["Value"] for item in items(answer, REFERENCED)] == [["1.2.1.1"]]
    assert reasons(answer, OTHERS) == [0xC000]


def test_lenient_framing_is_read(storing):
    """RFC 2046 section 5.1.1: preamble, epilogue, white space behind a boundary; parts need no header."""
    storing.start()
    body = multipart([CT], heads=[""]).replace(b"--a-boundary\r\n", b"a preamble\r\n--a-boundary \t\r\n", 1)
    assert storing.post(body + b"an epilogue").status_code == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ('multipart/related; type="application/dicom"; boundary="a-boundary"', 200),
        ("Multipart/Related; Boundary=a-boundary; type=application/dicom", 200),
        ("multipart/related; boundary=a-boundary", 200),
        ('multipart/related; type="application/dicom; transfer-syntax=*"; boundary=a-boundary', 200),
        ("multipart/related; type=application/dicom", 400),
        ('multipart/related; type=application/dicom; boundary="a\tb"', 400),
        (f"multipart/related; type=application/dicom; boundary={'b' * 300}", 400),
        ("multipart/related; type=application/pdf; boundary=a-boundary", 415),
        ("multipart/form-data; boundary=a-boundary", 415),
        ("text/plain", 415),
        ("", 415),
        ("nonsense", 415),
    ],
)
def test_which_payloads_are_taken(storing, content_type, status):
    """Table 10.5.3-1: 415.  What a page of another origin may send unasked is none of these (CORS)."""
    storing.start()
    assert storing.post(multipart([CT]), {"content-type": content_type}).status_code == status


def test_a_body_may_be_deflated(storing):
    """PS3.18 table 10.5.1-2: Content-Encoding is supported."""
    storing.start(max_body_bytes=1 << 20)
    body, gzipped = multipart([instance(1), instance(2)]), {"content-encoding": "gzip"}
    whole = gzip.compress(body)
    for blocks in ([whole], [bytes([byte]) for byte in whole]):
        answer = storing.post(iter(blocks), said() | gzipped)
        assert (answer.status_code, len(items(answer, REFERENCED))) == (200, 2)
    storing.archive.file()
    assert storing.dataset_of(items(answer, REFERENCED)[1]) == dataset_of(instance(2))
    alone = gzip.compress(instance(3))
    assert storing.post(alone, {"content-type": "application/dicom"} | gzipped).status_code == 200
    # What came whole before it broke off is stored, as it is without a coding.
    for sent, status in ((whole[: len(whole) // 2], (202, 400)), (body, (400,)), (b"", (400,))):
        assert storing.post(sent, said() | gzipped).status_code in status
    for sent in (whole + whole, whole + b"more"):
        assert storing.post(sent, said() | gzipped).status_code in (202, 400)
    bomb = gzip.compress(bytes(3 * BLOCK_BYTES))
    assert storing.post(bomb, {"content-type": "application/dicom"} | gzipped).status_code == 413


def test_what_a_deflated_block_holds_is_taken_in_blocks(storing):
    storing.start()
    sent = instance(1, size=3 * BLOCK_BYTES + 4)
    answer = storing.post(gzip.compress(multipart([sent])), said() | {"content-encoding": "gzip"})
    assert answer.status_code == 200
    storing.archive.file()
    assert storing.dataset_of(items(answer, REFERENCED)[0]) == dataset_of(sent)


def test_a_body_with_another_content_coding_is_not_taken(storing):
    storing.start()
    answer = storing.post(multipart([CT]), said() | {"content-encoding": "br"})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, identity")


# Limits


def test_a_body_that_says_it_is_too_large_is_not_read(storing):
    storing.start(max_body_bytes=1 << 20)
    with closing(storing.begin(b"", (1 << 20) + 1)) as connection:
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_turns_out_too_large_is_not_read_on(storing):
    storing.start(max_body_bytes=1 << 20)
    answer = storing.post(iter([multipart([instance(1, size=2 << 20)])]))
    assert (answer.status_code, "web.store.max_body" in answer.json()["detail"]) == (413, True)
    answer = storing.post(iter([multipart([instance(1), instance(2, size=2 << 20)])]))
    assert answer.status_code == 413  # all of it came as one block
    assert not storing.archive.slots()


def test_a_part_that_is_too_large_fails_alone(storing):
    storing.start(max_part_bytes=1 << 20, inline_bytes=0)
    large = instance(1, size=3 << 20)
    answer = storing.post(multipart([large, instance(2)]))
    assert (answer.status_code, reasons(answer)) == (202, [0xA700])
    answer = storing.post(multipart([large]))
    assert (answer.status_code, reasons(answer)) == (413, [0xA700])
    storing.archive.file()
    assert len(list((storing.root / "instances").rglob("*.dcm"))) == 1


def test_a_body_of_too_many_parts_is_not_read_on(storing):
    storing.start(max_parts=3)
    answer = storing.post(multipart([instance(1), b"", b"", b"", b""]))
    assert answer.status_code == 202
    assert reasons(answer, OTHERS) == [0xC000, 0xC000, 0xA700]
    assert storing.post(multipart([b""] * 4)).status_code == 413


def test_while_the_disk_is_below_its_reserve_nothing_is_read(storing):
    storing.start(reserve_bytes=1 << 30)
    storing.disk.free = 1 << 20
    with closing(storing.begin(b"", 1 << 30)) as connection:
        answer = connection.recv(1 << 12)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: " in answer


def test_when_the_disk_fails_nothing_is_said_to_be_stored(storing):
    storing.start()
    storing.disk.fail_syncs = True
    answer = storing.post(multipart([instance(1), instance(2)]))
    assert (answer.status_code, reasons(answer)) == (503, [0xA700, 0xA700])
    assert int(answer.headers["retry-after"]) > 0
    storing.disk.fail_syncs = False
    storing.archive.file()
    assert not list((storing.root / "instances").rglob("*.dcm"))
    assert storing.post(multipart([instance(1), instance(2)])).status_code == 200


def test_instances_of_a_block_share_a_sync(storing):
    storing.start(inline_bytes=1 << 20)
    storing.post(multipart([instance(0)]))
    before = len(storing.disk.syncs)
    assert storing.post(multipart([instance(number) for number in range(1, 21)])).status_code == 200
    assert len(storing.disk.syncs) == before + 1


# Slow clients, aborted uploads, many at a time


def test_a_client_that_stalls_loses_its_place_and_what_it_began(storing):
    storing.start(block_seconds=0.3, inline_bytes=0)
    whole = instance(1)
    body = multipart([whole, instance(2)])
    with closing(storing.begin(body[: len(whole) + 4000], len(body))) as connection:
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 408 ")
    assert storing.post(multipart([instance(3)])).status_code == 200
    storing.archive.file()
    assert len(list((storing.root / "instances").rglob("*.dcm"))) == 1


def test_an_upload_that_is_broken_off_leaves_nothing_of_a_part_begun(storing):
    storing.start(inline_bytes=0)
    first, second = instance(1, size=2 << 20), instance(2, size=4 << 20)
    body = multipart([first, second])
    with closing(storing.begin(body[: len(first) + (3 << 20)], len(body))):
        wait_until(lambda: len(storing.archive.slots()) == 2, 10, "both parts to be under way")
    wait_until(lambda: len(storing.archive.slots()) == 1, 10, "what was begun to be discarded")
    storing.archive.file()
    (held,) = (storing.root / "instances").rglob("*.dcm")
    assert dataset_of(held.read_bytes()) == dataset_of(first)  # it was whole: sent again it is the same
    assert storing.post(body).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_one_instance_is_whole_or_nothing(storing, chunked):
    """Cut between two elements it still looks like one: the connection's end is not the body's."""
    storing.start()
    file = instance(1)
    cut = file[: file.index(b"\xe0\x7f\x10\x00")]
    fields = {"content-type": "application/dicom"}
    with capture_logs() as logs:
        if chunked:
            fields["transfer-encoding"] = "chunked"
            connection = storing.begin(b"%x\r\n%b\r\n" % (len(cut), cut), None, fields)
        else:
            connection = storing.begin(cut, len(file), fields)
        connection.close()
        is_cut = {"store_cut_short"}.issubset
        wait_until(lambda: is_cut(line["event"] for line in logs), 10, "the request to have ended")
    storing.archive.file()
    assert list((storing.root / "instances").rglob("*.dcm")) == []


def test_more_requests_than_may_be_wait_and_then_are_told_to_come_again(storing):
    storing.start(max_requests=1, wait_seconds=0.2)
    body = multipart([instance(1)])
    with closing(storing.begin(body[:100], len(body))) as connection:
        answer = storing.post(multipart([instance(2)]))
        assert (answer.status_code, int(answer.headers["retry-after"]) > 0) == (503, True)
        connection.sendall(body[100:])
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 200 ")
    assert storing.post(multipart([instance(2)])).status_code == 200


def test_clients_that_store_at_once_are_each_told_of_their_own(storing):
    storing.start(max_requests=4)
    answers = {}

    def send(study):
        body = multipart([instance(number, study_uid=f"1.{study}") for number in range(10)])
        answers[study] = httpx.post(
            f"http://127.0.0.1:{storing.port}/dicomweb/studies/1.{study}",
            content=body,
            headers=said(),
            timeout=30,
        )

    threads = [threading.Thread(target=send, args=(study,)) for study in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for study, answer in answers.items():
        named = [item[SOP_UID]["Value"][0] for item in items(answer, REFERENCED)]
        assert (answer.status_code, named) == (200, [f"1.{study}.1.{number}" for number in range(10)])


def test_memory_does_not_grow_with_a_part(storing):
    storing.start()
    size = 96 << 20
    head = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    file = instance(1, size=4)
    place = file.rindex(struct.pack("<L", 4), 0, -4)
    file = file[:place] + struct.pack("<L", size)
    block = bytes(1 << 20)
    body = itertools.chain(
        (head, file), (block for _ in range(size >> 20)), (f"\r\n--{BOUNDARY}--".encode(),)
    )
    storing.post(multipart([instance(2)]))
    reset_peak_rss(os.getpid())
    before = peak_rss_bytes(os.getpid())
    assert storing.post(body).status_code == 200
    assert peak_rss_bytes(os.getpid()) - before < 24 << 20


# Answers


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "application/dicom+json"),
        ("*/*", "application/dicom+json"),
        ("application/json", "application/json"),
        ("application/dicom+xml", "application/dicom+xml"),
        ("application/dicom+json;q=0.1, application/dicom+xml", "application/dicom+xml"),
        ('multipart/related; type="application/dicom+xml"', "multipart/related"),
    ],
)
def test_the_response_is_of_the_media_type_that_is_accepted(storing, accept, content_type):
    """Table 10.5.4-1; XML is taken as one document too, as it was before there was that table."""
    storing.start()
    storing.client.headers.pop("accept")
    answer = storing.post(multipart([CT, b"junk"]), **({"accept": accept} if accept else {}))
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (202, content_type)
    if "json" in content_type:
        assert reasons(answer, OTHERS) == [0xC000]
        return
    document = answer.content[answer.content.index(b"<?xml") : answer.content.rindex(b">") + 1]
    model = read(document)
    assert model[REFERENCED]["Value"][0][SOP_UID]["Value"] == [
        pydicom.dcmread(SOURCES / "CT_small.dcm").SOPInstanceUID
    ]
    (failure,) = model[OTHERS]["Value"]
    assert as_text(failure) == {FAILURE_REASON: {"vr": "US", "Value": ["49152"]}}


def test_an_answer_that_cannot_be_given_is_told_before_anything_is_read(storing):
    storing.start()
    fields = said(accept="text/html")
    with closing(storing.begin(b"", 1 << 30, fields)) as connection:
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 406 ")


def test_pages_of_listed_origins_may_store(storing):
    storing.start(web={"cors_origins": ("https://viewer.example.org",)})
    asked = {"origin": "https://viewer.example.org", "access-control-request-headers": "content-type"}
    answer = storing.client.options(
        "/dicomweb/studies", headers={**asked, "access-control-request-method": "POST"}
    )
    assert answer.status_code == 200
    assert "POST" in answer.headers["access-control-allow-methods"]


def test_a_study_uid_that_cannot_be_filed_is_a_bad_request(storing):
    storing.start()
    assert storing.post(multipart([CT]), study_uid="a%5Cb").status_code == 400


def test_it_is_counted_as_other_intakes_are(storing):
    storing.start(calling_ae="UPLOADS")
    storing.post(multipart([CT, b"junk"]))
    counted = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in (storing.archive.metrics._instances, storing.archive.metrics._refused)
        for sample in next(iter(metric.collect())).samples
    }
    assert counted["dicomscp_received_instances_total", "UPLOADS"] == 1
    assert counted["dicomscp_refused_instances_total", "refused"] == 1


# Metadata and bulk data


def metadata(number, **more):
    """The metadata of an instance."""
    values = {"00080016": "1.2.840.10008.5.1.4.1.1.7", "00080018": f"1.2.1.{number}"}
    values |= {"0020000D": "1.2", "0020000E": "1.2.1"}
    return {tag: {"vr": "UI", "Value": [uid]} for tag, uid in values.items()} | more


def pixels(uri):
    return {"7FE00010": {"vr": "OW", "BulkDataURI": uri}}


def bulk_head(uri, content_type="application/octet-stream"):
    return f"Content-Type: {content_type}\r\nContent-Location: {uri}\r\n"


def with_metadata(objects, *bulk, kind="json"):
    """A body of metadata, and of parts of bulk data: heads and contents."""
    if kind == "json":
        texts = [json.dumps(objects).encode()]
    else:
        texts = [native_model(read_json(json.dumps(one).encode())).document for one in objects]
    head = f"Content-Type: application/dicom+{kind}\r\n"
    return multipart(
        [*texts, *(data for _, data in bulk)], heads=[head] * len(texts) + [head for head, _ in bulk]
    )


def stored_dataset(storing, item):
    data = storing.dataset_of(item)
    return pydicom.filereader.read_dataset(DicomBytesIO(data), is_implicit_VR=False, is_little_endian=True)


@pytest.mark.parametrize("kind", ["json", "xml"])
def test_metadata_and_bulk_data_become_instances(storing, kind):
    """Section 10.5.1.4; a BulkDataURI names the part with that Content-Location, relative or not."""
    storing.start()
    frame = next(generate_frames(pydicom.dcmread(SOURCES / "JPEG2000.dcm").PixelData, number_of_frames=1))
    name = {"00100010": {"vr": "PN", "Value": [{"Alphabetic": "Müller"}]}}
    large = os.urandom(3 * BLOCK_BYTES + 1)
    body = with_metadata(
        [
            metadata(1, **pixels("bulk/1"), **name),
            metadata(2, **pixels(f"http://127.0.0.1:{storing.port}/dicomweb/bulk/2")),
            metadata(3),
        ],
        (bulk_head("bulk/2", "image/jp2"), frame),
        (bulk_head("bulk/1"), large),
        kind=kind,
    )
    answer = storing.post(body, said(f"application/dicom+{kind}"))
    assert answer.status_code == 200
    storing.archive.file()
    first, second, third = (stored_dataset(storing, item) for item in items(answer, REFERENCED))
    assert (first.PatientName, first.PixelData) == ("Müller", large + b"\0")
    assert next(generate_frames(second.PixelData, number_of_frames=1)).rstrip(b"\0") == frame.rstrip(b"\0")
    assert second.Rows == 1024  # as the image says
    assert "PixelData" not in third


def image_file(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep_colour():
    """A PNG of one pixel, 16 bits a colour, which Pillow does not write."""
    chunks = [
        (b"IHDR", struct.pack(">2L5B", 1, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(7))),
        (b"IEND", b""),
    ]
    framed = [
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_png_and_gif_become_native_pixels_without_loss(storing):
    """PS3.18 table 10.5.2-1: they shall be transformed; the notes below it say what becomes of what."""
    rng = np.random.default_rng(1)
    grey8, grey16 = rng.integers(0, 256, (5, 7), np.uint8), rng.integers(0, 1 << 16, (5, 7), np.uint16)
    colour = rng.integers(0, 256, (5, 7, 3), np.uint8)
    alpha = np.dstack([colour, rng.integers(0, 256, (5, 7), np.uint8)])
    palette = Image.fromarray(colour).quantize(16)
    frames = [Image.fromarray(rng.integers(0, 256, (5, 7), np.uint8)) for _ in range(3)]
    moving = [Image.fromarray(np.dstack([np.asarray(one)] * 3)).quantize(35) for one in frames]
    shown = [np.asarray(one.convert("RGB")) for one in moving]
    sent = {
        "1": ("png", image_file(Image.fromarray(grey8), "PNG"), grey8),
        "2": ("png", image_file(Image.fromarray(grey16), "PNG"), grey16),
        "3": ("png", image_file(Image.fromarray(colour), "PNG"), colour),
        "4": ("png", image_file(Image.fromarray(alpha), "PNG"), colour),  # note 5
        "5": ("png", image_file(palette, "PNG", transparency=0), np.asarray(palette.convert("RGB"))),
        "6": ("png", image_file(Image.fromarray(grey8 > 99), "PNG"), (grey8 > 99) * np.uint8(255)),
        "7": ("gif", image_file(palette, "GIF"), np.asarray(palette.convert("RGB"))),
        "8": (
            "gif",
            image_file(moving[0], "GIF", save_all=True, append_images=moving[1:]),
            np.stack(shown),  # note 3
        ),
    }
    refused = {
        "20": ("png", deep_colour(), 0xC122),  # note 2
        "21": ("png", sent["3"][1][:60], 0xC000),
        "22": ("gif", b"GIF89a", 0xC000),
        "23": ("gif", sent["3"][1], 0xC000),
    }
    storing.start()
    body = with_metadata(
        [metadata(int(number), **pixels(number)) for number in (*sent, *refused)],
        *((bulk_head(number, f"image/{kind}"), file) for number, (kind, file, _) in (sent | refused).items()),
    )
    answer = storing.post(body, said("application/dicom+json"))
    assert answer.status_code == 202, answer.text
    assert {item[SOP_UID]["Value"][0] for item in items(answer, REFERENCED)} == {
        f"1.2.1.{one}" for one in sent
    }
    failed = {item[SOP_UID]["Value"][0]: item[FAILURE_REASON]["Value"][0] for item in items(answer, FAILED)}
    assert failed == {f"1.2.1.{number}": reason for number, (_, _, reason) in refused.items()}
    storing.archive.file()
    for item in items(answer, REFERENCED):
        dataset = stored_dataset(storing, item)
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        _, _, pixels_sent = sent[dataset.SOPInstanceUID.rpartition(".")[2]]
        assert np.array_equal(dataset.pixel_array, pixels_sent), dataset.SOPInstanceUID


@pytest.mark.parametrize("kind", ["json", "xml"])
def test_metadata_without_bulk_data_may_be_the_whole_body(storing, kind):
    storing.start()
    body = json.dumps([metadata(1)]).encode() if kind == "json" else native_model(metadata(1)).document
    answer = storing.post(body, {"content-type": f"application/dicom+{kind}"})
    assert (answer.status_code, len(items(answer, REFERENCED))) == (200, 1)


def test_what_is_retrieved_as_metadata_and_bulk_data_can_be_stored(storing):
    storing.start()
    storing.post(multipart([CT]))
    storing.archive.file()
    (answer,) = storing.client.get("/dicomweb/instances").json()
    address = answer[RETRIEVE_URL]["Value"][0]
    (attributes,) = storing.client.get(f"{address}/metadata").json()
    uris = [one["BulkDataURI"] for one in attributes.values() if "BulkDataURI" in one]
    octets = {"accept": "application/octet-stream"}
    bulk = [(bulk_head(uri), storing.client.get(uri, headers=octets).content) for uri in uris]
    attributes[SOP_INSTANCE]["Value"] = ["1.2.3"]
    answer = storing.post(with_metadata([attributes], *bulk), said("application/dicom+json"))
    assert answer.status_code == 200
    storing.archive.file()
    sent, found = (
        pydicom.dcmread(SOURCES / "CT_small.dcm"),
        stored_dataset(storing, items(answer, REFERENCED)[0]),
    )
    assert (found.SOPInstanceUID, found.PixelData) == ("1.2.3", sent.PixelData)
    assert found.PatientName == sent.PatientName
    assert found.ImagePositionPatient == sent.ImagePositionPatient


def test_metadata_that_fail_are_named_and_the_others_are_stored(storing):
    storing.start()
    body = with_metadata(
        [
            metadata(1, **pixels("missing")),
            metadata(2),
            metadata(3, **{"00280010": {"vr": "US", "Value": [70000]}}),
            metadata(4, **pixels("video")),
            {"00080018": {"vr": "UI", "Value": ["1.2.1.5"]}},
        ],
        (bulk_head("video", "video/mp4"), b"....ftyp"),
        (bulk_head("nobody's"), b"bytes"),
    )
    answer = storing.post(body, said("application/dicom+json"))
    assert answer.status_code == 202
    assert [item[SOP_UID]["Value"] for item in items(answer, REFERENCED)] == [["1.2.1.2"]]
    failed = {item[SOP_UID]["Value"][0]: item[FAILURE_REASON]["Value"][0] for item in items(answer, FAILED)}
    assert failed == {"1.2.1.1": 0xC000, "1.2.1.3": 0xC000, "1.2.1.4": 0xC122}
    assert reasons(answer, OTHERS) == [0xC000, 0xC000]  # no SOP Class; bulk data that nothing names
    assert any("(7FE0%2C0010)" in one for one in answer.headers.get_list("warning"))


@pytest.mark.parametrize("body", [b"[", b"[]", b"{}", b"null", b"[[]]"])
def test_what_is_no_metadata_fails(storing, body):
    storing.start()
    answer = storing.post(body, {"content-type": "application/dicom+json"})
    assert answer.status_code == (400 if body == b"[]" else 409)
    if body != b"[]":
        assert reasons(answer, OTHERS) == [0xC000]


def test_a_study_of_the_address_holds_for_metadata_too(storing):
    storing.start()
    answer = storing.post(with_metadata([metadata(1)]), said("application/dicom+json"), study_uid="1.3")
    assert (answer.status_code, reasons(answer)) == (409, [0xA900])


def test_metadata_are_bounded(storing):
    storing.start()
    text = b'[{"00104000":{"vr":"LT","Value":["' + b"x" * (33 << 20) + b'"]}}]'
    answer = storing.post(text, {"content-type": "application/dicom+json"})
    assert (answer.status_code, reasons(answer, OTHERS)) == (413, [0xA700])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json", b'[{"x":[' + b"{}," * (5 << 20) + b"{}]}]"),
        ("xml", b"<NativeDicomModel>" + b"<a/>" * (4 << 20) + b"</NativeDicomModel>"),
    ],
)
def test_a_small_body_that_becomes_much_is_not_parsed(storing, kind, text):
    """Some kilobytes of gzip, 16 MiB of text: parsed they take half a gigabyte, and the event loop waits."""
    storing.start()
    body = gzip.compress(text)
    assert len(body) < 32 << 10
    fields = {"content-type": f"application/dicom+{kind}", "content-encoding": "gzip"}
    storing.post(multipart([instance(2)]))
    reset_peak_rss(os.getpid())
    before = peak_rss_bytes(os.getpid())
    answer = storing.post(body, fields)
    assert (answer.status_code, reasons(answer, OTHERS)) == (413, [0xA700])
    assert peak_rss_bytes(os.getpid()) - before < 100 << 20


def test_what_is_kept_of_parts_of_bulk_data_is_bounded(storing):
    """Of an empty part its Content-Location is kept."""
    storing.start()
    whole = with_metadata([metadata(1)], (bulk_head("LOCATION"), b""))
    at = whole.index(b"\r\n--", whole.index(b"LOCATION")) + 2
    start = whole.rindex(b"--" + BOUNDARY.encode(), 0, at)
    part = whole[start:at].replace(b"LOCATION", b"%d/" + b"x" * (15 << 10))
    body = whole[:start] + b"".join(part % number for number in range(3000)) + whole[at:]
    answer = storing.post(body, said("application/dicom+json"))
    assert (answer.status_code, "metadata" in answer.json()["detail"]) == (413, True)


def test_failures_without_number_have_some_lines_in_the_log(storing):
    storing.start(max_parts=400)
    with capture_logs() as logs:
        answer = storing.post(b"[" + b"{}," * 500 + b"{}]", {"content-type": "application/dicom+json"})
    assert (answer.status_code, len(reasons(answer, OTHERS))) == (409, 401)
    told = [line for line in logs if line["event"].startswith("instance")]
    assert [line["event"] for line in told] == ["instance_refused"] * 100 + ["instances_refused"]
    assert told[-1]["more"] == 301


def test_who_stores_in_vain_does_not_keep_others_waiting(storing):
    storing.start()
    with capture_logs():
        body = b"[" + b"{}," * 1500 + json.dumps(metadata(1)).encode() + b"]"
        answer = storing.post(body, {"content-type": "application/dicom+json"})
    assert (answer.status_code, len(reasons(answer, OTHERS))) == (409, 1001)
    good = [json.dumps(metadata(number)).encode() for number in (1, 2)]
    body = b"[" + b"{}," * 900 + good[0] + b"," + b"{}," * 900 + good[1] + b"]"
    answer = storing.post(body, {"content-type": "application/dicom+json"})
    assert (answer.status_code, len(items(answer, REFERENCED))) == (202, 2)


def test_all_methods_of_an_address_are_told(storing):
    storing.start()
    assert storing.client.delete("/dicomweb/studies").headers["allow"] == "GET, HEAD, POST"
    assert storing.client.delete("/dicomweb/studies/1.2").headers["allow"] == "GET, HEAD, POST"


def test_metadata_that_cannot_be_read_fail_alone(storing):
    storing.start()
    model = native_model(metadata(1)).document
    beyond = model.replace(b'number="1"', b'number="%b"' % (b"9" * 5000))
    body = multipart([beyond, model, model[:-9]], "application/dicom+xml")
    answer = storing.post(body, said("application/dicom+xml"))
    assert (answer.status_code, reasons(answer, OTHERS)) == (202, [0xC000] * 2)
    assert [item[SOP_UID]["Value"] for item in items(answer, REFERENCED)] == [["1.2.1.1"]]
    second, third = (json.dumps(metadata(number)).encode() for number in (2, 3))
    body = b"[" + second + b',{"00080018":nonsense},' + third + b"]"
    answer = storing.post(body, {"content-type": "application/dicom+json"})
    assert (answer.status_code, reasons(answer, OTHERS)) == (202, [0xC000])
    assert len(items(answer, REFERENCED)) == 2


def test_bulk_data_do_not_fill_the_reserve(storing):
    storing.start(reserve_bytes=1 << 30)
    body = with_metadata([metadata(1, **pixels("p"))], (bulk_head("p"), bytes(4 << 20)))
    with closing(storing.begin(body[:1000], len(body), said("application/dicom+json"))) as connection:
        wait_until(lambda: storing.disk.looked > 0, 10, "the first look at the disk")
        storing.disk.free = 1 << 20
        storing.archive.intake._looked = -1.0
        connection.sendall(body[1000:])
        answer = connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 503 "), answer


def test_memory_does_not_grow_with_bulk_data(storing):
    storing.start()
    size, block = 96 << 20, bytes(1 << 20)
    head, tail = with_metadata([metadata(1, **pixels("p"))], (bulk_head("p"), b"HERE")).split(b"HERE")
    storing.post(multipart([instance(2)]))
    reset_peak_rss(os.getpid())
    before = peak_rss_bytes(os.getpid())
    body = itertools.chain((head,), (block for _ in range(size >> 20)), (tail,))
    assert storing.post(body, said("application/dicom+json")).status_code == 200
    assert peak_rss_bytes(os.getpid()) - before < 24 << 20


# What only several threads, or an end, show


def test_what_fails_to_be_synced_is_told_to_who_admitted_it(storing):
    """Two requests store at once, and the sync of one fails: neither may be told that it is stored."""
    storing.start()
    archive, told = storing.archive.archive, []

    def admit(number):
        dataset = dataset_of(instance(number))
        claim = Claim("1.2.840.10008.5.1.4.1.1.2", f"1.2.1.{number}", "1.2.840.10008.1.2.1")
        incoming = archive.receive(claim, Source(Origin.STOW_RS, "", ""))
        incoming.write(dataset)
        archive.admit(incoming, sync=False)

    def other():
        admit(2)
        with pytest.raises(BusyError):
            archive.sync()
        told.append(2)

    admit(1)
    storing.disk.fail_syncs = True
    thread = threading.Thread(target=other)
    thread.start()
    thread.join(10)
    storing.disk.fail_syncs = False
    assert told == [2]
    with pytest.raises(BusyError):
        archive.sync()


def test_a_gateway_that_ends_keeps_nothing_of_what_was_begun(storing):
    storing.start(inline_bytes=0)
    body = multipart([instance(1, size=8 << 20)])
    with closing(storing.begin(body[: 4 << 20], len(body))):
        wait_until(storing.archive.slots, 10, "the upload to be under way")
        storing.stop.set()
        storing.thread.join(10)
        assert not storing.thread.is_alive()
    assert not storing.archive.slots()


class AskedDecoders(Decoders):
    """Decoders that say when they are asked for something."""

    def __init__(self, limits):
        super().__init__(limits)
        self.asked = asyncio.Event()

    async def run(self, open_file, *, patient=False):
        self.asked.set()
        return await super().run(open_file, patient=patient)


def test_a_request_that_ends_while_it_is_decoded_for_holds_up_nobody(tmp_path):
    """Its thread waits for the event loop: that must not wait for the thread."""
    archive, decoders = StoringArchive(tmp_path), AskedDecoders(Limits())
    settings = WebSettings(store=archive.settings(max_requests=1))
    app = create_app(archive.archive, settings, tmp_path / "dicomweb", tmp_path / "state", decoders)
    told = []

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            image = image_file(Image.new("L", (64, 64)), "PNG")
            body = with_metadata([metadata(1, **pixels("p"))], (bulk_head("p", "image/png"), image))
            fields = said("application/dicom+json")
            asking = asyncio.create_task(client.post("/dicomweb/studies", content=body, headers=fields))
            await decoders.asked.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            told.append(await client.post("/dicomweb/studies", content=multipart([CT]), headers=said()))

    thread = threading.Thread(target=asyncio.run, args=(ask(),), daemon=True)
    thread.start()
    thread.join(60)
    assert [answer.status_code for answer in told] == [200]
    assert not archive.slots()
    decoders.close()
    archive.close()


def test_a_receipt_that_is_not_ours_is_nobodys(storing):
    """A file may say that it was ours, with a character set that we never wrote."""
    storing.start()
    claim, digest = ("1.2.840.10008.5.1.4.1.1.2", "1.2.1.1", "1.2.840.10008.1.2.1"), bytes(32)
    meta = file_meta(*claim, Receipt(0, Origin.STOW_RS, "A", "B", digest, "ISO_IR 100"))
    forged = meta.replace(b"ISO_IR 100", b"ISO_IR\xff100") + dataset_of(instance(1))
    assert storing.post(multipart([forged])).status_code == 200
    ours = meta + dataset_of(instance(1))
    assert storing.post(multipart([ours])).status_code == 200
    storing.archive.file()
    (path,) = (storing.root / "instances").rglob("*.dcm")
    assert read_file_meta(path.read_bytes()).receipt.default_charset == ""


def test_a_defect_of_ours_fails_one_instance_and_is_logged(storing):
    """Whatever escapes: the instance is a processing failure (0110), the others are stored."""
    storing.start()
    storing.disk.crash = True  # an error that no disk has
    with capture_logs() as logs:
        answer = storing.post(multipart([instance(1, size=2 << 20)]))
    storing.disk.crash = False
    assert (answer.status_code, reasons(answer)) == (409, [0x0110])
    assert "a defect" not in answer.headers["warning"]
    assert "instance_failed" in {line["event"] for line in logs}
    assert storing.post(multipart([instance(1, size=2 << 20)])).status_code == 200
