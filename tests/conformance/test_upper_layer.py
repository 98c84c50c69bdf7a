"""PS3.8 section 9, the acceptor's part, as tables."""

import pytest

from dicomscp.dimse.server import KnownAe, ListenerSettings, admit
from dicomscp.dimse.upper_layer import (
    ACCEPTED,
    Aborted,
    Acceptor,
    AssociateRequest,
    ContextAnswer,
    Fact,
    Message,
    Rejection,
    ReleaseRequested,
    State,
    Violation,
)
from tests.unit.dimse import wire
from tests.unit.dimse.wire import CT, ECHO, EXPLICIT, RELEASE

MAX_PDU_BYTES = 4096
REQUEST = wire.request()
ACCEPTANCE, REJECTION = wire.pdu(2, bytes(68)), wire.pdu(3, bytes(4))
RELEASE_REPLY, ABORT = wire.pdu(6, bytes(4)), wire.pdu(7, b"\0\0\2\6")
UNKNOWN = wire.pdu(8, bytes(4))


def acceptor_in(state: State) -> Acceptor:
    acceptor = Acceptor(MAX_PDU_BYTES)
    if state is not State.AWAITING_REQUEST:
        list(acceptor.receive(memoryview(REQUEST)))
    if state in {State.ESTABLISHED, State.AWAITING_RELEASE}:
        answers = [ContextAnswer(context_id, ACCEPTED, CT, EXPLICIT) for context_id in (1, 3)]
        acceptor.accept(answers, roles={}, extended={})
    if state is State.AWAITING_RELEASE:
        list(acceptor.receive(memoryview(RELEASE)))
    assert acceptor.state is state
    return acceptor


def aborts(fact: Fact) -> tuple[int, int]:
    """Source and reason of the A-ABORT that a violation is answered with."""
    assert isinstance(fact, Violation)
    assert fact.reply[:8] == bytes.fromhex("0700000000040000")
    return fact.reply[8], fact.reply[9]


# Table 9-10, events that are PDUs received: the fact told and the next state, or the A-ABORT of AA-1 or AA-8.
AA_1, AA_8, AA_8_UNKNOWN = (0, 0), (2, 2), (2, 1)
TABLE_9_10 = [
    (State.AWAITING_REQUEST, REQUEST, AssociateRequest, State.AWAITING_ANSWER),  # Evt6: AE-6
    (State.AWAITING_REQUEST, ACCEPTANCE, AA_1, State.CLOSING),  # Evt3
    (State.AWAITING_REQUEST, REJECTION, AA_1, State.CLOSING),  # Evt4
    (State.AWAITING_REQUEST, ECHO, AA_1, State.CLOSING),  # Evt10
    (State.AWAITING_REQUEST, RELEASE, AA_1, State.CLOSING),  # Evt12
    (State.AWAITING_REQUEST, RELEASE_REPLY, AA_1, State.CLOSING),  # Evt13
    (State.AWAITING_REQUEST, ABORT, Aborted, State.CLOSING),  # Evt16: AA-2
    (State.AWAITING_REQUEST, UNKNOWN, AA_1, State.CLOSING),  # Evt19
    (State.AWAITING_ANSWER, REQUEST, AA_8, State.CLOSING),
    (State.AWAITING_ANSWER, ECHO, AA_8, State.CLOSING),
    (State.AWAITING_ANSWER, RELEASE, AA_8, State.CLOSING),
    (State.AWAITING_ANSWER, ABORT, Aborted, State.CLOSING),  # AA-3
    (State.AWAITING_ANSWER, UNKNOWN, AA_8_UNKNOWN, State.CLOSING),
    (State.ESTABLISHED, REQUEST, AA_8, State.CLOSING),
    (State.ESTABLISHED, ACCEPTANCE, AA_8, State.CLOSING),
    (State.ESTABLISHED, REJECTION, AA_8, State.CLOSING),
    (State.ESTABLISHED, ECHO, Message, State.ESTABLISHED),  # DT-2
    (State.ESTABLISHED, RELEASE, ReleaseRequested, State.AWAITING_RELEASE),  # AR-2
    (State.ESTABLISHED, RELEASE_REPLY, AA_8, State.CLOSING),
    (State.ESTABLISHED, ABORT, Aborted, State.CLOSING),  # AA-3
    (State.ESTABLISHED, UNKNOWN, AA_8_UNKNOWN, State.CLOSING),
    (State.AWAITING_RELEASE, REQUEST, AA_8, State.CLOSING),
    (State.AWAITING_RELEASE, ECHO, AA_8, State.CLOSING),
    (State.AWAITING_RELEASE, RELEASE, AA_8, State.CLOSING),
    (State.AWAITING_RELEASE, ABORT, Aborted, State.CLOSING),  # AA-3
    (State.AWAITING_RELEASE, UNKNOWN, AA_8_UNKNOWN, State.CLOSING),
]


