"""Stage: what the second stream of mode `icarus` costs in a decode step, at the shape of a real base with random weights."""

from __future__ import annotations

import asyncio
import json
import statistics
from pathlib import Path

from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.modes import SharingMode
from prefillshare.proof.asked import Asked, Machine
from prefillshare.proof.engines import Pair, started
from prefillshare.proof.found import Part, Progress, Status, Tell
from prefillshare.proof.prompts import ids
from prefillshare.proof.subject import ADAPTERS, Subject, in_place, make_adapters

#: Llama 3.1 8B.
LARGE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
#: Requests at once -> tokens of context that each has.
SHORT, ON_CPUS, ON_GPUS = {1: 32, 2: 32}, {1: 256, 4: 256, 8: 256}, {1: 1024, 8: 1024, 32: 1024, 64: 1024}
STEPS = 32


async def run(asked: Asked, tell: Tell) -> None:
    machine = Machine.here()
    batches = SHORT if asked.short else ON_GPUS if machine.is_gpu else ON_CPUS
    steps = 8 if asked.short else STEPS
    chosen = in_place()
    subjects = {mode.name: _of_shape(asked, mode, machine) for mode in chosen}
    needed = len(subjects) * next(iter(subjects.values())).weight_bytes(asked.dtype)
    if needed > 0.6 * machine.memory_bytes:
        gib = f"{needed / 2**30:.0f} GiB of weights in {machine.memory_bytes / 2**30:.0f} GiB of memory"
        tell(Part("steps", Status.SKIPPED, f"{gib}; give a config.json of a smaller base with --shape"))
        return
    longest = max(batches.values()) + steps + 1
    sizes = {"max_tokens": longest, "kv_tokens": longest * max(batches) + 64, "engines": len(subjects)}
    random = {"engine_args": {"load_format": "dummy"}}
    tell(Progress(0, 1, f"starting {len(subjects)} engines with random weights"))
    async with started(
        *(one.settings("decode", asked.dtype, max_num_seqs=max(batches), **sizes, **random) for one in subjects.values())
    ) as engines:
        ways = {name: Pair(None, engine) for name, engine in zip(subjects, engines, strict=True)}
        plain, *others = ways
        found: dict[str, dict[int, float]] = {name: {} for name in ways}
        for number, (batch, context) in enumerate(batches.items()):
            tell(Progress(number, len(batches), f"{batch} requests at once"))
            rounds: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(2 if asked.short else 4):  # the first warms up
                for name in list(ways)[:: -1 if repeat % 2 else 1]:
                    rounds[name].append(await _step_s(ways[name], batch, context, steps, 1 + 100 * repeat))
            for name, own in rounds.items():
                found[name][batch] = statistics.median(own[1:])
    config = fingerprint.read_json(next(iter(subjects.values())).base, "config.json")
    for name in others:
        ratios = {batch: found[name][batch] / found[plain][batch] for batch in batches}
        text = ", ".join(f"x{ratio:.2f} with {batch}" for batch, ratio in ratios.items())
        text += f" at once ({config['num_hidden_layers']} layers of {config['hidden_size']}, {asked.dtype})"
        figures = {"step_s": {one: found[one] for one in (plain, name)}, f"to_{plain}": ratios}
        tell(Part(f"steps: {name} to {plain}", Status.MEASURED, text, figures))


async def _step_s(pair: Pair, batch: int, context: int, steps: int, salt: int) -> float:
    """Seconds between tokens while all requests decode. Their prompts are cached first: else some would end before others have
    been prefilled."""
    for n in (1, steps):
        turns = await asyncio.gather(
            *(pair.take(ids(context, salt + one), n, ADAPTERS[one % len(ADAPTERS)]) for one in range(batch))
        )
    all_there, first_ends = max(turn.token_s[0] for turn in turns), min(turn.token_s[-1] for turn in turns)
    gaps = [
        after - before
        for turn in turns
        for before, after in zip(turn.token_s, turn.token_s[1:], strict=False)
        if before >= all_there and after <= first_ends
    ]
    return statistics.median(gaps)


def _of_shape(asked: Asked, mode: SharingMode, machine: Machine) -> Subject:
    """A model folder without weights, and adapters for it."""
    if asked.shape is None and not machine.is_gpu:
        return Subject.of(asked, mode)
    folder = Path(asked.folder) / "shape"
    folder.mkdir(parents=True, exist_ok=True)
    config = Path(asked.shape).read_text() if asked.shape else json.dumps(LARGE)
    (folder / "config.json").write_text(config)
    linear = _linear_layers(folder)
    made = make_adapters(folder, Path(asked.folder) / f"shape-{mode.name}", linear, mode)
    return Subject(folder, mode, made, linear, None, json.loads(config)["num_hidden_layers"])


def _linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (out features, in features) of the linear layers in the model's blocks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    modules = model.named_modules()
    return {
        name: (module.out_features, module.in_features)
        for name, module in modules
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
