"""Stored responses and conversations with OpenAI's client, over turns that answer what a test tells them. No engine runs."""

from __future__ import annotations

import openai
import pytest
import pytest_asyncio
from surface_clients import with_openai

from benchmarks.chats.surface import ChatSurface
from prefillshare.kvshare.caller import Caller, current_caller

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

OPENING = "<|im_start|>assistant\n"
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALLED = '<tool_call>\n{"name": "look", "arguments": {"at": "map"}}\n</tool_call>'


def session_of(response) -> str:
    """How the call went on."""
    return response.model_extra["kv_transfer_params"]["prefillshare"]["session"]


def shown(*messages) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surface(smollm):
    async with with_openai(ChatSurface(str(smollm))) as surface:
        yield surface


@pytest.fixture
def responses(surface):
    surface.answers, surface.prompts = ["Yes."], []
    return surface.client.responses


async def test_any_decoder_goes_on_from_anothers_response_and_instructions_do_not_carry_over(surface, responses):
    surface.answers = ["Paris.", "Rome."]
    first = await responses.create(model="planner", input="Capital of France?", instructions="You plan.")
    second = await responses.create(
        model="coder", input="And of Italy?", instructions="You code.", previous_response_id=first.id
    )
    said = DEFAULT + shown(("user", "Capital of France?"), ("assistant", "Paris."), ("user", "And of Italy?"))
    assert surface.prompts[-1] == said + shown(("system", "You code.")) + OPENING
    assert (first.output_text, second.output_text) == ("Paris.", "Rome.")
    assert (second.previous_response_id, second.instructions, second.model) == (first.id, "You code.", "coder")
    assert (first.store, first.conversation) == (True, None)


async def test_it_goes_on_from_the_tokens_that_were_generated(surface, responses):
    first = await responses.create(model="planner", input="hi")
    before = surface.ids[-1]
    await responses.create(model="planner", input="more", previous_response_id=first.id)
    answer = [*surface.encode("Yes."), 2]
    assert surface.ids[-1][: len(before) + len(answer)] == [*before, *answer]


async def test_two_may_go_on_from_one_response(surface, responses):
    first = await responses.create(model="planner", input="Capital of France?")
    said = surface.prompts[-1] + "Yes.<|im_end|>\n"
    left = await responses.create(model="planner", input="left", previous_response_id=first.id)
    right = await responses.create(model="coder", input="right", previous_response_id=first.id)
    assert surface.prompts[-1] == said + shown(("user", "right")) + OPENING
    await responses.create(model="coder", input="more", previous_response_id=left.id)
    assert surface.prompts[-1] == said + shown(("user", "left"), ("assistant", "Yes."), ("user", "more")) + OPENING
    await responses.create(model="coder", input="more", previous_response_id=right.id)
    assert surface.prompts[-1] == said + shown(("user", "right"), ("assistant", "Yes."), ("user", "more")) + OPENING


async def test_a_response_is_retrieved_as_it_was_made_and_deleted_with_its_context(surface, responses):
    made = await responses.create(model="planner", input="hi", metadata={"a": "b"})
    found = await responses.retrieve(made.id)
    assert found.model_dump() == made.model_dump()
    assert found.metadata == {"a": "b"}
    items = await responses.input_items.list(made.id)
    assert [(item.role, item.content[0].text) for item in items.data] == [("user", "hi")]
    before = await surface.threads.count()
    await responses.delete(made.id)
    assert await surface.threads.count() == before - 1
    for asked in (
        responses.retrieve(made.id),
        responses.delete(made.id),
        responses.input_items.list(made.id),
        responses.create(model="planner", input="more", previous_response_id=made.id),
    ):
        with pytest.raises(openai.NotFoundError, match="no response"):
            await asked


async def test_deleting_one_response_of_a_thread_leaves_the_others(responses):
    first = await responses.create(model="planner", input="hi")
    second = await responses.create(model="planner", input="more", previous_response_id=first.id)
    await responses.delete(first.id)
    assert (await responses.retrieve(second.id)).id == second.id
    assert (await responses.create(model="planner", input="on", previous_response_id=second.id)).status == "completed"


async def test_nothing_goes_on_from_what_was_not_stored(surface, responses):
    before = await surface.threads.count()
    made = await responses.create(model="planner", input="hi", store=False)
    assert (made.store, await surface.threads.count()) == (False, before)
    with pytest.raises(openai.NotFoundError, match="store: false"):
        await responses.create(model="planner", input="more", previous_response_id=made.id)


async def test_what_goes_on_without_being_stored_changes_nothing(surface, responses):
    first = await responses.create(model="planner", input="hi")
    said = surface.prompts[-1] + "Yes.<|im_end|>\n"
    await responses.create(model="planner", input="aside", previous_response_id=first.id, store=False)
    assert surface.prompts[-1] == said + shown(("user", "aside")) + OPENING
    await responses.create(model="planner", input="more", previous_response_id=first.id)
    assert surface.prompts[-1] == said + shown(("user", "more")) + OPENING


