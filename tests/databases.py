"""Databases for the many indexes of tests: what is the same for all of them is made and compiled once.

SQLAlchemy keeps what it has compiled for each engine apart, because the dialects of two may differ.  Ours are
all opened by the program, in one way for each kind of database.
"""

import functools
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from dicomscp.archive import sqlite


class _Compiled(dict[tuple[Any, ...], Any]):
    """A cache in which the first part of a key, the dialect, is not looked at."""

    def get(self, key: tuple[Any, ...], default: Any = None) -> Any:
        return super().get(key[1:], default)

    def __setitem__(self, key: tuple[Any, ...], compiled: Any) -> None:
        super().__setitem__(key[1:], compiled)


_BY_DIALECT: dict[str, _Compiled] = defaultdict(_Compiled)


def compiled_once(engine: Engine) -> Engine:
    """The same engine, with what was compiled for others that were given here before."""
    return engine.execution_options(compiled_cache=_BY_DIALECT[engine.dialect.name])


def open_sqlite(path: Path) -> Engine:
    """What writes the index at *path*; a new one is a copy of one that the program made."""
    if not path.exists():
        path.write_bytes(_new_sqlite())
    return compiled_once(sqlite.open_engine(path, read_only=False))


@functools.cache
def _new_sqlite() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.sqlite"
        sqlite.open_engine(path, read_only=False).dispose()
        return path.read_bytes()
