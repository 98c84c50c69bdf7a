"""Hostile clients against the real server: bytes as no well-meant client writes them, or too few.

One server for all of it, with users; a request that is meant well goes beside, and is answered.
"""

import base64
import contextlib
import re
import select
import socket
import ssl
import threading
import time
from urllib.parse import quote

import httpx
import pydicom
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dicomscp.web import users
from dicomscp.web.app import Guard, WebSettings, create_app
from dicomscp.web.server import Transport, bind, serve
from dicomscp.web.users import Cost, Users
from tests.certificates import certified
from tests.processes import wait_until
from tests.unit.web.held import SOURCES, FilledArchive

PASSWORD = "a good password"
AUTHORIZATION = "Basic " + base64.b64encode(f"anna:{PASSWORD}".encode()).decode()
IDLE_SECONDS = STALL_SECONDS = 2.0
LONG_SECONDS = 20  # within which what takes two seconds is seen on a machine that is busy
ALL_SECRETS = (b"root:x:", b"SQLite format", b"scrypt", b"BEGIN PRIVATE KEY", b"DSCPSEG1")


class Site:
    """The application on a real server, with or without TLS."""

    def __init__(self, root, *, tls):
        self.archive = FilledArchive(root)
        self.held = self.archive.add_file("CT_small.dcm")
        large = pydicom.dcmread(SOURCES / "CT_small.dcm")
        large.SOPInstanceUID = large.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
        large.Rows, large.Columns, large.PixelData = 4096, 2048, bytes(1 << 24)
        self.large = self.archive.add(large)
        users.set_password(root / "users", "anna", ["read", "write"], PASSWORD, cost=Cost(10, 8, 1))
        settings = WebSettings(schemes={"basic": Users(root / "users")})
        app = create_app(self.archive, settings, root / "dicomweb", root / "state")
        certificate_file, key_file = certified(root) if tls else (None, None)
        self.context = ssl.create_default_context(cafile=certificate_file) if tls else None
        self.socket, self.stop = bind("127.0.0.1", 0), threading.Event()
        self.port = self.socket.getsockname()[1]
        transport = Transport(
            certificate_file,
            key_file,
            max_connections=64,
            idle_seconds=IDLE_SECONDS,
            stall_seconds=STALL_SECONDS,
        )
        self.thread = threading.Thread(
            target=serve,
            args=(app, self.socket, self.stop),
            kwargs={"drain_seconds": 1, "transport": transport},
        )
        self.thread.start()

    def client(self, **options):
        return httpx.Client(
            base_url=f"{'https' if self.context else 'http'}://127.0.0.1:{self.port}",
            headers={"authorization": AUTHORIZATION},
            verify=self.context or True,
            timeout=LONG_SECONDS,
            **options,
        )

    def connect(self, *, alpn="http/1.1", receive_bytes=None):
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(LONG_SECONDS)
        connection.connect(("127.0.0.1", self.port))
        if self.context is None:
            return connection
        context = ssl.create_default_context(cadata=None)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([alpn])
        return context.wrap_socket(connection)

    def exchange(self, sent):
        """All that comes back for these bytes until the server closes the connection."""
        came = b""
        with self.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(sent.encode("latin-1") if isinstance(sent, str) else sent)
            while piece := connection.recv(65536):
                came += piece
        return came

    def is_well(self):
        with self.client() as client:
            return client.get("/dicomweb/studies").status_code == 200

    def end(self):
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.socket.close()
        self.archive.engine.dispose()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("plain"), tls=False)
    yield site
    site.end()


@pytest.fixture(scope="module")
def tls_site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("tls"), tls=True)
    yield site
    site.end()


def written(line, *fields, body="", last=True):
    """A request of "anna" to a host of ours with these header fields, the *last* on its connection."""
    head = ["Host: localhost", f"Authorization: {AUTHORIZATION}", *fields]
    head += ["Connection: close"] if last else []
    return "\r\n".join([f"{line} HTTP/1.1", *head, "", body])


def statuses(came):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", came)]


# Where nothing leads to


