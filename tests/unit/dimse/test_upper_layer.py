"""The acceptor's byte loop: facts out of bytes, however they are cut; bytes within what the peer takes."""

import struct
from collections.abc import Iterable

import pytest

from dicomscp.dimse import upper_layer
from dicomscp.dimse.upper_layer import (
    ACCEPTED,
    COMMAND,
    LAST,
    Acceptor,
    AssociateRequest,
    ContextAnswer,
    Fact,
    Fragment,
    MalformedError,
    Message,
    Violation,
    decode_command,
    encode_command,
    fragments,
)
from tests.unit.dimse import wire
from tests.unit.dimse.wire import CT, EXPLICIT


def established(max_pdu_bytes: int = 16384, contexts: Iterable[int] = (1, 3)) -> Acceptor:
    """An acceptor whose association is open, with contexts for CT."""
    acceptor = Acceptor(max_pdu_bytes)
    for fact in acceptor.receive(memoryview(wire.request())):
        assert isinstance(fact, AssociateRequest)
        answers = [ContextAnswer(context_id, ACCEPTED, CT, EXPLICIT) for context_id in contexts]
        acceptor.accept(answers, roles={}, extended={})
    return acceptor


def told(acceptor: Acceptor, data: bytes, step: int = 1 << 20) -> list[Fact]:
    """What *data* tells in pieces of *step* bytes, fragments' bytes copied and joined."""
    facts: list[Fact] = []
    for pos in range(0, len(data), step):
        for fact in acceptor.receive(memoryview(data[pos : pos + step])):
            if not isinstance(fact, Fragment):
                facts.append(fact)
            elif facts and isinstance(facts[-1], Fragment) and not facts[-1].last:
                facts[-1] = Fragment(memoryview(bytes(facts[-1].data) + bytes(fact.data)), fact.last)
            else:
                facts.append(Fragment(memoryview(bytes(fact.data)), fact.last))
    return facts


def test_a_request_is_told_with_all_that_it_proposes():
    acceptor = Acceptor(16384)
    request = wire.request(
        [(1, CT, [EXPLICIT, "1.2.3"])],
        calling_ae="CT1",
        called_ae="PACS",
        max_pdu_bytes=4096,
        roles=[(CT, 1, 1)],
        extended=[(CT, b"\2\0\0")],
    )
    (fact,) = acceptor.receive(memoryview(request))
    assert fact == AssociateRequest(
        calling_ae="CT1",
        called_ae="PACS",
        protocol_version=1,
        application_context="1.2.840.10008.3.1.1.1",
        contexts=((1, CT, (EXPLICIT, "1.2.3")),),
        roles={CT: (True, True)},
        extended={CT: b"\2\0\0"},
        implementation="1.2.3.4",
    )
    assert acceptor.peer_max_pdu_bytes == 4096


def test_items_of_unknown_type_are_skipped():
    request = bytearray(wire.request())
    request += bytes.fromhex("7f000002abcd")
    request[2:6] = struct.pack(">L", len(request) - 6)
    (fact,) = Acceptor(16384).receive(memoryview(bytes(request)))
    assert isinstance(fact, AssociateRequest)
    assert len(fact.contexts) == 3


def test_titles_that_are_not_ascii_are_let_through_and_echoed():
    request = bytearray(wire.request())
    request[26:42] = b"\xdcBER\0\x07           "[:16].ljust(16)
    acceptor = Acceptor(16384)
    (fact,) = acceptor.receive(memoryview(bytes(request)))
    assert isinstance(fact, AssociateRequest)
    assert fact.calling_ae == "ÜBER??"
    assert acceptor.accept([], roles={}, extended={})[10:42] == request[10:42]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 7, 11, 13, 100, 4096])
def test_facts_do_not_depend_on_how_the_bytes_are_cut(step: int):
    stream = wire.store(bytes(range(256)) * 20, "1.2.3", step=1000) * 2
    facts = told(established(), stream, step)
    assert facts == told(established(), stream)
    assert [type(fact) for fact in facts] == [Message, Fragment, Message, Fragment]
    assert facts[1] == Fragment(memoryview(bytes(range(256)) * 20), True)


