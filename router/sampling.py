"""Sampling parameters of the gRPC surface: checked field by field, then given to vLLM's own class."""

from __future__ import annotations

from kvshare.errors import InvalidInput
from kvshare_vllm.sampling import make_sampling_params

# field -> (lowest, highest, lowest allowed itself)
_RANGES = {
    "max_tokens": (1, None, True),
    "temperature": (0, 2, True),
    "top_p": (0, 1, False),
    "top_k": (0, None, True),
    "min_p": (0, 1, True),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "repetition_penalty": (0, 2, False),
    "logprobs": (0, 20, True),
    "min_tokens": (0, None, True),
}
MAX_STOP = 16


def to_sampling_params(message):
    """pb.SamplingParams -> vLLM SamplingParams that streams deltas. Raises InvalidInput naming the field."""
    given = {field.name: value for field, value in message.ListFields()}
    for name, (low, high, closed) in _RANGES.items():
        value = given.get(name)
        if value is None:
            continue
        if not (value >= low if closed else value > low) or (high is not None and value > high):
            edge = "[" if closed else "("
            raise InvalidInput(
                f"{value:g} is out of range",
                field=f"sampling.{name}",
                fix=f"use a value in {edge}{low}, {'...' if high is None else high}{']' if high is not None else ')'}",
            )
    stop = list(given.pop("stop", ()))
    if len(stop) > MAX_STOP or "" in stop:
        raise InvalidInput(
            "a stop text is empty" if "" in stop else f"{len(stop)} stop texts",
            field="sampling.stop",
            fix=f"give at most {MAX_STOP}, none of them empty",
        )
    stop_token_ids = list(given.pop("stop_token_ids", ()))
    given.setdefault("temperature", 0.0)
    try:
        return make_sampling_params(stop=stop, stop_token_ids=stop_token_ids, **given)
    except ValueError as error:
        raise InvalidInput(str(error), field="sampling") from error