UPWARD = (
    "..",
    "%2e%2e",
    ".%2e",
    "%252e%252e",
    "%c0%ae%c0%ae",
    "..%00",
    "..%5c..",
    "..\\..",
    "....",
    "%2e%2e%2f%2e%2e",
    "..;",
    "%uff0e%uff0e",
)
PLACES = (
    "/{up}/{up}/{up}/{up}/etc/passwd",
    "/dicomweb/{up}/{up}/index.sqlite",
    "/dicomweb/studies/{up}",
    "/dicomweb/studies/{up}/{up}/users",
    "/dicomweb/studies/{up}/metadata",
    "/dicomweb/studies/{study}/series/{up}/metadata",
    "/dicomweb/studies/{study}/series/{up}/{up}/{up}/users",
    "/dicomweb/studies/{study}/series/{up}/instances/{up}/frames/{up}",
    "/dicomweb/studies/{study}/bulkdata/{up}/{up}/{up}/users",
    "/dicomweb/studies//etc/passwd",
    "/dicomweb/studies/%2fetc%2fpasswd/metadata",
    "/dicomweb/studies/{study}%00/metadata",
    "/ohif/{up}/{up}/users",
    "/changes/{up}/users",
    "//etc/passwd",
    "/%00",
)


def test_no_path_leads_out_of_what_is_served(site):
    """Each way up at each place, many on one connection, written as no library would let us."""
    study = site.held.key.study_uid
    asked = [place.format(up=up, study=study) for place in PLACES for up in UPWARD]
    left = list(dict.fromkeys(asked))
    while left:
        *first, last = left[:40]
        came = site.exchange(
            "".join(written(f"GET {path}", last=False) for path in first) + written(f"GET {last}")
        )
        found = statuses(came)
        assert found
        assert set(found) <= {307, 400, 404, 405, 406}, came
        assert not [secret for secret in ALL_SECRETS if secret in came]
        del left[: len(found)]  # a target that is malformed is the last one answered
    assert site.is_well()


def test_a_target_that_is_no_path_of_ours_is_refused(site):
    for target in (
        "http://evil.example.org/dicomweb/studies",
        "*",
        "evil",
        "/dicomweb/studies#fragment",
        "/dicomweb/\x80\xff",
        "/dicomweb/studies/\x01",
        "http://[::1",
    ):
        came = site.exchange(written(f"GET {target}"))
        assert all(status in {200, 400, 404, 421} for status in statuses(came)), (target, came)
        assert not [secret for secret in ALL_SECRETS if secret in came]


# What comes back in header fields


INJECTED = "x\r\nSet-Cookie: a=b\r\nX-Injected: 1"


@pytest.mark.parametrize(
    "path",
    [
        "/dicomweb/studies?StudyInstanceUID={bad}",
        "/dicomweb/studies?PatientName={bad}&fuzzymatching=true",
        "/dicomweb/studies?{bad}=1",
        "/dicomweb/studies?includefield={bad}",
        "/dicomweb/studies?limit={bad}",
        "/dicomweb/studies?accept={bad}",
        "/dicomweb/studies/{bad}/metadata",
        "/dicomweb/studies/{bad}/",
        "/dicomweb/studies/{study}/series/{bad}/instances/{bad}",
        "/dicomweb/studies/{study}/series/{bad}/",
        "/changes?since={bad}",
        "/changes/?since={bad}",
        "/?q={bad}",
        "/{bad}/",
        "/wado?requestType=WADO&studyUID={bad}&seriesUID={bad}&objectUID={bad}&contentType={bad}",
    ],
)
def test_nothing_that_is_asked_becomes_a_header_field(site, path):
    for bad in (quote(INJECTED, safe=""), quote(INJECTED.replace("\r", ""), safe=""), "%E5%98%8A%E5%98%8DX"):
        came = site.exchange(written(f"GET {path.format(bad=bad, study=site.held.key.study_uid)}"))
        head = came.partition(b"\r\n\r\n")[0].lower()
        assert statuses(came)[0] < 500, came
        assert b"\nset-cookie" not in head
        assert b"\nx-injected" not in head


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_uid_that_is_written_to_break_header_fields_is_never_in_one(site):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    dataset.PatientName = 'a"\r\nSet-Cookie: a=b'
    dataset.StudyInstanceUID = '1.2"; filename=x'
    dataset.SeriesInstanceUID = dataset.SOPInstanceUID = "1.2;a=b,c"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    held = site.archive.add(dataset)
    study = quote(held.key.study_uid, safe="")
    for path in (f"/dicomweb/studies/{study}/metadata", f"/dicomweb/studies/{study}", "/"):
        head = site.exchange(written(f"GET {path}")).partition(b"\r\n\r\n")[0]
        assert statuses(head)[0] < 500
        assert b"set-cookie" not in head.lower()
        assert b"filename=x" not in head


