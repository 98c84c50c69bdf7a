"""What conf/nginx.conf has nginx serve without us: to whom, and under which policies."""

import gzip
from http.client import HTTPConnection

import httpx
import pytest

from dicomscp.dicom.identity import InstanceKey
from dicomscp.study import layout
from dicomscp.web import install
from dicomscp.web.app import _SECURITY_HEADERS
from dicomscp.web.exchange import PDF_POLICY
from dicomscp.web.viewer import ViewerSettings, page_policy, publish_site, worker_policy
from tests.peers import NGINX, StaticNginx, require
from tests.unit.web.packages import package

OURS = {name.decode(): value.decode() for name, value in _SECURITY_HEADERS}
KEY = InstanceKey("1.2", "1.2.3", "1.2.3.4")
NAMES = ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8081"]
OTHERS = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]"]


def publish(root):
    """What a gateway would have there of one study, and the viewer."""
    published = root / "dicomweb"
    documents = [layout.study_index(KEY.study_uid), layout.study_metadata(KEY.study_uid)]
    documents += [layout.study_viewer(KEY.study_uid), "studies/index.json.gz"]
    for document in documents:
        (published / document).parent.mkdir(parents=True, exist_ok=True)
        (published / document).write_bytes(gzip.compress(b"[]"))
    value = published / layout.bulk_path(KEY, "00420011")
    value.parent.mkdir(parents=True)
    value.write_bytes(b"%PDF-1.4")
    source = root / "ohif.tgz"
    install.install(root, source, lambda *_: None, integrity=package(source))
    publish_site(ViewerSettings(root))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    publish(root)
    return root


@pytest.fixture(scope="module")
def nginx(root, tmp_path_factory):
    require(StaticNginx.program, NGINX)
    with StaticNginx(tmp_path_factory.mktemp("nginx"), root) as running:
        yield running


@pytest.fixture(scope="module")
def client(nginx):
    with httpx.Client(base_url=f"http://127.0.0.1:{nginx.port}", timeout=10) as client:
        yield client


BULK_DATA = f"/dicomweb/{layout.bulk_path(KEY, '00420011')}"
DATA = [
    "/dicomweb/studies",
    "/dicomweb/studies/1.2/metadata",
    "/dicomweb/studies/1.2/ohif-dicom-json",
    "/studies/1.2/ohif-dicom-json",
]


@pytest.mark.parametrize("host", NAMES)
def test_it_goes_by_the_names_of_this_machine(client, host):
    for path in (*DATA, BULK_DATA, "/ohif/"):
        assert client.get(path, headers={"host": host}).status_code == 200, path


@pytest.mark.parametrize("host", OTHERS)
def test_a_name_rebound_to_this_machine_reads_nothing(client, host):
    for path in (*DATA, BULK_DATA, "/ohif/", "/nothing"):
        answer = client.get(path, headers={"host": host})
        assert (answer.status_code, b"PDF" in answer.content) == (421, False), path


def test_a_request_for_no_host_reads_nothing(nginx):
    connection = HTTPConnection("127.0.0.1", nginx.port, timeout=10)
    connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"
    connection.putrequest("GET", DATA[0], skip_host=True)
    connection.endheaders()
    assert connection.getresponse().status == 421
    connection.close()


def policies(root):
    page, worker = page_policy(ViewerSettings(root)), worker_policy(ViewerSettings(root))
    pages = ("/ohif", "/ohif/", "/ohif/index.html", "/ohif/viewer?StudyInstanceUIDs=1.2")
    scripts = ("/ohif/app-config.js", "/ohif/89.bundle.b327bf3664812958.js")
    documents = (BULK_DATA, f"{BULK_DATA}?accept=application/pdf")
    return {
        **dict.fromkeys(DATA, OURS["content-security-policy"]),
        **dict.fromkeys(documents, PDF_POLICY),
        **dict.fromkeys(pages, page),
        **dict.fromkeys(scripts, worker),
    }


def test_each_answer_has_the_policy_that_we_would_send(client, root):
    for path, policy in policies(root).items():
        headers = client.get(path).headers
        assert headers.get_list("content-security-policy") == [policy], path
        for name in ("x-content-type-options", "referrer-policy", "cross-origin-resource-policy"):
            assert headers.get_list(name) == [OURS[name]], path
        assert headers["cache-control"] == "no-cache"


def test_a_document_is_what_its_address_says(client):
    assert client.get(BULK_DATA).headers["content-type"] == "application/octet-stream"
    for accept in ("application/pdf", "application%2Fpdf"):
        shown = client.get(f"{BULK_DATA}?accept={accept}")
        assert (shown.headers["content-type"], shown.content) == ("application/pdf", b"%PDF-1.4")
    assert client.get(BULK_DATA, params={"accept": "text/html"}).headers["content-type"] == (
        "application/octet-stream"
    )
