import asyncio
import os
import re
from contextlib import suppress
from functools import partial
from io import BytesIO
from urllib.parse import urlencode

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomscp.dicom.part10 import read_file_meta
from dicomscp.dicom.pixels import Pixels
from dicomscp.dicom.render import Window, render
from dicomscp.web.app import WebSettings, create_app
from dicomscp.web.decoders import Decoders, Limits
from dicomscp.web.problem import Problem
from dicomscp.web.render import MAX_SIDE, _window, quality_of, viewport_of
from tests.processes import peak_rss_bytes, reset_peak_rss
from tests.unit.dicom.encoding import DEFLATED, deflate, explicit
from tests.unit.web.conftest import Gateway
from tests.unit.web.held import LITTLE, SOURCES, FilledArchive

JPEG, PNG, GIF = "image/jpeg", "image/png", "image/gif"
PDF, CDA, STL = (f"1.2.840.10008.5.1.4.1.1.104.{number}" for number in (1, 2, 3))
MPEG4 = "1.2.840.10008.1.2.4.102"


def address(held, rest=""):
    study, series, sop = held.key
    return f"/dicomweb/studies/{study}/series/{series}/instances/{sop}{rest}"


def frames_of(count, rows=4, columns=6, **attributes):
    """An instance whose frame n has the value n in every pixel, but for two that span all."""
    dataset = pydicom.dcmread(SOURCES / "MR_small.dcm")
    for keyword in ("WindowCenter", "WindowWidth", "SmallestImagePixelValue", "LargestImagePixelValue"):
        if keyword in dataset:
            delattr(dataset, keyword)
    array = np.zeros((count, rows, columns), "<u2") + np.arange(1, count + 1, dtype="<u2")[:, None, None]
    array[:, 0, :2] = (0, 100)
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = rows, columns, count
    dataset.PixelRepresentation, dataset.PixelData = 0, array.tobytes()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = "1.9.1", "1.9.2", "1.9.3"
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def document(sop_class_uid, data, media_type, uid):
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class_uid, f"1.8.3.{uid}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.8.1", "1.8.2"
    dataset.EncapsulatedDocument = data + bytes(len(data) % 2)
    dataset.EncapsulatedDocumentLength = len(data)
    if media_type:
        dataset.MIMETypeOfEncapsulatedDocument = media_type
    return dataset


class Site(Gateway):
    """A gateway that many tests share, and what it holds."""

    def fill(self):
        for name in ("CT_small.dcm", "JPGExtended.dcm", "examples_ybr_color.dcm", "reportsi.dcm"):
            setattr(self, name.partition(".")[0], self.archive.add_file(name))
        self.broken = self.archive.add_file("JPEG2000-embedded-sequence-delimiter.dcm")
        self.frames = self.archive.add(frames_of(5, FrameTime=200))
        self.called = self.archive.add(
            frames_of(5, SOPInstanceUID="1.9.4", SeriesInstanceUID="1.9.5", RepresentativeFrameNumber=4)
        )

    def image(self, path, status=200, **asked):
        """The image at *path*, as an array."""
        response = self.client.get(path, **asked)
        assert response.status_code == status, response.text
        with Image.open(BytesIO(response.content)) as image:
            assert image.get_format_mimetype() == response.headers["content-type"]
            return np.array(image.convert("L") if image.mode == "P" else image)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    site.fill()
    site.start()
    yield site
    site.end()


def expected(name, *args):
    """What the file shows, as `dicom.render` has it."""
    data = (SOURCES / name).read_bytes()
    meta = read_file_meta(data)
    pixels = Pixels(data[meta.dataset_offset :], meta.transfer_syntax_uid, max_pixels=1 << 26)
    return render(pixels, *(args or (1,)))


def parts_of(response):
    boundary = re.search("boundary=([^;]+)", response.headers["content-type"])[1].encode()
    assert response.content.endswith(b"\r\n--" + boundary + b"--")
    found = []
    for part in response.content.split(b"--" + boundary)[1:-1]:
        head, body = part[2:-2].split(b"\r\n\r\n", 1)
        found.append((dict(line.split(": ", 1) for line in head.decode().split("\r\n")), body))
    return found


def opened(body):
    with Image.open(BytesIO(body)) as image:
        return np.array(image)


