"""Attribute matching (PS3.4 C.2.2.2): what a C-FIND identifier or QIDO-RS parameters ask for, and what fits.

A `Query` says at which level objects are wanted, which keys they must match and which attributes are
returned.  `matcher` decides, by the DICOM JSON of an object, whether it matches; an index may narrow the
candidates as it likes, but this decides.  So what a match is stands here and nowhere else.

Choices that the standard leaves open:

- PN matches without regard to case and to empty trailing components.  A name in the query without "="
  matches any component group of a name held; with "=", group by group, an empty one matching any.
- Numbers (IS, DS) match by value: 5 is 05.
- A time or date-time of lower precision stands for the whole period: 1015 is from 10:15:00 up to 10:16.
- Several values: the key matches if one of its values matches one of those held, whatever the VR.
- A lone "*" matches everything, in every VR.  Spaces around a value are not significant.
- A date-time with an offset from UTC and one without compare as if both were local.

What is called a level's *tags* are attributes that come from headers.  Computed attributes (numbers of
related entities, modalities in study, URLs) are supported beside them.
"""

import re
from calendar import monthrange
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from fnmatch import translate
from typing import Any, Literal, TypeAlias

from pydicom.datadict import keyword_dict, keyword_for_tag

from dicomscp.dicom.dictionary import public_vr
from dicomscp.errors import RefusedError


class IdentifierError(RefusedError):
    """The identifier breaks the rules of its information model (C-FIND status A900)."""


class BadValueError(RefusedError):
    """A key or parameter has a value that nothing can be compared with; the message names it."""


class Level(StrEnum):
    """The levels of the information models, from the top."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


# ── what is asked for ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Universal:
    """Everything matches; the attribute is only to be returned."""


@dataclass(frozen=True, slots=True)
class Single:
    """Equal to *value*, by the VR's rules."""

    value: str


@dataclass(frozen=True, slots=True)
class UIDList:
    """One of these UIDs."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wildcard:
    """`*` is any number of characters, `?` exactly one."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Range:
    """From *low* to *high*, both included; None is open.

    Dates are YYYYMMDD and times HHMMSS.ffffff, so that they compare as text; date-times are as asked for.
    """

    low: str | None
    high: str | None


@dataclass(frozen=True, slots=True)
class AnyOf:
    """One of several that are not all UIDs."""

    matches: "tuple[Single | Wildcard | Range, ...]"


@dataclass(frozen=True, slots=True)
class Items:
    """A sequence with an item that matches all *keys*."""

    keys: "tuple[Key, ...]"


Match: TypeAlias = Universal | Single | UIDList | Wildcard | Range | AnyOf | Items


@dataclass(frozen=True, slots=True)
class Key:
    """An attribute and what it must match."""

    tag: int
    vr: str
    match: Match


@dataclass(frozen=True, slots=True)
class Query:
    """Objects of *level* that match all *keys*.

    Of each, the attributes in *returns* are given if they are known, all if it is None; those in
    *always* are given even if they are not, without a value.  *limit* None is no limit.
    """

    level: Level
    keys: tuple[Key, ...]
    returns: frozenset[int] | None
    limit: int | None
    offset: int = 0
    always: frozenset[int] = frozenset()


# ── which attributes there are ───────────────────────────────────────────────────────────────────


def _tags(keywords: str) -> frozenset[int]:
    return frozenset(keyword_dict[keyword] for keyword in keywords.split())


STUDY_UID, SERIES_UID, SOP_UID, SOP_CLASS_UID = 0x0020000D, 0x0020000E, 0x00080018, 0x00080016
PATIENT_ID = 0x00100020
MODALITIES_IN_STUDY, SOP_CLASSES_IN_STUDY = 0x00080061, 0x00080062
INSTANCE_AVAILABILITY, RETRIEVE_URL = 0x00080056, 0x00081190
PATIENT_RELATED_STUDIES, PATIENT_RELATED_SERIES, PATIENT_RELATED_INSTANCES = (
    0x00201200,
    0x00201202,
    0x00201204,
)
STUDY_RELATED_SERIES, STUDY_RELATED_INSTANCES, SERIES_RELATED_INSTANCES = 0x00201206, 0x00201208, 0x00201209

