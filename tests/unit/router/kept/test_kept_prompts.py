"""Beginnings of prompts that calls over HTTP ask to keep: Anthropic's `cache_control`, OpenAI's `prompt_cache_retention`. No
engine runs."""

from __future__ import annotations

import anthropic
import pytest
import pytest_asyncio
from keeping_surface import KeepingSurface
from surface_clients import with_anthropic

from prefillshare.router.kept.budgets import Budget
from prefillshare.router.kept.kept import PRIORITIES, Kept, of_session

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surface(smollm):
    async with with_anthropic(KeepingSurface(str(smollm))) as surface:
        yield surface


async def ask(surface, messages, **more):
    return await surface.client.messages.create(model="planner", max_tokens=50, messages=messages, **more)


# cache_control ----------------------------------------------------------------------------------------------------------

EPHEMERAL = {"type": "ephemeral"}
HANDBOOK = "The harbour opens at six. " * 20


def block(text: str, ttl: str | None = None, *, keep: bool = True) -> dict:
    given = {"cache_control": EPHEMERAL | ({"ttl": ttl} if ttl else {})} if keep else {}
    return {"type": "text", "text": text, **given}


@pytest.fixture
async def keeping(surface):
    """The surface, with nothing kept."""
    for kept in await surface.store.of(""):
        await surface.store.let_go("", kept.name)
    surface.replicas.wanted.clear()
    surface.answers, surface.cached_tokens, surface.capacity = ["Yes."], 0, 1000
    yield surface
    surface.cached_tokens, surface.capacity = 0, 1000


def kept(surface) -> list[tuple[str, float]]:
    """What the last call keeps: the text up to where each kept beginning ends, and for how long."""
    if not surface.replicas.wanted:
        return []
    wanted = surface.replicas.wanted[-1]
    size = surface.base.block_size
    assert wanted.token_ids == surface.ids[-1]
    return [(surface.tokenizer.decode(wanted.token_ids[: one.blocks * size]), one.ttl_s) for one in wanted.kept]


def ends_within(text: str, whole: str, end: str, size: int) -> None:
    """`text` is the beginning of the prompt up to `end`'s end, give or take a block: whole blocks are kept, and what the
    template always puts behind the end is part of the beginning."""
    assert whole.startswith(text)
    assert abs(whole.index(end) + len(end) - len(text)) < 8 * size


async def test_the_prompt_up_to_a_block_of_the_system_prompt_is_kept(keeping):
    system = [block(HANDBOOK), block("You plan.", keep=False)]
    await ask(keeping, [{"role": "user", "content": "When?"}], system=system)
    ((text, ttl_s),) = kept(keeping)
    assert ttl_s == 300
    ends_within(text, keeping.prompts[-1], HANDBOOK, keeping.base.block_size)
    (one,) = await keeping.store.of("")
    await ask(keeping, [{"role": "user", "content": "And where?"}], system=system)
    assert [again.name for again in await keeping.store.of("")] == [one.name], "the same beginning is the same, for all calls"


async def test_up_to_four_blocks_of_messages_end_what_is_kept(keeping):
    messages = [
        {"role": "user", "content": [block(HANDBOOK, "1h"), block("When? " * 40, "1h"), block("And where?", keep=False)]},
        {"role": "assistant", "content": "At six, at the harbour."},
        {"role": "user", "content": [block("Thank you so much. " * 20)]},
    ]
    await ask(keeping, messages, system=[block("You plan. " * 30, "1h")])
    found, whole, size = kept(keeping), keeping.prompts[-1], keeping.base.block_size
    assert [ttl_s for _, ttl_s in found] == [3600, 3600, 3600, 300]
    ends = ("You plan. " * 30, HANDBOOK, "When? " * 40, "Thank you so much. " * 20)
    for (text, _), end in zip(found, ends, strict=True):
        ends_within(text, whole, end, size)


async def test_up_to_a_tool_the_system_prompt_is_kept_with_it(keeping):
    tools = [TOOL | {"cache_control": EPHEMERAL}, TOOL | {"name": "leave"}]
    await ask(keeping, [{"role": "user", "content": "When?"}], tools=tools, system=HANDBOOK)
    ((text, _),) = kept(keeping)
    ends_within(text, keeping.prompts[-1], HANDBOOK, keeping.base.block_size)


