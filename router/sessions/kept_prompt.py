"""What a call over HTTP asks to be kept of its prompt: by Anthropic's `cache_control`, or by OpenAI's `prompt_cache_retention`.

Within the tenant's budget it is granted before the turn begins, so that the answer's usage can say so, and it is kept when the
turn has computed it. Beyond the budget the call is served all the same: its usage says that nothing was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefillshare.kvshare.caller import Caller, cache_salt
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.router.kept.keeper import Keeper
from prefillshare.router.kept.kept import Kept

#: OpenAI's names of how long a prompt is kept -> seconds; 0: as long as the caches keep it by themselves.
RETENTIONS_S = {"in_memory": 0.0, "in-memory": 0.0, "24h": 86400.0}

#: (token ids, seconds).
Beginning = tuple[list[int], float]


def retention_s(request: Any) -> float:
    """Seconds for which a request asks its prompt to be kept. Raises InvalidInput."""
    asked = getattr(request, "prompt_cache_retention", None)
    if asked is None:
        return 0.0
    if asked not in RETENTIONS_S:
        raise InvalidInput(
            f"{str(asked)[:32]!r} is not known", field="prompt_cache_retention", fix="use in_memory or 24h, or leave it out"
        )
    return RETENTIONS_S[asked]


class KeptPrompt:
    """`keeper`: None where nothing may be kept."""

    def __init__(self, keeper: Keeper | None):
        self._keeper = keeper
        self.beginnings: Sequence[Beginning] = ()
        self._granted: list[Kept] = []

    async def grant(
        self, caller: Caller, prompt: list[int], client_salt: str | None, request: Any, *, whole: bool = False
    ) -> int:
        """Returns how much of the prompt is to be kept, in tokens. `whole`: what asks for a beginning means all of it, since it
        was laid out in another way."""
        asked = [(len(prompt) if whole else _common(prompt, token_ids), ttl_s) for token_ids, ttl_s in self.beginnings]
        if ttl_s := retention_s(request):
            asked.append((len(prompt), ttl_s))
        if not asked or self._keeper is None:
            return 0
        self._prompt, self._salt = prompt, cache_salt(caller.cache_domain, client_salt)
        self._granted = await self._keeper.grant(caller, prompt, self._salt, asked)
        return self._keeper.tokens(self._granted[-1]) if self._granted else 0

    def there(self) -> None:
        """The prompt has been computed; may be called again."""
        granted, self._granted = self._granted, []
        if granted:
            self._keeper.hold(granted, self._prompt, self._salt)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
