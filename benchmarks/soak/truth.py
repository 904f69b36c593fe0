"""What an undisturbed system would have said: plain transformers, and the same request when all is quiet again."""

from __future__ import annotations

import threading

import torch

from benchmarks.shared.reference_models import TOLERANCE, ReferenceModels
from benchmarks.soak.findings import Findings
from prefillshare.kvshare.config import Deployment


def _chosen_and_best(logits: torch.Tensor, response: list[int]) -> list[tuple[float, float]]:
    """Of each token its log-probability, and that of the likeliest one."""
    rows = logits.log_softmax(-1)
    return list(zip(rows[torch.arange(len(response)), torch.tensor(response)].tolist(), rows.amax(-1).tolist(), strict=True))


class Truth:
    """Threads may ask it at once."""

    def __init__(self, deployment: Deployment):
        self._models, self._lock = ReferenceModels(deployment), threading.Lock()
        for name in self._models.served:
            self._models.decoder(name)

    def problem(
        self, decoder: str, prompt: list[int], tokens: list[int], logprobs: list[float] | None, greedy: bool, own_layers: str
    ) -> str:
        """Why the decoder cannot have said this; empty if it can. `logprobs`: what it said of its tokens; None: nothing.
        `own_layers`: as in the turn's usage."""
        if not tokens:
            return ""
        with self._lock:
            rows = self._models.says(decoder, prompt, tokens, own_layers, pick=_chosen_and_best)
        for place, (chosen, best) in enumerate(rows):
            if greedy and not best - chosen <= TOLERANCE:
                return f"token {place} of {len(tokens)} of {decoder} is not the likeliest, by {best - chosen:.4f}"
            if logprobs is not None and not abs(chosen - logprobs[place]) <= TOLERANCE:
                return f"token {place} of {len(tokens)} of {decoder}: {logprobs[place]:.4f} instead of {chosen:.4f}"
        return ""


def compare(
    truth: Truth, found: Findings, decoder: str, prompt: list[int], tokens: list[int], logprobs: list[float], sampling: dict,
    own_layers: str, where: str = "",
) -> None:  # fmt: skip
    """Count a turn that was answered as right or wrong. `where`: added to what is told."""
    if problem := truth.problem(decoder, prompt, tokens, logprobs, sampling["temperature"] == 0, own_layers):
        found.tell("wrong", problem + where)
    elif len(tokens) != sampling["max_tokens"]:
        found.tell("wrong", f"{decoder} said {len(tokens)} tokens instead of {sampling['max_tokens']}{where}")
    else:
        found.add(right=1)
