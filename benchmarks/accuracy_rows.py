"""What benchmarks.accuracy compares: kinds of task, what is trained for each, and the rows of the tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from finetuning.recipe import Recipe, load, parse

RECIPES = Path("finetuning/recipes")
RUNS = Path("runs/accuracy")
#: Transcripts before each, at most: as in the sessions that the adapters serve.
OTHERS = 1


@dataclass(frozen=True)
class Study:
    """One kind of task. `recipe`: of PrefillShare's adapter; trained on `transcripts` of the suite `data`, each with at most
    `OTHERS` of other decoders' turns before it."""

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
        Study("tools", "bfcl_simple_python", 5000, ("bfcl_simple_python", "bfcl_multiple")),
        Study("arithmetic", "arithmetic", 4000, ("arithmetic",)),
    )
}


@dataclass(frozen=True)
class Training:
    """`changes`: what its recipe has that the study's has not; none: the adapter in adapters/. `part`: of the study's data it
    sees only one in so many transcripts, so many times as often. `studies`: those it is made for."""

    name: str
    changes: dict = field(default_factory=dict)
    part: int = 1
    studies: tuple[str, ...] = tuple(STUDIES)

    def recipe(self, study: Study) -> Recipe:
        recipe = load(study.recipe)
        if not self.changes and self.part == 1:
            return recipe
        folder = RUNS / study.name / self.name.replace(", ", "-").replace(" ", "-").lower()
        settings = recipe.model_dump(mode="json") | self.changes | {"output": str(folder)}
        if self.part > 1:
            whole = Path(recipe.train)
            part = whole.with_name(f"{whole.stem}-part-{self.part}{whole.suffix}")
            settings |= {"train": str(part), "epochs": recipe.epochs * self.part}
        return parse(settings)


FULL = {"weights": "full", "learning_rate": 1e-4, "micro_batch_size": 4}  # small steps at a time: half the memory
RANK = {"lora": {"rank": 64, "alpha": 128, "saved_as": "bfloat16"}, "learning_rate": 5e-4}
ICARUS = {"method": "icarus"}
ORDINARY = {"method": "ordinary"}
PART = 6

TRAININGS = {
    training.name: training
    for training in (
        Training("full fine-tuning", FULL | ORDINARY),
        Training("PrefillShare, LoRA"),
        Training("PrefillShare, full", FULL),
        Training("ICaRus", ICARUS),
        Training("PrefillShare, LoRA of rank 64", RANK),
        Training("ICaRus of rank 64", ICARUS | RANK),
        Training("full fine-tuning, a sixth of the data", FULL | ORDINARY, PART, ("tools",)),
        Training("PrefillShare, LoRA, a sixth of the data", {}, PART, ("tools",)),
    )
}


@dataclass(frozen=True)
class Row:
    """A decoder (None: the base) and how it sees context. `layers`: the share of the layers whose KV of the prompt it computes
    itself: the group of at most so many that its profile finds best (DroidSpeak)."""

    name: str
    about: str
    training: str | None
    method: str
    layers: float = 0.0

    def is_of(self, study: Study) -> bool:
        return self.training is None or study.name in TRAININGS[self.training].studies


REFERENCE = "full fine-tuning"
NAIVE = "naive sharing"
#: Shares of the layers, each a row.
LAYERS = (0.1, 0.25, 0.5)
ROWS = (
    Row("base", "the base itself, no training", None, "ordinary"),
    Row(REFERENCE, "all weights trained in the ordinary way; its own KV", REFERENCE, "ordinary"),
    Row(NAIVE, "the same weights, fed base KV of the prompt (DroidSpeak's full reuse)", REFERENCE, "prefillshare"),
    *(
        Row(f"DroidSpeak, {share:.0%} of the layers", "the same weights: their own KV of the prompt in the best group of at "
            "most so many layers, the base's in the others", REFERENCE, "prefillshare", share)
        for share in LAYERS
    ),
    Row("PrefillShare, LoRA", "an adapter of rank 8 trained over base KV of the prompt; the one in adapters/",
        "PrefillShare, LoRA", "prefillshare"),
    Row("PrefillShare, LoRA of rank 64", "the same, eight times as large", "PrefillShare, LoRA of rank 64", "prefillshare"),
    Row("PrefillShare, full", "all weights trained over base KV of the prompt", "PrefillShare, full", "prefillshare"),
    Row("ICaRus", "an adapter of rank 8 on q, o and the MLP, trained over base KV of everything", "ICaRus", "icarus"),
    Row("ICaRus of rank 64", "the same, eight times as large", "ICaRus of rank 64", "icarus"),
    Row("full fine-tuning, a sixth of the data", f"as many steps over one transcript in {PART}",
        "full fine-tuning, a sixth of the data", "ordinary"),
    Row("PrefillShare, LoRA, a sixth of the data", f"as many steps over one transcript in {PART}",
        "PrefillShare, LoRA, a sixth of the data", "prefillshare"),
)  # fmt: skip

#: The rows whose prompts can be base KV in part, and the parts. The base's own KV is base KV.
CURVE = ("base", NAIVE, "PrefillShare, LoRA")
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
