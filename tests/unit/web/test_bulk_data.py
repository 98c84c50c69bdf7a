"""Every BulkDataURI leads to the value that pydicom, as an independent second reading, finds there."""

import warnings

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence

from dicomscp.dicom.bulk import Encoded
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.errors import RefusedError
from dicomscp.web.exchange import WHOLE_BYTES
from dicomscp.web.media import DOCUMENT_TYPES
from dicomscp.web.studies import FrameTables
from tests.unit.dicom.encoding import SEQUENCE_END, UNDEFINED, explicit, fragments
from tests.unit.web.held import LITTLE, SOURCES
from tests.unit.web.test_studies import address, parts_of

BIG = "1.2.840.10008.1.2.2"
JPEG = "1.2.840.10008.1.2.4.50"
RLE = "1.2.840.10008.1.2.5"
H264, MPEG2, HEVC = (f"1.2.840.10008.1.2.4.{number}" for number in (102, 100, 107))
WORDS = {"OW": 2, "US": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}


def instance(**attributes):
    """A CT image without pixel data, with these attributes."""
    dataset = pydicom.dcmread(SOURCES / "CT_small.dcm")
    del dataset.PixelData
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def links(attributes, path=()):
    """Each BulkDataURI with the tags and item numbers that lead to it."""
    for tag, attribute in attributes.items():
        if "BulkDataURI" in attribute:
            yield attribute["BulkDataURI"], attribute["vr"], (*path, tag)
        for number, one in enumerate(attribute.get("Value", ()) if attribute["vr"] == "SQ" else (), 1):
            yield from links(one, (*path, tag, number))


def expected(dataset, path, syntax):
    """The value there as pydicom has it, one bytes object a media part, little endian, and its syntax."""
    *steps, last = path
    for tag, number in zip(steps[::2], steps[1::2], strict=True):
        dataset = dataset[int(tag, 16)].value[number - 1]
    element = dataset[int(last, 16)]
    if element.is_undefined_length:
        count = int(dataset.get("NumberOfFrames") or 1)
        return list(generate_frames(element.value, number_of_frames=count)), syntax
    value = element.value
    if syntax == BIG and element.VR in WORDS:
        word = WORDS[element.VR]
        if element.tag == 0x7FE00010:
            word = max(word, dataset.BitsAllocated // 8)
        value = b"".join(value[at : at + word][::-1] for at in range(0, len(value), word))
    return [value], LITTLE


def assert_links_resolve(gateway, held, dataset):
    """How many there are."""
    client, count = gateway.client, 0
    (attributes,) = client.get(address(held.key, "/metadata")).json()
    for uri, _, path in links(attributes):
        values, syntax = expected(dataset, path, held.transfer_syntax_uid)
        response = client.get(uri)
        assert response.status_code == 200, (uri, response.text)
        if len(values) == 1:
            assert response.content == values[0], uri
            assert response.headers["content-type"] == f"application/octet-stream; transfer-syntax={syntax}"
            part = client.get(uri, headers={"range": "bytes=1-2"})
            assert (part.status_code, part.content) == (206, values[0][1:3]), uri
        else:
            assert [body for _, body in parts_of(response)] == values, uri
        count += 1
    return count


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "JPEG2000.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "SC_rgb_rle_2frame.dcm",
        "examples_overlay.dcm",
        "examples_palette.dcm",
        "image_dfl.dcm",
        "liver_1frame.dcm",
        "rtdose_expb.dcm",
        "rtdose_rle.dcm",
        "waveform_ecg.dcm",
    ],
)
def test_links_of_real_files_lead_to_their_values(gateway, name):
    held = gateway.archive.add_file(name)
    gateway.start()

    assert assert_links_resolve(gateway, held, pydicom.dcmread(SOURCES / name)) > 0


