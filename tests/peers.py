"""Foreign peers: programs of others that the tests and the benchmark talk to.

A peer that is not installed is a skip that names its Debian package, and with CI=true a failure: CI installs
them all.  Servers listen on free ports, keep what they receive in a folder of theirs, and are ended by pid.
storescp and Orthanc cannot be bound to one address: on a machine that others reach, it takes a firewall.
Each has its usual settings, but for the largest PDU, which is 128 KiB: with their 16 KiB some are slower.
"""

import contextlib
import itertools
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

from tests.processes import Server, answers, descendants, free_port

DCMTK, ORTHANC, ORTHANC_WEB, NGINX = "dcmtk", "orthanc", "orthanc-dicomweb", "nginx-light"
POSTGRESQL = "postgresql"
MAX_PDU_BYTES = 131072
REPOSITORY = Path(__file__).resolve().parents[1]

_START_SECONDS = 30
_SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # in no user's PATH
_POSTGRESQL_FOLDERS = Path("/usr/lib/postgresql")  # a folder a version
_MEMORY, _MEMORY_BYTES = Path("/dev/shm"), 1 << 30
_ORTHANC_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def find_program(program: str) -> str | None:
    """The path of *program*, or None if it is not installed."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_FOLDERS]))


def require(program: str, package: str) -> str:
    """The path of *program*.  Without it the test is skipped, naming the Debian *package*; in CI it fails."""
    path = find_program(program)
    if path is None:
        missed(f"{program} is not installed (Debian package {package})")
    return path


def npm_package(name: str) -> Path:
    """The folder of the npm package *name*; without it as `require`."""
    package = REPOSITORY / "tests/conformance/node_modules" / name
    if not package.is_dir():
        missed(f"{name} is not installed (npm install --prefix tests/conformance)")
    return package


def missed(reason: str) -> None:
    """What a test needs is not there: it is skipped for that *reason*; in CI, which installs it, it fails."""
    import pytest

    give_up = pytest.fail if os.environ.get("CI", "").lower() == "true" else pytest.skip
    give_up(reason)


class Peer(ABC):
    """A foreign server that listens for associations, and keeps its files under *directory*."""

    name: ClassVar[str]
    program: ClassVar[str]
    package: ClassVar[str]
    ae_title: ClassVar[str] = "PEER"

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.port = free_port()
        self.received = self.directory / "received"
        self._server: Server | None = None

    @classmethod
    def installed(cls) -> bool:
        """Whether the program is there."""
        return find_program(cls.program) is not None

    @abstractmethod
    def command(self) -> list[str | Path]:
        """What is run; files it needs have been written."""

    def start(self) -> Self:
        """Return once it listens.  Raises GoneError if it does not come up."""
        self.received.mkdir(parents=True, exist_ok=True)
        self._server = Server(self.command(), self.directory / "log", directory=REPOSITORY)
        self._server.start(self._ready, _START_SECONDS)
        return self

    def stop(self) -> None:
        """End it.  Harmless to repeat."""
        if self._server:
            self._server.stop()

    def pids(self) -> Iterator[int]:
        """Its processes."""
        if self._server:
            yield self._server.pid
            yield from descendants(self._server.pid)

    def files(self) -> list[Path]:
        """What it has received, as files."""
        return sorted(path for path in self.received.rglob("*") if path.is_file())

    def _ready(self) -> bool:
        return answers(self.port)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class StoreScp(Peer):
    """DCMTK's storescp, one process for all associations, one after the other."""

    name = "storescp"
    program, package, ae_title = "storescp", DCMTK, "STORESCP"

    def command(self) -> list[str | Path]:
        program = find_program(self.program) or self.program
        return [program, *self.options(), "-pdu", str(MAX_PDU_BYTES), "-od", self.received, str(self.port)]

    def options(self) -> list[str]:
        """Further options."""
        return []


class ForkingStoreScp(StoreScp):
    """DCMTK's storescp, a process an association."""

    name = "storescp --fork"

    def options(self) -> list[str]:
        return ["--fork"]


