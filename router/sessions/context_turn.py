"""One turn behind a context: how its response becomes a part of the context, and how its KV comes about (router/ahead)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import Internal, InvalidInput
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.kvshare_vllm.surface.frontend import Frontend
from prefillshare.kvshare_vllm.surface.token_text import text_lengths
from prefillshare.router.ahead.eager import ContextKey
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.sessions.seen_response import seen_response
from prefillshare.router.turn.terms import Terms


@dataclass(frozen=True)
class LaidOut:
    """Token ids before the response. `context`: those that stay in the context. `seen`: those that the decoder sees; a suffix,
    which does not stay, makes the difference. `goes_on`: the suffix stands where it stood at the turn before. `several`: agents
    with other suffixes have taken turns in this context."""

    context: list[int]
    seen: list[int]
    goes_on: bool = False
    several: bool = False


def check_stays_whole(asked: Any, laid_out: LaidOut, max_len: int) -> None:
    """Raises InvalidInput if vLLM would cut off the prompt of this request, as its `truncation` allows. `asked`: as of
    http_turn.asked."""
    if getattr(asked, "truncation", None) == "auto" and len(laid_out.seen) >= max_len:
        raise InvalidInput(
            f"a context is never cut off, and the prompt's {len(laid_out.seen)} tokens leave no room for an answer: the model"
            f" takes {max_len}, both together",
            field="truncation",
            fix="send less, or go on from an earlier point of the conversation",
        )


#: Stores a context with the response: called when that is complete, with the token ids of both, and the text and the token ids
#: of the response. Returns whether the same agent will take the next turn.
Commit = Callable[[list[int], str, list[int]], Awaitable[bool | None]]


def _read_nothing(output) -> None:
    """For contexts that need not know what their responses say."""


async def _commit_nothing(context: list[int], text: str, token_ids: list[int]) -> None:
    """For contexts that are not stored."""


@dataclass
class ContextTurn:
    """`key`: names the context among those whose KV is made ahead. `replicas`, `session`: as in Terms."""

    frontend: Frontend
    response_kv: ResponseKV
    decoders: Mapping[str, Decoder]
    key: ContextKey
    caller: Caller
    laid_out: LaidOut
    commit: Commit = _commit_nothing
    replicas: dict[str, str] = field(default_factory=dict)
    deadline_s: float | None = None
    #: Called with each output, before anything is committed.
    read: Callable[[Any], None] = _read_nothing
    session: str = ""
    #: Filled while the turn runs.
    usage: TurnUsage | None = None

    async def outputs(self, request, decoder: str, **how) -> AsyncIterator:
        """The outputs of a prepared request for one response. `how`: further arguments of Frontend.run. Raises Internal if the
        request is not for what was laid out: the context would then be one that its decoder has not seen."""
        laid_out = self.laid_out
        if request.prompt_token_ids != laid_out.seen:
            raise Internal(f"{len(request.prompt_token_ids)} prompt tokens are not the {len(laid_out.seen)} that were laid out")
        # Whoever is next either sees what this turn's decoder sees, or the context without what is this agent's own.
        before = laid_out.seen if laid_out.goes_on else laid_out.context
        lendable = laid_out.seen == before
        with self.response_kv.of_turn(self.key, self.decoders[decoder], before, lendable=lendable) as response:
            terms = Terms(self.deadline_s, self.replicas, response.lend, response.ready, self.session)
            run = self.frontend.run(request, decoder, self.caller, terms=terms, **how)
            response.turns = run.turns
            shown = ""
            async with aclosing(run.outputs()) as outputs:
                async for output in outputs:
                    self.usage = run.turns[0].usage
                    self.read(output)
                    completion = output.outputs[0]
                    response.token_ids += completion.token_ids
                    shown += completion.text
                    if completion.finish_reason:
                        if completion.stop_reason is not None and completion.stop_reason in request.sampling_params.stop:
                            response.is_in_context_as(self._shown(request, response.token_ids, shown))
                        context = [*laid_out.context, *response.in_context]
                        if await self.commit(context, shown, response.token_ids):
                            response.go_on_from(laid_out.seen)
                        elif laid_out.several:  # the agent is done, and another may be next
                            response.go_on_from(laid_out.context)
                        response.ended()
                    else:
                        response.grew()
                    yield output

    def _shown(self, request, token_ids: list[int], shown: str) -> list[int]:
        tokenizer = self.frontend.renderer.tokenizer
        lengths = text_lengths(tokenizer, request, token_ids)
        return seen_response(token_ids, lengths, shown, lambda text: tokenizer.encode(text, add_special_tokens=False))
