import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomscp.dicom.multipart import OCTET_STREAM
from dicomscp.web.media import (
    DICOM_JSON,
    DICOM_XML,
    JSON,
    Offer,
    bulk_offers,
    byte_range,
    choose,
    content_type,
    frame_offers,
    ranges,
    takes_gzip,
)

EXPLICIT, J2K = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.90"
MULTIPART, SINGLE = Offer(OCTET_STREAM, True, EXPLICIT), Offer(OCTET_STREAM, False, EXPLICIT)
J2K_MULTIPART, J2K_IMAGE = Offer(OCTET_STREAM, True, J2K), Offer("image/jp2", True, J2K)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", MULTIPART),
        ("*/*", MULTIPART),
        ("multipart/related", MULTIPART),
        ("multipart/*", MULTIPART),
        # OHIF, quoted (its default) and not
        ('multipart/related; type="application/octet-stream"; transfer-syntax=*', MULTIPART),
        ("multipart/related; type=application/octet-stream; transfer-syntax=*", MULTIPART),
        ('multipart/related; type="application/octet-stream"; transfer-syntax="*"', MULTIPART),
        # the transfer syntax within the quotes, as Orthanc writes it
        (f'multipart/related; type="application/octet-stream; transfer-syntax={EXPLICIT}"', MULTIPART),
        ("MULTIPART/RELATED; TYPE=Application/Octet-Stream", MULTIPART),
        ("application/octet-stream", SINGLE),
        ("application/*", SINGLE),
        ("multipart/related;type=application/octet-stream;q=0.5, application/octet-stream", SINGLE),
        ("application/octet-stream;q=0, */*;q=0.1", MULTIPART),
        ("image/jpeg, */*;q=0.8", MULTIPART),
        (f"application/octet-stream; transfer-syntax={EXPLICIT}", SINGLE),
        (f"application/octet-stream; transfer-syntax={J2K}", None),
        (f'multipart/related; type="application/octet-stream"; transfer-syntax={J2K}', None),
        ('multipart/related; type="image/jp2"', None),
        ("text/html", None),
        ("application/octet-stream;q=0", None),
        ("application/octet-stream;q=much", None),
        (";;;,,,", None),
    ],
)
def test_native_frames_are_negotiated(accept, chosen):
    assert choose(accept, frame_offers(EXPLICIT, 1)) == chosen


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("*/*", J2K_MULTIPART),
        (f'multipart/related; type="image/jp2"; transfer-syntax={J2K}', J2K_IMAGE),
        ('multipart/related; type="image/*"', J2K_IMAGE),
        ('multipart/related; type="image/jls", multipart/related; type="image/jp2";q=0.3', J2K_IMAGE),
        ("image/jp2", None),  # several frames are no single part
        ("application/octet-stream", None),
        (f'multipart/related; type="application/octet-stream"; transfer-syntax={EXPLICIT}', None),
    ],
)
def test_compressed_frames_are_also_images(accept, chosen):
    assert choose(accept, frame_offers(J2K, 2)) == chosen


def test_commas_and_semicolons_in_quotes_separate_nothing():
    one, two = ranges('multipart/related; type="a/b; x=1, c/d", text/plain')
    assert (one.media_type, two.media_type) == ("a/b", "text/plain")


