"""Children: what they begin with, and what becomes of them."""

import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Pipe
from pathlib import Path

from dicomscp.children import Descriptor, start
from tests.processes import command_of, wait_until

REPOSITORY = Path(__file__).parents[2]


def _tell(connection, descriptor, listening):
    os.write(descriptor, b"written by a child")
    name, ours = listening.getsockname(), os.getpgid(0) == os.getpid()
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    connection.send((name, ours, ignored, command_of(os.getpid())[0]))
    connection.recv_bytes()


def test_a_child_has_what_it_is_given_and_a_name_in_the_list_of_processes():
    reading, writing = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours, theirs = Pipe()
        with theirs:
            child = start("teller", _tell, theirs, Descriptor(writing), listening)
        os.close(writing)
        assert ours.recv() == (listening.getsockname(), True, True, "dicomscp teller")
    assert os.read(reading, 100) == b"written by a child"
    os.close(reading)
    assert child.exitcode is None
    ours.send_bytes(b"end")
    child.join(10)
    assert child.exitcode == 0
    ours.close()


def test_children_can_be_started_when_what_they_are_forked_off_was_killed():
    first = start("first", os.getpid)
    first.join(10)
    server = _parent_of_children()
    os.kill(server, signal.SIGKILL)

    second = start("second", os.getpid)
    second.join(10)
    assert (first.exitcode, second.exitcode) == (0, 0)
    wait_until(lambda: _parent_of_children() != server, 10, "another process to fork them off")


PREPARED = """
import os, signal, sys
from dicomscp import children
from tests.unit.test_children import _asked_of_a_child, _tell_what_it_began_with

sys.imported_before = True
children.prepare()
sys.imported_after = True
server, *began_with = _asked_of_a_child(_tell_what_it_began_with)
assert began_with == [True, False], began_with
os.kill(server, signal.SIGKILL)
another, *began_with = _asked_of_a_child(_tell_what_it_began_with)
assert another != server
assert began_with == [False, False], began_with
"""


def test_children_are_forked_off_a_command_as_it_was_when_it_prepared_for_them():
    command = [sys.executable, "-c", PREPARED]
    run = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, timeout=60, cwd=REPOSITORY)
    assert (run.returncode, run.stderr) == (0, "")


def _tell_what_it_began_with(connection):
    began_with = (hasattr(sys, "imported_before"), hasattr(sys, "imported_after"))
    connection.send((os.getppid(), *began_with))


def _parent_of_children() -> int:
    ours, theirs = Pipe()
    with theirs:
        child = start("asked", _send_parent, theirs)
    parent = ours.recv()
    child.join(10)
    ours.close()
    return parent


def _send_parent(connection):
    connection.send(os.getppid())


def _grandparents(connection):
    """Start a child from a child; which processes those were forked off."""
    parent = os.getppid()
    ours, theirs = Pipe()
    with theirs:
        child = start("grandchild", _tell_parent, theirs)
    grandparent = ours.recv()
    child.join()
    ours.close()
    connection.send((parent, grandparent))


def _tell_parent(connection):
    connection.send(os.getppid())


def _asked_of_a_child(run):
    ours, theirs = Pipe()
    with theirs:
        child = start("child", run, theirs)
    said = ours.recv()
    child.join(10)
    ours.close()
    return said


def test_a_child_starts_children_off_what_it_was_forked_off_itself():
    parent, grandparent = _asked_of_a_child(_grandparents)
    assert parent == grandparent == _parent_of_children()


def _grandparents_without(connection):
    os.kill(os.getppid(), signal.SIGKILL)
    _grandparents(connection)


def test_a_child_can_start_children_when_what_it_was_forked_off_was_killed():
    server = _parent_of_children()
    _, grandparent = _asked_of_a_child(_grandparents_without)
    assert grandparent != server
    assert command_of(grandparent)  # it lives
