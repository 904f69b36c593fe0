"""The step that benchmarks.icarus.shapes times computes what it says."""

import pytest
import torch

from benchmarks.icarus.shapes import ADAPTERS, Model, Shapes, step

SHAPES = Shapes(layers=3, hidden=32, intermediate=48, heads=4, kv_heads=2, head=8, vocabulary=50)


@pytest.fixture(scope="module")
def model():
    return Model(SHAPES, "cpu", torch.float32)


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_two_streams_predict_what_the_decoder_does_over_the_bases_kv(model, batch):
    """The base alone, one stream, writes KV; the decoder, one stream, is then run over that KV without writing its own."""
    tokens, cache = torch.arange(batch) + 3, model.cache(batch, 6)
    ours = [(keys.clone(), values.clone()) for keys, values in cache]
    both = step(model, "two streams", tokens, ours)
    step(model, "plain", tokens, cache)
    for (keys, values), (base_keys, base_values) in zip(ours, cache, strict=True):
        torch.testing.assert_close((keys, values), (base_keys, base_values), atol=1e-5, rtol=1e-5)
    reads_only = [(_Frozen(keys), _Frozen(values)) for keys, values in cache]
    decoder = step(model, "plain with adapters", tokens, reads_only)
    torch.testing.assert_close(both, decoder, atol=1e-4, rtol=1e-4)
    assert (both - step(model, "plain", tokens, cache)).abs().max() > 0.1


class _Frozen(torch.Tensor):
    """A cache that writes do not change."""

    @staticmethod
    def __new__(cls, data):
        return data.as_subclass(cls)

    def __setitem__(self, key, value):
        pass


def test_requests_have_adapters_of_their_own(model):
    tokens, cache = torch.full((ADAPTERS,), 7), model.cache(1, 6)
    same = [(keys.repeat(ADAPTERS, 1, 1, 1), values.repeat(ADAPTERS, 1, 1, 1)) for keys, values in cache]
    logits = step(model, "two streams", tokens, same)
    assert all((logits[i] - logits[j]).abs().max() > 0.01 for i in range(ADAPTERS) for j in range(i))
