"""Response formats (JSON schema, regex, choice, grammar, structural tag): an engine gets only formats that have been tried.

vLLM converts a request's grammar on the event loop and compiles it beside an engine's steps, for as long as it takes. Here:
1. Its size is bounded, and it is refused if engines would not enforce all of it.
2. A process of its own compiles it and takes some steps with it, in limited CPU time (process.py). Tenants take turns.
3. The verdict is kept. A format that fails is refused with its field before it reaches a queue or an engine.

Seam: vllm/sampling_params.py (_validate_structured_outputs), vllm/v1/structured_output/{utils,backend_xgrammar}.py
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams, check_json_nesting
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import DeadlineExceeded, InvalidInput, Unavailable
from prefillshare.kvshare_vllm.asked_formats import ToolsFormat, field_of
from prefillshare.kvshare_vllm.fair_gate import FairGate
from prefillshare.kvshare_vllm.grammars.client import DIED, TOO_MUCH_CPU, TOO_MUCH_TIME
from prefillshare.kvshare_vllm.grammars.schema_coverage import not_held

#: The backend of the router and of all engines: vLLM would choose one by what the first request asks for, and keep it.
BACKEND = "xgrammar"
MOST_BYTES = 128 << 10
#: Grammars compiled at once; waiting requests of one tenant; verdicts kept; seconds that a request waits for its verdict.
AT_ONCE, MOST_WAITING, KEPT, PATIENCE_S = 2, 16, 4096, 120.0

_KINDS = ("json", "regex", "choice", "grammar", "structural_tag")
_CHEAPER = "lower the bounds of repetitions and lengths, do not nest them, and give fewer alternatives"
_CORRECT = "correct it, or leave out what is not supported"
_CORRECT_TOOL = 'correct the tool\'s parameters, or set "strict": false on it so that calls need not obey them'

#: (kind, grammar) -> what is wrong with it, as process.py reports it.
Try = Callable[[str, str], Awaitable[str | None]]


class Grammar(NamedTuple):
    """`kind`: one that process.py knows. `field`: the request field that held it."""

    field: str
    kind: str
    spec: str


class _Fault(NamedTuple):
    message: str
    fix: str


class Grammars:
    def __init__(self, try_out: Try, cpu_s: float):
        self._try_out, self._cpu_s = try_out, cpu_s
        self._gate = FairGate("a grammar to be compiled", AT_ONCE, MOST_WAITING)
        self._verdicts: OrderedDict[tuple[str, bytes], _Fault | None] = OrderedDict()

    async def tried(self, asked: StructuredOutputsParams) -> StructuredOutputsParams:
        """The format as engines get it. Raises InvalidInput if they cannot enforce it in time, and what waiting for the verdict
        raises."""
        if (grammar := laid_out(asked)) is None:
            return _for_engines(json_object=True)
        key = (grammar.kind, hashlib.sha256(grammar.spec.encode("utf-8", "surrogatepass")).digest())
        if key not in self._verdicts:
            await self._have_tried(key, grammar)
        self._verdicts.move_to_end(key)
        if fault := self._verdicts[key]:
            fix = _CORRECT_TOOL if grammar.field == ToolsFormat.field and fault.fix == _CORRECT else fault.fix
            raise InvalidInput(fault.message, field=grammar.field, fix=fix)
        return _for_engines(**{"grammar" if grammar.kind == "lark" else grammar.kind: grammar.spec})

    async def _have_tried(self, key: tuple[str, bytes], grammar: Grammar) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S), self._gate.enter(current_caller.get().tenant):
                if key in self._verdicts:  # tried for another request meanwhile
                    return
                self._verdicts[key] = self._fault(await self._try_out(grammar.kind, grammar.spec))
        except TimeoutError:
            raise DeadlineExceeded(f"the format of the response was not compiled within {PATIENCE_S:g} s") from None
        if len(self._verdicts) > KEPT:
            self._verdicts.popitem(last=False)

    def _fault(self, problem: str | None) -> _Fault | None:
        if problem is None:
            return None
        if problem == TOO_MUCH_TIME:  # not the grammar's fault: the next attempt may succeed
            raise Unavailable("the machine is too busy to compile the format of the response", fix="try again")
        if problem == TOO_MUCH_CPU:
            text = f"compiling it takes more than {self._cpu_s:g} s of CPU time (router.grammar_cpu_s)"
            return _Fault(text, _CHEAPER)
        if problem == DIED:
            return _Fault("compiling it takes too much memory", _CHEAPER)
        return _Fault(problem, _CHEAPER if "CPU time" in problem else _CORRECT)


def check_size(asked: StructuredOutputsParams) -> None:
    """Check the size before the format is processed. Raises InvalidInput."""
    for name in _KINDS:
        value = getattr(asked, name)
        size = len(value if isinstance(value, str) else json.dumps(value)) if value is not None else 0
        if size > MOST_BYTES:
            text, fix = f"it has {size} characters", f"send at most {MOST_BYTES}"
            raise InvalidInput(text, field=field_of(asked, name), fix=fix)


def laid_out(asked: StructuredOutputsParams) -> Grammar | None:
    """The grammar to be compiled; None if any JSON object will do, which every engine knows. Raises InvalidInput."""
    check_size(asked)
    for name in ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"):
        if getattr(asked, name):
            raise InvalidInput("engines do not keep to it", field=f"structured_outputs.{name}", fix="leave it out")
    if asked.json is not None:
        field = field_of(asked, "json")
        return Grammar(field, "json", _schema(asked.json, field))
    if asked.regex is not None:
        if "\x00" in asked.regex:
            raise InvalidInput("it has a NUL character", field=field_of(asked, "regex"), fix="leave it out")
        return Grammar(field_of(asked, "regex"), "regex", asked.regex)
    if asked.choice is not None:
        field = field_of(asked, "choice")
        if not asked.choice or not all(isinstance(text, str) and text for text in asked.choice):
            raise InvalidInput("a choice is of texts that are not empty", field=field, fix="give at least one")
        return Grammar(field, "grammar", choice_as_grammar(asked.choice))
    if asked.grammar is not None:
        if not asked.grammar.strip():
            raise InvalidInput("it is empty", field=field_of(asked, "grammar"), fix="give a grammar, or leave it out")
        kind = "lark" if grammar_is_likely_lark(asked.grammar) else "grammar"
        return Grammar(field_of(asked, "grammar"), kind, asked.grammar)
    if asked.structural_tag is not None:
        field = field_of(asked, "structural_tag")
        _check_nesting(asked.structural_tag, field, structural_tag=True)
        return Grammar(field, "structural_tag", asked.structural_tag)
    if not asked.json_object:
        raise InvalidInput("it is true or left out", field="structured_outputs.json_object", fix="leave it out")
    return None


def _schema(given: str | dict, field: str) -> str:
    """The schema as engines get it. Raises InvalidInput."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        raise InvalidInput("the schema is no JSON", field=field, fix="send a JSON schema") from None
    _check_nesting(given, field)
    if (where := not_held(schema)) is not None:
        raise InvalidInput(f"a response would not be held to the schema's {where}", field=field, fix=_CORRECT)
    if isinstance(schema, dict) and has_xgrammar_unsupported_json_features(schema):
        text = "the schema has what responses would not be held to: allOf of several, a format, or lengths beside a pattern"
        raise InvalidInput(text, field=field, fix=_CORRECT)
    return given if isinstance(given, str) else json.dumps(given)


def _check_nesting(given: str | dict, field: str, **how: bool) -> None:
    try:
        check_json_nesting(given, **how)
    except VLLMValidationError as error:
        raise InvalidInput(str(error), field=field, fix="nest less deeply") from error


def _for_engines(**what) -> StructuredOutputsParams:
    params = StructuredOutputsParams(**what)
    params._backend = BACKEND
    return params
