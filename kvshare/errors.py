"""The one exception tree, and its one mapping to gRPC status codes and HTTP statuses.

    PrefillShareError
    |-- InvalidInput            the request is wrong; sending it again is no use
    |   |-- ConfigError         a deployment file or a decoder's files are wrong, found before an engine starts
    |   |-- ContractMismatch    base and decoder (or two engines) do not agree on what KV means (R4)
    |-- Unauthenticated         no API key, or one that no tenant has
    |-- PermissionDenied        the key's tenant may not do this
    |-- NotFound                unknown decoder or session
    |   |-- SessionDamaged      what the store holds under the session's name is no session
    |-- Conflict                the session has changed meanwhile, or another turn holds it
    |   |-- AlreadyExists       the name of a new session is in use
    |   |-- SessionBusy         another turn runs on the session
    |-- Overloaded              a queue is full; carries a retry hint
    |   |-- OverLimit           the caller's tenant asks for more than it may; others are not concerned
    |-- DeadlineExceeded        the deadline passed before the turn ended
    |-- Unavailable             a replica or the session store is gone or not ready; trying again may help
    |   |-- ConnectionLost      the router that took the call is gone; a turn may have been committed before
    |   |   |-- AnswerLost      the turn was committed, but its answer did not arrive; taking it again would be a second turn
    |   |-- EngineStartError    an engine did not start; carries the end of its log
    |   |-- PrefixLost          a decode engine no longer holds a request's shared prefix (R3); resumable
    |   |-- ReplicaLost         the replica that served a turn is gone or does not answer; resumable elsewhere
    |-- Internal                a broken invariant of ours
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

#: What a client is told of an unforeseen error, whose own text is for the log only: it may reveal internals.
UNFORESEEN = "the server failed; its log says why"


class GrpcCode(StrEnum):
    """The gRPC status names we use (grpc.StatusCode members)."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    ABORTED = "ABORTED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


class ResumeReason(StrEnum):
    """Why a turn had to be taken up again before its end. Every value is safe to resume from."""

    #: The decode engine gave the request back: it needed the blocks, or could not load the shared prefix.
    PREEMPTED = "preempted"
    KV_LOAD_FAILED = "kv_load_failed"
    #: The replica's process or engine has died, or Serve has stopped it.
    GONE = "gone"
    #: The replica lives but does not answer, or its engine does not step.
    WEDGED = "wedged"
    #: The replica answered that it cannot serve the turn, or its stream ended early.
    UNAVAILABLE = "unavailable"


class PrefillShareError(Exception):
    """Base of all errors we raise on purpose.

    `field` names the offending field of a request, config or file, if there is one; `fix` says what to do.
    """

    #: Seconds after which trying again may help; 0: no hint.
    retry_after_s: float = 0.0
    grpc_code = GrpcCode.INTERNAL
    http_status = 500

    def __init__(self, message: str, *, field: str | None = None, fix: str | None = None):
        super().__init__(message)
        self.message, self.field, self.fix = message, field, fix

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        return f"{text} (fix: {self.fix})" if self.fix else text

    def __reduce__(self):
        # Errors cross process borders by pickle; keyword fields must survive.
        return _rebuild, (type(self), self.message, {k: v for k, v in self.__dict__.items() if k != "message"})


def _rebuild(cls: type[PrefillShareError], message: str, state: dict) -> PrefillShareError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.message = message
    error.__dict__.update(state)
    return error


class InvalidInput(PrefillShareError):
    grpc_code, http_status = GrpcCode.INVALID_ARGUMENT, 400


class ConfigError(InvalidInput):
    """A deployment file, a model folder or a decoder's files cannot be served as they are."""


class ContractMismatch(InvalidInput):
    """Two sides mean different things by the same KV bytes. Both values are named (R4)."""

    grpc_code, http_status = GrpcCode.FAILED_PRECONDITION, 409


class Unauthenticated(PrefillShareError):
    grpc_code, http_status = GrpcCode.UNAUTHENTICATED, 401


class PermissionDenied(PrefillShareError):
    grpc_code, http_status = GrpcCode.PERMISSION_DENIED, 403


class NotFound(PrefillShareError):
    grpc_code, http_status = GrpcCode.NOT_FOUND, 404


class SessionDamaged(NotFound):
    """The session is lost. Deleting it frees its name."""


class Conflict(PrefillShareError):
    grpc_code, http_status = GrpcCode.ABORTED, 409


class AlreadyExists(Conflict):
    """The name is in use."""

    grpc_code = GrpcCode.ALREADY_EXISTS


class SessionBusy(Conflict):
    """Another turn holds the session; when it has ended, the same call succeeds."""


class Overloaded(PrefillShareError):
    """A bounded queue is full. `retry_after_s`: a hint for the client."""

    grpc_code, http_status = GrpcCode.RESOURCE_EXHAUSTED, 429

    def __init__(self, message: str, *, retry_after_s: float = 1.0, **kw):
        super().__init__(message, **kw)
        self.retry_after_s = retry_after_s


class OverLimit(Overloaded):
    """The caller's tenant has begun, has in progress, or keeps as much as the keys file lets it."""


class DeadlineExceeded(PrefillShareError):
    grpc_code, http_status = GrpcCode.DEADLINE_EXCEEDED, 504


class Unavailable(PrefillShareError):
    grpc_code, http_status = GrpcCode.UNAVAILABLE, 503


class ConnectionLost(Unavailable):
    """Raised by the client: the connection broke before an answer. The session shows whether the turn was committed."""


class AnswerLost(ConnectionLost):
    """Raised by the client: the session shows that the turn was committed, but the connection broke before the answer had
    come. The session's context holds the answer."""


class EngineStartError(Unavailable):
    """An engine did not start. `log_tail` is the end of its log."""

    def __init__(self, message: str, *, log_tail: str = "", **kw):
        super().__init__(message, **kw)
        self.log_tail = log_tail

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n--- end of the engine's log ---\n{self.log_tail}" if self.log_tail else text


class PrefixLost(Unavailable):
    """The decode engine gave the request back: its shared prefix must come from the prefill pool again (R1, R3)."""

    def __init__(self, message: str, *, reason: ResumeReason, **kw):
        super().__init__(message, **kw)
        self.reason = reason


class ReplicaLost(Unavailable):
    """The replica that served a turn is gone or does not answer; nothing it had sent is lost."""

    def __init__(self, message: str, *, reason: ResumeReason = ResumeReason.GONE, **kw):
        super().__init__(message, **kw)
        self.reason = reason


class Internal(PrefillShareError):
    pass


@contextmanager
def about(field: str) -> Iterator[None]:
    """Within this context, an InvalidInput that names no field is about this one."""
    try:
        yield
    except InvalidInput as error:
        error.field = error.field or field
        raise
