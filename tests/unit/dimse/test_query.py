"""C-FIND: what is asked, what is answered, and in which character set."""

import socket
import struct
import subprocess
import threading
from datetime import timedelta
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
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from dicomscp.dicom.matching import Options
from dicomscp.dimse.query import (
    Answering,
    carrier,
    decode_identifier,
    encode_identifier,
    granted,
    options_of,
)
from dicomscp.dimse.server import KnownAe
from dicomscp.errors import BusyError, RefusedError
from tests.peers import require
from tests.unit.dimse import wire
from tests.unit.dimse.conftest import Listen
from tests.unit.dimse.held import MemoryArchive, study
from tests.unit.dimse.wire import EXPLICIT, IMPLICIT, STUDY_FIND, Wire
from tests.unit.web.held import FilledArchive

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


def test_what_is_known_to_match_comes_before_what_may_match(listen: Listen):
    """C.2.2.1.2 has both answered; of many that have no value the one that is sought must not be the last."""
    unknown = [study(f"1.2.{n}") for n in range(9)]
    wanted = study("1.2.99", **{"00080050": ("SH", ["A1"])})
    gateway = listen(MemoryArchive([*unknown, wanted]), answering=Answering(max_results=5))
    with Wire(gateway.port) as peer:
        peer.associate()
        answers = ask(peer, identifier(AccessionNumber="A1", StudyInstanceUID=""))
    uids = [answer.StudyInstanceUID for status, answer in answers if status == 0xFF00]
    assert (uids[0], len(set(uids)), answers[-1][0]) == ("1.2.99", 5, 0xA700)


def test_a_time_zone_that_is_not_known_is_not_sent(listen: Listen):
    """C.4.1.1.3.2."""
    gateway = listen(MemoryArchive([study()]))
    with Wire(gateway.port) as peer:
        peer.associate()
        answers = ask(peer, identifier(PatientName="", TimezoneOffsetFromUTC=""))
    assert [status for status, _ in answers] == [0xFF00, 0]
    assert "TimezoneOffsetFromUTC" not in answers[0][1]


def test_a_value_that_is_refused_is_told_to_whoever_asked_and_to_no_log(listen: Listen):
    gateway = listen(MemoryArchive([study()]))
    with Wire(gateway.port) as peer:
        peer.associate()
        ((status, _),) = ask(peer, identifier(PatientBirthDate="born in may"))
    assert status == 0xA900
    (line,) = gateway.logged("query_answered")
    assert (line["status"], line["offending"]) == ("A900", ["(0010,0030)"])
    assert "may" not in str(line)


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


@pytest.mark.parametrize(
    ("dataset", "tags", "told"),
    [
        (identifier("SERIES", SeriesInstanceUID=""), [0x0020000D], "StudyInstanceUID (0020,000D) must"),
        (identifier("NONSENSE"), [0x00080052], "Query/Retrieve Level"),
        (identifier(StudyDate="yesterday"), [0x00080020], "StudyDate (0008,0020) is a DA"),
        (identifier(Modality="CT", SeriesNumber="1"), [0x00080060, 0x00200011], "Modality (0008,0060)"),
        (identifier(charset="ISO_IR 100", PatientID="1"), [0x00080005], "'ISO_IR 999' is not supported"),
    ],
)
def test_an_identifier_that_does_not_fit_is_told_by_element(listen: Listen, dataset, tags, told: str):
    """PS3.4 table C.4-1: (0000,0901) and (0000,0902)."""
    gateway = listen(MemoryArchive([study()]))
    with Wire(gateway.port) as peer:
        peer.associate()
        encoded = encode(dataset).replace(b"ISO_IR 100", b"ISO_IR 999")
        command, _ = peer.send(wire.find(encoded)).response()
    assert command[0x0900] == b"\x00\xa9"
    assert command[0x0901] == b"".join(struct.pack("<HH", tag >> 16, tag & 0xFFFF) for tag in tags)
    assert told in command[0x0902].decode()


def test_a_request_for_another_sop_class_than_the_context_s_is_refused(listen: Listen):
    """PS3.7 section C.5.6."""
    gateway = listen(MemoryArchive([study()]))
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientID="")), sop_class_uid=PATIENT_FIND))
        assert peer.status() == (0x0122, "The SOP Class is not that of the context")


