import http.client
import socket
import threading

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from dicomscp.web.server import bind, serve


class Running:
    """An application with a request that ends when it is told to."""

    def __init__(self, drain_seconds):
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.stop, self.reached, self.go_on = threading.Event(), threading.Event(), threading.Event()
        app = Starlette(routes=[Route("/", self.hello), Route("/long", self.long)])
        self.thread = threading.Thread(
            target=serve, args=(app, self.socket, self.stop), kwargs={"drain_seconds": drain_seconds}
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

    def ask(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path)
        return connection, connection.getresponse()


@pytest.fixture
def running(request):
    running = Running(getattr(request, "param", 10))
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


@pytest.mark.parametrize("running", [0.2], indirect=True)
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
