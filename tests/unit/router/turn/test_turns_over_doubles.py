"""A turn, whatever fails meanwhile: exactly the tokens of a quiet run, and nothing is held afterwards.

Engines are doubles (tests/double): their arithmetic shows whose KV was read.
"""

import asyncio
from contextlib import suppress

import pytest
from double.cluster import KNOWN_S, START_S
from double.engines import LEASE_S
from double.system import nothing_held, system
from ray.exceptions import RayActorError
from virtual_time import clock, on_virtual_time

from prefillshare.kvshare.errors import DeadlineExceeded, Internal, PrefixLost, ResumeReason, Unavailable

PROMPT = list(range(20, 57))
DECODERS = ("a", "b", "o", "base", "s", "t", "c", "d")


@pytest.mark.parametrize("decoder", DECODERS)
@on_virtual_time
async def test_a_quiet_turn(decoder):
    async with system() as running:
        assert await running.turn(decoder, PROMPT) == running.expected(decoder, PROMPT)
        await nothing_held(running)


@on_virtual_time
async def test_a_context_that_goes_from_decoder_to_decoder():
    async with system() as running:
        context = list(PROMPT)
        for decoder in (*DECODERS, *DECODERS):
            said = await running.turn(decoder, context)
            assert said == running.expected(decoder, context)
            context += [*said, 50, 51]
        await nothing_held(running)


@on_virtual_time
async def test_many_turns_at_once():
    async with system() as running:
        prompts = [(DECODERS[number % len(DECODERS)], [*PROMPT[: 3 + number], 99 - number]) for number in range(40)]
        said = await asyncio.gather(*(running.turn(decoder, prompt) for decoder, prompt in prompts))
        assert said == [running.expected(decoder, prompt) for decoder, prompt in prompts]
        await nothing_held(running)


MOMENTS = {"prefill": ("prefill", "prefilled"), "decode": ("decode", "loaded", "token 1", "token 3", "token 6")}
FAILURES = {
    "dies": lambda pool, replica: (lambda: pool.kill(replica.name)),
    "cannot": lambda pool, replica: Unavailable("no"),
    "drops the call": lambda pool, replica: asyncio.CancelledError(),
    "hangs": lambda pool, replica: replica.hang,
}
LOSSES = {
    "gives it back": lambda pool, replica: PrefixLost("preempted", reason=ResumeReason.PREEMPTED),
    "cannot load": lambda pool, replica: PrefixLost("no KV", reason=ResumeReason.KV_LOAD_FAILED),
}


INSIDE = "the actor on 10.0.0.9, pid 4711, died; see /home/operator/ray/logs"


@pytest.mark.parametrize("cause", [RayActorError(error_msg=INSIDE), RuntimeError(INSIDE)])
@on_virtual_time
async def test_what_ray_or_python_say_of_a_failure_is_for_the_log_only(cause, caplog):
    async with system(max_retries=0) as running:
        for replica in running.pool_of("a").replicas.values():
            replica.planned["decode"] = cause
        with pytest.raises((Unavailable, Internal)) as refused:
            await running.turn("a", PROMPT)
        assert not {"10.0.0.9", "4711", "/home"} & set(str(refused.value).replace(",", " ").split())
        assert INSIDE in caplog.text


@pytest.mark.parametrize("decoder", ["a", "o", "s", "c"])
@pytest.mark.parametrize(
    ("side", "moment", "failure"),
    [(side, moment, how) for side, moments in MOMENTS.items() for moment in moments for how in FAILURES]
    + [("decode", moment, how) for moment in MOMENTS["decode"] for how in LOSSES],
)
@on_virtual_time
async def test_a_replica_fails_the_turn(decoder, side, moment, failure):
    """At each moment and in each way: the client sees one stream."""
    async with system() as running:
        pool = running.prefill_of(decoder) if side == "prefill" else running.pool_of(decoder)
        for replica in pool.replicas.values():
            replica.planned[moment] = (FAILURES | LOSSES)[failure](pool, replica)
            break
        # Whichever replica is chosen: a turn each until the one that fails has had its turn.
        for _ in range(4):
            assert await running.turn(decoder, PROMPT) == running.expected(decoder, PROMPT)
            if moment not in replica.planned:
                break
        assert moment not in replica.planned
        replica.come_back()
        await nothing_held(running, leases_s=LEASE_S + 1)  # what was lent to a replica that is gone runs out


async def left_after(running, decoder: str, prompt: list[int], seconds: float) -> None:
    client = asyncio.create_task(running.turn(decoder, prompt, tokens=80))
    await asyncio.sleep(seconds)
    client.cancel()
    with suppress(asyncio.CancelledError):
        await client