async def test_nobody_elses_response_is_known(surface, responses):
    token = current_caller.set(Caller("me", "me"))
    try:
        mine = await responses.create(model="planner", input="hi")
    finally:
        current_caller.reset(token)
    with pytest.raises(openai.NotFoundError):
        await responses.retrieve(mine.id)
    with pytest.raises(openai.NotFoundError):
        await responses.create(model="planner", input="more", previous_response_id=mine.id)


async def test_tools_are_called_and_answered_across_responses(surface, responses):
    surface.answers = [CALLED, "It is Paris."]
    trip = {"type": "json_schema", "name": "trip", "schema": {"type": "object"}}  # of the last answer, sent with every call
    forced = {"tool_choice": "required", "text": {"format": trip}}
    first = await responses.create(model="planner", input="Look.", tools=[TOOL], **forced)
    (call,) = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", "look", '{"at": "map"}')
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Paris"}
    second = await responses.create(model="coder", input=[result], previous_response_id=first.id)
    assert second.output_text == "It is Paris."
    assert CALLED + "<|im_end|>\n" + shown(("tool", "Paris")) + OPENING in surface.prompts[-1]
    with pytest.raises(openai.BadRequestError, match="waits for an output") as refused:
        await responses.create(model="coder", input=[result], previous_response_id=second.id)
    assert refused.value.param == "input.0.call_id"


async def test_an_output_without_its_call_is_refused(responses):
    result = {"type": "function_call_output", "call_id": "call_unknown", "output": "Paris"}
    with pytest.raises(openai.BadRequestError, match="'call_unknown'"):
        await responses.create(model="coder", input=[{"role": "user", "content": "hi"}, result])


async def test_streamed_or_not_a_response_is_the_same(surface, responses):
    surface.answers = [CALLED]
    whole = await responses.create(model="planner", input="Look.", tools=[TOOL])
    events = [event async for event in await responses.create(model="planner", input="Look.", tools=[TOOL], stream=True)]
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    last = events[-1].response
    assert events[-1].type == "response.completed"
    assert events[0].response.id == last.id
    assert [item.model_dump(exclude={"id", "call_id"}) for item in last.output] == [
        item.model_dump(exclude={"id", "call_id"}) for item in whole.output
    ]
    assert (await responses.retrieve(last.id)).model_dump() == last.model_dump()


async def test_a_client_that_sends_the_whole_history_goes_on_from_the_tokens_too(surface, responses):
    spaced = CALLED.replace('": ', '":  ')
    surface.answers = [spaced, "Paris."]
    history = [{"role": "user", "content": "Look."}]
    first = await responses.create(model="planner", input=history, tools=[TOOL], instructions="You plan.")
    history += [item.model_dump(exclude_none=True) for item in first.output]
    history.append({"type": "function_call_output", "call_id": first.output[0].call_id, "output": "Paris"})
    second = await responses.create(model="coder", input=history, instructions="You code.")
    assert spaced in surface.prompts[-1]
    assert session_of(second) == "continued"
    assert second.previous_response_id is None
    assert [item.type for item in (await responses.input_items.list(second.id, order="asc")).data] == [
        "message", "function_call", "function_call_output",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1", "conversation": "conv_1"}, "conversation"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"previous_response_id": "resp_" + "0" * 44}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": 3}}, "conversation"),
        ({"conversation": "0" * 32}, "conversation"),
    ],
)
async def test_what_cannot_be_gone_on_from_is_refused_with_the_field(responses, body, field):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        await responses.create(model="planner", input="hi", extra_body=body)
    assert refused.value.param == field
    assert "VLLM_" not in str(refused.value)


async def test_what_a_response_goes_on_from_is_not_cut_off_where_it_does_not_fit(surface, responses):
    first = await responses.create(model="planner", input="hi", truncation="auto")
    long = {"model": "planner", "input": "word " * 1100, "truncation": "auto", "max_output_tokens": 1}
    for named in ({"previous_response_id": first.id}, {}):
        with pytest.raises(openai.BadRequestError, match="tokens leave no room for an answer") as refused:
            await responses.create(**long, **named)
        assert refused.value.param == "truncation"


async def test_a_response_that_has_been_made_is_not_cancelled(responses):
    made = await responses.create(model="planner", input="hi")
    with pytest.raises(openai.BadRequestError, match="has been made"):
        await responses.cancel(made.id)


async def test_a_call_that_fails_leaves_no_thread(surface, responses):
    before = await surface.threads.count()
    with pytest.raises(openai.BadRequestError):
        await responses.create(model="planner", input="hi", max_output_tokens=100_000)
    with pytest.raises(openai.NotFoundError, match="planner"):
        await responses.create(model="nobody", input="hi")
    assert await surface.threads.count() == before