class PynetdicomScp(Peer):
    """A storage SCP of pynetdicom's AE as documented, that writes each dataset's bytes to a file."""

    name = "pynetdicom"
    program, package, ae_title = sys.executable, "python3-pynetdicom", "PYNETDICOM"

    def command(self) -> list[str | Path]:
        return [self.program, "-m", "tests.peers", str(self.port), self.received.resolve()]


class Orthanc(Peer):
    """Orthanc, with its DICOMweb plugin if that is installed; HTTP answers only this machine."""

    name = "Orthanc"
    program, package, ae_title = "Orthanc", ORTHANC, "ORTHANC"

    def __init__(self, directory: Path, *, sync_storage_area: bool = True) -> None:
        super().__init__(directory)
        self.http_port = free_port()
        self._sync_storage_area = sync_storage_area

    @classmethod
    def has_dicomweb(cls) -> bool:
        """Whether DICOMweb is served under /dicom-web."""
        return _ORTHANC_PLUGIN.exists()

    def command(self) -> list[str | Path]:
        settings = self.directory / "orthanc.json"
        settings.write_text(json.dumps(self._settings(), indent=1))
        return [find_program(self.program) or self.program, settings]

    def _settings(self) -> dict[str, object]:
        return {
            "Name": "peer",
            "StorageDirectory": str(self.received),
            "IndexDirectory": str(self.received),
            "SyncStorageArea": self._sync_storage_area,
            "DicomAet": self.ae_title,
            "DicomPort": self.port,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "UnknownSopClassAccepted": True,
            "MaximumPduLength": MAX_PDU_BYTES,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "Plugins": [str(_ORTHANC_PLUGIN)] if self.has_dicomweb() else [],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }

    def _ready(self) -> bool:
        return answers(self.port) and answers(self.http_port)


class ShippedNginx(Peer):
    """nginx, one worker, with the *configuration* in conf/ that operators are given, on a port of its own."""

    name = "nginx"
    program, package = "nginx", NGINX
    configuration: ClassVar[str]
    user: ClassVar[str]

    def replaced(self) -> dict[str, str]:
        """What stands here in place of something that stands there once."""
        return {}

    def command(self) -> list[str | Path]:
        settings = self.directory / "nginx.conf"
        settings.write_text(self._settings())
        return [
            find_program(self.program) or self.program,
            "-p",
            self.directory,
            "-c",
            settings,
            "-e",
            "stderr",
        ]

    def _settings(self) -> str:
        shipped = (REPOSITORY / "conf" / self.configuration).read_text(encoding="utf-8")
        # The workers of one that root started would give up root, and with it our files: so there are none.
        ours = {
            f"user {self.user};": f"daemon off; master_process off; pid {self.directory}/nginx.pid;",
            "http {": f"http {{ access_log off; keepalive_requests 1000000; {self._temporary()}",
        } | self.replaced()
        for there, here in ours.items():
            if shipped.count(there) != 1:
                raise ValueError(f"{self.configuration} has {there!r} {shipped.count(there)} times")
            shipped = shipped.replace(there, here)
        return shipped

    def _temporary(self) -> str:
        """Where it keeps what it keeps for a while."""
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        return " ".join(f"{kind}_temp_path {self.directory}/{kind};" for kind in kinds)


class StaticNginx(ShippedNginx):
    """nginx over the root of a gateway, without the gateway."""

    configuration, user = "nginx.conf", "dicomscp"

    def __init__(self, directory: Path, root: Path) -> None:
        super().__init__(directory)
        self._root = root

    def replaced(self) -> dict[str, str]:
        return {
            "listen 127.0.0.1:8081 default_server;": f"listen 127.0.0.1:{self.port} default_server;",
            "listen 127.0.0.1:8081;": f"listen 127.0.0.1:{self.port};",
            "root /var/lib/dicomscp;": f"root {self._root};",
        }