@pytest.mark.parametrize("folder", ["objects", "enhanced-multiframe", "charsets"])
def test_links_of_collected_files_lead_to_their_values(gateway, shared_data, folder):
    gateway.start()
    count = 0
    for path in sorted((shared_data / folder).glob("*.dcm")):
        file = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
            try:
                meta = read_file_meta(file)
                held = gateway.archive.add(dataset, meta.transfer_syntax_uid, file[meta.dataset_offset :])
            except (AttributeError, RefusedError):  # no instance: it lacks a UID
                continue
            count += assert_links_resolve(gateway, held, dataset)
    assert count > 0 or folder == "charsets"


def icon(pixels, **attributes):
    item = Dataset()
    item.Rows = item.Columns = 64
    item.BitsAllocated, item.SamplesPerPixel, item.PhotometricInterpretation = 8, 1, "MONOCHROME2"
    item.add_new(0x7FE00010, "OB", pixels)
    for name, value in attributes.items():
        setattr(item, name, value)
    return item


def rich_instance():
    """An instance with a bulk value of every kind that a header may hold."""
    octets = bytes(range(256)) * 16
    waveform, lut, inner = Dataset(), Dataset(), Dataset()
    waveform.add_new(0x54001010, "OW", octets)
    lut.add_new(0x00283006, "OW", octets[::-1])
    inner.add_new(0x00420011, "OB", octets + b"inner!")
    waveform.ReferencedImageSequence = Sequence([Dataset(), inner])
    dataset = instance(
        IconImageSequence=Sequence([icon(octets)]),
        WaveformSequence=Sequence([Dataset(), waveform]),
        ModalityLUTSequence=Sequence([lut]),
    )
    dataset.add_new(0x50003000, "OW", octets + b"curve!")
    dataset.add_new(0x60003000, "OW", octets + b"overlay!")
    dataset.add_new(0x60023000, "OB", octets + b"over")
    dataset.add_new(0x00282000, "OB", octets + b"profile!")
    dataset.add_new(0x00281201, "OW", octets + b"red!")
    dataset.add_new(0x7FE00008, "OF", octets)
    dataset.Rows = dataset.Columns = 32
    dataset.BitsAllocated = 32
    block = dataset.private_block(0x0099, "ACME", create=True)
    block.add_new(1, "OB", octets + b"private!")
    block.add_new(2, "UN", octets + b"unknown!")
    block.add_new(3, "OD", octets)
    return dataset


def encoded(dataset, *, implicit=False, little=True):
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = little, implicit
    write_dataset(buffer, dataset)
    return buffer.getvalue()


@pytest.mark.parametrize(("syntax", "implicit"), [(LITTLE, False), ("1.2.840.10008.1.2", True)])
def test_links_to_values_of_every_kind_lead_to_them(gateway, syntax, implicit):
    dataset = rich_instance()
    held = gateway.archive.add(dataset, syntax, encoded(dataset, implicit=implicit))
    gateway.start()

    assert assert_links_resolve(gateway, held, dataset) >= 14


def test_an_encapsulated_icon_is_its_bitstream(gateway):
    stream = b"\xff\xd8\xff\xe0" + bytes(2000)
    dataset = instance(IconImageSequence=Sequence([icon(encapsulate([stream]))]))
    dataset.IconImageSequence[0]["PixelData"].is_undefined_length = True
    held = gateway.archive.add(dataset, JPEG)
    gateway.start()

    assert assert_links_resolve(gateway, held, dataset) >= 1
    ((uri, vr, _),) = [
        link
        for link in links(gateway.client.get(address(held.key, "/metadata")).json()[0])
        if link[2][-1] == "7FE00010"
    ]
    response = gateway.client.get(uri, headers={"accept": "image/jpeg"})
    assert (vr, response.content) == ("OB", stream)
    assert response.headers["content-type"] == f"image/jpeg; transfer-syntax={JPEG}"


# Documents


def document(gateway, media_type, content, **attributes):
    """The address of an encapsulated document."""
    dataset = instance(MIMETypeOfEncapsulatedDocument=media_type, **attributes)
    dataset.add_new(0x00420011, "OB", content)
    study_uid, series_uid, sop_uid = gateway.archive.add(dataset).key
    gateway.start()
    return f"/dicomweb/studies/{study_uid}/bulkdata/{series_uid}/{sop_uid}/00420011"


