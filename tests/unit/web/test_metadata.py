"""The metadata of an instance: the same whoever makes them, and bounded whatever its header."""

import json
import os

import orjson
import pydicom
import pytest

from dicomscp.dicom.xmlmodel import native_model
from dicomscp.errors import LimitError
from dicomscp.web.decoders import Limits
from dicomscp.web.metadata import native_models
from tests.processes import peak_rss_bytes, reset_peak_rss
from tests.unit.dicom.encoding import DEFLATED, deflate, explicit, fragments, item
from tests.unit.dicom.nativemodel import as_text, read
from tests.unit.web.held import LITTLE, SOURCES
from tests.unit.web.test_studies import XML, address, parts_of

RLE = "1.2.840.10008.1.2.5"


def instance(*more, number=1):
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    del dataset.PixelData, dataset[0xFFFCFFFC]
    dataset.SOPInstanceUID = f"1.2.3.{number}"
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    pydicom.filewriter.write_dataset(buffer, dataset)
    return dataset, buffer.getvalue() + b"".join(more)


def items(count):
    """A sequence of so many items."""
    return explicit(0x52009230, "SQ", item(explicit(0x00204000, "LT", "ab")) * count)


PIXELS = explicit(0x7FE00010, "OW", bytes(1 << 20))
FRAMES = explicit(0x7FE00010, "OB", fragments(bytes(1 << 20)), length=0xFFFFFFFF)


@pytest.mark.parametrize(
    ("syntax", "more"),
    [
        (LITTLE, (items(20_000),)),
        (LITTLE, (items(20_000), PIXELS)),
        (LITTLE, (PIXELS, explicit(0x7FE10010, "LO", "X"), explicit(0xFFFCFFFC, "OB", bytes(300 << 10)))),
        (RLE, (FRAMES, explicit(0xFFFCFFFC, "OB", bytes(300 << 10)))),
        (DEFLATED, (items(10),)),
    ],
    ids=["large", "large before pixels", "large behind pixels", "large behind frames", "deflated"],
)
def test_a_child_makes_what_the_process_would(gateway, syntax, more):
    dataset, encoded = instance(*more)
    held = gateway.archive.add(dataset, syntax, deflate(encoded) if syntax == DEFLATED else encoded)
    dataset, encoded = instance(number=2)
    small = gateway.archive.add(dataset, LITTLE, encoded)
    client = gateway.start()
    response = client.get(address(held.key, "/metadata"))
    (found,), (expected,) = response.json(), client.get(address(small.key, "/metadata")).json()
    own = {"00080018", "00083002", "00431029", "52009230", "7FE00010", "7FE10010", "FFFCFFFC"}
    assert {tag: found[tag] for tag in found.keys() - own} == {
        tag: expected[tag] for tag in expected.keys() - own
    }
    assert int(response.headers["content-length"]) == len(response.content)
    if len(more) == 1:
        assert found["52009230"]["Value"][-1] == {"00204000": {"vr": "LT", "Value": ["ab"]}}
    ((_, body),) = parts_of(client.get(address(held.key, "/metadata"), headers={"accept": XML}))
    assert read(body) == as_text(json.loads(response.content, parse_float=str, parse_int=str)[0])
    known = {"if-none-match": response.headers["etag"]}
    assert client.get(address(held.key, "/metadata"), headers=known).status_code == 304
    head = client.head(address(held.key, "/metadata"))
    assert (head.headers["content-length"], head.content) == (response.headers["content-length"], b"")


def test_a_header_that_grows_beyond_bounds_costs_its_request_alone(gateway):
    """30 MB of items were a minute and two gigabytes of the process that serves."""
    dataset, encoded = instance(items(1_000_000))
    held = gateway.archive.add(dataset, LITTLE, encoded)
    client = gateway.start(limits=Limits(seconds=2, memory_bytes=256 << 20))
    small = gateway.archive.add_file("MR_small.dcm")
    reset_peak_rss(os.getpid())
    before = peak_rss_bytes(os.getpid())
    response = client.get(address(held.key, "/metadata"), headers={"accept": XML})
    assert response.status_code in (413, 500)
    assert response.headers["content-type"] == "application/problem+json"
    assert peak_rss_bytes(os.getpid()) - before < 64 << 20
    assert client.get(address(small.key, "/metadata")).status_code == 200


def test_no_xml_is_made_of_too_much():
    line = {"52009230": {"vr": "SQ", "Value": [{}] * 1000}}
    assert list(native_models([b"[", orjson.dumps(line) + b",", b"]"])) == [native_model(line).document]
    line["52009230"]["Value"] *= 300
    with pytest.raises(LimitError):
        list(native_models([orjson.dumps(line)]))
