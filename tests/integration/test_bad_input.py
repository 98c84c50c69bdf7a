"""What peers do wrong costs them a status, a rejection or an abort, and nobody else anything.

Each test runs beside a bystander, a sender whose every instance must be taken meanwhile; after each one the
root holds what was acknowledged, byte for byte, and nothing else, and every process is the one it was.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import pydicom
import pytest
from pydicom.config import disable_value_validation
from pynetdicom import AE, evt
from pynetdicom.pdu import A_ASSOCIATE_RJ

from tests.gateway import REPOSITORY, Gateway, wait_for_instances
from tests.peers import DCMTK, require
from tests.processes import GoneError, peak_rss_bytes, reset_peak_rss, wait_until

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
PRIVATE_CLASS, LISTED_PRIVATE_CLASS = "1.2.826.0.1.3680043.8.498.1.1", "1.2.826.0.1.3680043.8.498.2.1"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"

SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000
NOT_AUTHORIZED = 0x0124
ACCEPTED, ABSTRACT_SYNTAX_NOT_SUPPORTED = 0, 3
RQ, AC, RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
SERVICE_USER, SERVICE_PROVIDER = 0, 2

MIB, GIB = 1 << 20, 1 << 30
ANSWER_SECONDS = 20
VARIANTS = 8
BURST = 6


# ── a sender that sends whatever it is told to ───────────────────────────────────────────────────


class Instance(NamedTuple):
    """A dataset and what its sender may say of it."""

    study_uid: str
    series_uid: str
    sop_uid: str
    sop_class_uid: str
    syntax: str
    data: bytes


class Reply(NamedTuple):
    """The answer to a C-STORE."""

    status: int
    comment: str


class RejectedError(Exception):
    """The A-ASSOCIATE-RJ: result, source, reason."""


class Scu:
    """An association over a plain socket."""

    def __init__(
        self,
        port: int,
        contexts: Iterable[tuple[str, str]],
        *,
        called_ae: str = "DICOMSCP",
        calling_ae: str = "HOSTILE",
        kept: set[str] | None = None,
    ) -> None:
        """The digests of what is acknowledged are added to *kept*.  Raises RejectedError."""
        self._kept = set() if kept is None else kept
        self.contexts = dict(zip(contexts, itertools.count(1, 2)))
        self.results: dict[int, int] = {}
        self._message_id = 0
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(associate_rq(self.contexts, called_ae, calling_ae))
        kind, body = self.read()
        if kind != AC:
            self.socket.close()
            raise RejectedError(*body[1:4])
        self._note_results(body[68:])

    def store(self, instance: Instance, *, known: bool = False, **claimed: str) -> Reply:
        """The answer to *instance*, whatever is *claimed* of it; *known*: it is not to be held once more."""
        self.begin(instance, instance.data, last=True, **claimed)
        reply = self.reply()
        if reply.status == SUCCESS and not known:
            self._kept.add(hashlib.sha256(instance.data).hexdigest())
        return reply

    def begin(self, instance: Instance, data: bytes, *, last: bool = False, **claimed: str) -> None:
        """Send the command and *data*, which is the whole dataset only if it is the *last* of it."""
        context_id = self.contexts[instance.sop_class_uid, instance.syntax]
        self._message_id += 1
        command = store_rq(
            self._message_id,
            claimed.get("sop_class_uid", instance.sop_class_uid),
            claimed.get("sop_uid", instance.sop_uid),
        )
        self.socket.sendall(p_data(context_id, 3, command) + fragments(context_id, data, last=last))

    def reply(self) -> Reply:
        """The response that comes next."""
        kind, body = self.read()
        assert kind == P_DATA, f"PDU type {kind}: {body[:8].hex()}"
        command = elements(body[6:])
        return Reply(
            int.from_bytes(command[0x0900], "little"), command.get(0x0902, b"").decode("ascii").strip()
        )

    def read(self) -> tuple[int, bytes]:
        """Type and body of the next PDU; (0, b"") if the connection was closed."""
        return read_pdu(self.socket)

    def release(self) -> None:
        """End the association and return when the gateway has agreed."""
        self.socket.sendall(pdu(RELEASE_RQ, bytes(4)))
        kind, _ = self.read()
        assert kind == RELEASE_RP
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _note_results(self, items: bytes) -> None:
        while items:
            kind, length = struct.unpack_from(">BxH", items)
            if kind == 0x21:
                self.results[items[4]] = items[6]
            items = items[4 + length :]


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxL", kind, len(body)) + body


def p_data(context_id: int, flags: int, data: bytes) -> bytes:
    return pdu(P_DATA, struct.pack(">LBB", len(data) + 2, context_id, flags) + data)


def fragments(context_id: int, data: bytes, *, last: bool, step: int = 1 << 16) -> bytes:
    starts = range(0, max(len(data), 1), step)
    flags = (2 if last and start + step >= len(data) else 0 for start in starts)
    return b"".join(
        p_data(context_id, flag, data[start : start + step])
        for start, flag in zip(starts, flags, strict=True)
    )


def associate_rq(contexts: Iterable[tuple[str, str]], called_ae: str, calling_ae: str) -> bytes:
    def item(kind: int, data: bytes | str) -> bytes:
        encoded = data.encode() if isinstance(data, str) else data
        return struct.pack(">BxH", kind, len(encoded)) + encoded

    titles = f"{called_ae:16}{calling_ae:16}".encode()
    proposed = (
        item(0x20, bytes([context_id, 0, 0, 0]) + item(0x30, abstract) + item(0x40, syntax))
        for context_id, (abstract, syntax) in zip(itertools.count(1, 2), contexts)
    )
    information = item(0x50, item(0x51, struct.pack(">L", 1 << 16)) + item(0x52, "1.2.3"))
    fixed = struct.pack(">HH32s32x", 1, 0, titles)
    return pdu(RQ, fixed + item(0x10, APPLICATION_CONTEXT) + b"".join(proposed) + information)


def store_rq(message_id: int, sop_class_uid: str, sop_uid: str) -> bytes:
    def element(number: int, value: bytes) -> bytes:
        padded = value + b"\0" * (len(value) % 2)
        return struct.pack("<HHL", 0, number, len(padded)) + padded

    body = element(0x0002, sop_class_uid.encode())
    for number, value in ((0x0100, 1), (0x0110, message_id), (0x0700, 0), (0x0800, 1)):
        body += element(number, struct.pack("<H", value))
    body += element(0x1000, sop_uid.encode())
    return element(0x0000, struct.pack("<L", len(body))) + body


def elements(encoded: bytes) -> dict[int, bytes]:
    found = {}
    while encoded:
        _, number, length = struct.unpack_from("<HHL", encoded)
        found[number], encoded = encoded[8 : 8 + length], encoded[8 + length :]
    return found


def read_pdu(connection: socket.socket) -> tuple[int, bytes]:
    header = read_exactly(connection, 6)
    if not header:
        return 0, b""
    kind, length = struct.unpack(">BxL", header)
    return kind, read_exactly(connection, length)


def read_exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while len(received) < size and (part := connection.recv(size - len(received))):
            received += part
    return received


# ── datasets ─────────────────────────────────────────────────────────────────────────────────────


class Maker:
    """Makes instances out of a real one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, *, syntax: str = EXPLICIT, pixel_bytes: int = 0, **attributes: object) -> Instance:
        """A new instance, of a new study unless StudyInstanceUID is among *attributes*."""
        with disable_value_validation():
            dataset = pydicom.dcmread(self._path)
            dataset.SOPInstanceUID, dataset.StudyInstanceUID = new_uid(), new_uid()
            dataset.PatientName = "Bad^Input"
            for keyword, value in attributes.items():
                setattr(dataset, keyword, value)
            if "SeriesInstanceUID" not in attributes:
                dataset.SeriesInstanceUID = f"{dataset.StudyInstanceUID}.1"[:64]
            if pixel_bytes:
                dataset.PixelData = bytes(pixel_bytes)
            return instance_of(dataset, syntax)