# Rendered instances and frames, PS3.18 section 10.4.1.1.3


def test_an_instance_is_a_jpeg_unless_another_type_is_asked_for(site):
    response = site.client.get(address(site.CT_small, "/rendered"))
    assert response.headers["content-type"] == JPEG
    assert response.headers["cache-control"] == "no-cache"
    assert np.abs(opened(response.content).astype(int) - expected("CT_small.dcm")).max() < 40
    for media_type in (PNG, GIF):
        for asked in ({"headers": {"accept": media_type}}, {"params": {"accept": media_type}}):
            shown = site.image(address(site.CT_small, "/rendered"), **asked)
            np.testing.assert_array_equal(shown, expected("CT_small.dcm"))
    shown = site.image(address(site.CT_small, "/frames/1/rendered"), params={"accept": PNG})
    np.testing.assert_array_equal(shown, expected("CT_small.dcm"))


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("40,400,linear", Window(40, 400)),
        ("40.5,1e3,linear-exact", Window(40.5, 1000, "LINEAR_EXACT")),
        ("-100,50,sigmoid", Window(-100, 50, "SIGMOID")),
    ],
)
def test_a_window_is_shown(site, text, window):
    asked = {"window": text, "accept": PNG}
    shown = site.image(address(site.CT_small, "/rendered"), params=asked)
    np.testing.assert_array_equal(shown, expected("CT_small.dcm", 1, window))


def test_a_viewport_is_fitted_into_and_nothing_is_distorted(site):
    def shown(viewport):
        return site.image(address(site.frames, "/rendered"), params={"viewport": viewport, "accept": PNG})

    assert shown("60,60").shape == (40, 60)  # of 4 rows and 6 columns
    assert shown("3,200").shape == (2, 3)
    assert shown("60,60,,,3").shape == (60, 45)
    assert shown("30,30,1,0,2,2").shape == (30, 30)
    upright = shown("6,4")
    assert site.client.get(address(site.frames, "/rendered?viewport=6,4,9,0")).status_code == 406
    np.testing.assert_array_equal(shown("6,4,0,0,-6,4"), upright[:, ::-1])
    np.testing.assert_array_equal(shown("6,4,0,0,6,-4"), upright[::-1])
    beyond = shown("12,8,-6,-4,12,8")
    assert beyond.shape == (8, 12)
    assert not beyond[:4].any()
    assert not beyond[:, :6].any()
    np.testing.assert_array_equal(beyond[4:, 6:], upright)


def test_quality_is_that_of_the_jpeg(site):
    sizes = [
        len(site.client.get(address(site.CT_small, "/rendered"), params={"quality": quality}).content)
        for quality in (5, 90, 100)
    ]
    assert sizes == sorted(set(sizes))


def test_colour_is_shown_as_colour(site):
    shown = site.image(address(site.examples_ybr_color, "/rendered"), params={"accept": PNG})
    np.testing.assert_array_equal(shown, expected("examples_ybr_color.dcm"))


def test_frames_are_shown_by_their_numbers(site):
    for frame in (1, 5):
        shown = site.image(address(site.frames, f"/frames/{frame}/rendered"), params={"accept": PNG})
        assert shown[3, 3] == round(frame / 100 * 255)
    response = site.client.get(address(site.frames, "/frames/5,2/rendered"))
    heads = [head for head, _ in parts_of(response)]
    assert [head["Content-Type"] for head in heads] == [JPEG, JPEG]
    assert [head["Content-Location"] for head in heads] == [
        address(site.frames, f"/frames/{frame}/rendered") for frame in (5, 2)
    ]
    assert site.client.get(address(site.frames, "/frames/6/rendered")).status_code == 404
    missing = site.client.get(address(site.frames, "/frames/2,6/rendered"))
    assert (missing.status_code, "no frame 6" in missing.json()["detail"]) == (404, True)


def test_an_instance_of_several_frames_is_shown_by_one_or_in_parts(site):
    def value(held):
        return site.image(address(held, "/rendered"), params={"accept": PNG})[3, 3]

    assert value(site.frames) == round(1 / 100 * 255)
    assert value(site.called) == round(4 / 100 * 255)  # Representative Frame Number
    accept = {"accept": 'multipart/related; type="image/png"'}
    parts = parts_of(site.client.get(address(site.frames, "/rendered"), headers=accept))
    assert [opened(body)[3, 3] for _, body in parts] == [round(frame / 100 * 255) for frame in range(1, 6)]
    for head, body in parts:
        alone = site.client.get(head["Content-Location"], headers={"accept": PNG})
        assert (head["Content-Type"], body) == (PNG, alone.content)


