"""C-STORE: which status is answered to what, over the wire."""

import pytest

from dicomscp.dimse.server import KnownAe
from dicomscp.dimse.storage import comment
from dicomscp.errors import BusyError, DamagedError, MismatchError, RefusedError
from dicomscp.telemetry.metrics import ListenerMetrics
from dicomscp.telemetry.refusals import Refusals, recent
from tests.unit.dimse import wire
from tests.unit.dimse.conftest import Listen
from tests.unit.dimse.held import MemoryArchive
from tests.unit.dimse.wire import CT, ECHO, Wire

CT_UID = "1.3.6.1.4.1.5962.1.1.1.1.1.20040119072730.12322"
MR = "1.2.840.10008.5.1.4.1.1.4"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MismatchError("SOP Class UID of dataset and request differ"), 0xA900),
        (RefusedError("The dataset is cut short"), 0xC000),
        (BusyError("Disk below its reserve; resend later"), 0xA700),
        (DamagedError("The index is damaged"), 0xA700),
    ],
)
@pytest.mark.parametrize("when", ["fault", "admit_fault"])
def test_an_error_family_has_its_status_and_comment(listen: Listen, ct_dataset: bytes, error, status, when):
    archive = MemoryArchive()
    gateway = listen(archive)
    with Wire(gateway.port) as peer:
        peer.associate()
        setattr(archive, when, error)
        assert peer.send(wire.store(ct_dataset, CT_UID)).status() == (status, str(error))
        setattr(archive, when, None)
        assert peer.send(wire.store(ct_dataset, CT_UID)).status() == (0, "")
    (refused,) = gateway.logged("instance_refused")
    assert (refused["status"], refused["reason"]) == (f"{status:04X}", str(error))
    assert (refused["calling_ae"], refused["sop_uid"]) == ("MODALITY", CT_UID)


def test_what_is_refused_is_noted_with_its_reason_and_its_sender(listen: Listen, ct_dataset: bytes, tmp_path):
    archive, noting = MemoryArchive(), Refusals(tmp_path / "listener-0")
    archive.admit_fault = BusyError("Disk below its reserve; resend later")
    gateway = listen(archive, called_ae_titles=("GATEWAY",))
    gateway.listener.metrics = ListenerMetrics(noting)
    with Wire(gateway.port) as peer, Wire(gateway.port) as other:
        peer.associate(called_ae="GATEWAY")
        for _ in range(2):
            peer.send(wire.store(ct_dataset, CT_UID)).status()
        other.send(wire.request(called_ae="ELSEWHERE")).pdu()
        gateway.logged("association_rejected")
    noting.close()

    told = {(one.calling_ae, one.address, one.kind, one.reason, one.times) for one in recent(tmp_path, 10)}

    assert told == {
        ("MODALITY", "127.0.0.1", "busy", "Disk below its reserve; resend later", 2),
        ("MODALITY", "127.0.0.1", "rejected", "called AE title not recognized", 1),
    }


def test_an_unforeseen_error_costs_one_status_and_is_logged(listen: Listen, ct_dataset: bytes, ct_uid: str):
    archive = MemoryArchive()
    archive.admit_fault = ZeroDivisionError("division by zero")
    gateway = listen(archive)
    with Wire(gateway.port) as peer:
        peer.associate()
        status, text = peer.send(wire.store(ct_dataset, ct_uid)).status()
        assert peer.send(ECHO).status() == (0, "")
    assert (status, "division" in text) == (0xA700, False)
    assert gateway.logged("instance_failed")[0]["exc_info"] is archive.admit_fault


def test_a_full_disk_is_answered_at_the_end_of_the_dataset(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen(MemoryArchive(limit=5000))
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.store(ct_dataset, ct_uid, step=1000))
        assert peer.status() == (0xA700, "No space left on device")
        assert peer.send(ECHO).status() == (0, "")
    assert gateway.archive.incoming[0].discarded


@pytest.mark.parametrize(
    ("sop_class_uid", "sop_uid", "status"),
    [(MR, "1.2.3", 0x0122), (CT, "", 0xC000), ("", "1.2.3", 0xC000)],
)
def test_a_command_that_does_not_fit_its_context_or_names_nothing_is_refused(
    listen: Listen, ct_dataset: bytes, sop_class_uid: str, sop_uid: str, status: int
):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(wire.store(ct_dataset, sop_uid, sop_class_uid=sop_class_uid)).status()[0] == status
    assert not gateway.archive.incoming


def test_a_wrong_sop_instance_uid_is_a_mismatch(listen: Listen, ct_dataset: bytes):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(wire.store(ct_dataset, "1.2.3")).status()[0] == 0xA900


def test_a_dataset_cut_short_is_refused(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(wire.store(ct_dataset[:-100], ct_uid)).status()[0] == 0xC000


def test_a_request_without_a_dataset_is_refused(listen: Listen, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.data((1, 3, wire.command(1, CT, ct_uid, dataset=False))))
        assert peer.status()[0] == 0xC000


def test_an_ae_that_may_not_store_is_told_so(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen(known_aes=(KnownAe("MODALITY", store=False),))
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(wire.store(ct_dataset, ct_uid)).status() == (0x0124, "This AE may not store here")
        assert peer.send(ECHO).status() == (0, "")
    assert not gateway.archive.incoming


def test_an_aes_default_character_set_goes_with_its_instances(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen(known_aes=(KnownAe("MODALITY", default_character_set="ISO_IR 100"),))
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(wire.store(ct_dataset, ct_uid)).status() == (0, "")
    assert gateway.archive.sources[0].default_charset == "ISO_IR 100"


def test_an_empty_last_fragment_ends_the_dataset(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        head = wire.data((1, 3, wire.command(1, CT, ct_uid)))
        peer.send(head + wire.data((1, 0, ct_dataset)) + wire.data((1, 2, b"")))
        assert peer.status() == (0, "")
    assert gateway.archive.held[ct_uid] == ct_dataset


def test_command_and_dataset_may_share_a_pdu(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        request = wire.command(1, CT, ct_uid)
        peer.send(
            wire.data(
                (1, 1, request[:50]), (1, 3, request[50:]), (1, 0, ct_dataset[:100]), (1, 2, ct_dataset[100:])
            )
        )
        assert peer.status() == (0, "")
    assert gateway.archive.held[ct_uid] == ct_dataset


@pytest.mark.parametrize("text", ["Straße \\ 7", "x" * 200, "odd", ""])
def test_a_comment_is_even_ascii_without_backslash_of_64_at_most(text: str):
    value = comment(text)
    assert value.isascii()
    assert b"\\" not in value
    assert len(value) <= 64
    assert len(value) % 2 == 0
