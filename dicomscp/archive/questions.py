"""Questions: SQL that only reads, as text with a mark for each value.

To make a statement out of objects, and to find that the same was made before by looking at each of them,
takes longer than a database takes to answer most questions.  So what somebody waits for is asked in text, put
together of a few pieces: names come from the tables, whatever comes from outside goes in as a value.

Text is written as SQLite has it, and spelled for the database that is asked.
"""

import contextlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import Column, Connection
from sqlalchemy.exc import DBAPIError

Row: TypeAlias = Any  # SQLAlchemy 2.0 and 2.1 type theirs differently


class Sql(NamedTuple):
    """A piece of SQL with a question mark for each of its *values*, in their order."""

    text: str
    values: tuple[object, ...] = ()


FALSE, TRUE = Sql("1 = 0"), Sql("1 = 1")


class Lookup(NamedTuple):
    """What is read of *source*: the *columns* of the rows that meet all conditions, in *order*.

    Columns have no values beside them.
    """

    columns: tuple[str, ...]
    source: Sql
    where: tuple[Sql, ...] = ()
    order: tuple[str, ...] = ()
    distinct: bool = False  # rows that are equal in what orders them are one

    def narrowed(self, *conditions: Sql) -> "Lookup":
        """The same of the rows that meet these *conditions* as well."""
        return self._replace(where=self.where + conditions)

    def sql(self, limit: int | None = None, offset: int = 0) -> Sql:
        """As SQL: of *limit* rows behind the first *offset*."""
        text = f"SELECT {', '.join(self.columns)} FROM {self.source.text}"  # noqa: S608 - values have marks
        values = self.source.values
        if self.where:
            text += " WHERE " + " AND ".join([one.text for one in self.where])
            values = sum([one.values for one in self.where], values)
        if self.distinct:
            text += f" GROUP BY {', '.join(self.order)}"
        if self.order:
            text += f" ORDER BY {', '.join(self.order)}"
        if limit is not None:
            text, values = text + " LIMIT ?", (*values, limit)
        if offset:
            text, values = text + " OFFSET ?", (*values, offset)
        return Sql(text, values)

    def counted(self, bound: int) -> Sql:
        """How many rows there are, up to *bound*, in the one row that is read."""
        text, values = self.sql(bound)
        return Sql(f"SELECT count(*) FROM ({text}) AS counted", values)  # noqa: S608 - values have marks


@lru_cache(maxsize=1024)
def full_name(column: Column[Any]) -> str:
    """The *column* with its table, or with the alias of that."""
    return f"{column.table.name}.{column.name}"


def all_of(conditions: Sequence[Sql]) -> Sql:
    """That all *conditions* are met."""
    return _joined(" AND ", conditions) if conditions else TRUE


def any_of(conditions: Sequence[Sql]) -> Sql:
    """That one of *conditions* is met."""
    return _joined(" OR ", conditions) if conditions else FALSE


def _joined(word: str, conditions: Sequence[Sql]) -> Sql:
    if len(conditions) == 1:
        return conditions[0]
    text = word.join([one.text for one in conditions])
    return Sql(f"({text})", sum([one.values for one in conditions], ()))


def is_one_of(column: str, values: Iterable[object]) -> Sql:
    """That the *column* has one of these *values*."""
    listed = tuple(values)
    return Sql(f"{column} IN ({', '.join('?' * len(listed))})", listed) if listed else FALSE


def ask(connection: Connection, question: Sql) -> Sequence[Row]:
    """All rows that answer the *question*.

    Past SQLAlchemy but for its pool: what it does around a statement takes several times what SQLite does.
    Raises its DBAPIError all the same.
    """
    dialect = connection.dialect
    try:
        with contextlib.closing(connection.connection.cursor()) as cursor:
            cursor.execute(_spelled(question.text, dialect.name), question.values)
            return cursor.fetchall()
    except dialect.loaded_dbapi.Error as error:
        is_lost = dialect.is_disconnect(error, connection.connection, None)
        if is_lost:
            connection.invalidate(error)
        raise DBAPIError.instance(
            question.text,
            None,  # what is asked for are patients' attributes
            error,
            dialect.loaded_dbapi.Error,
            hide_parameters=True,
            connection_invalidated=is_lost,
            dialect=dialect,
        ) from error


def _spelled(text: str, dialect: str) -> str:
    if dialect == "sqlite":
        return text.replace(" IS TRUE", " IS 1")  # as its partial indexes have it
    return text.replace("?", "%s").replace("instr(", "strpos(")
