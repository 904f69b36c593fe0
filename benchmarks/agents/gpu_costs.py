"""What prefill and decode steps of a large model cost on this machine's GPU, in plain torch, fitted as the planner's costs are.

    python -m benchmarks.agents.gpu_costs [--computed 128 512 2048 8192] [--contexts 0 2048 8192] [--batches 1 4 16 64 256]

Weights are random, of Llama-3.1-8B's shapes, in bfloat16; every case is a CUDA graph that is replayed. Engines add scheduling
and sampling, and fuse more operations. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict

import torch
from rich.console import Console
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.agents import fit
from benchmarks.icarus.shapes import LLAMA_8B, Model, captured, replay_ms, step
from benchmarks.shared.result import write
from benchmarks.shared.small import bars

#: Longest context of a decode step's requests, so that the largest batches fit.
STEP_CONTEXTS = (512, 2048, 8192)


def prefill(model: Model, tokens: torch.Tensor, cache: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Logits [vocabulary] after the last of `tokens`, which are the end of a prompt, batch 1. `cache`: has room for the KV of
    the whole prompt; that of `tokens` is written into it."""
    s, count = model.shapes, len(tokens)
    hidden = model.embeddings[tokens]
    for (keys, values), weights in zip(cache, model.layers, strict=True):
        normed = rms_norm(hidden, (s.hidden,))
        new = linear(normed, weights["kv"]).view(count, 2, s.kv_heads, s.head).permute(1, 2, 0, 3)
        keys[0, :, -count:], values[0, :, -count:] = new[0], new[1]
        queries = linear(normed, weights["q"]).view(count, s.heads, s.head).transpose(0, 1)
        mask = causal_lower_right(count, keys.shape[2])
        seen = scaled_dot_product_attention(queries[None], keys, values, attn_mask=mask, enable_gqa=True)
        hidden = hidden + linear(seen[0].transpose(0, 1).reshape(count, -1), weights["o"])
        gate, up = linear(rms_norm(hidden, (s.hidden,)), weights["up"]).chunk(2, dim=-1)
        hidden = hidden + linear(silu(gate) * up, weights["down"])
    return linear(rms_norm(hidden[-1:], (s.hidden,)), model.embeddings)[0]


def seconds(function, repeats: int, replays: int) -> float:
    graph = captured(function)
    taken = statistics.median(replay_ms(graph, replays) for _ in range(repeats)) / 1000
    del graph
    torch.cuda.empty_cache()
    return taken


@torch.no_grad()
def measured(model: Model, args: argparse.Namespace, console: Console) -> tuple[list[fit.PrefillTime], list[fit.StepTime]]:
    prefills, steps = [], []
    token_bytes = 4 * model.shapes.layers * model.shapes.kv_heads * model.shapes.head
    room = torch.cuda.mem_get_info()[0] - (8 << 30)
    cases = [(batch, context) for batch in args.batches for context in STEP_CONTEXTS if batch * context * token_bytes < room]
    with bars(console) as progress:
        for computed in progress.track(args.computed, description="prefill"):
            for context in args.contexts:
                cache = model.cache(1, context + computed)
                tokens = torch.randint(model.shapes.vocabulary, (computed,), device=model.device)
                taken = seconds(lambda tokens=tokens, cache=cache: prefill(model, tokens, cache), args.repeats, args.replays)
                prefills.append(fit.PrefillTime(computed, context + computed, taken))
        for batch, context in progress.track(cases, description="decode steps"):
            cache = model.cache(batch, context)
            tokens = torch.randint(model.shapes.vocabulary, (batch,), device=model.device)
            taken = seconds(lambda t=tokens, cache=cache: step(model, "plain", t, cache), args.repeats, args.replays)
            steps.append(fit.StepTime(batch, batch * context, taken))
    return prefills, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--computed", type=int, nargs="+", default=[128, 512, 2048, 8192], help="tokens of a prefill")
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 2048, 8192], help="tokens before them")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="requests of a decode step")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each case (default: 5)")
    parser.add_argument("--replays", type=int, default=5, help="replays per measurement (default: 5)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; benchmarks.agents measures engines on CPUs")
    console = Console(stderr=True)
    prefills, steps = measured(Model(LLAMA_8B, "cuda", torch.bfloat16), args, console)
    fits = {"prefill": fit.prefill(prefills), "step": fit.step(steps)}
    headline = {}
    for name, found in fits.items():
        headline |= found.costs | {f"{name}_fit_error": round(found.error, 4), f"{name}_fit_worst": round(found.worst, 4)}
    config = vars(args) | {"shapes": vars(LLAMA_8B), "dtype": "bfloat16"}
    rows = {"prefill": [asdict(row) for row in prefills], "step": [asdict(row) for row in steps]}
    write("agents.gpu_costs", console, config, headline, file="gpu_costs", **rows)


if __name__ == "__main__":
    main()
