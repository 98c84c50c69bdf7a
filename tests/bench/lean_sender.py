"""Lean sender: a storage SCU that costs next to nothing, so that what is measured is the receiver.

Every C-STORE request is encoded before the first is sent, in PDUs of the receiver's maximum length up to
128 KiB, and leaves in one call; the next follows when the response to the last has been read.  TCP_NODELAY is
set, and TCP_QUICKACK again after each read, so that no receiver waits for a delayed acknowledgement.
Anything but Success, or a response to another message, ends the program.

    python -m tests.bench.lean_sender PORT --size "15 KB" --count 100     prints one JSON object
"""

import argparse
import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tests.bench.crew import run_crew, take_part
from tests.bench.instances import (
    CT_IMAGE_STORAGE,
    EXPLICIT_VR_LITTLE_ENDIAN,
    SIZES,
    Template,
    new_study_uid,
    sop_uid,
)

MAX_PDU_BYTES = 131072

_CONTEXT_ID = 1
_TIMEOUT_SECONDS = 120
_APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_PDU = struct.Struct(">BBL")
_PDV = struct.Struct(">LBB")
_ELEMENT = struct.Struct("<HHL")
STATUS = 0x0900  # an element of group 0000, as are the next two
_RESPONDED_TO, _DATA_SET_TYPE, _NO_DATA_SET = 0x0120, 0x0800, 0x0101


class SenderError(Exception):
    """The receiver did not do what was asked."""


class Association:
    """An association that proposes each of *sop_class_uids* in Explicit VR Little Endian, and no more.

    Their contexts are numbered as they come: 1, 3, 5 and so on.
    """

    def __init__(
        self,
        port: int,
        called_ae: str,
        calling_ae: str = "LEAN",
        sop_class_uids: Sequence[str] = (CT_IMAGE_STORAGE,),
    ) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._waiting, self._at = b"", 0
        self._socket.sendall(_associate_rq(called_ae, calling_ae, sop_class_uids))
        kind, body = self._read_pdu()
        if kind != 2:
            raise SenderError(f"association not accepted: PDU type {kind}, {body[:4].hex()}")
        self.max_pdu_bytes = _accepted(body, len(sop_class_uids))

    def store(self, request: Iterable[bytes], message_id: int) -> None:
        """Send the PDUs of one request and return when Success is heard.  Raises SenderError for all else."""
        for part in request:
            self.send(part)
        command = self.response()
        if command.get(_RESPONDED_TO) != message_id or command.get(STATUS) != 0:
            raise SenderError(
                f"message {message_id}: the response is to {command.get(_RESPONDED_TO)}, "
                f"its status 0x{command.get(STATUS, 0xFFFF):04X}"
            )

    def release(self) -> None:
        """End the association and return when the receiver has agreed."""
        self._socket.sendall(_PDU.pack(5, 0, 4) + bytes(4))
        self._read_pdu()
        self._socket.close()

    def send(self, pdus: bytes) -> None:
        """Send whole PDUs."""
        self._socket.sendall(pdus)

    def response(self) -> dict[int, int]:
        """The elements of the next response's command set that are two bytes long; its dataset is skipped."""
        encoded, command, waits = b"", {}, True
        while waits:
            kind, body = self._read_pdu()
            if kind != 4:
                raise SenderError(f"PDU type {kind} in place of a response: {body[:4].hex()}")
            for control, fragment in _pdvs(body):
                if control & 1:
                    encoded += fragment
                if control == 3:
                    command = dict(_short_elements(encoded))
                if control & 2:
                    waits = control == 3 and command.get(_DATA_SET_TYPE) != _NO_DATA_SET
        return command

    def _read_pdu(self) -> tuple[int, bytes]:
        kind, _, length = _PDU.unpack(self._read(6))
        return kind, self._read(length)

    def _read(self, length: int) -> bytes:
        while len(self._waiting) - self._at < length:
            received = self._socket.recv(65536)
            if not received:
                raise SenderError("the receiver closed the connection")
            # A receiver that leaves Nagle's algorithm on and writes a response in two parts waits for this.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            self._waiting, self._at = self._waiting[self._at :] + received, 0
        began, self._at = self._at, self._at + length
        return self._waiting[began : self._at]


