"""Datasets out of metadata and bulk data: PS3.18 sections 8.6 and 10.5.1.4, annex F; PS3.19 annex A."""

import json
import struct
import tracemalloc
from functools import partial

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filebase import DicomBytesIO

from dicomscp.dicom.bulk import bulk_value
from dicomscp.dicom.codestream import Codestream
from dicomscp.dicom.dataset import BulkData, Elsewhere, composed, json_objects, read_json
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.dicom.xmlmodel import native_model, read_native_model
from dicomscp.errors import LimitError, RefusedError, TransferSyntaxError
from tests.unit.dicom.encoding import explicit, item
from tests.unit.web.held import SOURCES

UIDS = {
    "00080016": {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.2"]},
    "00080018": {"vr": "UI", "Value": ["1.2.3"]},
    "0020000D": {"vr": "UI", "Value": ["1"]},
    "0020000E": {"vr": "UI", "Value": ["1.2"]},
}
PIXELS = "7FE00010"
BOXED = "GDCMJ2K_TextGBR.dcm"  # a JP2 file within DICOM, against PS3.5: what is kept of it is its codestream
LITTLE = "1.2.840.10008.1.2.1"


class Aside:
    """Bulk data that lie one behind the other."""

    def __init__(self):
        self.data, self.parts = b"", {}

    def add(self, uri, data, media_type="application/octet-stream", syntax=""):
        where = Elsewhere(len(self.data), len(data))
        self.parts.setdefault(uri, []).append(BulkData(media_type, syntax, where))
        self.data += data
        return self

    def read(self, where):
        return self.data[where.start : where.start + where.size]

    def compose(self, attributes, decode=None):
        """What is made, and its bytes; *decode* is told this and a part."""
        decoding = [partial(decode, self)] if decode else []
        made = composed(attributes, lambda uri: self.parts.get(uri, ()), self.read, *decoding)
        pieces = (self.read(piece) if isinstance(piece, Elsewhere) else piece for piece in made.pieces)
        return made, b"".join(pieces)


def compose(attributes):
    return Aside().compose(UIDS | attributes)[1]


def read_dataset(encoded, syntax=LITTLE):
    found = pydicom.filereader.read_dataset(
        DicomBytesIO(encoded), is_implicit_VR=False, is_little_endian=True
    )
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = syntax
    return found


# All of it


def described(file):
    """The metadata of *file*, as JSON, and its bulk data."""
    meta = read_file_meta(file)
    encoded = memoryview(file)[meta.dataset_offset :]
    header = Compiler().header(
        encoded, meta.transfer_syntax_uid, total_bytes=len(encoded), bulk_uri="/b", default_charset=""
    )
    text, aside = b"[{" + header.body + b"}]", Aside()
    for uri in uris(json.loads(text)[0]):
        value = bulk_value(encoded, meta.transfer_syntax_uid, uri.removeprefix("/b/"))
        syntax = value.transfer_syntax_uid if value.transfer_syntax_uid != LITTLE else ""
        for part in value.parts():
            aside.add(uri, b"".join(part), syntax=syntax)
    return text, aside


def uris(attributes):
    for attribute in attributes.values():
        if "BulkDataURI" in attribute:
            yield attribute["BulkDataURI"]
        if attribute["vr"] == "SQ":
            for one in attribute.get("Value", ()):
                yield from uris(one)


@pytest.mark.parametrize("by", ["json", "xml"])
def test_metadata_of_real_files_become_datasets_that_have_the_same_metadata(by):
    """What is retrieved can be stored: every attribute, every bulk value, text in one character set."""
    count = 0
    for path in sorted(SOURCES.rglob("*.dcm")):
        try:
            text, aside = described(path.read_bytes())
        except RefusedError:  # no instance
            continue
        attributes = read_json(text[1:-1])
        if not {"00080016", "00080018"} <= attributes.keys() or path.name == BOXED:
            continue
        if by == "xml":
            attributes = read_native_model(native_model(attributes).document)
        made, encoded = aside.compose(attributes)
        file = bytes(128) + b"DICM" + explicit(0x00020010, "UI", made.transfer_syntax_uid) + encoded
        again, values = described(file)
        assert comparable(again) == comparable(text), path
        for uri, parts in aside.parts.items():
            assert [values.read(part.where) for part in values.parts[uri]] == [
                padded(aside.read(part.where)) for part in parts
            ], (path, uri)
        count += 1
    assert count > 60


def padded(data):
    return data + b"\0" * (len(data) % 2)


def comparable(text):
    """Metadata without what need not come back."""
    (found,) = json.loads(text, object_hook=without_empty_components)
    found.pop("00083002")  # of answers, and not of datasets
    found.get(PIXELS, {}).pop("vr", "")  # encapsulated they are OB (PS3.5 section A.4), whatever they were
    return found


def without_empty_components(found):
    """A name without the carets at its end, which XML does not have."""
    if found.get("vr") == "PN" and "Value" in found:
        names = [{group: name.rstrip("^") for group, name in (one or {}).items()} for one in found["Value"]]
        found["Value"] = [{group: name for group, name in one.items() if name} or None for one in names]
        if found["Value"] == [None]:
            del found["Value"]
    return found


# Elements


@pytest.mark.parametrize(
    ("tag", "attribute", "element"),
    [
        (
            0x00280030,
            {"vr": "DS", "Value": ["0.661468", "0.50"]},
            explicit(0x00280030, "DS", "0.661468\\0.50 "),
        ),
        (0x00200013, {"vr": "IS", "Value": ["1"]}, explicit(0x00200013, "IS", "1 ")),
        (0x00280010, {"vr": "US", "Value": ["512", "1"]}, explicit(0x00280010, "US", b"\0\2\1\0")),
        (0x00280106, {"vr": "SS", "Value": ["-2"]}, explicit(0x00280106, "SS", struct.pack("<h", -2))),
        (0x00720072, {"vr": "SL", "Value": ["-2"]}, explicit(0x00720072, "SL", struct.pack("<l", -2))),
        (0x00720083, {"vr": "UV", "Value": [f"{2**64 - 1}"]}, explicit(0x00720083, "UV", b"\xff" * 8)),
        (0x00720074, {"vr": "FD", "Value": ["1.5", "-Infinity"]}, None),
        (0x00209165, {"vr": "AT", "Value": ["00080060"]}, explicit(0x00209165, "AT", b"\x08\x00\x60\x00")),
        (0x00200020, {"vr": "CS", "Value": ["L", None, "P"]}, explicit(0x00200020, "CS", "L\\\\P")),
        (0x00200010, {"vr": "SH"}, explicit(0x00200010, "SH")),
        (0x00200010, {"vr": "SH", "Value": []}, explicit(0x00200010, "SH")),
        (0x00200010, {"Value": ["no VR"]}, explicit(0x00200010, "SH", "no VR ")),
        (0x00420011, {"vr": "OB", "InlineBinary": " AQ\nID "}, explicit(0x00420011, "OB", b"\1\2\3\0")),
        (0x00104000, {"vr": "LT", "Value": ["x" * 70000]}, explicit(0x00104000, "UN", "x" * 70000)),
        (0x00400555, {"vr": "SQ"}, explicit(0x00400555, "SQ")),
        (
            0x00400555,
            {"vr": "SQ", "Value": [{"00100020": {"vr": "LO", "Value": ["A"]}}, {}, None]},
            explicit(0x00400555, "SQ", item(explicit(0x00100020, "LO", "A ")) + item() + item()),
        ),
        (
            0x00100010,
            {"vr": "PN", "Value": [{"Alphabetic": "A^B", "Phonetic": "C"}, {"Alphabetic": "D"}]},
            explicit(0x00100010, "PN", "A^B==C\\D"),
        ),
    ],
)
def test_an_element_is_written_as_its_vr_has_it(tag, attribute, element):
    """PS3.18 table F.2.3-1 and PS3.5 section 6.2."""
    if element is None:
        element = explicit(tag, "FD", struct.pack("<dd", 1.5, float("-inf")))
    uids = [explicit(int(name, 16), "UI", value["Value"][0]) for name, value in UIDS.items()]
    elements = sorted([*uids, element], key=lambda one: struct.unpack("<HH", one[:4]))
    assert compose({f"{tag:08X}": attribute}) == b"".join(elements)


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ({"vr": "US", "Value": ["70000"]}, "a value is no number that US has"),
        ({"vr": "US", "Value": ["1.5"]}, "a value is no number"),
        ({"vr": "FD", "Value": ["x"]}, "a value is no number"),
        ({"vr": "LO", "Value": "text"}, "its Value is no array"),
        ({"vr": "LO", "Value": [True]}, "a value is neither text nor a number"),
        ({"vr": "XX"}, "its VR is none"),
        ({"vr": ["LO"]}, "its VR is none"),
        ({"vr": "OB", "Value": ["1"]}, "a value of OB is InlineBinary or bulk data"),
        ({"vr": "OB", "InlineBinary": "A"}, "its InlineBinary is not base64"),
        ({"vr": "OB", "InlineBinary": 1}, "its InlineBinary is not base64"),
        ({"vr": "PN", "Value": [["A"]]}, "a name is no JSON object"),
        ({"vr": "AT", "Value": ["8,60"]}, "a tag is not eight hexadecimal digits"),
        ({"vr": "SQ", "Value": ["x"]}, "an item is no JSON object"),
        ({"vr": "SQ", "Value": [{"00100010": {"vr": "XX"}}]}, "(0010,0010): its VR is none"),
        ({"vr": "OW", "BulkDataURI": "nowhere"}, "no part of the body is its bulk data"),
        ({"vr": "OW", "BulkDataURI": ["nowhere"]}, "no part of the body is its bulk data"),
        ({"vr": "SQ", "BulkDataURI": "x"}, "a sequence has its items in Value"),
        ({"vr": "SQ", "InlineBinary": "YWI="}, "a sequence has its items in Value"),
        ({"vr": "LO", "Value": ["\ud800"]}, "its text has half of a character in it"),
        ("text", "it is no JSON object"),
    ],
)
def test_what_cannot_be_written_is_refused_by_its_tag(attribute, said):
    with pytest.raises(RefusedError) as caught:
        compose({"00420011": attribute})
    assert str(caught.value).startswith("(0042,0011)")
    assert said in str(caught.value)


