import re
import time
from datetime import datetime, timedelta
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomscp.dicom import matching
from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.matching import (
    EMPTY_VALUE,
    INSTANCE_TAGS,
    SERIES_TAGS,
    STANDARD,
    STUDY_TAGS,
    Adjusted,
    AllOf,
    AnyOf,
    BadValueError,
    Empty,
    Fuzzy,
    IdentifierError,
    Items,
    Key,
    Level,
    Model,
    Moments,
    Options,
    Query,
    Range,
    Single,
    UIDList,
    Wildcard,
    Zone,
    adjusted,
    answerer,
    header_tag,
    identity_keys,
    matcher,
    query_from_identifier,
    query_from_parameters,
)
from dicomscp.errors import RefusedError

LEVEL, CHARACTER_SET, TIMEZONE = 0x00080052, 0x00080005, 0x00080201
SERIES_DATE, SERIES_TIME = 0x00080021, 0x00080031
BIRTH_DATE, BIRTH_TIME, ISSUER = 0x00100030, 0x00100032, 0x00100021
STUDY_DATE, STUDY_TIME, ACCESSION, MODALITY = 0x00080020, 0x00080030, 0x00080050, 0x00080060
MODALITIES, PATIENT_NAME, PATIENT_ID = 0x00080061, 0x00100010, 0x00100020
STUDY_UID, SERIES_UID, SOP_UID = 0x0020000D, 0x0020000E, 0x00080018
SERIES_NUMBER, INSTANCE_NUMBER, REQUEST_ATTRIBUTES = 0x00200011, 0x00200013, 0x00400275
STEP_ID, PROCEDURE_ID, ACQUISITION = 0x00400009, 0x00401001, 0x0008002A
KVP, ADMITTING_DATE = 0x00180060, 0x00380020
OTHER_NAMES, CODES, CODE_VALUE, MEANING = 0x00101001, 0x00400008, 0x00080100, 0x00080104
PATIENT_COMMENTS, PATIENT_WEIGHT, STUDY_DESCRIPTION = 0x00104000, 0x00101030, 0x00081030


def identifier(level, **elements):
    """An identifier, of keywords of this module."""
    named = {globals()[keyword]: value for keyword, value in elements.items()}
    return {LEVEL: ("CS", [level])} | {
        tag: (public_vr(tag), value if isinstance(value, list) else [value]) for tag, value in named.items()
    }


def key(tag, *values):
    """The key that a C-FIND identifier at IMAGE level makes of *values*."""
    above = {PATIENT_ID: "P", STUDY_UID: "1", SERIES_UID: "1"}
    whole = {other: (public_vr(other), [value]) for other, value in above.items() if other != tag}
    query = query_from_identifier(
        {LEVEL: ("CS", ["IMAGE"]), **whole, tag: (public_vr(tag), list(values))}, root="STUDY"
    )
    return next((one for one in query.keys if one.tag == tag), None)


def match(tag, *values):
    return key(tag, *values).match


def ask(*keys, **fields):
    return matcher(Query(Level.IMAGE, keys, None, None, **fields))


def element(tag, *values):
    return {f"{tag:08X}": {"vr": public_vr(tag), "Value": list(values)}}


def fits(tag, asked, *held):
    """Whether an object with the values *held* matches the key *asked*."""
    keys = [one for one in (key(tag, *(asked if isinstance(asked, list) else [asked])),) if one]
    return ask(*keys)(element(tag, *held) if held else {f"{tag:08X}": {"vr": public_vr(tag)}})


def person(alphabetic="", ideographic="", phonetic=""):
    groups = {"Alphabetic": alphabetic, "Ideographic": ideographic, "Phonetic": phonetic}
    return {group: text for group, text in groups.items() if text}


# ── tables ───────────────────────────────────────────────────────────────────────────────────────

# PS3.4 tables C.6-1 to C.6-5, unique and required keys; PS3.18 tables 10.6.1-5 and 10.6.3-3 to 10.6.3-5.
REQUIRED = {
    "PATIENT": "PatientName PatientID",
    "STUDY": (
        "StudyDate StudyTime AccessionNumber PatientName PatientID StudyID StudyInstanceUID ModalitiesInStudy"
        " ReferringPhysicianName InstanceAvailability RetrieveURL TimezoneOffsetFromUTC PatientBirthDate"
        " PatientSex NumberOfStudyRelatedSeries NumberOfStudyRelatedInstances"
    ),
    "SERIES": (
        "Modality SeriesNumber SeriesInstanceUID SeriesDescription PerformedProcedureStepStartDate"
        " PerformedProcedureStepStartTime RequestAttributesSequence NumberOfSeriesRelatedInstances"
        " RetrieveURL"
    ),
    "IMAGE": (
        "InstanceNumber SOPInstanceUID SOPClassUID Rows Columns BitsAllocated NumberOfFrames RetrieveURL"
        " InstanceAvailability"
    ),
}


@pytest.mark.parametrize("level", list(Level))
def test_what_the_standard_requires_is_supported_at_its_level_and_below(level):
    wanted = {matching.keyword_dict[keyword] for keyword in REQUIRED[level].split()}
    for other in list(Level)[list(Level).index(level) :]:
        assert wanted <= STANDARD.supported(other)


def test_each_attribute_belongs_to_one_level():
    assert not STUDY_TAGS & SERIES_TAGS
    assert not STUDY_TAGS & INSTANCE_TAGS
    assert not SERIES_TAGS & INSTANCE_TAGS
    assert STANDARD.index_tags == STUDY_TAGS | SERIES_TAGS | INSTANCE_TAGS
    assert STANDARD.optional(Level.PATIENT) < STUDY_TAGS
    assert MODALITY not in STANDARD.supported(Level.STUDY)
    assert STANDARD.level_of(PATIENT_ID) is Level.PATIENT
    assert STANDARD.level_of(0x00081190) is None


@pytest.mark.parametrize("level", list(Level))
def test_a_key_is_unique_required_optional_or_computed(level):
    kinds = [
        {STANDARD.unique(level)},
        STANDARD.required(level),
        STANDARD.optional(level),
        STANDARD.computed(level),
    ]
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds))
    assert frozenset().union(*kinds) <= STANDARD.supported(level)


