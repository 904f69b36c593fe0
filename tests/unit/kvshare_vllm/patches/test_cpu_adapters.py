"""Adapters' deltas on CPUs: each row gets its own adapter's, however the batch mixes them."""

import pytest
import torch

from prefillshare.kvshare_vllm.patches.cpu_adapters import AdapterRows, rows_by_adapter

SLICES = (6, 3)


@pytest.mark.parametrize("mixed", [[7, 7, 5, 5, 0], [7, 5, 7, 0, 5], [0, 0, 0, 0, 0], [5, 0, 0, 0, 5]])
def test_every_row_gets_its_own_adapters_delta(mixed):
    torch.manual_seed(1)
    places, x, y = {5: 0, 7: 2}, torch.randn(5, 8), torch.randn(5, sum(SLICES))
    a = [torch.randn(3, 1, 4, 8) for _ in SLICES]
    b = [torch.randn(3, 1, size, 4) for size in SLICES]
    wanted = y.clone()
    for row, adapter in enumerate(mixed):
        if adapter:
            place = places[adapter]
            wanted[row] += torch.cat([0.5 * (x[row] @ a[n][place, 0].T) @ b[n][place, 0].T for n in range(2)])
    deltas = object.__new__(AdapterRows)
    deltas._chosen = [(rows, places[adapter]) for adapter, rows in rows_by_adapter(mixed).items()]
    deltas.add_lora_linear(y, x, a, b, 0.5, SLICES)
    torch.testing.assert_close(y, wanted)


def test_there_may_be_more_changes_of_adapter_than_requests():
    """Each of two requests has rows of the base and one of its adapter."""
    from vllm.lora.layers import LoRAMapping

    deltas = AdapterRows(16, 2, "cpu")
    mapping = LoRAMapping(index_mapping=(0, 0, 5, 0, 0, 7), prompt_mapping=(5, 7), is_prefill=True)
    deltas.update_metadata(mapping, [5, 7], 2, 100)
    assert [(rows, place) for rows, place in deltas._chosen] == [(slice(2, 3), 0), (slice(5, 6), 1)]


def test_rows_side_by_side_are_not_copied():
    found = rows_by_adapter([3, 3, 0, 9, 3, 9, 9])
    assert found.keys() == {3, 9}
    assert found[3].tolist() == [0, 1, 4]
    assert found[9].tolist() == [3, 5, 6]
    assert rows_by_adapter([0, 2, 2]) == {2: slice(1, 3)}
