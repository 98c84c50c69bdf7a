"""QIDO-RS (PS3.18 sections 8.3.4 and 10.6), asked of the application, or where bytes matter of a server."""

import asyncio
import email.parser
import email.policy
import socket
import threading
import tracemalloc

import httpx
import orjson
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from structlog.testing import capture_logs

from dicomscp.dicom.matching import STANDARD
from dicomscp.web.app import WebSettings, create_app
from dicomscp.web.exchange import WHOLE_BYTES
from dicomscp.web.search import MOST_IGNORED, MOST_REMAINING, OFFERS
from dicomscp.web.server import bind, serve
from tests.unit.dicom.nativemodel import as_text, read
from tests.unit.web.held import SOURCES, FilledArchive

XML = 'multipart/related; type="application/dicom+xml"'
BASE = "http://gateway.test:8080"
EMPTY = {"PatientID": "nobody"}


def code(value, meaning):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "99TEST", meaning
    return item


def detailed():
    """An instance of which much is told."""
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm", stop_before_pixels=True)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = (
        "1.2.1",
        "1.2.1.1",
        "1.2.1.1.1",
    )
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName, dataset.PatientID = "Yamada^Tarou=山田^太郎=やまだ^たろう", "JP <1>"
    dataset.SeriesDescription = "Series"
    dataset.PatientComments = "line\r\n\x1bend"
    dataset.ProcedureCodeSequence = [code("A", "first"), code("B", "second")]
    request = Dataset()
    request.ScheduledProcedureStepID, request.RequestedProcedureID = "S1", "P1"
    dataset.RequestAttributesSequence = [request]
    return dataset


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    filled = FilledArchive(tmp_path_factory.mktemp("searched"))
    for name in ("CT_small.dcm", "MR_small_implicit.dcm", "JPEG2000.dcm"):
        filled.add_file(name)
    filled.add(detailed())
    yield filled
    filled.engine.dispose()


@pytest.fixture
def ask(archive):
    """Asks an application over the archive, or over the one given, with these settings."""

    def get(path, params=None, *, method="GET", accept=None, headers=None, of=archive, **settings):
        app = create_app(of, WebSettings(hosts=("*",), **settings), of.root / "dicomweb", of.root / "state")
        headers = [*(headers or {}).items(), *([("accept", accept)] if accept is not None else [])]

        async def send():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
                client.headers.pop("accept")
                return await client.request(method, f"/dicomweb{path}", params=params, headers=headers)

        return asyncio.run(send())

    return get


def uids(response, tag="0020000D"):
    assert response.status_code == 200, response.text
    return [found[tag]["Value"][0] for found in response.json()]


def warnings(response):
    return response.headers.get_list("warning")


def parts_of(response):
    """The parts of a multipart answer as Python's own mail parser reads them: header and body."""
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + response.content)
    assert message.is_multipart()
    assert not message.defects
    return [(part.get_content_type(), part.get_payload(decode=True)) for part in message.iter_parts()]


# Resources


@pytest.mark.parametrize(
    ("path", "tag", "found"),
    [
        ("/studies", "0020000D", ["1.2.1"]),
        ("/series", "0020000E", ["1.2.1.1"]),
        ("/instances", "00080018", ["1.2.1.1.1"]),
        ("/studies/1.2.1/series", "0020000E", ["1.2.1.1"]),
        ("/studies/1.2.1/instances", "00080018", ["1.2.1.1.1"]),
        ("/studies/1.2.1/series/1.2.1.1/instances", "00080018", ["1.2.1.1.1"]),
    ],
)
def test_every_resource_answers_at_its_level(ask, path, tag, found):
    assert uids(ask(path, {"PatientID": "JP <1>"}), tag) == found


