"""Tables: what the index keeps, and what a row says of the attributes it was derived from.

    study ──< series ──< statement ──< instance
      └── study_object    study_modality    study_name

`study` is narrow: of what questions name most it has the values, in the form in which they are equal.  Its
DICOM JSON stands apart, in `study_object`, so that whoever looks for studies does not read it.
`study_modality` has a row for each modality of a study, and one without any if it has none; `study_name` has
one for each group, part and sound of its patient's name.  Both give the studies of a value in the order of
studies, and the irregular ones apart, without a look at `study`.  Only what is *listed* is there: studies of
which an instance is published.

Of an attribute with several values, or with one that is none, a column cannot tell in full: its bit is set
in the row's `irregular`, and only a matcher that sees the DICOM JSON can decide by it.  The column of an
attribute that is not irregular is null if and only if it has no value.

Names of persons stand between equals signs, one for each group, and modalities between backslashes: so what
is asked for is found inside, whole or from its beginning.  Text is compared byte by byte.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import orjson
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    UniqueConstraint,
    true,
)
from sqlalchemy import (
    Index as TableIndex,
)
from sqlalchemy import (
    Text as AnyText,
)

from dicomscp.dicom import matching
from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.matching import SERIES_UID, SOP_CLASS_UID, SOP_UID, STUDY_UID, Model, normal
from dicomscp.dicom.names import name_parts, sound

Attributes: TypeAlias = dict[str, dict[str, Any]]
"""A DICOM JSON object."""

Condition: TypeAlias = ColumnElement[bool]

NO_NUMBER = (1 << 63) - 1
"""The ordinal of what has no number: it stands last."""

metadata = MetaData()
"""The tables.  Foreign keys say how they join; no database is asked to check them."""

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
    Column("listed", Boolean, nullable=False, default=False),  # an instance of it is published
    Column("irregular", Integer, nullable=False, default=0),
    Column("recency", BigInteger, nullable=False, default=0),  # -YYYYMMDDHHMMSS: the newest stand first
    Column("patient_key", Text, nullable=False, default=""),
    Column("patient_id", Text),
    Column("patient_name", Text),
    Column("patient_birth_date", Text),
    Column("accession_number", Text),
    Column("study_time", Text),
    Column("study_id", Text),
    Column("study_description", Text),
    Column("referring_physician_name", Text),
    Column("modalities", Text, nullable=False, default=""),
)
IS_LISTED = study.c.listed.is_(true())
IS_DUE = study.c.changes != study.c.published


def _study_index(
    name: str,
    *columns: Column[Any],
    where: Condition = IS_LISTED,
    unique: bool = False,
    include: Sequence[str] = (),
) -> None:
    TableIndex(
        name,
        *columns,
        unique=unique,
        sqlite_where=where,
        postgresql_where=where,
        postgresql_include=include,
    )


# Whoever walks all studies does not read the table: neither to skip some, nor for what matching needs.
_WALKED = ["id"]  # which every index of SQLite has
_study_index(
    "study_order",
    study.c.recency,
    study.c.study_uid,
    study.c.listed,
    study.c.irregular,
    unique=True,
    include=_WALKED,
)
_study_index(
    "study_scan",
    study.c.recency,
    study.c.study_uid,
    study.c.listed,  # or SQLite reads the table for it, here as in `study_order`
    study.c.irregular,
    study.c.modalities,
    study.c.patient_name,
    study.c.patient_id,
    study.c.accession_number,
    study.c.study_description,
    study.c.study_time,
    study.c.patient_birth_date,
    study.c.study_id,
    study.c.referring_physician_name,
    include=_WALKED,
)
IS_IRREGULAR = study.c.irregular != 0
_study_index(
    "study_irregular", study.c.recency, study.c.study_uid, study.c.irregular, where=IS_IRREGULAR & IS_LISTED
)
_study_index("study_patient_id", study.c.patient_id, study.c.recency, study.c.study_uid)
_study_index("study_accession_number", study.c.accession_number, study.c.recency, study.c.study_uid)
_study_index("study_patient_key", study.c.patient_key, study.c.recency, study.c.study_uid)
_study_index("study_due", study.c.study_uid, where=IS_DUE)

study_object = Table(
    "study_object",
    metadata,
    Column("study_id", ForeignKey("study.id"), primary_key=True, autoincrement=False),
    Column("attributes", LargeBinary, nullable=False),
)

study_modality = Table(
    "study_modality",
    metadata,
    Column("modality", Text, primary_key=True),  # "" of a study that has none
    Column("recency", BigInteger, primary_key=True, autoincrement=False),
    Column("study_uid", Text, primary_key=True),
    Column("study_id", ForeignKey("study.id"), nullable=False),
    Column("irregular", Integer, nullable=False),
    sqlite_with_rowid=False,
)

study_name = Table(
    "study_name",
    metadata,
    Column("kind", SmallInteger, primary_key=True, autoincrement=False),
    Column("value", Text, primary_key=True),
    Column("recency", BigInteger, primary_key=True, autoincrement=False),
    Column("study_uid", Text, primary_key=True),
    Column("study_id", ForeignKey("study.id"), nullable=False),
    Column("irregular", Integer, nullable=False),
    sqlite_with_rowid=False,
)
NAMELESS, GROUP, PART, SOUND = range(4)
"""Kinds of `study_name`: no name at all; a group of the name, a part of a group, what a part sounds like."""

series = Table(
    "series",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("study_id", ForeignKey("study.id"), nullable=False),
    Column("series_uid", Text, nullable=False),
    Column("instances", Integer, nullable=False, default=0),
    Column("ordinal", BigInteger, nullable=False, default=NO_NUMBER),
    Column("irregular", Integer, nullable=False, default=0),
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
    Column("irregular", Integer, nullable=False),
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
for one in (series, instance):  # mostly there are none, and whoever pages far wants to know
    is_irregular = one.c.irregular != 0
    TableIndex(
        f"{one.name}_irregular", one.c.irregular, sqlite_where=is_irregular, postgresql_where=is_irregular
    )
IS_LEAVING = instance.c.leaving.is_not(None)
TableIndex("instance_leaving", instance.c.leaving, sqlite_where=IS_LEAVING, postgresql_where=IS_LEAVING)

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
IS_WITHDRAWN = publication.c.revision == ""
TableIndex(
    "publication_withdrawn",
    publication.c.number,
    sqlite_where=IS_WITHDRAWN,
    postgresql_where=IS_WITHDRAWN,
)

# ── which attribute stands where ─────────────────────────────────────────────────────────────────

LONGEST_BYTES = 200
"""Of a text in a column, or it is irregular: PostgreSQL takes 2,700 bytes into a row of an index."""

STUDY_DATE, STUDY_TIME, PATIENT_NAME, ACCESSION_NUMBER = 0x00080020, 0x00080030, 0x00100010, 0x00080050
MODALITY, SERIES_NUMBER, INSTANCE_NUMBER = 0x00080060, 0x00200011, 0x00200013
AVAILABLE_TRANSFER_SYNTAX_UID = 0x00083002
_ISSUER_OF_PATIENT_ID = 0x00100021

UIDS: dict[int, Column[Any]] = {
    STUDY_UID: study.c.study_uid,
    SERIES_UID: series.c.series_uid,
    SOP_UID: instance.c.sop_uid,
    SOP_CLASS_UID: instance.c.sop_class_uid,
}
"""Columns that always tell all there is to tell."""

_STUDY_TEXTS: dict[int, Column[Any]] = {
    matching.PATIENT_ID: study.c.patient_id,
    PATIENT_NAME: study.c.patient_name,
    0x00100030: study.c.patient_birth_date,
    ACCESSION_NUMBER: study.c.accession_number,
    STUDY_TIME: study.c.study_time,
    0x00200010: study.c.study_id,
    0x00081030: study.c.study_description,
    0x00080090: study.c.referring_physician_name,
}
_SERIES_TEXTS: dict[int, Column[Any]] = {
    MODALITY: series.c.modality,
    0x0008103E: series.c.series_description,
    0x00400244: series.c.performed_procedure_step_start_date,
}
TEXTS = _STUDY_TEXTS | _SERIES_TEXTS
"""Columns of text, as `normal` gives it; names between equals signs."""

ORDINALS: dict[int, Column[Any]] = {SERIES_NUMBER: series.c.ordinal, INSTANCE_NUMBER: instance.c.ordinal}
"""Columns of whole numbers, `NO_NUMBER` for none."""

# Kept in databases: to be added to at the ends alone.
_STUDY_BITS = (*_STUDY_TEXTS, STUDY_DATE, matching.MODALITIES_IN_STUDY)
_SERIES_BITS = (*_SERIES_TEXTS, SERIES_NUMBER)
BITS = {tag: 1 << n for tags in (_STUDY_BITS, _SERIES_BITS, (INSTANCE_NUMBER,)) for n, tag in enumerate(tags)}
"""The bit of each attribute in `irregular` of its table."""


class Places:
    """Where in the tables the attributes of a *model* lie."""

    def __init__(self, model: Model) -> None:
        self.model = model
        said = model.study_tags | model.series_tags
        self.statement = tuple(sorted((said | {SOP_CLASS_UID}) - {STUDY_UID, SERIES_UID}))
        """What an instance says of its study and series."""
        self.instance = tuple(
            sorted(model.instance_tags - {SOP_UID, SOP_CLASS_UID, AVAILABLE_TRANSFER_SYNTAX_UID})
        )
        """What an instance says of itself alone, but for what has a column of its own."""
        self.study = tuple(hexadecimal(tag) for tag in sorted(model.study_tags - {STUDY_UID}))
        self.series = tuple(hexadecimal(tag) for tag in sorted(model.series_tags - {SERIES_UID}))
        in_study = {matching.MODALITIES_IN_STUDY, matching.SOP_CLASSES_IN_STUDY}
        self.objects: tuple[tuple[Column[Any], frozenset[int]], ...] = (
            (study_object.c.attributes, model.study_tags - {STUDY_UID} | in_study),
            (series.c.attributes, model.series_tags - {SERIES_UID}),
            (instance.c.attributes, frozenset(self.instance)),
        )
        """Columns of DICOM JSON, and the attributes that may be in each."""


def hexadecimal(tag: int) -> str:
    """The tag as DICOM JSON names it."""
    return f"{tag:08X}"


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def series_attributes(statements: Iterable[Attributes], places: Places) -> Attributes:
    """A series' own attributes, from what its instances say, in published order."""
    return _first_values(statements, places.series)


