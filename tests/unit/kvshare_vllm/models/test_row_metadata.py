"""A batch of some of a step's rows has what the attention of just these rows needs."""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from prefillshare.kvshare_vllm.models.row_metadata import of_rows

#: Three requests: 4 tokens of a prompt, one token that is generated, the last 2 of a prompt.
STARTS = torch.tensor([0, 4, 5, 7], dtype=torch.int32)
STEP = CommonAttentionMetadata(
    query_start_loc=STARTS,
    query_start_loc_cpu=STARTS,
    seq_lens=torch.tensor([4, 9, 40]),
    num_reqs=3,
    num_actual_tokens=7,
    max_query_len=4,
    max_seq_len=40,
    block_table_tensor=torch.tensor([[1, 0], [2, 0], [3, 4]]),
    slot_mapping=torch.tensor([32, 33, 34, 35, 72, 134, 135]),
    positions=torch.tensor([0, 1, 2, 3, 8, 38, 39]),
    is_prefilling=torch.tensor([True, False, True]),
)


def test_last_rows_of_some_requests_in_any_order():
    rows, batch = of_rows(STEP, [(2, 6, 7), (0, 3, 4)])
    assert rows.tolist() == [6, 3]
    assert (batch.num_reqs, batch.num_actual_tokens, batch.max_query_len) == (2, 2, 1)
    assert batch.query_start_loc.tolist() == batch.query_start_loc_cpu.tolist() == [0, 1, 2]
    assert batch.query_start_loc.dtype == STARTS.dtype
    assert batch.seq_lens.tolist() == [40, 4]
    assert batch.block_table_tensor.tolist() == [[3, 4], [1, 0]]
    assert batch.slot_mapping.tolist() == [135, 35]
    assert batch.positions.tolist() == [39, 3]
    assert batch.is_prefilling.tolist() == [True, True]


def test_several_rows_of_a_request():
    rows, batch = of_rows(STEP, [(0, 1, 4), (1, 4, 5)])
    assert rows.tolist() == [1, 2, 3, 4]
    assert batch.query_start_loc.tolist() == [0, 3, 4]
    assert (batch.max_query_len, batch.seq_lens.tolist()) == (3, [4, 9])


def test_what_is_not_known_of_the_step_is_not_known_of_its_rows():
    _, batch = of_rows(STEP, [(1, 4, 5)])
    assert batch.seq_lens_cpu_upper_bound is None
