"""Attribute matching (PS3.4 C.2.2.2): what a C-FIND identifier or QIDO-RS parameters ask for, and what fits.

A `Query` says at which level objects are wanted, which keys they must match and which attributes are
returned.  `matcher` decides, by the DICOM JSON of an object, whether it matches; an index may narrow the
candidates as it likes, but this decides.  So what a match is stands here and nowhere else.

Choices that the standard leaves open:

- PN matches as `names` folds it, component by component in their order, without regard to empty trailing
  ones.  A name in the query without "=" matches any component group of a name held; with "=", group by
  group, an empty one matching any.  `?` is one character of the folded name: æ is two.
- Fuzzy matching of PN is literal matching and more: a name matches if each part that is asked for is a part
  of one component group of it, or sounds like one, in any order.  A part with wildcards must fit as written.
- Numbers (IS, DS) match by value: 5 is 05.
- A time or date-time of lower precision stands for the whole period: 1015 is from 10:15:00 up to 10:16.
- Several values: the key matches if one of its values matches one of those held, whatever the VR; if multiple
  value matching is agreed, where C.2.2.2.8 has it, if each does.
- A lone "*" matches everything, in every VR.  Spaces around a value are not significant.
- A date-time with an offset from UTC and one without compare as if both were local, unless time zones are
  adjusted: then what tells no zone is in that of its entity or of its query.
- Time zones are adjusted for date-times, and for dates and times that are a pair by their keywords and both
  there; a date or time alone, and what is inside sequences, is not moved.
- Combined: ranges of a date and its time are one range if both are open at the same ends.  Single dates and
  times match each by itself, which comes to the same.

Which attributes there are says a `Model`.
"""

import re
from calendar import monthrange
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from fnmatch import translate
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import keyword_dict, keyword_for_tag

from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.elements import MAX_DEPTH
from dicomscp.dicom.names import fold, name_parts, sound
from dicomscp.errors import RefusedError


class IdentifierError(RefusedError):
    """The identifier breaks the rules of its information model, by the elements with these *tags*."""

    def __init__(self, message: str, *tags: int) -> None:
        super().__init__(message)
        self.tags = tags


class BadValueError(RefusedError):
    """A key or parameter has a value that nothing can be compared with; the message names it.

    Of an identifier it is the element with the tag in *tags*.
    """

    def __init__(self, message: str, *tags: int) -> None:
        super().__init__(message)
        self.tags = tags


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

    matches: "tuple[Single | Wildcard | Range | Fuzzy, ...]"


@dataclass(frozen=True, slots=True)
class AllOf:
    """Each of several, by whatever value (C.2.2.2.8)."""

    matches: "tuple[Single | Fuzzy, ...]"


@dataclass(frozen=True, slots=True)
class Fuzzy:
    """A name like *value*, which may have wildcards: the same parts or ones that sound so, in any order."""

    value: str


@dataclass(frozen=True, slots=True)
class Empty:
    """No value (C.2.2.2.7)."""


@dataclass(frozen=True, slots=True)
class Moments:
    """The date of the key with the time *time_tag*, as one moment from *low* to *high*; None is open."""

    time_tag: int
    low: datetime | None
    high: datetime | None


@dataclass(frozen=True, slots=True)
class Adjusted:
    """*match*, by the date, time or date-time as it reads in the query's time zone (`adjusted`)."""

    match: "Single | Range | AnyOf | Moments"


@dataclass(frozen=True, slots=True)
class Items:
    """A sequence with an item that matches all *keys*."""

    keys: "tuple[Key, ...]"


Path: TypeAlias = tuple[int, ...]
"""An attribute, behind the sequences that it is in."""

Match: TypeAlias = (
    Universal
    | Single
    | UIDList
    | Wildcard
    | Range
    | AnyOf
    | AllOf
    | Fuzzy
    | Empty
    | Moments
    | Adjusted
    | Items
)


@dataclass(frozen=True, slots=True)
class Key:
    """An attribute and what it must match; a unique key is never matched by what has no value for it."""

    tag: int
    vr: str
    match: Match
    is_unique: bool = False


@dataclass(frozen=True, slots=True)
class Zone:
    """The time zone in which a query is asked, by its *offset* from UTC.

    *local* tells the offset of entities that do not tell theirs, at a moment in their own time.
    """

    offset: timedelta
    local: Callable[[datetime], timedelta]


def _utc(_: datetime) -> timedelta:
    return timedelta(0)


@dataclass(frozen=True, slots=True)
class Query:
    """Objects of *level* that match all *keys*.

    Of each, the attributes in *returns* are given if they are known, all if it is None; those in
    *always* are given even if they are not, without a value.  *limit* None is no limit.  Of the items of
    sequences that *parts* lead into, only what they lead to is given.

    If it *matches_unknown*, an entity that has no value for a key matches it (C.2.2.1.2).  *zone* is
    that of its `Adjusted` keys, if dates and times are adjusted; *local* is the offset from UTC of what tells
    none.  If there is a query *below*, of a lower level, only entities above what matches that one match.
    """

    level: Level
    keys: tuple[Key, ...]
    returns: frozenset[int] | None
    limit: int | None
    offset: int = 0
    always: frozenset[int] = frozenset()
    parts: frozenset[Path] = frozenset()
    matches_unknown: bool = False
    zone: Zone | None = None
    local: Callable[[datetime], timedelta] = _utc
    below: "Query | None" = None


@dataclass(frozen=True, slots=True)
class Options:
    """How keys are matched beyond the rules that always hold (PS3.4 C.5.1.1, PS3.18 8.3.4)."""

    fuzzy: bool = False
    empty: bool = False
    multiple: bool = False
    combined: bool = False
    relational: bool = False
    timezone: bool = False


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
TIMEZONE = 0x00080201
STUDY_RELATED_SERIES, STUDY_RELATED_INSTANCES, SERIES_RELATED_INSTANCES = 0x00201206, 0x00201208, 0x00201209

