"""Base KV made by an engine that serves adapters: the rows of a request's shared prefix run without its adapter.

vLLM decides for each row of a step which adapter it runs with. Here, the rows of a request before its own end of the prompt
(the last token, or the last few) get none (R1). That end and generated tokens keep the request's adapter, also when they are
computed again after a preemption. This holds for any part of a prompt that a step computes, and beside decodes with other
adapters.

Seam: vllm/v1/worker/lora_model_runner_mixin.py (`set_active_loras`); vllm/v1/worker/gpu_input_batch.py (`CachedRequestState`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prefillshare.kvshare.modes import SharingMode
from prefillshare.kvshare_vllm.transfer.params import Asked


def without_adapter(
    mode: SharingMode,
    of_tokens: Sequence[int],
    scheduled: np.ndarray,
    prompts: np.ndarray,
    computed: np.ndarray,
    own_tokens: Callable[[int], int] = lambda place: 1,
) -> tuple[int, ...]:
    """`of_tokens`: the adapter of each row, 0 for none. `scheduled`, `prompts`, `computed`: numbers of tokens of each request,
    in the batch's order. `own_tokens`: a request's place -> how many of its prompt's last tokens are its own. Returns the
    adapter of each row, 0 for those of shared prefixes."""
    rows = np.array(of_tokens)
    begins = np.cumsum(scheduled) - scheduled
    for place in np.flatnonzero(computed < prompts):
        shared = mode.handoff_tokens(int(prompts[place]), own_tokens=own_tokens(int(place))) - int(computed[place])
        rows[begins[place] : begins[place] + min(max(shared, 0), int(scheduled[place]))] = 0
    return tuple(int(row) for row in rows)


class BaseRows:
    """Stands in the place where a model runner asks for its rows' adapters. `prompts` counts those it was asked about."""

    def __init__(self, runner, mode: SharingMode):
        self._runner, self._mode, self.prompts = runner, mode, 0
        runner.set_active_loras = self._set_active_loras

    def _set_active_loras(self, batch, num_scheduled_tokens, num_sampled_tokens=None, *rest) -> None:
        if num_sampled_tokens is None:
            num_sampled_tokens = np.ones_like(num_scheduled_tokens, dtype=np.int32)
        of_requests, of_tokens, adapters = batch.make_lora_inputs(num_scheduled_tokens, num_sampled_tokens)
        prompts, computed = batch.num_prompt_tokens[: batch.num_reqs], batch.num_computed_tokens_cpu[: batch.num_reqs]
        self.prompts += int((computed < prompts).sum())

        def own_tokens(place: int) -> int:
            given = self._runner.requests[batch.req_ids[place]].sampling_params.extra_args or {}
            return Asked(given.get("kv_transfer_params")).own_tokens

        rows = without_adapter(self._mode, of_tokens, num_scheduled_tokens, prompts, computed, own_tokens)
        self._runner._set_active_loras(of_requests, rows, adapters, *rest)