# Where a request ends


class Taking:
    """A server whose application takes content, behind the guard: what it took, it says."""

    def __init__(self):
        self.socket, self.stop = bind("127.0.0.1", 0), threading.Event()
        self.port, self.context = self.socket.getsockname()[1], None
        guarded = Guard(self.take, hosts=(), origins=())
        self.thread = threading.Thread(target=serve, args=(guarded, self.socket, self.stop))
        self.thread.start()

    async def take(self, scope, receive, send):
        taken = bytearray()
        try:
            async for piece in Request(scope, receive).stream():
                taken += piece
        except ClientDisconnect:
            taken += b" and no end"
        said = b"<%s %s>" % (scope["path"].encode(), taken)
        await Response(said)(scope, receive, send)

    connect, exchange = Site.connect, Site.exchange


@pytest.fixture(scope="module")
def taking():
    taking = Taking()
    yield taking
    taking.stop.set()
    taking.thread.join(20)
    taking.socket.close()


SECOND = written("GET /second")
CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    ("fields", "answered"),
    [
        (("Content-Length: 4", "Content-Length: 5"), 400),
        (("Content-Length: 4, 5",), 400),
        (("Content-Length: 4, 4",), 400),
        (("Content-Length: +4",), 400),
        (("Content-Length: -1",), 400),
        (("Content-Length: 0x4",), 400),
        (("Content-Length: 4 4",), 400),
        (("Content-Length: 99999999999999999999",), 400),
        (("Content-Length : 4",), 400),
        ((" Content-Length: 4",), 400),
        (("Content-Length: 4", CHUNKED), 200),  # in chunks, and then the end (RFC 9112 6.1)
        ((CHUNKED, "Content-Length: 4"), 200),
        ((CHUNKED, "Transfer-Encoding: identity"), 400),
        (("Transfer-Encoding: identity", CHUNKED), 501),
        (("Transfer-Encoding: gzip, chunked",), 501),
        (("Transfer-Encoding: chunked, chunked",), 501),
        (("Transfer-Encoding: xchunked",), 400),
        (("Transfer-Encoding: chunked, identity",), 400),
        (("Transfer-Encoding: \x0bchunked",), 400),
        (("Transfer-Encoding : chunked",), 400),
        (("Transfer-Encoding:\n chunked",), 400),
        (("X\r: y",), 400),
        (("X: \x00",), 400),
        (("X y",), 400),
        ((": y",), 400),
    ],
)
def test_a_request_of_doubtful_length_is_the_last_on_its_connection(taking, fields, answered):
    """What we and a proxy might divide otherwise (RFC 9112 11.2): nothing behind it is answered."""
    came = taking.exchange(written("POST /first", *fields, body="0\r\n\r\n", last=False) + SECOND)
    assert statuses(came) == [answered], came
    assert b"</second" not in came