# What headers say, by level.
_OF_HEADERS = {
    Level.PATIENT: _tags(
        "PatientName PatientID IssuerOfPatientID IssuerOfPatientIDQualifiersSequence PatientBirthDate"
        " PatientBirthTime PatientSex OtherPatientIDs OtherPatientIDsSequence OtherPatientNames EthnicGroup"
        " PatientComments"
    ),
    Level.STUDY: _tags(
        "StudyInstanceUID StudyDate StudyTime AccessionNumber IssuerOfAccessionNumberSequence StudyID"
        " StudyDescription ReferringPhysicianName PhysiciansOfRecord NameOfPhysiciansReadingStudy"
        " TimezoneOffsetFromUTC ProcedureCodeSequence AdmittingDiagnosesDescription PatientAge PatientSize"
        " PatientWeight Occupation AdditionalPatientHistory AdmissionID RequestingPhysician"
        " RequestedProcedureDescription"
    ),
    Level.SERIES: _tags(
        "SeriesInstanceUID Modality SeriesNumber SeriesDescription SeriesDescriptionCodeSequence SeriesDate"
        " SeriesTime BodyPartExamined Laterality PatientPosition ProtocolName"
        " PerformedProcedureStepStartDate PerformedProcedureStepStartTime PerformedProcedureStepEndDate"
        " PerformedProcedureStepEndTime PerformedProcedureStepID PerformedProcedureStepDescription"
        " RequestAttributesSequence PerformingPhysicianName OperatorsName Manufacturer ManufacturerModelName"
        " StationName DeviceSerialNumber SoftwareVersions InstitutionName InstitutionalDepartmentName"
    ),
    Level.IMAGE: _tags(
        "SOPInstanceUID SOPClassUID InstanceNumber AvailableTransferSyntaxUID ImageType InstanceCreationDate"
        " InstanceCreationTime AcquisitionDate AcquisitionTime AcquisitionDateTime AcquisitionNumber"
        " ContentDate ContentTime NumberOfFrames Rows Columns BitsAllocated ConceptNameCodeSequence"
        " CompletionFlag VerificationFlag DocumentTitle ContentLabel ContentDescription"
        " PresentationCreationDate PresentationCreationTime ContentCreatorName"
    ),
}
_COMPUTED = {
    Level.PATIENT: frozenset({PATIENT_RELATED_STUDIES, PATIENT_RELATED_SERIES, PATIENT_RELATED_INSTANCES}),
    Level.STUDY: frozenset(
        {MODALITIES_IN_STUDY, SOP_CLASSES_IN_STUDY, STUDY_RELATED_SERIES, STUDY_RELATED_INSTANCES}
    ),
    Level.SERIES: frozenset({SERIES_RELATED_INSTANCES}),
    Level.IMAGE: frozenset[int](),
}
_OF_EVERY_LEVEL = frozenset({INSTANCE_AVAILABILITY, RETRIEVE_URL})  # but that of the patient

# PS3.4 tables C.6-1 to C.6-5.
_UNIQUE = {
    Level.PATIENT: PATIENT_ID,
    Level.STUDY: STUDY_UID,
    Level.SERIES: SERIES_UID,
    Level.IMAGE: SOP_UID,
}
_REQUIRED = {
    Level.PATIENT: _tags("PatientName"),
    Level.STUDY: _tags("StudyDate StudyTime AccessionNumber StudyID"),
    Level.SERIES: _tags("Modality SeriesNumber"),
    Level.IMAGE: _tags("InstanceNumber"),
}
# They govern the request or the response, and are never matched.
_CONTROL = frozenset({0x00080005, 0x00080052, 0x00080053, 0x00080054, 0x00080201})
_BULK_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})


class Model:
    """The attributes that entities of each level have, are matched by and returned with.

    They are those of the standard's tables and more that come from headers: optional keys, all of which
    are supported as required ones are (PS3.4 C.2.2.1.3).  Numbers of related entities, modalities and SOP
    classes in the study, availability and URLs are computed.
    """

    def __init__(self, extra: Mapping[Level, Iterable[int]] = MappingProxyType({})) -> None:
        """*extra* are further attributes of headers at some levels, each as `header_tag` gives it."""
        self.extra = {level: frozenset(extra.get(level, ())) for level in Level}
        self._own = {level: _OF_HEADERS[level] | self.extra[level] for level in Level}
        self._level_of = {tag: level for level in Level for tag in self._own[level] | _COMPUTED[level]}
        self._supported = {level: self._down_to(level) for level in Level}
        self.study_tags = self._own[Level.PATIENT] | self._own[Level.STUDY]
        """Attributes of a study and of its patient, out of headers."""
        self.series_tags = self._own[Level.SERIES]
        """Attributes of a series, out of headers."""
        self.instance_tags = self._own[Level.IMAGE]
        """Attributes of an instance, out of its header."""
        self.index_tags = self.study_tags | self.series_tags | self.instance_tags
        """What an index needs of each header."""

    def supported(self, level: Level) -> frozenset[int]:
        """What entities of *level* are matched by and returned with, that of the levels above with it."""
        return self._supported[level]

    def level_of(self, tag: int) -> Level | None:
        """The level that has the attribute, if one alone has it."""
        return self._level_of.get(tag)

    def unique(self, level: Level) -> int:
        """The unique key of *level*."""
        return _UNIQUE[level]

    def required(self, level: Level) -> frozenset[int]:
        """The required keys of *level* itself."""
        return _REQUIRED[level]

    def optional(self, level: Level) -> frozenset[int]:
        """The optional keys of *level* itself that come from headers, the extra ones with them."""
        return self._own[level] - _REQUIRED[level] - {_UNIQUE[level]}

    def computed(self, level: Level) -> frozenset[int]:
        """The optional keys of *level* itself that are computed."""
        return _COMPUTED[level] | (_OF_EVERY_LEVEL if level is not Level.PATIENT else frozenset())

    def _down_to(self, level: Level) -> frozenset[int]:
        above = _ORDER[: _ORDER.index(level) + 1]
        known = frozenset(tag for tag, of in self._level_of.items() if of in above)
        return known if level is Level.PATIENT else known | _OF_EVERY_LEVEL


_ORDER = tuple(Level)
STANDARD = Model()
"""What is known without any configuration; documents are made of it alone."""
STUDY_TAGS, SERIES_TAGS, INSTANCE_TAGS = STANDARD.study_tags, STANDARD.series_tags, STANDARD.instance_tags