def test_a_model_knows_extra_keys_at_their_level_and_below():
    model = Model({Level.SERIES: [KVP], Level.STUDY: [ADMITTING_DATE]})
    assert model.level_of(KVP) is Level.SERIES
    assert KVP in model.supported(Level.SERIES) & model.supported(Level.IMAGE) & model.optional(Level.SERIES)
    assert KVP not in model.supported(Level.STUDY) | STANDARD.supported(Level.IMAGE)
    assert model.index_tags == STANDARD.index_tags | {KVP, ADMITTING_DATE}
    assert ADMITTING_DATE in model.study_tags
    query = query_from_identifier(
        identifier("SERIES", STUDY_UID="1", KVP="120", ADMITTING_DATE=""), root="STUDY", model=model
    )
    assert query.keys[1:] == (Key(KVP, "DS", Single("120")),)
    assert {KVP, ADMITTING_DATE} < query.returns
    params = [("KVP", "120"), ("includefield", "00380020")]
    query, warnings = query_from_parameters(Level.SERIES, params, max_results=1, model=model)
    assert (query.keys, warnings) == ((Key(KVP, "DS", Single("120")),), [])
    assert ADMITTING_DATE in query.returns


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("NoSuchThing", "no attribute"),
        ("", "no attribute"),
        ("00180000", "no attribute"),
        ("00020010", "no attribute"),
        ("00091001", "no attribute"),
        ("6000", "no attribute"),
        ("PatientName", "known already"),
        ("00100020", "known already"),
        ("NumberOfStudyRelatedSeries", "known already"),
        ("SpecificCharacterSet", "known already"),
        ("RetrieveAETitle", "known already"),
        ("PixelData", "VR OB or OW"),
        ("SmallestImagePixelValue", "VR US or SS"),
        ("EncapsulatedDocument", "VR OB"),
    ],
)
def test_what_cannot_be_an_extra_key_is_refused_by_name(name, told):
    with pytest.raises(BadValueError, match=told) as refused:
        header_tag(name)
    assert repr(name) in str(refused.value)


def test_an_extra_key_is_named_by_keyword_or_digits():
    assert header_tag("KVP") == header_tag("00180060") == KVP
    assert header_tag("0018a001") == 0x0018A001


# ── kinds of matching, PS3.4 C.2.2.2 ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("values", [(), ("",), ("  ",), ("*",), ("**",), ("", "")])
@pytest.mark.parametrize("tag", [PATIENT_NAME, STUDY_DATE, SOP_UID, INSTANCE_NUMBER])
def test_no_value_or_a_lone_star_matches_everything(tag, values):
    """PS3.4 C.2.2.2.3."""
    assert key(tag, *values) is None


@pytest.mark.parametrize(
    ("tag", "values", "expected"),
    [
        (ACCESSION, ["A1"], Single("A1")),
        (ACCESSION, [" A1 "], Single("A1")),
        (ACCESSION, ["A?"], Wildcard("A?")),
        (STUDY_DESCRIPTION, ["[A]*"], Wildcard("[A]*")),
        (MODALITY, ["CT", "MR"], AnyOf((Single("CT"), Single("MR")))),
        (SOP_UID, ["1.2"], Single("1.2")),
        (SOP_UID, ["1.2", "1.3"], UIDList(("1.2", "1.3"))),
        (SOP_UID, ["bad uid".replace(" ", "_")], Single("bad_uid")),
        (STUDY_DATE, ["20200101"], Single("20200101")),
        (STUDY_DATE, ["2020.01.01"], Single("20200101")),
        (STUDY_DATE, ["20200101-"], Range("20200101", None)),
        (STUDY_DATE, ["-20200101"], Range(None, "20200101")),
        (STUDY_DATE, ["20190101 - 20200101"], Range("20190101", "20200101")),
        (STUDY_TIME, ["10"], Range("100000.000000", "105959.999999")),
        (STUDY_TIME, ["101530.5"], Range("101530.500000", "101530.599999")),
        (STUDY_TIME, ["1015-11"], Range("101500.000000", "115959.999999")),
        (STUDY_TIME, ["10:15:30-"], Range("101530.000000", None)),
        (ACQUISITION, ["2020"], Adjusted(Range("2020+0000", "2020+0000"))),
        (ACQUISITION, ["20200101-0500"], Adjusted(Range("20200101-0500", "20200101-0500"))),
        (ACQUISITION, ["2020-2021"], Adjusted(Range("2020+0000", "2021+0000"))),
        (ACQUISITION, ["20200101-0500-20200102-0500"], Adjusted(Range("20200101-0500", "20200102-0500"))),
        (ACQUISITION, ["-20200102+0100"], Adjusted(Range(None, "20200102+0100"))),
        (INSTANCE_NUMBER, ["05"], Single("05")),
    ],
)
def test_a_value_asks_for_what_its_vr_says(tag, values, expected):
    assert match(tag, *values) == expected


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        (STUDY_DATE, "2020"),
        (STUDY_DATE, "2020*"),
        (STUDY_DATE, "20201301"),
        (STUDY_DATE, "20200101-20209999"),
        (STUDY_DATE, "-"),
        (STUDY_DATE, "20200101-20200102-20200103"),
        (STUDY_TIME, "25"),
        (STUDY_TIME, "1015-9"),
        (ACQUISITION, "20200230"),
        (ACQUISITION, "0000"),
        (INSTANCE_NUMBER, "first"),
        (INSTANCE_NUMBER, "1_0"),
        (INSTANCE_NUMBER, "\uff11"),
        (INSTANCE_NUMBER, "nan"),
        (SOP_UID, "1.2.*"),
        (SOP_UID, "1.2 3"),
        (SOP_UID, "1" * 65),
        (SOP_UID, "é"),
    ],
)
def test_a_value_that_nothing_can_equal_is_an_error_that_names_the_key(tag, value):
    with pytest.raises(BadValueError, match=f"{tag >> 16:04X},{tag & 0xFFFF:04X}"):
        key(tag, value)


