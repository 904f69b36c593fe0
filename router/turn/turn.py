"""A turn over token ids: prefill, handoff, decode, and the same again if a replica or the prefix is lost.

1. Admit (admit.py): the tenant may use what the turn will need, and there is room for its decode and prefill, or a place in the
   queue; otherwise it is refused. From here on the turn has an account (router/accounts): the ledger counts what it uses before
   the client sees it.
2. Prefill (prefill.py): the mode says how many prompt tokens are handed over. A replica of the shared pool, or of the pool's
   own, computes what it has not cached and answers with a lease on the blocks. If there is no such pool, or the decode
   engine is to make them itself (decider.py), they are made in 3.
3. Decode (decode.py): the tokens stream. From the first contact the decode engine owns the lease; before it, we do.
4. Take up again (take_up_again.py): after PrefixLost (preempted, or the load failed or came late) or ReplicaLost (the replica
   died, is wedged, or says that it cannot), the turn goes back to 2 with the tokens so far as `replay`, and avoids the replica
   that failed. The client sees one stream, as if nothing had happened.
5. However the turn ends (complete, by an error, at the deadline, or because the client left), both calls are closed, which
   frees KV.

place.py decides where each call goes.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from opentelemetry.trace import INVALID_SPAN, Span

from prefillshare.kvshare.caller import cache_salt
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import (
    UNFORESEEN,
    DeadlineExceeded,
    Internal,
    OverLimit,
    PrefillShareError,
    PrefixLost,
    ReplicaLost,
)
from prefillshare.kvshare.handoff import Handoff, TokenChunk
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare.priority import RESUMED
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.kvshare_vllm.surface.turn_call import TurnCall
from prefillshare.router import clock
from prefillshare.router.admission.grant import Grant
from prefillshare.router.pools.pool import Placed
from prefillshare.router.pools.route import Route
from prefillshare.router.telemetry.recent_turns import RecentTurn
from prefillshare.router.turn.admit import admitted
from prefillshare.router.turn.decider import Choice, Where
from prefillshare.router.turn.decode import decode
from prefillshare.router.turn.prefill import prefill
from prefillshare.router.turn.prefix import Prefix
from prefillshare.router.turn.services import Services
from prefillshare.router.turn.span import turn_span
from prefillshare.router.turn.take_up_again import take_up_again
from prefillshare.router.turn.terms import Terms

logger = logging.getLogger(__name__)


class Turn:
    """Owns its state from admission to its end; the stages work on it. `chunks` may be called once."""

    def __init__(self, services: Services, call: TurnCall, decoder: Decoder, route: Route):
        self.services, self.call, self.decoder, self.route = services, call, decoder, route
        self.mode, self.terms = get_mode(decoder.sharing), call.terms or Terms()
        #: Mixed into the keys of the prompt's blocks on both sides: prompts of different salts never share KV (R7).
        self.salt = cache_salt(call.caller.cache_domain, call.salt)
        self.usage = TurnUsage(prompt_tokens=len(call.prompt))
        is_free = self.terms.is_probe
        self.account = services.accounts.of_turn(call.caller.tenant, decoder.name, self.usage, is_free=is_free)
        self.span: Span = INVALID_SPAN
        self.generated: list[int] = []
        self.prefix = self._prefix()
        self.usage.own_tokens = len(call.prompt) - len(self.prefix.token_ids)
        #: What the turn holds of its pools' room, once it is admitted.
        self.grant: Grant | None = None
        #: Attempts before this one, and how many of them failed because of a replica.
        self.number = self.failures = 0
        #: Replicas that failed this turn.
        self.avoid: set[str] = set()
        #: The decode call under way has given no token yet.
        self.is_silent = False
        #: Where the KV of the shared prefix comes from, if there is one.
        self.choice: Choice | None = None
        #: When the lease on it ends, at the latest (clock.now).
        self.lease_ends = math.inf
        #: What the prefill call took besides the engine's own part, seconds.
        self.handoff_s = 0.0
        #: Layers of the prefix that the decoder computes itself; `is_chosen` once that has been decided.
        self.own_layers: LayerGroup | None = None
        self.is_chosen = False
        #: The loan of KV that the decode engine offers at the end.
        self.lent: Handoff | None = None
        self._text_has_ended = False

    @property
    def name(self) -> str:
        """This attempt's request id in engines."""
        return f"{self.call.request_id}-{self.number}"

    @property
    def here(self) -> Placed | None:
        """The decode replica, if it is to make the KV of the shared prefix itself."""
        return self.choice.decode if self.choice and self.choice.where is Where.HERE else None

    @property
    def priority(self) -> int:
        """The turn's priority in the engines' queues, as in the router's."""
        return RESUMED if self.number else self.call.caller.priority

    def text_has_ended(self) -> None:
        self._text_has_ended = True

    async def chunks(self) -> AsyncIterator[TokenChunk]:
        """Yields the turn's tokens, and fills its usage. Raises PrefillShareError only."""
        name, request_id, services = self.decoder.name, self.call.request_id, self.services
        deadline_s = self.terms.deadline_s if self.terms.deadline_s is not None else services.config.default_deadline_s
        started, outcome, noted_end = clock.now(), "cancelled", self._note_beginning()
        try:
            with turn_span(self), services.in_progress.turn(name):
                async with asyncio.timeout(deadline_s):
                    if self.terms.ready:
                        await self.terms.ready()
                    async with admitted(self), aclosing(self._attempts()) as chunks:
                        async for chunk in chunks:
                            services.counted.generated(name, self.usage, chunk, clock.now() - started)
                            await self.account.before_tokens_are_passed_on(last=bool(chunk.finish_reason))
                            yield chunk
            outcome = "ok"
        except TimeoutError:
            outcome = DeadlineExceeded.__name__
            raise DeadlineExceeded(
                f"request {request_id}: the deadline passed after {self.usage.completion_tokens} tokens"
            ) from None
        except OverLimit:
            outcome = "limited"
            raise
        except PrefillShareError as error:
            outcome = type(error).__name__
            raise
        except GeneratorExit:
            outcome = "ok" if self._text_has_ended else "cancelled"
            raise
        except Exception as error:
            outcome = Internal.__name__
            logger.exception("request %s failed", request_id, extra={"request_id": request_id})
            raise Internal(f"request {request_id}: {UNFORESEEN}") from error
        finally:
            elapsed = clock.now() - started
            noted_end(outcome, elapsed)
            self._record(outcome, elapsed)

    async def _attempts(self) -> AsyncIterator[TokenChunk]:
        while True:
            self.is_silent = False
            try:
                handoff = await prefill(self)
                async with aclosing(decode(self, handoff)) as chunks:
                    async for chunk in chunks:
                        self.generated += chunk.token_ids
                        self.grant.grow_to(len(self.generated))
                        self.account.grew(len(self.call.prompt) + len(self.generated))
                        yield chunk
                        if chunk.finish_reason:
                            return
            except (PrefixLost, ReplicaLost) as lost:
                await take_up_again(self, lost)
                self.prefix = self._prefix()

    def _prefix(self) -> Prefix:
        """The part of the prompt and of the tokens generated after it that is handed over."""
        return Prefix.of(self.decoder, self.call.prompt, self.generated, self.services.block_size, self.salt)

    def _note_beginning(self) -> Callable[[str, float], None]:
        """Note the turn for the page at /ui. Returns what is to be called at its end (RecentTurns.began)."""
        if self.terms.is_probe:
            return lambda outcome, took_s: None
        call, decoder = self.call, self.decoder
        noted = RecentTurn(decoder.name, decoder.pool, call.request_id, self.terms.session, self.usage)
        return self.services.recent.began(call.caller.tenant, noted, call.prompt)

    def _record(self, outcome: str, elapsed: float) -> None:
        name, request_id = self.decoder.name, self.call.request_id
        told = {"request_id": request_id, "decoder": name, "outcome": outcome, **self.usage.report(), "total_s": elapsed}
        logger.info("request %s of %s: %s, %.3f s", request_id, name, outcome, elapsed, extra=told)
        self.services.counted.ended(name, outcome, self.usage, elapsed)