def header_tag(name: str) -> int:
    """The attribute that *name*, a keyword or eight hex digits, means: one that can be asked for in addition.

    Raises BadValueError if there is none of that name in a dataset, if it is known already, or if nothing
    can be compared with it: bulk data, and values whose VR depends on other elements.
    """
    tag = int(name, 16) if re.fullmatch("[0-9A-Fa-f]{8}", name) else keyword_dict.get(name, 0)
    vr = public_vr(tag)
    if not name or not tag & 0xFFFF or tag >> 16 < 8 or tag >> 16 & 1 or tag not in DicomDictionary:
        raise BadValueError(f"{_shown(name)} is no attribute of the standard, by keyword or eight hex digits")
    if STANDARD.level_of(tag) or tag in _CONTROL | _OF_EVERY_LEVEL:
        raise BadValueError(f"{_shown(name)} is known already")
    if len(vr) > 2 or vr in _BULK_VRS:
        raise BadValueError(f"{_shown(name)} is of VR {vr}, with which nothing is compared")
    return tag


# ── C-FIND ───────────────────────────────────────────────────────────────────────────────────────

Identifier: TypeAlias = Mapping[int, tuple[str, Sequence[Any]]]
"""VR and values of each element: text, or for SQ the items, which are identifiers."""

_QUERY_LEVEL = 0x00080052


def query_from_identifier(
    identifier: Identifier,
    *,
    root: Literal["PATIENT", "STUDY"],
    model: Model = STANDARD,
    options: Options = Options(),
    matches_unknown: bool = False,
    local: Callable[[datetime], timedelta] = _utc,
) -> Query:
    """The query that a C-FIND identifier makes, in the Patient Root or Study Root information model.

    Baseline behaviour (PS3.4 C.4.1.3.1.1): the unique key of every level above has one value, and no
    key of a level below has any.  Optional keys of the levels above are matched as well; an attribute
    that is not supported is as if it were not there.  A *relational* query may have any keys (C.4.1.3.2):
    if some are of levels below, the query has one *below* that has all of them.

    *local* is the offset from UTC of what tells no time zone of its own.  Raises IdentifierError for what
    the model does not allow, BadValueError for a value that cannot be compared.

    Returned always are the keys that are supported, and the unique keys down to the level.
    """
    level = _level_of(identifier, root)
    levels = _ORDER[0 if root == "PATIENT" else 1 : _ORDER.index(level) + 1]
    zone = _zone(identifier, local) if options.timezone else None
    keys = _identifier_keys(identifier, root, model, options=options, zone=zone, local=local)
    above = tuple(key for key in keys if key.tag in model.supported(level))
    if not options.relational:
        _check_hierarchy(levels, {key.tag: key for key in above}, [key for key in keys if key not in above])
    always = model.supported(level) & ({_UNIQUE[one] for one in levels} | identifier.keys())
    returns = always | _needed_to_adjust(always if zone else _adjusted_tags(above))
    parts = frozenset(_parts(identifier)) if any(vr == "SQ" for vr, _ in identifier.values()) else frozenset()
    query = Query(
        level,
        above,
        returns,
        None,
        always=always,
        parts=parts,
        matches_unknown=matches_unknown,
        zone=zone,
        local=local,
    )
    return query if len(above) == len(keys) else replace(query, below=_below(keys, model, query))


def _identifier_keys(
    identifier: Identifier,
    root: str,
    model: Model,
    *,
    options: Options,
    zone: Zone | None,
    local: Callable[[datetime], timedelta],
) -> tuple[Key, ...]:
    # Study Root has no patients: what identifies them is an attribute like others (C.3.2).
    unique = {PATIENT_ID} if root == "PATIENT" else set()
    control = _CONTROL if options.timezone else _CONTROL - {TIMEZONE}  # C.2.2.2
    found = []
    for tag, (_, values) in identifier.items():
        if model.level_of(tag) and tag not in control:
            try:
                match = _match(_name(tag), tag, public_vr(tag), values, options)
            except BadValueError as error:
                raise BadValueError(str(error), tag) from error
            if not isinstance(match, Universal):
                found.append(Key(tag, public_vr(tag), match, tag in unique))
    keys = tuple(found)
    if options.combined:
        keys = _combined(keys, {tag: str(values[0]) for tag, (_, values) in identifier.items() if values})
    return tuple(_adjusting(key, zone, local) for key in keys)


def _below(keys: tuple[Key, ...], model: Model, query: Query) -> Query:
    """What at the lowest level of *keys* matches all of them, with what identifies entities of *query*."""
    lowest = max((model.level_of(key.tag) or query.level for key in keys), key=_ORDER.index)
    returns = identity_tags(query.level) | _needed_to_adjust(_adjusted_tags(keys))
    return replace(query, level=lowest, keys=keys, returns=returns, always=frozenset(), parts=frozenset())


def may_be_unknown(query: Query) -> bool:
    """Whether there may be entities that match only because what is asked for is not known of them."""
    known = {STUDY_UID, SERIES_UID, SOP_UID, SOP_CLASS_UID}
    return query.matches_unknown and any(not key.is_unique and key.tag not in known for key in query.keys)


def identity_tags(level: Level) -> frozenset[int]:
    """The attributes that tell entities of *level* apart, in the whole of an archive."""
    if level is Level.PATIENT:
        return _tags("PatientID IssuerOfPatientID PatientName PatientBirthDate")
    return frozenset(_UNIQUE[one] for one in _ORDER[1 : _ORDER.index(level) + 1])


def identity_keys(level: Level, found: Mapping[str, Any]) -> tuple[Key, ...]:
    """Keys that the entity of *level* matches that *found*, with its `identity_tags`, is of or below.

    Patients without ID are told apart by name and birth date: of those that match, one that has more groups
    in its name is another, and has other keys.
    """
    tags = identity_tags(level)
    if level is Level.PATIENT:
        known = bool(_values(found, f"{PATIENT_ID:08X}"))
        by_id = _tags("PatientID IssuerOfPatientID")
        tags = by_id if known else tags - _tags("IssuerOfPatientID")
    vrs = {tag: public_vr(tag) for tag in sorted(tags)}
    return tuple(Key(tag, vr, _equal_to(vr, _values(found, f"{tag:08X}"))) for tag, vr in vrs.items())


def _equal_to(vr: str, values: Sequence[Any]) -> Match:
    if not values:
        return Empty()
    if vr != "PN":
        return Single(str(values[0]))
    groups = (_person(values[0]) or "").split("=")
    return Single("=".join(groups + [""] * (len(_GROUPS) - len(groups))))


