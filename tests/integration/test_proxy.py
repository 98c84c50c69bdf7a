"""Behind nginx as conf/nginx-proxy.conf sets it up: HTTPS, a path of its own, links that lead back."""

import re
import ssl
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient

from tests.certificates import certified
from tests.gateway import Gateway, run_command
from tests.peers import NGINX, ShippedNginx, require
from tests.processes import free_port, wait_until
from tests.unit.web.packages import FILES

STUDY = "1.2.826.5"


class ReverseProxy(ShippedNginx):
    """nginx on *port*, in front of the web server on the port *behind*."""

    configuration, user = "nginx-proxy.conf", "www-data"

    def __init__(self, directory: Path, port: int, behind: int) -> None:
        super().__init__(directory)
        self.port, self._behind = port, behind
        self.url = f"https://127.0.0.1:{port}"
        self.certificate, self._key = certified(directory)

    def replaced(self) -> dict[str, str]:
        return {
            "listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
            "/etc/ssl/pacs.pem": str(self.certificate),
            "/etc/ssl/pacs.key": str(self._key),
            "proxy_pass http://127.0.0.1:8080/;": f"proxy_pass http://127.0.0.1:{self._behind}/;",
            "proxy_pass http://127.0.0.1:8080;": f"proxy_pass http://127.0.0.1:{self._behind};",
        }


