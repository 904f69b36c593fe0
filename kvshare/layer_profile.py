"""`layer_profile.json` beside a decoder's KV contract: how much recomputing which layers helps, as measured by
`prefillshare profile` (DroidSpeak, arXiv 2411.02820, section 4.2).

Divergence: mean Kullback-Leibler divergence, in nats per response token, of the next-token distribution over shared KV from the
one with the decoder's own prefill. 0 is no difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.errors import ConfigError, ContractMismatch
from prefillshare.kvshare.layer_group import layer_group

T = TypeVar("T")

FILE = "layer_profile.json"
VERSION = 1
#: Most groups that a decoder may choose from at run time; more would hardly differ.
MOST_GROUPS = 4


@dataclass(frozen=True)
class Point:
    """`layers`: "4-9" or "none". `low`, `high`: 95 % interval of the divergence over examples. `agreement`: share of response
    tokens whose likeliest token is the same. `scores`: share of right answers by task suite, if suites were run."""

    layers: str
    divergence: float
    low: float
    high: float
    agreement: float
    examples: int
    scores: dict[str, float] | None = None

    @property
    def size(self) -> int:
        return len(layer_group(self.layers) or ())


@dataclass(frozen=True)
class LayerProfile:
    """`points`: all points measured on all examples, fewest layers first. `sensitivity`: per layer, the divergence if only that
    layer's KV is the base's."""

    base: str
    decoder: str
    data: str
    layers: int
    points: tuple[Point, ...]
    sensitivity: tuple[float, ...]

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points for which no other point of at most as many layers is better."""
        return tuple(frontier_of(self.points, lambda point: (point.size, point.divergence)))

    def within(self, floor: float) -> tuple[str, ...]:
        """Groups of at most `floor` divergence, most layers first: the smallest one, and larger ones that are better and begin
        at the same layer, so that the prefill pool keeps the inputs of one layer only. Empty if there is none."""
        good = [point for point in self.frontier if point.divergence <= floor]
        if not good:
            return ()
        groups, begin = good[:1], _begin(good[0])
        longer = (point for point in self.points if begin is not None and _begin(point) == begin)
        for point in sorted(longer, key=lambda point: point.size):
            if point.size > groups[-1].size and point.divergence < groups[-1].divergence:
                groups.append(point)
        step = -(-len(groups) // MOST_GROUPS)
        return tuple(point.layers for point in reversed(groups[::step]))

    def write(self, decoder: str | Path) -> Path:
        path = Path(decoder) / FILE
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")
        return path

    @classmethod
    def read(
        cls, decoder: str | Path, base: str | Path, weights: Callable[[str | Path], str] = fingerprint.weights
    ) -> LayerProfile:
        """`weights`: folder -> fingerprint. Raises ConfigError if no profile can be read, ContractMismatch if it is that of
        other weights."""
        again = f"measure it: prefillshare profile {decoder} --base {base} --data FILE"
        if not (Path(decoder) / FILE).is_file():
            raise ConfigError(f"{decoder} has no {FILE}, so nothing says which layers to recompute", fix=again)
        try:
            data = fingerprint.read_json(decoder, FILE)
            if data.pop("version") != VERSION:
                raise ValueError("another version")
            points = tuple(Point(**point) for point in data.pop("points"))
            profile = cls(points=points, sensitivity=tuple(data.pop("sensitivity")), **data)
            for point in points:
                layer_group(point.layers)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{decoder}/{FILE} is not a layer profile: {error}", fix=again) from None
        for what, measured, folder in (("base", profile.base, base), ("decoder", profile.decoder, decoder)):
            if measured != (here := weights(folder)):
                raise ContractMismatch(f"{decoder}/{FILE} was measured with {what} {measured}, {folder} is {here}", fix=again)
        return profile


def frontier_of(items: Iterable[T], size_and_divergence: Callable[[T], tuple[int, float]]) -> list[T]:
    """The items for which no other item of at most their size is better, smallest first."""
    best: list[T] = []
    least = math.inf
    for item in sorted(items, key=size_and_divergence):
        if (divergence := size_and_divergence(item)[1]) < least:
            least = divergence
            best.append(item)
    return best


def _begin(point: Point) -> int | None:
    group = layer_group(point.layers)
    return group.first if group else None