@pytest.mark.parametrize(
    "media_type",
    [
        "application/pdf",
        "application/sla",
        "application/xml",
        "model/mtl",
        "model/obj",
        "model/stl",
        "text/XML",
    ],
)
def test_a_document_can_be_had_as_what_it_is(gateway, media_type):
    content = b"%PDF-1.4 " + bytes(range(1, 200)) + b"\0\0"
    uri = document(gateway, media_type, content, EncapsulatedDocumentLength=len(content) - 1)
    client = gateway.client

    assert client.get(uri).content == content
    assert client.get(uri).headers["content-type"] == f"application/octet-stream; transfer-syntax={LITTLE}"
    for response in (
        client.get(uri, headers={"accept": media_type}),
        client.get(uri, params={"accept": media_type}),
    ):
        assert response.headers["content-type"] == media_type.lower()
        assert response.content == content[:-1]
        assert response.headers["accept-ranges"] == "bytes"
    part = client.get(uri, headers={"accept": media_type, "range": "bytes=-4"})
    assert (part.status_code, part.content) == (206, content[-5:-1])
    multipart = client.get(uri, headers={"accept": f'multipart/related; type="{media_type}"'})
    assert parts_of(multipart) == [[f"Content-Type: {media_type.lower()}".encode(), content[:-1]]]


@pytest.mark.parametrize("media_type", sorted(DOCUMENT_TYPES))
def test_a_document_can_do_nothing(gateway, media_type):
    """However it is asked for, it has the policy that it has when it is rendered; alone and as a part."""
    uri = document(gateway, media_type, b"<script>alert(1)</script>!")
    client = gateway.client
    multipart = f'multipart/related; type="{media_type}"'
    for response in (
        client.get(uri, headers={"accept": media_type}),
        client.get(uri, params={"accept": media_type}),
        client.get(uri, headers={"accept": media_type, "range": "bytes=1-9"}),
        client.get(uri, headers={"accept": multipart}),
    ):
        policy = response.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "frame-ancestors 'self'"} <= set(policy)
        assert ("sandbox" in policy) is (media_type != "application/pdf")
        assert not any(part.startswith("script-src") for part in policy)
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("content", "sent"), [(b"<a/>", b"<a/>"), (b"<a/>\n\0", b"<a/>\n"), (b"<a>\0</a>", b"<a>\0</a>")]
)
def test_xml_does_not_end_with_padding_even_if_its_length_was_left_out(gateway, content, sent):
    uri = document(gateway, "text/XML", content)

    assert gateway.client.get(uri, headers={"accept": "text/xml"}).content == sent
    assert gateway.client.get(uri).content == content


@pytest.mark.parametrize("media_type", ["text/html", "image/svg+xml", "text/xml; charset=x", ""])
def test_a_document_that_a_browser_would_run_is_octets(gateway, media_type):
    uri = document(gateway, media_type, b"<script>alert(1)</script>!")
    client = gateway.client

    for accept in ("text/html, */*;q=0.1", "*/*", ""):
        response = client.get(uri, headers={"accept": accept})
        assert response.headers["content-type"].startswith("application/octet-stream;")
    assert client.get(uri, headers={"accept": "text/html"}).status_code == 406


def test_other_values_are_not_called_documents(gateway):
    dataset = instance(MIMETypeOfEncapsulatedDocument="application/pdf")
    dataset.add_new(0x00282000, "OB", b"profile!")
    key = gateway.archive.add(dataset).key
    uri = f"/dicomweb/studies/{key[0]}/bulkdata/{key[1]}/{key[2]}/00282000"

    assert gateway.start().get(uri, headers={"accept": "application/pdf"}).status_code == 406


# Video


