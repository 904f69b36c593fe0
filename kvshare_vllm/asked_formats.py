"""Formats by the field of the request that they follow from, so that what is wrong with one can be said of that field."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

from pydantic.dataclasses import dataclass
from vllm.sampling_params import StructuredOutputsParams


@dataclass
class AskedFormat(StructuredOutputsParams):
    """Differs from a format of `structured_outputs` in its type only. `field`: of the request."""

    field: ClassVar[str]

    @classmethod
    def of(cls, form: StructuredOutputsParams) -> StructuredOutputsParams:
        return cls(**{one.name: getattr(form, one.name) for one in fields(form) if one.init})


@dataclass
class ToolsFormat(AskedFormat):
    field = "tools"


@dataclass
class ResponseFormat(AskedFormat):
    """Of completions and chats."""

    field = "response_format"


@dataclass
class TextFormat(AskedFormat):
    """Of responses."""

    field = "text.format"


def field_of(asked: StructuredOutputsParams, name: str) -> str:
    """Where a request has what the format has under this name."""
    return asked.field if isinstance(asked, AskedFormat) else f"structured_outputs.{name}"
