"""What the page is told: turns with the figures that their clients get, replicas as the router sees them, all of it bounded."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from double.engines import BLOCK
from double.system import deployment, session_system, system
from virtual_time import on_virtual_time

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import DeadlineExceeded, InvalidInput, ResumeReason
from prefillshare.router.telemetry.recent_turns import MOST, RecentTurns
from prefillshare.router.turn.terms import Terms
from prefillshare.router.ui.feed import MOST_REPLICAS, MOST_ROUTERS, Feed, revisions

PROMPT = list(range(20, 57))


def feed_of(running, **router) -> Feed:
    core = SimpleNamespace(orchestrator=running.orchestrator, fleet=running.fleet, decoders=running.orchestrator.decoders)
    running.orchestrator.services.config = Router(**router)
    return Feed(core, deployment(1))


@on_virtual_time
async def test_a_session_shows_that_the_second_decoder_finds_cached_what_the_first_one_had_computed():
    async with session_system(1) as running:
        await running.sessions.create("s1", PROMPT, tenant="")
        for decoder in ("a", "b"):
            await running.take("s1", decoder, [1, 2, 3, 4, 5])
        first, second = feed_of(running).told("")["turns"]
    assert (first["session"], first["lane"], first["decoder"], first["pool"]) == ("s1", "session s1", "a", "agents")
    assert (second["session"], second["decoder"], second["number"]) == ("s1", "b", 2)
    assert (first["prompt_tokens"], first["completion_tokens"]) == (42, 6)
    assert (first["cached_tokens"], first["computed_tokens"]) == (0, 41)
    found = (second["prompt_tokens"] - 1) // BLOCK * BLOCK
    assert second["prompt_tokens"] == 42 + 6 + 5
    assert second["cached_tokens"] >= 40, "the first turn's prompt, in whole blocks"
    assert second["cached_tokens"] <= found
    assert second["computed_tokens"] == 52 - second["cached_tokens"]
    for turn in (first, second):
        assert turn["prefill_choice"] == "there: only"
        assert (turn["prefill_replica"], turn["decode_replica"]) == ("prefill-1", "agents-1")
        assert (turn["outcome"], turn["resumes"]) == ("ok", 0)
        assert turn["took_s"] >= turn["time_to_first_token_s"] > 0


@on_virtual_time
async def test_calls_without_a_session_share_a_lane_if_they_continue_each_other():
    async with system(1) as running:
        said = await running.turn("a", PROMPT)
        await running.turn("b", [*PROMPT, *said, 1, 2])
        await running.turn("c", [9, *PROMPT])
        lanes = [(turn["lane"], turn["session"], turn["decoder"]) for turn in feed_of(running).told("")["turns"]]
    assert lanes == [("calls 1", "", "a"), ("calls 1", "", "b"), ("calls 2", "", "c")]


@on_virtual_time
async def test_a_turn_is_seen_while_it_runs_and_how_it_ended_afterwards():
    async with system(1) as running:
        feed = feed_of(running)
        stream = running.run("a", PROMPT, 6)
        await anext(stream)
        (seen,) = feed.told("")["turns"]
        assert (seen["outcome"], seen["completion_tokens"], seen["took_s"]) == ("", 1, 0.0)
        await stream.aclose()
        with pytest.raises(DeadlineExceeded):
            await running.turn("a", PROMPT, 90, deadline_s=1.0)
        told = feed.told("")
        assert [turn["outcome"] for turn in told["turns"]] == ["cancelled", "DeadlineExceeded"]
        known = f"{told['router']['id']}.{told['router']['revision']}"
        assert feed.told("", known)["turns"] == []
        assert len(feed.told("", f"00000000.7,{known.replace('.', '.0')}")["turns"]) == 0, "leading zeros are numbers, too"
        assert len(feed.told("", "00000000.7")["turns"]) == 2, "another router's revision says nothing of this one"


@on_virtual_time
async def test_probes_of_the_router_itself_are_not_shown():
    async with system(1) as running:
        await running.turn("a", PROMPT, is_probe=True)
        assert feed_of(running).told("")["turns"] == []
    assert Terms().is_probe is False


@on_virtual_time
async def test_a_tenant_is_told_of_its_own_turns_only():
    async with system(1) as running:
        for tenant, tokens in (("research", 3), ("support", 5)):
            async for _ in running.run("a", PROMPT, tokens, Caller(tenant, tenant)):
                pass
        feed = feed_of(running)
        for tenant, tokens in (("research", 3), ("support", 5)):
            told = feed.told(tenant)
            assert (told["tenant"], [turn["completion_tokens"] for turn in told["turns"]]) == (tenant, [tokens])
            assert told["router"]["revision"] == 2
        assert feed.told("")["turns"] == []
        assert "support" not in json.dumps(feed.told("research"))


@on_virtual_time
async def test_pools_stand_in_order_with_their_replicas_and_what_they_do():
    async with system(2) as running:
        told = feed_of(running, ui="full", replicas=2, redis_url="redis://one").told("")
        pools = told["pools"]
        assert [(pool["pool"], pool["role"], pool["for"]) for pool in pools] == [
            ("prefill", "prefill", ["agents", "streams"]), ("prefill-alone", "prefill", ["alone"]),
            ("agents", "decode", []), ("streams", "decode", []), ("alone", "decode", []),
        ]  # fmt: skip
        assert [replica["replica"] for replica in pools[0]["replicas"]] == ["prefill-1", "prefill-2"]
        assert pools[2]["replicas"][0] == {
            "replica": "agents-1", "usable": True, "reason": "", "calls": 0, "queued_tokens": 0, "running": 0, "waiting": 0,
            "blocks_used": 0, "blocks_total": 1_000, "preemptions": 0, "stalled_s": 0.0,
        }  # fmt: skip
        assert (told["deployment"], told["base"]) == ("doubles", {"name": "base", "model": "m"})
        assert (told["version"], told["ui"], told["router"]["routers"], told["block_tokens"]) == (1, "full", 2, BLOCK)
        assert {decoder["name"] for decoder in told["decoders"]} == {"a", "b", "o", "base", "s", "t", "c", "d"}


@on_virtual_time
async def test_an_ejected_replica_is_shown_with_the_reason():
    async with system(1) as running:
        running.fleet.pools["agents"].replicas.wellbeing.failed("agents-1", ResumeReason.GONE, for_good=True)
        (shown,) = next(pool for pool in feed_of(running).told("")["pools"] if pool["pool"] == "agents")["replicas"]
        assert (shown["usable"], shown["reason"]) == (False, "gone")


@on_virtual_time
async def test_waiting_turns_are_counted_by_pool():
    async with system(1, max_queued_prefill_tokens=1) as running:
        turns = [asyncio.create_task(running.turn("a", [*PROMPT, number])) for number in range(3)]
        await asyncio.sleep(0)
        waiting = {pool["pool"]: pool["waiting_turns"] for pool in feed_of(running).told("")["pools"]}
        assert waiting == {"prefill": 0, "prefill-alone": 0, "agents": 2, "streams": 0, "alone": 0}
        await asyncio.gather(*turns)


@on_virtual_time
async def test_an_answer_is_bounded_whatever_clients_call_their_sessions():
    async with system(1) as running:
        services = running.orchestrator.services
        services.recent = RecentTurns()
        for number in range(MOST + 9):
            await running.turn("a", [1, 2, 3], 1, session=f"{number}" + "\N{PILE OF POO}" * 9_999)
        members = running.fleet.pools["agents"].replicas.members
        for number in range(MOST_REPLICAS + 5):
            members[f"more-{number}"] = members["agents-1"]
        told = feed_of(running).told("")
        assert len(told["turns"]) == MOST
        assert len(json.dumps(told, ensure_ascii=False).encode()) < 2_000 * MOST
        (pool,) = [pool for pool in told["pools"] if pool["pool"] == "agents"]
        assert (len(pool["replicas"]), pool["unlisted_replicas"]) == (MOST_REPLICAS, 6)
        for number in range(MOST_REPLICAS + 5):
            del members[f"more-{number}"]


@pytest.mark.parametrize(
    "known", ["x", "0", "00000000", "00000000.", ".7", "00000000.-1", "00000000.1;", "zzzzzzzz.1", "00000000.1,", "1" * 40, " "]
)
def test_revisions_that_no_router_told_are_refused_by_field(known):
    with pytest.raises(InvalidInput) as refused:
        revisions(known)
    assert (refused.value.field, refused.value.fix.startswith("leave it out")) == ("known", True)


def test_as_many_routers_are_known_as_a_deployment_may_have():
    many = ",".join(f"{number:08x}.{number}" for number in range(MOST_ROUTERS))
    assert revisions(many)["00000003"] == 3
    with pytest.raises(InvalidInput):
        revisions(f"{many},ffffffff.1")
    assert revisions("") == {}
