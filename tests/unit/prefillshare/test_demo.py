"""The demo asks its decoders as they were trained to be asked, and knows a right answer."""

import io
import json

from rich.console import Console

from prefillshare import demo
from prefillshare.client import TurnResult
from prefillshare.finetuning.tasks import arithmetic, tool_calls
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb


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


def test_the_table_is_whole_in_80_columns():
    usage = pb.Usage(
        prompt_tokens=8192, cached_tokens=8000, computed_tokens=8191, kv_bytes_transferred=2**30, time_to_first_token_s=12.345,
        total_s=13, completion_tokens=200,
    )  # fmt: skip
    result = TurnResult(text="", token_ids=[], logprobs=[], finish_reason="stop", usage=usage, context_tokens=0)
    rows = [demo.Row(turn, [], result) for turn in demo.TURNS]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo._table(rows))
    shown = console.export_text()
    assert "…" not in shown
    assert "1024.0" in shown
