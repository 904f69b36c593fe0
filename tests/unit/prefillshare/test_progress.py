"""While a deployment starts, a file gets a line for each change, and a terminal one line that changes."""

from __future__ import annotations

import io

from rich.console import Console

from prefillshare.progress import startup_progress

STATES = [{"prefill": "UPDATING"}, {"prefill": "UPDATING"}, {"prefill": "HEALTHY", "agents": "UPDATING"}]


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    with startup_progress(console) as progress:
        for seconds, states in enumerate(STATES):
            progress(seconds, states)
        progress.done()
    return console.file.getvalue()


def test_a_file_gets_a_line_for_each_change():
    assert shown(False) == "starting, 0 s  prefill: updating\nstarting, 2 s  prefill: healthy  agents: updating\n"


def test_a_terminal_keeps_nothing_of_it():
    kept = shown(True).rsplit("\x1b[2K", 1)[-1]
    assert kept.strip() == ""