@pytest.mark.parametrize(
    ("syntax", "media_type"),
    [(H264, "video/mp4"), (f"{H264}.1", "video/mp4"), (MPEG2, "video/mpeg"), (HEVC, "video/mp4")],
)
def test_a_video_is_one_stream_in_ranges(gateway, syntax, media_type):
    pieces = [bytes(range(256)) * 8, b"tail"]
    dataset = instance(NumberOfFrames=300)
    pixels = explicit(0x7FE00010, "OB", fragments(*pieces), length=UNDEFINED)
    key = gateway.archive.add(dataset, syntax, encoded(dataset) + pixels).key
    uri = f"/dicomweb/studies/{key[0]}/bulkdata/{key[1]}/{key[2]}/7FE00010"
    client, whole = gateway.start(), b"".join(pieces)

    plain = client.get(uri)
    assert plain.content == whole
    assert plain.headers["content-type"] == f"application/octet-stream; transfer-syntax={syntax}"
    video = client.get(uri, params={"accept": media_type})
    assert (video.headers["content-type"], video.headers["accept-ranges"]) == (
        f"{media_type}; transfer-syntax={syntax}",
        "bytes",
    )
    assert video.content == whole
    part = client.get(uri, headers={"accept": media_type, "range": "bytes=2040-2050"})
    assert (part.status_code, part.content) == (206, whole[2040:2051])
    assert part.headers["content-range"] == f"bytes 2040-2050/{len(whole)}"
    frame = client.get(address(key, "/frames/1"), headers={"accept": media_type})
    assert frame.content == whole
    assert client.get(address(key, "/frames/2")).status_code == 404


# Frames


# PS3.18 table 8.7.3-5, and what clients asked for before it settled.
FRAME_TYPES = {
    "1.2.840.10008.1.2.4.50": ("image/jpeg",),
    "1.2.840.10008.1.2.4.51": ("image/jpeg",),
    "1.2.840.10008.1.2.4.57": ("image/jpeg",),
    "1.2.840.10008.1.2.4.70": ("image/jpeg",),
    "1.2.840.10008.1.2.4.80": ("image/jls",),
    "1.2.840.10008.1.2.4.81": ("image/jls",),
    "1.2.840.10008.1.2.4.90": ("image/jp2",),
    "1.2.840.10008.1.2.4.91": ("image/jp2",),
    "1.2.840.10008.1.2.4.92": ("image/jpx",),
    "1.2.840.10008.1.2.4.93": ("image/jpx",),
    "1.2.840.10008.1.2.4.110": ("image/jxl",),
    "1.2.840.10008.1.2.4.111": ("image/jxl",),
    "1.2.840.10008.1.2.4.112": ("image/jxl",),
    "1.2.840.10008.1.2.4.201": ("image/jphc",),
    "1.2.840.10008.1.2.4.202": ("image/jphc",),
    "1.2.840.10008.1.2.4.203": ("image/jphc",),
    "1.2.840.10008.1.2.5": ("image/dicom-rle", "image/x-dicom-rle"),
    "1.2.840.10008.1.2.8.1": ("application/x-deflate",),
}


def test_a_frame_is_of_the_media_type_of_its_transfer_syntax(gateway):
    """As it is stored, whatever it holds: alone and as a part, by the path of frames and of bulk data."""
    held = {}
    for number, syntax in enumerate(FRAME_TYPES, 1):
        dataset = instance(NumberOfFrames=1, SOPInstanceUID=f"1.2.3.{number}")
        pixels = explicit(0x7FE00010, "OB", fragments(f"frame {number:02}".encode()), length=UNDEFINED)
        held[syntax] = gateway.archive.add(dataset, syntax, encoded(dataset) + pixels).key
    client = gateway.start()
    for number, (syntax, media_types) in enumerate(FRAME_TYPES.items(), 1):
        key, frame = held[syntax], f"frame {number:02}".encode()
        bulk = f"/dicomweb/studies/{key[0]}/bulkdata/{key[1]}/{key[2]}/7FE00010"
        for media_type in media_types:
            for path in (address(key, "/frames/1"), bulk):
                alone = client.get(path, headers={"accept": media_type})
                said = (alone.status_code, alone.headers["content-type"], alone.content)
                assert said == (200, f"{media_type}; transfer-syntax={syntax}", frame)
                parts = client.get(path, headers={"accept": f'multipart/related; type="{media_type}"'})
                assert f'type="{media_type}"' in parts.headers["content-type"]
                assert frame in parts.content
        for other in {one for types in FRAME_TYPES.values() for one in types} - set(media_types):
            assert client.get(address(key, "/frames/1"), headers={"accept": other}).status_code == 406


