"""Archive: the index of the population, in SQLite or PostgreSQL, under a root that a gateway can serve.

It has no instances, so only questions can be put to a gateway that serves it.  What is written is written as
filing writes it.  A root that has what is wanted is used again.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy import Engine, update

from dicomscp.archive import postgres, sql, sqlite
from dicomscp.archive.index import Arrival, Index, Named
from dicomscp.archive.tables import study
from dicomscp.config import Config
from dicomscp.daemon import make_publisher, root_name
from tests.bench import population
from tests.bench.report import Report
from tests.peers import PostgreSql

TEMPORARY = "temporary"

_BATCH = 500  # arrivals in a transaction, as filing takes them
_FACTS, _NAME = "population.json", "index"
_VERSION = 1  # of what the population is made of


@dataclass(frozen=True, slots=True)
class Archive:
    """The index of the root *folder*, in the database at *url*, or in SQLite if that is empty."""

    folder: Path
    url: str = ""

    @property
    def backend(self) -> str:
        """The name of the database."""
        return "PostgreSQL" if self.url else "SQLite"

    @property
    def settings(self) -> dict[str, object]:
        """Of a gateway that serves it.

        What has no value for a key is not to match it: it would be most of what C-FIND answers here.
        """
        return {"query.match_unknown": False} | ({"index.url": self.url} if self.url else {})

    def open_engine(self, *, read_only: bool) -> Engine:
        """An engine for its database, whose tables are made unless it is *read_only*."""
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        if not self.url:
            return sqlite.open_engine(self.folder / "index.sqlite", read_only=read_only)
        return postgres.open_engine(self.url, read_only=read_only, root_name=root_name(self.folder))

    def read_through(self) -> None:
        """Let the system have in memory what it can of the file, if it is one."""
        if not self.url:
            with (self.folder / "index.sqlite").open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass

    def drop(self) -> None:
        """Take the tables away."""
        if self.url:
            (self.folder / "state").mkdir(parents=True, exist_ok=True)
            postgres.drop(self.url, root_name=root_name(self.folder))
        else:
            for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
                (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def empty_beside(self, folder: Path) -> Iterator["Archive"]:
        """An empty one in the same kind of database, in the same one if it has a URL, for as long."""
        if not self.url:
            yield Archive(folder)
            return
        schema = f"empty_{time.time_ns()}"
        options = f"{'&' if '?' in self.url else '?'}options=-csearch_path%3D{schema}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
            try:
                yield Archive(folder, self.url + options)
            finally:
                connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())


@contextlib.contextmanager
def at(folder: Path, database: str, *, keep: bool) -> Iterator[Archive]:
    """The archive under *folder* in the *database* with that URL, in SQLite without; taken away or kept.

    If *database* is `TEMPORARY`, in a PostgreSQL server that is started and ends with it.
    """
    if database == TEMPORARY:
        with PostgreSql() as server:
            yield Archive(folder, server.new_database())
        return
    archive = Archive(folder, database)
    try:
        yield archive
    finally:
        if not keep:
            archive.drop()


def build(archive: Archive, studies: int, report: Report) -> dict[str, float]:
    """What building the index of so many studies cost; it is built unless it is there."""
    wanted = {"version": _VERSION, "studies": studies, "schema": int(sql.HEAD)}
    with contextlib.suppress(FileNotFoundError, ValueError):
        found: dict[str, float] = json.loads(_facts_of(archive).read_text())
        if found.items() >= (wanted | _identity(archive)).items():
            return {name: figure for name, figure in found.items() if name != _NAME}
    facts = wanted | fill(archive, population.arrivals(studies), report)
    _facts_of(archive).write_text(json.dumps(facts | _identity(archive)))
    return facts


def _facts_of(archive: Archive) -> Path:
    return archive.folder / (f"postgresql-{_FACTS}" if archive.url else _FACTS)


def _identity(archive: Archive) -> dict[str, object]:
    """Which index it is, where the folder does not tell: a name that it got when it was made."""
    if not archive.url:
        return {}
    engine = archive.open_engine(read_only=False)
    try:
        return {_NAME: Index(engine).name()}
    finally:
        engine.dispose()


def fill(archive: Archive, arrivals: Iterable[Arrival], report: Report) -> dict[str, float]:
    """Make the index anew, of *arrivals*, with nothing left to be published; what that cost."""
    archive.folder.mkdir(parents=True, exist_ok=True)
    _facts_of(archive).unlink(missing_ok=True)
    archive.drop()
    engine = archive.open_engine(read_only=False)
    index = Index(engine)
    instances, spent, took = 0, 0.0, 0.0
    for batch in batches(arrivals):
        began, began_cpu = time.perf_counter(), time.process_time()
        index.apply(batch, {})
        took += time.perf_counter() - began
        spent += time.process_time() - began_cpu
        instances += len(batch)
        if instances % 50_000 < _BATCH:
            report.progress(f"{instances:,} instances, {took / instances * 1e6:.0f} us each")
    make_publisher(Config(root=archive.folder), index, archive.folder / "dicomweb").adopt()
    _let_nothing_be_due(engine)
    index.make_durable()
    engine.dispose()
    facts = {
        "instances": instances,
        "us an instance": took / instances * 1e6,
        "CPU us an instance": spent / instances * 1e6,
    }
    if archive.url:
        with psycopg.connect(archive.url) as connection:
            row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
        return facts | {"MB": (row[0] if row else 0) / 1e6}
    return facts | {"MB": (archive.folder / "index.sqlite").stat().st_size / 1e6}


def batches(arrivals: Iterable[Arrival]) -> Iterator[list[Arrival]]:
    """As filing takes them."""
    remaining = iter(arrivals)
    while batch := list(itertools.islice(remaining, _BATCH)):
        yield batch


def take_back(engine: Engine, arrivals: Iterable[Arrival]) -> None:
    """Have the index let go of the studies of *arrivals*, if it has them."""
    index = Index(engine)
    for study_uid in {arrival.key.study_uid for arrival in arrivals}:
        named = [Named(one.key, one.digest, one.received_at, one.receipts) for one in index.held(study_uid)]
        index.leave(named, {}, index.name())
    _let_nothing_be_due(engine)
    while left := index.left(_BATCH):
        index.forget_left(left)


def _let_nothing_be_due(engine: Engine) -> None:
    """There is nothing to compile: the documents of every study stand as they are."""
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(update(study).values(published=study.c.changes))
