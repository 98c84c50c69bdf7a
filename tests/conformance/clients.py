"""The foreign programs that ask the questions of the table, and what they got, in one form.

DCMTK's findscu, pynetdicom and dcmjs-dimse ask by C-FIND, of which pynetdicom alone negotiates and
dcmjs-dimse writes no character set but UTF-8; dicomweb-client asks by QIDO-RS, and requests what that cannot.
"""

import email.parser
import email.policy
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
import requests
from dicomweb_client import DICOMwebClient
from pydicom.charset import convert_encodings, encode_string
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pynetdicom import AE
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from tests.conformance.questions import MODELS, UNIQUE, Options, Question, Search
from tests.gateway import Gateway
from tests.peers import DCMTK, npm_package, require
from tests.unit.dicom import nativemodel

UNASKED = {"InstanceAvailability", "RetrieveAETitle"}  # no request has them (PS3.4 C.4.1.1.3.2)

Plain = dict[str, Any]
"""Attributes by keyword: text, or a list of several; of sequences a list of such items."""


class Answer(NamedTuple):
    """What came: the last status, those of the responses before, and the objects.

    *offending* are the elements that a C-FIND refuses, or None if the client does not tell.  *problem* and
    *headers* are those of an HTTP response.
    """

    status: int
    objects: list[Plain]
    pending: frozenset[int] = frozenset()
    offending: tuple[str, ...] | None = None
    problem: str = ""
    headers: Mapping[str, str] = {}

    @property
    def warnings(self) -> list[str]:
        return self.headers["Warning"].split(", ") if "Warning" in self.headers else []


def plain(dataset: Dataset) -> Plain:
    return {element.keyword: _plain(element) for element in dataset}


def _plain(element: DataElement) -> Any:
    if element.VR == "SQ":
        return [plain(item) for item in element.value]
    if isinstance(element.value, MultiValue):
        return [str(value) for value in element.value]
    return "" if element.value is None else str(element.value).replace(_GB_2312.decode(), "")


def asked(question: Question) -> dict[str, str]:
    """Every key of a C-FIND by its path: what is matched, and what is only to be returned."""
    unique = [UNIQUE[question.level]] if question.level in UNIQUE else []
    sequences = {path.partition(".")[0] for path in question.keys}
    returned = [keyword for keyword in question.returns if keyword not in sequences | UNASKED]
    return {**dict.fromkeys([*unique, *returned], ""), **question.keys}


# ── C-FIND ───────────────────────────────────────────────────────────────────────────────────────


def pynetdicom(gateway: Gateway, questions: Sequence[Question]) -> Iterator[Answer]:
    """What pynetdicom gets, which negotiates.

    An association for each question: its reactor may take the answers of one that follows upon another.
    """
    for question in questions:
        model = MODELS[question.root]
        association = associate(gateway, model, sub_fields(question.options))
        statuses, objects = [], []
        for status, answer in association.send_c_find(_identifier(question), model, msg_id=7):
            statuses.append(status)
            if answer is not None:
                objects.append(plain(answer))
            if question.cancel and len(objects) == question.cancel:
                association.send_c_cancel(7, query_model=model)
        association.release()
        *pending, last = statuses
        offending = last.get("OffendingElement") or []
        offending = [offending] if isinstance(offending, int) else offending
        yield Answer(
            last.Status,
            objects,
            frozenset(one.Status for one in pending),
            tuple(keyword_for_tag(tag) for tag in offending),
        )


def associate(gateway: Gateway, sop_class_uid: str, negotiated: bytes = b""):
    """An association of pynetdicom's, with these sub-fields for its SOP class."""
    ae = AE(ae_title="PYNETDICOM")
    ae.add_requested_context(sop_class_uid)
    item = SOPClassExtendedNegotiation()
    item.sop_class_uid, item.service_class_application_information = sop_class_uid, negotiated
    return ae.associate("127.0.0.1", gateway.port, ext_neg=[item] if negotiated else [])


def sub_fields(options: Options) -> bytes:
    """PS3.4 table C.5-1; the fifth is about multi-frame conversion."""
    relational, combined, fuzzy, timezone, empty, multiple = map(int, options)
    return bytes([relational, combined, fuzzy, timezone, 0, empty, multiple]) if any(options) else b""


