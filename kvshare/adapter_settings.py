"""The settings of a LoRA adapter (adapter_config.json): what they say of rank and modules, and whether engines follow them.

vLLM reads a few of PEFT's settings, refuses some, and ignores the rest. A setting that changes what the adapter computes and
that no engine follows is refused here, because the adapter would not answer as it was trained to.

Seam: peft/tuners/lora/config.py; peft/tuners/tuners_utils.py (`check_target_module_exists`); vllm/lora/peft_helper.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.errors import ConfigError

FILE = "adapter_config.json"

#: Settings that make the adapter something else than LoRA on linear modules -> what they make it.
_OTHER_KINDS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of LoRA B",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "layer_replication": "layers of the base run more than once",
    "modules_to_save": "modules trained in full beside the LoRA",
    "trainable_token_indices": "embeddings trained beside the LoRA",
    "target_parameters": "LoRA on bare parameters",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA)",
    "arrow_config": "routing among adapters (Arrow)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "fan_in_fan_out": "weights stored transposed",
}
#: Values of `init_lora_weights` that set only A and B. Others (PiSSA, OLoRA, CorDA, LoftQ) change the base, too.
_OWN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
#: Settings that are read here, or that have no effect once the adapter is trained.
_KNOWN = frozenset({
    "peft_type", "task_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights", "lora_dropout", "inference_mode",
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config", "ensure_weight_tying",
}) | _OTHER_KINDS.keys()  # fmt: skip

_MERGE = "train it as plain LoRA, or merge it into the base's weights and serve it as a `model`"
_SAVE = "give a LoRA adapter saved by PEFT"


@dataclass(frozen=True)
class AdapterSettings:
    """`rank` is that of modules for which no pattern says otherwise."""

    rank: int
    rank_pattern: Mapping[str, int]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]

    @classmethod
    def read(cls, folder: str) -> AdapterSettings:
        """Raises ConfigError for settings that no engine follows, or that are not PEFT's."""
        try:
            config = fingerprint.read_json(folder, FILE)
        except ConfigError as error:
            raise ConfigError(error.message, fix=_SAVE) from None
        _refuse_other_kinds(folder, config)

        def wrong(key: str, allowed: str) -> ConfigError:
            return ConfigError(f"{folder}/{FILE} has {key} = {config.get(key)!r}; {allowed}", fix=_SAVE)

        if not _is_rank(config.get("r")):
            raise ConfigError(f"{folder}/{FILE} has rank r = {config.get('r')!r}", fix=_SAVE)
        if not _is_number(config.get("lora_alpha")) or not config["lora_alpha"]:
            raise wrong("lora_alpha", "it is a number other than 0")
        if not isinstance(config.get("use_rslora") or False, bool):
            raise wrong("use_rslora", "it is true or false")
        for key, fits, what in (("rank_pattern", _is_rank, "ranks"), ("alpha_pattern", _is_number, "numbers")):
            patterns = config.get(key) or {}
            if not isinstance(patterns, dict) or not all(map(fits, patterns.values())) or not all(map(_is_regex, patterns)):
                raise wrong(key, f"it maps patterns of module names to {what}")
        targets, excluded = (_names(config.get(key)) for key in ("target_modules", "exclude_modules"))
        if not targets:
            raise wrong("target_modules", "it is a list of module names, or a pattern")
        if excluded is None:
            raise wrong("exclude_modules", "it is a list of module names, or a pattern")
        layers, pattern = config.get("layers_to_transform"), _names(config.get("layers_pattern"))
        layers = [layers] if isinstance(layers, int) else layers or []
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise wrong("layers_to_transform", "it is a list of layers, counted from 0")
        if pattern is None:
            raise wrong("layers_pattern", "it is the name of the list of layers")
        pattern = (pattern,) if isinstance(pattern, str) else pattern
        return cls(config["r"], config.get("rank_pattern") or {}, targets, excluded, tuple(layers), pattern)

    @property
    def highest_rank(self) -> int:
        return max(self.rank, *self.rank_pattern.values(), 1)

    def rank_of(self, module: str) -> int:
        """`module`: its full name in the base, such as model.layers.0.self_attn.q_proj."""
        matching = (rank for key, rank in self.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(matching, self.rank)

    def adapts(self, module: str) -> bool:
        """Whether PEFT puts the adapter on this linear module of the base."""
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return True
        if not _matches(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or not self.layers:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
        return found is not None and int(found[1]) in self.layers


def _refuse_other_kinds(folder: str, config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ConfigError(f"{folder} is a {kind} adapter; only LORA is served", fix="train a LoRA adapter")
    if (task := config.get("task_type") or "CAUSAL_LM") != "CAUSAL_LM":
        raise ConfigError(f"{folder}/{FILE} has task_type = {task!r}; decoders generate text (CAUSAL_LM)", fix=_SAVE)
    for key, name in _OTHER_KINDS.items():
        if value := config.get(key):
            raise ConfigError(f"{folder}/{FILE} has {key} = {value!r}: {name}, which engines do not serve", fix=_MERGE)
    if (bias := config.get("bias") or "none") != "none":
        raise ConfigError(f"{folder}/{FILE} has bias = {bias!r}: biases of the base are changed, too", fix=_MERGE)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _OWN_INITS:
        raise ConfigError(
            f"{folder}/{FILE} has init_lora_weights = {init!r}: it belongs to a base changed with it, not to the one served",
            fix="convert it to plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
        )
    for key, value in config.items():  # a number alone enables nothing
        if key not in _KNOWN and value and (value is True or not isinstance(value, int | float)):
            raise ConfigError(
                f"{folder}/{FILE} has {key} = {value!r}, which this release does not know",
                fix=f"if it does not change what the adapter computes, remove {key} from the file",
            )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_regex(value: Any) -> bool:
    """Whether it is one as a part of another, too, as PEFT uses it."""
    try:
        re.compile(value)
        re.compile(rf"(.*\.)?({value})$")
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return True


def _names(value: Any) -> str | tuple[str, ...] | None:
    """A pattern, or names; () if `value` is empty, None if it is neither."""
    if not value:
        return ()
    if isinstance(value, str):
        return value if _is_regex(value) else None
    return tuple(value) if isinstance(value, list) and all(isinstance(name, str) and name for name in value) else None


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
