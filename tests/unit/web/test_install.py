"""The viewer's files: where they come from, what is made of them, and that all are there or none."""

import gzip
import http.server
import json
import threading
from functools import partial

import pytest

from dicomscp.errors import ConfigError, RefusedError, UnreachableError
from dicomscp.web import install
from tests.peers import find_program, missed
from tests.unit.web.packages import FILES, package


@pytest.fixture
def source(tmp_path):
    return tmp_path / "ohif.tgz"


def installed_from(root, source, **options):
    if "integrity" not in options:
        options["integrity"] = package(source)
    told = []
    made = install.install(root, source, lambda *one: told.append(one), **options)
    assert told
    return made


def content(root, made, name):
    file = made.files[name]
    data = install.file_path(root, name, file).read_bytes()
    assert len(data) == (file.gzip or file.size)
    return gzip.decompress(data) if file.gzip else data


def test_what_is_fixed_to_the_root_of_a_site_is_so_no_more(root, source):
    made = installed_from(root, source)
    script = content(root, made, "app.bundle.0123456789abcdef.js").decode()
    page = install.page(root)

    assert "__webpack_require__.p = (self.PUBLIC_URL||self.location.href" in script
    assert "browserImportFunction(window.PUBLIC_URL+'dicom-microscopy-viewer/" in script
    assert "(ModalitiesInStudy.Value || []).length" in script
    style = content(root, made, "app.bundle.css").decode()
    assert "url(a34f9d1faa5f3315.woff2)" in style
    assert "url(//elsewhere.example/)" in style
    assert b'"assets/icon.png"' in content(root, made, "manifest.json")
    assert b'"icon.png"' in content(root, made, "assets/browser.xml")
    for one in ("manifest.json", "app-config.js", "app.bundle.css", "assets/browser.xml"):
        assert f'"%BASE%/{one}"' in page
    assert "<script>" not in page
    assert '"//elsewhere.example/"' in page


def test_files_are_deflated_where_that_gains_something_and_some_are_left_out(root, source):
    made = installed_from(root, source)

    assert set(made.files) == set(FILES) - {
        "index.html",
        "app-config.js",
        "sw.js",
        "app.bundle.0123456789abcdef.js.map",
    }
    assert [name for name, file in made.files.items() if not file.gzip] == [
        "a34f9d1faa5f3315.woff2",
        "assets/icon.png",
    ]
    assert content(root, made, "0ddf166f7a343eda.wasm") == FILES["0ddf166f7a343eda.wasm"]
    # A name that tells of the content, unless the content is not what the name tells of.
    assert {name for name, file in made.files.items() if file.lasting} == {
        "89.bundle.b327bf3664812958.js",
        "a34f9d1faa5f3315.woff2",
        "0ddf166f7a343eda.wasm",
    }
    assert install.installed(root) == made


def test_another_one_takes_its_place_and_is_removed(root, source):
    installed_from(root, source)
    again = package(source, FILES | {"new.js": b"1" * 100})

    made = installed_from(root, source, integrity=again)

    assert content(root, made, "new.js") == b"1" * 100
    assert sorted(path.name for path in (root / "viewer").iterdir()) == ["ohif"]
    assert install.remove(root)
    assert install.installed(root) is None
    assert not install.remove(root)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"index.html": b""}, "no OHIF app in it"),
        (FILES | {"../../escape.js": b"x"}, "has no place"),
        (FILES | {"a b.js": b"x"}, "has no place"),
    ],
)
def test_what_is_no_viewer_is_refused_and_what_was_there_stays(root, source, files, told):
    before = installed_from(root, source)
    integrity = package(source, files)

    with pytest.raises(RefusedError, match=told):
        installed_from(root, source, integrity=integrity)

    assert install.installed(root) == before
    assert sorted(path.name for path in (root / "viewer").iterdir()) == ["ohif"]


def test_a_package_that_is_another_than_the_pinned_one_is_refused(root, source):
    found = package(source)

    with pytest.raises(RefusedError) as caught:
        install.install(root, source, lambda *_: None)

    assert found in str(caught.value)
    assert install.INTEGRITY in str(caught.value)
    with pytest.raises(ConfigError, match="--integrity"):
        installed_from(root, source, integrity="md5-abc")
    with pytest.raises(ConfigError, match="pinned"):
        install.install(root, source, lambda *_: None, version="3.12.0")


def test_a_file_that_is_cut_short_is_refused(root, source):
    package(source)
    source.write_bytes(source.read_bytes()[:-200])
    with pytest.raises(RefusedError, match="integrity"):
        install.install(root, source, lambda *_: None)
    assert install.installed(root) is None


def test_a_folder_is_taken_as_it_is(root, tmp_path):
    folder = tmp_path / "package"
    for name, data in FILES.items():
        path = folder / "dist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "package.json").write_text('{"name": "@ohif/app", "version": "3.14.0"}')

    made = install.install(root, folder, lambda *_: None)

    assert (made.version, made.integrity) == ("3.14.0", "")
    assert len(made.files) == len(FILES) - 4


def test_what_an_installation_left_that_was_cut_short_goes(root, source):
    (root / "viewer/.999999999.new/ohif").mkdir(parents=True)
    installed_from(root, source)
    assert sorted(path.name for path in (root / "viewer").iterdir()) == ["ohif"]


def test_without_npm_it_is_said_what_to_do(root, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnreachableError, match=r"npm pack @ohif/app@3\.13\.2.*viewer install FILE"):
        install.install(root, None, lambda *_: None)


class Registry(http.server.BaseHTTPRequestHandler):
    """A registry of npm that has one package."""

    def __init__(self, *arguments, file, integrity):
        self._file, self._integrity = file, integrity
        super().__init__(*arguments)

    def do_GET(self):
        url = f"http://{self.headers['host']}/file.tgz"
        dist = {"tarball": url, "integrity": self._integrity}
        one = {"name": "@ohif/app", "version": "3.13.2", "dist": dist}
        whole = {"name": "@ohif/app", "dist-tags": {"latest": "3.13.2"}, "versions": {"3.13.2": one}}
        found = "ohif" in self.path.lower() or self.path == "/file.tgz"
        body = self._file.read_bytes() if self.path == "/file.tgz" else json.dumps(whole).encode()
        self.send_response(200 if found else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def registry(source, monkeypatch):
    if find_program("npm") is None:
        missed("npm is not installed (Debian package npm)")
    integrity = package(source)
    serving = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Registry, file=source, integrity=integrity)
    )
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{serving.server_port}/")
    yield integrity
    serving.shutdown()
    serving.server_close()


def test_npm_fetches_it_with_the_settings_that_it_has(root, registry):
    made = install.install(root, None, lambda *_: None, integrity=registry)

    assert made.version == "3.13.2"
    assert sorted(path.name for path in (root / "viewer").iterdir()) == ["ohif"]
    with pytest.raises(RefusedError, match="not the package that is meant"):
        install.install(root, None, lambda *_: None)
    with pytest.raises(UnreachableError, match=r"npm could not fetch @ohif/app@3\.99\.0: .*"):
        install.install(root, None, lambda *_: None, version="3.99.0", integrity=registry)