def test_what_is_no_uid_is_a_problem(ask):
    assert ask(f"/studies/{'1' * 65}/series").status_code == 400


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({}, "/dicomweb"),
        ({"base_url": "https://pacs.example.org/dicomweb"}, "https://pacs.example.org/dicomweb"),
    ],
)
def test_links_begin_with_the_base_url(tmp_path, ask, settings, base):
    """Behind a proxy the service is another one for those who ask."""
    archive = FilledArchive(tmp_path, retrieve_url=base)
    archive.add(detailed())
    response = ask("/instances", {"limit": "1", "Nonsense": "1"}, of=archive, **settings)
    assert uids(response, "00081190") == [f"{base}/studies/1.2.1/series/1.2.1.1/instances/1.2.1.1.1"]
    service = base if "//" in base else f"{BASE}{base}"
    assert warnings(response)[0].startswith(f"299 {service}: The parameter")
    archive.engine.dispose()


# Representations


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "application/dicom+json"),
        ("", "application/dicom+json"),
        ("*/*", "application/dicom+json"),
        ("application/dicom+json", "application/dicom+json"),
        ("application/*", "application/dicom+json"),
        ("application/json", "application/json"),
        ("application/dicom+json, application/json", "application/dicom+json"),
        (XML, "multipart/related"),
        (f"{XML}, application/dicom+json;q=0.5", "multipart/related"),
        (f"{XML};q=0.5, application/dicom+json", "application/dicom+json"),
    ],
)
def test_the_representation_is_negotiated(ask, accept, media_type):
    response = ask("/studies", accept=accept)
    assert response.headers["content-type"].split(";")[0] == media_type
    assert response.headers["vary"] == "Accept"
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("accept", ["text/html", "application/dicom+xml", "application/dicom", "nonsense"])
def test_what_is_not_offered_is_not_acceptable(ask, accept):
    response = ask("/studies", accept=accept)
    assert response.status_code == 406
    for offer in OFFERS:
        assert offer.media_type in response.json()["detail"]


def test_two_accept_lines_are_one_list(archive):
    app = create_app(archive, WebSettings(), archive.root / "dicomweb", archive.root / "state")

    async def send():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1"
        ) as client:
            lines = [("accept", "text/html"), ("accept", "application/json")]
            client.headers.pop("accept")
            return await client.get("/dicomweb/studies", headers=lines)

    assert asyncio.run(send()).headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("application/json", "application/json"),
        ("application/dicom+json", "application/dicom+json"),
        (XML, "multipart/related"),
        ("text/html", "application/dicom+json"),  # PS3.18 8.3.3.1: the default media type
    ],
)
def test_the_accept_parameter_stands_for_the_header(ask, accept, media_type):
    for raw in (
        {"params": {"accept": accept}},
        {"path": f"/studies?accept={accept}"},
    ):  # %2B, and a bare plus
        response = ask(**{"path": "/studies", **raw}, accept="text/plain")
        assert response.headers["content-type"].split(";")[0] == media_type
        assert warnings(response) == []


def test_the_accept_parameter_has_no_wildcards(ask):
    response = ask("/studies", {"accept": "application/*"})
    assert response.status_code == 400
    assert "accept" in response.json()["detail"]


@pytest.mark.parametrize(
    ("charset", "status"),
    [("utf-8", 200), ("iso-8859-1, UTF-8;q=0.1", 200), ("utf-8;q=0", 400), ("latin1", 400)],
)
def test_only_utf_8_is_written(ask, charset, status):
    """PS3.18 8.3.3.2: 400 for a character set that is not supported."""
    response = ask("/studies", {"charset": charset})
    assert response.status_code == status
    assert status == 200 or "charset" in response.json()["detail"]


def test_each_match_is_a_part_with_a_native_model_of_its_own(ask):
    of_json = ask("/studies", {"includefield": "all"})
    response = ask("/studies", {"includefield": "all"}, accept=XML)
    head = 'multipart/related; type="application/dicom+xml"; boundary='
    assert response.headers["content-type"].startswith(head)
    parts = parts_of(response)
    assert [media_type for media_type, _ in parts] == ["application/dicom+xml"] * 4
    assert of_json.content.count(b"\\u001b") == 1
    expected = orjson.loads(of_json.content.replace(b"\\u001b", "\ufffd".encode()))
    assert [read(document) for _, document in parts] == [as_text(found) for found in expected]
    assert [warning.partition("dicomweb: ")[2] for warning in warnings(response)] == [
        "1 characters that XML cannot hold are given as U+FFFD"
    ]