async def test_of_the_request_itself_it_stands_at_the_end_of_the_last_message(keeping):
    messages = [{"role": "user", "content": HANDBOOK}]
    await ask(keeping, messages, extra_body={"cache_control": EPHEMERAL})
    ((text, _),) = kept(keeping)
    ends_within(text, keeping.prompts[-1], HANDBOOK, keeping.base.block_size)


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_tells_what_was_read_what_was_put_there_and_what_is_neither(keeping, stream):
    async def usage():
        asked = {"messages": [{"role": "user", "content": "When?"}], "system": [block(HANDBOOK)]}
        if not stream:
            return (await ask(keeping, **asked)).usage
        async with keeping.client.messages.stream(model="planner", max_tokens=50, **asked) as running:
            return (await running.get_final_message()).usage

    told = await usage()
    whole = len(keeping.ids[-1])
    kept_tokens = keeping.replicas.wanted[-1].longest.blocks * keeping.base.block_size
    assert (told.cache_creation_input_tokens, told.cache_read_input_tokens) == (kept_tokens, 0)
    assert told.input_tokens == whole - kept_tokens > 0
    keeping.cached_tokens = kept_tokens
    told = await usage()
    assert (told.cache_creation_input_tokens, told.cache_read_input_tokens) == (0, kept_tokens)
    assert told.input_tokens == whole - kept_tokens


async def test_beyond_the_budget_the_call_is_served_and_its_usage_says_that_nothing_was_kept(keeping):
    keeping.capacity = 2
    told = await ask(keeping, [{"role": "user", "content": "When?"}], system=[block(HANDBOOK)])
    assert (told.content[0].text, told.usage.cache_creation_input_tokens) == ("Yes.", 0)
    assert told.usage.input_tokens == len(keeping.ids[-1])
    assert kept(keeping) == []


async def test_in_a_session_its_context_is_kept_however_it_is_laid_out(keeping):
    header = {"x-prefillshare-session": "kept"}
    await ask(keeping, [{"role": "user", "content": [block(HANDBOOK)]}], system="You plan.", extra_headers=header)
    wanted = keeping.replicas.wanted[-1]
    (only,) = wanted.kept
    text = keeping.tokenizer.decode(wanted.token_ids[: only.blocks * keeping.base.block_size])
    assert HANDBOOK[:200] in text
    assert "You plan." not in text, "the agent's own part is not of the context"


async def test_a_session_that_a_call_begins_is_not_kept_because_one_of_its_name_was(keeping):
    before = Kept("", of_session("anew"), 0, 600.0, 600.0)
    await keeping.store.keep(before, b"", Budget(9, "own", 9, "all"))
    said = [{"role": "user", "content": "When?"}]
    await ask(keeping, said, extra_headers={"x-prefillshare-session": "anew"})
    assert await keeping.store.of("") == []


async def test_without_cache_control_nothing_is_kept(keeping):
    told = await ask(keeping, [{"role": "user", "content": HANDBOOK}])
    assert kept(keeping) == []
    assert told.usage.cache_creation_input_tokens == 0


