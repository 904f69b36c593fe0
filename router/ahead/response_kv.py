"""How the base's KV of a response comes about before the next turn asks for it.

 1. While a response streams, and when it has ended, it is prefilled ahead of the next turn (router/ahead/eager.py).
 2. A decode engine that has made base KV itself lends it at the end instead, and the prefill pool pulls it
    (router/ahead/pull_back.py); what it does not pull is prefilled ahead.
 3. When the next turn comes, prefilling ahead is given up, and a pull in progress is waited for.
 4. If the context is kept (router/kept), it is kept with the response as soon as its KV is there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Protocol

from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.decoders import Decoder, ecache_layers
from prefillshare.kvshare.handoff import Handoff
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.modes import get_mode
from prefillshare.router.ahead.eager import ContextKey, EagerPrefill
from prefillshare.router.ahead.pull_back import PullBack
from prefillshare.router.kept.keeper import Keeper
from prefillshare.router.pools.fleet import Fleet


class ResponseKV:
    """`eager`, `pull_back`, `keeper`: None if the deployment does not use it."""

    def __init__(
        self, eager: EagerPrefill | None = None, pull_back: PullBack | None = None, keeper: Keeper | None = None
    ):
        self._eager, self._pull_back, self.keeper = eager, pull_back, keeper

    @classmethod
    def of(
        cls,
        deployment: Deployment,
        fleet: Fleet,
        metrics: Metrics,
        compute_s: Callable[[], float | None],
        keeper: Keeper | None = None,
    ) -> ResponseKV:
        """As the deployment configures it. `compute_s` returns the measured seconds per token of prefill."""
        config, base = deployment.router, deployment.base
        eager = pull_back = None
        if config.eager_prefill:
            limits = {"limit": config.eager_prefill_max, "stride_tokens": config.eager_prefill_stride_tokens}
            eager = EagerPrefill(fleet.maker_ahead, base, metrics, **limits)
        # What a decode engine lends comes without the hidden states that an E-cache needs.
        if config.pull_back != "never" and not ecache_layers(deployment.decode):
            limits = {"when": config.pull_back, "limit": config.pull_back_max}
            pull_back = PullBack(fleet.shared_prefill, base, metrics, compute_s=compute_s, **limits)
        return cls(eager, pull_back, keeper)

    @contextmanager
    def of_turn(
        self, session: ContextKey, decoder: Decoder, before: list[int], *, lendable: bool
    ) -> Iterator[ResponseOfTurn]:
        """The response of one turn. `before`: the context before it that the next turn will have. `lendable`: the decoder
        sees exactly that context (no suffix). If the block is left before the response has ended, the KV of the response is
        given up."""
        self.given_up(session)
        # Base KV of a response is of use only if decoders share it.
        eager = self._eager if get_mode(decoder.sharing).shares_prefill else None
        response = ResponseOfTurn(session, decoder, eager, self._pull_back, before, self._went_on, lendable=lendable)
        try:
            with self.keeper.turn(*session) if self.keeper else nullcontext():
                yield response
        finally:
            if not response.has_ended:
                self.given_up(session)
                if self._pull_back and response.lent:
                    self._pull_back.give_back(response.lent)

    def given_up(self, session: ContextKey) -> None:
        """Stop prefilling ahead for a session that goes on without it, or is gone."""
        if self._eager:
            self._eager.cancel(session)

    async def gone(self, session: ContextKey) -> None:
        """A session has been deleted, or another one begins under its name: nothing is made for it, and nothing of it is
        kept."""
        self.given_up(session)
        if self.keeper:
            await self.keeper.gone(*session)

    def shortened(self, session: ContextKey, context: list[int], salt: str | None) -> None:
        """A session's context has been cut off after these tokens: if it is kept, no more than them is kept from now on."""
        self.given_up(session)
        self._went_on(session, lambda: context, salt)

    async def made(self, session: ContextKey) -> None:
        """Wait until nothing is made for the session's context."""
        for making in filter(None, (self._pull_back, self._eager)):
            await making.made(session)

    def _went_on(self, session: ContextKey, context: Callable[[], list[int]], salt: str | None) -> None:
        if self.keeper:
            self.keeper.went_on(*session, context, salt, partial(self.made, session))

    async def stop(self) -> None:
        for background in filter(None, (self._eager, self._pull_back)):
            await background.stop()


class Making(Protocol):
    """The turn that makes the response."""

    #: What the decode engine lends at the turn's end.
    lent: Handoff | None
    salt: str | None


class ResponseOfTurn:
    """`token_ids`: generated so far. The code that takes the turn appends to them, and sets `turns` once the turn has begun."""

    def __init__(
        self,
        session: ContextKey,
        decoder: Decoder,
        eager: EagerPrefill | None,
        pull_back: PullBack | None,
        before: list[int],
        went_on: Callable[[ContextKey, Callable[[], list[int]], str | None], None],
        *,
        lendable: bool,
    ):
        self._went_on = went_on
        self._session, self._pool, self._eager, self._pull_back, self._before = session, decoder.pool, eager, pull_back, before
        #: Whether the decode engine's KV of what it generates is base KV already.
        self._lends = get_mode(decoder.sharing).lends_responses and pull_back is not None
        #: Whether the decode engine is to lend the context's KV at the end, if its mode allows that.
        self.lend = lendable and pull_back is not None
        self.turns: Sequence[Making] = ()
        self.token_ids: list[int] = []
        self._instead: list[int] | None = None
        self.has_ended = False

    @property
    def ready(self) -> Callable[[], Awaitable[None]] | None:
        """Waits for a pull for the session; to be awaited before the turn's prefix is looked up."""
        return partial(self._pull_back.settled, self._session) if self._pull_back else None

    @property
    def lent(self) -> Handoff | None:
        return self.turns[0].lent if self.turns else None

    @property
    def context(self) -> list[int]:
        """The context with the response."""
        return [*self._before, *self.in_context]

    @property
    def in_context(self) -> list[int]:
        """The response as it is in the context."""
        return self.token_ids if self._instead is None else self._instead

    def is_in_context_as(self, token_ids: list[int]) -> None:
        """The context has these instead of those that were generated."""
        self._instead = token_ids

    def go_on_from(self, before: list[int]) -> None:
        """The next turn will have this context before the response; called before `ended`. Nothing changes if the decode engine
        lends the KV of the context that it has seen: what it lends would not belong to another one."""
        if not (self._lends and self.lend):
            self._before = before

    def grew(self) -> None:
        """The response has become longer and goes on; called for every piece that streams."""
        if not self._lends:
            self._prefill_ahead(ended=False)

    def ended(self) -> None:
        """The response is complete, and a part of the context."""
        self.has_ended = True
        ahead = partial(self._prefill_ahead, ended=True)
        if self._lends and (lent := self.lent):
            # The loan is KV of the generated tokens; it is of use as far as the context has these.
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(self.token_ids, self.in_context, strict=False))
            lent = replace(lent, tokens=min(lent.tokens, len(self._before) + sum(1 for _ in alike)))
            self._pull_back.lent(self._session, self.context, lent, self.turns[0].salt, otherwise=ahead)
        else:
            ahead()
        self._went_on(self._session, lambda: self.context, self.turns[0].salt)

    def _prefill_ahead(self, *, ended: bool) -> None:
        if self._eager:
            tokens = len(self._before) + len(self.in_context)
            self._eager.grew(self._session, tokens, lambda: self.context, self.turns[0].salt, self._pool, ended=ended)
