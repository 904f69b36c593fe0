"""ICaRus in unforked vLLM: the base's stream writes all KV, an adapter's stream predicts (PAPERS: arXiv 2603.13281, 3.3).

Of T scheduled tokens, rows [0, T) of every activation are the encoder stream: the frozen base. Behind them are R rows of
the decoder stream: base weights plus the request's adapter, for the last scheduled token of every request that has one. A
linear layer reads its base weights once for both; the adapter's delta goes to the last R rows. Where every row has both
streams, their queries attend to the encoder's keys and values in one call, as twice the heads, so that these are read once: per
KV head, first the encoder's group, then the decoder's. In a step with rows that nobody predicts from, as those of a prompt are,
each stream attends by itself (`Apart`).

CUDA graphs: in a batch that has only decodes, and adapters among them, the decoder stream has every row (a request to the base
has no delta), so that only T decides what is computed; vLLM captures such batches separately from those without adapters.
Batches with prompt tokens run eagerly and choose their rows; only there may the streams attend by themselves. Without graphs,
all batches choose their rows.

Seam: vllm/model_executor/models/{llama,qwen3}.py (module names and order of operations); vllm/lora/layers/base_linear.py
(`_apply_lora_to_output`); vllm/v1/worker/lora_model_runner_mixin.py (`_set_active_loras`);
vllm/v1/worker/gpu_model_runner.py (`_build_attention_metadata`); vllm/model_executor/layers/attention/attention.py
(`unified_kv_cache_update`, `impl.forward`)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from prefillshare.kvshare_vllm.models.row_metadata import of_rows, only_group, seen_metadata


@dataclass(frozen=True)
class Apart:
    """A backend's metadata for a call of each stream by itself: for all T rows of a step, and for the R rows of the decoder
    stream, each as a request of one token; None if there are none."""

    encoder: object
    decoder: object | None


@dataclass(frozen=True)
class Step:
    """`tokens`: number of rows of the encoder stream. `rows`: those of them, [R], that the decoder stream has, too. `apart`:
    None if both streams attend in one call."""

    tokens: int
    rows: torch.Tensor
    apart: Apart | None = None


class TwoStreams:
    """Mixed into a vLLM model of a family whose layers are `self_attn` and `mlp` between two norms."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("ICaRus engines have no pipeline stages; use tensor parallelism")
        if vllm_config.speculative_config:
            raise ValueError("ICaRus engines do not speculate: only a request's last row is predicted from")
        if vllm_config.lora_config and vllm_config.lora_config.fully_sharded_loras:
            raise ValueError("ICaRus engines keep adapters whole on every rank; leave out fully_sharded_loras")
        for layer in self.model.layers:
            _double_heads(layer.self_attn)
        #: Requests of the batch that have an adapter, by their place in it; set before each step (`follow_adapters`).
        self.with_adapter: torch.Tensor | None = None
        #: Set before each step in which the streams attend by themselves (`follow_adapters`).
        self.apart: Apart | None = None
        #: Set instead of `with_adapter` if the batch has only decodes, and adapters among them, and runs as a graph.
        self.every_row = False

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None) -> torch.Tensor:
        """[T, hidden size]: the decoder stream's state at each row that it has, the encoder stream's elsewhere."""
        hidden = _embedding(self.model.embed_tokens)(input_ids) if inputs_embeds is None else inputs_embeds
        rows = self._rows(positions.shape[-1])
        encoder, decoder = _through_layers(self.model, hidden, positions, Step(positions.shape[-1], rows, self.apart))
        return encoder.index_copy(0, rows, decoder) if len(rows) else encoder

    def _rows(self, tokens: int) -> torch.Tensor:
        """Where the decoder stream runs: each request's last scheduled token, if it has an adapter."""
        chosen, metadata, device = self.with_adapter, get_forward_context().attn_metadata, next(self.parameters()).device
        if self.every_row:
            return torch.arange(tokens, device=device)
        ends = getattr(next(iter(metadata.values())), "query_start_loc", None) if metadata else None
        if metadata and ends is None:  # raised in the first step, which the engine takes before it is ready
            raise RuntimeError("this attention backend does not say where requests begin (query_start_loc); ICaRus needs one "
                               "that does, e.g. engine_args: {attention_backend: FLASH_ATTN}")  # fmt: skip
        if chosen is None:
            return torch.empty(0, dtype=torch.long, device=device)
        if ends is None:  # a dummy run: any rows will do if they are as many
            return torch.arange(tokens - len(chosen), tokens, device=device)
        return (ends[1:].long() - 1)[chosen]