def _identifier(question: Question) -> Dataset:
    made = Dataset()
    if question.charset:
        made.SpecificCharacterSet = question.charset.split("\\")
    made.QueryRetrieveLevel = question.level
    for name, value in asked(question).items():
        inner = made
        *path, keyword = name.split(".")
        for sequence in path:
            if sequence not in inner:
                setattr(inner, sequence, [Dataset()])
            inner = inner[sequence].value[0]
        tag, vr = tag_for_keyword(keyword), dictionary_VR(keyword)
        if vr == "SQ" and value:
            vr = "LO"  # of what is no sequence
        values = [] if vr == "SQ" else value.split("\\") if "\\" in value else value
        inner.add(DataElement(tag, vr, values, validation_mode=0))
    return made


def findscu(gateway: Gateway, questions: Sequence[Question]) -> Iterator[Answer]:
    """What DCMTK gets: what it writes to files, and the statuses that it tells of."""
    for question in questions:
        options = ["-k", f"QueryRetrieveLevel={question.level}"]
        options += ["-k", f"SpecificCharacterSet={question.charset}"] if question.charset else []
        for name, value in asked(question).items():
            key = name.replace(".", "[0].") if "." in name else _tag(name)
            options += ["-k", key.encode() + b"=" + _encoded(value, question.charset) if value else key]
        options += ["--cancel", str(question.cancel)] if question.cancel else []
        with tempfile.TemporaryDirectory() as folder:
            command = [require("findscu", DCMTK), "-d", _MODEL_OPTION[question.root], "-X", "-od", folder]
            to = ["-aec", gateway.ae_title, "127.0.0.1", str(gateway.port)]
            run = subprocess.run([*command, *options, *to], capture_output=True, timeout=60, check=False)
            objects = [plain(pydicom.dcmread(path)) for path in sorted(Path(folder).iterdir())]
        said = (run.stdout + run.stderr).decode(errors="replace")
        statuses = [int(status, 16) for status in _DCMTK_STATUS.findall(said)]
        assert statuses, said
        *pending, last = statuses
        yield Answer(last, objects, frozenset(pending))


def _tag(keyword: str) -> str:
    """As DCMTK takes it, which has other keywords for what is retired."""
    tag = tag_for_keyword(keyword)
    return f"{tag >> 16:04x},{tag & 0xFFFF:04x}"


_MODEL_OPTION = {"PATIENT": "-P", "STUDY": "-S", "PATIENT/STUDY": "-O"}
_DCMTK_STATUS = re.compile(r"DIMSE Status +: 0x([0-9a-f]{4})")


def _encoded(text: str, charset: str) -> bytes:
    """*text* as an SCU writes it: what delimits ends a code extension (PS3.5 section 6.1.2.5.3)."""
    if text.isascii():
        return text.encode()
    encodings = convert_encodings(charset.split("\\"))
    groups = (group.split("^") for group in text.split("="))
    return b"=".join(b"^".join(_extended(part, encodings) for part in group) for group in groups)


def _extended(text: str, encodings: Sequence[str]) -> bytes:
    encoded = encode_string(text, encodings)
    return encoded if text.isascii() or "iso_ir_58" not in encodings else _GB_2312 + encoded


# pydicom writes this escape sequence (PS3.3 table C.12-4) not at all, and leaves it where it reads it.
_GB_2312 = b"\x1b$)A"


