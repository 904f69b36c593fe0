"""Which models an engine runs: vLLM's own, or one of our families in their place. A mode names the family of its decode engines
(`SharingMode.models`). vLLM finds our models by the family's prefix before the stock architecture's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.model_config import ModelConfig
from prefillshare.kvshare.modes import SharingMode, get_mode, modes


class Family:
    """vLLM's own models."""

    prefix = ""

    def engine_args(self, s: EngineSettings) -> dict[str, Any]:
        return {}

    def follow(self, runner, has_adapters: bool) -> None:
        """From now on, a decode engine's model runner tells the model what it needs to know about each batch."""

    def make_base_kv(self, runner, mode: SharingMode) -> None:
        """From now on, a decode engine computes the rows of a shared prefix as the base's."""
        from prefillshare.kvshare_vllm.models.base_rows import BaseRows

        runner.base_rows = BaseRows(runner, mode)

    def check_base_kv(self, runner) -> None:
        """To be called after a first prompt. Raises RuntimeError if `make_base_kv` had no effect on it."""
        if not runner.base_rows.prompts:
            raise RuntimeError("rows of a shared prefix run with its adapter: vLLM no longer asks models/base_rows.py")


class Instead(Family):
    """Models of ours in place of vLLM's. `module`: one in this folder, with a class for each architecture."""

    module: str

    def engine_args(self, s: EngineSettings) -> dict[str, Any]:
        """Batches of decodes are captured as graphs; nothing is compiled."""
        stock = ModelConfig.read(s.model).architectures
        return {
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            "hf_overrides": {"architectures": [self.prefix + name for name in stock], **self.config(s)},
        }

    def config(self, s: EngineSettings) -> dict[str, Any]:
        """What the model's config has in addition to the stock config."""
        return {}


class TwoStreams(Instead):
    """Base and adapter side by side. What layers compute depends on a batch's adapters; it is captured where it does not."""

    prefix, module = "Icarus", "two_streams"

    def follow(self, runner, has_adapters: bool) -> None:
        from prefillshare.kvshare_vllm.models.two_streams import follow_adapters

        if has_adapters:
            follow_adapters(runner)

    def make_base_kv(self, runner, mode: SharingMode) -> None:
        """Nothing to do: the encoder stream is the base."""

    def check_base_kv(self, runner) -> None:
        """Nothing to check: the model's structure ensures it."""


class PartialLayers(Instead):
    """Tokens may pass through only a few layers, and layers' inputs may be kept. Prompts run eagerly, layer by layer; only
    decodes, which run as in the stock model, are captured as graphs."""

    prefix, module = "DroidSpeak", "own_layers"

    def engine_args(self, s: EngineSettings) -> dict[str, Any]:
        scheduler = "prefillshare.kvshare_vllm.engine.own_layers_scheduler.OwnLayersScheduler"
        return super().engine_args(s) | ({"scheduler_cls": scheduler} if s.role == "decode" else {})

    def config(self, s: EngineSettings) -> dict[str, Any]:
        return {"ecache_layers": list(s.ecache_layers), "keeps_ecache": s.role == "prefill"}

    def follow(self, runner, has_adapters: bool) -> None:
        from prefillshare.kvshare_vllm.models.own_layers import follow_plans

        follow_plans(runner)


STOCK = Family()
PARTIAL_LAYERS = PartialLayers()
_FAMILIES: dict[str | None, Family] = {None: STOCK} | {one.module: one for one in (TwoStreams(), PARTIAL_LAYERS)}


def of_decode(mode: SharingMode) -> Family:
    return _FAMILIES[mode.models]


def of_engine(s: EngineSettings) -> Family:
    if s.role == "decode":
        return of_decode(get_mode(s.mode))
    return PARTIAL_LAYERS if s.ecache_layers else STOCK


def of_model(model: object) -> Family:
    """The family of a running model."""
    name = type(model).__name__
    return next((family for family in _FAMILIES.values() if family.prefix and name.startswith(family.prefix)), STOCK)


def registered() -> Iterator[tuple[str, str]]:
    """Architecture and class ("module:class") of every model of ours."""
    for mode in modes():
        if isinstance(family := of_decode(mode), Instead):
            for stock in sorted(mode.architectures):
                yield family.prefix + stock, f"{__package__}.{family.module}:{family.prefix}{stock}"


class BaseKV:
    """Mixed into vLLM's workers (`worker_extension_cls`)."""

    def check_base_kv(self) -> None:
        """As Family.check_base_kv."""
        of_model(self.model_runner.get_model()).check_base_kv(self.model_runner)