def series_row(attributes: Attributes) -> dict[str, Any]:
    """The columns of a series, but for counts."""
    row = _columns(attributes, _SERIES_TEXTS)
    row["ordinal"], is_irregular = _ordinal(attributes, SERIES_NUMBER)
    row["irregular"] |= BITS[SERIES_NUMBER] * is_irregular
    return row | {"attributes": orjson.dumps(attributes)}


def study_row(
    statements: Iterable[Attributes], modalities: Iterable[str], classes: Iterable[str], places: Places
) -> tuple[dict[str, Any], bytes]:
    """The columns of a study, but for counts, and its object; *statements* are in published order."""
    attributes = _first_values(statements, places.study)
    row = _columns(attributes, _STUDY_TEXTS)
    in_study, of_classes = sorted(set(modalities)), sorted(set(classes))
    computed = {
        hexadecimal(matching.MODALITIES_IN_STUDY): _element("CS", in_study),
        hexadecimal(matching.SOP_CLASSES_IN_STUDY): _element("UI", of_classes),
    }
    date, is_irregular = _text(attributes, STUDY_DATE)
    row["irregular"] |= BITS[STUDY_DATE] * is_irregular
    between_backslashes = "".join(f"\\{modality.strip(' ')}" for modality in in_study) + "\\"
    fits = _fits(between_backslashes)
    row["irregular"] |= BITS[matching.MODALITIES_IN_STUDY] * (not fits)
    derived = {
        "recency": _recency(date, row["study_time"]),
        "patient_key": _patient_key(attributes),
        "modalities": between_backslashes if fits else "\\",
    }
    return row | derived, orjson.dumps(attributes | computed)


