"""Live progress while a deployment starts, and while a model's folder is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


class StartupProgress:
    def __init__(self, live: Live):
        self._live = live

    def __call__(self, elapsed_s: float, states: dict[str, str]) -> None:
        parts = [("starting ", "bold"), (f"{elapsed_s:5.0f} s  ", "")]
        for name, state in states.items():
            style = {"HEALTHY": "green", "UNHEALTHY": "red", "DEPLOY_FAILED": "red"}.get(state, "yellow")
            parts.append((f"{name}: {state.lower()}  ", style))
        self._live.update(Text.assemble(*parts))

    def done(self) -> None:
        self._live.update(Text(""))
        self._live.stop()


class StartupLines:
    """Where the output is a file: a line whenever something has changed."""

    def __init__(self, console: Console):
        self._console, self._said = console, ""

    def __call__(self, elapsed_s: float, states: dict[str, str]) -> None:
        said = "  ".join(f"{name}: {state.lower()}" for name, state in states.items())
        if said != self._said:
            self._console.print(f"starting, {elapsed_s:.0f} s  {said}", highlight=False, markup=False, soft_wrap=True)
        self._said = said

    def done(self) -> None: ...


@contextmanager
def startup_progress(console: Console) -> Iterator[StartupProgress | StartupLines]:
    if not console.is_terminal:
        yield StartupLines(console)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield StartupProgress(live)


_STAGES = {
    "waiting": "waiting for another run that is making this folder",
    "checking": "checking the folder's hashes",
    "hashing": "checking the package's file",
    "converting": "converting to float32",
    "recording": "hashing the written files",
}


class FetchProgress:
    """One bar per stage, on standard error so that output can be piped. Without a terminal: only how each stage ended."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(), console=Console(stderr=True),
        )
        self._stage: str | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> FetchProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage:
            self._finish()
            self._stage, self._task = stage, self._progress.add_task(_STAGES[stage], total=total, amount="")
        assert self._task is not None
        self._progress.update(self._task, completed=done, amount=f"{done / 1e6:.0f} MB" if total else "")

    def _finish(self) -> None:
        if self._task is not None and self._progress.tasks[self._task].total is None:
            self._progress.update(self._task, total=1.0, completed=1.0)
