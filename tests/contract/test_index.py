"""One suite for every database that can hold the index."""

import hashlib
import sqlite3
import threading
from collections import defaultdict
from dataclasses import replace
from datetime import datetime, timedelta

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from dicomscp.archive import index as index_module
from dicomscp.archive import postgres, sqlite
from dicomscp.archive.index import Arrival, Counts, Held, Index, Named, Publication
from dicomscp.archive.journal import Position
from dicomscp.archive.questions import Sql, ask
from dicomscp.archive.search import Search
from dicomscp.archive.tables import Places, metadata
from dicomscp.dicom import matching
from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.matching import (
    INSTANCE_TAGS,
    SERIES_TAGS,
    STUDY_TAGS,
    Adjusted,
    AllOf,
    AnyOf,
    Empty,
    Fuzzy,
    Items,
    Key,
    Level,
    Moments,
    Query,
    Range,
    Single,
    UIDList,
    Wildcard,
    Zone,
)
from dicomscp.errors import BusyError, ConfigError, DamagedError, RefusedError
from dicomscp.study import layout
from tests.databases import compiled_once, open_sqlite

NEXT = sqlite.USER_VERSION + 1
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"

STUDY_DATE, STUDY_TIME, ACCESSION, MODALITY = 0x00080020, 0x00080030, 0x00080050, 0x00080060
STUDY_DESCRIPTION, SERIES_DESCRIPTION, REFERRING = 0x00081030, 0x0008103E, 0x00080090
PATIENT_NAME, PATIENT_ID, BIRTH_DATE, STUDY_ID = 0x00100010, 0x00100020, 0x00100030, 0x00200010
TIMEZONE = 0x00080201
STUDY_UID, SERIES_UID, SOP_UID, SOP_CLASS_UID = 0x0020000D, 0x0020000E, 0x00080018, 0x00080016
SERIES_NUMBER, INSTANCE_NUMBER, ROWS, CONTENT_TIME = 0x00200011, 0x00200013, 0x00280010, 0x00080033
PROCEDURE_START, REQUEST_ATTRIBUTES, STEP_ID = 0x00400244, 0x00400275, 0x00400009

EVERY_STUDY = Query(Level.STUDY, (), None, None)
EVERY_SERIES = Query(Level.SERIES, (), None, None)
EVERY_INSTANCE = Query(Level.IMAGE, (), None, None)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request):
    """What opens an engine on one database, for writing or for reading; it can tell which kind it is."""
    return request.getfixturevalue(f"{request.param}_database")


@pytest.fixture
def sqlite_database(request, tmp_path):
    def open_engine(*, read_only=False):
        path = tmp_path / "index.sqlite"
        engine = compiled_once(sqlite.open_engine(path, read_only=True)) if read_only else open_sqlite(path)
        request.addfinalizer(engine.dispose)
        return engine

    return open_engine


@pytest.fixture(scope="module")
def tables_in_postgresql(postgresql):
    """The URL of a database with the tables of an index, to be copied: that is quicker than to make them."""
    url = postgresql.new_database()
    postgres.open_engine(url, read_only=False, root_name="root").dispose()
    yield url
    postgresql.drop(url)


@pytest.fixture
def postgresql_database(new_database, tables_in_postgresql):
    url, engines = new_database(tables_in_postgresql), {}

    def open_engine(*, read_only=False):
        if read_only not in engines:  # a connection is a process of the server: examples share some
            engine = postgres.open_engine(url, read_only=read_only, root_name="root")
            engines[read_only] = compiled_once(engine)
        return engines[read_only]

    yield open_engine
    for engine in engines.values():
        engine.dispose()


def plan_of(connection, question):
    """The steps by which the database answers *question*; PostgreSQL as if there were many rows."""
    if connection.dialect.name == "sqlite":
        return [
            row[3] for row in ask(connection, Sql(f"EXPLAIN QUERY PLAN {question.text}", question.values))
        ]
    connection.exec_driver_sql("SET enable_seqscan = off")
    return [row[0] for row in ask(connection, Sql(f"EXPLAIN {question.text}", question.values))]


@pytest.fixture
def index(database):
    return Index(database(), retrieve_url="/dicomweb")


def element(tag, *values):
    return {"vr": public_vr(tag), "Value": list(values)} if values else {"vr": public_vr(tag)}


def name(alphabetic, ideographic=""):
    return {"Alphabetic": alphabetic} | ({"Ideographic": ideographic} if ideographic else {})


def arrival(
    study="1", series="1.1", sop="1.1.1", *, at=0, digest=b"a", sop_class=CT, path=None, **attributes
):
    """A variant with these attributes, each by the name of its tag in this module."""
    key = InstanceKey(study, series, sop)
    elements = {
        STUDY_UID: element(STUDY_UID, study),
        SERIES_UID: element(SERIES_UID, series),
        SOP_UID: element(SOP_UID, sop),
        SOP_CLASS_UID: element(SOP_CLASS_UID, sop_class),
        0x00083002: element(0x00083002, EXPLICIT_LITTLE),
    }
    for keyword, value in attributes.items():
        tag = globals()[keyword]
        elements[tag] = element(tag, *(value if isinstance(value, tuple) else (value,)))
    fragments = {tag: b'"%08X":%b' % (tag, orjson.dumps(one)) for tag, one in sorted(elements.items())}
    whole = hashlib.sha256(digest).digest()
    path = path or layout.instance_path(key)
    return Arrival(key, sop_class, EXPLICIT_LITTLE, whole, at, "MODALITY", path, 100, fragments)


def found(index, level, *keys, returns=None, limit=None, offset=0, always=frozenset()):
    return list(index.find(Query(level, keys, returns, limit, offset, always)))


def values(objects, tag):
    return [one.get(f"{tag:08X}", {}).get("Value", [None])[0] for one in objects]


def key(tag, match):
    return Key(tag, public_vr(tag), match)


def leave(index, *gone):
    """Let the variants of these SOP Instance UIDs and digests leave, as they are now."""
    held = [one for those in index.known({sop_uid for sop_uid, _ in gone}).values() for one in those]
    named = [as_it_is(one) for one in held if (one.key.sop_uid, one.digest) in gone]
    return index.leave(named, {}, index.name())


def as_it_is(one):
    return Named(one.key, one.digest, one.received_at, one.receipts)


def finish(index):
    """Publish what is due, then forget what left."""
    for study_uid, changes in list(index.due()):
        index.mark_published(changes, publication(study_uid, "a"))
    while left := index.left(3):
        index.forget_left(left)


# ── a plain reading of the same rules ────────────────────────────────────────────────────────────


def elements_of(one):
    return orjson.loads(b"{" + b",".join(one.attributes.values()) + b"}")


def number_of(attributes, tag):
    numbers = attributes.get(f"{tag:08X}", {}).get("Value", [])
    return (False, numbers[0]) if numbers else (True, 0)


def first_values(objects, tags):
    merged = {}
    for attributes in objects:
        for tag in (f"{tag:08X}" for tag in tags):
            if tag in attributes and "Value" not in merged.get(tag, {}):
                merged[tag] = (
                    attributes[tag] if "Value" in attributes[tag] else merged.get(tag, attributes[tag])
                )
    return merged


class Plain:
    """What an index of *arrivals* must answer."""

    def __init__(self, arrivals, duplicates="first"):
        distinct = {(one.key, one.digest): one for one in arrivals}.values()
        by_sop = defaultdict(list)
        for one in distinct:
            by_sop[one.key.sop_uid].append(one)
        choose = min if duplicates == "first" else max
        published = [
            choose(variants, key=lambda one: (one.received_at, one.digest, one.key))
            for variants in by_sop.values()
        ]
        published.sort(key=lambda one: (number_of(elements_of(one), INSTANCE_NUMBER), one.key.sop_uid))
        self.series = defaultdict(list)
        for one in published:
            self.series[one.key[:2]].append(one)
        self.counts = Counts(
            len({one.key.study_uid for one in published}),
            len(self.series),
            len(published),
            len(distinct),
            100 * len(distinct),
        )

    def order(self, place):
        attributes = first_values(map(elements_of, self.series[place]), SERIES_TAGS)
        return number_of(attributes, SERIES_NUMBER), place[1]

    def held(self, study_uid):
        places = sorted((place for place in self.series if place[0] == study_uid), key=self.order)
        return [one for place in places for one in self.series[place]]

    def studies(self):
        for study_uid in {place[0] for place in self.series}:
            held = self.held(study_uid)
            of_study = [place for place in self.series if place[0] == study_uid]
            modalities = set()
            for place in of_study:
                merged = first_values(map(elements_of, self.series[place]), [MODALITY])
                modalities.update(merged.get(f"{MODALITY:08X}", {}).get("Value", []))
            yield first_values(map(elements_of, held), STUDY_TAGS) | {
                "00080056": element(0x00080056, "ONLINE"),
                "00080061": element(0x00080061, *sorted(modalities)),
                "00080062": element(0x00080062, *sorted({one.sop_class_uid for one in held})),
                "00081190": element(0x00081190, f"/dicomweb/studies/{study_uid}"),
                "00201206": element(0x00201206, len(of_study)),
                "00201208": element(0x00201208, len(held)),
            }


