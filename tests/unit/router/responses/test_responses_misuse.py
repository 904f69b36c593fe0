"""What goes wrong with stored responses and conversations is told with the field and the fix, and nothing is lost. No engine
runs."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress

import pytest
import pytest_asyncio

from benchmarks.chats.surface import ChatSurface
from prefillshare.kvshare.caller import Caller, current_caller
from prefillshare.router.sessions import MemorySessions

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

RESPONSES, CONVERSATIONS = "/v1/responses", "/v1/conversations"
ASK = {"model": "planner", "input": "hi"}
PATIENCE_S = 20
TTL_S = 100


class Surface(ChatSurface):
    now = 0.0

    async def asked(self, path: str = RESPONSES, method: str = "POST", status: int = 200, **body) -> dict:
        """The answer's JSON. Fails unless it has this status in time."""
        async with asyncio.timeout(PATIENCE_S):
            answer = await self.http.request(method, path, json=body or None)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def refused(self, path: str, field: str | None, status: int = 400, method: str = "POST", **body) -> str:
        """The refusal, which names the field."""
        error = (await self.asked(path, method, status, **body))["error"]
        assert (error["param"], error["code"]) == (field, status), error
        assert field is None or field in error["message"]
        return error["message"]

    async def items(self, conversation: str) -> list[str]:
        """The texts in a conversation."""
        listed = await self.asked(f"{CONVERSATIONS}/{conversation}/items?order=asc", "GET")
        texts = [item["content"] for item in listed["data"]]
        return [text if isinstance(text, str) else text[0]["text"] for text in texts]

    def begin(self, **body) -> asyncio.Task:
        """A call that waits before its second token until `go_on` is set. Cancelling it is hanging up."""
        self.waits_at = 2
        self.waiting.clear()
        self.go_on.clear()
        return asyncio.create_task(self.http.post(RESPONSES, json=ASK | body))

    async def is_waiting(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.waiting.wait()
        self.waits_at = 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(smollm):
    surface = Surface(str(smollm))
    surface.threads = MemorySessions(40, TTL_S, {"": 20, "me": 20}, evicts=True, clock=lambda: surface.now)
    await surface.start()
    yield surface
    await surface.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def surface(started):
    started.answers, started.prompts, started.waits_at = ["Yes."], [], 0
    yield started
    await started.threads.close()  # forgets all


@pytest_asyncio.fixture(loop_scope="module")
async def conversation(surface):
    return (await surface.asked(CONVERSATIONS, items=[{"role": "user", "content": "one"}]))["id"]


def message(**fields) -> list[dict]:
    return [{"role": "user", "content": "x"} | fields]


FUNCTION = {"type": "function", "name": "look"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input.0"),
        ({"input": message(content=3)}, "input.0.content"),
        ({"input": message(content=[{"type": "input_image", "image_url": "http://127.0.0.1:9/"}])}, "input.0.content.0"),
        ({"input": message(content=[{"type": "input_text", "text": 3}])}, "input.0.content.0.text"),
        ({"input": message(role="wizard")}, "input.0.role"),
        ({"input": message(id=3)}, "input.0.id"),
        ({"input": message(status="asleep")}, "input.0.status"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]}, "input.0.arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": {"a": 1}}]}, "input.0.output"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.0.call_id"),
        ({"input": "half \ud83d"}, "input"),
        ({"input": "word " * 50_000}, "input"),
        ({"input": message() * 2000}, "input"),
        ({"previous_response_id": 3}, "previous_response_id"),
        ({"conversation": {}}, "conversation"),
        ({"conversation": ""}, "conversation"),
        ({"store": "perhaps"}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "b" * 600}}, "metadata"),
        ({"tools": 3}, "tools"),
        ({"tools": [{"type": "moon"}]}, "tools.0"),
        ({"tools": [FUNCTION | {"parameters": "x"}]}, "tools.0.parameters"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"previous_input_messages": [{}]}, "previous_input_messages"),
    ],
)
async def test_what_is_not_as_it_must_be_is_refused_by_its_name(surface, body, field):
    answer = await surface.http.post(RESPONSES, content=json.dumps(ASK | body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field), error
    assert field in error["message"]
    assert len(error["message"]) < 600
    assert await surface.threads.count() == 0


async def test_a_body_that_is_no_json_is_refused_as_such(surface):
    for path in (RESPONSES, CONVERSATIONS):
        for body in (b" ", b'{"input', b"\xff\xfe"):
            answer = await surface.http.post(path, content=body, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)
            assert "not JSON" in answer.json()["error"]["message"]


async def test_an_empty_id_is_no_response_and_not_a_call_without_one(surface):
    await surface.refused(RESPONSES, "previous_response_id", 404, **ASK, previous_response_id="")


async def test_tools_that_the_server_would_have_to_run_are_named_as_ignored(surface):
    answer = await surface.http.post(RESPONSES, json=ASK | {"tools": [FUNCTION | {"parameters": {}}, {"type": "web_search"}]})
    assert answer.headers["x-prefillshare-ignored"] == "tools.1 (web_search)"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"items": {}}, "items"),
        ({"items": message(content=[{"type": "input_image", "image_url": "http://127.0.0.1:9/"}])}, "items.0.content.0"),
        ({"items": message(role="wizard")}, "items.0.role"),
        ({"items": message(id=3)}, "items.0.id"),
        ({"items": message(content=None)}, "items.0.content"),
        ({"items": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "items.0.call_id"),
        ({"items": [{"type": "item_reference", "id": "x"}]}, "items"),
        ({"items": message(content="x" * 200_000)}, "items"),
    ],
)
async def test_a_wrong_item_leaves_a_conversation_as_it_was(surface, conversation, body, field):
    await surface.refused(CONVERSATIONS, field, **body)
    await surface.refused(f"{CONVERSATIONS}/{conversation}/items", field, **body)
    assert await surface.items(conversation) == ["one"]
    assert await surface.threads.count() == 1