@pytest.mark.parametrize(
    ("tag", "asked", "held", "is_match"),
    [
        # Single value: case counts but in PN (C.2.2.2.1); spaces around do not.
        (ACCESSION, "abc", ["abc"], True),
        (ACCESSION, "abc", ["ABC"], False),
        (ACCESSION, "abc", [" abc "], True),
        (ACCESSION, "abc", [], False),
        (ACCESSION, "abc", [None], False),
        (ACCESSION, "abc", [None, "x", "abc"], True),
        (MODALITY, ["CT", "MR"], ["MR"], True),
        (MODALITY, ["CT", "MR"], ["US"], False),
        # Lists of UID (C.2.2.2.2).
        (SOP_UID, ["1.2", "1.3"], ["1.3"], True),
        (SOP_UID, ["1.2", "1.3"], ["1.30"], False),
        # Wildcards (C.2.2.2.4).
        (ACCESSION, "a*c", ["ac"], True),
        (ACCESSION, "a*c", ["a\nb c"], True),
        (ACCESSION, "a?c", ["ac"], False),
        (ACCESSION, "a?c", ["abc"], True),
        (ACCESSION, "*b*", ["abc"], True),
        (ACCESSION, "*B*", ["abc"], False),
        (ACCESSION, "[a]*", ["abc"], False),
        (ACCESSION, "[a]*", ["[a]bc"], True),
        (ACCESSION, "?*", [], False),
        # Numbers by value.
        (INSTANCE_NUMBER, "05", [5], True),
        (INSTANCE_NUMBER, "5", ["5"], True),
        (INSTANCE_NUMBER, "5", [50], False),
        (INSTANCE_NUMBER, "5", ["five"], False),
        (PATIENT_WEIGHT, "70", [70.0], True),
        # Dates (C.2.2.2.5).
        (STUDY_DATE, "20200101", ["20200101"], True),
        (STUDY_DATE, "20200101", ["2020.01.01"], True),
        (STUDY_DATE, "20200101-20200201", ["20200201"], True),
        (STUDY_DATE, "20200101-20200201", ["20200202"], False),
        (STUDY_DATE, "20200231-", ["20200301"], True),
        (STUDY_DATE, "-20200101", [], False),
        (STUDY_DATE, "-20200101", ["unknown"], False),
        # Times: what is not written is anything; a range does not go over midnight.
        (STUDY_TIME, "1015", ["101559.9"], True),
        (STUDY_TIME, "1015", ["1016"], False),
        (STUDY_TIME, "101530", ["10:15:30"], True),
        (STUDY_TIME, "10-1015", ["101559"], True),
        (STUDY_TIME, "10-1015", ["095959.999999"], False),
        (STUDY_TIME, "2300-0100", ["2330"], False),
        (STUDY_TIME, "10", ["later"], False),
        # Date-times: offsets count if both tell theirs.
        (ACQUISITION, "202001", ["20200131235959.999999"], True),
        (ACQUISITION, "2020", ["20210101"], False),
        (ACQUISITION, "20200101120000+0000", ["20200101130000+0100"], True),
        (ACQUISITION, "20200101120000+0000", ["20200101120000+0100"], False),
        (ACQUISITION, "20200101120000+0000", ["20200101120000"], True),
        (ACQUISITION, "20200101120000", ["20200101120000-0500"], False),
        (ACQUISITION, "20200101120000", ["20200101070000-0500"], True),
        (ACQUISITION, "20200101-", ["20191231235959.9"], False),
        (ACQUISITION, "20200229", ["20200229101530.25"], True),
        (ACQUISITION, "9999", ["99991231+0500"], True),
        (ACQUISITION, "0001+0000-", ["0001+1400"], False),
        (ACQUISITION, "20200101101530.2", ["20200101101530.25"], True),
        (ACQUISITION, "20200101101560", ["20200101101559"], True),
        (ACQUISITION, "2020", ["then", 5], False),
    ],
)
def test_an_object_matches_if_one_of_its_values_does(tag, asked, held, is_match):
    assert fits(tag, asked, *held) is is_match


@pytest.mark.parametrize(
    ("asked", "held", "is_match"),
    [
        ("DOE^JOHN", person("Doe^John"), True),
        ("doe^john^^", person("Doe^John"), True),
        ("doe^john", person("Doe^John^^Dr"), False),
        ("Doe", person("Doe^John"), False),
        ("STRAßE^a", person("strasse^A"), True),
        ("山田^太郎", person("Yamada^Tarou", "山田^太郎", "やまだ^たろう"), True),
        ("Yamada^Tarou=山田^太郎", person("YAMADA^TAROU", "山田^太郎"), True),
        ("Yamada^Tarou=山田^花子", person("YAMADA^TAROU", "山田^太郎"), False),
        ("=山田^太郎", person("Yamada^Tarou", "山田^太郎"), True),
        ("=山田^太郎", person("Yamada^Tarou"), False),
        ("doe*", person("DOE^JOHN"), True),
        ("doe^*", person("Doe"), True),
        ("*john*", person("Doe^John"), True),
        ("d?e^j*", person("Doe^John"), True),
        ("*山*", person("Yamada^Tarou", "山田^太郎"), True),
        ("yama*=*花*", person("Yamada^Tarou", "山田^太郎"), False),
        ("doe*", "DOE^JOHN", True),
        ("doe*", {}, False),
        ("doe", 5, False),
    ],
)
def test_names_match_by_their_component_groups_without_case(asked, held, is_match):
    assert fits(PATIENT_NAME, asked, held) is is_match


@given(st.text("ab*?[]!-", max_size=8), st.text("ab*?[]!-", min_size=1, max_size=8))
def test_wildcards_are_star_and_question_mark_and_nothing_else(pattern, text):
    plain = re.compile(
        "".join({"*": ".*", "?": "."}.get(character, re.escape(character)) for character in pattern)
    )
    asked = Key(ACCESSION, "SH", Wildcard(pattern))
    assert ask(asked)(element(ACCESSION, text)) is (plain.fullmatch(text) is not None)
    if not set(pattern) & set("[]!"):
        assert ask(asked)(element(ACCESSION, text)) is fnmatchcase(text, pattern)


def test_a_pattern_of_many_stars_is_decided_at_once():
    assert not fits(STUDY_DESCRIPTION, "*a" * 30 + "*b", "a" * 5000)


LONG = 1 << 18  # characters, of 1 MiB that an identifier may have


@pytest.mark.parametrize(
    ("tag", "values"),
    [
        (STUDY_DATE, ["-" * LONG]),
        (ACQUISITION, ["-" * LONG]),
        (STUDY_DESCRIPTION, ["*a" * LONG]),
        (PATIENT_NAME, ["a?" * LONG]),
        (ACCESSION, [str(n) for n in range(LONG)]),
    ],
)
def test_what_would_keep_others_waiting_is_refused_at_once(tag, values):
    began = time.thread_time()
    with pytest.raises(BadValueError, match=f"{tag >> 16:04X},{tag & 0xFFFF:04X}"):
        key(tag, *values)
    assert time.thread_time() - began < 0.5  # and not the seconds that it took to read them