def by_uid(objects):
    return {one[f"{STUDY_UID:08X}"]["Value"][0]: one for one in objects}


def assert_is(index, plain):
    """That *index* answers as *plain* does."""
    studies = list(index.find(EVERY_STUDY))
    assert by_uid(studies) == by_uid(plain.studies())
    assert len(studies) == len(by_uid(studies))
    assert index.counts() == plain.counts
    for study_uid in by_uid(studies):
        held = [(one.key, one.digest) for one in index.held(study_uid)]
        assert held == [(one.key, one.digest) for one in plain.held(study_uid)]


def answers(index):
    """Everything that can be asked of an index."""
    levels = [list(index.find(query)) for query in (EVERY_STUDY, EVERY_SERIES, EVERY_INSTANCE)]
    studies = list(index.studies())
    return levels, studies, [sorted(index.variants(study_uid)) for study_uid in studies], index.counts()


# ── arrivals ─────────────────────────────────────────────────────────────────────────────────────

CHOICES = {
    "STUDY_DATE": [None, (), "20200101", "19991231"],
    "STUDY_DESCRIPTION": [None, (), "head", "neck"],
    "PATIENT_ID": [None, "A", "B"],
    "MODALITY": [None, (), "CT", "MR"],
    "SERIES_NUMBER": [None, 1, 2, 10],
    "SERIES_DESCRIPTION": [None, "axial"],
}
# What many say alike, so that it matters who of them comes first.
ALIKE = [
    {"STUDY_DATE": "20200101", "MODALITY": "CT", "SERIES_NUMBER": 1},
    {"STUDY_DATE": "19991231", "MODALITY": "MR", "SERIES_NUMBER": 2, "STUDY_DESCRIPTION": "head"},
]


@st.composite
def variants(draw):
    study = draw(st.sampled_from(["1", "2"]))
    anything = st.fixed_dictionaries({name: st.sampled_from(some) for name, some in CHOICES.items()})
    attributes = draw(st.one_of(st.sampled_from(ALIKE), st.sampled_from(ALIKE), anything))
    return arrival(
        study,
        f"{study}.{draw(st.integers(1, 2))}",
        f"9.{draw(st.integers(1, 9))}",
        at=draw(st.integers(1, 3)),
        digest=draw(st.sampled_from([b"a", b"b", b"c"])),
        sop_class=CT if attributes in ALIKE else draw(st.sampled_from([CT, MR])),
        INSTANCE_NUMBER=draw(st.sampled_from([(), 1, 2, 10])),
        **{keyword: value for keyword, value in attributes.items() if value is not None},
    )


def uniquely(arrivals):
    """One dataset has one digest, so what has the same UIDs and digest is the same."""
    return list({(one.key, one.digest): one for one in arrivals}.values())


many = st.lists(variants(), min_size=1, max_size=14).map(uniquely)
with_databases = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def apply_in_batches(index, arrivals, data):
    """Apply all of them, in an order and in batches that *data* chooses, some of them again."""
    order = data.draw(st.permutations(arrivals))
    order += data.draw(st.lists(st.sampled_from(arrivals), max_size=4))
    while order:
        size = data.draw(st.integers(1, len(order)))
        index.apply(order[:size], {})
        order = order[size:]


@with_databases
@given(arrivals=many, duplicates=st.sampled_from(["first", "last"]), data=st.data())
def test_any_order_and_batching_gives_what_the_set_of_variants_gives(database, arrivals, duplicates, data):
    index = Index(database(), duplicates=duplicates)
    index.clear()
    apply_in_batches(index, arrivals, data)
    assert_is(index, Plain(arrivals, duplicates))
    incremental = answers(index)

    index.clear()
    index.apply(arrivals, {})
    assert answers(index) == incremental


@with_databases
@given(arrivals=many, data=st.data())
def test_after_a_removal_the_index_is_as_if_what_was_removed_had_never_come(database, arrivals, data):
    index = Index(database())
    index.clear()
    apply_in_batches(index, arrivals, data)
    gone = set(data.draw(st.lists(st.sampled_from([(one.key.sop_uid, one.digest) for one in arrivals]))))
    leave(index, *gone)
    finish(index)
    left = [one for one in arrivals if (one.key.sop_uid, one.digest) not in gone]
    assert_is(index, Plain(left))
    after = answers(index)

    index.clear()
    index.apply(left, {})
    assert_is(index, Plain(left))
    assert answers(index) == after


@with_databases
@given(arrivals=many)
def test_an_index_made_with_the_other_choice_of_variants_adopts_the_new_one(database, arrivals):
    first = Index(database(), duplicates="first")
    first.clear()
    first.apply(arrivals, {})
    assert_is(Index(database(), duplicates="last"), Plain(arrivals, "last"))
    assert_is(Index(database(), duplicates="first"), Plain(arrivals, "first"))


@with_databases
@given(arrivals=many)
def test_a_snapshot_of_a_study_is_what_questions_find(database, arrivals):
    index = Index(database(), retrieve_url="/dicomweb")
    index.clear()
    changes = index.apply(arrivals, {})
    for study_uid in index.studies():
        one = key(STUDY_UID, Single(study_uid))
        snapshot = index.snapshot(study_uid)
        assert ([snapshot.study] if snapshot.study else []) == found(index, Level.STUDY, one)
        tags = frozenset(int(tag, 16) for series in snapshot.series for tag in series)
        assert snapshot.series == found(index, Level.SERIES, one, returns=tags)
        assert snapshot.held == index.held(study_uid)
        assert snapshot.changes == changes.get(study_uid, 0)


def publication(study_uid, revision, instances=1):
    return Publication(study_uid, revision, 1, instances, 1_000_000)


def feed(index, since="", limit=100):
    found_feed = index.feed(since, limit)
    return [(one.study_uid, one.revision) for one in found_feed.publications], found_feed.token


def test_the_feed_has_each_study_once_where_it_last_changed(index):
    index.apply([arrival(study=uid, sop=uid) for uid in "123"], {})
    for uid in "123":
        index.mark_published(1, publication(uid, "a"))
    everything, token = feed(index)
    assert everything == [("1", "a"), ("2", "a"), ("3", "a")]
    index.mark_published(2, publication("2", "b"))
    index.mark_published(2, publication("3", "a"))  # published anew, and the same
    assert feed(index, token)[0] == [("2", "b")]
    assert feed(index)[0] == [("1", "a"), ("3", "a"), ("2", "b")]


def test_the_newest_studies_are_those_that_changed_last_and_first_those_that_wait(index):
    for number, uid in enumerate(("1", "2", "3", "4", "5")):
        index.apply([arrival(uid, uid, uid)], {})
        if number < 4:
            index.mark_published(1, publication(uid, "a"))
    assert index.newest(10) == ["5", "4", "3", "2", "1"]
    assert (index.newest(2), index.count_due()) == (["5", "4"], 1)

    index.apply([arrival("2", "2", "2.2")], {})
    assert (index.newest(3), index.count_due()) == (["5", "2", "4"], 2)
    index.mark_published(2, publication("2", "b"))
    index.mark_published(1, publication("5", "a"))
    assert (index.newest(3), index.count_due()) == (["5", "2", "4"], 0)

    index.mark_published(1, publication("5", "", 0))  # withdrawn
    assert index.newest(2) == ["2", "4"]


def test_the_feed_is_read_in_pages_while_studies_move(index):
    for uid in "12345":
        index.mark_published(1, publication(uid, "a"))
    first, token = feed(index, limit=2)
    assert index.feed("", 2).more
    index.mark_published(2, publication("1", "b"))
    second, token = feed(index, token, limit=2)
    third, token = feed(index, token, limit=2)
    assert [*first, *second, *third] == [
        ("1", "a"), ("2", "a"), ("3", "a"), ("4", "a"), ("5", "a"), ("1", "b")
    ]  # fmt: skip
    assert feed(index, token) == ([], token)
    assert not index.feed(token, 2).more


def test_a_study_that_is_withdrawn_is_told_of_and_may_come_back(index):
    index.mark_published(1, publication("1", "a"))
    token = feed(index)[1]
    index.mark_published(2, publication("1", "", 0))
    gone, later = feed(index, token)
    assert gone == [("1", "")]
    index.mark_published(3, publication("1", "a"))
    assert feed(index, later)[0] == [("1", "a")]
    assert index.announced(["1", "2"]) == {"1"}


