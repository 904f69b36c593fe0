"""The calls of the service as both clients make them, and what of them may be repeated."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from prefillshare.client.arguments import turn_input
from prefillshare.client.building import built
from prefillshare.client.retries import Call
from prefillshare.kvshare.errors import AlreadyExists, NotFound
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb


def decoders() -> Call:
    return Call("ListDecoders", pb.ListDecodersRequest())


def readiness() -> Call:
    return Call("GetReadiness", pb.GetReadinessRequest())


def create(
    session_id: str,
    messages: Sequence[Mapping[str, Any]] | None,
    text: str | None,
    token_ids: Sequence[int] | None,
    cache_domain: str,
    ttl_s: float | None,
) -> Call:
    name = session_id or uuid.uuid4().hex
    given = turn_input(messages, text, token_ids)
    request = built(pb.CreateSessionRequest, {"session_id": name, "input": given, "cache_domain": cache_domain, "ttl_s": ttl_s})
    return _making("CreateSession", request, name, made_up=not session_id)


def fork(session_id: str, new_session_id: str) -> Call:
    name = new_session_id or uuid.uuid4().hex
    request = built(pb.ForkSessionRequest, {"session_id": session_id, "new_session_id": name})
    return _making("ForkSession", request, name, made_up=not new_session_id)


def get(session_id: str, with_token_ids: bool = False) -> Call:
    return Call("GetSession", built(pb.GetSessionRequest, {"session_id": session_id, "include_token_ids": with_token_ids}))


def delete(session_id: str) -> Call:
    request = built(pb.DeleteSessionRequest, {"session_id": session_id})
    return Call("DeleteSession", request, done_if=NotFound, done=pb.DeleteSessionResponse())


def page(size: int, token: str) -> Call:
    return Call("ListSessions", built(pb.ListSessionsRequest, {"page_size": size, "page_token": token}))


def update(session_id: str, truncate_to: int | None, ttl_s: float | None) -> Call:
    """To truncate twice would take away what a turn in between has added."""
    request = built(pb.UpdateSessionRequest, {"session_id": session_id, "truncate_to": truncate_to, "ttl_s": ttl_s})
    return Call("UpdateSession", request, repeatable=truncate_to is None)


def keep(session_id: str, ttl_s: float, priority: int | None) -> Call:
    return Call("KeepSession", built(pb.KeepSessionRequest, {"session_id": session_id, "ttl_s": ttl_s, "priority": priority}))


def let_go(session_id: str) -> Call:
    return Call("LetGoSession", built(pb.LetGoSessionRequest, {"session_id": session_id}))


def let_go_kept(kept_id: str) -> Call:
    request = built(pb.LetGoKeptRequest, {"id": kept_id})
    return Call("LetGoKept", request, done_if=NotFound, done=pb.LetGoKeptResponse())


def kept() -> Call:
    return Call("ListKept", pb.ListKeptRequest())


def _making(method: str, request: Any, name: str, made_up: bool) -> Call:
    """Makes a session. `made_up`: the client has thought of the name, so that a session which has it is this call's own."""
    if not made_up:
        return Call(method, request, repeatable=False)
    return Call(method, request, done_if=AlreadyExists, done=pb.Session(session_id=name, turns=-1))
