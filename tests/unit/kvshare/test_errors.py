"""The exception tree: every class crosses process borders whole and has its gRPC and HTTP codes."""

import pickle
import re

import pytest

from prefillshare.kvshare import errors
from prefillshare.kvshare.errors import GrpcCode, PrefillShareError, ResumeReason

EXTRA = {
    errors.Overloaded: {"retry_after_s": 2.5},
    errors.OverLimit: {"retry_after_s": 2.5},
    errors.EngineStartError: {"log_tail": "last line"},
    errors.PrefixLost: {"reason": ResumeReason.KV_LOAD_FAILED},
    errors.ReplicaLost: {"reason": ResumeReason.WEDGED},
}
CODES = {
    "PrefillShareError": ("INTERNAL", 500),
    "InvalidInput": ("INVALID_ARGUMENT", 400),
    "ConfigError": ("INVALID_ARGUMENT", 400),
    "ContractMismatch": ("FAILED_PRECONDITION", 409),
    "Unauthenticated": ("UNAUTHENTICATED", 401),
    "PermissionDenied": ("PERMISSION_DENIED", 403),
    "NotFound": ("NOT_FOUND", 404),
    "SessionDamaged": ("NOT_FOUND", 404),
    "Conflict": ("ABORTED", 409),
    "AlreadyExists": ("ALREADY_EXISTS", 409),
    "SessionBusy": ("ABORTED", 409),
    "Overloaded": ("RESOURCE_EXHAUSTED", 429),
    "OverLimit": ("RESOURCE_EXHAUSTED", 429),
    "DeadlineExceeded": ("DEADLINE_EXCEEDED", 504),
    "Unavailable": ("UNAVAILABLE", 503),
    "ConnectionLost": ("UNAVAILABLE", 503),
    "AnswerLost": ("UNAVAILABLE", 503),
    "EngineStartError": ("UNAVAILABLE", 503),
    "PrefixLost": ("UNAVAILABLE", 503),
    "ReplicaLost": ("UNAVAILABLE", 503),
    "Internal": ("INTERNAL", 500),
}


def tree(cls=PrefillShareError) -> list[type[PrefillShareError]]:
    ours = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
    return [cls, *(grandchild for child in ours for grandchild in tree(child))]


def test_every_class_has_the_grpc_and_http_code_clients_rely_on():
    assert {cls.__name__: (str(cls.grpc_code), cls.http_status) for cls in tree()} == CODES


def test_codes_are_names_of_grpc():
    # grpc.StatusCode's names, kept here so that the test needs no grpc.
    assert {str(code) for code in GrpcCode} == {grpc for grpc, _ in CODES.values()}


def test_tree_in_the_docstring_is_the_tree():
    drawn, path = {}, []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"    ((?:\|   )*)(\|-- )?(\w+)", line):
            depth = len(match[1]) // 4 + bool(match[2])
            path[depth:] = [match[3]]
            drawn[match[3]] = path[depth - 1] if depth else None
    real = {cls.__name__: cls.__base__.__name__ if cls is not PrefillShareError else None for cls in tree()}
    assert drawn == real


@pytest.mark.parametrize("cls", tree(), ids=lambda cls: cls.__name__)
def test_pickling_keeps_every_field(cls):
    error = cls("it broke", field="decode.0", fix="mend it", **EXTRA.get(cls, {}))
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert vars(back) == vars(error)
    assert str(back) == str(error)
    assert back.args == error.args == ("it broke",)
    assert EXTRA.get(cls, {}).items() <= vars(back).items()


@pytest.mark.parametrize(
    ("field", "fix", "text"),
    [
        (None, None, "it broke"),
        ("base.model", None, "base.model: it broke"),
        (None, "mend it", "it broke (fix: mend it)"),
        ("base.model", "mend it", "base.model: it broke (fix: mend it)"),
    ],
)
def test_text_names_field_and_fix(field, fix, text):
    assert str(PrefillShareError("it broke", field=field, fix=fix)) == text


def test_engine_start_error_ends_with_the_engines_log():
    error = errors.EngineStartError("it did not start", log_tail="out of memory")
    assert str(error) == "it did not start\n--- end of the engine's log ---\nout of memory"
    assert str(errors.EngineStartError("it did not start")) == "it did not start"


def test_overloaded_hints_at_a_second_unless_told_otherwise():
    assert errors.Overloaded("full").retry_after_s == 1.0
