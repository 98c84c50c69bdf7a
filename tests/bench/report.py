"""Report: what was measured, as tables for a person or as one JSON object.

Progress goes to stderr as it happens, one line a turn, so that a run of minutes is never silent.
"""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that is to be reached; *at_most* if it is not to be exceeded."""

    name: str
    figure: float | None
    target: float
    unit: str = "x"
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """None if it was not measured."""
        if self.figure is None:
            return None
        return self.figure <= self.target if self.at_most else self.figure >= self.target


@dataclass(slots=True)
class Sheet:
    """One table: its columns and its rows."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)


class Report:
    """Collects while a benchmark runs; shows at its end."""

    def __init__(self, benchmark: str) -> None:
        self._progress = Console(stderr=True, highlight=False)
        self._facts: dict[str, Any] = {"benchmark": benchmark, "machine": _machine()}
        self._sheets: list[Sheet] = []
        self._targets: list[Target] = []
        self._left_out: list[str] = []

    def progress(self, line: str) -> None:
        """Say what has just been done."""
        self._progress.print(line, markup=False, soft_wrap=True)

    def left_out(self, what: str) -> None:
        """Name what was not measured, and why."""
        self._left_out.append(what)
        self.progress(f"left out: {what}")

    def fact(self, name: str, value: Any) -> None:
        """Keep a figure, for the JSON object."""
        self._facts[name] = value

    def sheet(self, title: str, *columns: str) -> Sheet:
        """A new table."""
        self._sheets.append(Sheet(title, list(columns)))
        return self._sheets[-1]

    def target(self, target: Target) -> None:
        """A figure beside what it is to be."""
        self._targets.append(target)

    @property
    def missed(self) -> bool:
        """Whether a target that was measured is not met."""
        return any(target.met is False for target in self._targets)

    def show(self, *, as_json: bool) -> None:
        """Write it to stdout."""
        if as_json:
            targets = [{**asdict(target), "met": target.met} for target in self._targets]
            json.dump({**self._facts, "targets": targets, "left_out": self._left_out}, sys.stdout, indent=1)
            print()
            return
        # A table in a file or a pipe is not to be folded to 80 columns.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        console.print(
            "; ".join(f"{name} {value}" for name, value in self._facts["machine"].items()), markup=False
        )
        for sheet in self._sheets:
            console.print(_table(sheet))
        if self._targets:
            console.print(_table(self._target_sheet()))
        for line in self._left_out:
            console.print(f"left out: {line}", markup=False)

    def _target_sheet(self) -> Sheet:
        sheet = Sheet("Targets", ["what", "measured", "target", ""])
        words = {True: "met", False: "NOT MET", None: "not measured"}
        for target in self._targets:
            figure = "-" if target.figure is None else f"{number(target.figure)} {target.unit}"
            sign = "<=" if target.at_most else ">="
            wanted = f"{sign} {number(target.target)} {target.unit}"
            sheet.rows.append([target.name, figure, wanted, words[target.met]])
        return sheet


def number(value: float) -> str:
    """A figure with as many digits as it deserves: about three, and no fraction above a hundred."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left", title_style="bold")
    for position, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if position == 0 else "right")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def _machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    return {
        "processor": f"{model} x {os.cpu_count()}",
        "load": f"{os.getloadavg()[0]:.1f} at the start",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
