"""Live progress while a deployment starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
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


@contextmanager
def startup_progress(console: Console) -> Iterator[StartupProgress]:
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield StartupProgress(live)
