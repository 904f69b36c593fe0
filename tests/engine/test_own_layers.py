"""DroidSpeak on real engines with a tiny model: the decoder's own layers over the base's hidden states, exact everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import reference
import torch
from conftest import ids
from engines import KV_BYTES, settings_of, started, turn
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefillshare.tiny_models import make_full_decoder

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

TOLERANCE = 1e-3
LAYERS = 4
#: Of four layers: none before, none behind, one of its own at either end, and in the middle.
GROUPS = ("0-1", "2-3", "1-2", "0-0", "3-3")


class Oracle:
    def __init__(self, settings, full: Path):
        self._base, self._full = _load(settings.model), _load(full)
        self._adapters = {n: PeftModel.from_pretrained(_load(settings.model), f).eval() for n, f in settings.adapters.items()}

    def diff(self, decoder: str | None, prompt: list[int], tokens: list[int], logprobs: list[float], group: str | None):
        model = self._full if decoder == "full" else self._adapters.get(decoder, self._base)
        if group is None:
            return reference.max_abs_diff(logprobs, reference.prefillshare(self._base, model, prompt, tokens))
        first, last = map(int, group.split("-"))
        return reference.max_abs_diff(logprobs, reference.droidspeak(self._base, model, prompt, tokens, first, last))


def _load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["llama", "qwen3"])
async def running(request, tmp_path_factory, smollm):
    """(prefill engine, one that serves two adapters, one with weights of its own), the oracle"""
    folder = tmp_path_factory.mktemp(f"own-layers-{request.param}")
    kept = (1, 2, 3)
    adapters = replace(
        settings_of(folder, smollm, "droidspeak", ("a", "b"), request.param),
        ecache_layers=kept,
        prefill_ecache_layers=kept,
        kv_cache_bytes=KV_BYTES * (LAYERS + len(kept)) // LAYERS,
    )
    full = make_full_decoder(Path(adapters.model), folder / "full", seed=5)
    own = replace(adapters, model=str(full), adapters={}, ecache_layers=(2,), pool="own")
    async with started(adapters, own) as engines:
        yield engines, Oracle(adapters, full)


async def exact(running, prompt: list[int], n: int, decoder: str | None = "a", own_layers: str | None = "1-2", **kw):
    """A turn that agrees with the reference; its last chunk and the reasons of its resumes."""
    (prefill, of_adapters, own), oracle = running
    engines = (prefill, own) if decoder == "full" else (prefill, of_adapters)
    adapter = None if decoder == "full" else decoder
    tokens, logprobs, chunk, reasons = await turn(engines, prompt, n, adapter, own_layers=own_layers, **kw)
    assert oracle.diff(decoder, prompt, tokens, logprobs, own_layers) <= TOLERANCE
    return tokens, chunk, reasons


@pytest.mark.parametrize("group", GROUPS)
async def test_any_group_of_layers_is_the_decoders_own(running, group):
    await exact(running, ids(70, salt=GROUPS.index(group)), 12, "a", group)


async def test_weights_of_its_own_and_fewer_kept_layers_than_the_prefill_engine(running):
    for group in ("2-2", "2-3", "0-2"):
        await exact(running, ids(75, salt=10), 12, "full", group)