# What is found and what is told of it


def test_no_match_is_an_empty_array(ask):
    response = ask("/studies", EMPTY)
    assert (response.status_code, response.json(), warnings(response)) == (200, [], [])


def test_no_match_is_an_empty_body_in_xml(ask):
    """RFC 2046 5.1.1: there is no multipart body without a part."""
    response = ask("/studies", EMPTY, accept=XML)
    assert (response.status_code, response.content, response.headers["content-length"]) == (200, b"", "0")
    assert "content-type" not in response.headers


@pytest.mark.parametrize("accept", [None, XML])
def test_no_match_is_no_content_if_so_set_up(ask, accept):
    response = ask("/studies", EMPTY, accept=accept, empty_status=204)
    assert (response.status_code, response.content) == (204, b"")
    assert "content-type" not in response.headers
    assert "content-length" not in response.headers
    assert ask("/studies", accept=accept, empty_status=204).status_code == 200


def test_what_remains_is_told_in_the_words_of_the_standard(ask):
    words = f"299 {BASE}/dicomweb: There are {{}} additional results that can be requested"
    first = ask("/studies", {"limit": "1"})
    assert warnings(first) == [words.format(3)]
    assert warnings(ask("/studies", {"limit": "1", "offset": "2"})) == [words.format(1)]
    assert warnings(ask("/studies", {"limit": "1", "offset": "3"})) == []
    assert warnings(ask("/studies", {"limit": "4"})) == []
    assert warnings(ask("/studies", max_results=3)) == [words.format(1)]
    limited = ask("/studies", {"limit": "1000"}, max_results=3)
    assert (len(limited.json()), warnings(limited)) == (3, [words.format(1)])
    nothing = ask("/studies", {"limit": "0"})
    assert (nothing.json(), warnings(nothing)) == ([], [words.format(4)])
    assert ask("/studies", {"offset": "4"}).json() == []


def test_pages_are_the_whole_in_one_order(ask):
    whole = uids(ask("/studies"))
    pages = [uids(ask("/studies", {"limit": "1", "offset": str(n)})) for n in range(4)]
    assert [uid for page in pages for uid in page] == whole


def test_what_remains_is_counted_to_a_bound(ask):
    class Large(Counting):
        studies = 3 * MOST_REMAINING

    archive = Large()
    (told,) = warnings(ask("/studies", {"limit": "1", "offset": "10"}, of=archive))
    assert f"There are {MOST_REMAINING} additional results" in told
    assert (archive.given, archive.bound) == (1, 11 + MOST_REMAINING)
    (told,) = warnings(ask("/studies", {"limit": "1", "offset": f"{2 * MOST_REMAINING}"}, of=archive))
    assert f"There are {MOST_REMAINING - 1} additional results" in told


def test_each_warning_is_a_line_of_its_own(ask):
    response = ask(
        "/studies", {"limit": "1", 'No"t, kn\u00f6wn\r\nX: y': "1", "Modality": "CT", "includefield": "A"}
    )
    assert response.status_code == 200
    assert [warning.partition("dicomweb: ")[2] for warning in warnings(response)] == [
        "The parameter 'No%22t%2C kn%C3%B6wn%5Cr%5CnX: y' is not supported and was ignored.",
        "The attribute 'Modality' is not matched here and was ignored.",
        "The attribute 'A' of includefield is unknown and was ignored.",
        "There are 3 additional results that can be requested",
    ]
    assert all("," not in warning for warning in warnings(response))