def new_uid() -> str:
    return f"2.25.{uuid.uuid4().int}"


def instance_of(dataset: pydicom.Dataset, syntax: str) -> Instance:
    with disable_value_validation(), io.BytesIO() as file:
        names = (dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID)
        uids = [uid if isinstance(uid, str) else "\\".join(uid or ()) for uid in names]
        class_uid = str(dataset.SOPClassUID)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(file, implicit_vr=syntax == IMPLICIT, little_endian=True)
        data = file.getvalue()
    if syntax == DEFLATED:
        data = b"".join(deflated(data))
    return Instance(*map(str, uids), class_uid, syntax, data)


def deflated(*parts: bytes) -> Iterator[bytes]:
    """*parts*, each to be repeated as often as one likes, and what ends them."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    for part in parts:
        yield compressor.compress(part) + compressor.flush(zlib.Z_FULL_FLUSH)
    yield compressor.flush()


def dataset_of(part10: bytes) -> bytes:
    """What follows group 2."""
    return part10[144 + int.from_bytes(part10[140:144], "little") :]


def instance_path(instance: Instance) -> str:
    return f"/dicomweb/studies/{instance.study_uid}/series/{instance.series_uid}/instances/{instance.sop_uid}"


# ── a gateway, and whoever else uses it ──────────────────────────────────────────────────────────


class Site:
    """A gateway and what it has acknowledged."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.kept: set[str] = set()
        self._parts = gateway.parts()

    def connect(self, *contexts: tuple[str, str], **titles: str) -> Scu:
        """An association; CT Image Storage in explicit VR little endian if nothing else is proposed."""
        return Scu(self.gateway.port, contexts or ((CT_IMAGE_STORAGE, EXPLICIT),), kept=self.kept, **titles)

    def store(self, *instances: Instance) -> None:
        """Have *instances* taken."""
        contexts = dict.fromkeys((one.sop_class_uid, one.syntax) for one in instances)
        with self.connect(*contexts, calling_ae="SENDER") as scu:
            assert {scu.store(one).status for one in instances} == {SUCCESS}
            scu.release()

    def why(self, sop_uid: str) -> str:
        """The reason that the log gives for refusing the instance."""
        return self.gateway.wait_for_event("instance_refused", sop_uid=sop_uid)["reason"]

    def files(self) -> list[Path]:
        """The instances held."""
        return [path for path in (self.gateway.root / "instances").rglob("*") if path.is_file()]

    def metadata(self, study_uid: str) -> list[dict[str, object]]:
        """The published document of the study."""
        path = self.gateway.root / "dicomweb" / "studies" / study_uid / "metadata.gz"
        wait_until(path.exists, 30, f"{study_uid} to be published")
        return json.loads(gzip.decompress(path.read_bytes()))

    def listeners(self) -> list[int]:
        """The pids of those who accept associations."""
        return [pid for name, pid in self._parts.items() if name.startswith("listener")]

    def check(self) -> None:
        """Nothing is there but what was acknowledged, and every process is the one it was."""
        wait_until(self._holds_what_was_kept, 15, "instances/ to hold just what was acknowledged")
        wait_until(lambda: not list(self._litter()), 15, f"no litter: {list(self._litter())}")
        names = {self.gateway.root.name, self.gateway.log.name, "gateway.toml"}
        assert {path.name for path in self.gateway.root.parent.iterdir()} <= names
        assert self.gateway.parts() == self._parts
        unforeseen = [event for event in self.gateway.events() if event["level"] in ("error", "critical")]
        assert unforeseen == []

    def _holds_what_was_kept(self) -> bool:
        digests = [hashlib.sha256(dataset_of(path.read_bytes())).hexdigest() for path in self.files()]
        return sorted(digests) == sorted(self.kept)

    def _litter(self) -> Iterator[Path]:
        root = self.gateway.root
        for path in (root / "incoming").rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and (
                    path.stat().st_size or not (root / "journal" / path.parent.name).exists()
                ):
                    yield path
        yield from (root / "state" / "attempts").glob("*")
        yield from (root / "quarantine").glob("*")


