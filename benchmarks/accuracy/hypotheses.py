"""The experiments on what closes the gap between sharing and ordinary fine-tuning: what each supposes, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prefillshare.finetuning.recipe import Recipe, parse

RUNS = Path("runs/screen")
#: Most transcripts per task, and most tokens of one.
SCREEN, MAX_TOKENS = 700, 768
TOOLS, HOME = ("bfcl_simple_python", "bfcl_multiple"), ("home_commands",)
#: Data of two turns, one of each of two tasks, in one transcript where both fit: both are learnt.
MIXTURE = "mixture"


@dataclass(frozen=True)
class Experiment:
    """`supposed`: the hypothesis; `verdict`: what came of it. `changes`: to the recipe. `over`: the experiment that makes its
    base; None: the model itself. `against`: the ordinary fine-tune of the same size over the same base, which it is compared
    with. `is_fed_base_kv`: ask it, too, with a part of the prompt as base KV, for which it was not trained."""

    name: str
    supposed: str
    data: str
    suites: tuple[str, ...]
    changes: dict = field(default_factory=dict)
    over: str | None = None
    against: str | None = None
    verdict: str = ""
    seeds: int = 1
    is_fed_base_kv: bool = False

    def folder(self, seed: int = 0) -> Path:
        return RUNS / (f"{self.name}-seed-{seed}" if seed else self.name)

    def recipe(self, model: Path, seed: int = 0) -> Recipe:
        base = str(BY_NAME[self.over].folder() if self.over else model)
        screen = {
            "base": base, "train": str(data_file(self.data)), "output": str(self.folder(seed)), "epochs": 2, "seed": seed,
            "dtype": "bfloat16", "max_tokens": MAX_TOKENS, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-3,
            "checkpoint_every_steps": 20, "lora": {"rank": 8, "alpha": 32, "saved_as": "bfloat16"},
        }  # fmt: skip
        return parse(screen | self.changes)


ORDINARY = {"method": "ordinary", "base_kv_gib": 0}
TUNED = {"method": "base", "base_kv_gib": 0, "lora": {"rank": 16, "alpha": 64, "saved_as": "bfloat16"}}
OWN_32, OWN_64 = {"own_tokens": 32}, {"own_tokens": 64}
EXPERIMENTS = (
    Experiment("base", "one base can be tuned on tool calls and arithmetic at once", MIXTURE, (*TOOLS, "arithmetic"), TUNED,
               verdict="tool calls, yes; arithmetic hardly, on so little data"),
    Experiment("home-ordinary", "the ordinary fine-tune of the model, to compare with", "home", HOME, ORDINARY,
               is_fed_base_kv=True),
    Experiment("home", "the model's KV is good enough for a task that it cannot do", "home", HOME, against="home-ordinary",
               verdict="no"),
    Experiment("home-own-32", "what is lost is lost in the question: a decoder that computes the prompt's last 32 tokens "
               "itself reads it", "home", HOME, OWN_32, against="home-ordinary", verdict="half of the gap is closed"),
    Experiment("home-own-64", "more own tokens win more", "home", HOME, OWN_64, against="home-ordinary",
               verdict="no: 32 cover the question"),
    Experiment("base-home-ordinary", "the ordinary fine-tune of the tuned base, to compare with", "home", HOME, ORDINARY,
               "base", seeds=3),
    Experiment("base-home", "a base tuned on other tasks makes KV that helps a task it has not learnt", "home", HOME,
               over="base", against="base-home-ordinary", verdict="no, not by itself"),
    Experiment("base-home-own-32", "both together: a tuned base, and an own end of the prompt", "home", HOME, OWN_32,
               over="base", against="base-home-ordinary", verdict="two thirds of the gap are closed", seeds=3),
    Experiment("base-tools-ordinary", "the ordinary fine-tune of the tuned base, to compare with", "tools", TOOLS, ORDINARY,
               "base"),
    Experiment("base-tools", "a base that has learnt the task makes KV from which a decoder needs nothing of its own", "tools",
               TOOLS, over="base", against="base-tools-ordinary", verdict="yes: what is left is within the noise"),
    Experiment("tools-ordinary", "the ordinary fine-tune of the model, to compare with", "tools", TOOLS, ORDINARY,
               is_fed_base_kv=True),
    Experiment("tools", "the model's KV is good enough for a task that it cannot do", "tools", TOOLS,
               against="tools-ordinary"),
)  # fmt: skip
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


def data_file(name: str) -> Path:
    return RUNS / "data" / f"{name}.jsonl"
