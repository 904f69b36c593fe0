"""An engine's outputs keep log-probabilities as the arrays that they come in, where vLLM makes a dict per token of them.

`CompletionOutput.logprobs` is a list of (token ids, values, rank) then, one per token, for `Logprobs.of_rows`.

Seam: vllm/v1/engine/output_processor.py (`OutputProcessor.add_request`, `RequestState.logprobs_processor`, which it cuts to the
new tokens), vllm/v1/engine/logprobs.py (`LogprobsProcessor`)
"""

from __future__ import annotations

from dataclasses import fields

from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import LogprobsLists


class _Arrays(LogprobsProcessor):
    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        # A batch's arrays are as wide as the request in it wants that wants most.
        width = None if self.num_logprobs < 0 else self.num_logprobs + 1
        token_ids, values, ranks, _ = logprobs_lists
        self.logprobs.extend(zip(token_ids[:, :width], values[:, :width], ranks.tolist(), strict=True))


def keep(processor: OutputProcessor) -> None:
    """Of one engine's front end."""
    stock = processor.add_request

    def add_request(request, *args, **kwargs) -> None:
        stock(request, *args, **kwargs)
        state = processor.request_states[request.request_id]
        if state.logprobs_processor is not None and state.logprobs_processor.logprobs is not None:
            of_vllm = state.logprobs_processor
            state.logprobs_processor = _Arrays(**{field.name: getattr(of_vllm, field.name) for field in fields(of_vllm)})

    processor.add_request = add_request