async def test_the_oldest_are_forgotten_when_a_tenant_has_as_many_as_it_may(surface, responses):
    first = await responses.create(model="planner", input="hi")
    for _ in range(20):
        await responses.create(model="planner", input="hi")
    assert await surface.threads.count("") == 20
    with pytest.raises(openai.NotFoundError):
        await responses.retrieve(first.id)


async def test_every_decoder_can_be_looked_up_and_an_unknown_one_is_told_all_that_there_are(surface):
    for name in ("planner", "coder", surface.base.name):
        assert (await surface.client.models.retrieve(name)).id == name
    for ask in (
        surface.client.models.retrieve("nobody"),
        surface.client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}]),
    ):
        with pytest.raises(openai.NotFoundError, match=f"{surface.base.name}, planner, coder") as refused:
            await ask
        assert refused.value.param == "model"


# Conversations


async def test_a_conversation_gathers_what_is_said_in_it(surface, responses):
    conversations = surface.client.conversations
    made = await conversations.create(items=[{"role": "user", "content": "I am Ann."}], metadata={"topic": "names"})
    surface.answers = ["Hello, Ann.", "Ann."]
    first = await responses.create(model="planner", input="Greet me.", conversation=made.id)
    assert first.conversation.id == made.id
    await responses.create(model="coder", input="Who am I?", conversation={"id": made.id}, instructions="Be brief.")
    said = DEFAULT + shown(
        ("user", "I am Ann."), ("user", "Greet me."), ("assistant", "Hello, Ann."), ("user", "Who am I?")
    )
    assert surface.prompts[-1] == said + shown(("system", "Be brief.")) + OPENING
    items = (await conversations.items.list(made.id, order="asc")).data
    texts = [item.content if isinstance(item.content, str) else item.content[0].text for item in items]
    assert texts == ["I am Ann.", "Greet me.", "Hello, Ann.", "Who am I?", "Ann."]
    page = await conversations.items.list(made.id, limit=2)
    assert [item.id for item in page.data] == [items[4].id, items[3].id]
    assert page.has_more
    assert [item.id async for item in conversations.items.list(made.id, limit=2)] == [item.id for item in reversed(items)]


async def test_items_are_added_looked_at_and_taken_out(surface, responses):
    conversations = surface.client.conversations
    made = await conversations.create()
    added = await conversations.items.create(
        made.id, items=[{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    )
    one, two = added.data
    assert (await conversations.items.retrieve(two.id, conversation_id=made.id)).id == two.id
    await responses.create(model="planner", input="three", conversation=made.id)
    await conversations.items.delete(one.id, conversation_id=made.id)
    await responses.create(model="planner", input="four", conversation=made.id)
    said = shown(("user", "two"), ("user", "three"), ("assistant", "Yes."), ("user", "four"))
    assert surface.prompts[-1] == DEFAULT + said + OPENING
    for ask in (conversations.items.retrieve, conversations.items.delete):
        with pytest.raises(openai.NotFoundError):
            await ask(one.id, conversation_id=made.id)


async def test_metadata_change_and_a_deleted_conversation_is_gone(surface, responses):
    conversations = surface.client.conversations
    made = await conversations.create(metadata={"a": "1"})
    await conversations.update(made.id, metadata={"a": "2"})
    assert (await conversations.retrieve(made.id)).metadata == {"a": "2"}
    assert (await conversations.delete(made.id)).deleted
    for asked in (
        conversations.retrieve(made.id),
        conversations.delete(made.id),
        conversations.update(made.id, metadata={}),
        conversations.items.list(made.id),
        responses.create(model="planner", input="hi", conversation=made.id),
    ):
        with pytest.raises(openai.NotFoundError, match="no conversation"):
            await asked


async def test_one_response_at_a_time_is_made_in_a_conversation(surface, responses):
    made = await surface.client.conversations.create()
    async with surface.threads.turn(made.id, tenant=""):
        with pytest.raises(openai.ConflictError):
            await responses.create(model="planner", input="hi", conversation=made.id)
    before = await surface.client.conversations.items.list(made.id)
    await responses.create(model="planner", input="aside", conversation=made.id, store=False)
    assert (await surface.client.conversations.items.list(made.id)).data == before.data == []


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"items": "hi"}, "items"),
        ({"items": [{"role": "user", "content": "x"}] * 21}, "items"),
        ({"items": [{"type": "moon"}]}, "items.0"),
        ({"items": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "items.0.call_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ],
)
async def test_a_conversation_that_cannot_be_is_refused_with_the_field(surface, given, field):
    before = await surface.threads.count()
    answer = await surface.http.post("/v1/conversations", json=given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
    assert await surface.threads.count() == before
