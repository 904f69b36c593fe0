"""How much may be kept: by a tenant (keys file), and by all together (router.max_kept_tokens, router.max_kept_share)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefillshare.kvshare.config import Router
from prefillshare.router.tenants import Tenants


@dataclass(frozen=True)
class Budget:
    """Most blocks that a tenant keeps, and all tenants together; each with the field that says so."""

    own: int
    own_field: str
    all: int
    all_field: str


class Budgets:
    """`capacity_blocks` returns how many blocks the replicas have that may keep something."""

    def __init__(self, config: Router, block_size: int, tenants: Tenants, capacity_blocks: Callable[[], int]):
        self._config, self.block_size = config, block_size
        self._tenants, self._capacity_blocks = tenants, capacity_blocks

    def of(self, tenant: str) -> Budget:
        most, all_field = int(self._config.max_kept_share * self._capacity_blocks()), "router.max_kept_share"
        if (limit := self._config.max_kept_tokens) is not None and limit // self.block_size < most:
            most, all_field = limit // self.block_size, "router.max_kept_tokens"
        own = self._tenants.max_kept_tokens(tenant, most * self.block_size)
        if own is None:
            return Budget(most, all_field, most, all_field)
        return Budget(own // self.block_size, f"tenants.{tenant}.max_kept_tokens", most, all_field)

    def has_room(self, kept_blocks: int, blocks: int, of_blocks: int) -> bool:
        """Whether a replica of `of_blocks` blocks that keeps `kept_blocks` may keep `blocks` more."""
        return kept_blocks + blocks <= self._config.max_kept_share * of_blocks
