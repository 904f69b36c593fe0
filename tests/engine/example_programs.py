"""The examples, the environment that they run in, and what they print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
#: `make examples-env` makes it.
PYTHON = ROOT / ".venv-examples" / "bin" / "python"


@dataclass(frozen=True)
class Turn:
    decoder: str
    prompt: int
    cached: int
    computed: int
    generated: int
    where: str


def turns(printed: str) -> list[Turn]:
    """Those of which examples/figures.py has printed a line."""
    found = re.findall(r"^(\S+) +(\d+) +(\d+) +(\d+) +(\d+)  (.*)$", printed, re.M)
    return [Turn(decoder, *map(int, figures), where) for decoder, *figures, where in found]
