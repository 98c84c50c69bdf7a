"""What is asked, of what, and what the standard says is found: one table for C-FIND and QIDO-RS.

Each row names its clause.  The studies are few and each is there for a rule; their names stand in the rows.
A question is asked of every backend by every client that can ask it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset

CT, MR, US, SR = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.6.1",
    "1.2.840.10008.5.1.4.1.1.88.11",
)
ROOT = "1.2.826.0.1.3680043.8.498.4"
NAMELESS = "nameless"  # of it nothing is known but its UIDs, modality and class

# ── what is held ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Series:
    """Series *name*: its modality, its class, how many instances, and further attributes."""

    name: str
    modality: str = "CT"
    sop_class_uid: str = CT
    instances: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Study *name*, its attributes, and its series."""

    name: str
    series: tuple[Series, ...]
    charset: str | list[str] = ""
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def uid(self) -> str:
        return f"{ROOT}.{number_of(self.name)}"


_OTHERS = {
    "AccessionNumber": "ACC0",
    "PatientSex": "F",
    "StudyDescription": "Other",
    "ReferringPhysicianName": "Wilson^James",
}


def _attributes(name: str, patient_id: str, date: str, time: str, **others: Any) -> dict[str, Any]:
    return _OTHERS | {
        "PatientName": name,
        "PatientID": patient_id,
        "StudyDate": date,
        "StudyTime": time,
        **others,
    }


def _request(step: str, procedure: str) -> Dataset:
    item = Dataset()
    item.ScheduledProcedureStepID, item.RequestedProcedureID = step, procedure
    return item


STUDIES = (
    Study(
        "john",
        (
            Series("john-ct", instances=3, attributes={"SeriesNumber": 2, "BodyPartExamined": "CHEST"}),
            Series("john-mr", "MR", MR, attributes={"SeriesNumber": 10, "BodyPartExamined": "HEAD"}),
        ),
        attributes=_attributes(
            "SMITH^JOHN",
            "P1",
            "20240115",
            "101530",
            AccessionNumber="ACC1",
            StudyID="S1",
            PatientBirthDate="19700203",
            PatientSex="M",
            StudyDescription="Chest [100%] (a?b*c)",
            ReferringPhysicianName="House^Gregory",
        ),
    ),
    Study(
        "john-again",
        (Series("again-us", "US", US, attributes={"SeriesNumber": 1}),),
        attributes=_attributes(
            "Smith^John^Q",
            "P1",
            "20240116",
            "0830",
            AccessionNumber="ACC2",
            StudyDescription="chest follow up",
            PatientSex="M",
        ),
    ),
    Study(
        "joerg",
        (
            Series(
                "joerg-ct",
                attributes={
                    "SeriesNumber": 7,
                    "RequestAttributesSequence": [_request("STEP1", "PROC1"), _request("STEP2", "PROC2")],
                },
            ),
            Series("joerg-sr", "SR", SR),
        ),
        charset="ISO_IR 100",
        attributes=_attributes(
            "Müller^Jörg", "P3", "20240201", "235959.5", AccessionNumber="acc1", PatientSex="M"
        ),
    ),
    Study(
        "yamada",
        (Series("yamada-mr", "MR", MR),),
        charset=["", "ISO 2022 IR 87"],
        attributes=_attributes("Yamada^Tarou=山田^太郎=やまだ^たろう", "P5", "20230630", "120000"),
    ),
    Study(
        "hong",
        (Series("hong-ct"),),
        charset=["", "ISO 2022 IR 149"],
        attributes=_attributes("Hong^Gildong=洪^吉洞=홍^길동", "P6", "20230701", "000000"),
    ),
    Study(
        "zhang",
        (Series("zhang-ct"),),
        charset="GB18030",
        attributes=_attributes("Zhang^XiaoDong=张^小东", "P7", "20230702", "101530.25"),
    ),
    Study(
        "dionysios",
        (Series("dionysios-ct"),),
        charset="ISO_IR 126",
        attributes=_attributes("Διονύσιος", "P8", "20221231", "07"),
    ),
    Study(
        "fyodor",
        (Series("fyodor-ct"),),
        charset="ISO_IR 144",
        attributes=_attributes("Достоевский^Фёдор", "P9", "20221230", "1959"),
    ),
    Study(
        "qabbani",
        (Series("qabbani-ct"),),
        charset="ISO_IR 127",
        attributes=_attributes("قباني^لنزار", "P10", "20221229", "200000"),
    ),
    Study(
        "sharon",
        (Series("sharon-ct"),),
        charset="ISO_IR 138",
        attributes=_attributes("שרון^דבורה", "P11", "20221228", "200100"),
    ),
    Study(NAMELESS, (Series("nameless-ot", "OT", SR),)),
)


