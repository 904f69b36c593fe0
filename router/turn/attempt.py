"""What a turn's attempts hand on to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvshare.layer_group import LayerGroup
from kvshare.priority import RESUMED
from router.admission.grant import Grant
from router.pools.route import Route
from router.turn.prefix import Prefix


@dataclass
class Attempt:
    """The one under way, and what is known from those before it."""

    route: Route
    #: What the turn holds of the pool's room; given back when it ends.
    grant: Grant
    prefix: Prefix
    generated: list[int] = field(default_factory=list)
    number: int = 0
    failures: int = 0
    #: Replicas that failed this turn.
    avoid: set[str] = field(default_factory=set)
    #: Its decode call has given no token yet.
    is_silent: bool = False
    #: Where the KV the decode engine loads comes from.
    source: str = ""
    #: When its lease ends, at the latest (time.perf_counter).
    lease_ends: float = math.inf
    #: Layers of the prefix that the decoder computes itself; `is_chosen` once that has been decided.
    own_layers: LayerGroup | None = None
    is_chosen: bool = False

    @property
    def priority(self) -> int:
        """In the engines' own queues: the turn's, as in the router's."""
        return RESUMED if self.number else self.grant.demand.priority
