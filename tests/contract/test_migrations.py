"""The tables of every revision, in both databases; and that the program before can live with the newest."""

import subprocess
import sys
import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, make_url

from dicomscp.archive import postgres, sql, sqlite
from dicomscp.archive.index import Index
from dicomscp.archive.tables import metadata
from dicomscp.dicom.matching import Level, Query
from dicomscp.errors import BusyError, ConfigError
from tests.contract import test_index, version_0001

EVERY_INSTANCE = Query(Level.IMAGE, (), None, None)


class SqliteFile:
    """A database in a file, as the program and as anybody else opens it."""

    def __init__(self, path):
        self.path = path

    def open(self, *, read_only=False, **others):
        return sqlite.open_engine(self.path, read_only=read_only, **others)

    def plain(self):
        return create_engine(f"sqlite:///{self.path}")


class PostgresqlDatabase:
    """The same, of a database of a server."""

    def __init__(self, url):
        self.url = url

    def open(self, *, read_only=False, **others):
        return postgres.open_engine(self.url, read_only=read_only, root_name="root", **others)

    def plain(self):
        return create_engine(make_url(self.url).set(drivername="postgresql+psycopg"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """A database with nothing in it; what is opened is closed after the test."""
    if request.param == "sqlite":
        made = SqliteFile(tmp_path / "index.sqlite")
    else:
        made = PostgresqlDatabase(request.getfixturevalue("new_database")())
    for opening in ("open", "plain"):
        setattr(made, opening, disposing(request, getattr(made, opening)))
    return made


def disposing(request, opening):
    def opened(**arguments):
        engine = opening(**arguments)
        request.addfinalizer(engine.dispose)
        return engine

    return opened


def revisions():
    config = Config()
    config.set_main_option("script_location", "dicomscp:archive/sql")
    return list(ScriptDirectory.from_config(config).walk_revisions())


def differences(connection):
    """Between the tables that are there and those of the program; keys to other tables only SQLite has."""

    def compared(_thing, name, kind, _reflected, _other):
        is_key = kind == "foreign_key_constraint" and connection.dialect.name != "sqlite"
        return not is_key and name != "sqlite_stat1"

    context = MigrationContext.configure(
        connection,
        opts={
            "compare_type": True,
            "compare_server_default": True,
            "include_object": compared,
            "version_table": sql.VERSION_TABLE,
        },
    )
    return compare_metadata(context, metadata)


def test_revisions_are_numbered_each_behind_one_and_the_last_is_the_program_s():
    newest_first = [(one.revision, one.down_revision) for one in revisions()]
    names = [name for name, _ in newest_first]
    assert names == [f"{number:04}" for number in range(len(names), 0, -1)]
    assert [before for _, before in newest_first] == [*names[1:], None]
    assert names[0] == sql.HEAD
    assert revisions()[0].module.compatible == sql.COMPATIBLE
    for one in revisions():
        assert (one.down_revision or "0001") <= one.module.compatible <= one.revision


def test_what_migrations_make_is_what_the_program_knows(database):
    with database.plain().begin() as connection:
        assert sql.migrate(connection, "", lambda: None)
        assert differences(connection) == []


def test_a_file_that_is_made_at_once_has_what_migrations_make_in_one(tmp_path):
    at_once, migrated = SqliteFile(tmp_path / "index.sqlite"), create_engine("sqlite://")
    with at_once.open().connect() as made, migrated.begin() as connection:
        assert differences(made) == []
        sql.migrate(connection, "", lambda: None)
        for kept in (f"SELECT * FROM {sql.VERSION_TABLE}", "SELECT * FROM setting WHERE name = 'compatible'"):
            assert made.exec_driver_sql(kept).all() == connection.exec_driver_sql(kept).all()
        texts = "SELECT sql FROM sqlite_master WHERE name = 'dicomscp_revision'"
        one, other = (each.exec_driver_sql(texts).scalar() for each in (made, connection))
        assert "".join(one.split()) == "".join(other.split())


def test_indexes_of_some_rows_are_those_that_questions_are_made_for(tmp_path):
    """Their conditions, word by word, without which SQLite does not take them; Alembic compares columns."""
    texts = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
    known, engine = create_engine("sqlite://"), create_engine("sqlite://")
    with engine.begin() as made, known.connect() as own:
        metadata.create_all(own)
        sql.migrate(made, "", lambda: None)
        assert made.exec_driver_sql(texts).all() == own.exec_driver_sql(texts).all()
    engine.dispose()


def test_an_index_of_the_first_revision_becomes_what_the_program_knows(database):
    with database.plain().begin() as connection:
        version_0001.make(connection)
    with database.open().connect() as connection:
        assert differences(connection) == []


def test_a_start_that_migrates_nothing_and_needs_no_server_imports_neither_for_it(tmp_path):
    script = f"""
import pathlib, sys
import dicomscp.daemon
dicomscp.daemon.sqlite.open_engine(pathlib.Path({str(tmp_path / "index.sqlite")!r}), read_only=False)
print(sorted(sys.modules.keys() & {{"alembic", "mako", "psycopg", "sqlalchemy"}}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "['sqlalchemy']\n"


def test_text_is_compared_byte_by_byte(database):
    with database.open().connect() as connection:
        columns = [column for table in metadata.tables for column in inspect(connection).get_columns(table)]
        texts = [column for column in columns if str(column["type"]).startswith("TEXT")]
        assert len(texts) > 20
        if connection.dialect.name == "postgresql":
            assert {column["type"].collation for column in texts} == {"C"}
        assert connection.exec_driver_sql("SELECT count(*) FROM study WHERE study_uid < 'a'").scalar() == 0


def test_an_index_of_the_first_revision_is_made_anew_from_what_is_held(database):
    """No release had it, so none has to live with what came after it."""
    with database.plain().begin() as before:
        version_0001.make(before)
        version_0001.begin_study(before)
        version_0001.take_in(before, 1)
    told = []
    index = Index(database.open(incomplete=lambda: told.append(1)))
    assert told == [1]
    assert index.counts().variants == 0
    assert index.name() == "abc", "it is the same index"


def test_a_new_index_is_told_to_lack_what_is_held_before_anybody_sees_it_and_once(database):
    told = []

    def incomplete():
        told.append(inspect(database.plain()).get_table_names())

    database.open(incomplete=incomplete)
    assert told == [[]]
    database.open(incomplete=incomplete)
    assert told == [[]]


def test_a_migration_that_fails_leaves_nothing(database):
    def incomplete():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        database.open(incomplete=incomplete)
    assert inspect(database.plain()).get_table_names() == []
    Index(database.open()).apply([test_index.arrival()], {})


def test_who_makes_it_at_the_same_time_finds_it_made(database):
    failures = []

    def make():
        try:
            Index(database.open()).name()
        except Exception as error:  # noqa: BLE001 - whatever it is fails the test
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("read_only", [True, False])
def test_an_index_of_a_later_version_is_refused_unless_that_says_that_we_can_live_with_it(
    database, read_only
):
    Index(database.open()).apply([test_index.arrival()], {})
    with database.plain().begin() as later:
        later.exec_driver_sql("UPDATE dicomscp_revision SET version_num = '9999'")
        later.exec_driver_sql(f"UPDATE setting SET value = '{sql.HEAD}' WHERE name = 'compatible'")
    assert len(Index(database.open(read_only=read_only)).held("1")) == 1
    with database.plain().begin() as later:
        later.exec_driver_sql("UPDATE setting SET value = '9998' WHERE name = 'compatible'")
    with pytest.raises(ConfigError, match="version 9999"):
        Index(database.open(read_only=read_only)).held("1")


def test_who_reads_waits_for_the_one_who_migrates(database):
    database.open()
    with database.plain().begin() as connection:
        connection.exec_driver_sql("UPDATE dicomscp_revision SET version_num = '0000'")
    with pytest.raises(BusyError, match="earlier version"):
        Index(database.open(read_only=True)).name()
