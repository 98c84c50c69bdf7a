"""PS3.18 row by row, as chapter 8 of docs/conformance.md has it, and what the code says of the same.

That each test named there is, and that nothing the web server takes or answers is left out, `test_statement`
looks after; that the gateway answers ANSWERS, `test_dicomweb`.
"""

import ast
import functools
import re
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from dicomscp.dicom import dataset
from dicomscp.dicom.matching import STANDARD
from dicomscp.dicom.multipart import OCTET_STREAM, VIDEO_TYPES
from dicomscp.web import capabilities, render, search, wado_uri
from dicomscp.web.media import DICOM, DOCUMENT_TYPES
from dicomscp.web.problem import PROBLEM_TYPE
from tests.conformance.statement import DOCUMENT

WEB = Path(capabilities.__file__).parent
RESOURCE, PARAMETER, FIELD, MEDIA, STATUS = "resource", "parameter", "header field", "media type", "status"
NOT_THERE, NEVER = "not there: ", "never"
COMMON, OTHERS = "All transactions", "What is not there"
SEARCH, RETRIEVE, URI, STORE, CAPABILITIES = (
    "Search (QIDO-RS)",
    "Retrieve (WADO-RS)",
    "Retrieve by URI (WADO-URI)",
    "Store (STOW-RS)",
    "Retrieve Capabilities",
)
ANSWERING = {
    SEARCH: ("search",),
    RETRIEVE: ("studies", "instances", "render"),
    URI: ("wado_uri",),
    STORE: ("store",),
    CAPABILITIES: ("capabilities",),
    COMMON: ("app", "access", "exchange", "problem"),
}
"""The modules of the web server that name statuses, by transaction; some help several."""

_STATUSES = frozenset(status.value for status in HTTPStatus)
_CHAPTER = re.compile(r"^## 8\. .*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_TABLE = re.compile(r"^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", re.MULTILINE)
_SHOWN = re.compile(r"`([\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)")


class Row(NamedTuple):
    """One resource, parameter, header field, media type or status; *tests* with their files."""

    kind: str
    name: str
    clause: str
    done: str
    tests: tuple[tuple[str, str], ...]


def _rows(table: str) -> Iterator[Row]:
    for line in table.splitlines()[2:]:
        kind, name, clause, done, shown = (cell.strip() for cell in line.strip("|").split("|"))
        tests = [
            (file, test) for file, listed in _SHOWN.findall(shown) for test in re.findall(r"\w+", listed)
        ]
        yield Row(kind, name.strip("`"), clause, done, tuple(tests))


(_chapter,) = _CHAPTER.findall(DOCUMENT.read_text(encoding="utf-8"))
TRANSACTIONS = {transaction: tuple(_rows(table)) for transaction, table in _TABLE.findall(_chapter)}


def names(transaction: str, kind: str) -> set[str]:
    """The names in the rows of that kind that are taken or answered."""
    return {
        name
        for row in TRANSACTIONS[transaction]
        if row.kind == kind and not row.done.startswith((NEVER, NOT_THERE))
        for name in row.name.split(", ")
    }


# ── what the code says ───────────────────────────────────────────────────────────────────────────


def parameters() -> dict[str, set[str]]:
    """The parameters that the code reads, by transaction."""
    rendered = {name for names in render.PARAMETERS.values() for name in names}
    return {
        SEARCH: {*search.PARAMETERS, "{attribute}"},
        RETRIEVE: {*rendered, "accept", "transfer-syntax"},
        URI: set(wado_uri.KNOWN),
        STORE: {"accept"},
    }


def media_types() -> dict[str, set[str]]:
    """The media types that the code gives, and takes as bodies and parts, by transaction."""
    methods = capabilities.methods(STANDARD, stores=True)
    found = {
        name: {
            one for method in methods if method.transaction == word for one in (*method.gives, *method.takes)
        }
        for name, word in ((SEARCH, "Search"), (RETRIEVE, "Retrieve"), (STORE, "Store"))
    }
    found[STORE] |= {
        OCTET_STREAM, *dataset._IMAGES, *dataset._DEFAULTS, *dataset.TRANSFORMED, *VIDEO_TYPES
    }  # fmt: skip
    found[CAPABILITIES] = {offer.media_type for offer in capabilities.OFFERS}
    found[URI] = {DICOM, *render.IMAGES, *DOCUMENT_TYPES, *VIDEO_TYPES}
    return found


def statuses(transaction: str) -> set[str]:
    """The statuses that the modules which answer *transaction* name in their code."""
    return {status for name in ANSWERING[transaction] for status in statuses_of(name)}


@functools.cache
def statuses_of(module: str) -> frozenset[str]:
    """The statuses that one module of the web server names."""
    tree = ast.parse((WEB / f"{module}.py").read_text(encoding="utf-8"))
    return frozenset(str(status) for node in ast.walk(tree) for status in _statuses_in(node))


def _statuses_in(node: ast.AST) -> Iterator[int]:
    """Statuses in what is raised as a Problem, in a Response, in a table, or returned."""
    if isinstance(node, ast.Call):
        called = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if called == "Problem":
            yield from _numbers(node.args[0])
        elif called in {"Response", "StreamingResponse", "_json"}:
            for one in (
                *node.args[1:2],
                *(word.value for word in node.keywords if word.arg == "status_code"),
            ):
                yield from _numbers(one)
    elif isinstance(node, ast.Return) and node.value is not None:
        for one in node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]:
            if isinstance(one, ast.Constant | ast.IfExp):
                yield from _numbers(one)
    elif isinstance(node, ast.Assign) and "_STATUS" in {getattr(one, "id", "") for one in node.targets}:
        yield from _numbers(node.value)


