"""Search: finds in the tables what a query asks for, in order, and no more of it than is wanted.

    keys ─▶ what columns tell ─▶ ways in ─▶ regular rows in order ┐
                                  irregular rows in order ────────┴─▶ objects

Columns tell of a key a condition that each regular row meets that matches; and often that each that meets it
matches.  If that holds for all keys, a regular row is a match without anybody reading its object: an offset
skips it where it lies, a count counts it there.  Irregular rows are always decided by `matching.matcher`, and
so is every row if a key is not told.  A kind of match that is not known here narrows nothing.

A patient's ID, an accession number, one modality and one name, or the sound of one, give their studies in
order, by indexes of their own.  Other *ways in*, by how a name begins, by modalities or a date among other
keys, are lookups, each counted to a thousand studies: what gives the fewest is the way.  If all give more,
studies are walked in order, for matches are dense enough.
Nothing here relies on statistics that a database gathers.

Studies and patients are two streams, of regular and of irregular rows, merged.  Below them irregular rows
stand among the others: questions there name their study, or are walks.  A walk goes on behind its last row by
what an index can seek, level by level, so a page costs what it has, however large the study that it is in.
"""

import functools
import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date, timedelta
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias, TypeVar

import orjson
from sqlalchemy import (
    Column,
    ColumnElement,
    FromClause,
    Select,
    Table,
    and_,
    exists,
    false,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import Integer

from dicomscp.archive.tables import (
    ACCESSION_NUMBER,
    AVAILABLE_TRANSFER_SYNTAX_UID,
    BITS,
    GROUP,
    IS_IRREGULAR,
    IS_LISTED,
    MODALITY,
    NAMELESS,
    NO_NUMBER,
    ORDINALS,
    PART,
    PATIENT_NAME,
    SOUND,
    STUDY_DATE,
    TEXTS,
    UIDS,
    Attributes,
    Condition,
    Places,
    hexadecimal,
    instance,
    series,
    study,
    study_modality,
    study_name,
    study_object,
)
from dicomscp.dicom import matching
from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.matching import (
    MOST_EMPTY,
    PATIENT_ID,
    SERIES_UID,
    SOP_UID,
    STUDY_UID,
    Adjusted,
    AllOf,
    AnyOf,
    Empty,
    Fuzzy,
    Key,
    Level,
    Match,
    Moments,
    Query,
    Range,
    Single,
    UIDList,
    Wildcard,
    normal,
)
from dicomscp.dicom.names import fold, name_parts, sound
from dicomscp.study import layout

Row: TypeAlias = Any  # SQLAlchemy 2.0 and 2.1 type theirs differently
Read: TypeAlias = Callable[[Select[Any]], Sequence[Row]]
"""Reads all that a statement gives, as of one moment."""

_VERY_FEW = 50  # studies, which another way in would not narrow for what it costs
_MOST_UIDS = 5000  # in one statement; of more, none is narrowed by
_MOST_VALUES = 1000  # the same of other values that are equal
_MOST_ALTERNATIVES = 50  # of which each is a condition: a database nests them only so deep
_MOST_RUNS = 8  # of a pattern, that it is narrowed by


class _Bounds(NamedTuple):
    few: int
    page: int


class Search:
    """One query of what lies at *places*; *retrieve_url* begins every RetrieveURL.

    So many studies are *few*, that is looked up by their ids; of so many rows is a *page*.
    """

    def __init__(
        self, query: Query, retrieve_url: str, places: Places, *, few: int = 1000, page: int = 500
    ) -> None:
        self._query, self._bounds, self._places = query, _Bounds(few, page), places
        kind = _Below if query.level in (Level.SERIES, Level.IMAGE) else _Studies
        self._candidates = kind(query, _Answers(query, retrieve_url, places), self._bounds)

    def find(self, read: Read) -> Iterator[Attributes]:
        """What matches, in order, within the query's offset and limit; rows are read in pages."""
        if self._query.limit == 0:
            return iter(())
        return islice(self._candidates.find(read, self._query.offset, self._query.limit), self._query.limit)

    def count(self, read: Read, bound: int) -> int:
        """How many match, whatever the offset and limit; *bound* if they are that many or more."""
        counted = self._candidates.count(read, bound)
        if counted is not None:
            return counted
        bare = replace(self._query, limit=bound, offset=0, returns=frozenset(), always=frozenset())
        return sum(1 for _ in Search(bare, "", self._places, **self._bounds._asdict()).find(read))


# ── what is returned ─────────────────────────────────────────────────────────────────────────────

_OTHER = study.alias("other")  # of the same patient
_OF_SAME_PATIENT = and_(_OTHER.c.patient_key == study.c.patient_key, _OTHER.c.listed.is_(true()))
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
_ELEMENTS: dict[int, ColumnElement[Any]] = {
    **UIDS,
    AVAILABLE_TRANSFER_SYNTAX_UID: instance.c.transfer_syntax_uid,
    matching.STUDY_RELATED_SERIES: study.c.series,
    matching.STUDY_RELATED_INSTANCES: study.c.instances,
    matching.SERIES_RELATED_INSTANCES: series.c.instances,
    **_PATIENT_COUNTS,
}
_URLS: dict[Level, tuple[Column[Any], ...]] = {
    Level.STUDY: (study.c.study_uid,),
    Level.SERIES: (study.c.study_uid, series.c.series_uid),
    Level.IMAGE: (study.c.study_uid, series.c.series_uid, instance.c.sop_uid),
}


class _Answers:
    """What becomes of a row: whether its object matches, and what of it is returned."""

    def __init__(self, query: Query, retrieve_url: str, places: Places) -> None:
        self._retrieve_url = retrieve_url
        self._has_availability = query.level is not Level.PATIENT
        supported = places.model.supported(query.level)
        if query.returns is None:
            returns = supported - (_PATIENT_COUNTS.keys() if self._has_availability else set())
        else:
            returns = supported & query.returns
        needed = returns | {key.tag for key in query.keys}
        self._returned = [(hexadecimal(tag), public_vr(tag), tag in query.always) for tag in sorted(returns)]
        self._query = query
        self._objects = [column for column, tags in places.objects if tags & needed]
        self._elements = [
            (hexadecimal(tag), public_vr(tag), column)
            for tag, column in _ELEMENTS.items()
            if tag in needed and tag in supported
        ]
        self._url = _URLS.get(query.level, ()) if matching.RETRIEVE_URL in needed else ()
        self.reads_study_object = study_object.c.attributes in self._objects

        self.columns: list[ColumnElement[Any]] = []
        """What must be read of a row; it stands behind all else."""
        elements = [column for _, _, column in self._elements]
        self.columns += dict.fromkeys([*self._url, *elements, *self._objects])
        at = {column: n - len(self.columns) for n, column in enumerate(self.columns)}
        self._at_objects = [at[column] for column in self._objects]
        self._at_elements = [(tag, vr, at[column]) for tag, vr, column in self._elements]
        self._at_url = [at[column] for column in self._url]

    @functools.cached_property
    def _matches(self) -> Callable[[Attributes], bool]:
        return matching.matcher(self._query)

    def answer(self, row: Row, *, decided: bool) -> Attributes | None:
        """The object of *row* as it is returned; None if it does not match, unless that is *decided*."""
        found: Attributes = orjson.loads(row[self._at_objects[0]]) if self._at_objects else {}
        for at in self._at_objects[1:]:
            found.update(orjson.loads(row[at]))
        for tag, vr, at in self._at_elements:
            found[tag] = {"vr": vr, "Value": [row[at]]}
        if self._has_availability:
            found[_AVAILABILITY] = {"vr": "CS", "Value": ["ONLINE"]}
        if self._at_url:
            found[_RETRIEVE_URL] = {"vr": "UR", "Value": [self._url_of(*[row[at] for at in self._at_url])]}
        if not decided and not self._matches(found):
            return None
        return {
            tag: found[tag] if tag in found else {"vr": vr}  # noqa: SIM401 - makes no element in vain
            for tag, vr, always in self._returned
            if always or tag in found
        }

    def _url_of(self, study_uid: str, series_uid: str = "", sop_uid: str = "") -> str:
        if sop_uid:
            return layout.instance_url(self._retrieve_url, InstanceKey(study_uid, series_uid, sop_uid))
        if series_uid:
            return layout.series_url(self._retrieve_url, study_uid, series_uid)
        return layout.study_url(self._retrieve_url, study_uid)


_AVAILABILITY, _RETRIEVE_URL = (
    hexadecimal(tag) for tag in (matching.INSTANCE_AVAILABILITY, matching.RETRIEVE_URL)
)


# ── what columns tell ────────────────────────────────────────────────────────────────────────────


class _Position(GenericFunction[int]):
    """Where text begins in other text, counted from 1; 0 if it is not there."""

    type, name = Integer(), "instr"
    inherit_cache = True


@compiles(_Position, "postgresql")
def _strpos(function: Any, compiler: Any, **options: Any) -> str:
    return f"strpos({compiler.process(function.clauses, **options)})"


def _has(column: Column[Any], text: str) -> Condition:
    return _Position(column, text) > 0


class _Told(NamedTuple):
    """A *condition* that each regular row of *table* meets that matches; if *exact*, only those do."""

    table: Table
    condition: Condition
    exact: bool
    bit: int  # in `irregular` of the rows of which it tells nothing

    @property
    def coarse(self) -> Condition:
        """What irregular rows meet as well."""
        return or_(self.condition, _is_irregular(self.table, self.bit)) if self.bit else self.condition


def _told(key: Key, *, unknown: bool) -> _Told | None:
    """What columns tell of *key*, None if nothing; with *unknown* what has no value matches as well."""
    column = UIDS.get(key.tag)
    if column is not None:
        condition = _uid(column, key.match)
        return None if condition is None else _Told(column.table, condition, exact=True, bit=0)
    told, none = _by_column(key)
    if told is None:
        return None
    condition, exact = told
    table = _table_of(key.tag)
    return _Told(table, or_(condition, none) if unknown else condition, exact, BITS.get(key.tag, 0))


_ByColumn: TypeAlias = "tuple[Condition, bool] | None"  # and whether it is exact


def _by_column(key: Key) -> tuple[_ByColumn, Condition]:
    """What the column says of *key*, and that it has no value."""
    none = _without_value(key.tag)
    if isinstance(key.match, Empty) and none is not None:
        return (none, True), none
    return _with_value(key), false() if none is None else none


def _without_value(tag: int) -> Condition | None:
    if tag == STUDY_DATE:
        return study.c.recency == 0
    if tag == matching.MODALITIES_IN_STUDY:
        return study.c.modalities == "\\"
    if tag in ORDINALS:
        return ORDINALS[tag] == NO_NUMBER
    return TEXTS[tag].is_(None) if tag in TEXTS else None


def _with_value(key: Key) -> _ByColumn:
    if key.tag == STUDY_DATE:
        return _date(key.match)
    if key.tag == matching.MODALITIES_IN_STUDY:
        return _modality(key.match)
    if key.tag in ORDINALS:
        return _number(ORDINALS[key.tag], key.match)
    if key.tag not in TEXTS:
        return None
    if key.vr != "PN" and (told := _one_of(TEXTS[key.tag], key.vr, key.match)):
        return told
    of_vr = _person if key.vr == "PN" else _text
    return _any(lambda match: of_vr(TEXTS[key.tag], key.vr, match), key.match)


def _table_of(tag: int) -> Table:
    column = TEXTS.get(tag, ORDINALS.get(tag))
    return study if column is None else column.table


def _any(tell: Callable[[Match], _ByColumn], match: Match) -> _ByColumn:
    """What *tell* tells of a match, or of one of several."""
    if not isinstance(match, AnyOf):
        return tell(match)
    if len(match.matches) > _MOST_ALTERNATIVES:
        return None
    told = [tell(one) for one in match.matches]
    known = [one for one in told if one is not None]
    if len(known) < len(told):
        return None
    return or_(*(condition for condition, _ in known)), all(exact for _, exact in known)


def _one_of(column: Column[Any], vr: str, match: Match) -> _ByColumn:
    """That the column is one of several values."""
    if not isinstance(match, AnyOf) or len(match.matches) > _MOST_VALUES:
        return None
    values = [normal(vr, one.value) for one in match.matches if isinstance(one, Single)]
    return (column.in_(values), True) if len(values) == len(match.matches) else None


def _uid(column: Column[Any], match: Match) -> Condition | None:
    if isinstance(match, Single):
        return column == match.value
    if isinstance(match, UIDList) and len(match.values) <= _MOST_UIDS:
        return column.in_(match.values)
    return None


def _date(match: Match) -> _ByColumn:
    dates, is_exact = _dates(match)
    told = _any(lambda one: None if (span := _span(one)) is None else (span.of(study.c.recency), True), dates)
    return told and (told[0], is_exact)


def _dates(match: Match) -> tuple[Match, bool]:
    """A match of dates that fits all that *match* fits, and whether it fits nothing else."""
    if isinstance(match, Moments):
        low, high = (None if end is None else f"{end:%Y%m%d}".zfill(8) for end in (match.low, match.high))
        return Range(low, high), False
    if isinstance(match, Adjusted):
        dates, _ = _dates(match.match)
        if isinstance(dates, AnyOf):
            return AnyOf(tuple(_widened(one) for one in dates.matches)), False
        return _widened(dates), False
    return match, True


_Dates = TypeVar("_Dates", bound=Match)
_FAR = timedelta(days=2)  # no two clocks are further apart


def _widened(match: _Dates) -> _Dates | Range:
    """A period that has the dates of *match* in all time zones; what is in no calendar leaves it open."""
    if isinstance(match, Single):
        return Range(_moved(match.value, -_FAR), _moved(match.value, _FAR))
    if isinstance(match, Range):
        return Range(_moved(match.low, -_FAR), _moved(match.high, _FAR))
    return match


def _moved(day: str | None, by: timedelta) -> str | None:
    try:
        return None if day is None else (date.fromisoformat(day) + by).isoformat().replace("-", "")
    except (ValueError, OverflowError):
        return None


class _Span(NamedTuple):
    """A period of dates, as recency counts."""

    low: int | None
    high: int

    def of(self, recency: Column[Any]) -> Condition:
        until = recency <= self.high
        return until if self.low is None else and_(recency >= self.low, until)


def _span(match: Match) -> _Span | None:
    """The recencies of what is from one date to another; None if *match* asks for no period."""
    match, _ = _dates(match)
    if isinstance(match, Single):
        date = normal("DA", match.value)
        match = Range(date, date) if isinstance(date, str) else match
    if not isinstance(match, Range):
        return None
    low = None if match.high is None else -int(match.high) * 10**6 - 999_999
    return _Span(low, -1 if match.low is None else -int(match.low) * 10**6)


def _modality(match: Match) -> _ByColumn:
    """That the study has one of the modalities, or all; a series that has one is in such a study."""
    values = _singles(match)
    if values is None or len(values) > _MOST_ALTERNATIVES:
        return None
    told = (_has(study.c.modalities, f"\\{value}\\") for value in values)
    return and_(*told) if isinstance(match, AllOf) else or_(*told), True


def _modalities(key: Key) -> list[str] | None:
    """The modalities of which one is asked for, in a study or in a series."""
    if isinstance(key.match, AllOf) or key.tag not in (matching.MODALITIES_IN_STUDY, MODALITY):
        return None
    return _singles(key.match)


def _singles(match: Match) -> list[str] | None:
    """The values that are asked for, without spaces around them; None unless all are single."""
    matches = match.matches if isinstance(match, AnyOf | AllOf) else (match,)
    values = [one.value.strip(" ") for one in matches if isinstance(one, Single)]
    return values if len(values) == len(matches) and not any("\\" in value for value in values) else None


def _number(column: Column[Any], match: Match) -> _ByColumn:
    return _any(lambda one: _one_number(column, one) if isinstance(one, Single) else None, match)


def _one_number(column: Column[Any], match: Single) -> _ByColumn:
    number = float(match.value)
    is_whole = number.is_integer() and abs(number) < NO_NUMBER
    return (column == int(number) if is_whole else false()), True


def _text(column: Column[Any], vr: str, match: Match) -> _ByColumn:
    if isinstance(match, Moments):
        told = _text(column, vr, _dates(match)[0])
        return told and (told[0], False)
    if isinstance(match, Range):
        after = column.is_not(None) if match.low is None else column >= match.low
        return (after if match.high is None else and_(after, column <= match.high)), True
    if isinstance(match, Single):
        value = normal(vr, match.value)
        return (column == value, True) if isinstance(value, str) else None
    if not isinstance(match, Wildcard):
        return None
    beginning, *others = _literals(match.pattern, r"[*?]+")
    conditions = [_begins(column, beginning), *(_has(column, run) for run in others[:_MOST_RUNS])]
    return and_(*conditions), _is_simple(match.pattern)


def _literals(pattern: str, separators: str) -> list[str]:
    """What a pattern begins with, and its other runs of characters that stand for themselves."""
    beginning, *others = re.split(separators, pattern)
    return [beginning, *filter(None, others)]


def _is_simple(pattern: str) -> bool:
    """Whether it asks for nothing but how a text begins, or what is in it."""
    return re.fullmatch(r"[^*?]*\*+|\*+[^*?]+\*+", pattern) is not None


def _begins(column: ColumnElement[Any], text: str) -> Condition:
    """That the column's text begins so, as a range: which an index can seek and all databases agree on."""
    if not text:
        return column.is_not(None)
    end = _behind(text)
    return column >= text if end is None else and_(column >= text, column < end)


def _behind(text: str) -> str | None:
    """The first text behind all that begin with *text*; None if there is none."""
    kept = text.rstrip("\U0010ffff")
    if not kept:
        return None
    return kept[:-1] + chr({0xD7FF: 0xE000}.get(ord(kept[-1]), ord(kept[-1]) + 1))


def _person(column: Column[Any], _vr: str, match: Match) -> _ByColumn:
    """Of a column with groups between equals signs."""
    if isinstance(match, Fuzzy):
        # The parts of other people's names are not kept.
        parts, is_exact = _parts(match, _BESIDE) if column is study.c.patient_name else ([], False)
        return and_(column.is_not(None), *map(_has_part, parts)), is_exact
    if isinstance(match, Single):
        groups = _groups(match.value)
        return (
            (and_(*(_has(column, f"={group}=") for group in groups)), "=" not in match.value)
            if groups
            else None
        )
    if not isinstance(match, Wildcard):
        return None
    pattern = _folded_pattern(match.pattern)
    if (beginning := _beginning_of_group(match)) is not None:
        begins = _has(column, f"={beginning}")
        without = beginning.rstrip("^")
        ends = [_has(column, f"={without}=")] if without != beginning and without else []
        return or_(begins, *ends), True
    runs = [run.strip(" ") for run in re.split(r"[*?^=]+", pattern)]
    exact = re.fullmatch(r"\*+[^*?=^]+\*+", pattern) is not None and pattern.strip("*") == runs[1]
    return and_(column.is_not(None), *(_has(column, run) for run in runs[:_MOST_RUNS] if run)), exact


def _beginning_of_group(match: Wildcard) -> str | None:
    """How a group of the name begins, if that is all that is asked for."""
    pattern = _folded_pattern(match.pattern)
    beginning = pattern.rstrip("*")
    if not beginning or beginning == pattern or set(beginning) & set("*?="):
        return None
    return beginning if len(beginning) - len(beginning.rstrip("^")) <= MOST_EMPTY else None


_MOST_PARTS = 4  # of a name that a question narrows by
_BESIDE = study_name.alias("part")  # of a study that is walked by `study_name` itself, it may be


def _parts(match: Fuzzy, among: FromClause = study_name) -> tuple[list[tuple[int, Condition]], bool]:
    """Parts in *among*, by kind and value, that a regular name has if it matches; and whether they suffice.

    A name that matches literally has them as well: parts that are asked for end where parts of it end.
    """
    names = [name_parts(fold(group)) for group in match.value.split("=")]
    wanted = [part for parts in names for part in parts if set(part) != {"*"}]
    whole = sorted((part for part in wanted if not set(part) & set("*?")), key=len, reverse=True)
    begun = [re.split("[*?]", part)[0] for part in wanted if part not in whole]
    found = [(SOUND, among.c.value == sound(part)) for part in whole]
    found += [(PART, _begins(among.c.value, beginning)) for beginning in begun if beginning]
    is_one = len(names) == len(wanted) == len(found) == 1
    return found[:_MOST_PARTS], is_one and wanted[0].rstrip("*") in (*whole, *begun)


def _has_part(part: tuple[int, Condition]) -> Condition:
    kind, value = part
    return exists().where(_BESIDE.c.kind == kind, value, _BESIDE.c.study_id == study.c.id)


def _folded_pattern(pattern: str) -> str:
    """As the matcher folds it: what is empty at an end stays, for it says which groups are asked for."""
    return "=".join(fold(group).strip(" ") for group in pattern.split("="))


def _groups(name: str) -> list[str]:
    return [group for group in str(normal("PN", name) or "").split("=") if group]


# ── ways in ──────────────────────────────────────────────────────────────────────────────────────


class _Way(NamedTuple):
    """A lookup that gives the ids of studies, of all regular ones that match among them.

    A walk of *table* goes by it as well, so it need not be looked up then.  If all that meets a condition in
    `study_name` matches the key of that name, the condition is *sought*.
    """

    ids: Select[Any]
    table: Table | None = None
    sought: Condition | None = None


def _ways(by_tag: dict[int, Key], *, unknown: bool) -> Iterator[_Way]:
    """Ways in, likely few first."""
    for tag in (PATIENT_ID, ACCESSION_NUMBER):
        column = TEXTS[tag]
        if tag not in by_tag:
            continue
        match = by_tag[tag].match
        if told := _one_of(column, "LO", match) or _any(functools.partial(_sought, column), match):
            found = or_(told[0], column.is_(None)) if unknown and not by_tag[tag].is_unique else told[0]
            yield _Way(select(study.c.id).where(IS_LISTED, found))
    if PATIENT_NAME in by_tag and (told := _any(_named, by_tag[PATIENT_NAME].match)):
        found, is_exact = told
        found = or_(found, study_name.c.kind == NAMELESS) if unknown else found
        yield _Way(select(study_name.c.study_id).where(found), study_name, found if is_exact else None)
    yield from _by_modality_and_date(by_tag, unknown=unknown)


def _sought(column: Column[Any], match: Match) -> _ByColumn:
    """A condition that an index seeks."""
    if isinstance(match, Wildcard) and match.pattern[:1] in ("*", "?"):
        return None
    if isinstance(match, Wildcard):
        return _begins(column, re.split("[*?]", match.pattern)[0]), False
    return _text(column, "LO", match) if isinstance(match, Single) else None


def _named(match: Match) -> _ByColumn:
    kind, value = study_name.c.kind == GROUP, study_name.c.value
    if isinstance(match, Single) and (groups := _groups(match.value)):
        return and_(kind, value == groups[0]), "=" not in match.value
    if isinstance(match, Wildcard) and (beginning := _beginning_of_group(match)) is not None:
        without = beginning.rstrip("^")
        return and_(kind, _begins(value, without)), beginning == without
    if isinstance(match, Fuzzy):
        parts, is_exact = _parts(match)
        return (and_(study_name.c.kind == parts[0][0], parts[0][1]), is_exact) if parts else None
    return None


def _by_modality_and_date(by_tag: dict[int, Key], *, unknown: bool) -> Iterator[_Way]:
    # A series that has none may be in a study that has some.
    tags = (matching.MODALITIES_IN_STUDY,) if unknown else (matching.MODALITIES_IN_STUDY, MODALITY)
    of_study = (_modalities(by_tag[tag]) for tag in tags if tag in by_tag)
    modalities = next((values for values in of_study if values is not None), None)
    span = _span(by_tag[STUDY_DATE].match) if STUDY_DATE in by_tag and not unknown else None
    if modalities is not None:
        sought = study_modality.c.modality.in_([*modalities, ""] if unknown else modalities)
        when = [] if span is None else [span.of(study_modality.c.recency)]
        yield _Way(select(study_modality.c.study_id).where(sought, *when), study_modality)
    elif span is not None:
        yield _Way(select(study.c.id).where(IS_LISTED, span.of(study.c.recency)), study)


def _is_sought(key: Key, *, unknown: bool) -> bool:
    """Whether an index gives all that matches *key* in order, and little of it or nothing else."""
    if key.tag in (STUDY_UID, SERIES_UID, SOP_UID):
        return True
    return key.tag in (PATIENT_ID, ACCESSION_NUMBER) and isinstance(key.match, Single) and not unknown


def _fewest(read: Read, most: int, ways: Iterable[_Way]) -> _Way | None:
    """Of *ways* the one that gives the fewest; None if all give more than *most*."""
    fewest, least = None, most + 1
    for way in ways:
        given = read(select(func.count()).select_from(way.ids.limit(least).subquery()))[0][0]
        if given < least:
            fewest, least = way, given
        if least <= _VERY_FEW:
            break
    return fewest


def _ways_of(query: Query) -> Iterator[_Way]:
    return _ways({key.tag: key for key in query.keys}, unknown=_unknown(query))


# ── studies and patients ─────────────────────────────────────────────────────────────────────────

_STUDY_ORDER = (study.c.recency, study.c.study_uid)
_PAGE = "page"  # the studies of one page; its columns are made once, for they cost more than the rest
_PAGE_ORDER: tuple[ColumnElement[Any], ...] = (
    literal_column(f"{_PAGE}.recency"),
    literal_column(f"{_PAGE}.study_uid"),
)
_IS_ON_PAGE = study.c.id == literal_column(f"{_PAGE}.id")


class _Match(NamedTuple):
    """A study or patient that matches, where it stands, and what is returned of it."""

    recency: int
    study_uid: str
    found: Attributes


def _place(match: _Match) -> tuple[int, str]:
    return match.recency, match.study_uid


class _Walk(NamedTuple):
    """What is walked in order if no way in gives few: all studies, or those of one name or modality."""

    table: Table
    sought: list[Condition]  # on `table`, which an index seeks
    beside: list[Condition]  # on `study`


class _Studies:
    """Candidates at the levels of studies and of patients, each of whom the newest study tells of."""

    def __init__(self, query: Query, answers: _Answers, bounds: _Bounds) -> None:
        self._query, self._answers, self._bounds = query, answers, bounds
        told = [(key, _told(key, unknown=_unknown(query, key))) for key in query.keys]
        self._known = [(key, one) for key, one in told if one is not None]
        self._is_exact = len(self._known) == len(told) and all(one.exact for _, one in self._known)
        self._mask = _mask((one for _, one in self._known), study)
        self._always = (_IS_PATIENTS_NEWEST,) if query.level is Level.PATIENT else ()
        self._walk = _walk(self._known, unknown=_unknown(query))
        self._is_sought = any(_is_sought(key, unknown=_unknown(query, key)) for key, _ in self._known)

    def find(self, read: Read, offset: int, limit: int | None) -> Iterator[Attributes]:
        """What matches behind *offset*; *limit* says how much of it may be wanted, no more."""
        irregular = self._irregular(read)
        few = list(islice(irregular, self._bounds.page)) if offset and self._is_exact else []
        if not offset or not self._is_exact or len(few) == self._bounds.page:
            regular = self._regular(read, 0, None if limit is None else offset + limit)
            merged = heapq.merge(regular, chain(few, irregular), key=_place)
            yield from (match.found for match in islice(merged, offset, None))
            return
        # So many regular rows are skipped at least, however many of the irregular ones stand before.
        beyond = max(0, offset - len(few))
        regular = self._regular(read, beyond, None if limit is None else offset + limit - beyond)
        first = next(regular, None)
        if beyond and first is None:
            return
        left = [match for match in few if not beyond or first is None or _place(match) > _place(first)]
        at = beyond + len(few) - len(left)
        merged = heapq.merge(chain([first] if first else [], regular), left, key=_place)
        yield from (match.found for match in islice(merged, offset - at, None))

    def count(self, read: Read, bound: int) -> int | None:
        """How many match, up to *bound*; None if only their objects tell."""
        if not self._is_exact:
            return None
        picked = self._picked(self._way(read)).limit(bound).subquery()
        (regular,) = read(select(func.count()).select_from(picked))[0]
        irregular = sum(1 for _ in islice(self._irregular(read), bound - regular))
        return int(regular) + irregular

    def _regular(self, read: Read, beyond: int, wanted: int | None) -> Iterator[_Match]:
        """Matches among regular rows, without the first *beyond* that meet what is told."""
        way = self._way(read)
        size = self._bounds.page if wanted is None else max(1, min(self._bounds.page, wanted))
        after: Row | None = None
        while True:
            rows = read(self._page(way, after, size, beyond))
            for row in rows:
                found = self._answers.answer(row, decided=self._is_exact)
                if found is not None:
                    yield _Match(row[0], row[1], found)
            if len(rows) < size:
                return
            after, size, beyond = rows[-1], self._bounds.page, 0

    def _irregular(self, read: Read) -> Iterator[_Match]:
        """Matches among the rows of which the keys' columns do not tell all."""
        if not self._mask:
            return
        all_ = _irregular_rows(
            self._mask, tuple(self._answers.columns), self._always, self._answers.reads_study_object
        )
        size, page = _VERY_FEW, all_
        rows = read(page.limit(size))
        if len(rows) == size:
            size, page = self._bounds.page, all_.where(*(one.coarse for _, one in self._known))
            rows = read(page.limit(size))
        while True:
            for row in rows:
                found = self._answers.answer(row, decided=False)
                if found is not None:
                    yield _Match(row[0], row[1], found)
            if len(rows) < size:
                return
            rows = read(page.where(_is_behind(_STUDY_ORDER, rows[-1][:2])).limit(size))

    def _way(self, read: Read) -> _Way | None:
        """What gives all regular rows that match, and few others; None if a walk is as good."""
        if self._is_sought or (self._is_exact and not self._walk.beside):
            return None
        ways = list(_ways_of(self._query))
        if all(way.table is self._walk.table for way in ways):
            return None
        fewest = _fewest(read, self._bounds.few, ways)
        return None if fewest is None or fewest.table is self._walk.table else fewest

    def _page(self, way: _Way | None, after: Row | None, size: int, beyond: int) -> Select[Any]:
        """The next *size* regular rows behind *after*, with what is read of them."""
        page = self._picked(way, after).limit(size).offset(beyond).subquery(_PAGE)
        rows = select(*_PAGE_ORDER, *self._answers.columns).join_from(page, study, _IS_ON_PAGE)
        return self._with_object(rows).order_by(*_PAGE_ORDER)

    def _picked(self, way: _Way | None, after: Row | None = None) -> Select[Any]:
        """Ids of regular rows behind *after* that meet what is told, in order."""
        walk = self._walk if way is None else self._within(way)
        walked = walk.table
        order = (walked.c.recency, walked.c.study_uid)
        if walked is study:
            picked = select(study.c.id, *order).where(IS_LISTED, *walk.sought, *walk.beside)
        else:
            picked = select(walked.c.study_id.label("id"), *order).where(*walk.sought)
            if walk.beside or self._always:
                picked = picked.join(study, study.c.id == walked.c.study_id).where(*walk.beside)
        sorted_by: tuple[Column[Any], ...] = order
        if way is not None and walked is not study:  # two groups of a name may begin alike
            sorted_by = (*order, walked.c.study_id)  # by all of what is grouped, so SQLite sorts but once
            picked = picked.group_by(*sorted_by)
        if self._mask:
            picked = picked.where(_is_regular(walked, self._mask))
        if after is not None:
            picked = picked.where(_is_behind(order, after[:2]))
        return picked.where(*self._always).order_by(*sorted_by)

    def _within(self, way: _Way) -> _Walk:
        if way.sought is None:
            told = [one.condition for _, one in self._known]
            return _Walk(study, [study.c.id.in_(way.ids)], told)
        beside = [one.condition for key, one in self._known if key.tag != PATIENT_NAME]
        return _Walk(study_name, [way.sought], beside)

    def _with_object(self, rows: Select[Any]) -> Select[Any]:
        return rows.join(study_object) if self._answers.reads_study_object else rows


@functools.lru_cache(maxsize=256)
def _irregular_rows(
    mask: int, columns: tuple[ColumnElement[Any], ...], always: tuple[Condition, ...], with_object: bool
) -> Select[Any]:
    """The studies that are irregular by *mask*, in order; made once, for each search looks for them."""
    those = (IS_LISTED, IS_IRREGULAR, _is_irregular(study, mask), *always)
    rows = select(*_STUDY_ORDER, *columns).select_from(study).where(*those)
    return (rows.join(study_object) if with_object else rows).order_by(*_STUDY_ORDER)


def _walk(known: Sequence[tuple[Key, _Told]], *, unknown: bool) -> _Walk:
    by, walk = None, _Walk(study, [], [])
    for key, _ in () if unknown else known:
        if (named := _of_one_name(key)) is not None:
            by, walk = key, _Walk(study_name, [named], [])
            break
        if len(modalities := _modalities(key) or ()) == 1:
            by, walk = key, _Walk(study_modality, [study_modality.c.modality.in_(modalities)], [])
    for key, one in known:
        span = _span(key.match) if key.tag == STUDY_DATE and not unknown else None
        if key is by:
            continue
        if span is not None:
            walk.sought.append(span.of(walk.table.c.recency))
        else:
            walk.beside.append(one.condition)
    return walk


def _of_one_name(key: Key) -> Condition | None:
    """What studies meet that match *key* and no others do, if an index gives them in order."""
    match = key.match
    if key.tag != PATIENT_NAME or not isinstance(match, Single | Fuzzy):
        return None
    told = _named(match)
    is_whole = isinstance(match, Single) or not set("*?") & set(match.value)
    return told[0] if told and told[1] and is_whole else None


# ── series and instances ─────────────────────────────────────────────────────────────────────────


class _Below:
    """Candidates at the levels of series and of instances, whose keys may be of the levels above."""

    def __init__(self, query: Query, answers: _Answers, bounds: _Bounds) -> None:
        self._query, self._answers, self._bounds = query, answers, bounds
        told = [(key, _told(key, unknown=_unknown(query, key))) for key in query.keys]
        self._known = [(key, one) for key, one in told if one is not None]
        self._is_exact = len(self._known) == len(told) and all(one.exact for _, one in self._known)
        tables = (study, series, instance) if query.level is Level.IMAGE else (study, series)
        masks = {table: _mask((one for _, one in self._known), table) for table in tables}
        has_modality = any(key.tag == MODALITY for key, _ in self._known)  # which narrows the studies, too
        self._study_mask = masks[study] | (_IN_STUDY if has_modality else 0)
        self._masks = {table: mask for table, mask in masks.items() if mask}
        self._is_sought = any(_is_sought(key, unknown=_unknown(query, key)) for key, _ in self._known)
        self._fixed = {key.tag for key, _ in self._known if isinstance(key.match, Single)}

    def find(self, read: Read, offset: int, limit: int | None) -> Iterator[Attributes]:
        """What matches behind *offset*; *limit* says how much of it may be wanted, no more."""
        open_ = self._open(read) if self._is_exact else None
        beyond = offset if self._is_exact and open_ is None else 0
        left = offset - beyond
        for row in self._rows(read, beyond, None if limit is None else left + limit, open_):
            decided = self._is_exact and not (open_ is not None and row.open)
            if left and decided:
                left -= 1
                continue
            found = self._answers.answer(row, decided=decided)
            if found is None:
                continue
            if left:
                left -= 1
                continue
            yield found

    def count(self, read: Read, bound: int) -> int | None:
        """How many match, up to *bound*; None if only their objects tell."""
        if not self._is_exact or self._open(read) is not None:
            return None
        picked = self._candidates(read, []).limit(bound).subquery()
        return int(read(select(func.count()).select_from(picked))[0][0])

    def _open(self, read: Read) -> Condition | None:
        """That the columns of a row do not tell all; None if they do of every row."""
        open_ = [
            _is_irregular(table, mask)
            for table, mask in self._masks.items()
            if read(_any_irregular(table, mask))
        ]
        return or_(*open_) if open_ else None

    def _rows(self, read: Read, beyond: int, wanted: int | None, open_: Condition | None) -> Iterator[Row]:
        """Candidates in order, without the first *beyond*, and whether each is *open_*."""
        is_open = [] if open_ is None else [open_.label("open")]
        columns = [*_PLACE[self._query.level], *is_open, *self._answers.columns]
        candidates = self._candidates(read, columns)
        size = self._bounds.page if wanted is None else max(1, min(self._bounds.page, wanted))
        rows = read(candidates.limit(size).offset(beyond))
        yield from rows
        stages = self._behind(rows[-1]) if len(rows) == size else []
        while stages:
            rows = read(candidates.where(stages.pop(0)).limit(self._bounds.page))
            yield from rows
            if len(rows) == self._bounds.page:
                stages = self._behind(rows[-1])

    def _behind(self, last: Row) -> list[Condition]:
        """What stands behind *last*: in its series, then in its study, then in other studies."""
        recency, study_uid, study_id, ordinal, series_uid, series_id, *lower = last
        stages = []
        if self._query.level is Level.IMAGE:
            stages.append(and_(series.c.id == series_id, _is_behind(_INSTANCE_ORDER, lower[:2])))
        if STUDY_UID not in self._fixed or SERIES_UID not in self._fixed:
            stages.append(and_(study.c.id == study_id, _is_behind(_SERIES_ORDER, (ordinal, series_uid))))
        if STUDY_UID not in self._fixed:
            stages.append(_is_behind(_STUDY_ORDER, (recency, study_uid)))
        return stages

    def _candidates(self, read: Read, columns: Sequence[ColumnElement[Any]]) -> Select[Any]:
        """All candidates in order: what is regular and meets what is told, and what is irregular."""
        level = self._query.level
        found = select(*columns) if columns else select(literal(1))
        found = found.select_from(_FROM[level]).where(IS_LISTED, _IS_PUBLISHED[level])
        found = found.where(*(one.coarse for _, one in self._known))
        if (ways := self._ways(read)) is not None:
            found = found.where(or_(*(study.c.id.in_(way.ids) for way in ways)))
        elif not _unknown(self._query):  # a series of a modality is in a study that has it
            series_of = [key for key, _ in self._known if key.tag == MODALITY]
            in_study = [_modality(key.match) for key in series_of]
            is_open = _is_irregular(study, _IN_STUDY)
            found = found.where(*(or_(told[0], is_open) for told in in_study if told is not None))
        if self._answers.reads_study_object and columns:
            found = found.join(study_object, study_object.c.study_id == study.c.id)
        return found.order_by(*self._order())

    def _order(self) -> list[Column[Any]]:
        """The columns that order the rows, without those that a unique key fixes."""
        order = [] if STUDY_UID in self._fixed else [*_STUDY_ORDER]
        if self._query.level is Level.SERIES:
            return [*order, *_SERIES_ORDER]
        return [*order, *([] if SERIES_UID in self._fixed and not order else _SERIES_ORDER), *_INSTANCE_ORDER]

    def _ways(self, read: Read) -> list[_Way] | None:
        """What gives the studies in which candidates are, and few others; None if all are walked."""
        if self._is_sought:
            return None
        way = _fewest(read, self._bounds.few, _ways_of(self._query))
        if way is None or not self._study_mask:
            return None if way is None else [way]
        those = (IS_LISTED, IS_IRREGULAR, _is_irregular(study, self._study_mask))
        irregular = _Way(select(study.c.id).where(*those))
        return None if _fewest(read, self._bounds.few, [irregular]) is None else [way, irregular]


_IN_STUDY = BITS[matching.MODALITIES_IN_STUDY]
_SERIES_ORDER = (series.c.ordinal, series.c.series_uid)
_INSTANCE_ORDER = (instance.c.ordinal, instance.c.sop_uid)
_FROM: dict[Level, Any] = {
    Level.SERIES: series.join(study),
    Level.IMAGE: instance.join(series).join(study),
}
_IS_PUBLISHED = {Level.SERIES: series.c.instances > 0, Level.IMAGE: instance.c.published.is_(true())}
_IN_SERIES = (*_STUDY_ORDER, study.c.id, *_SERIES_ORDER, series.c.id)
_PLACE = {Level.SERIES: _IN_SERIES, Level.IMAGE: (*_IN_SERIES, *_INSTANCE_ORDER)}


@functools.lru_cache(maxsize=256)
def _any_irregular(table: Table, mask: int) -> Select[Any]:
    """A row of *table* that is irregular by *mask*, if there is one; made once."""
    listed = [IS_LISTED] if table is study else []
    those = (table.c.irregular != 0, _is_irregular(table, mask), *listed)  # as the partial index says it
    return select(literal(1)).select_from(table).where(*those).limit(1)


@functools.lru_cache(maxsize=256)
def _is_regular(table: Table, mask: int) -> Condition:
    """That the columns of a row tell all that *mask* is about; made once, as is its opposite."""
    return table.c.irregular.op("&")(mask) == 0


@functools.lru_cache(maxsize=256)
def _is_irregular(table: Table, mask: int) -> Condition:
    return table.c.irregular.op("&")(mask) != 0


def _mask(told: Iterable[_Told], table: Table) -> int:
    """The bits of `irregular` by which rows of *table* are not told."""
    mask = 0
    for one in told:
        mask |= one.bit if one.table is table else 0
    return mask


def _is_behind(order: Sequence[Column[Any]], last: Sequence[Any]) -> Condition:
    """That a row stands behind the one with these values; an index in that order seeks it."""
    return tuple_(*order) > tuple_(*map(literal, last))


def _unknown(query: Query, key: Key | None = None) -> bool:
    """Whether *key*, or keys as such, are matched by what has no value for them (PS3.4 C.2.2.1.2)."""
    return query.matches_unknown and not (key and key.is_unique)
