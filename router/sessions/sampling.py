"""What a turn over gRPC asks of sampling, as fields of a chat completion, which the HTTP surface reads with the same class and
the same checks. What is out of range is refused here, with the range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.sampling import SamplingParams
from prefillshare.kvshare_vllm.surface.chat_request import chat_request, sampling_of
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

# field -> (lowest, highest, whether the lowest itself is allowed)
_RANGES = {
    "max_tokens": (1, None, True),
    "temperature": (0, 2, True),
    "top_p": (0, 1, False),
    "top_k": (-1, None, True),
    "min_p": (0, 1, True),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "repetition_penalty": (0, None, False),
    "logprobs": (-1, None, True),  # the decoder's pool says how many at most
    "min_tokens": (0, None, True),
    "n": (1, None, True),
    "stream_interval": (1, None, True),
}
MAX_STOP = 16
#: Fields of the oneof `format`, by their names in structured_outputs.
_FORMATS = {"json": "json_schema", **{name: name for name in ("json_object", "regex", "choice", "grammar", "structural_tag")}}
#: Field of a chat completion -> field of GenerateRequest, where it is not the same name in `sampling`.
_NAMES = {
    "top_logprobs": "sampling.logprobs",
    "max_completion_tokens": "sampling.max_tokens",
    "response_format": "sampling.json_schema",
    "structured_outputs": "sampling.structural_tag",  # the only one of which vLLM says no more than that
}
_NAMES = {f"structured_outputs.{theirs}": f"sampling.{ours}" for theirs, ours in _FORMATS.items()} | _NAMES
#: Fields within `repetition_detection`.
_OF_REPETITION = frozenset(pb.RepetitionDetection.DESCRIPTOR.fields_by_name)


def fields_of(message: pb.SamplingParams) -> dict[str, Any]:
    """Fields of a chat completion, but for max_tokens. Raises InvalidInput naming the message's field."""
    given = {field.name: value for field, value in message.ListFields()}
    for name, bounds in _RANGES.items():
        if name in given:
            _check_range(name, given[name], *bounds)
    given.pop("max_tokens", None)
    stop = list(given.get("stop", ()))
    if len(stop) > MAX_STOP or "" in stop:
        raise InvalidInput(
            "a stop text is empty" if "" in stop else f"{len(stop)} stop texts",
            field="sampling.stop",
            fix=f"give at most {MAX_STOP}, none of them empty",
        )
    given.setdefault("temperature", 0.0)
    check_min_tokens(given.get("min_tokens", 0), message.max_tokens or None)
    if given.get("n", 1) > 1 and not given["temperature"]:
        raise InvalidInput(
            f"{given['n']} responses would all be the same at temperature 0", field="sampling.n", fix="set sampling.temperature"
        )
    if "logprobs" in given:
        given["logprobs"], given["top_logprobs"] = True, given["logprobs"]
    if kind := message.WhichOneof("format"):
        value = given.pop(kind)
        name = next(theirs for theirs, ours in _FORMATS.items() if ours == kind)
        given["structured_outputs"] = {name: list(value.texts) if isinstance(value, pb.Choice) else value}
    if "logit_bias" in given:
        given["logit_bias"] = {str(token): bias for token, bias in given["logit_bias"].items()}
    if repetition := given.get("repetition_detection"):
        given["repetition_detection"] = {field.name: getattr(repetition, field.name) for field in repetition.DESCRIPTOR.fields}
    return {name: list(value) if name in _LISTS else value for name, value in given.items()}


_LISTS = frozenset({"stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logprob_token_ids"})


def to_sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """vLLM's, for streamed deltas. Raises InvalidInput naming the field."""
    with named_as_sent():
        return sampling_of(chat_request(fields_of(message)), message.max_tokens or None)


def check_min_tokens(asked: int, max_tokens: int | None) -> None:
    """Raises InvalidInput if a turn may not generate as many tokens as are asked for. `max_tokens`: None if it is not known."""
    if max_tokens is not None and asked > max_tokens:
        raise InvalidInput(
            f"{asked} is more than the {max_tokens} tokens this turn may generate",
            field="sampling.min_tokens",
            fix="ask for fewer, or raise sampling.max_tokens",
        )


@contextmanager
def named_as_sent(message: str | None = "sampling") -> Iterator[None]:
    """Within this context, an InvalidInput that names a field of a chat completion is changed to name the field of
    GenerateRequest, and one that names no field to name `message`."""
    try:
        yield
    except InvalidInput as error:
        error.field = _as_sent(error.field) if error.field else (_spoken_of(error.message) or message)
        raise


def _as_sent(field: str) -> str:
    for theirs, ours in _NAMES.items():
        if field == theirs or field.startswith(f"{theirs}."):
            return ours
    if field.partition(".")[0] in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        return f"sampling.{field}"
    return field


def _spoken_of(text: str) -> str | None:
    """The field that vLLM's text begins with, where it says no more."""
    word = text.partition(" ")[0].strip("`',")
    if word in _OF_REPETITION:
        return "sampling.repetition_detection"
    return f"sampling.{word}" if word in pb.SamplingParams.DESCRIPTOR.fields_by_name else None


def _check_range(name: str, value: float, low: float, high: float | None, closed: bool) -> None:
    if math.isfinite(value) and (value >= low if closed else value > low) and (high is None or value <= high):
        return
    edge = "[" if closed else "("
    raise InvalidInput(
        f"{value:g} is out of range",
        field=f"sampling.{name}",
        fix=f"use a value in {edge}{low}, {'...' if high is None else high}{']' if high is not None else ')'}",
    )