PATIENT_TAGS = _tags(
    "PatientName PatientID IssuerOfPatientID IssuerOfPatientIDQualifiersSequence PatientBirthDate"
    " PatientBirthTime PatientSex OtherPatientIDs OtherPatientIDsSequence OtherPatientNames EthnicGroup"
    " PatientComments"
)
"""Attributes of a patient, out of headers."""

STUDY_TAGS = PATIENT_TAGS | _tags(
    "StudyInstanceUID StudyDate StudyTime AccessionNumber IssuerOfAccessionNumberSequence StudyID"
    " StudyDescription ReferringPhysicianName PhysiciansOfRecord NameOfPhysiciansReadingStudy"
    " TimezoneOffsetFromUTC ProcedureCodeSequence AdmittingDiagnosesDescription PatientAge PatientSize"
    " PatientWeight Occupation AdditionalPatientHistory AdmissionID RequestingPhysician"
    " RequestedProcedureDescription"
)
"""Attributes of a study and of its patient, out of headers."""

SERIES_TAGS = _tags(
    "SeriesInstanceUID Modality SeriesNumber SeriesDescription SeriesDescriptionCodeSequence SeriesDate"
    " SeriesTime BodyPartExamined Laterality PatientPosition ProtocolName"
    " PerformedProcedureStepStartDate PerformedProcedureStepStartTime PerformedProcedureStepEndDate"
    " PerformedProcedureStepEndTime PerformedProcedureStepID PerformedProcedureStepDescription"
    " RequestAttributesSequence PerformingPhysicianName OperatorsName Manufacturer ManufacturerModelName"
    " StationName DeviceSerialNumber SoftwareVersions InstitutionName InstitutionalDepartmentName"
)
"""Attributes of a series, out of headers."""

INSTANCE_TAGS = _tags(
    "SOPInstanceUID SOPClassUID InstanceNumber AvailableTransferSyntaxUID ImageType InstanceCreationDate"
    " InstanceCreationTime AcquisitionDate AcquisitionTime AcquisitionDateTime AcquisitionNumber ContentDate"
    " ContentTime NumberOfFrames Rows Columns BitsAllocated ConceptNameCodeSequence CompletionFlag"
    " VerificationFlag DocumentTitle ContentLabel ContentDescription PresentationCreationDate"
    " PresentationCreationTime ContentCreatorName"
)
"""Attributes of an instance, out of its header."""

INDEX_TAGS = STUDY_TAGS | SERIES_TAGS | INSTANCE_TAGS
"""What an index needs of each header."""

_ORDER = tuple(Level)
_COMPUTED = {
    Level.PATIENT: frozenset({PATIENT_RELATED_STUDIES, PATIENT_RELATED_SERIES, PATIENT_RELATED_INSTANCES}),
    Level.STUDY: frozenset(
        {MODALITIES_IN_STUDY, SOP_CLASSES_IN_STUDY, STUDY_RELATED_SERIES, STUDY_RELATED_INSTANCES}
    ),
    Level.SERIES: frozenset({SERIES_RELATED_INSTANCES}),
    Level.IMAGE: frozenset[int](),
}
_OWN = {
    Level.PATIENT: PATIENT_TAGS,
    Level.STUDY: STUDY_TAGS - PATIENT_TAGS,
    Level.SERIES: SERIES_TAGS,
    Level.IMAGE: INSTANCE_TAGS,
}
_LEVEL_OF = {tag: level for level in Level for tag in _OWN[level] | _COMPUTED[level]}
_OF_EVERY_LEVEL = frozenset({INSTANCE_AVAILABILITY, RETRIEVE_URL})  # but that of the patient

_UNIQUE = {
    Level.PATIENT: PATIENT_ID,
    Level.STUDY: STUDY_UID,
    Level.SERIES: SERIES_UID,
    Level.IMAGE: SOP_UID,
}


def supported_tags(level: Level) -> frozenset[int]:
    """The attributes that objects at *level* can be matched by and returned with.

    Those of the levels above are among them.
    """
    above = _ORDER[: _ORDER.index(level) + 1]
    known = frozenset(tag for tag, of in _LEVEL_OF.items() if of in above)
    return known if level is Level.PATIENT else known | _OF_EVERY_LEVEL


