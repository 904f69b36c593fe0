"""Writes a benchmark's figures: one JSON file with what they were measured on, and the headline as the last line."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks.shared.environment import hardware, revision
from prefillshare.platform import versions

RESULTS = Path(__file__).parents[1] / "results"


def write(name: str, console: Console, config: dict, headline: dict, file: str = "", **parts) -> dict:
    """Write results/NAME.json, or results/FILE.json, and print the headline; returns all that is written. `parts`: further
    results of the benchmark."""
    result = {
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "hardware": hardware(),
        "versions": versions(),
        "config": config,
        **parts,
        "headline": headline,
    }
    RESULTS.mkdir(exist_ok=True)
    file = f"{file or name}.json"
    (RESULTS / file).write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written: benchmarks/results/{file}")
    print(json.dumps(headline))
    return result
