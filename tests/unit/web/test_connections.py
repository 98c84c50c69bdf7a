"""Connections that hang end, others do not: on sockets of this process, whose clock is the test's."""

import asyncio
import contextlib
import socket
import threading

import pytest

from dicomscp.web.connections import Connections
from tests.processes import wait_until


class Pair:
    """A connection: our end, as a server has accepted it, and the client's."""

    def __init__(self, listening):
        self.client = socket.create_connection(listening.getsockname()[:2], timeout=5)
        self.ours, self.peer = listening.accept()

    def is_open(self):
        self.client.setblocking(False)
        try:
            return bool(self.client.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False

    def fill(self):
        """Send what nobody reads, until no more goes."""
        self.ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.ours.send(bytes(1 << 16))

    def drain(self, count):
        self.client.settimeout(5)
        while count > 0:
            count -= len(self.client.recv(1 << 16))


class House:
    """A listening socket, connections to it, and what looks after them."""

    def __init__(self, **limits):
        self.now = 0.0
        self.listening = socket.create_server(("127.0.0.1", 0))
        limits = {"at_most": 16, "idle_seconds": 60, "stall_seconds": 30} | limits
        self.connections = Connections(now=lambda: self.now, **limits)
        self.pairs = []

    def connect(self):
        self.pairs.append(Pair(self.listening))
        return self.pairs[-1]

    def look(self, after=0.0):
        self.now += after
        self.connections.look(self.listening)


@pytest.fixture
def house(request):
    house = House(**getattr(request, "param", {}))
    yield house
    for pair in house.pairs:
        pair.client.close()
        pair.ours.close()
    house.listening.close()


class Asking:
    """A request under way in a thread: an application that does what it is told to."""

    def __init__(self, house, pair, use):
        self.receive, self.send = asyncio.Event(), asyncio.Event()
        self.pieces = []
        self.loop = asyncio.new_event_loop()
        self.reached = threading.Event()

        async def receive():
            self.reached.set()
            await self.receive.wait()
            self.receive.clear()
            return self.pieces.pop(0)

        async def send(_):
            self.reached.set()
            await self.send.wait()

        scope = {"type": "http", "client": pair.client.getsockname()[:2]}
        app = house.connections.noting(use)
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(app(scope, receive, send)))
        self.thread.start()

    def arrives(self, size, more=True):
        self.reached.clear()
        self.pieces.append({"type": "http.request", "body": bytes(size), "more_body": more})
        self.loop.call_soon_threadsafe(self.receive.set)

    def end(self):
        self.loop.call_soon_threadsafe(self.send.set)
        self.thread.join(5)
        assert not self.thread.is_alive()
        self.loop.close()


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def take(scope, receive, send):
    while (await receive())["more_body"]:
        pass


async def think(scope, receive, send):
    while (await receive())["more_body"]:
        pass
    await receive()  # the client going away


@pytest.mark.parametrize("house", [{"idle_seconds": 0.2}], indirect=True)
def test_what_has_no_request_and_does_not_move_is_closed(house):
    idle = house.connect()
    house.look()
    assert idle.is_open()

    def looked():
        house.look(after=0.05)
        return not idle.is_open()

    wait_until(looked, 5, "the idle connection to be closed")


@pytest.mark.parametrize("house", [{"idle_seconds": 0.2}], indirect=True)
def test_what_moves_is_not_idle(house):
    moving = house.connect()
    for _ in range(10):
        moving.client.send(b"x")
        moving.ours.recv(1)
        house.look(after=1)
        assert moving.is_open()


def test_what_was_sent_and_nobody_takes_is_cut(house):
    full = house.connect()
    full.fill()
    house.look()
    house.look(after=29)
    assert full.ours.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)
    house.look(after=1)
    with pytest.raises(ConnectionError):
        full.ours.send(b"x")
    assert full.ours.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes([1, 0, 0, 0, 0, 0, 0, 0])


def test_what_is_taken_slowly_is_cut_and_what_is_taken_less_slowly_is_not(house):
    slow, better = house.connect(), house.connect()
    slow.fill()
    better.fill()
    house.look()
    better.drain(1 << 20)  # more than 1 KiB a second
    better.fill()
    house.look(after=30)
    with pytest.raises(ConnectionError):
        slow.ours.send(b"x")
    better.drain(1 << 18)


def test_connections_without_a_request_go_when_they_are_getting_scarce(house):
    early = [house.connect() for _ in range(8)]
    house.look()
    house.look(after=30)
    assert all(pair.is_open() for pair in early)
    late = [house.connect() for _ in range(4)]
    asking = Asking(house, early[0], answer)
    assert asking.reached.wait(5)
    house.look()
    assert [pair.is_open() for pair in early] == [True] + 7 * [False]
    assert all(pair.is_open() for pair in late)  # there is time to ask yet
    for pair in early[1:]:
        pair.ours.close()
    asking.end()


def test_a_request_that_waits_for_a_body_is_cut(house):
    pair = house.connect()
    asking = Asking(house, pair, take)
    assert asking.reached.wait(5)
    house.look(after=29)
    assert pair.is_open()
    house.look(after=1)
    assert not pair.is_open()
    asking.arrives(0, more=False)
    asking.end()


def test_a_body_that_comes_byte_by_byte_is_cut_and_one_that_comes_is_not(house):
    slow, steady = house.connect(), house.connect()
    asking = [Asking(house, pair, take) for pair in (slow, steady)]
    for _ in range(6):
        for one, size in zip(asking, (1, 16384), strict=True):
            assert one.reached.wait(5)
            one.arrives(size)
            assert one.reached.wait(5)
        house.look(after=10)
    assert (slow.is_open(), steady.is_open()) == (False, True)
    for one in asking:
        one.arrives(0, more=False)
        one.end()


def test_a_request_that_waits_to_be_answered_by_us_is_not_cut(house):
    """A question that is waited for a minute, /changes, and one that takes long to work out."""
    pair = house.connect()
    asking = Asking(house, pair, think)
    assert asking.reached.wait(5)
    asking.arrives(0, more=False)
    assert asking.reached.wait(5)
    for _ in range(10):
        house.look(after=60)
    assert pair.is_open()
    asking.arrives(0, more=False)
    asking.end()


def test_an_answer_that_is_not_taken_is_cut_whatever_the_protocol(house):
    pair = house.connect()
    asking = Asking(house, pair, answer)
    assert asking.reached.wait(5)
    house.look(after=29)
    assert pair.is_open()
    house.look(after=1)
    assert not pair.is_open()
    asking.end()


def test_other_sockets_of_the_process_are_left_alone(house):
    other = House()
    pair = other.connect()
    house.connect()
    house.connections.look(house.listening)
    house.look(after=1000)
    assert pair.is_open()
    for end in (pair.client, pair.ours, other.listening):
        end.close()


def test_a_client_over_ipv6_is_known_by_its_address(house):
    house.listening.close()
    house.listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    pair = house.connect()
    asking = Asking(house, pair, answer)
    assert asking.reached.wait(5)
    house.look(after=30)
    assert not pair.is_open()
    asking.end()
