"""What a decode step of two streams costs at the shapes of a large model, on a GPU, in plain torch (ICaRus, arXiv 2603.13281).

    python -m benchmarks.icarus.shapes [--batches 1 4 16 64 128 256] [--contexts 1024 4096]

Random weights of Llama-3.1-8B's shapes. Three systems take one decode step for a batch of requests, each captured as a CUDA
graph; their replays take turns:
    plain                 one stream, no adapters
    plain with adapters   one stream, LoRA on q, o and the MLP, a quarter of the requests per adapter
    two streams           the base's rows write KV, the adapters' rows predict: each weight is read once for both, and the two
                          queries of a KV head read its keys and values once (rows side by side, as kvshare_vllm/models does)
Once a step is no longer bound by reading memory, the second stream's arithmetic shows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.shared.result import write
from benchmarks.shared.small import bars

SYSTEMS = ("plain", "plain with adapters", "two streams")
ADAPTERS, RANK = 4, 16


@dataclass(frozen=True)
class Shapes:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int


LLAMA_8B = Shapes(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head=128, vocabulary=128256)


class Model:
    """Random weights; adapters on q, o and the MLP's projections, stacked [adapters, in, rank] and [adapters, rank, out]."""

    def __init__(self, shapes: Shapes, device: str, dtype: torch.dtype, seed: int = 0):
        self.shapes, self.device, self.dtype = shapes, device, dtype
        random = torch.Generator(device).manual_seed(seed)
        s = shapes
        sizes = {
            "q": (s.hidden, s.heads * s.head), "kv": (s.hidden, 2 * s.kv_heads * s.head), "o": (s.heads * s.head, s.hidden),
            "up": (s.hidden, 2 * s.intermediate), "down": (s.intermediate, s.hidden),
        }  # fmt: skip

        def made(*size: int, scale: float) -> torch.Tensor:
            return torch.randn(*size, generator=random, device=device, dtype=dtype) * scale

        self.layers = [
            {name: made(out, into, scale=into**-0.5) for name, (into, out) in sizes.items()} for _ in range(s.layers)
        ]
        self.adapters = [
            {
                name: (made(ADAPTERS, into, RANK, scale=into**-0.5), made(ADAPTERS, RANK, out, scale=0.3 * RANK**-0.5))
                for name, (into, out) in sizes.items()
                if name != "kv"
            }
            for _ in range(s.layers)
        ]
        self.embeddings = made(s.vocabulary, s.hidden, scale=1.0)

    def cache(self, batch: int, context: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values per layer, [batch, KV heads, context, head]; the last column is the new token's."""
        size = batch, self.shapes.kv_heads, context, self.shapes.head
        return [tuple(torch.randn(size, device=self.device, dtype=self.dtype) for _ in range(2)) for _ in self.layers]


def step(model: Model, system: str, tokens: torch.Tensor, cache: list) -> torch.Tensor:
    """Logits [batch, vocabulary] after one token of each request; the new token's KV is written into the cache.

    Rows are the decoder's, or the base's followed by the decoder's. Every adapter has equally many requests, side by side.
    """
    batch, streams, s = len(tokens), 1 + (system == "two streams"), model.shapes
    adapted = system != "plain"
    hidden = model.embeddings[tokens].repeat(streams, 1)

    def project(name: str, number: int, rows: torch.Tensor) -> torch.Tensor:
        out = linear(rows, model.layers[number][name])
        if adapted and name != "kv":
            down, up = model.adapters[number][name]
            used = min(ADAPTERS, batch)  # a batch may be smaller than the number of adapters
            own = rows[-batch:].view(used, batch // used, -1)
            out[-batch:] += (own @ down[:used] @ up[:used]).view(batch, -1)
        return out

    for number, (keys, values) in enumerate(cache):
        normed = rms_norm(hidden, (s.hidden,))
        new_keys, new_values = project("kv", number, normed[:batch]).view(batch, 2, s.kv_heads, s.head).unbind(1)
        keys[:, :, -1], values[:, :, -1] = new_keys, new_values
        queries = project("q", number, normed).view(streams, batch, s.kv_heads, s.heads // s.kv_heads, s.head)
        side_by_side = queries.permute(1, 2, 0, 3, 4).reshape(batch, s.kv_heads, -1, s.head)
        seen = scaled_dot_product_attention(side_by_side, keys, values)
        seen = seen.view(batch, s.kv_heads, streams, -1, s.head).permute(2, 0, 1, 3, 4).reshape(streams * batch, -1)
        hidden = hidden + project("o", number, seen)
        gate, up = project("up", number, rms_norm(hidden, (s.hidden,))).chunk(2, dim=-1)
        hidden = hidden + project("down", number, silu(gate) * up)
    return linear(rms_norm(hidden[-batch:], (s.hidden,)), model.embeddings)


def captured(function: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / replays


@torch.no_grad()
def measure(model: Model, batch: int, context: int, repeats: int, replays: int) -> dict[str, dict[str, float]]:
    """System -> milliseconds of a step (median of the repeats), and the median ratios to the one-stream systems."""
    cache = model.cache(batch, context)
    tokens = torch.randint(model.shapes.vocabulary, (batch,), device=model.device)
    graphs = {system: captured(lambda system=system: step(model, system, tokens, cache)) for system in SYSTEMS}
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for repeat in range(repeats):
        turn = repeat % len(SYSTEMS)
        for system in SYSTEMS[turn:] + SYSTEMS[:turn]:
            times[system].append(replay_ms(graphs[system], replays))
    found: dict[str, dict[str, float]] = {}
    for system, own in times.items():
        found[system] = {"step_ms": round(statistics.median(own), 4)}
        for other in SYSTEMS[:2]:
            ratio = statistics.median(a / b for a, b in zip(own, times[other], strict=True))
            found[system][f"to {other}"] = round(ratio, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256], help="(default: 1 to 256)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096], help="tokens of KV (default: 1024 4096)")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each system, in turn (default: 9)")
    parser.add_argument("--replays", type=int, default=10, help="steps per measurement (default: 10)")
    args = parser.parse_args()
    if wrong := [batch for batch in args.batches if batch % min(batch, ADAPTERS)]:
        parser.error(f"argument --batches: {wrong[0]} requests do not spread evenly over {ADAPTERS} adapters")
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; benchmarks.icarus measures engines on CPUs")
    console, found = Console(stderr=True), {}
    model = Model(LLAMA_8B, "cuda", torch.bfloat16)
    kv_token_bytes = 4 * LLAMA_8B.layers * LLAMA_8B.kv_heads * LLAMA_8B.head
    room = torch.cuda.mem_get_info()[0] - (4 << 30)
    cases = [(c, b) for c in args.contexts for b in args.batches if b * c * kv_token_bytes < room]
    with bars(console) as progress:
        for context, batch in progress.track(cases, description="decode steps"):
            found.setdefault(str(context), {})[str(batch)] = measure(model, batch, context, args.repeats, args.replays)
            torch.cuda.empty_cache()
    headline = {
        f"step_cost_ratio_b{batch}_context_{context}": systems["two streams"]["to plain with adapters"]
        for context, by_batch in found.items()
        for batch, systems in by_batch.items()
    }
    config = vars(args) | {"shapes": vars(LLAMA_8B), "adapters": ADAPTERS, "rank": RANK, "dtype": "bfloat16"}
    write("icarus.shapes", console, config, headline, file="icarus_shapes", steps=found)


if __name__ == "__main__":
    main()
