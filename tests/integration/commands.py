"""Commands of dicomscp in the process of a test, for what it asks on its way.

To start a process takes longer than most commands.  That they do the same there is what test_commands shows.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

from dicomscp.cli import cli
from tests.gateway import Gateway


class Run(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


def run_here(*arguments: object, **environ: str) -> Run:
    """The command to its end, without the settings of whoever runs the tests."""
    others = dict.fromkeys(name for name in os.environ if name.startswith("DICOMSCP_"))
    mask = os.umask(0o077)  # a command has one of its own
    try:
        result = CliRunner().invoke(cli, list(map(str, arguments)), env=others | environ)
    finally:
        os.umask(mask)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Run(result.exit_code, result.stdout, result.stderr)


def send(gateway: Gateway, paths: Sequence[Path]) -> dict[str, Any]:
    """The report of `dicomscp send`, which sends a dataset's bytes as they are, on files and folders.

    It says how many were sent, and what was refused and why.
    """
    done = run_here("send", "--json", f"{gateway.ae_title}@127.0.0.1:{gateway.port}", *paths)
    report: dict[str, Any] = json.loads(done.out)
    assert done.status == bool(report["refused"]), done.err
    return report


def send_all(gateway: Gateway, paths: Sequence[Path]) -> dict[str, Any]:
    """The same, none having been refused."""
    report = send(gateway, paths)
    assert report["refused"] == []
    return report