_SUPPORTED = {level: supported_tags(level) for level in Level}


# ── C-FIND ───────────────────────────────────────────────────────────────────────────────────────

Identifier: TypeAlias = Mapping[int, tuple[str, Sequence[Any]]]
"""VR and values of each element: text, or for SQ the items, which are identifiers."""

_QUERY_LEVEL = 0x00080052
# They govern the request or the response, and are never matched.
_CONTROL = frozenset({0x00080005, _QUERY_LEVEL, 0x00080054, 0x00080201})


def query_from_identifier(identifier: Identifier, *, root: Literal["PATIENT", "STUDY"]) -> Query:
    """The query that a C-FIND identifier makes, in the Patient Root or Study Root information model.

    Baseline behaviour (PS3.4 C.4.1.3.1.1): the unique key of every level above has one value, and no
    key of a level below has any.  Optional keys of the levels above are matched as well; an attribute
    that is not supported is as if it were not there.  Raises IdentifierError for what the model does
    not allow, BadValueError for a value that cannot be compared.

    Returned are the keys that are supported, and the unique keys down to the level, known or not.
    """
    level = _level_of(identifier, root)
    keys = tuple(
        Key(tag, vr, match)
        for tag, (_, values) in identifier.items()
        if tag in _LEVEL_OF and tag not in _CONTROL
        for vr in (public_vr(tag),)
        for match in (_match(_name(tag), vr, values),)
        if not isinstance(match, Universal)
    )
    _check_hierarchy(level, root, {key.tag: key for key in keys})
    unique = {_UNIQUE[one] for one in _ORDER[: _ORDER.index(level) + 1]}
    returns = _SUPPORTED[level] & (unique | identifier.keys())
    return Query(level, keys, returns, None, always=returns)


def _level_of(identifier: Identifier, root: str) -> Level:
    _, values = identifier.get(_QUERY_LEVEL, ("CS", ()))
    text = str(values[0]).strip() if len(values) == 1 else ""
    if text not in _ORDER:
        raise IdentifierError("Query/Retrieve Level is missing or unknown")
    level = Level(text)
    if root == "STUDY" and level is Level.PATIENT:
        raise IdentifierError("Study Root has no PATIENT level")
    return level


def _check_hierarchy(level: Level, root: str, keys: Mapping[int, Key]) -> None:
    depth = _ORDER.index(level)
    for above in _ORDER[0 if root == "PATIENT" else 1 : depth]:
        key = keys.get(_UNIQUE[above])
        if key is None or not isinstance(key.match, Single):
            raise IdentifierError(f"{_name(_UNIQUE[above])} must have one value at {level} level")
    for tag in keys:
        if _ORDER.index(_LEVEL_OF[tag]) > depth:
            raise IdentifierError(f"{_name(tag)} is no key at {level} level")


# ── QIDO-RS ──────────────────────────────────────────────────────────────────────────────────────

# PS3.18 tables 10.6.3-3 to 10.6.3-5: what is returned unasked, and what of it even if it is not known.
_ALWAYS = {
    Level.STUDY: _tags(
        "StudyDate StudyTime AccessionNumber ReferringPhysicianName PatientName PatientID PatientBirthDate"
        " PatientSex StudyID"
    ),
    Level.SERIES: _tags("Modality SeriesNumber"),
    Level.IMAGE: _tags("InstanceNumber"),
}
_UNASKED = {
    Level.STUDY: _ALWAYS[Level.STUDY]
    | _OF_EVERY_LEVEL
    | _tags(
        "StudyInstanceUID StudyDescription TimezoneOffsetFromUTC ModalitiesInStudy NumberOfStudyRelatedSeries"
        " NumberOfStudyRelatedInstances"
    ),
    Level.SERIES: _ALWAYS[Level.SERIES]
    | _OF_EVERY_LEVEL
    | _tags(
        "StudyInstanceUID SeriesInstanceUID SeriesDescription SeriesDate SeriesTime"
        " PerformedProcedureStepStartDate PerformedProcedureStepStartTime RequestAttributesSequence"
        " NumberOfSeriesRelatedInstances"
    ),
    Level.IMAGE: _ALWAYS[Level.IMAGE]
    | _OF_EVERY_LEVEL
    | _tags(
        "StudyInstanceUID SeriesInstanceUID SOPInstanceUID SOPClassUID Rows Columns BitsAllocated"
        " NumberOfFrames AvailableTransferSyntaxUID"
    ),
}
_LITERAL = {
    "fuzzymatching": (
        "The fuzzymatching parameter is not supported. Only literal matching has been performed."
    ),
    "emptyvaluematching": "The emptyvaluematching parameter is not supported. Empty values match everything.",
    "multiplevaluematching": (
        "The multiplevaluematching parameter is not supported. Any one of several values matches."
    ),
}
_COMMA_VRS = frozenset({"UI", "CS"})  # neither can hold a comma; viewers send lists of modalities so
_LINE_VRS = frozenset({"LT", "ST", "UT", "UR"})  # a backslash is a character like any other
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


