"""Twelve turns of three decoders over HTTP compute only what is new, however their client keeps the history.

What is new at a turn: its prompt but for what the base's KV was computed of before, that is all earlier prompts and answers.
"""

from __future__ import annotations

from itertools import cycle

import pytest
from conftest import System

pytestmark = pytest.mark.engine

BLOCK = 32
TURNS, ANSWER = 12, 12
#: What each agent is told of itself.
AGENTS = {
    "tools": "You call tools. Choose the function that answers the question, and give its arguments.",
    "arithmetic": "You calculate. Go step by step, and put the result at the end.",
    "base": "You sum up what the others have said, in one sentence.",
}
ASKED = "Step {}: what do you do with what the others have found out so far, and what is left for the one after you?"


class Count:
    """New and computed prompt tokens of one way. `context`: tokens whose base KV has been computed."""

    def __init__(self) -> None:
        self.new = self.computed = self.context = 0
        self.served: list[str | None] = []

    def turn(self, usage: dict, own_tokens: int = 0) -> None:
        """`own_tokens`: of the prompt's end, which the context does not keep."""
        prompt = usage["prompt_tokens"]
        self.new += prompt - self.context
        self.computed += usage["computed_tokens"]
        self.context = prompt - own_tokens + usage["completion_tokens"]
        self.served.append(usage.get("session"))

    def check(self) -> None:
        assert self.computed <= 1.05 * self.new + TURNS * BLOCK, vars(self)
        assert self.new < 1.2 * self.context + 40 * TURNS, "the history was not shared in the first place"


def own_tokens(running: System, text: str) -> int:
    """Tokens of an agent's own part, as the demo model's template lays it out."""
    tokenizer = _tokenizer(running)
    return len(tokenizer.encode(f"<|im_start|>system\n{text}<|im_end|>\n", add_special_tokens=False))


def _tokenizer(running: System):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(running.deployment.base.model)


def usage_of(answer) -> dict:
    return answer.model_extra["kv_transfer_params"]["prefillshare"]


def test_by_responses(running, http):
    count, last = Count(), None
    for number, (name, told) in zip(range(TURNS), cycle(AGENTS.items())):
        last = http.responses.create(
            model=name,
            input=ASKED.format(number),
            instructions=told,
            previous_response_id=last.id if last else None,
            max_output_tokens=ANSWER,
            temperature=0,
        )
        count.turn(usage_of(last), own_tokens(running, told))
    assert count.served == ["begun"] + ["continued"] * (TURNS - 1)
    count.check()


def test_by_the_header(running, http):
    count, history = Count(), []
    for number, (name, told) in zip(range(TURNS), cycle(AGENTS.items())):
        history.append({"role": "user", "content": ASKED.format(number)})
        answer = http.chat.completions.create(
            model=name,
            messages=[{"role": "system", "content": told}, *history],
            max_tokens=ANSWER,
            temperature=0,
            extra_headers={"x-prefillshare-session": "twelve"},
        )
        history.append(answer.choices[0].message.model_dump(exclude_none=True))
        count.turn(usage_of(answer), own_tokens(running, told))
    assert count.served == ["begun"] + ["continued"] * (TURNS - 1)
    count.check()


def test_by_plain_chat_completions(running, http):
    count, history = Count(), [{"role": "system", "content": "You work in turns."}]
    for number, name in zip(range(TURNS), cycle(AGENTS)):
        history.append({"role": "user", "content": ASKED.format(number)})
        answer = http.chat.completions.create(model=name, messages=history, max_tokens=ANSWER, temperature=0)
        history.append(answer.choices[0].message.model_dump(exclude_none=True))
        count.turn(usage_of(answer))
    assert count.served == [None] * TURNS
    count.check()
