"""What becomes of every real file: admitted by `dicomscp import`, published, and read by others.

    python -m tests.conformance.outcomes ../shared/data > docs/outcomes.md

writes the table anew.  Files that share a SOP Instance UID go each into a root of their own; what is compared
are the documents that stand in the published tree then.
"""

import gzip
import hashlib
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
import pydicom.data
from click.testing import CliRunner
from pydicom.uid import ExplicitVRBigEndian

from dicomscp.cli import cli
from tests.conformance.readings import (
    DAMAGED,
    DCM2JSON,
    PYDICOM,
    differences,
    explanations,
    read_bulk_value,
    read_by_dcm2json,
    read_by_pydicom,
    read_ours,
    split,
    with_bulk_values,
)

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "outcomes.md"

EQUAL, EXPLAINED, WARNED, IN_PART, REFUSED = KINDS = "equal", "explained", "warned", "in part", "refused"
UNEXPLAINED = "UNEXPLAINED"

# Said of every instance, so not of each: the attribute that we add, the elements that JSON leaves out, and
# that our text is UTF-8.
_OF_EVERY_INSTANCE = {"syntax", "D-syntax", "group length", "utf-8", "D-utf-8"}
_READ_BY_NOBODY = {"not read by pydicom", "not read by dcm2json"}
_SETTINGS = {"DICOMSCP_STORAGE__SEGMENT_SIZE": str(2 << 20)}  # many short-lived roots
_POOL = 2


class Outcome(NamedTuple):
    """What became of one file."""

    kind: str
    told: str  # why
    codes: frozenset[str] = frozenset()


class Published(NamedTuple):
    """An instance as it stands in the published tree, and what its study's state document says of it."""

    metadata: dict[str, Any]
    warnings: list[str]


class Case(NamedTuple):
    """A file, and what it came to."""

    path: Path
    refused: str  # why
    published: Published | None
    dcm2json: str


def collection_files(folder: Path) -> list[Path]:
    """The files that the manifest of the collection names."""
    rows = (folder / "MANIFEST.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [folder / row.partition("\t")[0] for row in rows]


def pydicoms_folder() -> Path:
    """Where pydicom's wheel carries files."""
    return Path(pydicom.data.__file__).parent


def pydicoms_files() -> list[Path]:
    """The files of three folders of it that are no text."""
    folders = ("charset_files", "palettes", "test_files")
    found = (path for folder in folders for path in (pydicoms_folder() / folder).rglob("*"))
    return [path for path in found if path.is_file() and path.suffix not in {".txt", ".md", ".json", ".dump"}]


def judged(paths: Iterable[Path], dcm2json: str, scratch: Path) -> dict[Path, Outcome]:
    """What becomes of *paths*; files of the same bytes are taken and read once."""
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in paths}
    uids = {path: sop_uid_of(path) for path in {digest: path for path, digest in digests.items()}.values()}
    layers = layered(uids)
    roots = [Path(tempfile.mkdtemp(dir=scratch)) for _ in layers]
    cases: list[Case] = []
    with ProcessPoolExecutor(_POOL, multiprocessing.get_context("spawn"), logging.disable) as pool:
        for layer, (refused, published) in zip(layers, pool.map(import_layer, layers, roots), strict=True):
            if len(layer) != len(refused) + len(published):
                raise AssertionError(f"{len(layer)} sent, {len(refused)} refused, {len(published)} published")
            for path in layer:
                instance = None if path in refused else published[uids[path]]
                cases.append(Case(path, refused.get(path, ""), instance, dcm2json))
        outcomes = pool.map(outcome_of, cases, chunksize=8)
        by_digest = {digests[case.path]: outcome for case, outcome in zip(cases, outcomes, strict=True)}
    return {path: by_digest[digest] for path, digest in digests.items()}


def layered(uids: Mapping[Path, str]) -> list[list[Path]]:
    """The files in lists such that no two of one share a SOP Instance UID."""
    layers: list[list[Path]] = [[]]
    met: Counter[str] = Counter()
    for path, uid in uids.items():
        if met[uid] == len(layers):
            layers.append([])
        layers[met[uid]].append(path)
        met[uid] += bool(uid)
    return layers


