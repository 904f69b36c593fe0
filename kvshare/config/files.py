"""What a deployment names on disk: folders become absolute; what lies beside decoders (profiles, contracts) becomes what they
compute of a prompt themselves."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from prefillshare.kvshare import chat_template
from prefillshare.kvshare.config.access import with_files
from prefillshare.kvshare.config.tree import Base, DecodePool, Deployment
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError, InvalidInput
from prefillshare.kvshare.layer_profile import LayerProfile
from prefillshare.kvshare.modes import get_mode


def with_files_found(deployment: Deployment, folder: Path) -> Deployment:
    """Relative paths are tried from the current folder, then from `folder`. Raises ConfigError for what is not there."""

    def resolve(field: str, text: str, kind: str = "a model in Hugging Face format") -> str:
        candidates = (Path(text).expanduser(), folder / text)
        for candidate in candidates:
            if candidate.is_dir():
                return str(candidate.resolve())
        tried = " or ".join(dict.fromkeys(str(c.absolute()) for c in candidates))
        raise ConfigError(f"no such folder: {text!r} (looked for {tried})", field=field, fix=f"give the folder of {kind}")

    pools = []
    for number, pool in enumerate(deployment.decode):
        adapters = {
            name: resolve(f"decode.{number}.adapters.{name}", text, "a LoRA adapter in PEFT format")
            for name, text in pool.adapters.items()
        }
        update: dict[str, Any] = {"adapters": adapters}
        if pool.model:
            update["model"] = resolve(f"decode.{number}.model", pool.model)
        pools.append(pool.model_copy(update=update))
    base_folder = resolve("base.model", deployment.base.model)
    pools = [_with_profiles(number, _with_own_tokens(pool), base_folder) for number, pool in enumerate(pools)]
    base = deployment.base.model_copy(update={"model": base_folder, "chat_template": _template(deployment.base, folder)})
    router = deployment.router.model_copy(update=with_files(deployment.router.auth, deployment.router.tls, folder))
    return deployment.model_copy(update={"base": base, "decode": tuple(pools), "router": router})


def _template(base: Base, folder: Path) -> str | None:
    if base.chat_template is None:
        return None
    given = chat_template.found(base.chat_template, folder)
    chat_template.text_of(given)
    return given


def _with_own_tokens(pool: DecodePool) -> DecodePool:
    """Its decoders' own tokens as their contracts have them. What is wrong with a contract is said when it is checked."""
    if not get_mode(pool.sharing).own_end:
        return pool
    own_tokens = dict(pool.own_tokens)
    for name in pool.decoders:
        with suppress(ConfigError):
            own_tokens.setdefault(name, DecoderContract.read(pool.model or pool.adapters[name]).own_tokens)
    return pool.model_copy(update={"own_tokens": {name: count for name, count in own_tokens.items() if count > 1}})


def _with_profiles(number: int, pool: DecodePool, base: str) -> DecodePool:
    """Its decoders' own layers as their profiles and the pool's floor have them."""
    if pool.quality_floor is None:
        return pool
    own_layers = dict(pool.own_layers)
    for name in pool.decoders:
        if name in own_layers:
            continue
        field = f"decode.{number}.quality_floor"
        try:
            profile = LayerProfile.read(pool.model or pool.adapters[name], base)
        except InvalidInput as error:
            error.field = error.field or field
            raise
        if not (groups := profile.within(pool.quality_floor)):
            least = min(point.divergence for point in profile.points)
            raise ConfigError(
                f"no group of layers of {name} is within {pool.quality_floor:g}; the best measured has {least:.4g}",
                field=field,
                fix="raise it, or serve this decoder in mode none",
            )
        own_layers[name] = groups
    return pool.model_copy(update={"own_layers": own_layers})
