"""Which turns go on where an engine has stopped under them."""

from types import SimpleNamespace

import pytest
from router.turn.attempt import Attempt

from kvshare.errors import InvalidInput, PrefixLost, ReplicaLost, ResumeReason
from router.turn.wedging import NoToken, check_may_go_on

PLAIN, WITH_FORMAT = SimpleNamespace(structured_outputs=None), SimpleNamespace(structured_outputs=object())
WEDGED = ReplicaLost("replica d0 does not answer", reason=ResumeReason.WEDGED)
NO_TOKEN = NoToken("no token within 30 s", reason=ResumeReason.KV_LOAD_FAILED)
LOAD_FAILED = PrefixLost("could not load", reason=ResumeReason.KV_LOAD_FAILED)
GONE = ReplicaLost("replica d0 is gone", reason=ResumeReason.GONE)


def attempt(is_silent=True, failures=0) -> Attempt:
    return Attempt(route=None, grant=None, prefix=None, is_silent=is_silent, failures=failures)


@pytest.mark.parametrize(
    ("sampling", "before", "lost"),
    [
        (WITH_FORMAT, attempt(), WEDGED),
        (WITH_FORMAT, attempt(failures=1), NO_TOKEN),
    ],
)
def test_a_format_that_may_have_stopped_an_engine_is_not_given_to_another(sampling, before, lost):
    with pytest.raises(InvalidInput, match="its format may be why") as caught:
        check_may_go_on(sampling, before, lost)
    assert caught.value.field == "response_format"


@pytest.mark.parametrize(
    ("sampling", "before", "lost"),
    [
        (PLAIN, attempt(failures=4), WEDGED),
        (PLAIN, attempt(failures=4), NO_TOKEN),
        (WITH_FORMAT, attempt(is_silent=False), WEDGED),
        (WITH_FORMAT, attempt(), NO_TOKEN),
        (WITH_FORMAT, attempt(failures=4), LOAD_FAILED),
        (WITH_FORMAT, attempt(failures=4), GONE),
    ],
)
def test_others_go_on(sampling, before, lost):
    assert check_may_go_on(sampling, before, lost) is None
