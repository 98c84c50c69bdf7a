"""docs/conformance.md says what the code does."""

import ast
import re

import pytest

from dicomscp import config
from dicomscp.dicom import matching
from dicomscp.dicom.matching import STANDARD
from dicomscp.web import wado_uri
from dicomscp.web.capabilities import methods
from dicomscp.web.search import MOST_REMAINING
from tests.conformance import dicomweb, statement


@pytest.fixture(scope="module")
def document():
    return statement.DOCUMENT.read_text(encoding="utf-8")


def test_its_tables_are_those_of_the_code(document):
    assert {name for _, name, _ in statement.MARKED.findall(document)} == set(statement.TABLES)
    assert statement.rewritten(document) == document, "python -m tests.conformance.statement writes it anew"


def test_it_names_every_parameter_and_bound(document):
    for name in [*matching._FLAGS, "includefield", "limit", "offset", "accept", "charset"]:
        assert f"\n| `{name}` |" in document
    assert f"(default {config.Web().max_results})" in document
    assert f"a number of {MOST_REMAINING} means as many or more" in document


def test_it_names_every_setting_that_bounds_rendering(document):
    for name in ("max_pixels", "memory", "result_max", "seconds", "waiting"):
        assert name in config.Render.model_fields
        assert f"`render.{name}`" in document


def test_it_says_what_is_not_there(document):
    assert "Modality Worklist and Modality Performed Procedure Step are not part of this project" in document


# PS3.18 row by row


def test_every_resource_is_a_row():
    said = {one for name in dicomweb.TRANSACTIONS for one in dicomweb.names(name, dicomweb.RESOURCE)}
    there = {
        f"{one.verb} {{base}}{one.path}"
        for one in methods(STANDARD, stores=True)
        if one.path != "/{bulkdata}"
    }
    assert said == there | {"GET {bulkdata}", f"GET {wado_uri.ADDRESS}", "OPTIONS {base}/"}


def test_every_parameter_is_a_row():
    for transaction, names in dicomweb.parameters().items():
        assert dicomweb.names(transaction, dicomweb.PARAMETER) == names, transaction


def test_every_media_type_is_a_row():
    for transaction, names in dicomweb.media_types().items():
        assert dicomweb.names(transaction, dicomweb.MEDIA) == names, transaction


def test_every_status_that_the_code_names_is_a_row_and_every_row_is_named_by_the_code():
    said = {name: dicomweb.names(name, dicomweb.STATUS) for name in dicomweb.TRANSACTIONS}
    coded = {name: dicomweb.statuses(name) for name in dicomweb.ANSWERING}
    common = said[dicomweb.COMMON]
    for transaction, statuses in coded.items():
        if transaction != dicomweb.COMMON:  # what several call is answered by some of them
            assert statuses - {"200"} <= said[transaction] | common, transaction
    assert set().union(*coded.values()) <= set().union(*said.values())
    assert set().union(*said.values()) <= set().union(*coded.values()) | {"405"}  # which the router answers
    assert set(dicomweb.ANSWERING) | {dicomweb.OTHERS} == set(dicomweb.TRANSACTIONS)


def test_every_module_of_the_web_server_that_answers_is_looked_at():
    ours = {"changes", "page", "viewer"}  # what is not of PS3.18
    looked_at = {name for modules in dicomweb.ANSWERING.values() for name in modules}
    naming = {path.stem for path in dicomweb.WEB.glob("*.py") if dicomweb.statuses_of(path.stem)}
    assert naming - ours <= looked_at


def test_every_row_has_its_clause_and_a_test_that_is_there():
    root = statement.DOCUMENT.parents[1] / "tests"
    defined = {}
    for transaction, rows in dicomweb.TRANSACTIONS.items():
        assert len({(row.kind, row.name) for row in rows}) == len(rows), transaction
        for row in rows:
            assert row.clause
            assert row.tests or row.done.startswith(dicomweb.NEVER), row
            for file, name in row.tests:
                if file not in defined:
                    tree = ast.parse((root / file).read_text(encoding="utf-8"))
                    defined[file] = {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}
                assert name in defined[file], f"{file}::{name}"


def test_what_is_not_there_is_asked_for():
    """By `test_dicomweb`: that it is answered as the rows say."""
    asked = {one.request for one in dicomweb.ANSWERS}
    rows = [row for rows in dicomweb.TRANSACTIONS.values() for row in rows]
    assert {row.name for row in rows if row.done.startswith(dicomweb.NOT_THERE)} <= asked


def test_the_tests_that_it_names_are_there(document):
    root = statement.DOCUMENT.parents[1]
    written = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("*/**/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", document))
    assert named
    assert [name for name in sorted(named) if f"def {name}(" not in written] == []
    assert [path for path in re.findall(r"`(tests/[\w/.]+)`", document) if not (root / path).exists()] == []
