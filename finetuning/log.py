"""What a run reports while it goes on: a CSV row per step, and how far it has come."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from prefillshare.finetuning.progress import Clock, shown

FILE = "log.csv"
COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_s", "validation_loss")


class TrainingLog:
    """`log.csv` of a run's folder; an earlier attempt's steps after `start` are dropped."""

    def __init__(self, folder: Path, start: int):
        self._file = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read(folder) if row["step"] <= start] if start else []

    def __enter__(self) -> TrainingLog:
        part = self._file.with_suffix(".part")
        with part.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self._file)  # the file is whole at any time, since the run may be killed
        self._stream = self._file.open("a", newline="")
        self._writer = csv.DictWriter(self._stream, COLUMNS)
        return self

    def __exit__(self, *_) -> None:
        self._stream.close()

    def write(self, row: dict) -> None:
        self.rows.append(row)
        self._writer.writerow(row)
        self._stream.flush()

    def last(self, column: str) -> float | None:
        return next((row[column] for row in reversed(self.rows) if row[column] is not None), None)


def read(folder: Path) -> list[dict]:
    """Rows of a run's log; what was not measured is None."""
    try:
        with (folder / FILE).open(newline="") as stream:
            return [{k: (int(v) if k in ("step", "epoch", "tokens") else float(v)) if v else None for k, v in row.items()}
                    for row in csv.DictReader(stream)]  # fmt: skip
    except FileNotFoundError:
        return []


@contextmanager
def training_progress(
    console: Console, steps: int, start: int, clock: Clock = time.monotonic
) -> Iterator[Callable[[dict], None]]:
    """Yields what is told each row."""
    with shown(console, clock) as progress:
        task = progress.add_task("training", steps, start)

        def show(row: dict) -> None:
            text = f"epoch {row['epoch']}, loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s"
            progress.update(task, row["step"], text)
            if row["validation_loss"] is not None:
                progress.print(f"epoch {row['epoch']}: validation loss {row['validation_loss']:.4f}")

        yield show
