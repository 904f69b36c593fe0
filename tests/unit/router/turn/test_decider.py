"""Who makes the base's KV that a turn lacks: decode engines beside a prefill pool, over doubles."""

import asyncio
import random
from types import SimpleNamespace

import pytest
from double.engines import BLOCK, LEASE_S
from double.system import nothing_held, session_system, system
from virtual_time import on_virtual_time

from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.turn.decider import Choice, Decider, Where, Why
from prefillshare.router.turn.place import decode_place, prefill_place

PROMPT = list(range(20, 57))


async def choice(running, decoder="a", prompt=PROMPT, tokens=6) -> str:
    """Of one turn, which is exact."""
    turn = running.turn_of(decoder, prompt, tokens)
    said = [token async for chunk in turn.chunks() for token in chunk.token_ids]
    assert said == running.expected(decoder, prompt, tokens)
    return turn.usage.prefill_choice


def counted(running) -> dict[tuple[str, str], float]:
    samples = [sample for family in running.metrics["prefills_total"].collect() for sample in family.samples]
    return {(s.labels["where"], s.labels["why"]): s.value for s in samples if s.name.endswith("_total") and s.value}


@pytest.mark.parametrize("decoder", ["a", "s"])
@pytest.mark.parametrize(
    ("policy", "expected"), [("always", "here: policy"), ("never", "there: policy"), (None, "there: only")]
)
@on_virtual_time
async def test_a_policy_is_kept(policy, expected, decoder):
    async with system(local_prefill=policy) as running:
        context = list(PROMPT)
        for _ in range(3):
            assert await choice(running, decoder, context) == expected
            context += [70, 71, 72]
        assert counted(running) == {tuple(expected.split(": ")): 3}
        await nothing_held(running)


@pytest.mark.parametrize("policy", ["auto", "never"])
@on_virtual_time
async def test_a_prefill_pool_that_is_gone_stops_nobody(policy):
    async with system(local_prefill=policy, wedged_after_s=2) as running:
        await choice(running)
        for replica in tuple(running.cluster.pools["prefill"].replicas.values()):
            replica.hang()
        running.fleet.pools["prefill"].replicas.members.clear()
        running.fleet.pools["prefill"].replicas.note_change()
        assert await choice(running, prompt=PROMPT[::-1]) == "here: unavailable"
        # The other pool may have a copy by now.
        assert await choice(running, "s", prompt=PROMPT[::-1]) in ("here: unavailable", "here: sooner", "copy: sooner")


@pytest.mark.parametrize("policy", ["auto", "never"])
@on_virtual_time
async def test_a_turn_does_not_wait_for_a_prefill_pool_that_has_failed_it(policy):
    """Serve has not told yet that the replicas have died. A turn asks each of them once."""
    async with system(local_prefill=policy) as running:
        await choice(running)
        replicas = running.cluster.pools["prefill"].replicas.values()
        for replica in replicas:
            replica.die()
        made, began = len(running.cluster.calls("prefill")), asyncio.get_running_loop().time()
        expected = ("here: unavailable",) if policy == "never" else ("here: unavailable", "here: sooner")
        assert await choice(running, prompt=PROMPT[::-1]) in expected
        assert asyncio.get_running_loop().time() - began < 1
        asked = [call for call in running.cluster.calls("prefill")[made:] if call.pool == "prefill"]
        assert len(asked) <= len(replicas)


@on_virtual_time
async def test_what_is_cached_where_it_is_read_is_not_handed_over():
    async with system(local_prefill="auto", replicas=1) as running:
        await choice(running)
        await asyncio.sleep(0.1)
        assert await choice(running, "b", [*PROMPT, 80, 81]) == "here: cached"
        await nothing_held(running)


@on_virtual_time
async def test_both_ways_are_measured_and_then_the_sooner_is_taken():
    """In the doubles a token takes as long in either engine, and a handoff takes time besides."""
    async with system(local_prefill="auto", replicas=1) as running:
        prompts = [[n, *PROMPT, n] for n in range(100, 108)]
        choices = [await choice(running, prompt=prompt) for prompt in prompts]
        costs = running.orchestrator.services.decider.costs["agents"]
        assert costs.here_s.value is not None
        assert set(choices[-4:]) == {"here: sooner"}
        costs.here_s.add(500.0, 10)  # as if it had become slow
        assert await choice(running, prompt=[200, *PROMPT, 200]) == "there: sooner"
        await nothing_held(running)


class Pool:
    def __init__(self, missing, queued=0, active=0, name="p"):
        self.name, replica = name, SimpleNamespace(total_queued_tokens=queued, total_active=active, id=f"{name}-1")
        self.placed = SimpleNamespace(replica=replica, missing_tokens=missing, cached_tokens=2_000 - missing)
        self.replicas = SimpleNamespace(any_well=lambda without: True)

    def most_cached(self, tokens, keys, without):
        return self.placed