def test_only_what_was_asked_for_is_answered(listen: Listen):
    """PS3.4 C.4.1.1.3.2."""
    gateway = listen(MemoryArchive([study(**{"00080201": ("SH", ["+0100"])})]))
    with Wire(gateway.port) as peer:
        peer.associate([(5, STUDY_FIND, [EXPLICIT]), (7, PATIENT_FIND, [EXPLICIT])])
        (_, of_study), _ = ask(peer, identifier(PatientName=""))
        (_, of_patient), _ = ask(peer, identifier(PatientID="4711"), context_id=7, sop_class_uid=PATIENT_FIND)
    always = {"QueryRetrieveLevel", "RetrieveAETitle", "InstanceAvailability", "StudyInstanceUID"}
    assert {element.keyword for element in of_study} == always | {"PatientName"}
    assert {element.keyword for element in of_patient} == always | {"PatientID"}


def test_what_is_not_known_matches_unless_configured_otherwise(listen: Listen):
    """PS3.4 C.2.2.1.2."""
    for settings, matches in (({}, 1), ({"answering": Answering(match_unknown=False)}, 0)):
        gateway = listen(MemoryArchive([study()]), **settings)
        with Wire(gateway.port) as peer:
            peer.associate()
            assert len(ask(peer, identifier(AccessionNumber="A1"))) == matches + 1


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


def test_an_index_that_cannot_be_asked_now_is_out_of_resources(listen: Listen):
    class Busy(MemoryArchive):
        def find(self, query, goes_on=lambda: True):
            raise BusyError("The index is being rebuilt; ask again later")

    gateway = listen(Busy())
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientName=""))))
        assert peer.status() == (0xA700, "The index is being rebuilt; ask again later")


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


def test_a_request_that_comes_in_two_parts_before_the_last_answer_waits_for_it(listen: Listen):
    archive = MemoryArchive([study("1.2.1"), study("1.2.2")])
    archive.gate.clear()
    gateway = listen(archive)
    asked = wire.find(encode(identifier(PatientName="")))
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(asked + asked[:-5])
        statuses = [peer.status()[0]]
        peer.send(asked[-5:])
        archive.gate.set()
        statuses += [peer.status()[0] for _ in range(5)]
    assert statuses == [0xFF00, 0xFF00, 0] * 2


def test_a_release_ends_a_query_under_way(listen: Listen):
    archive = MemoryArchive([study(f"1.2.{n}") for n in range(1, 900)])
    gateway = listen(archive)
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientName=""))) + wire.RELEASE)
        while peer.pdu()[0] == 4:
            pass
    assert gateway.logged("association_ended")[0]["how"] == "released"


class Looking(MemoryArchive):
    """Looks for a match in vain, until it is told not to go on or has looked *enough*."""

    def __init__(self):
        super().__init__()
        self.began, self.enough = threading.Event(), threading.Event()

    def find(self, query, goes_on=lambda: True):
        while goes_on() and not self.enough.is_set():
            self.began.set()
        yield from ()


def test_a_cancel_is_heard_while_nothing_matches(listen: Listen):
    looking = Looking()
    gateway, began = listen(looking), looking.began
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientName=""))))
        assert began.wait(10)
        peer.send(wire.data((5, 3, wire.cancel(8))) + wire.data((5, 3, wire.cancel())))
        assert peer.status() == (0xFE00, "")
        began.clear()
        peer.send(wire.find(encode(identifier(PatientName=""))))
        assert began.wait(10)
        peer.send(wire.ECHO + wire.data((5, 3, wire.cancel())))
        assert peer.status() == (0xFE00, "")
        assert peer.status() == (0, "")
        assert peer.send(wire.ECHO).status() == (0, "")