def query_from_parameters(
    level: Level,
    params: Iterable[tuple[str, str]],
    *,
    study_uid: str | None = None,
    series_uid: str | None = None,
    max_results: int,
) -> tuple[Query, list[str]]:
    """The query that a QIDO-RS request makes, and warnings about what of it is not done.

    *study_uid* and *series_uid* are those of the resource; without them the attributes of the levels
    above are returned too.  No more than *max_results* are asked for.  Raises BadValueError, naming the
    parameter, for a value that cannot be used.
    """
    asked: list[tuple[tuple[int, ...], str, str]] = []
    included: set[int] = set()
    everything = False
    bounds = {"limit": max_results, "offset": 0}
    warnings: list[str] = []
    for name, value in params:
        if name == "includefield":
            for field in value.split(","):
                everything = everything or field.strip() == "all"
                included.update(_included(field.strip(), warnings))
        elif name in bounds:
            bounds[name] = _whole_number(name, value)
        elif name in _LITERAL:
            warnings += _literal(name, value)
        elif path := _path(name):
            if path[0] in _SUPPORTED[level] and path[0] not in _CONTROL:
                asked.append((path, name, value))
            else:
                warnings.append(f"The attribute {_shown(name)} is not matched at this level.")
        else:
            warnings.append(f"The parameter {_shown(name)} is unknown and was ignored.")
    scope = {STUDY_UID: study_uid, SERIES_UID: series_uid}
    keys = tuple(Key(tag, "UI", Single(uid)) for tag, uid in scope.items() if uid is not None)
    scoped = [Level.STUDY] * (study_uid is not None) + [Level.SERIES] * (series_uid is not None)
    levels = [
        one
        for one in _UNASKED
        if one is level or (one not in scoped and one in _ORDER[: _ORDER.index(level)])
    ]
    always = frozenset().union(*(_ALWAYS[one] for one in levels))
    unasked = frozenset().union(*(_UNASKED[one] for one in levels))
    query = Query(
        level,
        keys + _asked_keys(asked),
        None if everything else unasked | (_SUPPORTED[level] & included),
        min(bounds["limit"], max_results),
        bounds["offset"],
        always,
    )
    return query, warnings


def _included(field: str, warnings: list[str]) -> Iterable[int]:
    """The attribute that includefield names; of a path, the sequence it begins with."""
    if field in ("", "all"):
        return ()
    path = _path(field)
    if not path:
        warnings.append(f"The attribute {_shown(field)} of includefield is unknown and was ignored.")
    return path[:1]


def _literal(name: str, value: str) -> list[str]:
    if value not in ("true", "false"):
        raise BadValueError(f"{name} is true or false, not {_shown(value)}")
    return [_LITERAL[name]] if value == "true" else []


def _whole_number(name: str, value: str) -> int:
    if not _NUMBER.fullmatch(value):
        raise BadValueError(f"{name} is a whole number, not {_shown(value)}")
    return int(value)


