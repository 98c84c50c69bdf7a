"""C-FIND: what is asked, what is answered, and in which character set."""

import subprocess
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import config, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from dicomscp.dimse.query import Answering, carrier, decode_identifier, encode_identifier
from dicomscp.dimse.server import KnownAe
from dicomscp.errors import RefusedError
from tests.peers import require
from tests.unit.dimse import wire
from tests.unit.dimse.conftest import Listen
from tests.unit.dimse.held import MemoryArchive, study
from tests.unit.dimse.wire import EXPLICIT, IMPLICIT, STUDY_FIND, Wire

BIG, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
PATIENT_FIND, PATIENT_STUDY_FIND = "1.2.840.10008.5.1.4.1.2.1.1", "1.2.840.10008.5.1.4.1.2.3.1"
EMPTY_LEVEL = b"\x08\x00\x52\x00CS\x00\x00"
JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"


def identifier(level: str = "STUDY", *, charset: str = "", **keys: Any) -> Dataset:
    dataset = Dataset()
    if charset:
        dataset.SpecificCharacterSet = charset.split("\\")
    dataset.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        tag = tag_for_keyword(keyword)
        dataset.add(DataElement(tag, dictionary_VR(tag), value, validation_mode=config.IGNORE))
    return dataset


def encode(dataset: Dataset, syntax: str = EXPLICIT) -> bytes:
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = syntax == IMPLICIT, syntax != BIG
    write_dataset(file, dataset)
    return file.getvalue()


def decode(encoded: bytes, syntax: str = EXPLICIT) -> Dataset:
    return read_dataset(BytesIO(encoded), syntax == IMPLICIT, syntax != BIG)


def ask(peer: Wire, dataset: Dataset, **kwargs: Any) -> list[tuple[int, Dataset]]:
    peer.send(wire.find(encode(dataset), **kwargs))
    answers = []
    while True:
        command, encoded = peer.response()
        answers.append((int.from_bytes(command[0x0900], "little"), decode(encoded)))
        if not encoded:
            return answers


def test_each_match_is_pending_and_the_last_answer_is_success(listen: Listen):
    gateway = listen(MemoryArchive([study("1.2.3"), study("1.2.4", "Roe^Jane")]))
    with Wire(gateway.port) as peer:
        peer.associate()
        answers = ask(peer, identifier(PatientName="", StudyInstanceUID="", AccessionNumber=""))
    assert [status for status, _ in answers] == [0xFF00, 0xFF00, 0]
    first = answers[0][1]
    assert (str(first.PatientName), first.StudyInstanceUID, first.AccessionNumber) == (
        "Doe^John",
        "1.2.3",
        "",
    )
    assert (first.QueryRetrieveLevel, first.InstanceAvailability) == ("STUDY", "ONLINE")
    assert first["RetrieveAETitle"].is_empty  # nobody retrieves from here by C-MOVE or C-GET
    assert "SpecificCharacterSet" not in first
    assert "PatientSex" not in first
    (line,) = gateway.logged("query_answered")
    assert (line["matches"], line["status"]) == (2, "0000")
    assert "Doe" not in str(line)


def test_keys_match(listen: Listen):
    gateway = listen(MemoryArchive([study("1.2.3"), study("1.2.4", "Roe^Jane")]))
    with Wire(gateway.port) as peer:
        peer.associate()
        answers = ask(
            peer, identifier(PatientName="ROE*", NumberOfStudyRelatedInstances=None, ModalitiesInStudy="")
        )
    assert [status for status, _ in answers] == [0xFF00, 0]
    assert answers[0][1].NumberOfStudyRelatedInstances == 7
    assert list(answers[0][1].ModalitiesInStudy) == ["CT", "MR"]