def send(port: int, called_ae: str, size: str, study_uids: list[str], count: int) -> dict[str, Any]:
    """Send *count* instances of each study on as many associations at once, from as many processes.

    Returns when all are acknowledged: the seconds from the first request to the last response, the rate, the
    latencies' median and 99th percentile, and when the last response came, by the monotonic clock.
    """
    options = ["--called-ae", called_ae, "--size", size, "--count", str(count)]
    results = run_crew(__spec__.name, [[str(port), *options, "--study-uid", uid] for uid in study_uids])
    ended = max(result["ended"] for result in results)
    seconds = ended - min(result["began"] for result in results)
    latencies = sorted(itertools.chain.from_iterable(result["latencies"] for result in results))
    return {
        "seconds": seconds,
        "rate": len(latencies) / seconds,
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        "ended": ended,
    }


def send_one(port: int, called_ae: str, size: str, study_uid: str) -> None:
    """Send one instance, from this process."""
    association = Association(port, called_ae)
    dataset = Template(SIZES[size]).dataset(study_uid, 1)
    association.store([encode_request(dataset, sop_uid(study_uid, 1), 1, association.max_pdu_bytes)], 1)
    association.release()


def send_multiframe(port: int, called_ae: str, study_uid: str, length: int) -> float:
    """Send one instance of at least *length* bytes, made while it is sent; the seconds until Success."""
    association = Association(port, called_ae)
    began = time.monotonic()
    association.store(_multiframe(study_uid, length, association.max_pdu_bytes), 1)
    seconds = time.monotonic() - began
    association.release()
    return seconds


def encode_request(
    dataset: bytes,
    instance_uid: str,
    message_id: int,
    max_pdu_bytes: int,
    *,
    sop_class_uid: str = CT_IMAGE_STORAGE,
    context_id: int = _CONTEXT_ID,
) -> bytes:
    """The PDUs of one C-STORE request; of one C-FIND request if there is no *instance_uid*."""
    step = max_pdu_bytes - 6
    data = (
        _data_pdu(dataset[at : at + step], context_id, last=at + step >= len(dataset))
        for at in range(0, len(dataset), step)
    )
    return b"".join((_command_pdu(instance_uid, message_id, sop_class_uid, context_id), *data))


def _command_pdu(
    instance_uid: str, message_id: int, sop_class_uid: str = CT_IMAGE_STORAGE, context_id: int = _CONTEXT_ID
) -> bytes:
    command = b"".join(
        (
            _element(0x0002, _padded(sop_class_uid)),
            _element(0x0100, b"\x01\0" if instance_uid else b"\x20\0"),  # C-STORE-RQ, C-FIND-RQ
            _element(0x0110, message_id.to_bytes(2, "little")),
            _element(0x0700, b"\0\0"),
            _element(_DATA_SET_TYPE, b"\0\0"),  # a dataset follows
            _element(0x1000, _padded(instance_uid)) if instance_uid else b"",
        )
    )
    command = _element(0x0000, len(command).to_bytes(4, "little")) + command
    return _PDU.pack(4, 0, len(command) + 6) + _PDV.pack(len(command) + 2, context_id, 3) + command


def _data_pdu(fragment: bytes, context_id: int = _CONTEXT_ID, *, last: bool) -> bytes:
    head = _PDU.pack(4, 0, len(fragment) + 6) + _PDV.pack(len(fragment) + 2, context_id, 2 * last)
    return head + fragment


