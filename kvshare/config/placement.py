"""The part of the deployment file that says how a replica is chosen."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from prefillshare.kvshare.config.changes import TAKEN_OVER
from prefillshare.kvshare.yaml_tree import Node

Scorer = Literal["work", "prefix", "balance", "session", "fill", "turn"]


class Placement(Node):
    """How a replica is chosen: by a weighted sum of scorers in [0, 1] (router/pools/placement.py)."""

    CHANGE: ClassVar = TAKEN_OVER

    policy: Literal["prefix_aware", "least_loaded", "session_sticky", "round_robin"] = "prefix_aware"
    """Named sets of weights. prefix_aware: for prefill, the replica with the least work left before the first token, cached
    prefixes included; for decode, by load and cached prefix. The other policies are for comparison."""
    prefill_weights: dict[Scorer, float] = Field(default_factory=dict)
    """Your own weights for prefill, instead of the policy's: a mapping from scorers to weights."""
    decode_weights: dict[Scorer, float] = Field(default_factory=dict)
    """Your own weights for decode, instead of the policy's."""

    @field_validator("prefill_weights", "decode_weights")
    @classmethod
    def _some_weight(cls, value: dict[str, float]) -> dict[str, float]:
        if value and (min(value.values()) < 0 or not sum(value.values())):
            raise ValueError(f"weights are at least 0 and not all 0, got {value}")
        return value