async def test_metadata_are_changed_only_by_who_sends_some(surface):
    made = await surface.asked(CONVERSATIONS, metadata={"a": "b"})
    path = f"{CONVERSATIONS}/{made['id']}"
    for body in ({"items": message()}, {"metadata": []}, {"metadata": {"a": None}}):
        await surface.refused(path, "metadata", **body)
    assert (await surface.asked(path, "GET"))["metadata"] == {"a": "b"}


async def test_what_is_deleted_twice_was_there_only_once(surface, conversation):
    made = await surface.asked(**ASK)
    listed = await surface.asked(f"{CONVERSATIONS}/{conversation}/items", "GET")
    for path, field in (
        (f"{RESPONSES}/{made['id']}", "response_id"),
        (f"{CONVERSATIONS}/{conversation}/items/{listed['data'][0]['id']}", "item_id"),
        (f"{CONVERSATIONS}/{conversation}", "conversation_id"),
    ):
        await surface.asked(path, "DELETE")
        await surface.refused(path, field, 404, "DELETE")


async def test_what_has_expired_is_unknown_and_what_was_used_has_not(surface, conversation):
    left, used = await surface.asked(**ASK), await surface.asked(**ASK)
    surface.now += TTL_S - 1
    used = await surface.asked(**ASK, previous_response_id=used["id"])
    surface.now += 2
    text = await surface.refused(RESPONSES, "previous_response_id", 404, **ASK, previous_response_id=left["id"])
    assert "unused for 100 s" in text
    await surface.refused(RESPONSES, "conversation", 404, **ASK, conversation=conversation)
    await surface.asked(**ASK, previous_response_id=used["id"])


async def test_another_tenants_conversation_is_unknown_everywhere(surface, conversation):
    token = current_caller.set(Caller("me", "me"))
    try:
        path = f"{CONVERSATIONS}/{conversation}"
        await surface.refused(RESPONSES, "conversation", 404, **ASK, conversation=conversation)
        await surface.refused(path, "conversation_id", 404, metadata={})
        await surface.refused(f"{path}/items", "conversation_id", 404, items=message())
        for method in ("GET", "DELETE"):
            await surface.refused(path, "conversation_id", 404, method)
        history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "Yes."}, *message()]
        await surface.asked(model="planner", input=history)
        assert await surface.threads.count("me") == 1
    finally:
        current_caller.reset(token)
    assert await surface.items(conversation) == ["one"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_that_is_deleted_under_a_call_is_told_of(surface, conversation, stream):
    call = surface.begin(conversation=conversation, stream=stream)
    await surface.is_waiting()
    await surface.asked(f"{CONVERSATIONS}/{conversation}", "DELETE")
    surface.go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        answer = await call
    if not stream:
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (409, "conversation")
        assert "was deleted" in error["message"]
    else:
        error, failed = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")][-2:]
        assert (error["type"], error["param"]) == ("error", "conversation")
        assert failed["response"]["status"] == "failed"
    assert await surface.threads.count() == 0


async def test_of_two_calls_in_one_conversation_the_second_is_refused_and_the_first_goes_on(surface, conversation):
    call = surface.begin(conversation=conversation)
    await surface.is_waiting()
    text = await surface.refused(RESPONSES, "conversation", 409, **ASK, conversation=conversation)
    assert "wait until it has ended" in text
    await surface.refused(f"{CONVERSATIONS}/{conversation}/items", "conversation_id", 409, items=message())
    surface.go_on.set()
    assert (await call).status_code == 200
    assert await surface.items(conversation) == ["one", "hi", "Yes."]


async def test_a_call_that_had_to_wait_for_another_adds_its_items_behind_the_others(surface, conversation, monkeypatch):
    turn = surface.threads.turn

    @asynccontextmanager
    async def behind_another(*given, **how):
        monkeypatch.undo()
        await surface.asked(**ASK | {"input": "first"}, conversation=conversation)
        async with turn(*given, **how) as session:
            yield session

    monkeypatch.setattr(surface.threads, "turn", behind_another)
    await surface.asked(**ASK | {"input": "second"}, conversation=conversation)
    assert await surface.items(conversation) == ["one", "first", "Yes.", "second", "Yes."]


@pytest.mark.parametrize("stream", [False, True])
async def test_who_hangs_up_and_sends_it_again_goes_on_from_where_it_was(surface, conversation, stream):
    first = await surface.asked(**ASK)
    for where in ({"previous_response_id": first["id"]}, {"conversation": conversation}, {}):
        before = await surface.threads.count()
        call = surface.begin(**where, stream=stream)
        await surface.is_waiting()
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        assert await surface.threads.count() == before
        again = await surface.asked(**ASK, **where)
        assert again["status"] == "completed"
        context = surface.prompts[-1]
        assert context.count("user\nhi") == (2 if "previous_response_id" in where else 1)
    assert await surface.items(conversation) == ["one", "hi", "Yes."]


async def test_who_deletes_a_response_that_a_call_goes_on_from_takes_nothing_from_the_call(surface):
    first = await surface.asked(**ASK)
    call = surface.begin(previous_response_id=first["id"])
    await surface.is_waiting()
    await surface.asked(f"{RESPONSES}/{first['id']}", "DELETE")
    surface.go_on.set()
    second = (await call).json()
    await surface.asked(**ASK, previous_response_id=second["id"])
    assert surface.prompts[-1].count("user\nhi") == 3


async def test_going_on_from_a_response_of_a_conversation_leaves_the_conversation_alone(surface, conversation):
    first = await surface.asked(**ASK, conversation=conversation)
    await surface.asked(**ASK | {"input": "aside"}, previous_response_id=first["id"])
    history = [{"role": "user", "content": text} for text in ("one", "hi")]
    history += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "another aside"}]
    await surface.asked(model="planner", input=history)
    await surface.asked(**ASK | {"input": "on"}, conversation=conversation)
    assert "aside" not in surface.prompts[-1]
    assert await surface.items(conversation) == ["one", "hi", "Yes.", "on", "Yes."]


