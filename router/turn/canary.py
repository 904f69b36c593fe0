"""The canary measures on live turns how far answers over shared KV are from the decoder's own (DroidSpeak drifts with data).

In a sampled share of the turns of decoders that recompute layers, one place in the response is looked at again:
 1. The turn runs as always, but its likeliest tokens are asked for, too; the client gets only what it asked for.
 2. When it has ended, a decode replica predicts the same place again, from the decoder's own prefill of the prompt and the
    response up to there, at the lowest priority. One turn is looked at at a time; those that end meanwhile are left out.
 3. The divergence of the two predictions is exported. If it grows, the layers that matter have changed: profile again.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace

from prefillshare.kvshare.decoders import ALL, Decoder
from prefillshare.kvshare.errors import PrefillShareError
from prefillshare.kvshare.handoff import Handoff, TokenChunk
from prefillshare.kvshare.logprobs import Logprobs
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare.priority import BEHIND
from prefillshare.kvshare_vllm.surface.turn_call import RunningTurn, TurnCall
from prefillshare.router.background import Background
from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.pools.calls import CALL_ERRORS, answer
from prefillshare.router.pools.route import Route
from prefillshare.router.turn.orchestrator import Orchestrator

logger = logging.getLogger(__name__)

#: Number of likeliest tokens that are compared one by one, if the decoder's pool returns that many.
TOP = 20


class Canary:
    """Makes turns as the orchestrator does. `share`: the part of the turns that are looked at, 0 to 1."""

    def __init__(self, orchestrator: Orchestrator, metrics: Metrics, share: float, rng: random.Random | None = None):
        self._orchestrator, self._metrics, self._share = orchestrator, metrics, share
        self._rng = rng or random.Random()
        self._background, self._task = Background(metrics), None

    def expect(self, decoders: Mapping[str, Decoder]) -> None:
        """Export the quality floors that these decoders are measured against."""
        floor = self._metrics["quality_floor"]
        floor.clear()
        for decoder in decoders.values():
            if decoder.quality_floor is not None:
                floor.labels(decoder.name).set(decoder.quality_floor)

    def turn(self, call: TurnCall) -> RunningTurn:
        """As Orchestrator.turn."""
        decoder = self._orchestrator.decoders.get(call.decoder)
        if decoder and get_mode(decoder.sharing).recomputes and self._rng.random() < self._share:
            return _LookedAt(self, self._orchestrator, decoder, call)
        return self._orchestrator.turn(call)

    def look(
        self, decoder: Decoder, route: Route, prompt: list[int], tokens: list[int], told: Logprobs, request_id: str
    ) -> None:
        if self._task and not self._task.done():
            self._metrics["canary_turns_total"].labels(decoder.name, "dropped").inc()
            return
        place = self._rng.randrange(len(told))
        comparing = self._compare(decoder, route, [*prompt, *tokens[:place]], told.row(place))
        self._task = self._background.start("canary", comparing, request=request_id)

    async def _compare(self, decoder: Decoder, route: Route, context: list[int], shared: Mapping[int, float]) -> None:
        outcome = "failed"
        try:
            placement = await route.decode.choose(len(context), BlockKeys([0], 1))
            async with route.decode.calling(placement):
                call = route.decode.replicas.on(placement.replica.id).own_next
                top = _top(decoder)
                own = await answer(call.remote(context, adapter=decoder.adapter, top=top, priority=BEHIND))
            self._metrics["canary_divergence"].labels(decoder.name).observe(divergence(own.row(0), shared))
            outcome = "done"
        except (PrefillShareError, *CALL_ERRORS) as error:
            logger.warning("the canary of %s: %s: %s", decoder.name, type(error).__name__, error)
        finally:
            self._metrics["canary_turns_total"].labels(decoder.name, outcome).inc()

    async def stop(self) -> None:
        await self._background.stop()


class _LookedAt:
    """A turn for which the likeliest tokens are asked for, too."""

    def __init__(self, canary: Canary, orchestrator: Orchestrator, decoder: Decoder, call: TurnCall):
        self._canary, self._decoder, self._call = canary, decoder, call
        self._route, self._asked = orchestrator.routes[decoder.pool], call.sampling.logprobs
        sampling = call.sampling.clone()
        sampling.logprobs = self._asked if self._asked == ALL else max(_top(decoder), self._asked or 0)
        self._turn = orchestrator.turn(replace(call, sampling=sampling))
        self.usage = self._turn.usage

    @property
    def lent(self) -> Handoff | None:
        return self._turn.lent

    @property
    def salt(self) -> str | None:
        return self._turn.salt

    def text_has_ended(self) -> None:
        self._turn.text_has_ended()

    async def chunks(self) -> AsyncIterator[TokenChunk]:
        tokens, told = [], []
        async with aclosing(self._turn.chunks()) as chunks:
            async for chunk in chunks:
                tokens += chunk.token_ids
                told += [chunk.logprobs] if chunk.logprobs else []
                if chunk.finish_reason and told:
                    whole = Logprobs.joined(told)
                    self._canary.look(self._decoder, self._route, self._call.prompt, tokens, whole, self._call.request_id)
                yield replace(chunk, logprobs=as_asked(chunk.logprobs, self._asked))


def _top(decoder: Decoder) -> int:
    return TOP if decoder.max_logprobs == ALL else min(TOP, decoder.max_logprobs)


def as_asked(told: Logprobs | None, asked: int | None) -> Logprobs | None:
    """Only the log-probabilities that the client wants: of the sampled token and of the `asked` likeliest ones."""
    if told is None or asked is None:
        return None
    return told if asked == ALL else told.likeliest(asked)


def divergence(own: Mapping[int, float], shared: Mapping[int, float]) -> float:
    """Kullback-Leibler divergence of `shared` from `own`, in nats, as in a layer profile.

    Both arguments map the likeliest tokens to their log-probabilities. Tokens in both are compared one by one, all others
    together as one. The result is never more than the divergence over all tokens.
    """
    both = own.keys() & shared.keys()
    parts = [(math.exp(own[token]), math.exp(shared[token])) for token in both]
    parts.append(tuple(max(1e-9, 1 - sum(part[side] for part in parts)) for side in (0, 1)))
    return max(0.0, sum(p * math.log(p / q) for p, q in parts if p > 0))