def test_fuzzy_names_have_bounds_too():
    for names, multiple in ((["a " * LONG], False), (["b", "a " * LONG], True)):
        with pytest.raises(BadValueError, match="longer"):
            question(Options(fuzzy=True, multiple=multiple), OTHER_NAMES=names)


def test_a_number_held_is_none_that_only_python_takes_for_one():
    assert not ask(key(INSTANCE_NUMBER, "10"))(element(INSTANCE_NUMBER, "1_0"))
    assert ask(key(INSTANCE_NUMBER, "10"))(element(INSTANCE_NUMBER, "10"))


@given(st.text(max_size=40))
def test_any_text_is_a_match_or_a_refusal(text):
    for tag in (PATIENT_NAME, STUDY_DATE, STUDY_TIME, ACQUISITION, INSTANCE_NUMBER, SOP_UID, ACCESSION):
        try:
            asked = key(tag, text)
        except RefusedError:
            continue
        if asked:
            ask(asked)(element(tag, text))


# ── sequences, C.2.2.2.6 ─────────────────────────────────────────────────────────────────────────


def request(step, procedure):
    return {**element(STEP_ID, step), **element(PROCEDURE_ID, procedure)}


def test_the_keys_of_a_sequence_must_match_in_one_item():
    item = {STEP_ID: ("SH", ["S1"]), PROCEDURE_ID: ("SH", ["P*"]), PATIENT_ID: ("LO", [""])}
    asked = key(REQUEST_ATTRIBUTES, item)
    assert asked.match == Items((Key(STEP_ID, "SH", Single("S1")), Key(PROCEDURE_ID, "SH", Wildcard("P*"))))
    one_item = element(REQUEST_ATTRIBUTES, request("S0", "X"), request("S1", "P1"))
    apart = element(REQUEST_ATTRIBUTES, request("S1", "X"), request("S0", "P1"))
    assert ask(asked)(one_item)
    assert not ask(asked)(apart)
    assert not ask(asked)({})


def test_a_sequence_without_values_matches_everything():
    assert key(REQUEST_ATTRIBUTES) is None
    assert key(REQUEST_ATTRIBUTES, {}) is None
    assert key(REQUEST_ATTRIBUTES, {STEP_ID: ("SH", [])}) is None


def test_a_sequence_key_has_one_item():
    with pytest.raises(BadValueError, match="RequestAttributesSequence"):
        key(REQUEST_ATTRIBUTES, {}, {})


# ── C-FIND, PS3.4 C.4.1 and C.6 ──────────────────────────────────────────────────────────────────


def test_an_identifier_becomes_keys_and_what_to_return():
    query = query_from_identifier(
        identifier("STUDY", PATIENT_NAME="Doe*", STUDY_DATE="", CHARACTER_SET="ISO_IR 100", MODALITIES="CT"),
        root="STUDY",
    )
    assert query.level is Level.STUDY
    assert query.keys == (
        Key(PATIENT_NAME, "PN", Wildcard("Doe*")),
        Key(MODALITIES, "CS", Single("CT")),
    )
    assert query.returns == query.always == {PATIENT_NAME, STUDY_DATE, MODALITIES, STUDY_UID}
    assert (query.limit, query.offset) == (None, 0)


@pytest.mark.parametrize(
    ("root", "asked"),
    [
        ("PATIENT", identifier("PATIENT", PATIENT_NAME="Doe")),
        ("PATIENT", identifier("STUDY", PATIENT_ID="P")),
        ("PATIENT", identifier("SERIES", PATIENT_ID="P", STUDY_UID="1")),
        ("PATIENT", identifier("IMAGE", PATIENT_ID="P", STUDY_UID="1", SERIES_UID="2")),
        ("STUDY", identifier("STUDY")),
        ("STUDY", identifier("SERIES", STUDY_UID="1", PATIENT_NAME="Doe")),
        ("STUDY", identifier("IMAGE", STUDY_UID="1", SERIES_UID="2", SOP_UID=["3", "4"])),
        ("STUDY", identifier("STUDY", SERIES_UID="", MODALITY="", PROCEDURE_ID="not of this model")),
        ("STUDY", identifier("STUDY", TIMEZONE="+0100")),
    ],
)
def test_what_an_information_model_allows_is_taken(root, asked):
    assert query_from_identifier(asked, root=root).level == asked[LEVEL][1][0]


@pytest.mark.parametrize(
    ("root", "asked", "told"),
    [
        ("STUDY", {}, "Level"),
        ("STUDY", identifier([]), "Level"),
        ("STUDY", identifier("INSTANCE"), "Level"),
        ("STUDY", identifier(["STUDY", "SERIES"]), "Level"),
        ("STUDY", identifier("PATIENT"), "PATIENT"),
        ("PATIENT", identifier("STUDY"), "PatientID"),
        ("PATIENT", identifier("STUDY", PATIENT_ID="P*"), "PatientID"),
        ("PATIENT", identifier("SERIES", STUDY_UID="1"), "PatientID"),
        ("STUDY", identifier("SERIES"), "StudyInstanceUID"),
        ("STUDY", identifier("SERIES", STUDY_UID=["1", "2"]), "StudyInstanceUID"),
        ("STUDY", identifier("IMAGE", STUDY_UID="1"), "SeriesInstanceUID"),
        ("STUDY", identifier("STUDY", SERIES_UID="1"), "SeriesInstanceUID"),
        ("STUDY", identifier("STUDY", MODALITY="CT"), "Modality"),
        ("PATIENT", identifier("PATIENT", STUDY_DATE="20200101"), "StudyDate"),
    ],
)
def test_what_an_information_model_does_not_allow_is_refused(root, asked, told):
    """Status A900: the identifier does not match the SOP class."""
    asked = asked if LEVEL not in asked else {**asked, LEVEL: ("CS", _flat(asked[LEVEL][1]))}
    with pytest.raises(IdentifierError, match=told):
        query_from_identifier(asked, root=root)


def _flat(level):
    return level[0] if level and isinstance(level[0], list) else level


