"""Which layers of a prompt a decoder should compute itself: measured, not guessed (DroidSpeak, arXiv 2411.02820, section 4.2).

 1. For each example (a transcript's last response and all that is before it), the decoder's next-token distributions with its
    own prefill are the reference.
 2. For a group [a, b], the decoder's own KV of these layers is computed from the base's hidden states at layer a. One pass
    from a to the last layer that is needed serves every b; each group then costs only the response's tokens.
 3. The search goes from coarse to fine: first groups whose ends are on a grid, on a part of the examples; then the neighbours
    of the groups that are best for their number of layers, on ever finer grids; then the best ones, and the longer groups that
    begin with them, on all examples.
 4. Every measurement is written to a file at once, so that a profile that was ended goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import DynamicCache

from prefillshare.finetuning.conditioned import own_layers, plain
from prefillshare.finetuning.evaluate import evenly, offline_answers
from prefillshare.finetuning.progress import shown
from prefillshare.finetuning.subjects import Subject
from prefillshare.finetuning.transcripts import Example
from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.layer_group import LayerGroup, layer_group
from prefillshare.kvshare.layer_profile import FILE, LayerProfile, Point, frontier_of

#: Candidates are measured on one in PART of the examples, and on at least LEAST.
PART, LEAST = 4, 4
#: The first grid divides the layers into this many parts.
GRID = 8


@dataclass(frozen=True)
class Seen:
    """For one example: mean divergence per response token, and the share of positions with the same likeliest token."""

    divergence: float
    agreement: float


class Measured:
    """Measurements by example and group, in a file. A file of another run is begun anew."""

    def __init__(self, file: Path, run: str):
        self._file, self._seen = file, {}
        lines = file.read_text().splitlines() if file.is_file() else []
        if lines[:1] != [run]:
            file.write_text(run + "\n")
            return
        for line in lines[1:]:
            try:
                example, group, divergence, agreement = json.loads(line)
            except ValueError:  # the run ended while it was being written
                continue
            self._seen[example, group] = Seen(divergence, agreement)

    def get(self, example: int, group: str) -> Seen | None:
        return self._seen.get((example, group))

    def add(self, example: int, seen: dict[str, Seen]) -> None:
        self._seen |= {(example, group): it for group, it in seen.items()}
        lines = (json.dumps([example, group, it.divergence, it.agreement]) for group, it in seen.items())
        with self._file.open("a") as stream:
            stream.write("".join(line + "\n" for line in lines))


class Profiler:
    """`base`, `decoder`: transformers models. `examples`: only their last response is measured."""

    def __init__(self, base, decoder, examples: Sequence[Example], measured: Measured, console: Console):
        self._base, self._decoder, self._examples = plain(base), plain(decoder), examples
        self._measured, self._console = measured, console
        self.layers = len(self._decoder.model.layers)

    def search(self) -> list[Point]:
        """The groups measured on all examples, including "none"; fewest layers first."""
        part = self._part()
        step = max(1, self.layers // GRID)
        candidates = {None} | {
            LayerGroup(first, end - 1)
            for first in range(0, self.layers, step)
            for end in (*range(first + step, self.layers, step), self.layers)
            if end - first < self.layers
        }
        while True:
            self._measure(candidates, part, f"groups on a grid of {step}")
            best = self._best(candidates, part)
            if step == 1:
                break
            step = max(1, step // 2)
            candidates |= {near for group in best if group for near in self._near(group, step)}
        begins = {group.first for group in best if group}
        ends = {group.last for group in best if group}
        final = {None, *best} | {LayerGroup(a, b) for a in begins for b in ends if b >= a and b - a + 1 < self.layers}
        everything = range(len(self._examples))
        self._measure(final, everything, "the best groups on all examples")
        return sorted((self._point(group, everything) for group in final), key=lambda point: (point.size, point.divergence))

    def sensitivity(self) -> list[float]:
        """Per layer: the divergence if only this layer's KV is the base's."""
        part = self._part()
        self._measure([f"base {layer}" for layer in range(self.layers)], part, "single layers")
        return [self._mean(f"base {layer}", part) for layer in range(self.layers)]

    def _part(self) -> range:
        wanted = min(len(self._examples), max(LEAST, len(self._examples) // PART))
        return range(0, len(self._examples), max(1, len(self._examples) // wanted))

    def _near(self, group: LayerGroup, step: int) -> Iterable[LayerGroup]:
        for first in (group.first - step, group.first, group.first + step):
            for last in (group.last - step, group.last, group.last + step):
                if 0 <= first <= last < self.layers and last - first + 1 < self.layers:
                    yield LayerGroup(first, last)

    def _best(self, groups: Iterable[LayerGroup | None], part: Sequence[int]) -> list[LayerGroup | None]:
        """The groups to which no other with as few layers is better."""
        return frontier_of(groups, lambda group: (len(group or ()), self._mean(_name(group), part)))

    def _mean(self, name: str, part: Sequence[int]) -> float:
        return sum(self._measured.get(number, name).divergence for number in part) / len(part)

    def _point(self, group: LayerGroup | None, part: Sequence[int]) -> Point:
        seen = [self._measured.get(number, _name(group)) for number in part]
        mean = sum(it.divergence for it in seen) / len(seen)
        spread = math.sqrt(sum((it.divergence - mean) ** 2 for it in seen) / max(1, len(seen) - 1) / len(seen))
        agreement = sum(it.agreement for it in seen) / len(seen)
        return Point(_name(group), mean, max(0.0, mean - 1.96 * spread), mean + 1.96 * spread, agreement, len(seen))

    def _measure(self, wanted: Iterable[LayerGroup | str | None], part: Sequence[int], title: str) -> None:
        names = {_name(what): what for what in wanted}
        with shown(self._console) as progress:
            bar = progress.add_task(title, len(part))
            for number in part:
                if missing := {name: what for name, what in names.items() if self._measured.get(number, name) is None}:
                    self._measured.add(number, self._compare(self._examples[number], missing))
                progress.advance(bar)

    @torch.no_grad()
    def _compare(self, example: Example, wanted: dict[str, LayerGroup | str | None]) -> dict[str, Seen]:
        start, end = example.responses[-1]
        device = self._base.device
        prefix = torch.tensor([example.token_ids[: start - 1]], device=device)
        rest = torch.tensor([example.token_ids[start - 1 : end - 1]], device=device)
        of_base = self._base(prefix, use_cache=True, output_hidden_states=True)
        base_kv, hidden = _layers(of_base.past_key_values), of_base.hidden_states
        own_kv = _layers(self._decoder(prefix, use_cache=True).past_key_values)
        own = self._log_probabilities(rest, own_kv)
        seen, longest = {}, {}
        for group in sorted(what for what in wanted.values() if isinstance(what, LayerGroup)):
            longest[group.first] = group
        recomputed = {}
        for first, group in longest.items():
            entering = hidden[first] if first else self._decoder.model.embed_tokens(prefix)
            recomputed[first] = own_layers(self._decoder, entering, group)
        for name, what in wanted.items():
            if isinstance(what, str):
                layer = int(what.removeprefix("base "))
                kv = [*own_kv[:layer], base_kv[layer], *own_kv[layer + 1 :]]
            else:
                kv = list(base_kv)
                if what:
                    kv[what.first : what.last + 1] = recomputed[what.first][: len(what)]
            other = self._log_probabilities(rest, kv)
            divergence = (own.exp() * (own - other)).sum(-1).clamp(min=0).mean().item()
            seen[name] = Seen(divergence, (own.argmax(-1) == other.argmax(-1)).float().mean().item())
        return seen

    def _log_probabilities(self, ids: torch.Tensor, kv) -> torch.Tensor:
        """[tokens, vocabulary], of the decoder after `ids` over `kv`."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(kv):
            cache.update(keys, values, layer)
        return self._decoder(ids, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)


