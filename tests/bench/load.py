"""Load: HTTP GETs over one kept connection, as fast as the server answers.

    python -m tests.bench.load PORT PATH --seconds 2 --header "Accept: */*"     prints one JSON object

The body is read to its end, by its length or its chunks, and thrown away.  Any status but 200 ends the
program.
"""

import argparse
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.bench.crew import run_crew, take_part

_TIMEOUT_SECONDS = 60
_BUFFER_BYTES = 1 << 18


class LoadError(Exception):
    """The server did not answer as was expected."""


class Connection:
    """One connection on which the same request is made again and again."""

    def __init__(self, port: int, path: str, headers: Sequence[str]) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = "\r\n".join(
            [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", *headers, "", ""]
        ).encode()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._waiting = b""

    def get(self) -> int:
        """Make the request; the length of the body, as it came over the wire."""
        self._socket.sendall(self._request)
        while b"\r\n\r\n" not in self._waiting:
            self._more()
        head, _, self._waiting = self._waiting.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        if lines[0].split()[1] != b"200":
            raise LoadError(f"{self._request.splitlines()[0].decode()}: {lines[0].decode()}")
        fields = {
            name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        if b"content-length" in fields:
            return self._skip(int(fields[b"content-length"]))
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            return self._skip_chunks()
        raise LoadError("an answer without length keeps no connection")

    def _more(self) -> None:
        received = self._socket.recv(65536)
        if not received:
            raise LoadError("the server closed the connection")
        self._waiting += received

    def _skip(self, length: int) -> int:
        left = length - len(self._waiting)
        self._waiting = self._waiting[length:]
        while left > 0:
            received = self._socket.recv_into(self._buffer, min(left, _BUFFER_BYTES))
            if not received:
                raise LoadError("the server closed the connection within a body")
            left -= received
        return length

    def _skip_chunks(self) -> int:
        whole = 0
        while True:
            while b"\r\n" not in self._waiting:
                self._more()
            line, _, self._waiting = self._waiting.partition(b"\r\n")
            length = int(line.partition(b";")[0], 16)
            self._skip(length + 2)  # trailers are not used by those we ask
            whole += length
            if not length:
                return whole


def requests_per_second(
    port: int, path: str, headers: Sequence[str], *, connections: int, seconds: float
) -> dict[str, float]:
    """Ask on as many connections at once, a process each: the sum of their rates, and the body's length.

    How many were answered, all told, and how much of its time a process was busy asking.
    """
    options = ["--seconds", str(seconds)]
    for header in headers:
        options += ["--header", header]
    results = run_crew(__spec__.name, [[str(port), path, *options]] * connections)
    return {
        "rate": sum(result["rate"] for result in results),
        "bytes": results[0]["bytes"],
        "answered": sum(result["answered"] for result in results) + len(results),
        "busy": sum(result["busy"] for result in results) / len(results),
    }


def _prepare(port: int, path: str, headers: Sequence[str], seconds: float) -> Callable[[], dict[str, Any]]:
    connection = Connection(port, path, headers)
    length = connection.get()  # what is made at the first request is not measured

    def run() -> dict[str, Any]:
        began, used, answered = time.monotonic(), time.process_time(), 0
        while time.monotonic() - began < seconds:
            connection.get()
            answered += 1
        took = time.monotonic() - began
        busy = (time.process_time() - used) / took
        return {"rate": answered / took, "bytes": length, "answered": answered, "busy": busy}

    return run


def main() -> None:
    """Ask a port of this machine."""
    parser = argparse.ArgumentParser(description="Ask a port of this machine.")
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--header", action="append", default=[])
    options = parser.parse_args()
    take_part(lambda: _prepare(options.port, options.path, options.header, options.seconds))


if __name__ == "__main__":
    main()