def _numbers(node: ast.AST) -> Iterator[int]:
    for one in ast.walk(node):
        if isinstance(one, ast.Constant) and type(one.value) is int and one.value in _STATUSES:
            yield one.value
        elif (
            isinstance(one, ast.Attribute)
            and isinstance(one.value, ast.Name)
            and one.value.id == "HTTPStatus"
        ):
            yield HTTPStatus[one.attr].value


# ── what is asked of the gateway ─────────────────────────────────────────────────────────────────


class Answer(NamedTuple):
    """What is answered to a *request*, a method and an address with names in braces, with header *fields*."""

    request: str
    status: int
    media_type: str = PROBLEM_TYPE
    fields: tuple[str, ...] = ()
    body: str = ""


_STUDY = "GET {base}/studies/{study}"
_SERIES = f"{_STUDY}/series/{{series}}"
_INSTANCE = f"{_SERIES}/instances/{{instance}}"
_PNG_PARTS = ('Accept: multipart/related; type=\\"image/png\\"',)
_LITTLE = "transfer-syntax=1.2.840.10008.1.2.1"
_WADO = "GET /wado?requestType=WADO&studyUID={study}&seriesUID={series}&objectUID={instance}"
_DICOM_JSON, _PART_10 = "application/dicom+json", ("Content-Type: application/dicom",)

ANSWERS = (
    *(
        Answer(row.name, int(row.done.removeprefix(NOT_THERE)[:3]))
        for rows in TRANSACTIONS.values()
        for row in rows
        if row.done.startswith(NOT_THERE)
    ),
    *(
        Answer(f"{of}/rendered", 200, 'multipart/related; type="image/png"', _PNG_PARTS)
        for of in (_STUDY, _SERIES)
    ),
    *(
        Answer(f"{of}/thumbnail", 200, "image/jpeg")
        for of in (_STUDY, _SERIES, _INSTANCE, f"{_INSTANCE}/frames/1")
    ),
    Answer(f"{_INSTANCE}/thumbnail?accept=image/png&viewport=64,64", 200, "image/png"),
    Answer(_WADO, 200, "image/jpeg"),
    Answer(f"{_WADO}&contentType=application/dicom", 200, "application/dicom"),
    Answer(f"{_WADO}&contentType=image/png&charset=utf-8", 200, "image/png"),
    Answer("OPTIONS {base}/", 200, "application/vnd.sun.wadl+xml"),
    Answer("OPTIONS {base}/", 200, "application/json", ("Accept: application/json",)),
    Answer("GET {base}/studies", 200, _DICOM_JSON, ("Accept-Charset: iso-8859-1",)),
    Answer("HEAD {base}/studies", 200, _DICOM_JSON),
    Answer(f"{_STUDY}/metadata", 200, "application/json", ("Accept: application/json",)),
    Answer("GET {bulkdata}", 206, f"application/octet-stream; {_LITTLE}", ("Range: bytes=0-9",)),
    Answer("GET {bulkdata}", 416, PROBLEM_TYPE, ("Range: bytes=9999999-",)),
    Answer("POST {base}/series", 405),
    Answer("PUT {base}/studies", 405),
    Answer(
        "POST {base}/studies?accept=application/dicom%2Bxml",
        200,
        "application/dicom+xml",
        _PART_10,
        "@{file}",
    ),
    Answer("POST {base}/studies/1.2.3", 409, _DICOM_JSON, _PART_10, "@{file}"),
)
