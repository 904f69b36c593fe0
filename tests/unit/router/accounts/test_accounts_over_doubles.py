"""What turns have used is in the ledger, exactly, however they end. Engines are doubles (tests/double), on virtual time."""

import asyncio
from contextlib import aclosing

import pytest
from double.cluster import CALL_S
from double.engines import BLOCK, LOAD_S, STEP_S
from double.system import KV_BYTES, nothing_held, session_system, system
from virtual_time import clock, on_virtual_time

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.errors import DeadlineExceeded, Overloaded, Unavailable
from prefillshare.router.accounts.figures import Figures, total
from prefillshare.router.admission.grant import TenantShare
from prefillshare.router.turn.turn import Turn

ACME = Caller("acme")
#: 37 tokens: four blocks of 8 and a part of a fifth. All but the last are shared.
PROMPT = list(range(20, 57))
SHARED, CACHEABLE = 36, 32


async def ledger(running) -> dict[tuple[str, str], Figures]:
    rows = await running.orchestrator.services.accounts.ledger.rows()
    return {(row.place.tenant, row.place.decoder): row.figures for row in rows}


async def take(turn: Turn) -> list[int]:
    return [token async for chunk in turn.chunks() for token in chunk.token_ids]


@on_virtual_time
async def test_a_turn_is_in_the_ledger_with_what_its_client_is_told():
    async with system() as running:
        first, second = (running.turn_of("a", PROMPT, 6, ACME) for _ in range(2))
        await take(first)
        await take(second)
        found = (await ledger(running))["acme", "a"]
        told = [turn.usage for turn in (first, second)]
        assert found.turns == 2
        assert found.prompt_tokens == sum(usage.prompt_tokens for usage in told) == 2 * len(PROMPT)
        assert found.cached_tokens == sum(usage.cached_tokens for usage in told) == CACHEABLE
        assert found.computed_tokens == sum(usage.computed_tokens for usage in told) == 2 * SHARED - CACHEABLE
        assert found.generated_tokens == sum(usage.completion_tokens for usage in told) == 12


@on_virtual_time
async def test_tokens_are_in_the_ledger_before_the_client_sees_them():
    async with system() as running:
        seen = 0
        async for chunk in running.turn_of("a", PROMPT, 6, ACME).chunks():
            seen += len(chunk.token_ids)
            found = (await ledger(running))["acme", "a"]
            assert (found.generated_tokens, found.prompt_tokens, found.computed_tokens) == (seen, len(PROMPT), SHARED)


@on_virtual_time
async def test_kv_byte_seconds_are_the_blocks_of_the_sequence_times_the_time_on_the_replica():
    async with system() as running:
        tokens_at = [clock() async for _ in running.turn_of("a", PROMPT, 6, ACME).chunks()]
        called = tokens_at[0] - STEP_S - LOAD_S - CALL_S
        # The prompt's 37 tokens take five blocks of eight, up to the third token; the fourth is the sequence's 41st.
        block_seconds = 5 * (tokens_at[3] - called) + 6 * (tokens_at[5] - tokens_at[3])
        found = (await ledger(running))["acme", "a"]
        assert found.kv_byte_seconds == pytest.approx(block_seconds * BLOCK * KV_BYTES, abs=1)
        assert block_seconds == pytest.approx(5 * (CALL_S + LOAD_S + 4 * STEP_S) + 6 * 2 * STEP_S)


@on_virtual_time
async def test_turns_with_the_same_prompt_each_count_all_its_blocks():
    async with system() as running:
        turns = [running.turn_of(name, PROMPT, 6, ACME) for name in ("a", "b")]
        await asyncio.gather(*map(take, turns))
        found = await ledger(running)
        assert found["acme", "a"].kv_byte_seconds == pytest.approx(found["acme", "b"].kv_byte_seconds, rel=0.02)


@on_virtual_time
async def test_a_turn_whose_replica_dies_pays_for_each_token_once_and_for_the_prefill_as_often_as_it_was_made():
    async with system() as running:
        pool = running.pool_of("a")

        def die():
            for replica in pool.replicas.values():
                replica.planned.clear()
            pool.kill(pool.busy().name)

        for replica in pool.replicas.values():
            replica.planned["token 3"] = die
        turn = running.turn_of("a", PROMPT, 6, ACME)
        assert await take(turn) == running.expected("a", PROMPT)
        found = (await ledger(running))["acme", "a"]
        assert turn.usage.resumes == 1
        assert (found.turns, found.prompt_tokens, found.generated_tokens) == (1, len(PROMPT), 6)
        assert found.computed_tokens == turn.usage.computed_tokens > SHARED
        await nothing_held(running, leases_s=30)