class IcarusLlamaForCausalLM(TwoStreams, LlamaForCausalLM):
    pass


class IcarusQwen3ForCausalLM(TwoStreams, Qwen3ForCausalLM):
    pass


def _embedding(layer) -> nn.Module:
    """The base's embedding; adapters have none of their own."""
    return getattr(layer, "base_layer", layer)


def _double_heads(attention) -> None:
    """The module keeps its projections of H heads; its attention call takes 2 H heads over the same keys and values."""
    stock = attention.attn
    context, config = get_current_vllm_config().compilation_config.static_forward_context, get_current_vllm_config()
    name = stock.layer_name
    del context[name]
    attention.attn = Attention(
        2 * attention.num_heads,
        attention.head_dim,
        attention.scaling,
        num_kv_heads=attention.num_kv_heads,
        cache_config=config.cache_config,
        quant_config=config.quant_config,
        per_layer_sliding_window=getattr(stock, "sliding_window", None),
        prefix=name,
    )
    #: The backend for H heads.
    attention.one_stream = stock.impl


def _through_layers(model, hidden: torch.Tensor, positions: torch.Tensor, step: Step):
    """All layers of a model and its last norm: the encoder stream's [T, hidden size] and the decoder stream's [R, ...]."""
    hidden = torch.cat([hidden, hidden[step.rows]])
    positions = torch.cat([positions, positions[step.rows]])
    residual = hidden
    hidden = model.layers[0].input_layernorm(hidden)
    for number, layer in enumerate(model.layers):
        if number:
            hidden, residual = layer.input_layernorm(hidden, residual)
        hidden = _attend(layer.self_attn, positions, hidden, step)
        hidden, residual = layer.post_attention_layernorm(hidden, residual)
        hidden = _mlp(layer.mlp, hidden, step)
    hidden, _ = model.norm(hidden, residual)
    return hidden[: step.tokens], hidden[step.tokens :]