@pytest.mark.parametrize("decoder", ["a", "o", "s", "c"])
@on_virtual_time
async def test_a_client_leaves_at_any_moment(decoder):
    """Wherever its calls are by then, nothing is held a moment later, leases included."""
    async with system(replicas=1) as running:
        moments = [*(number * 0.0009 for number in range(70)), 0.08, 0.1, 0.2, 0.3, 1.0]
        for number, moment in enumerate(moments):
            await left_after(running, decoder, [*PROMPT, *divmod(number, 10)], moment)
            await nothing_held(running, within_s=0.5)


@on_virtual_time
async def test_a_client_leaves_while_its_turn_waits_for_a_decode_replica():
    async with system(replicas=1) as running:
        pool = running.cluster.pools["agents"]
        (replica,) = pool.replicas.values()
        (prefill,) = running.cluster.pools["prefill"].replicas.values()
        prefill.planned["prefilled"] = lambda: pool.kill(replica.name)
        await left_after(running, "a", PROMPT, 2.0)
        assert running.cluster.leases.held  # nobody is there to say that it will not be read
        await nothing_held(running, leases_s=LEASE_S + 1)


@pytest.mark.parametrize("decoder", ["a", "o", "s", "c"])
@on_virtual_time
async def test_a_deadline_passes_at_any_moment(decoder):
    async with system(replicas=1) as running:
        for number in range(1, 60):
            with pytest.raises(DeadlineExceeded):
                await running.turn(decoder, PROMPT, tokens=8, deadline_s=number * 0.013)
            await nothing_held(running)
        assert await running.turn(decoder, PROMPT, deadline_s=2.0) == running.expected(decoder, PROMPT)


@pytest.mark.parametrize("decoder", ["a", "o", "s", "c"])
@on_virtual_time
async def test_a_turn_that_loses_its_prefix_at_every_token_ends(decoder):
    async with system(max_resumes=6) as running:
        for replica in running.pool_of(decoder).replicas.values():
            for token in range(2, 7):
                replica.planned[f"token {token}"] = PrefixLost("preempted", reason=ResumeReason.PREEMPTED)
        assert await running.turn(decoder, PROMPT) == running.expected(decoder, PROMPT)
        await nothing_held(running, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_a_turn_that_is_resumed_too_often_fails_and_says_so():
    async with system(max_resumes=2) as running:
        for replica in running.pool_of("a").replicas.values():
            for token in range(2, 7):
                replica.planned[f"token {token}"] = PrefixLost("preempted", reason=ResumeReason.PREEMPTED)
        with pytest.raises(Unavailable, match="was resumed 2 times"):
            await running.turn("a", PROMPT)
        await nothing_held(running, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_a_turn_that_replicas_fail_too_often_fails_and_says_so():
    async with system(max_retries=1) as running:
        for replica in running.pool_of("a").replicas.values():
            replica.planned["decode"] = Unavailable("no")
        with pytest.raises(Unavailable, match="failed on 2 replicas"):
            await running.turn("a", PROMPT)
        await nothing_held(running, leases_s=LEASE_S + 1)


@pytest.mark.parametrize(("side", "error"), [("prefill", Unavailable), ("agents", DeadlineExceeded)])
@on_virtual_time
async def test_where_a_whole_pool_hangs_turns_fail_and_go_on_when_it_is_back(side, error):
    """A turn that has been admitted waits for room in its decode pool as long as its client does."""
    async with system(replica_wait_s=3) as running:
        pool = running.cluster.pools[side]
        for replica in pool.replicas.values():
            replica.hang()
        with pytest.raises(error):
            await running.turn("a", PROMPT)
        for replica in pool.replicas.values():
            replica.come_back()
        await asyncio.sleep(60)  # probes let it back in
        assert await running.turn("a", PROMPT) == running.expected("a", PROMPT)
        await nothing_held(running, leases_s=LEASE_S + 1)


@pytest.mark.parametrize("side", ["prefill", "agents"])
@on_virtual_time
async def test_the_only_replica_dies_and_the_turn_waits_for_the_next(side):
    async with system(replicas=1) as running:
        pool = running.cluster.pools[side]
        (replica,) = pool.replicas.values()
        replica.planned["prefilled" if side == "prefill" else "token 3"] = lambda: pool.kill(replica.name)
        began = clock()
        assert await running.turn("a", PROMPT) == running.expected("a", PROMPT)
        assert clock() - began >= START_S - KNOWN_S
        await nothing_held(running, leases_s=LEASE_S + 1)