def test_several_frames_are_an_animated_gif(site):
    for path, frames in (("/rendered", 5), ("/frames/2,4,5/rendered", 3), ("/frames/2/rendered", 1)):
        response = site.client.get(address(site.frames, path), headers={"accept": GIF})
        with Image.open(BytesIO(response.content)) as image:
            assert (image.format, image.n_frames) == ("GIF", frames)
            if frames > 1:
                assert (image.info["duration"], image.info["loop"]) == (200, 0)


def test_a_study_is_shown_in_parts_and_says_what_cannot_be(site):
    study = f"/dicomweb/studies/{site.broken.key.study_uid}"
    accept = {"accept": 'multipart/related; type="image/png"'}
    parts = parts_of(site.client.get(f"{study}/rendered", headers=accept))
    by_address = {head["Content-Location"]: head["Content-Type"] for head, _ in parts}
    assert by_address[address(site.broken, "/frames/1/rendered")] == "application/problem+json"
    assert by_address[address(site.JPGExtended, "/frames/1/rendered")] == PNG
    series = f"/dicomweb/studies/{site.frames.key.study_uid}/series/{site.frames.key.series_uid}"
    assert len(parts_of(site.client.get(f"{series}/rendered"))) == 5
    assert site.client.get(f"{study}/rendered", headers={"accept": PNG}).status_code == 406
    head = site.client.head(f"{study}/rendered")
    assert (head.status_code, head.content) == (200, b"")


# Thumbnails, section 10.4.1.1.4


def test_thumbnails_are_small_and_of_what_the_design_says(site):
    study, series, _ = site.frames.key
    middle = round(3 / 100 * 255)
    for path, value in (
        (f"/dicomweb/studies/{study}/thumbnail", None),
        (f"/dicomweb/studies/{study}/series/{series}/thumbnail", middle),
        (address(site.frames, "/thumbnail"), middle),
        (address(site.called, "/thumbnail"), round(4 / 100 * 255)),
        (address(site.frames, "/frames/5/thumbnail"), round(5 / 100 * 255)),
    ):
        shown = site.image(path, params={"accept": PNG})
        assert shown.shape == (4, 6), path  # what is small stays so
        assert value is None or shown[3, 3] == value, path
    colour = address(site.examples_ybr_color, "/thumbnail")
    assert site.image(colour).shape == (192, 256, 3)
    assert site.image(colour, params={"viewport": "64,64"}).shape == (48, 64, 3)
    # as OHIF asks for them
    mixed = {"accept": 'multipart/related; type="application/octet-stream"'}
    assert site.image(colour, params={"accept": JPEG}, headers=mixed).shape == (192, 256, 3)


# What goes wrong


@pytest.mark.parametrize(
    ("resource", "parameters"),
    [
        ("rendered", {"window": "40,400"}),
        ("rendered", {"window": "40,400,LINEAR"}),
        ("rendered", {"window": "40,0.5,linear"}),
        ("rendered", {"window": "40,0,sigmoid"}),
        ("rendered", {"window": "nan,400,linear"}),
        ("rendered", {"window": ["40,400,linear", "40,400,linear"]}),
        ("rendered", {"viewport": "100"}),
        ("rendered", {"viewport": "0,100"}),
        ("rendered", {"viewport": f"100,{MAX_SIDE + 1}"}),
        ("rendered", {"viewport": "100,100,a"}),
        ("rendered", {"viewport": "100,100,1,2,3,4,5"}),
        ("thumbnail", {"viewport": "100,100,1,2,3,4"}),
        ("rendered", {"quality": "0"}),
        ("rendered", {"quality": "101"}),
        ("rendered", {"quality": "best"}),
        ("rendered", {"quality": ""}),
        ("rendered", {"annotation": "patient,overlay"}),
        ("rendered", {"annotation": ""}),
        ("rendered", {"accept": "image/*"}),
        ("frames/0x1/rendered", {}),
    ],
)
def test_a_parameter_that_is_wrong_is_named(site, resource, parameters):
    response = site.client.get(address(site.CT_small, f"/{resource}"), params=parameters)
    assert response.status_code == 400
    assert next(iter(parameters), "Frames").removesuffix("s") in response.json()["detail"] or (
        "window" in parameters and "linear window" in response.json()["detail"]
    )


