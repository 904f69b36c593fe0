"""Our errors as gRPC statuses, with details in the standard way: a google.rpc.Status that holds an ErrorDetail.

Where they apply, it also holds google.rpc's own BadRequest and RetryInfo, which clients may understand. The trailing metadata
say besides how the tenant stands against its limits (kvshare/rate_limits.py).
Seam: https://github.com/grpc/proposal/blob/master/L44-python-rich-status.md
"""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from prefillshare.kvshare import rate_limits
from prefillshare.kvshare.errors import PrefillShareError
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

#: Longest text in a status. Clients accept 8 KiB of metadata by default, and the message is in it three times.
MOST_CHARS = 1_000


async def abort(context, error: PrefillShareError) -> None:
    """End the call with the error's status. Does not return."""
    retry_after_s = error.retry_after_s
    status = status_pb2.Status(code=grpc.StatusCode[error.grpc_code].value[0], message=_cut(str(error)))
    detail = pb.ErrorDetail(
        kind=type(error).__name__,
        message=_cut(error.message),
        field=error.field or "",
        fix=_cut(error.fix or ""),
        retry_after_s=retry_after_s,
    )
    status.details.add().Pack(detail)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=detail.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after_s:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        status.details.add().Pack(info)
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, (*rich.trailing_metadata, *rate_limits.headers_now()))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]} ..."
