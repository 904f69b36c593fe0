"""An engine's outputs keep log-probabilities in the arrays they arrive in; vLLM would turn them into a dict per token.

`CompletionOutput.logprobs` is then a list of (token ids, values, rank), one per token, for `Logprobs.of_rows`.

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
        # A batch's arrays are as wide as the largest number that one of its requests asks for.
        width = None if self.num_logprobs < 0 else self.num_logprobs + 1
        token_ids, values, ranks, _ = logprobs_lists
        self.logprobs.extend(zip(token_ids[:, :width], values[:, :width], ranks.tolist(), strict=True))


def keep(processor: OutputProcessor) -> None:
    """Have `processor`, of one engine's front end, keep the arrays."""
    stock = processor.add_request

    def add_request(request, *args, **kwargs) -> None:
        stock(request, *args, **kwargs)
        state = processor.request_states[request.request_id]
        if state.logprobs_processor is not None and state.logprobs_processor.logprobs is not None:
            of_vllm = state.logprobs_processor
            state.logprobs_processor = _Arrays(**{field.name: getattr(of_vllm, field.name) for field in fields(of_vllm)})

    processor.add_request = add_request
