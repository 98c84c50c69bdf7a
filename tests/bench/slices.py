"""Slices: how long OHIF in Chromium takes, from its first request for data to the pixels of a long CT.

Two moments count: when the slice that is shown is decoded, and when the last one of the series is, for OHIF
loads the whole series behind the one it shows.  Both are of the page's own clock.  What was decoded is then
compared with what was sent, every slice by its SHA-256; a slice that differs ends the benchmark.

Every slice has other pixels, anatomy repeated and noise in five of its bits, so that gzip takes a third off
it, as it does with real ones.  Servers take turns, each with a new context of the browser: nothing is kept
between two openings.  The first opening of all, in which the browser itself wakes up, does not count.
"""

import contextlib
import hashlib
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests import peers
from tests.bench.instances import SIZES, Template, new_study_uid, sop_uid
from tests.bench.report import Report, Target
from tests.bench.store import wait_published
from tests.gateway import Gateway, run_command
from tests.processes import GoneError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_SIZE = SIZES["0.5 MB"]
_NOISE = 32  # values
_RESCALE = -1024  # the intercept of the template
_SECONDS = 120
_AT_MOST = 1.1

# The clock starts with the first request for data, and notes when each image has come to be in the cache.
_WATCH = """
  performance.setResourceTimingBufferSize(5000);
  const came = window.sliceTimes = new Map();
  let library;
  Object.defineProperty(window, 'cornerstone', {
    configurable: true, get: () => library,
    set(value) {
      library = value;
      value.eventTarget.addEventListener('CORNERSTONE_IMAGE_CACHE_IMAGE_ADDED', (event) => {
        const id = event.detail.image.imageId;
        if (id.includes('/frames/')) came.set(id, performance.now());
      });
    },
  });
"""
_ALL_CAME = (
    """(count) => [...window.sliceTimes.keys()].filter((id) => id.includes('/frames/')).length >= count"""
)
_TIMES = """() => {
  const began = Math.min(...performance.getEntriesByType('resource')
    .filter((one) => one.name.includes('/dicomweb/')).map((one) => one.startTime));
  const {activeViewportId} = services.viewportGridService.getState();
  const viewport = cornerstone.getEnabledElements().map((one) => one.viewport)
    .find((one) => one.id === activeViewportId);
  const times = [...window.sliceTimes.values()];
  return {
    shown: window.sliceTimes.get(viewport.getCurrentImageId()) - began,
    last: Math.max(...times) - began,
  };
}"""


class Opening(NamedTuple):
    """Milliseconds from the first request for data."""

    shown: float
    last: float


def run(directory: Path, count: int, rounds: int, report: Report) -> None:
    """Open a series of *count* slices, *rounds* times from each server."""
    try:
        from tests.viewer.browser import CHROMIUM, FETCH_PACKAGE, PACKAGE, chromium
    except ModuleNotFoundError as error:
        report.left_out(f"OHIF: {error}")
        return
    for there, what in (
        (PACKAGE.is_file(), f"its package is not here ({FETCH_PACKAGE})"),
        (peers.find_program(CHROMIUM), f"Chromium is not installed (Debian package {CHROMIUM})"),
        (peers.StaticNginx.installed(), f"nginx is not installed (Debian package {peers.NGINX})"),
    ):
        if not there:
            report.left_out(f"OHIF: {what}")
            return
    with contextlib.ExitStack() as stack:
        study_uid, digests = _made(directory / "slices", count)
        bases = {}
        for name, frames in (("dicomscp", "range"), ("dicomscp, frames as files", "files")):
            root = directory / f"ohif-{frames}"
            _run_command("viewer", "install", PACKAGE, "--root", root)
            _run_command("import", directory / "slices", "--root", root)
            gateway = stack.enter_context(Gateway(root, settings={"publish.frames": frames}))
            wait_published(gateway, [study_uid], count)
            bases[name] = gateway.url("/ohif/")
        nginx = stack.enter_context(peers.StaticNginx(directory / "ohif-nginx", gateway.root))
        bases[nginx.name] = f"http://127.0.0.1:{nginx.port}/ohif/"
        browser = stack.enter_context(chromium())
        _opened(browser, bases[nginx.name], study_uid, digests)
        taken: dict[str, list[Opening]] = {name: [] for name in bases}
        for round_ in range(rounds):
            for name in sorted(bases, reverse=bool(round_ % 2)):
                opening = _opened(browser, bases[name], study_uid, digests)
                taken[name].append(opening)
                told = f"shown after {opening.shown:,.0f} ms, the last after {opening.last:,.0f} ms"
                report.progress(f"round {round_ + 1}: {count} slices in OHIF, {name}: {told}")
    _judge(taken, nginx.name, count, report)


def _run_command(*arguments: object) -> None:
    done = run_command(*arguments)
    if done.returncode:
        raise GoneError(f"dicomscp {arguments[0]}: {done.stderr[-2000:]}")


def _made(folder: Path, count: int) -> tuple[str, dict[str, str]]:
    """Write *count* slices; the study's UID, and the SHA-256 of each one's values by SOP Instance UID."""
    template, study_uid, digests = Template(_SIZE), new_study_uid(), {}
    noise = np.random.default_rng(count)
    folder.mkdir(parents=True)
    for slice_ in range(1, count + 1):
        file = template.file(study_uid, slice_)
        at = len(file) - _SIZE.rows * _SIZE.rows * 2
        pixels = np.frombuffer(file, "<i2", offset=at)
        pixels = np.roll(pixels, slice_) + noise.integers(0, _NOISE, pixels.size, "<i2")
        (folder / f"{slice_:05}.dcm").write_bytes(file[:at] + pixels.tobytes())
        digests[sop_uid(study_uid, slice_)] = hashlib.sha256((pixels + _RESCALE).tobytes()).hexdigest()
    return study_uid, digests


def _opened(browser: "Browser", base: str, study_uid: str, digests: dict[str, str]) -> Opening:
    from tests.viewer.browser import Ohif, new_context

    context = new_context(browser)
    context.add_init_script(_WATCH)
    ohif = Ohif(context, base)
    ohif.open(f"viewer?StudyInstanceUIDs={study_uid}", [study_uid])
    ohif.page.wait_for_function(_ALL_CAME, arg=len(digests), timeout=_SECONDS * 1000, polling=200)
    opening = Opening(**ohif.page.evaluate(_TIMES))
    found = {frame.sop: frame.sha256 for frame in ohif.pixels([study_uid]).values()}
    context.close()
    if found != digests:
        wrong = sum(found.get(one) != digest for one, digest in digests.items())
        raise GoneError(f"{wrong} of {len(digests)} slices are not as they were sent, by {base}")
    return opening


def _judge(taken: dict[str, list[Opening]], bound: str, count: int, report: Report) -> None:
    report.fact("ohif", {name: [one._asdict() for one in found] for name, found in taken.items()})
    sheet = report.sheet(
        f"{count} slices in OHIF, milliseconds from its first request for data", "what", *taken
    )
    for moment, told in (("shown", "the one that is shown"), ("last", "the last one")):
        times = {name: [getattr(one, moment) for one in found] for name, found in taken.items()}
        cells = (f"{statistics.median(one):,.0f} ({min(one):,.0f}-{max(one):,.0f})" for one in times.values())
        sheet.rows.append([told, *cells])
        for name, found in times.items():
            if name != bound:
                ratio = statistics.median(one / two for one, two in zip(found, times[bound], strict=True))
                what = f"{told} of {count} slices in OHIF, {name} to {bound}"
                report.target(Target(what, ratio, _AT_MOST, at_most=True))