@pytest.mark.parametrize("tag", ["00000010", "00010010", "FFFEE000", "FFFEE00D", "FFFF0001"])
def test_what_is_no_element_of_a_dataset_is_refused(tag):
    with pytest.raises(RefusedError, match="no element of a dataset has this tag"):
        compose({tag: {"vr": "LO", "Value": ["x"]}})


def test_a_dataset_nests_no_deeper_than_is_read():
    attributes = {}
    for _ in range(70):
        attributes = {"0040A730": {"vr": "SQ", "Value": [attributes]}}
    with pytest.raises(RefusedError, match="nests deeper"):
        compose(attributes)


def test_text_beyond_ascii_is_utf_8_and_says_so():
    """PS3.18 section F.2: JSON is UTF-8, whatever Specific Character Set says."""
    made = read_dataset(compose({"00100010": {"vr": "PN", "Value": [{"Alphabetic": "Müller^Jürgen"}]}}))
    assert (made.SpecificCharacterSet, made.PatientName) == ("ISO_IR 192", "Müller^Jürgen")
    latin = {"00080005": {"vr": "CS", "Value": ["ISO_IR 100"]}}
    assert read_dataset(compose(latin)).SpecificCharacterSet == "ISO_IR 192"
    assert "SpecificCharacterSet" not in read_dataset(compose({}))
    nested = {"00400555": {"vr": "SQ", "Value": [latin | {"00100020": {"vr": "LO", "Value": ["ü"]}}]}}
    made = read_dataset(compose(nested))
    assert made.SpecificCharacterSet == made[0x00400555].value[0].SpecificCharacterSet == "ISO_IR 192"


