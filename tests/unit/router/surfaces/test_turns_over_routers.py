"""A client, two routers one after the other, and sessions in Redis: a turn whose router died is taken once, whenever it died.

The routers have all of theirs but the engines: what a turn generates is given.
"""

import asyncio
import uuid
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace

import pytest
from char_tokenizer import Chats, Tokenizer, text
from polling import until
from ports import free_port
from stub_turn import StubTurn

from prefillshare.client import AsyncClient, Retries
from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import AnswerLost
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare_vllm.surface.text_work import TextWork
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.redis_calls import RedisCalls
from prefillshare.router.sessions import RedisSessions
from prefillshare.router.sessions.turns import Turns
from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer

pytestmark = pytest.mark.slow

PATIENT = Retries(most=60, first_pause_s=0.02, longest_pause_s=0.1)


class Frontend:
    """`gate`: what a turn waits for between its first token and its last."""

    def __init__(self):
        self.renderer = SimpleNamespace(tokenizer=Tokenizer())
        self.chats, self.text = Chats(self.renderer.tokenizer), TextWork(4096, 1)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 256)
        self.gate, self.begun = asyncio.Event(), asyncio.Event()

    def prepare(self, prompt, sampling, request_id, decoder):
        return SimpleNamespace(sampling_params=sampling, prompt_token_ids=list(prompt["prompt_token_ids"]))

    def run(self, request, decoder, caller, *, terms=None):
        return SimpleNamespace(turns=[StubTurn(None)], outputs=self._outputs)

    async def _outputs(self):
        for chunk in (TokenChunk([ord("y")]), TokenChunk([ord("!")], finish_reason="stop")):
            told = {"token_ids": chunk.token_ids, "finish_reason": chunk.finish_reason, "text": text(chunk.token_ids)}
            yield SimpleNamespace(outputs=[SimpleNamespace(index=0, logprobs=None, stop_reason=None, **told)])
            self.begun.set()
            await self.gate.wait()


class AnswersTooLate(Servicer):
    """Dies between a turn's commit and its last message."""

    def __init__(self, turns, has_committed: asyncio.Event):
        super().__init__(turns, None)
        self._has_committed = has_committed

    async def Generate(self, request, context):
        async with aclosing(super().Generate(request, context)) as pieces:
            async for piece in pieces:
                if piece.HasField("done"):
                    self._has_committed.set()
                    await asyncio.sleep(60)
                yield piece


@asynccontextmanager
async def router(redis_url: str, prefix: str, port: int, kind=Servicer, *given):
    """Yields (its frontend, its server, its sessions)."""
    sessions = RedisSessions(RedisCalls(redis_url, "session store", prefix=prefix), 10, 60, lease_s=0.5)
    frontend = Frontend()
    decoders = {"planner": Decoder("planner", "agents", "prefillshare", "planner", "lora")}
    turns = Turns(Base(model="m", max_model_len=4096), decoders, frontend, sessions, ResponseKV())
    server = GrpcServer(kind(turns, *(given or (None,))), "127.0.0.1", port)
    await server.start()
    try:
        yield frontend, server, sessions
    finally:
        await server.stop(0)
        await sessions.close()
        frontend.text.close()


@pytest.fixture
def place(redis_server):
    return redis_server.url, uuid.uuid4().hex, free_port()


async def test_a_turn_that_its_router_took_along_is_taken_again_once_its_lease_has_ended(place, monkeypatch):
    async with AsyncClient(f"127.0.0.1:{place[2]}", retries=PATIENT, timeout_s=40) as client:
        async with router(*place) as (frontend, server, sessions):
            session = await client.create_session("s", text="ask:")
            turn = asyncio.create_task(session.turn("planner", text=" why?"))
            await asyncio.wait_for(frontend.begun.wait(), 20)

            async def silent(*_):
                return [b"ok"]

            # It is killed: it neither renews the turn's lease nor ends it.
            monkeypatch.setattr(sessions, "_ask", silent)
            await server.stop(0)
        async with router(*place) as (frontend, _, sessions):
            frontend.gate.set()
            result = await turn
            kept = await sessions.get("s", tenant="")
    assert (result.text, result.turns) == ("y!", 1)
    assert (text(kept.token_ids), kept.turns) == ("ask: why?y!", 1)


async def test_a_turn_that_was_committed_before_its_router_died_is_not_taken_again(place):
    async with AsyncClient(f"127.0.0.1:{place[2]}", retries=PATIENT, timeout_s=40) as client:
        committed = asyncio.Event()
        async with router(*place, AnswersTooLate, committed) as (frontend, server, sessions):
            frontend.gate.set()
            session = await client.create_session("s", text="ask:")
            turn = asyncio.create_task(session.turn("planner", text=" why?"))
            await asyncio.wait_for(committed.wait(), 20)
            await server.stop(0)

            async def let_go():
                return not (await sessions.get("s", tenant="")).busy

            await until(let_go)
        async with router(*place) as (frontend, _, sessions):
            frontend.gate.set()
            with pytest.raises(AnswerLost, match="has had 1 turns, not 0"):
                await turn
            assert text((await sessions.get("s", tenant="")).token_ids) == "ask: why?y!"
            assert (await session.turn("planner", text=" and?")).turns == 2