@pytest.mark.parametrize(("state", "pdu", "fact", "after"), TABLE_9_10)
def test_each_pdu_has_its_action_in_each_state(state: State, pdu: bytes, fact, after: State):
    """PS3.8 table 9-10."""
    acceptor = acceptor_in(state)
    (told,) = acceptor.receive(memoryview(pdu))
    assert acceptor.state is after
    if isinstance(fact, tuple):
        assert aborts(told) == fact
    else:
        assert isinstance(told, fact)


@pytest.mark.parametrize("pdu", [REQUEST, ECHO, RELEASE, ABORT, UNKNOWN, b"noise"])
def test_in_sta13_all_is_dropped(pdu: bytes):
    """PS3.8 table 9-10, AA-6 and AR-5 on."""
    acceptor = acceptor_in(State.AWAITING_ANSWER)
    acceptor.reject(Rejection(1, 1, 1, "no reason"))
    assert list(acceptor.receive(memoryview(pdu))) == []


@pytest.mark.parametrize(
    ("answer", "encoded", "after"),
    [
        (
            lambda acceptor: acceptor.reject(Rejection(2, 3, 1, "")),
            "03000000000400020301",
            State.CLOSING,
        ),  # AE-8
        (lambda acceptor: acceptor.abort(0), "07000000000400000000", State.CLOSING),  # AA-1
        (lambda acceptor: acceptor.abort(2, 6), "07000000000400000206", State.CLOSING),  # AA-8
    ],
)
def test_our_answers_are_encoded_as_the_tables_say(answer, encoded: str, after: State):
    """PS3.8 tables 9-21, 9-26."""
    acceptor = acceptor_in(State.AWAITING_ANSWER)
    assert answer(acceptor) == bytes.fromhex(encoded)
    assert acceptor.state is after


def test_a_release_is_answered_and_the_close_awaited():
    """PS3.8 tables 9-25, 9-10 (AR-4)."""
    acceptor = acceptor_in(State.AWAITING_RELEASE)
    assert acceptor.release() == bytes.fromhex("06000000000400000000")
    assert acceptor.state is State.CLOSING


STORE = wire.data((1, 3, wire.command(1, CT, "1.2.3")))
UNEXPECTED, INVALID = (2, 5), (2, 6)


