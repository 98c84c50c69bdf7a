"""Compile: how many instances a second become DICOM JSON, read from their files, on one core.

The gateway's compiler beside the loop that everybody writes, pydicom's `dcmread` and `to_json_dict`.  The
compiler begins each round with an empty cache, as for a new study; files lie in the page cache for both.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom

from dicomscp.dicom.identity import PrefixError
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.part10 import read_file_meta
from tests.bench.instances import SIZES, Template, enhanced_file
from tests.bench.report import Report, Target, number

_PREFIX_BYTES = 65536
_PYDICOM_FILES = 30  # it takes about 15 ms for each
_FRAMES = 500


@dataclass(frozen=True, slots=True)
class Options:
    """Which series, how often, and where their files go."""

    directory: Path
    rounds: int
    instances: tuple[int, ...]
    sizes: tuple[str, ...]


def run(options: Options, report: Report) -> None:
    """Measure series of every size and length, and one enhanced multi-frame header."""
    sheet = report.sheet(
        "DICOM JSON from files, instances a second", "series", "dicomscp", "pydicom", "ratio"
    )
    slowest = float("inf")
    for size in options.sizes:
        for count in options.instances:
            folder = options.directory / f"{size.replace(' ', '')}-{count}"
            Template(SIZES[size]).write_series(folder, count)
            ours, theirs = _compare(
                f"{count} instances of {size}", sorted(folder.iterdir()), options.rounds, report
            )
            sheet.rows.append([f"{count} x {size}", number(ours), number(theirs), f"{ours / theirs:.0f}x"])
            slowest = min(slowest, ours)
    enhanced = options.directory / "enhanced.dcm"
    enhanced.write_bytes(enhanced_file(_FRAMES))
    name = f"Enhanced CT, {_FRAMES} functional groups"
    ours, theirs = _compare(name, [enhanced], options.rounds, report)
    sheet.rows.append([name, number(ours), number(theirs), f"{ours / theirs:.0f}x"])
    report.target(Target("metadata compile from files, CT header, the slowest series", slowest, 2000.0, "/s"))


def _compare(name: str, files: Sequence[Path], rounds: int, report: Report) -> tuple[float, float]:
    """The medians of both, taken in turns."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_rate(compile_series, files))
        theirs.append(_rate(_by_pydicom, files[:_PYDICOM_FILES]))
        report.progress(f"{name}: dicomscp {number(ours[-1])}/s, pydicom {number(theirs[-1])}/s")
    report.fact(name, {"dicomscp": ours, "pydicom": theirs})
    return statistics.median(ours), statistics.median(theirs)


def _rate(work: Callable[[Sequence[Path]], bytes], files: Sequence[Path]) -> float:
    gc.collect()
    began = time.perf_counter()
    work(files)
    return len(files) / (time.perf_counter() - began)


def compile_series(files: Sequence[Path]) -> bytes:
    """The series' metadata document, by the gateway's compiler."""
    compiler = Compiler()
    return b"[" + b",".join(_compiled(compiler, path) for path in files) + b"]"


def _compiled(compiler: Compiler, path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        data = file.read(_PREFIX_BYTES)
        whole = file.seek(0, 2)
        try:
            return _header(compiler, data, whole)
        except PrefixError:
            file.seek(0)
            return _header(compiler, file.read(), whole)


def _header(compiler: Compiler, data: bytes, whole: int) -> bytes:
    meta = read_file_meta(data)
    header = compiler.header(
        memoryview(data)[meta.dataset_offset :],
        meta.transfer_syntax_uid,
        total_bytes=whole - meta.dataset_offset,
        bulk_uri="/dicomweb/studies/2.25.1/bulkdata/2.25.2/2.25.3",
    )
    return b"{" + header.body + b"}"


def _by_pydicom(files: Sequence[Path]) -> bytes:
    """The same by the usual loop."""
    return json.dumps(
        [pydicom.dcmread(path, stop_before_pixels=True).to_json_dict() for path in files]
    ).encode()
