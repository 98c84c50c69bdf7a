"""docs/conformance.md says what the code does."""

import re

import pytest

from dicomscp import config
from dicomscp.dicom import matching
from dicomscp.web.search import MOST_REMAINING
from tests.conformance import statement


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


def test_the_tests_that_it_names_are_there(document):
    root = statement.DOCUMENT.parents[1]
    written = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("*/**/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", document))
    assert named
    assert [name for name in sorted(named) if f"def {name}(" not in written] == []
    assert [path for path in re.findall(r"`(tests/[\w/.]+)`", document) if not (root / path).exists()] == []