def test_a_study_that_never_had_documents_is_not_withdrawn(index):
    index.mark_published(1, publication("1", "", 0))
    assert feed(index)[0] == []


def test_a_token_of_an_index_made_anew_begins_anew(index):
    index.mark_published(1, publication("1", "a"))
    token = feed(index)[1]
    assert not index.feed(token, 1).reset
    index.clear()
    index.mark_published(1, publication("2", "a"))
    again = index.feed(token, 10)
    assert again.reset
    assert [one.study_uid for one in again.publications] == ["2"]


def test_numbers_that_were_given_out_are_not_used_again_by_the_next_life(database):
    """A loss of power may take back the last commits, though a follower has read them."""
    engine = database()
    index = Index(engine)
    index.clear()
    index.mark_published(1, publication("1", "a"))
    epoch, _, number = feed(index)[1].partition("-")
    given_out = f"{epoch}-{int(number) + 7}"  # seven more were lost
    Index(engine).mark_published(1, publication("2", "a"))
    assert feed(Index(engine), given_out)[0] == [("2", "a")]


@pytest.mark.parametrize("token", ["x", "1", "abc-", "-1", "abc-1x", "abc-" + "9" * 30, "a b-1"])
def test_what_is_no_token_is_refused(index, token):
    with pytest.raises(RefusedError, match="token"):
        index.feed(token, 1)


def test_studies_made_in_another_way_are_due(index):
    index.apply([arrival(study="1")], {})
    index.publish_as("this")
    index.mark_published(1, publication("1", "a"))
    index.publish_as("this")
    assert list(index.due()) == []
    index.publish_as("other")
    assert list(index.due()) == [("1", 1)]


def test_what_stands_first_decides_even_if_it_comes_last(index):
    """What is said already comes to stand before what else is said."""
    index.apply([arrival(sop="2", INSTANCE_NUMBER=2, STUDY_DESCRIPTION="second")], {})
    index.apply([arrival(sop="3", INSTANCE_NUMBER=3, STUDY_DESCRIPTION="other")], {})
    assert values(index.find(EVERY_STUDY), STUDY_DESCRIPTION) == ["second"]
    index.apply([arrival(sop="1", INSTANCE_NUMBER=1, STUDY_DESCRIPTION="other")], {})
    assert values(index.find(EVERY_STUDY), STUDY_DESCRIPTION) == ["other"]
    index.apply([arrival(sop="0", INSTANCE_NUMBER=0, STUDY_DESCRIPTION="second")], {})
    assert values(index.find(EVERY_STUDY), STUDY_DESCRIPTION) == ["second"]


def test_applying_an_arrival_twice_changes_nothing(index):
    one = arrival()
    assert index.apply([one, one], {}) == {"1": 1}
    assert index.apply([one], {}) == {}
    assert index.counts() == Counts(1, 1, 1, 1, 100)
    assert [index.snapshot(uid).changes for uid in "12"] == [1, 0]


# ── variants ─────────────────────────────────────────────────────────────────────────────────────


def test_of_variants_in_two_studies_one_is_published_and_both_studies_change(index):
    late = arrival("1", "1.1", "9.1", at=2, digest=b"late")
    early = arrival("2", "2.1", "9.1", at=1, digest=b"early")
    assert index.apply([late], {}) == {"1": 1}
    assert index.apply([early], {}) == {"1": 2, "2": 1}
    assert index.held("1") == []
    assert [one.digest for one in index.held("2")] == [early.digest]
    assert values(index.find(EVERY_STUDY), STUDY_UID) == ["2"]
    assert list(index.studies()) == ["1", "2"]
    assert [one.digest for one in index.variants("1")] == [late.digest]
    assert index.counts() == Counts(1, 1, 1, 2, 200)


def test_ties_of_receipt_go_by_digest(database):
    one, other = arrival(digest=b"a"), arrival(digest=b"b")
    low, high = sorted([one.digest, other.digest])
    for duplicates, digest in (("first", low), ("last", high)):
        index = Index(database(), duplicates=duplicates)
        index.apply([one, other], {})
        assert [held.digest for held in index.held("1")] == [digest]


def test_a_removed_variant_makes_room_for_the_next_one(index):
    first, second = arrival(at=1, digest=b"a"), arrival(at=2, digest=b"b", path="instances/elsewhere.dcm")
    index.apply([first, second], {})
    assert leave(index, ("1.1.1", first.digest)) == {"1": 2}
    assert index.held("1") == [
        Held(second.key, CT, EXPLICIT_LITTLE, "instances/elsewhere.dcm", second.digest, 2, 100)
    ]


def test_the_middles_of_series_are_those_nearest_to_it(index):
    arrivals = [
        arrival(series=f"1.{number}", sop=f"1.{number}.{sop:02}", SERIES_NUMBER=number)
        for number in (2, 1)
        for sop in range(9)
    ]
    index.apply([*arrivals, arrival("2", sop="2.1")], {})
    by_series = [[one.key.sop_uid for one in index.held("1", f"1.{number}")] for number in (1, 2)]
    expected = [held[at] for held in by_series for at in (4, 3, 5)]
    middles = [one.key.sop_uid for one in index.middles("1", None, 3)]
    assert middles == expected
    assert [one.key.sop_uid for one in index.middles("1", "1.2", 1)] == [by_series[1][4]]
    assert [one.key.sop_uid for one in index.middles("2", None, 16)] == ["2.1"]
    assert list(index.middles("3", None, 16)) == []


def test_known_tells_every_variant_wherever_it_claims_to_belong(index):
    here, there = arrival("1", sop="9.1", at=2), arrival("2", sop="9.1", at=1, digest=b"b")
    index.apply([here, there, arrival(sop="9.2")], {})
    known = index.known(["9.1", "9.1", "9.3"])
    assert known.keys() == {"9.1"}
    assert [one.key.study_uid for one in known["9.1"]] == ["2", "1"]
    assert known["9.1"][1].path == layout.instance_path(here.key)


# ── what leaves ──────────────────────────────────────────────────────────────────────────────────


def test_what_leaves_is_listed_nowhere_and_its_file_is_told_of_until_no_document_names_it(index):
    one, other = arrival(sop="1", digest=b"a"), arrival(sop="2", digest=b"b")
    index.apply([one, other], {})
    index.mark_published(1, publication("1", "a"))
    assert leave(index, ("1", one.digest)) == {"1": 2}
    assert [held.key.sop_uid for held in index.held("1")] == ["2"]
    assert [held.key.sop_uid for held in index.variants("1")] == ["2"]
    assert index.held("1", "1.1", "1") == []
    assert values(found(index, Level.IMAGE), SOP_UID) == ["2"]
    assert index.known(["1"]) == {}
    assert index.counts() == Counts(1, 1, 1, 1, 100, leaving=1)

    (leaving,) = index.leaving()
    assert index.known(["1"], leaving=True) == {"1": [leaving]}
    assert index.leaving_of(one.key) == [leaving]
    assert index.leaving_studies() == {"1": 1}
    assert (leaving.path, leaving.leaving) == (one.path, 2)
    assert index.left(10) == []
    index.mark_published(2, publication("1", "a"))
    assert index.left(10) == [leaving]
    index.forget_left([leaving])
    assert index.leaving() == index.left(10) == []
    assert index.counts() == Counts(1, 1, 1, 1, 100)


def test_a_compile_that_began_before_a_variant_left_lets_no_file_go(index):
    index.apply([arrival(sop="1"), arrival(sop="2")], {})
    leave(index, ("1", arrival(sop="1").digest))
    index.mark_published(1, publication("1", "a"))
    assert index.left(10) == []
    index.mark_published(2, publication("1", "a"))
    index.mark_unpublished()
    assert index.left(10) == []


def test_changes_of_a_study_that_comes_again_are_counted_on(index):
    """A late publish of what it was shows nothing of what it is."""
    index.apply([arrival(at=1)], {})
    leave(index, ("1.1.1", arrival().digest))
    finish(index)
    assert index.snapshot("1").changes == 0
    assert index.apply([arrival(at=2)], {}) == {"1": 3}
    index.mark_published(2, publication("1", "a"))
    leave(index, ("1.1.1", arrival().digest))
    assert index.left(10) == []
    assert list(index.due()) == [("1", 4)]


def test_a_variant_that_no_document_names_goes_without_a_publish(index):
    first, second = arrival(at=1, digest=b"a"), arrival(at=2, digest=b"b", path="instances/elsewhere.dcm")
    index.apply([first, second], {})
    index.mark_published(1, publication("1", "a"))
    leave(index, ("1.1.1", second.digest))
    assert list(index.due()) == []
    assert [one.digest for one in index.left(10)] == [second.digest]


