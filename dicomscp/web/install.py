"""The viewer's files: OHIF as it is published, made fit for any path, under the root.

    npm pack @ohif/app ─▶ digest as pinned ─▶ files ─▶ fixed paths taken out ─▶ deflated ─▶ shown in one step

    viewer/ohif/version.json     what is installed, and of each file its name, digest, size and kind
    viewer/ohif/index.html       the page, with a mark where the path goes under which the viewer is served
    viewer/ohif/app/...          the files, as <name>.gz where that is smaller
    viewer/site/...              the page and the settings for one path, for web servers other than ours

The published app is built to stand at "/".  What is fixed to that is replaced by what the browser knows: a
script asks where it came from, a style sheet and a manifest name their neighbours.  So the files are the same
wherever they are served, and only the page has to be told.  What is taken out of the page besides are its
inline scripts, which stand at the head of the settings: a policy without exceptions can then hold for it.

Source maps, and the service worker that loads a library from elsewhere, are left out.
"""

import base64
import binascii
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import orjson
from isal import isal_zlib

from dicomscp.crew import cores
from dicomscp.disk import Disk
from dicomscp.errors import BusyError, ConfigError, RefusedError, UnreachableError

PACKAGE = "@ohif/app"
VERSION = "3.13.2"
INTEGRITY = "sha512-WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA=="
"""Of the package's file, as npm writes it: what was looked at and is tested."""

BASE = "%BASE%"
"""Stands in the page for the path under which the viewer is served; no file has it otherwise."""

_FORMAT = 1
_LEVEL = 6  # of zlib: 15 % less to load at each start than igzip makes
_SELDOM = "ort/"  # three quarters of all bytes, for inference in the browser: for them igzip's speed counts
_SELDOM_LEVEL = 3
_FETCH_SECONDS = 900  # 50 MB over a line of half a megabit
_LOOK_SECONDS = 0.2
_BLOCK_BYTES = 1 << 20
_MOST_BYTES = 1 << 30  # of all files: five times what there are today
_MOST_FILES = 5000
_MOST_FILE_BYTES = 256 << 20

_LEFT_OUT = re.compile(r".*\.map|_headers|_redirects|serve\.json|sw\.js|app-config\.js")
_HASHED = re.compile(r"(?:.*/)?(?:[^/]*\.)?[0-9a-f]{16}\.[^/]+")
_NAME = re.compile(r"[A-Za-z0-9_@.-]+(?:/[A-Za-z0-9_@.-]+)*")

_SCRIPT = re.compile(r"<script>.*?</script>", re.DOTALL)
_IN_PAGE = re.compile(r'(\b(?:href|src|content)=")/(?!/)')
_WHERE_FROM = '(self.PUBLIC_URL||self.location.href.replace(/[?#].*$/,"").replace(/[^/]*$/,""))'
_IN_SCRIPT = (
    (re.compile(rb'__webpack_require__\.p = "/"'), b"__webpack_require__.p = " + _WHERE_FROM.encode()),
    (re.compile(rb"browserImportFunction\('/"), b"browserImportFunction(window.PUBLIC_URL+'"),
    # A study whose Modalities in Study is empty would leave the list of all studies empty.
    (re.compile(rb"\bModalitiesInStudy\.Value\.length\b"), b"(ModalitiesInStudy.Value || []).length"),
)
_IN_STYLE = re.compile(rb"url\(/(?!/)")
_IN_MANIFEST = re.compile(rb'"/assets/')

Progress = Callable[[int, int | None, str], None]


class File(NamedTuple):
    """One of the viewer's files: SHA-256 and size of what a browser gets.

    *gzip* is the size of the deflated bytes, 0 if it is kept as it is.  *lasting*: the same name never stands
    for other bytes.
    """

    digest: str
    size: int
    gzip: int
    lasting: bool


class Installed(NamedTuple):
    """What is installed."""

    version: str
    integrity: str
    source: str
    files: dict[str, File]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.gzip or file.size for file in self.files.values())