def test_what_belongs_to_messages_is_left_out():
    more = {
        "00020010": {"vr": "UI", "Value": ["1.2.3"]},
        "00080000": {"vr": "UL", "Value": ["4"]},
        "00083002": {"vr": "UI", "Value": ["1.2.3"]},
    }
    assert compose(more) == compose({})


# Pixel data


def pixels_of(name):
    found = pydicom.dcmread(SOURCES / name)
    return found, list(generate_frames(found.PixelData, number_of_frames=int(found.get("NumberOfFrames", 1))))


def test_native_pixel_data_are_as_they_came():
    made, encoded = Aside().add("p", b"\1\2\3").compose(UIDS | {PIXELS: {"vr": "OW", "BulkDataURI": "p"}})
    assert made.transfer_syntax_uid == LITTLE
    assert encoded.endswith(explicit(0x7FE00010, "OW", b"\1\2\3\0"))


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("JPGExtended.dcm", "image/jpeg"),
        ("JPEG2000.dcm", "image/jp2"),
        ("MR_small_jpeg_ls_lossless.dcm", "image/jls"),
        ("JPEGLSNearLossless_08.dcm", "image/jls"),
        ("SC_rgb_small_odd_jpeg.dcm", "image/jpeg"),
        ("examples_ybr_color.dcm", "image/jpeg"),
        ("SC_rgb_rle_2frame.dcm", "image/dicom-rle"),
    ],
)
def test_compressed_pixel_data_are_encapsulated_in_the_syntax_that_they_are_in(name, media_type):
    """PS3.18 table 10.5.2-1: unchanged; the media type alone does not say the transfer syntax."""
    found, frames = pixels_of(name)
    aside = Aside()
    for frame in frames:
        aside.add("p", frame, media_type)
    attributes = UIDS | {PIXELS: {"vr": "OB", "BulkDataURI": "p"}}
    made, encoded = aside.compose(attributes)
    assert made.transfer_syntax_uid == found.file_meta.TransferSyntaxUID
    again = read_dataset(encoded, made.transfer_syntax_uid)
    assert [
        frame.rstrip(b"\0") for frame in generate_frames(again.PixelData, number_of_frames=len(frames))
    ] == [frame.rstrip(b"\0") for frame in frames]
    if media_type == "image/dicom-rle":  # it says nothing of its size
        return
    for keyword in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated"):
        assert again[keyword].value == found[keyword].value, keyword