def modality_rows(row: Mapping[str, Any], study_id: int, study_uid: str) -> list[dict[str, Any]]:
    """The rows of `study_modality` for a *row* of `study`."""
    modalities = dict.fromkeys(row["modalities"].strip("\\").split("\\"))
    return [{"modality": modality, **_placed(row, study_id, study_uid)} for modality in modalities]


def name_rows(row: Mapping[str, Any], study_id: int, study_uid: str) -> list[dict[str, Any]]:
    """The rows of `study_name` for a *row* of `study`."""
    pairs = _names(row["patient_name"])
    placed = _placed(row, study_id, study_uid)
    return [{"kind": kind, "value": value, **placed} for kind, value in pairs]


def _placed(row: Mapping[str, Any], study_id: int, study_uid: str) -> dict[str, Any]:
    """Where a study stands, and whether it is regular."""
    kept = {name: row[name] for name in ("recency", "irregular")}
    return {**kept, "study_uid": study_uid, "study_id": study_id}


@lru_cache(maxsize=1 << 12)
def _names(between_signs: str | None) -> tuple[tuple[int, str], ...]:
    """Kinds and values of a name as it stands in the column."""
    if between_signs is None:
        return ((NAMELESS, ""),)
    groups = [group for group in between_signs.split("=") if group]
    parts = [part for group in groups for part in name_parts(group)]
    pairs = [(GROUP, group) for group in groups] + [(PART, part) for part in parts]
    return tuple(dict.fromkeys(pairs + [(SOUND, sound(part)) for part in parts]))


