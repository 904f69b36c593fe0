"""Whether a turn would succeed now, found out by asking the session store and taking a turn on every pool."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Awaitable, Callable, Mapping

from prefillshare.kvshare.caller import ANONYMOUS
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import Overloaded, PrefillShareError, Unavailable
from prefillshare.kvshare_vllm.sampling import make_prompt, make_sampling_params
from prefillshare.kvshare_vllm.surface.frontend import Frontend
from prefillshare.router import clock
from prefillshare.router.sessions import SessionStore
from prefillshare.router.turn.terms import Terms

PROBE_DEADLINE_S = 60.0
#: Seconds for which a successful probe is believed.
PROBE_TTL_S = 10.0
#: What is said before a turn has been tried.
UNKNOWN = "the first turns are being tried"


class Readiness:
    """`decoders` is changed in place by its owner. `probe` takes a turn of the named decoder, with a deadline.

    Anybody may ask, without a key, and as often as they like. So one at a time has turns tried and waits for them; others are
    told at once what was found before."""

    def __init__(
        self,
        decoders: Mapping[str, Decoder],
        sessions: SessionStore,
        is_draining: Callable[[], bool],
        probe: Callable[[str], Awaitable[None]],
    ):
        self._decoders, self._sessions = decoders, sessions
        self._is_draining, self._probe = is_draining, probe
        self._probed: dict[str, float] = {}
        self._trying: asyncio.Task[str] | None = None
        #: When they began to be tried, and what was found the last time.
        self._began, self._found = clock.now(), UNKNOWN

    async def not_ready_because(self) -> str:
        """Empty if a turn on every pool succeeds now, else the reason. If the store does not answer, no turn is tried."""
        if self._is_draining():
            return "the router is stopping"
        try:
            await self._sessions.check()
        except Unavailable as error:
            return str(error)
        if not self._due():
            return ""
        if self._trying is None or self._trying.done():
            self._began, self._trying = clock.now(), asyncio.create_task(self._try())
            return await asyncio.shield(self._trying)  # whoever asked may leave
        took_s = clock.now() - self._began
        if self._found or took_s < PROBE_TTL_S:
            return self._found
        return f"the turns that are tried have not ended for {took_s:.0f} s"

    def _due(self) -> dict[str, str]:
        """Pools that have to be tried, and a decoder of each."""
        by_pool = {decoder.pool: name for name, decoder in self._decoders.items()}
        since = clock.now() - PROBE_TTL_S
        return {pool: name for pool, name in by_pool.items() if self._probed.get(pool, -math.inf) <= since}

    async def _try(self) -> str:
        self._found = await self._reason()
        return self._found

    async def _reason(self) -> str:
        for pool, name in self._due().items():
            try:
                await self._probe(name)
            except Overloaded:
                pass  # it is up, and busy: taking it out of rotation would help nobody
            except PrefillShareError as error:
                return f"pool {pool}: {error}"
            self._probed[pool] = clock.now()
        return ""


async def probe(frontend: Frontend, decoder: str) -> None:
    """A turn of one token. Raises what a client would get."""
    sampling, name = make_sampling_params(max_tokens=1, temperature=0.0), f"probe-{uuid.uuid4().hex}"
    request = frontend.prepare(make_prompt([1, 2, 3]), sampling, name, decoder)
    run = frontend.run(request, decoder, ANONYMOUS, terms=Terms(deadline_s=PROBE_DEADLINE_S, is_probe=True))
    async for _ in run.outputs():
        pass