def test_another_variant_takes_over_in_whatever_study_it_is(index):
    here, there = arrival("1", sop="9", at=1), arrival("2", sop="9", at=2, digest=b"b")
    index.apply([here, there], {})
    assert index.held("2") == []
    leave(index, ("9", here.digest))
    assert [one.digest for one in index.held("2")] == [there.digest]
    assert dict(index.due()).keys() == {"1", "2"}


def test_what_came_again_since_the_index_was_asked_stays(index):
    one, two = arrival(sop="1"), arrival(sop="2")
    index.apply([one, two], {})
    asked = [as_it_is(held) for held in index.variants("1")]
    index.apply([], {}, [(one.key, one.digest)])
    assert index.leave(asked, {}, index.name()) == {"1": 2}
    assert [held.key.sop_uid for held in index.held("1")] == ["1"]
    assert [held.receipts for held in index.held("1")] == [2]


def test_what_is_received_while_it_leaves_is_held_anew_and_an_old_removal_does_not_mean_it(index):
    one, again = arrival(at=1), arrival(at=2)
    index.apply([one], {})
    asked = [as_it_is(held) for held in index.variants("1")]
    index.leave(asked, {}, index.name())
    assert index.apply([again], {}) == {"1": 3}
    assert index.leaving() == []
    (held,) = index.held("1")
    assert (held.received_at, held.leaving) == (2, None)
    assert index.leave(asked, {}, index.name()) == {}
    assert index.held("1") == [held]


def test_a_removal_that_is_applied_again_tells_again_which_studies_it_changed(index):
    index.apply([arrival(sop="1"), arrival(sop="2")], {})
    asked = [as_it_is(held) for held in index.variants("1", "1.1", "1")]
    assert index.leave(asked, {}, index.name()) == {"1": 2}
    before = index.leaving()
    assert index.leave(asked, {}, index.name()) == {"1": 2}
    assert index.leaving() == before


def test_what_another_index_was_asked_removes_nothing(index):
    index.apply([arrival()], {})
    asked, name_then = [as_it_is(held) for held in index.variants("1")], index.name()
    index.clear()
    index.apply([arrival()], {})
    assert index.leave(asked, {"remove-1": Position(1, 100)}, name_then) == {}
    assert len(index.held("1")) == 1
    assert index.positions() == {"remove-1": Position(1, 100)}
    assert index.leave(asked, {}, index.name()) == {"1": 2}


def test_a_new_index_has_a_name_that_readers_know_and_that_stays(database):
    name_then = Index(database()).name()
    assert name_then
    assert Index(database(read_only=True)).name() == name_then
    assert Index(database(), duplicates="last").name() == name_then


@with_databases
@given(arrivals=many, data=st.data(), duplicates=st.sampled_from(["first", "last"]))
def test_while_something_leaves_the_index_answers_as_if_it_had_never_come(
    database, arrivals, data, duplicates
):
    """And what of it comes again is held, whenever it comes."""
    index = Index(database(), duplicates=duplicates)
    index.clear()
    apply_in_batches(index, arrivals, data)
    gone = set(data.draw(st.lists(st.sampled_from([(one.key.sop_uid, one.digest) for one in arrivals]))))
    leave(index, *gone)
    plain = Plain([one for one in arrivals if (one.key.sop_uid, one.digest) not in gone], duplicates)
    plain.counts = plain.counts._replace(leaving=len(index.leaving()))
    assert_is(index, plain)

    back = [
        one._replace(received_at=one.received_at + 100)
        for one in arrivals
        if (one.key.sop_uid, one.digest) in gone and data.draw(st.booleans())
    ]
    if back:
        apply_in_batches(index, back, data)
    finish(index)
    left = [one for one in arrivals if (one.key.sop_uid, one.digest) not in gone]
    assert_is(index, Plain(left + back, duplicates))


def test_what_is_leaving_is_found_without_reading_the_table_of_instances(database):
    engine = database()
    index = Index(engine)
    index.apply([arrival(sop=f"9.{n}") for n in range(200)], {})
    for conditions in (index_module.IS_LEAVING, index_module._READY_TO_GO):
        with engine.connect() as connection:
            asked = index_module._HELD.where(conditions).compile(
                connection, compile_kwargs={"literal_binds": True}
            )
            plan = plan_of(connection, Sql(str(asked)))
        assert "instance_leaving" in str(plan)


# ── order ────────────────────────────────────────────────────────────────────────────────────────