def installed(root: Path) -> Installed | None:
    """What is installed under *root*; None if nothing is, or in a way that only a newer program knows."""
    try:
        form, version, integrity, source, files = orjson.loads(version_path(root).read_bytes())
    except (OSError, ValueError, TypeError):
        return None
    if form != _FORMAT:
        return None
    return Installed(version, integrity, source, {name: File(*file) for name, file in files.items()})


def version_path(root: Path) -> Path:
    """The file that says what is installed; another one each time something else is."""
    return root / "viewer" / "ohif" / "version.json"


def page(root: Path) -> str:
    """The viewer's page, with `BASE` in it."""
    return (root / "viewer" / "ohif" / "index.html").read_text(encoding="utf-8")


def file_path(root: Path, name: str, file: File) -> Path:
    """Where the bytes of the *file* called *name* lie."""
    return root / "viewer" / "ohif" / "app" / (f"{name}.gz" if file.gzip else name)


def remove(root: Path) -> bool:
    """Take the viewer away, the page first; False if there was none."""
    there = version_path(root).parent.exists()
    version_path(root).unlink(missing_ok=True)
    shutil.rmtree(root / "viewer", ignore_errors=True)
    return there


def install(
    root: Path,
    source: Path | None,
    progress: Progress,
    *,
    version: str = VERSION,
    integrity: str | None = None,
) -> Installed:
    """Install the viewer under *root*, in place of another; whoever has it open goes on with what it loaded.

    *source* is the package's file, or a folder with the app as it was built; None fetches the package by npm,
    with its settings.  A file must have that *integrity*; None is what is pinned, or for another *version*
    a ConfigError.  A folder is taken as it is.  Raises UnreachableError if it cannot be fetched, RefusedError
    if it is not what it should be, BusyError if the disk takes no more; what was installed then stays.
    """
    if integrity is None and version != VERSION:
        raise ConfigError(
            f"{version} is not the version that is pinned, {VERSION}: say by --integrity what its file has "
            f"to be (npm view {PACKAGE}@{version} dist.integrity)"
        )
    folder = root / "viewer"
    making = folder / f".{os.getpid()}.new"
    try:
        Disk().make_directory(making)
        _sweep(folder)
        made = _install(making, source, progress, version, integrity or INTEGRITY)
        _show(root, making / "ohif")
    except OSError as error:
        raise BusyError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return made


def write_site(root: Path, files: dict[str, bytes]) -> None:
    """Put *files*, the page and the settings for one path, where other web servers find them.

    Raises BusyError if the disk takes no more.
    """
    folder = root / "viewer" / "site"
    try:
        Disk().make_directory(folder)
        for name, data in files.items():
            making = folder / f".{name}.new"
            making.write_bytes(_gzip(data))
            Disk().rename(making, folder / f"{name}.gz")
    except OSError as error:
        raise BusyError(f"{folder} cannot be written: {error.strerror}") from error


def _install(
    making: Path, source: Path | None, progress: Progress, version: str, integrity: str
) -> Installed:
    if source is not None and source.is_dir():
        files, version, integrity = _of_folder(source), _version_of(source), ""
    else:
        file = source or _fetched(making / "package", version, progress)
        _check(file, integrity)
        files = _of_package(file)
    app = making / "ohif"
    kept = _written(files, app, progress)
    if "index.html" not in kept or not any(name.startswith("app.bundle") for name in kept):
        raise RefusedError(f"{source} has no OHIF app in it: index.html or app.bundle is missing")
    del kept["index.html"]
    made = Installed(version, integrity, str(source or f"npm {PACKAGE}"), kept)
    (app / "version.json").write_bytes(
        orjson.dumps([_FORMAT, *made[:3], {name: list(file) for name, file in kept.items()}])
    )
    return made


def _sweep(folder: Path) -> None:
    """Take away what an installation that was cut short left."""
    for left in folder.glob(".*.new"):
        if left.is_dir() and not Path("/proc", left.name.split(".")[1]).exists():
            shutil.rmtree(left, ignore_errors=True)


