"""`dicomscp send`, which sends a dataset's bytes as they are."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gateway import REPOSITORY, Gateway


def send(gateway: Gateway, paths: Sequence[Path]) -> dict[str, Any]:
    """Its report on *paths*, files and folders: how many were sent, and what was refused and why."""
    peer = f"{gateway.ae_title}@127.0.0.1:{gateway.port}"
    command = [sys.executable, "-m", "dicomscp", "send", "--json", peer, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, check=False, cwd=REPOSITORY, timeout=120)
    report: dict[str, Any] = json.loads(run.stdout)
    assert run.returncode == bool(report["refused"]), run.stderr.decode()
    return report


def send_all(gateway: Gateway, paths: Sequence[Path]) -> dict[str, Any]:
    """The same, none having been refused."""
    report = send(gateway, paths)
    assert report["refused"] == []
    return report
