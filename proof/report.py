"""Progress while stages run, a table at the end, and a file with the results so far."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from prefillshare.kvshare.errors import ConfigError
from prefillshare.platform import versions
from prefillshare.proof.asked import Machine
from prefillshare.proof.found import Part, Progress, Status
from prefillshare.proof.stages import Stage

_STYLES = {Status.PASSED: "green", Status.FAILED: "red", Status.UNFINISHED: "red", Status.SKIPPED: "yellow"}


class Results:
    """All parts so far, and `file`, which has them at any time."""

    def __init__(self, machine: Machine, dtype: str, file: Path):
        self.machine, self.dtype, self._file = machine, dtype, file
        self.parts: list[Part] = []
        self._took_s = 0.0
        self._write()

    @property
    def proven(self) -> bool:
        """Something has passed, and nothing else than that and measurements is there."""
        found = {part.status for part in self.parts}
        return Status.PASSED in found and found <= {Status.PASSED, Status.MEASURED}

    def add(self, told: Part | Progress, took_s: float) -> None:
        self._took_s = took_s
        if isinstance(told, Part):
            self.parts.append(told)
            self._write()

    def _write(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(_finite(self._written()), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            fix = "name a file in a folder that you may write to"
            raise ConfigError(f"cannot write {self._file}: {error.strerror}", field="--output", fix=fix) from None

    def summary(self) -> dict[str, Any]:
        return _finite({
            "proven": self.proven,
            "device": self.machine.name,
            "dtype": self.dtype,
            "took_s": round(self._took_s, 1),
            "parts": {part.name: {"status": part.status, **part.figures} for part in self.parts},
        })

    def _written(self) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": asdict(self.machine),
            "versions": versions(),
            "dtype": self.dtype,
            "took_s": round(self._took_s, 1),
            "proven": self.proven,
            "parts": [asdict(part) for part in self.parts],
        }

    def table(self) -> Table:
        table = Table(title=f"{self.machine.name}, {'proven' if self.proven else 'not proven'} in {self._took_s:.0f} s")
        for header in ("what", "", "found"):
            table.add_column(header, overflow="fold")
        for part in self.parts:
            table.add_row(part.name, part.status, Text(part.found), style=_STYLES.get(part.status, ""))
        return table


@contextmanager
def watched(console: Console) -> Iterator[Callable[[Stage, Part | Progress], None]]:
    """Show what runs, and each part when it is there."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        said = ""

        def watch(stage: Stage, told: Part | Progress) -> None:
            nonlocal said
            if isinstance(told, Part):
                text = f"{told.status.upper()}  {told.name}: {told.found}"
                bars.console.print(text, style=_STYLES.get(told.status, ""), markup=False)
                return
            text = f"{stage.name}: {told.what}"
            bars.update(task, description=text, completed=told.done, total=told.total)
            if not console.is_terminal and text != said:
                console.print(text, markup=False)
            said = text

        yield watch


def _finite(found: Any) -> Any:
    """With None for numbers that JSON does not have."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
