"""vLLM's SamplingParams for callers above that do not import vLLM."""

from __future__ import annotations

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from prefillshare.kvshare_vllm.vllm_refusals import as_our_errors


def make_sampling_params(**fields) -> SamplingParams:
    """vLLM's SamplingParams, for streamed deltas; unset `max_tokens` stays None. Raises InvalidInput for what vLLM refuses."""
    with as_our_errors():
        return SamplingParams(**{"max_tokens": None, **fields}, output_kind=RequestOutputKind.DELTA)


def make_prompt(token_ids: list[int]):
    return tokens_input(token_ids)


def logprob_rows(completion) -> list[list[tuple[int, float, int]]] | None:
    """A CompletionOutput's log-probabilities: per token (id, log-probability, rank), the sampled token first."""
    if completion.logprobs is None:
        return None
    rows = []
    for token, row in zip(completion.token_ids, completion.logprobs, strict=True):
        others = [(t, p.logprob, p.rank or 0) for t, p in row.items() if t != token]
        rows.append([(token, row[token].logprob, row[token].rank or 0), *others])
    return rows