async def test_nothing_goes_on_from_a_response_before_which_an_item_was_taken_out(surface, conversation):
    first = await surface.asked(**ASK, conversation=conversation)
    listed = await surface.asked(f"{CONVERSATIONS}/{conversation}/items?order=asc", "GET")
    await surface.asked(f"{CONVERSATIONS}/{conversation}/items/{listed['data'][0]['id']}", "DELETE")
    text = await surface.refused(RESPONSES, "previous_response_id", **ASK, previous_response_id=first["id"])
    assert "send the conversation instead" in text
    history = [{"role": "user", "content": text} for text in ("one", "hi")]
    await surface.asked(model="planner", input=[*history, {"role": "assistant", "content": "Yes."}, *message()])
    assert surface.prompts[-1].count("user\none") == surface.prompts[-1].count("user\nhi") == 1
    assert (await surface.asked(f"{RESPONSES}/{first['id']}", "GET"))["id"] == first["id"]
    await surface.asked(**ASK | {"input": "on"}, conversation=conversation)
    assert "user\none" not in surface.prompts[-1]


async def test_a_message_that_is_to_be_continued_is_not_laid_out_without_what_it_belongs_to(surface, conversation):
    first = await surface.asked(**ASK)
    begun = {"type": "message", "role": "assistant", "status": "in_progress", "id": "msg_1"}
    begun["content"] = [{"type": "output_text", "text": "Once", "annotations": []}]
    for where in ({"previous_response_id": first["id"]}, {"conversation": conversation}):
        for store in (True, False):
            await surface.refused(RESPONSES, "input", **ASK | {"input": [begun], "store": store}, **where)
    alone = await surface.asked(**ASK | {"input": [*message(), begun]})
    assert (alone["store"], surface.prompts[-1].endswith("Once")) == (False, True)


async def test_a_request_that_is_too_long_behind_a_response_leaves_the_response(surface):
    first = await surface.asked(**ASK)
    await surface.refused(RESPONSES, "input", **ASK | {"input": "word " * 1100}, previous_response_id=first["id"])
    await surface.asked(**ASK, previous_response_id=first["id"])
    assert surface.prompts[-1].count("user\nhi") == 2


async def test_what_is_damaged_in_the_store_is_told_as_such_and_can_be_deleted(surface, conversation):
    made = await surface.asked(**ASK)
    await surface.threads.note(made["id"].removeprefix("resp_")[:32], {made["id"]: "{}"}, tenant="")
    await surface.threads.note(conversation, {"conversation": "[]"}, tenant="")
    for path, field, where in (
        (f"{RESPONSES}/{made['id']}", "response_id", {"previous_response_id": made["id"]}),
        (f"{CONVERSATIONS}/{conversation}", "conversation_id", {"conversation": conversation}),
    ):
        assert "damaged" in await surface.refused(path, field, 404, "GET")
        assert "damaged" in await surface.refused(RESPONSES, next(iter(where)), 404, **ASK, **where)
        await surface.asked(path, "DELETE")
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes."}, *message()]
    await surface.asked(model="planner", input=history)
    assert await surface.threads.count() == 1
