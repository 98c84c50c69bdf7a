"""The page: whole without script, live with it, and whatever it is told is text."""

import re
from html.parser import HTMLParser
from urllib.parse import quote

import pydicom
import pytest
from pydicom.config import disable_value_validation

from dicomscp.errors import BusyError
from dicomscp.study import layout
from tests.processes import wait_until
from tests.unit.web.held import SOURCES, FilledArchive

MARKUP = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{0}"
STARTED = "2026-01-02T03:04:05+00:00"


def facts(**changed):
    """What `status` tells of a gateway in which all is well."""
    return {
        "root": "/root",
        "running": True,
        "serve": {"started_at": STARTED},
        "parts": [part("listener-0"), part("pipeline")],
        "journal_waiting_bytes": 0,
        "journal_lag_seconds": 0.0,
        "disk_free_bytes": 412_345_678_901,
        "disk_size_bytes": 1_000_000_000_000,
        "disk_reserve_bytes": 1 << 30,
        "associations": 2,
        "calling_aes": [],
        "refused": 0,
        "rejected_associations": 0,
        "refusals": [],
        "set_aside_studies": 0,
        "set_aside": [],
        "quarantined": 0,
        "quarantine": [],
        "held": {
            "studies": 7,
            "series": 8,
            "instances": 1234,
            "variants": 0,
            "bytes": 5_600_000,
            "leaving": 0,
        },
        "due": 1,
        **changed,
    }


def part(name, *, alive=True, deaths=0, exit_status=None):
    return {
        "name": name, "alive": alive, "started_at": STARTED, "deaths": deaths, "exit_status": exit_status
    }  # fmt: skip


def sending(calling_ae, per_second=None):
    rates = {"instances_per_second": per_second, "bytes_per_second": per_second and per_second * 500_000}
    return {"calling_ae": calling_ae, "instances": 1200, "bytes": 6e8, "last_at": STARTED, **rates}


