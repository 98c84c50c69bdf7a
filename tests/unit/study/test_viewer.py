"""What an instance adds to the document that OHIF opens a study with."""

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomscp.dicom.identity import InstanceKey
from dicomscp.study.compile import member
from dicomscp.study.viewer import CLOSING, SERIES_END, Entries, series_head, study_head

KEY = InstanceKey("1.2", "1.2.3", "1.2.3.4")
CT, PDF, SLIDE = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.104.1",
    "1.2.840.10008.5.1.4.1.1.77.1.6",
)
ADDRESS = "/dicomweb/studies/1.2/series/1.2.3/instances/1.2.3.4"
BULK = "/dicomweb/studies/1.2/bulkdata/1.2.3/1.2.3.4"


def image(*more, sop_class_uid=CT, syntax="1.2.840.10008.1.2.1"):
    """The fragments of an image with *more*, each a tag, VR and values."""
    usual = [(0x00080016, "UI", [sop_class_uid]), (0x00083002, "UI", [syntax])]
    made = {tag: member(tag, vr, values) for tag, vr, values in [*usual, *more]}
    made[0x7FE00010] = b'"7FE00010":{"vr":"OW","BulkDataURI":"%b/7FE00010"}' % BULK.encode()
    return made


def entries(fragments, texts=None):
    made = Entries("/dicomweb").of(KEY, texts or list(fragments.values()), fragments)
    assert b"\n" not in made
    return orjson.loads(b"[%b]" % made)


def metadata(*more):
    (entry,) = entries(image(*more))
    return entry["metadata"]


def test_there_is_an_entry_for_each_frame_and_the_first_says_everything():
    first, second, third = entries(image((0x00280008, "IS", [3]), (0x00280010, "US", [64])))

    assert first == {
        "metadata": {
            "SOPClassUID": CT,
            "AvailableTransferSyntaxUID": "1.2.840.10008.1.2.1",
            "NumberOfFrames": 3,
            "Rows": 64,
        },
        "url": f"wadors:{ADDRESS}/frames/1",
    }
    assert second == {"metadata": {"SOPInstanceUID": "1.2.3.4"}, "url": f"wadors:{ADDRESS}/frames/2"}
    assert third["url"] == f"wadors:{ADDRESS}/frames/3"


@pytest.mark.parametrize(
    ("vr", "values", "natural"),
    [
        ("DS", [1.5, 2], [1.5, 2]),
        ("IS", [7], 7),
        ("LO", ["a", None], ["a", None]),
        ("PN", [{"Alphabetic": "DOE^J", "Ideographic": "山田"}], "DOE^J"),
        ("PN", [{"Ideographic": "山田"}, {}], ["山田", ""]),
    ],
)
def test_values_are_as_ohif_has_them(vr, values, natural):
    assert metadata((0x00204000, vr, values))["ImageComments"] == natural


def test_sequences_stay_lists_and_what_has_no_value_or_no_keyword_is_left_out():
    item = {"00080100": {"vr": "SH", "Value": ["A"]}, "00091001": {"vr": "SH", "Value": ["x"]}}
    found = metadata((0x00082218, "SQ", [item]), (0x00100010, "PN", []), (0x00431001, "SH", ["private"]))

    assert found["AnatomicRegionSequence"] == [{"CodeValue": "A"}]
    assert not {"PatientName", "PixelData", ""} & found.keys()


def test_a_palette_is_there_as_it_stands_in_the_header():
    fragments = image()
    fragments[0x00281201] = b'"00281201":{"vr":"OW","InlineBinary":"AAA="}'

    (entry,) = entries(fragments)

    assert entry["metadata"]["RedPaletteColorLookupTableData"] == {"InlineBinary": "AAA="}


def test_what_has_no_frames_is_retrieved_whole():
    fragments = image(sop_class_uid=PDF)
    del fragments[0x7FE00010]
    fragments[0x00420011] = b'"00420011":{"vr":"OB","BulkDataURI":"%b/00420011"}' % BULK.encode()
    fragments[0x00420012] = member(0x00420012, "LO", ["application/pdf"])

    (entry,) = entries(fragments)

    assert entry["url"] == f"dicomweb:{ADDRESS}?accept=application/dicom"
    assert entry["metadata"]["EncapsulatedDocument"] == {
        "DirectRetrieveURL": f"{BULK}/00420011?accept=application/pdf"
    }


