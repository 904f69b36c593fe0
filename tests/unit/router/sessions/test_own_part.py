"""Where an agent's own part stands, as stores keep it."""

import pytest

from prefillshare.router.sessions.session import OwnPart


@pytest.mark.parametrize("several", [False, True])
def test_an_agents_part_is_read_as_it_was_written(several):
    part = OwnPart(12, "ab" * 32, several)
    assert OwnPart.parsed(str(part)) == part


@pytest.mark.parametrize("text", ["", "+", "12:", "12:+", ":ab", "x:ab"])
def test_what_is_none_is_read_as_none(text):
    assert OwnPart.parsed(text) is None