def test_of_many_parameters_that_are_ignored_some_are_named(ask):
    told = warnings(ask("/studies", {f"unknown{n}": "1" for n in range(500)}))
    assert len(told) == MOST_IGNORED + 1
    assert f"{500 - MOST_IGNORED} more parameters were ignored" in told[-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "-1"),
        ("limit", ""),
        ("offset", "1e3"),
        ("fuzzymatching", "yes"),
        ("emptyvaluematching", ""),
        ("multiplevaluematching", "TRUE"),
        ("StudyDate", "2020-01-01"),
        ("StudyInstanceUID", "1.2.*"),
        ("PatientID", ["1", "2"]),
        ("limit", ["1", "1"]),
        ("0010,0020", "1"),
    ],
)
def test_a_bad_value_is_a_problem_that_names_the_parameter(ask, name, value):
    response = ask("/studies", {name: value})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert name in response.json()["detail"]


def test_parameters_that_are_nothing_are_passed_over(ask):
    """Weasis begins its query with an ampersand."""
    response = ask("/studies?&PatientID=JP%20%3C1%3E&&limit=10&")
    assert uids(response) == ["1.2.1"]
    assert warnings(response) == []


NAMES = """
PatientName 00100020 StudyDate StudyTime ModalitiesInStudy StudyInstanceUID SeriesNumber PatientSize
AcquisitionDateTime RequestAttributesSequence RequestAttributesSequence.00400009 TimezoneOffsetFromUTC
NumberOfStudyRelatedSeries RetrieveURL 00080005 includefield limit offset fuzzymatching accept charset
emptyvaluematching multiplevaluematching PixelData 00091001
"""
VALUES = """* ? - \\ , = ^ . 1 "" true CT,MR 20200101- 1.2\\3 +0100 all utf-8 99999999999999999999 %"""
PARAMETER = st.tuples(
    st.sampled_from(NAMES.split()), st.sampled_from(VALUES.split()) | st.just("") | st.text(max_size=8)
)


