"""The part of the deployment file that says how a replica is chosen."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from prefillshare.kvshare.config.changes import TAKEN_OVER
from prefillshare.kvshare.yaml_tree import Node

Scorer = Literal["work", "prefix", "balance", "session", "fill", "turn"]


class Placement(Node):
    """How a replica is chosen: scorers in [0, 1], weighted (router/pools/placement.py)."""

    CHANGE: ClassVar = TAKEN_OVER

    policy: Literal["prefix_aware", "least_loaded", "session_sticky", "round_robin"] = "prefix_aware"
    """Weights by name. prefix_aware: where the least work is left before the first token, cached prefixes counted, and
    for decode by load and cached prefix; the others are for comparison."""
    prefill_weights: dict[Scorer, float] = Field(default_factory=dict)
    """Weights of one's own for prefill, instead of the policy's: scorer -> weight."""
    decode_weights: dict[Scorer, float] = Field(default_factory=dict)
    """Weights of one's own for decode, instead of the policy's."""

    @field_validator("prefill_weights", "decode_weights")
    @classmethod
    def _some_weight(cls, value: dict[str, float]) -> dict[str, float]:
        if value and (min(value.values()) < 0 or not sum(value.values())):
            raise ValueError(f"weights are at least 0 and not all 0, got {value}")
        return value
