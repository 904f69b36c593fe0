"""The messages of the gRPC contract (protos/prefillshare/v1) as what the router works with, and back."""

from __future__ import annotations

from typing import Any

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.router.sessions.base import Session
from prefillshare.router.sessions.listing import Listed
from prefillshare.router.sessions.tools import json_object
from prefillshare.router.sessions.turn_inputs import TurnInput
from prefillshare.router.sessions.turn_responses import TurnEvent


def turn_input(given: pb.Input, field: str) -> TurnInput:
    """Raises InvalidInput for messages that cannot be what they say they are. `field`: the message's."""
    kind = given.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "messages":
        return kind, [_chat_message(m, f"{field}.messages.{number}") for number, m in enumerate(given.messages.messages)]
    if kind == "token_ids":
        return kind, list(given.token_ids.ids)
    return kind, given.text


def _chat_message(message: pb.Message, field: str) -> dict[str, Any]:
    """As chat templates get it: a call's arguments are an object."""
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        shown["name"] = message.name
    if message.tool_calls:
        if message.role != "assistant":
            raise InvalidInput("only an assistant calls tools", field=f"{field}.tool_calls", fix="leave them out")
        calls = enumerate(message.tool_calls)
        shown["tool_calls"] = [_tool_call(call, f"{field}.tool_calls.{number}") for number, call in calls]
    if message.role == "tool":
        if not message.tool_call_id:
            text, fix = "a tool's result without the id of its call", "give the id of the call"
            raise InvalidInput(text, field=f"{field}.tool_call_id", fix=fix)
        shown["tool_call_id"] = message.tool_call_id
    elif message.tool_call_id:
        raise InvalidInput("only a tool's result answers a call", field=f"{field}.tool_call_id", fix="leave it out")
    return shown


def _tool_call(call: pb.ToolCall, field: str) -> dict[str, Any]:
    if not call.name:
        raise InvalidInput("a call without a name", field=f"{field}.name", fix="name the function that was called")
    arguments = json_object(call.arguments, f"{field}.arguments", "the arguments as JSON") if call.arguments else {}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def response(event: TurnEvent) -> pb.GenerateResponse:
    made = pb.GenerateResponse(text=event.text, token_ids=event.token_ids, index=event.index)
    for row in event.logprobs or ():
        made.logprobs.add(entries=[pb.Logprob(token_id=t, logprob=p, rank=r) for t, p, r in row])
    for delta in event.tool_call_deltas:
        made.tool_calls.add(index=delta.index, id=delta.id, name=delta.name, arguments=delta.arguments)
    if event.finish_reason:
        calls = [pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in event.tool_calls]
        made.done.CopyFrom(
            pb.Done(
                finish_reason=event.finish_reason,
                usage=pb.Usage(**event.usage.report()),
                context_tokens=event.context_tokens,
                tool_calls=calls,
                turns=event.turns,
            )
        )
    return made


def described(session: Session, expires_in_s: float, ttl_s: float, with_tokens: bool = False) -> pb.Session:
    """`ttl_s`: that of sessions which have none of their own."""
    return pb.Session(
        session_id=session.session_id,
        context_tokens=len(session.token_ids),
        turns=session.turns,
        token_ids=session.token_ids if with_tokens else (),
        expires_in_s=expires_in_s,
        ttl_s=ttl_s if session.ttl_s is None else session.ttl_s,
        busy=session.busy,
        cache_domain=session.cache_domain,
    )


def listed(session: Listed) -> pb.Session:
    return pb.Session(
        session_id=session.session_id,
        context_tokens=session.tokens,
        turns=session.turns,
        expires_in_s=session.expires_in_s,
        ttl_s=session.ttl_s,
        busy=session.busy,
        cache_domain=session.cache_domain,
        damaged=session.damaged,
    )