def number_of(name: str) -> int:
    """What stands for *name* in a UID: the same in every run, and of names that begin alike in order."""
    return int.from_bytes(name.encode(), "big") % 10**20


def names_of(uids: Iterator[str]) -> set[str]:
    """The names of studies, series and instances with these UIDs."""
    return {_NAMES[uid] for uid in uids}


def datasets() -> Iterator[Dataset]:
    """Every instance."""
    for study in STUDIES:
        for series in study.series:
            for number in range(1, series.instances + 1):
                yield _dataset(study, series, number)


def _dataset(study: Study, series: Series, number: int) -> Dataset:
    dataset = Dataset()
    if study.charset:
        dataset.SpecificCharacterSet = study.charset
    dataset.SOPClassUID = series.sop_class_uid
    dataset.StudyInstanceUID = study.uid
    dataset.SeriesInstanceUID = f"{study.uid}.{number_of(series.name)}"[:64]
    dataset.SOPInstanceUID = f"{ROOT}.9.{number_of(series.name)}.{number}"
    dataset.Modality = series.modality
    if study.name != NAMELESS:
        dataset.InstanceNumber = number
    for keyword, value in (study.attributes | series.attributes).items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def write(folder: Path) -> None:
    """All instances as files under *folder*."""
    for number, dataset in enumerate(datasets()):
        dataset.save_as(folder / f"{number:03}.dcm", enforce_file_format=True)


_NAMES = {
    uid: name
    for study in STUDIES
    for series in study.series
    for number in range(1, series.instances + 1)
    for dataset in (_dataset(study, series, number),)
    for uid, name in (
        (dataset.StudyInstanceUID, study.name),
        (dataset.SeriesInstanceUID, series.name),
        (dataset.SOPInstanceUID, f"{series.name}-{number}"),
    )
}


# ── what is asked ────────────────────────────────────────────────────────────────────────────────


class Options(NamedTuple):
    """What extended negotiation grants and parameters ask for."""

    relational: bool = False
    combined: bool = False
    fuzzy: bool = False
    timezone: bool = False
    empty: bool = False
    multiple: bool = False


NO_OPTIONS = Options()


@dataclass(frozen=True)
class Question:
    """A row: *keys*, by keyword or dotted path, at *level*, and the names of what is found.

    By C-FIND what has no value for a key is found too (PS3.4 C.2.2.1.2): *unknown*.  *protocols* are those
    by which it can be asked.
    """

    clause: str
    keys: dict[str, str]
    found: tuple[str, ...]
    level: str = "STUDY"
    options: Options = NO_OPTIONS
    unknown: tuple[str, ...] = (NAMELESS,)
    protocols: tuple[str, ...] = ("C-FIND", "QIDO-RS")

    def found_by(self, protocol: str) -> set[str]:
        return {*self.found, *(self.unknown if protocol == "C-FIND" else ())}


_ALL = tuple(study.name for study in STUDIES)
_RELATIONAL, _FUZZY, _COMBINED = Options(relational=True), Options(fuzzy=True), Options(combined=True)
_WITHOUT_REQUEST = tuple(
    series.name for study in STUDIES for series in study.series if series.name != "joerg-ct"
)
_REQUEST = "RequestAttributesSequence"
_EMPTY, _MULTIPLE = Options(empty=True), Options(multiple=True)


def _uid(name: str) -> str:
    return next(study.uid for study in STUDIES if study.name == name)


