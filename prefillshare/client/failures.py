"""gRPC's errors as the exceptions of kvshare.errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError

from prefillshare.kvshare import errors
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import rpc_status_pb2 as rpc_pb

_DETAILS = "grpc-status-details-bin"
_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: errors.ConnectionLost,  # the router's own has details
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.ABORTED: errors.Conflict,
}


@contextmanager
def typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise typed(error) from error


def typed(error: grpc.RpcError) -> errors.PrefillShareError:
    """If the server hints when trying again may help, the error has `retry_after_s`."""
    detail, hint_s = _details(error)
    if detail is not None:
        found = getattr(errors, detail.kind, None)
        kind = found if isinstance(found, type) and issubclass(found, errors.PrefillShareError) else errors.PrefillShareError
        typed_error = kind(detail.message, field=detail.field or None, fix=detail.fix or None)
        hint_s = hint_s or detail.retry_after_s
    elif error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
        # gRPC itself refuses a message that is too large, before the router sees it: waiting would not help.
        return errors.InvalidInput(error.details() or "", fix="send less, or raise router.max_request_bytes")
    else:
        kind = _BY_CODE.get(error.code(), errors.PrefillShareError)
        typed_error = kind(f"{error.code().name}: {error.details()}")
    if hint_s:
        typed_error.retry_after_s = hint_s
    return typed_error


def was_not_sent(error: BaseException | None) -> bool:
    """Whether no server has seen the call, because there is no connection to one. `error`: gRPC's."""
    if not isinstance(error, grpc.RpcError) or error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    return (error.details() or "").startswith("failed to connect to all addresses")


def _details(error: grpc.RpcError) -> tuple[pb.ErrorDetail | None, float]:
    """The router's own detail, and the standard's hint in seconds, which a proxy may give, too."""
    packed = dict(error.trailing_metadata() or ()).get(_DETAILS, b"")
    detail, hint_s = None, 0.0
    try:
        for one in rpc_pb.RpcStatus.FromString(packed).details:
            match one.type_url.rpartition("/")[2]:
                case "google.rpc.RetryInfo":
                    hint_s = rpc_pb.RpcRetryInfo.FromString(one.value).retry_delay.ToTimedelta().total_seconds()
                case pb.ErrorDetail.DESCRIPTOR.full_name:
                    detail = pb.ErrorDetail.FromString(one.value)
    except DecodeError:  # not the standard's; code and text remain
        return None, 0.0
    return detail, hint_s