def _attend(attention, positions: torch.Tensor, hidden: torch.Tensor, step: Step) -> torch.Tensor:
    tokens, rows = step.tokens, step.rows
    qkv = _linear(attention.qkv_proj, hidden, step)
    q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    if hasattr(attention, "q_norm"):
        q, k = _per_head(attention.q_norm, q, attention.head_dim), _per_head(attention.k_norm, k, attention.head_dim)
    q, k = attention.rotary_emb(positions, q, k)
    if step.apart:
        return _linear(attention.o_proj, _attend_apart(attention, q, k, v, step), step)
    per_kv_head = (attention.num_kv_heads, 1, attention.num_heads // attention.num_kv_heads, attention.head_dim)
    encoder, decoder = q[:tokens].reshape(-1, *per_kv_head), q[tokens:].reshape(-1, *per_kv_head)
    queries = torch.cat([encoder, torch.zeros_like(encoder).index_copy(0, rows, decoder)], dim=2)
    seen = attention.attn(queries.reshape(tokens, -1), k[:tokens].contiguous(), v[:tokens].contiguous())
    seen = seen.reshape(tokens, attention.num_kv_heads, 2, -1)
    seen = torch.cat([seen[:, :, 0].reshape(tokens, -1), seen[rows, :, 1].reshape(-1, attention.q_size)])
    return _linear(attention.o_proj, seen, step)


def _attend_apart(attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> torch.Tensor:
    """[T + R, H * head size]: the encoder's keys and values are stored, then each stream's queries attend to them."""
    layer, tokens = attention.attn, step.tokens
    heads, stored = (-1, attention.num_heads, attention.head_dim), (-1, attention.num_kv_heads, attention.head_dim)
    q, seen = q.view(heads), torch.empty_like(q)
    k, v, out = k[:tokens].reshape(stored), v[:tokens].reshape(stored), seen.view(heads)
    unified_kv_cache_update(k, v, layer.layer_name)
    attention.one_stream.forward(layer, q[:tokens], k, v, layer.kv_cache, step.apart.encoder, out[:tokens])
    if step.apart.decoder is not None:
        rows = slice(0, len(step.rows))  # no backend looks at keys and values that it has not to store
        attention.one_stream.forward(layer, q[tokens:], k[rows], v[rows], layer.kv_cache, step.apart.decoder, out[tokens:])
    return seen


def _mlp(mlp, hidden: torch.Tensor, step: Step) -> torch.Tensor:
    return _linear(mlp.down_proj, mlp.act_fn(_linear(mlp.gate_up_proj, hidden, step)), step)


def _per_head(norm, x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return norm(x.reshape(*x.shape[:-1], -1, head_dim)).reshape(x.shape)


def _linear(layer, x: torch.Tensor, step: Step) -> torch.Tensor:
    """One product with the base's weights over both streams; the adapters' deltas on the decoder's rows only."""
    if not isinstance(layer, BaseLinearLayerWithLoRA):
        return layer(x)[0]
    base, split = layer.base_layer, isinstance(layer.base_layer, RowParallelLinear)
    bias = None if split and layer.tp_rank else base.bias
    output = base.quant_method.apply(base, x, bias)
    if x.shape[0] > step.tokens:
        layer._apply_lora_to_output(x[step.tokens :], output[step.tokens :])
    # Every rank has a part of the sum, both of the base's product and of the delta.
    return tensor_model_parallel_all_reduce(output) if split and layer.tp_size > 1 else output


def follow_adapters(runner) -> None:
    """From now on, before each step, the model is told which requests have an adapter and whether the streams attend by
    themselves, and the adapters' kernels are told only of the decoder stream's rows."""
    stock, build = runner._set_active_loras, runner._build_attention_metadata
    #: The requests of the step that have an adapter, by their place in it; the attention group of one stream, once needed.
    chosen, alone = [], None
    graphs = runner.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE

    def set_active_loras(of_requests, of_tokens, adapters, *rest) -> None:
        nonlocal chosen
        chosen = sorted((place for place, adapter in enumerate(of_requests) if adapter > 0), key=of_requests.__getitem__)
        model = runner.get_model()
        model.every_row = bool(chosen) and graphs and len(of_tokens) == len(of_requests)
        model.with_adapter = None
        if chosen and not model.every_row:
            model.with_adapter = torch.tensor(chosen).to(runner.device, non_blocking=True)
        rows = tuple(of_requests[place] for place in chosen) or (0,)  # the kernels do not accept an empty list of rows
        stock(of_requests, of_tokens if model.every_row else rows, adapters, *rest)

    runner._set_active_loras = set_active_loras

    def build_attention_metadata(*args, **kwargs):
        nonlocal alone
        model = runner.get_model()
        model.apart = None
        with seen_metadata(only_group(runner)) as seen:
            built = build(*args, **kwargs)
        is_graph = graphs and seen and seen[0].max_query_len == 1
        if seen and not is_graph and len(chosen) < seen[0].num_actual_tokens and _can_be_apart(model):
            alone = alone or _one_stream_group(runner, model)
            ends = seen[0].query_start_loc_cpu.tolist()[1:]
            decoder = None
            if chosen:
                _, rows = of_rows(seen[0], [(place, ends[place] - 1, ends[place]) for place in chosen])
                decoder = alone.build_metadata(rows)
            model.apart = Apart(alone.build_metadata(seen[0]), decoder)
        return built

    runner._build_attention_metadata = build_attention_metadata


def _can_be_apart(model) -> bool:
    layer = model.model.layers[0].self_attn.attn
    return not layer.attn_backend.forward_includes_kv_cache_update and layer.query_quant is None


def _one_stream_group(runner, model):
    """The attention group as it is where layers have H heads: builders of metadata look at the layers."""
    alone = copy.copy(only_group(runner))
    with _one_stream(model):
        alone.create_metadata_builders(runner.vllm_config, runner.device, alone.kernel_block_size)
    return alone


@contextmanager
def _one_stream(model) -> Iterator[None]:
    attentions = [layer.self_attn for layer in model.model.layers]
    both = [attention.attn.impl for attention in attentions]
    for attention in attentions:
        attention.attn.impl = attention.one_stream
    try:
        yield
    finally:
        for attention, impl in zip(attentions, both, strict=True):
            attention.attn.impl = impl