class Document(HTMLParser):
    """What is on a page: elements with their attributes, and text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    @property
    def words(self):
        """The text, with one space between words."""
        return " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        if tag in ("p", "td", "dd"):
            self.text += " "
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, attribute):
        return [attributes.get(attribute) for name, attributes in self.elements if name == tag]


def shown(client, path="/", **parameters):
    response = client.get(path, params=parameters)
    assert response.status_code == 200
    return Document(response.text)


# Studies


def test_the_page_lists_studies_with_their_state(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    uid = held.key.study_uid
    client = gateway.start(ae_title="ARCHIVE1")
    document = shown(client)
    for text in ("ARCHIVE1", "CompressedSamples, CT1", "1CT1", "2004-01-19 07:27", "CT", "in preparation"):
        assert text in document.text, text
    assert document.all("img", "src") == [f"/dicomweb/studies/{uid}/thumbnail"]
    assert document.all("img", "loading") == ["lazy"]
    assert f"/dicomweb/studies/{uid}/metadata?accept=application/json" in document.all("a", "href")


@pytest.mark.parametrize(
    ("record", "state"),
    [
        ({"instances": 1, "warnings_count": 0, "last_received_at": "2026-01-02T03:04:05Z"}, "published"),
        ({"instances": 0, "warnings_count": 0}, "0 published"),
        ({"instances": 1, "warnings_count": 2, "warnings": ["one", "two"]}, "published, 2 warnings"),
    ],
)
def test_a_study_says_how_far_it_is_published(gateway, record, state):
    held = gateway.archive.add_file("CT_small.dcm")
    gateway.record(held.key.study_uid, **record)
    document = shown(gateway.start())
    assert f"{state} " in document.text
    assert document.all("time", "datetime") == ["2026-01-02T03:04:05+00:00"] * ("last_received_at" in record)


def test_a_search_leads_to_a_study_and_that_to_its_series_and_metadata(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    gateway.archive.add_file("MR_small_implicit.dcm")
    study_uid, series_uid, _ = held.key
    for document in (layout.study_metadata(study_uid), layout.series_metadata(study_uid, series_uid)):
        gateway.publish(document, [])
    gateway.publish(layout.instances_index(study_uid, series_uid), [])
    gateway.record(study_uid, instances=1, warnings_count=1, warnings=["<b>it is odd"])
    client = gateway.start()

    found = shown(client, q="1CT")
    (link,) = [href for href in found.all("a", "href") if href.startswith("./?study=")]
    study = shown(client, "/", study=link.removeprefix("./?study="))

    assert "1 · CT" in study.text
    assert "<b>it is odd" in study.text
    assert f"/dicomweb/studies/{study_uid}/series/{series_uid}/thumbnail" in study.all("img", "src")
    data = [href for href in study.all("a", "href") if href.startswith("/dicomweb")]
    assert len(data) == 3
    for href in data:
        response = client.get(href)
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json")


def test_a_study_that_is_not_held_is_told_as_a_page(gateway):
    client = gateway.start()
    for uid in ("1.2.3", "../../etc/passwd", MARKUP):
        response = client.get("/", params={"study": uid})
        assert (response.status_code, "No such study" in response.text) == (404, True)


def test_the_page_searches_names_and_ids(gateway):
    for name in ("CT_small.dcm", "MR_small_implicit.dcm"):
        gateway.archive.add_file(name)
    client = gateway.start()
    assert "CT1" in shown(client, q="1CT").text
    assert "MR1" not in shown(client, q="1CT").text
    assert "MR1" in shown(client, q="^MR").text
    assert "No study has “nobody”" in shown(client, q="nobody").text


@pytest.mark.parametrize("wanted", ["\0", "a" * 5000, "=", "^^^^^^", "a=b=c=d", "*", "%00", "🩻", "1,2"])
def test_whatever_is_searched_for_is_answered_by_a_page(gateway, wanted):
    gateway.archive.add_file("CT_small.dcm")
    response = gateway.start().get("/", params={"q": wanted})
    assert response.status_code in (200, 400)
    assert response.headers["content-type"].startswith("text/html")


def test_an_empty_gateway_says_what_to_do(gateway):
    assert "Send some to the AE title DICOMSCP" in shown(gateway.start()).text


def test_studies_that_changed_last_come_first_whatever_their_date(gateway):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm", stop_before_pixels=True)
    for number, date in enumerate(("20200101", "", "19000101", "20300101", "20100101")):
        dataset.StudyInstanceUID, dataset.StudyDate = f"1.2.{number}", date
        dataset.SOPInstanceUID = dataset.SeriesInstanceUID = f"1.2.{number}.1"
        gateway.archive.add(dataset)
    document = shown(gateway.start())
    keys = [attributes["data-key"] for tag, attributes in document.elements if tag == "li" and
            attributes.get("class") == "study"]  # fmt: skip
    assert keys == ["1.2.4", "1.2.3", "1.2.2", "1.2.1", "1.2.0"]


# The viewer


def test_without_a_viewer_no_study_leads_to_one(gateway):
    gateway.archive.add_file("CT_small.dcm")
    document = shown(gateway.start())
    assert [href for href in document.all("a", "href") if "view" in href] == []


def test_with_a_viewer_thumbnail_and_name_lead_to_it(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start(viewer_url=lambda uid: f"/ohif/viewer?StudyInstanceUIDs={uid}")
    address = f"/ohif/viewer?StudyInstanceUIDs={held.key.study_uid}"
    for document in (shown(client), shown(client, q="CT"), shown(client, study=held.key.study_uid)):
        assert document.all("a", "href").count(address) == 2


# Now


def test_the_figures_are_told(gateway):
    document = shown(gateway.start(status=facts))
    for text in (
        "7 studies",
        "1,234 instances",
        "5.3 MiB",
        "384 GiB free of 931 GiB",
        "2 open now",
        "1 study",
    ):
        assert text in document.words, text
    assert document.all("meter", "value") == ["588000000000"]
    assert STARTED in document.all("time", "datetime")


@pytest.mark.parametrize(
    ("waiting_bytes", "lag_seconds", "said"),
    [
        (0, 0.0, "To be indexed nothing all that came can be found"),
        (3 << 20, 0.0, "To be indexed 3.0 MiB on the way"),
        (3 << 30, 75.0, "To be indexed 3.0 GiB 75 s behind"),
    ],
)
def test_what_waits_for_the_index_is_told(gateway, waiting_bytes, lag_seconds, said):
    told = facts(journal_waiting_bytes=waiting_bytes, journal_lag_seconds=lag_seconds)
    assert said in shown(gateway.start(status=lambda: told)).words


def test_who_sends_now_is_told_with_the_rates(gateway):
    told = facts(calling_aes=[sending("CT1", 12.5), sending("", 0.0), sending("MR1")])
    text = shown(gateway.start(status=lambda: told)).words
    assert "CT1 12 6.0 MiB/s 1,200 572 MiB 2026-01-02 03:04:05 UTC" in text
    assert "drop folder - - 1,200" in text
    assert "MR1 - - 1,200" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"parts": [part("pipeline", alive=False, deaths=3, exit_status=-9)]},
            "pipeline ended with exit status -9",
        ),
        ({"disk_free_bytes": 1000}, "below its reserve"),
        ({"set_aside_studies": 2}, "2 studies could not be published"),
        ({"index_away": "PostgreSQL is away"}, "PostgreSQL is away"),
        ({"index_rebuilding": True}, "being made anew"),
        ({"extra_keys_not_askable": ["KVP", "PatientAge"]}, "KVP, PatientAge"),
    ],
)
def test_what_a_person_must_know_stands_first(gateway, changed, said):
    html = gateway.start(status=lambda: facts(**changed)).get("/").text
    assert said in html[html.index('id="alerts"') : html.index("<h2")]


def test_what_the_index_does_not_say_is_not_made_up(gateway):
    told = facts(index_away="PostgreSQL is away")
    del told["held"], told["due"]
    words = shown(gateway.start(status=lambda: told)).words
    assert "Held - the index cannot say" in words
    assert "To be published -" in words


def test_nothing_is_alerted_of_when_all_is_well(gateway):
    assert '<div id="alerts" data-live></div>' in gateway.start(status=facts).get("/").text


def test_what_went_wrong_is_told_with_reasons(gateway):
    refusal = {
        "calling_ae": "CT1", "address": "10.0.0.1", "kind": "refused", "reason": "cut short",
        "times": 1200, "first_at": STARTED, "last_at": STARTED,
    }  # fmt: skip
    told = facts(
        refused=1203,
        rejected_associations=1,
        refusals=[refusal, {**refusal, "kind": "rejected", "reason": "unknown title", "times": 1}],
        quarantined=1,
        quarantine=[{"file": "letters/a.gz", "time": STARTED, "reason": "not DICOM but gzip"}],
        set_aside_studies=1,
        set_aside=[{"study_uid": "1.2.3", "attempts": 3, "reason": "it failed"}],
    )
    text = shown(gateway.start(status=lambda: told)).words
    for said in (
        "1,203 instances and 1 association since the start",
        "refused 1,200 times CT1 · 10.0.0.1 2026-01-02 03:04:05 UTC cut short",
        "association rejected 1 time CT1 · 10.0.0.1",
        "file letters/a.gz 2026-01-02 03:04:05 UTC not DICOM but gzip",
        "3 attempts 1.2.3 it failed",
    ):
        assert said in text, said


def test_a_gateway_whose_index_is_away_still_has_a_page(gateway):
    class Away(FilledArchive):
        def newest(self, limit):
            raise BusyError("The index is being rebuilt; ask again later")

        def find(self, query, goes_on=lambda: True):
            raise BusyError("The index is being rebuilt; ask again later")

    def status():
        raise BusyError("nobody knows")

    (gateway.archive.root / "away").mkdir()
    away = Away(gateway.archive.root / "away")
    client = gateway.start(away, status=status)
    text = shown(client).text
    assert "The index is being rebuilt" in text
    assert "nobody knows" in text
    response = client.get("/", params={"q": "Doe"})
    assert (response.status_code, "being rebuilt" in response.text) == (503, True)
    assert client.get("/status").json()["trouble"] == [
        "nobody knows", "The index is being rebuilt; ask again later"
    ]  # fmt: skip
    away.engine.dispose()


# Markup is text


def test_whatever_is_told_is_text(gateway):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    with disable_value_validation():
        dataset.PatientName = MARKUP
        dataset.PatientID = dataset.StudyDescription = dataset.SeriesDescription = MARKUP
        dataset.AccessionNumber = dataset.Modality = MARKUP
        dataset.StudyInstanceUID = "1.2.<b>'\"&"
    held = gateway.archive.add(dataset)
    gateway.record(held.key.study_uid, instances=1, warnings_count=1, warnings=[MARKUP])
    told = facts(
        parts=[part(MARKUP, alive=False, exit_status=MARKUP)],
        calling_aes=[sending(MARKUP, 1)],
        refusals=[{"calling_ae": MARKUP, "address": MARKUP, "kind": MARKUP, "reason": MARKUP, "times": 1,
                   "first_at": MARKUP, "last_at": MARKUP}],
        quarantine=[{"file": MARKUP, "time": MARKUP, "reason": MARKUP}],
        set_aside=[{"study_uid": MARKUP, "attempts": MARKUP, "reason": MARKUP}],
        serve={"started_at": MARKUP},
        index_away=MARKUP,
    )  # fmt: skip
    client = gateway.start(
        ae_title=MARKUP, version=MARKUP, status=lambda: told, viewer_url=lambda uid: f"/ohif/?{uid}{MARKUP}"
    )
    pages = [client.get("/", params=asked).text for asked in ({}, {"q": MARKUP}, {"q": "alert"},
                                                               {"study": held.key.study_uid})]  # fmt: skip
    for html in pages:
        document = Document(html)
        assert [src.partition("?")[0] for src in document.all("script", "src")] == ["page.js"]
        assert not document.all("style", "type")
        for tag, attributes in document.elements:
            assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
            for name in ("src", "href", "action"):
                address = attributes.get(name, "./")
                assert re.match(r"(\./|/dicomweb/|/ohif/|page\.|#)", address), address
        assert MARKUP in document.text
    assert pages[0].count(">alert(1)<") == 0
    assert f"/dicomweb/studies/{quote(held.key.study_uid, safe='')}/thumbnail" in Document(pages[0]).all(
        "img", "src"
    )


def test_the_policy_lets_nothing_load_or_run_but_what_is_ours(gateway):
    client = gateway.start()
    response = client.get("/")
    policy = dict(
        rule.strip().split(" ", 1) for rule in response.headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    assert response.headers["cache-control"] == "no-store"
    document = Document(response.text)
    files = [*document.all("script", "src"), *document.all("link", "href")]
    assert len(files) == 3
    for file in files:
        answer = client.get(f"/{file}")
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["content-type"].partition(";")[0] in (
            "text/css",
            "text/javascript",
            "image/svg+xml",
        )
        assert "http:" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https:" not in answer.text
        assert "innerHTML" not in answer.text


# /status


def test_status_is_what_the_gateway_tells_and_changes_when_the_page_does(gateway):
    told = facts()
    app = {"status": lambda: told}
    client = gateway.start(**app)
    first = client.get("/status")
    assert first.headers["content-type"] == "application/json"
    assert first.headers["cache-control"] == "no-cache, private"
    assert {**told, "disk_free_bytes": 412_000_000_000}.items() <= first.json().items()

    etag = first.headers["etag"]
    assert shown(client).all("html", "data-status") == [etag]  # so the script asks for what came since
    same = client.get("/status", headers={"if-none-match": etag})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    assert client.get("/status", headers={"if-none-match": '"other"'}).status_code == 200


def test_a_study_more_is_another_status(gateway):
    client = gateway.start(status=facts)
    first = client.get("/status").headers["etag"]
    gateway.archive.add_file("CT_small.dcm")
    wait_until(lambda: client.get("/status").headers["etag"] != first, 10, "another status")
    assert client.get("/status", headers={"if-none-match": first}).status_code == 200


def test_free_space_that_changes_unseen_is_the_same_status(gateway):
    asked = []

    def status():
        asked.append(facts(disk_free_bytes=412_345_678_901 - 1_000_000 * len(asked)))
        return asked[-1]

    client = gateway.start(status=status)
    etags = set()

    def asked_again():
        etags.add(client.get("/status").headers["etag"])
        return len(asked) > 1

    wait_until(asked_again, 10, "another look")
    assert len(etags) == 1


def test_many_who_ask_cost_one_look_a_second(gateway):
    asked = []

    def status():
        asked.append(1)
        return facts()

    client = gateway.start(status=status)
    for _ in range(20):
        client.get("/status")
        client.get("/")
    assert len(asked) <= 3  # one, and one more for each second that this took


def test_status_without_facts_is_answered(gateway):
    assert gateway.start().get("/status").json().keys() == {"trouble", "studies_shown"}
