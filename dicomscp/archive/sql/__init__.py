"""Migrations of the index's tables, the same for both databases.

    env.py                  Alembic's environment: one connection, the caller's transaction
    versions/v0001_tables   the tables as they were when migrations began
    versions/v0002_ways_in  narrow tables for questions, filled from the instances anew

What the newest revision gives is `tables.metadata`; a new file of SQLite is made of that at once.  Whoever
writes migrates when it opens the index, in one transaction; whoever reads finds what stands, and says so if
it cannot be read.

The rule of every revision: it adds, and leaves alone what the version of the program before it reads and
writes (a new column has a default or may be null, a new table may be left empty).  So that version goes on
running beside the new one, and may be started again: each revision says in `compatible` which is the oldest
whose program can live with it.  What nobody uses any more goes a version later.  A revision that cannot fill
what it adds from the rows that are there calls `incomplete`, and the index is made anew from the instances.

Alembic takes 0.2 s to import, so only a migration does.
"""

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, column, insert, inspect, table, text

from dicomscp.archive.tables import metadata
from dicomscp.errors import BusyError, ConfigError

HEAD = "0002"
"""The revision of `tables.metadata`; revisions are numbered, so they sort."""

COMPATIBLE = "0002"
"""The oldest revision whose program can live with the tables of `HEAD`, as that revision says too."""

VERSION_TABLE = "dicomscp_revision"
"""Where Alembic notes the revision; a database that has it has an index of ours."""

STANDING = f"""SELECT (SELECT version_num FROM {VERSION_TABLE}),
    (SELECT value FROM setting WHERE name = 'compatible'),
    (SELECT value FROM setting WHERE name = 'root')"""  # noqa: S608 - a constant
"""Of a database: its revision, the oldest one whose program can live with it, the root whose index it is."""


def another(where: str, version: str) -> ConfigError:
    """What is at *where* is not for this program."""
    return ConfigError(
        f"{where} is an index of version {version}, this program has version {HEAD}: "
        "use the program that made it, or rebuild the index"
    )


def check(revision: str, compatible: str | None, where: str, *, read_only: bool) -> None:
    """Raise unless this program can live with tables of that *revision*, or migrate them.

    ConfigError if they are of a newer one, BusyError if they are to be migrated first.
    """
    if revision > HEAD and not (compatible and compatible <= HEAD):
        raise another(where, revision)
    if read_only and revision < HEAD:
        raise BusyError(f"{where} is an index of an earlier version, which serve migrates when it starts")


def revision_of(connection: Connection) -> str:
    """The revision of the tables; "" if Alembic never was here."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return ""
    return str(connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar() or "")  # noqa: S608 - a constant


def make(connection: Connection, incomplete: Callable[[], None]) -> None:
    """Make the tables of `HEAD`, where there are none; *incomplete* is called as by `migrate`."""
    metadata.create_all(connection, checkfirst=False)
    connection.exec_driver_sql(
        f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL,"
        f" CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
    )
    connection.execute(insert(table(VERSION_TABLE, column("version_num"))).values(version_num=HEAD))
    incomplete()
    _note_compatible(connection)


def migrate(connection: Connection, revision: str, incomplete: Callable[[], None]) -> bool:
    """Bring tables of that *revision*, "" if there are none, to `HEAD` in the connection's transaction.

    *incomplete* is called if the tables lack what the instances would tell: when they are new, too.  False
    if nothing was to be done.
    """
    is_stamped = bool(revision_of(connection))
    if is_stamped and revision >= HEAD:
        return False
    from alembic import command, config  # noqa: PLC0415 - takes 0.2 s, and only a migration needs it

    settings = config.Config()
    settings.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    lacking: list[bool] = []
    settings.attributes.update(connection=connection, incomplete=lambda: lacking.append(True))
    if revision and not is_stamped:
        command.stamp(settings, revision)
    command.upgrade(settings, HEAD)
    if lacking:
        incomplete()
    _note_compatible(connection)
    return True


def _note_compatible(connection: Connection) -> None:
    connection.execute(text("DELETE FROM setting WHERE name = 'compatible'"))
    noted = text("INSERT INTO setting (name, value) VALUES ('compatible', :revision)")
    connection.execute(noted, {"revision": COMPATIBLE})