def _show(root: Path, made: Path) -> None:
    """Let what was *made* be read, once it is on the disk."""
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        Disk().sync_all(descriptor)
    finally:
        os.close(descriptor)
    Disk().exchange(made, version_path(root).parent)


# Where it comes from


def _fetched(folder: Path, version: str, progress: Progress) -> Path:
    """The package's file, fetched by npm with the settings that it has; nothing stays in its cache."""
    npm = shutil.which("npm")
    if npm is None:
        raise UnreachableError(
            "npm is needed to fetch the viewer, and is not installed (Debian package npm); or run "
            f"'npm pack {PACKAGE}@{version}' elsewhere and give the file: dicomscp viewer install FILE"
        )
    folder.mkdir(mode=0o700)
    options = ["--cache", str(folder / "cache"), "--no-update-notifier", "--no-audit", "--no-fund"]
    command = [npm, "pack", f"{PACKAGE}@{version}", "--pack-destination", str(folder), *options]
    fetching = subprocess.Popen(  # noqa: S603 -- a program of ours, with arguments of ours
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder
    )
    told = _waited_for(fetching, folder, progress)
    found = sorted(folder.glob("*.tgz"))
    if fetching.returncode or not found:
        raise UnreachableError(
            f"npm could not fetch {PACKAGE}@{version}: {_reason(told)}; or run "
            f"'npm pack {PACKAGE}@{version}' elsewhere and give the file: dicomscp viewer install FILE"
        )
    return found[0]


def _waited_for(fetching: "subprocess.Popen[bytes]", folder: Path, progress: Progress) -> str:
    """What *fetching* said until it ended; how much it has fetched is told by what lies in *folder*."""
    told: list[bytes] = []
    reading = threading.Thread(target=lambda: told.append(fetching.communicate()[1]), name="npm", daemon=True)
    reading.start()
    try:
        for _ in range(int(_FETCH_SECONDS / _LOOK_SECONDS)):
            reading.join(_LOOK_SECONDS)
            if not reading.is_alive():
                break
            progress(_kib_under(folder), None, "fetching, KiB")
    finally:
        if reading.is_alive():
            fetching.kill()
            reading.join()
    return b"".join(told).decode(errors="replace")


