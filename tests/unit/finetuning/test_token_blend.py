"""CacheBlend: the tokens that differ most are the decoder's own in all layers, the others stay the base's."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefillshare.finetuning import conditioned, grouped_attention
from prefillshare.finetuning.token_blend import WHOLE_LAYERS, blended

LAYERS = 5
CONTEXTS = [[3, 9, 4, 1, 7, 7, 2, 8, 5, 6], [8, 2, 6, 4, 9]]
LENGTHS = torch.tensor([10, 5])


def model(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 2}
    return grouped_attention.use(LlamaForCausalLM(LlamaConfig(vocab_size=12, num_hidden_layers=LAYERS, **sizes)).eval())


BASE, DECODER = model(1), model(2)


def blend(contexts, share):
    ids = torch.stack([torch.tensor(c + [0] * (max(map(len, contexts)) - len(c))) for c in contexts])
    lengths = torch.tensor([len(c) for c in contexts])
    kv = conditioned.base_kv(BASE, contexts)
    return kv, conditioned.base_kv(DECODER, contexts), blended(DECODER, kv, ids, lengths, share)


def apart(one, other, row, length):
    """Columns of a row that differ."""
    return {c for c in range(length) if not torch.allclose(one[row, :, c], other[row, :, c], atol=1e-5)}


def test_all_tokens_are_the_decoders_own_prefill():
    _, own, made = blend(CONTEXTS, 1.0)
    for layer in range(LAYERS):
        for wanted, got in zip(own[layer], made[layer], strict=True):
            assert not apart(wanted, got, 0, 10) | apart(wanted, got, 1, 5)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_as_many_tokens_as_asked_for_are_computed_and_they_are_the_farthest(share):
    base, own, made = blend(CONTEXTS, share)
    for row, length in enumerate((10, 5)):
        far = (own[WHOLE_LAYERS - 1][1][row] - base[WHOLE_LAYERS - 1][1][row]).square().sum((0, 2))[:length]
        chosen = set(far.topk(int(-(-share * length // 1))).indices.tolist())
        for layer in range(LAYERS):
            wanted = set(range(length)) if layer < WHOLE_LAYERS else chosen
            assert apart(base[layer][1], made[layer][1], row, length) == wanted
            if layer < WHOLE_LAYERS:
                assert not apart(own[layer][1], made[layer][1], row, length)


def test_a_prompt_alone_gets_what_it_gets_in_a_batch():
    _, _, together = blend(CONTEXTS, 0.3)
    for row, context in enumerate(CONTEXTS):
        _, _, alone = blend([context], 0.3)
        for one, both in zip(alone, together, strict=True):
            assert not apart(one[1], both[1][row : row + 1], 0, len(context))


def test_what_it_is_given_stays_as_it_is():
    base, _, _ = blend(CONTEXTS, 0.5)
    again = conditioned.base_kv(BASE, CONTEXTS)
    assert all(torch.equal(one, other) for a, b in zip(base, again, strict=True) for one, other in zip(a, b, strict=True))