class Bystander:
    """A sender that sends all the while; as a context manager it checks at its end that all was taken."""

    def __init__(self, site: Site, make: Maker, *, pause: float = 0.05) -> None:
        self._site, self._pause = site, pause
        self._study_uid = new_uid()
        self._make = make
        self._stop = threading.Event()
        self._statuses: list[int] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._send, name="bystander")

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self._statuses or self._error, ANSWER_SECONDS, "the bystander to be heard")
        return self

    def __exit__(self, *_: object) -> None:
        heard = len(self._statuses)
        with contextlib.suppress(GoneError):  # _error says it better
            wait_until(lambda: len(self._statuses) > heard or self._error, ANSWER_SECONDS, "one more answer")
        self._stop.set()
        self._thread.join()
        assert self._error is None, f"the bystander was disturbed: {self._error!r}"
        assert set(self._statuses) == {SUCCESS}
        assert len(self._statuses) > heard

    def _send(self) -> None:
        try:
            with self._site.connect(calling_ae="BYSTANDER") as scu:
                while not self._stop.wait(self._pause):
                    self._statuses.append(scu.store(self._make(StudyInstanceUID=self._study_uid)).status)
                scu.release()
        except BaseException as error:  # noqa: BLE001 - told by __exit__
            self._error = error


def at_once(
    site: Site, ask: Callable[[Scu, int], Any], context: tuple[str, str] = (CT_IMAGE_STORAGE, EXPLICIT)
) -> list[Any]:
    """What *ask* gives for each of six associations that begin together."""
    begin = threading.Barrier(BURST)

    def converse(number: int) -> Any:
        with site.connect(context, calling_ae=f"BURST{number}") as scu:
            begin.wait(ANSWER_SECONDS)
            answer = ask(scu, number)
            scu.release()
        return answer

    with ThreadPoolExecutor(BURST) as executor:
        return list(executor.map(converse, range(BURST)))


def serving(folder: Path, config: str = "", **settings: object) -> Iterator[Site]:
    """A gateway while the tests of the module run."""
    file = folder / "gateway.toml"
    file.write_text(config)
    named = {name.replace("__", "."): value for name, value in settings.items()}
    gateway = Gateway(
        folder / "root",
        settings={"drain_seconds": 2, **named},
        config=file,
    )
    with gateway:
        yield Site(gateway)
    shutil.rmtree(folder / "root")


@pytest.fixture(scope="module")
def make(pydicom_files):
    return Maker(pydicom_files / "CT_small.dcm")


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A gateway as it comes, but that it publishes sooner."""
    yield from serving(tmp_path_factory.mktemp("usual"), pipeline__quiet_seconds=1)


@pytest.fixture
def site(usual, make):
    with Bystander(usual, make):
        yield usual
    usual.check()


STRICT = """
[dimse]
called_ae_titles = ["DICOMSCP"]
max_associations = 4
unknown_sop_classes = "reject"
private_sop_classes = ["1.2.826.0.1.3680043.8.498.2"]
[[dimse.ae]]
title = "BYSTANDER"
[[dimse.ae]]
title = "SENDER"
find = true
[[dimse.ae]]
title = "READER"
store = false
[[dimse.ae]]
title = "ELSEWHERE"
addresses = ["192.0.2.0/24"]
"""


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A gateway that knows its peers, is nearly full, and takes four associations."""
    folder = tmp_path_factory.mktemp("strict")
    yield from serving(
        folder,
        STRICT,
        pipeline__quiet_seconds=1,
        inbox__enabled=False,
        storage__reserve=free_bytes(folder) - GIB,
    )


@pytest.fixture
def strict_site(strict, make):
    with Bystander(strict, make):
        yield strict
    strict.check()


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """A gateway that does not wait for peers that are silent."""
    yield from serving(
        tmp_path_factory.mktemp("impatient"),
        dimse__idle_seconds=1,
        dimse__accept_seconds=1,
        dimse__listeners=1,
        inbox__enabled=False,
    )


@pytest.fixture
def impatient_site(impatient, make):
    with Bystander(impatient, make):
        yield impatient
    impatient.check()


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


# ── datasets that are not what they should be ────────────────────────────────────────────────────


@pytest.mark.parametrize("pixel_bytes", [0, 300_000], ids=["in memory", "in a slot"])
def test_a_dataset_that_was_cut_short_is_refused(site, make, pixel_bytes):
    whole = make(pixel_bytes=pixel_bytes)

    with site.connect() as scu:
        status, comment = scu.store(whole._replace(data=whole.data[:-100]))
        assert scu.store(whole).status == SUCCESS
        scu.release()

    assert status == CANNOT_UNDERSTAND
    assert "cut short" in comment
    assert "cut short" in site.why(whole.sop_uid)


def test_a_dataset_without_bytes_is_refused(site, make):
    instance = make()

    with site.connect() as scu:
        assert scu.store(instance._replace(data=b"")).status == CANNOT_UNDERSTAND
        scu.release()

    assert site.why(instance.sop_uid)


def test_a_dataset_of_another_instance_or_class_than_the_command_says_is_refused_as_that(site, make):
    instance, other = make(), new_uid()
    mr = make()._replace(sop_class_uid=MR_IMAGE_STORAGE)

    with site.connect((CT_IMAGE_STORAGE, EXPLICIT), (MR_IMAGE_STORAGE, EXPLICIT)) as scu:
        wrong_uid = scu.store(instance, sop_uid=other)
        wrong_class = scu.store(mr)
        scu.release()

    assert (wrong_uid.status, wrong_class.status) == (MISMATCH, MISMATCH)
    assert "SOP Instance UID" in wrong_uid.comment
    assert "SOP Class UID" in wrong_class.comment
    assert "SOP Instance UID" in site.why(other)
    assert "SOP Class UID" in site.why(mr.sop_uid)


