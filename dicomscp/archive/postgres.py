"""PostgreSQL as the index's database: how it is reached, and whether what is there is this root's.

A commit is durable when it returns, so settling need not wait for it; a server that is set up to promise
less is refused.  What writes takes one lock for its transaction, so writers wait for each other as with
SQLite; of what reads, each statement is a snapshot of its own, unless one is asked for.

The server may be away.  Only an engine that writes needs it when it is opened; one that reads says "busy"
for as long as it is, at once, and finds it when it is back.  What stands there is looked at on every new
connection, because it may be another database by then.
"""

import contextlib
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.string import StrDumperUnknown
from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, inspect, make_url, text

from dicomscp.archive import index, sql
from dicomscp.errors import BusyError, ConfigError, DamagedError

_POOL = 8  # connections a process: a gateway has five that ask, and a server as it comes takes 100
_PAUSE_SECONDS = 1.0  # after a failure to connect nobody tries for so long, nor waits
_ROOT = "root"  # a setting: the name of the root whose index it is

# Of libpq.  A server that is cut off is given up after 5 s when connecting, 20 s when waiting for an answer.
_CONNECTING = {
    "connect_timeout": 5,
    "tcp_user_timeout": 20_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
}
# Of the session.  The just-in-time compiler takes longer than any question of ours.
_SESSION = {
    "synchronous_commit": "on",
    "jit": "off",
    "lock_timeout": "30s",  # another writer's transaction takes less
    "idle_in_transaction_session_timeout": "5min",  # of a process that hangs: it may hold the writers' lock
}
_READER = {"default_transaction_read_only": "on", "statement_timeout": "30s"}
_WRITER = {"statement_timeout": "10min"}  # migrations, and what a rebuild begins with

_LOCK = "SELECT pg_advisory_xact_lock(1146307440, hashtext(current_schema()))"  # "DSCP"
_WHERE = "index.url: the database"
_NUL = "\uffff"  # a character that no text has, for the one that PostgreSQL cannot hold


def open_engine(
    url: str,
    *,
    read_only: bool,
    root_name: str,
    password_file: Path | None = None,
    incomplete: Callable[[], None] = lambda: None,
) -> Engine:
    """An engine for the index of the root called *root_name*, in the database at *url*.

    Unless *read_only*, the tables are made or migrated if need be; before that is committed, *incomplete* is
    called if they lack what is held.  The password is read from *password_file* for each connection, or is
    libpq's business.  Raises BusyError if the server is away, ConfigError if the database is another root's
    or of another version of this program, DamagedError if tables are gone.  If *read_only*, whoever asks
    gets these.
    """
    engine = create_engine(
        _for_psycopg(url),
        execution_options={"read_only": read_only},
        hide_parameters=True,  # they are patients' attributes
        pool_size=_POOL,
        max_overflow=0,
        use_native_hstore=False,
    )
    door = _Door(root_name, password_file, read_only=read_only)
    event.listen(engine, "do_connect", door.connect)
    event.listen(engine, "checkout", _leave_if_gone)
    event.listen(engine, "begin", _begin)
    if not read_only:
        try:
            with _told():
                _make(engine, root_name, incomplete)
        except BaseException:
            engine.dispose()
            raise
        door.is_made = True
    return engine


def drop(url: str, *, root_name: str, password_file: Path | None = None) -> None:
    """Take the tables of an index away, whatever version it is of; those of other programs stay.

    Raises BusyError if the server is away, ConfigError if it is another root's.
    """
    engine = create_engine(_for_psycopg(url), use_native_hstore=False)
    event.listen(engine, "do_connect", _Door(root_name, password_file, read_only=False).connect)
    event.listen(engine, "begin", _begin)
    try:
        with _told(), engine.execution_options(writes=True).begin() as connection:
            there = set(inspect(connection).get_table_names())
            if sql.VERSION_TABLE not in there:
                return
            if "setting" in there:
                _check_root(_setting(connection, _ROOT), root_name)
            for name in sorted(there & {*index.metadata.tables, sql.VERSION_TABLE}):
                connection.exec_driver_sql(f'DROP TABLE "{name}" CASCADE')
    finally:
        engine.dispose()


def _for_psycopg(url: str) -> URL:
    return make_url(url).set(drivername="postgresql+psycopg")


