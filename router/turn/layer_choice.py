"""How many layers of a prompt a decoder computes itself, where it may choose (DroidSpeak, arXiv 2411.02820, section 4.4).

The more layers, the nearer the answer is to the decoder's own, and the later its first token. Of the groups that a decoder is
configured with, all good enough, each turn takes the one of most layers with which its first token is expected in time:
 1. The decision falls when the prefill has ended: what the turn has waited is known then.
 2. What is left: tokens that no decode replica has for that group, times its layers, times what a token and layer have lately
    taken in that pool, waiting in the engine included. So under load groups become smaller, and grow again after it.
 3. A turn that is taken up again keeps its group: the tokens it has were made with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.router.clock import now
from prefillshare.router.service_rate import MeanRatio

#: Fewer tokens tell more of a call than of the layers.
LEAST_TOKENS = 32


class LayerChoice:
    def __init__(self, clock: Callable[[], float] = now):
        #: Pool -> seconds per token and layer.
        self._rates: dict[str, MeanRatio] = defaultdict(lambda: MeanRatio(clock))

    def choose(
        self, decoder: Decoder, tokens: int, spent_s: float, cached_tokens: Callable[[LayerGroup | None], int]
    ) -> LayerGroup | None:
        """For a prefix of so many tokens, so long after the turn came. `cached_tokens`: what the best decode replica has."""
        rate, objective = self._rates[decoder.pool].value, decoder.ttft_objective_s
        if rate is None or objective is None:
            return decoder.own_layers[0]
        for group in decoder.own_layers:
            work = (tokens - cached_tokens(group)) * len(group or ())
            if spent_s + work * rate <= objective:
                return group
        return decoder.own_layers[-1]

    def took(self, pool: str, tokens: int, group: LayerGroup | None, seconds: float) -> None:
        """From the decode call to the first token."""
        if group and tokens >= LEAST_TOKENS:
            self._rates[pool].add(seconds, tokens * len(group))