def test_a_time_zone_in_an_identifier_is_a_key_unless_dates_are_adjusted_by_it():
    """C.2.2.2."""
    asked = identifier("STUDY", TIMEZONE="+0100")
    for adjusts in (False, True):
        query = query_from_identifier(asked, root="STUDY", options=Options(timezone=adjusts))
        assert [one.tag for one in query.keys] == ([] if adjusts else [TIMEZONE])
        assert TIMEZONE in query.returns


@pytest.mark.parametrize(
    ("local", "own", "held", "is_match"),
    [
        (0, None, "19980128073000-0300", True),
        (0, None, "19980128103000", True),
        (2, None, "19980128103000", True),
        (2, None, "19980128103000+0200", True),
        (2, None, "19980128073000-0300", False),
        (2, "+0000", "19980128083000", True),
        (2, "+0000", "19980128103000", False),
    ],
)
def test_a_date_time_without_offset_is_in_the_zone_of_its_entity_or_the_local_one(local, own, held, is_match):
    """C.2.2.2.5.3 d; the first is the example of C.2.2.2.1.3, where the local zone is UTC's."""
    query = query_from_identifier(
        identifier("IMAGE", STUDY_UID="1", SERIES_UID="1", ACQUISITION="19980128103000"),
        root="STUDY",
        local=lambda _: timedelta(hours=local),
    )
    found = element(STUDY_UID, "1") | element(SERIES_UID, "1") | element(ACQUISITION, held)
    assert {STUDY_UID, SERIES_UID, ACQUISITION, TIMEZONE} <= query.returns
    assert matcher(query)(found | (element(TIMEZONE, own) if own else {})) is is_match


# ── beyond the baseline ──────────────────────────────────────────────────────────────────────────

RELATIONAL = Options(relational=True)


def question(options, level="STUDY", root="STUDY", **elements):
    return query_from_identifier(identifier(level, **elements), root=root, options=options)


def finds(query, **held):
    """Whether an object with these values, by keywords of this module, matches."""
    attributes = {}
    for keyword, value in held.items():
        attributes |= element(globals()[keyword], *(value if isinstance(value, list) else [value]))
    return matcher(query)(attributes)


@pytest.mark.parametrize(
    ("asked", "held", "is_match"),
    [
        ("Smith^Mary", person("Mary^Smith"), True),
        ("Smith^Mary", person("Smyth^Mary"), True),
        ("smith, mary", person("Mary Smith"), True),
        ("Swain", person("Swayne^Bob"), True),
        ("Müller", person("MUELLER^JOERG"), True),
        ("Smith^Mary", person("Smith^John"), False),
        ("Smith^Mary^Ann", person("Smith^Mary"), False),
        ("mar*", person("Smith^Mary"), True),
        ("mar* smyth", person("Smith^Mary"), True),
        ("mar*", person("Doe^Otmar"), False),
        ("d*n", person("Doe^John"), True),
        ("*oe^j*", person("Doe^John"), True),
        ("太郎 山田", person("Yamada^Tarou", "山田^太郎"), True),
        ("山田^花子", person("Yamada^Tarou", "山田^太郎"), False),
        ("Tarou^Yamada=太郎", person("Yamada^Tarou", "山田^太郎"), True),
        ("Tarou^Yamada=花子", person("Yamada^Tarou", "山田^太郎"), False),
        ("=太郎", person("Yamada^Tarou"), False),
        ("Yamada^太郎", person("Yamada^Tarou", "山田^太郎"), False),
        ("^", person("Doe"), False),
        ("O'Brien", person("OBrien^Pat"), True),
        ("Doe", "DOE^JOHN", True),
        ("Doe", 5, False),
    ],
)
def test_fuzzy_matching_takes_parts_in_any_order_and_by_their_sound(asked, held, is_match):
    """PS3.4 C.2.2.2.1.1."""
    query = question(Options(fuzzy=True), PATIENT_NAME=asked)
    assert query.keys == (Key(PATIENT_NAME, "PN", Fuzzy(asked)),)
    assert finds(query, PATIENT_NAME=held) is is_match


@given(st.text("ab ^=*?'é", max_size=6), st.text("ab ^'é", max_size=8))
def test_what_matches_literally_matches_fuzzily(asked, held):
    literal, fuzzy = (question(Options(fuzzy=is_fuzzy), PATIENT_NAME=asked) for is_fuzzy in (False, True))
    if finds(literal, PATIENT_NAME=person(held)):
        assert finds(fuzzy, PATIENT_NAME=person(held))


@pytest.mark.parametrize("tag", ["ACCESSION", "PATIENT_NAME", "STUDY_DATE", "MODALITIES"])
def test_two_quotation_marks_ask_for_no_value(tag):
    """PS3.4 C.2.2.2.7."""
    query = question(Options(empty=True), **{tag: EMPTY_VALUE})
    assert [one.match for one in query.keys] == [Empty()]
    assert finds(query)
    assert matcher(query)({f"{globals()[tag]:08X}": {"vr": "LO"}})
    assert matcher(query)({f"{globals()[tag]:08X}": {"vr": "LO", "Value": [None]}})
    assert not finds(query, **{tag: "20200101"})


def test_quotation_marks_are_a_value_unless_it_is_agreed():
    query = question(Options(), ACCESSION=EMPTY_VALUE)
    assert [one.match for one in query.keys] == [Single('""')]
    assert not finds(query)
    assert [one.match for one in question(Options(empty=True), ACCESSION='"').keys] == [Single('"')]


def test_a_sequence_may_be_asked_to_have_no_items():
    query, _ = query_from_parameters(
        Level.SERIES,
        [("emptyvaluematching", "true"), ("RequestAttributesSequence.ScheduledProcedureStepID", '""')],
        max_results=1,
    )
    assert query.keys == (Key(REQUEST_ATTRIBUTES, "SQ", Items((Key(STEP_ID, "SH", Empty()),))),)
    assert matcher(query)(element(REQUEST_ATTRIBUTES, request("S1", "P"), {}))
    assert not matcher(query)(element(REQUEST_ATTRIBUTES, request("S1", "P")))


