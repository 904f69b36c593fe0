"""Base KV made by an engine that has adapters beside the base: rows of a request's shared prefix run without its adapter.

vLLM says per token which adapter it runs with. Of a step's rows of a request, those before the last prompt token get none
(R1); the last prompt token and what is generated after it have the request's, and so have generated tokens that are computed
again after a preemption. It holds for whatever part of a prompt a step computes, and beside decodes of other adapters.

Seam: vllm/v1/worker/lora_model_runner_mixin.py (`set_active_loras`, V1 runner), vllm/v1/worker/gpu/lora_utils.py
(`LoraState.make_lora_inputs`, V2 runner)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefillshare.kvshare.modes import SharingMode


def without_adapter(
    mode: SharingMode, of_tokens: Sequence[int], scheduled: np.ndarray, prompts: np.ndarray, computed: np.ndarray
) -> tuple[int, ...]:
    """`of_tokens`: adapter of each row, 0 for none. `scheduled`, `prompts`, `computed`: tokens of each request, in the batch's
    order. Returns the adapters of the rows, those of shared prefixes 0."""
    rows = np.array(of_tokens)
    begins = np.cumsum(scheduled) - scheduled
    for place in np.flatnonzero(computed < prompts):
        shared = mode.handoff_tokens(int(prompts[place])) - int(computed[place])
        rows[begins[place] : begins[place] + min(max(shared, 0), int(scheduled[place]))] = 0
    return tuple(int(row) for row in rows)


class BaseRows:
    """Put in place of how a model runner says which adapters rows have. `prompts`: requests whose prefix it has seen run."""

    def __init__(self, runner, mode: SharingMode, v2: bool):
        self._runner, self._mode, self.prompts = runner, mode, 0
        if v2:
            self._stock = runner.lora_state.make_lora_inputs
            runner.lora_state.make_lora_inputs = self._make_lora_inputs
        else:
            self._stock = runner.set_active_loras
            runner.set_active_loras = self._set_active_loras

    def _set_active_loras(self, batch, num_scheduled_tokens, num_sampled_tokens=None, *rest) -> None:
        if num_sampled_tokens is None:
            num_sampled_tokens = np.ones_like(num_scheduled_tokens, dtype=np.int32)
        of_requests, of_tokens, adapters = batch.make_lora_inputs(num_scheduled_tokens, num_sampled_tokens)
        prompts, computed = batch.num_prompt_tokens[: batch.num_reqs], batch.num_computed_tokens_cpu[: batch.num_reqs]
        rows = self._rows(of_tokens, num_scheduled_tokens, prompts, computed)
        self._runner._set_active_loras(of_requests, rows, adapters, *rest)

    def _make_lora_inputs(self, req_ids, idx_mapping, num_scheduled_tokens):
        of_requests, of_tokens, adapters = self._stock(req_ids, idx_mapping, num_scheduled_tokens)
        states = self._runner.req_states
        prompts, computed = states.prompt_len.np[idx_mapping], states.num_computed_prefill_tokens[idx_mapping]
        return of_requests, self._rows(of_tokens, num_scheduled_tokens, prompts, computed), adapters

    def _rows(self, of_tokens, scheduled, prompts, computed) -> tuple[int, ...]:
        self.prompts += int((computed < prompts).sum())
        return without_adapter(self._mode, of_tokens, scheduled, prompts, computed)