def test_what_the_metadata_say_of_the_pixels_stands():
    _, (frame,) = pixels_of("JPEG2000.dcm")
    said = {"00280004": {"vr": "CS", "Value": ["MONOCHROME1"]}, "00280101": {"vr": "US", "Value": ["12"]}}
    attributes = UIDS | said | {PIXELS: {"vr": "OB", "BulkDataURI": "p"}}
    again = read_dataset(Aside().add("p", frame, "image/jp2").compose(attributes)[1])
    assert (again.PhotometricInterpretation, again.BitsStored, again.Rows) == ("MONOCHROME1", 12, 1024)


def test_of_a_jp2_file_the_codestream_is_kept():
    """PS3.5 section A.4.4: the JP2 file format is not used."""
    _, (frame,) = pixels_of("JPEG2000.dcm")
    signature = b"\0\0\0\x0cjP  \r\n\x87\n"
    boxes = signature + struct.pack(">L4s4s", 12, b"ftyp", b"jp2 ")
    for box in (
        struct.pack(">L4s", len(frame) + 8, b"jp2c") + frame + struct.pack(">L4s", 8, b"free"),
        struct.pack(">L4sQ", 1, b"jp2c", len(frame) + 16) + frame,
        struct.pack(">L4s", 0, b"jp2c") + frame,
    ):
        aside = Aside().add("p", boxes + box, "image/jp2")
        _, encoded = aside.compose(UIDS | {PIXELS: {"vr": "OB", "BulkDataURI": "p"}})
        (kept,) = generate_frames(read_dataset(encoded).PixelData, number_of_frames=1)
        assert kept == frame


@pytest.mark.parametrize(
    ("data", "media_type", "syntax", "error"),
    [
        (b"\x89PNG\r\n", "image/png", "", TransferSyntaxError),
        (b"GIF89a", "image/gif", "", TransferSyntaxError),
        (b"\0\0\0\x18ftypmp42", "video/mp4", "", TransferSyntaxError),
        (b"\xff\xd8\xff", "image/jpeg", "", RefusedError),
        (b"\xff\xd8\xff\xc9\0\x0b" + bytes(20), "image/jpeg", "", TransferSyntaxError),
        (b"\xff\xd8\xff\xda\0\x0c\1" + bytes(20), "image/jpeg", "", RefusedError),
        (b"\xff\xd8\xff\xe0\0\4\0\0\0\0", "image/jpeg", "", RefusedError),
        (b"\xff\x4f\xff\x51" + bytes(50), "image/jp2", "", RefusedError),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(8), "image/jp2", "", RefusedError),
        (b"any", "application/octet-stream", "1.2.840.10008.1.2.2", TransferSyntaxError),
        (b"any", "image/jpeg", "1.2.840.10008.1.2.7.1", TransferSyntaxError),
    ],
)
def test_pixel_data_that_cannot_be_held_as_they_came_are_refused(data, media_type, syntax, error):
    """Of PNG and GIF there is no transfer syntax, and here nobody decodes them; a video must say its own."""
    with pytest.raises(error) as caught:
        Aside().add("p", data, media_type, syntax).compose(UIDS | {PIXELS: {"vr": "OB", "BulkDataURI": "p"}})
    assert type(caught.value) is error


