import asyncio
import socket
from urllib.parse import quote

import httpx
import pydicom
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from dicomscp.dicom.matching import STANDARD
from dicomscp.errors import BusyError
from dicomscp.web.app import WebSettings, create_app
from tests.unit.web.held import SOURCES

CDA = "1.2.840.10008.5.1.4.1.1.104.2"


class Failing:
    """An archive whose searches end with an error."""

    model = STANDARD

    def __init__(self, error):
        self.error = error

    def find(self, query, goes_on):
        raise self.error


def raw(gateway, text):
    """What the server answers to these bytes."""
    with socket.create_connection(gateway.socket.getsockname(), timeout=5) as connection:
        connection.sendall(text.encode())
        return connection.recv(65536).decode("latin-1")


# Who may ask


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8080", "[::1]:8080", "localhost:1", "LOCALHOST.", "10.1.2.3", "a.localhost"],
)
def test_addresses_and_loopback_names_are_always_ours(gateway, host):
    assert gateway.start().get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["gateway.example.org:80", "GATEWAY.example.org"])
def test_listed_host_names_are_ours(gateway, host):
    client = gateway.start(hosts=("Gateway.Example.org",))
    assert client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example.org", "localhost.evil.org", "127.0.0.1.evil.org", "evil.org:8080"]
)
def test_a_name_rebound_to_this_machine_is_refused(gateway, host):
    gateway.archive.add_file("CT_small.dcm")
    response = gateway.start(hosts=("gateway.example.org",)).get("/dicomweb/studies", headers={"host": host})
    assert response.status_code == 421
    assert response.headers["content-type"] == "application/problem+json"
    assert "web.hosts" in response.json()["detail"]


def test_an_asterisk_takes_any_host(gateway):
    assert gateway.start(hosts=("*",)).get("/healthz", headers={"host": "any.example.org"}).status_code == 200


def test_a_request_without_a_host_is_refused(gateway):
    gateway.start()
    assert " 400 " in raw(gateway, "GET /healthz HTTP/1.0\r\n\r\n")
    assert " 400 " in raw(gateway, "GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: 127.0.0.1\r\n\r\n")
    for host in ("[::1", "a b", "user@localhost", "local/host", "::1"):
        assert " 400 " in raw(gateway, f"GET /healthz/ HTTP/1.1\r\nHost: {host}\r\n\r\n"), host


