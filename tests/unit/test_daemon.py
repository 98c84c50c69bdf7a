"""How parts are told to end."""

import signal
import subprocess
import sys

from tests.gateway import REPOSITORY

WAITING = """
import sys, threading
from dicomscp.daemon import _set_on
import signal
stop = threading.Event()
_set_on(stop, signal.SIGTERM)
print(flush=True)
while not stop.wait(1e-6):
    pass
"""


def test_a_signal_ends_a_loop_that_looks_at_its_event_all_the_time():
    """The handler meets the event's lock held: one that set it itself would now and then wait for ever."""
    processes = [
        subprocess.Popen([sys.executable, "-c", WAITING], cwd=REPOSITORY, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in processes:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    for process in processes:
        with process.stdout:
            assert process.wait(30) == 0