def _path(name: str) -> tuple[int, ...]:
    """The tags that *name* leads through, by keyword or eight hex digits; () if one is not known."""
    tags = []
    for part in name.split("."):
        tag = int(part, 16) if re.fullmatch("[0-9A-Fa-f]{8}", part) else keyword_dict.get(part, 0)
        if not tag or public_vr(tag) == "UN":
            return ()
        tags.append(tag)
    is_through_sequences = all(public_vr(tag) == "SQ" for tag in tags[:-1])
    return tuple(tags) if is_through_sequences else ()


def _asked_keys(asked: Iterable[tuple[tuple[int, ...], str, str]]) -> tuple[Key, ...]:
    """A key for each attribute; what is asked of one sequence must hold in one item."""
    keys: list[Key] = []
    inside: dict[int, list[tuple[tuple[int, ...], str, str]]] = {}
    for (tag, *rest), name, value in asked:
        vr = public_vr(tag)
        if rest:
            inside.setdefault(tag, []).append((tuple(rest), name, value))
        elif not isinstance(match := _match(name, vr, [] if vr == "SQ" else _split(vr, value)), Universal):
            keys.append(Key(tag, vr, match))
    for tag, more in inside.items():
        if nested := _asked_keys(more):
            keys.append(Key(tag, "SQ", Items(nested)))
    return tuple(keys)


def _split(vr: str, value: str) -> list[str]:
    if vr in _LINE_VRS:
        return [value]
    return re.split(r"[\\,]" if vr in _COMMA_VRS else r"\\", value)


def _shown(text: str) -> str:
    return repr(text[:64])


# ── from text to match ───────────────────────────────────────────────────────────────────────────

# PS3.4 C.2.2.2.4
_WILDCARD_VRS = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
_NUMBER_VRS = frozenset({"DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"})
_UID = re.compile(r"[!-\[\]-~]{1,64}")  # what can be held, PS3.5 or not


def _name(tag: int) -> str:
    return f"{keyword_for_tag(tag)} ({tag >> 16:04X},{tag & 0xFFFF:04X})".lstrip()


def _match(name: str, vr: str, values: Sequence[Any]) -> Match:
    """What *values* of a key ask for; none, or only empty ones, ask for nothing."""
    if vr == "SQ":
        return _items(name, values)
    texts = [text for text in (str(value).strip(" ") for value in values) if text]
    if not texts or any(set(text) == {"*"} for text in texts):
        return Universal()
    if vr == "UI":
        if bad := next((text for text in texts if not _UID.fullmatch(text) or set(text) & set("*?")), None):
            raise BadValueError(f"{name} is a UID, not {_shown(bad)}")
        return Single(texts[0]) if len(texts) == 1 else UIDList(tuple(texts))
    matches = tuple(_one_match(name, vr, text) for text in texts)
    return matches[0] if len(matches) == 1 else AnyOf(matches)


def _items(name: str, items: Sequence[Identifier]) -> Match:
    if len(items) > 1:
        raise BadValueError(f"{name} has more than one item")
    keys = tuple(
        Key(tag, vr, match)
        for item in items
        for tag, (written, values) in item.items()
        for vr in (public_vr(tag) if public_vr(tag) != "UN" else written,)
        for match in (_match(_name(tag), vr, values),)
        if not isinstance(match, Universal)
    )
    return Items(keys) if keys else Universal()


def _one_match(name: str, vr: str, text: str) -> Single | Wildcard | Range:
    if vr in _WILDCARD_VRS and ("*" in text or "?" in text):
        return Wildcard(text)
    if vr in ("DA", "TM", "DT"):
        match = _range(vr, text)
        if match is None:
            raise BadValueError(f"{name} is a {vr} or a range of them, not {_shown(text)}")
        return match
    if vr in _NUMBER_VRS and normal(vr, text) is None:
        raise BadValueError(f"{name} is a number, not {_shown(text)}")
    return Single(text)


def _range(vr: str, text: str) -> Single | Range | None:
    """A date, or a period; None if *text* is neither."""
    if _bound(vr, text, up=False) is not None:
        date = _bound(vr, text, up=False)
        return Single(date) if vr == "DA" and date else Range(date, _bound(vr, text, up=True))
    for hyphen in (at for at, character in enumerate(text) if character == "-"):
        low, high = text[:hyphen].strip(), text[hyphen + 1 :].strip()
        bounds = _bound(vr, low, up=False) if low else None, _bound(vr, high, up=True) if high else None
        if (low or high) and (bounds[0] is not None) == bool(low) and (bounds[1] is not None) == bool(high):
            return Range(*bounds)
    return None


