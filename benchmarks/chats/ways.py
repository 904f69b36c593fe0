"""The ways in which a client may keep a conversation, and the twelve turns that are played by each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle

from benchmarks.chats.surface import ChatSurface

BLOCK, TURNS = 32, 12
AGENTS = {
    "planner": "You plan. Split the task into steps, and say which of them come first.",
    "coder": "You write code. Keep to the plan, and say what you have left out.",
    "base": "You are the reviewer. Name one thing that is missing, in one sentence.",
}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": told, "parameters": SCHEMA}}
    for name, told in (("read_file", "Read a file of the project."), ("run_tests", "Run the tests in a folder."))
]
WAYS = ("responses", "header", "plain")


def _answer(number: int, thinking: str) -> tuple[str, bool]:
    """The text of a turn's answer, and whether it is a tool call; every third one is, without spaces, as models may write."""
    if number % 3 == 1:
        call = {"name": "read_file", "arguments": {"path": f"src/part_{number}.py", "lines": 40}}
        return f"{thinking}<tool_call>\n{json.dumps(call, separators=(',', ':'))}\n</tool_call>", True
    return f"{thinking}Step {number}: the part is done, and its tests pass. The next one needs the result of this one.", False


async def play(base: str, template: str, thinking: str, way: str) -> dict[str, int]:
    """The conversation over one way. Raises AssertionError if a call is not answered."""
    surface = ChatSurface(base, base={"name": "base", "chat_template": template, "max_model_len": 4096})
    await surface.start()
    try:
        return await _Client(surface, way).play(thinking)
    finally:
        await surface.stop()


class _Client:
    def __init__(self, surface: ChatSurface, way: str):
        self._surface, self._way = surface, way
        self._made: list[list[int]] = []
        self._history: list[dict] = []
        self._last: dict = {}
        self._new = self._computed = self._continued = 0

    async def play(self, thinking: str) -> dict[str, int]:
        called = None
        for number, name in zip(range(TURNS), cycle(AGENTS), strict=False):
            answer, is_call = _answer(number, thinking)
            self._surface.answers = [answer]
            asked = {"role": "user", "content": f"Go on with part {number} of the billing service."}
            call_id = await self._turn(name, self._result(called, number) if called else asked)
            assert bool(call_id) == is_call, self._last
            called = call_id
            self._count()
        return {"new": self._new, "computed": self._computed, "continued": self._continued}

    def _result(self, call_id: str, number: int) -> dict:
        return {"role": "tool", "tool_call_id": call_id, "content": f"def part_{number}(order):\n    return order.total()\n"}

    async def _turn(self, name: str, message: dict) -> str | None:
        """Returns the id of the tool call that the answer makes."""
        if self._way == "responses":
            return await self._response(name, message)
        self._history.append(message)
        body = {"model": name, "messages": [{"role": "system", "content": AGENTS[name]}, *self._history], "tools": TOOLS}
        if self._way == "plain":  # the recipe: what is an agent's own comes last, in a message that is not kept
            own = {"role": "system", "content": AGENTS[name]}
            body["messages"] = [{"role": "system", "content": "You work in turns."}, *self._history, own]
        headers = {"x-prefillshare-session": "twelve"} if self._way == "header" else {}
        data = await self._post("/v1/chat/completions", body, headers)
        answer = {key: value for key, value in data["choices"][0]["message"].items() if value is not None}
        self._history.append(answer)
        return answer["tool_calls"][0]["id"] if answer.get("tool_calls") else None

    async def _response(self, name: str, message: dict) -> str | None:
        item = message
        if message["role"] == "tool":
            item = {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
        body = {"model": name, "input": [item], "instructions": AGENTS[name]}
        body["tools"] = [{"type": "function", **tool["function"]} for tool in TOOLS]
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
        self._computed += len(prompt) - min(common, len(prompt) - 1) // BLOCK * BLOCK
        self._new += len(prompt) - common
        self._made += [prompt, kept]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that both have."""
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))
