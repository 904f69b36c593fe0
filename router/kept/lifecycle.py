"""Opens the store of what tenants keep."""

from __future__ import annotations

from prefillshare.kvshare.config import Router
from prefillshare.router.kept.memory import MemoryKept
from prefillshare.router.kept.redis import RedisKept
from prefillshare.router.kept.store import KeptStore
from prefillshare.router.redis_calls import RedisCalls


def open_kept(config: Router) -> KeptStore:
    """In Redis if sessions are, else in the router's memory. Raises ConfigError."""
    if config.redis_url is None:
        return MemoryKept()
    return RedisKept(RedisCalls.of(config, "store of kept contexts"))
