"""How many layers of a prompt a decoder computes itself, if it has a choice (DroidSpeak, arXiv 2411.02820, section 4.4).

With more layers the answer is closer to the decoder's own, and its first token comes later. All groups of layers that a decoder
is configured with are good enough. Each turn takes the largest of them with which its first token is expected in time:
 1. The decision is made when the prefill has ended, because the turn's waiting time is known then.
 2. The time still needed is the number of tokens that no decode replica has for that group, times the group's layers, times the
    seconds per token and layer lately measured in that pool, waiting in the engine included. So groups become smaller under
    load, and grow again after it.
 3. A turn that is taken up again keeps its group: the tokens it has so far were made with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.router.clock import now
from prefillshare.router.service_rate import MeanRatio

#: With fewer tokens, a measurement shows the cost of a call rather than that of the layers.
LEAST_TOKENS = 32


class LayerChoice:
    def __init__(self, clock: Callable[[], float] = now):
        #: Pool -> seconds per token and layer.
        self._rates: dict[str, MeanRatio] = defaultdict(lambda: MeanRatio(clock))

    def choose(
        self, decoder: Decoder, tokens: int, spent_s: float, cached_tokens: Callable[[LayerGroup | None], int]
    ) -> LayerGroup | None:
        """The group for a prefix of `tokens` tokens, `spent_s` seconds after the turn came. `cached_tokens`: group -> tokens of
        the prefix that the best decode replica has."""
        rate, objective = self._rates[decoder.pool].value, decoder.ttft_objective_s
        if rate is None or objective is None:
            return decoder.own_layers[0]
        for group in decoder.own_layers:
            work = (tokens - cached_tokens(group)) * len(group or ())
            if spent_s + work * rate <= objective:
                return group
        return decoder.own_layers[-1]

    def took(self, pool: str, tokens: int, group: LayerGroup | None, seconds: float) -> None:
        """Note the seconds from a decode call to its first token. `tokens`: how many went through the layers of `group`."""
        if group and tokens >= LEAST_TOKENS:
            self._rates[pool].add(seconds, tokens * len(group))
