"""The decode engine's worker: restores the state of a resumed request that this process has not run before.

vLLM's V1 model runner looks a resumed request up in its own table, so it is put there first. Seeded requests on CPUs get
generators that stay right when a prompt is computed in chunks.

Seam: vllm/v1/worker/gpu_model_runner.py, `_update_states`; vllm/v1/sample/ops/topk_topp_sampler.py (draws per token).
"""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType
from vllm.v1.worker.gpu_input_batch import CachedRequestState

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare_vllm.models import families


class ReplayGenerator(torch.Generator):
    """A CPU generator that can take back the draw of an unfinished chunk, of a prompt or of a replay.

    vLLM samples once per chunk and undoes what it will not use through the offset, which CPU generators do not have.
    It does so only until the prompt or the replay is done, that is, before the first draw that counts.
    """

    start: torch.Tensor

    @classmethod
    def after(cls, drawn: int, seed: int) -> ReplayGenerator:
        """A generator as it is after `drawn` sampled tokens: on CPUs one integer per token seeds the fused kernel."""
        made = cls()
        made.manual_seed(seed)
        for _ in range(drawn):
            torch.randint(0, 2**31, (1,), generator=made, dtype=torch.long)
        made.start = made.get_state()
        return made

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        self.set_state(self.start)


class SharedKVWorker(PlatformWorker):
    def load_model(self, *args, **kwargs) -> None:
        if self.use_v2_model_runner:
            raise RuntimeError("what this worker does to vLLM's V1 model runner has no effect on the V2 runner")
        super().load_model(*args, **kwargs)
        family = families.of_model(self.model_runner.get_model())
        if transfer := self.vllm_config.kv_transfer_config:
            mode = get_mode(transfer.kv_connector_extra_config["sharing_mode"])
            if families.of_decode(mode) is not family:
                raise RuntimeError("the engine's model is not the one its sharing mode runs")
            if transfer.kv_connector_extra_config["makes_base_kv"]:
                family.make_base_kv(self.model_runner, mode)
        family.follow(self.model_runner, has_adapters=bool(self.vllm_config.lora_config))
        if current_platform.is_cpu():
            take_back_draws(self.model_runner)

    def execute_model(self, scheduler_output):
        meta = scheduler_output.kv_connector_metadata
        self.model_runner.own_layers = getattr(meta, "own_layers", {})
        for data in getattr(meta, "restored_requests", ()):
            drawn = _drawn(scheduler_output, data.req_id)
            self.model_runner.requests[data.req_id] = CachedRequestState(
                req_id=data.req_id,
                prompt_token_ids=data.prompt_token_ids,
                mm_features=data.mm_features,
                sampling_params=data.sampling_params,
                generator=self._generator_after(data.sampling_params, drawn),
                block_ids=data.block_ids,
                num_computed_tokens=data.num_computed_tokens,
                output_token_ids=list(scheduler_output.scheduled_cached_reqs.all_token_ids[data.req_id][-drawn:]),
                lora_request=data.lora_request,
            )
        return super().execute_model(scheduler_output)

    def _generator_after(self, params, drawn: int) -> torch.Generator | None:
        """The request's generator as it is after `drawn` sampled tokens."""
        if params.sampling_type != SamplingType.RANDOM_SEED:
            return None
        if current_platform.is_cpu():
            return ReplayGenerator.after(drawn, params.seed)
        generator = torch.Generator(device=self.model_runner.device)
        generator.manual_seed(params.seed)
        row = torch.empty(self.model_runner.input_batch.vocab_size, device=self.model_runner.device)
        for _ in range(drawn):  # one exponential per vocabulary entry and token
            row.exponential_(generator=generator)
        return generator


def take_back_draws(runner) -> None:
    """From now on, the V1 runner's new seeded requests have generators that can take back a draw."""
    stock = runner._update_states

    def update_states(scheduler_output):
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:  # in place: it goes on from its present state
            generator = runner.requests[request_id].generator if request_id in runner.requests else None
            if isinstance(generator, ReplayGenerator):
                generator.start = generator.get_state()
        corrections, batch = stock(scheduler_output), runner.input_batch
        for data in scheduler_output.scheduled_new_reqs:
            state = runner.requests[data.req_id]
            if state.generator is not None:
                state.generator = ReplayGenerator.after(0, state.sampling_params.seed)
                batch.generators[batch.req_id_to_index[data.req_id]] = state.generator
        return corrections

    runner._update_states = update_states


def _drawn(scheduler_output, request_id: str) -> int:
    cached = scheduler_output.scheduled_cached_reqs
    return cached.num_output_tokens[cached.req_ids.index(request_id)]
