"""Fixtures that every suite may ask for."""

import gc
import os
import shutil
from pathlib import Path

import pydicom.data
import pytest
import structlog
from hypothesis import settings

from tests.peers import POSTGRESQL, PostgreSql, missed

gc.disable()  # what is collected stays: looking through it meanwhile takes half of the time

# Random examples are for whoever changes something; in CI a red run tells of the change.
settings.register_profile("CI", derandomize=True)
if os.environ.get("CI", "").lower() == "true":
    settings.load_profile("CI")


_TESTS = Path(__file__).parent

# What takes long, as a file or because it waits, is begun first: no process of xdist's begins with it when
# the others are about to end.  Most of the rest takes a second or so.
_FIRST = (
    "integration/test_round_trip.py",
    "viewer/",
    "conformance/test_outcomes.py",
    "crash/",
    "integration/",
    "conformance/",
    "unit/test_style.py",
    "contract/",
)


def pytest_collection_modifyitems(items):
    """Order the files; the tests of each stay in their order."""
    items.sort(key=lambda item: _turn(item.path.relative_to(_TESTS).as_posix()))


def pytest_collection_finish():
    """Look through what comes and goes from now on, and through nothing else."""
    gc.freeze()
    gc.enable()


def _turn(file):
    return next((turn for turn, first in enumerate(_FIRST) if file.startswith(first)), len(_FIRST))


@pytest.fixture(autouse=True)
def _logs_as_they_were():
    """A command that runs in this process sets up its logs, which are no other test's."""
    yield
    structlog.reset_defaults()


_SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def collection() -> Path | None:
    """The collection of real files that stands beside a checkout, or None: it is not part of the project."""
    return _SHARED if (_SHARED / "MANIFEST.tsv").is_file() else None


@pytest.fixture(scope="session")
def shared_data(collection: Path | None) -> Path:
    """The same, for tests that are of nothing without it."""
    if collection is None:
        pytest.skip("no collection of real files at ../shared/data: pydicom's own files are used alone")
    return collection


@pytest.fixture(scope="session")
def pydicom_files() -> Path:
    """The folder of DICOM files that pydicom's wheel carries."""
    return Path(pydicom.data.__file__).parent / "test_files"


@pytest.fixture
def ct_small(pydicom_files: Path) -> Path:
    """A real CT instance, explicit VR little endian, 256 elements."""
    return pydicom_files / "CT_small.dcm"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A new root, taken away after the test because some tests fill it."""
    path = tmp_path / "root"
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql() -> PostgreSql:
    """A PostgreSQL server that runs while the session does; whoever stops it starts it again."""
    if PostgreSql.folder() is None:
        missed(f"PostgreSQL is not installed (Debian package {POSTGRESQL})")
    with PostgreSql() as server:
        yield server


@pytest.fixture
def new_database(postgresql: PostgreSql):
    """What makes an empty database, or a copy of one, and returns its URL; each goes after the test."""
    made = []

    def make(copied: str = "") -> str:
        made.append(postgresql.new_database(copied))
        return made[-1]

    yield make
    for url in made:
        postgresql.drop(url)
