"""Attention metadata for some of a step's rows, so that a layer can run just these.

Seam: vllm/v1/attention/backend.py (`CommonAttentionMetadata`); vllm/v1/worker/utils.py (`AttentionGroup.build_metadata`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

#: (the request's place in the batch, its first row, the row after its last); rows reach to the end of what is scheduled of it.
Part = tuple[int, int, int]
#: Makes a backend's metadata.
Build = Callable[[CommonAttentionMetadata], object]


def of_rows(metadata: CommonAttentionMetadata, parts: Sequence[Part]) -> tuple[torch.Tensor, CommonAttentionMetadata]:
    """(numbers of the rows, [R]; metadata of a batch of just these rows, whose requests are in the order of `parts`)."""
    lengths = [end - begin for _, begin, end in parts]
    device = metadata.slot_mapping.device
    rows = torch.cat([torch.arange(begin, end) for _, begin, end in parts]).to(device)
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=metadata.query_start_loc_cpu.dtype)
    at = torch.tensor([place for place, *_ in parts], device=device)

    def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[at.to(tensor.device)]

    return rows, replace(
        metadata,
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=of(metadata.seq_lens),
        seq_lens_cpu_upper_bound=of(metadata.seq_lens_cpu_upper_bound),
        num_reqs=len(parts),
        num_actual_tokens=len(rows),
        max_query_len=max(lengths),
        block_table_tensor=of(metadata.block_table_tensor),
        slot_mapping=metadata.slot_mapping[rows],
        positions=None if metadata.positions is None else metadata.positions[rows],
        is_prefilling=of(metadata.is_prefilling),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@contextmanager
def seen_metadata(group) -> Iterator[list[CommonAttentionMetadata]]:
    """Yields a list of what the attention group builds its metadata from meanwhile."""
    build, seen = group.build_metadata, []

    def build_and_look(metadata, *rest, **more):
        seen.append(metadata)
        return build(metadata, *rest, **more)

    group.build_metadata = build_and_look
    try:
        yield seen
    finally:
        del group.build_metadata


def only_group(runner):
    """The one attention group of a model whose layers are all alike."""
    (group,) = [group for groups in runner.attn_groups for group in groups]
    return group
