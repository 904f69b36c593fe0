"""Three agents of the OpenAI Agents SDK share one context, although each of them is another model.

A planner takes every question and hands it over: to a tool caller, which looks fares up, or to a coder, which does the sums. In
an ordinary deployment, each handoff makes the next model read the whole conversation anew. Here it computes only what is new:
each turn prints how much of its prompt was found cached.

    prefillshare serve deploy/configs/demo.yaml
    .venv-examples/bin/python examples/agents_sdk.py --api responses
    .venv-examples/bin/python examples/agents_sdk.py --api chat

The SDK is used as it is: a decoder's name is an agent's `model`. Over chat completions, a header names the conversation.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunHooks,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from figures import Where, print_head, print_turn
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

#: The number makes each run a context of its own: a second run would find everything that the first has computed.
BRIEF = f"""Notes {uuid.uuid4().hex[:8]}: we run a ferry line between the mainland and three islands.
A ferry carries up to 220 passengers and 40 cars. People book on the web, at two ticket offices and by phone. A place is held
for ten minutes while somebody pays, and is given back if they do not. Tickets can be changed until one hour before departure.
Residents of the islands pay half. A bicycle counts as a quarter of a car place. In bad weather the line cancels departures:
everybody who booked gets a message, and may choose another departure or their money back.
What does a grown-up pay on the northern route?"""
SUM = "How much do 3 adults and 2 residents pay together?"
NOTE = "Write them a short note with what you have found out."


@function_tool(strict_mode=True)
def fare(route: Literal["north", "south", "east"], passenger: Literal["adult", "resident"]) -> str:
    """What one passenger pays, in euros.

    Args:
        route: The route.
        passenger: Who travels.
    """
    price = {"north": 14, "south": 18, "east": 22}[route]
    return f"{price if passenger == 'adult' else price // 2} euros"


class Turns(RunHooks):
    """Notes what the answers say of their cost. The SDK calls `on_llm_end` after every call of a model, streamed or not."""

    def __init__(self, where: Where):
        self._where, self._noted = where, []

    async def on_llm_end(self, context, agent, response) -> None:
        usage = response.usage
        cached = usage.input_tokens_details.cached_tokens
        self._noted.append((agent.model.model, usage.input_tokens, cached, usage.output_tokens, self._where.last))

    def print_new(self) -> None:
        for turn in self._noted:
            print_turn(*turn)
        self._noted.clear()


def build(args: argparse.Namespace, client: AsyncOpenAI) -> tuple[Agent, Agent, Agent]:
    """Planner, tool caller and coder."""
    kind = OpenAIResponsesModel if args.api == "responses" else OpenAIChatCompletionsModel

    def model(decoder: str):
        return kind(model=decoder, openai_client=client)

    settings = ModelSettings(temperature=0, max_tokens=64, include_usage=True)  # usage also of streamed chat completions
    coder = Agent(
        name="coder",
        handoff_description="Calculates.",
        instructions="Solve the problem step by step. End with #### and the result.",
        model=model(args.coder),
        model_settings=settings,
    )
    tools = Agent(
        name="tools",
        handoff_description="Looks fares up.",
        instructions="Call the function that answers the question.",
        model=model(args.tools),
        model_settings=choosing(settings, args, "fare"),
        tools=[fare],
        tool_use_behavior="stop_on_first_tool",  # the demo's tool caller does nothing but call tools
    )
    planner = Agent(
        name="planner",
        instructions="Hand questions over to those who can answer them, and write notes yourself.",
        model=model(args.planner),
        model_settings=settings,
        handoffs=[tools, coder],
    )
    return planner, tools, coder


def choosing(settings: ModelSettings, args: argparse.Namespace, choice: str) -> ModelSettings:
    """The demo's models are very small, so that they are told which tool to call, and a handoff is a tool, too. Larger models
    choose well by themselves: --auto."""
    return settings if args.auto else settings.resolve(ModelSettings(tool_choice=choice, parallel_tool_calls=False))


async def ask(agent: Agent, question: str, turns: Turns, session: SQLiteSession, streamed: bool) -> None:
    """One run: the agent takes the question, may hand it over, and the last agent answers."""
    if streamed:
        run = Runner.run_streamed(agent, question, hooks=turns, session=session)
        async for event in run.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                print(event.data.delta, end="", flush=True)
        print()
    else:
        run = await Runner.run(agent, question, hooks=turns, session=session)
        print(run.final_output)
    turns.print_new()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="unused", help="needed where the deployment has API keys")
    parser.add_argument("--api", choices=("responses", "chat"), default="responses")
    parser.add_argument("--planner", default="base", help="the planner's decoder")
    parser.add_argument("--coder", default="arithmetic")
    parser.add_argument("--tools", default="tools")
    parser.add_argument("--auto", action="store_true", help="the models choose whom to hand over to")
    args = parser.parse_args()

    set_tracing_disabled(True)  # the SDK would send traces to OpenAI
    where, session_id = Where(), f"ferry-{uuid.uuid4().hex[:8]}"
    client = AsyncOpenAI(
        base_url=args.base_url,
        api_key=args.api_key,
        # Over Responses, the server recognises the conversation. Over chat completions, this header names it.
        default_headers={"x-prefillshare-session": session_id} if args.api == "chat" else {},
        http_client=DefaultAsyncHttpxClient(event_hooks={"response": [where.aread]}),
    )
    planner, tools, coder = build(args, client)
    turns, session = Turns(where), SQLiteSession(session_id)  # the SDK's own memory of the conversation
    settings = planner.model_settings

    print_head()
    async with client:
        for question, other, streamed in ((BRIEF, tools, False), (SUM, coder, True)):
            asked = planner.clone(model_settings=choosing(settings, args, f"transfer_to_{other.name}"))
            await ask(asked, question, turns, session, streamed)
        await ask(planner.clone(handoffs=[]), NOTE, turns, session, streamed=True)
    session.close()


if __name__ == "__main__":
    asyncio.run(main())
