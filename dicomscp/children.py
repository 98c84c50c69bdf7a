"""Children: processes of this program that begin with all of it imported.

They are forked off one process that has imported the program and does nothing else, the fork server of the
standard library.  So a child starts in milliseconds in place of a second or two, and what was imported lies
in memory once for all of them.  A child has nothing of us but what it is given.

That process is itself forked off the command, once it has imported the program and before it does anything;
so a start imports once.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver, reduction, resource_tracker, util
from multiprocessing.context import ForkServerProcess
from typing import Any, NoReturn, TypeAlias

from setproctitle import setproctitle

from dicomscp.errors import BusyError

Child: TypeAlias = ForkServerProcess

_TAKING_OVER_SECONDS = 2.0  # if what they are forked off was killed this moment; the next is soon there
_PAUSE_SECONDS = 0.02

_SERVER = multiprocessing.get_context("forkserver")
# What the standard library knows of its one server, by fields that are the same from Python 3.11 to 3.13.
_STANDARD = forkserver._forkserver  # noqa: SLF001 - there is no public way to ask or to tell it
_SERVER.set_forkserver_preload(["dicomscp.cli"])


def prepare() -> None:
    """Fork off this process what children are forked off; returns at once.

    For a command that has imported the program and done nothing yet, in its one thread.  Who does not call it
    can start children too: the first waits until another process has imported the program.
    """
    if sys.version_info >= (3, 14):  # there the two share a secret that nobody else can set
        forkserver.ensure_running()
        return
    with socket.socket(socket.AF_UNIX) as listening:
        address = f"{util.get_temp_dir()}/children"
        listening.bind(address)
        listening.listen()
        alive, ours = os.pipe()  # the server ends when nobody has the writing end
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _fork_children(listening, alive)
    os.close(alive)
    vars(_STANDARD).update(_forkserver_address=address, _forkserver_alive_fd=ours, _forkserver_pid=pid)


def _fork_children(listening: socket.socket, alive: int) -> NoReturn:
    """Be the fork server until the end of this process."""
    try:
        setproctitle("dicomscp children")
        forkserver.main(listening.detach(), alive, [])
    except SystemExit:
        os._exit(0)
    except Exception:  # noqa: BLE001 - the last frame of a forked process: it is told, and ends with status 1
        sys.excepthook(*sys.exc_info())
    os._exit(1)


class Descriptor:
    """A file descriptor to be given to a child, where it arrives as a number of its own."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _arrived, (reduction.DupFd(self._number),)


def _arrived(given: Any) -> int:
    return int(given.detach())


def start(title: str, run: Callable[..., None], *given: object) -> Child:
    """A child that runs *run*, of which a list of processes says "dicomscp *title*".

    *given* are its arguments: what can be pickled, sockets, connections and each `Descriptor`.  No signal of
    a terminal reaches it, which is for us to act on.  Raises BusyError if the system has no room for it.
    """
    deadline = time.monotonic() + _TAKING_OVER_SECONDS
    while True:
        child = _SERVER.Process(target=_run, args=(title, run, *given))
        try:
            child.start()
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            if time.monotonic() > deadline:
                raise _no_room(error) from error
            _part_with_server()
            time.sleep(_PAUSE_SECONDS)
        except OSError as error:
            raise _no_room(error) from error
        else:
            return child


def _no_room(error: Exception) -> BusyError:
    return BusyError(f"no process can be started: {error}")


def _run(title: str, run: Callable[..., None], *given: object) -> None:
    gc.freeze()  # what is imported stays: looking through it costs time and unshares its memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
    setproctitle(f"dicomscp {title}")
    _share_server()
    run(*given)


def _share_server() -> None:
    """Start children of this child off what it was forked off itself.

    The standard library means to do so, but does not know a server without its pid, and begins another: that
    imports the program again.
    """
    if vars(_STANDARD)["_forkserver_address"]:
        vars(_STANDARD)["ensure_running"] = resource_tracker.ensure_running


def _part_with_server() -> None:
    """It does not answer: have the standard library begin another, if it was not ours."""
    vars(_STANDARD).pop("ensure_running", None)  # which `_share_server` put there