QUESTIONS = (
    # Single value, PS3.4 C.2.2.2.1
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
    Question(
        "C.2.2.2.1 a physician is a name too",
        {"ReferringPhysicianName": "HOUSE^GREGORY"},
        ("john",),
        unknown=(NAMELESS,),
    ),
    Question("C.2.2.2.1 a date", {"StudyDate": "20240115"}, ("john",)),
    Question("C.2.2.2.1.3 a time by its meaning", {"StudyTime": "083000"}, ("john-again",)),
    Question("C.2.2.2.1.3 a time of lower precision is a period", {"StudyTime": "1015"}, ("john", "zhang")),
    # Names, C.2.2.2.1.1
    Question("C.2.2.2.1.1 case does not count", {"PatientName": "smith^john"}, ("john",)),
    Question("C.2.2.2.1.1 accents do not count", {"PatientName": "MULLER^JORG"}, ("joerg",)),
    Question("C.2.2.2.1.1 nor in the question", {"PatientName": "smïth^jöhn"}, ("john",)),
    Question("C.2.2.2.1.1 positions count", {"PatientName": "John^Smith"}, ()),
    Question("C.2.2.2.1.1 empty components at the end do not", {"PatientName": "Smith^John^^^"}, ("john",)),
    Question("C.2.2.2.1.1 any component group", {"PatientName": "山田^太郎"}, ("yamada",)),
    Question("C.2.2.2.1.1 phonetic", {"PatientName": "やまだ^たろう"}, ("yamada",)),
    Question("C.2.2.2.1.1 alphabetic of three", {"PatientName": "Yamada^Tarou"}, ("yamada",)),
    Question("C.2.2.2.1.1 group by group", {"PatientName": "Yamada^Tarou=山田^太郎"}, ("yamada",)),
    Question("C.2.2.2.1.1 Hangul", {"PatientName": "홍^길동"}, ("hong",)),
    Question("C.2.2.2.1.1 Chinese", {"PatientName": "张^小东"}, ("zhang",)),
    Question("C.2.2.2.1.1 Greek", {"PatientName": "ΔΙΟΝΥΣΙΟΣ"}, ("dionysios",)),
    Question("C.2.2.2.1.1 Cyrillic", {"PatientName": "достоевский^федор"}, ("fyodor",)),
    Question("C.2.2.2.1.1 Arabic", {"PatientName": "قباني^لنزار"}, ("qabbani",)),
    Question("C.2.2.2.1.1 Hebrew", {"PatientName": "שרון^דבורה"}, ("sharon",)),
    # Lists of UIDs, C.2.2.2.2
    Question(
        "C.2.2.2.2",
        {"StudyInstanceUID": f"{_uid('john')}\\{_uid('hong')}\\1.2.3"},
        ("john", "hong"),
        unknown=(),
    ),
    # Universal, C.2.2.2.3
    Question("C.2.2.2.3 zero length", {"PatientName": ""}, _ALL, unknown=()),
    Question("C.2.2.2.3 a star", {"PatientName": "*"}, _ALL, unknown=()),
    # Wild cards, C.2.2.2.4
    Question("C.2.2.2.4 at the end", {"PatientName": "smith*"}, ("john", "john-again")),
    Question("C.2.2.2.4 in front", {"PatientName": "*john"}, ("john",)),
    Question("C.2.2.2.4 on both sides", {"PatientName": "*ill*"}, ()),
    Question("C.2.2.2.4 on both sides of accents", {"PatientName": "*üll*"}, ("joerg",)),
    Question(
        "C.2.2.2.4 one character",
        {"PatientID": "P?"},
        ("john", "john-again", "joerg", "yamada", "hong", "zhang", "dionysios", "fyodor"),
    ),
    Question("C.2.2.2.4 case counts", {"StudyDescription": "chest*"}, ("john-again",)),
    Question(
        "C.2.2.2.4 brackets and percent signs mean themselves", {"StudyDescription": "*[100%]*"}, ("john",)
    ),
    Question("C.2.2.2.4 ideographic", {"PatientName": "山*"}, ("yamada",)),
    Question("C.2.2.2.4 in Hangul", {"PatientName": "*길동"}, ("hong",)),
    # Ranges, C.2.2.2.5
    Question(
        "C.2.2.2.5.1 from to, both included", {"StudyDate": "20240115-20240116"}, ("john", "john-again")
    ),
    Question("C.2.2.2.5.1 until", {"StudyDate": "-20221229"}, ("qabbani", "sharon")),
    Question("C.2.2.2.5.1 from", {"StudyDate": "20240116-"}, ("john-again", "joerg")),
    Question("C.2.2.2.5.2 times", {"StudyTime": "083000-101530"}, ("john", "john-again", "zhang")),
    Question("C.2.2.2.5.2 until", {"StudyTime": "-0700"}, ("hong", "dionysios")),
    Question(
        "C.2.2.2.5.4 date and time apart",
        {"StudyDate": "20240115-20240116", "StudyTime": "0900-1100"},
        ("john",),
        protocols=("C-FIND",),
    ),
    Question(
        "C.2.2.2.5.4 combined",
        {"StudyDate": "20240115-20240116", "StudyTime": "1000-0900"},
        ("john", "john-again"),
        options=_COMBINED,
    ),
    # Sequences, C.2.2.2.6
    Question(
        "C.2.2.2.6 in one item",
        {
            "RequestAttributesSequence.ScheduledProcedureStepID": "STEP2",
            "RequestAttributesSequence.RequestedProcedureID": "PROC2",
        },
        ("joerg-ct",),
        level="SERIES",
        options=_RELATIONAL,
        unknown=_WITHOUT_REQUEST,
    ),
    Question(
        "C.2.2.2.6 not in two",
        {
            "RequestAttributesSequence.ScheduledProcedureStepID": "STEP1",
            "RequestAttributesSequence.RequestedProcedureID": "PROC2",
        },
        (),
        level="SERIES",
        options=_RELATIONAL,
        unknown=_WITHOUT_REQUEST,
    ),
    # Several values
    Question("C.2.2.3 one of those held", {"ModalitiesInStudy": "MR"}, ("john", "yamada"), unknown=()),
    Question(
        "any of several, as declared",
        {"ModalitiesInStudy": "MR\\US"},
        ("john", "john-again", "yamada"),
        unknown=(),
    ),
    Question(
        "multiple value matching",
        {"ModalitiesInStudy": "MR\\CT"},
        ("john",),
        options=_MULTIPLE,
        unknown=(),
    ),
    Question("empty value matching", {"PatientName": '""'}, (NAMELESS,), options=_EMPTY, unknown=()),
    Question(
        "empty value matching, of an attribute that many lack",
        {"StudyID": '""'},
        tuple(n for n in _ALL if n != "john"),
        options=_EMPTY,
        unknown=(),
    ),
    # Fuzzy
    Question("fuzzy: by sound", {"PatientName": "Smyth^Jon"}, ("john", "john-again"), options=_FUZZY),
    Question("fuzzy: in any order", {"PatientName": "Jörg Müller"}, ("joerg",), options=_FUZZY),
    Question(
        "fuzzy: literal names too", {"PatientName": "SMITH^JOHN"}, ("john", "john-again"), options=_FUZZY
    ),
    Question("fuzzy: other scripts as they are", {"PatientName": "太郎^山田"}, ("yamada",), options=_FUZZY),
    Question("without: not by sound", {"PatientName": "Smyth^Jon"}, ()),
    # Levels, C.4.1.1, C.4.1.2
    Question(
        "series of a study",
        {"StudyInstanceUID": _uid("john"), "Modality": "MR"},
        ("john-mr",),
        level="SERIES",
        unknown=(),
    ),
    Question(
        "a number by its value",
        {"StudyInstanceUID": _uid("john"), "SeriesNumber": "02"},
        ("john-ct",),
        level="SERIES",
        unknown=(),
    ),
    Question(
        "relational: series of all",
        {"PatientID": "P1", "Modality": "US"},
        ("again-us",),
        level="SERIES",
        options=_RELATIONAL,
        unknown=(),
    ),
    Question(
        "relational: instances of all",
        {"StudyDate": "20240115", "InstanceNumber": "3"},
        ("john-ct-3",),
        level="IMAGE",
        options=_RELATIONAL,
        unknown=("nameless-ot-1",),
    ),
)