def dcmjs(gateway: Gateway, questions: Sequence[Question]) -> Iterator[Answer]:
    """What dcmjs-dimse gets: all questions by one process."""
    sent = [
        {"model": MODELS[one.root], "cancel": one.cancel, "elements": _elements(one)} for one in questions
    ]
    script = Path(__file__).with_name("findscu.js")
    run = subprocess.run(
        [require("node", "nodejs"), script, npm_package("dcmjs-dimse"), str(gateway.port), gateway.ae_title],
        input=json.dumps(sent).encode(), capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    for answer in json.loads(run.stdout):
        objects = [_of_dcmjs(dataset) for dataset in answer["datasets"]]
        yield Answer(answer["status"], objects, frozenset(answer["pending"]))


def _elements(question: Question) -> dict[str, Any]:
    made: dict[str, Any] = {"QueryRetrieveLevel": question.level}
    for name, value in asked(question).items():
        *path, keyword = name.split(".")
        inner = made
        for sequence in path:
            inner = inner.setdefault(sequence, [{}])[0]
        values = value.split("\\")
        is_sequence = dictionary_VR(keyword) == "SQ"
        inner[keyword] = [] if is_sequence else values if len(values) > 1 else value
    return made


def _of_dcmjs(elements: dict[str, Any]) -> Plain:
    return {
        keyword: [_of_dcmjs(item) for item in _listed(value)]
        if dictionary_VR(keyword) == "SQ"
        else _text_of_dcmjs(value)
        for keyword, value in elements.items()
        if tag_for_keyword(keyword)
    }


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _text_of_dcmjs(value: Any) -> Any:
    if isinstance(value, list):
        texts = [_text_of_dcmjs(one) for one in value]
        return texts[0] if len(texts) == 1 else texts or ""
    if isinstance(value, dict):
        return "=".join(value.get(group, "") for group in _GROUPS).rstrip("=")
    return "" if value is None else str(value)


_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


# ── QIDO-RS ──────────────────────────────────────────────────────────────────────────────────────


def dicomweb_client(gateway: Gateway, questions: Sequence[Question]) -> Iterator[Answer]:
    """What dicomweb-client gets."""
    for question in questions:
        options = question.options
        flags = {"emptyvaluematching": options.empty, "multiplevaluematching": options.multiple}
        yield _searched(
            gateway,
            question.level,
            {
                "search_filters": question.keys,
                "fields": sorted(question.returns) or None,
                "fuzzymatching": options.fuzzy or None,
                "additional_params": {name: "true" for name, wanted in flags.items() if wanted} or None,
            },
        )


def dicomweb_search(gateway: Gateway, search: Search) -> Answer:
    """What dicomweb-client gets of one of the resources, with all its parameters or page by page."""
    params: dict[str, list[str]] = {}
    for name, value in search.params:
        params.setdefault(name, []).append(value)
    arguments = {"additional_params": params, "get_remaining": search.page_by_page}
    return _searched(gateway, search.level, arguments, *search.scope)


def _searched(gateway: Gateway, level: str, arguments: dict[str, Any], *scope: str) -> Answer:
    responses: list[requests.Response] = []
    session = requests.Session()
    session.hooks["response"].append(lambda response, **_: responses.append(response))
    client = DICOMwebClient(gateway.url("/dicomweb"), session=session)
    search = {
        "STUDY": client.search_for_studies,
        "SERIES": client.search_for_series,
        "IMAGE": client.search_for_instances,
    }[level]
    try:
        objects = [plain(Dataset.from_json(one)) for one in search(*scope, **arguments)]
    except requests.HTTPError as error:
        return Answer(error.response.status_code, [], problem=error.response.json()["detail"])
    finally:
        session.close()
    return Answer(responses[0].status_code, objects, headers=responses[0].headers)


def requested(gateway: Gateway, search: Search, known: str = "") -> Answer:
    """What comes of a plain HTTP request, by the library requests; *known* is an ETag that we have."""
    headers = {"Accept": search.accept} | ({"If-None-Match": known} if known else {})
    url = gateway.url(f"/dicomweb{search.path}")
    response = requests.get(url, params=search.params, headers=headers, timeout=30)
    if not response.ok:
        return Answer(response.status_code, [], problem=response.json()["detail"])
    objects = [plain(Dataset.from_json(one)) for one in _documents(response)]
    return Answer(response.status_code, objects, headers=response.headers)


def _documents(response: requests.Response) -> list[dict[str, Any]]:
    """The DICOM JSON objects of an answer in whichever media type."""
    content_type = response.headers.get("Content-Type", "")
    if not response.content:
        return []
    if not content_type.startswith("multipart/"):
        return response.json()
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + response.content)
    return [nativemodel.read(part.get_payload(decode=True)) for part in message.iter_parts()]
