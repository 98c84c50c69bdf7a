"""Every row of the table, of both backends, by both protocols, from foreign clients."""

import re
import subprocess

import pytest

from tests.conformance import clients, held
from tests.conformance.clients import Answer
from tests.conformance.questions import (
    AFTER_REBUILD,
    BEFORE_REBUILD,
    CONTEXTS,
    HTTP,
    MODELS,
    NEGOTIATIONS,
    NO_OPTIONS,
    QUESTIONS,
    SEARCH_BEFORE_REBUILD,
    SEARCHES,
    UNIQUE,
    UTF_8,
    Question,
    Search,
)
from tests.gateway import Gateway, run_command
from tests.peers import DCMTK, require
from tests.processes import wait_until

EMPTY_SEARCH = {"SQLite": 200, "PostgreSQL": 204}  # PS3.18 table 10.6.3-1, and as it was until 2025


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
    """A folder of all instances, and how many they are."""
    folder = tmp_path_factory.mktemp("held")
    return folder, held.write(folder)


@pytest.fixture(scope="module", params=EMPTY_SEARCH)
def settings(request):
    settings = {
        "query.max_results": held.MAX_RESULTS,
        "query.timezone": held.TIMEZONE,
        "web.max_results": held.MAX_RESULTS,
        "web.empty_search": EMPTY_SEARCH[request.param],
        **{f"index.extra_keys.{level}": [key] for level, key in held.EXTRA_KEYS.items()},
    }
    if request.param == "PostgreSQL":
        settings["index.url"] = request.getfixturevalue("postgresql").new_database()
    return settings


@pytest.fixture(scope="module")
def gateway(settings, instances, tmp_path_factory):
    with Gateway(tmp_path_factory.mktemp("questions") / "root", settings=settings) as running:
        folder, count = instances
        storescu = require("storescu", DCMTK)
        to = ["-aec", running.ae_title, "127.0.0.1", str(running.port)]
        subprocess.run([storescu, "+sd", *to, folder], check=True, timeout=60)
        wait_until(lambda: _indexed(running) == count, 30, "all instances to be indexed")
        yield running


def _indexed(gateway: Gateway) -> int:
    return sum(one["00201208"]["Value"][0] for one in gateway.get_json("/dicomweb/studies"))


# ── what is wrong with an answer ─────────────────────────────────────────────────────────────────


def wrong_by_c_find(question: Question, answer: Answer):
    if answer.status != question.status:
        yield f"status {answer.status:04X}, not {question.status:04X}"
    if answer.objects and answer.pending != {question.pending}:
        yield f"pending {[f'{one:04X}' for one in answer.pending]}, not {question.pending:04X}"
    if answer.offending is not None and answer.offending != question.offending:
        yield f"offending {answer.offending}, not {question.offending}"
    if question.cancel and not question.cancel <= len(answer.objects) < held.MAX_RESULTS:
        yield f"{len(answer.objects)} answers"
    if question.found is None and not question.cancel and answer.objects:
        yield f"{len(answer.objects)} answers"
    if question.found is not None:
        yield from _wrong_names(question, answer, {*question.found, *question.unknown})
        known = held.names_of(one[UNIQUE[question.level]] for one in answer.objects)[: len(question.found)]
        if set(known) != set(question.found):
            yield f"first {known}, before {question.found}"
    for one in answer.objects:
        if one["QueryRetrieveLevel"] != question.level:
            yield f"level {one['QueryRetrieveLevel']}"
        yield from _wrongly_labelled(question, one)
    yield from _wrong_attributes(question, question.level, answer)


def _wrongly_labelled(question: Question, found: dict):
    said = found.get("SpecificCharacterSet", "")
    said = "\\".join(said) if isinstance(said, list) else said
    if said not in (question.charset, UTF_8, "") or not (said or str(found).isascii()):
        yield f"{said!r} for {found}"
    name = held.names_of([found[UNIQUE[question.level]]])[0]
    if name in question.answers and question.labelled not in (None, said):
        yield f"labelled {said!r}, not {question.labelled!r}: {found}"