def test_what_is_sent_while_nothing_matches_is_taken_afterwards(
    listen: Listen, ct_dataset: bytes, ct_uid: str
):
    looking = Looking()
    gateway, began, enough = listen(looking), looking.began, looking.enough
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientName=""))))
        assert began.wait(10)
        request = wire.store(ct_dataset, ct_uid)
        peer.send(request[:1000])
        began.clear()
        assert began.wait(10)
        peer.send(request[1000:] + wire.ECHO)
        enough.set()
        assert [peer.status() for _ in range(3)] == [(0, "")] * 3
    assert gateway.archive.held[ct_uid] == ct_dataset


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (wire.RELEASE, "released"),
        (bytes.fromhex("07000000000400000000"), "aborted by the peer (source 0, reason 0)"),
        (wire.pdu(9, bytes(4)), "unrecognized PDU type 09"),
        (b"", "closed by the peer without release"),
    ],
)
def test_an_association_that_ends_ends_its_query_that_nothing_matches(listen: Listen, end: bytes, how: str):
    looking = Looking()
    gateway, began = listen(looking), looking.began
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(encode(identifier(PatientName=""))))
        assert began.wait(10)
        if end:
            peer.send(end)
        else:
            peer.socket.shutdown(socket.SHUT_WR)
        while peer.pdu():
            pass
    assert gateway.logged("association_ended")[0]["how"] == how


# ── extended negotiation, PS3.4 C.5.1.1 ──────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked", "agreed"),
    [
        (b"\1", b"\1"),
        (b"\0", b"\0"),
        (b"\1\1\1\1", b"\1\1\1\1"),
        (b"\0\1\0\1\1", b"\0\1\0\1\0"),
        (b"\1" * 7, b"\1\1\1\1\0\1\1"),
        (b"\1" * 9, b"\1\1\1\1\0\1\1\0\0"),
        (b"\2\xff", b"\0\0"),
    ],
)
def test_what_is_asked_for_is_granted_as_far_as_it_is_done_and_in_the_length_asked(asked, agreed):
    assert granted(asked) == agreed
    assert options_of(agreed) == options_of(agreed + b"\0")


def test_options_go_by_their_place():
    assert options_of(b"\1\0\1") == Options(relational=True, fuzzy=True)
    assert options_of(b"\0\1\0\1\0\1\1") == Options(combined=True, timezone=True, empty=True, multiple=True)
    assert options_of(b"") == Options()


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """An archive with an index of real files."""
    archive = FilledArchive(tmp_path_factory.mktemp("filled"))
    for name in ("CT_small.dcm", "MR_small.dcm", "examples_overlay.dcm", "rtplan.dcm"):
        archive.add_file(name)
    yield archive
    archive.engine.dispose()


@pytest.fixture
def associate(listen: Listen, filled):
    """A function that opens an association of pynetdicom's with these options of an information model."""
    gateway = listen(filled, answering=Answering(local=lambda _: timedelta(hours=1)))
    open_ones = []

    def open_one(asked: bytes | None, model: str = STUDY_FIND) -> Association:
        ae = AE()
        ae.add_requested_context(STUDY_FIND)
        ae.add_requested_context(PATIENT_FIND)
        items = []
        if asked is not None:
            item = SOPClassExtendedNegotiation()
            item.sop_class_uid, item.service_class_application_information = model, asked
            items = [item]
        open_ones.append(ae.associate("127.0.0.1", gateway.port, ext_neg=items))
        assert open_ones[-1].is_established
        return open_ones[-1]

    yield open_one
    for one in open_ones:
        one.release()


def found(association, dataset: Dataset, model: str = STUDY_FIND) -> list[Any]:
    """The answers, and the last status."""
    *answers, (last, none) = association.send_c_find(dataset, model)
    assert none is None
    return [*(answer for _, answer in answers), last.Status]


def test_pynetdicom_negotiates_and_asks_relationally(associate):
    association = associate(b"\1\1\1\1\1\1\1")
    assert association.acceptor.sop_class_extended == {STUDY_FIND: b"\1\1\1\1\0\1\1"}
    asked = identifier("SERIES", Modality="CT", PatientName="", SeriesInstanceUID="")
    series, status = found(association, asked)
    assert (str(series.PatientName), series.Modality, status) == ("CompressedSamples^CT1", "CT", 0)
    # Keys below the level: studies with an instance of so many rows in a series of that modality.
    below = identifier(Modality="CT", Rows=128, StudyInstanceUID="", NumberOfStudyRelatedInstances="")
    answers = found(association, below)
    assert [one.NumberOfStudyRelatedInstances for one in answers[:-1]] == [1]
    assert found(association, identifier(Modality="CT", Rows=64)) == [0]
    # What was agreed for Study Root says nothing of Patient Root.
    assert found(association, asked, PATIENT_FIND) == [0xA900]