def test_fragments_are_views_of_the_bytes_fed():
    acceptor = established()
    told(acceptor, wire.data((1, 3, wire.command(1, CT, "1.2.3"))))
    data = bytearray(wire.data((1, 2, b"dataset")))
    (fact,) = acceptor.receive(memoryview(data))
    assert isinstance(fact, Fragment)
    assert fact.data.obj is data


def test_nothing_is_read_after_a_violation():
    acceptor = established()
    facts = told(acceptor, b"\x63" + bytes(5) + wire.store(b"xx", "1.2.3"))
    assert [type(fact) for fact in facts] == [Violation]
    assert told(acceptor, wire.ECHO) == []


def test_a_pdu_a_little_over_the_maximum_is_forgiven():
    acceptor = established(max_pdu_bytes=4096)
    told(acceptor, wire.data((1, 3, wire.command(1, CT, "1.2.3"))))
    (fact,) = told(acceptor, wire.data((1, 2, bytes(4096))))
    assert isinstance(fact, Fragment)


def test_a_command_set_in_many_fragments_is_one_message():
    encoded = wire.command(1, CT, "1.2.3")
    pdvs = [
        (1, COMMAND | (LAST if pos == len(encoded) - 1 else 0), encoded[pos : pos + 1])
        for pos in range(len(encoded))
    ]
    (fact,) = told(established(), wire.data(*pdvs))
    assert fact == Message(1, decode_command(encoded), has_dataset=True)


def test_a_command_set_without_end_is_a_violation():
    (fact,) = told(established(), wire.data((1, COMMAND, bytes(16000))) * 5)
    assert isinstance(fact, Violation)
    assert "65536" in fact.text


@pytest.mark.parametrize("limit", [0, 7, 8, 20, 100, 16384])
def test_what_is_sent_keeps_to_the_peers_maximum(limit: int):
    data = bytes(range(200))
    stream, got, flags = fragments(5, COMMAND, data, limit), b"", []
    pos = 0
    while pos < len(stream):
        pdu_type, length, pdv, context_id, flag = struct.unpack_from(">BxLLBB", stream, pos)
        assert (pdu_type, context_id, pdv) == (4, 5, length - 4)
        assert not limit or length <= max(limit, 8)
        got += stream[pos + 12 : pos + 6 + length]
        flags.append(flag)
        pos += 6 + length
    assert got == data
    assert flags == [COMMAND] * (len(flags) - 1) + [COMMAND | LAST]


def test_command_sets_are_read_as_written():
    elements = [(0x0002, b"1.2\0"), (0x0100, b"\1\0"), (0x1000, b"")]
    encoded = encode_command(elements)
    assert decode_command(encoded) == {0: struct.pack("<L", len(encoded) - 12)} | dict(elements)


@pytest.mark.parametrize(
    "encoded",
    [
        b"\0",
        b"\0\0\0\0\4\0\0",
        b"\0\0\0\1\4\0\0\0\0\0",  # longer than there is
        b"\0\0\0\1\xff\xff\xff\xff",
        b"\x08\0\x05\0\0\0\0\0",  # not of group 0000
    ],
)
def test_a_malformed_command_set_is_told_so(encoded: bytes):
    with pytest.raises(MalformedError):
        decode_command(encoded)


def test_pynetdicom_reads_what_we_accept():
    from pynetdicom.pdu import A_ASSOCIATE_AC

    acceptor = established()
    answers = [ContextAnswer(1, ACCEPTED, CT, EXPLICIT), ContextAnswer(3, 4, CT)]
    pdu = A_ASSOCIATE_AC()
    pdu.decode(acceptor.accept(answers, roles={CT: (True, False)}, extended={CT: b"\2"}))
    primitive = pdu.to_primitive()
    results = {
        item.context_id: item.result for item in primitive.presentation_context_definition_results_list
    }
    assert results == {1: 0, 3: 4}
    assert upper_layer.IMPLEMENTATION_CLASS_UID in {
        str(getattr(item, "implementation_class_uid", "")) for item in primitive.user_information
    }
