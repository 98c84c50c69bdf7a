"""Crew: programs in processes of their own that prepare, wait for each other, then begin together.

A member writes a line when it is prepared, begins at a line on its input, and writes one JSON object when
it is done.  Times are of the monotonic clock, which all processes of a machine share.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

REPOSITORY = Path(__file__).resolve().parents[2]


class CrewError(Exception):
    """A member failed; what it wrote is in the message."""


def run_crew(module: str, members: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run `python -m module` with each of *members*, arguments, and return their results.

    All are ended on the way out, whatever happens.  Raises CrewError if one fails.
    """
    with contextlib.ExitStack() as stack:
        crew = [
            stack.enter_context(_Member([sys.executable, "-m", module, *arguments])) for arguments in members
        ]
        for member in crew:
            member.line()
        for member in crew:
            member.begin()
        return [json.loads(member.line()) for member in crew]


class _Member:
    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"begin\n")
        self._process.stdin.flush()

    def line(self) -> bytes:
        """The next line it writes.  Raises CrewError if it ends instead."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            told = self._process.stderr.read().decode(errors="replace").strip()[-2000:]
            raise CrewError(f"{' '.join(self._command[2:])}: {told}")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:  # which closes the pipes and waits
            pass


def take_part(prepare: Callable[[], Callable[[], dict[str, Any]]]) -> None:
    """Be a member: *prepare*, wait for the word to begin, do what prepare returned, tell the result."""
    begin = prepare()
    print("prepared", flush=True)
    if sys.stdin.readline():
        print(json.dumps(begin()), flush=True)