@pytest.mark.parametrize(
    ("pdus", "abort"),
    [
        pytest.param(wire.data((5, 3, b"")), INVALID, id="context that was not accepted"),
        pytest.param(wire.data((2, 3, b"")), INVALID, id="even context"),
        pytest.param(wire.data((1, 2, b"dataset")), UNEXPECTED, id="dataset without command"),
        pytest.param(STORE + STORE, UNEXPECTED, id="command where a dataset is due"),
        pytest.param(STORE + wire.data((1, 0, b"x"), (1, 3, b"")), UNEXPECTED, id="command inside a dataset"),
        pytest.param(STORE + wire.data((3, 2, b"x")), UNEXPECTED, id="dataset in another context"),
        pytest.param(wire.data((1, 1, b"x"), (3, 1, b"x")), UNEXPECTED, id="command in two contexts"),
        pytest.param(wire.pdu(4, b""), INVALID, id="P-DATA-TF without PDV"),
        pytest.param(wire.pdu(4, bytes(5)), INVALID, id="P-DATA-TF shorter than a PDV's header"),
        pytest.param(wire.pdu(4, b"\0\0\0\1\1\3"), INVALID, id="PDV shorter than its header"),
        pytest.param(wire.pdu(4, b"\0\0\0\3\1\3"), INVALID, id="PDV longer than its PDU"),
        pytest.param(wire.pdu(4, b"\xff\xff\xff\xff\1\3"), INVALID, id="PDV of 4 GiB"),
        pytest.param(ECHO[:2] + b"\xff\xff\xff\xff", INVALID, id="P-DATA-TF of 4 GiB"),
        pytest.param(STORE + wire.data((1, 2, bytes(6000))), INVALID, id="P-DATA-TF over the maximum"),
        pytest.param(wire.pdu(5, bytes(5)), INVALID, id="A-RELEASE-RQ of five bytes"),
        pytest.param(wire.data((1, 3, b"nonsense")), (0, 0), id="command set that is none"),
        pytest.param(wire.data((1, 3, b"")), (0, 0), id="empty command set"),
    ],
)
def test_a_broken_p_data_tf_is_aborted_with_its_reason(pdus: bytes, abort: tuple[int, int]):
    """PS3.8 section 9.3.8; the service user's abort for what is PS3.7's business."""
    acceptor = acceptor_in(State.ESTABLISHED)
    *_, last = acceptor.receive(memoryview(pdus))
    assert aborts(last) == abort


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\0\1\0\0" + b"A" * 16, id="cut short"),
        pytest.param(REQUEST[6:-3], id="last item cut short"),
        pytest.param(REQUEST[6:74] + b"\x20\0\xff\xff\1\0\0\0", id="item past the end"),
        pytest.param(REQUEST[6:74] + b"\x20\0\0\4\2\0\0\0", id="even context ID"),
        pytest.param(REQUEST[6:74] + b"\x20\0\0\4\1\0\0\0", id="context without abstract syntax"),
        pytest.param(REQUEST[6:74] + b"\x20\0\0\1\1", id="context without room"),
        pytest.param(REQUEST[6:74] + b"\x50\0\0\5\x51\0\0\1\0", id="maximum length of one byte"),
        pytest.param(REQUEST[6:74] + b"\x50\0\0\x07\x54\0\0\3\0\2\x31", id="role without a role"),
        pytest.param(REQUEST[6:74] + b"\x50\0\0\x06\x56\0\0\2\0\2", id="extended without a class"),
    ],
)
def test_a_malformed_request_is_aborted(body: bytes):
    """PS3.8 table 9-10, Evt19 in Sta2: AA-1."""
    acceptor = Acceptor(MAX_PDU_BYTES)
    (fact,) = acceptor.receive(memoryview(wire.pdu(1, body)))
    assert aborts(fact) == (0, 0)


def test_the_same_context_twice_is_aborted():
    """PS3.8 section 9.3.2.2: identifiers are unique."""
    pdu = wire.request([(1, CT, [EXPLICIT]), (1, CT, [EXPLICIT])])
    (fact,) = Acceptor(MAX_PDU_BYTES).receive(memoryview(pdu))
    assert aborts(fact) == (0, 0)


def test_a_request_of_more_than_a_mebibyte_is_not_collected():
    """A bound of ours: 128 contexts with every transfer syntax are less than half of it."""
    (fact,) = Acceptor(MAX_PDU_BYTES).receive(memoryview(b"\1\0\0\x10\0\1"))
    assert aborts(fact) == (0, 0)


REJECTIONS = [
    ({"version": 2}, {}, (1, 2, 2)),
    ({"application_context": "1.2.3"}, {}, (1, 1, 2)),
    ({}, {"called_ae_titles": ("OTHER",)}, (1, 1, 7)),
    ({}, {"known_aes": (KnownAe("OTHER"),)}, (1, 1, 3)),
]


@pytest.mark.parametrize(("request_", "settings", "rejection"), REJECTIONS)
def test_a_rejection_has_its_result_source_and_reason(request_, settings, rejection: tuple[int, int, int]):
    """PS3.8 table 9-21."""
    (fact,) = Acceptor(MAX_PDU_BYTES).receive(memoryview(wire.request(**request_)))
    assert isinstance(fact, AssociateRequest)
    answer = admit(fact, "192.0.2.1", ListenerSettings(**settings))
    assert isinstance(answer, Rejection)
    assert answer[:3] == rejection


def test_a_protocol_version_with_more_bits_is_taken():
    """PS3.8 table 9-11: only bit 0 is tested."""
    (fact,) = Acceptor(MAX_PDU_BYTES).receive(memoryview(wire.request(version=3)))
    assert isinstance(fact, AssociateRequest)
    assert isinstance(admit(fact, "192.0.2.1", ListenerSettings()), KnownAe)
