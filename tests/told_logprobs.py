"""Log-probabilities as engines tell them."""

import numpy as np

from prefillshare.kvshare.logprobs import Logprobs


def logprobs(*entries: tuple[int, float], rank: int = 1) -> Logprobs:
    """Of one token, (token, log-probability): itself, then the likeliest."""
    tokens, values = zip(*entries, strict=True)
    return Logprobs(np.array([tokens], np.int32), np.array([values], np.float32), np.array([rank], np.int32))