def test_what_has_no_image_is_told(site):
    def status(path, accept=JPEG):
        return site.client.get(path, headers={"accept": accept}).status_code

    for rest in ("/rendered", "/thumbnail", "/frames/1/rendered"):
        assert status(address(site.reportsi, rest)) == 404  # no pixels
        assert status(address(site.broken, rest)) == 406  # that no decoder reads
        assert status(address(site.CT_small, rest), "image/webp") == 406
    assert status(f"/dicomweb/studies/{site.reportsi.key.study_uid}/thumbnail") == 404
    assert status(f"/dicomweb/studies/{site.reportsi.key.study_uid}/rendered", "*/*") == 404
    assert status(address(site.CT_small).replace(site.CT_small.key.sop_uid, "9.9") + "/rendered") == 404


def test_what_is_not_done_is_named(site):
    asked = {"annotation": "patient,technique", "iccprofile": "srgb", "else": "1"}
    response = site.client.get(address(site.CT_small, "/rendered"), params=asked)
    assert response.status_code == 200
    said = f"299 {site.url}/dicomweb: "
    assert response.headers["warning"].split(", ") == [
        f"{said}The following parameters were passed over: else and iccprofile",
        f"{said}The following annotation values are not supported: patient and technique",
    ]
    nothing = site.client.get(
        address(site.CT_small, "/rendered"), params={"iccprofile": "no", "charset": "utf-8"}
    )
    assert "warning" not in nothing.headers


def test_an_image_that_is_known_is_not_made_again(site):
    for path in (
        address(site.CT_small, "/rendered"),
        address(site.CT_small, "/thumbnail"),
        address(site.frames, "/frames/1,2/rendered"),
        f"/dicomweb/studies/{site.frames.key.study_uid}/rendered",
    ):
        first = site.client.get(path)
        assert not first.headers["etag"].startswith("W/")
        again = site.client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = site.client.get(path, params={"viewport": "3,3"})
        assert other.headers["etag"] != first.headers["etag"]
        png = site.client.get(path, headers={"accept": f'multipart/related; type="{PNG}", {PNG}'})
        assert png.headers["etag"] != first.headers["etag"]
    head = site.client.head(address(site.CT_small, "/rendered"))
    got = site.client.get(address(site.CT_small, "/rendered"))
    assert (head.headers["content-length"], head.content) == (str(len(got.content)), b"")


# Documents and videos


def test_documents_are_given_as_what_they_are_and_can_do_nothing(site):
    for number, (sop_class_uid, told, media_type) in enumerate(
        [
            (PDF, "application/pdf", "application/pdf"),
            (PDF, "text/html", "application/pdf"),
            (PDF, "", "application/pdf"),
            (CDA, "text/xml", "text/xml"),
            (STL, "model/stl", "model/stl"),
        ]
    ):
        body = b"<a>document</a>"
        held = site.archive.add(document(sop_class_uid, body, told, number))
        response = site.client.get(address(held, "/rendered"))
        assert (response.status_code, response.headers["content-type"]) == (200, media_type)
        assert response.content.rstrip(b"\0") == body
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert ("sandbox" in policy) is (media_type != "application/pdf")
        known = {"if-none-match": response.headers["etag"]}
        assert site.client.get(address(held, "/rendered"), headers=known).status_code == 304
        assert site.client.get(address(held, "/rendered"), headers={"accept": JPEG}).status_code == 406
        assert site.client.get(address(held, "/thumbnail")).status_code == 404


def test_a_video_is_given_as_it_is_and_in_ranges(site):
    dataset = frames_of(1, SOPInstanceUID="1.9.9", SeriesInstanceUID="1.9.8", NumberOfFrames=50)
    stream = bytes(range(256)) * 40
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    held = site.archive.add(dataset, MPEG4)
    response = site.client.get(address(held, "/rendered"))
    assert (response.headers["content-type"].partition(";")[0], response.content) == ("video/mp4", stream)
    part = site.client.get(address(held, "/rendered"), headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, stream[100:200])


