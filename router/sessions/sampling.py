"""Sampling parameters of the gRPC surface: checked field by field, then given to vLLM's own class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.sampling import make_sampling_params
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

# field -> (lowest, highest, whether the lowest itself is allowed)
_RANGES = {
    "max_tokens": (1, None, True),
    "temperature": (0, 2, True),
    "top_p": (0, 1, False),
    "top_k": (0, None, True),
    "min_p": (0, 1, True),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "repetition_penalty": (0, 2, False),
    "logprobs": (0, None, True),  # the decoder's pool says how many at most
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
    check_min_tokens(given.get("min_tokens", 0), given.get("max_tokens"))
    with named_as_sent():
        return make_sampling_params(stop=stop, stop_token_ids=stop_token_ids, **given)


def check_min_tokens(asked: int, max_tokens: int | None) -> None:
    """Raises InvalidInput if a turn may not generate as many tokens as are asked for. `max_tokens`: None if it is not known."""
    if max_tokens is not None and asked > max_tokens:
        raise InvalidInput(
            f"{asked} is more than the {max_tokens} tokens this turn may generate",
            field="sampling.min_tokens",
            fix="ask for fewer, or raise sampling.max_tokens",
        )


@contextmanager
def named_as_sent() -> Iterator[None]:
    """Within this context, an InvalidInput that names a sampling parameter is changed to name the message's field, and one that
    names no field to name the message."""
    try:
        yield
    except InvalidInput as error:
        if error.field is None:
            error.field = "sampling"
        elif error.field in pb.SamplingParams.DESCRIPTOR.fields_by_name:
            error.field = f"sampling.{error.field}"
        raise
