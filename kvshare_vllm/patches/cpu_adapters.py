"""Adapters' deltas in plain torch, as CPU engines compute them: one product per adapter, whose weights are used in place.

vLLM's own kernels for CPUs copy an adapter's weights once for every row of a batch. Here the rows of one adapter make one
product, in engines of every mode; everything else is vLLM's.

Seam: vllm/lora/punica_wrapper/punica_cpu.py (`__init__`, `update_metadata`, `add_lora_linear`; stacked weights are
[adapters, 1, rank, in] and [adapters, 1, out, rank]); vllm/platforms/cpu.py (`get_punica_wrapper`)

Goes when: vLLM's own kernels for CPUs use adapters' weights in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

#: Rows of a batch: a slice if they are contiguous, which copies nothing.
Rows = slice | torch.Tensor


def rows_by_adapter(adapters: Sequence[int]) -> dict[int, Rows]:
    """Adapter -> its rows. `adapters`: the adapter of each row; 0 is none."""
    places: dict[int, list[int]] = {}
    for row, adapter in enumerate(adapters):
        if adapter > 0:
            places.setdefault(adapter, []).append(row)
    return {adapter: _slice(rows) or torch.tensor(rows) for adapter, rows in places.items()}


def _slice(rows: list[int]) -> slice | None:
    first, end = rows[0], rows[-1] + 1
    return slice(first, end) if end - first == len(rows) else None


class AdapterRows(PunicaWrapperCPU):
    #: (rows, the adapter's place).
    _chosen: Sequence[tuple[Rows, int]] = ()

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device, **more):
        """vLLM has room for `max_batches` runs of rows with the same adapter: one per request. Here a request's rows are the
        base's and then its adapter's (models/base_rows.py), so there may be a run per row."""
        super().__init__(max_num_batched_tokens, max(max_batches, max_num_batched_tokens), device, **more)

    def update_metadata(self, mapping, lora_index_to_id, *args, **kwargs) -> None:
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        by_adapter = rows_by_adapter(mapping.index_mapping)
        self._chosen = [(rows, lora_index_to_id.index(adapter)) for adapter, rows in by_adapter.items()]

    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **_) -> None:
        """y [rows, all outputs] += x [rows, in] @ A @ B * scale, per slice of the outputs."""
        for rows, place in self._chosen:
            own, begins = x[rows], 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                y[rows, begins : begins + size] += (own @ a[place, 0].T * scale) @ b[place, 0].T
                begins += size


def use() -> None:
    """From now on, engines of this process compute deltas this way."""
    current_platform.__class__.get_punica_wrapper = classmethod(lambda _: f"{AdapterRows.__module__}.{AdapterRows.__name__}")
