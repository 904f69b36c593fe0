"""Adapters' deltas on CPUs: one product per adapter, with its weights where they lie.

vLLM's own kernels for CPUs copy an adapter's weights once for every row of a batch. Here consecutive rows of one adapter
make one product, in engines of every mode; everything else is vLLM's.

Seam: vllm/lora/punica_wrapper/punica_cpu.py (`update_metadata`, `add_lora_linear`; stacked weights are [adapters, 1, rank, in]
and [adapters, 1, out, rank]); vllm/platforms/cpu.py (`get_punica_wrapper`)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class AdapterRuns(PunicaWrapperCPU):
    #: (first row, end, the adapter's place) of consecutive rows with the same adapter.
    _runs: Sequence[tuple[int, int, int]] = ()

    def update_metadata(self, mapping, lora_index_to_id, *args, **kwargs) -> None:
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        self._runs, first = [], 0
        for adapter, rows in groupby(mapping.index_mapping):
            end = first + sum(1 for _ in rows)
            if adapter > 0:
                self._runs.append((first, end, lora_index_to_id.index(adapter)))
            first = end

    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **_) -> None:
        """y [rows, all outputs] += x [rows, in] @ A @ B * scale, per slice of the outputs."""
        for first, end, place in self._runs:
            rows, begins = x[first:end], 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                y[first:end, begins : begins + size] += (rows @ a[place, 0].T * scale) @ b[place, 0].T
                begins += size


def use() -> None:
    """From now on engines of this process that run on CPUs make deltas so."""
    current_platform.__class__.get_punica_wrapper = classmethod(lambda _: f"{AdapterRuns.__module__}.{AdapterRuns.__name__}")
