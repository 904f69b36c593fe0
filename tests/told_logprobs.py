"""Log-probabilities in the form in which engines return them."""

import numpy as np

from prefillshare.kvshare.logprobs import Logprobs


def logprobs(*entries: tuple[int, float], rank: int = 1) -> Logprobs:
    """Those of one generated token. `entries`: (token, log-probability), first of the token itself, then of the likeliest."""
    tokens, values = zip(*entries, strict=True)
    return Logprobs(np.array([tokens], np.int32), np.array([values], np.float32), np.array([rank], np.int32))
