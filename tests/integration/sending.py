"""`dicomscp send`, which sends a dataset's bytes as they are.

It runs in this process: to start it in its own takes longer than most of what is sent.  That it does the
same there is shown by the tests of the commands.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from dicomscp.cli import cli
from tests.gateway import Gateway


def send(gateway: Gateway, paths: Sequence[Path]) -> dict[str, Any]:
    """Its report on *paths*, files and folders: how many were sent, and what was refused and why."""
    peer = f"{gateway.ae_title}@127.0.0.1:{gateway.port}"
    run = CliRunner().invoke(cli, ["send", "--json", peer, *map(str, paths)])
    report: dict[str, Any] = json.loads(run.stdout)
    assert run.exit_code == bool(report["refused"]), run.output
    return report


def send_all(gateway: Gateway, paths: Sequence[Path]) -> dict[str, Any]:
    """The same, none having been refused."""
    report = send(gateway, paths)
    assert report["refused"] == []
    return report
