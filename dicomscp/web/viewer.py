"""The viewer: OHIF's files as they were installed, and the page and settings made for this gateway.

    <base path>                        the page: also for every path below it without an extension, which
    <base path>/viewer?...             are places in the app
    <base path>/app-config.js          its settings, made from ours
    <base path>/...                    its files, deflated as they lie

A reverse proxy passes paths as they are: the base path is what browsers see.  With the package's content in
their names files are kept by browsers for good; others are asked for again, by their digest.

The policy of the page is as narrow as OHIF works with:

- its own scripts, and WebAssembly, which decoders are made of; no inline script: the page has none;
- inline styles, which its libraries put into the page as they draw;
- images, media, documents and connections of this server, of `blob:` and `data:`, which it makes itself (PDF,
  thumbnails, WebAssembly inside of scripts), and of those servers that the settings name;
- workers of this server, and of `blob:`.

A script's own policy counts when it runs as a worker: there the glue of the decoders makes functions out of
text (`unsafe-eval`).  Neither a patient's name nor anything else of a study ever is a script's text there.
"""

import hashlib
import re
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomscp.errors import ConfigError, DamagedError
from dicomscp.web import install
from dicomscp.web.access import OpenRoute, may_store
from dicomscp.web.exchange import is_known
from dicomscp.web.install import BASE, File, Installed
from dicomscp.web.media import takes_gzip
from dicomscp.web.problem import Problem

SETTINGS, PAGE = "app-config.js", "index.html"
DICOMWEB, DICOM_JSON = "dicomweb", "dicomjson"
"""The names of the two data sources."""

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".jsonc": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".webapp": "application/manifest+json",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xml": "application/xml",
}
_ORIGIN = re.compile(
    r"https?://[A-Za-z0-9.-]+(?::[0-9]+)?(?=/|$)|https?://\[[0-9A-Fa-f:.]+\](?::[0-9]+)?(?=/|$)"
)
_LASTING = "public, max-age=31536000, immutable"

# What stood in the page as inline scripts, for the path that {} is.
_HEAD = """\
console.time("scriptToView");
window.PUBLIC_URL = {};
function browserImportFunction(name) {{ return import(name); }}
"""


class ViewerSettings(NamedTuple):
    """What the viewer is told.

    *root* has the files that were installed.  *base_path*, without a slash at its end, is where browsers find
    the viewer, *base_url* where they find DICOMweb.  *settings* are laid over those that are made here.  With
    *preload* studies have a document for the second data source.  With *upload* the list of studies has a
    button to store files, for those who may.
    """

    root: Path
    base_path: str = "/ohif"
    base_url: str = "/dicomweb"
    settings: Mapping[str, Any] = {}
    preload: bool = True
    upload: bool = False


def read_settings(path: Path | None) -> dict[str, Any]:
    """The viewer's settings in the JSON file at *path*; none without one.

    Raises ConfigError if it cannot be read or is no object.
    """
    if path is None:
        return {}
    try:
        found = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"viewer.settings: {path} cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"viewer.settings: {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"viewer.settings: {path} is not a JSON object, as window.config is")
    return found


def app_config(settings: ViewerSettings) -> dict[str, Any]:
    """OHIF's settings: ours, with those of the operator laid over them.

    That is done as a merge patch (RFC 7396): objects are merged, null takes away, all else replaces; except
    for data sources, which are merged by their names.
    """
    ours: dict[str, Any] = {
        "name": "dicomscp",
        "routerBasename": settings.base_path,
        "extensions": [],
        "modes": [],
        "customizationService": {},
        "showStudyList": True,
        "maxNumberOfWebWorkers": 3,
        "showWarningMessageForCrossOrigin": False,  # nothing here needs isolation; what is shared is ours
        "showCPUFallbackMessage": True,
        "showLoadingIndicator": True,
        "strictZSpacingForVolumeViewport": True,
        "groupEnabledModesFirst": True,
        "showErrorDetails": "always",
        "maxNumRequests": {"interaction": 100, "thumbnail": 5, "prefetch": 25},
        "defaultDataSourceName": DICOMWEB,
        "dataSources": [_dicomweb(settings)] + [_dicom_json(settings.base_url)] * settings.preload,
    }
    theirs = dict(settings.settings)
    sources = theirs.pop("dataSources", [])
    merged: dict[str, Any] = _merged(ours, theirs)
    merged["dataSources"] = _merged_sources(ours["dataSources"], sources)
    return merged


