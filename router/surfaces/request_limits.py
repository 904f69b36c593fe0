"""How large a request may be, on either surface. Larger ones are refused before they are parsed."""

from __future__ import annotations

from dataclasses import dataclass

from prefillshare.kvshare.config import Base, Router

#: Bytes for a request's text and what surrounds it, per token of the model's length. English has four to five per token.
BYTES_PER_TOKEN = 64
LEAST_BODY_BYTES = 1 << 20
#: Names and values of all headers (HTTP) or metadata (gRPC) together.
HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class RequestLimits:
    body_bytes: int
    header_bytes: int = HEADER_BYTES

    @classmethod
    def of(cls, router: Router, base: Base) -> RequestLimits:
        return cls(router.max_request_bytes or max(LEAST_BODY_BYTES, BYTES_PER_TOKEN * base.max_model_len))


LEAST = RequestLimits(LEAST_BODY_BYTES)
