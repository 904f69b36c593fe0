"""The base on which something is shown, adapters for it, and the settings of engines that serve them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.contract import DTYPE_BYTES, KVShape
from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.layer_group import LayerGroup, ecache_parts
from prefillshare.kvshare.modes import SharingMode, modes
from prefillshare.proof.asked import Asked, Machine
from prefillshare.seeded_adapters import adapted, linear_layers, write_adapter
from prefillshare.tiny_models import SMALL, TINY, make_base

ADAPTERS = ("a", "b", "c", "d")
BLOCK, RANK, LEASE_S = 32, 8, 60


@dataclass(frozen=True)
class Subject:
    """`linear`: module name -> (out features, in features). `group`: the layers that decoders compute themselves (modes that
    recompute)."""

    base: Path
    mode: SharingMode
    adapters: Mapping[str, Path]
    linear: Mapping[str, tuple[int, int]]
    group: LayerGroup | None
    layers: int

    @classmethod
    def of(cls, asked: Asked, mode: SharingMode) -> Subject:
        folder = Path(asked.folder)
        base = Path(asked.base) if asked.base else folder / "base"
        if not (base / "config.json").is_file():
            make_base("llama", base, sizes=SMALL if Machine.here().is_gpu and not asked.short else TINY)
        linear = linear_layers(base)
        made = make_adapters(base, folder / f"adapters-{mode.name}", linear, mode)
        layers = KVShape.of(base).layers
        group = LayerGroup(layers // 4, layers // 2) if mode.recomputes else None
        return cls(base, mode, made, linear, group, layers)

    def weight_bytes(self, dtype: str) -> int:
        """Of the blocks' linear layers, which are most of a large base."""
        return DTYPE_BYTES[dtype] * sum(rows * columns for rows, columns in self.linear.values())

    def kv_bytes(self, dtype: str) -> int:
        """Per token."""
        return KVShape.of(self.base).bytes_per_token(dtype)

    def settings(self, role: str, dtype: str, *, max_tokens: int, kv_tokens: int, engines: int, **more) -> EngineSettings:
        """Settings of one of `engines` engines that run side by side. `kv_tokens`: how many tokens its KV cache holds."""
        kept = (transition,) if self.group and (transition := self.group.transition) else ()
        shape = KVShape.of(self.base)
        hidden = fingerprint.read_json(str(self.base), "config.json")["hidden_size"]
        kept_layers = len(kept) * ecache_parts(hidden, shape.kv_heads, shape.head_size)
        kv_bytes = shape.bytes_per_token(dtype) * (self.layers + kept_layers) // self.layers
        arguments = {"skip_tokenizer_init": True, "gpu_memory_utilization": 0.9 / engines}
        return EngineSettings(
            role=role,
            pool=role,
            model=str(self.base),
            mode=self._mode_of(role).name,
            contract="proof",
            dtype=dtype,
            max_model_len=max_tokens,
            block_size=BLOCK,
            kv_cache_bytes=kv_bytes * (-(-kv_tokens // BLOCK) + 1) * BLOCK,
            ecache_layers=kept,
            prefill_ecache_layers=kept if role == "decode" else (),
            makes_base_kv=role == "decode" and self.mode.base_in_place,
            adapters={name: str(path) for name, path in self.adapters.items()} if role == "decode" else {},
            max_lora_rank=RANK,
            max_loras=len(ADAPTERS),
            lease_s=LEASE_S,
            cpu_cores=",".join(map(str, sorted(os.sched_getaffinity(0)))),
            **{"engine_args": arguments | more.pop("engine_args", {}), **more},
        )

    def _mode_of(self, role: str) -> SharingMode:
        """Prefill engines do not depend on the modes that draw on them."""
        return self.mode if role == "decode" else next(mode for mode in modes() if mode.shares_prefill)


def make_adapters(base: Path, target: Path, layers: Mapping[str, tuple[int, int]], mode: SharingMode) -> dict[str, Path]:
    """Write the adapters, which need no contract here. `layers`: module name -> (out features, in features)."""
    made = {name: target / name for name in ADAPTERS}
    for name, folder in made.items():
        write_adapter(folder, adapted(layers, mode.adapter_modules), base, name, RANK)
    return made


def in_place() -> list[SharingMode]:
    """The modes in which one engine can do everything."""
    return [mode for mode in modes() if mode.base_in_place]