def wrong_by_qido_rs(question: Question, answer: Answer, empty: int):
    status = HTTP[question.status]
    if answer.status != (status if answer.objects or status != 200 else empty):
        yield f"status {answer.status}, not {status}"
    if missing := [name for name in question.offending if name not in answer.problem]:
        yield f"{missing} not named in {answer.problem!r}"
    if question.found is not None:
        yield from _wrong_names(question, answer, set(question.found))
    yield from _wrong_attributes(question, question.level, answer)


def wrong_by_search(search: Search, answer: Answer, empty: int):
    expected = empty if search.status == 200 and not search.found else search.status
    if answer.status != expected:
        yield f"status {answer.status}, not {expected}"
    names = tuple(held.names_of(one[UNIQUE[search.level]] for one in answer.objects))
    if names != search.found:
        yield f"found {names}, not {search.found}"
    said = [warning.partition(": ")[2] for warning in answer.warnings]
    if said != list(search.warnings):
        yield f"warned {said}, not {search.warnings}"
    if any(part not in answer.problem for part in search.problem):
        yield f"{search.problem} not named in {answer.problem!r}"
    accepted = dict(search.params).get("accept", search.accept or "application/dicom+json")
    media_type = answer.headers.get("Content-Type", "").partition(";")[0]
    if answer.objects and media_type != accepted.partition(";")[0]:
        yield f"{media_type}, not {accepted}"
    if search.is_streamed != (answer.headers.get("Transfer-Encoding") == "chunked"):
        yield f"headers {answer.headers}"
    if answer.status == 200 and search.is_streamed == ("ETag" in answer.headers):
        yield f"headers {answer.headers}"
    yield from _wrong_attributes(search, search.level, answer)


def _wrong_names(question: Question, answer: Answer, expected: set[str]):
    names = held.names_of(one[UNIQUE[question.level]] for one in answer.objects)
    if sorted(names) != sorted(expected):
        yield f"found {sorted(names)}, not {sorted(expected)}"


def _wrong_attributes(row: Question | Search, level: str, answer: Answer):
    for one in answer.objects:
        name = held.names_of([one[UNIQUE[level]]])[0]
        for keyword, value in row.answers.get(name, {}).items():
            if one.get(keyword) != value:
                yield f"{name}: {keyword} is {one.get(keyword)!r}, not {value!r}"
        if missing := [keyword for keyword in row.has if keyword not in one]:
            yield f"{name} lacks {missing}"
        if found := [keyword for keyword in row.lacks if keyword in one]:
            yield f"{name} has {found}"


def told(wrong: dict[str, list[str]]) -> str:
    return "\n".join(f"{row}\n    {what}" for row, found in wrong.items() for what in found)


# ── asking ───────────────────────────────────────────────────────────────────────────────────────

CLIENTS = {
    "findscu": clients.findscu,
    "pynetdicom": clients.pynetdicom,
    "dcmjs-dimse": clients.dcmjs,
}


def can_ask(client: str, question: Question) -> bool:
    """DCMTK and dcmjs-dimse do not negotiate, and dcmjs-dimse writes UTF-8 alone."""
    if question.clients is not None and client not in question.clients:
        return False
    if client == "dcmjs-dimse" and question.charset != UTF_8:
        return False
    return client == "pynetdicom" or question.options == NO_OPTIONS


CLAUSE = re.compile(r"(PS3\.\d+ )?(table )?([CFK]\.)?\d+(\.\d+)*(-\d+)?|RFC \d+ [0-9.]+")


def test_every_row_has_its_clause_and_somebody_who_asks():
    rows = [*QUESTIONS, *BEFORE_REBUILD, *AFTER_REBUILD, *SEARCHES, SEARCH_BEFORE_REBUILD]
    clauses = [row.clause for row in rows] + [clause for clause, *_ in (*NEGOTIATIONS, *CONTEXTS)]
    assert not [clause for clause in clauses if not CLAUSE.match(clause)]
    assert all(
        any(can_ask(client, row) for client in CLIENTS) for row in QUESTIONS if "C-FIND" in row.protocols
    )