class PostgreSql:
    """A PostgreSQL server with its own data, in memory where there is room: its syncs cost nothing there.

    Its databases sort text as English readers do, so what needs another order has to say so.  Clients need no
    password.  It does not run as root: then it is Debian's user "postgres".
    """

    user = "dicomscp"

    def __init__(self) -> None:
        in_memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _MEMORY_BYTES
        self._home = Path(tempfile.mkdtemp(prefix="postgresql-", dir=_MEMORY if in_memory else None))
        self.data = self._home / "data"
        self.port = free_port()
        self._as_user: list[str] = []
        self._server: Server | None = None
        self._numbers = itertools.count()

    @classmethod
    def folder(cls) -> Path | None:
        """Where its programs are, of the newest version; None if it is not installed."""
        newest = sorted(_POSTGRESQL_FOLDERS.glob("*/bin"), key=lambda path: int(path.parent.name))
        initdb = find_program("initdb")
        return newest[-1] if newest else Path(initdb).resolve().parent if initdb else None

    def start(self) -> Self:
        """Return once it takes connections; after `stop` it goes on with what it had.  Harmless to repeat."""
        if self._server and self._server.running:
            return self
        folder, data = self.folder(), self.data
        if folder is None:
            raise FileNotFoundError(POSTGRESQL)
        if os.geteuid() == 0 and not self._as_user:
            owner = pwd.getpwnam("postgres")
            os.chown(self._home, owner.pw_uid, owner.pw_gid)
            self._as_user = [
                "setpriv",
                f"--reuid={owner.pw_uid}",
                f"--regid={owner.pw_gid}",
                "--clear-groups",
            ]
        if not data.exists():
            locale = ["--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en"]
            self._run(folder / "initdb", "-D", data, "-U", self.user, "-A", "trust", "--no-sync", *locale)
        self._server = Server(
            [*self._as_user, folder / "postgres", "-D", data, "-p", str(self.port), "-k", self._home,
             "-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=64MB", "-c", "max_connections=200"],
            self._home / "log",
            directory=self._home,
        )  # fmt: skip
        self._server.start(self._ready, _START_SECONDS)
        return self

    def stop(self, *, immediately: bool = False) -> None:
        """End it: clients are cut off, and if *immediately*, as a crash does it.  Harmless to repeat."""
        if self._server and self._server.running:
            os.kill(self._server.pid, signal.SIGQUIT if immediately else signal.SIGINT)
            self._server.wait(_START_SECONDS)

    def new_database(self, copied: str = "") -> str:
        """The URL of a new database: an empty one, or a copy of that at *copied*, which nobody may use."""
        name = f"test_{next(self._numbers)}"
        template = copied.rpartition("/")[2] or "template1"
        self.execute("postgres", f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Take the database at *url* away, whoever is connected to it."""
        self.execute("postgres", f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def url(self, database: str) -> str:
        """The URL of that database."""
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/{database}"

    def execute(self, database: str, statement: str) -> None:
        """Have *statement* executed, outside of any transaction."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement)

    def close(self) -> None:
        """End it and take away what it kept."""
        self.stop(immediately=True)
        shutil.rmtree(self._home, ignore_errors=True)

    def _ready(self) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.OperationalError):
            self.execute("postgres", "SELECT 1")
            return True
        return False

    def _run(self, *command: str | Path) -> None:
        subprocess.run([*self._as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd=self._home)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def _run_pynetdicom(port: int, directory: Path) -> None:
    from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt

    def write(event: evt.Event) -> int:
        (directory / event.request.AffectedSOPInstanceUID).write_bytes(event.encoded_dataset())
        return 0

    ae = AE(PynetdicomScp.ae_title)
    ae.maximum_pdu_size = MAX_PDU_BYTES
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
    ae.start_server(("127.0.0.1", port), evt_handlers=[(evt.EVT_C_STORE, write)])


if __name__ == "__main__":
    _run_pynetdicom(int(sys.argv[1]), Path(sys.argv[2]))
