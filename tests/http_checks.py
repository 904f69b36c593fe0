"""What Schemathesis checks of each answer besides its own checks; it imports this by SCHEMATHESIS_HOOKS."""

from __future__ import annotations

import schemathesis


@schemathesis.check
def refusals_say_what_is_wrong(ctx, response, case) -> None:
    """In the shape of OpenAI's errors or of Anthropic's, with a text for people."""
    if response.status_code < 400 or response.status_code in (404, 405):
        return
    said = response.json()
    assert isinstance(said, dict), said
    error = said.get("error", {})
    assert isinstance(error, dict), said
    assert error.get("type"), said
    assert len(error.get("message") or "") > 5, said
    for inside in ("Traceback", "site-packages", "object at 0x"):
        assert inside not in response.text, said
