"""A real Chromium with OHIF in it: Debian's, driven by playwright.

OHIF tells of success when a viewport stays blank, and of requests that failed not always, so nothing counts
but the pixels that its own loader has decoded (`pixels`) and what the page looks like (`screenshot`).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Browser, Page

# Software rendering: there is no graphics card where tests run, and no sandbox for root.
OPTIONS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage"]
_SECONDS = 60

# What decides: the array that cornerstone draws from, of each frame of each display set of the studies open.
_PIXELS = """async (wanted) => {
  const [source] = extensionManager.getActiveDataSource();
  const found = [];
  for (const set of services.displaySetService.getActiveDisplaySets()) {
    if (!set.images || !wanted.some((uid) => uid === set.StudyInstanceUID)) continue;
    for (const id of source.getImageIdsForDisplaySet(set)) {
      const image = await cornerstone.imageLoader.loadAndCacheImage(id);
      const array = image.getPixelData();
      const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
      const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
      const lossy = image.imageFrame?.transferSyntax ?? '';
      found.push({
        id, type: array.constructor.name, length: array.length, color: image.color,
        scaled: Boolean(image.preScale?.scaled), rows: image.rows, columns: image.columns,
        sha256: Array.from(digest, (one) => one.toString(16).padStart(2, '0')).join(''),
        data: wanted.includes('data') ? btoa(bytes.reduce((all, one) => all + String.fromCharCode(one), '')) : '',
      });
    }
  }
  return found;
}"""
_HAS_STUDIES = """(wanted) => {
  const sets = window.services?.displaySetService?.getActiveDisplaySets() ?? [];
  return wanted.every((uid) => sets.some((set) => set.StudyInstanceUID === uid));
}"""
_IS_DRAWN = """() => (window.cornerstone?.getEnabledElements() ?? []).some(({viewport}) =>
  !viewport.id.startsWith('renderGPU') && viewport.getImageData?.())"""
_SETS = """() => services.displaySetService.getActiveDisplaySets().map((set) => ({
  uid: set.displaySetInstanceUID, study: set.StudyInstanceUID, modality: set.Modality,
  frames: set.numImageFrames, unsupported: Boolean(set.unsupported)}))"""
_SHOW = """(uid) => {
  const {activeViewportId} = services.viewportGridService.getState();
  services.viewportGridService.setDisplaySetsForViewports(
    [{viewportId: activeViewportId, displaySetInstanceUIDs: [uid]}]);
}"""


class Frame(NamedTuple):
    """One frame as cornerstone has it."""

    id: str
    type: str
    length: int
    color: bool
    scaled: bool
    rows: int
    columns: int
    sha256: str
    data: str

    @property
    def place(self) -> tuple[str, int]:
        """The SOP Instance UID and the frame's number."""
        parts = self.id.split("/")
        return parts[parts.index("instances") + 1], int(parts[-1])


class Viewer:
    """A page of OHIF; what went wrong in it is in `complaints`."""

    def __init__(self, browser: Browser, base: str) -> None:
        """*base* is the address of its study list, with a slash at its end."""
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.context.add_init_script(
            "localStorage.setItem('introductionTourShown', 'true');"
            "localStorage.setItem('investigationalUseDialog', 'hidden');"
        )
        self.page: Page = self.context.new_page()
        self.base = base
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("requestfailed", lambda failed: self.complaints.append(f"failed: {failed.url}"))
        self.page.on("request", lambda asked: self.requests.append(asked.url))
        self.page.on("response", self._look)
        self.page.on("console", self._listen)

    def open(self, path: str, studies: list[str]) -> None:
        """Open *path* and return once the display sets of all *studies* are there and something is drawn."""
        self.page.goto(self.base + path)
        self.page.wait_for_function(_HAS_STUDIES, arg=studies, timeout=_SECONDS * 1000)
        self.page.wait_for_function(_IS_DRAWN, timeout=_SECONDS * 1000)

    def pixels(self, studies: list[str], *, data: bool = False) -> dict[tuple[str, int], Frame]:
        """The frames of *studies* by place, loaded and decoded by the app; with *data*, their bytes too."""
        found = self.page.evaluate(_PIXELS, [*studies, *["data"] * data])
        return {frame.place: frame for frame in (Frame(**one) for one in found)}

    def display_sets(self) -> list[dict[str, Any]]:
        """What there is to be shown."""
        return list(self.page.evaluate(_SETS))

    def show(self, display_set: dict[str, Any]) -> None:
        """Put a display set into the viewport."""
        self.page.evaluate(_SHOW, display_set["uid"])

    def screenshot(self, path: Path) -> None:
        """What the page looks like."""
        self.page.screenshot(path=path)

    def close(self) -> None:
        """Close the page."""
        self.context.close()

    def _look(self, response: Any) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status}: {response.url}")

    def _listen(self, message: Any) -> None:
        if "Content Security Policy" in message.text or "Refused to" in message.text:
            self.complaints.append(f"policy: {message.text}")
