"""The ways in which a client may keep a conversation, and the twelve turns that are played by each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from benchmarks.chats.surface import ChatSurface

BLOCK, TURNS = 32, 12
AGENTS = {
    "planner": "You plan. Split the task into steps, and say which of them come first.",
    "coder": "You write code. Keep to the plan, and say what you have left out.",
    "base": "You are the reviewer. Name one thing that is missing, in one sentence.",
}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}}
BRIEF = "\n".join(
    f"Part {number}: orders of kind {number} are billed on day {number % 28 + 1}, and refunded within {number + 14} days."
    for number in range(60)
)
WAYS = ("responses", "header", "plain")


@dataclass(frozen=True)
class Agent:
    """`prompt`: its system prompt."""

    decoder: str
    prompt: str
    tools: list[dict]


def agents(alike: bool) -> list[Agent]:
    """The three agents. `alike`: all have the same system prompt and tools."""
    prompts = ["You work on the billing service in turns."] * len(AGENTS) if alike else list(AGENTS.values())
    names = ["all"] * len(AGENTS) if alike else list(AGENTS)
    return [Agent(*of, _tools(name)) for of, name in zip(zip(AGENTS, prompts, strict=True), names, strict=True)]


def _tools(agent: str) -> list[dict]:
    told = {"read_file": "Read a file of the project", f"report_{agent}": "Tell how far the work is"}
    return [
        {"type": "function", "function": {"name": name, "description": f"{text}, as {agent}.", "parameters": SCHEMA}}
        for name, text in told.items()
    ]


def _answer(number: int, thinking: str) -> tuple[str, bool]:
    """The text of a turn's answer, and whether it is a tool call; every third one is, without spaces, as models may write."""
    if number % 3 == 1:
        call = {"name": "read_file", "arguments": {"path": f"src/part_{number}.py", "lines": 40}}
        return f"{thinking}<tool_call>\n{json.dumps(call, separators=(',', ':'))}\n</tool_call>", True
    return f"{thinking}Step {number}: the part is done, and its tests pass. The next one needs the result of this one.", False


async def play(base: str, template: str, thinking: str, way: str, alike: bool) -> dict[str, int]:
    """The conversation by one way. Raises AssertionError if a call is not answered as the script says."""
    surface = ChatSurface(base, base={"name": "base", "chat_template": template, "max_model_len": 4096})
    await surface.start()
    try:
        return await _Client(surface, way).play(thinking, agents(alike))
    finally:
        await surface.stop()


class _Client:
    def __init__(self, surface: ChatSurface, way: str):
        self._surface, self._way = surface, way
        self._made: list[list[int]] = []
        self._history: list[dict] = []
        self._last: dict = {}
        self._prompt = self._computed = self._continued = 0

    async def play(self, thinking: str, agents: list[Agent]) -> dict[str, int]:
        turns, called = cycle(agents), None
        for number in range(TURNS):
            answer, is_call = _answer(number, thinking)
            self._surface.answers = [answer]
            if called:  # who has called a tool gets its result
                message = self._result(called, number)
            else:
                agent = next(turns)
                asked = f"Go on with part {number} of the billing service."
                message = {"role": "user", "content": asked if number else f"{BRIEF}\n\n{asked}"}
            called = await self._turn(agent, message)
            assert bool(called) == is_call, self._last
            self._count()
        last = len(self._surface.ids[-1])
        return {"prompt": self._prompt, "last_prompt": last, "computed": self._computed, "continued": self._continued}

    def _result(self, call_id: str, number: int) -> dict:
        return {"role": "tool", "tool_call_id": call_id, "content": f"def part_{number}(order):\n    return order.total()\n"}

    async def _turn(self, agent: Agent, message: dict) -> str | None:
        """Returns the id of the tool call that the answer makes."""
        if self._way == "responses":
            return await self._response(agent, message)
        self._history.append(message)
        messages = [{"role": "system", "content": agent.prompt}, *self._history]
        body = {"model": agent.decoder, "messages": messages, "tools": agent.tools}
        headers = {"x-prefillshare-session": "twelve"} if self._way == "header" else {}
        data = await self._post("/v1/chat/completions", body, headers)
        answer = {key: value for key, value in data["choices"][0]["message"].items() if value is not None}
        self._history.append(answer)
        return answer["tool_calls"][0]["id"] if answer.get("tool_calls") else None

    async def _response(self, agent: Agent, message: dict) -> str | None:
        item = message
        if message["role"] == "tool":
            item = {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
        body = {"model": agent.decoder, "input": [item], "instructions": agent.prompt}
        body["tools"] = [{"type": "function", **tool["function"]} for tool in agent.tools]
        body["previous_response_id"] = self._last.get("id")
        data = await self._post("/v1/responses", body, {})
        return next((item["call_id"] for item in data["output"] if item["type"] == "function_call"), None)

    async def _post(self, path: str, body: dict, headers: dict) -> dict:
        answered = await self._surface.http.post(path, json=body | {"temperature": 0}, headers=headers)
        assert answered.status_code == 200, answered.text
        self._last = answered.json()
        self._continued += answered.headers.get("x-prefillshare-session-state") == "continued"
        return self._last

    def _count(self) -> None:
        """Take note of the last prompt; from now on the base's KV of it is there, and that of the answer behind its context."""
        prompt, kept = self._surface.ids[-1], self._surface.kept[-1]
        common = max((_common(prompt, made) for made in self._made), default=0)
        self._prompt += len(prompt)
        self._computed += len(prompt) - min(common, len(prompt) - 1) // BLOCK * BLOCK
        self._made += [prompt, kept]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that both have."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, others) in pairs if mine != others), min(len(one), len(other)))
