"""What the gateway holds when the questions of the table are asked: few studies, each there for a rule.

Studies, series, instances and patients have names, which stand in the rows in place of UIDs.  *long* is the
one that has many instances, each of which is answered with as much text as an LT may have: more than sockets
hold of an answer that nobody reads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset

CT, MR, US, SR, XA = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.6.1",
    "1.2.840.10008.5.1.4.1.1.88.11",
    "1.2.840.10008.5.1.4.1.1.12.1",
)
ROOT = "1.2.826.0.1.3680043.8.498.4"
NAMELESS = "nameless"  # of it nothing is known but its UIDs, modality and class
LONG = "long"
MAX_RESULTS = 200  # as the gateway is set up, for both protocols
LONG_INSTANCES = MAX_RESULTS + 50
EXTRA_KEYS = {"study": "Allergies", "series": "ScanOptions", "instance": "SliceThickness"}
ADDED_KEY = "SequenceVariant"  # of series, once all is held
TIMEZONE = "Asia/Tokyo"  # of what does not tell its own: nine hours east of UTC, all the year


@dataclass(frozen=True)
class Series:
    """Series *name*: its modality, its class, how many instances, and further attributes.

    *each* are those of its first instances, one by one.
    """

    name: str
    modality: str = "CT"
    sop_class_uid: str = CT
    instances: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)
    each: tuple[dict[str, Any], ...] = ()

    def sop_uid(self, number: int) -> str:
        return f"{ROOT}.9.{number_of(self.name)}.{number}"


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

    def series_uid(self, series: Series) -> str:
        return f"{self.uid}.{number_of(series.name)}"[:64]


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


def _request(step: str, procedure: str, description: str) -> Dataset:
    item = Dataset()
    item.ScheduledProcedureStepID, item.RequestedProcedureID = step, procedure
    item.RequestedProcedureDescription = description
    return item


STUDIES = (
    Study(
        "john",
        (
            Series(
                "john-ct",
                instances=3,
                attributes={
                    "SeriesNumber": 2,
                    "BodyPartExamined": "CHEST",
                    "ScanOptions": "HELICAL",
                    ADDED_KEY: "SK",
                },
                each=(  # at 10:15:30.5, 10:16:30 and 10:17:30 in Tokyo
                    {"AcquisitionDateTime": "20240115101530.5", "SliceThickness": "1.5"},
                    {"AcquisitionDateTime": "20240115101630+0900", "SliceThickness": "3"},
                    {"AcquisitionDateTime": "20240115011730+0000", "SliceThickness": "3"},
                ),
            ),
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
            PatientAge="053Y",
            PatientSex="M",
            Allergies="NUTS",
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
                    "RequestAttributesSequence": [
                        _request("STEP1", "PROC1", "head"),
                        _request("STEP2", "PROC2", "neck"),
                    ],
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
        "halfwidth",
        (Series("halfwidth-ct"),),
        charset=["ISO 2022 IR 13", "ISO 2022 IR 87"],
        attributes=_attributes("ﾔﾏﾀﾞ^ﾊﾅｺ=山田^花子=やまだ^はなこ", "P12", "20230629", "120000"),
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
        attributes=_attributes("Достоевский^Фёдор", "P9", "20221230", "1959", TimezoneOffsetFromUTC="-0500"),
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
    Study(
        LONG,
        (
            Series(
                "long-xa",
                "XA",
                XA,
                instances=LONG_INSTANCES,
                each=({"PatientComments": "長" * 10_000, "AdditionalPatientHistory": "久" * 10_000},),
            ),
        ),
        charset="ISO_IR 192",
        attributes=_attributes("Long^List", "PLONG", "20230101", "120500"),
    ),
    Study(NAMELESS, (Series("nameless-ot", "OT", SR),)),
)
ALL = tuple(study.name for study in STUDIES)
ALL_SERIES = tuple(series.name for study in STUDIES for series in study.series)
NEWEST_FIRST = (
    *(
        study.name
        for study in sorted(
            (study for study in STUDIES if study.name != NAMELESS),
            key=lambda study: study.attributes["StudyDate"],
            reverse=True,
        )
    ),
    NAMELESS,
)


def uid(name: str) -> str:
    """The UID of the study or series *name*."""
    for study in STUDIES:
        if study.name == name:
            return study.uid
        for series in study.series:
            if series.name == name:
                return study.series_uid(series)
    raise LookupError(name)


def number_of(name: str) -> int:
    """What stands for *name* in a UID: the same in every run, and of names that begin alike in order."""
    return int.from_bytes(name.encode(), "big") % 10**20


def instances_of(name: str, count: int) -> tuple[str, ...]:
    """The names of the first *count* instances of the series *name*."""
    return tuple(f"{name}-{number}" for number in range(1, count + 1))


def names_of(uids: Iterable[str]) -> list[str]:
    """The names of studies, series and instances with these UIDs, and of patients with these IDs."""
    return [_NAMES[one] for one in uids]


def write(folder: Path) -> int:
    """All instances as files under *folder*; how many they are."""
    number = 0
    for number, dataset in enumerate(_datasets(), 1):
        dataset.save_as(folder / f"{number:03}.dcm", enforce_file_format=True)
    return number


def _datasets() -> Iterator[Dataset]:
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
    dataset.SeriesInstanceUID = study.series_uid(series)
    dataset.SOPInstanceUID = series.sop_uid(number)
    dataset.Modality = series.modality
    if study.name != NAMELESS:
        dataset.InstanceNumber = number
    own = next(islice(series.each, number - 1, None), {})
    for keyword, value in (study.attributes | series.attributes | own).items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


_NAMES = {
    known: name
    for study in STUDIES
    for series in study.series
    for known, name in (
        (study.uid, study.name),
        (study.series_uid(series), series.name),
        (study.attributes.get("PatientID", ""), study.attributes.get("PatientID", NAMELESS)),
        *((series.sop_uid(n), f"{series.name}-{n}") for n in range(1, series.instances + 1)),
    )
}