def test_patients_are_found_by_what_they_have_below_each_once(associate):
    association = associate(b"\1", PATIENT_FIND)
    asked = identifier(
        "PATIENT", PatientName="", StudyDate="20040101-20041231", NumberOfPatientRelatedStudies=""
    )
    *patients, status = found(association, asked, PATIENT_FIND)
    assert sorted(str(one.PatientName) for one in patients) == [
        "CompressedSamples^CT1",
        "CompressedSamples^MR1",
    ]
    assert {one.NumberOfPatientRelatedStudies for one in patients} == {1}
    assert {element.keyword for element in patients[0]} == {
        "QueryRetrieveLevel", "RetrieveAETitle", "InstanceAvailability",
        "PatientName", "PatientID", "NumberOfPatientRelatedStudies",
    }  # fmt: skip
    assert status == 0


def test_of_patients_without_id_that_one_is_found_whose_name_it_is(
    listen: Listen, tmp_path: Path, ct_small: Path
):
    archive = FilledArchive(tmp_path)
    named = (("Doe^John", "CT"), ("doe^john", "PT"), ("Doe^John=\u5c71^", "MR"))
    for number, (name, modality) in enumerate(named):
        uid = f"1.2.{number}"
        dataset = dcmread(ct_small)
        dataset.SpecificCharacterSet, dataset.PatientName, dataset.Modality = "ISO_IR 192", name, modality
        dataset.PatientID, dataset.StudyDate = "", f"202{number}0101"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid, uid, uid
        archive.add(dataset)
    gateway = listen(archive)
    with Wire(gateway.port) as peer:
        peer.associate([(5, PATIENT_FIND, [wire.EXPLICIT])], extended=[(PATIENT_FIND, b"\1")])
        for modality, name in (("CT", "doe^john"), ("MR", "Doe^John=\u5c71^"), ("PT", "doe^john")):
            asked = identifier("PATIENT", Modality=modality, PatientName="")
            (_, patient), (status, _) = ask(peer, asked, sop_class_uid=PATIENT_FIND)
            assert (str(patient.PatientName), status) == (name, 0)
    archive.engine.dispose()


def test_more_matches_of_keys_below_than_are_allowed_end_in_out_of_resources(listen: Listen, filled):
    gateway = listen(filled, answering=Answering(1))
    with Wire(gateway.port) as peer:
        peer.associate(extended=[(STUDY_FIND, b"\1")])
        answers = ask(peer, identifier(InstanceNumber="1"))
    assert [status for status, _ in answers] == [0xFF00, 0xA700]


def test_without_negotiation_only_the_baseline_is_done(associate):
    association = associate(None)
    assert association.acceptor.sop_class_extended == {}
    assert found(association, identifier("SERIES", Modality="MR")) == [0xA900]
    assert found(association, identifier(PatientName="MR1^CompressedSamples")) == [0]


def test_pynetdicom_asks_fuzzily_by_all_values_and_by_none(associate):
    association = associate(b"\0\0\1\0\0\1\1")
    name, status = found(association, identifier(PatientName="mr1^compresedsamples"))
    assert (str(name.PatientName), status) == ("CompressedSamples^MR1", 0)
    assert found(association, identifier(ModalitiesInStudy=["CT", "MR"]))[-1] == 0
    assert len(found(association, identifier(ModalitiesInStudy=["CT", "MR"]))) == 1
    unknown = found(association, identifier(AccessionNumber='""', PatientName="Comp*"))
    assert len(unknown) == 3
    assert found(association, identifier(PatientName='""')) == [0]


