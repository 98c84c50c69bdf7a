"""Index: what is held, in tables, for questions.  Derived: it can be made again from the instances.

    study ──< series ──< statement ──< instance

An *instance* row is one variant held; of all variants of a SOP Instance UID, wherever in the archive they
claim to belong, exactly one is published.  What an instance says of its study and series is kept apart,
once for all instances of the series that say the same: that is a *statement*.  The rows of study and
series are derived from the statements of published instances, in published order of their first instance:
of each attribute, the first value that is not empty.  So whatever came in whatever order and batches, the
rows are a function of the variants held, and an instance that says what others said changes only counts.

Published order is series by number, then UID, and instances by number, then UID; absent numbers last.

A variant that is removed first *leaves*: it is held no more and no question lists it, but its row says
what file is to go once no document names it.

Questions run in two steps.  Columns narrow the candidates; `matching.matcher` decides by the DICOM JSON.
So columns may be coarse but must never lose a match: a row with a value that its column does not tell in
full (several values, a date that is none) is marked *irregular* and is a candidate always.
"""

import contextlib
import hashlib
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import orjson
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    Table,
    UniqueConstraint,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    false,
    func,
    insert,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy import (
    Index as TableIndex,
)
from sqlalchemy import (
    Text as AnyText,
)
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionError

from dicomscp.archive.journal import Position
from dicomscp.dicom import matching
from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.matching import (
    SERIES_UID,
    SOP_CLASS_UID,
    SOP_UID,
    STANDARD,
    STUDY_UID,
    AnyOf,
    Key,
    Level,
    Match,
    Model,
    Query,
    Range,
    Single,
    UIDList,
    Wildcard,
    normal,
)
from dicomscp.dicom.names import fold
from dicomscp.errors import BusyError, DamagedError, RefusedError
from dicomscp.study import layout

Attributes: TypeAlias = dict[str, dict[str, Any]]
"""A DICOM JSON object."""

_Row: TypeAlias = Any  # SQLAlchemy 2.0 and 2.1 type theirs differently

NO_NUMBER = (1 << 63) - 1
"""The ordinal of what has no number: it stands last."""


class Arrival(NamedTuple):
    """A variant that has come into custody; *attributes* are the fragments of the model's index tags."""

    key: InstanceKey
    sop_class_uid: str
    transfer_syntax_uid: str
    digest: bytes
    received_at: int
    calling_ae: str
    path: str
    size: int
    attributes: Mapping[int, bytes]


class Held(NamedTuple):
    """A variant that is held; *path* is relative to the root.

    It came *receipts* times, what is the same counted with it.  If it is *leaving*, it is held no more:
    its file goes once the study's documents show it as it was at that count of changes.
    """

    key: InstanceKey
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str
    digest: bytes
    received_at: int
    size: int
    receipts: int = 1
    leaving: int | None = None


class Named(NamedTuple):
    """A variant as a removal names it: as it was when the index was asked, and not as it may be since."""

    key: InstanceKey
    digest: bytes
    received_at: int
    receipts: int


class Counts(NamedTuple):
    """How much is held.  Variants and their bytes count all, the others what is published.

    What is leaving is counted by itself alone.
    """

    studies: int
    series: int
    instances: int
    variants: int
    bytes: int
    leaving: int = 0


class Snapshot(NamedTuple):
    """What a study is at one moment: its object, those of its series, and the published instances, in order.

    *study* is None if nothing of it is published; *changes* is how often it has changed by then.
    """

    study: Attributes | None
    series: list[Attributes]
    held: list[Held]
    changes: int


class Publication(NamedTuple):
    """What the documents of a study show; *published_at* in microseconds since 1970.

    *revision* is "" of a study whose documents were withdrawn.
    """

    study_uid: str
    revision: str
    series: int
    instances: int
    published_at: int


class Feed(NamedTuple):
    """Studies by when they were last published, each once.

    *token* stands for the place behind the last; *reset* says that it does not go on from what was asked
    for, but begins anew.
    """

    publications: list[Publication]
    token: str
    more: bool
    reset: bool


# ── tables ───────────────────────────────────────────────────────────────────────────────────────

metadata = MetaData()
"""The tables as the newest migration leaves them.  Foreign keys say how tables join; nobody checks them."""

Text = AnyText().with_variant(AnyText(collation="C"), "postgresql")  # byte by byte, as SQLite compares
_ID = BigInteger().with_variant(Integer(), "sqlite")  # there an integer primary key is the row's own number

study = Table(
    "study",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("study_uid", Text, nullable=False, unique=True),
    Column("instances", Integer, nullable=False, default=0),
    Column("series", Integer, nullable=False, default=0),
    Column("variants", Integer, nullable=False, default=0),
    Column("bytes", BigInteger, nullable=False, default=0),
    Column("changes", BigInteger, nullable=False, default=0),  # of what is published of it, ever
    Column("published", BigInteger, nullable=False, default=0),  # changes that its documents show
    Column("recency", BigInteger, nullable=False, default=0),  # -YYYYMMDDHHMMSS: the newest stand first
    Column("irregular", Boolean, nullable=False, default=False),
    Column("patient_key", Text, nullable=False, default=""),
    Column("patient_id", Text),
    Column("patient_name", Text),
    Column("patient_birth_date", Text),
    Column("accession_number", Text),
    Column("study_date", Text),
    Column("study_time", Text),
    Column("study_id", Text),
    Column("study_description", Text),
    Column("referring_physician_name", Text),
    Column("modalities", Text, nullable=False, default=""),  # each between backslashes
    Column("attributes", LargeBinary, nullable=False, default=b"{}"),
    TableIndex("study_order", "recency", "study_uid", unique=True),
    TableIndex("study_patient_key", "patient_key", "recency", "study_uid"),
    TableIndex("study_patient_id", "patient_id"),
    TableIndex("study_accession_number", "accession_number"),
    TableIndex("study_irregular", "irregular"),
)
_IS_DUE = study.c.changes != study.c.published
TableIndex("study_due", study.c.study_uid, sqlite_where=_IS_DUE, postgresql_where=_IS_DUE)

series = Table(
    "series",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("study_id", ForeignKey("study.id"), nullable=False),
    Column("series_uid", Text, nullable=False),
    Column("instances", Integer, nullable=False, default=0),
    Column("ordinal", BigInteger, nullable=False, default=NO_NUMBER),
    Column("irregular", Boolean, nullable=False, default=False),
    Column("modality", Text),
    Column("series_description", Text),
    Column("performed_procedure_step_start_date", Text),
    Column("attributes", LargeBinary, nullable=False, default=b"{}"),
    UniqueConstraint("study_id", "series_uid"),
    TableIndex("series_order", "study_id", "ordinal", "series_uid", unique=True),
    TableIndex("series_uid", "series_uid"),
)

