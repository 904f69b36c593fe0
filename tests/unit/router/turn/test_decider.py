"""Who makes the base's KV that a turn lacks: decode engines beside a prefill pool, over doubles."""

import asyncio
import random
from types import SimpleNamespace

import pytest
from double.engines import LEASE_S
from double.system import nothing_held, session_system, system
from virtual_time import on_virtual_time

from prefillshare.router.turn.decider import Choice, Decider, Why
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
        assert await choice(running, "s", prompt=PROMPT[::-1]) == "here: unavailable"


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
    def __init__(self, missing, queued=0, active=0):
        replica = SimpleNamespace(total_queued_tokens=queued, total_active=active, id="r")
        self.placed = SimpleNamespace(replica=replica, missing_tokens=missing, cached_tokens=0)
        self.replicas = SimpleNamespace(usable=lambda *_: [replica])


async def decided(monkeypatch, here: Pool, there: Pool, objective=None, was_here=None, **rates) -> tuple[bool, Why]:
    """`rates`: here_s, read_s, handoff_s, compute_s."""

    async def place(pool):
        return pool.placed

    monkeypatch.setattr("prefillshare.router.turn.decider.decode_place", lambda turn: place(here))
    monkeypatch.setattr("prefillshare.router.turn.decider.prefill_place", lambda turn: place(there))
    decider = Decider(lambda: 0.0)
    decider.costs["p"].was_here = was_here
    for name in ("here_s", "read_s", "handoff_s"):
        getattr(decider.costs["p"], name).add(rates.get(name, 0.0), 1)
    decoder = SimpleNamespace(pool="p", local_prefill="auto", inter_token_objective_s=objective, step_tokens=None)
    services = SimpleNamespace(block_size=16, compute_s=SimpleNamespace(value=rates.get("compute_s", 0.0)))
    turn = SimpleNamespace(route=SimpleNamespace(prefill=there), decoder=decoder, services=services, avoid=set())
    choice = await decider.choose(turn)
    assert choice.placed is (here if choice.is_here else there).placed
    return choice.is_here, choice.why


RATES = {"here_s": 0.001, "compute_s": 0.001, "read_s": 0.0001, "handoff_s": 0.05}


@pytest.mark.parametrize(
    ("here", "there", "is_here"),
    [
        (Pool(40), Pool(40), True),  # a handoff costs more than it would save
        (Pool(40, active=6), Pool(40), False),  # six responses would wait for it
        (Pool(1000), Pool(0), False),  # read instead of computed
        (Pool(1000), Pool(1000), True),  # nothing to be read sooner
        (Pool(1000), Pool(1000, queued=9000), True),  # there is a queue
        (Pool(1000, queued=9000), Pool(1000), False),  # here is
    ],
)
async def test_the_sooner_way_is_taken(monkeypatch, here, there, is_here):
    assert await decided(monkeypatch, here, there, **RATES) == (is_here, Why.SOONER)


@pytest.mark.parametrize(("active", "expected"), [(0, (True, Why.SOONER)), (1, (False, Why.OBJECTIVE))])
async def test_an_objective_between_tokens_is_a_veto_where_responses_run(monkeypatch, active, expected):
    assert await decided(monkeypatch, Pool(40, active=active), Pool(40), objective=0.03, **RATES) == expected


async def test_what_the_two_ways_take_nearly_alike_does_not_go_to_and_fro(monkeypatch):
    """A pool goes on as it did for its last turn."""
    rates = {"here_s": 0.001, "compute_s": 0.001}
    for was_here, missing in ((True, 105), (False, 95)):
        is_here, _ = await decided(monkeypatch, Pool(missing), Pool(100), was_here=was_here, **rates)
        assert is_here is was_here


class AtRandom(Decider):
    """Each way, whatever it costs."""

    def __init__(self):
        super().__init__()
        self.rng = random.Random(5)

    async def choose(self, turn):
        is_here = bool(turn.decoder.local_prefill) and self.rng.random() < 0.5
        return Choice(is_here, Why.POLICY, await (decode_place if is_here else prefill_place)(turn))


@on_virtual_time
async def test_a_session_whose_turns_are_prefilled_at_random_is_exact():
    async with session_system(local_prefill="auto") as running:
        running.orchestrator.services.decider = AtRandom()
        await running.turns.create("s", ("token_ids", PROMPT))
        context = list(PROMPT)
        for number in range(24):
            decoder, given = ("a", "b", "base", "s", "t")[number % 5], [60 + number, 61]
            said = await running.take("s", decoder, given, tokens=11)
            assert said == running.expected(decoder, [*context, *given], 11)
            context += [*given, *said]
            await asyncio.sleep(number % 3)
        assert {where for where, _ in counted(running)} == {"here", "there"}
        await nothing_held(running, leases_s=LEASE_S + 1)