def _kib_under(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # npm moves its files about
            size += path.lstat().st_size if path.is_file() else 0
    return size >> 10


def _reason(told: str) -> str:
    """What npm said of a failure, in a line."""
    lines = [re.sub(r"^npm (?:error|ERR!) ?", "", line).strip() for line in told.splitlines()]
    said = [line for line in lines if line and not line.startswith(("npm ", "A complete log", "code "))]
    return said[0] if said else "it gave no reason"


def _check(file: Path, integrity: str) -> None:
    """Raise RefusedError unless the bytes of *file* have that *integrity*."""
    algorithm, _, wanted = integrity.partition("-")
    try:
        digest = hashlib.new({"sha512": "sha512", "sha384": "sha384", "sha256": "sha256"}[algorithm])
        base64.b64decode(wanted, validate=True)
    except (KeyError, binascii.Error) as error:
        raise ConfigError(
            f"--integrity is sha512- and base64, as npm writes it (is {integrity!r})"
        ) from error
    with file.open("rb") as reading:
        while block := reading.read(_BLOCK_BYTES):
            digest.update(block)
    found = f"{algorithm}-{base64.b64encode(digest.digest()).decode()}"
    if found != integrity:
        raise RefusedError(
            f"{file} is not the package that is meant: it has the integrity {found}, not {integrity}. "
            "Fetch it again; or, if it is another version and you trust it, say so by --integrity"
        )


def _of_package(file: Path) -> Iterator[tuple[str, bytes]]:
    """The files of the app in the package at *file*, by name."""
    try:
        with tarfile.open(file, "r:gz") as package:
            for member in package:
                if member.isfile() and member.name.startswith("package/dist/"):
                    name = member.name.removeprefix("package/dist/")
                    _check_size(name, member.size)
                    reading = package.extractfile(member)
                    yield name, reading.read() if reading else b""
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise RefusedError(f"{file} is no package of npm: {error}") from error


def _of_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files of the app as it was built, in *folder* or, if that is a package, in its dist."""
    if (folder / "dist" / "index.html").is_file():
        folder /= "dist"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            name = path.relative_to(folder).as_posix()
            _check_size(name, path.stat().st_size)
            yield name, path.read_bytes()


def _check_size(name: str, size: int) -> None:
    if size > _MOST_FILE_BYTES:
        raise RefusedError(f"{name} has {size} bytes, which no file of the viewer has")


def _version_of(folder: Path) -> str:
    """The version that the package says it has, if *folder* is one."""
    for place in (folder, folder.parent):
        with contextlib.suppress(OSError, ValueError):
            said = orjson.loads((place / "package.json").read_bytes())
            if isinstance(said, dict) and said.get("name") == PACKAGE:
                return str(said.get("version"))
    return "unknown"


# What is made of it


def _written(files: Iterable[tuple[str, bytes]], folder: Path, progress: Progress) -> dict[str, File]:
    """Write *files* into *folder*, deflated on all cores; the page stands beside the others."""
    Disk().make_directory(folder)
    kept: dict[str, File] = {}
    waiting: deque[tuple[str, Future[File]]] = deque()
    total = 0

    def wait_for_one() -> None:
        name, writing = waiting.popleft()
        kept[name] = writing.result()
        progress(len(kept), None, "deflating")

    with ThreadPoolExecutor(cores()) as deflating:
        for name, data in files:
            if _LEFT_OUT.fullmatch(name):
                continue
            total += len(data)
            if not _is_name(name) or total > _MOST_BYTES or len(kept) >= _MOST_FILES:
                raise RefusedError(f"the viewer is not taken: {name!r} has no place, or is one too many")
            waiting.append((name, deflating.submit(_write, folder, name, data)))
            if len(waiting) > cores():
                wait_for_one()
        while waiting:
            wait_for_one()
    return kept


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and ".." not in PurePosixPath(name).parts


def _write(folder: Path, name: str, data: bytes) -> File:
    made = rewritten(name, data)
    file = File(hashlib.sha256(made).hexdigest(), len(made), 0, _HASHED.fullmatch(name) is not None)
    if made is not data:  # another version of ours may make something else of the same file
        file = file._replace(lasting=False)
    path = folder / "app" / name
    if name == "index.html":
        path = folder / name
    elif (
        len(
            deflated := isal_zlib.compress(made, _SELDOM_LEVEL, 31)
            if name.startswith(_SELDOM)
            else _gzip(made)
        )
        < len(made) * 0.95
    ):
        path, made, file = path.with_name(f"{path.name}.gz"), deflated, file._replace(gzip=len(deflated))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(made)
    return file


def rewritten(name: str, data: bytes) -> bytes:
    """*data* of the file called *name* without what fixes it to "/"; *data* itself if nothing does."""
    made = data
    if name == "index.html":
        made = _page(data.decode()).encode()
    elif name.endswith(".js"):
        for fixed, free in _IN_SCRIPT:
            made = fixed.sub(free.replace(b"\\", rb"\\"), made)
    elif name.endswith(".css"):
        made = _IN_STYLE.sub(b"url(" + b"../" * name.count("/"), made)
    elif name.endswith((".json", ".xml", ".webapp")):
        to_assets = b"" if name.startswith("assets/") else b"assets/"
        made = _IN_MANIFEST.sub(b'"' + to_assets, made)
    return data if made == data else made


def _page(text: str) -> str:
    """The page with `BASE` where it is fixed to "/", and without inline scripts."""
    return _IN_PAGE.sub(rf"\g<1>{BASE}/", _SCRIPT.sub("", text))


def _gzip(data: bytes) -> bytes:
    """*data* as gzip, without a time."""
    deflator = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    return deflator.compress(data) + deflator.flush()