def test_an_unsupported_key_is_a_warning_and_not_returned(listen: Listen):
    gateway = listen(MemoryArchive([study()]))
    with Wire(gateway.port) as peer:
        peer.associate()
        answers = ask(peer, identifier(PatientName="", RouteOfAdmissions=""))
    assert [status for status, _ in answers] == [0xFF01, 0]
    assert "RouteOfAdmissions" not in answers[0][1]


@pytest.mark.parametrize(
    ("sop_class_uid", "dataset"),
    [
        (STUDY_FIND, identifier("PATIENT", PatientID="")),
        (STUDY_FIND, identifier("NONSENSE")),
        (STUDY_FIND, identifier("SERIES", SeriesInstanceUID="")),
        (PATIENT_FIND, identifier("STUDY", StudyInstanceUID="")),
        (PATIENT_STUDY_FIND, identifier("SERIES", PatientID="1", StudyInstanceUID="1", SeriesInstanceUID="")),
        (STUDY_FIND, identifier(StudyDate="yesterday")),
        (STUDY_FIND, Dataset()),
    ],
)
def test_an_identifier_that_does_not_fit_the_model_is_answered_so(
    listen: Listen, sop_class_uid: str, dataset
):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate([(5, sop_class_uid, [EXPLICIT])])
        peer.send(wire.find(encode(dataset) or EMPTY_LEVEL, sop_class_uid=sop_class_uid))
        status, text = peer.status()
    assert status == 0xA900
    assert text


def test_an_identifier_cut_short_is_answered_so(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(wire.find(encode(identifier(PatientName="Doe"))[:-2])).status()[0] == 0xA900


def test_an_identifier_without_end_is_answered_so(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.data((5, 3, wire.command(0x20, STUDY_FIND))))
        for _ in range(20):
            peer.send(wire.data((5, 0, bytes(100_000))))
        assert peer.send(wire.data((5, 2, b""))).status() == (
            0xA900,
            "The identifier is longer than 1048576 bytes",
        )


def test_more_matches_than_are_allowed_end_in_out_of_resources(listen: Listen):
    gateway = listen(MemoryArchive([study(f"1.2.{n}") for n in range(5)]), answering=Answering(3))
    with Wire(gateway.port) as peer:
        peer.associate()
        answers = ask(peer, identifier(PatientName=""))
    assert [status for status, _ in answers] == [0xFF00] * 3 + [0xA700]


def test_a_failing_archive_is_answered_and_logged(listen: Listen):
    class Failing(MemoryArchive):
        def find(self, query):
            raise ZeroDivisionError

    gateway = listen(Failing())
    with Wire(gateway.port) as peer:
        peer.associate()
        assert [status for status, _ in ask(peer, identifier(PatientName=""))] == [0xC001]
        assert peer.send(wire.ECHO).status() == (0, "")
    assert gateway.logged("query_failed")


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"open_find": False}, 0x0124),
        ({"open_find": False, "known_aes": (KnownAe("MODALITY"),)}, 0x0124),
        ({"open_find": False, "known_aes": (KnownAe("MODALITY", find=True),)}, 0),
        ({"open_find": True, "known_aes": (KnownAe("MODALITY"),)}, 0x0124),
        ({"open_find": True}, 0),
    ],
)
def test_only_those_listed_for_it_may_query_or_on_loopback_anybody_if_none_is_listed(
    listen: Listen, settings: dict[str, Any], status: int
):
    gateway = listen(MemoryArchive([study()]), **settings)
    with Wire(gateway.port) as peer:
        peer.associate()
        answers = ask(peer, identifier(PatientName=""))
    assert answers[-1][0] == status
    assert len(answers) == (1 if status else 2)


# ── cancelling ───────────────────────────────────────────────────────────────────────────────────