HOSTILE_UIDS = {
    "a parent folder": "../../../../tmp/x",
    "a slash": "1.2/3",
    "a backslash": "1.2\\3",
    "a NUL": "1.2\x003",
    "a control character": "1.2\n3",
    "a space": "1.2 3",
    "65 characters": "1." + "2" * 63,
    "nothing": "",
}


@pytest.mark.parametrize("uid", HOSTILE_UIDS.values(), ids=HOSTILE_UIDS)
def test_a_uid_that_can_name_no_file_is_refused(site, make, uid):
    claimed_too = make(SOPInstanceUID=uid)
    within = [make(**{keyword: uid}) for keyword in ("StudyInstanceUID", "SeriesInstanceUID")]

    with site.connect() as scu:
        replies = [scu.store(one) for one in (claimed_too, *within)]
        assert scu.store(make()).status == SUCCESS
        scu.release()

    assert {reply.status for reply in replies} == {CANNOT_UNDERSTAND}
    assert all("UID" in site.why(one.sop_uid) for one in within)
    reasons = [event["reason"] for event in site.gateway.events("instance_refused")]
    assert any("UID cannot be filed" in reason or "names no SOP" in reason for reason in reasons)


def test_odd_uids_that_devices_may_send_are_held_where_they_do_no_harm(site, make):
    uids = ["..", ".", "~", "CON", "1.2.*;$(id)"]
    components = ["~" + hashlib.sha256(uid.encode()).hexdigest()[:32] for uid in uids]

    site.store(*(make(StudyInstanceUID=uid, SeriesInstanceUID=uid) for uid in uids))

    for uid, component in zip(uids, components, strict=True):
        (document,) = site.metadata(component)
        assert document["0020000D"]["Value"] == [uid]
    held = {path.parts[-3:-1] for path in site.files()}
    assert {(component, component) for component in components} <= held


# ── deflated datasets ────────────────────────────────────────────────────────────────────────────


def bomb(instance: Instance, megabytes: int, *, before_uids: bool) -> Instance:
    """*instance* with an element of *megabytes* of zeros, in a deflated stream that does not end."""
    tag = (0x0007, 0x1001) if before_uids else (0x7FE1, 0x1001)
    header = struct.pack("<HH2sHL", *tag, b"OB", 0, 0xFFFFFFFE)
    parts = (header if before_uids else instance.data + header, bytes(MIB), bytes(MIB))
    first, _, zeros, _ = deflated(*parts)
    return instance._replace(syntax=DEFLATED, data=first + zeros * megabytes)


def test_deflated_datasets_that_inflate_without_end_are_refused_within_bounds(site, make):
    instances = [bomb(make(), 4096, before_uids=True) for _ in range(BURST)]
    before = _begin_peaks(site.listeners())

    replies = at_once(
        site, lambda scu, number: scu.store(instances[number]), context=(CT_IMAGE_STORAGE, DEFLATED)
    )

    assert {reply.status for reply in replies} == {CANNOT_UNDERSTAND}
    assert all("inflates" in reply.comment for reply in replies)
    assert all("inflates" in site.why(instance.sop_uid) for instance in instances)
    assert max(_growth(before)) < 200 * MIB


def test_one_that_inflates_without_end_behind_its_uids_harms_nobody(site, make):
    instance = bomb(make(), 4096, before_uids=False)
    before = _begin_peaks(site.gateway.processes())

    with site.connect((CT_IMAGE_STORAGE, DEFLATED)) as scu:
        status, _ = scu.store(instance)
        scu.release()

    # What names it is within bounds; that the rest is without end is the business of whoever retrieves it.
    assert status == SUCCESS
    assert site.metadata(instance.study_uid)[0]["00080018"]["Value"] == [instance.sop_uid]
    wait_for_instances(site.gateway, instance.study_uid, 1)
    frame = f"{instance_path(instance)}/frames/1"
    answers = {get(site.gateway, frame)[0], get(site.gateway, frame)[0]}
    assert answers <= {404, 413, 422}
    assert max(_growth(before)) < 400 * MIB


def _begin_peaks(pids: Iterable[int]) -> dict[int, int]:
    for pid in pids:
        reset_peak_rss(pid)
    return {pid: peak_rss_bytes(pid) for pid in pids}


def _growth(before: dict[int, int]) -> list[int]:
    return [peak_rss_bytes(pid) - size for pid, size in before.items()]


