"""A format that follows from a request's tools, so that what is wrong with it can be said of them."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from vllm.sampling_params import StructuredOutputsParams


@dataclass
class ToolsFormat(StructuredOutputsParams):
    """Differs from other formats in its type only."""
