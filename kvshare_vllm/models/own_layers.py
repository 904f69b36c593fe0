"""DroidSpeak in unforked vLLM: prompt tokens that pass through only a few layers (arXiv 2411.02820, sections 4.2 and 4.3).

The same model serves both sides:
 - Prefill: all tokens pass through all layers; what enters the layers in `ecache_layers` is kept beside the KV.
 - Decode: a request's shared prefix is scheduled as vLLM schedules a prompt, in chunks, beside running decodes. Its tokens
   enter at the first layer of the request's group, as the base's hidden states (or as embeddings, at layer 0), and leave
   after the last, which computes the decoder's own K and V there. In all other layers they have no rows; their KV has been
   loaded. Every other token, from the last one of the prompt on, passes through all layers.

A step whose tokens all pass through all layers runs as in the stock model. Otherwise the layers are divided into segments, each
of which runs the same rows throughout and gets attention metadata for just these rows.

Seam: vllm/model_executor/models/{llama,qwen3}.py (layers take and give hidden states and residual);
vllm/v1/worker/gpu_model_runner.py (`_build_attention_metadata`, `_set_active_loras`)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from prefillshare.kvshare.layer_group import LayerGroup, OwnLayers
from prefillshare.kvshare_vllm.models.ecache import ECache
from prefillshare.kvshare_vllm.models.row_metadata import Build, of_rows, only_group, seen_metadata
from prefillshare.kvshare_vllm.transfer.regions import ecache_names, ecache_parts_of


@dataclass(frozen=True)
class Rows:
    """Some of a step's rows, with their attention metadata and cache slots."""

    rows: torch.Tensor
    metadata: object
    slots: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """Layers [first, end) and the rows that run there. `some`: None for all rows, with the metadata that vLLM has built."""

    first: int
    end: int
    some: Rows | None


@dataclass(frozen=True)
class Plan:
    """What runs in one step. `enter`: layer -> (rows that begin there with the E-cache's hidden states, their cache slots)."""

    segments: Sequence[Segment]
    enter: Mapping[int, tuple[torch.Tensor, torch.Tensor]]


class PartialLayers:
    """Mixed into a vLLM model. `ecache_layers`, `keeps_ecache` come with its config (`hf_overrides`)."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("DroidSpeak engines have no pipeline stages; use tensor parallelism")
        if vllm_config.speculative_config:
            raise ValueError("DroidSpeak engines do not speculate")
        config, attention = vllm_config.model_config.hf_config, [layer.self_attn.attn for layer in self.model.layers]
        names, parts = [a.layer_name for a in attention], ecache_parts_of(vllm_config)
        self.ecaches = nn.ModuleDict({
            str(layer): ECache(ecache_names(names, layer, parts), attention[0], vllm_config, config.hidden_size)
            for layer in config.ecache_layers
        })
        self._keep_at = tuple(config.ecache_layers) if config.keeps_ecache else ()
        #: Set before each step whose tokens do not all pass through all layers (`follow_plans`).
        self.plan: Plan | None = None
        #: Tells the adapters' kernels which rows run now: (rows, or None for all).
        self.run_adapters_on = lambda rows: None

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None) -> torch.Tensor:
        """[T, hidden size]; the rows of tokens that do not pass through the last layer are undefined."""
        if self.plan is None and not self._keep_at:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        stream = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        stream = self._keeping(stream, positions) if self.plan is None else self._planned(self.plan, stream, positions)
        return self.model.norm(stream)

    def _keeping(self, stream: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        bounds = [0, *self._keep_at, len(self.model.layers)]
        for first, end in itertools.pairwise(bounds):
            if first:
                self.ecaches[str(first)].store(stream)
            stream = self._through(first, end, stream, positions)
        return stream

    def _planned(self, plan: Plan, stream: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for segment in plan.segments:
            if segment.first in plan.enter:
                rows, slots = plan.enter[segment.first]
                stream = stream.index_copy(0, rows, self.ecaches[str(segment.first)].load(slots))
            if (some := segment.some) is None:
                self.run_adapters_on(None)
                stream = self._through(segment.first, segment.end, stream, positions)
            else:
                self.run_adapters_on(some.rows)
                self._attend_with(segment.first, segment.end, some)
                part = self._through(segment.first, segment.end, stream[some.rows], positions[some.rows])
                stream = stream.index_copy(0, some.rows, part)
        self.run_adapters_on(None)
        return stream

    def _through(self, first: int, end: int, stream: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The output of layer end - 1, given the input of layer `first`; both are [rows, hidden size]."""
        residual = None
        for layer in self.model.layers[first:end]:
            stream, residual = layer(positions, stream, residual)
        return stream if residual is None else stream + residual

    def _attend_with(self, first: int, end: int, some: Rows) -> None:
        context = get_forward_context()
        for layer in self.model.layers[first:end]:
            name = layer.self_attn.attn.layer_name
            context.attn_metadata[name], context.slot_mapping[name] = some.metadata, some.slots


