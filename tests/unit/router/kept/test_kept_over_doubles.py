"""What is kept over a router's own fleet and turns: on one replica, growing with its session, and elsewhere when that is lost.

Engines are doubles (tests/double), on virtual time.
"""

import asyncio
from contextlib import suppress

import pytest
from double.engines import BLOCK, STEP_S
from double.system import session_system
from virtual_time import on_virtual_time

from prefillshare.kvshare.caller import ANONYMOUS, Caller
from prefillshare.kvshare.errors import Conflict, InvalidInput, NotFound, Overloaded, Unavailable
from prefillshare.router.kept.kept import of_session
from prefillshare.router.kept.upkeep import CLAIM_S, PERIOD_S

PROMPT = list(range(20, 57))  # 37 tokens, of which 32 are in whole blocks
NAME = "0::session:s"


async def begun(running, context=PROMPT, session_id="s", **how):
    await running.turns.create(session_id, ("token_ids", context))
    return await running.turns.kept.keep(ANONYMOUS, session_id, **how)


def kept(running, pool: str = "prefill") -> dict[str, dict[str, int]]:
    """Replica -> name -> tokens that it keeps; replicas that keep nothing are left out."""
    there = {name: replica.engine.kept.names for name, replica in running.cluster.pools[pool].replicas.items()}
    return {name: names for name, names in there.items() if names}


def value(metric) -> float:
    return sum(sample.value for family in metric.collect() for sample in family.samples if sample.name.endswith("_total"))


async def keeper_of(running, name: str = NAME) -> str:
    """The replica that keeps it."""
    (replica,) = (replica for replica, names in kept(running).items() if name in names)
    return replica


@on_virtual_time
async def test_a_kept_session_is_kept_in_whole_blocks_on_one_replica():
    async with session_system(replicas=3) as running:
        told = await begun(running, ttl_s=60, priority=70)
        assert (told.blocks, told.left_s, told.priority) == (4, 60, 70)
        await asyncio.sleep(1)
        assert list(kept(running).values()) == [{NAME: 32}]
        listed = await running.turns.kept.listed(ANONYMOUS)
        assert (listed.tokens, listed.held) == (32, {of_session("s"): 32})
        assert listed.max_tokens == 500 * BLOCK * 3


