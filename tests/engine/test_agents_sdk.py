"""The OpenAI Agents SDK, unmodified and in the environment of the examples, over the HTTP surface with scripted answers.

What runs is examples/agents_sdk.py, whose agents choose for themselves (--auto). No engine runs.
"""

from __future__ import annotations

import asyncio
import json

import pytest
import pytest_asyncio
import uvicorn
from example_programs import EXAMPLES, PYTHON, turns
from ports import free_port

from benchmarks.chats.surface import ChatSurface

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

OPENING = "<|im_start|>assistant\n"
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def call(name: str, **arguments) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


#: Planner, tool caller; planner, coder; planner.
TO_TOOLS, TO_CODER = call("transfer_to_tools"), call("transfer_to_coder")
FARE = call("fare", route="north", passenger="adult")
ASKED = "How much do 3 adults and 2 residents pay together?"
ASKED_LAST = "Write them a short note with what you have found out."
PLANS = "Hand questions over to those who can answer them, and write notes yourself."
CALLS, SOLVES = "Call the function that answers the question.", "Solve the problem step by step. End with #### and the result."
SUM, NOTE = "3 * 14 + 2 * 7 = 56\n#### 56", "It is 56 euros."


#: Asks once whole and once streamed, and prints how each ends.
CUT_OFF = """
import asyncio, logging, sys
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, set_tracing_disabled
from agents.exceptions import ModelBehaviorError
from openai import AsyncOpenAI

logging.disable()
set_tracing_disabled(True)
model = OpenAIResponsesModel(model="planner", openai_client=AsyncOpenAI(base_url=sys.argv[1], api_key="unused"))
agent = Agent(name="planner", model=model, model_settings=ModelSettings(max_tokens=3))

async def whole():
    await Runner.run(agent, "Count.")

async def streamed():
    run, kinds = Runner.run_streamed(agent, "Count."), []
    try:
        async for event in run.stream_events():
            if event.type == "raw_response_event":
                kinds.append(event.data.type)
    finally:
        print(*kinds[-2:])

async def main():
    for run in (whole, streamed):
        try:
            await run()
        except ModelBehaviorError as error:
            print(error)

asyncio.run(main())
"""


def shown(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surface(smollm):
    surface = ChatSurface(str(smollm), base={"chat_template": "smollm2_tools", "max_model_len": 2048})
    await surface.start()
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(surface.app, port=port, lifespan="off", log_level="warning"))
    serving = asyncio.create_task(server.serve())
    surface.url = f"http://127.0.0.1:{port}/v1"
    yield surface
    server.should_exit = True
    await serving
    await surface.stop()


async def ran(surface: ChatSurface, *words: str) -> str:
    """What the example prints, over answers as scripted."""
    surface.answers, surface.prompts, surface.ids = [TO_TOOLS, FARE, TO_CODER, SUM, NOTE], [], []
    return await printed_by(
        EXAMPLES / "agents_sdk.py", "--base-url", surface.url, "--auto", "--planner", "planner", "--coder", "coder",
        "--tools", surface.base.name, *words,
    )  # fmt: skip


async def printed_by(*command) -> str:
    """In the environment of the examples."""
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(PYTHON, *command, **pipes)
    try:
        out, err = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.kill()
    assert (process.returncode, err.decode()) == (0, "")
    return out.decode()


@pytest.mark.parametrize("api", ["responses", "chat"])
async def test_agents_hand_over_call_tools_and_stream_and_each_goes_on_from_the_whole_context(surface, api):
    printed = await ran(surface, "--api", api)
    taken = turns(printed)
    assert [turn.decoder for turn in taken] == ["planner", surface.base.name, "planner", "coder", "planner"]
    assert [turn.prompt for turn in taken] == [len(ids) for ids in surface.ids]
    assert [turn.where for turn in taken] == ["", "", "streamed", "streamed", "streamed"]
    for text in (SUM, NOTE, "14 euros"):
        assert f"\n{text}\n" in printed

    brief = surface.prompts[0].removeprefix(DEFAULT).partition("<|im_end|>\n")[0].partition("user\n")[2]
    contexts = [DEFAULT + shown("user", brief)]
    contexts.append(contexts[-1] + shown("assistant", TO_TOOLS) + shown("tool", '{"assistant": "tools"}'))
    contexts.append(contexts[-1] + shown("assistant", FARE) + shown("tool", "14 euros") + shown("user", ASKED))
    contexts.append(contexts[-1] + shown("assistant", TO_CODER) + shown("tool", '{"assistant": "coder"}'))
    contexts.append(contexts[-1] + shown("assistant", SUM) + shown("user", ASKED_LAST))
    for prompt, context, own in zip(surface.prompts, contexts, (PLANS, CALLS, PLANS, SOLVES, PLANS), strict=True):
        assert prompt.startswith(context + "<|im_start|>system\n")
        assert prompt.removeprefix(context).endswith(own + "<|im_end|>\n" + OPENING)
        assert prompt.removeprefix(context).count("<|im_start|>") == 2  # its own part, and the answer's opening


async def test_a_response_that_is_cut_off_ends_a_run_as_openais_does(surface):
    surface.answers = ["One, two, three, four."]
    why = "status=incomplete; incomplete_details=IncompleteDetails(reason='max_output_tokens')."
    told = f"Responses stream ended with terminal event `response.incomplete`. {why}"
    whole, events, streamed = (await printed_by("-c", CUT_OFF, surface.url)).splitlines()
    assert whole == streamed == told
    assert events == "response.output_item.done response.incomplete"