def strings(attributes: Attributes, tag: int) -> list[str]:
    """The values of an attribute that are text."""
    return [
        value for value in attributes.get(hexadecimal(tag), {}).get("Value", ()) if isinstance(value, str)
    ]


@lru_cache(maxsize=1 << 16)
def instance_number(fragment: bytes) -> tuple[int, int]:
    """An instance's ordinal and what of it is irregular, from the fragment of its number."""
    ordinal, is_irregular = _ordinal(orjson.loads(b"{" + fragment + b"}"), INSTANCE_NUMBER)
    return ordinal, BITS[INSTANCE_NUMBER] * is_irregular


def _columns(attributes: Attributes, columns: Mapping[int, Column[Any]]) -> dict[str, Any]:
    """The columns' values by name, and which of them do not tell all."""
    row: dict[str, Any] = {"irregular": 0}
    for tag, column in columns.items():
        row[column.name], is_irregular = _text(attributes, tag)
        row["irregular"] |= BITS[tag] * is_irregular
    return row


def _text(attributes: Attributes, tag: int) -> tuple[str | None, bool]:
    """The first value of an attribute as a column has it, and whether that does not tell all."""
    value, is_irregular = _first_value(attributes, tag)
    return (value, is_irregular) if value is None or _fits(value) else (None, True)


def _fits(text: str) -> bool:
    """Whether a column can take it: no database of ours holds a NUL otherwise than another does."""
    return len(text.encode()) <= LONGEST_BYTES and "\0" not in text


def _first_value(attributes: Attributes, tag: int) -> tuple[str | None, bool]:
    """The same, whether a column can take it or not."""
    values = [value for value in attributes.get(hexadecimal(tag), {}).get("Value", ()) if value is not None]
    if not values:
        return None, False
    vr = public_vr(tag)
    value = normal(vr, values[0])
    if not isinstance(value, str) or not value:
        return None, True
    return (f"={value}=" if vr == "PN" else value), len(values) > 1


def _ordinal(attributes: Attributes, tag: int) -> tuple[int, bool]:
    """As `_text`, of a whole number."""
    values = attributes.get(hexadecimal(tag), {}).get("Value", ())
    try:
        number = int(values[0])
    except (IndexError, TypeError, ValueError):
        return NO_NUMBER, bool(values)
    if not -NO_NUMBER <= number < NO_NUMBER:
        return NO_NUMBER, True
    return number, len(values) > 1 or normal("IS", values[0]) != number


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


def _recency(date: str | None, time: str | None) -> int:
    return -int(date + (time or "000000")[:6]) if date else 0


def _patient_key(attributes: Attributes) -> str:
    """What tells patients apart: the ID and its issuer; where there is no ID, name and birth date."""
    patient_id, issuer, name, birth_date = (
        _first_value(attributes, tag)[0] or ""
        for tag in (matching.PATIENT_ID, _ISSUER_OF_PATIENT_ID, PATIENT_NAME, 0x00100030)
    )
    key = f"{patient_id}\\{issuer}" if patient_id else f"\\\\{name}\\{birth_date}"
    is_long = len(key.encode()) > 5 * LONGEST_BYTES
    return hashlib.sha256(key.encode()).hexdigest() if is_long else key


def _element(vr: str, values: Sequence[object]) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)} if values else {"vr": vr}


UNLISTED: dict[str, Any] = {
    "listed": False,
    "irregular": 0,
    "recency": 0,
    "patient_key": "",
    "modalities": "",
    **{column.name: None for column in _STUDY_TEXTS.values()},
}
"""The columns of a study of which nothing is published."""