class _Door:
    """Lets connections in: as we need them, to a database that is ours."""

    def __init__(self, root_name: str, password_file: Path | None, *, read_only: bool) -> None:
        self._root_name, self._password_file = root_name, password_file
        self._session = _SESSION | (_READER if read_only else _WRITER)
        self._name = "dicomscp questions" if read_only else "dicomscp filing"
        self._read_only = read_only
        self.is_made = read_only  # what stands there is to be looked at
        self._lock = threading.Lock()
        self._away, self._away_until = "", 0.0

    def connect(
        self, _dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]
    ) -> "psycopg.Connection[Any]":
        """A new connection; while the server is away, only one caller a second waits to find that out."""
        with self._lock:
            if time.monotonic() < self._away_until:
                raise BusyError(self._away)
        try:
            connection = psycopg.connect(*arguments, **self._complete(parameters), autocommit=True)
        except psycopg.OperationalError as error:
            with self._lock:
                self._away = f"PostgreSQL cannot be reached: {' '.join(str(error).split())}"
                self._away_until = time.monotonic() + _PAUSE_SECONDS
            raise BusyError(self._away) from error
        connection.adapters.register_dumper(str, _Text)
        try:
            with _told():
                self._check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _complete(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """What the URL says, on what we need."""
        ours = " ".join(f"-c {name}={value}" for name, value in self._session.items())
        options = {"options": f"{ours} {parameters.get('options', '')}".rstrip()}
        return {"application_name": self._name, **_CONNECTING, **self._password(), **parameters, **options}

    def _password(self) -> dict[str, str]:
        if self._password_file is None:
            return {}
        try:
            return {"password": self._password_file.read_text(encoding="utf-8").strip("\r\n")}
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"index.password_file: {self._password_file} cannot be read: {error}"
            ) from error

    def _check(self, connection: "psycopg.Connection[Any]") -> None:
        commits, syncs, encoding, *there = _row(connection, _PROMISES)
        if "off" in (commits, syncs):
            raise ConfigError(
                "index.url: the server forgets commits when power fails: set fsync = on there, "
                "and do not set synchronous_commit in the URL"
            )
        if encoding != "UTF8":
            raise ConfigError(f"index.url: the database's encoding is {encoding}; make one with UTF8")
        if not self.is_made:
            return
        if not all(there):
            raise DamagedError("the index is not in its database: start serve, or rebuild it")
        revision, compatible, root_name = _row(connection, sql.STANDING)
        _check_root(root_name, self._root_name)
        sql.check(revision, compatible, _WHERE, read_only=self._read_only)


_PROMISES = f"""SELECT current_setting('synchronous_commit'), current_setting('fsync'),
    current_setting('server_encoding'),
    to_regclass('{sql.VERSION_TABLE}') IS NOT NULL, to_regclass('setting') IS NOT NULL"""


class _Text(StrDumperUnknown):
    """A text as PostgreSQL can hold it.  No column has a NUL, so who asks for one finds none by it."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\0", _NUL))


def _row(connection: "psycopg.Connection[Any]", question: str) -> tuple[Any, ...]:
    return connection.execute(question.encode()).fetchone() or ()


def _setting(connection: Connection, name: str) -> str:
    found = connection.execute(text("SELECT value FROM setting WHERE name = :name"), {"name": name}).scalar()
    return str(found or "")


def _check_root(found: str | None, ours: str) -> None:
    if found and found != ours:
        raise ConfigError(
            "index.url: that database holds the index of another root; make an empty one for this root, "
            "or empty it if that root is given up for good"
        )


def _make(engine: Engine, root_name: str, incomplete: Callable[[], None]) -> None:
    """Make or migrate the tables, and make them this root's; whoever comes second finds it done."""
    with engine.execution_options(writes=True).begin() as connection:
        there = set(inspect(connection).get_table_names())
        ours = set(index.metadata.tables)
        revision = sql.revision_of(connection)
        if there & ours and not revision:
            raise ConfigError(f"{_WHERE} has tables of another program: {', '.join(sorted(there & ours))}")
        if revision >= sql.HEAD and ours - there:
            raise DamagedError(f"the index has lost tables ({', '.join(sorted(ours - there))}): rebuild it")
        if revision:
            _, compatible, root = connection.exec_driver_sql(sql.STANDING).one()
            _check_root(root, root_name)
            sql.check(revision, compatible, _WHERE, read_only=False)
        sql.migrate(connection, revision, incomplete)
        if not _setting(connection, _ROOT):
            claim = text("INSERT INTO setting (name, value) VALUES (:name, :value)")
            connection.execute(claim, {"name": _ROOT, "value": root_name})


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What goes wrong before anybody asks, as our own errors."""
    try:
        yield
    except (psycopg.OperationalError, exc.OperationalError) as error:
        raise BusyError(f"PostgreSQL does not answer: {index.first_line(error)}") from error
    except (psycopg.Error, exc.DBAPIError) as error:
        raise ConfigError(f"index.url: the database cannot be used: {index.first_line(error)}") from error


def _leave_if_gone(connection: "psycopg.Connection[Any]", _record: object, _proxy: object) -> None:
    """Have a connection made anew that the server has ended since: it said so, and nobody listened."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    try:
        while poll.poll(0):
            connection.pgconn.consume_input()
    except psycopg.OperationalError as error:
        raise exc.DisconnectionError from error


def _begin(connection: Connection) -> None:
    """Begin what writes with the writers' lock, a snapshot as one; a single question takes no transaction."""
    options = connection.get_execution_options()
    if options.get("writes"):
        connection.exec_driver_sql(f"BEGIN; {_LOCK}")
    elif options.get("snapshot"):
        connection.exec_driver_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
