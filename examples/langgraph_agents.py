"""A LangGraph whose nodes are decoders of one base: planner, tool caller with its tool, coder, planner again.

LangGraph's state holds the messages, and each node sends all of them, with a system prompt of its own. The header
`x-prefillshare-session` names the conversation to which the calls belong: the server lays out only what is new of them, and
puts each node's own system prompt and tools behind the common context. So each node computes only what is new.

    prefillshare serve deploy/configs/demo.yaml
    .venv-examples/bin/python examples/langgraph_agents.py
"""

from __future__ import annotations

import argparse
import uuid
from itertools import pairwise
from typing import Literal

from figures import Where, print_head, print_turn
from langchain_core.messages import SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from openai import DefaultHttpxClient

#: The number makes each run a context of its own: a second run would find everything that the first has computed.
BRIEF = f"""Notes {uuid.uuid4().hex[:8]}: we run a ferry line between the mainland and three islands.
A ferry carries up to 220 passengers and 40 cars. People book on the web, at two ticket offices and by phone. A place is held
for ten minutes while somebody pays, and is given back if they do not. Tickets can be changed until one hour before departure.
Residents of the islands pay half. A bicycle counts as a quarter of a car place. In bad weather the line cancels departures:
everybody who booked gets a message, and may choose another departure or their money back.
How much do 3 adults pay together on the northern route?"""


@tool
def fare(route: Literal["north", "south", "east"]) -> str:
    """What an adult pays on a route, in euros."""
    return f"{ {'north': 14, 'south': 18, 'east': 22}[route] } euros"


def agent(name: str, decoder: str, told: str, base_url: str, headers: dict[str, str], tools: list | None = None):
    """A node of the graph: one call of a decoder, which sees the agent's own instructions and all messages so far."""
    where = Where()
    model = ChatOpenAI(
        model=decoder,
        base_url=base_url,
        api_key="unused",
        default_headers=headers,
        temperature=0,
        max_tokens=48,
        http_client=DefaultHttpxClient(event_hooks={"response": [where.read]}),
        include_response_headers=True,
    )
    # The demo's models are small, so that the tool caller has to call; with larger ones, leave tool_choice out.
    answering = model.bind_tools(tools, tool_choice="required", parallel_tool_calls=False) if tools else model

    def node(state: MessagesState) -> dict:
        answer = answering.invoke([SystemMessage(told), *state["messages"]])
        used = answer.usage_metadata
        served = answer.response_metadata["headers"]["x-prefillshare-session-state"]  # begun, then continued
        cached = used["input_token_details"].get("cache_read", 0)
        print(f"{name}: {answer.text or answer.tool_calls[0]['args']}")
        print_turn(decoder, used["input_tokens"], cached, used["output_tokens"], f"{where.last}, {served}")
        return {"messages": [answer]}

    return node


def build(base_url: str, headers: dict[str, str]):
    def node(name: str, decoder: str, told: str, tools: list | None = None):
        return agent(name, decoder, told, base_url, headers, tools)

    graph = StateGraph(MessagesState)
    graph.add_node("planner", node("planner", "base", "You plan. Say in one sentence what has to be found out."))
    graph.add_node("caller", node("caller", "tools", "Call the function that finds out what is missing.", [fare]))
    graph.add_node("fare", ToolNode([fare]))
    graph.add_node("coder", node("coder", "arithmetic", "Solve the problem step by step. End with #### and the result."))
    graph.add_node("writer", node("writer", "base", "You write the answer to the customer, in one sentence."))
    order = (START, "planner", "caller", "fare", "coder", "writer", END)
    for before, after in pairwise(order):
        graph.add_edge(before, after)
    return graph.compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    base_url = parser.parse_args().base_url

    print_head()
    graph = build(base_url, {"x-prefillshare-session": f"ferry-{uuid.uuid4().hex[:8]}"})
    state = graph.invoke({"messages": [("user", BRIEF)]})
    print(f"{len(state['messages'])} messages, the last by {state['messages'][-1].response_metadata['model_name']}")


if __name__ == "__main__":
    main()