async def decided(
    monkeypatch, here: Pool, there: Pool | None, copy: Pool | None = None, objective=None, last=None, **rates
) -> tuple[Where, Why]:
    """`rates`: here_s, read_s, handoff_s, compute_s."""

    async def place(pool):
        return pool.placed

    monkeypatch.setattr("prefillshare.router.turn.decider.decode_place", lambda turn: place(here))
    monkeypatch.setattr("prefillshare.router.turn.decider.prefill_place", lambda turn: place(there))
    decider = Decider(lambda: 0.0)
    decider.costs["p"].last = last
    for name in ("here_s", "read_s", "handoff_s"):
        getattr(decider.costs["p"], name).add(rates.get(name, 0.0), 1)
    decider.costs["q"].here_s.add(rates.get("here_s", 0.0), 1)
    turn = SimpleNamespace(
        route=SimpleNamespace(decode=here, prefill=there, holders=(copy,) if copy else ()),
        decoder=SimpleNamespace(pool="p", local_prefill="auto", inter_token_objective_s=objective, step_tokens=None),
        services=SimpleNamespace(block_size=16, compute_s=SimpleNamespace(value=rates.get("compute_s", 0.0))),
        prefix=SimpleNamespace(token_ids=[0] * 2_000, keys=None),
        avoid=set(),
    )
    choice = await decider.choose(turn)
    return choice.where, choice.why


RATES = {"here_s": 0.001, "compute_s": 0.001, "read_s": 0.0001, "handoff_s": 0.05}


@pytest.mark.parametrize(
    ("here", "there", "where"),
    [
        (Pool(40), Pool(40), "here"),  # a handoff costs more than it would save
        (Pool(40, active=6), Pool(40), "there"),  # six responses would wait for it
        (Pool(1000), Pool(0), "there"),  # read instead of computed
        (Pool(1000), Pool(1000), "here"),  # nothing to be read sooner
        (Pool(1000), Pool(1000, queued=9000), "here"),  # there is a queue
        (Pool(1000, queued=9000), Pool(1000), "there"),  # here is
    ],
)
async def test_the_sooner_way_is_taken(monkeypatch, here, there, where):
    assert await decided(monkeypatch, here, there, **RATES) == (where, Why.SOONER)


@pytest.mark.parametrize(
    ("copy", "where"),
    [
        (Pool(0, name="q"), "copy"),  # read instead of computed
        (Pool(0, queued=3000, name="q"), "there"),  # it has a queue
        (Pool(600, active=9, name="q"), "there"),  # nine responses would wait for what it lacks
        (Pool(990, name="q"), "there"),  # it has less than a block more
    ],
)
async def test_the_nearest_copy_is_read_where_that_is_sooner(monkeypatch, copy, where):
    assert await decided(monkeypatch, Pool(1000, active=3), Pool(500), copy, **RATES) == (where, Why.SOONER)


async def test_without_a_prefill_pool_there_is_the_copy(monkeypatch):
    assert await decided(monkeypatch, Pool(1000), None, Pool(0, name="q"), **RATES) == (Where.COPY, Why.SOONER)
    assert await decided(monkeypatch, Pool(1000), None, None, **RATES) == (Where.HERE, Why.ONLY)


@pytest.mark.parametrize(("active", "expected"), [(0, ("here", Why.SOONER)), (1, ("there", Why.OBJECTIVE))])
async def test_an_objective_between_tokens_is_a_veto_where_responses_run(monkeypatch, active, expected):
    assert await decided(monkeypatch, Pool(40, active=active), Pool(40), objective=0.03, **RATES) == expected


@pytest.mark.parametrize(("last", "missing"), [(Where.HERE, 105), (Where.THERE, 95)])
async def test_what_the_two_ways_take_nearly_alike_does_not_go_to_and_fro(monkeypatch, last, missing):
    """A pool goes on as it did for its last turn."""
    where, _ = await decided(monkeypatch, Pool(missing), Pool(100), last=last, here_s=0.001, compute_s=0.001)
    assert where is last


class AtRandom(Decider):
    """Each way, whatever it costs."""

    def __init__(self):
        super().__init__()
        self.rng = random.Random(5)

    async def choose(self, turn):
        if not turn.decoder.local_prefill:
            return await super().choose(turn)
        decode, route = await decode_place(turn), turn.route
        ways = [Choice(Where.HERE, Why.POLICY, route.decode, decode, decode)]
        if route.prefill:
            ways.append(Choice(Where.THERE, Why.POLICY, route.prefill, await prefill_place(turn)))
        if copy := self._copy(turn, decode):
            ways.append(copy)
        return self.rng.choice(ways)


@pytest.mark.parametrize("in_place", [False, True])
@on_virtual_time
async def test_a_session_whose_turns_are_prefilled_at_random_is_exact(in_place):
    async with session_system(local_prefill="auto", in_place=in_place) as running:
        running.orchestrator.services.decider = AtRandom()
        await running.turns.create("s", ("token_ids", PROMPT))
        context = list(PROMPT)
        for number in range(40):
            decoder, given = ("a", "b", "base", "s", "t")[number % 5], [60 + number, 61]
            said = await running.take("s", decoder, given, tokens=11)
            assert said == running.expected(decoder, [*context, *given], 11)
            context += [*given, *said]
            await asyncio.sleep(number % 3)
        assert {where for where, _ in counted(running)} == {"here", "copy"} | (set() if in_place else {"there"})
        await nothing_held(running, leases_s=LEASE_S + 1)


@pytest.mark.parametrize(("policy", "maker", "other"), [("always", "agents", "prefill"), ("never", "prefill", "agents")])
@on_virtual_time
async def test_a_response_is_prefilled_ahead_where_its_prompt_was_made(policy, maker, other):
    async with session_system(replicas=1, local_prefill=policy) as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        await running.take("s", "a", [5], tokens=40)
        await asyncio.sleep(5)
        context = await running.context("s")
        keys = BlockKeys(context, BLOCK)
        assert max(running.fleet.pools[maker].overlaps(keys).values()) == len(context) // BLOCK * BLOCK
        assert max(running.fleet.pools[other].overlaps(keys).values(), default=0) <= len(PROMPT)
