"""Offline answers are what the definition of each mode gives, token by token, whatever they are batched with."""

import random

import pytest
import torch
from tiny_in_memory import KINDS, SIZES, model, with_adapter

from prefillshare import reference
from prefillshare.finetuning import grouped_attention
from prefillshare.finetuning.generate import generate
from prefillshare.finetuning.methods import METHODS, PrefillShare
from prefillshare.finetuning.subjects import FrozenBase
from prefillshare.kvshare.layer_group import LayerGroup

pytestmark = pytest.mark.slow

PROMPTS = [[random.Random(n).randrange(SIZES["vocab_size"]) for _ in range(length)] for n, length in enumerate((11, 4, 1))]
NO_TOKEN = SIZES["vocab_size"]


def answers(method, base, decoder, prompts, max_tokens=4, **options):
    options = {"stop_ids": [NO_TOKEN]} | options
    return generate(METHODS[method], decoder, FrozenBase(base), prompts, max_tokens=max_tokens, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_token_is_the_references_choice(kind, method):
    base = model(kind, 1)
    decoder = with_adapter(model(kind, 1), METHODS[method].lora_modules)
    grouped = [grouped_attention.use(model(kind, 1)) for _ in range(2)]
    grouped[1] = with_adapter(grouped[1], METHODS[method].lora_modules)
    choices = getattr(reference, METHODS[method].sharing)
    for prompt, answer in zip(PROMPTS, answers(method, *grouped, PROMPTS), strict=True):
        assert answer == choices(base, decoder, prompt, answer, pick=reference.likeliest)


@pytest.mark.parametrize("own_tokens", [1, 3, 4, 100])
def test_with_its_own_end_of_the_prompt_every_token_is_the_references_choice(own_tokens):
    base, decoder = model("llama", 1), model("llama", 2)
    made = generate(PrefillShare(own_tokens), decoder, FrozenBase(base), PROMPTS, max_tokens=4, stop_ids=[NO_TOKEN])
    for prompt, answer in zip(PROMPTS, made, strict=True):
        assert answer == reference.prefillshare(base, decoder, prompt, answer, own_tokens, pick=reference.likeliest)
    assert (made == answers("ordinary", base, decoder, PROMPTS)) == (own_tokens == 100)


@pytest.mark.parametrize(("kind", "group"), [("llama", "1-1"), ("qwen3", "0-1")])
def test_layers_of_its_own_over_the_bases_hidden_states_are_the_references(kind, group):
    base, decoder = model(kind, 1), model(kind, 2)
    for prompt, answer in zip(
        PROMPTS, answers("prefillshare", base, decoder, PROMPTS, own_layers=LayerGroup.parse(group)), strict=True
    ):
        assert answer == reference.droidspeak(base, decoder, prompt, answer, group, pick=reference.likeliest)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_attention_changes_no_logits(kind):
    ids = torch.tensor([[5, 9, 2, 11], [7, 1, 3, 3]])
    mask = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4).clone()
    mask[1, 0, :, 0] = torch.tensor([True, False, False, False])
    with torch.no_grad():
        for given in (None, mask):
            stock = model(kind, 1)(ids, attention_mask=given).logits
            grouped = grouped_attention.use(model(kind, 1))(ids, attention_mask=given).logits
            assert (stock - grouped).abs().max() < 1e-5


@pytest.mark.parametrize("ending", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_answer_ends_with_its_stop_token_and_others_go_on(method, ending):
    """So few may go on that the batch is made smaller."""
    base, decoder = model("llama", 1), with_adapter(model("llama", 1), METHODS[method].lora_modules)
    whole = answers(method, base, decoder, PROMPTS, max_tokens=8)
    stops = [answer[2] for answer in whole[:ending]]
    ended = answers(method, base, decoder, PROMPTS, max_tokens=8, stop_ids=stops)
    for free, cut in zip(whole, ended, strict=True):
        end = next((place + 1 for place, token in enumerate(free) if token in stops), None)
        assert cut == free[:end]
    assert sum(len(cut) < 8 for cut in ended) >= ending
    assert any(len(cut) == 8 for cut in ended)


def test_a_share_of_the_prompt_is_base_kv_and_the_rest_the_decoders():
    base, decoder = model("llama", 1), model("llama", 2)
    (prompt, *_), tokens = PROMPTS, 4

    def by_hand(given: int) -> list[int]:
        past = base(torch.tensor([prompt[:given]]), use_cache=True).past_key_values if given else None
        ids = prompt[given:]
        for _ in range(tokens):
            fresh = None if past is None else base(torch.tensor([prompt[:given]]), use_cache=True).past_key_values
            ids = [*ids, int(decoder(torch.tensor([ids]), past_key_values=fresh).logits[0, -1].argmax())]
        return ids[len(prompt) - given :]

    with torch.no_grad():
        for share in (0.0, 0.5, 1.0):
            (answer,) = answers("prefillshare", base, decoder, [prompt], tokens, base_share=share)
            assert answer == by_hand(int((len(prompt) - 1) * share))
    assert answers("prefillshare", base, decoder, PROMPTS, base_share=0.0) == answers("ordinary", base, decoder, PROMPTS)


def test_the_bases_kv_of_a_batch_of_prompts_is_computed_once():
    base, decoder = model("llama", 1), model("llama", 2)
    frozen, calls = FrozenBase(base, kept_bytes=10**6), []
    base.model.register_forward_hook(lambda *_: calls.append(1))

    def ask(base_kv, **options):
        return generate(METHODS["prefillshare"], decoder, base_kv, PROMPTS, max_tokens=4, stop_ids=[NO_TOKEN], **options)

    first = ask(frozen), ask(frozen, base_share=0.5)
    assert len(calls) == 1
    assert first == (ask(FrozenBase(base)), ask(FrozenBase(base), base_share=0.5))
    assert len(calls) == 3