statement = Table(
    "statement",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("series_id", ForeignKey("series.id"), nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("instances", Integer, nullable=False, default=0),  # published ones that make it
    Column("first_ordinal", BigInteger, nullable=False, default=NO_NUMBER),
    Column("first_sop_uid", Text, nullable=False, default=""),
    Column("attributes", LargeBinary, nullable=False),
    UniqueConstraint("series_id", "digest"),
)

instance = Table(
    "instance",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("series_id", ForeignKey("series.id"), nullable=False),
    Column("statement_id", ForeignKey("statement.id"), nullable=False),
    Column("sop_uid", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("ordinal", BigInteger, nullable=False),
    Column("irregular", Boolean, nullable=False),
    Column("published", Boolean, nullable=False),
    Column("received_at", BigInteger, nullable=False),
    Column("receipts", Integer, nullable=False, default=1),
    Column("leaving", BigInteger),  # the study's changes when it left; null while it is held
    Column("size", BigInteger, nullable=False),
    Column("sop_class_uid", Text, nullable=False),
    Column("transfer_syntax_uid", Text, nullable=False),
    Column("calling_ae", Text, nullable=False),
    Column("path", Text),  # unless it is the one that follows from the UIDs
    Column("attributes", LargeBinary, nullable=False),
    UniqueConstraint("sop_uid", "digest", "series_id"),
    TableIndex("instance_order", "series_id", "ordinal", "sop_uid"),
)
_IS_LEAVING = instance.c.leaving.is_not(None)
_READY_TO_GO = and_(_IS_LEAVING, study.c.published >= instance.c.leaving)  # no document names it
TableIndex("instance_leaving", instance.c.leaving, sqlite_where=_IS_LEAVING, postgresql_where=_IS_LEAVING)

journal_position = Table(
    "journal_position",
    metadata,
    Column("writer", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("offset", BigInteger, nullable=False),
)

setting = Table(
    "setting",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

publication = Table(
    "publication",
    metadata,
    Column("study_uid", Text, primary_key=True),
    Column("number", BigInteger, nullable=False, unique=True),  # rises with each
    Column("revision", Text, nullable=False),  # "" of a study that was withdrawn
    Column("series", Integer, nullable=False),
    Column("instances", Integer, nullable=False),
    Column("published_at", BigInteger, nullable=False),
)
_IS_WITHDRAWN = publication.c.revision == ""
TableIndex(
    "publication_withdrawn",
    publication.c.number,
    sqlite_where=_IS_WITHDRAWN,
    postgresql_where=_IS_WITHDRAWN,
)

# ── attributes and the columns they are matched by ───────────────────────────────────────────────

# What a column takes of a text.  The standard allows no longer values in these, and PostgreSQL no more than
# 2,700 bytes in a row of an index; nor does it take a NUL.
_LONGEST_BYTES = 1000

_MODALITY, _SERIES_NUMBER, _INSTANCE_NUMBER = 0x00080060, 0x00200011, 0x00200013
_AVAILABLE_TRANSFER_SYNTAX_UID = 0x00083002

_UID_COLUMNS: dict[int, Column[Any]] = {
    STUDY_UID: study.c.study_uid,
    matching.SERIES_UID: series.c.series_uid,
    SOP_UID: instance.c.sop_uid,
    SOP_CLASS_UID: instance.c.sop_class_uid,
}
_STUDY_COLUMNS: dict[int, Column[Any]] = {
    0x00100020: study.c.patient_id,
    0x00100010: study.c.patient_name,
    0x00100030: study.c.patient_birth_date,
    0x00080050: study.c.accession_number,
    0x00080020: study.c.study_date,
    0x00080030: study.c.study_time,
    0x00200010: study.c.study_id,
    0x00081030: study.c.study_description,
    0x00080090: study.c.referring_physician_name,
}
_SERIES_COLUMNS: dict[int, Column[Any]] = {
    _MODALITY: series.c.modality,
    0x0008103E: series.c.series_description,
    0x00400244: series.c.performed_procedure_step_start_date,
}
_ORDINAL_COLUMNS: dict[int, Column[Any]] = {
    _SERIES_NUMBER: series.c.ordinal,
    _INSTANCE_NUMBER: instance.c.ordinal,
}

_MATCHED_COLUMNS = (
    _STUDY_COLUMNS | _SERIES_COLUMNS | _ORDINAL_COLUMNS | {matching.MODALITIES_IN_STUDY: study.c.modalities}
)


class _Places:
    """Where in the tables the attributes of a model lie that have no column of their own."""

    def __init__(self, model: Model) -> None:
        self.model = model
        said = model.study_tags | model.series_tags
        self.statement = tuple(sorted((said | {SOP_CLASS_UID}) - {STUDY_UID, SERIES_UID}))
        self.instance = tuple(
            sorted(model.instance_tags - {SOP_UID, SOP_CLASS_UID, _AVAILABLE_TRANSFER_SYNTAX_UID})
        )
        self.study = tuple(_hex(tag) for tag in sorted(model.study_tags - {STUDY_UID}))
        self.series = tuple(_hex(tag) for tag in sorted(model.series_tags - {SERIES_UID}))
        in_study = {matching.MODALITIES_IN_STUDY, matching.SOP_CLASSES_IN_STUDY}
        self.blobs: tuple[tuple[Column[Any], frozenset[int]], ...] = (
            (study.c.attributes, model.study_tags - {STUDY_UID} | in_study),
            (series.c.attributes, model.series_tags - {SERIES_UID}),
            (instance.c.attributes, frozenset(self.instance)),
        )


def _hex(tag: int) -> str:
    return f"{tag:08X}"


def _column_value(attributes: Attributes, tag: int) -> tuple[str | None, bool]:
    """The value that the column of *tag* takes, and whether it fails to tell the attribute in full."""
    value, irregular = _first_value(attributes, tag)
    if value and (len(value.encode()) > _LONGEST_BYTES or "\0" in value):
        return None, True
    return value, irregular


def _first_value(attributes: Attributes, tag: int) -> tuple[str | None, bool]:
    """The first value in the form in which values are equal, and whether it is not all there is to tell."""
    values = [value for value in attributes.get(_hex(tag), {}).get("Value", ()) if value is not None]
    if not values:
        return None, False
    value = normal(public_vr(tag), values[0])
    return (value if isinstance(value, str) else None), len(values) > 1 or value is None


def _ordinal(attributes: Attributes, tag: int) -> tuple[int, bool]:
    """The first value of an IS attribute, as `_column_value` gives those of text."""
    values = attributes.get(_hex(tag), {}).get("Value", ())
    try:
        number = int(values[0])
    except (IndexError, TypeError, ValueError):
        return NO_NUMBER, len(values) > 1
    if not -NO_NUMBER <= number < NO_NUMBER:
        return NO_NUMBER, True
    return number, len(values) > 1 or normal("IS", values[0]) != number


@lru_cache(maxsize=1 << 16)
def _instance_number(fragment: bytes) -> tuple[int, bool]:
    return _ordinal(orjson.loads(b"{" + fragment + b"}"), _INSTANCE_NUMBER)


def _first_values(statements: Iterable[Attributes], tags: Sequence[str]) -> Attributes:
    """Of each attribute the first element with a value, or the first without if none has one."""
    found: Attributes = {}
    lacking = list(tags)
    for attributes in statements:
        left = []
        for tag in lacking:
            element = attributes.get(tag)
            if element is not None and len(element) > 1:
                found[tag] = element
            else:
                left.append(tag)
                if element is not None:
                    found.setdefault(tag, element)
        lacking = left
    return found


def _strings(attributes: Attributes, tag: int) -> list[str]:
    return [value for value in attributes.get(_hex(tag), {}).get("Value", ()) if isinstance(value, str)]


def _columns(attributes: Attributes, columns: Mapping[int, Column[Any]]) -> dict[str, Any]:
    """The columns' values by name, and whether the row is irregular."""
    row: dict[str, Any] = {"irregular": False}
    for tag, column in columns.items():
        row[column.name], irregular = _column_value(attributes, tag)
        row["irregular"] |= irregular
    return row


def _series_row(attributes: Attributes) -> dict[str, Any]:
    """What is derived of a series, but for counts."""
    row = _columns(attributes, _SERIES_COLUMNS)
    row["ordinal"], irregular = _ordinal(attributes, _SERIES_NUMBER)
    row["irregular"] |= irregular
    return row | {"attributes": orjson.dumps(attributes)}


def _study_row(attributes: Attributes, modalities: Iterable[str], classes: Iterable[str]) -> dict[str, Any]:
    """What is derived of a study, but for counts."""
    row = _columns(attributes, _STUDY_COLUMNS)
    in_study, of_classes = sorted(set(modalities)), sorted(set(classes))
    computed = {
        _hex(matching.MODALITIES_IN_STUDY): _element("CS", in_study),
        _hex(matching.SOP_CLASSES_IN_STUDY): _element("UI", of_classes),
    }
    return row | {
        "recency": _recency(row["study_date"], row["study_time"]),
        "patient_key": _patient_key(attributes),
        "modalities": "".join(f"\\{modality}" for modality in in_study) + "\\",
        "attributes": orjson.dumps(attributes | computed),
    }


def _recency(date: str | None, time: str | None) -> int:
    return -int(date + (time or "000000")[:6]) if date else 0


def _patient_key(attributes: Attributes) -> str:
    """What tells patients apart: the ID and its issuer; where there is no ID, name and birth date."""
    patient_id, issuer, name, birth_date = (
        _first_value(attributes, tag)[0] or "" for tag in (0x00100020, 0x00100021, 0x00100010, 0x00100030)
    )
    key = f"{patient_id}\\{issuer}" if patient_id else f"\\\\{name}\\{birth_date}"
    is_long = len(key.encode()) > _LONGEST_BYTES
    return hashlib.sha256(key.encode()).hexdigest() if is_long else key


def _element(vr: str, values: Sequence[object]) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)} if values else {"vr": vr}


# ── narrowing ────────────────────────────────────────────────────────────────────────────────────

_Condition: TypeAlias = ColumnElement[bool]
_MOST_UIDS = 5000  # in one statement; of more, none is narrowed by


def _narrowed(key: Key) -> tuple[Table, _Condition] | None:
    """A table, and a condition that every regular row of it meets that matches *key*; else None."""
    column = _MATCHED_COLUMNS.get(key.tag)
    if column is None:
        return None
    if column is study.c.modalities:
        condition = _modality_condition(key.match)
    elif key.tag in _ORDINAL_COLUMNS:
        condition = _number_condition(column, key.match)
    else:
        condition = _text_condition(column, key.vr, key.match)
    return None if condition is None else (column.table, condition)


def _number_condition(column: Column[Any], match: Match) -> _Condition | None:
    if not isinstance(match, Single):
        return None
    number = float(match.value)
    is_whole = number.is_integer() and abs(number) < NO_NUMBER
    return column == int(number) if is_whole else false()


def _text_condition(column: Column[Any], vr: str, match: Match) -> _Condition | None:
    if isinstance(match, AnyOf):
        return _any(_text_condition(column, vr, one) for one in match.matches)
    if isinstance(match, Range):
        after = column.is_not(None) if match.low is None else column >= match.low
        return after if match.high is None else and_(after, column <= match.high)
    if isinstance(match, Single):
        value = normal(vr, match.value)
        runs = _runs(column, vr, match.value)
        return or_(column == value, and_(column.contains("="), runs)) if vr == "PN" else column == value
    return _runs(column, vr, match.pattern) if isinstance(match, Wildcard) else None


def _any(conditions: Iterable[_Condition | None]) -> _Condition | None:
    """Any of *conditions*; None, which narrows nothing, if one of them is."""
    known = list(conditions)
    told = [one for one in known if one is not None]
    return or_(*told) if len(told) == len(known) else None


def _runs(column: Column[Any], vr: str, pattern: str) -> _Condition:
    """That the column contains each run of characters that stand for themselves."""
    runs = re.split(r"[*?^=]+", fold(pattern)) if vr == "PN" else re.split(r"[*?]+", pattern)
    return and_(
        *(column.contains(run.strip(" "), autoescape=True) for run in runs if run), column.is_not(None)
    )


def _modality_condition(match: Match) -> _Condition | None:
    if isinstance(match, AnyOf):
        return _any(_modality_condition(one) for one in match.matches)
    if isinstance(match, Single):
        return study.c.modalities.contains(f"\\{match.value}\\", autoescape=True)
    return None


def _uid_condition(key: Key) -> _Condition | None:
    """As `_narrowed`, of columns that tell their UIDs in full."""
    column = _UID_COLUMNS.get(key.tag)
    if column is None:
        return None
    if isinstance(key.match, Single):
        return column == key.match.value
    if isinstance(key.match, UIDList) and len(key.match.values) <= _MOST_UIDS:
        return column.in_(key.match.values)
    return None


# ── the index ────────────────────────────────────────────────────────────────────────────────────

_CHUNK = 500  # values in one statement
_PAGE = 500  # rows in one snapshot
_NO_LIMIT = (1 << 31) - 1
_WITHDRAWN_KEPT = 100_000  # studies withdrawn that the feed still tells of: about 15 MB
_UNSETTLED = 1_000_000  # publications: more than a loss of power can take back
_NAME, _FEED_FROM = "index", "feed_from"

_Touched: TypeAlias = set[int]  # ids of series


class _Variant(NamedTuple):
    """What decides which variant of a SOP Instance UID is published."""

    received_at: int
    digest: bytes
    study_uid: str
    series_uid: str
    sop_uid: str
    id: int
    series_id: int
    study_id: int
    published: bool
    receipts: int
    leaving: int | None

    @property
    def key(self) -> InstanceKey:
        return InstanceKey(self.study_uid, self.series_uid, self.sop_uid)

    @property
    def named(self) -> Named:
        return Named(self.key, self.digest, self.received_at, self.receipts)


class Index:
    """The index in one database; safe to share between threads.

    One process at a time writes.  Methods that change something return, for each study whose published
    instances changed, how often they have changed by now: whoever publishes compares that count with what
    it published last.  Raises BusyError when the database does not take or answer it now, DamagedError
    when it cannot be read.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        duplicates: Literal["first", "last"] = "first",
        retrieve_url: str = "/dicomweb",
        model: Model = STANDARD,
    ) -> None:
        """*duplicates* says which variant is published: that received first, or last; ties go by digest.

        *retrieve_url* begins every RetrieveURL.  *model* says which attributes are kept for questions; of
        what is held already, those that an earlier one had until the index is made anew.  An index that was
        made with another choice of variants is changed to this one, unless the engine is read-only.
        """
        self._engine, self._writer = engine, engine.execution_options(writes=True)
        self._duplicates, self._retrieve_url = duplicates, retrieve_url
        self.model, self._places = model, _Places(model)
        self._feed_from: int | None = None
        if not engine.get_execution_options().get("read_only"):
            self._adopt()

    # What changes it

    def apply(
        self,
        arrivals: Sequence[Arrival],
        positions: Mapping[str, Position],
        again: Sequence[tuple[InstanceKey, bytes]] = (),
        repaired: Sequence[Arrival] = (),
    ) -> dict[str, int]:
        """Take in *arrivals* and how far each journal is read, in one transaction.

        A variant that is held already, under the same UIDs, changes nothing; one that is leaving is held
        anew.  *again* names variants by UIDs and digest, once for each time that the same came again.
        Those *repaired* are held with another receipt from now on, and their studies have changed.
        """
        with self._writing() as connection:
            changed = self._take_in(connection, arrivals) if arrivals else {}
            changed |= self._repair(connection, repaired) if repaired else {}
            _count_receipts(connection, again)
            _put_positions(connection, positions)
        return changed

    def leave(self, named: Sequence[Named], positions: Mapping[str, Position], asked: str) -> dict[str, int]:
        """Let the *named* variants leave, and note how far journals are read, in one transaction.

        Another variant may be published then.  One that is not as it was named stays: it was received
        again since.  All stay if the index that was *asked* is not this one.  Returns the changes of
        every study of which something named is leaving now, or left before.
        """
        with self._writing() as connection:
            _put_positions(connection, positions)
            if asked != _name_of(connection):
                return {}
            wanted = set(named)
            variants = self._variants(connection, {one.key.sop_uid for one in wanted})
            meant = [one for one in variants if one.named in wanted]
            going = [one for one in meant if one.leaving is None]
            self._withdraw(connection, going)
            for study_id in {one.study_id for one in going}:
                _note_leaving(connection, study_id, [one.id for one in going if one.study_id == study_id])
            return _changes_of(connection, {one.study_id for one in meant})

    def leaving_studies(self) -> set[str]:
        """The studies of which something is leaving."""
        studies = select(study.c.study_uid).join_from(instance, series).join(study)
        with self._reading() as connection:
            return set(connection.execute(studies.where(_IS_LEAVING).distinct()).scalars())

    def leaving(self) -> list[Held]:
        """Every variant that left and whose file is not known to be gone."""
        with self._reading() as connection:
            return [_held(row) for row in connection.execute(_HELD.where(_IS_LEAVING))]

    def left(self, limit: int) -> list[Held]:
        """At most *limit* variants that left and that no document names any more."""
        with self._reading() as connection:
            return [_held(row) for row in connection.execute(_HELD.where(_READY_TO_GO).limit(limit))]

    def forget_left(self, variants: Sequence[Held]) -> None:
        """The files of these variants, which left, are gone for good."""
        with self._writing() as connection:
            named = {(one.key, one.digest) for one in variants}
            gone = [
                one
                for one in self._variants(connection, {key.sop_uid for key, _ in named})
                if one.leaving is not None and (one.key, one.digest) in named
            ]
            for chunk in _chunks([one.id for one in gone]):
                connection.execute(delete(instance).where(instance.c.id.in_(chunk)))
            _sweep(connection, {one.series_id for one in gone}, {one.study_id for one in gone})

    def clear(self) -> None:
        """Forget everything, the positions and the index's name too."""
        with self._writing() as connection:
            for table in (instance, statement, series, study, journal_position, publication):
                connection.execute(delete(table))
            _begin_anew(connection)

    def make_durable(self) -> None:
        """Once this returns, what was committed survives loss of power, even if a sync failed before.

        The log of commits is written out into the tables, so nothing relies on it any more.
        """
        checkpoint = self._engine.get_execution_options().get("checkpoint")
        if checkpoint is None:  # each commit is durable when it returns
            return
        with self._reading() as connection:
            busy, *_ = connection.exec_driver_sql(checkpoint).one()
        if busy:
            raise BusyError("the index cannot be made durable while it is being read")

    def forget_position(self, writer: str) -> None:
        """The journal of *writer* is gone."""
        with self._writing() as connection:
            connection.execute(delete(journal_position).where(journal_position.c.writer == writer))

    def mark_published(self, changes: int, publication: Publication) -> None:
        """The documents of the study show it as it was at that count of *changes*.

        If they are not what they were, the study moves to the end of the feed.
        """
        study_uid = publication.study_uid
        with self._writing() as connection:
            this = study.c.study_uid == study_uid
            connection.execute(update(study).where(this).values(published=changes))
            _end_studies(connection, this)
            if self._feed_from is None:  # a number that was lost with the power may have been given out
                self._feed_from = _last_number(connection) + _UNSETTLED
            _announce(connection, publication, self._feed_from)

    def mark_unpublished(self) -> None:
        """No document stands: every study with a published instance is due."""
        with self._writing() as connection:
            connection.execute(update(study).values(published=0))

    def publish_as(self, made_by: str) -> None:
        """Documents are made so from now on: if they were made otherwise, every study is due."""
        with self._writing() as connection:
            name = setting.c.name == "documents"
            before = connection.execute(select(setting.c.value).where(name)).scalar()
            if before != made_by:
                connection.execute(update(study).values(published=0))
                _put(connection, setting, {"name": "documents"}, {"value": made_by})

    # What is asked of it

    def name(self) -> str:
        """A random name that this index got when it was made or last cleared."""
        with self._reading() as connection:
            return _name_of(connection)

    def positions(self) -> dict[str, Position]:
        """How far each journal was read when the last arrivals of it were applied."""
        with self._reading() as connection:
            rows = connection.execute(select(journal_position)).all()
        return {row.writer: Position(row.number, row.offset) for row in rows}

    def known(self, sop_uids: Iterable[str], *, leaving: bool = False) -> dict[str, list[Held]]:
        """Every variant held under those SOP Instance UIDs, in whatever study, earliest first.

        With *leaving*, those that left and whose file may still be there are among them.
        """
        found: dict[str, list[Held]] = {}
        with self._reading() as connection:
            for chunk in _chunks(set(sop_uids)):
                condition = and_(instance.c.sop_uid.in_(chunk), true() if leaving else ~_IS_LEAVING)
                rows = connection.execute(
                    _HELD.where(condition).order_by(instance.c.received_at, instance.c.digest)
                )
                for row in rows:
                    found.setdefault(row.sop_uid, []).append(_held(row))
        return found

    def held(self, study_uid: str, series_uid: str | None = None, sop_uid: str | None = None) -> list[Held]:
        """The published variant of every instance there, in published order."""
        conditions = [*_place(study_uid, series_uid, sop_uid), instance.c.published.is_(true())]
        with self._reading() as connection:
            return [
                _held(row) for row in connection.execute(_HELD.where(*conditions).order_by(*_PUBLISHED_ORDER))
            ]

    def variants(
        self, study_uid: str, series_uid: str | None = None, sop_uid: str | None = None
    ) -> list[Held]:
        """Every variant that claims to be there, published or not, in published order."""
        order = (*_PUBLISHED_ORDER, instance.c.received_at, instance.c.digest)
        there = and_(*_place(study_uid, series_uid, sop_uid), ~_IS_LEAVING)
        with self._reading() as connection:
            return [_held(row) for row in connection.execute(_HELD.where(there).order_by(*order))]

    def leaving_of(self, key: InstanceKey) -> list[Held]:
        """What is leaving of one instance; what its documents name, as far as can be told, comes first."""
        there = and_(*_place(*key), _IS_LEAVING)
        with self._reading() as connection:
            found = [_held(row) for row in connection.execute(_HELD.where(there))]
        found.sort(key=lambda one: (one.received_at, one.digest), reverse=self._duplicates == "last")
        return found

    def snapshot(self, study_uid: str) -> Snapshot:
        """What the study is now, read at one moment."""
        one = (Key(STUDY_UID, "UI", Single(study_uid)),)
        with self._snapshot() as connection:
            this = study.c.study_uid == study_uid
            changes = connection.execute(select(study.c.changes).where(this)).scalar()
            studies = self._all(connection, Query(Level.STUDY, one, OF_STUDY, None))
            of_study = self._all(connection, Query(Level.SERIES, one, _OF_SERIES, None))
            rows = connection.execute(
                _HELD.where(this, instance.c.published.is_(true())).order_by(*_PUBLISHED_ORDER)
            )
            return Snapshot(next(iter(studies), None), of_study, [_held(row) for row in rows], changes or 0)

    def feed(self, since: str, limit: int) -> Feed:
        """The studies published behind the token *since*, at most *limit*; from the first if it is "".

        Raises RefusedError for what is no token.
        """
        name, _, digits = since.partition("-")
        if since and not (name.isalnum() and digits.isdecimal() and digits.isascii() and len(digits) < 19):
            raise RefusedError("since is not a token that was given out; leave it out to begin anew")
        with self._snapshot() as connection:
            settings = _settings(connection)
            first, last = int(settings.get(_FEED_FROM, "0")), _last_number(connection)
            goes_on = name == settings.get(_NAME) and first <= int(digits) <= last
            after = int(digits) if since and goes_on else 0
            rows = connection.execute(
                select(publication)
                .where(publication.c.number > after)
                .order_by(publication.c.number)
                .limit(limit + 1)
            ).all()
        given = rows[:limit]
        token = f"{settings.get(_NAME, '0')}-{given[-1].number if given else after}"
        found = [
            Publication(row.study_uid, row.revision, row.series, row.instances, row.published_at)
            for row in given
        ]
        return Feed(found, token, len(rows) > limit, reset=bool(since) and not goes_on)

    def announced(self, study_uids: Iterable[str]) -> set[str]:
        """Those of these studies that have documents."""
        with self._reading() as connection:
            return {
                uid
                for chunk in _chunks(study_uids)
                for uid in connection.execute(
                    select(publication.c.study_uid).where(publication.c.study_uid.in_(chunk), ~_IS_WITHDRAWN)
                ).scalars()
            }

    def studies(self) -> Iterator[str]:
        """The UIDs of all studies of which a variant is held, in order."""
        yield from (row.study_uid for row in self._paged(study.c.variants > 0))

    def due(self) -> Iterator[tuple[str, int]]:
        """The studies whose documents do not show what is published of them, and their changes by now."""
        yield from ((row.study_uid, row.changes) for row in self._paged(_IS_DUE))

    def due_instances(self) -> int:
        """How many published instances the studies have that are due."""
        with self._reading() as connection:
            return int(connection.execute(select(_sum(study.c.instances)).where(_IS_DUE)).scalar() or 0)

    def counts(self) -> Counts:
        """How much is held."""
        held = study.c.instances > 0
        totals = (study.c.series, study.c.instances, study.c.variants, study.c.bytes)
        with self._reading() as connection:
            row: _Row = connection.execute(select(func.count().filter(held), *map(_sum, totals))).one()
            leaving = connection.execute(select(func.count()).where(_IS_LEAVING)).scalar()
        return Counts(*row)._replace(leaving=leaving or 0)

    def find(self, query: Query, goes_on: Callable[[], bool] = lambda: True) -> Iterator[dict[str, Any]]:
        """The objects that match *query*, as DICOM JSON.

        Before each page of rows is read, *goes_on* is asked; if it says no, nothing more is given.

        Studies and patients come newest first (by date, time, then UID; those without a date last), what
        belongs to them in published order.  Rows are read in pages, each a snapshot of its own.
        """
        search = _Search(query, self._retrieve_url, self._places)
        to_skip, left = query.offset, query.limit
        after: _Row | None = None
        while (left is None or left > 0) and goes_on():
            beyond, to_skip = (to_skip, 0) if search.is_exact else (0, to_skip)
            size = _PAGE if left is None else min(_PAGE, to_skip + left)
            with self._reading() as connection:
                rows = connection.execute(search.page(after, size).offset(beyond)).all()
            for row in rows:
                found = search.match(row)
                if found is None:
                    continue
                if to_skip:
                    to_skip -= 1
                    continue
                yield found
                if left is not None:
                    left -= 1
                    if not left:
                        return
            if len(rows) < size:
                return
            after = rows[-1]

    # Transactions

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        with _translated(), self._writer.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _translated(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        """A connection on which all questions are answered as of one moment; to be given back soon."""
        with _translated(), self._engine.execution_options(snapshot=True).connect() as connection:
            yield connection

    def _all(self, connection: Connection, query: Query) -> list[Attributes]:
        """All objects that match *query*, whose keys are UIDs."""
        search = _Search(query, self._retrieve_url, self._places)
        rows = connection.execute(search.page(None, _NO_LIMIT)).all()
        return [found for row in rows if (found := search.match(row)) is not None]

    def _paged(self, condition: _Condition) -> Iterator[_Row]:
        """Study UIDs and changes of the studies that meet *condition*, by UID."""
        after = ""
        while True:
            page = (
                select(study.c.study_uid, study.c.changes)
                .where(condition, study.c.study_uid > after)
                .order_by(study.c.study_uid)
                .limit(_PAGE)
            )
            with self._reading() as connection:
                rows = connection.execute(page).all()
            yield from rows
            if len(rows) < _PAGE:
                return
            after = rows[-1].study_uid

    # Taking in and forgetting

    def _take_in(self, connection: Connection, arrivals: Sequence[Arrival]) -> dict[str, int]:
        sop_uids = {arrival.key.sop_uid for arrival in arrivals}
        known = self._hold_anew(connection, arrivals, self._variants(connection, sop_uids))
        there = {(one.key, one.digest) for one in known}
        fresh: dict[tuple[InstanceKey, bytes], Arrival] = {}
        for arrival in arrivals:
            if (arrival.key, arrival.digest) not in there:
                fresh.setdefault((arrival.key, arrival.digest), arrival)
        if not fresh:
            return {}
        times = Counter(key.sop_uid for key, _ in fresh)
        contested = {one.sop_uid for one in known} & times.keys() | {uid for uid, n in times.items() if n > 1}
        intake = _Intake(connection, self._places)
        for arrival in fresh.values():
            intake.add(arrival, published=arrival.key.sop_uid not in contested)
        moved = intake.write()
        recounted, studies = self._choose(connection, contested)
        _derive(connection, moved | recounted, self._places)
        return _count_studies(connection, intake.gains, studies | intake.published_studies)

    def _repair(self, connection: Connection, repaired: Sequence[Arrival]) -> dict[str, int]:
        came = {(arrival.key, arrival.digest): arrival for arrival in repaired}
        sop_uids = {arrival.key.sop_uid for arrival in repaired}
        held = [one for one in self._variants(connection, sop_uids) if (one.key, one.digest) in came]
        gains: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for one in held:
            arrival = came[one.key, one.digest]
            this = instance.c.id == one.id
            size = connection.execute(select(instance.c.size).where(this)).scalar() or 0
            gains[one.study_id][1] += arrival.size - size
            receipt = {"received_at": arrival.received_at, "calling_ae": arrival.calling_ae}
            connection.execute(update(instance).where(this).values(size=arrival.size, **receipt))
        recounted, studies = self._choose(connection, sop_uids)
        _derive(connection, recounted, self._places)
        return _count_studies(connection, gains, studies | gains.keys())

    def _choose(self, connection: Connection, sop_uids: Iterable[str]) -> tuple[_Touched, set[int]]:
        """Publish the right variant of each; returns the series recounted and the studies changed."""
        by_sop: dict[str, list[_Variant]] = defaultdict(list)
        for one in self._variants(connection, sop_uids):
            if one.leaving is None:
                by_sop[one.sop_uid].append(one)
        choose = min if self._duplicates == "first" else max
        chosen = {choose(variants).id for variants in by_sop.values()}
        wrong = [
            one for variants in by_sop.values() for one in variants if one.published != (one.id in chosen)
        ]
        if wrong:
            connection.execute(
                update(instance)
                .where(instance.c.id == bindparam("b_id"))
                .values(published=bindparam("b_published")),
                [{"b_id": one.id, "b_published": not one.published} for one in wrong],
            )
        touched = {one.series_id for one in wrong}
        for series_id in touched:
            _recount(connection, series_id)
        return touched, {one.study_id for one in wrong}

    def _hold_anew(
        self, connection: Connection, arrivals: Sequence[Arrival], known: Sequence[_Variant]
    ) -> list[_Variant]:
        """What is leaving makes room for *arrivals* that are the same; returns which of *known* are held."""
        came = {(arrival.key, arrival.digest) for arrival in arrivals}
        leaving = [one for one in known if one.leaving is not None]
        for chunk in _chunks([one.id for one in leaving if (one.key, one.digest) in came]):
            connection.execute(delete(instance).where(instance.c.id.in_(chunk)))
        return [one for one in known if one.leaving is None]

    def _withdraw(self, connection: Connection, going: Sequence[_Variant]) -> dict[str, int]:
        """Neither publish nor count these any more; returns the changes of studies whose documents change."""
        losses: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for chunk in _chunks([one.id for one in going]):
            rows = connection.execute(
                select(series.c.study_id, instance.c.size)
                .join_from(instance, series)
                .where(instance.c.id.in_(chunk))
            )
            for study_id, size in rows:
                losses[study_id][0] -= 1
                losses[study_id][1] -= size
            # Any count will do until the study's is known: they are no candidates from here on.
            connection.execute(
                update(instance).where(instance.c.id.in_(chunk)).values(published=False, leaving=0)
            )
        touched = {one.series_id for one in going}
        for series_id in touched:
            _recount(connection, series_id)
        recounted, studies = self._choose(connection, {one.sop_uid for one in going})
        _derive(connection, touched | recounted, self._places)
        return _count_studies(connection, losses, studies | {one.study_id for one in going if one.published})

    def _variants(self, connection: Connection, sop_uids: Iterable[str]) -> list[_Variant]:
        """Those under these SOP Instance UIDs, leaving or not."""
        return [
            _Variant(*row)
            for chunk in _chunks(sop_uids)
            for row in connection.execute(_VARIANT.where(instance.c.sop_uid.in_(chunk)))
        ]

    def _adopt(self) -> None:
        """Make an index of the other choice of variants one of this; give a new one its name."""
        with self._writing() as connection:
            settings = _settings(connection)
            if _NAME not in settings:
                _begin_anew(connection)
            made_with = settings.get("duplicates")
            if made_with == self._duplicates:
                return
            several = select(instance.c.sop_uid).group_by(instance.c.sop_uid).having(func.count() > 1)
            recounted, studies = self._choose(connection, connection.execute(several).scalars().all())
            _derive(connection, recounted, self._places)
            _count_studies(connection, {}, studies)
            _put(connection, setting, {"name": "duplicates"}, {"value": self._duplicates})


# Of what documents say, whatever else is kept: the same instances give the same documents.
OF_STUDY = STANDARD.supported(Level.STUDY) - STANDARD.computed(Level.PATIENT)
"""What documents say of a study."""
_OF_SERIES = STANDARD.series_tags | {
    STUDY_UID,
    matching.INSTANCE_AVAILABILITY,
    matching.RETRIEVE_URL,
    matching.SERIES_RELATED_INSTANCES,
}
_PUBLISHED_ORDER = (series.c.ordinal, series.c.series_uid, instance.c.ordinal, instance.c.sop_uid)

_HELD = (
    select(
        study.c.study_uid,
        series.c.series_uid,
        instance.c.sop_uid,
        instance.c.sop_class_uid,
        instance.c.transfer_syntax_uid,
        instance.c.path,
        instance.c.digest,
        instance.c.received_at,
        instance.c.size,
        instance.c.receipts,
        instance.c.leaving,
    )
    .join_from(instance, series)
    .join(study)
)

_VARIANT: Select[Any] = (
    select(
        instance.c.received_at,
        instance.c.digest,
        study.c.study_uid,
        series.c.series_uid,
        instance.c.sop_uid,
        instance.c.id,
        instance.c.series_id,
        series.c.study_id,
        instance.c.published,
        instance.c.receipts,
        instance.c.leaving,
    )
    .join_from(instance, series)
    .join(study)
)


def _held(row: _Row) -> Held:
    study_uid, series_uid, sop_uid, sop_class_uid, transfer_syntax_uid, path, *rest = row
    key = InstanceKey(study_uid, series_uid, sop_uid)
    return Held(key, sop_class_uid, transfer_syntax_uid, path or layout.instance_path(key), *rest)


_READ_ONLY = "25006"  # SQLSTATE; a server that stands by for another one says so


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """A database's errors as ours; what it says names no values."""
    try:
        yield
    except NoConnectionError as error:
        raise BusyError("the index has too many readers now") from error
    except DBAPIError as error:
        reason = first_line(error.orig)
        is_passing = isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
        if is_passing or getattr(error.orig, "sqlstate", "") == _READ_ONLY:
            raise BusyError(f"the index cannot be used now: {reason}") from error
        raise DamagedError(f"the index is damaged, rebuild it: {reason}") from error


def first_line(error: object) -> str:
    """What a database says in its first line; behind it PostgreSQL quotes rows: patients' attributes."""
    return str(error).partition("\n")[0]


def _sum(column: Column[Any]) -> ColumnElement[int]:
    """The sum as an integer: PostgreSQL adds up large ones as decimals."""
    return cast(func.coalesce(func.sum(column), 0), BigInteger)


def _settings(connection: Connection) -> dict[str, str]:
    rows: list[_Row] = list(connection.execute(select(setting.c.name, setting.c.value)))
    return {row.name: row.value for row in rows}


def _begin_anew(connection: Connection) -> None:
    """Give the index another name: tokens and removals that name an earlier one say nothing from now on."""
    _put(connection, setting, {"name": _NAME}, {"value": secrets.token_hex(8)})
    _put(connection, setting, {"name": _FEED_FROM}, {"value": "0"})


def _last_number(connection: Connection) -> int:
    return connection.execute(select(func.max(publication.c.number))).scalar() or 0


def _announce(connection: Connection, new: Publication, least: int) -> None:
    """Move a study that is not what it was to the end of the feed, with a number of at least *least*."""
    this = publication.c.study_uid == new.study_uid
    before = connection.execute(select(publication.c.revision).where(this)).scalar()
    if before == new.revision or (before is None and not new.revision):
        return
    number = max(_last_number(connection) + 1, least)
    _put(connection, publication, {"study_uid": new.study_uid}, {**new._asdict(), "number": number})
    if new.revision:
        return
    withdrawn = select(publication.c.number).where(_IS_WITHDRAWN).order_by(publication.c.number.desc())
    oldest = connection.execute(withdrawn.offset(_WITHDRAWN_KEPT).limit(1)).scalar()
    if oldest is not None:
        connection.execute(delete(publication).where(_IS_WITHDRAWN, publication.c.number <= oldest))
        _put(connection, setting, {"name": _FEED_FROM}, {"value": str(oldest)})


def _place(study_uid: str, series_uid: str | None, sop_uid: str | None) -> list[_Condition]:
    """That an instance claims to be of the study, of the series, or to be that instance."""
    conditions = [study.c.study_uid == study_uid]
    if series_uid is not None:
        conditions.append(series.c.series_uid == series_uid)
    if sop_uid is not None:
        conditions.append(instance.c.sop_uid == sop_uid)
    return conditions


def _name_of(connection: Connection) -> str:
    """The index's own name; empty while it has none."""
    name = connection.execute(select(setting.c.value).where(setting.c.name == _NAME)).scalar()
    return str(name or "")


def _put_positions(connection: Connection, positions: Mapping[str, Position]) -> None:
    for writer, position in positions.items():
        _put(connection, journal_position, {"writer": writer}, position._asdict())


def _count_receipts(connection: Connection, again: Sequence[tuple[InstanceKey, bytes]]) -> None:
    """Note of each of these variants that it came again."""
    rows = [
        {
            "b_study_uid": key.study_uid,
            "b_series_uid": key.series_uid,
            "b_sop_uid": key.sop_uid,
            "b_digest": digest,
        }
        for key, digest in again
    ]
    if rows:
        connection.execute(_COUNT_RECEIPT, rows)


_COUNT_RECEIPT = (
    update(instance)
    .where(
        instance.c.sop_uid == bindparam("b_sop_uid"),
        instance.c.digest == bindparam("b_digest"),
        instance.c.series_id
        == select(series.c.id)
        .join(study)
        .where(
            study.c.study_uid == bindparam("b_study_uid"), series.c.series_uid == bindparam("b_series_uid")
        )
        .scalar_subquery(),
    )
    .values(receipts=instance.c.receipts + 1)
)


def _note_leaving(connection: Connection, study_id: int, ids: Sequence[int]) -> None:
    """Documents do not name these instances of the study once they show it as it is now."""
    now = select(study.c.changes).where(study.c.id == study_id).scalar_subquery()
    for chunk in _chunks(ids):
        connection.execute(update(instance).where(instance.c.id.in_(chunk)).values(leaving=now))


def _changes_of(connection: Connection, study_ids: Iterable[int]) -> dict[str, int]:
    return {
        row.study_uid: row.changes
        for chunk in _chunks(study_ids)
        for row in connection.execute(select(study.c.study_uid, study.c.changes).where(study.c.id.in_(chunk)))
    }


def _chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    all_values = list(values)
    for start in range(0, len(all_values), _CHUNK):
        yield all_values[start : start + _CHUNK]


def _put(connection: Connection, table: Table, key: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Set the row with that *key*, there or not."""
    condition = and_(*(table.c[name] == value for name, value in key.items()))
    if not connection.execute(update(table).where(condition).values(**row)).rowcount:
        connection.execute(insert(table).values(**{**key, **row}))


# ── taking in ────────────────────────────────────────────────────────────────────────────────────


class _Intake:
    """The new variants of one transaction on their way into the tables."""

    def __init__(self, connection: Connection, places: _Places) -> None:
        self._connection, self._places = connection, places
        self._series_ids: dict[tuple[str, str], int] = {}
        self._study_ids: dict[str, int] = {}
        self._statements: dict[tuple[int, bytes], int] = {}
        self._rows: list[dict[str, Any]] = []
        self._first: dict[int, tuple[int, str]] = {}  # published order of the first instance, by statement
        self._count: Counter[int] = Counter()  # published instances, by statement
        self._series_of: dict[int, int] = {}  # by statement
        self._before: dict[int, tuple[int, tuple[int, str]]] = {}  # count and first, by statement
        self.gains: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # variants and bytes, by study
        self.published_studies: set[int] = set()

    def add(self, arrival: Arrival, *, published: bool) -> None:
        """Prepare the row of one variant.  The hot path."""
        key, attributes = arrival.key, arrival.attributes
        place = (key.study_uid, key.series_uid)
        series_id = self._series_ids.get(place) or self._series_id(*place)
        get = attributes.get
        said = b",".join(filter(None, map(get, self._places.statement)))
        statement_id = self._statements.get((series_id, said)) or self._statement_id(series_id, said)
        number = get(_INSTANCE_NUMBER)
        ordinal, irregular = _instance_number(number) if number else (NO_NUMBER, False)
        study_id = self._study_ids[key.study_uid]
        gain = self.gains[study_id]
        gain[0] += 1
        gain[1] += arrival.size
        if published:
            order = (ordinal, key.sop_uid)
            self._count[statement_id] += 1
            self._first[statement_id] = min(self._first.get(statement_id, order), order)
            self.published_studies.add(study_id)
        self._rows.append(
            {
                "series_id": series_id,
                "statement_id": statement_id,
                "sop_uid": key.sop_uid,
                "digest": arrival.digest,
                "ordinal": ordinal,
                "irregular": irregular,
                "published": published,
                "received_at": arrival.received_at,
                "size": arrival.size,
                "sop_class_uid": arrival.sop_class_uid,
                "transfer_syntax_uid": arrival.transfer_syntax_uid,
                "calling_ae": arrival.calling_ae,
                "path": None if arrival.path == layout.instance_path(key) else arrival.path,
                "attributes": b"{" + b",".join(filter(None, map(get, self._places.instance))) + b"}",
            }
        )

    def write(self) -> _Touched:
        """Insert the rows and count them; returns the series whose derived attributes may have changed."""
        self._connection.execute(insert(instance), self._rows)
        touched: _Touched = set()
        by_series: Counter[int] = Counter()
        counted = {}
        for statement_id, count in self._count.items():
            series_id = self._series_of[statement_id]
            by_series[series_id] += count
            before, first = self._before[statement_id]
            order = self._first[statement_id]
            if not before or (order < first and self._is_one_of_several(statement_id)):
                touched.add(series_id)
            counted[statement_id] = (before + count, min(order, first) if before else order)
        _count_statements(self._connection, counted)
        for series_id, count in by_series.items():
            self._connection.execute(
                update(series).where(series.c.id == series_id).values(instances=series.c.instances + count)
            )
        return touched

    def _is_one_of_several(self, statement_id: int) -> bool:
        others = exists().where(
            statement.c.series_id == self._series_of[statement_id],
            statement.c.id != statement_id,
            statement.c.instances > 0,
        )
        return bool(self._connection.execute(select(others)).scalar())

    def _series_id(self, study_uid: str, series_uid: str) -> int:
        study_id = self._study_ids.get(study_uid) or self._study_id(study_uid)
        self._study_ids[study_uid] = study_id
        series_id = _id_of(self._connection, series, {"study_id": study_id, "series_uid": series_uid})
        self._series_ids[study_uid, series_uid] = series_id
        return series_id

    def _study_id(self, study_uid: str) -> int:
        there = select(study.c.id).where(study.c.study_uid == study_uid)
        found: int | None = self._connection.execute(there).scalar()
        if found is not None:
            return found
        before = _changes_before(self._connection)
        return _inserted(
            self._connection, study, {"study_uid": study_uid, "changes": before, "published": before}
        )

    def _statement_id(self, series_id: int, said: bytes) -> int:
        columns = (
            statement.c.id,
            statement.c.instances,
            statement.c.first_ordinal,
            statement.c.first_sop_uid,
        )
        digest = hashlib.sha256(said).digest()
        row: _Row = self._connection.execute(
            select(*columns).where(statement.c.series_id == series_id, statement.c.digest == digest)
        ).one_or_none()
        if row is None:
            values = {"series_id": series_id, "digest": digest, "attributes": b"{" + said + b"}"}
            row = (_inserted(self._connection, statement, values), 0, NO_NUMBER, "")
        statement_id, before, *first = row
        self._before[statement_id] = (before, tuple(first))
        self._statements[series_id, said] = statement_id
        self._series_of[statement_id] = series_id
        return int(statement_id)


def _id_of(connection: Connection, table: Table, key: Mapping[str, Any]) -> int:
    """The id of the row with that *key*, which is made if it is not there."""
    condition = and_(*(table.c[name] == value for name, value in key.items()))
    found: int | None = connection.execute(select(table.c.id).where(condition)).scalar()
    return _inserted(connection, table, key) if found is None else found


def _inserted(connection: Connection, table: Table, values: Mapping[str, Any]) -> int:
    """The id of a new row."""
    key: _Row = connection.execute(insert(table).values(**values)).inserted_primary_key
    return int(key[0])


_COUNT_STATEMENT = (
    update(statement)
    .where(statement.c.id == bindparam("b_id"))
    .values(
        instances=bindparam("b_instances"),
        first_ordinal=bindparam("b_ordinal"),
        first_sop_uid=bindparam("b_sop_uid"),
    )
)


def _count_statements(connection: Connection, counted: Mapping[int, tuple[int, tuple[int, str]]]) -> None:
    """Note how many published instances make each statement, and which of them is first."""
    rows = [
        {"b_id": statement_id, "b_instances": instances, "b_ordinal": ordinal, "b_sop_uid": sop_uid}
        for statement_id, (instances, (ordinal, sop_uid)) in counted.items()
    ]
    if rows:
        connection.execute(_COUNT_STATEMENT, rows)


def _recount(connection: Connection, series_id: int) -> None:
    """Count the statements of a series, and find their first instances, from its rows."""
    counted: dict[int, tuple[int, tuple[int, str]]] = {}
    rows = connection.execute(
        select(instance.c.statement_id, instance.c.ordinal, instance.c.sop_uid)
        .where(instance.c.series_id == series_id, instance.c.published.is_(true()))
        .order_by(instance.c.ordinal, instance.c.sop_uid)
    )
    for statement_id, ordinal, sop_uid in rows:
        instances, first = counted.get(statement_id, (0, (ordinal, sop_uid)))
        counted[statement_id] = (instances + 1, first)
    connection.execute(update(statement).where(statement.c.series_id == series_id).values(instances=0))
    _count_statements(connection, counted)
    total = sum(instances for instances, _ in counted.values())
    connection.execute(update(series).where(series.c.id == series_id).values(instances=total))


def _derive(connection: Connection, series_ids: _Touched, places: _Places) -> None:
    """Derive these series and their studies from the statements of what is published."""
    for chunk in _chunks(series_ids):
        rows = connection.execute(select(series.c.study_id).where(series.c.id.in_(chunk)).distinct())
        for study_id in rows.scalars().all():
            _derive_study(connection, study_id, series_ids, places)


def _derive_study(connection: Connection, study_id: int, series_ids: _Touched, places: _Places) -> None:
    rows = connection.execute(
        select(series.c.id, series.c.series_uid, statement.c.attributes)
        .join_from(series, statement)
        .where(series.c.study_id == study_id, statement.c.instances > 0)
        .order_by(series.c.id, statement.c.first_ordinal, statement.c.first_sop_uid)
    )
    statements: dict[tuple[int, str], list[Attributes]] = defaultdict(list)
    for series_id, series_uid, attributes in rows:
        statements[series_id, series_uid].append(orjson.loads(attributes))
    ordered: list[tuple[int, str, list[Attributes]]] = []
    modalities: list[str] = []
    for (series_id, series_uid), said in statements.items():
        attributes = _first_values(said, places.series)
        row = _series_row(attributes)
        if series_id in series_ids:
            connection.execute(update(series).where(series.c.id == series_id).values(**row))
        ordered.append((row["ordinal"], series_uid, said))
        modalities += _strings(attributes, _MODALITY)
    ordered.sort(key=lambda one: one[:2])
    in_order = [attributes for _, _, said in ordered for attributes in said]
    classes = [uid for attributes in in_order for uid in _strings(attributes, SOP_CLASS_UID)]
    row = _study_row(_first_values(in_order, places.study), modalities, classes)
    connection.execute(update(study).where(study.c.id == study_id).values(**row))


_SERIES_OF_STUDY = series.c.study_id == study.c.id
# Nothing of it is held, no document stands, and nothing of it is leaving.
_IS_OVER = and_(study.c.variants == 0, ~_IS_DUE, ~exists().where(_SERIES_OF_STUDY))


def _count_studies(
    connection: Connection, gains: Mapping[int, Sequence[int]], changed: set[int]
) -> dict[str, int]:
    """Bring the counts of studies up to date; returns the changes of those *changed*, by UID."""
    rows = [
        {
            "b_id": study_id,
            "b_variants": gains.get(study_id, (0, 0))[0],
            "b_bytes": gains.get(study_id, (0, 0))[1],
            "b_changes": int(study_id in changed),
        }
        for study_id in gains.keys() | changed
    ]
    if rows:
        connection.execute(_COUNT_STUDY, rows)
    return _changes_of(connection, changed)


_COUNT_STUDY = (
    update(study)
    .where(study.c.id == bindparam("b_id"))
    .values(
        variants=study.c.variants + bindparam("b_variants"),
        bytes=study.c.bytes + bindparam("b_bytes"),
        changes=study.c.changes + bindparam("b_changes"),
        instances=select(func.coalesce(func.sum(series.c.instances), 0))
        .where(_SERIES_OF_STUDY)
        .scalar_subquery(),
        series=select(func.count()).where(_SERIES_OF_STUDY, series.c.instances > 0).scalar_subquery(),
    )
)


def _sweep(connection: Connection, series_ids: set[int], study_ids: set[int]) -> None:
    """Take away what no variant needs any more; a study stays until its documents are withdrawn."""
    for series_id in series_ids:
        used = select(instance.c.statement_id).where(instance.c.series_id == series_id)
        connection.execute(
            delete(statement).where(statement.c.series_id == series_id, statement.c.id.not_in(used))
        )
        connection.execute(
            delete(series).where(series.c.id == series_id, ~exists().where(instance.c.series_id == series_id))
        )
    for chunk in _chunks(study_ids):
        _end_studies(connection, study.c.id.in_(chunk))


def _end_studies(connection: Connection, condition: _Condition) -> None:
    """Take away the studies of which nothing is left.

    Should one come again, its changes are counted on from there: a publish of what it was, which somebody
    may still have in hand, must not pass for one of what it is.
    """
    over = and_(condition, _IS_OVER)
    last = connection.execute(select(func.max(study.c.changes)).where(over)).scalar()
    if last is not None:
        connection.execute(delete(study).where(over))
        _put(connection, setting, {"name": "changes"}, {"value": str(max(last, _changes_before(connection)))})


def _changes_before(connection: Connection) -> int:
    """The most that changes of a study that is gone were counted to."""
    return int(connection.execute(select(setting.c.value).where(setting.c.name == "changes")).scalar() or 0)


# ── searching ────────────────────────────────────────────────────────────────────────────────────

_STUDY_ORDER = (study.c.recency, study.c.study_uid)
_SERIES_ORDER = (series.c.ordinal, series.c.series_uid)
_INSTANCE_ORDER = (instance.c.ordinal, instance.c.sop_uid)
_OTHER = study.alias("other")  # of the same patient
_OF_SAME_PATIENT = and_(_OTHER.c.patient_key == study.c.patient_key, _OTHER.c.instances > 0)
_IS_PATIENTS_NEWEST = ~exists().where(
    _OF_SAME_PATIENT,
    tuple_(_OTHER.c.recency, _OTHER.c.study_uid) < tuple_(study.c.recency, study.c.study_uid),
)
_PATIENT_COUNTS: dict[int, ColumnElement[Any]] = {
    tag: select(total).where(_OF_SAME_PATIENT).scalar_subquery().label(f"patient_{name}")
    for tag, name, total in (
        (matching.PATIENT_RELATED_STUDIES, "studies", func.count()),
        (matching.PATIENT_RELATED_SERIES, "series", func.sum(_OTHER.c.series)),
        (matching.PATIENT_RELATED_INSTANCES, "instances", func.sum(_OTHER.c.instances)),
    )
}
_COUNTS: dict[int, ColumnElement[Any]] = {
    matching.STUDY_RELATED_SERIES: study.c.series,
    matching.STUDY_RELATED_INSTANCES: study.c.instances,
    matching.SERIES_RELATED_INSTANCES: series.c.instances,
} | _PATIENT_COUNTS
_UIDS: dict[int, Column[Any]] = _UID_COLUMNS | {
    _AVAILABLE_TRANSFER_SYNTAX_UID: instance.c.transfer_syntax_uid
}
_FROM: dict[Level, Any] = {
    Level.PATIENT: study,
    Level.STUDY: study,
    Level.SERIES: series.join(study),
    Level.IMAGE: instance.join(series).join(study),
}
_URLS: dict[Level, tuple[Column[Any], ...]] = {
    Level.STUDY: (study.c.study_uid,),
    Level.SERIES: (study.c.study_uid, series.c.series_uid),
    Level.IMAGE: (study.c.study_uid, series.c.series_uid, instance.c.sop_uid),
}
_IS_PUBLISHED: dict[Level, _Condition] = {
    Level.PATIENT: and_(study.c.instances > 0, _IS_PATIENTS_NEWEST),
    Level.STUDY: study.c.instances > 0,
    Level.SERIES: series.c.instances > 0,
    Level.IMAGE: instance.c.published.is_(true()),
}


class _Search:
    """One query: the statement that reads a page of candidates, and what becomes of each row."""

    def __init__(self, query: Query, retrieve_url: str, places: _Places) -> None:
        self._query, self._retrieve_url = query, retrieve_url
        supported = places.model.supported(query.level)
        if query.returns is None:
            returns = supported - (_PATIENT_COUNTS.keys() if query.level is not Level.PATIENT else set())
        else:
            returns = supported & query.returns
        self._needed = returns | {key.tag for key in query.keys}
        self._returned = [(_hex(tag), public_vr(tag), tag in query.always) for tag in sorted(returns)]
        self._matches = matching.matcher(query)
        self.is_exact = all(_uid_condition(key) is not None for key in query.keys)  # every candidate matches
        self._order = self._ordering()
        self._blobs = [column for column, tags in places.blobs if tags & self._needed]
        self._elements = [
            (_hex(tag), public_vr(tag), column)
            for tag, column in (_UIDS | _COUNTS).items()
            if tag in self._needed and tag in supported
        ]
        self._url = _URLS.get(query.level) if matching.RETRIEVE_URL in self._needed else None
        self._select = self._candidates()

    def page(self, after: _Row | None, size: int) -> Select[Any]:
        """The next *size* candidates behind the row *after*."""
        page = self._select.limit(size)
        if after is None:
            return page
        last = [after._mapping[column] for column in self._order]  # noqa: SLF001 - SQLAlchemy's public name
        if len(self._order) > 1 and self._order[0] is study.c.recency:
            page = page.where(study.c.recency >= last[0])  # what an index can seek, in a join too
        return page.where(tuple_(*self._order) > tuple_(*last))

    def match(self, row: _Row) -> dict[str, Any] | None:
        """The object of *row* as it is returned, or None if it does not match."""
        found: Attributes = {}
        values = row._mapping  # noqa: SLF001 - SQLAlchemy's public name
        for blob in self._blobs:
            found.update(orjson.loads(values[blob]))
        for tag, vr, column in self._elements:
            found[tag] = {"vr": vr, "Value": [values[column]]}
        if self._query.level is not Level.PATIENT:
            found[_hex(matching.INSTANCE_AVAILABILITY)] = {"vr": "CS", "Value": ["ONLINE"]}
        if self._url:
            uids = (values[column] for column in self._url)
            found[_hex(matching.RETRIEVE_URL)] = {"vr": "UR", "Value": [self._url_of(*uids)]}
        if not self._matches(found):
            return None
        return {
            tag: found.get(tag, {"vr": vr}) for tag, vr, always in self._returned if always or tag in found
        }

    def _url_of(self, study_uid: str, series_uid: str = "", sop_uid: str = "") -> str:
        if sop_uid:
            return layout.instance_url(self._retrieve_url, InstanceKey(study_uid, series_uid, sop_uid))
        if series_uid:
            return layout.series_url(self._retrieve_url, study_uid, series_uid)
        return layout.study_url(self._retrieve_url, study_uid)

    def _candidates(self) -> Select[Any]:
        """All candidates in order; what is not told in full by columns is among them."""
        level, keys = self._query.level, self._query.keys
        told: dict[Table, list[_Condition]] = defaultdict(list)
        conditions = [_IS_PUBLISHED[level]]
        for key in keys:
            if (condition := _uid_condition(key)) is not None:
                conditions.append(condition)
            elif not self._query.matches_unknown and (narrowed := _narrowed(key)) is not None:
                table, condition = narrowed
                told[table].append(condition)
        conditions += [
            or_(table.c.irregular.is_(true()), and_(*of_table)) for table, of_table in told.items()
        ]
        columns = dict.fromkeys(
            [*self._order, *(self._url or ()), *(column for *_, column in self._elements), *self._blobs]
        )
        return select(*columns).select_from(_FROM[level]).where(*conditions).order_by(*self._order)

    def _ordering(self) -> list[Column[Any]]:
        """The columns that order the rows, without those that a unique key fixes."""
        fixed = {key.tag for key in self._query.keys if isinstance(key.match, Single)}
        order = (
            [] if STUDY_UID in fixed and self._query.level in (Level.SERIES, Level.IMAGE) else [*_STUDY_ORDER]
        )
        if self._query.level is Level.SERIES:
            order += _SERIES_ORDER
        elif self._query.level is Level.IMAGE:
            order += [] if SERIES_UID in fixed and not order else _SERIES_ORDER
            order += _INSTANCE_ORDER
        return order
