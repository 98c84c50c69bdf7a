"""SQLite as the index's database: how it is opened, and whether it is one of ours.

WAL with synchronous=NORMAL: a commit is not synced one by one, and a loss of power may take the last ones
back, but only whole and in order.  Whoever files settles with a sync of the whole file system, and the
journal holds what a loss of power could take.  What writes takes the write lock when it begins, so it
never fails half way for another's sake; of what reads, each statement is a snapshot of its own.
"""

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc

from dicomscp.archive import sql
from dicomscp.errors import BusyError, DamagedError

USER_VERSION = 2
"""The database's user_version: all that there was of a version before there were migrations."""

_BEFORE_MIGRATIONS = "0001"  # the revision of such a file
_BUSY_SECONDS = 30  # a writer waits so long for another one: publishing and filing are two
_POOL = 16  # more threads than that which read at once wait for each other
_READER_CACHE_KIB = 8 << 10
_WRITER_CACHE_KIB = 64 << 10
# What the query planner is told of each index: rows, then rows with equal first, first two, ... columns.
# Told once and for all, so that a query is answered in the same way in a small and in a large archive.
_STATISTICS = (
    ("study", "sqlite_autoindex_study_1", "20000 1"),
    # With bytes a row, or the order in which the two were made would say which is walked.
    ("study", "study_order", "20000 1 1 1 1 sz=80"),
    ("study", "study_scan", "20000 1 1 1 1 1 1 1 1 1 1 1 1 1 sz=250"),
    ("study", "study_irregular", "20 1 1 1"),
    ("study", "study_patient_id", "20000 2 1 1"),
    ("study", "study_accession_number", "20000 1 1 1"),
    ("study", "study_patient_key", "20000 2 1 1"),
    ("study", "study_due", "100 1"),
    ("study_modality", "study_modality", "25000 2500 1 1"),
    ("study_name", "study_name", "100000 25000 10 1 1"),
    ("series", "sqlite_autoindex_series_1", "100000 5 1"),
    ("series", "series_order", "100000 5 1 1"),
    ("series", "series_uid", "100000 1"),
    ("statement", "sqlite_autoindex_statement_1", "150000 2 1"),
    ("instance", "sqlite_autoindex_instance_1", "5000000 1 1 1"),
    ("instance", "instance_order", "5000000 50 1 1"),
    ("publication", "sqlite_autoindex_publication_1", "20000 1"),
    ("publication", "sqlite_autoindex_publication_2", "20000 1"),
    ("publication", "publication_withdrawn", "100 1"),
    ("instance", "instance_leaving", "1000 1"),
    ("series", "series_irregular", "20 1"),
    ("instance", "instance_irregular", "20 1"),
)
_CHECKPOINT_PAGES = 4000  # 16 MiB of WAL between checkpoints, each of which syncs


def open_engine(path: Path, *, read_only: bool, incomplete: Callable[[], None] = lambda: None) -> Engine:
    """An engine for the index at *path*; unless *read_only*, the database is made or migrated if need be.

    Before that is committed, *incomplete* is called if the tables lack what is held.  Raises DamagedError
    if what is there is missing or no database, ConfigError if it is of another version of this program,
    BusyError if the file cannot be opened now, or is to be migrated first.
    """
    mode = "ro" if read_only else "rwc"
    engine = create_engine(
        URL.create("sqlite", database=f"file:{_quoted(path)}", query={"mode": mode, "uri": "true"}),
        connect_args={"timeout": _BUSY_SECONDS},
        execution_options={"read_only": read_only, "checkpoint": "PRAGMA wal_checkpoint(TRUNCATE)"},
        hide_parameters=True,  # they are patients' attributes
        pool_size=_POOL,
        max_overflow=0,
    )
    event.listen(engine, "connect", _set_up_reader if read_only else _set_up_writer)
    event.listen(engine, "begin", _begin)
    _follow(engine, path)
    try:
        _check(path, read_only=read_only)
        if not read_only:
            _make(engine, incomplete)
    except (sqlite3.OperationalError, exc.OperationalError) as error:
        raise BusyError(f"{path.name} cannot be opened now: {error}") from error
    except (sqlite3.DatabaseError, exc.DatabaseError) as error:
        raise DamagedError(f"{path.name} cannot be read as an index ({error}): rebuild it") from error
    return engine


def set_aside(path: Path) -> None:
    """Put an index that cannot be read aside, for a person to look at."""
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    path.replace(path.with_name(f"{path.name}.damaged"))


def _follow(engine: Engine, path: Path) -> None:
    """Let connections to a file that is not at *path* any more be made anew: the index was, meanwhile."""

    def note(_connection: sqlite3.Connection, record: Any) -> None:
        record.info["inode"] = path.stat().st_ino

    def check(_connection: sqlite3.Connection, record: Any, _proxy: Any) -> None:
        try:
            is_there = path.stat().st_ino == record.info["inode"]
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise exc.DisconnectionError

    event.listen(engine, "connect", note)
    event.listen(engine, "checkout", check)


def _quoted(path: Path) -> str:
    return path.absolute().as_uri().removeprefix("file://")


def _check(path: Path, *, read_only: bool) -> None:
    """Raise unless the file is an index of this version, or is still to be made."""
    if not path.exists():
        if read_only:
            raise DamagedError(f"{path.name} is not there: start serve, or rebuild it")
        return
    with contextlib.closing(sqlite3.connect(f"file:{_quoted(path)}?mode=rw", uri=True)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        is_migrated = sql.VERSION_TABLE in tables
        revision, compatible, _ = (
            connection.execute(sql.STANDING).fetchone() if is_migrated else (_BEFORE_MIGRATIONS, "", "")
        )
    if version == USER_VERSION:
        sql.check(revision, compatible, path.name, read_only=read_only)
    elif version or tables or read_only:
        raise sql.another(path.name, str(version))


def _make(engine: Engine, incomplete: Callable[[], None]) -> None:
    """Make or migrate the tables; whoever comes second finds it done."""
    with engine.execution_options(writes=True).begin() as connection:
        revision = sql.revision_of(connection)
        if not revision and connection.exec_driver_sql("PRAGMA user_version").scalar():
            revision = _BEFORE_MIGRATIONS
        if not revision:
            sql.make(connection, incomplete)
        if not revision or sql.migrate(connection, revision, incomplete):
            connection.exec_driver_sql("ANALYZE")  # makes the table of statistics
            connection.exec_driver_sql("DELETE FROM sqlite_stat1")
            connection.exec_driver_sql("INSERT INTO sqlite_stat1 VALUES (?, ?, ?)", list(_STATISTICS))
            connection.exec_driver_sql("ANALYZE sqlite_schema")  # reads it
            connection.exec_driver_sql(f"PRAGMA user_version = {USER_VERSION}")


def _set_up_writer(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin as we say
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA cache_size = -{_WRITER_CACHE_KIB}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {_CHECKPOINT_PAGES * 4096 * 2}")


def _set_up_reader(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None
    connection.execute(f"PRAGMA cache_size = -{_READER_CACHE_KIB}")


def _begin(connection: Connection) -> None:
    """Take the write lock at once for what says that it writes; a single question takes no transaction."""
    options = connection.get_execution_options()
    if options.get("writes"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif options.get("snapshot"):
        connection.exec_driver_sql("BEGIN")
