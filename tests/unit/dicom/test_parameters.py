"""What a QIDO-RS request asks for, by its parameters (PS3.18 sections 8.3.4 and 10.6)."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomscp.dicom.matching import (
    AnyOf,
    BadValueError,
    Items,
    Key,
    Level,
    Range,
    Single,
    UIDList,
    Wildcard,
    narrowed,
    query_from_parameters,
)
from dicomscp.errors import RefusedError

STUDY_DATE, MODALITY, MODALITIES, STUDY_DESCRIPTION = 0x00080020, 0x00080060, 0x00080061, 0x00081030
PATIENT_NAME, PATIENT_ID, PATIENT_AGE = 0x00100010, 0x00100020, 0x00101010
PATIENT_WEIGHT, PATIENT_COMMENTS = 0x00101030, 0x00104000
STUDY_UID, SERIES_UID = 0x0020000D, 0x0020000E
REQUEST_ATTRIBUTES, STEP_ID, PROCEDURE_ID = 0x00400275, 0x00400009, 0x00401001
PROCEDURE_CODE, CODE_VALUE, CODE_MEANING = 0x00081032, 0x00080100, 0x00080104


def parameters(level, *params, **options):
    return query_from_parameters(level, params, **{"max_results": 100, **options})


def test_parameters_name_attributes_by_keyword_or_tag():
    query, warnings = parameters(
        Level.STUDY, ("PatientName", "Doe*"), ("00100020", "P"), ("0020000d", "1,2\\3")
    )
    assert query.keys == (
        Key(PATIENT_NAME, "PN", Wildcard("Doe*")),
        Key(PATIENT_ID, "LO", Single("P")),
        Key(STUDY_UID, "UI", UIDList(("1", "2", "3"))),
    )
    assert warnings == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ModalitiesInStudy", "CT,MR", AnyOf((Single("CT"), Single("MR")))),
        ("PatientName", "Doe, John", Single("Doe, John")),
        ("PatientComments", "a\\b", Single("a\\b")),
        ("StudyID", "a\\b", AnyOf((Single("a"), Single("b")))),
        ("StudyDate", "20200101-", Range("20200101", None)),
    ],
)
def test_a_comma_separates_only_where_no_value_has_one(name, value, expected):
    query, _ = parameters(Level.STUDY, (name, value))
    assert [one.match for one in query.keys] == [expected]


def test_a_path_leads_into_a_sequence():
    query, warnings = parameters(
        Level.SERIES,
        ("RequestAttributesSequence.ScheduledProcedureStepID", "S1"),
        ("00400275.00401001", "P1"),
        ("RequestAttributesSequence", ""),
    )
    inside = (Key(STEP_ID, "SH", Single("S1")), Key(PROCEDURE_ID, "SH", Single("P1")))
    assert query.keys == (Key(REQUEST_ATTRIBUTES, "SQ", Items(inside)),)
    assert warnings == []


def test_the_resource_is_a_key_too():
    query, _ = parameters(Level.IMAGE, study_uid="1", series_uid="2")
    assert query.keys == (Key(STUDY_UID, "UI", Single("1")), Key(SERIES_UID, "UI", Single("2")))


def test_limit_and_offset_are_kept_within_bounds():
    query, _ = parameters(Level.STUDY, ("limit", "7"), ("offset", "3"))
    assert (query.limit, query.offset) == (7, 3)
    assert parameters(Level.STUDY)[0].limit == 100
    assert parameters(Level.STUDY, ("limit", "101"))[0].limit == 100
    assert parameters(Level.STUDY, ("limit", "0"))[0].limit == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "-1"),
        ("limit", "many"),
        ("limit", "9" * 50),
        ("offset", "1.5"),
        ("offset", ""),
        ("fuzzymatching", "perhaps"),
        ("StudyDate", "yesterday"),
        ("StudyInstanceUID", "1.2.*"),
        ("OtherPatientIDsSequence", "1"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_parameter(name, value):
    with pytest.raises(BadValueError, match=name):
        parameters(Level.STUDY, (name, value))


def test_what_is_not_done_is_warned_of():
    query, warnings = parameters(
        Level.STUDY,
        ("Modality", "CT"),
        ("NoSuchAttribute", "1"),
        ("12345678", "1"),
        ("PatientID.StudyID", "1"),
        ("patientid", "1"),
        ("", "1"),
        ("includefield", "StudyDescription,Nonsense"),
    )
    assert query.keys == ()
    assert [re.search("'(.*)'", warning).group(1) for warning in warnings] == [
        "Modality",
        "NoSuchAttribute",
        "12345678",
        "PatientID.StudyID",
        "patientid",
        "Nonsense",
    ]


def test_a_path_that_leads_deeper_than_anything_nests_is_warned_of():
    deep = ".".join(["OtherPatientIDsSequence"] * 2000)
    query, warnings = parameters(Level.STUDY, (f"{deep}.PatientID", "1"), ("includefield", deep))
    assert query.keys == ()
    assert len(warnings) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("PatientID", "1"), ("PatientID", "2")),
        (("PatientID", "1"), ("00100020", "1")),
        (("00081190", ""), ("RetrieveURL", "")),
        (("OtherPatientIDsSequence.PatientID", "1"), ("00101002.00100020", "2")),
        (("limit", "1"), ("limit", "1")),
        (("offset", "1"), ("offset", "2")),
        (("fuzzymatching", "true"), ("fuzzymatching", "true")),
        (("StudyInstanceUID", "1"), ("StudyInstanceUID", "2")),
    ],
)
def test_what_may_be_given_once_is_not_given_twice(first, second):
    """PS3.18 8.3.4.1: no attribute shall be repeated; a list of UIDs is one value."""
    parameters(Level.STUDY, first)
    with pytest.raises(BadValueError, match=second[0]):
        parameters(Level.STUDY, first, second)


@pytest.mark.parametrize("name", ["0010,0020", "(0010,0020)", "0010, 0020"])
def test_a_tag_in_two_parts_is_refused(name):
    with pytest.raises(BadValueError, match="00100020"):
        parameters(Level.STUDY, (name, "1"))


def test_what_is_matched_is_returned():
    """PS3.18 10.6.3.3: attributes passed as match parameters are in the response."""
    query, _ = parameters(Level.STUDY, ("PatientComments", "x*"), ("00101010", ""))
    assert {PATIENT_COMMENTS, PATIENT_AGE} <= query.returns


@pytest.mark.parametrize(
    ("value", "low"), [("20200101 0100", "20200101+0100"), ("20200101+0100", "20200101+0100")]
)
def test_a_plus_that_came_as_a_space_is_a_plus_again(value, low):
    query, _ = parameters(Level.IMAGE, ("AcquisitionDateTime", value))
    assert query.keys[0].match.match.low == low


def test_includefield_into_a_sequence_returns_that_attribute_of_its_items_alone():
    step, procedure = (PROCEDURE_CODE, CODE_VALUE), (PROCEDURE_CODE, CODE_MEANING)
    query, _ = parameters(
        Level.STUDY,
        ("includefield", "ProcedureCodeSequence.CodeValue"),
        ("00081032.CodeMeaning", "x"),
    )
    assert PROCEDURE_CODE in query.returns
    assert query.parts == {step, procedure}
    whole, _ = parameters(Level.STUDY, ("includefield", "00081032.CodeValue,00081032"))
    assert PROCEDURE_CODE in whole.returns
    assert whole.parts == frozenset()


def test_a_sequence_that_is_returned_anyway_is_returned_whole():
    query, _ = parameters(Level.SERIES, ("RequestAttributesSequence.ScheduledProcedureStepID", "S1"))
    assert query.parts == frozenset()
    assert parameters(Level.STUDY, ("includefield", "all,00081032.CodeValue"))[0].parts == frozenset()


def test_items_are_narrowed_to_what_is_asked_of_them():
    def code(value):
        return {"vr": "SH", "Value": [value]}

    inner = [{"00080100": code("C"), "00080102": code("D")}, {}]
    found = {
        "00081032": {
            "vr": "SQ",
            "Value": [
                {"00080100": code("A"), "00080104": code("B"), "00080121": {"vr": "SQ", "Value": inner}}
            ],
        },
        "00080050": code("X"),
        "00081110": {"vr": "SQ"},
    }
    deeper = (0x00081032, 0x00080121, 0x00080102)
    parts = [(0x00081032, 0x00080100), deeper, (0x00081110, 0x00081150), (1, 2)]
    assert narrowed(found, parts) == {
        "00081032": {
            "vr": "SQ",
            "Value": [
                {
                    "00080100": code("A"),
                    "00080121": {"vr": "SQ", "Value": [{"00080102": code("D")}, {}]},
                }
            ],
        },
        "00080050": code("X"),
        "00081110": {"vr": "SQ"},
    }


def test_includefield_adds_to_what_is_returned_unasked():
    query, warnings = parameters(
        Level.STUDY, ("includefield", "00104000, PatientWeight"), ("includefield", "")
    )
    assert {PATIENT_COMMENTS, PATIENT_WEIGHT, STUDY_DATE, STUDY_UID, MODALITIES} <= query.returns
    assert query.always < query.returns
    assert warnings == []


def test_includefield_returns_nothing_of_a_lower_level():
    """OHIF asks for the Modality of studies."""
    query, warnings = parameters(Level.STUDY, ("includefield", "00081030,00080060"))
    assert STUDY_DESCRIPTION in query.returns
    assert MODALITY not in query.returns
    assert warnings == []


def test_includefield_all_returns_everything():
    assert parameters(Level.STUDY, ("includefield", "all"))[0].returns is None


def test_without_a_resource_the_levels_above_are_returned_too():
    of_series, _ = parameters(Level.IMAGE, study_uid="1", series_uid="2")
    of_study, _ = parameters(Level.IMAGE, study_uid="1")
    of_all, _ = parameters(Level.IMAGE)
    assert MODALITY not in of_series.returns
    assert MODALITY in of_study.returns
    assert STUDY_DATE not in of_study.returns
    assert STUDY_DATE in of_all.returns


@given(
    st.sampled_from([Level.STUDY, Level.SERIES, Level.IMAGE]),
    st.lists(
        st.tuples(st.sampled_from(["limit", "PatientID", "StudyDate", "x.y", "includefield"]), st.text())
    ),
)
def test_any_parameters_are_a_query_or_a_refusal(level, params):
    try:
        query, _ = parameters(level, *params)
    except RefusedError:
        return
    assert query.limit <= 100
