"""Our errors as gRPC statuses, with an ErrorDetail in the trailing metadata."""

from __future__ import annotations

import grpc

from kvshare.errors import PrefillShareError
from protos.prefillshare.v1 import prefillshare_pb2 as pb

ERROR_METADATA = "prefillshare-error-bin"


async def abort(context, error: PrefillShareError) -> None:
    """Does not return."""
    detail = pb.ErrorDetail(
        kind=type(error).__name__,
        message=error.message,
        field=error.field or "",
        fix=error.fix or "",
        retry_after_s=getattr(error, "retry_after_s", 0.0),
    )
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), ((ERROR_METADATA, detail.SerializeToString()),))