def _bound(vr: str, text: str, *, up: bool) -> str | None:
    """Where a period begins, or with *up* ends; None if *text* is not of the VR."""
    if vr == "DA":
        return _date(text)
    if vr == "TM":
        return _time(text, up=up)
    return text if _moments(text) else None


# ── values ───────────────────────────────────────────────────────────────────────────────────────

_DATE = re.compile(r"(\d{4})(\.?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])", re.ASCII)
_TIME = re.compile(r"([01]\d|2[0-3])(?:(:?)([0-5]\d)(?:\2([0-5]\d|60)(?:\.(\d{1,6}))?)?)?", re.ASCII)
_DATE_TIME = re.compile(
    r"(\d{4})(?:(0[1-9]|1[0-2])(?:(0[1-9]|[12]\d|3[01])(?:([01]\d|2[0-3])(?:([0-5]\d)(?:([0-5]\d|60)"
    r"(?:\.(\d{1,6}))?)?)?)?)?)?(?:([+-])(0\d|1[0-4])([0-5]\d))?",
    re.ASCII,
)
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def normal(vr: str, value: Any) -> str | float | None:
    """One value of DICOM JSON in the form in which values of that VR are equal; None if it has none.

    Text comes without spaces around it, dates as YYYYMMDD, times as HHMMSS.ffffff, names folded with
    their groups joined by "=".
    """
    if vr == "PN":
        return _person(value)
    if vr in _NUMBER_VRS:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return None
    if not isinstance(value, str):
        return None
    text = value.strip(" ")
    if vr == "DA":
        return _date(text)
    if vr == "TM":
        return _time(text, up=False)
    return text


def _date(text: str) -> str | None:
    return text.replace(".", "") if _DATE.fullmatch(text) else None  # 1999.12.31 is of ACR-NEMA


def _time(text: str, *, up: bool) -> str | None:
    found = _TIME.fullmatch(text)
    if not found:
        return None
    hour, _, minute, second, fraction = found.groups()
    full, digit = ("59", "9") if up else ("00", "0")
    return f"{hour}{minute or full}{second or full}.{(fraction or '').ljust(6, digit)}"


def _moments(text: str) -> tuple[datetime, datetime, timedelta | None] | None:
    """The first and last moment that a date-time stands for, and its offset from UTC."""
    found = _DATE_TIME.fullmatch(text)
    if not found:
        return None
    *parts, fraction, sign, hours, minutes = found.groups()
    numbers = [int(part) for part in parts if part]
    year, month, day, hour, minute, second = numbers + [1, 1, 1, 0, 0, 0][len(numbers) :]
    micro = int((fraction or "").ljust(6, "0"))
    try:
        # A leap second is the one before; the offset is told apart.
        first = datetime(year, month, day, hour, minute, min(second, 59), micro)  # noqa: DTZ001 - its offset is told apart
    except ValueError:
        return None
    last = _last(first, len(numbers), fraction or "")
    if sign is None:
        return first, last, None
    offset = timedelta(hours=int(hours), minutes=int(minutes))
    return first, last, -offset if sign == "-" else offset


def _last(first: datetime, parts: int, fraction: str) -> datetime:
    """The last moment of what begins with *first* and is told in so many parts."""
    month = first.month if parts > 1 else 12
    return first.replace(
        month=month,
        day=first.day if parts > 2 else monthrange(first.year, month)[1],
        hour=first.hour if parts > 3 else 23,
        minute=first.minute if parts > 4 else 59,
        second=first.second if parts > 5 else 59,
        microsecond=int(f"{first.microsecond:06}"[: len(fraction)].ljust(6, "9")),
    )


def _person(value: Any) -> str | None:
    """A name, folded: component groups joined by "=", neither components nor groups empty at an end."""
    if isinstance(value, Mapping):
        groups = [str(value.get(group) or "") for group in _GROUPS]
    elif isinstance(value, str):
        groups = value.split("=")
    else:
        return None
    return "=".join(group.strip(" ").rstrip("^ ").casefold() for group in groups).rstrip("=")


