"""The lines of style, types and rooms hold: each tool runs as on a developer's machine."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom.uid import AllTransferSyntaxes

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
_TRANSFER_SYNTAXES = frozenset({*map(str, AllTransferSyntaxes), "1.2.840.113619.5.2"})


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-m", "ruff", "check", "--no-cache", "--output-format=concise"], id="ruff check"),
        pytest.param(["-m", "ruff", "format", "--no-cache", "--check"], id="ruff format"),
        pytest.param(["-m", "mypy"], id="mypy"),
        pytest.param(["-c", LINT_IMPORTS], id="lint-imports"),
    ],
)
def test_the_code_passes(command):
    run = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )

    assert run.returncode == 0, run.stdout


def test_a_transfer_syntax_is_written_in_one_place():
    homes = {}
    for path in sorted((ROOT / "dicomscp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in _TRANSFER_SYNTAXES:
                homes.setdefault(node.value, []).append(path.name)
    assert homes["1.2.840.10008.1.2.1"] == ["elements.py"]
    assert {uid: places for uid, places in homes.items() if len(places) > 1} == {}


def test_ci_runs_the_command_that_the_readme_gives():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = [line.strip() for line in readme.splitlines() if "pip install -e" in line]

    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