# Native pixels


def test_an_instance_is_made_explicit_if_that_is_asked_for(site):
    wanted = f"application/dicom; transfer-syntax={LITTLE}"
    rle = site.archive.add_file("MR_small_RLE.dcm")
    for held, name in ((rle, "MR_small_RLE.dcm"), (site.examples_ybr_color, "examples_ybr_color.dcm")):
        response = site.client.get(address(held), headers={"accept": wanted})
        assert response.headers["content-type"] == wanted
        made = pydicom.dcmread(BytesIO(response.content))
        np.testing.assert_array_equal(made.pixel_array, pydicom.dcmread(SOURCES / name).pixel_array)
        assert int(response.headers["content-length"]) == len(response.content)
        stored = site.client.get(address(held), headers={"accept": "application/dicom"})
        assert stored.headers["etag"] != response.headers["etag"]
        known = {"accept": wanted, "if-none-match": response.headers["etag"]}
        assert site.client.get(address(held), headers=known).status_code == 304
        part = site.client.get(address(held), headers={"accept": wanted, "range": "bytes=300000-300009"})
        if len(response.content) > 300_009:
            assert (part.status_code, part.content) == (206, response.content[300_000:300_010])
        else:
            assert part.status_code == 416
    refused = site.client.get(address(site.broken), headers={"accept": wanted})
    assert (refused.status_code, "as it is stored" in refused.json()["detail"]) == (406, True)


def test_a_study_is_made_explicit_one_instance_after_another(site):
    study = "1.7.1"
    for number, name in enumerate(("JPGExtended.dcm", "CT_small.dcm", "MR_small_RLE.dcm")):
        dataset = pydicom.dcmread(SOURCES / name)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, "1.7.2"
        dataset.SOPInstanceUID, dataset.InstanceNumber = f"1.7.3.{number}", number
        buffer = BytesIO()
        dataset.save_as(buffer)
        data = buffer.getvalue()
        meta = read_file_meta(data)
        site.archive.add(dataset, meta.transfer_syntax_uid, data[meta.dataset_offset :])
    wanted = f'multipart/related; type="application/dicom"; transfer-syntax={LITTLE}'
    response = site.client.get(f"/dicomweb/studies/{study}", headers={"accept": wanted})
    made = [pydicom.dcmread(BytesIO(body)) for _, body in parts_of(response)]
    assert [one.SOPInstanceUID for one in made] == ["1.7.3.0", "1.7.3.1", "1.7.3.2"]
    assert {one.file_meta.TransferSyntaxUID for one in made} == {LITTLE}
    np.testing.assert_array_equal(
        made[2].pixel_array, pydicom.dcmread(SOURCES / "MR_small_RLE.dcm").pixel_array
    )
    other = wanted.replace(LITTLE, "1.2.840.10008.1.2.4.70")
    assert site.client.get(f"/dicomweb/studies/{study}", headers={"accept": other}).status_code == 406


def test_frames_are_decoded_if_that_is_asked_for(site):
    array = pydicom.dcmread(SOURCES / "examples_ybr_color.dcm").pixel_array
    single = {"accept": f"application/octet-stream; transfer-syntax={LITTLE}"}
    response = site.client.get(address(site.examples_ybr_color, "/frames/3"), headers=single)
    assert response.headers["content-type"] == single["accept"]
    assert response.content == array[2].tobytes()
    parts = {"accept": f'multipart/related; type="application/octet-stream"; transfer-syntax={LITTLE}'}
    numbers = list(range(30, 0, -1))
    path = address(site.examples_ybr_color, f"/frames/{','.join(map(str, numbers))}")
    response = site.client.get(path, headers=parts)
    assert int(response.headers["content-length"]) == len(response.content) > 4 << 20  # streamed
    assert [body for _, body in parts_of(response)] == [array[number - 1].tobytes() for number in numbers]
    assert site.client.head(path, headers=parts).headers["content-length"] == str(len(response.content))
    stored = pydicom.dcmread(SOURCES / "examples_ybr_color.dcm").PixelData
    as_stored = site.client.get(address(site.examples_ybr_color, "/frames/1"))
    ((_, frame),) = parts_of(as_stored)
    assert frame == next(generate_frames(stored, number_of_frames=30))
    assert site.client.get(address(site.broken, "/frames/1"), headers=single).status_code == 406
    assert site.client.get(address(site.examples_ybr_color, "/frames/31"), headers=single).status_code == 404