def test_what_a_document_says_it_is_stays_one_parameter():
    fragments = image()
    fragments[0x00420011] = b'"00420011":{"vr":"OB","BulkDataURI":"x"}'
    fragments[0x00420012] = member(0x00420012, "LO", ['application/pdf&accept=text/html"#'])

    (entry,) = entries(fragments)

    address = entry["metadata"]["EncapsulatedDocument"]["DirectRetrieveURL"]
    assert address.partition("?accept=")[2] == "application/pdf%26accept%3Dtext/html%22%23"


def test_a_video_is_played_from_where_it_is():
    (entry,) = entries(image((0x00280008, "IS", [900]), syntax="1.2.840.10008.1.2.4.102"))

    assert entry["metadata"]["PixelData"] == {"DirectRetrieveURL": f"{BULK}/7FE00010"}


@pytest.mark.parametrize(
    ("count", "sop_class_uid", "wanted"),
    [([], CT, 1), ([0], CT, 1), (["many"], CT, 1), ([2**31], CT, 100_000), ([50_000], SLIDE, 1)],
)
def test_entries_are_of_bounded_number(count, sop_class_uid, wanted):
    fragments = image((0x00280008, "IS", count), sop_class_uid=sop_class_uid)
    assert len(entries(fragments)) == wanted


def item(text, number):
    inner = {"00281052": {"vr": "DS", "Value": [number]}, "00281054": {"vr": "LO", "Value": [text]}}
    return {"00289145": {"vr": "SQ", "Value": [inner, inner]}, "00204000": {"vr": "LT", "Value": [text]}}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(['},{"', '"},{"', "{", '\\"},{"a', "plain"]), min_size=1, max_size=4))
def test_a_long_sequence_says_what_it_would_say_if_it_were_short(texts):
    items = [item(texts[number % len(texts)], number) for number in range(900)]
    fragments = image((0x52009230, "SQ", items))
    assert len(fragments[0x52009230]) > 1 << 16

    (entry,) = entries(fragments)

    assert entry["metadata"]["PerFrameFunctionalGroupsSequence"] == [
        {
            "PixelValueTransformationSequence": [
                {"RescaleIntercept": number, "RescaleType": texts[number % len(texts)]}
            ]
            * 2,
            "ImageComments": texts[number % len(texts)],
        }
        for number in range(900)
    ]


def test_a_long_text_that_is_no_sequence_is_read_too():
    assert metadata((0x00204000, "LT", ["},{" * 40_000]))["ImageComments"] == "},{" * 40_000


def test_elements_in_one_text_and_alone_say_the_same():
    fragments = image((0x00280010, "US", [64]), (0x00280011, "US", [32]))
    assert entries(fragments, [b",".join(fragments.values())]) == entries(fragments)


def test_a_document_is_made_of_heads_entries_and_ends():
    study = {
        "0020000D": {"vr": "UI", "Value": ["1.2"]},
        "00080061": {"vr": "CS", "Value": ["CT", "PT"]},
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "DOE"}]},
        "00080050": {"vr": "SH"},
    }
    series = {"0020000E": {"vr": "UI", "Value": ["1.2.3"]}, "00200011": {"vr": "IS", "Value": [7]}}
    text = study_head(study, 2, "/dicomweb") + series_head(series) + b"1,2" + SERIES_END + b","
    text += series_head(series) + b"3" + CLOSING

    assert orjson.loads(text) == {
        "studies": [
            {
                "StudyInstanceUID": "1.2",
                "PatientName": "DOE",
                "NumInstances": 2,
                "Modalities": "CT\\PT",
                "wadoRoot": "/dicomweb",
                "series": [
                    {"SeriesInstanceUID": "1.2.3", "SeriesNumber": 7, "instances": [1, 2]},
                    {"SeriesInstanceUID": "1.2.3", "SeriesNumber": 7, "instances": [3]},
                ],
            }
        ]
    }
