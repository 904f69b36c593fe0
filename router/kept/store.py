"""Who keeps what until when. Refusals are worded here, once for all stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from prefillshare.kvshare.errors import InvalidInput, OverLimit, Overloaded
from prefillshare.router.kept.budgets import Budget
from prefillshare.router.kept.kept import Kept

#: Why something is not kept, for metrics.
NEVER_FITS, OWN_BUDGET, ALL_BUDGET = "never_fits", "own_budget", "all_budget"
#: Longest hint for when to try again, seconds.
LONGEST_HINT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What a store did. `kept`: what is kept now under the name; None: nothing, or it was refused to keep it. `refused`: why it
    is not kept as asked, or "". `own`, `all`: blocks that the tenant and all tenants keep now. `free_s`: until something of the
    tenant's is kept no longer by itself."""

    kept: Kept | None
    refused: str = ""
    own: int = 0
    all: int = 0
    free_s: float = 0.0


class KeptStore(ABC):
    """Each change is atomic, whoever else changes what the tenant keeps. What has expired counts no longer.

    Where the store is not in this process, all methods may raise Unavailable.
    """

    @abstractmethod
    async def keep(self, kept: Kept, keys: bytes, budget: Budget) -> Answer:
        """Keep a context with these block keys under its name, in place of what was kept under it. A prompt takes the place of
        shorter prompts that it begins with, unless these are kept longer. Beyond the budget nothing changes."""

    @abstractmethod
    async def prolong(self, tenant: str, name: str, keys: bytes, budget: Budget) -> Answer:
        """The context goes on, and has these keys by now: it is kept for its time from now on. Beyond the budget, what is kept
        of it so far is."""

    @abstractmethod
    async def placed(self, tenant: str, names: Sequence[str], pool: str, replica: str) -> list[str]:
        """Those of these contexts that are still kept are kept on this replica. Returns the names of the others."""

    @abstractmethod
    async def shorten(self, tenant: str, name: str, ttl_s: float) -> Kept | None:
        """What is kept under the name, if anything: from now on, and whenever it is prolonged, for at most `ttl_s` seconds."""

    @abstractmethod
    async def let_go(self, tenant: str, name: str) -> Kept | None:
        """Returns what was kept under the name."""

    @abstractmethod
    async def of(self, tenant: str) -> list[Kept]:
        """What the tenant keeps."""

    @abstractmethod
    async def own(self, tenant: str) -> int:
        """Blocks that the tenant keeps."""

    @abstractmethod
    async def held(self) -> dict[str, int]:
        """Tenant -> blocks, of those that keep something."""

    @abstractmethod
    async def claim(self, tenant: str, name: str, for_s: float) -> bool:
        """Whether the caller is the first to ask for this in `for_s` seconds: of all routers, one sees to a context."""

    @abstractmethod
    async def close(self) -> None: ...


def refusal(asked: Kept, answer: Answer, budget: Budget, block_size: int) -> InvalidInput | Overloaded:
    """The error that says why something is not kept."""
    wanted = asked.blocks * block_size
    whose = f"tenant {asked.tenant!r}" if asked.tenant else "you"
    of_own = answer.refused != ALL_BUDGET
    most, field = (budget.own, budget.own_field) if of_own else (budget.all, budget.all_field)
    if answer.refused == NEVER_FITS:
        most, field = min((budget.own, budget.own_field), (budget.all, budget.all_field))
        return InvalidInput(
            f"{wanted} tokens are more than the {most * block_size} that {whose} may keep",
            field=field,
            fix="keep a shorter context, or have the limit raised",
        )
    have = (answer.own if of_own else answer.all) * block_size
    kind = OverLimit if of_own and asked.tenant else Overloaded
    return kind(
        f"{whose if of_own else 'all tenants together'} keep{'s' if of_own and asked.tenant else ''} {have} tokens of at most"
        f" {most * block_size}; a context of {wanted} tokens does not fit beside them",
        field=field,
        retry_after_s=min(max(answer.free_s, 1.0), LONGEST_HINT_S) if of_own else LONGEST_HINT_S,
        fix="let something go (ListKept lists it), or have the limit raised",
    )