def test_what_does_not_inflate_is_refused(site, make):
    instance = make(syntax=DEFLATED)

    with site.connect((CT_IMAGE_STORAGE, DEFLATED)) as scu:
        garbage = scu.store(instance._replace(data=b"\xff" * 1000))
        half = scu.store(instance._replace(data=instance.data[: len(instance.data) // 2]))
        assert scu.store(instance).status == SUCCESS
        scu.release()

    assert (garbage.status, half.status) == (CANNOT_UNDERSTAND, CANNOT_UNDERSTAND)
    assert site.why(instance.sop_uid)


# ── bytes that are no protocol ───────────────────────────────────────────────────────────────────

NO_ASSOCIATION = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(100),
    "data before an association": p_data(1, 3, b"x" * 20),
    "a request of 4 GiB": struct.pack(">BxL", RQ, 0xFFFFFFFF) + bytes(64),
    "an item that runs past the end": pdu(
        RQ, struct.pack(">HH32s32x", 1, 0, b" " * 32) + b"\x10\0\xff\xff1.2"
    ),
    "a request without its fixed fields": pdu(RQ, bytes(10)),
}


@pytest.mark.parametrize("data", NO_ASSOCIATION.values(), ids=NO_ASSOCIATION)
def test_what_is_no_request_for_an_association_is_aborted(site, data):
    before = len(site.gateway.events("connection_without_association"))

    with socket.create_connection(("127.0.0.1", site.gateway.port), timeout=ANSWER_SECONDS) as connection:
        connection.sendall(data)
        kind, body = read_pdu(connection)

    assert (kind, body) == (ABORT, bytes(4))
    wait_until(
        lambda: len(site.gateway.events("connection_without_association")) > before, 10, "a line in the log"
    )
    assert site.gateway.events("connection_without_association")[-1]["how"]


GARBAGE = {
    "an unknown PDU": (pdu(0x42, b"?" * 50), SERVICE_PROVIDER, 1),
    "a second request": (pdu(RQ, bytes(68)), SERVICE_PROVIDER, 2),
    "an acceptance": (pdu(AC, bytes(68)), SERVICE_PROVIDER, 2),
    "a PDU of 4 GiB": (struct.pack(">BxL", P_DATA, 0xFFFFFFFF), SERVICE_PROVIDER, 6),
    "a PDV beyond its PDU": (pdu(P_DATA, struct.pack(">LBB", 500, 1, 3) + b"x" * 20), SERVICE_PROVIDER, 6),
    "a context that was not accepted": (p_data(99, 3, b"x" * 20), SERVICE_PROVIDER, 6),
    "a dataset without a command": (p_data(1, 2, b"x" * 20), SERVICE_PROVIDER, 5),
    "a command that is none": (p_data(1, 3, b"\xff" * 20), SERVICE_USER, 0),
    "a command without its field": (p_data(1, 3, bytes(8)), SERVICE_USER, 0),
}


@pytest.mark.parametrize(("data", "source", "reason"), GARBAGE.values(), ids=GARBAGE)
def test_garbage_on_an_association_is_aborted_with_its_reason(site, data, source, reason, request):
    title = f"G{abs(hash(request.node.name)) % 10**12}"
    with site.connect(calling_ae=title) as scu:
        scu.socket.sendall(data)
        kind, body = scu.read()

    assert (kind, *body[2:4]) == (ABORT, source, reason)
    assert site.gateway.wait_for_event("association_ended", calling_ae=title)["how"]


def test_garbage_within_a_dataset_leaves_nothing_of_it(site, make):
    instance = make(pixel_bytes=1_000_000)

    with site.connect(calling_ae="WITHIN") as scu:
        scu.begin(instance, instance.data[:600_000])
        scu.socket.sendall(pdu(0x42, b"?" * 50))
        kind, body = scu.read()

    assert (kind, *body[2:4]) == (ABORT, SERVICE_PROVIDER, 1)
    ended = site.gateway.wait_for_event("association_ended", calling_ae="WITHIN")
    assert ended["cut_short"]
    assert "unrecognized PDU" in ended["how"]


def test_random_bytes_are_answered_with_an_abort_or_a_closed_connection(site):
    source = random.Random(20)
    for number in range(40):
        data = bytearray(source.randbytes(source.randrange(6, 3000)))
        data[0] = number % 9
        with socket.create_connection(("127.0.0.1", site.gateway.port), timeout=ANSWER_SECONDS) as peer:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            kind, _ = read_pdu(peer)
        assert kind in (0, RJ, ABORT)


# ── peers that leave or do not go on ─────────────────────────────────────────────────────────────


def test_a_thousand_port_probes_leave_no_thread_no_descriptor_and_a_line_each_at_most(site):
    pids = site.listeners()
    before = {pid: _resources(pid) for pid in pids}
    lines = len(site.gateway.events())

    for number in range(1000):
        with socket.create_connection(("127.0.0.1", site.gateway.port), timeout=ANSWER_SECONDS) as probe:
            if number % 4 == 0:  # as a scanner does, with RST
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    for pid in pids:
        wait_until(lambda pid=pid: _are_within(_resources(pid), before[pid]), 15, "threads to end")
    assert len(site.gateway.events()) - lines <= 1000 + 50  # those of the bystander's study beside them
    assert len(site.gateway.events("connection_without_association")) > 0


def _resources(pid: int) -> tuple[int, int]:
    """How many threads and descriptors the process has."""
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - counted


def _are_within(now: tuple[int, int], before: tuple[int, int]) -> bool:
    return now[0] <= before[0] + 1 and now[1] <= before[1] + 4  # a slot in the making, a segment


@pytest.mark.parametrize("how", ["abort", "close", "reset"])
def test_a_sender_that_leaves_within_a_dataset_leaves_nothing_of_it(site, make, how):
    instance = make(pixel_bytes=1_000_000)
    title = f"LEAVES {how}".upper()

    with site.connect(calling_ae=title) as scu:
        scu.begin(instance, instance.data[:600_000])
        if how == "abort":
            scu.socket.sendall(pdu(ABORT, bytes(4)))
        elif how == "reset":
            scu.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    ended = site.gateway.wait_for_event("association_ended", calling_ae=title)
    assert ended["cut_short"]
    assert {"abort": "aborted by the peer", "close": "closed by the peer", "reset": "connection lost"}[
        how
    ] in ended["how"]


def test_an_abort_right_after_success_takes_nothing_back(site, make):
    instances = [make(), make(pixel_bytes=300_000)]

    for instance in instances:
        with site.connect(calling_ae="ABORTS") as scu:
            assert scu.store(instance).status == SUCCESS
            scu.socket.sendall(pdu(ABORT, bytes(4)))

    site.gateway.wait_for_event("association_ended", calling_ae="ABORTS", stored=1)
    for instance in instances:
        wait_for_instances(site.gateway, instance.study_uid, 1)
        assert site.metadata(instance.study_uid)[0]["00080018"]["Value"] == [instance.sop_uid]


def test_a_sender_that_stalls_within_a_dataset_is_aborted(impatient_site, make):
    instance = make(pixel_bytes=1_000_000)

    with impatient_site.connect(calling_ae="STALLS") as scu:
        scu.begin(instance, instance.data[:600_000])
        kind, body = scu.read()

    assert (kind, body[2]) == (ABORT, SERVICE_PROVIDER)
    ended = impatient_site.gateway.wait_for_event("association_ended", calling_ae="STALLS")
    assert ended["cut_short"]
    assert ended["how"] == "silent for too long"


def test_a_sender_that_stalls_between_instances_keeps_what_was_acknowledged(impatient_site, make):
    instance = make()

    with impatient_site.connect(calling_ae="PAUSES") as scu:
        assert scu.store(instance).status == SUCCESS
        kind, _ = scu.read()

    assert kind == ABORT
    assert impatient_site.gateway.wait_for_event("association_ended", calling_ae="PAUSES")["stored"] == 1
    wait_for_instances(impatient_site.gateway, instance.study_uid, 1)


@pytest.mark.parametrize("data", [b"", associate_rq([(CT_IMAGE_STORAGE, EXPLICIT)], "A", "B")[:50]])
def test_a_peer_that_never_asks_is_let_go(impatient_site, data):
    gateway = impatient_site.gateway
    before = len(gateway.events("connection_without_association"))

    with socket.create_connection(("127.0.0.1", gateway.port), timeout=ANSWER_SECONDS) as connection:
        connection.sendall(data)
        assert read_pdu(connection) == (0, b"")

    wait_until(
        lambda: len(gateway.events("connection_without_association")) > before, 10, "a line in the log"
    )
    assert gateway.events("connection_without_association")[-1]["how"] == "silent for too long"


# ── many at once ─────────────────────────────────────────────────────────────────────────────────


def test_six_associations_that_send_one_study_at_once_make_one_study(site, make):
    study_uid = new_uid()
    series_uids = [f"{study_uid}.{number}" for number in range(1, 3)]
    batches = [
        [
            make(StudyInstanceUID=study_uid, SeriesInstanceUID=series_uids[number % 2], InstanceNumber=number)
            for number in range(10)
        ]
        for _ in range(BURST)
    ]

    statuses = at_once(site, lambda scu, number: {scu.store(one).status for one in batches[number]})

    assert statuses == [{SUCCESS}] * BURST
    wait_for_instances(site.gateway, study_uid, 10 * BURST)
    site.gateway.wait_for_event("study_published", seconds=20, study_uid=study_uid)
    sop_uids = {document["00080018"]["Value"][0] for document in site.metadata(study_uid)}
    assert sop_uids == {instance.sop_uid for batch in batches for instance in batch}
    (study,) = site.gateway.get_json(f"/dicomweb/studies?StudyInstanceUID={study_uid}&includefield=all")
    assert study["00201206"]["Value"] == [2]
    assert study["00201208"]["Value"] == [10 * BURST]
    published = [event for event in site.gateway.events("study_published") if event["study_uid"] == study_uid]
    assert len(published) == 1


def test_six_associations_that_send_one_instance_at_once_make_one_instance(site, make):
    instance = make()

    replies = at_once(site, lambda scu, _: scu.store(instance))

    assert [reply.status for reply in replies] == [SUCCESS] * BURST
    assert len(site.metadata(instance.study_uid)) == 1


def test_one_association_too_many_over_all_listeners_is_rejected_until_one_ends(strict_site):
    gateway = strict_site.gateway
    with contextlib.ExitStack() as stack:
        # With the bystander's these are four.
        held = [stack.enter_context(strict_site.connect(calling_ae="SENDER")) for _ in range(3)]
        rejections = set()
        for _ in range(4):
            with pytest.raises(RejectedError) as rejection:
                strict_site.connect(calling_ae="SENDER")
            rejections.add(rejection.value.args)
        held[0].release()
        wait_until(lambda: _is_let_in(strict_site), 10, "the place to be given to another")

    assert rejections <= {(2, 3, 2), (2, 3, 1)}
    assert "too many associations" in gateway.wait_for_event("association_rejected")["reason"]


def _is_let_in(site: Site) -> bool:
    with contextlib.suppress(RejectedError), site.connect(calling_ae="SENDER") as scu:
        scu.release()
        return True
    return False


# ── peers that are not let in ────────────────────────────────────────────────────────────────────

STRANGERS = {
    "called": ("WRONG", "SENDER", 7, "called AE title not recognized"),
    "calling": ("DICOMSCP", "STRANGER", 3, "calling AE title not recognized"),
    "address": ("DICOMSCP", "ELSEWHERE", 3, "calling AE title not recognized from this address"),
}


@pytest.mark.parametrize(("called", "calling", "reason", "words"), STRANGERS.values(), ids=STRANGERS)
def test_a_title_that_is_not_listed_is_rejected(strict_site, called, calling, reason, words):
    ae, heard = AE(calling), []
    ae.add_requested_context("1.2.840.10008.1.1")
    # pynetdicom 3.0 takes a rejection that comes at once for a failure to connect, now and then.
    hear = [(evt.EVT_PDU_RECV, lambda event: heard.append(event.pdu))]
    association = ae.associate("127.0.0.1", strict_site.gateway.port, ae_title=called, evt_handlers=hear)

    assert not association.is_established
    (answer,) = heard
    assert isinstance(answer, A_ASSOCIATE_RJ)
    assert (answer.result, answer.source, answer.reason_diagnostic) == (1, 1, reason)
    facts = {"calling_ae": calling, "called_ae": called, "reason": words}
    assert strict_site.gateway.wait_for_event("association_rejected", **facts)


def test_dcmtk_hears_that_it_called_the_wrong_title(strict_site):
    echoscu = require("echoscu", DCMTK)
    command = [echoscu, "-aet", "SENDER", "-aec", "WRONG", "127.0.0.1", str(strict_site.gateway.port)]

    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert result.returncode != 0
    assert "Called AE Title Not Recognized" in result.stderr


def test_who_may_query_but_not_store_is_told_so(strict_site, make):
    instance = make()

    with strict_site.connect(calling_ae="READER") as scu:
        status, comment = scu.store(instance)
        scu.release()

    assert status == NOT_AUTHORIZED
    assert "may not store" in comment
    assert "may not store" in strict_site.why(instance.sop_uid)


@pytest.mark.parametrize(
    ("private_class", "result"),
    [(PRIVATE_CLASS, ABSTRACT_SYNTAX_NOT_SUPPORTED), (LISTED_PRIVATE_CLASS, ACCEPTED)],
)
def test_a_private_class_is_refused_where_unknown_classes_are_unless_it_is_listed(
    strict_site, make, private_class, result
):
    instance = make(SOPClassUID=private_class)
    contexts = [(CT_IMAGE_STORAGE, EXPLICIT), (private_class, EXPLICIT)]

    with strict_site.connect(*contexts, calling_ae="SENDER") as scu:
        assert scu.results == {1: ACCEPTED, 3: result}
        if result == ACCEPTED:
            assert scu.store(instance).status == SUCCESS
        scu.release()


def test_a_class_that_nobody_knows_is_taken_by_default(site, make):
    instance = make(SOPClassUID=PRIVATE_CLASS)

    site.store(instance)

    wait_for_instances(site.gateway, instance.study_uid, 1)
    assert site.metadata(instance.study_uid)[0]["00080016"]["Value"] == [PRIVATE_CLASS]


def test_a_class_that_is_no_storage_is_refused_while_the_others_are_taken(site, make):
    verification_of_print = "1.2.840.10008.5.1.1.9"  # Basic Grayscale Print Management

    with site.connect((CT_IMAGE_STORAGE, EXPLICIT), (verification_of_print, EXPLICIT)) as scu:
        assert scu.results == {1: ACCEPTED, 3: ABSTRACT_SYNTAX_NOT_SUPPORTED}
        assert scu.store(make()).status == SUCCESS
        scu.release()


# ── a disk that fills up ─────────────────────────────────────────────────────────────────────────


def test_below_the_disk_reserve_new_instances_are_refused_and_questions_answered(strict, make):
    held, new = make(), make()
    strict.store(held)
    wait_for_instances(strict.gateway, held.study_uid, 1)
    ballast = strict.gateway.root / "run" / "ballast"
    try:
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, GIB + GIB // 2)
        with strict.connect(calling_ae="SENDER") as scu:
            wait_until(lambda: _is_refused(scu, new), 5, "the disk to be seen as full")
            status, comment = scu.store(make(pixel_bytes=300_000))
            found = find(strict.gateway, held.study_uid)
            listed = strict.gateway.get_json(f"/dicomweb/studies?StudyInstanceUID={held.study_uid}")
            ballast.unlink()
            wait_until(lambda: scu.store(new).status == SUCCESS, 5, "room to be seen")
            scu.release()
    finally:
        ballast.unlink(missing_ok=True)

    assert status == OUT_OF_RESOURCES
    assert "reserve" in comment
    assert "reserve" in strict.why(new.sop_uid)
    assert found == [held.study_uid]
    assert len(listed) == 1
    wait_for_instances(strict.gateway, new.study_uid, 1)
    strict.check()


def _is_refused(scu: Scu, instance: Instance) -> bool:
    return scu.store(instance).status == OUT_OF_RESOURCES


def find(gateway: Gateway, study_uid: str) -> list[str]:
    """The studies that a C-FIND gives."""
    identifier = pydicom.Dataset()
    identifier.QueryRetrieveLevel, identifier.StudyInstanceUID = "STUDY", study_uid
    return [answer.StudyInstanceUID for status, answer in c_find(gateway, identifier) if answer]


def c_find(gateway: Gateway, identifier: pydicom.Dataset) -> list[tuple[int, pydicom.Dataset | None]]:
    """Status and identifier of every response."""
    ae = AE("SENDER")
    ae.add_requested_context(STUDY_ROOT_FIND)
    association = ae.associate("127.0.0.1", gateway.port, ae_title="DICOMSCP")
    assert association.is_established
    answers = [
        (status.Status, found) for status, found in association.send_c_find(identifier, STUDY_ROOT_FIND)
    ]
    association.release()
    return answers


# ── the same again, and others under its name ────────────────────────────────────────────────────


def test_an_identical_resend_is_success_and_changes_nothing(site, make):
    instance = make()
    site.store(instance)
    before = _as_published(site, instance)

    with site.connect() as scu:
        assert scu.store(instance, known=True).status == SUCCESS
        scu.release()

    _assert_unchanged(site, make, instance, before)


def test_a_resend_in_another_uncompressed_syntax_is_success_and_changes_nothing(site, make, tmp_path):
    instance = make(PixelData=bytes(range(256)) * 128)
    site.store(instance)
    before = _as_published(site, instance)
    again = [
        _converted(instance, option, syntax, tmp_path)
        for option, syntax in (("+ti", IMPLICIT), ("+tb", BIG_ENDIAN), ("+td", DEFLATED))
    ]
    assert len({instance.data, *(one.data for one in again)}) == 4

    with site.connect(*((CT_IMAGE_STORAGE, one.syntax) for one in again)) as scu:
        assert {scu.store(one, known=True).status for one in again} == {SUCCESS}
        scu.release()

    _assert_unchanged(site, make, instance, before)


def _converted(instance: Instance, option: str, syntax: str, folder: Path) -> Instance:
    """*instance* as DCMTK writes it in *syntax*."""
    (folder / "from").write_bytes(instance.data)
    command = [require("dcmconv", DCMTK), "-f", "-t=", option, str(folder / "from"), str(folder / "to")]
    subprocess.run(command, check=True, timeout=60)
    return instance._replace(syntax=syntax, data=dataset_of((folder / "to").read_bytes()))


def _as_published(site: Site, instance: Instance) -> tuple[object, ...]:
    site.metadata(instance.study_uid)
    site.gateway.wait_for_event("study_published", study_uid=instance.study_uid)
    study = site.gateway.get_json(f"/dicomweb/studies?StudyInstanceUID={instance.study_uid}")
    folder = site.gateway.root / "dicomweb" / "studies" / instance.study_uid
    documents = {path: path.stat().st_mtime_ns for path in folder.rglob("*.gz")}
    instances = {path: path.stat().st_mtime_ns for path in site.files() if instance.study_uid in path.parts}
    return study, documents, instances


def _assert_unchanged(site: Site, make: Maker, instance: Instance, before: tuple[object, ...]) -> None:
    """It still is as *before* when what was stored later has been published."""
    later = make()
    site.store(later)
    site.gateway.wait_for_event("study_published", study_uid=later.study_uid)
    assert _as_published(site, instance) == before
    variants = site.gateway.events("variant_held")
    assert [event for event in variants if event["sop_uid"] == instance.sop_uid] == []


def test_variants_of_an_instance_are_held_up_to_a_bound_and_then_refused(site, make):
    first = make(PatientComments="variant 0")
    uids = {
        "SOPInstanceUID": first.sop_uid,
        "StudyInstanceUID": first.study_uid,
        "SeriesInstanceUID": first.series_uid,
    }
    variants = [first, *(make(PatientComments=f"variant {n}", **uids) for n in range(1, VARIANTS))]
    one_more = make(PatientComments="one more", **uids)

    site.store(*variants)
    assert find(site.gateway, first.study_uid) == [first.study_uid]  # answered when all are in the index
    assert len(_files_of(site, first)) == VARIANTS
    with site.connect() as scu:
        status, comment = scu.store(one_more)
        again = scu.store(variants[3], known=True)
        scu.release()

    assert (status, again.status) == (OUT_OF_RESOURCES, SUCCESS)
    assert "variants" in comment
    assert "variants" in site.why(first.sop_uid)
    (document,) = site.metadata(first.study_uid)
    assert document["00104000"]["Value"] == ["variant 0"]
    assert site.gateway.wait_for_event("variant_held", sop_uid=first.sop_uid, variants=VARIANTS)


def _files_of(site: Site, instance: Instance) -> list[Path]:
    return [path for path in site.files() if path.name.startswith(instance.sop_uid)]


# ── questions ────────────────────────────────────────────────────────────────────────────────────

IMPROPER = {
    "no level": {},
    "no such level": {"QueryRetrieveLevel": "FRAME"},
    "a level of another model": {"QueryRetrieveLevel": "PATIENT"},
    "a series of no study": {"QueryRetrieveLevel": "SERIES"},
    "an instance of no series": {"QueryRetrieveLevel": "IMAGE", "StudyInstanceUID": "1.2"},
}


@pytest.mark.parametrize("keys", IMPROPER.values(), ids=IMPROPER)
def test_an_improper_identifier_is_answered_as_that(site, keys):
    identifier = pydicom.Dataset()
    identifier.PatientID = "1CT1"
    for keyword, value in keys.items():
        setattr(identifier, keyword, value)
    before = len(site.gateway.events("query_answered"))

    ((status, found),) = c_find(site.gateway, identifier)

    assert (status, found) == (MISMATCH, None)
    wait_until(lambda: len(site.gateway.events("query_answered")) > before, 10, "a line in the log")
    answered = site.gateway.events("query_answered")[-1]
    assert (answered["status"], answered["matches"]) == ("A900", 0)
    assert answered["reason"]


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────


def get(gateway: Gateway, path: str, **headers: str) -> tuple[int, str, bytes]:
    """Status, media type and body for *path* just as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.web_port, timeout=ANSWER_SECONDS)
    try:
        connection.putrequest("GET", path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "a b"])
def test_a_host_that_is_not_ours_is_refused(usual, host):
    status, media_type, body = get(usual.gateway, "/dicomweb/studies", Host=host)

    assert status in (400, 421)
    assert media_type == "application/problem+json"
    assert b"ost" in json.loads(body)["detail"].encode()


TRAVERSALS = [
    "/dicomweb/studies/%2e%2e%2f%2e%2e%2findex.sqlite",
    "/dicomweb/studies/%2e%2e%2f%2e%2e%2frun%2fstate.json/metadata",
    "/dicomweb/studies/../../run/state.json",
    "/dicomweb/studies/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/dicomweb/studies/..\\..\\run\\state.json",
    "/dicomweb/studies/%252e%252e%252frun/metadata",
    "/dicomweb/studies/{study}/series/%2e%2e%2f%2e%2e%2f%2e%2e/metadata",
    "/dicomweb/studies/{study}/bulkdata/%2e%2e/%2e%2e/7FE00010",
    "/dicomweb/studies/{study}/series/{series}/instances/%2e%2e%2f%2e%2e%2frun%2fstate.json",
    "/dicomweb/studies/%00/metadata",
    "//etc/passwd",
    "/../run/state.json",
    "/dicomweb/studies/" + "a" * 5000,
]


@pytest.fixture(scope="module")
def published(usual, make):
    """An instance that is published."""
    instance = make()
    usual.store(instance)
    usual.metadata(instance.study_uid)
    return instance


@pytest.mark.parametrize("path", TRAVERSALS, ids=range(len(TRAVERSALS)))
def test_no_path_leads_out_of_what_is_published(usual, published, path):
    written = path.format(study=published.study_uid, series=published.series_uid)

    status, media_type, body = get(usual.gateway, written)

    assert status in (400, 404, 414)
    assert media_type == "application/problem+json"
    assert b"started_at" not in body
    assert b"root:" not in body


BAD_QUESTIONS = [
    ("/dicomweb/studies?limit=-1", 400),
    ("/dicomweb/studies?limit=x", 400),
    ("/dicomweb/studies?StudyDate=yesterday", 400),
    ("/dicomweb/studies/1.2.3/metadata", 404),
    ("/dicomweb/studies/1.2.3/series/1.2/instances/1.2/frames/1", 404),
]


@pytest.mark.parametrize(("path", "expected"), BAD_QUESTIONS)
def test_a_bad_question_is_told_what_is_wrong(usual, path, expected):
    with pytest.raises(urllib.error.HTTPError) as failure:
        usual.gateway.get(path)

    with failure.value as answer:
        assert answer.code == expected
        assert json.loads(answer.read())["detail"]


# ── after all that ───────────────────────────────────────────────────────────────────────────────


def test_after_all_that_verify_finds_nothing(usual, published):
    command = [sys.executable, "-m", "dicomscp", "verify", "--root", str(usual.gateway.root)]

    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)

    assert result.stdout.endswith(", 0 findings\n"), result.stdout
    assert result.returncode == 0
