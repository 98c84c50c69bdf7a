"""Every question of the table, of both backends, by both protocols, from foreign clients.

DCMTK's findscu, pynetdicom and dcmjs-dimse ask by C-FIND, of which pynetdicom alone negotiates;
dicomweb-client asks by QIDO-RS.
"""

import json
import subprocess
from pathlib import Path

import pytest
from dicomweb_client import DICOMwebClient
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from tests.conformance import questions
from tests.conformance.questions import NO_OPTIONS, QUESTIONS, Options, Question, names_of
from tests.gateway import Gateway
from tests.peers import DCMTK, npm_package, require
from tests.processes import wait_until

STUDY_ROOT = "1.2.840.10008.5.1.4.1.2.2.1"
UNIQUE = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
UTF_8 = "ISO_IR 192"
INSTANCES = sum(1 for _ in questions.datasets())


@pytest.fixture(scope="module", params=["SQLite", "PostgreSQL"])
def gateway(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    (folder / "in").mkdir()
    questions.write(folder / "in")
    settings = {}
    if request.param == "PostgreSQL":
        settings["index.url"] = request.getfixturevalue("postgresql").new_database()
    with Gateway(folder / "root", settings=settings) as running:
        storescu = require("storescu", DCMTK)
        to = ["-aec", running.ae_title, "127.0.0.1", str(running.port)]
        subprocess.run([storescu, "+sd", *to, folder / "in"], check=True, timeout=60)
        path = "/dicomweb/instances?limit=100"
        wait_until(lambda: len(running.get_json(path)) == INSTANCES, 30, "all instances to be indexed")
        yield running


# ── clients ──────────────────────────────────────────────────────────────────────────────────────


def identifier(question: Question) -> Dataset:
    """The question as pynetdicom sends it, in UTF-8."""
    made = Dataset()
    made.SpecificCharacterSet = UTF_8
    made.QueryRetrieveLevel = question.level
    for name, value in {UNIQUE[question.level]: "", **question.keys}.items():
        inner = made
        *path, keyword = name.split(".")
        for sequence in path:
            if sequence not in inner:
                setattr(inner, sequence, [Dataset()])
            inner = inner[sequence].value[0]
        values = value.split("\\") if "\\" in value else value
        tag = tag_for_keyword(keyword)
        inner.add(DataElement(tag, dictionary_VR(tag), values, validation_mode=0))
    return made


def pynetdicom(gateway: Gateway, asked: list[Question]) -> list[set[str]]:
    """What pynetdicom finds, which negotiates.

    An association for each question: its reactor may take the answers of one that follows upon another.
    """
    return [ask_pynetdicom(gateway, question) for question in asked]


def ask_pynetdicom(gateway, question):
    ae = AE(ae_title="PYNETDICOM")
    ae.add_requested_context(STUDY_ROOT)
    item = SOPClassExtendedNegotiation()
    item.sop_class_uid = STUDY_ROOT
    item.service_class_application_information = negotiation(question.options)
    association = ae.associate("127.0.0.1", gateway.port, ext_neg=[item])
    assert association.is_established
    uids = []
    for status, answer in association.send_c_find(identifier(question), STUDY_ROOT):
        assert status.Status in (0xFF00, 0xFF01, 0x0000), (question.clause, status)
        if answer is not None:
            uids.append(answer[UNIQUE[question.level]].value)
    association.release()
    assert len(uids) == len(set(uids)), question.clause
    return names_of(uids)


def negotiation(options: Options) -> bytes:
    """PS3.4 C.5.1.1; the fifth byte is about multi-frame conversion."""
    relational, combined, fuzzy, timezone, empty, multiple = map(int, options)
    return bytes([relational, combined, fuzzy, timezone, 0, empty, multiple])


def findscu(gateway: Gateway, asked: list[Question]) -> list[set[str]]:
    """What DCMTK finds."""
    return [ask_findscu(gateway, question) for question in asked]


def ask_findscu(gateway, question):
    keys = {"QueryRetrieveLevel": question.level, "SpecificCharacterSet": UTF_8, UNIQUE[question.level]: ""}
    options = []
    for name, value in (keys | question.keys).items():
        *path, keyword = name.split(".")
        options += ["-k", "".join(f"{sequence}[0]." for sequence in path) + f"{keyword}={value}"]
    to = ["-aec", gateway.ae_title, "127.0.0.1", str(gateway.port)]
    command = [require("findscu", DCMTK), "-S", "--show-responses", *options, *to]
    run = subprocess.run(command, capture_output=True, timeout=30, check=True)
    tag = tag_for_keyword(UNIQUE[question.level])
    start = f"({tag >> 16:04x},{tag & 0xFFFF:04x}) UI [".encode()
    said = (run.stdout + run.stderr).splitlines()
    uids = (line.partition(start)[2].partition(b"]")[0] for line in said if start in line)
    return names_of(uid.strip(b"\0 ").decode() for uid in uids)


def dcmjs(gateway: Gateway, asked: list[Question]) -> list[set[str]]:
    """What dcmjs-dimse finds: all questions by one process."""
    sent = [{"level": one.level, "elements": {UNIQUE[one.level]: "", **elements(one)}} for one in asked]
    script = Path(__file__).with_name("findscu.js")
    run = subprocess.run(
        [require("node", "nodejs"), script, npm_package("dcmjs-dimse"), str(gateway.port), gateway.ae_title],
        input=json.dumps(sent).encode(), capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    answers = json.loads(run.stdout)
    assert all(answer["status"] == 0 for answer in answers)
    return [
        names_of(dataset[UNIQUE[one.level]] for dataset in answer["datasets"])
        for one, answer in zip(asked, answers, strict=True)
    ]


def elements(question):
    made = {}
    for name, value in question.keys.items():
        *path, keyword = name.split(".")
        inner = made
        for sequence in path:
            inner = inner.setdefault(sequence, [{}])[0]
        values = value.split("\\")
        inner[keyword] = values if len(values) > 1 else value
    return made


def dicomweb_client(gateway: Gateway, asked: list[Question]) -> list[set[str]]:
    """What dicomweb-client finds."""
    client = DICOMwebClient(gateway.url("/dicomweb"))
    search = {
        "STUDY": client.search_for_studies,
        "SERIES": client.search_for_series,
        "IMAGE": client.search_for_instances,
    }
    found = []
    for question in asked:
        options = question.options
        params = {"emptyvaluematching": options.empty, "multiplevaluematching": options.multiple}
        objects = search[question.level](
            search_filters=question.keys,
            fuzzymatching=options.fuzzy or None,
            additional_params={name: "true" for name, asked_for in params.items() if asked_for} or None,
        )
        tag = f"{tag_for_keyword(UNIQUE[question.level]):08X}"
        found.append(names_of(one[tag]["Value"][0] for one in objects))
    return found


CLIENTS = {
    "findscu": (findscu, "C-FIND", False),
    "pynetdicom": (pynetdicom, "C-FIND", True),
    "dcmjs-dimse": (dcmjs, "C-FIND", False),
    "dicomweb-client": (dicomweb_client, "QIDO-RS", True),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_found_is_what_the_standard_says(gateway, client):
    ask, protocol, negotiates = CLIENTS[client]
    asked = [
        one for one in QUESTIONS if protocol in one.protocols and (negotiates or one.options == NO_OPTIONS)
    ]
    found = ask(gateway, asked)
    wrong = {
        f"{one.clause}: {one.keys}": (sorted(names), sorted(one.found_by(protocol)))
        for one, names in zip(asked, found, strict=True)
        if names != one.found_by(protocol)
    }
    assert not wrong, "\n".join(
        f"{row}\n    found {is_} not {should}" for row, (is_, should) in wrong.items()
    )
