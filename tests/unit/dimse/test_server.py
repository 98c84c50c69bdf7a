"""The listener with real sockets: who is let in, what it costs, how it ends."""

import ipaddress
import os
import resource
import socket
import struct
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dicomscp.dimse.query import Answering
from dicomscp.dimse.server import (
    KnownAe,
    ListenerSettings,
    Service,
    admit,
    choose_transfer_syntax,
    negotiate,
    service_of,
)
from dicomscp.dimse.upper_layer import AssociateRequest, ProposedContext
from tests.peers import require
from tests.processes import wait_until
from tests.unit.dimse import wire
from tests.unit.dimse.conftest import Listen
from tests.unit.dimse.held import MemoryArchive, MemoryIncoming, study
from tests.unit.dimse.wire import CT, ECHO, EXPLICIT, IMPLICIT, RELEASE, Wire

JPEG_LOSSLESS, JPEG, BIG = "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.2"
IDLE_ABORT = bytes.fromhex("07000000000400000200")


def test_an_echo_is_answered_and_the_association_released(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(ECHO).status() == (0, "")
        assert peer.send(RELEASE).pdu()[0] == 6
        assert peer.is_closed()
    (ended,) = gateway.logged("association_ended")
    assert (ended["calling_ae"], ended["called_ae"], ended["address"]) == (
        "MODALITY",
        "DICOMSCP",
        "127.0.0.1",
    )
    assert (ended["how"], ended["echoes"], ended["stored"]) == ("released", 1, 0)


def test_an_instance_is_stored_byte_for_byte(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(wire.store(ct_dataset, ct_uid)).status() == (0, "")
    assert gateway.archive.held[ct_uid] == ct_dataset
    assert gateway.archive.sources[0].calling_ae == "MODALITY"
    (ended,) = gateway.logged("association_ended")
    assert (ended["how"], ended["stored"], ended["size"]) == (
        "closed by the peer without release",
        1,
        len(ct_dataset),
    )


def test_bytes_that_come_one_at_a_time_make_the_same_instance(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        request = wire.store(ct_dataset, ct_uid, step=1000)
        for pos in range(600):
            peer.send(request[pos : pos + 1])
        assert peer.send(request[600:]).status() == (0, "")
    assert gateway.archive.held[ct_uid] == ct_dataset


def test_requests_sent_ahead_are_answered_in_order(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send((ECHO + wire.store(ct_dataset, ct_uid)) * 20)
        answers = [int.from_bytes(peer.response()[0][0x0100], "little") for _ in range(40)]
    assert answers == [0x8030, 0x8001] * 20


def test_a_response_to_a_peer_with_tiny_pdus_is_split(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate(max_pdu_bytes=20)
        assert peer.send(ECHO).status() == (0, "")


@pytest.mark.parametrize("field", [0x10, 0x21, 0x140])
def test_an_operation_that_the_context_is_not_for_is_answered_so(listen: Listen, field: int):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.data((1, 3, wire.command(field, CT)), (1, 2, b"identifier")))
        assert peer.status()[0] == 0x0211
        assert peer.send(ECHO).status() == (0, "")


# ── rejections ───────────────────────────────────────────────────────────────────────────────────


def _request(**changes) -> AssociateRequest:
    values = {
        "calling_ae": "MODALITY",
        "called_ae": "DICOMSCP",
        "protocol_version": 1,
        "application_context": "1.2.840.10008.3.1.1.1",
        "contexts": (ProposedContext(1, CT, (EXPLICIT,)),),
        "roles": {},
        "extended": {},
        "implementation": "",
    }
    return AssociateRequest(**(values | changes))


def test_anybody_is_let_in_if_nobody_is_listed():
    ae = admit(_request(called_ae="WHATEVER"), "10.0.0.1", ListenerSettings(open_find=False))
    assert isinstance(ae, KnownAe)
    assert (ae.store, ae.find) == (True, False)


def test_a_called_title_that_is_not_listed_is_rejected():
    settings = ListenerSettings(called_ae_titles=("GATEWAY",))
    assert admit(_request(), "10.0.0.1", settings)[:3] == (1, 1, 7)
    assert isinstance(admit(_request(called_ae="GATEWAY"), "10.0.0.1", settings), KnownAe)


@pytest.mark.parametrize(
    ("calling_ae", "address", "admitted"),
    [
        ("CT1", "10.1.2.3", True),
        ("CT1", "::ffff:10.1.2.3", True),
        ("CT1", "10.2.2.3", False),
        ("CT2", "192.0.2.1", True),
        ("CT2", "fe80::1%eth0", True),
        ("CT3", "10.1.2.3", False),
    ],
)
def test_only_listed_titles_are_let_in_from_their_networks(calling_ae: str, address: str, admitted: bool):
    networks = (ipaddress.ip_network("10.1.0.0/16"),)
    settings = ListenerSettings(known_aes=(KnownAe("CT1", networks), KnownAe("CT2")))
    answer = admit(_request(calling_ae=calling_ae), address, settings)
    assert isinstance(answer, KnownAe) is admitted
    assert admitted or answer[:3] == (1, 1, 3)


def test_a_title_may_be_listed_twice_for_two_networks():
    one, two = (ipaddress.ip_network(network) for network in ("10.1.0.0/16", "10.2.0.0/16"))
    settings = ListenerSettings(known_aes=(KnownAe("CT1", (one,)), KnownAe("CT1", (two,), find=True)))
    assert admit(_request(calling_ae="CT1"), "10.2.0.1", settings) == settings.known_aes[1]


def test_a_rejection_reaches_the_peer_and_the_log(listen: Listen):
    gateway = listen(called_ae_titles=("GATEWAY",))
    with Wire(gateway.port) as peer:
        assert peer.send(wire.request()).pdu() == bytes.fromhex("03000000000400010107")
        assert peer.is_closed()
    (rejected,) = gateway.logged("association_rejected")
    assert rejected["reason"] == "called AE title not recognized"
    assert (rejected["calling_ae"], rejected["address"]) == ("MODALITY", "127.0.0.1")
    assert not gateway.events("association_ended")


def test_one_association_too_many_is_told_to_come_again(listen: Listen):
    gateway = listen(seats=1)
    with Wire(gateway.port) as first, Wire(gateway.port) as second:
        first.associate()
        assert second.send(wire.request()).pdu() == bytes.fromhex("03000000000400020302")
        first.send(RELEASE).pdu()
        with Wire(gateway.port) as third:
            third.associate()


def test_connections_beyond_any_use_are_closed_at_once(listen: Listen):
    gateway = listen(max_associations=1)
    peers = [Wire(gateway.port) for _ in range(80)]
    (refused, *_) = gateway.logged("connection_refused", 80 - 65)
    assert refused["reason"] == "too many connections"
    for peer in peers:
        peer.socket.close()


# ── negotiation ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("proposed", "chosen"),
    [
        ([IMPLICIT, BIG, EXPLICIT], EXPLICIT),
        ([BIG, IMPLICIT], IMPLICIT),
        ([IMPLICIT, JPEG_LOSSLESS], JPEG_LOSSLESS),  # as it probably lies there
        ([JPEG, IMPLICIT], IMPLICIT),  # nobody is made to compress with loss
        ([JPEG], JPEG),
        (["1.2.840.10008.1.2.4.201", JPEG_LOSSLESS], "1.2.840.10008.1.2.4.201"),  # as proposed
        (["1.2.840.10008.1.2.4.999"], "1.2.840.10008.1.2.4.999"),  # the standard's, of tomorrow
        (["1.2.840.113619.5.2"], "1.2.840.113619.5.2"),
        (["1.2.840.10008.1.2.6.2", "1.2.3.4"], ""),
        ([], ""),
    ],
)
def test_the_transfer_syntax_is_our_preference_not_the_requestors_order(proposed: list[str], chosen: str):
    assert choose_transfer_syntax(Service.STORAGE, proposed, ListenerSettings()) == chosen


def test_listed_transfer_syntaxes_are_all_that_is_accepted_in_their_order():
    settings = ListenerSettings(transfer_syntaxes=(IMPLICIT, JPEG))
    assert choose_transfer_syntax(Service.STORAGE, [JPEG, IMPLICIT], settings) == IMPLICIT
    assert choose_transfer_syntax(Service.STORAGE, [EXPLICIT], settings) == ""
    assert choose_transfer_syntax(Service.FIND, [EXPLICIT], settings) == EXPLICIT


@pytest.mark.parametrize(
    ("abstract_syntax", "accepting", "rejecting"),
    [
        ("1.2.840.10008.1.1", Service.VERIFICATION, Service.VERIFICATION),
        (CT, Service.STORAGE, Service.STORAGE),
        ("1.2.840.10008.5.1.4.1.1.6", Service.STORAGE, Service.STORAGE),  # retired
        ("1.2.840.10008.5.1.4.1.1.501.1", Service.STORAGE, Service.STORAGE),  # DICOS
        ("1.2.840.10008.5.1.4.1.2.2.1", Service.FIND, Service.FIND),
        ("1.2.840.10008.5.1.4.1.2.2.2", None, None),  # C-MOVE
        ("1.2.840.10008.5.1.4.31", None, None),  # worklist
        ("1.2.840.10008.5.1.4.38.1", None, None),  # hanging protocol: of no study
        ("1.2.840.10008.5.1.4.1.1.200.1", None, None),
        ("1.2.840.10008.5.1.4.1.1.9999", Service.STORAGE, None),  # the standard's, of tomorrow
        ("1.2.840.10008.9.9", None, None),
        ("1.3.12.2.1107.5.9.1", Service.STORAGE, None),  # Siemens CSA non-image
        ("1.2.826.0.1.5", Service.STORAGE, Service.STORAGE),  # by list
        ("1.2.826.0.1.5.7", Service.STORAGE, Service.STORAGE),
        ("1.2.826.0.1.57", Service.STORAGE, None),
    ],
)
def test_what_a_context_is_for(abstract_syntax: str, accepting: Service | None, rejecting: Service | None):
    private = ("1.2.826.0.1.5",)
    settings = ListenerSettings(private_sop_classes=private)
    assert service_of(abstract_syntax, settings) is accepting
    settings = ListenerSettings(private_sop_classes=private, unknown_sop_classes="reject")
    assert service_of(abstract_syntax, settings) is rejecting


def test_every_storage_class_of_pynetdicom_is_accepted_in_every_transfer_syntax():
    from pynetdicom import ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts

    settings = ListenerSettings(unknown_sop_classes="reject")
    for context in AllStoragePresentationContexts:
        assert service_of(context.abstract_syntax, settings) is Service.STORAGE
    for syntax in ALL_TRANSFER_SYNTAXES:
        live_video = syntax.startswith("1.2.840.10008.1.2.7.")
        assert choose_transfer_syntax(Service.STORAGE, [syntax], settings) == ("" if live_video else syntax)


def test_contexts_are_answered_one_by_one(listen: Listen):
    gateway = listen()
    contexts = [
        (1, CT, [IMPLICIT, EXPLICIT]),
        (3, CT, ["1.2.3"]),
        (5, "1.2.840.10008.5.1.4.31", [IMPLICIT]),
        (7, CT, [JPEG]),
    ]
    with Wire(gateway.port) as peer:
        acceptance = peer.associate(contexts)
    answers = [(item.context_id, item.result) for item in acceptance.presentation_context]
    assert answers == [(1, 0), (3, 4), (5, 3), (7, 0)]
    syntaxes = [item.transfer_syntax for item in acceptance.presentation_context if not item.result]
    assert syntaxes == [EXPLICIT, JPEG]
    assert acceptance.user_information.maximum_length == 131072
    assert (acceptance.reserved_aet, acceptance.reserved_aec) == ("DICOMSCP", "MODALITY")


@pytest.mark.parametrize(
    ("proposed", "result", "answered"),
    [((1, 1), 0, (True, False)), ((1, 0), 0, (True, False)), ((0, 1), 1, None), ((0, 0), 1, None)],
)
def test_the_requestor_is_scu_or_nothing(proposed, result: int, answered):
    roles = {CT: (bool(proposed[0]), bool(proposed[1]))}
    ours = negotiate(_request(roles=roles), ListenerSettings())
    assert ours.answers[0].result == result
    assert ours.roles.get(CT) == answered


def test_roles_and_extended_negotiation_are_answered_on_the_wire(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer:
        acceptance = peer.associate(roles=[(CT, 1, 1)], extended=[(CT, bytes(6))])
    information = acceptance.user_information
    role = information.role_selection[CT]
    assert (role.scu, role.scp) == (1, 0)
    assert [item.app_info for item in information.ext_neg] == [bytes((2, 0, 3, 0, 0, 0))]


# ── limits ───────────────────────────────────────────────────────────────────────────────────────


def test_a_connection_that_asks_for_nothing_is_closed(listen: Listen):
    gateway = listen(accept_seconds=0.2)
    with Wire(gateway.port) as peer:
        assert peer.is_closed()
    (line,) = gateway.logged("connection_without_association")
    assert (line["how"], line["log_level"], line["size"]) == ("silent for too long", "info", 0)


def test_a_request_that_trickles_in_is_cut_off(listen: Listen):
    gateway = listen(accept_seconds=0.3)
    began = time.monotonic()
    with Wire(gateway.port) as peer:
        threading.Thread(target=_trickle, args=(peer.socket, wire.request()), daemon=True).start()
        assert peer.is_closed()
    assert time.monotonic() - began < 5
    assert gateway.logged("connection_without_association")[0]["how"] == "open for too long"


def _trickle(sock: socket.socket, data: bytes) -> None:
    pause = threading.Event()
    try:
        for byte in data:
            sock.sendall(bytes([byte]))
            pause.wait(0.02)
    except OSError:
        pass


def test_a_sender_that_stalls_in_a_dataset_is_aborted_and_nothing_kept(
    listen: Listen, ct_dataset: bytes, ct_uid: str
):
    gateway = listen(idle_seconds=0.2)
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.store(ct_dataset, ct_uid)[:8000])
        assert peer.pdu() == IDLE_ABORT
        assert peer.is_closed()
    (ended,) = gateway.logged("association_ended")
    assert (ended["how"], ended["cut_short"]) == ("silent for too long", True)
    assert gateway.archive.incoming[0].discarded
    assert not gateway.archive.held


def test_an_association_ends_when_its_time_is_over(listen: Listen):
    gateway = listen(association_seconds=0.2)
    with Wire(gateway.port) as peer:
        peer.associate()
        while (answer := peer.send(ECHO).pdu())[0] == 4:
            pass
        assert answer == IDLE_ABORT
    assert gateway.logged("association_ended")[0]["how"] == "open for too long"


def test_an_association_ends_when_its_time_is_over_in_the_middle_of_answers_too(listen: Listen):
    level = b"\x08\x00\x52\x00CS\x06\x00STUDY "
    endless = Answering(1_000_000)
    gateway = listen(MemoryArchive([study()] * 1_000_000), association_seconds=0.2, answering=endless)
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(level))
        while (answer := peer.pdu())[0] == 4:
            pass
        assert answer == IDLE_ABORT
    assert gateway.logged("association_ended")[0]["how"] == "open for too long"


def test_an_abort_after_success_keeps_what_was_acknowledged(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(wire.store(ct_dataset, ct_uid)).status() == (0, "")
        peer.send(bytes.fromhex("07000000000400000000"))
        assert peer.is_closed()
    (ended,) = gateway.logged("association_ended")
    assert ended["how"] == "aborted by the peer (source 0, reason 0)"
    assert list(gateway.archive.held) == [ct_uid]


def test_garbage_in_an_association_is_aborted_and_said(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        assert peer.send(b"GET / HTTP/1.1\r\n\r\n").pdu() == bytes.fromhex("07000000000400000201")
        assert peer.is_closed()
    assert gateway.logged("association_ended")[0]["how"] == "unrecognized PDU type 47"


def test_a_command_that_is_no_request_is_aborted(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.data((3, 3, wire.command(0x8030, wire.VERIFICATION, dataset=False))))
        assert peer.pdu() == bytes.fromhex("07000000000400000000")


def test_a_peer_that_does_not_read_its_answers_is_given_up(listen: Listen):
    level = b"\x08\x00\x52\x00CS\x06\x00STUDY "
    gateway = listen(MemoryArchive([study()] * 100_000), idle_seconds=0.2, answering=Answering(100_000))
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.find(level))
        (ended,) = gateway.logged("association_ended")
    assert ended["how"] == "connection lost: the peer does not read"


def test_a_connection_that_is_reset_is_told_so(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        peer.send(wire.store(ct_dataset, ct_uid)[:8000])
        wait_until(lambda: gateway.archive.incoming, 10, "the dataset to begin")
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    (ended,) = gateway.logged("association_ended")
    assert ended["how"] == "connection lost: Connection reset by peer"
    assert gateway.archive.incoming[0].discarded


def test_an_unforeseen_error_ends_one_association_only(listen: Listen):
    class BadSeats:
        def take(self) -> bool:
            raise ZeroDivisionError

        def release(self) -> None:
            raise AssertionError

    gateway = listen()
    good, gateway.listener.seats = gateway.listener.seats, BadSeats()
    with Wire(gateway.port) as peer:
        assert peer.send(wire.request()).pdu() == bytes.fromhex("07000000000400000000")
        assert peer.is_closed()
    gateway.listener.seats = good
    assert gateway.logged("association_failed")
    with Wire(gateway.port) as peer:
        peer.associate()


def test_a_process_out_of_descriptors_accepts_again_once_it_has_some(listen: Listen):
    gateway = listen()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    with socket.socket() as late:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            with suppress(OSError):
                while True:
                    held.append(os.dup(late.fileno()))
            late.connect(("127.0.0.1", gateway.port))
            assert "Too many open files" in gateway.logged("accept_failed")[0]["reason"]
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        late.sendall(wire.request())
        assert late.recv(1) == b"\2"


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_thousand_port_probes_leave_nothing_behind(listen: Listen):
    gateway = listen()
    socket.create_connection(("127.0.0.1", gateway.port)).close()
    gateway.logged("connection_without_association")
    threads, descriptors = threading.active_count(), _descriptors()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        socket.create_connection(("127.0.0.1", gateway.port)).close()
    lines = gateway.logged("connection_without_association", 1001)
    assert {line["log_level"] for line in lines} == {"info"}
    assert not any("exc_info" in line for line in lines)
    wait_until(lambda: threading.active_count() == threads, 10, "threads")
    wait_until(lambda: _descriptors() == descriptors, 10, "descriptors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000  # KiB


def test_memory_does_not_grow_with_the_instance(listen: Listen):
    class Sink(MemoryIncoming):
        size = 0

        def write(self, data: memoryview) -> None:
            Sink.size += len(data)

    class SinkArchive(MemoryArchive):
        def receive(self, claim, source):
            return Sink(claim, source, None)

        def admit(self, incoming):
            return None

    gateway = listen(SinkArchive())
    with Wire(gateway.port) as peer:
        peer.associate()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peer.send(wire.data((1, 3, wire.command(1, CT, "1.2.3"))))
        chunk = wire.data((1, 0, bytes(131066)))
        for _ in range(2000):
            peer.send(chunk)
        assert peer.send(wire.data((1, 2, b""))).status() == (0, "")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000  # KiB
    assert Sink.size == 2000 * 131066


# ── draining ─────────────────────────────────────────────────────────────────────────────────────


def test_a_drain_lets_an_open_association_finish(listen: Listen, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        gateway.listener.drain(10)
        assert gateway.thread.is_alive()
        assert peer.send(wire.store(ct_dataset, ct_uid)).status() == (0, "")
        assert peer.send(RELEASE).pdu()[0] == 6
    gateway.thread.join(10)
    assert not gateway.thread.is_alive()
    assert gateway.events("drained") == [{"aborted": 0, "left": 0, "event": "drained", "log_level": "info"}]


def test_who_asks_while_the_gateway_stops_is_told_to_come_again(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer, Wire(gateway.port) as late:
        peer.associate()
        wait_until(lambda: len(gateway.listener._open) == 2, 10, "both connections")
        gateway.listener.drain(10)
        assert late.send(wire.request()).pdu() == bytes.fromhex("03000000000400020301")
        peer.send(RELEASE).pdu()


def test_what_does_not_finish_in_time_is_aborted(listen: Listen):
    gateway = listen()
    with Wire(gateway.port) as peer:
        peer.associate()
        gateway.listener.drain(0.1)
        assert peer.pdu() == IDLE_ABORT
        assert peer.is_closed()
    gateway.thread.join(10)
    assert gateway.logged("association_ended")[0]["how"] == "the gateway stops"


# ── foreign peers ────────────────────────────────────────────────────────────────────────────────


def test_dcmtk_echoes(listen: Listen):
    gateway = listen()
    program = require("echoscu", "dcmtk")
    subprocess.run([program, "-aec", "ANY", "127.0.0.1", str(gateway.port)], check=True, timeout=20)
    assert gateway.logged("association_ended")[0]["how"] == "released"


def test_dcmtk_stores_what_we_then_hold(listen: Listen, ct_small: Path, ct_dataset: bytes, ct_uid: str):
    gateway = listen()
    program = require("storescu", "dcmtk")
    subprocess.run([program, "127.0.0.1", str(gateway.port), str(ct_small)], check=True, timeout=20)
    assert len(gateway.archive.held[ct_uid]) > 0.9 * len(ct_dataset)


def test_dcmtk_proposing_everything_is_accepted(listen: Listen, ct_small: Path):
    gateway = listen()
    program = require("storescu", "dcmtk")
    command = [program, "+C", "-R", "-pdu", "131072", "127.0.0.1", str(gateway.port), str(ct_small)]
    subprocess.run(command, check=True, timeout=20)


def test_pynetdicom_stores_and_echoes(listen: Listen, ct_small: Path, ct_uid: str):
    from pydicom import dcmread
    from pynetdicom import AE

    gateway = listen()
    ae = AE("PYNETDICOM")
    ae.add_requested_context(CT, [IMPLICIT, EXPLICIT])
    ae.add_requested_context(wire.VERIFICATION)
    association = ae.associate("127.0.0.1", gateway.port)
    assert association.is_established
    assert association.send_c_echo().Status == 0
    assert association.send_c_store(dcmread(ct_small)).Status == 0
    association.release()
    assert ct_uid in gateway.archive.held
    assert gateway.logged("association_ended")[0]["how"] == "released"
