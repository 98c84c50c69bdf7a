"""Compile: how many instances a second become DICOM JSON, read from their files, on one core.

The gateway's compiler beside the loop that everybody writes, pydicom's `dcmread` and `to_json_dict`.  The
compiler begins each round with an empty cache, as for a new study; files lie in the page cache for both.
Both are measured in CPU time, which is the time they take on a core of their own.  Static DICOMweb's
`mkdicomweb`, if it is installed, is run once over each series, on all cores; it writes frames as well.
"""

import gc
import json
import shutil
import statistics
import subprocess
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
from tests.peers import find_program

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
        "DICOM JSON from files, instances a second", "series", "dicomscp", "pydicom", "ratio", "mkdicomweb"
    )
    program = find_program("mkdicomweb")
    if program is None:
        report.left_out("mkdicomweb (static-wado) is not installed")
    rates, ratios, beside_static_wado = [], [], []
    for size in options.sizes:
        for count in options.instances:
            folder = options.directory / f"{size.replace(' ', '')}-{count}"
            Template(SIZES[size]).write_series(folder, count)
            name = f"{count} instances of {size}"
            ours, theirs = _compare(name, sorted(folder.iterdir()), options.rounds, report)
            static_wado = None if program is None else _by_mkdicomweb(program, folder, count)
            rates.append(ours)
            ratios.append(ours / theirs)
            if static_wado is not None:
                report.fact(f"{name}, mkdicomweb", static_wado)
                beside_static_wado.append(ours / static_wado)
            sheet.rows.append(_row(f"{count} x {size}", ours, theirs, static_wado))
    enhanced = options.directory / "enhanced.dcm"
    enhanced.write_bytes(enhanced_file(_FRAMES))
    name = f"Enhanced CT, {_FRAMES} functional groups"
    ours, theirs = _compare(name, [enhanced], options.rounds, report)
    sheet.rows.append(_row(name, ours, theirs, None))
    for target in (
        Target("metadata compile from files, CT header, the slowest series", min(rates), 4000.0, "/s"),
        Target("the same beside pydicom's loop, the least", min(ratios), 50.0),
        Target("the same beside mkdicomweb, the least", min(beside_static_wado, default=None), 20.0),
        Target(f"{name}, with an empty cache", 1000 / ours, 50.0, "ms", at_most=True),
    ):
        report.target(target)


def _row(name: str, ours: float, theirs: float, static_wado: float | None) -> list[str]:
    last = "-" if static_wado is None else number(static_wado)
    return [name, number(ours), number(theirs), f"{ours / theirs:.0f}x", last]


def _by_mkdicomweb(program: str, folder: Path, count: int) -> float:
    """Its rate over the *count* files in *folder*, the start of the program included."""
    output = folder.with_name(f"{folder.name}-mkdicomweb")
    began = time.perf_counter()
    subprocess.run(
        [program, "create", "--quiet", "-o", output, folder], check=True, stdout=subprocess.DEVNULL
    )
    rate = count / (time.perf_counter() - began)
    shutil.rmtree(output)
    return rate


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
    began = time.process_time()
    work(files)
    return len(files) / (time.process_time() - began)


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