def test_a_cancel_stops_the_answers_in_the_middle(listen: Listen):
    archive = MemoryArchive([study(f"1.2.{n}") for n in range(1, 900)])
    archive.gate.clear()
    gateway = listen(archive)
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientName=""))))
        assert peer.status()[0] == 0xFF00
        peer.send(wire.data((5, 3, wire.cancel())))
        threading.Timer(0.1, archive.gate.set).start()
        statuses = []
        while not statuses or statuses[-1] == 0xFF00:
            statuses.append(peer.status()[0])
        assert peer.send(wire.ECHO).status() == (0, "")
    assert statuses[-1] == 0xFE00
    assert len(statuses) < 5
    assert gateway.logged("query_answered")[0]["status"] == "FE00"


def test_a_cancel_of_another_request_or_of_none_changes_nothing(listen: Listen):
    archive = MemoryArchive([study("1.2.1"), study("1.2.2")])
    gateway = listen(archive)
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.data((5, 3, wire.cancel())))
        archive.gate.clear()
        peer.send(wire.find(encode(identifier(PatientName=""))))
        assert peer.status()[0] == 0xFF00
        peer.send(wire.data((5, 3, wire.cancel(8))))
        archive.gate.set()
        assert [peer.status()[0] for _ in range(2)] == [0xFF00, 0]


def test_a_request_before_the_last_answer_waits_for_it(listen: Listen):
    gateway = listen(MemoryArchive([study(f"1.2.{n}") for n in range(1, 50)]))
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientName=""))) + wire.ECHO)
        fields = [int.from_bytes(peer.response()[0][0x0100], "little") for _ in range(51)]
    assert fields == [0x8020] * 50 + [0x8030]


def test_a_release_ends_a_query_under_way(listen: Listen):
    archive = MemoryArchive([study(f"1.2.{n}") for n in range(1, 900)])
    gateway = listen(archive)
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientName=""))) + wire.RELEASE)
        while peer.pdu()[0] == 4:
            pass
    assert gateway.logged("association_ended")[0]["how"] == "released"


# ── encodings and character sets ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
def test_identifiers_are_read_as_pydicom_writes_them(syntax: str):
    dataset = identifier(
        PatientName="Doe^J*", StudyDate="20200101-", StudyInstanceUID=["1.2", "1.3"], Rows=512
    )
    inner = Dataset()
    inner.ScheduledProcedureStepID = "STEP"
    dataset.RequestAttributesSequence = [inner]
    decoded = decode_identifier(encode(dataset, syntax), syntax)
    assert decoded[0x00100010] == ("PN", ["Doe^J*"])
    assert decoded[0x0020000D] == ("UI", ["1.2", "1.3"])
    assert decoded[0x00280010] == ("US", ["512"])
    assert decoded[0x00400275] == ("SQ", [{0x00400009: ("SH", ["STEP"])}])


def test_sequences_of_undefined_length_are_read():
    inner = Dataset()
    inner.ScheduledProcedureStepID = "STEP"
    inner.is_undefined_length_sequence_item = True
    dataset = identifier(RequestAttributesSequence=[inner, inner])
    dataset["RequestAttributesSequence"].is_undefined_length = True
    decoded = decode_identifier(encode(dataset), EXPLICIT)
    assert decoded[0x00400275][1] == [{0x00400009: ("SH", ["STEP"])}] * 2


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_answers_are_read_again_as_they_were(syntax: str):
    known = study(
        name=JAPANESE,
        **{
            "00280010": ("US", [512]),
            "00101030": ("DS", [71.5]),
            "00280009": ("AT", ["00181063"]),
            "00400275": ("SQ", [{"00400009": {"vr": "SH", "Value": ["STEP"]}}, {}]),
        },
    )
    encoded = encode_identifier(known, syntax, ())
    decoded = decode_identifier(encoded, syntax)
    assert decoded[0x00080005] == ("CS", ["ISO_IR 192"])
    assert decoded[0x00100010] == ("PN", [JAPANESE])
    assert decoded[0x00280010] == ("US", ["512"])
    assert decoded[0x00280009] == ("AT", ["00181063"])
    assert decoded[0x00101030] == ("DS", ["71.5"])
    assert decoded[0x00400275] == ("SQ", [{0x00400009: ("SH", ["STEP"])}, {}])


