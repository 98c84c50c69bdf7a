"""A study's documents are a function of the set of its headers."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from dicomscp.dicom.identity import InstanceKey
from dicomscp.study.compile import Member, compile_series, compile_study, study_order

STUDY = "1.2.3"


def fragment(tag, vr, *values):
    return b'"%08X":%b' % (tag, orjson.dumps({"vr": vr, "Value": list(values)} if values else {"vr": vr}))


def member(series_uid, sop_uid, number=None, name=None, series_number=None):
    fragments = {
        0x00080016: fragment(0x00080016, "UI", "1.2.840.10008.5.1.4.1.1.2"),
        0x00080018: fragment(0x00080018, "UI", sop_uid),
        0x00080060: fragment(0x00080060, "CS", "CT"),
        0x00100010: fragment(0x00100010, "PN", *([{"Alphabetic": name}] if name else [])),
        0x0020000D: fragment(0x0020000D, "UI", STUDY),
        0x0020000E: fragment(0x0020000E, "UI", series_uid),
        0x00200011: fragment(0x00200011, "IS", *([series_number] if series_number is not None else [])),
        0x00200013: fragment(0x00200013, "IS", *([number] if number is not None else [])),
    }
    return Member(InstanceKey(STUDY, series_uid, sop_uid), fragments)


def compiled(members):
    by_series = {}
    for one in members:
        by_series.setdefault(one.key.series_uid, []).append(one)
    summaries, documents = [], {}
    for series_uid, some in by_series.items():
        summary, made = compile_series(STUDY, series_uid, some, "/dicomweb")
        summaries.append(summary)
        documents |= {document.path: b"".join(document.body) for document in made}
    made = compile_study(STUDY, study_order(summaries), "/dicomweb")
    return documents | {document.path: b"".join(document.body) for document in made}


def names(body, tag):
    return [one[tag]["Value"][0] for one in orjson.loads(body)]


def test_instances_stand_by_number_then_uid_absent_numbers_last():
    members = [
        member("1.1", "1.9"), member("1.1", "1.10"), member("1.1", "1.3", 10), member("1.1", "1.2", 2),
        member("1.1", "1.1", 10),
    ]  # fmt: skip
    documents = compiled(members)
    order = ["1.2", "1.1", "1.3", "1.10", "1.9"]
    assert names(documents["studies/1.2.3/series/1.1/metadata.gz"], "00080018") == order
    assert names(documents["studies/1.2.3/series/1.1/instances/index.json.gz"], "00080018") == order


def test_series_stand_by_number_and_are_counted():
    members = [member("1.5", "2.1", series_number=9), member("1.6", "2.2", series_number=1)]
    members += [member("1.4", "2.3"), member("1.6", "2.4", series_number=1)]
    series = orjson.loads(compiled(members)["studies/1.2.3/series/index.json.gz"])
    assert [(one["0020000E"]["Value"][0], one["00201209"]["Value"][0]) for one in series] == [
        ("1.6", 2),
        ("1.5", 1),
        ("1.4", 1),
    ]


def test_where_instances_disagree_the_first_that_is_not_empty_stands():
    members = [member("1.1", "1.3", 3, "LATER"), member("1.1", "1.1", 1), member("1.1", "1.2", 2, "FIRST")]
    (study,) = orjson.loads(compiled(members)["studies/1.2.3/index.json.gz"])
    assert study["00100010"]["Value"] == [{"Alphabetic": "FIRST"}]
    assert study["00201208"]["Value"] == [3]
    assert study["00080061"]["Value"] == ["CT"]


some_members = st.lists(
    st.builds(
        member,
        st.sampled_from(["1.1", "1.2"]),
        st.integers(1, 30).map(lambda n: f"9.{n}"),
        st.none() | st.integers(-3, 12),
        st.none() | st.sampled_from(["A", "B"]),
        st.none() | st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one.key.sop_uid,
)


@given(some_members.flatmap(lambda members: st.tuples(st.just(members), st.permutations(members))))
def test_any_order_of_arrival_gives_the_same_documents(both):
    first, second = both
    assert compiled(first) == compiled(second)
