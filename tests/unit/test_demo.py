"""The demo asks its decoders as they were trained to be asked, and knows a right answer."""

import json

from finetuning.tasks import arithmetic, tool_calls
from prefillshare import demo


def test_its_instructions_are_those_the_adapters_were_trained_with():
    assert (demo.SOLVE, demo.CALL) == (arithmetic.SYSTEM, tool_calls.SYSTEM)


def test_every_specialist_has_something_to_be_right_about():
    asked = {turn.decoder: turn for turn in demo.TURNS}
    assert asked.keys() == {"arithmetic", "tools", "base"}
    assert asked["base"].wanted is None
    assert all(turn.wanted is not None for turn in demo.TURNS if turn.decoder != "base")


def test_an_answer_is_right_however_it_is_put():
    sum_, call = demo.TURNS[0], demo.TURNS[1]
    assert sum_.is_right(f"220 - 132 = {sum_.wanted}\n#### {sum_.wanted}")
    assert sum_.is_right(f"There are {sum_.wanted}.00 seats")
    assert not sum_.is_right(f"{sum_.wanted} + 1 = 89")
    assert not sum_.is_right("many")
    text = json.dumps(call.wanted)
    assert call.is_right(f"<tool_call>\n{text}\n</tool_call>")
    assert call.is_right(text)
    assert not call.is_right(text.replace("3", "4"))
    assert not call.is_right("I hold the seats.")
    assert not call.is_right('{"name": ')