def test_other_origins_get_nothing_unless_listed(gateway):
    response = gateway.start().get("/dicomweb/studies", headers={"origin": "https://evil.example.org"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_listed_origin_may_read(gateway):
    client = gateway.start(cors_origins=("https://viewer.example.org",))
    for path in ("/dicomweb/studies", "/dicomweb/studies/9.9/metadata"):
        response = client.get(path, headers={"origin": "https://viewer.example.org"})
        assert response.headers["access-control-allow-origin"] == "https://viewer.example.org"
        assert "Origin" in response.headers["vary"]
        other = client.get(path, headers={"origin": "https://evil.example.org"})
        assert "access-control-allow-origin" not in other.headers


def test_a_preflight_as_ohif_makes_it_is_answered(gateway):
    client = gateway.start(cors_origins=("https://viewer.example.org",))
    asks = {
        "origin": "https://viewer.example.org",
        "access-control-request-method": "GET",
        "access-control-request-headers": "accept,authorization",
    }
    path = "/dicomweb/studies/1.2/series/1.3/instances/1.4/frames/1"
    response = client.options(path, headers=asks)
    assert response.is_success
    assert response.headers["access-control-allow-origin"] == "https://viewer.example.org"
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    refused = client.options(path, headers={**asks, "origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in refused.headers


def test_pages_of_listed_origins_show_images_and_documents(gateway):
    """An image and a frame are asked for without an Origin, so it is their headers that decide."""
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    dataset.SOPClassUID, dataset.MIMETypeOfEncapsulatedDocument = CDA, "text/xml"
    dataset.EncapsulatedDocument = b"<a/>"
    study_uid, series_uid, sop_uid = gateway.archive.add(dataset).key
    instance = f"/dicomweb/studies/{study_uid}/series/{series_uid}/instances/{sop_uid}"
    bulk = f"/dicomweb/studies/{study_uid}/bulkdata/{series_uid}/{sop_uid}/00420011?accept=text/xml"
    client = gateway.start(cors_origins=("https://viewer.example.org", "https://a.example.org"))
    for path in (f"{instance}/rendered", bulk):
        headers = client.get(path).headers
        assert headers["cross-origin-resource-policy"] == "cross-origin"
        policy = headers["content-security-policy"].split("; ")
        assert "frame-ancestors 'self' https://a.example.org https://viewer.example.org" in policy
        assert "sandbox" in policy
    for path in ("/", "/dicomweb/studies", "/nothing"):  # what our own pages do not frame either
        assert "frame-ancestors 'none'" in client.get(path).headers["content-security-policy"]


def test_without_listed_origins_pages_of_elsewhere_show_nothing(gateway):
    headers = gateway.start().get("/dicomweb/studies").headers
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_every_answer_has_the_security_headers(gateway):
    client = gateway.start()
    for path in ("/", "/healthz", "/dicomweb/studies", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"].startswith("default-src 'none'")


# How failures are told


def test_an_unknown_address_and_a_wrong_method_are_problems(gateway):
    client = gateway.start()
    for response, status in ((client.get("/nothing"), 404), (client.post("/dicomweb/studies"), 405)):
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["status"] == status
        assert problem["title"]
        assert problem["detail"].endswith(".")
    assert response.headers["allow"] == "GET, HEAD"


def test_nothing_is_redirected(gateway):
    client = gateway.start()
    for path in ("/dicomweb/studies", "/dicomweb/studies/1.2/metadata", "/status", "/changes", "/healthz"):
        response = client.get(f"{path}/?PatientName=Doe")
        assert response.status_code == 404, path
        assert response.headers["content-type"] == "application/problem+json"
        assert "location" not in response.headers


def test_a_busy_archive_says_when_to_come_back(gateway):
    busy = Failing(BusyError("The index is being rebuilt; ask again later."))
    response = gateway.start(busy).get("/dicomweb/studies")
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.json()["detail"] == "The index is being rebuilt; ask again later."


def test_an_unexpected_failure_is_logged_once_and_told_without_internals(gateway):
    client = gateway.start(Failing(KeyError("secret internals")))
    with structlog.testing.capture_logs() as logs:
        response = client.get("/dicomweb/studies?PatientName=Doe*")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert (entry["event"], entry["path"]) == ("request_failed", "/dicomweb/studies")
    assert "Doe" not in str({name: value for name, value in entry.items() if name != "exc_info"})


@given(
    path=st.text(max_size=30)
    | st.sampled_from(["studies", "series", "instances", "metadata", "frames", "bulkdata"]),
    rest=st.sampled_from(
        [
            "",
            "/metadata",
            "/series/1/instances/2/frames/1",
            "/bulkdata/1/2/3",
            "/series",
            "/rendered",
            "/series/1/instances/2/thumbnail",
        ]
    ),
    query=st.text(alphabet="abc=&%*?<>\\'\"0123456789.", max_size=30),
    headers=st.dictionaries(
        st.sampled_from(["accept", "accept-encoding", "if-none-match", "if-range", "range"]),
        st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    ),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_is_a_failure_of_the_gateway(gateway, path, rest, query, headers):
    app = create_app(gateway.archive, WebSettings(), gateway.published, gateway.state)

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1"
        ) as client:
            return await client.get(f"/dicomweb/studies/{quote(path)}{rest}?{query}", headers=headers)

    response = asyncio.run(ask())
    assert response.status_code < 500
    assert response.status_code < 400 or response.headers["content-type"] == "application/problem+json"


# Probes


def test_health_and_readiness(gateway):
    facts = (True, {"pipeline": "running"})
    client = gateway.start(ready=lambda: facts)
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"ready": True, "pipeline": "running"}
    facts = (False, {"pipeline": "restarting"})
    response = client.get("/readyz")
    assert (response.status_code, response.json()["pipeline"]) == (503, "restarting")


def test_metrics_are_prometheus_text(gateway):
    response = gateway.start().get("/metrics")
    # By which a scraper reads it; of later versions it has nothing.
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert list(text_string_to_metric_families(response.text))


def test_metrics_can_be_the_callers(gateway):
    response = gateway.start(metrics=lambda: b"dicomscp_instances_total 3\n").get("/metrics")
    assert response.text == "dicomscp_instances_total 3\n"
