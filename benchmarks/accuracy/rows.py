"""What benchmarks.accuracy compares: kinds of task, what is trained for each, and the rows of the tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prefillshare.finetuning.recipe import Recipe, load, parse

RECIPES = Path("finetuning/recipes")
RUNS = Path("runs/accuracy")
#: Most transcripts that precede each one, as in the sessions that the adapters serve.
OTHERS = 1


@dataclass(frozen=True)
class Study:
    """One kind of task. `recipe`: that of PrefillShare's adapter, which is trained on `transcripts` transcripts of the suite
    `data`, each preceded by at most `OTHERS` of other decoders."""

    name: str
    data: str
    transcripts: int
    suites: tuple[str, ...]

    @property
    def recipe(self) -> Path:
        return RECIPES / f"{self.name}.yaml"


STUDIES = {
    study.name: study
    for study in (
        Study("tools", "bfcl_simple_python", 3600, ("bfcl_simple_python", "bfcl_multiple")),
        Study("arithmetic", "arithmetic", 2600, ("arithmetic",)),
    )
}


@dataclass(frozen=True)
class Training:
    """`changes`: how its recipe differs from the study's; none for the adapter in adapters/. `shipped`: for one that is in
    adapters/, too, the part of its name after the study's."""

    name: str
    changes: dict = field(default_factory=dict)
    shipped: str = ""

    def recipe(self, study: Study) -> Recipe:
        recipe = load(study.recipe)
        if not self.changes:
            return recipe
        folder = RUNS / study.name / self.name.replace(", ", "-").replace(" ", "-").lower()
        if self.shipped:
            folder = Path(recipe.output).with_name(f"{study.name}-{self.shipped}")
        return parse(recipe.model_dump(mode="json") | self.changes | {"output": str(folder)})


FULL = {"weights": "full", "learning_rate": 1e-4, "micro_batch_size": 4}  # small micro-batches take half the memory
ORDINARY = {"method": "ordinary"}
#: The lower layers stay the base's. The adapter has four times the rank in a seventh of the layers.
LAST = "LoRA fine-tuning of the last 4 layers"
LAST_LORA = {"rank": 32, "alpha": 128, "saved_as": "bfloat16", "last_layers": 4}

TRAININGS = {
    training.name: training
    for training in (
        Training("full fine-tuning", FULL | ORDINARY),
        Training("LoRA fine-tuning", ORDINARY),
        Training("PrefillShare, LoRA"),
        Training("PrefillShare, full", FULL),
        Training("ICaRus", {"method": "icarus"}),
        Training(LAST, ORDINARY | {"lora": LAST_LORA}, shipped="last-layers"),
    )
}


@dataclass(frozen=True)
class Row:
    """A decoder and how it sees context. `training`: None for the base. `layers`, `tokens`: what it computes itself in the
    base's KV of the prompt: the group that its profile finds best with at most this share of the layers (DroidSpeak), or this
    share of the tokens (CacheBlend)."""

    name: str
    about: str
    training: str | None
    method: str
    layers: float = 0.0
    tokens: float = 0.0

    @property
    def ordinary(self) -> str | None:
        """The row that tells what sharing costs: the same decoder over its own KV, or, for a decoder that was trained for
        sharing, the ordinary fine-tune of the same size. None for the base, and for that fine-tune itself."""
        if self.method == "ordinary":
            return None
        if self.training in PROFILED:
            return self.training
        return REFERENCE if self.all_weights else UNTRAINED

    @property
    def all_weights(self) -> bool:
        return self.training is not None and "weights" in TRAININGS[self.training].changes


REFERENCE = "full fine-tuning"
NAIVE = "naive sharing"
UNTRAINED, REUSE = "LoRA fine-tuning", "LoRA fine-tuning, naive sharing"
#: The ordinary fine-tunes that DroidSpeak serves, and the shares of the layers that each computes itself; every share is a row.
PROFILED = {REFERENCE: "the same weights", UNTRAINED: "the same adapter", LAST: "the same adapter"}
LAYERS = {REFERENCE: (0.1, 0.25, 0.5), UNTRAINED: (0.1, 0.25, 0.5), LAST: (0.15,)}


def _droidspeak(training: str) -> list[Row]:
    return [
        Row(f"DroidSpeak, {training}, {share:.0%} of the layers", f"{PROFILED[training]}: its own KV of the prompt in the best "
            "group of at most so many layers, the base's in the others", training, "prefillshare", share)
        for share in LAYERS[training]
    ]  # fmt: skip


ROWS = (
    Row("base", "the base itself, no training", None, "ordinary"),
    Row(REFERENCE, "all weights trained in the ordinary way; its own KV", REFERENCE, "ordinary"),
    Row(NAIVE, "the same weights, fed base KV of the prompt", REFERENCE, "prefillshare"),
    *_droidspeak(REFERENCE),
    Row("PrefillShare, LoRA", "an adapter of rank 8 trained over base KV of the prompt; the one in adapters/",
        "PrefillShare, LoRA", "prefillshare"),
    Row("PrefillShare, full", "all weights trained over base KV of the prompt", "PrefillShare, full", "prefillshare"),
    Row("ICaRus", "an adapter of rank 8 on q, o and the MLP, trained over base KV of everything", "ICaRus", "icarus"),
    Row(UNTRAINED, "an adapter of rank 8 trained in the ordinary way; its own KV", UNTRAINED, "ordinary"),
    Row(REUSE, "the same adapter, fed base KV of the prompt", UNTRAINED, "prefillshare"),
    *_droidspeak(UNTRAINED),
    Row(LAST, "an adapter of rank 32 on these alone, trained in the ordinary way; its own KV", LAST, "ordinary"),
    Row(f"{LAST}, naive sharing", "the same adapter, fed base KV of the prompt", LAST, "prefillshare"),
    *_droidspeak(LAST),
    Row("CacheBlend, LoRA fine-tuning, 15 % of the tokens", "the same adapter: its own KV of two layers, and in the others of "
        "the tokens whose KV differ most there", UNTRAINED, "prefillshare", tokens=0.15),
)  # fmt: skip

#: Rows of the collapse curve, and the shares of the prompt that are base KV. For the base itself all KV is base KV.
CURVE = ("base", NAIVE, "PrefillShare, LoRA")
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
