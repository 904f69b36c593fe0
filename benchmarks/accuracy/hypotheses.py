"""The experiments on what closes the gap between sharing and ordinary fine-tuning: what each supposes, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.accuracy.rows import FULL, RECIPES
from prefillshare.finetuning.recipe import Recipe, load, parse

RUNS = Path("runs/screen")
#: Most transcripts per task, and most tokens of one.
SCREEN, MAX_TOKENS = 700, 768
TOOLS, HOME = ("bfcl_simple_python", "bfcl_multiple"), ("home_commands",)
#: Data of two turns, one of each of two tasks, in one transcript where both fit: both are learnt.
MIXTURE = "mixture"
#: Data of all three tasks, as the recipe of the shipped base has it; and of JOINT_TASKS.
AGENTS, JOINT = "agents", "joint"
#: The first of the home commands: as many as SEEN_TRANSCRIPTS.
SEEN, SEEN_TRANSCRIPTS = "home-seen", 100


@dataclass(frozen=True)
class Experiment:
    """`supposed`: the hypothesis; `verdict`: what came of it. `changes`: to the recipe; `file`: a recipe that is used instead,
    with this experiment's base and data. `over`: the experiment that makes its base; None: the model itself. `against`: the
    ordinary fine-tune of the same size over the same base, which it is compared with. `lever`: a way of training that is no
    feature (benchmarks/accuracy/levers). `is_fed_base_kv`: ask it, too, with a part of the prompt as base KV, for which it was
    not trained."""

    name: str
    supposed: str
    data: str
    suites: tuple[str, ...]
    changes: dict = field(default_factory=dict)
    over: str | None = None
    against: str | None = None
    lever: str = ""
    file: Path | None = None
    verdict: str = ""
    seeds: int = 1
    is_fed_base_kv: bool = False

    def folder(self, seed: int = 0) -> Path:
        return RUNS / (f"{self.name}-seed-{seed}" if seed else self.name)

    def recipe(self, model: Path, seed: int = 0) -> Recipe:
        base = str(BY_NAME[self.over].folder() if self.over else model)
        mine = {"base": base, "train": str(data_file(self.data)), "output": str(self.folder(seed)), "seed": seed}
        if self.file:
            return parse(load(self.file).model_dump(mode="json") | mine)
        screen = {
            "epochs": 2, "dtype": "bfloat16", "max_tokens": MAX_TOKENS, "batch_size": 16, "micro_batch_size": 8,
            "learning_rate": 1e-3, "checkpoint_every_steps": 20, "lora": {"rank": 8, "alpha": 32, "saved_as": "bfloat16"},
        }  # fmt: skip
        return parse(screen | mine | self.changes)


ORDINARY = {"method": "ordinary", "base_kv_gib": 0}
ICARUS = {"method": "icarus"}
TUNED = {"method": "base", "base_kv_gib": 0, "lora": {"rank": 16, "alpha": 64, "saved_as": "bfloat16"}}
OWN_32, OWN_64 = {"own_tokens": 32}, {"own_tokens": 64}
#: Tasks of the decoders that are trained jointly with their prefill module, and the rank of each map of base KV.
JOINT_TASKS, KV_MAP_RANK = ("home", "arithmetic"), 32
EXPERIMENTS = (
    # Over the model as it comes.
    Experiment("home-ordinary", "the ordinary fine-tune of the model, to compare with", "home", HOME, ORDINARY,
               is_fed_base_kv=True),
    Experiment("home", "the model's KV is good enough for a task that it cannot do", "home", HOME, against="home-ordinary",
               verdict="no"),
    Experiment("home-own-32", "what is lost is lost in the question: a decoder that computes the prompt's last 32 tokens "
               "itself reads it", "home", HOME, OWN_32, against="home-ordinary", verdict="half of the gap is closed"),
    Experiment("home-own-64", "more own tokens win more", "home", HOME, OWN_64, against="home-ordinary",
               verdict="no: 32 cover the question"),
    Experiment("home-distilled", "a teacher's distribution says more than the next token alone: that of the ordinary "
               "fine-tune is learnt, too", "home", HOME, against="home-ordinary", lever="distilled",
               verdict="no: what is won is within the noise"),
    Experiment("home-mapped", f"base KV can be mapped to what the task needs, by maps of rank {KV_MAP_RANK} of each layer's "
               "keys and values", "home", HOME, against="home-ordinary", lever="mapped", verdict="half of the gap is closed, "
               "as by an own end; but each decoder needs a copy of the KV of its own in decode memory (no R5)"),
    Experiment("home-own-32-mapped", "both together: maps of base KV, and an own end of the prompt", "home", HOME, OWN_32,
               against="home-ordinary", lever="mapped", verdict="no more than each by itself"),
    # Over a base that has learnt two tasks, and not the third.
    Experiment("base", "one base can be tuned on tool calls and arithmetic at once", MIXTURE, (*TOOLS, "arithmetic"), TUNED,
               verdict="tool calls, yes; arithmetic hardly, on so little data"),
    Experiment("base-tools-ordinary", "the ordinary fine-tune of the tuned base, to compare with", "tools", TOOLS, ORDINARY,
               "base"),
    Experiment("base-tools", "a base that has learnt the task makes KV from which a decoder needs nothing of its own", "tools",
               TOOLS, over="base", against="base-tools-ordinary", verdict="yes: what is left is within the noise"),
    Experiment("base-home-ordinary", "the ordinary fine-tune of the tuned base, to compare with", "home", HOME, ORDINARY,
               "base", seeds=3),
    Experiment("base-home", "a base tuned on other tasks makes KV that helps a task it has not learnt", "home", HOME,
               over="base", against="base-home-ordinary", verdict="no, not by itself"),
    Experiment("base-home-own-32", "both together: a tuned base, and an own end of the prompt", "home", HOME, OWN_32,
               over="base", against="base-home-ordinary", verdict="two thirds of the gap are closed", seeds=3),
    # Over that base after a hundred transcripts of the third task: it has seen the task, and cannot do it as well as a decoder.
    Experiment("seen", "a hundred transcripts show a base what a task is about", SEEN, HOME, TUNED, "base",
               verdict="not enough to answer by itself"),
    Experiment("seen-home-ordinary", "the ordinary fine-tune of this base, to compare with", "home", HOME, ORDINARY, "seen"),
    Experiment("seen-home", "a base that has seen the task makes KV from which decoders learn it", "home", HOME, over="seen",
               against="seen-home-ordinary", verdict="more is right than over `base`, but the gap is the same"),
    Experiment("seen-home-own-32", "with an own end of the prompt, nothing is left of the gap", "home", HOME, OWN_32, "seen",
               "seen-home-ordinary", verdict="a third of it is left, as over `base`"),
    # Over a base that has learnt all three: finetuning/recipes/base.yaml.
    Experiment("agents", "one base can learn all tasks of its decoders", AGENTS, (*TOOLS, "arithmetic", *HOME),
               file=RECIPES / "base.yaml", verdict="yes: tool calls are about as good as those of the base of two tasks"),
    Experiment("agents-home-ordinary", "the ordinary fine-tune of this base, to compare with", "home", HOME, ORDINARY,
               "agents"),
    Experiment("agents-home", "over a base that has learnt the task, home commands need nothing of the decoder's own, too",
               "home", HOME, over="agents", against="agents-home-ordinary",
               verdict="nearly: four fifths of the gap are closed, while decoders learn much that the base does not know"),
    Experiment("agents-home-own-32", "what is left of the gap is in the question", "home", HOME, OWN_32, "agents",
               "agents-home-ordinary", verdict="yes: what is left is within the noise"),
    Experiment("agents-home-icarus", "the same holds for a decoder that makes no KV at all", "home", HOME, ICARUS, "agents",
               "agents-home-ordinary"),
    Experiment("agents-home-full-ordinary", "full fine-tuning of this base, to compare with", "home", HOME, ORDINARY | FULL,
               "agents"),
    Experiment("agents-home-full", "the same holds for all weights", "home", HOME, FULL, "agents",
               "agents-home-full-ordinary"),
    Experiment("agents-tools-ordinary", "the ordinary fine-tune of this base, to compare with", "tools", TOOLS, ORDINARY,
               "agents"),
    Experiment("agents-tools", "a third task in the mixture does not harm the others", "tools", TOOLS, over="agents",
               against="agents-tools-ordinary"),
    Experiment("agents-tools-own-32", "what is left of the gap is in the question", "tools", TOOLS, OWN_32, "agents",
               "agents-tools-ordinary"),
    Experiment("agents-tools-icarus", "the same holds for a decoder that makes no KV at all", "tools", TOOLS, ICARUS, "agents",
               "agents-tools-ordinary"),
    # One prefill module, trained through the losses of its decoders.
    Experiment("joint", "a prefill module is best trained through its decoders' losses", JOINT, (), TUNED, lever="joint"),
    Experiment("joint-home-ordinary", "the ordinary fine-tune of this module, to compare with", "home", HOME, ORDINARY,
               "joint"),
    Experiment("joint-home", "its decoder of home commands", "home", HOME, over="joint", against="joint-home-ordinary"),
    Experiment("joint-arithmetic", "its decoder of arithmetic", "arithmetic", ("arithmetic",), over="joint"),
)  # fmt: skip
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


def data_file(name: str) -> Path:
    return RUNS / "data" / f"{name}.jsonl"
