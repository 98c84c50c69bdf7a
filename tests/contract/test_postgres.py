"""What is of PostgreSQL alone: whose database it is, what the server promises, that it may be away."""

import threading

import psycopg
import pytest

from dicomscp.archive import postgres
from dicomscp.archive.index import Index
from dicomscp.dicom.matching import Level, Single, Wildcard
from dicomscp.errors import BusyError, ConfigError, DamagedError
from tests.contract.test_index import (
    EVERY_STUDY,
    PATIENT_ID,
    STUDY_DESCRIPTION,
    STUDY_UID,
    arrival,
    found,
    key,
    values,
)
from tests.processes import free_port


@pytest.fixture
def url(new_database):
    return new_database()


@pytest.fixture
def opened(request):
    """What opens an engine, to be closed after the test."""

    def open_engine(url, *, read_only=False, root_name="root", **others):
        engine = postgres.open_engine(url, read_only=read_only, root_name=root_name, **others)
        request.addfinalizer(engine.dispose)
        return engine

    return open_engine


def test_a_database_belongs_to_one_root(url, opened):
    Index(opened(url)).apply([arrival()], {})
    with pytest.raises(ConfigError, match="another root"):
        opened(url, root_name="other")
    reader = Index(opened(url, read_only=True, root_name="other"))
    with pytest.raises(ConfigError, match="another root"):
        reader.held("1")
    with pytest.raises(ConfigError, match="another root"):
        postgres.drop(url, root_name="other")
    assert len(Index(opened(url)).held("1")) == 1


def test_what_is_dropped_can_be_made_anew(url, opened):
    Index(opened(url)).apply([arrival()], {})
    postgres.drop(url, root_name="root")
    reader = Index(opened(url, read_only=True))
    with pytest.raises(DamagedError, match="start serve"):
        reader.held("1")
    told = []
    assert Index(opened(url, incomplete=lambda: told.append(1))).held("1") == []
    assert told == [1]
    assert reader.held("1") == []


def test_tables_of_another_program_are_left_alone(url, opened, postgresql):
    name = url.rpartition("/")[2]
    postgresql.execute(name, "CREATE TABLE instance (x int)")
    postgresql.execute(name, "CREATE TABLE alembic_version (version_num text)")
    with pytest.raises(ConfigError, match="another program: instance"):
        opened(url)
    postgres.drop(url, root_name="root")
    postgresql.execute(name, "SELECT x, version_num FROM instance, alembic_version")


def test_an_index_that_lost_a_table_is_damaged(url, opened, postgresql):
    index = Index(opened(url))
    postgresql.execute(url.rpartition("/")[2], "DROP TABLE statement")
    with pytest.raises(DamagedError, match="rebuild"):
        index.apply([arrival()], {})
    with pytest.raises(DamagedError, match="statement"):
        opened(url)


def test_a_server_that_forgets_commits_is_refused(url, opened, postgresql):
    with pytest.raises(ConfigError, match="forgets commits"):
        opened(f"{url}?options=-c%20synchronous_commit%3Doff")
    postgresql.execute("postgres", "ALTER ROLE dicomscp SET synchronous_commit = off")
    try:
        opened(url)  # ours beats the role's
    finally:
        postgresql.execute("postgres", "ALTER ROLE dicomscp RESET synchronous_commit")


def test_a_database_of_another_encoding_is_refused(opened, postgresql, request):
    postgresql.execute(
        "postgres",
        "CREATE DATABASE latin ENCODING LATIN1 LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0",
    )
    request.addfinalizer(lambda: postgresql.drop(postgresql.url("latin")))
    with pytest.raises(ConfigError, match="LATIN1"):
        opened(postgresql.url("latin"))


def test_a_server_that_is_away_is_busy_and_asked_for_no_sooner_than_needed(opened):
    url = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    with pytest.raises(BusyError, match="cannot be reached"):
        opened(url)
    reader = Index(opened(url, read_only=True))
    for _ in range(2):
        with pytest.raises(BusyError, match="cannot be reached"):
            reader.held("1")


def test_who_was_connected_before_a_restart_finds_the_server_again(url, opened, postgresql):
    writer, reader = Index(opened(url)), Index(opened(url, read_only=True))
    writer.apply([arrival()], {})
    assert len(reader.held("1")) == 1
    postgresql.stop(immediately=True)
    postgresql.start()
    assert len(reader.held("1")) == 1
    writer.apply([arrival(sop="2")], {})
    assert len(reader.held("1")) == 2


def test_two_processes_that_write_wait_for_each_other(url, opened):
    failures = []

    def write(index, first):
        try:
            for number in range(first, first + 40):
                index.apply([arrival(sop=f"9.{number}")], {})
        except Exception as error:  # noqa: BLE001 - whatever it is fails the test
            failures.append(error)

    indexes = [Index(opened(url)), Index(opened(url))]
    threads = [threading.Thread(target=write, args=(one, 100 * n)) for n, one in enumerate(indexes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert indexes[0].counts().instances == 80
    assert indexes[0].snapshot("1").changes == 80


def test_a_value_with_a_nul_is_held_and_found(url, opened):
    index = Index(opened(url))
    index.apply([arrival(PATIENT_ID="A\0B", STUDY_DESCRIPTION="\0"), arrival("2", "2.1", "2")], {})
    assert values(index.find(EVERY_STUDY), PATIENT_ID) == ["A\0B", None]
    for match in (Single("A\0B"), Wildcard("A\0*"), Wildcard("A?B")):
        assert values(found(index, Level.STUDY, key(PATIENT_ID, match)), STUDY_UID) == ["1"]
    assert values(found(index, Level.STUDY, key(STUDY_DESCRIPTION, Single("\0"))), STUDY_UID) == ["1"]
    assert found(index, Level.STUDY, key(STUDY_UID, Single("1\0"))) == []


def test_a_question_for_which_the_server_takes_too_long_is_busy(url, opened):
    engine = opened(f"{url}?options=-c%20statement_timeout%3D1", read_only=True)
    opened(url)
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE study")
        with pytest.raises(BusyError, match="timeout"):
            Index(engine).studies().__next__()