def _multiframe(study_uid: str, length: int, max_pdu_bytes: int) -> Iterator[bytes]:
    """A request whose pixel data is as many frames of 512 x 512 as it takes."""
    one = Template(SIZES["0.5 MB"]).dataset(study_uid, 1)
    at = one.index(b"\xe0\x7f\x10\x00OW") + 12
    frame = 512 * 512 * 2
    frames = -(-length // frame)
    number = str(frames).encode()
    number += b" " * (len(number) % 2)
    element = b"\x28\x00\x08\x00IS" + len(number).to_bytes(2, "little") + number
    head = one[: at - 12].replace(b"\x28\x00\x10\x00US", element + b"\x28\x00\x10\x00US")
    head += b"\xe0\x7f\x10\x00OW\0\0" + (frames * frame).to_bytes(4, "little")
    step = max_pdu_bytes - 6
    fragment = _data_pdu(one[at : at + frame][:step].ljust(step, b"\0"), last=False)
    yield _command_pdu(sop_uid(study_uid, 1), 1)
    yield _data_pdu(head, last=False)
    whole, rest = divmod(frames * frame, step)
    yield from itertools.repeat(fragment, whole)
    yield _data_pdu(bytes(rest), last=True)


def _element(number: int, value: bytes) -> bytes:
    return _ELEMENT.pack(0, number, len(value)) + value


def _padded(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(value)) + value


def _associate_rq(called_ae: str, calling_ae: str, sop_class_uids: Sequence[str]) -> bytes:
    syntax = _item(0x40, EXPLICIT_VR_LITTLE_ENDIAN.encode())
    user = _item(0x51, MAX_PDU_BYTES.to_bytes(4, "big")) + _item(0x52, b"2.25.1")
    body = struct.pack(">HH16s16s32x", 1, 0, called_ae.encode().ljust(16), calling_ae.encode().ljust(16))
    body += _item(0x10, _APPLICATION_CONTEXT.encode())
    for number, uid in enumerate(sop_class_uids):
        body += _item(0x20, bytes((2 * number + 1, 0, 0, 0)) + _item(0x30, uid.encode()) + syntax)
    body += _item(0x50, user)
    return _PDU.pack(1, 0, len(body)) + body


def _items(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(encoded):
        kind, length = encoded[at], int.from_bytes(encoded[at + 2 : at + 4], "big")
        yield kind, encoded[at + 4 : at + 4 + length]
        at += 4 + length


def _accepted(body: bytes, contexts: int) -> int:
    """The PDU length to send by, from an A-ASSOCIATE-AC.  Raises SenderError if a context was refused."""
    items = list(_items(body[68:]))
    results = {value[0]: value[2] for kind, value in items if kind == 0x21}
    if results != {2 * number + 1: 0 for number in range(contexts)}:
        raise SenderError(f"not all presentation contexts were accepted: {results}")
    stated = int.from_bytes(dict(_items(dict(items).get(0x50, b""))).get(0x51, b""), "big")
    return min(stated or MAX_PDU_BYTES, MAX_PDU_BYTES)


def _pdvs(body: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(body):
        length, _, control = _PDV.unpack_from(body, at)
        yield control, body[at + 6 : at + 4 + length]
        at += 4 + length


def _short_elements(encoded: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at + 8 <= len(encoded):
        _, number, length = _ELEMENT.unpack_from(encoded, at)
        if length == 2:
            yield number, int.from_bytes(encoded[at + 8 : at + 10], "little")
        at += 8 + length


def _prepare(
    port: int, called_ae: str, size: str, study_uid: str, count: int
) -> Callable[[], dict[str, Any]]:
    association = Association(port, called_ae)
    template = Template(SIZES[size])
    requests = [
        encode_request(
            template.dataset(study_uid, number),
            sop_uid(study_uid, number),
            number & 0xFFFF,
            association.max_pdu_bytes,
        )
        for number in range(1, count + 1)
    ]
    return lambda: _send(association, requests)


def _send(association: Association, requests: list[bytes]) -> dict[str, Any]:
    """One plain loop: what it costs is not the receiver's."""
    latencies, clock = [], time.monotonic
    began = clock()
    for number, request in enumerate(requests, 1):
        before = clock()
        association.store((request,), number & 0xFFFF)
        latencies.append(clock() - before)
    ended = clock()
    association.release()
    return {"began": began, "ended": ended, "latencies": latencies}


def main() -> None:
    """Send to a port of this machine."""
    parser = argparse.ArgumentParser(description="Send to a port of this machine.")
    parser.add_argument("port", type=int)
    parser.add_argument("--called-ae", default="ANY-SCP")
    parser.add_argument("--size", choices=SIZES, default="15 KB")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--study-uid", default=new_study_uid())
    options = parser.parse_args()
    take_part(
        lambda: _prepare(options.port, options.called_ae, options.size, options.study_uid, options.count)
    )


if __name__ == "__main__":
    main()
