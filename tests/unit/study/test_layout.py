"""Where things lie."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from dicomscp.dicom.identity import InstanceKey
from dicomscp.study import layout

KEY = InstanceKey("1.2.3", "1.2.3.4", "1.2.3.4.5")


def test_an_instance_lies_under_its_uids():
    fan = hashlib.sha256(b"1.2.3").hexdigest()[:2]
    assert layout.instance_path(KEY) == f"instances/{fan}/1.2.3/1.2.3.4/1.2.3.4.5.dcm"


def test_a_further_variant_carries_its_digest():
    path = layout.instance_path(KEY, bytes(range(32)))
    assert path.endswith("/1.2.3.4.5~0001020304050607.dcm")


@given(st.text(min_size=1, max_size=80))
def test_no_uid_leads_out_of_its_folder(uid):
    component = layout.component(uid)
    assert component not in {"", ".", ".."}
    assert "/" not in component
    assert "\\" not in component
    assert component.isascii()


def test_an_irregular_uid_never_meets_a_regular_one():
    assert layout.component("1.2.840.A") == "~" + hashlib.sha256(b"1.2.840.A").hexdigest()[:32]
    assert layout.component("1..2").startswith("~")
    assert layout.component("1." * 32 + "1").startswith("~")


def test_bulk_data_is_addressed_below_its_study():
    assert layout.bulk_uri("/dicomweb", KEY) == "/dicomweb/studies/1.2.3/bulkdata/1.2.3.4/1.2.3.4.5"


def test_what_is_published_of_an_instance_lies_where_it_is_addressed():
    folder = "studies/1.2.3/series/1.2.3.4/instances/1.2.3.4.5"
    assert layout.frame_path(KEY, 12, compressed=True) == f"{folder}/frames/12.mht"
    assert layout.frame_path(KEY, 12, compressed=False) == f"{folder}/frames/12.mht.gz"
    for path in ("60003000", "54000100/1/54001010"):
        assert f"/dicomweb/{layout.bulk_path(KEY, path)}" == f"{layout.bulk_uri('/dicomweb', KEY)}/{path}"


def test_an_irregular_uid_is_hashed_in_every_path():
    key = InstanceKey("1.2.A", "a b", "..")
    for path in (layout.frame_path(key, 1, compressed=True), layout.bulk_path(key, "60003000")):
        assert path.count("~") == 3
        assert " " not in path