def _dicomweb(settings: ViewerSettings) -> dict[str, Any]:
    base_url = settings.base_url
    return {
        "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
        "sourceName": DICOMWEB,
        "configuration": {
            "friendlyName": "dicomscp, DICOMweb",
            "name": DICOMWEB,
            "qidoRoot": base_url,
            "wadoRoot": base_url,
            "wadoUriRoot": base_url,
            "imageRendering": "wadors",
            "thumbnailRendering": "wadors",
            "enableStudyLazyLoad": True,
            # Filters once more in the browser, so the published tree serves on any web server; and asks for
            # bulk data with Accept: */*, of which our answer is the bare bytes.
            "staticWado": True,
            "singlepart": "bulkdata,video",
            # A quoted Accept makes a browser ask before each frame whether it may, if we are another origin.
            "omitQuotationForMultipartRequest": True,
            "supportsFuzzyMatching": False,
            "supportsWildcard": True,
            "bulkDataURI": {"enabled": True},
            "dicomUploadEnabled": settings.upload,  # STOW-RS, a request a file
        },
    }


def _dicom_json(base_url: str) -> dict[str, Any]:
    return {
        "namespace": "@ohif/extension-default.dataSourcesModule.dicomjson",
        "sourceName": DICOM_JSON,
        "configuration": {
            "friendlyName": "dicomscp, one document a study",
            "name": DICOM_JSON,
            "wadoRoot": base_url,
        },
    }


def _merged(ours: Any, theirs: Any) -> Any:
    if not isinstance(theirs, dict):
        return theirs
    merged = dict(ours) if isinstance(ours, dict) else {}
    for name, value in theirs.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


def _merged_sources(ours: Sequence[dict[str, Any]], theirs: Any) -> list[Any]:
    if not isinstance(theirs, list) or not all(isinstance(one, dict) for one in theirs):
        raise ConfigError("viewer.settings: dataSources is a list of objects, each with its sourceName")
    by_name = {one["sourceName"]: one for one in ours}
    for one in theirs:
        name = one.get("sourceName", "")
        by_name[name] = _merged(by_name.get(name), one)
    return list(by_name.values())


def site(settings: ViewerSettings, page: str) -> dict[str, bytes]:
    """The page and the settings as files, by name; *page* is what was installed."""
    return {PAGE: page.replace(BASE, settings.base_path).encode(), SETTINGS: _settings_file(settings)}


def _settings_file(settings: ViewerSettings) -> bytes:
    head = _HEAD.format(orjson.dumps(f"{settings.base_path}/").decode())
    config = orjson.dumps(app_config(settings), option=orjson.OPT_INDENT_2)
    return head.encode() + b"window.config = " + config + b";\n"


def publish_site(settings: ViewerSettings) -> None:
    """Write page and settings for web servers other than ours, if the viewer is installed.

    These serve what is published, and store nothing.  Raises ConfigError if the operator's settings cannot
    be merged, BusyError if the disk takes no more.
    """
    settings = settings._replace(upload=False)
    app_config(settings)
    if install.installed(settings.root):
        install.write_site(settings.root, site(settings, install.page(settings.root)))


def page_policy(settings: ViewerSettings) -> str:
    """The Content-Security-Policy of the page."""
    others = " ".join(_origins(app_config(settings)))
    ours = f"'self' blob: data: {others}".strip()
    kinds = "; ".join(f"{kind}-src {ours}" for kind in ("connect", "img", "media", "frame", "object"))
    return (
        "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'; "
        "manifest-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        f"font-src 'self' data:; worker-src 'self' blob:; {kinds}"
    )


def worker_policy(settings: ViewerSettings) -> str:
    """The Content-Security-Policy of scripts, which counts where they run as workers."""
    others = " ".join(_origins(app_config(settings)))
    return (
        "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval' 'unsafe-eval'; "
        f"worker-src 'self' blob:; connect-src 'self' blob: data: {others}".strip()
    )


def _origins(value: object) -> list[str]:
    """The origins that settings name, each once, in order."""
    found: dict[str, None] = {}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str) and (origin := _ORIGIN.match(one)):
            found[origin[0]] = None
    return sorted(found)


