"""What a part of a campaign has found, as it is kept in a file and added up."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

#: Most problems of which the text is kept.
TOLD = 50


@dataclass
class Findings:
    """`turns`: that were asked for. `right`: whose tokens were compared and found right. `asked_again`: turns that were asked a
    second time when all was quiet. `refused`: kind of error -> turns that ended in it, which changed nothing and which a client
    may take again. `left`: turns that their client gave up, by how. `lost`: turns that ended in an error that nobody may get.
    `wrong`: turns with a token, and sessions with a context, that an undisturbed system does not have. `hung`: turns that
    outlived their deadline. `leaked`: what is still held when nothing runs, by what it is."""

    turns: int = 0
    right: int = 0
    asked_again: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    surfaces: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    wrong: int = 0
    hung: int = 0
    leaked: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def count(self, what: Counter[str], kind: str) -> None:
        with self._lock:
            what[kind] += 1

    def tell(self, kind: str, problem: str) -> None:
        """`kind`: lost, wrong or hung."""
        with self._lock:
            setattr(self, kind, getattr(self, kind) + 1)
            if len(self.problems) < TOLD:
                self.problems.append(f"{kind}: {problem}")

    def as_dict(self) -> dict:
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in told.items()}

    @classmethod
    def of(cls, told: dict) -> Findings:
        counters = {name: Counter(value) for name, value in told.items() if isinstance(value, dict)}
        return cls(**told | counters)

    @classmethod
    def summed(cls, parts: Iterable[Findings]) -> Findings:
        total = cls()
        for part in parts:
            for name, value in part.as_dict().items():
                setattr(total, name, getattr(total, name) + (Counter(value) if isinstance(value, dict) else value))
        return total