def _level_of(identifier: Identifier, root: str) -> Level:
    _, values = identifier.get(_QUERY_LEVEL, ("CS", ()))
    text = str(values[0]).strip() if len(values) == 1 else ""
    if text not in _ORDER:
        raise IdentifierError("Query/Retrieve Level is missing or unknown", _QUERY_LEVEL)
    level = Level(text)
    if root == "STUDY" and level is Level.PATIENT:
        raise IdentifierError("Study Root has no PATIENT level", _QUERY_LEVEL)
    return level


def _check_hierarchy(levels: Sequence[Level], keys: Mapping[int, Key], below: Sequence[Key]) -> None:
    *above, level = levels
    for one in above:
        key = keys.get(_UNIQUE[one])
        if key is None or not isinstance(key.match, Single):
            text = f"{_name(_UNIQUE[one])} must have one value at {level} level"
            raise IdentifierError(text, _UNIQUE[one])
    if below:
        tags = [key.tag for key in below]
        raise IdentifierError(f"{_name(tags[0])} is no key at {level} level", *tags)


def _parts(identifier: Identifier) -> Iterator[Path]:
    """The attributes inside sequences that are asked for; a sequence without any is asked for whole."""
    for tag, (vr, values) in identifier.items():
        for item in values if vr == "SQ" else ():
            for nested, (inner, _) in item.items():
                deeper = [(tag, *path) for path in _parts({nested: item[nested]})] if inner == "SQ" else []
                yield from deeper or [(tag, nested)]


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
        "StudyInstanceUID SeriesInstanceUID TimezoneOffsetFromUTC SeriesDescription SeriesDate SeriesTime"
        " PerformedProcedureStepStartDate PerformedProcedureStepStartTime RequestAttributesSequence"
        " NumberOfSeriesRelatedInstances"
    ),
    Level.IMAGE: _ALWAYS[Level.IMAGE]
    | _OF_EVERY_LEVEL
    | _tags(
        "StudyInstanceUID SeriesInstanceUID SOPInstanceUID SOPClassUID TimezoneOffsetFromUTC Rows Columns"
        " BitsAllocated NumberOfFrames AvailableTransferSyntaxUID"
    ),
}
_FLAGS = {"fuzzymatching": "fuzzy", "emptyvaluematching": "empty", "multiplevaluematching": "multiple"}
OPTIONS = tuple(_FLAGS)
"""The parameters of QIDO-RS that are true or false."""
_COMMA_VRS = frozenset({"UI", "CS"})  # neither can hold a comma; viewers send lists of modalities so
_LINE_VRS = frozenset({"LT", "ST", "UT", "UR"})  # a backslash is a character like any other
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_IN_PARTS = re.compile(r"\(?[0-9A-Fa-f]{4} ?, ?[0-9A-Fa-f]{4}\)?")  # (gggg,eeee), as it is printed
_LOST_PLUS = re.compile(r"(?<![- ]) (?=\d{4}(\D|$))", re.ASCII)


def query_from_parameters(
    level: Level,
    params: Iterable[tuple[str, str]],
    *,
    study_uid: str | None = None,
    series_uid: str | None = None,
    max_results: int,
    model: Model = STANDARD,
    local: Callable[[datetime], timedelta] = _utc,
) -> tuple[Query, list[str]]:
    """The query that a QIDO-RS request makes, and sentences about what of it is not done.

    *study_uid* and *series_uid* are those of the resource; without them the attributes of the levels
    above are returned too.  No more than *max_results* are asked for.  Raises BadValueError, naming the
    parameter, for a value that cannot be used and for what may be given once and is given again.

    Dates and times are matched as combined and, if (0008,0201) is among the parameters, as in that time zone
    (PS3.18 section 8.3.4.1.1); *local* is the offset from UTC of what tells none of its own.  Keys of the
    levels above are matched without their unique keys.  What is matched is returned as well.
    """
    asked = _Asked(model.supported(level))
    for name, value in params:
        asked.take(name, value)
    scope = {STUDY_UID: study_uid, SERIES_UID: series_uid}
    keys = tuple(Key(tag, "UI", Single(uid)) for tag, uid in scope.items() if uid is not None)
    always, unasked = _returned_at(level, scoped=[uid is not None for uid in scope.values()])
    whole = unasked | {path[0] for path in asked.returned if len(path) == 1}
    parts = frozenset(path for path in asked.returned if path[0] not in whole)
    keys = _combined(keys + _asked_keys(asked.keys, asked.options), asked.written)
    zone = Zone(asked.offset, local) if asked.offset is not None else None
    keys = tuple(_adjusting(key, zone, local) for key in keys)
    whole |= _needed_to_adjust(_adjusted_tags(keys))
    query = Query(
        level,
        keys,
        None if asked.everything else whole | {path[0] for path in parts},
        min(asked.numbers.get("limit", max_results), max_results),
        asked.numbers.get("offset", 0),
        always,
        frozenset() if asked.everything else parts,
        zone=zone,
        local=local,
    )
    return query, asked.warnings


def narrowed(found: dict[str, Any], parts: Iterable[Path]) -> dict[str, Any]:
    """*found*, with nothing in the items of sequences but what *parts* of them are asked for."""
    inside: dict[int, list[Path]] = {}
    for tag, *rest in parts:
        inside.setdefault(tag, []).append(tuple(rest))
    return found | {
        name: {**found[name], "Value": [_part(item, paths) for item in found[name]["Value"]]}
        for tag, paths in inside.items()
        for name in (f"{tag:08X}",)
        if "Value" in found.get(name, {})
    }


