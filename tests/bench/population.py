"""A hospital's archive, made up: studies of eight years as arrivals, of any size and the same each time.

What matters for questions is distributed as hospitals have it, or so that questions are harder:

- Family names by Zipf over 3,000, flattened.  The most common has 0.8 % of the people, as Smith has in the
  census of the United States of 2010; but there the 239 most common have a quarter of the people, and here
  half, so a name finds more.  Half of the names in capitals, some with accents, with ideographic and
  phonetic groups, or missing.
- Kinds of studies between what is done and what fills an archive.  Of 42.9 million examinations that NHS
  England counted in 2013/14, 54 % were radiographs, 23 % ultrasound, 12 % CT, 6 % MR, 3 % fluoroscopy, 1 %
  nuclear medicine; here 47, 13, 21, 14, 2 and 3 %, because CT and MR have grown since, and much
  ultrasound is never archived.  Reports, presentation states and segmentations make some studies have two
  modalities.
- Ten instances a study on average: radiographs, mammograms and ultrasound have as many as they have, CT and
  MR a tenth; no question for studies meets their instances.
- Patients who come once, and patients who come twenty times; times of day that thicken at noon; as many
  studies on each day, and no weekends, because a span of so many days is then of so many studies.
- Accession numbers and IDs of one length, 5 % without accession number; one study in a thousand with a value
  that is none, or with two where one belongs.

Sources: U.S. Census Bureau, Frequently Occurring Surnames in the 2010 Census; NHS England, Annual Imaging and
Radiodiagnostics Statistics 2013-14.  The rest is judgement.
"""

import bisect
import hashlib
import itertools
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, timedelta
from typing import Any, NamedTuple

import orjson

from dicomscp.archive.index import Arrival
from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dimse.query import encode_identifier
from dicomscp.study import layout

INSTANCES_PER_STUDY = 10
FIRST_DAY, DAYS = date(2018, 1, 1), 8 * 365

_ROOT = "1.2.826.0.1.3680043.8.498"
_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_AVAILABLE_TRANSFER_SYNTAX = 0x00083002  # of what is held, not of what is sent
_STORAGE = "1.2.840.10008.5.1.4.1.1."


class Kind(NamedTuple):
    """A kind of study: its share, its modalities, series and instances, and what it is called."""

    share: int
    modality: str
    sop_class_uid: str
    series: tuple[int, int]
    instances: tuple[int, int]  # in a series
    also: tuple[tuple[float, str, str], ...]  # one more series: how often, its modality and SOP class
    descriptions: tuple[str, ...]
    body_parts: tuple[str, ...]


_SR = ("SR", _STORAGE + "88.33")
_KINDS = (
    Kind(
        34, "DX", _STORAGE + "1.1", (1, 2), (1, 2), ((0.05, "PR", _STORAGE + "11.1"),),
        ("Chest PA and lateral", "Thorax a.p.", "Knee left 2 views", "Hand right", "Pelvis", "Foot 3 views"),
        ("CHEST", "KNEE", "HAND", "PELVIS", "FOOT"),
    ),
    Kind(
        8, "CR", _STORAGE + "1", (1, 1), (1, 2), (),
        ("Chest", "Bedside chest", "Abdomen", "Skull"), ("CHEST", "ABDOMEN", "SKULL"),
    ),
    Kind(
        21, "CT", _STORAGE + "2", (2, 4), (3, 10), ((0.4, *_SR), (0.05, "SEG", _STORAGE + "66.4")),
        ("CT head without contrast", "CT thorax", "CT abdomen and pelvis", "CT angiography aorta",
         "CT lumbar spine", "Low dose lung screening"),
        ("HEAD", "CHEST", "ABDOMEN", "AORTA", "LSPINE"),
    ),
    Kind(
        14, "MR", _STORAGE + "4", (3, 7), (2, 6), ((0.1, "PR", _STORAGE + "11.1"),),
        ("MRI brain", "MRI knee", "MRI lumbar spine", "MR angiography", "MRI prostate", "MRI liver"),
        ("BRAIN", "KNEE", "LSPINE", "PROSTATE", "LIVER"),
    ),
    Kind(
        13, "US", _STORAGE + "6.1", (1, 1), (3, 14), ((0.25, *_SR),),
        ("Abdomen complete", "Thyroid", "Carotid duplex", "Echocardiography"),
        ("ABDOMEN", "THYROID", "CAROTID", "HEART"),
    ),
    Kind(
        5, "MG", _STORAGE + "1.2", (1, 1), (4, 4), ((0.2, *_SR),),
        ("Screening mammography", "Mammography left"), ("BREAST",),
    ),
    Kind(
        2, "PT", _STORAGE + "128", (1, 2), (8, 16), ((1.0, "CT", _STORAGE + "2"),),
        ("PET-CT whole body", "PET-CT brain"), ("WHOLEBODY", "BRAIN"),
    ),
    Kind(
        2, "XA", _STORAGE + "12.1", (2, 5), (1, 3), ((0.5, *_SR),),
        ("Coronary angiography", "Cerebral angiography"), ("HEART", "HEAD"),
    ),
    Kind(
        1, "NM", _STORAGE + "20", (1, 3), (1, 3), (),
        ("Bone scan", "Thyroid scan"), ("WHOLEBODY", "THYROID"),
    ),
)  # fmt: skip