JSON_OFFERS = (Offer(DICOM_JSON), Offer(JSON), Offer(DICOM_XML, multipart=True))
XML = JSON_OFFERS[2]


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        # RFC 9110 12.5.1: the most specific range that fits says the weight
        ("application/dicom+json;q=0, */*;q=0.1", JSON_OFFERS[1]),
        ("*/*;q=0.1, application/dicom+json;q=0", JSON_OFFERS[1]),
        ("application/*;q=0, */*", XML),
        ("application/*;q=0, */*, multipart/related;q=0", None),
        ("*/*;q=0", None),
        ("*/*;q=0.1", JSON_OFFERS[0]),
        ("application/dicom+json;q=0.5, application/json;q=0.501", JSON_OFFERS[1]),
        ("application/dicom+json;q=0.5, application/*;q=0.9", JSON_OFFERS[1]),
        # equal weights: as listed, then as offered
        ('multipart/related; type="application/dicom+xml", application/dicom+json', XML),
        ('multipart/related; type="application/dicom+xml", */*', XML),
        ('*/*, multipart/related; type="application/dicom+xml"', JSON_OFFERS[0]),
        # parameters, in any case, quoted, spaced
        ('Multipart/Related ; Type = "Application/DICOM+XML" ; Q=0.3', XML),
        ('multipart/related; type="application\\/dicom+xml"', XML),
        ("multipart/related; type=application/dicom+xml; boundary=x", XML),
        ('multipart/related; boundary="a;b,c"; type="application/dicom+xml"', XML),
        ("multipart/related", XML),
        ("application/dicom+json; charset=UTF-8", JSON_OFFERS[0]),
        ("application/dicom+json; charset=iso-8859-1", None),
        ("application/dicom+json; profile=x", JSON_OFFERS[0]),
        ("application/dicom+json;", JSON_OFFERS[0]),
        # a list without members
        (", ,", JSON_OFFERS[0]),
        # kinds that are not offered
        ("application/dicom+xml", None),
        ('multipart/mixed; type="application/dicom+xml"', None),
        ('multipart/related; type="application/dicom"', None),
        # malformed members
        ("application/dicom+json; q=high, application/json", JSON_OFFERS[1]),
        ("application/json, application/dicom+json; q=2", JSON_OFFERS[1]),
        ("application/dicom+json; q=-1", None),
        ("application/dicom+json; q=nan", None),
        ("application/dicom+json x", None),
        ("*/json, application/json", JSON_OFFERS[1]),
        ('application/dicom+json; a="b', None),
        ("json", None),
        ("/", None),
    ],
)
def test_json_and_xml_are_negotiated(accept, chosen):
    assert choose(accept, JSON_OFFERS) == chosen


def test_json_for_a_browser_and_for_dicomweb_client():
    offers = (Offer(DICOM_JSON), Offer(JSON))
    assert choose("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", offers) == offers[0]
    assert choose("application/dicom+json, application/json", offers) == offers[0]
    assert choose("application/json", offers) == offers[1]
    assert choose("application/dicom+xml", offers) is None


@pytest.mark.parametrize(
    ("transfer_syntax_uid", "media_type"),
    [
        ("1.2.840.10008.1.2.4.100", "video/mpeg"),
        ("1.2.840.10008.1.2.4.101.1", "video/mpeg"),
        ("1.2.840.10008.1.2.4.102", "video/mp4"),
        ("1.2.840.10008.1.2.4.108", "video/mp4"),
        ("1.2.840.10008.1.2.8.1", "application/x-deflate"),
    ],
)
def test_a_value_is_octets_first_and_also_what_its_transfer_syntax_makes_it(transfer_syntax_uid, media_type):
    offers = bulk_offers(transfer_syntax_uid, 1)

    assert offers[0] == Offer(OCTET_STREAM, False, transfer_syntax_uid)
    assert choose(media_type, offers) == Offer(media_type, False, transfer_syntax_uid)
    assert choose("video/*, application/x-deflate", offers) == choose(media_type, offers)


@pytest.mark.parametrize("media_type", ["application/pdf", "text/xml", "model/stl", "model/obj", "model/mtl"])
def test_a_document_is_octets_first_and_also_what_it_says_it_is(media_type):
    offers = bulk_offers(EXPLICIT, 1, media_type)

    assert offers[0] == SINGLE
    assert choose(media_type, offers) == Offer(media_type)
    assert choose(f'multipart/related; type="{media_type}"', offers) == Offer(media_type, multipart=True)


@pytest.mark.parametrize("media_type", ["text/html", "image/svg+xml", "application/javascript", "", "x\r\ny"])
def test_a_document_is_not_sent_as_what_a_browser_would_run(media_type):
    assert bulk_offers(EXPLICIT, 1, media_type) == bulk_offers(EXPLICIT, 1)


