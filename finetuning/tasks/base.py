"""The interface of a task suite, and checks on training data."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from prefillshare.kvshare.errors import ConfigError, InvalidInput

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Question:
    """`messages`: the prompt. `is_right`: whether an answer's text is right. `tools`: those offered, as OpenAI defines them."""

    name: str
    messages: Sequence[dict[str, str]]
    is_right: Callable[[str], bool]
    tools: Sequence[dict[str, Any]] = ()


class Task(ABC):
    name: str
    #: Longest answer, tokens.
    max_tokens: int
    #: Its questions and transcripts have `tools`, which the chat template must have a place for.
    offers_tools: bool = False
    #: Its transcripts may precede those of any suite, as other decoders' turns. Data that recipes name depends on which do.
    precedes_others: bool = True

    @abstractmethod
    def questions(self) -> list[Question]:
        """The test set, always the same."""

    @abstractmethod
    def transcripts(self, count: int, seed: int, split: str = "train") -> list[dict]:
        """At most `count` transcripts of a split (one of SPLITS). The splits have nothing in common with each other or with the
        test questions."""


def check_disjoint(transcripts: Sequence[dict], questions: Sequence[Question]) -> None:
    """Raises ConfigError, naming the test question, if a transcript asks one: in the same words, or in all of them and more."""
    asked = [(normalised(question.messages[-1]["content"]), question.name) for question in questions]
    for transcript in transcripts:
        for message in transcript["messages"]:
            if message["role"] != "user" or not normalised(message["content"]):
                continue
            if (name := asks_as(normalised(message["content"]), asked)) is not None:
                raise ConfigError(f"test question {name} is in the training data: {message['content'][:80]!r}")


def in_company(transcripts: Sequence[dict], others: Sequence[dict], most: int, seed: int) -> list[dict]:
    """Each transcript as a part of a session that several decoders share: up to `most` others precede it and are not learnt."""
    rng = random.Random(f"company {seed}")

    def said(other: dict) -> list[dict]:
        return [m | {"weight": 0} if m["role"] == "assistant" else m for m in other["messages"]]

    return [
        {"messages": [m for other in rng.sample(others, rng.randint(0, most)) for m in said(other)] + transcript["messages"]}
        for transcript in transcripts
    ]


def together(suites: Sequence[Sequence[dict]], most: int, seed: int) -> list[dict]:
    """The transcripts of all suites, each once, up to `most` of different suites in one, in any order. Raises InvalidInput for
    transcripts that offer tools, which would be offered to all."""
    rng, made = random.Random(f"together {seed}"), []
    for round_of_all in zip_longest(*suites):
        turns = [transcript for transcript in round_of_all if transcript is not None]
        if any("tools" in transcript for transcript in turns):
            raise InvalidInput("a suite whose transcripts offer tools stays alone", field="--together", fix="leave it out")
        rng.shuffle(turns)
        for first in range(0, len(turns), most):
            made.append({"messages": [m for transcript in turns[first : first + most] for m in transcript["messages"]]})
    rng.shuffle(made)
    return made


def asks_as(text: str, asked: Sequence[tuple[str, str]]) -> str | None:
    """The name of a question of `asked` (normalised text, name) that `text` contains, or that contains it."""
    return next((name for question, name in asked if question in text or text in question), None)


def normalised(text: str) -> str:
    """Lower case, words only."""
    return " ".join(re.findall(r"\w+", text.lower()))