@pytest.mark.parametrize(
    ("tag", "asked", "held", "is_match"),
    [
        ("MODALITIES", ["CT", "PT"], ["CT", "PT", "SR"], True),
        ("MODALITIES", ["PT", "CT"], ["CT", "PT"], True),
        ("MODALITIES", ["CT", "PT"], ["CT"], False),
        ("MODALITIES", ["CT", "PT"], [], False),
        # One value at most: what several mean is not defined there, and any will do.
        ("ACCESSION", ["A", "B"], ["B"], True),
        ("STUDY_UID", ["1", "2"], ["2"], True),
    ],
)
def test_several_values_must_all_be_there_where_that_is_defined(tag, asked, held, is_match):
    """PS3.4 C.2.2.2.8."""
    assert finds(question(Options(multiple=True), **{tag: asked}), **{tag: held}) is is_match


def test_several_values_are_names_too_and_have_no_wildcards():
    query = question(Options(multiple=True, fuzzy=True), OTHER_NAMES=["Doe", "Roe"])
    assert query.keys[0].match == AllOf((Fuzzy("Doe"), Fuzzy("Roe")))
    assert question(Options(), MODALITIES=["CT", "P*"]).keys[0].match == AnyOf((Single("CT"), Wildcard("P*")))
    with pytest.raises(BadValueError, match="ModalitiesInStudy"):
        question(Options(multiple=True), MODALITIES=["CT", "P*"])


# ── what is not known, C.2.2.1.2 ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tag", "asked"),
    [
        ("ACCESSION", "A"),
        ("ACCESSION", "A*"),
        ("PATIENT_NAME", "Doe"),
        ("STUDY_DATE", "20200101-"),
        ("MODALITIES", ["CT", "MR"]),
        ("PATIENT_WEIGHT", "70"),
        ("PATIENT_ID", "P"),
    ],
)
def test_a_value_that_is_not_known_matches_if_so_agreed(tag, asked):
    asked = identifier("STUDY", **{tag: asked})
    strict, lenient = (
        query_from_identifier(asked, root="STUDY", matches_unknown=unknown) for unknown in (False, True)
    )
    assert (finds(strict), finds(lenient)) == (False, True)
    assert finds(lenient, **{tag: [None]})
    assert not finds(lenient, **{tag: "19990101"})


def test_the_unique_key_of_patients_is_always_known():
    """In Study Root it is a key like others (C.3.2)."""
    asked = identifier("STUDY", PATIENT_ID="P")
    of_patients = query_from_identifier(asked, root="PATIENT", matches_unknown=True)
    assert not finds(of_patients)
    assert finds(of_patients, PATIENT_ID="P")


def test_what_is_not_known_in_an_item_matches_too():
    item = {STEP_ID: ("SH", ["S1"])}
    asked = {LEVEL: ("CS", ["SERIES"]), STUDY_UID: ("UI", ["1"]), REQUEST_ATTRIBUTES: ("SQ", [item])}
    query = query_from_identifier(asked, root="STUDY", matches_unknown=True)
    assert finds(query, STUDY_UID="1")
    assert finds(query, STUDY_UID="1", REQUEST_ATTRIBUTES={})
    assert not finds(query, STUDY_UID="1", REQUEST_ATTRIBUTES=request("S2", "P"))


def test_parameters_of_qido_match_only_what_is_known():
    query, _ = query_from_parameters(Level.STUDY, [("AccessionNumber", "A*")], max_results=1)
    assert not finds(query)


# ── dates with times, C.2.2.2.5.4, and time zones, C.2.2.2.1.3 ───────────────────────────────────

COMBINED = Options(combined=True)
AT = datetime(2006, 7, 5, 10), datetime(2006, 7, 7, 18, 0, 59, 999999)  # noqa: DTZ001 - as the query says


@pytest.mark.parametrize(
    ("date", "time", "expected"),
    [
        ("20060705-20060707", "1000-1800", Moments(STUDY_TIME, *AT)),
        ("20060705-", "1000-", Moments(STUDY_TIME, AT[0], None)),
        ("-20060707", "-1800", Moments(STUDY_TIME, None, AT[1])),
        ("20060705-", "1000-1800", None),
        ("20060705-20060707", "10", None),
        ("20060705", "1000-1800", None),
        ("20060705", "10", None),
        ("20060705-20060707", "", None),
    ],
)
def test_ranges_of_the_same_form_are_one(date, time, expected):
    query = question(COMBINED, STUDY_DATE=date, STUDY_TIME=time)
    assert (query.keys == (Key(STUDY_DATE, "DA", expected),)) is bool(expected)
    assert query.always >= {STUDY_DATE, STUDY_TIME}
    assert len(question(Options(), STUDY_DATE=date, STUDY_TIME=time).keys) == 1 + bool(time)


@pytest.mark.parametrize(
    ("date", "time", "is_match"),
    [
        ("20060705", "100000", True),
        ("20060705", "0959", False),
        ("20060706", "0300", True),
        ("20060707", "180059.9", True),
        ("20060707", "1801", False),
        ("2006.07.06", "12:00:00", True),
        ("20060706", [], False),
        ([], "1200", False),
        ("soon", "1200", False),
        ("20060706", "noon", False),
        ("20060231", "1200", False),
    ],
)
def test_a_date_and_a_time_match_as_one_moment(date, time, is_match):
    query = question(COMBINED, STUDY_DATE="20060705-20060707", STUDY_TIME="1000-1800")
    assert finds(query, STUDY_DATE=date, STUDY_TIME=time) is is_match


def test_of_a_date_and_time_what_is_not_known_matches_as_agreed():
    asked = identifier("STUDY", STUDY_DATE="20060705-20060707", STUDY_TIME="1000-1800")
    query = query_from_identifier(asked, root="STUDY", options=COMBINED, matches_unknown=True)
    assert finds(query)
    assert finds(query, STUDY_TIME="09")
    assert finds(query, STUDY_DATE="20060705")
    assert not finds(query, STUDY_DATE="20060708")


def test_every_pair_of_date_and_time_is_combined():
    pairs = matching._TIME_OF
    known = {date for date in STANDARD.index_tags if public_vr(date) == "DA"}
    assert known <= pairs.keys()
    assert pairs[BIRTH_DATE] == BIRTH_TIME
    assert {pairs[date] for date in known} == {tag for tag in STANDARD.index_tags if public_vr(tag) == "TM"}


def test_a_date_in_no_calendar_is_no_end_of_a_moment():
    with pytest.raises(BadValueError, match="StudyDate"):
        question(COMBINED, STUDY_DATE="20200231-", STUDY_TIME="10-")


def in_zone(offset, *, options=None, local=0, unknown=False, **elements):
    return query_from_identifier(
        identifier("STUDY", TIMEZONE=offset, **elements),
        root="STUDY",
        options=options or Options(timezone=True),
        matches_unknown=unknown,
        local=lambda _: timedelta(hours=local),
    )


