"""What one turn cost, as reported to clients, logs and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TurnUsage:
    """What one turn cost. Times in seconds, measured at the router."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Prompt tokens that the prefill side found in its cache, and those that it had to compute; together all tokens prefilled.
    cached_tokens: int = 0
    computed_tokens: int = 0
    #: Tokens at the prompt's end that the decoder computes itself: with the two above the whole prompt, if it was prefilled
    #: once.
    own_tokens: int = 0
    #: What the router's index had predicted for cached_tokens.
    predicted_tokens: int = 0
    kv_bytes: int = 0
    #: How often the turn was taken up again: after a preemption, a failed load or the loss of a replica.
    resumes: int = 0
    #: Time that the turn waited for room before the prefill.
    queue_s: float = 0.0
    prefill_s: float = 0.0
    #: Load times at the decode engine, as in TokenChunk.
    load_s: float = 0.0
    rest_load_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    prefill_replica: str = ""
    decode_replica: str = ""
    #: Where the missing KV came from and why, like "here: sooner" or "there: objective" (router/turn/decider.py); "" if nothing
    #: is shared.
    prefill_choice: str = ""
    #: Layers that the decoder computed itself over the prompt, like "4-9"; "": none.
    own_layers: str = ""

    def report(self) -> dict[str, int | float | str]:
        """The usage as clients see it, with the names and meanings of message Usage (protos/prefillshare/v1)."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "computed_tokens": self.computed_tokens,
            "own_tokens": self.own_tokens,
            "kv_bytes_transferred": self.kv_bytes,
            "time_to_first_token_s": self.ttft_s,
            "total_s": self.total_s,
            "prefill_s": self.prefill_s,
            "resumes": self.resumes,
            "prefill_replica": self.prefill_replica,
            "decode_replica": self.decode_replica,
            "predicted_tokens": self.predicted_tokens,
            "own_layers": self.own_layers,
            "prefill_choice": self.prefill_choice,
            "kv_load_s": self.load_s,
            "kv_rest_load_s": self.rest_load_s,
        }
