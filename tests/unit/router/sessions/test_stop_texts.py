"""A session keeps what the client saw of a response that a stop text ended. The tokenizer is real; no engine runs: the tokens
that it would generate are given."""

from __future__ import annotations

import pytest
import pytest_asyncio
from stub_turn import StubTurn

from prefillshare.kvshare.caller import ANONYMOUS
from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.sessions import MemorySessions

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ASK = "Say:"


class Router:
    """`says`: token ids of the next response. `at_once`: how many of them come at once."""

    def __init__(self):
        self.says, self.at_once, self.prompts = [], 1, []

    async def start(self, model: str):
        from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app
        from prefillshare.router.sessions.turns import Turns

        base = Base(model=model, dtype="float32", max_model_len=512)
        _, frontend = await build_openai_app(base, ["planner"], self.run_turn, lambda *_: None, middleware=[])
        self.tokenizer = frontend.renderer.tokenizer
        decoders = {"planner": Decoder("planner", "pool", "prefillshare", "planner", "lora")}
        self.turns = Turns(base, decoders, frontend, MemorySessions(100, 100), ResponseKV())

    def run_turn(self, call) -> StubTurn:
        self.prompts.append(call.prompt)
        return StubTurn(self._chunks())

    async def _chunks(self):
        for start in range(0, len(self.says), self.at_once):
            end = start + self.at_once
            yield TokenChunk(self.says[start:end], finish_reason="length" if end >= len(self.says) else None)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def turn(self, session: str, *, stop: list[str], text: str = ASK):
        """Take a turn. Returns (the text that was shown, the last event)."""
        from prefillshare.kvshare_vllm.sampling import make_sampling_params

        sampling, shown = make_sampling_params(stop=stop, max_tokens=64), ""
        turn = self.turns.take(session, "planner", ("text", text), None, sampling, f"r-{len(self.prompts)}", ANONYMOUS)
        async for event in turn:
            shown += event.text
        return shown, event


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router(smollm):
    router = Router()
    await router.start(str(smollm))
    return router


def in_pieces(router: Router, *texts: str) -> list[int]:
    """Tokens of `texts`, each of which is tokenised separately."""
    return [token for text in texts for token in router.ids(text)]


@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "anew"),
    [
        ((" one", " two", " three", " four"), [" three"], " one two", ""),  # at a token's border
        ((" one", " two", " three", " four"), ["three"], " one two ", " "),  # inside a token
        ((" one", " something", " four"), ["thing"], " one some", " some"),
        ((" one", " two", " three"), ["two three"], " one ", " "),  # across tokens
        ((" one", " two"), [" one"], "", ""),  # at the beginning
        ((" one", " 🜚", " two"), ["🜚"], " one ", " "),  # a character of several tokens
        ((" one 🜚🜚", "é", " two"), ["é"], " one 🜚🜚", ""),  # after one
        ((" one", " 🜚x", " two"), ["x"], " one 🜚", ""),
        ((" one", " two", " three"), ["three", "two"], " one ", " "),  # the first of several
    ],
)
async def test_a_session_keeps_what_was_shown(router, pieces, stop, shown, anew, at_once):
    session = (await router.turns.create("", None)).session_id
    router.says, router.at_once = in_pieces(router, *pieces), at_once
    seen, last = await router.turn(session, stop=stop)
    assert (seen, last.finish_reason) == (shown, "stop")
    asked = router.ids(ASK)
    context = list((await router.turns.sessions.get(session, tenant="")).token_ids)
    response = context[len(asked) :]
    assert context[: len(asked)] == asked
    assert last.context_tokens == len(context)
    assert router.tokenizer.decode(response) == shown
    tail = router.ids(anew) if anew else []
    generated = response[: len(response) - len(tail)]
    assert response[len(generated) :] == tail
    assert generated == router.says[: len(generated)]
    # The next turn follows what was shown: the decoder reads nothing that the client has not seen.
    router.says, router.at_once = router.ids(" yes"), 1
    await router.turn(session, stop=[], text=" And?")
    assert router.prompts[-1] == [*context, *router.ids(" And?")]
    assert router.tokenizer.decode(router.prompts[-1]) == f"{ASK}{shown} And?"


async def test_without_a_stop_text_every_generated_token_is_kept(router):
    session = (await router.turns.create("", None)).session_id
    router.says = [*router.ids(" one two"), router.ids("🜚")[0]]  # ends inside a character
    shown, last = await router.turn(session, stop=["never"])
    assert (shown.rstrip("\ufffd"), last.finish_reason) == (" one two", "length")
    context = (await router.turns.sessions.get(session, tenant="")).token_ids
    assert list(context) == [*router.ids(ASK), *router.says]
