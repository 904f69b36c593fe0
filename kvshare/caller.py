"""Who makes a call, and with whom its prompts share KV (R7).

A cache domain is a set of prompts that may share KV. Every tenant has one of its own. It must name another domain explicitly to
put a session or request there, and its entry in the keys file must allow it. Engines get the domain's salt: they mix it into
the key of a prompt's first block, on which all later keys depend.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar
from dataclasses import dataclass, replace

from prefillshare.kvshare.errors import InvalidInput, PermissionDenied
from prefillshare.kvshare.priority import PRIORITIES


@dataclass(frozen=True)
class Caller:
    """A tenant as one call sees it. "" is the only, anonymous tenant of deployments without `router.auth`."""

    tenant: str = ""
    cache_domain: str = ""
    #: Further domains this tenant may choose.
    may_share: tuple[str, ...] = ()
    #: Priority of its turns; lower is sooner, as in vLLM.
    priority: int = 0

    def in_domain(self, chosen: str) -> Caller:
        """The caller in the domain that it chose; "" is its own. Raises PermissionDenied."""
        if chosen in ("", self.cache_domain):
            return self
        if chosen not in self.may_share:
            allowed = [name for name in (self.cache_domain, *self.may_share) if name]
            raise PermissionDenied(
                f"cache domain {chosen!r} is not among those this caller may use",
                field="cache_domain",
                fix=f"leave it out, or use one of {', '.join(allowed)}" if allowed else "leave it out",
            )
        return replace(self, cache_domain=chosen)

    def behind(self, steps: int, field: str = "priority") -> Caller:
        """The caller of a request that lets others go first: `steps` behind the tenant's own priority, at most the last.
        Raises InvalidInput, about `field`, if `steps` is out of range; below 0, the request would go before its tenant's
        others."""
        if not 0 <= steps <= PRIORITIES[-1]:
            raise InvalidInput(
                f"{steps} is out of range",
                field=field,
                fix=f"use 0 to {PRIORITIES[-1]}: how far this request goes behind its tenant's others",
            )
        return replace(self, priority=min(self.priority + steps, PRIORITIES[-1]))


ANONYMOUS = Caller()
#: Set by the surface, per call, before anything else runs; tasks made during the call inherit it.
current_caller: ContextVar[Caller] = ContextVar("prefillshare_caller", default=ANONYMOUS)


def cache_salt(domain: str, client_salt: str | None = None) -> str | None:
    """The salt that engines get. None for the anonymous domain without a client's salt: such keys stay unsalted.

    Different (domain, client_salt) give different salts, which are the same on every router and after every restart. No secret
    is needed: a client's own salt never reaches an engine unchanged, so nobody can send the salt of another domain.
    """
    if not domain and client_salt is None:
        return None
    parts = [domain] if client_salt is None else [domain, client_salt]
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in encoded)).hexdigest()