@on_virtual_time
async def test_what_its_turns_add_is_kept_too_and_its_time_begins_anew():
    async with session_system() as running:
        await begun(running, ttl_s=60)
        await asyncio.sleep(50)
        said = await running.take("s", "a", [60], tokens=20)
        await asyncio.sleep(3)
        context = [*PROMPT, 60, *said]
        assert list(kept(running).values()) == [{NAME: len(context) // BLOCK * BLOCK}]
        (one,) = (await running.turns.kept.listed(ANONYMOUS)).kept
        assert one.left_s > 50
        await asyncio.sleep(61)
        assert kept(running) == {}
        assert (await running.turns.kept.listed(ANONYMOUS)).kept == []


@on_virtual_time
async def test_what_a_truncation_takes_away_is_kept_no_longer():
    async with session_system() as running:
        await begun(running, ttl_s=60)
        await running.take("s", "a", [60], tokens=20)
        await asyncio.sleep(3)
        assert (await running.turns.kept.listed(ANONYMOUS)).tokens == 56
        await running.turns.update("s", truncate_to=len(PROMPT))
        await asyncio.sleep(3)
        listed = await running.turns.kept.listed(ANONYMOUS)
        assert (listed.tokens, listed.held) == (32, {of_session("s"): 32})
        assert await running.take("s", "b", [61]) == running.expected("b", [*PROMPT, 61])


@on_virtual_time
async def test_it_stays_where_it_is_while_it_grows():
    async with session_system(replicas=3) as running:
        await begun(running, ttl_s=60)
        await asyncio.sleep(1)
        first = await keeper_of(running)
        for number in range(6):
            await running.take("s", "ab"[number % 2], [60 + number], tokens=20)
            await asyncio.sleep(3)
            assert await keeper_of(running) == first
        computed = value(running.metrics["keep_prefill_tokens_total"])
        assert computed <= 33 + 6 * BLOCK, "eager prefill has computed the responses; keeping them adds a token each"


@on_virtual_time
async def test_turns_that_follow_at_once_prolong_it_without_computing_it_twice():
    async with session_system() as running:
        await begun(running, ttl_s=2)
        await asyncio.sleep(1)
        for number in range(8):
            await running.take("s", "a", [60 + number], tokens=9)
            assert NAME in kept(running)[await keeper_of(running)], "its time has not passed although turns took longer"
        await asyncio.sleep(1)
        context = await running.context("s")
        assert list(kept(running).values()) == [{NAME: len(context) // BLOCK * BLOCK}]


@on_virtual_time
async def test_beyond_the_budget_it_is_refused_and_nothing_changes():
    async with session_system(max_kept_tokens=40) as running:
        await begun(running, session_id="s", ttl_s=60)
        await running.turns.create("t", ("token_ids", [9, *PROMPT]))
        with pytest.raises(Overloaded) as refused:
            await running.turns.kept.keep(ANONYMOUS, "t", ttl_s=60)
        assert str(refused.value) == (
            "router.max_kept_tokens: you keep 32 tokens of at most 40; a context of 32 tokens does not fit beside them "
            "(fix: let something go (ListKept lists it), or have the limit raised)"
        )
        assert refused.value.retry_after_s == pytest.approx(60, abs=1)
        await running.turns.create("u", ("token_ids", [*range(60, 160)]))
        with pytest.raises(InvalidInput, match="96 tokens are more than the 40 that you may keep"):
            await running.turns.kept.keep(ANONYMOUS, "u", ttl_s=60)
        await asyncio.sleep(1)
        assert list(kept(running).values()) == [{NAME: 32}]
        fork = await running.sessions.fork("s", "f", tenant="")
        assert (await running.turns.kept.keep(ANONYMOUS, fork.session_id)).blocks == 4, "it adds nothing"


@on_virtual_time
async def test_growth_beyond_the_budget_leaves_what_was_kept():
    async with session_system(max_kept_tokens=40) as running:
        await begun(running, ttl_s=60)
        await asyncio.sleep(50)
        await running.take("s", "a", [60], tokens=20)
        await asyncio.sleep(30)
        assert list(kept(running).values()) == [{NAME: 32}]
        refused = running.metrics["keeps_refused_total"].labels("own_budget")
        assert refused._value.get() == 1


@on_virtual_time
async def test_nothing_may_be_kept_where_the_share_is_0():
    async with session_system(max_kept_share=0) as running:
        with pytest.raises(InvalidInput, match=r"router\.max_kept_share"):
            await begun(running)


@on_virtual_time
async def test_letting_go_ends_it_at_once_and_may_be_repeated():
    async with session_system() as running:
        await begun(running)
        await asyncio.sleep(1)
        await running.turns.kept.let_go(ANONYMOUS, "s")
        await asyncio.sleep(1)
        assert kept(running) == {}
        await running.turns.kept.let_go(ANONYMOUS, "s")
        with pytest.raises(NotFound):
            await running.turns.kept.let_go(ANONYMOUS, "unknown")
        with pytest.raises(NotFound):
            await running.turns.kept.keep(ANONYMOUS, "unknown")
        with pytest.raises(NotFound):
            await running.turns.kept.keep(Caller("other"), "s")


@on_virtual_time
async def test_a_deleted_session_is_let_go():
    async with session_system() as running:
        await begun(running)
        await asyncio.sleep(1)
        await running.turns.delete("s")
        await asyncio.sleep(1)
        assert (kept(running), (await running.turns.kept.listed(ANONYMOUS)).tokens) == ({}, 0)


@on_virtual_time
async def test_a_session_that_lives_shorter_is_kept_shorter_on_its_replica_too():
    async with session_system() as running:
        await begun(running, ttl_s=600)
        await asyncio.sleep(1)
        await running.turns.update("s", ttl_s=20)
        (one,) = (await running.turns.kept.listed(ANONYMOUS)).kept
        assert (one.ttl_s, one.left_s) == (20, 20)
        await asyncio.sleep(21)
        with pytest.raises(NotFound):
            await running.sessions.get("s", tenant="")
        assert (kept(running), (await running.turns.kept.listed(ANONYMOUS)).kept) == ({}, [])


@on_virtual_time
async def test_a_session_that_lives_longer_is_kept_as_long_as_before():
    async with session_system() as running:
        await begun(running, ttl_s=60)
        await running.turns.update("s", ttl_s=600)
        (one,) = (await running.turns.kept.listed(ANONYMOUS)).kept
        assert (one.ttl_s, one.left_s) == (60, 60)


@pytest.mark.parametrize("way", ["create", "fork"])
@on_virtual_time
async def test_a_new_session_is_not_kept_because_one_of_its_name_was(way):
    async with session_system() as running:
        await begun(running)
        await asyncio.sleep(1)
        await running.sessions.delete("s", tenant="")  # without a word to the keeper
        if way == "create":
            await running.turns.create("s", ("token_ids", PROMPT))
        else:
            await running.turns.create("t", ("token_ids", PROMPT))
            await running.turns.fork("t", "s")
        assert (await running.turns.kept.listed(ANONYMOUS)).kept == []
        await running.take("s", "a", [60], tokens=20)
        await asyncio.sleep(3)
        assert (kept(running), (await running.turns.kept.listed(ANONYMOUS)).kept) == ({}, [])


@on_virtual_time
async def test_a_session_that_is_created_and_kept_right_after_its_deletion_is_kept():
    async with session_system() as running:
        await begun(running)
        await running.turns.delete("s")
        await begun(running)
        await asyncio.sleep(1)
        assert list(kept(running).values()) == [{NAME: 32}]


@on_virtual_time
async def test_what_outlives_its_session_can_be_let_go():
    async with session_system() as running:
        await begun(running)
        await asyncio.sleep(1)
        await running.sessions.delete("s", tenant="")
        await running.turns.kept.let_go(ANONYMOUS, "s")
        await asyncio.sleep(1)
        assert (kept(running), (await running.turns.kept.listed(ANONYMOUS)).kept) == ({}, [])
        with pytest.raises(NotFound):
            await running.turns.kept.let_go(ANONYMOUS, "s")


@on_virtual_time
async def test_where_nobody_can_keep_it_the_error_says_so():
    async with session_system(replicas=1) as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        running.cluster.pools["prefill"].kill("prefill-1")
        await asyncio.sleep(1)
        with pytest.raises(Unavailable, match="no replica that could keep it is ready"):
            await running.turns.kept.keep(ANONYMOUS, "s")
        running.fleet.keepers = ()
        with pytest.raises(InvalidInput, match="no pool of this deployment shares KV"):
            await running.turns.kept.keep(ANONYMOUS, "s")


@pytest.mark.parametrize(("how", "field"), [({"ttl_s": 3601}, "ttl_s"), ({"ttl_s": -1}, "ttl_s"),
                                            ({"ttl_s": float("nan")}, "ttl_s"), ({"priority": 101}, "priority")])  # fmt: skip
@on_virtual_time
async def test_wrong_times_and_priorities_are_refused(how, field):
    async with session_system() as running:
        with pytest.raises(InvalidInput) as refused:
            await begun(running, **how)
        assert refused.value.field == field


@on_virtual_time
async def test_without_a_time_it_is_kept_as_long_as_the_session_lives_and_never_longer():
    async with session_system() as running:
        assert (await begun(running)).ttl_s == 3600
        await running.turns.update("s", ttl_s=50)
        assert (await running.turns.kept.keep(ANONYMOUS, "s")).ttl_s == 50
        with pytest.raises(InvalidInput, match="use at most 50, the time for which this session lives unused"):
            await running.turns.kept.keep(ANONYMOUS, "s", ttl_s=51)


@on_virtual_time
async def test_when_its_replica_dies_the_next_turn_has_another_keep_it():
    async with session_system(replicas=2) as running:
        await begun(running)
        await asyncio.sleep(1)
        first = await keeper_of(running)
        running.cluster.pools["prefill"].kill(first)
        await asyncio.sleep(1)
        await running.take("s", "a", [60])
        await asyncio.sleep(3)
        context = await running.context("s")
        assert kept(running)[await keeper_of(running)] == {NAME: len(context) // BLOCK * BLOCK}
        assert await keeper_of(running) != first


@on_virtual_time
async def test_without_a_next_turn_the_upkeep_has_another_keep_it():
    async with session_system(replicas=2) as running:
        running.keeper.start()
        await begun(running)
        await asyncio.sleep(1)
        first = await keeper_of(running)
        running.cluster.pools["prefill"].kill(first)
        await asyncio.sleep(3 * PERIOD_S)
        assert kept(running)[await keeper_of(running)] == {NAME: 32}


@pytest.mark.parametrize("left", [0, 2 * BLOCK])
@on_virtual_time
async def test_what_a_replica_gave_up_is_kept_again_later(left):
    async with session_system(replicas=1) as running:
        running.keeper.start()
        await begun(running)
        await asyncio.sleep(1)
        (engine,) = (replica.engine for replica in running.cluster.pools["prefill"].replicas.values())
        engine.give_up(NAME, left)
        await asyncio.sleep(2 * PERIOD_S)
        assert list(kept(running).values()) == [{NAME: 32}]
        computed = value(running.metrics["keep_prefill_tokens_total"])
        engine.give_up(NAME, left)
        await asyncio.sleep(2 * PERIOD_S)
        assert kept(running).get("prefill-1", {}).get(NAME, 0) == left, "not so soon again"
        assert value(running.metrics["keep_prefill_tokens_total"]) == computed
        await asyncio.sleep(CLAIM_S + PERIOD_S)
        assert list(kept(running).values()) == [{NAME: 32}]


@on_virtual_time
async def test_the_upkeep_sees_to_one_session_at_a_time_the_important_ones_first():
    async with session_system(replicas=1) as running:
        running.keeper.start()
        names = []
        for number, priority in enumerate((10, 90, 50)):
            await begun(running, [number + 1, *PROMPT], f"s{number}", priority=priority)
            names.append(f"0::session:s{number}")
        await asyncio.sleep(2)
        (engine,) = (replica.engine for replica in running.cluster.pools["prefill"].replicas.values())
        for name in names:
            engine.give_up(name)
        order = []
        while len(order) < 3:
            await asyncio.sleep(1)
            order += [name for name in engine.kept.names if name not in order]
        assert order == [names[1], names[2], names[0]]


@on_virtual_time
async def test_a_session_that_is_gone_without_a_word_is_kept_no_longer():
    async with session_system(replicas=1) as running:
        await begun(running)
        await asyncio.sleep(1)
        await running.sessions.delete("s", tenant="")
        running.cluster.pools["prefill"].replicas["prefill-1"].engine.give_up(NAME)
        running.keeper.start()
        await asyncio.sleep(1)
        assert (await running.turns.kept.listed(ANONYMOUS)).kept == []


@on_virtual_time
async def test_turns_go_on_as_always_whatever_happens_to_what_is_kept():
    """Replicas fail while they keep, grow and let go."""
    async with session_system(replicas=2) as running:
        running.keeper.start()
        context = list(PROMPT)
        await begun(running, ttl_s=30)
        pool = running.cluster.pools["prefill"]
        for number in range(12):
            decoder = ("a", "s", "b", "base")[number % 4]
            said = await running.take("s", decoder, [60 + number], tokens=12)
            assert said == running.expected(decoder, [*context, 60 + number], 12)
            context += [60 + number, *said]
            if number % 3 == 0:
                pool.kill(next(iter(pool.replicas)))
            if number % 4 == 1:
                await running.turns.kept.let_go(ANONYMOUS, "s")
                await running.turns.kept.keep(ANONYMOUS, "s", ttl_s=30)
            await asyncio.sleep(number % 3)
        await asyncio.sleep(20)
        assert list(kept(running).values()) == [{NAME: len(context) // BLOCK * BLOCK}]
        await asyncio.sleep(40)
        assert kept(running) == {}


@on_virtual_time
async def test_a_second_turn_that_is_refused_prolongs_nothing():
    async with session_system() as running:
        await begun(running, ttl_s=60)
        await asyncio.sleep(1)
        first = asyncio.create_task(running.take("s", "a", [60], tokens=30))
        await asyncio.sleep(STEP_S * 4)
        with suppress(Conflict):
            await running.take("s", "a", [61])
        (one,) = (await running.turns.kept.listed(ANONYMOUS)).kept
        assert (one.blocks, one.left_s) == (4, pytest.approx(60 - 1 - STEP_S * 4, abs=1))
        await first


@on_virtual_time
async def test_in_a_deployment_without_prefill_pool_a_decode_replica_keeps_it():
    async with session_system(replicas=2, in_place=True) as running:
        await begun(running)
        await asyncio.sleep(1)
        pools = [pool for pool in ("agents", "streams") if kept(running, pool)]
        assert len(pools) == 1
        assert list(kept(running, pools[0]).values()) == [{NAME: 32}]
        assert "alone" not in {pool.name for pool in running.fleet.keepers}


@on_virtual_time
async def test_beside_a_prefill_pool_a_decode_replica_keeps_what_it_has_made():
    async with session_system(replicas=2, local_prefill="always") as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        await running.take("s", "a", [60], tokens=20)
        await asyncio.sleep(3)
        await running.turns.kept.keep(ANONYMOUS, "s")
        await asyncio.sleep(1)
        (names,) = kept(running, "agents").values()
        assert set(names) == {NAME}
        assert kept(running) == {}


# Beginnings of prompts --------------------------------------------------------------------------------------------------


@on_virtual_time
async def test_beginnings_of_a_prompt_are_kept_with_one_call_on_one_replica():
    async with session_system(replicas=3) as running:
        granted = await running.keeper.grant(ANONYMOUS, PROMPT, None, [(8, 3600.0), (37, 300.0), (5, 300.0)])
        assert [(kept.blocks, kept.ttl_s) for kept in granted] == [(1, 3600), (4, 300)], "less than a block is not kept"
        assert kept(running) == {}, "only when its KV is there"
        running.keeper.hold(granted, PROMPT, None)
        await asyncio.sleep(1)
        (names,) = kept(running).values()
        assert sorted(names.values()) == [8, 32]
        assert len(running.cluster.calls("warm")) == 1
        await asyncio.sleep(300)
        (names,) = kept(running).values()
        assert list(names.values()) == [8]


@pytest.mark.parametrize("waits_s", [0, STEP_S / 2, 1])
@pytest.mark.parametrize("number", [0, 1])
@on_virtual_time
async def test_one_beginning_is_let_go_and_the_other_stays(number, waits_s):
    """Also while a replica is being told to keep both."""
    async with session_system(replicas=3) as running:
        granted = await running.keeper.grant(ANONYMOUS, PROMPT, None, [(8, 3600.0), (37, 300.0)])
        running.keeper.hold(granted, PROMPT, None)
        await asyncio.sleep(waits_s)
        await running.turns.kept.let_go_kept(ANONYMOUS, granted[number].name)
        await asyncio.sleep(3)
        other = granted[1 - number]
        assert list(kept(running).values()) == [{other.engine_name: other.blocks * BLOCK}]
        assert [one.name for one in (await running.turns.kept.listed(ANONYMOUS)).kept] == [other.name]


@on_virtual_time
async def test_a_prompt_that_its_turn_has_computed_is_kept_there_at_the_cost_of_a_token():
    async with session_system(replicas=3) as running:
        prompt = [*PROMPT, *range(60, 90)]
        granted = await running.keeper.grant(ANONYMOUS, prompt, None, [(len(prompt), 300.0)])
        await running.turn("a", prompt)
        running.keeper.hold(granted, prompt, None)
        await asyncio.sleep(1)
        assert value(running.metrics["keep_prefill_tokens_total"]) == 1
        holder = await keeper_of(running, granted[0].engine_name)
        (prefilled,) = (name for name, one in running.cluster.pools["prefill"].replicas.items() if one.engine.cache.prompts)
        assert holder == prefilled


@on_virtual_time
async def test_beyond_the_budget_the_longer_beginning_is_left_out():
    async with session_system(max_kept_tokens=16) as running:
        granted = await running.keeper.grant(ANONYMOUS, PROMPT, None, [(16, 300.0), (37, 300.0)])
        assert [kept.blocks for kept in granted] == [2]
        assert running.metrics["keeps_refused_total"].labels("never_fits")._value.get() == 1


@on_virtual_time
async def test_prompts_are_not_made_again_by_the_upkeep():
    async with session_system(replicas=1) as running:
        granted = await running.keeper.grant(ANONYMOUS, PROMPT, None, [(37, 300.0)])
        running.keeper.hold(granted, PROMPT, None)
        running.keeper.start()
        await asyncio.sleep(1)
        (engine,) = (replica.engine for replica in running.cluster.pools["prefill"].replicas.values())
        engine.give_up(granted[0].engine_name)
        await asyncio.sleep(5 * PERIOD_S)
        assert kept(running) == {}
        granted = await running.keeper.grant(ANONYMOUS, PROMPT, None, [(37, 300.0)])
        running.keeper.hold(granted, PROMPT, None)
        await asyncio.sleep(1)
        assert list(kept(running).values()) == [{granted[0].engine_name: 32}]