def test_published_order_is_by_number_then_uid_with_absent_numbers_last(index):
    arrivals = [
        arrival(series="1.2", sop="5", SERIES_NUMBER=2, INSTANCE_NUMBER=1),
        arrival(series="1.10", sop="6", INSTANCE_NUMBER=1),
        arrival(series="1.1", sop="4", SERIES_NUMBER=2),
        arrival(series="1.1", sop="30", SERIES_NUMBER=2, INSTANCE_NUMBER=2),
        arrival(series="1.1", sop="3", SERIES_NUMBER=2, INSTANCE_NUMBER=10),
        arrival(series="1.1", sop="2", SERIES_NUMBER=2, INSTANCE_NUMBER=10),
    ]
    index.apply(arrivals, {})
    assert [one.key.sop_uid for one in index.held("1")] == ["30", "2", "3", "4", "5", "6"]
    assert values(index.find(EVERY_INSTANCE), SOP_UID) == ["30", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("number", ["9" * 30, 1e30, -1e30, "many"])
def test_a_number_that_is_none_stands_last(index, number):
    index.apply([arrival(sop="1", INSTANCE_NUMBER=number), arrival(sop="2", INSTANCE_NUMBER=2)], {})
    assert [one.key.sop_uid for one in index.held("1")] == ["2", "1"]
    assert values(index.find(EVERY_INSTANCE), INSTANCE_NUMBER) == [2, number]


def test_studies_come_newest_first_and_undated_ones_last(index):
    index.apply(
        [
            arrival("1", sop="1"),
            arrival("2", sop="2", STUDY_DATE="20200101", STUDY_TIME="1015"),
            arrival("3", sop="3", STUDY_DATE="20200101", STUDY_TIME="101501.5"),
            arrival("4", sop="4", STUDY_DATE="20210101"),
            arrival("5", sop="5", STUDY_DATE="no date"),
        ],
        {},
    )
    assert values(index.find(EVERY_STUDY), STUDY_UID) == ["4", "3", "2", "1", "5"]


@pytest.mark.parametrize("keys", [(), (key(PATIENT_ID, Single("A")),)])
@pytest.mark.parametrize("level", [Level.STUDY, Level.SERIES, Level.IMAGE])
def test_pages_join_without_a_gap_or_a_double(index, level, keys):
    """More than two pages at each level, with ties in everything but the UIDs."""
    arrivals = [
        arrival(
            f"1.{study}",
            f"1.{study}.{series}",
            f"1.{study}.{series}.{n}",
            INSTANCE_NUMBER=n % 3,
            PATIENT_ID="A",
        )
        for study in range(600)
        for series in range(2)
        for n in range(2)
    ]
    index.apply(arrivals, {})
    tag = {Level.STUDY: STUDY_UID, Level.SERIES: SERIES_UID, Level.IMAGE: SOP_UID}[level]
    whole = values(found(index, level, *keys), tag)
    assert len(whole) == len(set(whole)) == {Level.STUDY: 600, Level.SERIES: 1200, Level.IMAGE: 2400}[level]
    for offset, limit in ((0, 7), (495, 10), (500, 500), (599, 5), (5000, 1)):
        page = found(index, level, *keys, limit=limit, offset=offset)
        assert values(page, tag) == whole[offset : offset + limit]


def test_a_series_of_more_than_a_page_is_read_in_order(index):
    index.apply([arrival(sop=f"1.{n}", INSTANCE_NUMBER=n) for n in range(1203)], {})
    of_series = (key(STUDY_UID, Single("1")), key(SERIES_UID, Single("1.1")))
    assert values(found(index, Level.IMAGE, *of_series), INSTANCE_NUMBER) == list(range(1203))
    assert values(found(index, Level.IMAGE, of_series[0]), INSTANCE_NUMBER) == list(range(1203))
    assert found(index, Level.IMAGE, *of_series, limit=0) == []


# ── what is found ────────────────────────────────────────────────────────────────────────────────

NAMES = ["Doe^John", "DOE^JANE", "Doe", "Yamada^Tarou", "Ångström^Åke", "O%_/Neil", "a\U0010ffff", "^"]
person = st.sampled_from(NAMES).flatmap(lambda n: st.sampled_from([name(n), name(n, "山田^太郎")]))
texts = st.sampled_from(["A", "a", "AB", "A B", "50%", "1_2", "x/y", "é", "[a]", " A ", " "])
dates = st.sampled_from(["20200101", "20200131", "1999.12.31", "2020", "none"])
times = st.sampled_from(["10", "1015", "101530", "101530.5", "10:15:30", "never"])
steps = texts.map(lambda one: {f"{STEP_ID:08X}": element(STEP_ID, one)})


def some(strategy):
    """Absent, empty, one value or, less often, two."""
    one = st.tuples(strategy)
    return st.one_of(st.none(), st.just(()), one, one, one, st.tuples(strategy, strategy))


MATCHED = {
    "STUDY_DATE": dates,
    "STUDY_TIME": times,
    "TIMEZONE": st.sampled_from(["+0100", "-1200", "+1400"]),
    "ACCESSION": texts,
    "PATIENT_NAME": person,
    "PATIENT_ID": texts,
    "REFERRING": person,
    "STUDY_DESCRIPTION": texts,
    "MODALITY": st.sampled_from(["CT", "MR", "C", "C" * 200]),
    "SERIES_NUMBER": st.sampled_from([1, 2, -3, 1.5, "x"]),
    "SERIES_DESCRIPTION": texts,
    "PROCEDURE_START": dates,
    "INSTANCE_NUMBER": st.sampled_from([1, 2, 1.5]),
    "CONTENT_TIME": times,
    "REQUEST_ATTRIBUTES": steps,
}


@st.composite
def any_instance(draw, keywords):
    attributes = {keyword: draw(some(MATCHED[keyword])) for keyword in keywords}
    study = draw(st.sampled_from("123456"))
    return arrival(
        study,
        f"{study}.{draw(st.integers(1, 2))}",
        f"9.{draw(st.integers(1, 20))}",
        sop_class=draw(st.sampled_from([CT, MR])),
        **{keyword: value for keyword, value in attributes.items() if value is not None},
    )


def wildcards(beginnings):
    """Patterns that fix the beginning, the end, the middle, or all but one character of a value."""
    shapes = ["{}*", "*{}*", "*{}", "{}**", "?{}*", "{}?", "*{}*?"]
    cut = st.tuples(beginnings, st.integers(1, 8)).map(lambda both: both[0][: both[1]])
    return st.tuples(st.sampled_from(shapes), cut).map(lambda both: Wildcard(both[0].format(both[1])))


text_matches = st.one_of(
    texts.map(Single), wildcards(texts), st.sampled_from(["A?B", "*", "?"]).map(Wildcard)
)
PEOPLE = [
    "doe^john",
    "Doe^John^^",
    "doe",
    "山田^太郎",
    "yamada^tarou=山田^太郎",
    "doe=",
    "=山田^太郎",
    "^",
    "a",
]
PATTERNS_OF_NAMES = [
    "DOE^J?N*",
    "*山*",
    "ångström^*",
    "doe^*",
    "doe^^^*",
    "*^*",
    "d*=山*",
    "山*=",
    "*太*=",
    "doe*^^^^^",
    "*doe*^^^^^",
]
people = st.sampled_from(PEOPLE)
person_matches = st.one_of(
    people.map(Single),
    wildcards(people),
    st.sampled_from(PATTERNS_OF_NAMES).map(Wildcard),
)
bounds = {
    "DA": ["19991231", "20200101", "20200131"],
    "TM": ["100000.000000", "101530.000000", "101530.999999"],
}


def several(matches):
    """One of *matches*, or any of two."""
    return st.one_of(matches, matches, st.tuples(matches, matches).map(AnyOf))


def ranges(vr):
    ends = st.one_of(st.none(), st.sampled_from(bounds[vr]))
    return st.tuples(ends, ends).filter(any).map(lambda both: Range(*both))


days = several(st.one_of(ranges("DA"), st.just(Single("20200101"))))
modalities = several(st.sampled_from([Single("CT"), Single("C"), Single("MR"), Wildcard("C?")]))
numbers = several(st.sampled_from(["1", "1.5", "1e30", "-3"]).map(Single))
MATCHES = {
    STUDY_DATE: days,
    STUDY_TIME: several(ranges("TM")),
    ACCESSION: several(text_matches),
    PATIENT_NAME: several(person_matches),
    PATIENT_ID: several(text_matches),
    BIRTH_DATE: days,
    REFERRING: several(person_matches),
    STUDY_DESCRIPTION: several(text_matches),
    matching.MODALITIES_IN_STUDY: modalities,
    matching.SOP_CLASSES_IN_STUDY: st.just(Single(MR)),
    matching.STUDY_RELATED_INSTANCES: st.just(Single("2")),
    STUDY_UID: st.sampled_from([Single("1"), UIDList(("1", "3", "7"))]),
    MODALITY: modalities,
    SERIES_NUMBER: numbers,
    SERIES_DESCRIPTION: several(text_matches),
    PROCEDURE_START: days,
    REQUEST_ATTRIBUTES: texts.map(lambda one: Items((key(STEP_ID, Single(one)),))),
    SERIES_UID: st.sampled_from([Single("1.1"), UIDList(("1.1", "2.2"))]),
    SOP_UID: st.sampled_from([Single("9.1"), UIDList(("9.1", "9.2", "9.3"))]),
    SOP_CLASS_UID: st.just(Single(CT)),
    INSTANCE_NUMBER: numbers,
    CONTENT_TIME: several(ranges("TM")),
}
LEVELS = [Level.PATIENT, Level.STUDY, Level.STUDY, Level.SERIES, Level.IMAGE]


ALWAYS_KNOWN = [STUDY_UID, SERIES_UID, SOP_UID, SOP_CLASS_UID, matching.STUDY_RELATED_INSTANCES]


FUZZY = [
    "doe",
    "jon",
    "john doe",
    "*e jo*",
    "tar*",
    "=太郎",
    "o neil",
    "doe=山田",
    "Dough^J?hn",
    "yamata^tarou",
    "*",
]
MOMENTS = [datetime(2020, 1, 1, 10, 15), datetime(2020, 1, 1, 12), datetime(2020, 1, 31), datetime.max]  # noqa: DTZ001, DTZ901 - no zone is told


def moments():
    ends = st.one_of(st.none(), st.sampled_from(MOMENTS))
    return st.tuples(ends, ends).filter(any).map(lambda both: Moments(STUDY_TIME, *both))


def any_match(tag):
    """What a key of the tag may ask for, by options too."""
    kinds = [MATCHES[tag], MATCHES[tag], st.just(Empty())]
    if public_vr(tag) == "PN":
        kinds.append(several(st.sampled_from(FUZZY).map(Fuzzy)))
    if public_vr(tag) == "CS":
        kinds.append(st.just(AllOf((Single("CT"), Single("MR")))))
    if tag == STUDY_DATE:
        kinds += [moments(), st.one_of(days, moments()).map(Adjusted)]
    if tag == STUDY_TIME:
        kinds.append(several(ranges("TM")).map(Adjusted))
    return st.one_of(*kinds)


zones = st.sampled_from([-14, -1, 5, 14]).map(
    lambda hours: Zone(timedelta(hours=hours), lambda _: timedelta(hours=1))
)


@st.composite
def any_query(draw, keywords):
    """Few keys or none, most of them about these attributes, with and without bounds."""
    level = draw(st.sampled_from(LEVELS))
    tags = {globals()[keyword] for keyword in keywords} & MATCHES.keys()
    if MODALITY in tags:
        tags |= {matching.MODALITIES_IN_STUDY, matching.SOP_CLASSES_IN_STUDY}
    supported = matching.STANDARD.supported(level)
    known = sorted(tags & supported) * 3
    known += [tag for tag in ALWAYS_KNOWN if tag in supported]
    some_tags = draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
    keys = [key(tag, draw(any_match(tag))) for tag in some_tags]
    if draw(st.booleans()):
        keys = [replace(one, is_unique=one.tag == PATIENT_ID) for one in keys]
    limit = draw(st.one_of(st.none(), st.integers(0, 4)))
    return Query(
        level,
        tuple(keys),
        matching.STANDARD.supported(level),
        limit,
        draw(st.integers(0, 5)),
        matches_unknown=draw(st.booleans()),
        zone=draw(zones),
    )


def in_order(one):
    """Where an object stands among others of its level."""
    date, time = (
        next((matching.normal(vr, value) for value in one.get(tag, {}).get("Value", ())), None)
        for vr, tag in (("DA", "00080020"), ("TM", "00080030"))
    )
    recency = -int(date + (time or "000000")[:6]) if date else 0
    lower = []
    for number, uid in ((SERIES_NUMBER, SERIES_UID), (INSTANCE_NUMBER, SOP_UID)):
        absent, value = number_of(one, number)
        lower += [(True, 0) if absent or value == "x" else (False, int(value)), values([one], uid)[0] or ""]
    return recency, one["0020000D"]["Value"][0] if "0020000D" in one else "", *lower


@st.composite
def archives_and_queries(draw):
    """Instances that tell some attributes alone, so that much matches, and queries about those."""
    some_keywords = st.lists(st.sampled_from(sorted(MATCHED)), min_size=1, max_size=3, unique=True)
    keywords = draw(st.one_of(some_keywords, st.just(["STUDY_DATE", "STUDY_TIME", "TIMEZONE"])))
    instances = st.lists(any_instance(keywords), max_size=14, unique_by=lambda one: one.key.sop_uid)
    return draw(instances), draw(st.lists(any_query(keywords), min_size=8, max_size=8))


@settings(with_databases, max_examples=60)
@given(
    archive=archives_and_queries(),
    few=st.sampled_from([0, 1, 3, 1000]),
    page=st.sampled_from([1, 2, 3, 500]),
)
def test_what_is_found_is_what_the_matcher_takes_of_everything(database, archive, few, page):
    """Whichever way in is taken, however pages are cut, with any offset, limit and bound."""
    arrivals, queries = archive
    index = Index(database())
    index.clear()
    index.apply(arrivals, {})
    for query in queries:
        everything = found(index, query.level, returns=query.returns)
        matches = matching.matcher(query)
        expected = [one for one in everything if matches(one)]
        if query.level is not Level.PATIENT:
            assert everything == sorted(everything, key=in_order)
        end = None if query.limit is None else query.offset + query.limit
        search = Search(query, "/dicomweb", index._places, few=few, page=page)
        assert list(search.find(index._rows)) == expected[query.offset : end]
        assert search.count(index._rows, 4) == min(4, len(expected))
        assert list(index.find(query)) == expected[query.offset : end]


MANY = 1500  # a database nests conditions a thousand deep


@pytest.mark.parametrize(
    ("tag", "match"),
    [
        (PATIENT_ID, AnyOf(tuple(Single(f"{n}") for n in range(MANY)))),
        (PATIENT_ID, AnyOf(tuple(Wildcard(f"{n}*") for n in range(MANY)))),
        (PATIENT_ID, Wildcard("*" + "7*" * MANY)),
        (PATIENT_NAME, AnyOf(tuple(Single(f"{n}") for n in range(MANY)))),
        (PATIENT_NAME, Wildcard("*" + "7*" * MANY)),
        (PATIENT_NAME, Fuzzy(" ".join(f"{n}" for n in range(MANY)))),
        (STUDY_DATE, AnyOf(tuple(Range(f"20{n:06}", None) for n in range(MANY)))),
        (SERIES_NUMBER, AnyOf(tuple(Single(f"{n}") for n in range(MANY)))),
        (MODALITY, AnyOf(tuple(Single(f"{n}") for n in range(MANY)))),
        (matching.MODALITIES_IN_STUDY, AllOf(tuple(Single(f"{n}") for n in range(MANY)))),
        (SERIES_UID, UIDList(tuple(f"1.{n}" for n in range(20 * MANY)))),
    ],
)
def test_keys_of_any_size_are_answered(index, tag, match):
    seven = {"PATIENT_ID": "7" * MANY, "PATIENT_NAME": name("7"), "STUDY_DATE": "20200101"}
    instances = [
        arrival(SERIES_NUMBER=7, MODALITY="7", **seven),
        arrival(series="7", sop="7", SERIES_NUMBER="x"),
    ]
    index.apply(instances, {})
    everything = found(index, Level.SERIES, returns=matching.STANDARD.supported(Level.SERIES))
    query = Query(Level.SERIES, (key(tag, match),), None, None)
    expected = [one for one in everything if matching.matcher(query)(one)]
    assert values(index.find(query), SERIES_UID) == values(expected, SERIES_UID)
    assert index.count(query, 10) == len(expected)


def test_a_name_that_is_not_the_patient_s_is_found_by_its_sound(index):
    index.apply([arrival(PATIENT_NAME=name("Doe^Jane"), REFERRING=name("Smith^John"))], {})
    for asked, count in (("smyth", 1), ("doe", 0)):
        fuzzy = Query(Level.STUDY, (key(REFERRING, Fuzzy(asked)),), None, None)
        assert len(list(index.find(fuzzy))) == index.count(fuzzy, 10) == count


@pytest.mark.parametrize(
    ("pattern", "studies"),
    [("doe*", ["1", "2"]), ("doe*=", ["2"]), ("*oe*=", ["2"]), ("=doe*", ["1"]), ("doe*^^^^^", [])],
)
def test_a_pattern_with_an_equals_sign_is_of_the_groups_that_it_names(index, pattern, studies):
    """And one of more components than there are fits none."""
    index.apply(
        [
            arrival(PATIENT_NAME=name("Smith^John", "Doe")),
            arrival("2", "2.1", "2.1.1", PATIENT_NAME=name("Doe^John")),
        ],
        {},
    )
    asked = Query(Level.STUDY, (key(PATIENT_NAME, Wildcard(pattern)),), None, None)
    assert values(index.find(asked), STUDY_UID) == studies
    assert index.count(asked, 10) == len(studies)
    assert index.count(asked, 10, lambda: False) == 0  # nobody waits for it


def test_a_value_of_any_length_is_held_and_found(index):
    """PostgreSQL refuses a row of an index that is too long, and would refuse it for ever."""
    long = "".join(hashlib.sha256(bytes([n])).hexdigest() for n in range(250))
    names = {"PATIENT_NAME": name(long), "STUDY_DESCRIPTION": long, "ACCESSION": long}
    index.apply(
        [
            arrival("1", sop="1", PATIENT_ID=long + "1", **names),
            arrival("2", sop="2", PATIENT_ID=long + "2", MODALITY=long, SERIES_DESCRIPTION=long),
            arrival("3", sop="3", PATIENT_NAME=name(long)),
        ],
        {},
    )
    assert values(found(index, Level.STUDY, key(PATIENT_ID, Single(long + "2"))), STUDY_UID) == ["2"]
    assert values(found(index, Level.STUDY, key(ACCESSION, Wildcard(f"{long[:-1]}?"))), STUDY_UID) == ["1"]
    assert values(found(index, Level.STUDY, key(PATIENT_NAME, Single(long))), STUDY_UID) == ["1", "3"]
    assert values(found(index, Level.SERIES, key(SERIES_DESCRIPTION, Single(long))), STUDY_UID) == ["2"]
    assert values(found(index, Level.SERIES, key(MODALITY, Single(long))), STUDY_UID) == ["2"]
    in_study = key(matching.MODALITIES_IN_STUDY, Single(long))
    assert values(found(index, Level.STUDY, in_study), STUDY_UID) == ["2"]
    assert len(found(index, Level.PATIENT)) == 3


def test_the_first_value_in_published_order_stands_for_the_study(index):
    index.apply(
        [
            arrival(series="1.2", sop="2", SERIES_NUMBER=2, STUDY_DESCRIPTION="second", PATIENT_ID="B"),
            arrival(series="1.1", sop="1", SERIES_NUMBER=1, STUDY_DESCRIPTION="first", PATIENT_ID=()),
        ],
        {},
    )
    (one,) = index.find(EVERY_STUDY)
    assert values([one], STUDY_DESCRIPTION) == ["first"]
    assert values([one], PATIENT_ID) == ["B"]


def test_what_is_computed_is_right_at_every_level(index):
    index.apply(
        [
            arrival("1", "1.1", "1", MODALITY="CT", PATIENT_ID="A"),
            arrival("1", "1.1", "2", MODALITY="CT", PATIENT_ID="A"),
            arrival("1", "1.2", "3", MODALITY="SR", PATIENT_ID="A", sop_class=MR),
            arrival("2", "2.1", "4", MODALITY="CT", PATIENT_ID="A"),
        ],
        {},
    )
    studies = found(index, Level.STUDY, key(STUDY_UID, Single("1")))
    assert studies[0]["00080061"]["Value"] == ["CT", "SR"]
    assert studies[0]["00080062"]["Value"] == [CT, MR]
    assert values(studies, 0x00201206) == [2]
    assert values(studies, 0x00201208) == [3]
    assert values(found(index, Level.SERIES), 0x00201209) == [2, 1, 1]
    assert values(found(index, Level.SERIES, limit=1), 0x00081190) == ["/dicomweb/studies/1/series/1.1"]
    (instance,) = found(index, Level.IMAGE, key(SOP_UID, Single("3")))
    assert values([instance], 0x00081190) == ["/dicomweb/studies/1/series/1.2/instances/3"]
    assert values([instance], 0x00083002) == [EXPLICIT_LITTLE]
    wanted = frozenset({0x00201200, 0x00201202, 0x00201204})
    (patient,) = found(index, Level.PATIENT, returns=wanted)
    assert patient == {
        "00201200": element(0x00201200, 2),
        "00201202": element(0x00201202, 3),
        "00201204": element(0x00201204, 4),
    }
    assert found(index, Level.STUDY, key(STUDY_UID, Single("2")), returns=wanted) == [patient]


def test_a_patient_is_an_id_and_its_issuer_told_by_the_newest_study(index):
    index.apply(
        [
            arrival("1", sop="1", PATIENT_ID="A", STUDY_DATE="20200101", PATIENT_NAME=name("Maiden^Name")),
            arrival("2", sop="2", PATIENT_ID="A", STUDY_DATE="20210101", PATIENT_NAME=name("Married^Name")),
            arrival("3", sop="3", PATIENT_NAME=name("No^Id")),
            arrival("4", sop="4", PATIENT_NAME=name("No^Id")),
            arrival("5", sop="5", PATIENT_NAME=name("Other^Name")),
        ],
        {},
    )
    names = [one["Alphabetic"] for one in values(found(index, Level.PATIENT), PATIENT_NAME)]
    assert names == ["Married^Name", "No^Id", "Other^Name"]
    assert found(index, Level.PATIENT, key(PATIENT_NAME, Single("Maiden^Name"))) == []
    assert values(found(index, Level.PATIENT, limit=1, offset=1), PATIENT_NAME) == [name("No^Id")]


def test_only_what_is_asked_for_is_returned_and_what_is_always_wanted_even_empty(index):
    index.apply([arrival(STUDY_DATE="20200101", MODALITY="CT")], {})
    wanted = frozenset({STUDY_DATE, PATIENT_ID, MODALITY, STUDY_DESCRIPTION})
    (one,) = found(index, Level.STUDY, returns=wanted, always=frozenset({PATIENT_ID}))
    assert one == {"00080020": element(STUDY_DATE, "20200101"), "00100020": {"vr": "LO"}}
    (one,) = found(index, Level.SERIES, returns=wanted)
    assert list(one) == ["00080020", "00080060"]


def test_every_indexed_attribute_comes_back(index):
    whole = arrival()
    tags = matching.STANDARD.index_tags - {STUDY_UID, SERIES_UID, SOP_UID, SOP_CLASS_UID, 0x00083002}
    samples = {"PN": name("A^B"), "SQ": {}, "DA": "20200101", "TM": "10", "IS": 1, "DS": 1.5, "US": 2}
    elements = {tag: element(tag, samples.get(public_vr(tag), "X")) for tag in tags}
    fragments = {tag: b'"%08X":%b' % (tag, orjson.dumps(one)) for tag, one in elements.items()}
    index.apply([whole._replace(attributes={**whole.attributes, **fragments})], {})
    (one,) = found(index, Level.IMAGE)
    assert {tag: one[f"{tag:08X}"] for tag in elements} == elements
    assert {f"{tag:08X}" for tag in STUDY_TAGS | SERIES_TAGS | INSTANCE_TAGS} <= one.keys()
    assert list(one) == sorted(one)


# ── publishing, positions, processes ─────────────────────────────────────────────────────────────


def test_a_study_is_due_until_what_was_published_is_what_is_held(index):
    index.apply([arrival(sop="1")], {})
    assert list(index.due()) == [("1", 1)]
    index.apply([arrival(sop="2")], {})
    index.mark_published(1, publication("1", "a"))
    assert list(index.due()) == [("1", 2)]
    index.mark_published(2, publication("1", "a"))
    assert list(index.due()) == []
    index.mark_unpublished()
    assert list(index.due()) == [("1", 2)]


def test_a_study_whose_last_instance_is_removed_is_due_until_it_is_withdrawn(index):
    one = arrival()
    index.apply([one], {})
    index.mark_published(1, publication("1", "a"))
    assert leave(index, ("1.1.1", one.digest)) == {"1": 2}
    assert list(index.due()) == [("1", 2)]
    assert list(index.studies()) == []
    assert list(index.find(EVERY_STUDY)) == []
    index.mark_published(2, publication("1", "a"))
    assert list(index.due()) == []
    index.forget_left(index.left(1))
    assert index.snapshot("1").changes == 0


def test_what_no_variant_needs_any_more_takes_no_room(index):
    def rows():
        with index._engine.connect() as connection:
            return {
                table.name: connection.execute(select(func.count()).select_from(table)).scalar()
                for table in metadata.sorted_tables
                if table.name in ("study", "series", "statement", "instance")
            }

    one, other = arrival(sop="1", MODALITY="CT"), arrival("1", "1.2", "2", MODALITY="MR")
    index.apply([one], {})
    before = rows()
    index.apply([other], {})
    leave(index, ("2", other.digest))
    finish(index)
    assert rows() == before
    leave(index, ("1", one.digest))
    finish(index)
    assert set(rows().values()) == {0}


def test_positions_are_committed_with_their_arrivals_or_not_at_all(index):
    index.apply([arrival(sop="1")], {"listener-0": Position(1, 100)})
    index.apply([], {"listener-0": Position(1, 200), "web": Position(3, 64)})
    with pytest.raises(DamagedError):
        index.apply([arrival(sop="2")._replace(sop_class_uid=None)], {"listener-0": Position(9, 9)})
    assert index.positions() == {"listener-0": Position(1, 200), "web": Position(3, 64)}
    assert index.known(["2"]) == {}
    index.forget_position("web")
    assert index.positions() == {"listener-0": Position(1, 200)}


def test_clear_forgets_everything(index):
    index.apply([arrival()], {"web": Position(1, 100)})
    index.clear()
    assert answers(index) == ([[], [], []], [], [], Counts(0, 0, 0, 0, 0))
    assert index.positions() == {}
    assert list(index.due()) == []


def test_a_search_goes_on_while_the_index_changes(index):
    index.apply([arrival(f"1.{n}", sop=f"9.{n}") for n in range(1200)], {})
    search = index.find(EVERY_STUDY)
    seen = [next(search) for _ in range(3)]
    first, last = values(seen, STUDY_UID)[0], "1.1199"
    leave(index, *[(one.key.sop_uid, one.digest) for uid in (first, last) for one in index.held(uid)])
    uids = values(seen + list(search), STUDY_UID)
    assert len(uids) == len(set(uids)) == 1200


def test_a_reader_sees_what_is_committed_and_changes_nothing(database):
    writer = Index(database())
    reader = Index(database(read_only=True))
    writer.apply([arrival()], {})
    assert values(reader.find(EVERY_STUDY), STUDY_UID) == ["1"]
    with pytest.raises(BusyError):
        reader.clear()


def test_filing_and_publishing_write_at_the_same_time(index):
    """Two threads of one process write; neither fails, nothing is lost."""
    failures = []

    def publish():
        try:
            for _ in range(100):
                for study_uid, changes in index.due():
                    index.mark_published(changes, publication(study_uid, "a"))
        except Exception as error:  # noqa: BLE001 - whatever it is fails the test
            failures.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    for n in range(100):
        index.apply([arrival(sop=f"9.{n}")], {})
    thread.join()
    assert failures == []
    assert index.snapshot("1").changes == 100
    assert index.counts().instances == 100


def test_patients_attributes_are_not_in_errors(index):
    with pytest.raises(DamagedError) as raised:
        index.apply([arrival(PATIENT_ID="SECRET")._replace(sop_class_uid=None)], {})
    assert "SECRET" not in str(raised.value)
    assert "SECRET" not in str(raised.value.__cause__)


# ── the databases ───────────────────────────────────────────────────────────────────────────


def test_make_durable_leaves_nothing_to_the_log(sqlite_database, tmp_path):
    index = Index(sqlite_database())
    index.apply([arrival()], {})
    index.make_durable()
    assert (tmp_path / "index.sqlite-wal").stat().st_size == 0
    assert index.counts().instances == 1


def test_a_file_that_is_no_database_is_damaged(tmp_path):
    path = tmp_path / "index.sqlite"
    path.write_bytes(b"not a database" * 100)
    for read_only in (True, False):
        with pytest.raises(DamagedError, match=r"index\.sqlite"):
            sqlite.open_engine(path, read_only=read_only)


def test_a_database_that_loses_its_bytes_is_damaged(tmp_path, sqlite_database):
    index = Index(sqlite_database())
    index.apply([arrival(sop=f"9.{n}") for n in range(50)], {})
    index.make_durable()
    path = tmp_path / "index.sqlite"
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * len(data[4096:])
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="rebuild"):
        Index(sqlite_database(read_only=True)).held("1")


