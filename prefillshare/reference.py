"""The oracle: what a response's log-probabilities must be, in plain transformers, one function per mode.

Every function takes the prompt's and the response's token ids and returns one log-probability per response token,
computed in float32 from the definition of the mode, with nothing cached, batched or handed over. With `pick=likeliest` it
returns the token that the mode would have generated at each place of the response.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import transformers

from prefillshare.kvshare.decoders import Decoder


def of(decoder: Decoder, own_layers: str = "") -> Callable[..., list[float]]:
    """The function that says what a served decoder's responses must be. `own_layers`: as in the turn's usage."""
    own = {"own_layers": own_layers} if own_layers else {"own_tokens": decoder.own_tokens} if decoder.own_tokens > 1 else {}
    return partial(globals()[decoder.sharing], **own)


def chosen(logits: torch.Tensor, response: list[int]) -> list[float]:
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].tolist()


def likeliest(logits: torch.Tensor, response: list[int]) -> list[int]:
    return logits.argmax(-1).tolist()


@torch.no_grad()
def prefillshare(
    base, decoder, prompt: list[int], response: list[int], own_tokens: int = 1, *, pick=chosen
) -> list[float]:
    """The base makes the KV of all prompt tokens but the last, or the last `own_tokens`; from there the decoder makes its own
    KV (arXiv 2602.12029)."""
    shared = max(0, len(prompt) - own_tokens)
    past = base(torch.tensor([prompt[:shared]]), use_cache=True).past_key_values if shared else None
    own = torch.tensor([prompt[shared:] + response[:-1]])
    logits = decoder(own, past_key_values=past, use_cache=True).logits[0, len(prompt) - shared - 1 :]
    return pick(logits, response)


@torch.no_grad()
def none(base, decoder, prompt: list[int], response: list[int], *, pick=chosen) -> list[float]:
    """The decoder does everything itself; the base takes no part."""
    logits = decoder(torch.tensor([prompt + response[:-1]])).logits[0, len(prompt) - 1 :]
    return pick(logits, response)


@torch.no_grad()
def icarus(base, decoder, prompt: list[int], response: list[int], *, pick=chosen) -> list[float]:
    """The base makes all KV; the decoder's hidden states make queries, attention output and MLP only (arXiv 2603.13281)."""
    tokens = torch.tensor([prompt + response[:-1]])
    cache = base(tokens, use_cache=True).past_key_values
    model = getattr(decoder, "get_base_model", lambda: decoder)()
    hidden = model.model.embed_tokens(tokens)
    rope = model.model.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
    for layer, kv in zip(model.model.layers, cache.layers, strict=True):
        attention = layer.self_attn
        queries = attention.q_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))
        queries = getattr(attention, "q_norm", lambda q: q)(queries).transpose(1, 2)
        cos, sin = (part[:, None] for part in rope)
        first, second = queries.chunk(2, -1)
        queries = queries * cos + torch.cat([-second, first], -1) * sin
        seen = torch.nn.functional.scaled_dot_product_attention(queries, kv.keys, kv.values, is_causal=True, enable_gqa=True)
        hidden = hidden + attention.o_proj(seen.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = model.lm_head(model.model.norm(hidden))[0, len(prompt) - 1 :]
    return pick(logits, response)


@torch.no_grad()
def droidspeak(
    base, decoder, prompt: list[int], response: list[int], own_layers: str = "", *, pick=chosen
) -> list[float]:
    """The KV of all prompt tokens but the last is the base's, except in a group of layers such as "4-9": there it is the
    decoder's, computed from the group's input in the base. From there the decoder makes its own KV (arXiv 2411.02820)."""
    if len(prompt) == 1 or not own_layers:
        return prefillshare(base, decoder, prompt, response, pick=pick)
    first, last = map(int, own_layers.split("-"))
    shared = torch.tensor([prompt[:-1]])
    of_base = base(shared, use_cache=True, output_hidden_states=True)
    past, own = of_base.past_key_values, transformers.DynamicCache()
    model = getattr(decoder, "get_base_model", lambda: decoder)().model
    hidden = of_base.hidden_states[first] if first else model.embed_tokens(shared)
    rope = model.rotary_emb(hidden, torch.arange(shared.shape[1])[None])
    for layer in model.layers[first : last + 1]:
        hidden = layer(hidden, attention_mask=None, past_key_values=own, use_cache=True, position_embeddings=rope)
    past.layers[first : last + 1] = own.layers[first : last + 1]
    logits = decoder(torch.tensor([prompt[-1:] + response[:-1]]), past_key_values=past, use_cache=True).logits[0]
    return pick(logits, response)


def max_abs_diff(got: list[float], want: list[float]) -> float:
    assert len(got) == len(want), f"{len(got)} log-probabilities against {len(want)}"
    return largest(abs(a - b) for a, b in zip(got, want, strict=True))


def largest(differences: Iterable[float]) -> float:
    """NaN if one of them is: `max` would pass over it."""
    return max(differences, key=lambda one: (math.isnan(one), one))