def test_of_a_long_list_the_first_64_members_are_read():
    known = "application/dicom+json"
    assert choose(", ".join(["a/b"] * 63 + [known]), JSON_OFFERS) == JSON_OFFERS[0]
    assert choose(", ".join(["a/b"] * 64 + [known]), JSON_OFFERS) is None
    assert len(ranges("a/b," * 100)) == 64
    assert takes_gzip("br, " * 63 + "gzip")
    assert not takes_gzip("br, " * 64 + "gzip")


def test_a_member_has_at_most_64_parameters():
    (one,) = ranges("a/b" + "; c=d" * 63 + "; q=0.5")
    assert one.quality == 0.5
    assert not ranges("a/b" + "; c=d" * 64 + "; q=0.5")
    assert content_type("a/b" + ";" * 65) is None


@pytest.mark.parametrize(
    "member", ["a/b,", ",", "a/b;q=0.1,", ";", 'a/b;c="', '"', '"\\', " ", "a=", "; a ", "\\"]
)
def test_what_is_as_long_as_may_be_is_read_in_no_time(member):
    """All who are served wait for it: some ms of CPU, where every member of the list would take 200."""
    header = (member * (64 << 10))[: 64 << 10]
    offers = tuple(frame_offers(EXPLICIT, 1))
    for begin in ("", "a/b;"):
        for call in (lambda field: choose(field, offers), takes_gzip, content_type):
            # Each time another one: the last ones are remembered.
            assert min(cpu_seconds(call, f"{begin}{header}{end}") for end in "123") < 0.02


def cpu_seconds(call, *arguments):
    began = time.thread_time()
    call(*arguments)
    return time.thread_time() - began


@given(st.text(alphabet=' */;,="\\abq01.-', max_size=60) | st.text(max_size=30))
def test_any_accept_header_is_read(accept):
    assert choose(accept, frame_offers(J2K, 1)) in [None, *frame_offers(J2K, 1)]


@pytest.mark.parametrize(
    ("accept_encoding", "taken"),
    [
        ("", False),
        ("gzip", True),
        ("gzip, deflate, br, zstd", True),
        ("br;q=1.0, GZIP;q=0.5", True),
        ("gzip;q=0", False),
        ("identity", False),
        ("*", True),
        ("*;q=0", False),
        ("*;q=0, gzip;q=0.5", True),
        ("gzip;q=0, *", False),
        ("gzip;q=some", False),
    ],
)
def test_gzip_is_sent_to_those_who_take_it(accept_encoding, taken):
    assert takes_gzip(accept_encoding) is taken


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("", None),
        ("bytes=0-9", slice(0, 10)),
        ("bytes=90-", slice(90, 100)),
        ("bytes=90-500", slice(90, 100)),
        ("bytes=-10", slice(90, 100)),
        ("bytes=-500", slice(0, 100)),
        ("bytes=100-", slice(100, 100)),
        ("bytes=-0", slice(100, 100)),
        ("bytes=9-1", None),
        ("bytes=0-1,5-6", None),
        ("bytes=-", None),
        ("lines=0-1", None),
    ],
)
def test_one_range_is_read_and_what_is_no_range_is_ignored(header, part):
    assert byte_range(header, 100) == part


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("application/dicom", ("application/dicom", {})),
        (
            'Multipart/Related; Type="Application/DICOM"; boundary=a=b',
            ("multipart/related", {"type": "Application/DICOM", "boundary": "a=b"}),
        ),
        ('image/jp2;transfer-syntax="1.2" ;;', ("image/jp2", {"transfer-syntax": "1.2"})),
        ('a/b; c="d\\"e; f"', ("a/b", {"c": 'd"e; f'})),
        ("", None),
        ("application", None),
        ("a/b; c", None),
        ("a/b c/d", None),
    ],
)
def test_a_content_type_is_read(field, said):
    assert content_type(field) == said