def decoded_to(image, data):
    """What decodes an image, as the web server does it: to the samples *data*, described by *image*."""

    def decode(aside, part):
        assert part.media_type == "image/png"
        where = Elsewhere(len(aside.data), len(data))
        aside.data += data
        return BulkData("application/octet-stream", LITTLE, where, image)

    return decode


RGB = Codestream(LITTLE, 2, 3, 3, 8, False, "RGB")
GREY = Codestream(LITTLE, 2, 3, 1, 16, False, "MONOCHROME2")


@pytest.mark.parametrize(
    ("image", "parts", "frames", "photometric"),
    [(RGB, 1, 1, "RGB"), (RGB, 2, 1, "RGB"), (RGB, 1, 3, "RGB"), (GREY, 1, 1, "MONOCHROME2")],
)
def test_an_image_that_no_transfer_syntax_has_becomes_native_pixels(image, parts, frames, photometric):
    """Table 10.5.2-1; what describes the pixels is added (10.5.2)."""
    data = bytes(range(2 * 3 * image.samples * image.bits // 8)) * frames
    aside = Aside()
    for _ in range(parts):
        aside.add("p", b"file", "image/png")
    made, encoded = aside.compose(UIDS | {PIXELS: {"vr": "OB", "BulkDataURI": "p"}}, decoded_to(image, data))
    assert made.transfer_syntax_uid == LITTLE
    again = read_dataset(encoded)
    assert again.PixelData == data * parts
    assert (again.Rows, again.Columns, again.SamplesPerPixel) == (2, 3, image.samples)
    assert (again.BitsAllocated, again.BitsStored, again.HighBit) == (image.bits, image.bits, image.bits - 1)
    assert again.PhotometricInterpretation == photometric
    assert again.get("NumberOfFrames", 1) == parts * frames
    assert again.get("PlanarConfiguration") == (0 if image.samples == 3 else None)


@pytest.mark.parametrize(
    ("tag", "vr", "value", "agrees"),
    [
        ("00280010", "US", "2", True),
        ("00280010", "US", "3", False),
        ("00280100", "US", "8", False),
        ("00280101", "US", "12", True),  # of 16 that are there
        ("00280004", "CS", "MONOCHROME1", True),
        ("00280004", "CS", "PALETTE COLOR", False),
        ("00280008", "IS", "1", True),
    ],
)
def test_metadata_say_of_decoded_pixels_what_the_image_has(tag, vr, value, agrees):
    attributes = UIDS | {PIXELS: {"vr": "OW", "BulkDataURI": "p"}, tag: {"vr": vr, "Value": [value]}}
    compose = Aside().add("p", b"file", "image/png").compose
    if agrees:
        assert (
            str(read_dataset(compose(attributes, decoded_to(GREY, bytes(12)))[1])[int(tag, 16)].value)
            == value
        )
        return
    with pytest.raises(RefusedError, match=f"^.{tag[:4]},{tag[4:]}.: "):
        compose(attributes, decoded_to(GREY, bytes(12)))


def test_a_video_is_held_in_the_syntax_that_it_says():
    aside = Aside().add("p", b"video", "video/mp4", "1.2.840.10008.1.2.4.102")
    made, encoded = aside.compose(UIDS | {PIXELS: {"vr": "OB", "BulkDataURI": "p"}})
    assert made.transfer_syntax_uid == "1.2.840.10008.1.2.4.102"
    assert encoded.endswith(encapsulate([b"video\0"], has_bot=False) + b"\xfe\xff\xdd\xe0\0\0\0\0")


def test_frames_of_two_syntaxes_are_refused():
    aside = Aside().add("p", b"a", "image/jpeg", "1.2.840.10008.1.2.4.50")
    aside.add("p", b"b", "image/jpeg", "1.2.840.10008.1.2.4.51")
    with pytest.raises(TransferSyntaxError):
        aside.compose(UIDS | {PIXELS: {"vr": "OB", "BulkDataURI": "p"}})


# JSON and XML

marks = st.text('{}[]",:\\aé', max_size=6)
NUMBERED = b"""<NativeDicomModel><DicomAttribute tag="00100020" vr="LO"><Value number="%b"/>
</DicomAttribute></NativeDicomModel>"""


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"[",
            b"[1]",
            b'"x"',
            b"\xff",
            b"[" * 100_000,
            b"null",
            b"{",
            b"[[]]",
            b"[{}",
            b"[{}]]",
            b"[{},]",
        ),
        *(
            b"[{} {}]",
            b"[{}{}]",
            b"[{};{}]",
            b"{},{}",
            b"{}{}",
            b'["{}"]',
            b"[}",
            b"}{",
            b"]{}[",
            b'[{"a]}',
            b"]",
        ),
    ],
)
def test_what_is_no_dicom_json_is_refused(text):
    with pytest.raises(RefusedError):
        list(map(read_json, json_objects(text)))


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        (b"[]", []),
        (b"\xef\xbb\xbf [ {} ,\n{} ]\n", [b"{}", b"{}"]),
        (b'{"a":[{}]}', [b'{"a":[{}]}']),
        (rb'[{"a":"}\"{[,"},{"\\":"]"}]', [rb'{"a":"}\"{[,"}', rb'{"\\":"]"}']),
    ],
)
def test_objects_are_had_one_by_one(text, objects):
    assert list(json_objects(text)) == objects


