"""What is asked, and what the standard says is found: one table for C-FIND and QIDO-RS.

Each row begins with its clause.  One that names no part is of PS3.4, whose rules PS3.18 section 8.3.4.1.1
takes over for QIDO-RS.  QUESTIONS are asked of every backend by both protocols, by every client that can ask
them; SEARCHES are what QIDO-RS alone has; NEGOTIATIONS and CONTEXTS are what is agreed before.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.conformance.held import (
    ADDED_KEY,
    ALL,
    ALL_SERIES,
    CT,
    LONG,
    LONG_INSTANCES,
    MAX_RESULTS,
    MR,
    NAMELESS,
    NEWEST_FIRST,
    SR,
    instances_of,
    uid,
)

UTF_8 = "ISO_IR 192"
C_FIND, QIDO_RS = ("C-FIND",), ("QIDO-RS",)
SUCCESS, CANCELLED, OUT_OF_RESOURCES, NOT_OF_THE_MODEL = 0x0000, 0xFE00, 0xA700, 0xA900  # table C.4-1
PENDING, PENDING_WITH_WARNING = 0xFF00, 0xFF01
HTTP = {SUCCESS: 200, OUT_OF_RESOURCES: 200, NOT_OF_THE_MODEL: 400}
MODELS = {
    "PATIENT": "1.2.840.10008.5.1.4.1.2.1.1",
    "STUDY": "1.2.840.10008.5.1.4.1.2.2.1",
    "PATIENT/STUDY": "1.2.840.10008.5.1.4.1.2.3.1",
}
UNIQUE = {
    "PATIENT": "PatientID",
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}


class Options(NamedTuple):
    """What extended negotiation grants and parameters ask for."""

    relational: bool = False
    combined: bool = False
    fuzzy: bool = False
    timezone: bool = False
    empty: bool = False
    multiple: bool = False


NO_OPTIONS = Options()
_RELATIONAL, _COMBINED, _FUZZY = Options(relational=True), Options(combined=True), Options(fuzzy=True)
_TIMEZONE, _EMPTY, _MULTIPLE = Options(timezone=True), Options(empty=True), Options(multiple=True)


@dataclass(frozen=True)
class Question:
    """A row: *keys*, by keyword or dotted path, at *level*, and the names of what is found.

    By C-FIND what has no value for a key is found too (C.2.2.1.2): *unknown*, behind what has one.  *found*
    None is whatever is found.  *answers* are attributes of some of what is found, which are asked for as
    well; *has* are asked for and answered, with or without a value, and *lacks* are asked for and not
    answered.  *status* is the last one of C-FIND, and *pending* those before.  A refusal is of *offending*
    attributes, which the problem of an HTTP response names too.

    *root*, *charset*, in which is asked, *labelled*, in which is answered ("": in plain ASCII), and *cancel*,
    after so many responses, are of C-FIND.
    """

    clause: str
    keys: dict[str, str]
    found: tuple[str, ...] | None = ()
    level: str = "STUDY"
    options: Options = NO_OPTIONS
    unknown: tuple[str, ...] = (NAMELESS,)
    protocols: tuple[str, ...] = (*C_FIND, *QIDO_RS)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    status: int = SUCCESS
    pending: int = PENDING
    offending: tuple[str, ...] = ()
    root: str = "STUDY"
    charset: str = UTF_8
    labelled: str | None = None
    cancel: int = 0
    clients: tuple[str, ...] | None = None  # those that can ask so, if not all can

    @property
    def returns(self) -> set[str]:
        """What is asked for only to be returned."""
        answered = {keyword for answer in self.answers.values() for keyword in answer}
        return {*answered, *self.has, *self.lacks} - self.keys.keys()


def _patients(clause: str, keys: dict[str, str], found: tuple[str, ...] = (), **others: Any) -> Question:
    return Question(clause, keys, found, **{"root": "PATIENT", "protocols": C_FIND, "unknown": (), **others})


def _series_of(study: str) -> dict[str, str]:
    return {"StudyInstanceUID": uid(study)}


def _instances_of(study: str, series: str) -> dict[str, str]:
    return {"StudyInstanceUID": uid(study), "SeriesInstanceUID": uid(series)}


def _refused(clause: str, keys: dict[str, str], *offending: str, **others: Any) -> Question:
    return Question(clause, keys, None, status=NOT_OF_THE_MODEL, offending=offending, **others)


_JOHN_CT = _instances_of("john", "john-ct")
_REQUEST = "RequestAttributesSequence"
_STEP, _PROCEDURE = f"{_REQUEST}.ScheduledProcedureStepID", f"{_REQUEST}.RequestedProcedureID"
_ITEMS = [
    {
        "RequestedProcedureDescription": text,
        "ScheduledProcedureStepID": f"STEP{n}",
        "RequestedProcedureID": f"PROC{n}",
    }
    for n, text in ((1, "head"), (2, "neck"))
]
_REQUIRED = ("StudyDate", "StudyTime", "AccessionNumber", "PatientName", "PatientID", "StudyID")
_MANY_UIDS = "\\".join([*(f"1.2.3.{n}" for n in range(600)), uid("john"), uid("hong")])
_OTHER_NAMES = tuple(n for n in ALL if n != "john")
_WITHOUT_REQUEST = tuple(name for name in ALL_SERIES if name != "joerg-ct")
_IN_UTC = {"TimezoneOffsetFromUTC": "+0000"}

_MATCHING = (
    # Single value
    Question("C.2.2.2.1 equal", {"PatientID": "P1"}, ("john", "john-again")),
    Question("C.2.2.2.1 case counts", {"AccessionNumber": "acc1"}, ("joerg",)),
    Question("C.2.2.2.1 case counts in descriptions", {"StudyDescription": "CHEST FOLLOW UP"}, ()),
    Question("C.2.2.2.1 no part of a value", {"PatientID": "P"}, ()),
    Question(
        "C.2.2.2.1 spaces around do not count", {"StudyDescription": " chest follow up "}, ("john-again",)
    ),
    Question(
        "C.2.2.2.1 two keys are both to match",
        {"PatientID": "P1", "AccessionNumber": "ACC2"},
        ("john-again",),
    ),
    Question("C.2.2.2.1 an optional key", {"PatientSex": "M"}, ("john", "john-again", "joerg")),
    Question("C.2.2.2.1 a physician is a name too", {"ReferringPhysicianName": "HOUSE^GREGORY"}, ("john",)),
    Question("C.2.2.2.1 a date", {"StudyDate": "20240115"}, ("john",)),
    Question(
        "C.2.2.2.1 a number by its value",
        {**_series_of("john"), "SeriesNumber": "02"},
        ("john-ct",),
        level="SERIES",
        unknown=(),
    ),
    Question("C.2.2.2.1.3 a time by its meaning", {"StudyTime": "083000"}, ("john-again",)),
    Question("C.2.2.2.1.3 a time of lower precision is a period", {"StudyTime": "1015"}, ("john", "zhang")),
    Question(
        "C.2.2.2.1.3 a date-time by its meaning",
        {**_JOHN_CT, "AcquisitionDateTime": "20240115011630.0000+0000"},
        ("john-ct-2",),
        level="IMAGE",
        unknown=(),
    ),
    Question(
        "C.2.2.2.1.3 a date-time of lower precision is a period, without offset a local one",
        {**_JOHN_CT, "AcquisitionDateTime": "202401151016"},
        ("john-ct-2",),
        level="IMAGE",
        unknown=(),
    ),
    # Names
    Question("C.2.2.2.1.1 case does not count", {"PatientName": "smith^john"}, ("john",)),
    Question("C.2.2.2.1.1 accents do not count", {"PatientName": "MULLER^JORG"}, ("joerg",)),
    Question("C.2.2.2.1.1 nor in the question", {"PatientName": "smïth^jöhn"}, ("john",)),
    Question("C.2.2.2.1.1 positions count", {"PatientName": "John^Smith"}, ()),
    Question("C.2.2.2.1.1 empty components at the end do not", {"PatientName": "Smith^John^^^"}, ("john",)),
    Question("C.2.2.2.1.1 Greek letters by their meaning", {"PatientName": "ΔΙΟΝΥΣΙΟΣ"}, ("dionysios",)),
    Question("C.2.2.2.1.1 Cyrillic ones too", {"PatientName": "достоевский^федор"}, ("fyodor",)),
    Question("C.2.2.2.1.1 halfwidth and fullwidth", {"PatientName": "ヤマダ^ハナコ"}, ("halfwidth",)),
    # Lists of UIDs
    Question(
        "C.2.2.2.2 one of them",
        {"StudyInstanceUID": f"{uid('john')}\\{uid('hong')}\\1.2.3"},
        ("john", "hong"),
        unknown=(),
    ),
    Question("C.2.2.2.2 of more than 500", {"StudyInstanceUID": _MANY_UIDS}, ("john", "hong"), unknown=()),
    # Universal
    Question("C.2.2.2.3 zero length", {"PatientName": ""}, ALL, unknown=()),
    Question("C.2.2.2.3 a star", {"PatientName": "*"}, ALL, unknown=()),
    Question("C.2.2.2.3 a star in a VR without wildcards", {"StudyDate": "*"}, ALL, unknown=()),
    Question(
        "C.2.2.2.3 each required key of studies",
        dict.fromkeys(_REQUIRED, ""),
        ALL,
        unknown=(),
        answers={
            "john": {
                "StudyDate": "20240115",
                "StudyTime": "101530",
                "AccessionNumber": "ACC1",
                "PatientName": "SMITH^JOHN",
                "PatientID": "P1",
                "StudyID": "S1",
            },
            # C.2.2.1.2: without a value, and there
            NAMELESS: dict.fromkeys(_REQUIRED, ""),
        },
    ),
    Question(
        "C.2.2.2.3 each required key of series",
        {**_series_of("john"), "Modality": "", "SeriesNumber": ""},
        ("john-ct", "john-mr"),
        level="SERIES",
        unknown=(),
        answers={"john-mr": {"Modality": "MR", "SeriesNumber": "10"}},
    ),
    Question(
        "C.2.2.2.3 each required key of instances",
        {**_JOHN_CT, "InstanceNumber": ""},
        instances_of("john-ct", 3),
        level="IMAGE",
        unknown=(),
        answers={"john-ct-3": {"InstanceNumber": "3"}},
    ),
    # Wild cards
    Question("C.2.2.2.4 at the end", {"PatientName": "smith*"}, ("john", "john-again")),
    Question("C.2.2.2.4 in front", {"PatientName": "*john"}, ("john",)),
    Question("C.2.2.2.4 on both sides", {"PatientName": "*ill*"}, ()),
    Question("C.2.2.2.4 on both sides of accents", {"PatientName": "*üll*"}, ("joerg",)),
    Question(
        "C.2.2.2.4 one character",
        {"PatientID": "P?"},
        ("john", "john-again", "joerg", "yamada", "hong", "zhang", "dionysios", "fyodor"),
    ),
    Question("C.2.2.2.4 no character", {"AccessionNumber": "ACC1*"}, ("john",)),
    Question("C.2.2.2.4 case counts", {"StudyDescription": "chest*"}, ("john-again",)),
    Question(
        "C.2.2.2.4 brackets and percent signs mean themselves", {"StudyDescription": "*[100%]*"}, ("john",)
    ),
    Question(
        "C.2.2.2.4 in a code string",
        {**_series_of("john"), "BodyPartExamined": "HE?D"},
        ("john-mr",),
        level="SERIES",
        unknown=(),
    ),
    Question("C.2.2.2.4 ideographic", {"PatientName": "山*"}, ("yamada", "halfwidth")),
    Question("C.2.2.2.4 in Hangul", {"PatientName": "*길동"}, ("hong",)),
    Question(
        "C.2.2.2.4 not in an AS, in which they are characters",
        {"PatientAge": "05?Y"},
        (),
        unknown=_OTHER_NAMES,
    ),
    _refused("C.2.2.2.4 not in a UI", {"StudyInstanceUID": f"{uid('john')[:-1]}*"}, "StudyInstanceUID"),
    _refused("C.2.2.2.4 not in a DA", {"StudyDate": "2024*"}, "StudyDate"),
    _refused("C.2.2.2.4 not in a TM", {"StudyTime": "10*"}, "StudyTime"),
    _refused(
        "C.2.2.2.4 not in an IS",
        {**_series_of("john"), "SeriesNumber": "1*"},
        "SeriesNumber",
        level="SERIES",
        clients=("findscu", "dicomweb-client"),  # the others write numbers alone
    ),
    # Ranges
    Question(
        "C.2.2.2.5.1 from to, both included", {"StudyDate": "20240115-20240116"}, ("john", "john-again")
    ),
    Question("C.2.2.2.5.1 until", {"StudyDate": "-20221229"}, ("qabbani", "sharon")),
    Question("C.2.2.2.5.1 from", {"StudyDate": "20240116-"}, ("john-again", "joerg")),
    Question("C.2.2.2.5.2 times", {"StudyTime": "083000-101530"}, ("john", "john-again", "zhang")),
    Question("C.2.2.2.5.2 until", {"StudyTime": "-0700"}, ("hong", "dionysios")),
    Question("C.2.2.2.5.2 from", {"StudyTime": "2000-"}, ("joerg", "qabbani", "sharon")),
    Question(
        "C.2.2.2.5.3 from to, by their offsets",
        {**_JOHN_CT, "AcquisitionDateTime": "20240115011600+0000-20240115021630+0100"},
        ("john-ct-2",),
        level="IMAGE",
        unknown=(),
    ),
    Question(
        "C.2.2.2.5.3 from to, local",
        {**_JOHN_CT, "AcquisitionDateTime": "20240115101530.5-20240115101630"},
        ("john-ct-1", "john-ct-2"),
        level="IMAGE",
        unknown=(),
    ),
    Question(
        "C.2.2.2.5.3 until, of which a date is the whole day",
        {**_JOHN_CT, "AcquisitionDateTime": "-20240115"},
        instances_of("john-ct", 3),
        level="IMAGE",
        unknown=(),
    ),
    Question(
        "C.2.2.2.5.3 from, west of UTC",
        {**_JOHN_CT, "AcquisitionDateTime": "20240114201730-0500-"},
        ("john-ct-3",),
        level="IMAGE",
        unknown=(),
    ),
    Question(
        "C.2.2.2.5.4 date and time apart",
        {"StudyDate": "20240115-20240116", "StudyTime": "0900-1100"},
        ("john",),
        protocols=C_FIND,
    ),
    Question(
        "C.2.2.2.5.4 combined",
        {"StudyDate": "20240115-20240116", "StudyTime": "1000-0900"},
        ("john", "john-again"),
        options=_COMBINED,
    ),
    Question(
        "C.2.2.2.5.4 combined, from",
        {"StudyDate": "20240115-", "StudyTime": "101530-"},
        ("john", "john-again", "joerg"),
        options=_COMBINED,
    ),
    # Sequences
    Question(
        "C.2.2.2.6 in one item, which is answered with what was asked for",
        {**_series_of("joerg"), _STEP: "STEP2", _PROCEDURE: "PROC2"},
        ("joerg-ct",),
        level="SERIES",
        unknown=("joerg-sr",),
        protocols=C_FIND,
        answers={
            "joerg-ct": {_REQUEST: [{"ScheduledProcedureStepID": "STEP2", "RequestedProcedureID": "PROC2"}]}
        },
    ),
    Question(
        "C.2.2.2.6, PS3.18 10.6.3.3 in one item; all are answered",
        {**_series_of("joerg"), _STEP: "STEP2", _PROCEDURE: "PROC2"},
        ("joerg-ct",),
        level="SERIES",
        protocols=QIDO_RS,
        answers={"joerg-ct": {_REQUEST: _ITEMS}},
    ),
    Question(
        "C.2.2.2.6 not in two",
        {**_series_of("joerg"), _STEP: "STEP1", _PROCEDURE: "PROC2"},
        (),
        level="SERIES",
        unknown=("joerg-sr",),
    ),
    Question(
        "C.2.2.2.6 wild cards in items",
        {**_series_of("joerg"), _STEP: "*1"},
        ("joerg-ct",),
        level="SERIES",
        unknown=("joerg-sr",),
    ),
    Question(
        "C.2.2.2.6 without items: universal, and answered whole",
        {**_series_of("joerg"), _REQUEST: ""},
        ("joerg-ct", "joerg-sr"),
        level="SERIES",
        unknown=(),
        answers={"joerg-ct": {_REQUEST: _ITEMS}},
    ),
    Question(
        "C.2.2.2.6 of all series",
        {_STEP: "STEP2"},
        ("joerg-ct",),
        level="SERIES",
        options=_RELATIONAL,
        unknown=_WITHOUT_REQUEST,
    ),
    # Empty value
    Question("C.2.2.2.7", {"PatientName": '""'}, (NAMELESS,), options=_EMPTY, unknown=()),
    Question(
        "C.2.2.2.7 of an attribute that many lack",
        {"StudyID": '""'},
        _OTHER_NAMES,
        options=_EMPTY,
        unknown=(),
    ),
    Question("C.2.2.2.7 without being agreed on it is a value", {"PatientName": '""'}, ()),
    # Several values
    Question(
        "C.2.2.3 one of those held, and all are returned",
        {"ModalitiesInStudy": "MR"},
        ("john", "yamada"),
        unknown=(),
        answers={"john": {"ModalitiesInStudy": ["CT", "MR"]}},
    ),
    Question(
        "C.2.2.2.8 without being agreed on any of several will do, as declared",
        {"ModalitiesInStudy": "MR\\US"},
        ("john", "john-again", "yamada"),
        unknown=(),
    ),
    Question(
        "C.2.2.2.8 all of several", {"ModalitiesInStudy": "MR\\CT"}, ("john",), options=_MULTIPLE, unknown=()
    ),
    _refused(
        "C.2.2.2.8 without wild cards",
        {"ModalitiesInStudy": "M*\\CT"},
        "ModalitiesInStudy",
        options=_MULTIPLE,
    ),
    # Fuzzy, C.2.2.2.1.1
    Question(
        "C.2.2.2.1.1 fuzzy: by sound", {"PatientName": "Smyth^Jon"}, ("john", "john-again"), options=_FUZZY
    ),
    Question("C.2.2.2.1.1 fuzzy: in any order", {"PatientName": "Jörg Müller"}, ("joerg",), options=_FUZZY),
    Question(
        "C.2.2.2.1.1 fuzzy: literal names too",
        {"PatientName": "SMITH^JOHN"},
        ("john", "john-again"),
        options=_FUZZY,
    ),
    Question(
        "C.2.2.2.1.1 fuzzy: other scripts as they are",
        {"PatientName": "太郎^山田"},
        ("yamada",),
        options=_FUZZY,
    ),
    Question("C.2.2.2.1.1 without being agreed on: not by sound", {"PatientName": "Smyth^Jon"}, ()),
    # Time zones
    Question(
        "C.2.2.2.1.3 a time zone: what tells none is local",
        {**_IN_UTC, "StudyDate": "20240115", "StudyTime": "0115"},
        ("john",),
        options=_TIMEZONE,
        protocols=C_FIND,
        answers={"john": {**_IN_UTC, "StudyDate": "20240115", "StudyTime": "011530"}},
    ),
    Question(
        "PS3.18 8.3.4.1.1 a time zone; answered as it was received",
        {**_IN_UTC, "StudyDate": "20240115", "StudyTime": "0115"},
        ("john",),
        protocols=QIDO_RS,
        answers={"john": {"StudyDate": "20240115", "StudyTime": "101530"}},
    ),
    Question(
        "C.2.2.2.1.3 over midnight",
        {**_IN_UTC, "StudyDate": "20230630"},
        ("yamada", "hong"),
        options=_TIMEZONE,
    ),
    Question(
        "C.2.2.2.1.3 what tells its own is in that",
        {**_IN_UTC, "StudyDate": "20221231"},
        ("fyodor",),
        options=_TIMEZONE,
    ),
    Question(
        "C.2.2.2.5.2 times and midnight are those of the time zone",
        {**_IN_UTC, "StudyTime": "-0100"},
        ("fyodor",),
        options=_TIMEZONE,
    ),
    Question(
        "C.2.2.2.5.4 combined, in a time zone",
        {**_IN_UTC, "StudyDate": "20240115-20240115", "StudyTime": "0115-2330"},
        ("john", "john-again"),
        options=Options(timezone=True, combined=True),
    ),
    Question(
        "C.2.2.2.5.3 date-times of no offset in a time zone",
        {**_IN_UTC, **_JOHN_CT, "AcquisitionDateTime": "20240115011600-20240115011700"},
        ("john-ct-2",),
        level="IMAGE",
        options=_TIMEZONE,
        unknown=(),
    ),
    Question(
        "C.2.2.2 without being agreed on the time zone is a key",
        {"TimezoneOffsetFromUTC": "-0500"},
        ("fyodor",),
        unknown=tuple(name for name in ALL if name != "fyodor"),
        protocols=C_FIND,
    ),
    # Values that nothing can equal
    _refused("PS3.5 6.2 no date", {"StudyDate": "20241301"}, "StudyDate"),
    _refused("PS3.5 6.2 a range of which one end is none", {"StudyDate": "20240115-2024"}, "StudyDate"),
    _refused("PS3.5 6.2 no time", {"StudyTime": "2500"}, "StudyTime"),
    _refused(
        "PS3.5 6.2 no date-time",
        {**_JOHN_CT, "AcquisitionDateTime": "yesterday"},
        "AcquisitionDateTime",
        level="IMAGE",
    ),
    _refused(
        "C.2.2.2.6 text for a sequence",
        {**_series_of("joerg"), _REQUEST: "STEP2"},
        _REQUEST,
        level="SERIES",
        clients=("pynetdicom", "dicomweb-client"),  # DCMTK and dcmjs-dimse cannot write it
    ),
    _refused(
        "PS3.5 6.2 no number",
        {**_series_of("john"), "SeriesNumber": "two"},
        "SeriesNumber",
        level="SERIES",
        clients=("findscu", "dicomweb-client"),
    ),
)

_MODEL = (
    # Levels
    Question(
        "C.4.1.3.1.1 series of a study",
        {**_series_of("john"), "Modality": "MR"},
        ("john-mr",),
        level="SERIES",
        unknown=(),
    ),
    Question(
        "C.4.1.3.1.1 instances of a series",
        {**_JOHN_CT, "InstanceNumber": "2"},
        ("john-ct-2",),
        level="IMAGE",
        unknown=(),
    ),
    _refused(
        "C.4.1.3.1.1 series without a study",
        {"Modality": "MR"},
        "StudyInstanceUID",
        level="SERIES",
        protocols=C_FIND,
    ),
    _refused(
        "C.4.1.3.1.1 series of two studies",
        {"StudyInstanceUID": f"{uid('john')}\\{uid('hong')}"},
        "StudyInstanceUID",
        level="SERIES",
        protocols=C_FIND,
    ),
    _refused(
        "C.4.1.3.1.1 instances without a series",
        _series_of("john"),
        "SeriesInstanceUID",
        level="IMAGE",
        protocols=C_FIND,
    ),
    _refused("C.4.1.3.1.1 a key below the level", {"Modality": "MR"}, "Modality", protocols=C_FIND),
    _refused(
        "C.6.2.1 a level that the model has not",
        {"PatientID": "P1"},
        "QueryRetrieveLevel",
        level="PATIENT",
        protocols=C_FIND,
    ),
    _refused(
        "C.4.1.1.3.1 a level that there is not",
        {"PatientID": "P1"},
        "QueryRetrieveLevel",
        level="FRAME",
        protocols=C_FIND,
    ),
    # Relational
    Question(
        "C.4.1.3.2 series of all",
        {"PatientID": "P1", "Modality": "US"},
        ("again-us",),
        level="SERIES",
        options=_RELATIONAL,
        unknown=(),
    ),
    Question(
        "C.4.1.3.2 instances of all",
        {"StudyDate": "20240115", "InstanceNumber": "3"},
        ("john-ct-3",),
        level="IMAGE",
        options=_RELATIONAL,
        unknown=("nameless-ot-1",),
    ),
    Question(
        "C.4.1.3.2.1 keys below the level, which one series matches",
        {"Modality": "MR", "BodyPartExamined": "HEAD"},
        ("john",),
        options=_RELATIONAL,
        unknown=("yamada",),
        protocols=C_FIND,
    ),
    Question(
        "C.4.1.3.2.1 and not two",
        {"Modality": "CT", "BodyPartExamined": "HEAD"},
        (),
        options=_RELATIONAL,
        unknown=("joerg", "halfwidth", "hong", "zhang", "dionysios", "fyodor", "qabbani", "sharon"),
        protocols=C_FIND,
    ),
    Question(
        "C.4.1.3.2.1 keys two levels below",
        {"SOPClassUID": SR},
        ("joerg", NAMELESS),
        options=_RELATIONAL,
        unknown=(),
        protocols=C_FIND,
    ),
    # Patient Root
    _patients(
        "C.6.1.1.2 patients, each once",
        {"PatientName": "smith*"},
        ("P1",),
        level="PATIENT",
        unknown=(NAMELESS,),
        answers={
            "P1": {
                "NumberOfPatientRelatedStudies": "2",
                "NumberOfPatientRelatedSeries": "3",
                "NumberOfPatientRelatedInstances": "5",
                "PatientSex": "M",
            }
        },
    ),
    _patients(
        "C.2.2.1.1 the unique key is always known",
        {"PatientID": "P1*"},
        ("P1", "P10", "P11", "P12"),
        level="PATIENT",
    ),
    _patients("C.6.1.1.3 studies of a patient", {"PatientID": "P1", "StudyDate": "20240115"}, ("john",)),
    _patients(
        "C.6.1.1.4 series of a patient's study",
        {"PatientID": "P1", **_series_of("john"), "Modality": "CT"},
        ("john-ct",),
        level="SERIES",
    ),
    _patients(
        "C.6.1.1.5 instances of a patient's series",
        {"PatientID": "P1", **_JOHN_CT, "InstanceNumber": "1"},
        ("john-ct-1",),
        level="IMAGE",
    ),
    _patients(
        "C.4.1.3.1.1 studies without a patient",
        {"StudyDate": "20240115"},
        None,
        status=NOT_OF_THE_MODEL,
        offending=("PatientID",),
    ),
    _patients(
        "C.4.1.3.2.1 patients by a key below",
        {"Modality": "US"},
        ("P1",),
        level="PATIENT",
        options=_RELATIONAL,
    ),
    _patients("C.6.3 of Patient/Study Only", {"PatientID": "P3"}, ("joerg",), root="PATIENT/STUDY"),
    _patients(
        "C.6.3 which has no series",
        {"PatientID": "P1", **_series_of("john")},
        None,
        level="SERIES",
        root="PATIENT/STUDY",
        status=NOT_OF_THE_MODEL,
        offending=("QueryRetrieveLevel",),
    ),
)

# What can be asked for at each level, as docs/conformance.md has it; a time zone has rows of its own.
_SUPPORTED = {
    level: tuple(keywords.split())
    for level, keywords in {
        "PATIENT": """
            PatientName PatientID IssuerOfPatientID IssuerOfPatientIDQualifiersSequence PatientBirthDate
            PatientBirthTime PatientSex OtherPatientIDs OtherPatientNames OtherPatientIDsSequence EthnicGroup
            PatientComments NumberOfPatientRelatedStudies NumberOfPatientRelatedSeries
            NumberOfPatientRelatedInstances
        """,
        "STUDY": """
            StudyDate StudyTime AccessionNumber IssuerOfAccessionNumberSequence ModalitiesInStudy
            SOPClassesInStudy ReferringPhysicianName StudyDescription
            ProcedureCodeSequence PhysiciansOfRecord NameOfPhysiciansReadingStudy
            AdmittingDiagnosesDescription RetrieveURL PatientAge PatientSize PatientWeight Occupation
            AdditionalPatientHistory StudyInstanceUID StudyID NumberOfStudyRelatedSeries
            NumberOfStudyRelatedInstances RequestingPhysician RequestedProcedureDescription AdmissionID
        """,
        "SERIES": """
            SeriesDate SeriesTime Modality Manufacturer InstitutionName StationName SeriesDescription
            SeriesDescriptionCodeSequence InstitutionalDepartmentName PerformingPhysicianName OperatorsName
            ManufacturerModelName RetrieveURL BodyPartExamined DeviceSerialNumber SoftwareVersions
            ProtocolName PatientPosition SeriesInstanceUID SeriesNumber Laterality
            NumberOfSeriesRelatedInstances PerformedProcedureStepStartDate PerformedProcedureStepStartTime
            PerformedProcedureStepEndDate PerformedProcedureStepEndTime PerformedProcedureStepID
            PerformedProcedureStepDescription RequestAttributesSequence
        """,
        "IMAGE": """
            ImageType InstanceCreationDate InstanceCreationTime SOPClassUID SOPInstanceUID AcquisitionDate
            ContentDate AcquisitionDateTime AcquisitionTime ContentTime RetrieveURL AvailableTransferSyntaxUID
            AcquisitionNumber InstanceNumber NumberOfFrames Rows Columns BitsAllocated ConceptNameCodeSequence
            CompletionFlag VerificationFlag DocumentTitle ContentLabel ContentDescription
            PresentationCreationDate PresentationCreationTime ContentCreatorName
        """,
    }.items()
}
_KEYS = (
    _patients(
        "C.4.1.1.3.2 every key of patients is answered, with or without a value",
        {"PatientID": "P1"},
        ("P1",),
        level="PATIENT",
        has=_SUPPORTED["PATIENT"],
    ),
    Question(
        "C.4.1.1.3.2 every key of studies",
        {"StudyInstanceUID": uid(NAMELESS)},
        (NAMELESS,),
        unknown=(),
        protocols=C_FIND,
        has=_SUPPORTED["PATIENT"] + _SUPPORTED["STUDY"],
    ),
    Question(
        "C.4.1.1.3.2 every key of series",
        _series_of(NAMELESS),
        ("nameless-ot",),
        level="SERIES",
        unknown=(),
        protocols=C_FIND,
        has=_SUPPORTED["SERIES"],
    ),
    Question(
        "C.4.1.1.3.2 every key of instances",
        _instances_of(NAMELESS, "nameless-ot"),
        ("nameless-ot-1",),
        level="IMAGE",
        unknown=(),
        protocols=C_FIND,
        has=_SUPPORTED["IMAGE"],
    ),
    Question(
        "C.6.2.1.2 optional keys of studies",
        {"PatientID": "P1", "StudyDate": "20240115"},
        ("john",),
        answers={
            "john": {
                "PatientBirthDate": "19700203",
                "PatientSex": "M",
                "PatientAge": "053Y",
                "StudyDescription": "Chest [100%] (a?b*c)",
                "ReferringPhysicianName": "House^Gregory",
            }
        },
    ),
    Question(
        "C.6.1.1.4 an optional key of series",
        {**_series_of("john"), "BodyPartExamined": "HEAD"},
        ("john-mr",),
        level="SERIES",
        unknown=(),
        answers={"john-mr": {"BodyPartExamined": "HEAD"}},
    ),
    Question(
        "C.6.1.1.5 an optional key of instances",
        {**_JOHN_CT, "SOPClassUID": CT},
        instances_of("john-ct", 3),
        level="IMAGE",
        unknown=(),
        answers={"john-ct-1": {"AvailableTransferSyntaxUID": "1.2.840.10008.1.2.1"}},
    ),
    Question(
        "C.3.4 what is counted of studies",
        {"NumberOfStudyRelatedInstances": "4"},
        ("john",),
        unknown=(),
        answers={"john": {"NumberOfStudyRelatedSeries": "2", "NumberOfPatientRelatedStudies": "2"}},
    ),
    Question(
        "C.3.4 what is counted of series",
        {**_series_of("john"), "NumberOfSeriesRelatedInstances": "3"},
        ("john-ct",),
        level="SERIES",
        unknown=(),
        answers={"john-ct": {"NumberOfSeriesRelatedInstances": "3"}},
    ),
    Question(
        "C.3.4 SOP classes in the study",
        {"SOPClassesInStudy": MR},
        ("john", "yamada"),
        unknown=(),
        answers={"john": {"SOPClassesInStudy": [CT, MR]}, "yamada": {"SOPClassesInStudy": MR}},
    ),
    Question(
        "C.4.1.1.3.2 what is said of every match: it is online, and no AE gives it",
        {"PatientID": "P3"},
        ("joerg",),
        protocols=C_FIND,
        answers={"joerg": {"InstanceAvailability": "ONLINE", "RetrieveAETitle": ""}},
    ),
    Question(
        "C.4.1.1.3.2 a time zone is told where one is known",
        {"PatientID": "P9"},
        ("fyodor",),
        answers={"fyodor": {"TimezoneOffsetFromUTC": "-0500"}},
    ),
    Question(
        "C.4.1.1.3.2 and never without a value",
        {"PatientID": "P3"},
        ("joerg",),
        lacks=("TimezoneOffsetFromUTC",),
    ),
    Question(
        "C.4.1.1.3.2, PS3.18 10.6.3.3 where it is",
        {**_series_of("john"), "Modality": "MR"},
        ("john-mr",),
        level="SERIES",
        unknown=(),
        answers={
            "john-mr": {
                "InstanceAvailability": "ONLINE",
                "RetrieveURL": f"/dicomweb/studies/{uid('john')}/series/{uid('john-mr')}",
            }
        },
    ),
    # Keys that configuration adds
    Question(
        "C.2.2.1.3 of studies, by configuration",
        {"Allergies": "NUT*"},
        ("john",),
        unknown=_OTHER_NAMES,
        answers={"john": {"Allergies": "NUTS"}},
    ),
    Question(
        "C.2.2.1.3 of series, by configuration",
        {**_series_of("john"), "ScanOptions": "HELICAL"},
        ("john-ct",),
        level="SERIES",
        unknown=("john-mr",),
    ),
    Question(
        "C.2.2.1.3 of instances, by configuration",
        {**_JOHN_CT, "SliceThickness": "3.0"},
        ("john-ct-2", "john-ct-3"),
        level="IMAGE",
        unknown=(),
    ),
    Question(
        "C.2.2.1.3 a key that is not supported is not answered, and warned of",
        {"PatientID": "P1", "SmokingStatus": "NO"},
        ("john", "john-again"),
        pending=PENDING_WITH_WARNING,
        protocols=C_FIND,
        lacks=("SmokingStatus",),
        clients=("findscu", "pynetdicom"),  # dcmjs-dimse takes FF01 for the end
    ),
    # Ends
    Question(
        "C.4.1.2.1 C-CANCEL in the middle of answers",
        {**_instances_of(LONG, "long-xa"), "PatientComments": "", "AdditionalPatientHistory": ""},
        None,
        level="IMAGE",
        status=CANCELLED,
        cancel=3,
        protocols=C_FIND,
    ),
    Question(
        "table C.4-1, PS3.18 8.3.4.4 more matches than are given",
        _instances_of(LONG, "long-xa"),
        instances_of("long-xa", MAX_RESULTS),
        level="IMAGE",
        status=OUT_OF_RESOURCES,
        unknown=(),
    ),
)

# ── character sets ───────────────────────────────────────────────────────────────────────────────

JIS, JIS_WITH_KANA, KS_X = "\\ISO 2022 IR 87", "ISO 2022 IR 13\\ISO 2022 IR 87", "\\ISO 2022 IR 149"
# By study: its name, and sets that carry all of it.
_WRITTEN = (
    (
        "yamada",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
        (JIS, JIS_WITH_KANA, "GB18030", UTF_8),
    ),
    ("halfwidth", "ﾔﾏﾀﾞ^ﾊﾅｺ=山田^花子=やまだ^はなこ", (JIS_WITH_KANA, UTF_8)),
    ("hong", "Hong^Gildong=洪^吉洞=홍^길동", (KS_X, "GB18030", UTF_8)),
    ("zhang", "Zhang^XiaoDong=张^小东", ("GB18030", "GBK", "\\ISO 2022 IR 58", UTF_8)),
    ("dionysios", "Διονύσιος", ("ISO_IR 126", "\\ISO 2022 IR 126", UTF_8)),
    ("fyodor", "Достоевский^Фёдор", ("ISO_IR 144", "\\ISO 2022 IR 144", UTF_8)),
    ("qabbani", "قباني^لنزار", ("ISO_IR 127", "\\ISO 2022 IR 127", UTF_8)),
    ("sharon", "שרון^דבורה", ("ISO_IR 138", "\\ISO 2022 IR 138", UTF_8)),
    ("joerg", "Müller^Jörg", ("ISO_IR 100", "ISO_IR 101", "ISO_IR 148", UTF_8)),
)


def _written() -> Iterator[Question]:
    """By each representation of each name in each set, answered in that set."""
    for study, name, charsets in _WRITTEN:
        groups = name.split("=")
        for charset in charsets:
            for asked in dict.fromkeys([*groups, name]):
                yield Question(
                    f"C.2.2.2, C.4.1.1.3.2, PS3.3 C.12.1.1.2 {charset}",
                    {"PatientName": asked},
                    (study,),
                    charset=charset,
                    labelled=charset,
                    answers={study: {"PatientName": name}},
                    clients=("findscu",) if "IR 58" in charset else None,  # pydicom cannot write it
                )


_CHARACTER_SETS = (
    *_written(),
    Question(
        "C.4.1.1.3.2 a set that cannot carry the answer",
        {"StudyInstanceUID": uid("yamada")},
        ("yamada",),
        unknown=(),
        charset="ISO_IR 100",
        labelled=UTF_8,
        answers={"yamada": {"PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"}},
    ),
    Question(
        "C.4.1.1.3.2 one that carries a part of the name",
        {"PatientName": "ﾔﾏﾀﾞ^ﾊﾅｺ"},
        ("halfwidth",),
        charset="ISO_IR 13",
        labelled=UTF_8,
        answers={"halfwidth": {"PatientName": "ﾔﾏﾀﾞ^ﾊﾅｺ=山田^花子=やまだ^はなこ"}},
    ),
    Question(
        "C.4.1.1.3.2 one of another script",
        {"PatientName": "Zhang*"},
        ("zhang",),
        charset="ISO_IR 126",
        labelled=UTF_8,
        answers={"zhang": {"PatientName": "Zhang^XiaoDong=张^小东"}},
    ),
    Question(
        "C.2.2.2 without a set it is the default repertoire",
        {"StudyInstanceUID": uid("joerg")},
        ("joerg",),
        unknown=(),
        charset="",
        labelled=UTF_8,
        answers={"joerg": {"PatientName": "Müller^Jörg"}},
    ),
    Question(
        "C.4.1.1.3.2 what is plain ASCII has no set",
        {"StudyInstanceUID": uid("john")},
        ("john",),
        unknown=(),
        charset="ISO_IR 100",
        labelled="",
        answers={"john": {"PatientName": "SMITH^JOHN"}},
    ),
    _refused(
        "C.2.2.2 a set that is not supported, as declared",
        {"PatientID": "P1"},
        "SpecificCharacterSet",
        charset="ISO_IR 999",
        protocols=C_FIND,
        clients=("findscu",),  # the others know no such set either
    ),
)

QUESTIONS = _MATCHING + _MODEL + _KEYS + _CHARACTER_SETS

# A key of series that configuration adds to what is held, before the index is made anew and after.
BEFORE_REBUILD = (
    Question(
        "C.2.2.1.3 not supported until the index is made anew",
        {**_series_of("john"), ADDED_KEY: "SK"},
        ("john-ct", "john-mr"),
        level="SERIES",
        unknown=(),
        protocols=C_FIND,
        pending=PENDING_WITH_WARNING,
        lacks=(ADDED_KEY,),
    ),
)
AFTER_REBUILD = (
    Question(
        "C.2.2.1.3 by configuration, of what was held before",
        {**_series_of("john"), ADDED_KEY: "SK"},
        ("john-ct",),
        level="SERIES",
        unknown=("john-mr",),
        answers={"john-ct": {ADDED_KEY: "SK"}},
    ),
)

# ── what QIDO-RS alone has ───────────────────────────────────────────────────────────────────────

XML = 'multipart/related; type="application/dicom+xml"'


@dataclass(frozen=True)
class Search:
    """A row: *params* of the resource at *level* within *scope*, and the names of what is found, in order.

    Nothing found and 200 is 200 or 204, as the gateway is set up.  Each of *warnings* is said, and no more;
    each of *problem* is in that of a refusal.  *has* are attributes that every match has, and *lacks* that
    none has.  *accept* and *known*, which asks again with the ETag of the first answer, are for plain HTTP.
    """

    clause: str
    params: tuple[tuple[str, str], ...] = ()
    found: tuple[str, ...] = ()
    level: str = "STUDY"
    within: tuple[str, ...] = ()
    status: int = 200
    warnings: tuple[str, ...] = ()
    problem: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    accept: str = ""
    is_known: bool = False
    is_streamed: bool = False
    page_by_page: bool = False

    @property
    def scope(self) -> tuple[str, ...]:
        return tuple(map(uid, self.within))

    @property
    def path(self) -> str:
        names = ("studies", "series", "instances")
        above = "".join(f"/{name}/{one}" for name, one in zip(names, self.scope, strict=False))
        return f"{above}/{names[('STUDY', 'SERIES', 'IMAGE').index(self.level)]}"


def _params(**values: Any) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items())


def _bad(name: str, value: str, *others: tuple[str, str]) -> Search:
    return Search(
        "PS3.18 8.3.4, table 10.6.3-1 a bad value is named",
        ((name, value), *others),
        status=400,
        problem=(name,),
    )


_P1 = ("PatientID", "P1")
_ON_THE_DAY = ("john-again", "john")
_REMAINING = "There are {} additional results that can be requested"
# PS3.18 table 10.6.3-3
_OF_STUDIES = (
    "StudyDate", "StudyTime", "AccessionNumber", "InstanceAvailability", "ModalitiesInStudy",
    "ReferringPhysicianName", "RetrieveURL", "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "StudyInstanceUID", "StudyID", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances",
)  # fmt: skip

SEARCHES = (
    # Resources, PS3.18 table 10.6.1-1
    Search("PS3.18 10.6.1 all studies", (_P1,), _ON_THE_DAY),
    Search("PS3.18 10.6.1 a study's series", (), ("john-ct", "john-mr"), "SERIES", ("john",)),
    Search(
        "PS3.18 10.6.1 a series' instances",
        (),
        instances_of("john-ct", 3),
        "IMAGE",
        ("john", "john-ct"),
        lacks=("PatientID", "Modality"),
    ),
    Search(
        "PS3.18 10.6.1 a study's instances",
        (),
        (*instances_of("john-ct", 3), "john-mr-1"),
        "IMAGE",
        ("john",),
        has=("Modality",),
        lacks=("PatientID",),
    ),
    Search(
        "PS3.18 10.6.1 all series", (_P1,), ("again-us", "john-ct", "john-mr"), "SERIES", has=("PatientID",)
    ),
    Search(
        "PS3.18 10.6.1 all instances",
        (_P1,),
        ("again-us-1", *instances_of("john-ct", 3), "john-mr-1"),
        "IMAGE",
        has=("PatientID", "Modality"),
    ),
    # Names of attributes
    Search("PS3.18 8.3.4.1 by tag", (("00100020", "P1"),), _ON_THE_DAY),
    Search("PS3.18 8.3.4.1 by tag in small letters", (("0020000d", uid("john")),), ("john",)),
    Search("PS3.18 8.3.4.1 in a sequence", ((_STEP, "STEP2"),), ("joerg-ct",), "SERIES"),
    Search(
        "PS3.18 8.3.4.1 in a sequence, by tags", (("00400275.00400009", "STEP2"),), ("joerg-ct",), "SERIES"
    ),
    Search(
        "PS3.18 8.3.4.1 a list of UIDs by commas",
        (("StudyInstanceUID", f"{uid('john')},{uid('hong')}"),),
        ("john", "hong"),
    ),
    Search(
        "PS3.18 8.3.4.1 no attribute twice", (_P1, ("PatientID", "P3")), status=400, problem=("PatientID",)
    ),
    Search(
        "PS3.18 8.3.4.1 nor under another name", (_P1, ("00100020", "P1")), status=400, problem=("00100020",)
    ),
    # Attributes of the answers
    Search(
        "PS3.18 10.6.3.3.1 what is returned unasked",
        (_P1,),
        _ON_THE_DAY,
        has=_OF_STUDIES,
        lacks=("NumberOfPatientRelatedStudies", "SOPClassesInStudy", "Allergies"),
        answers={
            "john": {"InstanceAvailability": "ONLINE", "RetrieveURL": f"/dicomweb/studies/{uid('john')}"}
        },
    ),
    Search(
        "PS3.18 8.3.4.3 includefield: by keyword and tag, in a list and repeated",
        (
            _P1,
            ("includefield", "NumberOfPatientRelatedStudies,00201202"),
            ("includefield", "SOPClassesInStudy"),
        ),
        _ON_THE_DAY,
        has=("NumberOfPatientRelatedStudies", "NumberOfPatientRelatedSeries", "SOPClassesInStudy"),
    ),
    Search(
        "PS3.18 8.3.4.3 includefield: all",
        (("StudyInstanceUID", uid("john")), ("includefield", "all")),
        ("john",),
        has=("SOPClassesInStudy", "PatientAge", "Allergies"),
        lacks=("NumberOfPatientRelatedStudies",),  # counted when it is named
    ),
    Search(
        "PS3.18 8.3.4.3 includefield: nothing of a level below",
        (_P1, ("includefield", "SOPInstanceUID")),
        _ON_THE_DAY,
        lacks=("SOPInstanceUID",),
    ),
    # Pages
    Search(
        "PS3.18 8.3.4.4 limit",
        _params(limit=3),
        NEWEST_FIRST[:3],
        warnings=(_REMAINING.format(len(ALL) - 3),),
    ),
    Search(
        "PS3.18 8.3.4.4 limit and offset",
        _params(limit=4, offset=3),
        NEWEST_FIRST[3:7],
        warnings=(_REMAINING.format(len(ALL) - 7),),
    ),
    Search("PS3.18 8.3.4.4 the last page", _params(limit=4, offset=len(ALL) - 2), NEWEST_FIRST[-2:]),
    Search("PS3.18 8.3.4.4 behind the last page", _params(offset=len(ALL)), ()),
    Search(
        "PS3.18 8.3.4.4 pages are the whole in one order",
        _params(limit=5),
        NEWEST_FIRST,
        warnings=(_REMAINING.format(len(ALL) - 5),),  # of the first
        page_by_page=True,
    ),
    Search(
        "PS3.18 8.3.4.4 no more than the server gives",
        _params(limit=5000),
        instances_of("long-xa", MAX_RESULTS),
        "IMAGE",
        (LONG, "long-xa"),
        warnings=(_REMAINING.format(LONG_INSTANCES - MAX_RESULTS),),
    ),
    # What is not done, and what cannot be
    Search(
        "PS3.18 8.3.4 what is not supported is named and ignored",
        (_P1, ("sort", "StudyDate"), ("SmokingStatus", "NO")),
        _ON_THE_DAY,
        warnings=(
            "The parameter 'sort' is not supported and was ignored.",
            "The attribute 'SmokingStatus' is not matched here and was ignored.",
        ),
    ),
    Search(
        "PS3.18 8.3.4.1 an attribute of a level below is ignored",
        (_P1, ("Modality", "US")),
        _ON_THE_DAY,
        warnings=("The attribute 'Modality' is not matched here and was ignored.",),
    ),
    _bad("limit", "-1"),
    _bad("limit", "many"),
    _bad("limit", "3", ("limit", "4")),
    _bad("offset", "1.5"),
    _bad("fuzzymatching", "yes"),
    _bad("emptyvaluematching", "1"),
    _bad("multiplevaluematching", ""),
    _bad("StudyDate", "2024-01-15"),
    _bad("0010,0020", "P1"),
    _bad("TimezoneOffsetFromUTC", "CET"),
    _bad("IssuerOfAccessionNumberSequence", "x"),
    # Responses
    Search("PS3.18 table 10.6.3-1 nothing found", (("PatientID", "nobody"),), ()),
    Search("PS3.18 table 10.6.4-1 JSON", (_P1,), _ON_THE_DAY, accept="application/dicom+json"),
    Search("PS3.18 table 10.6.4-1 plain JSON", (_P1,), _ON_THE_DAY, accept="application/json"),
    Search("PS3.18 table 10.6.4-1, PS3.19 A.1 XML", (_P1,), _ON_THE_DAY, accept=XML, has=("PatientName",)),
    Search(
        "PS3.18 table 10.6.4-1, PS3.19 A.1 XML of every script",
        (("StudyInstanceUID", uid("yamada")),),
        ("yamada",),
        accept=XML,
        answers={"yamada": {"PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"}},
    ),
    Search("PS3.18 table 10.6.3-1 nothing found, in XML", (("PatientID", "nobody"),), (), accept=XML),
    Search("PS3.18 8.3.3.1 the parameter for Accept", (_P1, ("accept", XML)), _ON_THE_DAY, accept="*/*"),
    Search("RFC 9110 15.5.7 nothing that is acceptable", (_P1,), status=406, accept="text/html"),
    Search("RFC 9110 13.1.2 an answer that stands", (_P1,), status=304, accept="*/*", is_known=True),
    Search(
        "RFC 9112 7.1 a large answer is sent as it is read",
        (("includefield", "PatientComments,AdditionalPatientHistory"),),
        instances_of("long-xa", MAX_RESULTS),
        "IMAGE",
        (LONG, "long-xa"),
        warnings=(_REMAINING.format(LONG_INSTANCES - MAX_RESULTS),),
        has=("PatientComments",),
        is_streamed=True,
    ),
    Search(
        "RFC 9112 7.1 a large answer is sent as it is read, in XML too",
        (("includefield", "PatientComments,AdditionalPatientHistory"),),
        instances_of("long-xa", MAX_RESULTS),
        "IMAGE",
        (LONG, "long-xa"),
        warnings=(_REMAINING.format(LONG_INSTANCES - MAX_RESULTS),),
        has=("PatientComments",),
        accept=XML,
        is_streamed=True,
    ),
)

SEARCH_BEFORE_REBUILD = Search(
    "PS3.18 8.3.4 not supported until the index is made anew",
    ((ADDED_KEY, "SK"),),
    ("john-ct", "john-mr"),
    "SERIES",
    ("john",),
    warnings=(f"The attribute {ADDED_KEY!r} is not matched here and was ignored.",),
)

# ── what is agreed before anything is asked ──────────────────────────────────────────────────────

NEGOTIATIONS = (
    ("C.5.1.1 relational queries", b"\1", b"\1"),
    ("C.5.1.1 combined dates and times", b"\0\1", b"\0\1"),
    ("C.5.1.1 fuzzy matching", b"\0\0\1", b"\0\0\1"),
    ("C.5.1.1 time zones", b"\0\0\0\1", b"\0\0\0\1"),
    ("C.5.1.1 no conversion of multi-frame images", b"\0\0\0\0\1", b"\0\0\0\0\0"),
    ("C.5.1.1 empty values", b"\0\0\0\0\0\1", b"\0\0\0\0\0\1"),
    ("C.5.1.1 multiple values", b"\0\0\0\0\0\0\1", b"\0\0\0\0\0\0\1"),
    ("C.5.1.1 nothing that was not asked for", b"\0\0\0\0\0\0\0", b"\0\0\0\0\0\0\0"),
    ("C.5.1.1 all of it", b"\1\1\1\1\1\1\1", b"\1\1\1\1\0\1\1"),
)
CONTEXTS = (
    ("C.6.1 Patient Root", MODELS["PATIENT"], True),
    ("C.6.2 Study Root", MODELS["STUDY"], True),
    ("C.6.3 Patient/Study Only", MODELS["PATIENT/STUDY"], True),
    ("K.6.1 Modality Worklist, as declared", "1.2.840.10008.5.1.4.31", False),
    ("F.7 Modality Performed Procedure Step, as declared", "1.2.840.10008.3.1.2.3.3", False),
)
