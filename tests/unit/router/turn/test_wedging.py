"""Which turns go on where an engine has stopped under them."""

from types import SimpleNamespace

import pytest

from prefillshare.kvshare.errors import InvalidInput, PrefixLost, ReplicaLost, ResumeReason
from prefillshare.router.turn.wedging import NoToken, check_may_go_on

PLAIN, WITH_FORMAT = SimpleNamespace(structured_outputs=None), SimpleNamespace(structured_outputs=object())
WEDGED = ReplicaLost("replica d0 does not answer", reason=ResumeReason.WEDGED)
NO_TOKEN = NoToken("no token within 30 s", reason=ResumeReason.KV_LOAD_FAILED)
LOAD_FAILED = PrefixLost("could not load", reason=ResumeReason.KV_LOAD_FAILED)
GONE = ReplicaLost("replica d0 is gone", reason=ResumeReason.GONE)


def turn(sampling, is_silent=True, failures=0) -> SimpleNamespace:
    return SimpleNamespace(call=SimpleNamespace(sampling=sampling), is_silent=is_silent, failures=failures)


@pytest.mark.parametrize(
    ("before", "lost"),
    [
        (turn(WITH_FORMAT), WEDGED),
        (turn(WITH_FORMAT, failures=1), NO_TOKEN),
    ],
)
def test_a_format_that_may_have_stopped_an_engine_is_not_given_to_another(before, lost):
    with pytest.raises(InvalidInput, match="its format may be why") as caught:
        check_may_go_on(before, lost)
    assert caught.value.field == "response_format"


@pytest.mark.parametrize(
    ("before", "lost"),
    [
        (turn(PLAIN, failures=4), WEDGED),
        (turn(PLAIN, failures=4), NO_TOKEN),
        (turn(WITH_FORMAT, is_silent=False), WEDGED),
        (turn(WITH_FORMAT), NO_TOKEN),
        (turn(WITH_FORMAT, failures=4), LOAD_FAILED),
        (turn(WITH_FORMAT, failures=4), GONE),
    ],
)
def test_others_go_on(before, lost):
    assert check_may_go_on(before, lost) is None
