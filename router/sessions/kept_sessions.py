"""What a tenant keeps (router/kept) as its calls ask for it, and what the keeper must know of sessions."""

from __future__ import annotations

from prefillshare.kvshare.caller import Caller, cache_salt
from prefillshare.kvshare.errors import InvalidInput, NotFound
from prefillshare.router.kept.keeper import Keeper, Listed
from prefillshare.router.kept.kept import Kept, of_session
from prefillshare.router.sessions.base import Session, SessionStore


class KeptSessions:
    """`keeper`: None where nothing may be kept."""

    def __init__(self, sessions: SessionStore, keeper: Keeper | None):
        self._sessions, self._keeper = sessions, keeper

    async def keep(self, caller: Caller, session_id: str, ttl_s: float = 0.0, priority: int | None = None) -> Kept:
        """`ttl_s`: 0: as long as the session lives unused. Raises NotFound, InvalidInput, PermissionDenied; Overloaded beyond
        the budget."""
        session = await self._sessions.get(session_id, tenant=caller.tenant)
        longest_s = self._longest_s(session)
        if not 0 <= ttl_s <= longest_s:  # NaN, too
            raise InvalidInput(
                f"{ttl_s:g} s is out of range",
                field="ttl_s",
                fix=f"use at most {longest_s:g}, the time for which this session lives unused, or have it live longer",
            )
        salt = cache_salt(caller.in_domain(session.cache_domain).cache_domain)
        return await self._keeper.keep_session(caller, session_id, session.token_ids, salt, ttl_s or longest_s, priority)

    async def let_go(self, caller: Caller, session_id: str) -> None:
        """Nothing happens to a session that is not kept. Raises NotFound for one that is neither kept nor there."""
        if not await self._keeper.let_go(caller.tenant, of_session(session_id)):
            await self._sessions.get(session_id, tenant=caller.tenant)

    async def let_go_kept(self, caller: Caller, name: str) -> None:
        """Let go of a session or of a beginning of a prompt. `name`: as of Kept. Raises NotFound."""
        if not await self._keeper.let_go(caller.tenant, name):
            raise NotFound(f"nothing is kept under {name[:128]!r}", field="id", fix="use an id that ListKept tells")

    async def live_for(self, session: Session) -> None:
        """The session has got another time to live: it is kept no longer than that. Raises Unavailable."""
        if self._keeper:
            salt, longest_s = cache_salt(session.cache_domain), self._longest_s(session)
            await self._keeper.shorten(session.tenant, session.session_id, session.token_ids, salt, longest_s)

    def _longest_s(self, session: Session) -> float:
        """Seconds for which the session lives unused."""
        return self._sessions.ttl_s if session.ttl_s is None else session.ttl_s

    def tokens(self, kept: Kept) -> int:
        """How much of a context is to be kept."""
        return self._keeper.tokens(kept)

    async def listed(self, caller: Caller) -> Listed:
        return await self._keeper.listed(caller.tenant)


async def context_of(sessions: SessionStore, tenant: str, session_id: str) -> tuple[list[int], str | None]:
    """A session's token ids, and the salt that their KV has. Raises NotFound."""
    session = await sessions.get(session_id, tenant=tenant)
    return list(session.token_ids), cache_salt(session.cache_domain)