def _part(item: dict[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    wanted = {f"{path[0]:08X}" for path in paths}
    whole = {path[0] for path in paths if len(path) == 1}
    found = item if isinstance(item, dict) else {}
    kept = {name: attribute for name, attribute in found.items() if name in wanted}
    return narrowed(kept, [path for path in paths if path[0] not in whole])


def _returned_at(level: Level, *, scoped: Sequence[bool]) -> tuple[frozenset[int], frozenset[int]]:
    """What is returned known or not, and all that is returned unasked.

    Of the levels above, *scoped* says which the resource names: those are known to whoever asks.
    """
    above = [one for one, named in zip((Level.STUDY, Level.SERIES), scoped, strict=True) if not named]
    levels = [level, *(one for one in above if _ORDER.index(one) < _ORDER.index(level))]
    always = frozenset().union(*(_ALWAYS[one] for one in levels))
    return always, frozenset().union(*(_UNASKED[one] for one in levels))


class _Asked:
    """What the parameters of one request ask for, taken one by one."""

    def __init__(self, supported: frozenset[int]) -> None:
        self.keys: list[tuple[Path, str, str]] = []
        self.returned: set[Path] = set()
        self.everything = False
        self.numbers: dict[str, int] = {}
        self.offset: timedelta | None = None
        self.options = Options(combined=True, relational=True)
        self.warnings: list[str] = []
        self.written: dict[int, str] = {}  # values, by attributes that are in no sequence
        self._supported = supported
        self._seen: set[str | Path] = set()

    def take(self, name: str, value: str) -> None:
        if name == "includefield":
            for field in value.split(","):
                self._include(field.strip())
        elif name in ("limit", "offset"):
            self._once(name, name)
            self.numbers[name] = _whole_number(name, value)
        elif name in _FLAGS:
            self._once(name, name)
            self.options = replace(self.options, **{_FLAGS[name]: _truth(name, value)})
        elif path := _path(name):
            self._match(path, name, value)
        elif _IN_PARTS.fullmatch(name):
            raise BadValueError(f"{_shown(name)}: a tag is written as eight hex digits, as 00100020")
        elif name:
            self.warnings.append(f"The parameter {_shown(name)} is not supported and was ignored.")

    def _match(self, path: Path, name: str, value: str) -> None:
        """PS3.18 8.3.4.1: no attribute is repeated, under another name neither."""
        self._once(path, name)
        if path == (TIMEZONE,):
            self.offset = _zone_offset(name, value)
            return
        if path[0] in _CONTROL or path[0] not in self._supported:
            self.warnings.append(f"The attribute {_shown(name)} is not matched here and was ignored.")
            return
        self.keys.append((path, name, value))
        self.returned.add(path)
        if len(path) == 1:
            self.written[path[0]] = value

    def _include(self, field: str) -> None:
        path = _path(field)
        if field == "all":
            self.everything = True
        elif field and not path:
            self.warnings.append(f"The attribute {_shown(field)} of includefield is unknown and was ignored.")
        elif path and path[0] in self._supported:
            self.returned.add(path)  # what is of a lower level is not (10.6.3.3.1), and needs no warning

    def _once(self, what: str | Path, name: str) -> None:
        if what in self._seen:
            raise BadValueError(f"{_shown(name)} is given more than once")
        self._seen.add(what)


def _truth(name: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise BadValueError(f"{name} is true or false, not {_shown(value)}")
    return value == "true"


def _zone_offset(name: str, value: str) -> timedelta | None:
    offset = _offset(_LOST_PLUS.sub("+", value))
    if offset is None and value:
        raise BadValueError(f"{name} is an offset as +0100, not {_shown(value)}")
    return offset


def _whole_number(name: str, value: str) -> int:
    if not _NUMBER.fullmatch(value):
        raise BadValueError(f"{name} is a whole number of at most nine digits, not {_shown(value)}")
    return int(value)


def _path(name: str) -> Path:
    """The tags that *name* leads through, by keyword or eight hex digits; () if one is not known.

    And if they are more than an identifier may nest.
    """
    tags: list[int] = []
    for part in name.split("."):
        if len(tags) > MAX_DEPTH:
            return ()
        tag = int(part, 16) if re.fullmatch("[0-9A-Fa-f]{8}", part) else keyword_dict.get(part, 0)
        if not part or not tag or public_vr(tag) == "UN":  # some that are retired have no keyword
            return ()
        tags.append(tag)
    is_through_sequences = all(public_vr(tag) == "SQ" for tag in tags[:-1])
    return tuple(tags) if is_through_sequences else ()


def _asked_keys(asked: Iterable[tuple[Path, str, str]], options: Options) -> tuple[Key, ...]:
    """A key for each attribute; what is asked of one sequence must hold in one item."""
    keys: list[Key] = []
    inside: dict[int, list[tuple[Path, str, str]]] = {}
    for (tag, *rest), name, value in asked:
        vr = public_vr(tag)
        if rest:
            inside.setdefault(tag, []).append((tuple(rest), name, value))
        elif not isinstance(match := _match(name, tag, vr, _split(vr, value), options), Universal):
            keys.append(Key(tag, vr, match))
    for tag, more in inside.items():
        if nested := _asked_keys(more, options):
            keys.append(Key(tag, "SQ", Items(nested)))
    return tuple(keys)


def _split(vr: str, value: str) -> list[str]:
    if vr in _LINE_VRS:
        return [value]
    if vr == "DT":
        # An offset from UTC begins with a plus, which PS3.18 lets stand for itself and forms for a space.
        value = _LOST_PLUS.sub("+", value)
    return re.split(r"[\\,]" if vr in _COMMA_VRS else r"\\", value)


def _shown(text: str) -> str:
    return repr(text[:64])


# ── from text to match ───────────────────────────────────────────────────────────────────────────

# PS3.4 C.2.2.2.4
_WILDCARD_VRS = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
_NUMBER_VRS = frozenset({"DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"})
_MULTIPLE_VRS = frozenset({"AE", "AS", "AT", "CS", "LO", "PN", "SH", "UC"})  # C.2.2.2.8
EMPTY_VALUE = '""'
"""What asks for no value, if empty value matching is agreed (C.2.2.2.7)."""
_UID = re.compile(r"[!-\[\]-~]{1,64}")  # what can be held, PS3.5 or not
_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# What nobody asks for, and what would keep everybody else waiting.
_MOST_VALUES = 1000  # of a key, but for UIDs, which are looked up
_LONGEST_PATTERN, _MOST_STARS = 1024, 64  # of a name, if it is asked for fuzzily, too
_LONGEST_PERIOD = 100  # two DT with offsets have 53 characters


def _name(tag: int) -> str:
    return f"{keyword_for_tag(tag)} ({tag >> 16:04X},{tag & 0xFFFF:04X})".lstrip()


def _match(name: str, tag: int, vr: str, values: Sequence[Any], options: Options) -> Match:
    """What *values* of a key ask for; none, or only empty ones, ask for nothing."""
    if options.empty and list(values) == [EMPTY_VALUE]:
        return Empty()
    if vr == "SQ":
        return _items(name, values, options)
    if any(isinstance(value, Mapping) for value in values):
        raise BadValueError(f"{name} is a {vr}, not a sequence")
    texts = [text for text in (str(value).strip(" ") for value in values) if text]
    if not texts or any(set(text) == {"*"} for text in texts):
        return Universal()
    if vr == "UI":
        if bad := next((text for text in texts if not _UID.fullmatch(text) or set(text) & set("*?")), None):
            raise BadValueError(f"{name} is a UID, not {_shown(bad)}")
        return Single(texts[0]) if len(texts) == 1 else UIDList(tuple(texts))
    if len(texts) > _MOST_VALUES:
        raise BadValueError(f"{name} has more than {_MOST_VALUES} values")
    if len(texts) > 1 and options.multiple and _takes_several(tag, vr):
        if bad := next((text for text in texts if vr in _WILDCARD_VRS and set(text) & set("*?")), None):
            raise BadValueError(f"{name} is one of several values, which have no wildcards: {_shown(bad)}")
        is_fuzzy = vr == "PN" and options.fuzzy
        return AllOf(tuple(Fuzzy(_pattern_of(name, text)) if is_fuzzy else Single(text) for text in texts))
    matches = tuple(_one_match(name, vr, text, options) for text in texts)
    return matches[0] if len(matches) == 1 else AnyOf(matches)


def _takes_several(tag: int, vr: str) -> bool:
    """Whether multiple value matching is defined for the attribute (C.2.2.2.8)."""
    return vr in _MULTIPLE_VRS and tag in DicomDictionary and DicomDictionary[tag][1] != "1"


def _items(name: str, values: Sequence[Any], options: Options) -> Match:
    items: list[Identifier] = [value for value in values if isinstance(value, Mapping)]
    texts = (str(value) for value in values if not isinstance(value, Mapping))
    if bad := next((text for text in texts if text.strip(" *")), None):
        raise BadValueError(f"{name} is a sequence, which has no value of its own: {_shown(bad)}")
    if len(items) > 1:
        raise BadValueError(f"{name} has more than one item")
    keys = tuple(
        Key(tag, vr, match)
        for item in items
        for tag, (written, values) in item.items()
        for vr in (public_vr(tag) if public_vr(tag) != "UN" else written,)
        for match in (_match(_name(tag), tag, vr, values, options),)
        if not isinstance(match, Universal)
    )
    return Items(keys) if keys else Universal()


def _one_match(name: str, vr: str, text: str, options: Options) -> Single | Wildcard | Range | Fuzzy:
    if vr == "PN" and options.fuzzy:
        return Fuzzy(_pattern_of(name, text))
    if vr in _WILDCARD_VRS and ("*" in text or "?" in text):
        return Wildcard(_pattern_of(name, text))
    if vr in ("DA", "TM", "DT"):
        match = _range(vr, text)
        if match is None:
            raise BadValueError(f"{name} is a {vr} or a range of them, not {_shown(text)}")
        return match
    if vr in _NUMBER_VRS and normal(vr, text) is None:
        raise BadValueError(f"{name} is a number, not {_shown(text)}")
    return Single(text)


def _pattern_of(name: str, text: str) -> str:
    if len(text) > _LONGEST_PATTERN or len(re.findall(r"\*+", text)) > _MOST_STARS:
        raise BadValueError(f"{name} is longer or has more stars than any pattern: {_shown(text)}")
    return text


def _range(vr: str, text: str) -> Single | Range | None:
    """A date, or a period; None if *text* is neither."""
    if len(text) > _LONGEST_PERIOD:
        return None
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


# ── dates with their times, and time zones ───────────────────────────────────────────────────────

_TIME_OF = {
    tag: keyword_dict[f"{keyword[:-4]}Time"]
    for keyword, tag in keyword_dict.items()
    if keyword.endswith("Date")
    and public_vr(tag) == "DA"
    and public_vr(keyword_dict.get(f"{keyword[:-4]}Time", 0)) == "TM"
}
_DATE_OF = {time: date for date, time in _TIME_OF.items()}
_TIME_OF_HEX = {f"{date:08X}": f"{time:08X}" for date, time in _TIME_OF.items()}
_OFFSET = re.compile(r"([+-])(0\d|1[0-4])([0-5]\d)", re.ASCII)


def _combined(keys: tuple[Key, ...], written: Mapping[int, str]) -> tuple[Key, ...]:
    """*keys*, with one in place of those of a date and its time if both are ranges of the same form."""
    ranges = {
        key.tag: key.match for key in keys if isinstance(key.match, Range) and "-" in written.get(key.tag, "")
    }
    pairs = {
        date: time
        for date, time in _TIME_OF.items()
        if date in ranges and time in ranges and _form(ranges[date]) == _form(ranges[time])
    }
    return tuple(
        Key(key.tag, "DA", _moments_of(ranges[key.tag], ranges[pairs[key.tag]], key.tag))
        if key.tag in pairs
        else key
        for key in keys
        if key.tag not in pairs.values()
    )


def _form(match: Range) -> tuple[bool, bool]:
    return match.low is None, match.high is None


def _moments_of(dates: Range, times: Range, date_tag: int) -> Moments:
    ends = []
    for date, time in ((dates.low, times.low), (dates.high, times.high)):
        moment = _moment(date, time) if date and time else None
        if date and moment is None:
            raise BadValueError(f"{_name(date_tag)}: {date} is in no calendar", date_tag)
        ends.append(moment)
    return Moments(_TIME_OF[date_tag], *ends)


def _moment(date: str, time: str) -> datetime | None:
    """The moment of a date and a time as `normal` gives them; a leap second is the one before."""
    found = _moments(f"{date}{time}")
    return found[0] if found else None


def _zone(identifier: Identifier, local: Callable[[datetime], timedelta]) -> Zone | None:
    _, values = identifier.get(TIMEZONE, ("SH", ()))
    if not any(values):
        return None
    offset = _offset(values[0])
    if offset is None:
        text = f"{_name(TIMEZONE)} is an offset as +0100, not {_shown(str(values[0]))}"
        raise BadValueError(text, TIMEZONE)
    return Zone(offset, local)


def _offset(value: object) -> timedelta | None:
    found = _OFFSET.fullmatch(str(value).strip(" "))
    if not found:
        return None
    offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
    return -offset if found[1] == "-" else offset


def _offset_text(offset: timedelta) -> str:
    minutes = round(offset.total_seconds()) // 60
    return f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}{abs(minutes) % 60:02}"


def _adjusting(key: Key, zone: Zone | None, local: Callable[[datetime], timedelta]) -> Key:
    """*key*, of a date-time as asked for in *zone*, of a date or time that has the other, too.

    Without a zone date-times alone are moments, in the local one unless they tell theirs (C.2.2.2.5.3).
    """
    match = key.match
    is_of_pair = zone is not None and (key.tag in _TIME_OF or key.tag in _DATE_OF)
    if not isinstance(match, Single | Range | AnyOf | Moments) or not (key.vr == "DT" or is_of_pair):
        return key
    if key.vr != "DT":
        return replace(key, match=Adjusted(match))
    return replace(key, match=Adjusted(_offset_told(match, local if zone is None else lambda _: zone.offset)))


def _offset_told(
    match: "Single | Range | AnyOf | Moments", offset_at: Callable[[datetime], timedelta]
) -> "Single | Range | AnyOf | Moments":
    """A match of date-times, of which those that tell no offset tell that of their moment."""
    if isinstance(match, AnyOf):
        ranges = [_offset_told(one, offset_at) for one in match.matches if isinstance(one, Range)]
        return AnyOf(tuple(one for one in ranges if isinstance(one, Range)))
    if not isinstance(match, Range):
        return match
    return Range(*(end and _with_offset(end, offset_at) for end in (match.low, match.high)))


def _with_offset(moment: str, offset_at: Callable[[datetime], timedelta]) -> str:
    moments = _moments(moment)
    if moments is None or moments[2] is not None:
        return moment
    return moment + _offset_text(offset_at(moments[0]))


def _adjusted_tags(keys: Iterable[Key]) -> frozenset[int]:
    return frozenset(key.tag for key in keys if isinstance(key.match, Adjusted))


def _needed_to_adjust(asked: frozenset[int]) -> frozenset[int]:
    """What must be known to adjust the attributes *asked* for."""
    if not asked:
        return asked
    pairs = (_TIME_OF.get(tag, _DATE_OF.get(tag, TIMEZONE)) for tag in asked)
    return frozenset(pairs) | {TIMEZONE}


def adjusted(attributes: Mapping[str, Any], zone: Zone) -> dict[str, Any]:
    """A DICOM JSON object as it reads in *zone*: dates moved with their times, date-times that say where.

    It is in the zone that its (0008,0201) says, or else in the local one.
    """
    own = next((_offset(value) for value in _values(attributes, f"{TIMEZONE:08X}")), None)
    found = dict(attributes)
    for tag, element in attributes.items():
        if element["vr"] == "DT":
            values = [_placed(value, own, zone) for value in element.get("Value", ())]
            found[tag] = {**element, "Value": values} if values else element
        elif time_tag := _TIME_OF_HEX.get(tag):
            dates, times = _values(attributes, tag), _values(attributes, time_tag)
            if dates and times and (moved := _moved(dates[0], times[0], own, zone)):
                found[tag], found[time_tag] = (
                    {**attributes[one], "Value": [value]}
                    for one, value in zip((tag, time_tag), moved, strict=True)
                )
    return found


def _placed(value: Any, own: timedelta | None, zone: Zone) -> Any:
    if not isinstance(value, str):
        return value
    return _with_offset(value.strip(" "), zone.local if own is None else lambda _: own)


def _moved(date: Any, time: Any, own: timedelta | None, zone: Zone) -> tuple[str, str] | None:
    """A date and its time as they read in *zone*, the time as precise as it was; None if they are none."""
    day, clock = normal("DA", date), normal("TM", time)
    moment = _moment(str(day), str(clock)) if day and clock else None
    if moment is None:
        return None
    try:
        there = moment + zone.offset - (zone.local(moment) if own is None else own)
    except OverflowError:
        return None
    rest = time.strip(" ").replace(":", "")[4:]
    text = f"{there.year:04}{there.month:02}{there.day:02}"
    return text, f"{there.hour:02}{there.minute:02}{rest}"


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
        if isinstance(value, str) and not _NUMERAL.fullmatch(value.strip(" ")):
            return None  # of what Python takes for a number
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
    return "=".join(_group(group) for group in groups).rstrip("=")


def _group(text: str) -> str:
    return fold(text).strip(" ").rstrip("^ ") if text else ""


# ── deciding ─────────────────────────────────────────────────────────────────────────────────────

_Test: TypeAlias = Callable[[Any], bool]
MOST_EMPTY = 4
"""Components at the end of a name that may be written or not (PS3.5 section 6.2.1.1)."""

_NOTHING: Mapping[str, Any] = {}


def matcher(query: Query) -> Callable[[Mapping[str, Any]], bool]:
    """A function that tells whether a DICOM JSON object matches all keys of *query*.

    If they are `Adjusted`, the object needs its (0008,0201), and with a date its time.
    """
    plain = [key for key in query.keys if not isinstance(key.match, Adjusted)]
    moved = [replace(key, match=key.match.match) for key in query.keys if isinstance(key.match, Adjusted)]
    matches = _matcher(plain, unknown=query.matches_unknown)
    if not moved:
        return matches
    zone = query.zone or Zone(timedelta(0), query.local)
    matches_there = _matcher(moved, unknown=query.matches_unknown)
    return lambda attributes: matches(attributes) and matches_there(adjusted(attributes, zone))


def answerer(query: Query) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that makes of an object that was found what C-FIND answers of it.

    Of sequences that were matched only the items that match, of those only what was asked for (C.2.2.2.6);
    if time zones are adjusted, dates and times as they read in the query's, which is told (C.4.1.1.3.2).
    """
    asked = {f"{tag:08X}" for tag in query.always}
    zone = query.zone

    def answer(found: Mapping[str, Any]) -> dict[str, Any]:
        chosen = narrowed(_chosen(found, query.keys, unknown=query.matches_unknown), query.parts)
        if zone is not None:
            chosen = adjusted(chosen, zone)
        chosen = {tag: element for tag, element in chosen.items() if tag in asked}
        if zone is not None:
            chosen[f"{TIMEZONE:08X}"] = {"vr": "SH", "Value": [_offset_text(zone.offset)]}
        elif not _values(chosen, f"{TIMEZONE:08X}"):  # it is not sent without a value (C.4.1.1.3.2)
            chosen.pop(f"{TIMEZONE:08X}", None)
        return chosen

    return answer


def _chosen(found: Mapping[str, Any], keys: Sequence[Key], *, unknown: bool) -> dict[str, Any]:
    """*found*, of its sequences only the items that match."""
    chosen = dict(found)
    for key in keys:
        name = f"{key.tag:08X}"
        if isinstance(key.match, Items) and _values(found, name):
            inner = key.match.keys
            matches = _matcher(inner, unknown=unknown)
            items = [one for one in _values(found, name) if isinstance(one, Mapping) and matches(one)]
            chosen[name] = {**found[name], "Value": [_chosen(one, inner, unknown=unknown) for one in items]}
    return chosen


def _matcher(keys: Sequence[Key], *, unknown: bool) -> Callable[[Mapping[str, Any]], bool]:
    tests = [_object_test(key, unknown=unknown and not key.is_unique) for key in keys]
    return lambda attributes: all(test(attributes) for test in tests)


def _values(attributes: Mapping[str, Any], tag: str) -> list[Any]:
    """The values of an attribute that are not empty."""
    return [value for value in attributes.get(tag, {}).get("Value", ()) if value not in (None, "")]


def _object_test(key: Key, *, unknown: bool) -> Callable[[Mapping[str, Any]], bool]:
    """Whether an object matches; *unknown* is the answer if it has no value."""
    tag, match = f"{key.tag:08X}", key.match
    if isinstance(match, Empty):
        return lambda attributes: not _values(attributes, tag)
    if isinstance(match, Moments):
        return _test_combined(tag, match, unknown=unknown)
    if isinstance(match, AllOf):
        tests = [_test(key.vr, one, unknown=unknown) for one in match.matches]

        def matches_all(attributes: Mapping[str, Any]) -> bool:
            values = _values(attributes, tag)
            return all(any(map(test, values)) for test in tests) if values else unknown

        return matches_all
    test = _test(key.vr, match, unknown=unknown)

    def matches(attributes: Mapping[str, Any]) -> bool:
        """As `any` of `_values`.  Hot: entered for each candidate."""
        known = False
        for value in attributes.get(tag, _NOTHING).get("Value", ()):
            if value is not None and value != "":
                if test(value):
                    return True
                known = True
        return unknown and not known

    return matches


def _test_combined(tag: str, match: Moments, *, unknown: bool) -> Callable[[Mapping[str, Any]], bool]:
    time_tag = f"{match.time_tag:08X}"
    low, high = match.low or datetime.min, match.high or datetime.max  # noqa: DTZ901 - no zone is compared

    def matches(attributes: Mapping[str, Any]) -> bool:
        dates, times = _values(attributes, tag), _values(attributes, time_tag)
        if not dates:
            return unknown
        date = normal("DA", dates[0])
        if not times:
            day = _moment(str(date), "000000")
            return unknown and day is not None and low.date() <= day.date() <= high.date()
        moment = _moment(str(date), str(normal("TM", times[0])))
        return moment is not None and low <= moment <= high

    return matches


def _test(vr: str, match: Match, *, unknown: bool) -> _Test:
    """Whether one value matches; *unknown* is the answer if in an item there is none."""
    if isinstance(match, Items):
        matches = _matcher(match.keys, unknown=unknown)
        return lambda value: isinstance(value, Mapping) and matches(value)  # devices give it other VRs
    if isinstance(match, AnyOf):
        tests = [_test(vr, one, unknown=unknown) for one in match.matches]
        return lambda value: any(test(value) for test in tests)
    if isinstance(match, UIDList):
        uids = frozenset(match.values)
        return lambda value: value in uids
    if isinstance(match, Range):
        return _test_range(vr, match)
    if isinstance(match, Fuzzy):
        return _test_fuzzy(match.value)
    if vr == "PN" and isinstance(match, Single | Wildcard):
        return _test_person(match)
    if isinstance(match, Single):
        wanted = normal(vr, match.value)
        return lambda value: normal(vr, value) == wanted
    if isinstance(match, Wildcard):
        pattern = _pattern(match.pattern)
        return lambda value: pattern.fullmatch(str(value).strip(" ")) is not None
    return lambda _: True


def _pattern(text: str) -> re.Pattern[str]:
    """`*` and `?` as a regular expression whose time is linear in the number of stars: they are atomic."""
    return re.compile(translate(re.sub(r"\*+", "*", text).replace("[", "[[]")))


def _test_person(match: Single | Wildcard) -> _Test:
    text = match.value if isinstance(match, Single) else match.pattern
    groups = [fold(group).strip(" ") for group in text.split("=")]
    if isinstance(match, Single):
        tests = [_equals(group.rstrip("^ ")) for group in groups]
    else:
        tests = [_fits(group) for group in groups]
    asked = [bool(group.strip("^ ")) for group in groups]

    def test(value: Any) -> bool:
        held = (_person(value) or "").split("=")
        if len(tests) == 1:
            return any(tests[0](group) for group in held if group)
        held += [""] * (len(tests) - len(held))
        return all(one(group) for one, group, wanted in zip(tests, held, asked, strict=False) if wanted)

    return test


def _test_fuzzy(text: str) -> _Test:
    literal = _test_person(Wildcard(text) if set(text) & set("*?") else Single(text))
    groups = [
        [_test_part(part) for part in name_parts(fold(group)) if set(part) != {"*"}]
        for group in text.split("=")
    ]

    def test(value: Any) -> bool:
        if literal(value):
            return True
        held = [name_parts(group) for group in (_person(value) or "").split("=")]
        if len(groups) == 1:
            return bool(groups[0]) and any(_has_parts(parts, groups[0]) for parts in held)
        held += [[]] * (len(groups) - len(held))
        return any(groups) and all(
            _has_parts(parts, wanted) for parts, wanted in zip(held, groups, strict=False)
        )

    return test


def _has_parts(parts: Sequence[str], wanted: Sequence[Callable[[str], bool]]) -> bool:
    return all(any(map(test, parts)) for test in wanted)


def _test_part(wanted: str) -> Callable[[str], bool]:
    if set(wanted) & set("*?"):
        pattern = _pattern(wanted)
        return lambda part: pattern.fullmatch(part) is not None
    heard = sound(wanted)
    return lambda part: part == wanted or sound(part) == heard


def _equals(wanted: str) -> Callable[[str], bool]:
    return lambda group: group == wanted


def _fits(wanted: str) -> Callable[[str], bool]:
    """The empty components at the end of a name may be written or not (PS3.5 section 6.2.1.1)."""
    pattern = _pattern(wanted)
    if wanted.endswith("*"):  # what fits with some of them fits with all
        return lambda group: pattern.fullmatch(group + "^" * MOST_EMPTY) is not None
    return lambda group: any(pattern.fullmatch(group + "^" * empty) for empty in range(MOST_EMPTY + 1))


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