@pytest.mark.parametrize(
    ("asked", "held", "is_match"),
    [
        # 23:30 in UTC is half past midnight of the next day an hour further east.
        ({"STUDY_DATE": "20200102"}, {"TIMEZONE": "+0000"}, True),
        ({"STUDY_DATE": "20200101"}, {"TIMEZONE": "+0000"}, False),
        ({"STUDY_DATE": "20200101"}, {"TIMEZONE": "+0100"}, True),
        ({"STUDY_TIME": "0030"}, {"TIMEZONE": "+0000"}, True),
        ({"STUDY_TIME": "2330"}, {"TIMEZONE": "+0000"}, False),
        ({"STUDY_DATE": "20200102-20200102", "STUDY_TIME": "00-01"}, {"TIMEZONE": "+0000"}, True),
        ({"STUDY_DATE": "20200101", "STUDY_TIME": "2230"}, {"TIMEZONE": "+0200"}, True),
        # In its own time zone if it tells one, else in the gateway's, which is +0300.
        ({"STUDY_DATE": "20200101", "STUDY_TIME": "2130"}, {}, True),
        ({"STUDY_DATE": "20200101", "STUDY_TIME": "2130"}, {"TIMEZONE": "nonsense"}, True),
        ({"STUDY_DATE": "20200101", "STUDY_TIME": "2330"}, {}, False),
    ],
)
def test_a_study_is_found_by_its_time_in_the_zone_of_the_query(asked, held, is_match):
    held = {"STUDY_DATE": "20200101", "STUDY_TIME": "2330"} | held
    for combined in (False, True):
        query = in_zone("+0100", local=3, options=Options(timezone=True, combined=combined), **asked)
        assert all(isinstance(one.match, Adjusted) for one in query.keys)
        assert finds(query, **held) is is_match
        assert query.returns >= {STUDY_DATE, STUDY_TIME, TIMEZONE}


@pytest.mark.parametrize(
    ("asked", "held", "own", "is_match"),
    [
        ("20200101120000", "20200101110000", "+0000", True),
        ("20200101120000", "20200101120000", "+0000", False),
        ("20200101120000", "20200101120000", "+0100", True),
        ("20200101120000+0000", "20200101140000", "+0200", True),
        ("20200101120000", "20200101120000+0100", "+0900", True),
        ("20200101-20200102", "20200102233000", "+0000", False),
        ("20200101-20200102", "20200102223000", "+0000", True),
    ],
)
def test_a_date_time_is_in_the_zone_that_it_tells_or_of_its_entity(asked, held, own, is_match):
    query = query_from_identifier(
        identifier("IMAGE", STUDY_UID="1", SERIES_UID="1", ACQUISITION=asked, TIMEZONE="+0100"),
        root="STUDY",
        options=Options(timezone=True),
    )
    whole = {"STUDY_UID": "1", "SERIES_UID": "1", "ACQUISITION": held, "TIMEZONE": own}
    assert finds(query, **whole) is is_match


def test_one_of_several_date_times_is_in_the_zone_of_the_query():
    query = query_from_identifier(
        identifier(
            "IMAGE", STUDY_UID="1", SERIES_UID="1", ACQUISITION=["2019", "20200101"], TIMEZONE="+0100"
        ),
        root="STUDY",
        options=Options(timezone=True),
    )
    told = AnyOf((Range("2019+0100", "2019+0100"), Range("20200101+0100", "20200101+0100")))
    assert query.keys[-1].match == Adjusted(told)


def test_what_is_below_knows_what_it_takes_to_adjust_it():
    query = in_zone("+0100", options=Options(timezone=True, relational=True), SERIES_DATE="20200101")
    assert query.below.returns == {STUDY_UID, SERIES_TIME, TIMEZONE}
    assert query.below.zone == query.zone


def test_a_time_zone_is_an_offset():
    with pytest.raises(BadValueError, match="TimezoneOffsetFromUTC"):
        in_zone("CET", STUDY_DATE="20200101")
    assert in_zone("", STUDY_DATE="20200101").zone is None
    assert in_zone("+0100", options=Options(), STUDY_DATE="20200101").zone is None


@pytest.mark.parametrize(
    ("own", "date", "time", "there"),
    [
        ("+0000", "20191231", "2330", ("20200101", "0030")),
        ("+0200", "20200101", "003015.25", ("20191231", "233015.25")),
        ("-0330", "20200101", "10", ("20200101", "1430")),
        ("+0100", "2020.01.01", "10:15:30", ("20200101", "101530")),
        ("+0000", "99991231", "2330", ("99991231", "2330")),
        ("+0000", "20200101", "late", ("20200101", "late")),
    ],
)
def test_what_is_answered_reads_as_in_the_zone_of_the_query(own, date, time, there):
    zone = Zone(timedelta(hours=1), lambda _: timedelta(0))
    held = element(TIMEZONE, own) | element(STUDY_DATE, date) | element(STUDY_TIME, time)
    moved = adjusted(held, zone)
    assert tuple(moved[f"{tag:08X}"]["Value"][0] for tag in (STUDY_DATE, STUDY_TIME)) == there


def test_answers_say_in_which_zone_they_are_and_have_only_what_was_asked_for():
    query = in_zone("-0330", STUDY_DATE="", PATIENT_NAME="")
    held = element(STUDY_DATE, "20200101") | element(STUDY_TIME, "0100") | element(TIMEZONE, "+0000")
    answer = answerer(query)(held)
    assert answer == element(STUDY_DATE, "20191231") | element(TIMEZONE, "-0330")
    plain = answerer(question(Options(timezone=True), STUDY_DATE=""))(held)
    assert plain == element(STUDY_DATE, "20200101")


def test_a_date_or_a_time_alone_is_not_moved():
    zone = Zone(timedelta(hours=9), lambda _: timedelta(0))
    for held in (
        element(STUDY_DATE, "20200101"),
        element(STUDY_TIME, "2330"),
        element(BIRTH_DATE, "19700101"),
    ):
        assert adjusted(held, zone) == held


# ── items that are answered, C.2.2.2.6 ───────────────────────────────────────────────────────────


def series_with(*items):
    return element(STUDY_UID, "1") | element(REQUEST_ATTRIBUTES, *items)