@on_virtual_time
async def test_cancelled_and_failed_turns_are_in_the_ledger_with_what_they_used():
    async with system() as running:
        async with aclosing(running.turn_of("a", PROMPT, 6, ACME).chunks()) as chunks:
            async for _ in chunks:
                break
        late = running.turn_of("b", PROMPT, 30, ACME, deadline_s=1.0)
        with pytest.raises(DeadlineExceeded):
            await take(late)
        broken = running.turn_of("c", PROMPT, 6, ACME)
        for replica in running.prefill_of("c").replicas.values():
            replica.planned["prefill"] = Unavailable("no")
        running.orchestrator.services.config = running.orchestrator.services.config.model_copy(update={"max_retries": 0})
        with pytest.raises(Unavailable):
            await take(broken)
        found = await ledger(running)
        assert found["acme", "a"].generated_tokens == 1
        assert found["acme", "b"].generated_tokens == late.usage.completion_tokens > 5
        assert found["acme", "a"].kv_byte_seconds > 0
        assert found["acme", "c"] == Figures(turns=1, prompt_tokens=len(PROMPT))


@on_virtual_time
async def test_turns_that_are_refused_and_probes_are_not_in_the_ledger():
    async with system(max_queued=1) as running:
        one = asyncio.create_task(take(running.turn_of("a", PROMPT, 6, ACME)))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await take(running.turn_of("a", PROMPT, 6, Caller("other")))
        await one
        await take(running.turn_of("a", PROMPT, 1, is_probe=True))
        assert list(await ledger(running)) == [("acme", "a")]


@on_virtual_time
async def test_session_turns_are_in_the_ledger_before_the_session_has_them():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        commit, at_commit = running.sessions.commit, []

        async def committed(*args, **kwargs):
            at_commit.append(total((await ledger(running)).values()).generated_tokens)
            await commit(*args, **kwargs)

        running.sessions.commit = committed
        for decoder in ("a", "s", "b"):
            await running.take("s", decoder, [60])
        assert at_commit == [6, 12, 18]


@on_virtual_time
async def test_metrics_count_the_same_by_tenant_and_no_more_than_a_hundred_tenants_by_name():
    async with system() as running:
        registry = running.metrics["tenant_turns_total"]
        for number in range(103):
            await take(running.turn_of("a", PROMPT, 1, Caller(f"t{number}")))
        await take(running.turn_of("a", PROMPT, 2, Caller("t7")))
        await take(running.turn_of("a", PROMPT, 2, Caller("t102")))
        turns = {labels.labels["tenant"]: labels.value for labels in registry.collect()[0].samples if "total" in labels.name}
        assert len(turns) == 101
        assert (turns["t7"], turns["(others)"]) == (2, 4)
        tokens = running.metrics["tenant_tokens_total"]
        kinds = {kind: tokens.labels("t7", "a", kind)._value.get() for kind in ("prompt", "cached", "computed", "generated")}
        found = (await ledger(running))["t7", "a"]
        assert kinds == {
            "prompt": found.prompt_tokens, "cached": found.cached_tokens, "computed": found.computed_tokens, "generated": 3,
        }  # fmt: skip


LIMITED = {"acme": TenantShare("acme", tokens_per_minute=100, turns_per_minute=10)}


@on_virtual_time
async def test_a_tenants_tokens_are_those_that_were_computed_and_generated():
    async with system(tenants=LIMITED) as running:
        first = running.turn_of("a", PROMPT, 6, ACME)
        await take(first)
        # 37 - 0 + 6 = 43 of 100; the second finds 32 cached: 5 + 6.
        await take(running.turn_of("b", PROMPT, 6, ACME))
        # A decoder with an own end computes it, and pays for it, although the rest is cached: 24 cached, 13 + 2.
        own = running.turn_of("o", PROMPT, 2, ACME)
        await take(own)
        assert (own.usage.own_tokens, own.usage.cached_tokens, own.usage.computed_tokens) == (11, 24, 2)
        bucket = running.orchestrator.services.accounts.limits._buckets["acme"]["tokens"]
        left = bucket.allowance("tokens", clock())
        assert left.remaining == pytest.approx(100 - 43 - 11 - 15 + 1.9 * 100 / 60, abs=2)
        with pytest.raises(Overloaded, match=r"^tenants\.acme\.tokens_per_minute: of 100 tokens a minute, the 66 that"):
            await take(running.turn_of("a", list(range(100, 160)), 6, ACME))
        await nothing_held(running)


@on_virtual_time
async def test_a_turn_that_is_refused_by_the_queue_gives_back_what_it_took_of_the_limits():
    async with system(tenants=LIMITED, max_queued=1) as running:
        one = asyncio.create_task(take(running.turn_of("a", PROMPT, 6, Caller("other"))))
        await asyncio.sleep(0.01)
        for _ in range(30):
            with pytest.raises(Overloaded, match="max_queued"):
                await take(running.turn_of("a", PROMPT, 6, ACME))
        await one
        await take(running.turn_of("a", PROMPT, 6, ACME))


@on_virtual_time
async def test_a_long_answer_holds_up_its_tenants_next_turn_while_it_runs():
    async with system(tenants=LIMITED, expected_output_tokens=8) as running:
        long = asyncio.create_task(take(running.turn_of("a", PROMPT, 200, ACME)))
        await asyncio.sleep(10)  # 100 tokens at ten a second, of which 16 have been refilled
        with pytest.raises(Overloaded, match="tokens_per_minute"):
            await take(running.turn_of("b", PROMPT, 6, ACME))
        await long
