"""Turns, clients that leave, and failing replicas in any order, drawn by hypothesis: no token is lost, doubled or wrong, and at
the end nothing is held, neither a lease nor room nor a call.
"""

import asyncio
from typing import ClassVar

from double.cluster import START_S
from double.engines import LEASE_S
from double.system import nothing_held, session_system
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule
from virtual_time import VirtualLoop

from prefillshare.kvshare.errors import DeadlineExceeded, PrefixLost, ResumeReason, Unavailable

DECODERS = st.sampled_from(("a", "b", "o", "base", "s", "t", "c", "d"))
GIVEN = st.lists(st.integers(10, 99), min_size=1, max_size=20)
POOLS = st.sampled_from(("prefill", "agents", "streams", "alone", "prefill-alone"))
MOMENTS = st.sampled_from(("prefill", "prefilled", "pull", "decode", "loaded", "token 1", "token 2", "token 5"))
FAILURES = st.sampled_from(("dies", "cannot", "drops", "hangs", "preempts", "cannot load"))
#: What a client may get where replicas fail; any other error fails the test.
MAY_FAIL = (Unavailable, DeadlineExceeded)


class AnyOrder(RuleBasedStateMachine):
    sessions = Bundle("sessions")
    #: Of the system.
    of_system: ClassVar[dict] = {}

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.within = session_system(**self.of_system)
        self.running = self.runner.run(self.within.__aenter__())
        #: Session -> its context, as it must be.
        self.contexts: dict[str, list[int]] = {}
        self.disturbed = False

    @rule(target=sessions, given=GIVEN)
    def create(self, given):
        name = f"s{len(self.contexts)}"
        self.runner.run(self.running.turns.create(name, ("token_ids", given)))
        self.contexts[name] = given
        return name

    @rule(session=sessions, decoder=DECODERS, given=GIVEN, tokens=st.integers(1, 12))
    def take(self, session, decoder, given, tokens):
        self.runner.run(self._take(session, decoder, given, tokens))

    @rule(session=sessions, decoder=DECODERS, given=GIVEN, tokens=st.integers(1, 12), after_s=st.floats(0, 2))
    def leave(self, session, decoder, given, tokens, after_s):
        async def leave():
            turn = asyncio.create_task(self._take(session, decoder, given, tokens))
            await asyncio.sleep(after_s)
            turn.cancel()
            await asyncio.wait({turn})
            if not turn.cancelled():
                turn.result()
            assert await self.running.context(session) == self.contexts[session]

        self.runner.run(leave())

    @rule(one=sessions, other=sessions, decoders=st.tuples(DECODERS, DECODERS), given=GIVEN, tokens=st.integers(1, 12))
    def take_two(self, one, other, decoders, given, tokens):
        async def both():
            turns = {one: decoders[0], other: decoders[1]}
            await asyncio.gather(*(self._take(session, decoder, given, tokens) for session, decoder in turns.items()))

        self.runner.run(both())

    @rule(session=sessions)
    def fork(self, session):
        name = f"{session}f{len(self.contexts)}"
        self.runner.run(self.running.sessions.fork(session, name, tenant=""))
        self.contexts[name] = list(self.contexts[session])

    @rule(pool=POOLS, number=st.integers(0, 1), moment=MOMENTS, failure=FAILURES)
    def plan_a_failure(self, pool, number, moment, failure):
        async def plan():
            pools = self.running.cluster.pools
            pool_ = pools.get(pool, pools["agents"])
            replica = list(pool_.replicas.values())[number % len(pool_.replicas)]
            replica.planned[moment] = {
                "dies": lambda: pool_.kill(replica.name),
                "cannot": Unavailable("no"),
                "drops": asyncio.CancelledError(),
                "hangs": replica.hang,
                "preempts": PrefixLost("preempted", reason=ResumeReason.PREEMPTED),
                "cannot load": PrefixLost("no KV", reason=ResumeReason.KV_LOAD_FAILED),
            }[failure]

        self.disturbed = True
        self.runner.run(plan())

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds):
        self.runner.run(asyncio.sleep(seconds))

    @rule()
    def let_all_come_back(self):
        self.runner.run(self._all_well())

    async def _take(self, session, decoder, given, tokens):
        before = list(self.contexts[session])
        try:
            said = await self.running.take(session, decoder, given, tokens=tokens)
        except MAY_FAIL:
            assert self.disturbed
            assert await self.running.context(session) == before
            return
        assert said == self.running.expected(decoder, [*before, *given], tokens)
        self.contexts[session] = [*before, *given, *said]
        assert await self.running.context(session) == self.contexts[session]

    async def _all_well(self):
        for pool in self.running.cluster.pools.values():
            for replica in pool.replicas.values():
                replica.planned.clear()
                replica.come_back()
        await asyncio.sleep(START_S + 60)  # those that were ejected are probed
        self.disturbed = False

    def teardown(self):
        async def end():
            await self._all_well()
            for session, context in self.contexts.items():
                assert await self.running.context(session) == context
            await nothing_held(self.running, leases_s=LEASE_S + 1)
            await self.within.__aexit__(None, None, None)

        self.runner.run(end())
        self.runner.close()


class AnyOrderInPlace(AnyOrder):
    of_system: ClassVar[dict] = {"in_place": True}


class AnyOrderEitherWay(AnyOrder):
    of_system: ClassVar[dict] = {"local_prefill": "auto"}


TestAnyOrder, TestAnyOrderInPlace, TestAnyOrderEitherWay = (
    machine.TestCase for machine in (AnyOrder, AnyOrderInPlace, AnyOrderEitherWay)
)
TestAnyOrder.settings = TestAnyOrderInPlace.settings = TestAnyOrderEitherWay.settings = settings(
    max_examples=5,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # looking for a smaller case would take minutes
    suppress_health_check=list(HealthCheck),
)