def name_parts(folded: str) -> list[str]:
    """The parts of a folded name, of all its groups, in their order."""
    return [part for part in re.split(r"[\^=\s]+", folded) if part]


def sound(part: str) -> str:
    """What a part of a name sounds like."""
    return part


# ── deciding ─────────────────────────────────────────────────────────────────────────────────────

_Test: TypeAlias = Callable[[Any], bool]


def matcher(keys: Sequence[Key]) -> Callable[[Mapping[str, Any]], bool]:
    """A function that tells whether a DICOM JSON object matches all *keys*."""
    tests = [
        (f"{key.tag:08X}", _test(key.vr, key.match)) for key in keys if not isinstance(key.match, Universal)
    ]

    def matches(attributes: Mapping[str, Any]) -> bool:
        for tag, test in tests:
            values = attributes.get(tag, {}).get("Value", ())
            if not any(test(value) for value in values if value is not None):
                return False
        return True

    return matches


def _test(vr: str, match: Match) -> _Test:
    """Whether one value matches."""
    if isinstance(match, Items):
        return matcher(match.keys)
    if isinstance(match, AnyOf):
        tests = [_test(vr, one) for one in match.matches]
        return lambda value: any(test(value) for test in tests)
    if isinstance(match, UIDList):
        uids = frozenset(match.values)
        return lambda value: value in uids
    if isinstance(match, Range):
        return _test_range(vr, match)
    if isinstance(match, Universal):
        return lambda _: True
    if vr == "PN":
        return _test_person(match)
    if isinstance(match, Single):
        wanted = normal(vr, match.value)
        return lambda value: normal(vr, value) == wanted
    pattern = _pattern(match.pattern)
    return lambda value: pattern.fullmatch(str(value).strip(" ")) is not None


def _pattern(text: str) -> re.Pattern[str]:
    """`*` and `?` as a regular expression whose time is linear in the number of stars: they are atomic."""
    return re.compile(translate(re.sub(r"\*+", "*", text).replace("[", "[[]")))


def _test_person(match: Single | Wildcard) -> _Test:
    text = match.value if isinstance(match, Single) else match.pattern
    groups = [group.strip(" ") for group in text.casefold().split("=")]
    if isinstance(match, Single):
        tests = [_equals(group.rstrip("^ ")) for group in groups]
    else:
        tests = [_fits(_pattern(group)) for group in groups]
    asked = [bool(group.strip("^ ")) for group in groups]

    def test(value: Any) -> bool:
        held = (_person(value) or "").split("=")
        if len(tests) == 1:
            return any(tests[0](group) for group in held if group)
        held += [""] * (len(tests) - len(held))
        return all(one(group) for one, group, wanted in zip(tests, held, asked, strict=False) if wanted)

    return test


def _equals(wanted: str) -> Callable[[str], bool]:
    return lambda group: group == wanted


def _fits(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    """The empty components at the end of a name may be written or not (PS3.5 section 6.2.1.1)."""
    return lambda group: any(pattern.fullmatch(group + "^" * empty) for empty in range(5))


def _test_range(vr: str, match: Range) -> _Test:
    low, high = match.low, match.high
    if vr == "DT":
        return _test_moments(low, high)

    def test(value: Any) -> bool:
        held = normal(vr, value)
        return isinstance(held, str) and (low is None or held >= low) and (high is None or held <= high)

    return test


def _test_moments(low: str | None, high: str | None) -> _Test:
    first = _moments(low) if low is not None else None
    last = _moments(high) if high is not None else None

    def test(value: Any) -> bool:
        held = _moments(value.strip(" ")) if isinstance(value, str) else None
        if held is None:
            return False
        after = first is None or held[0] - first[0] >= _apart(held[2], first[2])
        before = last is None or held[0] - last[1] <= _apart(held[2], last[2])
        return after and before

    return test


def _apart(held: timedelta | None, asked: timedelta | None) -> timedelta:
    """How much further from UTC the clock of *held* is than that of *asked*, if both are told."""
    return held - asked if held is not None and asked is not None else timedelta(0)