def wrong_of_c_find(gateway, client, questions):
    asked = [one for one in questions if "C-FIND" in one.protocols and can_ask(client, one)]
    return {
        f"{one.clause}: {one.keys}": list(wrong_by_c_find(one, answer))
        for one, answer in zip(asked, CLIENTS[client](gateway, asked), strict=True)
    }


def wrong_of_qido_rs(gateway, questions, empty):
    asked = [one for one in questions if "QIDO-RS" in one.protocols and one.charset == UTF_8]
    return {
        f"{one.clause}: {one.keys}": list(wrong_by_qido_rs(one, answer, empty))
        for one, answer in zip(asked, clients.dicomweb_client(gateway, asked), strict=True)
    }


def wrong_of_searches(gateway, searches, empty):
    wrong = {}
    for search in searches:
        ask = clients.requested if search.accept else clients.dicomweb_search
        answer = ask(gateway, search)
        if search.is_known:
            answer = clients.requested(gateway, search, answer.headers["ETag"])
        wrong[f"{search.clause}: {search.params}"] = list(wrong_by_search(search, answer, empty))
    return wrong


@pytest.mark.parametrize("client", CLIENTS)
def test_what_c_find_answers_is_what_the_standard_says(gateway, client):
    wrong = wrong_of_c_find(gateway, client, QUESTIONS)
    assert not any(wrong.values()), told(wrong)


def test_what_qido_rs_answers_is_what_the_standard_says(gateway, settings):
    wrong = wrong_of_qido_rs(gateway, QUESTIONS, settings["web.empty_search"])
    assert not any(wrong.values()), told(wrong)


def test_what_the_resources_of_qido_rs_answer_is_what_the_standard_says(gateway, settings):
    wrong = wrong_of_searches(gateway, SEARCHES, settings["web.empty_search"])
    assert not any(wrong.values()), told(wrong)


def test_what_is_agreed_is_what_the_standard_has(gateway):
    wrong = {}
    for clause, asked, granted in NEGOTIATIONS:
        association = clients.associate(gateway, MODELS["STUDY"], asked)
        agreed = association.acceptor.sop_class_extended.get(MODELS["STUDY"])
        wrong[clause] = [] if agreed == granted else [f"{agreed}, not {granted}"]
        association.release()
    for clause, sop_class_uid, is_accepted in CONTEXTS:
        association = clients.associate(gateway, sop_class_uid)
        wrong[clause] = [] if bool(association.accepted_contexts) == is_accepted else ["decided otherwise"]
        if association.is_established:
            association.release()
    assert not any(wrong.values()), told(wrong)


def test_dcmtk_is_refused_a_worklist(gateway):
    """K.6.1, as docs/conformance.md declares."""
    to = ["-aec", gateway.ae_title, "127.0.0.1", str(gateway.port)]
    run = subprocess.run(
        [require("findscu", DCMTK), "-W", "-k", "PatientName", *to],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert b"No Acceptable Presentation Contexts" in run.stdout + run.stderr


def test_a_key_that_is_added_is_supported_once_the_index_is_made_anew(gateway, settings):
    """Stands last, for it stops the gateway that the others ask."""
    level = "index.extra_keys.series"
    changed = Gateway(gateway.root, settings=settings | {level: [*settings[level], held.ADDED_KEY]})
    empty = settings["web.empty_search"]
    gateway.stop()
    with changed:
        wrong = wrong_of_c_find(changed, "findscu", BEFORE_REBUILD)
        wrong |= wrong_of_searches(changed, [SEARCH_BEFORE_REBUILD], empty)
    assert not any(wrong.values()), told(wrong)
    rebuilt = run_command("rebuild", "--index", "--root", changed.root, **changed._environ())
    assert rebuilt.returncode == 0, rebuilt.stderr
    with changed:
        wrong = wrong_of_c_find(changed, "findscu", AFTER_REBUILD)
        wrong |= wrong_of_qido_rs(changed, AFTER_REBUILD, empty)
    assert not any(wrong.values()), told(wrong)
