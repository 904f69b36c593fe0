"""Stored responses where several routers share a Redis server, which may go. No engine runs."""

from __future__ import annotations

import asyncio

import openai
import pytest
import pytest_asyncio
from ports import free_port
from surface_clients import openai_client

from benchmarks.chats.surface import ChatSurface
from benchmarks.shared.redis_server import RedisServer
from prefillshare.router.redis_calls import RedisCalls
from prefillshare.router.sessions import RedisSessions

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

OPENING = "<|im_start|>assistant\n"
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALLED = '<tool_call>\n{"name":  "look", "arguments":  {"at":  "map"}}\n</tool_call>'  # as templates do not lay it out
PATIENCE_S = 20


def session_of(response) -> str:
    """How the call went on."""
    return response.model_extra["kv_transfer_params"]["prefillshare"]["session"]


def store(server: RedisServer, **options) -> RedisSessions:
    return RedisSessions(RedisCalls(server.url, "session store"), 20, 60, evicts=True, **options)


def shown(*messages) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(smollm, tmp_path_factory):
    """A Redis server, and two routers over it, each with a client."""
    with RedisServer(tmp_path_factory.mktemp("redis"), free_port()) as server:
        routers = [ChatSurface(str(smollm), store(server, timeout_s=1)) for _ in range(2)]
        try:
            for router in routers:
                await router.start()
                router.client = openai_client(router.http)
            yield server, *routers
        finally:
            for router in routers:
                await router.stop()
                await router.threads.close()


@pytest.fixture
def redis(started):
    return started[0]


@pytest.fixture
def routers(started):
    for router in started[1:]:
        router.answers, router.prompts, router.waits_at = ["Yes."], [], 0
    return started[1:]


async def test_with_redis_every_router_goes_on_from_every_response_and_one_may_die(routers):
    one, other = routers
    first = await one.client.responses.create(model="planner", input="Capital of France?")
    made = await one.client.conversations.create(items=[{"role": "user", "content": "I am Ann."}])
    thread = first.id.removeprefix("resp_")[:32]
    await one.threads.turn(thread, tenant="").__aenter__()  # in the middle of which its router dies
    await one.threads.close()
    second = await other.client.responses.create(model="coder", input="And of Italy?", previous_response_id=first.id)
    said = shown(("user", "Capital of France?"), ("assistant", "Yes."), ("user", "And of Italy?"))
    assert other.prompts[-1] == DEFAULT + said + OPENING
    assert (await other.client.responses.retrieve(first.id)).model_dump() == first.model_dump()
    assert second.previous_response_id == first.id
    await other.client.responses.create(model="coder", input="Who am I?", conversation=made.id)
    assert shown(("user", "I am Ann."), ("user", "Who am I?")) in other.prompts[-1]


async def test_a_whole_history_is_known_to_every_router_at_the_cost_of_no_more_calls_of_the_store(routers, monkeypatch):
    one, other = routers
    calls: list[int] = []

    async def counted(*given, run=other.threads._run, **how):
        calls.append(1)
        return await run(*given, **how)

    monkeypatch.setattr(other.threads, "_run", counted)
    one.answers = [CALLED]
    history = [{"role": "user", "content": "Look."}]
    first = await one.client.responses.create(model="planner", input=history, tools=[TOOL])
    await other.client.responses.create(model="planner", input=history, tools=[TOOL])
    begun = len(calls)
    history += [item.model_dump(exclude_none=True) for item in first.output]
    history.append({"type": "function_call_output", "call_id": first.output[0].call_id, "output": "Paris"})
    second = await other.client.responses.create(model="coder", input=history)
    assert CALLED in other.prompts[-1]
    assert session_of(second) == "continued"
    assert len(calls) - begun == begun
    unknown = [{"role": "user", "content": "Hm."}, {"role": "assistant", "content": "What?"}, *history[:1]]
    third = await other.client.responses.create(model="coder", input=unknown)
    assert session_of(third) == "begun"
    assert len(calls) == 3 * begun + 1


async def test_while_redis_is_gone_only_what_relies_on_it_is_refused(redis, routers):
    router, _ = routers
    responses = router.client.responses
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "two"}]
    first = await responses.create(model="planner", input="one")
    redis.kill()
    for asked in ({"input": history}, {"input": "one"}):
        made = await responses.create(model="coder", **asked)
        assert (made.status, made.store) == ("completed", False)
    assert router.prompts[-2] == DEFAULT + shown(("user", "one"), ("assistant", "Yes."), ("user", "two")) + OPENING
    for asked in ({"previous_response_id": first.id}, {"store": True}):
        with pytest.raises(openai.InternalServerError, match="session store") as refused:
            await responses.create(model="coder", input="two", **asked)
        assert refused.value.status_code == 503
    redis.start()
    router.waits_at = 2
    call = asyncio.create_task(responses.create(model="coder", input=history))
    async with asyncio.timeout(PATIENCE_S):
        await router.waiting.wait()
    redis.kill()
    router.go_on.set()
    made = await call
    assert (made.output_text, made.store, session_of(made)) == ("Yes.", False, "continued")
    redis.start()
    assert session_of(await responses.create(model="coder", input=history)) == "continued"


async def test_a_response_of_another_base_is_not_gone_on_from(redis, routers):
    one, _ = routers
    stores = [store(redis, tokenizer=letter * 64) for letter in "ab"]
    own = one.threads
    try:
        one.threads = one.app.state.threads.sessions = stores[0]
        history = [{"role": "user", "content": "one"}]
        first = await one.client.responses.create(model="planner", input=history)
        made = await one.client.conversations.create(items=history)
        one.app.state.threads.sessions = stores[1]
        for field, told in (("previous_response_id", first.id), ("conversation", made.id)):
            with pytest.raises(openai.ConflictError, match=f"{told}.* tokenizer aaaaaaaaaaaa.* has bbbbbbbbbbbb") as refused:
                await one.client.responses.create(model="planner", input="two", **{field: told})
            assert refused.value.param == field
        history += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "two"}]
        assert session_of(await one.client.responses.create(model="planner", input=history)) == "begun"
        one.app.state.threads.sessions = stores[0]
        await one.client.responses.create(model="planner", input="two", previous_response_id=first.id)
    finally:
        one.threads = one.app.state.threads.sessions = own
        for one_base in stores:
            await one_base.close()
