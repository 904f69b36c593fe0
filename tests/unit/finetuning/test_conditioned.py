"""Training sees what serving feeds: its log-probabilities are the reference's, for every method and architecture."""

import random

import pytest
import torch
from tiny_in_memory import KINDS, SIZES, model, with_adapter

from prefillshare import reference
from prefillshare.finetuning import conditioned
from prefillshare.finetuning.methods import METHODS, PrefillShare
from prefillshare.finetuning.transcripts import Example

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


def example(seed: int, *lengths: int) -> Example:
    """Alternating inputs and responses of these lengths."""
    rng, ids, spans = random.Random(seed), [], []
    for number, length in enumerate(lengths):
        if number % 2:
            spans.append((len(ids), len(ids) + length))
        ids += [rng.randrange(SIZES["vocab_size"]) for _ in range(length)]
    return Example(tuple(ids), tuple(spans))


#: One response, several, a prompt of one token, a response right after another's.
EXAMPLES = [example(1, 9, 5), example(2, 6, 4, 3, 7, 1, 2), example(3, 1, 3), example(4, 5, 3, 0, 4)]


def log_probabilities(method, decoder, base, examples):
    kv = conditioned.base_kv(base, [e.token_ids[: max(1, METHODS[method].view(e).base_tokens)] for e in examples])
    return conditioned.log_probabilities(decoder, conditioned.make_batch(METHODS[method], examples, kv, "cpu"))


def wanted(method, base, decoder, one: Example, **options) -> list[float]:
    """The reference's, response by response, each after all that was before it."""
    function = getattr(reference, METHODS[method].sharing)
    ids = list(one.token_ids)
    return [p for start, end in one.responses for p in function(base, decoder, ids[:start], ids[start:end], **options)]


@pytest.mark.parametrize("own_tokens", [2, 5, 9, 100])
@pytest.mark.parametrize("together", [1, len(EXAMPLES)])
def test_a_decoder_with_its_own_end_of_the_prompt_sees_base_kv_only_before_it(own_tokens, together):
    base, decoder, method = model("llama", 1), model("llama", 2), PrefillShare(own_tokens)
    for first in range(0, len(EXAMPLES), together):
        part = EXAMPLES[first : first + together]
        kv = conditioned.base_kv(base, [e.token_ids[: max(1, method.view(e).base_tokens)] for e in part])
        made = conditioned.log_probabilities(decoder, conditioned.make_batch(method, part, kv, "cpu"))
        for one, got in zip(part, made, strict=True):
            want = wanted("prefillshare", base, decoder, one, own_tokens=own_tokens)
            assert reference.max_abs_diff(got, want) < TOLERANCE
    got = wanted("prefillshare", base, decoder, EXAMPLES[0], own_tokens=own_tokens)
    with_one = wanted("prefillshare", base, decoder, EXAMPLES[0])
    alone = wanted("ordinary", base, decoder, EXAMPLES[0])
    assert reference.max_abs_diff(got, with_one) > 100 * TOLERANCE
    assert (reference.max_abs_diff(got, alone) < TOLERANCE) == (own_tokens >= 9)  # the prompt's length


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("together", [1, len(EXAMPLES)])
def test_training_sees_what_the_reference_computes(kind, method, together):
    base = model(kind, 1)
    decoder = with_adapter(model(kind, 1), METHODS[method].lora_modules)
    for first in range(0, len(EXAMPLES), together):
        part = EXAMPLES[first : first + together]
        for one, got in zip(part, log_probabilities(method, decoder, base, part), strict=True):
            want = wanted(method, base, decoder, one)
            assert reference.max_abs_diff(got, want) < TOLERANCE
            plain = wanted(method, base, base, one)
            assert max(abs(a - b) for a, b in zip(want, plain, strict=True)) > 100 * TOLERANCE, "the adapter does nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_full_weights_see_the_bases_cache_and_not_their_own(kind):
    base, decoder = model(kind, 1), model(kind, 2)
    (got,) = log_probabilities("prefillshare", decoder, base, EXAMPLES[:1])
    assert reference.max_abs_diff(got, wanted("prefillshare", base, decoder, EXAMPLES[0])) < TOLERANCE
    assert reference.max_abs_diff(got, wanted("ordinary", base, decoder, EXAMPLES[0])) > 100 * TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_layers_give_the_same_gradients(method):
    def gradients(checkpointing: bool):
        base = model("llama", 1)
        decoder = with_adapter(model("llama", 1), METHODS[method].lora_modules).train()
        if checkpointing:
            conditioned.allow_checkpointing(decoder)
        kv = conditioned.base_kv(base, [e.token_ids for e in EXAMPLES])
        conditioned.loss_sum(decoder, conditioned.make_batch(METHODS[method], EXAMPLES, kv, "cpu")).backward()
        return {name: p.grad for name, p in decoder.named_parameters() if p.requires_grad and p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() != set()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_no_gradient_reaches_the_base():
    base = model("llama", 1)
    decoder = model("llama", 2).train()
    kv = conditioned.base_kv(base, [e.token_ids for e in EXAMPLES])
    conditioned.loss_sum(decoder, conditioned.make_batch(METHODS["prefillshare"], EXAMPLES, kv, "cpu")).backward()
    assert all(p.grad is None for p in base.parameters())
