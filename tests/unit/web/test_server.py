import http.client
import select
import socket
import threading

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from dicomscp.web.server import Transport, bind, serve
from tests.processes import wait_until


class Running:
    """An application with a request that ends when it is told to."""

    def __init__(self, drain_seconds, transport):
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.stop, self.reached, self.go_on = threading.Event(), threading.Event(), threading.Event()
        self.taken = 0
        app = Starlette(
            routes=[
                Route("/", self.hello),
                Route("/long", self.long),
                Route("/take", self.take, methods=["POST"]),
            ]
        )
        self.thread = threading.Thread(
            target=serve,
            args=(app, self.socket, self.stop),
            kwargs={"drain_seconds": drain_seconds, "transport": transport},
        )
        self.thread.start()

    async def hello(self, request):
        return PlainTextResponse("hello")

    async def long(self, request):
        def chunks():
            yield b"begun,"
            self.reached.set()
            self.go_on.wait(20)
            yield b"ended"

        return StreamingResponse(chunks(), headers={"content-length": "11"})

    async def take(self, request):
        async for piece in request.stream():
            self.taken += len(piece)
        return PlainTextResponse("taken")

    def ask(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path)
        return connection, connection.getresponse()


@pytest.fixture
def running(request):
    running = Running(*getattr(request, "param", (10, Transport())))
    yield running
    running.go_on.set()
    running.stop.set()
    running.thread.join(20)
    assert not running.thread.is_alive()
    running.socket.close()


def test_port_zero_takes_a_free_port_known_before_serving(running):
    connection, response = running.ask("/")
    assert (response.status, response.read()) == (200, b"hello")
    connection.close()


def test_stopping_closes_idle_connections_and_returns(running):
    connection, response = running.ask("/")
    response.read()
    running.stop.set()
    running.thread.join(5)
    assert not running.thread.is_alive()
    assert connection.sock.recv(1) == b""
    connection.close()


def test_a_request_begun_is_finished_while_stopping(running):
    connection, response = running.ask("/long")
    assert running.reached.wait(5)
    running.stop.set()
    running.thread.join(0.3)
    assert running.thread.is_alive()
    running.go_on.set()
    assert response.read() == b"begun,ended"
    connection.close()


@pytest.mark.parametrize("running", [(0.2, Transport())], indirect=True)
def test_a_request_that_outlasts_the_drain_is_cut_and_its_client_knows(running):
    connection, response = running.ask("/long")
    assert running.reached.wait(5)
    running.stop.set()
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    connection.close()


def test_the_socket_outlives_the_server(running):
    running.stop.set()
    running.thread.join(5)
    with socket.create_connection(("127.0.0.1", running.port), timeout=5):
        pass  # queued for whoever serves next


def test_a_port_that_is_taken_is_an_error(running):
    with pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", running.port)


@pytest.mark.parametrize("running", [(10, Transport(stall_seconds=1.5))], indirect=True)
def test_a_body_that_is_not_sent_on_is_not_waited_for_and_others_are_served(running):
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as stuck:
        stuck.sendall(b"POST /take HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nbegun")
        connection, response = running.ask("/")
        assert response.read() == b"hello"
        connection.close()
        try:
            assert stuck.recv(1024) == b""
        except ConnectionResetError:
            assert running.taken == len(b"begun")


@pytest.mark.parametrize("running", [(10, Transport(stall_seconds=1.5))], indirect=True)
def test_a_body_that_comes_steadily_may_take_as_long_as_it_takes(running):
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as steady:
        size = 12 * 8192
        steady.sendall(b"POST /take HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
        for sent in range(1, 13):
            steady.sendall(bytes(8192))
            wait_until(lambda sent=sent: running.taken == sent * 8192, 10, "the piece to be taken")
            assert not select.select([steady], [], [], 0.25)[0] or sent == 12
        assert b"taken" in steady.recv(1024)
