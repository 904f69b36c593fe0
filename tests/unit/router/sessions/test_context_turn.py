"""A turn behind a context asks the engine for what was laid out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prefillshare.kvshare.caller import ANONYMOUS
from prefillshare.kvshare.errors import Internal
from prefillshare.router.sessions.context_turn import ContextTurn, LaidOut


async def test_a_prompt_that_is_not_what_was_laid_out_is_neither_run_nor_committed():
    committed = []
    turn = ContextTurn(None, None, {}, ("", "s"), ANONYMOUS, LaidOut([1, 2, 3], [1, 2, 3, 4]), committed.append)
    with pytest.raises(Internal, match="2 prompt tokens are not the 4 that were laid out"):
        await anext(turn.outputs(SimpleNamespace(prompt_token_ids=[1, 2]), "planner"))
    assert committed == []