class _Site(NamedTuple):
    """What is installed, and the page and the settings for it."""

    state: tuple[int, int, int]
    installed: Installed
    files: dict[str, bytes]


class Viewer:
    """The viewer's resources; there while it is installed, whether before this process began or after."""

    def __init__(self, settings: ViewerSettings, *, is_open: bool = False) -> None:
        """*is_open*: whether they answer all, whoever else is asked."""
        self._settings = settings
        self._route = OpenRoute if is_open else Route
        self._policies = {".html": page_policy(settings), ".js": worker_policy(settings)}
        self._for_readers = _settings_file(settings._replace(upload=False))
        self._site: _Site | None = None
        self._lock = threading.Lock()

    def routes(self) -> list[Route]:
        """All resources, under the base path."""
        base = self._settings.base_path
        return [
            self._route(base, self.show, methods=["GET"]),
            self._route(f"{base}/{{path:path}}", self.show, methods=["GET"]),
        ]

    def study_url(self, study_uid: str) -> str | None:
        """The address at which the viewer shows the study; None while none is installed."""
        if self._current() is None:
            return None
        return f"{self._settings.base_path}/viewer?StudyInstanceUIDs={quote(study_uid, safe='')}"

    async def show(self, request: Request) -> Response:
        """The page, the settings, or a file."""
        return await to_thread.run_sync(self._answer, request, request.path_params.get("path", ""))

    def _answer(self, request: Request, name: str) -> Response:
        site = self._current()
        if site is None:
            raise Problem(404, "The viewer is not installed; its operator may run: dicomscp viewer install")
        if name not in site.installed.files and "." not in PurePosixPath(name).name:
            name = PAGE
        if (data := site.files.get(name)) is not None:
            is_for_readers = name == SETTINGS and not may_store(request)
            return self._whole(request, name, self._for_readers if is_for_readers else data)
        file = site.installed.files.get(name)
        if file is None:
            raise Problem(404, "The viewer has no such file.")
        return self._file(request, name, file)

    def _whole(self, request: Request, name: str, data: bytes) -> Response:
        """The page or the settings, which change with our configuration."""
        file = File(hashlib.sha256(data).hexdigest(), len(data), 0, lasting=False)
        return self._sent(request, name, file, lambda **_: data)

    def _file(self, request: Request, name: str, file: File) -> Response:
        def read(*, gzip: bool) -> bytes:
            try:
                data = install.file_path(self._settings.root, name, file).read_bytes()
                return zlib.decompress(data, 31) if file.gzip and not gzip else data
            except (OSError, zlib.error) as error:
                raise DamagedError(
                    f"The viewer's file {name} is damaged; install the viewer anew."
                ) from error

        return self._sent(request, name, file, read)

    def _sent(self, request: Request, name: str, file: File, read: Callable[..., bytes]) -> Response:
        gzip = bool(file.gzip) and takes_gzip(request.headers.get("accept-encoding", ""))
        suffix = PurePosixPath(name).suffix
        headers = {
            "content-type": _TYPES.get(suffix, "application/octet-stream"),
            "etag": f'"{file.digest}-gzip"' if gzip else f'"{file.digest}"',
            "cache-control": _LASTING if file.lasting else "no-cache",
        }
        if file.gzip:
            headers["vary"] = "Accept-Encoding"
        if name == SETTINGS:
            headers["vary"] = "Authorization"  # who may not store has no button for it
        if gzip:
            headers["content-encoding"] = "gzip"
        if suffix in self._policies:
            headers["content-security-policy"] = self._policies[suffix]
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        if request.method == "HEAD":
            size = file.gzip if gzip else file.size
            return Response(headers=headers | {"content-length": str(size)})
        return Response(read(gzip=gzip), headers=headers)

    def _current(self) -> _Site | None:
        """What is installed now; it is read again when it was replaced."""
        try:
            status = install.version_path(self._settings.root).stat()
        except OSError:
            return None
        state = (status.st_ino, status.st_mtime_ns, status.st_size)
        with self._lock:
            if self._site is None or self._site.state != state:
                self._site = self._read(state)
            return self._site

    def _read(self, state: tuple[int, int, int]) -> _Site | None:
        installed = install.installed(self._settings.root)
        if installed is None:
            return None
        return _Site(state, installed, site(self._settings, install.page(self._settings.root)))
