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
from typing import NamedTuple, TypeAlias, TypeVar

import orjson
from sqlalchemy import Table

from dicomscp.archive.questions import FALSE, Lookup, Row, Sql, all_of, any_of, full_name, is_one_of
from dicomscp.archive.tables import (
    ACCESSION_NUMBER,
    AVAILABLE_TRANSFER_SYNTAX_UID,
    BITS,
    GROUP,
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

Read: TypeAlias = Callable[[Sql], Sequence[Row]]
"""Reads all that answers a question, as of one moment."""

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

_IS_LISTED, _IS_IRREGULAR = Sql("study.listed IS TRUE"), Sql("study.irregular != 0")
_OF_SAME_PATIENT = "study AS other WHERE other.patient_key = study.patient_key AND other.listed IS TRUE"
_IS_PATIENTS_NEWEST = Sql(
    f"NOT EXISTS (SELECT 1 FROM {_OF_SAME_PATIENT}"  # noqa: S608 - nothing from outside
    " AND (other.recency, other.study_uid) < (study.recency, study.study_uid))"
)
_PATIENT_COUNTS = {
    tag: f"(SELECT {total} FROM {_OF_SAME_PATIENT})"  # noqa: S608 - nothing from outside
    for tag, total in (
        (matching.PATIENT_RELATED_STUDIES, "count(*)"),
        (matching.PATIENT_RELATED_SERIES, "sum(other.series)"),
        (matching.PATIENT_RELATED_INSTANCES, "sum(other.instances)"),
    )
}
_ELEMENTS = {
    **{tag: full_name(column) for tag, column in UIDS.items()},
    AVAILABLE_TRANSFER_SYNTAX_UID: full_name(instance.c.transfer_syntax_uid),
    matching.STUDY_RELATED_SERIES: full_name(study.c.series),
    matching.STUDY_RELATED_INSTANCES: full_name(study.c.instances),
    matching.SERIES_RELATED_INSTANCES: full_name(series.c.instances),
    **_PATIENT_COUNTS,
}
_URLS = {
    Level.STUDY: ("study.study_uid",),
    Level.SERIES: ("study.study_uid", "series.series_uid"),
    Level.IMAGE: ("study.study_uid", "series.series_uid", "instance.sop_uid"),
}
_STUDY_OBJECT = full_name(study_object.c.attributes)
_WITH_OBJECT = " JOIN study_object ON study_object.study_id = study.id"


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
        self._objects = [full_name(column) for column, tags in places.objects if tags & needed]
        self._elements = [
            (hexadecimal(tag), public_vr(tag), column)
            for tag, column in _ELEMENTS.items()
            if tag in needed and tag in supported
        ]
        self._url = _URLS.get(query.level, ()) if matching.RETRIEVE_URL in needed else ()
        self.reads_study_object = _STUDY_OBJECT in self._objects
        beside = {tag for tag, _, _ in self._elements} | {_AVAILABILITY, _RETRIEVE_URL}
        self._is_decided_by_objects = beside.isdisjoint(hexadecimal(key.tag) for key in query.keys)

        self.columns: tuple[str, ...] = ()
        """What must be read of a row; it stands behind all else."""
        elements = [column for _, _, column in self._elements]
        self.columns += tuple(dict.fromkeys([*self._url, *elements, *self._objects]))
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
        if not decided and self._is_decided_by_objects:
            if not self._matches(found):
                return None
            decided = True
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


def _has(column: str, text: str) -> Sql:
    return Sql(f"instr({column}, ?) > 0", (text,))


class _Told(NamedTuple):
    """A *condition* that each regular row of *table* meets that matches; if *exact*, only those do."""

    table: Table
    condition: Sql
    exact: bool
    bit: int  # in `irregular` of the rows of which it tells nothing

    @property
    def coarse(self) -> Sql:
        """What irregular rows meet as well."""
        if not self.bit:
            return self.condition
        return any_of([self.condition, _is_irregular(self.table, self.bit)])


def _told(key: Key, *, unknown: bool) -> _Told | None:
    """What columns tell of *key*, None if nothing; with *unknown* what has no value matches as well."""
    column = UIDS.get(key.tag)
    if column is not None:
        condition = _uid(full_name(column), key.match)
        return None if condition is None else _Told(column.table, condition, exact=True, bit=0)
    told, none = _by_column(key)
    if told is None:
        return None
    condition, exact = told
    table = _table_of(key.tag)
    return _Told(table, any_of([condition, none]) if unknown else condition, exact, BITS.get(key.tag, 0))


_ByColumn: TypeAlias = tuple[Sql, bool] | None  # and whether it is exact


def _by_column(key: Key) -> tuple[_ByColumn, Sql]:
    """What the column says of *key*, and that it has no value."""
    none = _without_value(key.tag)
    if isinstance(key.match, Empty) and none is not None:
        return (none, True), none
    return _with_value(key), FALSE if none is None else none


def _without_value(tag: int) -> Sql | None:
    if tag == STUDY_DATE:
        return Sql("study.recency = 0")
    if tag == matching.MODALITIES_IN_STUDY:
        return Sql("study.modalities = ?", ("\\",))
    if tag in ORDINALS:
        return Sql(f"{full_name(ORDINALS[tag])} = {NO_NUMBER}")
    return Sql(f"{full_name(TEXTS[tag])} IS NULL") if tag in TEXTS else None


def _with_value(key: Key) -> _ByColumn:
    if key.tag == STUDY_DATE:
        return _date(key.match)
    if key.tag == matching.MODALITIES_IN_STUDY:
        return _modality(key.match)
    if key.tag in ORDINALS:
        return _number(full_name(ORDINALS[key.tag]), key.match)
    if key.tag not in TEXTS:
        return None
    if key.vr != "PN" and (told := _one_of(full_name(TEXTS[key.tag]), key.vr, key.match)):
        return told
    of_vr = _person if key.vr == "PN" else _text
    return _any(lambda match: of_vr(full_name(TEXTS[key.tag]), key.vr, match), key.match)


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
    return any_of([condition for condition, _ in known]), all(exact for _, exact in known)


def _one_of(column: str, vr: str, match: Match) -> _ByColumn:
    """That the column is one of several values."""
    if not isinstance(match, AnyOf) or len(match.matches) > _MOST_VALUES:
        return None
    values = [normal(vr, one.value) for one in match.matches if isinstance(one, Single)]
    return (is_one_of(column, values), True) if len(values) == len(match.matches) else None


def _uid(column: str, match: Match) -> Sql | None:
    if isinstance(match, Single):
        return Sql(f"{column} = ?", (match.value,))
    if isinstance(match, UIDList) and len(match.values) <= _MOST_UIDS:
        return is_one_of(column, match.values)
    return None


def _date(match: Match) -> _ByColumn:
    dates, is_exact = _dates(match)
    told = _any(lambda one: None if (span := _span(one)) is None else (span.of(study), True), dates)
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

    def of(self, table: Table) -> Sql:
        recency = f"{table.name}.recency"
        if self.low is None:
            return Sql(f"{recency} <= ?", (self.high,))
        return Sql(f"({recency} >= ? AND {recency} <= ?)", (self.low, self.high))


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
    told = [_has("study.modalities", f"\\{value}\\") for value in values]
    return all_of(told) if isinstance(match, AllOf) else any_of(told), True


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


def _number(column: str, match: Match) -> _ByColumn:
    return _any(lambda one: _one_number(column, one) if isinstance(one, Single) else None, match)


def _one_number(column: str, match: Single) -> _ByColumn:
    number = float(match.value)
    is_whole = number.is_integer() and abs(number) < NO_NUMBER
    return (Sql(f"{column} = ?", (int(number),)) if is_whole else FALSE), True


def _text(column: str, vr: str, match: Match) -> _ByColumn:
    if isinstance(match, Moments):
        told = _text(column, vr, _dates(match)[0])
        return told and (told[0], False)
    if isinstance(match, Range):
        after = _is_set(column) if match.low is None else Sql(f"{column} >= ?", (match.low,))
        until = [] if match.high is None else [Sql(f"{column} <= ?", (match.high,))]
        return all_of([after, *until]), True
    if isinstance(match, Single):
        value = normal(vr, match.value)
        return (Sql(f"{column} = ?", (value,)), True) if isinstance(value, str) else None
    if not isinstance(match, Wildcard):
        return None
    beginning, *others = _literals(match.pattern, r"[*?]+")
    conditions = [_begins(column, beginning), *(_has(column, run) for run in others[:_MOST_RUNS])]
    return all_of(conditions), _is_simple(match.pattern)


def _literals(pattern: str, separators: str) -> list[str]:
    """What a pattern begins with, and its other runs of characters that stand for themselves."""
    beginning, *others = re.split(separators, pattern)
    return [beginning, *filter(None, others)]


def _is_simple(pattern: str) -> bool:
    """Whether it asks for nothing but how a text begins, or what is in it."""
    return re.fullmatch(r"[^*?]*\*+|\*+[^*?]+\*+", pattern) is not None


def _is_set(column: str) -> Sql:
    return Sql(f"{column} IS NOT NULL")


def _begins(column: str, text: str) -> Sql:
    """That the column's text begins so, as a range: which an index can seek and all databases agree on."""
    if not text:
        return _is_set(column)
    end = _behind(text)
    if end is None:
        return Sql(f"{column} >= ?", (text,))
    return Sql(f"({column} >= ? AND {column} < ?)", (text, end))


def _behind(text: str) -> str | None:
    """The first text behind all that begin with *text*; None if there is none."""
    kept = text.rstrip("\U0010ffff")
    if not kept:
        return None
    return kept[:-1] + chr({0xD7FF: 0xE000}.get(ord(kept[-1]), ord(kept[-1]) + 1))


def _person(column: str, _vr: str, match: Match) -> _ByColumn:
    """Of a column with groups between equals signs."""
    if isinstance(match, Fuzzy):
        # The parts of other people's names are not kept.
        parts, is_exact = _parts(match, _BESIDE) if column == _PATIENT_NAME else ([], False)
        return all_of([_is_set(column), *map(_has_part, parts)]), is_exact
    if isinstance(match, Single):
        groups = _groups(match.value)
        return (
            (all_of([_has(column, f"={group}=") for group in groups]), "=" not in match.value)
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
        return any_of([begins, *ends]), True
    runs = [run.strip(" ") for run in re.split(r"[*?^=]+", pattern)]
    exact = re.fullmatch(r"\*+[^*?=^]+\*+", pattern) is not None and pattern.strip("*") == runs[1]
    return all_of([_is_set(column), *(_has(column, run) for run in runs[:_MOST_RUNS] if run)]), exact


def _beginning_of_group(match: Wildcard) -> str | None:
    """How a group of the name begins, if that is all that is asked for."""
    pattern = _folded_pattern(match.pattern)
    beginning = pattern.rstrip("*")
    if not beginning or beginning == pattern or set(beginning) & set("*?="):
        return None
    return beginning if len(beginning) - len(beginning.rstrip("^")) <= MOST_EMPTY else None


_MOST_PARTS = 4  # of a name that a question narrows by
_PATIENT_NAME = full_name(study.c.patient_name)
_BESIDE = "part"  # `study_name` of a study that is walked by `study_name` itself, it may be
_HAS_PART = "EXISTS (SELECT 1 FROM study_name AS part WHERE part.study_id = study.id AND"


def _parts(match: Fuzzy, among: str = "study_name") -> tuple[list[Sql], bool]:
    """Parts in *among* that a regular name has if it matches, and whether they suffice.

    A name that matches literally has them as well: parts that are asked for end where parts of it end.
    """
    names = [name_parts(fold(group)) for group in match.value.split("=")]
    wanted = [part for parts in names for part in parts if set(part) != {"*"}]
    whole = sorted((part for part in wanted if not set(part) & set("*?")), key=len, reverse=True)
    begun = [re.split("[*?]", part)[0] for part in wanted if part not in whole]
    found = [_of_kind(SOUND, among, Sql(f"{among}.value = ?", (sound(part),))) for part in whole]
    found += [_of_kind(PART, among, _begins(f"{among}.value", beginning)) for beginning in begun if beginning]
    is_one = len(names) == len(wanted) == len(found) == 1
    return found[:_MOST_PARTS], is_one and wanted[0].rstrip("*") in (*whole, *begun)


def _of_kind(kind: int, among: str, value: Sql) -> Sql:
    return Sql(f"({among}.kind = {kind} AND {value.text})", value.values)


def _has_part(part: Sql) -> Sql:
    return Sql(f"{_HAS_PART} {part.text})", part.values)


def _folded_pattern(pattern: str) -> str:
    """As the matcher folds it: what is empty at an end stays, for it says which groups are asked for."""
    return "=".join(fold(group).strip(" ") for group in pattern.split("="))


def _groups(name: str) -> list[str]:
    return [group for group in str(normal("PN", name) or "").split("=") if group]


# ── ways in ──────────────────────────────────────────────────────────────────────────────────────


_STUDY_IDS = Lookup(("study.id",), Sql("study"), (_IS_LISTED,))


class _Way(NamedTuple):
    """A lookup that gives the ids of studies, of all regular ones that match among them.

    A walk of *table* goes by it as well, so it need not be looked up then.  If all that meets a condition in
    `study_name` matches the key of that name, the condition is *sought*.
    """

    ids: Lookup
    table: Table | None = None
    sought: Sql | None = None


def _ways(by_tag: dict[int, Key], *, unknown: bool) -> Iterator[_Way]:
    """Ways in, likely few first."""
    for tag in (PATIENT_ID, ACCESSION_NUMBER):
        column = full_name(TEXTS[tag])
        if tag not in by_tag:
            continue
        match = by_tag[tag].match
        if told := _one_of(column, "LO", match) or _any(functools.partial(_sought, column), match):
            is_all = not unknown or by_tag[tag].is_unique
            found = told[0] if is_all else any_of([told[0], Sql(f"{column} IS NULL")])
            yield _Way(_STUDY_IDS.narrowed(found))
    if PATIENT_NAME in by_tag and (told := _any(_named, by_tag[PATIENT_NAME].match)):
        found, is_exact = told
        found = any_of([found, Sql(f"study_name.kind = {NAMELESS}")]) if unknown else found
        ids = Lookup(("study_name.study_id",), Sql("study_name"), (found,))
        yield _Way(ids, study_name, found if is_exact else None)
    yield from _by_modality_and_date(by_tag, unknown=unknown)


def _sought(column: str, match: Match) -> _ByColumn:
    """A condition that an index seeks."""
    if isinstance(match, Wildcard) and match.pattern[:1] in ("*", "?"):
        return None
    if isinstance(match, Wildcard):
        return _begins(column, re.split("[*?]", match.pattern)[0]), False
    return _text(column, "LO", match) if isinstance(match, Single) else None


def _named(match: Match) -> _ByColumn:
    value = "study_name.value"
    if isinstance(match, Single) and (groups := _groups(match.value)):
        is_first = Sql(f"{value} = ?", (groups[0],))
        return _of_kind(GROUP, "study_name", is_first), "=" not in match.value
    if isinstance(match, Wildcard) and (beginning := _beginning_of_group(match)) is not None:
        without = beginning.rstrip("^")
        return _of_kind(GROUP, "study_name", _begins(value, without)), beginning == without
    if isinstance(match, Fuzzy):
        parts, is_exact = _parts(match)
        return (parts[0], is_exact) if parts else None
    return None


def _by_modality_and_date(by_tag: dict[int, Key], *, unknown: bool) -> Iterator[_Way]:
    # A series that has none may be in a study that has some.
    tags = (matching.MODALITIES_IN_STUDY,) if unknown else (matching.MODALITIES_IN_STUDY, MODALITY)
    of_study = (_modalities(by_tag[tag]) for tag in tags if tag in by_tag)
    modalities = next((values for values in of_study if values is not None), None)
    span = _span(by_tag[STUDY_DATE].match) if STUDY_DATE in by_tag and not unknown else None
    if modalities is not None:
        sought = is_one_of("study_modality.modality", [*modalities, ""] if unknown else modalities)
        when = [] if span is None else [span.of(study_modality)]
        ids = Lookup(("study_modality.study_id",), Sql("study_modality"), (sought, *when))
        yield _Way(ids, study_modality)
    elif span is not None:
        yield _Way(_STUDY_IDS.narrowed(span.of(study)), study)


def _is_sought(key: Key, *, unknown: bool) -> bool:
    """Whether an index gives all that matches *key* in order, and little of it or nothing else."""
    if key.tag in (STUDY_UID, SERIES_UID, SOP_UID):
        return True
    return key.tag in (PATIENT_ID, ACCESSION_NUMBER) and isinstance(key.match, Single) and not unknown


def _fewest(read: Read, most: int, ways: Iterable[_Way]) -> _Way | None:
    """Of *ways* the one that gives the fewest; None if all give more than *most*."""
    fewest, least = None, most + 1
    for way in ways:
        given = read(way.ids.counted(least))[0][0]
        if given < least:
            fewest, least = way, given
        if least <= _VERY_FEW:
            break
    return fewest


def _ways_of(query: Query) -> Iterator[_Way]:
    return _ways({key.tag: key for key in query.keys}, unknown=_unknown(query))


# ── studies and patients ─────────────────────────────────────────────────────────────────────────

_STUDY_ORDER = ("study.recency", "study.study_uid")
_PAGE_ORDER = ("page.recency", "page.study_uid")


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
    sought: list[Sql]  # on `table`, which an index seeks
    beside: list[Sql]  # on `study`


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
        (regular,) = read(self._picked(self._way(read)).counted(bound))[0]
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
        columns, source = (*_STUDY_ORDER, *self._answers.columns), Sql("study" + self._with_object)
        those = (_IS_LISTED, _IS_IRREGULAR, _is_irregular(study, self._mask), *self._always)
        size, page = _VERY_FEW, Lookup(columns, source, those, _STUDY_ORDER)
        rows = read(page.sql(size))
        if len(rows) == size:
            size, page = self._bounds.page, page.narrowed(*(one.coarse for _, one in self._known))
            rows = read(page.sql(size))
        while True:
            for row in rows:
                found = self._answers.answer(row, decided=False)
                if found is not None:
                    yield _Match(row[0], row[1], found)
            if len(rows) < size:
                return
            rows = read(page.narrowed(_is_behind(_STUDY_ORDER, rows[-1][:2])).sql(size))

    def _way(self, read: Read) -> _Way | None:
        """What gives all regular rows that match, and few others; None if a walk is as good."""
        if self._is_sought or (self._is_exact and not self._walk.beside):
            return None
        ways = list(_ways_of(self._query))
        if all(way.table is self._walk.table for way in ways):
            return None
        fewest = _fewest(read, self._bounds.few, ways)
        return None if fewest is None or fewest.table is self._walk.table else fewest

    def _page(self, way: _Way | None, after: Row | None, size: int, beyond: int) -> Sql:
        """The next *size* regular rows behind *after*, with what is read of them."""
        picked, values = self._picked(way, after).sql(size, beyond)
        source = f"({picked}) AS page JOIN study ON study.id = page.id{self._with_object}"
        return Lookup((*_PAGE_ORDER, *self._answers.columns), Sql(source, values), order=_PAGE_ORDER).sql()

    def _picked(self, way: _Way | None, after: Row | None = None) -> Lookup:
        """Ids of regular rows behind *after* that meet what is told, in order."""
        walk = self._walk if way is None else self._within(way)
        source = walked = walk.table.name
        order: tuple[str, ...] = (f"{walked}.recency", f"{walked}.study_uid")
        where = [*walk.sought, *walk.beside, *self._always]
        id_ = "study.id"
        if walk.table is study:
            where.insert(0, _IS_LISTED)
        else:
            id_ = f"{walked}.study_id"
            if walk.beside or self._always:
                source = f"{walked} JOIN study ON study.id = {id_}"
        if self._mask:
            where.append(_is_regular(walk.table, self._mask))
        if after is not None:
            where.append(_is_behind(order, after[:2]))
        columns = (f"{id_} AS id", *order)
        is_distinct = way is not None and walk.table is not study  # two groups of a name may begin alike
        if is_distinct:
            order = (*order, id_)  # by all of what is grouped, so SQLite sorts but once
        return Lookup(columns, Sql(source), tuple(where), order, is_distinct)

    def _within(self, way: _Way) -> _Walk:
        if way.sought is None:
            told = [one.condition for _, one in self._known]
            return _Walk(study, [_is_within(way)], told)
        beside = [one.condition for key, one in self._known if key.tag != PATIENT_NAME]
        return _Walk(study_name, [way.sought], beside)

    @property
    def _with_object(self) -> str:
        return _WITH_OBJECT if self._answers.reads_study_object else ""


def _is_within(way: _Way) -> Sql:
    ids, values = way.ids.sql()
    return Sql(f"study.id IN ({ids})", values)


def _walk(known: Sequence[tuple[Key, _Told]], *, unknown: bool) -> _Walk:
    by, walk = None, _Walk(study, [], [])
    for key, _ in () if unknown else known:
        if (named := _of_one_name(key)) is not None:
            by, walk = key, _Walk(study_name, [named], [])
            break
        if len(modalities := _modalities(key) or ()) == 1:
            by, walk = key, _Walk(study_modality, [is_one_of("study_modality.modality", modalities)], [])
    for key, one in known:
        span = _span(key.match) if key.tag == STUDY_DATE and not unknown else None
        if key is by:
            continue
        if span is not None:
            walk.sought.append(span.of(walk.table))
        else:
            walk.beside.append(one.condition)
    return walk


def _of_one_name(key: Key) -> Sql | None:
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
        self._at_open = len(_PLACE[query.level])

    def find(self, read: Read, offset: int, limit: int | None) -> Iterator[Attributes]:
        """What matches behind *offset*; *limit* says how much of it may be wanted, no more."""
        open_ = self._open(read) if self._is_exact else None
        beyond = offset if self._is_exact and open_ is None else 0
        left = offset - beyond
        for row in self._rows(read, beyond, None if limit is None else left + limit, open_):
            decided = self._is_exact and not (open_ is not None and row[self._at_open])
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
        return int(read(self._candidates(read, ()).counted(bound))[0][0])

    def _open(self, read: Read) -> Sql | None:
        """That the columns of a row do not tell all; None if they do of every row."""
        open_ = [
            _is_irregular(table, mask)
            for table, mask in self._masks.items()
            if read(_any_irregular(table, mask))
        ]
        return any_of(open_) if open_ else None

    def _rows(self, read: Read, beyond: int, wanted: int | None, open_: Sql | None) -> Iterator[Row]:
        """Candidates in order, without the first *beyond*, and whether each is *open_*."""
        is_open = () if open_ is None else (open_.text,)
        columns = (*_PLACE[self._query.level], *is_open, *self._answers.columns)
        candidates = self._candidates(read, columns)
        size = self._bounds.page if wanted is None else max(1, min(self._bounds.page, wanted))
        rows = read(candidates.sql(size, beyond))
        yield from rows
        stages = self._behind(rows[-1]) if len(rows) == size else []
        while stages:
            rows = read(candidates.narrowed(stages.pop(0)).sql(self._bounds.page))
            yield from rows
            if len(rows) == self._bounds.page:
                stages = self._behind(rows[-1])

    def _behind(self, last: Row) -> list[Sql]:
        """What stands behind *last*: in its series, then in its study, then in other studies."""
        recency, study_uid, study_id, ordinal, series_uid, series_id, *lower = last[: self._at_open]
        stages = []
        if self._query.level is Level.IMAGE:
            in_series = Sql("series.id = ?", (series_id,))
            stages.append(all_of([in_series, _is_behind(_INSTANCE_ORDER, lower)]))
        if STUDY_UID not in self._fixed or SERIES_UID not in self._fixed:
            in_study = Sql("study.id = ?", (study_id,))
            stages.append(all_of([in_study, _is_behind(_SERIES_ORDER, (ordinal, series_uid))]))
        if STUDY_UID not in self._fixed:
            stages.append(_is_behind(_STUDY_ORDER, (recency, study_uid)))
        return stages

    def _candidates(self, read: Read, columns: tuple[str, ...]) -> Lookup:
        """All candidates in order: what is regular and meets what is told, and what is irregular."""
        level = self._query.level
        where = [_IS_LISTED, _IS_PUBLISHED[level], *(one.coarse for _, one in self._known)]
        if (ways := self._ways(read)) is not None:
            where.append(any_of([_is_within(way) for way in ways]))
        elif not _unknown(self._query):  # a series of a modality is in a study that has it
            series_of = [key for key, _ in self._known if key.tag == MODALITY]
            in_study = [_modality(key.match) for key in series_of]
            is_open = _is_irregular(study, _IN_STUDY)
            where += [any_of([told[0], is_open]) for told in in_study if told is not None]
        with_object = _WITH_OBJECT if self._answers.reads_study_object and columns else ""
        return Lookup(columns or ("1",), Sql(_FROM[level] + with_object), tuple(where), self._order())

    def _order(self) -> tuple[str, ...]:
        """The columns that order the rows, without those that a unique key fixes."""
        order = () if STUDY_UID in self._fixed else _STUDY_ORDER
        if self._query.level is Level.SERIES:
            return order + _SERIES_ORDER
        in_order = () if SERIES_UID in self._fixed and not order else _SERIES_ORDER
        return order + in_order + _INSTANCE_ORDER

    def _ways(self, read: Read) -> list[_Way] | None:
        """What gives the studies in which candidates are, and few others; None if all are walked."""
        if self._is_sought:
            return None
        way = _fewest(read, self._bounds.few, _ways_of(self._query))
        if way is None or not self._study_mask:
            return None if way is None else [way]
        irregular = _Way(_STUDY_IDS.narrowed(_IS_IRREGULAR, _is_irregular(study, self._study_mask)))
        return None if _fewest(read, self._bounds.few, [irregular]) is None else [way, irregular]


_IN_STUDY = BITS[matching.MODALITIES_IN_STUDY]
_SERIES_ORDER = ("series.ordinal", "series.series_uid")
_INSTANCE_ORDER = ("instance.ordinal", "instance.sop_uid")
_OF_STUDY = "JOIN study ON study.id = series.study_id"
INSTANCES = f"instance JOIN series ON series.id = instance.series_id {_OF_STUDY}"
"""Instances with the series and studies that they belong to."""

_FROM = {Level.SERIES: f"series {_OF_STUDY}", Level.IMAGE: INSTANCES}
_IS_PUBLISHED = {Level.SERIES: Sql("series.instances > 0"), Level.IMAGE: Sql("instance.published IS TRUE")}
_IN_SERIES = (*_STUDY_ORDER, "study.id", *_SERIES_ORDER, "series.id")
_PLACE = {Level.SERIES: _IN_SERIES, Level.IMAGE: (*_IN_SERIES, *_INSTANCE_ORDER)}


@functools.lru_cache(maxsize=256)
def _any_irregular(table: Table, mask: int) -> Sql:
    """A row of *table* that is irregular by *mask*, if there is one."""
    listed = [_IS_LISTED] if table is study else []
    in_index = Sql(f"{table.name}.irregular != 0")  # as the partial index says it
    those = (in_index, _is_irregular(table, mask), *listed)
    return Lookup(("1",), Sql(table.name), those).sql(1)


def _is_regular(table: Table, mask: int) -> Sql:
    """That the columns of a row tell all that *mask* is about."""
    return Sql(f"({table.name}.irregular & {mask}) = 0")


def _is_irregular(table: Table, mask: int) -> Sql:
    return Sql(f"({table.name}.irregular & {mask}) != 0")


def _mask(told: Iterable[_Told], table: Table) -> int:
    """The bits of `irregular` by which rows of *table* are not told."""
    mask = 0
    for one in told:
        mask |= one.bit if one.table is table else 0
    return mask


def _is_behind(order: Sequence[str], last: Sequence[object]) -> Sql:
    """That a row stands behind the one with these values; an index in that order seeks it."""
    marks = ", ".join("?" * len(last))
    return Sql(f"({', '.join(order)}) > ({marks})", tuple(last))


def _unknown(query: Query, key: Key | None = None) -> bool:
    """Whether *key*, or keys as such, are matched by what has no value for them (PS3.4 C.2.2.1.2)."""
    return query.matches_unknown and not (key and key.is_unique)
