"""ICaRus under tensor parallelism: an engine of two ranks agrees with the reference, and lends KV to an engine of one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ids
from engines import nothing_held, settings_of, started, turn
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefillshare import reference
from prefillshare.kvshare_vllm.forkserver import spare
from prefillshare.proof.engines import new_id

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


def model(folder: str | Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


async def test_two_ranks_say_what_the_reference_says(tmp_path, smollm, monkeypatch):
    # With Intel's OpenMP, ranks hold the cores between steps, and the prefill engine would read their loan too late.
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(spare, "_spares", [])
    decode = settings_of(tmp_path, smollm, "icarus", ("a", "b"), "qwen3")
    base = model(decode.model)
    decoders = {name: PeftModel.from_pretrained(model(decode.model), path).eval() for name, path in decode.adapters.items()}
    async with started(replace(decode, tensor_parallel_size=2, cpu_cores="0|1", lease_s=60)) as engines:
        prefill, _ = engines
        context = ids(45)
        for name in ("a", None, "b"):
            tokens, logprobs, chunk, _ = await turn(engines, context, 40, name, lend=True)
            result = await prefill.pull(context + tokens, chunk.lent, new_id())  # before its lease ends, so before all else
            assert result.computed_tokens == 1
            want = reference.icarus(base, decoders.get(name, base), context, tokens)
            assert reference.max_abs_diff(logprobs, want) <= 1e-3
            context = context + tokens
        await nothing_held(*engines)