@pytest.fixture(scope="module")
def port():
    """That of the proxy, which the gateway knows beforehand."""
    return free_port()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, port):
    folder = tmp_path_factory.mktemp("proxied")
    for name, data in FILES.items():
        (folder / "ohif" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "ohif" / name).write_bytes(data)
    installed = run_command("viewer", "install", folder / "ohif", "--root", folder / "root")
    assert installed.returncode == 0, installed.stderr
    settings = {
        "publish.base_url": f"https://127.0.0.1:{port}/pacs/dicomweb",
        "viewer.base_path": "/pacs/ohif",
        "pipeline.quiet_seconds": 0.1,
    }
    with Gateway(folder / "root", settings=settings) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def proxy(gateway, port, tmp_path_factory):
    require(ReverseProxy.program, NGINX)
    with ReverseProxy(tmp_path_factory.mktemp("nginx"), port, gateway.web_port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def client(proxy):
    """What a browser is: it follows links, and asks for gzip."""
    context = ssl.create_default_context(cafile=proxy.certificate)
    with httpx.Client(base_url=proxy.url, verify=context, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def dicomweb(proxy):
    session = requests.Session()
    session.trust_env = False  # which may name authorities of its own
    session.verify = str(proxy.certificate)
    return DICOMwebClient(f"{proxy.url}/pacs/dicomweb", session=session, chunk_size=300_000)


@pytest.fixture(scope="module")
def stored(dicomweb, pydicom_files):
    """Some instances that came through the proxy, in a body larger than nginx takes unless it is told to."""
    sent = []
    for number in range(1, 41):
        dataset = pydicom.dcmread(pydicom_files / "CT_small.dcm")
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = STUDY, f"{STUDY}.1"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{STUDY}.1.{number}"
        dataset.InstanceNumber = number
        sent.append(dataset)
    answer = dicomweb.store_instances(sent)
    assert len(answer.ReferencedSOPSequence) == len(sent)
    assert answer.RetrieveURL == f"{dicomweb.base_url}/studies/{STUDY}"
    wait_until(lambda: is_published(dicomweb, len(sent)), 30, "the study to be published whole")
    return sent


def is_published(dicomweb, count):
    return len(dicomweb.retrieve_study_metadata(STUDY)) == count


def test_links_of_answers_and_documents_lead_back_through_the_proxy(dicomweb, client, stored):
    (study,) = dicomweb.search_for_studies(search_filters={"StudyInstanceUID": STUDY})
    (series,) = dicomweb.search_for_series(STUDY)
    (instance,) = dicomweb.search_for_instances(STUDY, limit=1)
    for found in (study, series, instance):
        (address,) = found["00081190"]["Value"]
        assert address.startswith(f"{dicomweb.base_url}/studies/{STUDY}")
        assert len(client.get(f"{address}/metadata").json()) in {len(stored), 1}
    (metadata, *_) = dicomweb.retrieve_series_metadata(STUDY, f"{STUDY}.1")
    (pixels,) = dicomweb.retrieve_bulkdata(metadata["7FE00010"]["BulkDataURI"])
    (frame,) = dicomweb.retrieve_instance_frames(STUDY, f"{STUDY}.1", f"{STUDY}.1.1", [1])
    assert pixels == frame == stored[0].PixelData
    assert dicomweb.retrieve_instance(STUDY, f"{STUDY}.1", f"{STUDY}.1.40") == stored[-1]
    assert len(dicomweb.retrieve_study(STUDY)) == len(stored)


def test_a_page_of_the_proxy_stores_and_is_told_where(client, proxy, pydicom_files):
    """As OHIF's upload does it: the browser tells the origin of the page."""
    file = (pydicom_files / "MR_small.dcm").read_bytes()
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + file + b"\r\n--b--"
    fields = {
        "content-type": 'multipart/related; type="application/dicom"; boundary=b',
        "origin": proxy.url,
    }
    answer = client.post("/pacs/dicomweb/studies", content=body, headers=fields)
    assert answer.status_code == 200
    (address,) = answer.json()["00081190"]["Value"]
    assert (
        answer.headers["location"]
        == address
        == f"{proxy.url}/pacs/dicomweb/studies/"
        + str(pydicom.dcmread(pydicom_files / "MR_small.dcm", stop_before_pixels=True).StudyInstanceUID)
    )
    fields["origin"] = "https://evil.example.org"
    assert client.post("/pacs/dicomweb/studies", content=body, headers=fields).status_code == 403


def test_the_viewer_and_what_its_settings_and_documents_name_are_there(client, proxy, dicomweb, stored):
    page = client.get("/pacs/ohif/viewer", params={"StudyInstanceUIDs": STUDY})
    assert page.status_code == 200
    named = re.findall(r'(?:src|href)="(/[^/"][^"]*)"', page.text)
    assert len(named) >= 4
    assert {path: client.get(path).status_code for path in named} == dict.fromkeys(named, 200)
    settings = client.get("/pacs/ohif/app-config.js").text
    assert '"routerBasename": "/pacs/ohif"' in settings
    for root in ("qidoRoot", "wadoRoot"):
        assert f'"{root}": "{dicomweb.base_url}"' in settings
    policy = page.headers["content-security-policy"]
    assert f"connect-src 'self' blob: data: {proxy.url};" in policy
    for address in (
        f"/pacs/studies/{STUDY}/ohif-dicom-json",
        f"/pacs/dicomweb/studies/{STUDY}/ohif-dicom-json",
    ):
        document = client.get(address)
        assert document.headers["content-encoding"] == "gzip"
        (frame, *_) = re.findall(r'"wadors:([^"]+)"', document.text)
        assert client.get(frame).status_code == 200


def test_every_link_of_the_status_page_leads_somewhere(client, stored):
    assert client.get("/pacs", follow_redirects=True).url.path == "/pacs/"
    for path in ("/pacs/", f"/pacs/?study={STUDY}", "/pacs/?q=CT"):
        page = client.get(path)
        named = {
            urljoin(str(page.url), one) for one in re.findall(r'(?:href|src|action)="([^"#]+)"', page.text)
        }
        assert len(named) >= 5
        found = {address: client.get(address.replace("&amp;", "&")).status_code for address in named}
        assert set(found.values()) == {200}, found
    assert client.get("/pacs/status").json()["running"] is True
    wado = {"requestType": "WADO", "studyUID": STUDY, "seriesUID": f"{STUDY}.1", "objectUID": f"{STUDY}.1.1"}
    assert client.get("/pacs/wado", params=wado | {"contentType": "image/png"}).content[:4] == b"\x89PNG"


def test_what_caches_and_players_ask_passes_through(client, proxy, stored):
    address = f"/pacs/dicomweb/studies/{STUDY}/series/{STUDY}.1"
    metadata = client.get(f"{address}/metadata")
    assert metadata.headers["content-encoding"] == "gzip"
    etag = metadata.headers["etag"]
    assert client.get(f"{address}/metadata", headers={"if-none-match": etag}).status_code == 304
    (pixels,) = {metadata.json()[0]["7FE00010"]["BulkDataURI"]}
    octets = {"accept": "application/octet-stream"}
    part = client.get(pixels, headers=octets | {"range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, stored[0].PixelData[2:6])
    head = client.head(f"{address}/instances/{STUDY}.1.1", headers={"accept": "application/dicom"})
    assert int(head.headers["content-length"]) > len(stored[0].PixelData)
    assert client.options("/pacs/dicomweb/").text.count(f'base="{proxy.url}/pacs/dicomweb/"') == 1