def test_pynetdicom_asks_in_its_time_zone(associate):
    association = associate(b"\0\1\0\1")
    # 07:27:30 of 2004-01-19, five hours west of UTC, as that instance says.
    asked = identifier(StudyDate="20040118", StudyTime="", TimezoneOffsetFromUTC="-1300", PatientName="Comp*")
    study, status = found(association, asked)
    assert (study.StudyDate, study.StudyTime, status) == ("20040118", "232730", 0)
    assert study.TimezoneOffsetFromUTC == "-1300"
    for range_of_times, matches in (("2327-0000", 1), ("2328-0000", 0)):
        asked.StudyDate, asked.StudyTime = "20040118-20040119", range_of_times
        assert len(found(association, asked)) == matches + 1
    # 13:26:45 of 2005-11-30, and the instance says nothing: an hour east of UTC, as the gateway is.
    asked = identifier(StudyDate="20051129", StudyTime="2326", TimezoneOffsetFromUTC="-1300")
    study, status = found(association, asked)
    assert (study.StudyTime, status) == ("232645.921000", 0)


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


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_a_sequence_that_a_device_took_for_text_is_answered_without_a_value(syntax: str):
    odd = {"00400275": ("LO", ["12345"]), "00081030": ("SQ", [{"00100010": {"vr": "PN"}}])}
    decoded = decode_identifier(encode_identifier(study(**odd), syntax, ()), syntax)
    assert decoded[0x00400275] == ("SQ", [])
    assert decoded[0x00081030][1] == []
    assert decoded[0x00100010] == ("PN", ["Doe^John"])


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_answers_are_read_again_as_they_were(syntax: str):
    known = study(
        name=JAPANESE,
        **{
            "00280010": ("US", [512]),
            "00101030": ("DS", [71.5]),
            "00280009": ("AT", ["00181063"]),
            "00189074": ("UV", ["18446744073709551615"]),
            "00189073": ("FD", ["NaN", 0.5]),
            "00400275": ("SQ", [{"00400009": {"vr": "SH", "Value": ["STEP"]}}, {}]),
        },
    )
    encoded = encode_identifier(known, syntax, ())
    decoded = decode_identifier(encoded, syntax)
    assert decoded[0x00080005] == ("CS", ["ISO_IR 192"])
    assert decoded[0x00100010] == ("PN", [JAPANESE])
    assert decoded[0x00280010] == ("US", ["512"])
    assert decoded[0x00280009] == ("AT", ["00181063"])
    if syntax != IMPLICIT:  # where the VR is that of the dictionary
        assert decoded[0x00189074] == ("UV", ["18446744073709551615"])
        assert decoded[0x00189073] == ("FD", ["nan", "0.5"])
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
        ("Hong^Gildong=洪^吉洞=홍^길동", ("", "ISO 2022 IR 149"), ("", "ISO 2022 IR 149")),
        ("Dion=Διον=Διον", ("ISO 2022 IR 100", "ISO 2022 IR 126"), ("ISO 2022 IR 100", "ISO 2022 IR 126")),
        ("Müller^山田", ("", "ISO 2022 IR 87"), ("ISO_IR 192",)),
    ],
)
def test_text_goes_back_in_the_requestors_set_if_that_carries_it(name: str, terms, used):
    assert carrier(name, terms) == used
    encoded = encode_identifier(study(name=name), EXPLICIT, terms)
    assert decode_identifier(encoded, EXPLICIT)[0x00100010] == ("PN", [name])
    read = decode(encoded)
    assert str(read.PatientName) == name


def test_chinese_goes_back_in_its_code_extension():
    """Which pydicom does not read."""
    terms, name = ("", "ISO 2022 IR 58"), "Zhang^XiaoDong=张^小东"
    encoded = encode_identifier(study(name=name), EXPLICIT, terms)
    assert b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab" in encoded
    assert decode_identifier(encoded, EXPLICIT)[0x00100010] == ("PN", [name])


def test_a_code_extension_is_begun_again_on_each_line():
    """PS3.5 section 6.1.2.5.3."""
    comments = "첫째 줄\r\n둘째 줄"
    terms = ("", "ISO 2022 IR 149")
    encoded = encode_identifier({"00104000": {"vr": "LT", "Value": [comments]}}, EXPLICIT, terms)
    assert decode(encoded).PatientComments == comments
    assert decode_identifier(encoded, EXPLICIT)[0x00104000] == ("LT", [comments])


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


def test_dcmtk_cancels_in_the_middle(listen: Listen):
    gateway = listen(MemoryArchive([study(f"1.2.{n}") for n in range(1, 9000)]))
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID"]
    command = [require("findscu", "dcmtk"), "-v", "-S", "--cancel", "3", *keys]
    run = subprocess.run(
        [*command, "127.0.0.1", str(gateway.port)], check=True, timeout=60, capture_output=True, text=True
    )
    said = run.stdout + run.stderr
    assert "Received Final Find Response (Cancel: " in said
    assert said.count("Received Find Response") < 8999
