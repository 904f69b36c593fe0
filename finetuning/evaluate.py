"""Task scores of a decoder, through the served system or offline by the same definition.

Offline answers are compared with the reference, token by token, in tests/unit/finetuning/test_generate.py; they are batched
freely and need no engines. Through the system, answers come from `prefillshare serve` over gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from prefillshare.client import Client
from prefillshare.finetuning.generate import generate
from prefillshare.finetuning.subjects import Subject
from prefillshare.finetuning.tasks import Question, Task
from prefillshare.finetuning.tasks.tool_calls import written
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.router.sessions.chat import ChatLayout

T = TypeVar("T")

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """Share of right answers with its 95 % interval (Wilson)."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.96, self.asked, self.share
        middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def score(right: Sequence[bool]) -> Score:
    return Score(sum(right), len(right))


@dataclass(frozen=True)
class Difference:
    """The difference of two shares of right answers to the same questions, with its 95 % interval. Questions that both answer
    right or both wrong do not count. `only_first`, `only_second`: questions that only one answers right."""

    only_first: int
    only_second: int
    asked: int

    @property
    def mean(self) -> float:
        return (self.only_first - self.only_second) / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Agresti and Min, Biometrics 61 (2005): half a question is added to each of the four cells."""
        first, second, asked = self.only_first + 0.5, self.only_second + 0.5, self.asked + 2
        mean = (first - second) / asked
        width = 1.96 * math.sqrt(first + second - (first - second) ** 2 / asked) / asked
        return mean - width, mean + width


def difference(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    pairs = list(zip(first, second, strict=True))
    return Difference(pairs.count((True, False)), pairs.count((False, True)), len(pairs))


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spread, in order."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def offline_answers(
    subject: Subject,
    task: Task,
    questions: Sequence[Question],
    tokenizer,
    *,
    stop_ids: Sequence[int],
    batch_size: int = 16,
    base_share: float = 1.0,
    own_layers: LayerGroup | None = None,
    own_share: float = 0.0,
    device: str = "cpu",
    advance: Advance = lambda count: None,
) -> list[str]:
    """Greedy answers, in the questions' order; prompts of like length are batched together."""
    prompts = [ChatLayout(tokenizer, question.tools).opening(list(question.messages)) for question in questions]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers = [""] * len(prompts)
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        made = generate(
            subject.method,
            subject.decoder,
            subject.base,
            [prompts[number] for number in part],
            max_tokens=task.max_tokens,
            stop_ids=stop_ids,
            device=device,
            base_share=base_share,
            own_layers=own_layers,
            own_share=own_share,
        )
        for number, ids in zip(part, made, strict=True):
            answers[number] = tokenizer.decode(ids, skip_special_tokens=True)
        advance(len(part))
    return answers


def served_answers(
    client: Client,
    decoder: str,
    task: Task,
    questions: Sequence[Question],
    *,
    at_once: int = 16,
    advance: Advance = lambda count: None,
) -> list[str]:
    """Greedy answers of a running deployment; each question has a session of its own.

    Tools are offered as clients offer them: where router.own_prompt puts them, and with calls found by the deployment's parser.
    """

    def ask(question: Question) -> str:
        session, tools = client.create_session(), {"tools": question.tools} if question.tools else {}
        how = {"max_tokens": task.max_tokens, "temperature": 0.0} | tools
        try:
            result = session.turn(decoder, messages=list(question.messages), **how)
            return written(result.text, [(call.name, call.arguments) for call in result.tool_calls])
        finally:
            session.delete()
            advance(1)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(ask, questions))
