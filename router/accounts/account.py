"""One turn's account: what it uses is told to the ledger, to the metrics and to its tenant's limits while it runs.

A turn is in the ledger from its admission on. What a turn has used stays there however it ends.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from prefillshare.kvshare.usage import TurnUsage
from prefillshare.router.accounts.figures import NOTHING, Figures
from prefillshare.router.accounts.kv_time import KVTime
from prefillshare.router.accounts.ledger import Ledger
from prefillshare.router.accounts.limits import Charge
from prefillshare.router.accounts.metrics import TenantMetrics


class TurnAccount:
    """`usage` is filled by the turn. `ledger`: None for turns that nobody is to be charged for."""

    def __init__(
        self, tenant: str, decoder: str, usage: TurnUsage, kv_time: KVTime, ledger: Ledger | None, metrics: TenantMetrics
    ):
        self._tenant, self._decoder, self._usage, self._kv_time = tenant, decoder, usage, kv_time
        self._ledger, self._metrics = ledger, metrics
        self._charge, self._uncached = Charge(), 0
        self._is_open, self._noted = False, NOTHING

    def open(self, charge: Charge, uncached: int) -> None:
        """The turn has been admitted. `uncached`: prompt tokens that are expected not to be found cached."""
        self._charge, self._uncached, self._is_open = charge, uncached, True
        self._note()

    def holding_kv(self, tokens: int) -> AbstractContextManager[None]:
        """Within this context the turn's sequence, of so many tokens at first, is on a decode replica."""
        return self._kv_time.held(tokens)

    def grew(self, tokens: int) -> None:
        """The sequence on the decode replica has this many tokens now."""
        self._kv_time.grow_to(tokens)

    async def before_tokens_are_passed_on(self, *, last: bool) -> None:
        """The client is about to see tokens that `usage` counts already. Waits until the ledger has them and, for the last
        ones, until the turn has ended for its tenant's limits."""
        self._note()
        if last:
            self._charge.settle(self._billable)
        if self._ledger:
            await self._ledger.written()
        if last:
            await self._charge.settled()

    def close(self) -> None:
        """The turn has ended."""
        if self._is_open:
            self._note()
            self._charge.settle(self._billable)
            self._is_open = False

    @property
    def _billable(self) -> int:
        """Tokens that count for the limits (limits.py)."""
        usage = self._usage
        uncached = usage.prompt_tokens - usage.cached_tokens if usage.prefill_replica else self._uncached
        return uncached + usage.completion_tokens

    def _note(self) -> None:
        usage = self._usage
        so_far = Figures(
            1,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.computed_tokens,
            usage.completion_tokens,
            self._kv_time.byte_seconds,
        )
        new, self._noted = so_far.minus(self._noted), so_far
        self._charge.used(self._billable)
        if self._ledger and any(new):
            self._ledger.add(self._tenant, self._decoder, new)
            self._metrics.used(self._tenant, self._decoder, new)
