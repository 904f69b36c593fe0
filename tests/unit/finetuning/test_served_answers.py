"""Suites asked over gRPC: a router in a script stands for the deployment."""

import asyncio
import json

import pytest
from scripted_router import ScriptedRouter, serving
from typer.testing import CliRunner

from prefillshare.cli import app
from prefillshare.client import Client
from prefillshare.finetuning.evaluate import served_answers
from prefillshare.finetuning.tasks import TASKS
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

pytestmark = pytest.mark.slow

WITH_TOOLS = TASKS["bfcl_simple_python_tools"]
RIGHT = pb.ToolCall(id="1", name="calculate_triangle_area", arguments='{"base": 10, "height": 5}')
CUT_OFF = pb.ToolCall(id="1", name="calculate_triangle_area", arguments='{"base": 10, "hei')


def router(*calls: pb.ToolCall, says: str = "") -> ScriptedRouter:
    made = ScriptedRouter()
    made.pieces, made.calls = [pb.GenerateResponse(text=says)] * bool(says), list(calls)
    return made


async def answers_of(made: ScriptedRouter, task, count: int = 1) -> list[str]:
    def ask(port: int) -> list[str]:
        with Client(f"127.0.0.1:{port}") as client:
            return served_answers(client, "planner", task, task.questions()[:count], at_once=1)

    async with serving(made) as (_, port):
        return await asyncio.to_thread(ask, port)


async def test_tools_are_offered_as_the_question_has_them_and_each_session_is_deleted():
    made, question = router(RIGHT), WITH_TOOLS.questions()[0]
    await answers_of(made, WITH_TOOLS)
    (asked,) = [request for request in made.asked if isinstance(request, pb.GenerateRequest)]
    (tool,), function = asked.tools, question.tools[0]["function"]
    assert (tool.name, json.loads(tool.parameters)) == (function["name"], function["parameters"])
    assert [message.content for message in asked.input.messages.messages] == [m["content"] for m in question.messages]
    assert (asked.sampling.max_tokens, asked.sampling.temperature) == (WITH_TOOLS.max_tokens, 0.0)
    assert made.turns == {}


async def test_a_suite_without_tools_offers_none_and_its_answer_is_the_text():
    made = router(says="It is 7.\n#### 7")
    assert await answers_of(made, TASKS["arithmetic"]) == ["It is 7.\n#### 7"]
    assert [list(request.tools) for request in made.asked if isinstance(request, pb.GenerateRequest)] == [[]]


@pytest.mark.parametrize(
    ("calls", "says", "right"),
    [
        ((RIGHT,), "", True),
        ((RIGHT,), "I call it.", True),
        ((RIGHT, CUT_OFF), "", True),
        ((pb.ToolCall(name=RIGHT.name, arguments='{"base": 10, "height": 6}'),), "", False),
        ((pb.ToolCall(name="area", arguments=RIGHT.arguments),), "", False),
        ((CUT_OFF,), "", False),
        ((), "I would call it.", False),
    ],
)
async def test_calls_that_the_deployment_has_parsed_are_judged_as_those_in_text(calls, says, right):
    (answer,) = await answers_of(router(*calls, says=says), WITH_TOOLS)
    assert WITH_TOOLS.questions()[0].is_right(answer) is right


async def test_eval_asks_a_deployment_suites_with_tools():
    async with serving(router(RIGHT)) as (_, port):
        asked = ["eval", WITH_TOOLS.name, "--served", f"127.0.0.1:{port}", "--name", "planner", "--limit", "1"]
        result = await asyncio.to_thread(CliRunner().invoke, app, asked)
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert (figures[WITH_TOOLS.name]["accuracy"], figures[WITH_TOOLS.name]["asked"]) == (1.0, 1)
