"""A real Chromium with OHIF in it: Debian's, driven by playwright.

OHIF tells of success when a viewport stays blank, and not of every request that failed, so nothing counts but
the pixels that its own loader has decoded (`pixels`), and what the page looks like (`screenshot`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.peers import REPOSITORY, find_program

CHROMIUM = "chromium"  # the program, and Debian's package
PACKAGE = REPOSITORY / "tests/viewer/ohif-app-3.13.2.tgz"
FETCH_PACKAGE = "npm pack @ohif/app@3.13.2 --pack-destination tests/viewer"

# Software rendering: there is no graphics card where tests run, and no sandbox for root.
_OPTIONS = [
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
]
# What is told once to everybody who opens the viewer would stand before what a screenshot is taken of.
_GREETINGS = """
  try { localStorage.setItem('shownTours', '["basicViewerTour"]'); } catch { /* a document without any */ }
"""
_SECONDS = 60  # a page takes 4 s on a machine with nothing else to do

_HAS_STUDIES = """(wanted) => {
  const sets = window.services?.displaySetService?.getActiveDisplaySets() ?? [];
  return wanted.every((uid) => sets.some((set) => set.StudyInstanceUID === uid));
}"""
_VIEWPORT = """
  const {activeViewportId} = services.viewportGridService.getState();
  const viewport = window.cornerstone?.getEnabledElements()
    .map((one) => one.viewport).find((one) => one.id === activeViewportId);
"""
_SHOW = (
    "(uid) => {"
    + _VIEWPORT
    + """
  services.viewportGridService.setDisplaySetsForViewports(
    [{viewportId: activeViewportId, displaySetInstanceUIDs: [uid]}]);
}"""
)
_IS_DRAWN = (
    "(study) => {"
    + _VIEWPORT
    + """
  const id = viewport?.getCurrentImageId?.() ?? '';
  const isDrawn = viewport?.viewportStatus === 'rendered' && viewport.getImageData?.();
  return isDrawn && id.includes(`/studies/${study}/`);
}"""
)
# What decides: the arrays that cornerstone draws from, of each frame of the display sets of these studies.
_PIXELS = """async ({studies, whole}) => {
  const [source] = extensionManager.getActiveDataSource();
  const sets = services.displaySetService.getActiveDisplaySets()
    .filter((set) => set.images && studies.includes(set.StudyInstanceUID));
  const encoded = (bytes) => {
    let text = '';
    for (let at = 0; at < bytes.length; at += 8192) {
      text += String.fromCharCode.apply(null, bytes.subarray(at, at + 8192));
    }
    return btoa(text);
  };
  const load = async (id) => {
    const image = await cornerstone.imageLoader.loadAndCacheImage(id);
    const array = image.getPixelData();
    const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
    const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    const sop = id.split('/instances/')[1].split('/')[0];
    return {
      id, sop, type: array.constructor.name, scaled: Boolean(image.preScale?.scaled),
      sha256: Array.from(digest, (one) => one.toString(16).padStart(2, '0')).join(''),
      data: whole.includes(sop) ? encoded(bytes) : '',
    };
  };
  return Promise.all(sets.flatMap((set) => source.getImageIdsForDisplaySet(set)).map(load));
}"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, which must be installed; closed after."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_program(CHROMIUM), args=_OPTIONS)
        yield browser
        browser.close()


def new_context(browser: Browser) -> BrowserContext:
    """Windows of somebody who has opened nothing yet."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.add_init_script(_GREETINGS)
    return context


class Frame(NamedTuple):
    """One frame as cornerstone has it: the address it came from, and its array."""

    id: str
    sop: str
    type: str
    scaled: bool
    sha256: str
    data: str  # base64

    @property
    def place(self) -> tuple[str, int]:
        """The SOP Instance UID and the frame's number."""
        return self.sop, int(self.id.rpartition("/")[2])


class Ohif:
    """A page of OHIF; what went wrong in it is in `complaints`, what it asked for in `requests`."""

    def __init__(self, context: BrowserContext, base: str) -> None:
        """*base* is the address of its study list, with a slash at its end."""
        self.page: Page = context.new_page()
        self.base = base
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("request", lambda one: self.requests.append(one.url))
        self.page.on("response", self._look)
        self.page.on("console", self._listen)

    def open(self, path: str, studies: Sequence[str]) -> None:
        """Open *path* and return once there are display sets of all *studies*."""
        self.page.goto(self.base + path)
        self.page.wait_for_function(_HAS_STUDIES, arg=list(studies), timeout=_SECONDS * 1000)

    def pixels(self, studies: Sequence[str], whole: Sequence[str] = ()) -> dict[tuple[str, int], Frame]:
        """The frames of *studies* by place, as the app decodes them; with the bytes of those *whole*."""
        found = self.page.evaluate(_PIXELS, {"studies": list(studies), "whole": list(whole)})
        return {frame.place: frame for frame in (Frame(**one) for one in found)}

    def show(self, study_uid: str) -> None:
        """Put the display set of a study into the viewport, and return once its image is drawn."""
        self.page.evaluate(_SHOW, self.display_set(study_uid))
        self.page.wait_for_function(_IS_DRAWN, arg=study_uid, timeout=_SECONDS * 1000)

    def show_document(self, study_uid: str) -> str:
        """Put a PDF into the viewport; the address that the browser's own viewer is given."""
        self.page.evaluate(_SHOW, self.display_set(study_uid))
        shown = self.page.wait_for_selector("object[type='application/pdf'][data]", timeout=_SECONDS * 1000)
        assert shown is not None
        return str(shown.get_attribute("data"))

    def display_set(self, study_uid: str) -> str:
        """The UID of the first display set of a study."""
        find = "(uid) => services.displaySetService.getActiveDisplaySets()"
        find += ".find((set) => set.StudyInstanceUID === uid).displaySetInstanceUID"
        return str(self.page.evaluate(find, study_uid))

    def bytes_at(self, address: str) -> bytes:
        """What the page gets at an address of its own, such as `blob:`."""
        script = "async (url) => Array.from(new Uint8Array(await (await fetch(url)).arrayBuffer()))"
        return bytes(self.page.evaluate(script, address))

    def screenshot(self, path: Path) -> None:
        """What the page looks like."""
        self.page.screenshot(path=path)

    def close(self) -> None:
        """Close the page."""
        self.page.close()

    def _failed(self, request: Any) -> None:
        if request.url.startswith("http"):  # the browser's own viewer of PDF goes about its business
            self.complaints.append(f"{request.failure}: {request.url}")

    def _look(self, response: Any) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status}: {response.url}")

    def _listen(self, message: Any) -> None:
        if "Content Security Policy" in message.text:
            self.complaints.append(f"policy: {message.text}")