@pytest.mark.parametrize(
    "body",
    [
        "g\r\nx\r\n0\r\n\r\n",
        "-1\r\nx\r\n0\r\n\r\n",
        "0x1\r\nx\r\n0\r\n\r\n",
        "1 \nx\r\n0\r\n\r\n",
        "1\nx\n0\n\n",
        "1;a\nb\r\nx\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nx\r\n0\r\n\r\n",
        "1\r\nxyz\r\n0\r\n\r\n",
        "1;" + "a" * 20000 + "\r\nx\r\n0\r\n\r\n",
    ],
)
def test_chunks_that_are_none_have_no_end_and_nothing_behind_them_is_answered(taking, body):
    came = taking.exchange(written("POST /first", CHUNKED, body=body, last=False) + SECOND)
    assert b"and no end>" in came
    assert b"</second" not in came


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (("Content-Length: 4",), "abcd"),
        (("Content-Length: 4", "Content-Length: 4"), "abcd"),
        ((CHUNKED,), "2;x=y\r\nab\r\n2\r\ncd\r\n0\r\nX-Trailer: y\r\n\r\n"),
        (("Transfer-Encoding: Chunked",), "4\r\nabcd\r\n0\r\n\r\n"),
    ],
)
def test_two_requests_in_order_are_two_answers(taking, fields, body):
    """What the tests above rely on."""
    came = taking.exchange(written("POST /first", *fields, body=body, last=False) + SECOND)
    assert came.count(b"</first abcd>") == came.count(b"</second >") == 1


def test_content_where_none_is_taken_is_refused_and_nothing_behind_it_is_answered(site):
    for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        for fields, body in (
            (("Content-Length: 5",), "hello"),
            (("Transfer-Encoding: chunked",), "5\r\nhello\r\n0\r\n\r\n"),
        ):
            came = site.exchange(written(f"{method} /healthz", *fields, body=body, last=False) + SECOND)
            assert statuses(came) == [413], (method, fields, came)


def test_a_body_that_announces_gigabytes_is_not_waited_for_where_none_is_taken(site):
    for method, status in (("GET", 413), ("POST", 405)):
        with site.connect() as connection:
            connection.sendall(written(f"{method} /healthz", "Content-Length: 5000000000").encode())
            assert statuses(connection.recv(65536))[0] == status


# Too much


def test_header_fields_beyond_any_need_are_refused(site):
    for fields in (
        [f"X-Large: {'x' * 70_000}"],
        [f"X-{number}: {'x' * 700}" for number in range(95)],
        [f"X-{number}: y" for number in range(5000)],
        [f"Cookie: {'c' * 200_000}"],
        [f"X-Large: {'x' * 2_000_000}"],
    ):
        came = site.exchange(written("GET /healthz", *fields))
        assert not came or statuses(came)[0] == 431, came[:200]
    assert statuses(site.exchange(written("GET /healthz", f"X-Large: {'x' * 40_000}"))) == [200]


def test_an_address_beyond_any_need_is_refused(site):
    for length in (70_000, 1_000_000):
        came = site.exchange(written(f"GET /dicomweb/studies?PatientName={'x' * length}"))
        assert not came or statuses(came)[0] in {400, 414, 431}, came[:200]
    assert site.is_well()


# Slow clients