FIVE = [block(f"part {n}") for n in range(5)]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"system": FIVE}, "cache_control: 5 blocks have it (fix: give it to at most 4 blocks)"),
        ({"system": [block("a", "2h")]}, "system.0.cache_control.ttl: '2h' is not known (fix: use one of 5m, 1h)"),
        ({"system": [block("a"), block("b", "1h")]}, "system.1.cache_control: what is kept for longer comes before"),
        ({"system": [block("a") | {"cache_control": {"type": "forever"}}]}, "system.0.cache_control: this is not of type eph"),
        ({"messages": [{"role": "user", "content": [block("")]}]}, "messages.0.content.0.cache_control: an empty text cannot"),
        ({"tools": [TOOL | {"cache_control": 1}]}, "tools.0.cache_control: this is not of type ephemeral"),
    ],
)
async def test_a_wrong_cache_control_is_named(keeping, asked, told):
    usual = {"model": "planner", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(anthropic.BadRequestError) as refused:
        await keeping.client.messages.create(**(usual | asked))
    assert refused.value.body["error"]["message"].startswith(told)
    assert keeping.replicas.wanted == []


# OpenAI's prompt_cache_retention ----------------------------------------------------------------------------------------


async def test_a_prompt_that_is_to_be_retained_for_a_day_is_kept_for_a_day(keeping):
    body = {"model": "planner", "max_tokens": 5, "messages": [{"role": "user", "content": HANDBOOK}]}
    for retention, ttl_s in (("24h", 86400), ("in_memory", None), (None, None)):
        keeping.replicas.wanted.clear()
        told = await keeping.http.post("/v1/chat/completions", json=body | {"prompt_cache_retention": retention})
        assert told.status_code == 200
        assert [one[1] for one in kept(keeping)] == ([ttl_s] if ttl_s else [])
    told = await keeping.http.post("/v1/chat/completions", json=body | {"prompt_cache_retention": "7d"})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "prompt_cache_retention")
    assert "use in_memory or 24h" in told.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_the_prompt_of_a_call_that_goes_behind_others_is_given_up_before_theirs(keeping, path):
    said = {"input": HANDBOOK} if path == "/v1/responses" else {"messages": [{"role": "user", "content": HANDBOOK}]}
    body = {"model": "planner", "prompt_cache_retention": "24h", **said}
    for priority in (0, 3):
        assert (await keeping.http.post(path, json=body | {"priority": priority})).status_code == 200
    first, behind = (wanted.longest for wanted in keeping.replicas.wanted)
    assert first.rank - behind.rank == 3 * len(PRIORITIES)


async def test_of_a_response_its_prompt_is_kept(keeping):
    body = {"model": "planner", "max_output_tokens": 5, "input": HANDBOOK, "prompt_cache_retention": "24h"}
    assert (await keeping.http.post("/v1/responses", json=body)).status_code == 200
    ((text, ttl_s),) = kept(keeping)
    assert (HANDBOOK[:200] in text, ttl_s) == (True, 86400)
    told = await keeping.http.post("/v1/responses", json=body | {"prompt_cache_retention": "7d"})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "prompt_cache_retention")


@pytest.mark.parametrize("session", ["", "fails"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_a_call_that_fails_before_its_prompt_is_there_takes_up_nothing_of_the_budget(keeping, path, session):
    said = {"input": HANDBOOK} if path == "/v1/responses" else {"messages": [{"role": "user", "content": HANDBOOK}]}
    headers = {"x-prefillshare-session": session} if session else {}
    body = {"model": "planner", "prompt_cache_retention": "24h", **said}
    keeping.fails_at = 1
    try:
        assert (await keeping.http.post(path, json=body, headers=headers)).status_code == 503
    finally:
        keeping.fails_at = 0
    assert (await keeping.store.own(""), kept(keeping)) == (0, [])


async def test_a_call_that_fails_takes_nothing_from_what_was_kept_before(keeping):
    short = {"messages": [{"role": "user", "content": "When?"}], "system": [block(HANDBOOK)]}
    await ask(keeping, **short)
    before = [one.name for one in await keeping.store.of("")]
    keeping.fails_at = 1
    try:
        with pytest.raises(anthropic.APIStatusError):
            await ask(keeping, short["messages"], system=[block(HANDBOOK), block("More. " * 60)])
    finally:
        keeping.fails_at = 0
    assert [one.name for one in await keeping.store.of("")] == before


async def test_the_prompt_of_several_answers_is_kept_once(keeping):
    body = {"model": "planner", "n": 3, "messages": [{"role": "user", "content": HANDBOOK}], "prompt_cache_retention": "24h"}
    told = (await keeping.http.post("/v1/chat/completions", json=body)).json()["usage"]["prompt_tokens_details"]
    assert len(keeping.replicas.wanted) == 1
    assert told["created_cache_tokens"] == keeping.replicas.wanted[0].longest.blocks * keeping.base.block_size
