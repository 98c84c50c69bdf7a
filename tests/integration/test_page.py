"""The page in a real browser: it lives without reloading, and what senders wrote does nothing."""

import contextlib
import shutil

import pydicom
import pytest
from pydicom.config import disable_value_validation
from pydicom.uid import generate_uid

from tests.gateway import Gateway
from tests.peers import missed, require

MARKUP = "<img src=x onerror=alert(1)>^<script>alert(2)</script>"
CT_NAME, MARKED = "CompressedSamples, CT1", "<script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser():
    """Chromium, as Debian has it."""
    program = require("chromium", "chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missed("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def marked(ct_small, tmp_path):
    """An instance of another study, with markup wherever text may stand."""
    dataset = pydicom.dcmread(ct_small)
    with disable_value_validation():
        dataset.PatientName, dataset.PatientID, dataset.StudyDescription = MARKUP, MARKUP, MARKUP
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(dataset, keyword, generate_uid())
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(tmp_path / "marked.dcm")
    return tmp_path / "marked.dcm"


def test_what_arrives_and_what_goes_wrong_is_shown_without_reloading(browser, root, ct_small, marked):
    """One gateway for all: starting it costs more than everything else."""
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(Gateway(root, settings={"pipeline.quiet_seconds": 0.2}))
        inbox = gateway.root / "inbox"  # cheaper than a program that sends
        shutil.copy(ct_small, inbox)
        context = browser.new_context(viewport={"width": 360, "height": 800})
        stack.callback(context.close)
        page, complaints = context.new_page(), []
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(gateway.url())
        card = page.locator("#studies > .study", has_text=CT_NAME)
        card.get_by_text("published").wait_for()
        card.evaluate("node => { node.marked = true; window.marked = true; }")

        shutil.copy(marked, inbox)
        (inbox / f"{MARKED.replace('/', '')}.txt").write_text("no DICOM")

        newest = page.locator("#studies > .study").first
        newest.get_by_text(MARKED, exact=False).first.wait_for()
        assert (
            newest.locator("h3").inner_text() == "<img src · x onerror · alert(1)>, <script>alert(2)</script>"
        )
        page.locator("#quarantined-list").get_by_text("The file is not DICOM.").wait_for()
        page.locator("#arriving").get_by_text("drop folder").wait_for()
        assert page.evaluate("window.marked")  # the page was not loaded again
        assert card.evaluate("node => node.marked")  # nor was a study drawn anew that had not changed
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

        gateway.kill_part("inbox")
        page.locator("#parts").get_by_text("inbox works, 1 restart").wait_for()
        gateway.stop()
        page.locator("#stale").get_by_text("has not answered since").wait_for()
        thumbnails_and_the_end = ("Failed to load resource: ", "Failed to fetch")
        assert [one for one in complaints if not one.startswith(thumbnails_and_the_end)] == []