# WADO-URI, section 9


def wado(held, **parameters):
    names = dict(zip(("studyUID", "seriesUID", "objectUID"), held.key, strict=True))
    return f"/wado?{urlencode({'requestType': 'WADO'} | names | parameters)}"


def test_wado_uri_gives_the_file(site):
    stored = (site.archive.root / site.JPGExtended.path).read_bytes()
    for parameters, headers in (
        # as OHIF asks for it, whose Accept header is another one
        (
            {"contentType": "application/dicom", "transferSyntax": "*"},
            {"accept": 'multipart/related; type="application/octet-stream"; transfer-syntax=*'},
        ),
        ({}, {"accept": "application/dicom"}),
        ({"transferSyntax": "*"}, {}),
        ({"contentType": "application/dicom", "transferSyntax": site.JPGExtended.transfer_syntax_uid}, {}),
    ):
        response = site.client.get(wado(site.JPGExtended, **parameters), headers=headers)
        assert (response.status_code, response.content) == (200, stored)
        assert response.headers["content-type"] == "application/dicom"  # without parameters, 9.1.3
        part = site.client.get(
            wado(site.JPGExtended, **parameters), headers=headers | {"range": "bytes=128-131"}
        )
        assert (part.status_code, part.content) == (206, b"DICM")
        assert part.headers["content-type"] == "application/dicom"
        beyond = headers | {"range": f"bytes={len(stored)}-"}
        assert site.client.get(wado(site.JPGExtended, **parameters), headers=beyond).status_code == 416
    explicit = {"contentType": "application/dicom", "transferSyntax": LITTLE}
    made = pydicom.dcmread(BytesIO(site.client.get(wado(site.JPGExtended, **explicit)).content))
    assert made.file_meta.TransferSyntaxUID == LITTLE


def test_wado_uri_gives_images(site):
    in_a_page = {"accept": "image/avif,image/webp,image/*,*/*;q=0.8"}
    for accept in ({}, in_a_page):  # */* is a JPEG (9.3)
        assert site.client.get(wado(site.CT_small), headers=accept).headers["content-type"] == JPEG
    window = {"windowCenter": "40", "windowWidth": "400"}
    shown = site.image(wado(site.CT_small, contentType=PNG, **window))
    np.testing.assert_array_equal(shown, expected("CT_small.dcm", 1, Window(40, 400)))
    shown = site.image(wado(site.CT_small, contentType=PNG, region="0.25,0.5,0.75,1", **window))
    np.testing.assert_array_equal(shown, expected("CT_small.dcm", 1, Window(40, 400))[64:, 32:96])
    for sides, shape in (({"rows": 32}, (32, 32)), ({"columns": 256}, (256, 256))):
        assert site.image(wado(site.CT_small, contentType=PNG, **sides)).shape == shape
    assert site.image(wado(site.frames, contentType=PNG, frameNumber=3))[3, 3] == round(3 / 100 * 255)
    with Image.open(BytesIO(site.client.get(wado(site.frames, contentType=GIF)).content)) as image:
        assert image.n_frames == 5
    listed = wado(site.CT_small, contentType="image/webp,image/gif;q=0.5,image/png;q=0.7")
    response = site.client.get(listed)
    assert response.headers["content-type"] == PNG
    known = {"if-none-match": response.headers["etag"]}
    assert site.client.get(listed, headers=known).status_code == 304


def test_wado_uri_gives_documents(site):
    held = site.archive.add(document(PDF, b"%PDF-1.4", "application/pdf", 77))
    for parameters in ({"contentType": "application/pdf"}, {}):
        response = site.client.get(wado(held, **parameters))
        assert (response.headers["content-type"], response.content) == ("application/pdf", b"%PDF-1.4")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert site.client.get(wado(held, contentType=JPEG)).status_code == 406