class DroidSpeakLlamaForCausalLM(PartialLayers, LlamaForCausalLM):
    pass


class DroidSpeakQwen3ForCausalLM(PartialLayers, Qwen3ForCausalLM):
    pass


def follow_plans(runner) -> None:
    """From now on `runner.own_layers` (request id -> OwnLayers, set before a step) decides which layers tokens pass through."""
    runner.own_layers: dict[str, OwnLayers] = {}
    model, of_adapters = runner.get_model(), []
    set_adapters = runner._set_active_loras

    def set_active_loras(of_requests, of_tokens, adapters, *rest) -> None:
        of_adapters[:] = [of_requests, of_tokens, adapters, *rest]
        set_adapters(of_requests, of_tokens, adapters, *rest)

    def run_adapters_on(rows: torch.Tensor | None) -> None:
        if of_adapters and any(of_adapters[0]):
            of_requests, of_tokens, *rest = of_adapters
            chosen = of_tokens if rows is None else tuple(of_tokens[row] for row in rows.tolist())
            set_adapters(of_requests, chosen, *rest)

    runner._set_active_loras, model.run_adapters_on = set_active_loras, run_adapters_on
    stock = runner._build_attention_metadata

    def build_attention_metadata(*args, **kwargs):
        model.plan = None
        if not runner.own_layers:
            return stock(*args, **kwargs)
        group = only_group(runner)
        with seen_metadata(group) as seen:
            built = stock(*args, **kwargs)
        model.plan = plan(runner, model, seen[0], group.build_metadata)
        return built

    runner._build_attention_metadata = build_attention_metadata


def plan(runner, model: PartialLayers, metadata, build: Build) -> Plan:
    """The plan of a step that schedules a shared prefix. `metadata`: vLLM's CommonAttentionMetadata of the whole step."""
    starts, batch = metadata.query_start_loc_cpu.tolist(), runner.input_batch
    partial: list[tuple[int, int, LayerGroup | None]] = []  # per request: first row, number of rows for its group only
    for place, request in enumerate(batch.req_ids):
        own, rows = runner.own_layers.get(request), starts[place + 1] - starts[place]
        left = min(max(0, own.shared_tokens - int(batch.num_computed_tokens_cpu[place])), rows) if own else 0
        partial.append((starts[place], left, own.group if own else None))
    groups = {group for _, left, group in partial if left and group}
    bounds = sorted({0, len(model.model.layers)} | {group.first for group in groups} | {group.last + 1 for group in groups})
    # Layers on either side of a group often run the same rows.
    made: dict[tuple[int, ...], Rows | None] = {tuple(starts[:-1]): None}
    segments = []
    for first, end in itertools.pairwise(bounds):
        begins = tuple(start + (0 if group and first in group else left) for start, left, group in partial)
        if begins == tuple(starts[1:]):  # nothing runs there
            continue
        if begins not in made:
            made[begins] = _rows(begins, starts, metadata, build)
        segments.append(Segment(first, end, made[begins]))
    enter: dict[int, list[torch.Tensor]] = {}
    for start, left, group in partial:
        if left and group and group.transition:
            enter.setdefault(group.transition, []).append(torch.arange(start, start + left))
    rows = {layer: torch.cat(of).to(metadata.slot_mapping.device) for layer, of in enter.items()}
    return Plan(segments, {layer: (of, metadata.slot_mapping[of]) for layer, of in rows.items()})


def _rows(begins: Sequence[int], starts: list[int], metadata, build: Build) -> Rows:
    """The rows from `begins[i]` to the end of request i, for every i."""
    parts = [(place, begin, end) for place, (begin, end) in enumerate(zip(begins, starts[1:], strict=True)) if begin < end]
    rows, chosen = of_rows(metadata, parts)
    return Rows(rows, build(chosen), chosen.slot_mapping)
