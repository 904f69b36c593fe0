"""The canary: what it compares, whom it asks, and that clients see nothing of it."""

import asyncio
import math
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from polling import until
from stub_turn import StubTurn
from told_logprobs import logprobs

from prefillshare.kvshare.caller import ANONYMOUS
from prefillshare.kvshare.decoders import ALL, Decoder
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare_vllm.surface.turn_call import TurnCall
from prefillshare.router.turn.canary import TOP, Canary, as_asked, divergence


def logs(**probabilities):
    return {int(token[1:]): math.log(p) for token, p in probabilities.items()}


def test_equal_distributions_do_not_diverge():
    assert divergence(logs(t1=0.5, t2=0.3), logs(t1=0.5, t2=0.3)) == pytest.approx(0)


def test_it_is_the_divergence_where_all_tokens_are_known():
    p, q = logs(t1=0.5, t2=0.3, t3=0.2), logs(t1=0.2, t2=0.3, t3=0.5)
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2.5) + 0.2 * math.log(0.4), abs=1e-6)


def test_what_is_in_one_list_only_counts_among_the_rest():
    """Over all tokens it would be more."""
    p, q = logs(t1=0.6, t2=0.3), logs(t1=0.3, t3=0.6)
    assert divergence(p, q) == pytest.approx(0.6 * math.log(2) + 0.4 * math.log(0.4 / 0.7))


def test_the_client_gets_the_rows_it_asked_for():
    told = logprobs((9, -2.0), (1, -0.1), (2, -1.0), (9, -2.0), (4, -3.0), rank=3)
    assert as_asked(told, None) is None
    assert as_asked(told, 0).row(0) == {9: -2.0}
    assert as_asked(told, 2).row(0) == {9: -2.0, 1: pytest.approx(-0.1), 2: -1.0}
    assert as_asked(told, ALL) is told


class Sampling:
    def __init__(self, logprobs=None):
        self.logprobs = logprobs

    def clone(self):
        return Sampling(self.logprobs)


class World:
    """An orchestrator whose turns have three tokens, and a decode replica that is asked again."""

    def __init__(self, sharing="droidspeak"):
        self.decoders = {"d": Decoder("d", "pool", sharing, "adapter", "lora")}
        self.asked, self.samplings, self.error, self.gate = [], [], None, asyncio.Event()
        self.gate.set()
        remote = SimpleNamespace(remote=lambda *args, **kw: asyncio.ensure_future(self.own_next(*args, **kw)))
        replica = SimpleNamespace(own_next=remote)
        decode = SimpleNamespace(choose=self.choose, calling=self.calling, replicas=SimpleNamespace(on=lambda _: replica))
        self.routes = {"pool": SimpleNamespace(decode=decode)}

    def turn(self, call):
        return StubTurn(self._chunks(call.sampling))

    async def _chunks(self, sampling):
        self.samplings.append(sampling.logprobs)
        for token in (5, 6, 7):
            told = logprobs((token, math.log(0.9)), (token, math.log(0.9)), (8, math.log(0.05)))
            asked = sampling.logprobs is not None
            yield TokenChunk([token], logprobs=told if asked else None, finish_reason="length" if token == 7 else None)

    async def choose(self, tokens, keys):
        return SimpleNamespace(replica=SimpleNamespace(id="one"))

    @asynccontextmanager
    async def calling(self, placement):
        yield

    async def own_next(self, token_ids, adapter, top, priority):
        await self.gate.wait()
        if self.error:
            raise self.error
        self.asked.append((token_ids, adapter, top))
        return logprobs(*((token, math.log(0.3)) for token in (5, 6, 7)), (8, math.log(0.05)))


async def turn(canary, asked=None):
    return [chunk async for chunk in canary.turn(TurnCall("d", [1, 2], Sampling(asked), "r", ANONYMOUS)).chunks()]


def test_what_a_decoder_is_measured_against_is_exported(metrics):
    canary, floor = Canary(World(), metrics, 1.0), metrics["quality_floor"]
    floors = {"d": 0.3, "e": None}
    canary.expect({name: Decoder(name, "p", "droidspeak", None, "full", quality_floor=at) for name, at in floors.items()})
    assert [(sample.labels, sample.value) for sample in floor.collect()[0].samples] == [({"decoder": "d"}, 0.3)]
    canary.expect({})
    assert floor.collect()[0].samples == []


async def counted(metrics, outcome, number):
    async def is_so():
        return metrics["canary_turns_total"].labels("d", outcome)._value.get() == number

    async with asyncio.timeout(2):
        await until(is_so)


async def test_one_place_of_a_sampled_turn_is_predicted_again(metrics):
    world = World()
    canary = Canary(world, metrics, 1.0)
    chunks = await turn(canary)
    assert [chunk.token_ids for chunk in chunks] == [[5], [6], [7]]
    assert all(chunk.logprobs is None for chunk in chunks)
    assert world.samplings == [TOP]
    await counted(metrics, "done", 1)
    ((context, adapter, top),) = world.asked
    assert (context, adapter, top) in [([1, 2, 5, 6, 7][: 2 + place], "adapter", TOP) for place in range(3)]
    own, rest = 0.3, 0.65  # of the sampled token, and of all that is in neither list or in one
    wanted = own * math.log(own / 0.9) + 0.05 * math.log(0.05 / 0.05) + rest * math.log(rest / 0.05)
    assert metrics["canary_divergence"].labels("d")._sum.get() == pytest.approx(wanted)
    await canary.stop()


@pytest.mark.parametrize(("sharing", "share"), [("droidspeak", 0.0), ("prefillshare", 1.0)])
async def test_other_turns_are_left_alone(metrics, sharing, share):
    world = World(sharing)
    chunks = await turn(Canary(world, metrics, share), 0)
    assert world.samplings == [0]
    assert chunks[0].logprobs
    assert not world.asked


async def test_one_at_a_time_and_failures_harm_nobody(metrics):
    world = World()
    canary = Canary(world, metrics, 1.0)
    world.gate.clear()
    await turn(canary)
    await turn(canary)
    await counted(metrics, "dropped", 1)
    world.error = Unavailable("gone")
    world.gate.set()
    await counted(metrics, "failed", 1)
    await canary.stop()


@pytest.mark.parametrize(("limit", "top"), [(5, 5), (20, TOP), (50, TOP), (-1, TOP)])
async def test_no_more_is_asked_for_than_the_decoders_pool_gives(metrics, limit, top):
    world = World()
    world.decoders["d"] = replace(world.decoders["d"], max_logprobs=limit)
    await turn(Canary(world, metrics, 1.0))
    assert world.samplings == [top]
    await counted(metrics, "done", 1)
    assert [asked for _, _, asked in world.asked] == [top]
