"""The oracle for a running system: takes turns through the gRPC client and compares every log-probability."""

from __future__ import annotations

from functools import cached_property

from benchmarks.shared.reference_models import TOLERANCE, ReferenceModels
from prefillshare import reference
from prefillshare.client import RemoteSession, TurnResult


class Oracle(ReferenceModels):
    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.deployment.base.model)

    def diff(
        self,
        name: str,
        prompt: list[int],
        tokens: list[int],
        logprobs: list[float],
        mode: str | None = None,
        own_layers: str = "",
    ) -> float:
        """Largest difference from the reference of `mode` (default: the decoder's). `own_layers`: as in the turn's usage."""
        if mode:
            expected = getattr(reference, mode)(self.base, self.decoder(name), prompt, tokens)
        else:
            expected = self.says(name, prompt, tokens, own_layers)
        return reference.max_abs_diff(logprobs, expected)

    def turn(
        self, session: RemoteSession, name: str, *, suffix_ids: list[int] | None = None, **kwargs
    ) -> tuple[TurnResult, list[int]]:
        """Take a turn and check it. Returns the result and the prompt the decoder saw."""
        if suffix_ids:
            kwargs["suffix_token_ids"] = suffix_ids
        result = session.turn(name, logprobs=0, **kwargs)
        kept = list(session.get(with_token_ids=True).token_ids)
        prompt = kept[: len(kept) - len(result.token_ids)] + (suffix_ids or [])
        assert kept[len(kept) - len(result.token_ids) :] == result.token_ids
        assert result.usage.prompt_tokens == len(prompt)
        own_layers = result.usage.own_layers
        assert self.diff(name, prompt, result.token_ids, result.logprobs, own_layers=own_layers) <= TOLERANCE
        return result, prompt

