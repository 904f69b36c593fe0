"""Tool calling: BFCL's questions, its possible answers and its own AST checker (package bfcl-eval).

A suite describes the functions in the system message, in BFCL's own form, or offers them as tools, as OpenAI's clients do. The
base's template lays tools out; `smollm2_tools` in the same way as the system message here, but for what JSON schemas call the
types.
Test: the categories simple_python and multiple. Training: questions of the live categories with one call, to functions that
no test question is about, and calls made from a seed (synthetic_calls.py).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, partial
from importlib.resources import files
from types import ModuleType, SimpleNamespace

from prefillshare.finetuning.tasks.base import SPLITS, Question, Task, asks_as, normalised
from prefillshare.finetuning.tasks.synthetic_calls import synthetic_calls

OPEN, CLOSE = "<tool_call>", "</tool_call>"
SYSTEM = """You answer with one call of a function. The functions:
<tools>
{tools}
</tools>
Answer with its name and arguments, like
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": VALUE}}}}
</tool_call>"""
TRAINING, TESTED = ("live_simple", "live_multiple"), ("simple_python", "multiple")


class ToolCalls(Task):
    max_tokens = 192

    def __init__(self, category: str, offers_tools: bool = False):
        self.category, self.offers_tools, self.precedes_others = category, offers_tools, not offers_tools
        self.name = f"bfcl_{category}" + ("_tools" if offers_tools else "")

    def questions(self) -> list[Question]:
        made = []
        for item, truth in _items(self.category):
            messages, tools = (_own_messages(item), _tools(item)) if self.offers_tools else (_messages(item), ())
            made.append(Question(item["id"], messages, partial(_is_right, item, truth, self.category), tools))
        return made

    def transcripts(self, count: int, seed: int, split: str = "train") -> list[dict]:
        """Up to half of the transcripts are live questions, the others are synthetic."""
        rng = random.Random(f"{seed} {split}")
        transcript = _transcript_with_tools if self.offers_tools else _transcript
        made = [transcript(item, call) for item, call in _live_items() if _split_of(item) == split]
        rng.shuffle(made)
        made = made[: count // 2]
        made += [transcript(item, call) for item, call in synthetic_calls(count - len(made), f"{seed} {split}")]
        rng.shuffle(made)
        return made


@cache
def _live_items() -> list[tuple[dict, dict]]:
    """Live questions with one call, and that call. None asks what a test question asks, or is about the same function as one,
    and BFCL's checker accepts every call."""
    tested = [pair for category in TESTED for pair in _items(category)]
    asked = [(normalised(_asked(item)), item["id"]) for item, _ in tested]
    functions = {name for _, truth in tested for call in truth for name in call}
    found = []
    for category in TRAINING:
        for item, truth in _items(category):
            if len(truth) != 1 or functions & set(truth[0]) or asks_as(normalised(_asked(item)), asked) is not None:
                continue
            if _is_right(item, truth, category, json.dumps(call := _answer(truth))):
                found.append((item, call))
    return found


def _split_of(item: dict) -> str:
    """The split of an item: a tenth is for validation, chosen by name, so that it is the same for every seed."""
    return SPLITS[int(hashlib.sha256(item["id"].encode()).hexdigest(), 16) % 10 == 0]


def parse_call(answer: str) -> dict[str, dict] | None:
    """{name: arguments} of the first call in an answer; None where there is none."""
    start = answer.find(OPEN)
    text = answer[start + len(OPEN) :] if start >= 0 else answer
    try:
        call, _ = json.JSONDecoder().raw_decode(text.lstrip())
        return {call["name"]: dict(call["arguments"])}
    except (ValueError, KeyError, TypeError):
        return None


def written(text: str, calls: Iterable[tuple[str, str]]) -> str:
    """An answer whose calls a server has taken out of its text, as a decoder writes it. `calls`: names, and arguments as JSON,
    whose end may be missing."""
    own = [f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{CLOSE}' for name, arguments in calls]
    return "\n".join([*([text] if text else []), *own])


def _is_right(item: dict, truth: list[dict], category: str, answer: str) -> bool:
    call = parse_call(answer)
    if call is None:
        return False
    checker = _checker()
    result = checker.ast_checker(item["function"], [call], truth, checker.Language.PYTHON, category, "ours")
    return bool(result["valid"])


@cache
def _checker() -> ModuleType:
    """BFCL's AST checker. It asks its table of models only whether names have their dots replaced. That table imports every
    provider's client, so a stub takes its place."""
    name = "bfcl_eval.constants.model_config"
    stands_in = ModuleType(name)
    stands_in.MODEL_CONFIG_MAPPING = defaultdict(lambda: SimpleNamespace(underscore_to_dot=False))
    before = sys.modules.get(name)
    sys.modules[name] = stands_in
    try:
        from bfcl_eval.eval_checker.ast_eval import ast_checker
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
    return ast_checker


@cache
def _items(category: str) -> list[tuple[dict, list[dict]]]:
    """(question with its functions, possible answers) of a category."""
    data = files("bfcl_eval") / "data"
    file = f"BFCL_v4_{category}.json"
    truths = {r["id"]: r["ground_truth"] for r in _records(data / "possible_answer" / file)}
    return [(r, truths[r["id"]]) for r in _records(data / file)]


def _records(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _asked(item: dict) -> str:
    return item["question"][0][-1]["content"]


def _messages(item: dict) -> list[dict[str, str]]:
    tools = "\n".join(json.dumps(function) for function in item["function"])
    before = [m["content"] for m in item["question"][0] if m["role"] == "system"]
    system = "\n".join([SYSTEM.format(tools=tools), *before])
    return [{"role": "system", "content": system}, {"role": "user", "content": _asked(item)}]


def _answer(truth: list[dict]) -> dict:
    """The first of each argument's possible values; "" among them means that it may be left out."""
    ((name, arguments),) = truth[0].items()
    return {"name": name, "arguments": _chosen(arguments)}


def _chosen(possible: dict[str, list]) -> dict:
    return {key: _value(values[0]) for key, values in possible.items() if values and "" not in values}


def _value(value):
    """A possible value, made definite: inside a mapping, too, every key has a list of possible values."""
    if isinstance(value, dict):
        return _chosen({key: values for key, values in value.items() if isinstance(values, list)})
    return [_value(one) for one in value] if isinstance(value, list) else value


def _own_messages(item: dict) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in item["question"][0]]


def _tools(item: dict) -> list[dict]:
    return [
        {"type": "function", "function": function | {"parameters": _schema(function["parameters"])}}
        for function in item["function"]
    ]


#: BFCL's types of values -> JSON schemas'; None: of any type.
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}


def _schema(given: dict) -> dict:
    """A description of values in BFCL's form as a JSON schema."""
    schema = {key: value for key, value in given.items() if key != "type" or _TYPES.get(value, value)}
    if "type" in schema:
        schema["type"] = _TYPES.get(schema["type"], schema["type"])
    if isinstance(items := schema.get("items"), dict):
        schema["items"] = _schema(items)
    if isinstance(properties := schema.get("properties"), dict):
        schema["properties"] = {name: _schema(about) for name, about in properties.items()}
    return schema


def _transcript_with_tools(item: dict, call: dict) -> dict:
    calls = [{"type": "function", "function": call}]
    return {"messages": [*_own_messages(item), {"role": "assistant", "tool_calls": calls}], "tools": _tools(item)}


def _transcript(item: dict, call: dict) -> dict:
    answer = {"role": "assistant", "content": f"{OPEN}\n{json.dumps(call)}\n{CLOSE}"}
    return {"messages": [*_messages(item), answer]}