def of_items(*items):
    asked = {LEVEL: ("CS", ["SERIES"]), STUDY_UID: ("UI", ["1"]), REQUEST_ATTRIBUTES: ("SQ", list(items))}
    return answerer(query_from_identifier(asked, root="STUDY"))


def test_of_a_sequence_the_items_that_match_are_answered_and_of_them_what_was_asked_for():
    answer = of_items({STEP_ID: ("SH", ["S1"]), CODES: ("SQ", [{MEANING: ("LO", [])}])})
    codes = element(CODES, element(MEANING, "Head") | element(CODE_VALUE, "1"))
    held = series_with(request("S0", "P0"), request("S1", "P1") | codes, request("S1", "P2"))
    assert answer(held)["00400275"]["Value"] == [
        element(STEP_ID, "S1") | element(CODES, element(MEANING, "Head")),
        element(STEP_ID, "S1"),
    ]


def test_a_sequence_that_is_asked_for_without_keys_is_answered_whole():
    held = series_with(request("S0", "P0"), request("S1", "P1"))
    for items in ((), ({},)):
        assert of_items(*items)(held)["00400275"] == held["00400275"]
    only = of_items({PROCEDURE_ID: ("SH", [])})(held)["00400275"]["Value"]
    assert only == [element(PROCEDURE_ID, "P0"), element(PROCEDURE_ID, "P1")]


def test_items_in_items_are_chosen_too():
    code = {CODE_VALUE: ("SH", ["2"])}
    answer = of_items({CODES: ("SQ", [code])})
    codes = element(CODES, element(CODE_VALUE, "1"), element(CODE_VALUE, "2"))
    assert answer(series_with(codes))["00400275"]["Value"] == [element(CODES, element(CODE_VALUE, "2"))]


# ── relational queries, C.4.1.3.2 ────────────────────────────────────────────────────────────────


def test_a_relational_query_needs_no_unique_keys():
    query = question(RELATIONAL, "SERIES", PATIENT_NAME="Doe*", MODALITY="CT")
    assert [one.tag for one in query.keys] == [PATIENT_NAME, MODALITY]
    assert (query.level, query.below) == (Level.SERIES, None)
    assert query.always == {PATIENT_NAME, MODALITY, STUDY_UID, SERIES_UID}


def test_keys_below_the_level_make_a_query_below_with_all_keys():
    query = question(RELATIONAL, PATIENT_NAME="Doe*", MODALITY="CT", INSTANCE_NUMBER="1", SERIES_UID="")
    assert [one.tag for one in query.keys] == [PATIENT_NAME]
    assert query.below.level is Level.IMAGE
    assert [one.tag for one in query.below.keys] == [PATIENT_NAME, MODALITY, INSTANCE_NUMBER]
    assert query.below.returns == {STUDY_UID}
    assert question(RELATIONAL, SERIES_UID="").below is None


@pytest.mark.parametrize(
    ("level", "held", "expected"),
    [
        (Level.STUDY, {"STUDY_UID": "1"}, {STUDY_UID: Single("1")}),
        (
            Level.SERIES,
            {"STUDY_UID": "1", "SERIES_UID": "2"},
            {STUDY_UID: Single("1"), SERIES_UID: Single("2")},
        ),
        (
            Level.PATIENT,
            {"PATIENT_ID": "P", "PATIENT_NAME": person("D")},
            {PATIENT_ID: Single("P"), ISSUER: Empty()},
        ),
        (
            Level.PATIENT,
            {"PATIENT_NAME": person("A", "", "C")},
            {PATIENT_ID: Empty(), PATIENT_NAME: Single("a==c"), BIRTH_DATE: Empty()},
        ),
    ],
)
def test_an_entity_is_told_by_its_unique_keys_a_patient_without_id_by_name_and_birth_date(
    level, held, expected
):
    attributes = {}
    for keyword, value in held.items():
        attributes |= element(globals()[keyword], value)
    keys = identity_keys(level, attributes)
    assert {one.tag: one.match for one in keys} == expected
    assert ask(*keys)(attributes)


# ── whatever comes ───────────────────────────────────────────────────────────────────────────────

ASKED = st.dictionaries(
    st.sampled_from(
        [PATIENT_NAME, STUDY_DATE, STUDY_TIME, TIMEZONE, MODALITIES, REQUEST_ATTRIBUTES, SERIES_UID, MODALITY]
    ),
    st.lists(
        st.sampled_from(["", "*", "a*", '""', "20200101-20200102", "10-11", "+0100", "CT", "1.2"])
        | st.text(max_size=5)
        | st.just({STEP_ID: ("SH", ["S*"]), CODES: ("SQ", [{MEANING: ("LO", [""])}])}),
        max_size=2,
    ),
)
VALUE = (
    st.none()
    | st.text(max_size=8)
    | st.integers()
    | st.floats()
    | st.sampled_from(["20200101", "1015", "+0100", "-9999", {}, {"Alphabetic": None}])
    | st.just(element(STEP_ID, "S1") | {f"{CODES:08X}": {"vr": "SQ", "Value": [None, "x", {}]}})
)
HELD = st.dictionaries(
    st.sampled_from(
        [
            f"{tag:08X}"
            for tag in (PATIENT_NAME, STUDY_DATE, STUDY_TIME, TIMEZONE, MODALITIES, REQUEST_ATTRIBUTES)
        ]
    ),
    st.fixed_dictionaries(
        {"vr": st.sampled_from(["PN", "DA", "TM", "SH", "SQ", "DT", "US"])},
        optional={"Value": st.lists(VALUE)},
    ),
)


@given(ASKED, HELD, st.lists(st.booleans(), min_size=7, max_size=7))
def test_any_identifier_is_a_query_that_any_object_matches_or_not_or_a_refusal(asked, held, flags):
    elements = {LEVEL: ("CS", ["STUDY"])}
    for tag, values in asked.items():
        are_items = all(isinstance(value, dict) for value in values)
        elements[tag] = ("SQ" if are_items else "LO", values)
    try:
        query = query_from_identifier(
            elements, root="STUDY", options=Options(*flags[:6]), matches_unknown=flags[6]
        )
    except RefusedError:
        return
    assert matcher(query)(held) in (True, False)
    answer = answerer(query)(held)
    assert answer.keys() <= held.keys() | {f"{TIMEZONE:08X}"}
    assert identity_keys(query.level, held)