_FAMILIES = (
    "Smith Johnson Williams Brown Jones Miller Davis Garcia Rodriguez Wilson Martinez Anderson Taylor Thomas"
    " Hernandez Moore Martin Jackson Thompson White Lopez Lee Gonzalez Harris Clark Lewis Robinson Walker"
    " Müller Schmidt Schneider Fischer Weber Meyer Wagner Becker Schulz Hoffmann Schäfer Koch Bauer Richter"
    " Klein Wolf Schröder Neumann Schwarz Zimmermann Krüger Hofmann Lehmann Köhler König Jäger Groß Weiß"
    " Dubois Lefèvre Moreau Léger Çelik Yilmaz Öztürk Ångström Sjöberg Østergaard Nowák Dvořák Novotný"
    " O'Brien O'Neill MacDonald McCarthy van^der^Berg De-Vries Ibrahim Nguyen Kowalski Papadopoulos"
)
_GIVEN = (
    "James Mary John Patricia Robert Jennifer Michael Linda William Elizabeth David Barbara Richard Susan"
    " Joseph Jessica Thomas Sarah Charles Karen Anna Maria Peter Hans Jürgen Renée Zoë José María Chloé Björn"
    " Søren Ayşe Mehmet Fatma Katarzyna Piotr Olga Ivan Jana Jiří Eva Marie Lukas Emma Noah Mia Ben Sofia"
)
_JAPANESE = (
    ("Yamada", "山田", "やまだ"), ("Suzuki", "鈴木", "すずき"), ("Tanaka", "田中", "たなか"),
    ("Satou", "佐藤", "さとう"), ("Takahashi", "高橋", "たかはし"), ("Itou", "伊藤", "いとう"),
    ("Watanabe", "渡辺", "わたなべ"), ("Nakamura", "中村", "なかむら"),
)  # fmt: skip
_JAPANESE_GIVEN = (
    ("Tarou", "太郎", "たろう"), ("Hanako", "花子", "はなこ"), ("Ichirou", "一郎", "いちろう"),
    ("Yuki", "雪", "ゆき"), ("Kenji", "健二", "けんじ"), ("Akira", "明", "あきら"),
)  # fmt: skip
_SYLLABLES = "ka ro mi ste bel dan tor ven li gra shi no pe ru zan wil ber go ma tis"
_ENDINGS = "son er ski man ova ini berg ez sen ton"

_NAME_ZIPF = 25  # the most common of 3,000 has 0.8 % of the people, as Smith has
_WITHOUT_NAME, _IRREGULAR, _WITHOUT_ACCESSION, _JAPANESE_SHARE = 0.01, 0.001, 0.05, 0.03
_PATIENTS_PER_STUDY = 0.6


class Patient(NamedTuple):
    """Who was examined."""

    id: str
    name: dict[str, str] | None
    birth_date: str
    sex: str


class Study(NamedTuple):
    """What a study says of itself, for those who ask for it."""

    study_uid: str
    patient: Patient
    date: str
    accession_number: str | None
    kind: Kind


def arrivals(studies: int, *, start: int = 0) -> Iterator[Arrival]:
    """Those of so many studies, `INSTANCES_PER_STUDY` a study on average, in the order they were made.

    *start* counts studies that were made before: others come, of the same patients.
    """
    made = _Made(studies, start)
    for study in made.studies():
        yield from made.instances(study)


