"""The data of the experiments: at most so many short transcripts of each suite, and what is put together of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

from benchmarks.accuracy.hypotheses import (
    AGENTS,
    JOINT,
    JOINT_TASKS,
    MAX_TOKENS,
    MIXTURE,
    SCREEN,
    SEEN,
    SEEN_TRANSCRIPTS,
    data_file,
)
from benchmarks.accuracy.rows import OTHERS
from prefillshare.finetuning.tasks import TASKS, write_transcripts

#: Name -> (suite, transcripts that are made, of which the first that are short enough are taken, most others before each).
ALONE = {
    "tools": ("bfcl_simple_python", 3600, OTHERS),
    "arithmetic": ("arithmetic", 2600, OTHERS),
    "home": ("home_commands", SCREEN, 0),
}
MIXED = ("tools", "arithmetic")


def make(tokenizer) -> None:
    """Make the transcripts that are not there."""
    for name, (suite, count, others) in ALONE.items():
        if not data_file(name).is_file():
            write_transcripts([TASKS[suite]], data_file(name), count, others=others)
            made = data_file(name).read_text().splitlines(keepends=True)
            data_file(name).write_text("".join([line for line in made if _fits(tokenizer, _messages(line))][:SCREEN]))
    if not data_file(MIXTURE).is_file():
        turns = [[_messages(line)[-3:] for line in data_file(name).read_text().splitlines()] for name in MIXED]
        made = mixed(turns, lambda messages: _fits(tokenizer, messages))
        data_file(MIXTURE).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in made))
    if not data_file(AGENTS).is_file():
        write_transcripts([TASKS[suite] for suite, *_ in ALONE.values()], data_file(AGENTS), SCREEN, in_one=2)
    if not data_file(SEEN).is_file():
        data_file(SEEN).write_text("".join(data_file("home").read_text().splitlines(keepends=True)[:SEEN_TRANSCRIPTS]))
    if not data_file(JOINT).is_file():
        data_file(JOINT).write_text("".join(data_file(name).read_text() for name in JOINT_TASKS))


def mixed(turns: Sequence[Sequence[list]], fits: Callable[[list], bool], seed: int = 0) -> list[list]:
    """Pairs of turns, one of each of two tasks, in either order; a pair that does not fit becomes two transcripts."""
    rng, made = random.Random(seed), []
    for one, other in zip(*turns, strict=True):
        pair = one + other if rng.random() < 0.5 else other + one
        made += [pair] if fits(pair) else [one, other]
    rng.shuffle(made)
    return made


def _messages(line: str) -> list[dict]:
    return json.loads(line)["messages"]


def _fits(tokenizer, messages: list[dict]) -> bool:
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)) <= MAX_TOKENS