def _name(what: LayerGroup | str | None) -> str:
    return str(what or "none")


def _layers(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def run_of(base: str, decoder: str, examples: Sequence[Example]) -> str:
    """Identifies the run that a file of measurements belongs to."""
    return hashlib.sha256(repr((base, decoder, [(e.token_ids, e.responses[-1]) for e in examples])).encode()).hexdigest()


def profile(
    base: Path, decoder: Path, subject: Subject, data: Path, found: Sequence[Example], most: int, console: Console
) -> LayerProfile:
    """The profile of `decoder`, loaded as `subject`, on at most `most` of the transcripts that were `found` in `data`, evenly
    spread. Measurements are kept beside the decoder until `keep`."""
    examples = evenly(found, most)
    weights = fingerprint.weights(base), fingerprint.weights(decoder)
    measured = Measured(_measured(decoder), run_of(*weights, examples))
    profiler = Profiler(subject.base.model, subject.decoder, examples, measured, console)
    return LayerProfile(*weights, str(data), profiler.layers, tuple(profiler.search()), tuple(profiler.sensitivity()))


def keep(made: LayerProfile, decoder: Path) -> Path:
    file = made.write(decoder)
    _measured(decoder).unlink(missing_ok=True)
    return file


def _measured(decoder: Path) -> Path:
    return decoder / f".{FILE}.measured"


def scored(
    profile: LayerProfile, subject: Subject, suites, limit: int, tokenizer, stops: Sequence[int], device: str, console: Console
) -> LayerProfile:
    """The same profile with the frontier's shares of right answers on these suites."""
    points = {point.layers: point for point in profile.points}
    with shown(console) as progress:
        for point in profile.frontier:
            scores = {}
            for task in suites:
                questions = task.questions()[:limit]
                bar = progress.add_task(f"{point.layers}, {task.name}", len(questions))
                answers = offline_answers(
                    subject, task, questions, tokenizer, stop_ids=stops, own_layers=layer_group(point.layers), device=device,
                    advance=lambda count, bar=bar: progress.advance(bar, count),
                )  # fmt: skip
                right = [question.is_right(answer) for question, answer in zip(questions, answers, strict=True)]
                scores[task.name] = sum(right) / len(right)
            points[point.layers] = replace(point, scores=scores)
    return replace(profile, points=tuple(points.values()))