@pytest.mark.parametrize(
    ("name", "terms", "used"),
    [
        ("Doe^John", ("ISO_IR 100",), ()),
        ("Müller^Jörg", (), ("ISO_IR 192",)),
        ("Müller^Jörg", ("ISO_IR 100",), ("ISO_IR 100",)),
        ("Müller^Jörg", ("ISO_IR 144",), ("ISO_IR 192",)),
        ("Люксембург", ("ISO_IR 144",), ("ISO_IR 144",)),
        ("Müller^Jörg", ("GB18030",), ("GB18030",)),
        ("Müller^Jörg", ("NONSENSE",), ("ISO_IR 192",)),
        (JAPANESE, ("", "ISO 2022 IR 87"), ("", "ISO 2022 IR 87")),
        ("Kim^김희중", ("", "ISO 2022 IR 149"), ("", "ISO 2022 IR 149")),
        ("Müller^山田", ("", "ISO 2022 IR 87"), ("ISO_IR 192",)),
    ],
)
def test_text_goes_back_in_the_requestors_set_if_that_carries_it(name: str, terms, used):
    assert carrier(name, terms) == used
    encoded = encode_identifier(study(name=name), EXPLICIT, terms)
    assert decode_identifier(encoded, EXPLICIT)[0x00100010] == ("PN", [name])
    read = decode(encoded)
    assert str(read.PatientName) == name


def test_a_query_in_latin_1_is_answered_in_latin_1(listen: Listen):
    gateway = listen(MemoryArchive([study(name="Müller^Jörg")]))
    with Wire(gateway.port) as peer:
        peer.associate()
        answers = ask(peer, identifier(charset="ISO_IR 100", PatientName="müller*"))
    assert [status for status, _ in answers] == [0xFF00, 0]
    assert answers[0][1].SpecificCharacterSet == "ISO_IR 100"
    assert str(answers[0][1].PatientName) == "Müller^Jörg"


def test_text_that_is_not_of_its_character_set_is_refused():
    encoded = encode(identifier(PatientName="x")).replace(b"x ", b"\xff\xfe")
    with pytest.raises(RefusedError, match="Character Set"):
        decode_identifier(encoded, EXPLICIT)


# ── foreign peers ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", ["-S", "-P"])
def test_dcmtk_finds(listen: Listen, tmp_path: Path, model: str):
    gateway = listen(MemoryArchive([study(name="Müller^Jörg")]))
    command = [require("findscu", "dcmtk"), model, "-X", "-od", str(tmp_path)]
    command += [
        "-k",
        "QueryRetrieveLevel=STUDY",
        "-k",
        "PatientName",
        "-k",
        "PatientID=4711",
        "-k",
        "StudyInstanceUID",
    ]
    subprocess.run([*command, "127.0.0.1", str(gateway.port)], check=True, timeout=20)
    (answer,) = tmp_path.iterdir()
    dataset = dcmread(answer, force=True)
    assert (str(dataset.PatientName), dataset.SpecificCharacterSet) == ("Müller^Jörg", "ISO_IR 192")


def test_pynetdicom_finds_and_cancels(listen: Listen):
    from pynetdicom import AE

    gateway = listen(MemoryArchive([study(f"1.2.{n}") for n in range(1, 500)]))
    ae = AE()
    ae.add_requested_context(STUDY_FIND)
    association = ae.associate("127.0.0.1", gateway.port)
    statuses = []
    for status, answer in association.send_c_find(identifier(PatientName="Doe*"), STUDY_FIND, msg_id=3):
        if not statuses:
            assert str(answer.PatientName) == "Doe^John"
            association.send_c_cancel(3, query_model=STUDY_FIND)
        statuses.append(status.Status)
    association.release()
    assert statuses[-1] == 0xFE00 or (len(statuses) == 500 and statuses[-1] == 0)
