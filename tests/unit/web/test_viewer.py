"""The viewer over HTTP: its files as they lie, and a page and settings made for this gateway."""

import gzip
import json
import re

import pytest

from dicomscp.errors import ConfigError
from dicomscp.web import install
from dicomscp.web.users import Cost, Users, set_password
from dicomscp.web.viewer import Viewer, ViewerSettings, app_config, publish_site, read_settings
from tests.unit.web.packages import FILES, package

SCRIPT = "/ohif/app.bundle.0123456789abcdef.js"
LASTING = "/ohif/89.bundle.b327bf3664812958.js"


def put_in(root):
    source = root / "ohif.tgz"
    install.install(root, source, lambda *_: None, integrity=package(source))


@pytest.fixture
def viewer(gateway, tmp_path):
    def start(*, installed=True, **settings):
        if installed:
            put_in(tmp_path)
        return gateway.start(viewer=ViewerSettings(tmp_path, **settings))

    return start


def config_of(client, base="/ohif"):
    text = client.get(f"{base}/app-config.js").text
    return json.loads(re.search(r"window\.config = (.*);", text, re.DOTALL)[1])


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/ohif/", "text/html; charset=utf-8"),
        ("/ohif/app-config.js", "text/javascript; charset=utf-8"),
        (SCRIPT, "text/javascript; charset=utf-8"),
        ("/ohif/app.bundle.css", "text/css; charset=utf-8"),
        ("/ohif/0ddf166f7a343eda.wasm", "application/wasm"),
        ("/ohif/a34f9d1faa5f3315.woff2", "font/woff2"),
        ("/ohif/assets/icon.png", "image/png"),
        ("/ohif/manifest.json", "application/json"),
    ],
)
def test_each_file_says_what_it_is(viewer, path, content_type):
    answer = viewer().get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, content_type)
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["", "/", "/viewer?StudyInstanceUIDs=1.2.3", "/viewer/dicomjson?url=/a.json"]
)
def test_places_in_the_app_are_its_page(viewer, path):
    page = viewer().get(f"/ohif{path}")

    assert page.status_code == 200
    assert f'src="{SCRIPT}"' in page.text
    assert page.headers["cache-control"] == "no-cache"
    policy = page.headers["content-security-policy"]
    assert "script-src 'self' 'wasm-unsafe-eval';" in policy
    assert "frame-ancestors 'self'" in policy
    assert not re.search(r"<script>|<script [^>]*>[^<]|javascript:| on[a-z]+=", page.text)


def test_bytes_go_out_as_they_lie_or_inflated(viewer):
    client = viewer()
    plain = client.get(LASTING)
    deflated = client.get(LASTING, headers={"accept-encoding": "gzip"})

    assert plain.content == deflated.content == FILES[LASTING.removeprefix("/ohif/")]
    assert "content-encoding" not in plain.headers
    assert deflated.headers["content-encoding"] == "gzip"
    assert int(deflated.headers["content-length"]) < len(plain.content)
    assert plain.headers["etag"] != deflated.headers["etag"]
    for one in (plain, deflated):
        assert one.headers["vary"] == "Accept-Encoding"
        assert one.headers["cache-control"] == "public, max-age=31536000, immutable"
        headers = {"if-none-match": one.headers["etag"], "accept-encoding": "gzip, identity"}
        if one is plain:
            headers["accept-encoding"] = "identity"
        known = client.get(LASTING, headers=headers)
        assert (known.status_code, known.content) == (304, b"")
        head = client.head(LASTING, headers=headers | {"if-none-match": ""})
        assert head.headers["content-length"] == one.headers["content-length"]
        assert head.content == b""


def test_what_was_rewritten_is_asked_for_again(viewer):
    assert viewer().get(SCRIPT).headers["cache-control"] == "no-cache"


def test_a_worker_may_make_functions_out_of_text_and_the_page_may_not(viewer):
    client = viewer()
    assert "'unsafe-eval'" in client.get(SCRIPT).headers["content-security-policy"]
    assert "'unsafe-eval'" not in client.get("/ohif/").headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["no.js", "sw.js", "..%2f..%2findex.sqlite", "%2e%2e/version.json", "index.html.gz"]
)
def test_there_is_nothing_else(viewer, path):
    assert viewer().get(f"/ohif/{path}").status_code == 404


def test_it_may_be_installed_and_removed_while_we_run(viewer, tmp_path):
    client = viewer(installed=False)
    absent = client.get("/ohif/")
    assert absent.status_code == 404
    assert "dicomscp viewer install" in absent.json()["detail"]
    put_in(tmp_path)
    assert client.get("/ohif/").status_code == 200
    install.remove(tmp_path)
    assert client.get(SCRIPT).status_code == 404


def test_a_study_has_an_address_in_it_while_it_is_installed(tmp_path):
    viewer = Viewer(ViewerSettings(tmp_path, base_path="/pacs/view"))
    assert viewer.study_url("1.2") is None
    put_in(tmp_path)
    assert viewer.study_url("1.2&x") == "/pacs/view/viewer?StudyInstanceUIDs=1.2%26x"
    install.remove(tmp_path)
    assert viewer.study_url("1.2") is None