@given(
    st.sampled_from(["/studies", "/series", "/studies/1.2.1/series", "/studies/1.2.1/instances"]),
    st.lists(PARAMETER, max_size=4),
    st.sampled_from([None, XML]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parameters_are_answered_or_named(ask, path, params, accept):
    response = ask(path, params, accept=accept)
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        assert any(name in response.json()["detail"] for name, _ in params)


# Validators and methods


def test_an_answer_that_stands_is_not_sent_again(ask):
    seen = set()
    for accept in (None, "application/json", XML):
        first = ask("/studies", accept=accept)
        etag = first.headers["etag"]
        assert not etag.startswith("W/")
        seen.add(etag)
        again = ask("/studies", accept=accept, headers={"if-none-match": f'"x", {etag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert ask("/studies", accept=accept).content == first.content
        assert ask("/studies", {"limit": "2"}, accept=accept).headers["etag"] != etag
    assert len(seen) == 3


def test_an_answer_changes_its_etag_with_what_is_found(tmp_path, ask):
    archive = FilledArchive(tmp_path)
    first = archive.add_file("CT_small.dcm")
    before = ask("/studies", of=archive).headers["etag"]
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    dataset.SOPInstanceUID = f"{first.key.sop_uid}.1"
    archive.add(dataset)
    after = ask("/studies", of=archive, headers={"if-none-match": before})
    assert after.status_code == 200
    assert after.headers["etag"] != before
    archive.engine.dispose()


@pytest.mark.parametrize("accept", [None, XML])
@pytest.mark.parametrize("params", [{}, EMPTY, {"limit": "1"}])
def test_head_tells_what_get_would(ask, accept, params):
    head, got = ask("/studies", params, accept=accept, method="HEAD"), ask("/studies", params, accept=accept)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers == got.headers


def test_what_the_tables_of_the_standard_ask_for_is_returned(ask):
    """PS3.18 tables 10.6.3-3 to 10.6.3-5; the conditional ones are all known here."""
    study = (
        "00080020 00080030 00080050 00080056 00080061 00080090 00080201 00081190 00100010 00100020 00100030"
        " 00100040 0020000D 00200010 00201206 00201208"
    )
    series = "00080060 00080201 0008103E 00081190 0020000E 00200011 00201209 00400275"
    instance = "00080016 00080018 00080056 00080201 00081190 00200013 00280010 00280011 00280100"
    for path, wanted in {
        "/studies": study,
        "/studies/1.2.1/series": series,
        "/series": f"{study} {series}",
        "/studies/1.2.1/series/1.2.1.1/instances": instance,
        "/studies/1.2.1/instances": f"{series} {instance}",
        "/instances": f"{study} {series} {instance}",
    }.items():
        (found,) = ask(path, {"PatientID": "JP <1>"}).json()
        assert set(wanted.split()) - found.keys() == set(), path
        assert list(found) == sorted(found)


# Sequences, as parts of what is asked and returned


def test_what_is_asked_of_a_sequence_holds_in_one_item(ask):
    both = {"ProcedureCodeSequence.CodeValue": "A", "00081032.CodeMeaning": "first"}
    assert uids(ask("/studies", both)) == ["1.2.1"]
    assert ask("/studies", both | {"00081032.CodeMeaning": "second"}).json() == []


def test_only_what_is_asked_of_items_is_returned(ask):
    (found,) = ask(
        "/studies", {"PatientID": "JP <1>", "includefield": "ProcedureCodeSequence.CodeMeaning"}
    ).json()
    assert found["00081032"]["Value"] == [
        {"00080104": {"vr": "LO", "Value": [meaning]}} for meaning in ("first", "second")
    ]
    (found,) = ask("/studies", {"PatientID": "JP <1>", "includefield": "00081032"}).json()
    assert [item.keys() for item in found["00081032"]["Value"]] == [{"00080100", "00080102", "00080104"}] * 2


# Options of matching


def test_names_are_found_fuzzily_if_asked_for(ask):
    assert uids(ask("/studies", {"PatientName": "Tarou Yamadah", "fuzzymatching": "true"})) == ["1.2.1"]
    assert ask("/studies", {"PatientName": "Tarou Yamadah", "fuzzymatching": "false"}).json() == []


def test_what_has_no_value_is_found_if_asked_for(ask):
    empty = {"PatientComments": '""', "emptyvaluematching": "true"}
    assert sorted([*uids(ask("/studies", empty)), "1.2.1"]) == sorted(uids(ask("/studies")))
    assert ask("/studies", {"PatientComments": '""'}).json() == []


def test_all_of_several_values_are_found_if_asked_for(ask):
    several = {"ModalitiesInStudy": "CT,MR"}
    assert len(ask("/studies", several).json()) == 3
    assert ask("/studies", several | {"multiplevaluematching": "true"}).json() == []


def test_dates_and_times_are_one_range(ask):
    """The study is of 2004-01-19, 07:27:30."""
    dates, patient = "20040118-20040120", {"PatientID": "JP <1>"}
    assert uids(ask("/studies", {"StudyDate": dates, "StudyTime": "080000-060000", **patient})) == ["1.2.1"]
    assert (
        ask("/studies", {"StudyDate": "20040119-20040120", "StudyTime": "080000-060000", **patient}).json()
        == []
    )


@pytest.mark.parametrize(("offset", "found"), [("-0500", True), (" 0000", False), ("%2B0000", False)])
def test_dates_and_times_are_of_the_time_zone_that_is_told(ask, offset, found):
    """The study was at 07:27:30 where it is five hours earlier than UTC."""
    when = "StudyDate=20040119-20040119&StudyTime=072000-073000"
    response = ask(f"/studies?{when}&PatientID=JP%20%3C1%3E&TimezoneOffsetFromUTC={offset}")
    assert bool(uids(response)) is found
    assert warnings(response) == []
    assert ask("/studies", {"00080201": "five"}).status_code == 400


# Viewers: what OHIF 3 asks, and what it reads of the answers

OF_STUDIES = "limit=101&offset=0&fuzzymatching={}&includefield=00081030%2C00080060%2C00080090%2C00100030"
STUDY_FIELDS = (
    "0020000D 00080020 00080030 00080050 00100020 00100010 00100030 00201208 00081030 00080061 00080090"
)
SERIES_FIELDS = "0020000D 0020000E 00080060 00200011 00080021 00201209 0008103E"


@pytest.mark.parametrize("fuzzy", ["false", "true"])
@pytest.mark.parametrize(
    "filters",
    [
        "PatientName=*Yamada*&",
        "PatientName=*YAMADA*&00100020=*P%20%3C*&",
        "AccessionNumber=&StudyDescription=*e*&00100020=*JP*&",
        "ModalitiesInStudy=CT%2CMR&00100020=*JP*&StudyDate=19700102-20261121&",
        "StudyInstanceUID=1.2.1&",
        "00100020=JP%20%3C1%3E&",
    ],
)
def test_the_study_list_of_a_viewer(ask, filters, fuzzy):
    response = ask(f"/studies?{filters}{OF_STUDIES.format(fuzzy)}", accept="application/dicom+json")
    assert uids(response) == ["1.2.1"]
    assert warnings(response) == []
    assert set(STUDY_FIELDS.split()) <= response.json()[0].keys()


@pytest.mark.parametrize(
    "query",
    [
        "includefield=0008103E%2C00080021",
        "includefield=00080021%2C00080031%2C0008103E%2C00200011",
        "includefield=00080021%2C00080031%2C0008103E%2C00200011&SeriesInstanceUID=1.2.1.1",
    ],
)
def test_the_series_list_of_a_viewer(ask, query):
    response = ask(f"/studies/1.2.1/series?{query}", accept="application/dicom+json")
    assert uids(response, "0020000E") == ["1.2.1.1"]
    assert warnings(response) == []
    assert set(SERIES_FIELDS.split()) <= response.json()[0].keys()


# Large answers


class Counting:
    """An archive of many studies, which fails at one of them if so told."""

    studies = 0
    fails_at = -1
    model = STANDARD

    def __init__(self, root=None):
        self.root, self.given = root or SOURCES, 0

    def find(self, query, goes_on):
        limit = self.studies if query.limit is None else query.offset + query.limit
        for number in range(query.offset, min(limit, self.studies)):
            if number == self.fails_at:
                raise OSError("the disk is gone")
            self.given += 1
            yield {
                "0020000D": {"vr": "UI", "Value": [f"1.2.{number}"]},
                "00081030": {"vr": "LO", "Value": ["x" * 2000]},
            }

    def count(self, query, bound, goes_on):
        self.bound = bound
        return min(self.studies, bound)


class FewStudies(Counting):
    studies = 2


class ManyStudies(Counting):
    studies = 20_000


class FailsOnTheWay(ManyStudies):
    fails_at = 15_000


class FailsEarly(ManyStudies):
    fails_at = 100


class Served:
    """The application on a real server."""

    def __init__(self, archive):
        settings = WebSettings(max_results=19_000)
        app = create_app(archive, settings, archive.root / "dicomweb", archive.root / "state")
        self.socket, self.stop = bind("127.0.0.1", 0), threading.Event()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/dicomweb"
        self.thread = threading.Thread(target=serve, args=(app, self.socket, self.stop))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join(10)
        self.socket.close()


HOST = "Host: localhost\r\n"
SEARCH = "GET /dicomweb/studies?limit=1 HTTP/1.1\r\n" + HOST


def test_requests_as_no_library_sends_them():
    """What stands in the bytes of a request, and what its answer has to begin and end with."""
    many = ", ".join(f"text/x-{number};q=0.{number}" for number in range(63))
    with Served(FewStudies()) as server:
        for asked, begins, ends in (
            (SEARCH + "Accept: text/html\r\nAccept: application/json\r\n\r\n", " 200 ", "]"),
            (SEARCH + "ACCEPT:application/dicom+json\r\n\r\n", " 200 ", "]"),
            (SEARCH + "Accept:\r\n\r\n", " 200 ", "]"),
            (SEARCH + f"Accept: {many}, application/json;q=0.001\r\n\r\n", " 200 ", "]"),
            (SEARCH + f"Accept: {many}, text/x, application/json\r\n\r\n", " 406 ", "}"),
            (SEARCH + "Accept: \xe9/\xfc, */*;q=0.1\r\n\r\n", " 200 ", "]"),
            (SEARCH + 'Accept: "\\\r\n\r\n', " 406 ", "}"),
            (SEARCH + 'If-None-Match: "x"\r\nIf-None-Match: *\r\n\r\n', " 304 ", "\r\n\r\n"),
            (SEARCH.replace("GET", "HEAD") + "\r\n", " 200 ", "\r\n\r\n"),
            (SEARCH.replace("1.1", "1.0") + "\r\n", " 200 ", "]"),
            (SEARCH.replace("limit=1", "PatientName=%zz%ff%00&limit=1") + "\r\n", " 200 ", "]"),
            (SEARCH.replace("limit=1", "%6cimit=%31") + "\r\n", " 200 ", "]"),
            (SEARCH.replace("limit=1", "limit=%D9%A1") + "\r\n", " 400 ", "}"),
            (SEARCH.replace("GET", "DELETE") + "\r\n", " 405 ", "}"),
        ):
            with socket.create_connection(server.socket.getsockname(), timeout=5) as connection:
                connection.sendall(asked.encode("latin-1"))
                answer = connection.recv(65536).decode("latin-1")
            assert begins in answer.splitlines()[0], (asked, answer)
            assert answer.endswith(ends), (asked, answer)


def test_what_is_held_of_an_answer_takes_no_more_room_than_it_is_long():
    with Served(ManyStudies()) as server, httpx.Client() as client:
        tracemalloc.start()
        try:
            with client.stream("GET", f"{server.url}/studies") as response:
                next(response.iter_raw())
                held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert held < 1.5 * WHOLE_BYTES


@pytest.mark.parametrize("accept", ["application/dicom+json", XML])
def test_a_large_answer_is_sent_as_it_is_read(accept):
    archive = ManyStudies()
    with (
        Served(archive) as server,
        httpx.Client() as client,
        client.stream("GET", f"{server.url}/studies", headers={"accept": accept}) as response,
    ):
        chunks = response.iter_raw()
        next(chunks)
        begun = archive.given
        response._content = b"".join([b"", *chunks])
        assert "There are 1000 additional results" in response.headers["warning"]
        assert response.headers["transfer-encoding"] == "chunked"
        assert "etag" not in response.headers
    assert len(response.content) > 4 * WHOLE_BYTES
    assert begun < archive.given == 19_000


@pytest.mark.parametrize("accept", ["application/dicom+json", XML])
def test_an_answer_that_has_to_end_early_is_an_error_for_who_reads_it(accept):
    with capture_logs() as logs, Served(FailsOnTheWay()) as server, httpx.Client() as client:
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            client.get(f"{server.url}/studies", headers={"accept": accept})
        head = client.head(f"{server.url}/studies", headers={"accept": accept})
        assert (head.status_code, head.content) == (200, b"")
        assert "content-length" not in head.headers
    assert [entry["event"] for entry in logs] == ["request_failed"]


def test_what_fails_before_anything_is_sent_has_a_status_of_its_own():
    with capture_logs(), Served(FailsEarly()) as server:
        assert httpx.get(f"{server.url}/studies").status_code == 500


class WithoutMatch(Counting):
    """An archive that looks for what there is not, as long as it is let."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = threading.Event(), threading.Event()

    def find(self, query, goes_on):
        self.begun.set()
        while goes_on():
            self.ended.wait(0.005)
        self.ended.set()
        yield from ()


def test_a_search_that_nobody_waits_for_ends():
    archive = WithoutMatch()
    with Served(archive) as server:
        with socket.create_connection(server.socket.getsockname(), timeout=5) as connection:
            connection.sendall(f"{SEARCH}\r\n".encode())
            assert archive.begun.wait(5)
        assert archive.ended.wait(5)