def sop_uid_of(path: Path) -> str:
    """Its SOP Instance UID, or the one its meta information gives; "" if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(path, force=True, specific_tags=["SOPInstanceUID"])
            return str(dataset.get("SOPInstanceUID") or "")
        except Exception:  # noqa: BLE001 -- whatever it is, the meta information may do
            return str(pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPInstanceUID", ""))


def import_layer(paths: Sequence[Path], root: Path) -> tuple[dict[Path, str], dict[str, Published]]:
    """What `dicomscp import` refuses of *paths*, and what stands published after it, by SOP Instance UID."""
    environ = dict.fromkeys(name for name in os.environ if name.startswith("DICOMSCP_")) | _SETTINGS
    command = ["import", "--json", "--root", str(root), *map(str, paths)]
    run = CliRunner().invoke(cli, command, env=environ)
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    report = json.loads(run.stdout)
    refused = {Path(one["path"]): one["reason"] for one in report["refused"]}
    if report["stopped"] or report["admitted"] + len(refused) != len(paths):
        raise AssertionError(run.output)
    return refused, read_tree(root)


def read_tree(root: Path) -> dict[str, Published]:
    """Every instance in the published tree below *root*, by SOP Instance UID."""
    warned: dict[str, list[str]] = defaultdict(list)
    for path in (root / "state").glob("??/*.json"):
        state = json.loads(path.read_bytes())
        if state["warnings_count"] != len(state["warnings"]):
            raise AssertionError(f"{path} does not list all of its warnings")
        for warning in state["warnings"]:
            uid, _, text = warning.partition(": ")
            warned[uid].append(text)
    documents = (root / "dicomweb" / "studies").glob("*/series/*/metadata.gz")
    instances = [one for path in documents for one in json.loads(gzip.decompress(path.read_bytes()))]
    found = {one["00080018"]["Value"][0]: one for one in instances}
    if len(found) != len(instances) or not warned.keys() <= found.keys():
        raise AssertionError("the published tree names an instance twice, or warns of one that it has not")
    return {uid: Published(one, warned[uid]) for uid, one in found.items()}


def outcome_of(case: Case) -> Outcome:
    """Compare what is published with what the others read; of what is refused, what would have been."""
    if case.published is None and not _is_readable(case.path):
        return Outcome(REFUSED, case.refused)
    dataset, syntax = split(case.path.read_bytes())
    if case.published is None:
        ours, warned = read_ours(dataset, syntax), []
    else:
        metadata, warned = case.published
        ours = with_bulk_values(metadata, dataset, syntax, read_bulk_value(dataset, syntax))
    codes, unexplained = _beside_the_others(case, ours, big_endian=syntax == ExplicitVRBigEndian)
    damage = [DAMAGED[case.path.name]] if case.path.name in DAMAGED else []
    told = ", ".join([*damage, *sorted(codes - _OF_EVERY_INSTANCE), *warned])
    if unexplained or codes >= _READ_BY_NOBODY:
        return Outcome(UNEXPLAINED, "; ".join([told, *unexplained]), codes)
    if case.published is None:
        return Outcome(REFUSED, case.refused, codes)
    return Outcome(IN_PART if damage else WARNED if warned else EXPLAINED if told else EQUAL, told, codes)


def _is_readable(path: Path) -> bool:
    """Whether a file that was refused is DICOM by its beginning or its name, and whole."""
    with path.open("rb") as file:
        begins = file.read(132)
    return path.name not in DAMAGED and (begins[128:] == b"DICM" or path.suffix == ".dcm")


def _beside_the_others(
    case: Case, ours: dict[str, Any], *, big_endian: bool
) -> tuple[frozenset[str], list[str]]:
    """What explains the differences, and those that nothing explains."""
    codes: set[str] = set()
    unexplained: list[str] = []
    readings = []
    if case.path.name not in DAMAGED:  # there pydicom reads something else
        readings.append(("pydicom", read_by_pydicom(case.path), PYDICOM))
    with tempfile.TemporaryDirectory() as scratch:
        of_dcm2json = read_by_dcm2json(case.dcm2json, case.path, Path(scratch))
        readings.append(("dcm2json", of_dcm2json, DCM2JSON))
    for program, theirs, deviations in readings:
        if theirs is None:
            codes.add(f"not read by {program}")
            continue
        explaining, rest = explanations(differences(ours, theirs, big_endian=big_endian), deviations)
        codes |= explaining
        unexplained += rest
    return frozenset(codes), unexplained


# --- the document -------------------------------------------------------------------------------------------


def versions(dcm2json: str) -> str:
    """What the table was made with."""
    said = subprocess.run([dcm2json, "--version"], capture_output=True, check=False).stdout.decode()
    dcmtk = re.search(r"v(\d+\.\d+\.\d+)", said)
    return f"pydicom {pydicom.__version__}, DCMTK {dcmtk[1] if dcmtk else 'unknown'}"


def made_with(document: str) -> str:
    """The versions that *document* names."""
    (said,) = re.findall(r"Made by a test, with (.*)\.$", document, re.MULTILINE)
    return str(said)


def head(programs: str) -> str:
    """The document up to the first table."""
    legend = "\n".join(
        f"| {one.code} | {program} | {_cell(one.reason)} |"
        for program, deviations in (("pydicom", PYDICOM), ("dcm2json", DCM2JSON))
        for one in deviations
        if one.code not in _OF_EVERY_INSTANCE
    )
    return f"""# What becomes of real files

