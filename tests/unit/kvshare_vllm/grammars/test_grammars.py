"""A response's format is bounded, then tried once in another process; only then may an engine see it."""

import asyncio
import json

import pytest
from vllm.sampling_params import StructuredOutputsParams as Asked

from prefillshare.kvshare.errors import InvalidInput, Unavailable
from prefillshare.kvshare_vllm.grammars.client import DIED, TOO_MUCH_CPU, TOO_MUCH_TIME
from prefillshare.kvshare_vllm.grammars.grammars import BACKEND, MOST_BYTES, Grammars
from prefillshare.kvshare_vllm.grammars.schema_coverage import not_held

TRIP = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}


class Compiler:
    """Says what it was told to, when it is let."""

    def __init__(self, problem=None):
        self.problem, self.tried, self.go_on = problem, [], asyncio.Event()
        self.go_on.set()

    async def __call__(self, kind, spec):
        self.tried.append((kind, spec))
        await self.go_on.wait()
        return self.problem


def ask(grammars: Grammars, **asked):
    return asyncio.run(grammars.tried(Asked(**asked)))


@pytest.mark.parametrize(
    ("asked", "kind", "spec", "for_engines"),
    [
        ({"json": TRIP}, "json", json.dumps(TRIP), {"json": json.dumps(TRIP)}),
        ({"json": json.dumps(TRIP)}, "json", json.dumps(TRIP), {"json": json.dumps(TRIP)}),
        ({"regex": "a+"}, "regex", "a+", {"regex": "a+"}),
        ({"choice": ["a", 'b"']}, "grammar", 'root ::= "a" | "b\\""', {"grammar": 'root ::= "a" | "b\\""'}),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"', {"grammar": 'root ::= "a"'}),
        ({"grammar": 'start: "a"'}, "lark", 'start: "a"', {"grammar": 'start: "a"'}),
        ({"structural_tag": "{}"}, "structural_tag", "{}", {"structural_tag": "{}"}),
    ],
)
def test_engines_get_what_was_tried_for_their_one_backend(asked, kind, spec, for_engines):
    compiler = Compiler()
    given = ask(Grammars(compiler, 5), **asked)
    assert compiler.tried == [(kind, spec)]
    assert given._backend == BACKEND
    assert {name: getattr(given, name) for name in for_engines} == for_engines


def test_any_json_object_needs_no_trial():
    compiler = Compiler()
    assert ask(Grammars(compiler, 5), json_object=True).json_object is True
    assert compiler.tried == []


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"json": {"enum": ["a" * MOST_BYTES]}}, "structured_outputs.json"),
        ({"json": "{" + " " * MOST_BYTES + "}"}, "structured_outputs.json"),
        ({"regex": "a" * (MOST_BYTES + 1)}, "structured_outputs.regex"),
        ({"choice": ["a" * 1000] * 200}, "structured_outputs.choice"),
        ({"grammar": "a" * (MOST_BYTES + 1)}, "structured_outputs.grammar"),
        ({"structural_tag": "a" * (MOST_BYTES + 1)}, "structured_outputs.structural_tag"),
        ({"json": "no json"}, "structured_outputs.json"),
        ({"json": '{"a":' * 100 + "1" + "}" * 100}, "structured_outputs.json"),
        ({"json": {"allOf": [{"type": "string"}, {"enum": ["yes"]}]}}, "structured_outputs.json"),
        ({"json": {"type": "integer", "multipleOf": 3}}, "structured_outputs.json"),
        ({"json": {"not": {"type": "integer"}}}, "structured_outputs.json"),
        ({"regex": "a\x00"}, "structured_outputs.regex"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": ["a", ""]}, "structured_outputs.choice"),
        ({"grammar": " "}, "structured_outputs.grammar"),
        ({"json_object": False}, "structured_outputs.json_object"),
        ({"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern"),
    ],
)
def test_what_is_too_large_or_not_held_is_refused_before_anybody_compiles_it(asked, field):
    compiler = Compiler()
    with pytest.raises(InvalidInput) as caught:
        ask(Grammars(compiler, 5), **asked)
    assert (caught.value.field, compiler.tried) == (field, [])
    assert caught.value.fix


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (TOO_MUCH_CPU, r"more than 5 s of CPU time \(router\.grammar_cpu_s\)"),
        (DIED, "too much memory"),
        ("it cannot be compiled: Lookahead is not supported yet.", "Lookahead"),
    ],
)
def test_a_format_that_fails_is_refused_and_not_tried_again(problem, message):
    compiler = Compiler(problem)
    grammars = Grammars(compiler, 5)
    for _ in range(2):
        with pytest.raises(InvalidInput, match=message) as caught:
            ask(grammars, regex="(a+)+")
    assert caught.value.field == "structured_outputs.regex"
    assert len(compiler.tried) == 1


def test_a_machine_too_busy_says_nothing_about_a_format():
    compiler = Compiler(TOO_MUCH_TIME)
    grammars = Grammars(compiler, 5)
    with pytest.raises(Unavailable):
        ask(grammars, regex="a")
    compiler.problem = None
    assert ask(grammars, regex="a").regex == "a"


def test_requests_with_one_format_have_it_tried_once_and_keep_the_event_loop_free():
    async def main():
        compiler = Compiler()
        compiler.go_on.clear()
        grammars = Grammars(compiler, 5)
        asked = [asyncio.create_task(grammars.tried(Asked(regex="a+"))) for _ in range(3)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in asked)
        compiler.go_on.set()
        assert {given.regex for given in await asyncio.gather(*asked)} == {"a+"}
        return compiler.tried

    tried = asyncio.run(main())
    assert 1 <= len(tried) <= 2  # of two that are let in together, both may


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        (TRIP, None),
        ({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "title": "x", "default": None}, None),
        ({"$ref": "#/$defs/a", "description": "x", "$defs": {"a": {"type": "integer"}}}, None),
        ({"type": "object", "properties": {"not": {"type": "string"}, "if": {"const": 1}}}, None),
        ({"type": "string", "enum": ["not"]}, None),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, None),
        ({"type": "object", "anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}]}, None),
        ({"properties": {"a": {"not": {"type": "integer"}}}}, "properties.a.not"),
        ({"type": "object", "if": {}, "then": {}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "array", "items": {"uniqueItems": True}}, "items.uniqueItems"),
        ({"anyOf": [{"minimum": 3}]}, "anyOf.0.minimum (without a type)"),
        ({"required": ["a"]}, "required (without a type)"),
        ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer"}}}, "minimum (beside $ref)"),
        ({"type": "object", "required": ["a"], "anyOf": [{"type": "object"}]}, "required (beside anyOf)"),
        ({"type": "string", "enum": ["a", "bb"], "maxLength": 1}, "maxLength (beside enum)"),
        ({"$defs": {"a": {"pattern": "a"}}, "$ref": "#/$defs/a"}, "$defs.a.pattern (without a type)"),
    ],
)
def test_what_a_response_would_not_be_held_to_is_found_where_it_stands(schema, where):
    assert not_held(schema) == where