def test_it_stands_under_any_path(viewer):
    client = viewer(base_path="/pacs/view", base_url="https://pacs.example.org/pacs/dicomweb")

    page = client.get("/pacs/view/viewer?StudyInstanceUIDs=1.2")
    config = config_of(client, "/pacs/view")

    assert 'src="/pacs/view/app.bundle.' in page.text
    assert "https://pacs.example.org;" in page.headers["content-security-policy"]
    assert config["routerBasename"] == "/pacs/view"
    assert config["dataSources"][0]["configuration"]["wadoRoot"] == "https://pacs.example.org/pacs/dicomweb"
    assert 'window.PUBLIC_URL = "/pacs/view/";' in client.get("/pacs/view/app-config.js").text
    assert client.get("/ohif/").status_code == 404


def test_the_settings_of_the_operator_are_laid_over_ours(viewer):
    theirs = {
        "showStudyList": False,
        "showErrorDetails": None,
        "maxNumRequests": {"prefetch": 5},
        "hotkeys": [1],
        "oidc": [{"authority": "https://login.example.org/realm"}],
        "dataSources": [
            {"sourceName": "dicomweb", "configuration": {"dicomUploadEnabled": True}},
            {"sourceName": "other", "configuration": {"qidoRoot": "https://other.example.org:8443/rs"}},
        ],
    }
    client = viewer(settings=theirs)

    config = config_of(client)

    assert config["showStudyList"] is False
    assert "showErrorDetails" not in config
    assert config["maxNumRequests"] == {"interaction": 100, "thumbnail": 5, "prefetch": 5}
    sources = {one["sourceName"]: one["configuration"] for one in config["dataSources"]}
    assert list(sources) == ["dicomweb", "dicomjson", "other"]
    assert sources["dicomweb"]["dicomUploadEnabled"] is True
    assert sources["dicomweb"]["staticWado"] is True
    policy = client.get("/ohif/").headers["content-security-policy"]
    connect = re.search(r"connect-src ([^;]*)", policy)[1].split()
    assert connect == [
        "'self'",
        "blob:",
        "data:",
        "https://login.example.org",
        "https://other.example.org:8443",
    ]


def uploads(config):
    return config["dataSources"][0]["configuration"]["dicomUploadEnabled"]


def test_there_is_a_button_to_store_files_where_that_is_done(viewer):
    client = viewer(upload=True)
    assert uploads(config_of(client)) is True
    assert uploads(app_config(ViewerSettings("/"))) is False


def test_who_may_not_store_has_no_button_for_it(gateway, tmp_path):
    put_in(tmp_path)
    users = tmp_path / "users"
    for name, scopes in (("anna", ["read", "write"]), ("ward", ["read"])):
        set_password(users, name, scopes, f"{name}'s password", cost=Cost(10, 8, 1))
    client = gateway.start(viewer=ViewerSettings(tmp_path, upload=True), schemes={"basic": Users(users)})
    answers = {
        name: client.get("/ohif/app-config.js", auth=(name, f"{name}'s password"))
        for name in ("anna", "ward")
    }
    found = {
        name: json.loads(re.search(r"window\.config = (.*);", answer.text, re.DOTALL)[1])
        for name, answer in answers.items()
    }
    assert {name: uploads(config) for name, config in found.items()} == {"anna": True, "ward": False}
    assert answers["anna"].headers["vary"] == "Authorization"
    assert answers["anna"].headers["etag"] != answers["ward"].headers["etag"]


def test_without_preload_there_is_one_data_source():
    found = app_config(ViewerSettings("/", preload=False))["dataSources"]
    assert [one["sourceName"] for one in found] == ["dicomweb"]


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is not JSON"), ("[1]", "is not a JSON object"), (None, "cannot be read")]
)
def test_settings_that_cannot_be_read_are_errors_of_the_configuration(tmp_path, text, told):
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"viewer.settings: .*{told}"):
        read_settings(path)
    with pytest.raises(ConfigError, match="dataSources is a list"):
        app_config(ViewerSettings(tmp_path, settings={"dataSources": {}}))


def test_other_web_servers_find_page_and_settings_as_files(tmp_path):
    publish_site(ViewerSettings(tmp_path))
    assert not (tmp_path / "viewer").exists()
    put_in(tmp_path)

    publish_site(ViewerSettings(tmp_path, base_path="/here", upload=True))

    site = {path.name: gzip.decompress(path.read_bytes()) for path in (tmp_path / "viewer/site").iterdir()}
    assert set(site) == {"index.html.gz", "app-config.js.gz"}
    assert b'src="/here/app.bundle.' in site["index.html.gz"]
    assert b'"dicomUploadEnabled": false' in site["app-config.js.gz"]  # they store nothing