Every file of two collections, taken by `dicomscp import` and published with the default settings; each
instance in the published metadata is compared with pydicom's reading of the file, and with DCMTK's
`dcm2json`. Bulk values are compared too, encapsulated pixel data apart. Files that share a SOP Instance UID
went each into a root of their own. Made by a test, with {programs}.

| outcome | meaning |
|---|---|
| equal | published; both others read the same |
| explained | published; one of the others reads something else, for the reasons named |
| warned | published; what cannot be read as it should is named, as in the study's state document |
| in part | published as far as it can be read: the file is damaged |
| refused | not taken, with the sentence that the sender or the operator gets |

Not named, for it holds everywhere: (0008,3002) Available Transfer Syntax UID is added, group lengths are left
out, and a Specific Character Set becomes ISO_IR 192, because JSON is UTF-8.

| reason | who reads otherwise | why ours stands |
|---|---|---|
{legend}
"""


def section(title: str, outcomes: Mapping[str, Outcome]) -> str:
    """The tables of one collection; *outcomes* are by path below its folder."""
    folders = Counter((path.rpartition("/")[0], one.kind) for path, one in outcomes.items())
    kinds = Counter(one.kind for one in outcomes.values())
    counts = [
        (f"`{folder}`", [folders[folder, kind] for kind in KINDS])
        for folder in sorted({folder for folder, _ in folders})
    ]
    counts.append(("all", [kinds[kind] for kind in KINDS]))
    lines = ["", f"## {title}", ""]
    lines += [f"| folder | files | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 2) + "|"]
    lines += [f"| {name} | {sum(n)} | {' | '.join(str(one or '') for one in n)} |" for name, n in counts]
    lines += ["", "| file | outcome | |", "|---|---|---|"]
    lines += [f"| `{path}` | {one.kind} | {_cell(one.told)} |" for path, one in sorted(outcomes.items())]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PYDICOMS_TITLE = "Files that pydicom carries"
COLLECTION_TITLE = "The collection of real files"


def below(folder: Path, outcomes: Mapping[Path, Outcome]) -> dict[str, Outcome]:
    """The outcomes of the files below *folder*, by their path in it."""
    return {
        path.relative_to(folder).as_posix(): outcome
        for path, outcome in outcomes.items()
        if path.is_relative_to(folder)
    }


def main(collection: Path) -> str:
    """The whole document."""
    paths = [*pydicoms_files(), *collection_files(collection)]
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = judged(paths, "dcm2json", Path(scratch))
    return (
        head(versions("dcm2json"))
        + section(PYDICOMS_TITLE, below(pydicoms_folder(), outcomes))
        + section(COLLECTION_TITLE, below(collection, outcomes))
    )


if __name__ == "__main__":
    sys.stdout.write(main(Path(sys.argv[1])))
