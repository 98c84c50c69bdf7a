"""What an instance adds to the documents of its series."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from dicomscp.dicom.identity import InstanceKey
from dicomscp.study.compile import SECTION_BYTES, ends_section, lines, member

KEY = InstanceKey("1.2", "1.2.3", "1.2.3.4")


def test_the_list_of_instances_has_what_qido_gives_of_an_instance():
    fragments = {
        0x00080018: member(0x00080018, "UI", ["1.2.3.4"]),
        0x00100010: member(0x00100010, "PN", [{"Alphabetic": "DOE"}]),
        0x00200013: member(0x00200013, "IS", [7]),
        0x00280010: member(0x00280010, "US", []),
    }
    made = lines(KEY, b",".join(fragments.values()), fragments, "/dicomweb")
    assert list(orjson.loads(made.metadata)) == ["00080018", "00100010", "00200013", "00280010"]
    assert orjson.loads(made.listed) == {
        "00080018": {"vr": "UI", "Value": ["1.2.3.4"]},
        "00080056": {"vr": "CS", "Value": ["ONLINE"]},
        "00081190": {"vr": "UR", "Value": ["/dicomweb/studies/1.2/series/1.2.3/instances/1.2.3.4"]},
        "0020000D": {"vr": "UI", "Value": ["1.2"]},
        "0020000E": {"vr": "UI", "Value": ["1.2.3"]},
        "00200013": {"vr": "IS", "Value": [7]},
        "00280010": {"vr": "US"},
    }


@given(st.text())
def test_no_line_holds_a_line_end(text):
    fragment = member(0x00104000, "LT", [text])
    made = lines(KEY, fragment, {0x00104000: fragment}, "/dicomweb")
    assert b"\n" not in made.metadata
    assert b"\n" not in made.listed


def test_sections_end_the_more_often_the_longer_lines_are():
    uids = [f"1.2.840.{number}" for number in range(20_000)]
    short, long = (sum(ends_section(uid, size) for uid in uids) for size in (100, SECTION_BYTES // 8))
    assert 0.8 < short / (len(uids) / 64) < 1.2
    assert 0.9 < long / (len(uids) / 8) < 1.1
    assert all(ends_section(uid, SECTION_BYTES) for uid in uids)
