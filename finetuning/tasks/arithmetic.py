"""Arithmetic word problems: reasoning-gym's gsm_symbolic (GSM-Symbolic's templates); training and test seeds are far apart."""

from __future__ import annotations

import re
from functools import partial

from prefillshare.finetuning.tasks.base import SPLITS, Question, Task, asks_as, normalised
from prefillshare.kvshare.errors import InvalidInput

TEST_SEED, TEST_SIZE = 500_000_000, 500
#: An item's own seed is the data set's seed plus the item's number, so each of our seeds gets a stride of items of its own.
STRIDE, SEEDS = 1_000_000, 200
_FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
SYSTEM = "Solve the problem step by step. End with #### and the result."


class Arithmetic(Task):
    name, max_tokens = "arithmetic", 256

    def questions(self) -> list[Question]:
        return [
            Question(f"{self.name}_{number}", _messages(item), partial(_is_right, item))
            for number, item in enumerate(_dataset(TEST_SIZE, TEST_SEED))
        ]

    def transcripts(self, count: int, seed: int, split: str = "train") -> list[dict]:
        first = (SPLITS.index(split) * SEEDS + seed) * STRIDE
        more = count + count // 10 + 10  # a few happen to ask what the test set asks
        if seed >= SEEDS or more > STRIDE:
            raise InvalidInput(f"seed {seed} and count {count} are too large", fix=f"use at most {SEEDS - 1} and {STRIDE // 2}")
        asked = [(normalised(question.messages[-1]["content"]), question.name) for question in self.questions()]
        items = [item for item in _dataset(more, first) if asks_as(normalised(item["question"]), asked) is None][:count]
        answers = [{"role": "assistant", "content": item["metadata"]["answer_cot"]} for item in items]
        return [{"messages": [*_messages(item), answer]} for item, answer in zip(items, answers, strict=True)]


def _dataset(size: int, seed: int):
    import reasoning_gym

    return reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)


def _messages(item) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": item["question"]}]


def _is_right(item, answer: str) -> bool:
    found = _FINAL.findall(answer)
    return bool(found) and float(found[-1].replace(",", "")) == float(item["answer"].replace(",", ""))
