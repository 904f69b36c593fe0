"""Calls in an answer's text: what the pieces of a stream tell together is what the whole text gives."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefillshare.kvshare_vllm.tool_text import Call, hermes, llama

ONE = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call>'
ODD = '<tool_call>{"name":"g","arguments":{"a":1.50,  "b":"\\u00e9 </tool_call> {"}}</tool_call>'
F, G = Call("f", '{"a": 1, "b": "x"}'), Call("g", '{"a":1.50,  "b":"\\u00e9 </tool_call> {"}')
L = '{"name": "f", "parameters": {"a": 1, "b": "x"}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        ("Hello.", "Hello.", []),
        ("\n\n", "\n\n", []),
        (ONE, "", [F]),
        (ODD, "", [G]),
        (f"{ONE}\n{ODD}", "", [F, G]),
        (f"{ONE}{ODD} and more", "", [F, G]),
        (f"\n {ONE}", "", [F]),
        (f"I look. \n{ONE}", "I look. \n", [F]),
        ("a < b", "a < b", []),
        ("a <tool", "a <tool", []),
        (ONE[:-1], "", [F]),
        (ONE[:-13], "", [F]),
        (ONE[:-14], "", [F]),
        (ONE[:-15], "", [Call("f", '{"a": 1, "b": "x"')]),
        (ONE[:47], "", [Call("f", '{"a": 1,')]),
        ('<tool_call>\n{"name": "f", "argum', "", [Call("f", "")]),
        ('<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f', []),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "", [Call("f", "{}")]),
        ('<tool_call>{"arguments": {"a": {}}, "name": "f"}</tool_call>', "", [Call("f", '{"a": {}}')]),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [Call("f", '"{}"')]),
        ('<tool_call>{"name": "f", "arguments": [1, "]"]}</tool_call>', "", [Call("f", '[1, "]"]')]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [Call("f", "null")]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [Call("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', "", [Call("f", '{"a": 1')]),
        ('<tool_call>{"name": "f", "arguments": {"name": "g", "a": 1}}', "", [Call("f", '{"name": "g", "a": 1}')]),
        ("<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>", []),
        (f"<tool_call>no</tool_call>{ONE}", "<tool_call>no</tool_call>", [F]),
        (f"{ONE}<tool_call>no</tool_call>{ONE}", "", [F, F]),
        (f"{ONE}<tool_call>\n{{\"na", "", [F]),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', '<tool_call>{"name": 3, "arguments": {}}</tool_call>', []),
    ],
)  # fmt: skip
def test_hermes(text, content, calls):
    assert hermes(text, True) == (content, calls)
    assert told_in_pieces(hermes, text) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello {you}.", "Hello {you}.", []),
        (L, "", [F]),
        (L.replace("parameters", "arguments"), "", [F]),
        (f"{L}; {L}", "", [F, F]),
        (f"{L}{L}", "", [F, F]),
        (f"<|python_tag|>{L}", "", [F]),
        (f"Look:\n<|python_tag|>{L}", "Look:\n", [F]),
        (f"Look:\n{L}", "Look:\n", [F]),
        (f"Look: {L}", f"Look: {L}", []),
        (L[:-1], "", [F]),
        (L[:-2], "", [Call("f", '{"a": 1, "b": "x"')]),
        ('{"name": "f", "par', '{"name": "f", "par', []),
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ('{"x": {"name": "f", "arguments": {}}}', '{"x": {"name": "f", "arguments": {}}}', []),
        ("f() {\n  return 1;\n}", "f() {\n  return 1;\n}", []),
        ("{not json}", "{not json}", []),
        ('{"type": "function", "name": "f", "parameters": {}}', "", [Call("f", "{}")]),
    ],
)
def test_llama(text, content, calls):
    assert llama(text, True) == (content, calls)
    assert told_in_pieces(llama, text) == (content, calls)


def test_text_that_cannot_be_a_call_is_not_held_back():
    assert hermes("I think that a < b", False) == ("I think that a < b", [])
    assert hermes("I think <tool_", False) == ("I think ", [])
    assert llama('f() {\n {"x": 1', False) == ('f() {\n {"x": 1', [])
    assert llama('{"name', False) == ("", [])


PARTS = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "<tool_", "\n", " ", '{"name": "f"', '"name"', ': "f"', ', "arguments": ', '{"a": ',
         "1", "2", '"x', '"', "\\", "\\u00e9", "}", "}}", "]", "[", "{", ",", ":", "text", "null", "é", ONE, ODD, L, "; ",
         "<|python_tag|>", '"parameters"']
    ),
    max_size=14,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("read", [hermes, llama])
@settings(max_examples=300, deadline=None)
@given(PARTS)
@example(ONE + ODD)
def test_whatever_the_text_pieces_give_what_the_whole_gives(read, text):
    assert told_in_pieces(read, text) == read(text, True)


def told_in_pieces(read, text):
    """What somebody knows who was told only what each further character adds."""
    content, calls = "", []
    for end in range(len(text) + 2):
        now, found = read(text[:end], end > len(text))
        assert now.startswith(content), (text[:end], content, now)
        assert len(found) >= len(calls), (text[:end], calls, found)
        for number, before in enumerate(calls):
            assert found[number].name == before.name, text[:end]
            assert found[number].arguments.startswith(before.arguments), (text[:end], before, found)
        content, calls = now, found
    return content, calls
