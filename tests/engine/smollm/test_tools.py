"""Tools on a real system: the demo's adapter calls, is told results and is forced, by clients as they are, streamed or not."""

from __future__ import annotations

import json
from typing import Literal

import httpx
import instructor
import openai
import pytest
from jsonschema import validate
from pydantic import BaseModel, Field

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_held_after")]

ASK = [{"role": "user", "content": "Book a ticket from Ullapool to Stornoway for 3 passengers."}]


class Berth(BaseModel):
    deck: Literal["upper", "lower"]
    beds: int = Field(ge=1, le=4)


class Trip(BaseModel):
    """A trip to be booked."""

    berth: Berth
    days: int = Field(ge=1, le=99)


def tool(name: str, description: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


BOOK = tool(
    "book_ticket",
    "Book a ferry ticket.",
    origin={"type": "string", "description": "Port where it begins."},
    destination={"type": "string", "description": "Port where it ends."},
    passengers={"type": "integer", "description": "How many passengers."},
)
COUNT = {"type": "integer", "minimum": 0, "maximum": 9}
SIZE = tool("set_size", "Set the size.", size={"enum": ["small", "large"]}, count=COUNT)
NESTED = tool("book_trip", "Book a trip.", trip=Trip.model_json_schema()["$defs"]["Berth"])


def ask(http: openai.OpenAI, stream: bool, **body):
    """(finish reason, text, [(name, arguments)]) of the answer, which is the same each time."""
    body = {"model": "tools", "messages": ASK, "temperature": 0, "max_tokens": 100} | body
    if stream:
        with http.chat.completions.stream(**body) as pieces:
            for _ in pieces:
                pass
            answer = pieces.current_completion_snapshot
    else:
        answer = http.chat.completions.create(**body)
    (choice,) = answer.choices
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    return choice.finish_reason, choice.message.content or "", calls


def test_the_adapter_calls_by_itself_what_it_is_offered(http):
    whole = ask(http, False, tools=[SIZE, BOOK])
    reason, _, ((name, arguments),) = whole
    assert (reason, name) == ("tool_calls", "book_ticket")
    assert json.loads(arguments) == {"origin": "Ullapool", "destination": "Stornoway", "passengers": 3}
    assert ask(http, True, tools=[SIZE, BOOK]) == whole


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book_trip"}}])
def test_forced_calls_obey_their_schemas_streamed_or_not(http, choice):
    offered = {NESTED["function"]["name"]: NESTED["function"]["parameters"], "set_size": SIZE["function"]["parameters"]}
    body = {"tools": [NESTED, SIZE], "tool_choice": choice, "parallel_tool_calls": False}
    whole = ask(http, False, **body)
    reason, _, ((name, arguments),) = whole
    assert reason == ("tool_calls" if choice == "required" else "stop")
    validate(json.loads(arguments), offered[name])
    assert ask(http, True, **body) == whole


def test_a_forced_call_that_max_tokens_cuts_off_is_a_part_of_the_whole_one(http):
    body = {"tools": [BOOK], "tool_choice": "required"}
    _, _, ((_, whole),) = ask(http, False, **body)
    cut = ask(http, False, **body, max_tokens=24)
    reason, text, ((name, arguments),) = cut
    assert (reason, text, name) == ("length", "", "book_ticket")
    assert 0 < len(arguments) < len(whole)
    assert whole.startswith(arguments)
    assert ask(http, True, **body, max_tokens=24) == cut


def test_what_a_client_sends_back_is_what_was_generated(running, http):
    """So the next call finds the first one's answer in the cache: prompt and answer go on as token ids that are known."""
    first = http.chat.completions.create(model="tools", messages=ASK, tools=[BOOK], temperature=0, max_tokens=100)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Booked, number 17."}
    history = [*ASK, message.model_dump(exclude_none=True), result]

    def prompt(messages) -> list[int]:
        body = {"model": "tools", "messages": messages, "tools": [BOOK]}
        return httpx.post(running.http_url.removesuffix("v1") + "tokenize", json=body, timeout=60).json()["tokens"]

    seen = prompt(ASK)
    answer = http.chat.completions.create(
        model="tools", messages=ASK, tools=[BOOK], temperature=0, max_tokens=100, extra_body={"return_token_ids": True}
    )
    generated = answer.choices[0].token_ids
    assert prompt(history)[: len(seen) + len(generated)] == [*seen, *generated]


def test_instructor_gets_objects_where_it_asks_for_them(http):
    client = instructor.from_openai(http, mode=instructor.Mode.TOOLS)
    trip = client.chat.completions.create(
        model="base", response_model=Trip, messages=ASK, temperature=0, max_tokens=200, max_retries=0
    )
    assert isinstance(trip.berth, Berth)
    assert 1 <= trip.days <= 99
