"""Two histories are the same conversation if role, text and tool calls are, however a client writes them down."""

import pytest

from prefillshare.router.sessions.transcript import Transcript

ASK = {"role": "user", "content": "Capital of France?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "b": 2}'}}]}
HISTORY = [ASK, CALL, {"role": "tool", "content": "Paris"}]


def said(*messages) -> Transcript:
    return Transcript().with_messages(messages)


def test_a_history_that_goes_on_begins_with_what_was_said():
    assert said(*HISTORY).begins([*HISTORY, ASK])
    assert said(*HISTORY).begins(HISTORY)
    assert Transcript().begins([])
    assert Transcript().begins(HISTORY)
    assert not said(*HISTORY).begins(HISTORY[:2])


def test_it_may_be_taken_note_of_in_any_pieces():
    assert said(ASK).with_messages([CALL]).with_messages(HISTORY[2:]) == said(*HISTORY)


@pytest.mark.parametrize(
    "same",
    [
        CALL | {"content": None, "refusal": None, "audio": None, "reasoning": "first, ..."},
        CALL | {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"b": 2, "a": 1}}}]},
        CALL | {"tool_calls": [{"id": "2", "function": {"name": "f", "arguments": '{"b":2,"a":1}'}}]},
    ],
)
def test_what_clients_write_differently_makes_no_difference(same):
    assert said(ASK, same) == said(ASK, CALL)


@pytest.mark.parametrize("arguments", ['{"at": }', "map", "[1]", '"map"', "3", "null", "[" * 100_000, "", None, {}])
def test_arguments_that_are_no_object_are_an_empty_one(arguments):
    """As vLLM lays them out when the client sends them back."""
    other, empty = (ASK | {"tool_calls": [{"function": {"name": "f", "arguments": given}}]} for given in (arguments, "{}"))
    assert said(other) == said(empty)


def test_text_in_parts_is_text():
    parts = [{"type": "text", "text": "Capital of"}, {"type": "text", "text": "France?"}]
    assert said({"role": "user", "content": parts}) == said({"role": "user", "content": "Capital of\nFrance?"})


@pytest.mark.parametrize(
    "other",
    [
        CALL | {"role": "user"},
        CALL | {"content": "Wait."},
        CALL | {"tool_calls": [{"function": {"name": "g", "arguments": '{"a": 1, "b": 2}'}}]},
        CALL | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "b": 3}'}}]},
        CALL | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "b": 2'}}]},
        CALL | {"tool_calls": CALL["tool_calls"] * 2},
        {"role": "assistant", "content": ""},
    ],
)
def test_another_role_text_or_call_does(other):
    assert not said(ASK, CALL).begins([ASK, other, ASK])


def test_it_is_read_as_it_was_written():
    for transcript in (Transcript(), said(ASK), said(*HISTORY)):
        assert Transcript.parsed(str(transcript)) == transcript


@pytest.mark.parametrize("written", ["", "1", "x:", "-1:", "1:ab", "²:", ":" + "0" * 64])
def test_what_was_not_written_here_is_no_transcript(written):
    assert Transcript.parsed(written) is None