@pytest.mark.parametrize(
    ("status", "named", "parameters"),
    [
        (400, "requestType", {"requestType": "Wado"}),
        (400, "studyUID", {"studyUID": ""}),
        (400, "objectUID", {"objectUID": "a/b"}),
        (400, "contentType", {"contentType": "jpeg"}),
        (400, "transferSyntax", {"transferSyntax": "JPEG"}),
        (400, "transferSyntax", {"transferSyntax": LITTLE, "contentType": JPEG}),
        (400, "frameNumber", {"frameNumber": "1,2", "contentType": JPEG}),
        (400, "frameNumber", {"frameNumber": "1", "contentType": "application/dicom"}),
        (400, "rows", {"rows": "0", "contentType": JPEG}),
        (400, "region", {"region": "0,0,1", "contentType": JPEG}),
        (400, "region", {"region": "0.5,0,0.5,1", "contentType": JPEG}),
        (400, "windowWidth", {"windowCenter": "40", "contentType": JPEG}),
        (400, "width", {"windowCenter": "40", "windowWidth": "0", "contentType": JPEG}),
        (400, "imageQuality", {"imageQuality": "200", "contentType": JPEG}),
        (404, "Nothing is held", {"objectUID": "9.9"}),
        (400, "no frame 2", {"frameNumber": "2", "contentType": JPEG}),
        (400, "contentType", {"contentType": f"application/dicom; transfer-syntax={LITTLE}"}),
        (400, "presentation", {"presentationUID": "1.2", "windowCenter": "1", "windowWidth": "2"}),
        (406, "contentType", {"contentType": "image/webp"}),
        (406, "transferSyntax", {"transferSyntax": "1.2.840.10008.1.2.4.70"}),
        (406, "anonymize", {"anonymize": "yes"}),
        (406, "presentationUID", {"presentationUID": "1.2", "contentType": JPEG}),
    ],
)
def test_wado_uri_says_what_is_wrong(site, status, named, parameters):
    response = site.client.get(wado(site.CT_small, **parameters))
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert named in response.json()["detail"]


def test_wado_uri_takes_a_parameter_once_and_names_what_it_passes_over(site):
    assert site.client.get(wado(site.CT_small) + "&studyUID=1").status_code == 400
    response = site.client.get(wado(site.CT_small, contentType=JPEG, imageAnnotation="patient", other="1"))
    assert response.headers["warning"].endswith("imageAnnotation and other")


# What decoding may cost


def test_a_frame_of_too_many_pixels_is_not_decoded(gateway):
    held = gateway.archive.add(frames_of(40))
    client = gateway.start(limits=Limits(max_pixels=100))
    assert client.get(address(held, "/rendered")).status_code == 200
    response = client.get(address(held, "/rendered"), params={"viewport": "20,20"})
    assert (response.status_code, "more than 100 pixels" in response.json()["detail"]) == (413, True)
    response = client.get(address(held, "/rendered"), headers={"accept": GIF})
    assert (response.status_code, "fewer frames" in response.json()["detail"]) == (413, True)
    large = gateway.archive.add(frames_of(1, rows=50, SOPInstanceUID="1.9.7"))
    assert client.get(address(large, "/rendered")).status_code == 413


def test_what_would_be_too_large_is_not_even_begun(gateway):
    held = gateway.archive.add(frames_of(2))
    client = gateway.start()
    for asked in ({"viewport": f"{MAX_SIDE},{MAX_SIDE}"}, {"viewport": "9,9,-1e9,-1e9,1e10,1e10"}):
        assert client.get(address(held, "/rendered"), params=asked).status_code == 413


class Client:
    """Who asks the application itself, and takes of an answer what it wants to."""

    def __init__(self, app):
        self.app, self.status, self.begun, self.go_on = app, 0, asyncio.Event(), asyncio.Event()

    async def ask(self, path, accept):
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
        }
        scope |= {
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"accept", accept.encode())],
            "scheme": "http",
        }
        scope |= {
            "server": ("localhost", 80),
            "client": ("127.0.0.1", 1),
            "root_path": "",
            "asgi": {"version": "3.0"},
        }
        await self.app(scope, self.receive, self.send)

    async def receive(self):
        await asyncio.Event().wait()

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message.get("body"):
            self.begun.set()
            await self.go_on.wait()


