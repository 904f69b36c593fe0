"""Every example of docs/client.md runs as it stands there."""

import asyncio
import re
from pathlib import Path

import pytest
from scripted_router import ScriptedRouter, serving

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parents[4] / "docs/client.md").read_text(), re.S | re.M)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
async def test_an_example_of_the_guide_runs(number, capsys):
    router = ScriptedRouter()
    async with serving(router) as (_, port):
        code = EXAMPLES[number].replace("127.0.0.1:9000", f"127.0.0.1:{port}")
        await asyncio.to_thread(exec, compile(code, "docs/client.md", "exec"), {"__name__": "__main__"})
    assert router.count("CreateSession") == 1
    assert router.count("Generate") >= 1


def test_there_are_examples():
    assert len(EXAMPLES) == 7