def test_a_frame_that_is_told_of_and_not_there_is_told_in_a_sentence(gateway):
    dataset = instance(NumberOfFrames=5)
    pixels = explicit(0x7FE00010, "OB", fragments(b"ab", b"cd"), length=UNDEFINED)
    key = gateway.archive.add(dataset, RLE, encoded(dataset) + pixels).key
    client = gateway.start()

    ((_, body),) = parts_of(client.get(address(key, "/frames/2")))
    assert body == b"cd"
    response = client.get(address(key, "/frames/1,3"))
    assert response.status_code == 404
    assert "tells of 5 frames, but the pixel data hold 2" in response.json()["detail"]


def test_pixel_data_of_many_frames_are_streamed(gateway):
    dataset = instance(NumberOfFrames=3)
    streams = [bytes([number]) * (WHOLE_BYTES // 2) for number in range(3)]
    pixels = explicit(0x7FE00010, "OB", fragments(*streams), length=UNDEFINED)
    key = gateway.archive.add(dataset, RLE, encoded(dataset) + pixels).key
    uri = f"/dicomweb/studies/{key[0]}/bulkdata/{key[1]}/{key[2]}/7FE00010"
    response = gateway.start().get(uri)

    assert [body for _, body in parts_of(response)] == streams
    assert int(response.headers["content-length"]) == len(response.content) > WHOLE_BYTES


def test_pixel_data_of_which_a_frame_is_cut_short_are_not_sent_in_part(gateway):
    dataset = instance(NumberOfFrames=2)
    pixels = explicit(0x7FE00010, "OB", fragments(b"ab", b"cdef"), length=UNDEFINED)
    key = gateway.archive.add(dataset, RLE, (encoded(dataset) + pixels)[: -len(SEQUENCE_END) - 1]).key
    client = gateway.start()

    response = client.get(f"/dicomweb/studies/{key[0]}/bulkdata/{key[1]}/{key[2]}/7FE00010")
    assert (response.status_code, "frame 2" in response.json()["detail"]) == (404, True)
    ((_, body),) = parts_of(client.get(address(key, "/frames/1")))
    assert body == b"ab"


class Counted(bytes):
    """Bytes that can be told apart by identity; a dataset of frames that must be scanned for."""


def scanned(name, count):
    element = explicit(0x00280008, "IS", str(count))
    pixels = fragments(*[name] * count)
    return Encoded(Counted(element + explicit(0x7FE00010, "OB", pixels, length=UNDEFINED)), RLE)


def test_frame_tables_are_made_once_while_they_are_looked_at(gateway):
    held = [gateway.archive.add_file("CT_small.dcm")._replace(digest=bytes([n]) * 32) for n in range(3)]
    encoded_datasets = [scanned(b"%02d" % number, 4) for number in range(3)]
    tables = FrameTables(kept=2)
    first, second = (tables.of(held[n], encoded_datasets[n]) for n in range(2))

    assert tables.of(held[0], encoded_datasets[0]) is first
    tables.of(held[2], encoded_datasets[2])
    assert tables.of(held[0], encoded_datasets[0]) is first
    assert tables.of(held[1], encoded_datasets[1]) is not second


def test_frame_tables_take_bounded_memory(gateway):
    held = [gateway.archive.add_file("CT_small.dcm")._replace(digest=bytes([n]) * 32) for n in range(2)]
    small, large = scanned(b"ab", 4), scanned(b"cd", 100)
    tables = FrameTables(kept_bytes=8 * 100)
    first = tables.of(held[0], small)
    assert tables.of(held[0], small) is first

    too_large = tables.of(held[1], large)
    assert too_large.frames == 100
    assert tables.of(held[1], large) is not too_large