@pytest.mark.parametrize(
    ("rest", "accept"),
    [
        ("/rendered", PNG),
        ("/frames/1/rendered", f'multipart/related; type="{PNG}"'),
    ],
)
def test_what_was_made_counts_until_it_is_sent(tmp_path, rest, accept):
    archive = FilledArchive(tmp_path)
    held = archive.add_file("MR_small_RLE.dcm")
    decoders = Decoders(Limits(processes=1, result_bytes=5000))
    app = create_app(archive, WebSettings(), tmp_path / "dicomweb", tmp_path / "state", decoders)

    async def ask():
        slow, other, later = Client(app), Client(app), Client(app)
        other.go_on.set()
        later.go_on.set()
        asking = asyncio.ensure_future(slow.ask(address(held, rest), accept))
        await slow.begun.wait()
        await other.ask(address(held, "/rendered"), PNG)
        slow.go_on.set()
        await asyncio.wait_for(asking, 20)
        await later.ask(address(held, "/rendered"), PNG)
        return slow.status, other.status, later.status

    try:
        assert asyncio.run(ask()) == (200, 503, 200)
    finally:
        decoders.close()
        archive.engine.dispose()


def test_frames_that_are_only_told_of_are_one_part(site):
    """Number of Frames is what somebody has written."""
    held = site.archive.add(
        frames_of(2, NumberOfFrames=2**31 - 1, SOPInstanceUID="1.6.3", SeriesInstanceUID="1.6.2")
    )
    parts = parts_of(
        site.client.get(address(held, "/rendered"), headers={"accept": f'multipart/related; type="{PNG}"'})
    )
    assert [head["Content-Type"] for head, _ in parts] == [PNG, PNG, "application/problem+json"]
    assert b"2147483647 frames" in parts[2][1]
    assert site.client.get(address(held, "/rendered"), headers={"accept": GIF}).status_code == 413
    assert site.client.get(address(held, "/thumbnail")).status_code == 200


def test_a_file_that_is_gone_costs_a_study_that_instance(site):
    held = [
        site.archive.add(
            frames_of(1, StudyInstanceUID="1.5.1", SOPInstanceUID=f"1.5.3.{number}", InstanceNumber=number)
        )
        for number in range(3)
    ]
    (site.archive.root / held[1].path).unlink()
    for gone in (held[1], held[0]):
        (site.archive.root / gone.path).unlink(missing_ok=True)
        response = site.client.get("/dicomweb/studies/1.5.1/rendered")
        assert response.status_code == 200
        by_address = {head["Content-Location"]: head["Content-Type"] for head, _ in parts_of(response)}
        assert by_address[address(gone, "/frames/1/rendered")] == "application/problem+json"
        assert by_address[address(held[2], "/frames/1/rendered")] == JPEG
        assert site.client.get("/dicomweb/studies/1.5.1/thumbnail").status_code == 200
        assert site.client.get(address(gone, "/thumbnail")).status_code == 500


def deflated(dataset, more=b""):
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return deflate(buffer.getvalue() + more)


def test_a_thumbnail_is_looked_for_among_what_is_deflated_too(site):
    """And not by inflating it in the process that serves."""
    report = pydicom.dcmread(SOURCES / "reportsi.dcm")
    report.StudyInstanceUID, report.SeriesInstanceUID, report.SOPInstanceUID = "1.4.1", "1.4.2", "1.4.3"
    large = explicit(0xFFFCFFFC, "OB", bytes(120 << 20))
    site.archive.add(report, DEFLATED, deflated(report, large))
    site.client.get(address(site.CT_small, "/thumbnail"))
    reset_peak_rss(os.getpid())
    before = peak_rss_bytes(os.getpid())
    assert site.client.get("/dicomweb/studies/1.4.1/thumbnail").status_code == 404
    assert peak_rss_bytes(os.getpid()) - before < 40 << 20
    image = frames_of(1, StudyInstanceUID="1.4.1", SeriesInstanceUID="1.4.9", SOPInstanceUID="1.4.4")
    image.SeriesNumber = 99999
    site.archive.add(image, DEFLATED, deflated(image))
    assert site.client.get("/dicomweb/studies/1.4.1/thumbnail").status_code == 200


@given(text=st.text(alphabet="0123456789.,+-eE linarexctsgmod", max_size=40))
def test_parameters_are_read_or_refused(text):
    for read in (_window, partial(viewport_of, regions=True), partial(quality_of, name="quality")):
        with suppress(Problem):  # of status 400, as its tests show; nothing else may come of it
            read(text)