def until_closed(connection):
    """How long the server keeps the connection open from now on."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.settimeout(LONG_SECONDS)
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - began


def dribbles(connection, piece=b"x", every=0.2):
    """How long the server bears being sent *piece* after *piece*."""
    began = time.monotonic()
    while time.monotonic() - began < LONG_SECONDS:
        try:
            connection.sendall(piece)
        except (ConnectionError, ssl.SSLError):
            break
        readable, _, _ = select.select([connection], [], [], every)
        if readable:
            try:
                if not connection.recv(65536):
                    break
            except (ConnectionError, ssl.SSLError):
                break
    return time.monotonic() - began


HEAD = f"GET /dicomweb/studies HTTP/1.1\r\nHost: localhost\r\nAuthorization: {AUTHORIZATION}\r\n"


@pytest.mark.parametrize("begun", ["", "GET /", HEAD])
def test_a_head_that_does_not_come_to_its_end_is_not_waited_for(site, begun):
    with site.connect() as connection:
        connection.sendall(begun.encode())
        assert until_closed(connection) < LONG_SECONDS


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(site):
    with site.connect() as connection:
        connection.sendall(HEAD.encode())
        assert dribbles(connection, b"X: y\r\n") < LONG_SECONDS


def large_of(site):
    key = site.large.key
    return f"/dicomweb/studies/{key.study_uid}/series/{key.series_uid}/instances/{key.sop_uid}/frames/1"


def unread(site, receive_bytes=4096):
    """A connection on which a large answer is asked for and begun, and nothing of it read."""
    connection = site.connect(receive_bytes=receive_bytes)
    line = written(f"GET {large_of(site)}", "Accept: multipart/related; type=application/octet-stream")
    connection.sendall(line.encode())
    select.select([connection], [], [], LONG_SECONDS)
    return connection


def is_gone(connection):
    """Whether the server has ended the connection; asks the kernel, reads nothing."""
    events = select.poll()
    events.register(connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    return bool(events.poll(0))


@pytest.mark.parametrize("where", ["site", "tls_site"])
def test_who_does_not_read_loses_the_connection_and_others_are_served_meanwhile(request, where):
    site = request.getfixturevalue(where)
    with unread(site) as slow, unread(site) as another:
        assert not is_gone(slow)
        assert site.is_well()
        wait_until(lambda: is_gone(slow) and is_gone(another), LONG_SECONDS, "the slow readers to be cut")
    assert site.is_well()


def test_who_reads_next_to_nothing_loses_the_connection(site):
    with unread(site) as slow:

        def read_a_little():
            with contextlib.suppress(ConnectionError):
                slow.recv(64)
            return is_gone(slow)

        wait_until(read_a_little, LONG_SECONDS, "the slow reader to be cut")


def test_silence_on_an_encrypted_connection_ends_it_whatever_was_agreed(tls_site):
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    cases = [("http/1.1", b""), ("h2", b""), ("h2", b"PRI * HT"), ("h2", preface)]
    connections = []
    for alpn, begun in cases:
        connection = tls_site.connect(alpn=alpn)
        connection.sendall(begun)
        connections.append(connection)
    assert tls_site.is_well()
    for connection in connections:
        assert until_closed(connection) < LONG_SECONDS
        connection.close()


def test_who_holds_many_connections_for_nothing_keeps_nobody_out(site):
    """As many as there may be at all, each with a head that does not come to its end."""
    held = []
    try:
        for _ in range(64):
            connection = site.connect()
            connection.sendall(HEAD.encode())
            held.append(connection)
        assert site.is_well()
    finally:
        for connection in held:
            connection.close()


# TLS and HTTP/2


def test_http_2_is_spoken_by_agreement(tls_site):
    with tls_site.client(http2=True) as client:
        answer = client.get("/dicomweb/studies")
        assert (answer.http_version, answer.status_code) == ("HTTP/2", 200)
        assert client.get(large_of(tls_site)).status_code == 200
        assert client.get("/dicomweb/studies", headers={"authorization": ""}).status_code == 401
        assert client.get("/healthz", headers={"host": "evil.example.org"}).status_code == 421
        assert client.request("GET", "/healthz", content=b"x").status_code == 413
        assert client.get("/healthz", headers={"x-large": "x" * 60_000}).status_code == 200
        with contextlib.suppress(httpx.TransportError):  # it may be cut off before it is answered
            assert client.get("/healthz", headers={"x-large": "x" * 100_000}).status_code == 431
    with tls_site.client() as client:
        answer = client.get("/dicomweb/studies")
        assert (answer.http_version, answer.status_code) == ("HTTP/1.1", 200)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_of_tls_are_not_spoken(tls_site):
    for version, works in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", tls_site.port), timeout=LONG_SECONDS) as connection:
            if works:
                context.wrap_socket(connection).close()
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    context.wrap_socket(connection)


def test_http_2_is_not_spoken_unencrypted(site):
    came = site.exchange(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    assert not came.startswith(b"\0\0")
    upgrade = (
        "Connection: Upgrade, HTTP2-Settings, close",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAAP__",
    )
    came = site.exchange(written("GET /healthz", *upgrade, last=False))
    assert statuses(came) == [200]
    assert b" 101 " not in came


def test_plain_http_on_an_encrypted_port_is_not_answered(tls_site):
    with socket.create_connection(("127.0.0.1", tls_site.port), timeout=LONG_SECONDS) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"ok" not in connection.recv(65536)