@pytest.mark.parametrize(("version", "read_only"), [(0, False), (0, True), (NEXT, False), (NEXT, True)])
def test_a_database_of_another_version_or_program_is_refused(tmp_path, version, read_only):
    path = tmp_path / "index.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (x)")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    with pytest.raises(ConfigError, match="version"):
        sqlite.open_engine(path, read_only=read_only)


def test_a_missing_file_cannot_be_read(tmp_path):
    with pytest.raises(DamagedError, match="not there"):
        sqlite.open_engine(tmp_path / "index.sqlite", read_only=True)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(BusyError, match="cannot be opened"):
        sqlite.open_engine(tmp_path / "missing" / "index.sqlite", read_only=False)


def test_more_readers_than_connections_wait_for_each_other(database):
    index = Index(database())
    index.apply([arrival(sop=f"9.{n}") for n in range(50)], {})
    counts = []
    threads = [
        threading.Thread(target=lambda: counts.append(len(found(index, Level.IMAGE)))) for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [50] * 40


def test_an_index_in_a_folder_with_odd_characters_is_opened(tmp_path):
    folder = tmp_path / "a b?c#d%20é"
    folder.mkdir()
    engine = sqlite.open_engine(folder / "index.sqlite", read_only=False)
    Index(engine).apply([arrival()], {})
    engine.dispose()
    assert (folder / "index.sqlite").is_file()


def of_level(level, *keys, offset=0):
    return Query(level, keys, None, 10, offset)


NAMED = key(PATIENT_NAME, Wildcard("smith*"))
ANYWHERE = key(PATIENT_NAME, Wildcard("*mit*"))
OF_CT = key(matching.MODALITIES_IN_STUDY, Single("CT"))
LAST_YEAR = key(STUDY_DATE, Range("20250101", "20251231"))


@pytest.mark.parametrize(
    ("query", "steps"),
    [
        (of_level(Level.STUDY), ["study USING COVERING INDEX study_order"]),
        (of_level(Level.STUDY, offset=5000), ["study USING COVERING INDEX study_order"]),
        (of_level(Level.STUDY, key(STUDY_UID, Single("1"))), ["study USING INDEX sqlite_autoindex_study_1"]),
        (of_level(Level.STUDY, key(PATIENT_ID, Single("A"))), ["study USING INDEX study_patient_id"]),
        (of_level(Level.STUDY, key(ACCESSION, Single("A"))), ["study USING INDEX study_accession_number"]),
        (of_level(Level.STUDY, LAST_YEAR), ["study USING COVERING INDEX study_order"]),
        (of_level(Level.STUDY, OF_CT, offset=5000), ["study_modality USING PRIMARY KEY"]),
        (of_level(Level.STUDY, OF_CT, LAST_YEAR), ["study_modality USING PRIMARY KEY"]),
        (of_level(Level.STUDY, ANYWHERE), ["study USING COVERING INDEX study_scan"]),
        (
            of_level(Level.STUDY, key(PATIENT_NAME, Single("smith")), key(PATIENT_NAME, Fuzzy("smith^john"))),
            ["study_name USING PRIMARY KEY", "part USING PRIMARY KEY"],
        ),
        (of_level(Level.STUDY, NAMED), ["study_name USING PRIMARY KEY", "study USING INTEGER PRIMARY KEY"]),
        (of_level(Level.PATIENT, NAMED), ["study_name USING PRIMARY KEY", "study USING INTEGER PRIMARY KEY"]),
        (
            of_level(Level.STUDY, key(PATIENT_NAME, Fuzzy("smith"))),
            ["study_name USING PRIMARY KEY", "study USING INTEGER PRIMARY KEY"],
        ),
        (
            of_level(Level.STUDY, key(STUDY_DATE, Moments(STUDY_TIME, MOMENTS[0], None))),
            ["study USING COVERING INDEX study_order (recency<?)"],
        ),
        (
            of_level(Level.STUDY, key(STUDY_DATE, Adjusted(Single("20200101")))),
            ["study USING COVERING INDEX study_order (recency>? AND recency<?)"],
        ),
        (of_level(Level.SERIES), ["study USING INDEX study_order", "series USING INDEX series_order"]),
        (of_level(Level.SERIES, NAMED), ["study_name USING PRIMARY KEY", "series USING INDEX series_order"]),
        (of_level(Level.IMAGE), ["study USING INDEX study_order", "instance USING INDEX instance_order"]),
        (of_level(Level.IMAGE, key(STUDY_UID, Single("1"))), ["instance USING INDEX instance_order"]),
        (
            of_level(Level.IMAGE, key(SOP_UID, Single("1"))),
            ["instance USING INDEX sqlite_autoindex_instance_1"],
        ),
    ],
)
def test_each_question_goes_by_the_index_that_is_made_for_it(sqlite_database, query, steps):
    """None reads all series or instances; the plans of a large archive are those of a small one."""
    engine = sqlite_database()
    for turn in ("as made", "as made the other way round"):
        plans = plans_of(engine, query)
        for step in steps:
            assert any(f" {step}" in plan for plan in plans), (turn, plans)
        assert not any(plan.startswith(("SCAN instance", "SCAN series")) for plan in plans), turn
        turn_indexes_round(engine)


def turn_indexes_round(engine):
    """Make the indexes anew, the last one first: SQLite looks at them in the order they were made in."""
    with engine.execution_options(writes=True).begin() as connection:
        made = connection.exec_driver_sql(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY rowid"
        ).all()
        statistics = connection.exec_driver_sql("SELECT tbl, idx, stat FROM sqlite_stat1").all()
        for index_name, statement in reversed(made):
            connection.exec_driver_sql(f"DROP INDEX {index_name}")
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql("DELETE FROM sqlite_stat1")
        for row in statistics:
            connection.exec_driver_sql("INSERT INTO sqlite_stat1 VALUES (?, ?, ?)", tuple(row))
        connection.exec_driver_sql("ANALYZE sqlite_schema")


@pytest.mark.parametrize(
    ("query", "by"),
    [
        (of_level(Level.STUDY), "study_"),
        (of_level(Level.STUDY, key(PATIENT_ID, Single("A"))), "study_"),
        (of_level(Level.STUDY, OF_CT, offset=5000), "study_modality_pkey"),
        (of_level(Level.STUDY, NAMED), "study_name_pkey"),
        (of_level(Level.STUDY, key(PATIENT_NAME, Fuzzy("smith"))), "study_name_pkey"),
        (
            of_level(Level.STUDY, key(PATIENT_NAME, Single("smith")), key(PATIENT_NAME, Fuzzy("smith^john"))),
            "study_name_pkey",
        ),
        (of_level(Level.SERIES), "series_order"),
        (of_level(Level.IMAGE), "instance_order"),
        (of_level(Level.IMAGE, key(STUDY_UID, Single("1"))), "instance_order"),
        (of_level(Level.IMAGE, key(SOP_UID, Single("1"))), "instance_sop_uid_digest_series_id_key"),
    ],
)
def test_postgresql_has_an_index_for_each_question(postgresql_database, query, by):
    plans = plans_of(postgresql_database(), query)
    assert any(by in plan for plan in plans), plans
    assert not any(f"Seq Scan on {table}" in plan for plan in plans for table in ("instance", "series"))


def plans_of(engine, query):
    """The steps of all that is read for *query*, of an archive of one study."""
    Index(engine).apply([arrival(PATIENT_NAME=name("Smith"))], {})
    plans = []

    def read(question):
        with engine.connect() as connection:
            plans.extend(plan_of(connection, question))
            return ask(connection, question)

    list(Search(query, "", Places(matching.STANDARD)).find(read))
    return plans


def test_a_search_ends_before_the_page_at_which_it_is_told_not_to_go_on(index):
    index.apply([arrival(sop=f"1.1.{number}", INSTANCE_NUMBER=number) for number in range(1, 1202)], {})
    nothing = replace(EVERY_INSTANCE, keys=(key(CONTENT_TIME, Single("1")),))
    asked = iter([True, True, False])
    assert not list(index.find(nothing, lambda: next(asked)))
    assert next(asked, None) is None
    asked = iter([True, False])
    assert 0 < len(list(index.find(EVERY_INSTANCE, lambda: next(asked)))) < 1201


def test_what_has_no_value_for_a_key_is_found_if_unknown_values_match(index):
    index.apply(
        [
            arrival("1", ACCESSION="A"),
            arrival("2", "2.1", "2.1.1"),
            arrival("3", "3.1", "3.1.1", ACCESSION="B"),
        ],
        {},
    )
    asked = Query(Level.STUDY, (key(ACCESSION, Single("A")),), None, None)
    assert values(index.find(asked), STUDY_UID) == ["1"]
    assert sorted(values(index.find(replace(asked, matches_unknown=True)), STUDY_UID)) == ["1", "2"]


def test_a_series_without_modality_is_found_if_unknown_values_match_whatever_its_study_has(index):
    index.apply([arrival(MODALITY="MR"), arrival(series="1.2", sop="1.1.2")], {})
    asked = Query(Level.SERIES, (key(MODALITY, Single("CT")),), None, None, matches_unknown=True)
    assert values(index.find(asked), SERIES_UID) == ["1.2"]
