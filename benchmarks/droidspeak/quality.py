"""What a decoder that DroidSpeak serves loses in right answers, against its own full prefill: the same questions are answered
greedily both ways, offline and in float32. tests/engine/test_droidspeak.py checks that the served system agrees with the
offline definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.accuracy.asker import best_group
from prefillshare.finetuning import subjects
from prefillshare.finetuning.evaluate import difference, evenly, offline_answers
from prefillshare.finetuning.methods import METHODS
from prefillshare.finetuning.tasks import TASKS
from prefillshare.finetuning.transcripts import stop_ids
from prefillshare.kvshare.layer_group import LayerGroup, layer_group
from prefillshare.kvshare.layer_profile import LayerProfile

BATCH = 32


def profiled_point(base: Path, decoder: Path, share: float) -> LayerGroup:
    """The group of least divergence in the decoder's profile among those with at most this share of the layers."""
    return layer_group(best_group(LayerProfile.read(decoder, base), share))


def quality(
    base: Path, decoder: Path, group: LayerGroup, suite: str, questions: int, advance: Callable[[int], None]
) -> dict[str, float | int | str]:
    """Shares of right answers, and the difference in points with its 95 % interval (paired, Agresti and Min)."""
    task, tokenizer, frozen = TASKS[suite], AutoTokenizer.from_pretrained(base), subjects.load_base(base)
    asked = evenly(task.questions(), questions)
    answers = {}
    for way, method, own_layers in (("own_prefill", "ordinary", None), ("droidspeak", "prefillshare", group)):
        subject = subjects.load(way, base, decoder, METHODS[method], frozen=frozen)
        answers[way] = offline_answers(
            subject, task, asked, tokenizer, stop_ids=stop_ids(base, tokenizer), batch_size=BATCH, own_layers=own_layers,
            advance=advance,
        )  # fmt: skip
    right = {way: [q.is_right(a) for q, a in zip(asked, given, strict=True)] for way, given in answers.items()}
    apart = difference(right["droidspeak"], right["own_prefill"])
    low, high = apart.interval
    return {
        "decoder": str(decoder),
        "suite": suite,
        "questions": len(asked),
        "layers": str(group),
        **{way: sum(of) / len(of) for way, of in right.items()},
        "same_answers": sum(a == b for a, b in zip(*answers.values(), strict=True)),
        "points": round(100 * apart.mean, 2),
        "points_low": round(100 * low, 2),
        "points_high": round(100 * high, 2),
    }