@given(st.lists(st.dictionaries(marks, st.recursive(marks, st.lists, max_leaves=5), max_size=3), max_size=4))
def test_any_objects_are_had_as_they_were_written(objects):
    text = json.dumps(objects, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert [json.loads(one) for one in json_objects(text)] == objects


@pytest.mark.parametrize(
    "within",
    [b"{}," * 300_000, b"[]," * 300_000, b'"a",' * 2_000_000, b'{"":' * 300, b'"a":0,' * 400_000],
    ids=["objects", "arrays", "values", "depth", "members"],
)
def test_an_object_with_too_much_in_it_is_not_parsed(within):
    """Three bytes become a hundred."""
    found = json_objects(b'[{"00100010":{"vr":"CS"}},{"x":[' + within + b"1]}]")
    assert read_json(next(found))
    with pytest.raises(LimitError):
        next(found)


def test_an_escape_after_the_other_costs_nothing():
    text = b'[{"00100010":"' + rb"\n" * (8 << 20) + b'"}]'
    tracemalloc.start()
    (one,) = json_objects(text)
    assert tracemalloc.get_traced_memory()[1] < 2 * len(text)
    tracemalloc.stop()
    assert len(one) == len(text) - 2


def test_digits_of_numbers_stay():
    found = read_json(b'{"00280030":{"vr":"DS","Value":[0.10,1e5,12345678901234567890]}}')
    assert found["00280030"]["Value"] == ["0.10", "1e5", "12345678901234567890"]


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<a/>",
        b"<NativeDicomModel>",
        b'<!DOCTYPE a [<!ENTITY b "b">]><NativeDicomModel/>',
        b"<NativeDicomModel>" + b"<Item>" * 300 + b"</Item>" * 300 + b"</NativeDicomModel>",
        NUMBERED % b"9999999",
        NUMBERED % b"0",
        NUMBERED % b"one",
        NUMBERED % (b"9" * 5000),
        b'<?xml version="1.0" encoding="mac_arabic"?><NativeDicomModel/>',
    ],
)
def test_what_is_no_native_model_is_refused(document):
    with pytest.raises(RefusedError):
        read_native_model(document)


@pytest.mark.parametrize(
    "within", [b"<a/>" * 1_000_001, b"<a %b/>" % b" ".join(b"a%d=''" % number for number in range(1_000_000))]
)
def test_a_model_with_too_much_in_it_is_not_parsed(within):
    with pytest.raises(LimitError):
        read_native_model(b"<NativeDicomModel>" + within + b"</NativeDicomModel>")


def test_a_model_may_be_in_any_encoding_that_parsers_have():
    text = native_model({"00100020": {"vr": "LO", "Value": ["é"]}}).document.decode()
    for encoding in ("UTF-16", "ISO-8859-1"):
        document = text.replace("UTF-8", encoding).encode(encoding)
        assert read_native_model(document)["00100020"]["Value"] == ["é"]


def test_private_elements_are_put_into_the_block_of_their_creator():
    """PS3.19 table A.1.5-2: the tag has 00 for the block."""
    creator = {"vr": "LO", "Value": ["ACME"]}
    attributes = {"00090010": {"vr": "LO", "Value": ["OTHER"]}, "00090011": creator, "00091101": creator}
    assert read_native_model(native_model(attributes).document) == attributes
    alone = native_model(attributes).document.replace(b">ACME<", b">THIRD<", 1)
    assert read_native_model(alone)["00091201"] == creator