def some_studies(studies: int, count: int) -> list[Study]:
    """So many of the *studies* of that archive, of all times."""
    every = max(1, studies // count)
    return list(itertools.islice(_Made(studies, 0).studies(), 0, every * count, every))


def spans(studies: int, modalities: Sequence[str], most: int) -> list[tuple[date, date]]:
    """A span of days for each of *modalities*, within which at most *most* studies have it; for some a day.

    Days are drawn, and how many of them: one, a week, a month or a year, halved until they are few enough.
    """
    made, chance = _Made(studies, 0), random.Random("spans")
    sums = {modality: made.sums(modality) for modality in set(modalities)}
    found = []
    for modality in modalities:
        day, length = chance.randrange(DAYS - 400), chance.choice((1, 7, 31, 366))
        while length > 1 and made.between(sums[modality], day, day + length) > most:
            length //= 2
        first = FIRST_DAY + timedelta(days=day)
        found.append((first, first + timedelta(days=length - 1)))
    return found


def name_prefixes(studies: int, count: int, most: int, *, accents: bool = True) -> list[str]:
    """How names of patients begin, in capitals, each such that at most *most* studies are of one.

    Each is a common family name whole, and as many letters of what follows as that takes; a name that has
    more studies in full is left out, as is, without *accents*, where a name with an accent begins so.
    """
    made = [study.patient.name["Alphabetic"] for study in _Made(studies, 0).studies() if study.patient.name]
    names = sorted(map(plain, made))
    accented = {plain(name) for name in made if not name.isascii()}
    prefixes = []
    for family in map(plain, family_names()):
        first = bisect.bisect_left(names, family)
        end = bisect.bisect_left(names, family + "\uffff")
        if first == end:
            continue
        whole = names[(first + end) // 2]
        for length in range(len(family), len(whole) + 1):
            prefix = whole[:length]
            begin_so = names[bisect.bisect_left(names, prefix) : bisect.bisect_left(names, prefix + "\uffff")]
            if len(begin_so) <= most:
                prefixes += [prefix] if accents or accented.isdisjoint(begin_so) else []
                break
        if len(prefixes) == count:
            break
    return prefixes


def plain(name: str) -> str:
    """A name in capitals without accents."""
    return "".join(
        char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char)
    ).upper()


def one_a_series(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """Those of *arrivals* that are the first of their series: all that studies and series are known by."""
    return (arrival for arrival in arrivals if arrival.key.sop_uid == f"{arrival.key.series_uid}.1")


def dataset(arrival: Arrival) -> bytes:
    """An instance that says what *arrival* says and has nothing else, in Explicit VR Little Endian."""
    said = {tag: text for tag, text in arrival.attributes.items() if tag != _AVAILABLE_TRANSFER_SYNTAX}
    header = orjson.loads(b"{%b}" % b",".join(said.values()))
    return encode_identifier(header, _EXPLICIT_LITTLE, ())


def given_names(count: int = 1000) -> list[str]:
    """The most common given names."""
    return _made_up(_GIVEN.split(), count)


def family_names(count: int = 3000) -> list[str]:
    """The most common family names."""
    return _made_up(_FAMILIES.split(), count)


def _made_up(known: Sequence[str], count: int) -> list[str]:
    """Those *known* first, then names made of syllables."""
    invented = (
        (first + second + ending).capitalize()
        for first, second, ending in itertools.product(
            _SYLLABLES.split(), _SYLLABLES.split(), _ENDINGS.split()
        )
    )
    return list(itertools.islice(itertools.chain(known, invented), count))


class _Zipf:
    """Chooses by rank: the n-th is as often as 1 / (n + *flat*)."""

    def __init__(self, names: Sequence[str], flat: int) -> None:
        self._names = names
        self._sums = list(itertools.accumulate(1 / (rank + flat) for rank in range(1, len(names) + 1)))

    def choose(self, chance: random.Random) -> str:
        return self._names[bisect.bisect(self._sums, chance.random() * self._sums[-1])]


class _Made:
    """One archive; what is drawn of a study depends on its number alone."""

    def __init__(self, studies: int, start: int) -> None:
        self._count, self._start = studies, start
        chance = random.Random("patients")
        self._families, self._given = _Zipf(family_names(), _NAME_ZIPF), _Zipf(given_names(), _NAME_ZIPF)
        self._patients = [self._patient(chance, n) for n in range(max(1, int(studies * _PATIENTS_PER_STUDY)))]
        self._physicians = [self._person(chance)["Alphabetic"] for _ in range(500)]
        self._kinds = random.Random("kinds").choices(_KINDS, [kind.share for kind in _KINDS], k=studies)

    def _patient(self, chance: random.Random, number: int) -> Patient:
        name = None if chance.random() < _WITHOUT_NAME else self._person(chance)
        born = date(1925, 1, 1) + timedelta(days=chance.randrange(90 * 365))
        return Patient(f"{chance.choice('PHX')}{number:07}", name, f"{born:%Y%m%d}", chance.choice("MFMFO"))

    def _person(self, chance: random.Random) -> dict[str, str]:
        if chance.random() < _JAPANESE_SHARE:
            groups = zip(chance.choice(_JAPANESE), chance.choice(_JAPANESE_GIVEN), strict=True)
            written = ("^".join(parts) for parts in groups)
            return dict(zip(("Alphabetic", "Ideographic", "Phonetic"), written, strict=True))
        family, given = self._families.choose(chance), self._given.choose(chance)
        middle = f"^{self._given.choose(chance)}" if chance.random() < 0.2 else ""
        name = f"{family}^{given}{middle}"
        return {"Alphabetic": name.upper() if chance.random() < 0.5 else name}

    def sums(self, modality: str) -> list[int]:
        """For each number of first studies, how many of them may have *modality*."""
        have = {kind for kind in _KINDS if modality in (kind.modality, *(also[1] for also in kind.also))}
        return [0, *itertools.accumulate(kind in have for kind in self._kinds)]

    def between(self, sums: Sequence[int], first: int, end: int) -> int:
        """Of the studies that *sums* counts, those made on the days from *first* and before *end*."""
        low, high = (-(-day * self._count // DAYS) for day in (first, end))
        return sums[min(high, self._count)] - sums[low]

    def studies(self) -> Iterator[Study]:
        """All studies, by the days they were made on."""
        for number in range(self._count):
            chance = random.Random(f"study {self._start + number}")
            returning = chance.random() < 0.4  # of a patient who was here already, or will be
            patients = self._patients
            patient = (
                patients[int(len(patients) * chance.random() ** 2)]
                if returning
                else patients[int(number * _PATIENTS_PER_STUDY) % len(patients)]
            )
            day = FIRST_DAY + timedelta(days=number * DAYS // self._count)
            accession = None if chance.random() < _WITHOUT_ACCESSION else f"A{self._start + number:09}"
            uid = f"{_ROOT}.{chance.randrange(10**20)}.{self._start + number}"
            yield Study(uid, patient, f"{day:%Y%m%d}", accession, self._kinds[number])

    def instances(self, study: Study) -> Iterator[Arrival]:
        """The arrivals of one study."""
        chance = random.Random(study.study_uid)
        kind = study.kind
        of_study = self._of_study(chance, study)
        made = [(kind.modality, kind.sop_class_uid, chance.randint(*kind.instances))
                for _ in range(chance.randint(*kind.series))]  # fmt: skip
        made += [
            (modality, sop_class, chance.randint(*kind.instances) if modality == "CT" else 1)
            for share, modality, sop_class in kind.also
            if chance.random() < share
        ]
        hour = int(min(23, max(0, chance.gauss(12, 4))))
        clock = f"{hour:02}{chance.randrange(60):02}{chance.randrange(60):02}"
        of_study[0x00080030] = _fragment(0x00080030, clock)
        for number, (modality, sop_class_uid, count) in enumerate(made, 1):
            series_uid = f"{study.study_uid}.{number}"
            of_series = of_study | self._of_series(chance, study, modality, number, clock)
            of_series |= {
                0x0020000E: _fragment(0x0020000E, series_uid),
                0x00080016: _fragment(0x00080016, sop_class_uid),
                0x00280010: _fragment(0x00280010, 512),
                0x00280011: _fragment(0x00280011, 512),
                0x00280100: _fragment(0x00280100, 16),
                0x00083002: _fragment(0x00083002, _EXPLICIT_LITTLE),
                0x00080008: _fragment(0x00080008, "ORIGINAL", "PRIMARY", "AXIAL"),
            }
            yield from _instances(
                InstanceKey(study.study_uid, series_uid, ""), sop_class_uid, of_series, count
            )

    def _of_study(self, chance: random.Random, study: Study) -> dict[int, bytes]:
        patient, kind = study.patient, study.kind
        values: dict[int, Sequence[Any]] = {
            0x0020000D: [study.study_uid],
            0x00100020: [patient.id],
            0x00100021: ["HOSPITAL"],
            0x00100030: [patient.birth_date],
            0x00100040: [patient.sex],
            0x00080020: [study.date],
            0x00200010: [f"{chance.randrange(100000)}"],
            0x00081030: [chance.choice(kind.descriptions)],
            0x00080090: [{"Alphabetic": chance.choice(self._physicians)}],
            0x00101010: [f"{(int(study.date[:4]) - int(patient.birth_date[:4])) % 100:03}Y"],
            0x00080050: [study.accession_number] if study.accession_number else [],
            0x00100010: [patient.name] if patient.name else [],
        }
        if chance.random() < _IRREGULAR:
            tag, value = chance.choice(_IRREGULAR_VALUES)
            values[tag] = value if tag != 0x00100020 else [patient.id, *value]
        return {tag: _fragment(tag, *value) for tag, value in values.items()}

    def _of_series(
        self, chance: random.Random, study: Study, modality: str, number: int, clock: str
    ) -> dict[int, bytes]:
        part = chance.choice(study.kind.body_parts)
        values: dict[int, Sequence[Any]] = {
            0x00080060: [modality],
            0x00200011: [number],
            0x0008103E: [f"{part.lower()} {chance.choice(_SERIES_WORDS)}"],
            0x00180015: [part],
            0x00080021: [study.date],
            0x00080031: [clock],
            0x00400244: [study.date],
            0x00400245: [clock],
            0x00080070: [chance.choice(_MAKERS)],
            0x00081010: [f"{modality}{chance.randrange(4)}"],
            0x00080080: ["General Hospital"],
            0x00181030: [f"{study.kind.modality} {part}"],
        }
        if study.accession_number:
            step = {"00400009": {"vr": "SH", "Value": [f"S{study.accession_number}"]}}
            values[0x00400275] = [step]
        return {tag: _fragment(tag, *value) for tag, value in values.items()}


_IRREGULAR_VALUES: tuple[tuple[int, list[Any]], ...] = (
    (0x00080020, ["yesterday"]),
    (0x00080020, ["20200101", "20200102"]),
    (0x00100020, ["ALIAS"]),
    (0x00080050, ["A1", "A2"]),
    (0x00100010, [{"Alphabetic": "Two^Names"}, {"Alphabetic": "Names^Two"}]),
    (0x00081030, ["one", "other"]),
)
_SERIES_WORDS = ("t1", "t2", "thin", "soft tissue", "bone", "lung", "ap", "lateral", "cine", "delayed")
_MAKERS = ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips Medical Systems", "CANON", "FUJIFILM Corporation")


def _fragment(tag: int, *values: Any) -> bytes:
    element = {"vr": public_vr(tag)} | ({"Value": list(values)} if values else {})
    return b'"%08X":%b' % (tag, orjson.dumps(element))


def _instances(
    place: InstanceKey, sop_class_uid: str, shared: dict[int, bytes], count: int
) -> Iterator[Arrival]:
    for number in range(1, count + 1):
        key = place._replace(sop_uid=f"{place.series_uid}.{number}")
        yield Arrival(
            key,
            sop_class_uid,
            _EXPLICIT_LITTLE,
            hashlib.sha256(key.sop_uid.encode()).digest(),
            1_700_000_000_000_000 + number,
            "MODALITY",
            layout.instance_path(key),
            525_000,
            shared
            | {
                0x00080018: b'"00080018":{"vr":"UI","Value":["%b"]}' % key.sop_uid.encode(),
                0x00200013: b'"00200013":{"vr":"IS","Value":[%d]}' % number,
                0x00080033: b'"00080033":{"vr":"TM","Value":["%06d.5"]}' % (100000 + number),
            },
        )
