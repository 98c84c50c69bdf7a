"""Hostile bytes: the upper layer tells facts and never raises, however they are cut; identifiers likewise."""

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from dicomscp.dimse.query import decode_identifier
from dicomscp.dimse.upper_layer import (
    ACCEPTED,
    Acceptor,
    AssociateRequest,
    ContextAnswer,
    Fragment,
    MalformedError,
    Message,
    ReleaseRequested,
    decode_command,
    encode_command,
)
from dicomscp.errors import RefusedError
from tests.unit.dimse import wire
from tests.unit.dimse.wire import CT, EXPLICIT

SYNTAXES = ["1.2.840.10008.1.2", EXPLICIT, "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"]
settings.register_profile("pdu", deadline=None, max_examples=200)
BOUNDED = settings.get_profile("pdu")
GOOD = [
    wire.request(),
    wire.store(bytes(300), "1.2.3", step=100),
    wire.ECHO,
    wire.RELEASE,
    wire.find(b"\x08\x00\x52\x00CS\x06\x00STUDY "),
    wire.pdu(7, bytes(4)),
]


def conversation(pieces: list[bytes]) -> list[tuple[object, ...]]:
    """What an acceptor that agrees to everything makes of the bytes; fragments joined."""
    acceptor = Acceptor(4096)
    told: list[tuple[object, ...]] = []
    for piece in pieces:
        for fact in acceptor.receive(memoryview(piece)):
            if isinstance(fact, AssociateRequest):
                told.append((fact.calling_ae, fact.contexts))
                answers = [ContextAnswer(one.context_id, ACCEPTED, CT, EXPLICIT) for one in fact.contexts]
                assert acceptor.accept(answers, roles={}, extended={})[0] == 2
            elif isinstance(fact, Fragment):
                if told[-1][0] == "bytes":
                    told[-1] = ("bytes", told[-1][1] + bytes(fact.data))  # type: ignore[operator]
                else:
                    told.append(("bytes", bytes(fact.data)))
                if fact.last:
                    told.append(("last",))
            elif isinstance(fact, Message):
                told.append(("message", fact.context_id, tuple(fact.command.items()), fact.has_dataset))
            elif isinstance(fact, ReleaseRequested):
                told.append(("release", acceptor.release()))
            else:
                told.append(tuple(fact))
    return [one for one in told if one != ("bytes", b"")]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """An association's bytes in some order, some of them changed, lost or doubled."""
    parts = [GOOD[0], *draw(st.lists(st.sampled_from(GOOD), max_size=5))]
    stream = bytearray(b"".join(parts))
    for _ in range(draw(st.integers(0, 4))):
        pos = draw(st.integers(0, len(stream)))
        change = draw(st.sampled_from(["set", "cut", "insert"]))
        if change == "set" and pos < len(stream):
            stream[pos] = draw(st.integers(0, 255))
        elif change == "cut":
            del stream[pos : pos + draw(st.integers(1, 20))]
        else:
            stream[pos:pos] = draw(st.binary(max_size=20))
    return bytes(stream)


@BOUNDED
@given(st.binary(max_size=2000))
def test_any_bytes_tell_facts(data: bytes):
    conversation([data])


@BOUNDED
@given(st.binary(max_size=300), st.sampled_from([1, 2, 4, 5]))
def test_any_bytes_after_a_good_header_tell_facts(body: bytes, pdu_type: int):
    conversation([wire.request(), wire.pdu(pdu_type, body)])
    conversation([wire.pdu(pdu_type, wire.request()[6:74] + body)])


@BOUNDED
@given(streams(), st.data())
def test_facts_do_not_depend_on_how_the_bytes_are_cut(stream: bytes, data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[low:high] for low, high in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert conversation(pieces) == conversation([stream])


@BOUNDED
@given(st.binary(max_size=500))
def test_any_command_set_is_read_or_malformed(encoded: bytes):
    try:
        decode_command(encoded)
    except MalformedError:
        return


@BOUNDED
@given(st.dictionaries(st.integers(1, 0xFFFF), st.binary(max_size=70)))
def test_command_sets_are_read_as_written(elements: dict[int, bytes]):
    encoded = encode_command(sorted(elements.items()))
    decoded = decode_command(encoded)
    assert decoded.pop(0) == struct.pack("<L", len(encoded) - 12)
    assert decoded == elements


@BOUNDED
@given(st.binary(max_size=500), st.sampled_from(SYNTAXES))
def test_any_identifier_is_read_or_refused(encoded: bytes, syntax: str):
    try:
        decode_identifier(encoded, syntax)
    except RefusedError:
        return


@BOUNDED
@given(
    st.lists(
        st.sampled_from([b"\x40\x00\x75\x02SQ\0\0\xff\xff\xff\xff", b"\xfe\xff\x00\xe0\xff\xff\xff\xff"]),
        max_size=300,
    )
)
def test_deep_identifiers_are_read_or_refused(parts: list[bytes]):
    try:
        decode_identifier(b"".join(parts), EXPLICIT)
    except RefusedError:
        return
