"""The deployment file: one frozen tree, unknown keys refused, every field documented with meaning, range and default.

`load(path)` reads and checks everything that can be known without starting an engine, except model files
(`kvshare.contract`) and the machine (`prefillshare.preflight`). Errors name the field's path, the value and the fix.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvshare.errors import ConfigError
from kvshare.modes import get_mode, mode_names

#: Names that appear in URLs, metrics labels and Ray deployment names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Base(_Node):
    """The frozen base model: it makes all shared KV."""

    model: str
    """Folder of the base model in Hugging Face format. Relative paths are tried from the current folder, then from
    the deployment file's."""
    name: Name = "base"
    """Name under which the base itself is served beside its decoders."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of weights and KV, the same in every engine. On CPUs without AVX-512 bfloat16 is slow: use float32."""
    max_model_len: int = Field(4096, ge=16)
    """Longest prompt plus response, in tokens. At most the model's own limit."""
    block_size: int = Field(32, ge=1, le=256)
    """Tokens per KV block. CPU attention wants a multiple of 32; on GPUs 16 is usual."""
    tool_call_parser: str | None = None
    """vLLM tool parser of the base's family ("hermes", "llama3_json", ...). Unset: tools are refused unless named."""
    reasoning_parser: str | None = None
    """vLLM reasoning parser of the base's family, if it thinks aloud."""


class Engines(_Node):
    """Replicas of one kind of engine and what each of them gets."""

    replicas: int = Field(1, ge=1, le=4096)
    """Number of engine replicas."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache per replica, GiB. Must hold at least one sequence of base.max_model_len."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs per replica. Leave at 1 on CPUs."""
    max_num_seqs: int = Field(64, ge=1)
    """Most sequences one replica runs at once."""
    max_num_batched_tokens: int | None = Field(None, ge=16)
    """Most tokens one replica processes per step; unset: vLLM's default."""
    cpu_cores: str | None = Field(None, pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$")
    """CPU build only: cores every replica of this pool computes on, like "0" or "0-3". Unset: vLLM chooses."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, e.g. {gpu_memory_utilization: 0.9}. Those this system sets itself are refused."""

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "dtype", "max_model_len", "block_size", "kv_transfer_config", "scheduler_cls", "worker_cls",
                "enable_prefix_caching", "enable_lora", "kv_cache_memory_bytes", "tensor_parallel_size", "max_num_seqs"}
        if taken := sorted(ours & value.keys()):
            raise ValueError(f"{', '.join(taken)} is set by prefillshare; use the field of the deployment file instead")
        return value


class Prefill(Engines):
    """The prefill pool. It runs the base and is shared by every pool whose mode shares prefill."""


class DecodePool(Engines):
    """One decode pool: either LoRA adapters on the base (`adapters`), or one model with weights of its own (`model`)."""

    pool: Name
    """Name of the pool."""
    sharing: str = "prefillshare"
    """Sharing mode: where this pool's prompt KV comes from."""
    adapters: dict[Name, str] = Field(default_factory=dict)
    """Decoder name -> folder of its LoRA adapter in PEFT format."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 16
    """Highest LoRA rank this pool's engines make room for."""
    serve_base: bool = True
    """Adapter pools only: also serve the plain base under base.name. The first pool that does gets it."""
    model: str | None = None
    """Folder of a decoder with full weights."""
    name: Name | None = None
    """Name the full-weight decoder is served under; default: the pool's name."""
    prefill: Engines | None = None
    """Modes that do not share prefill only: the pool's own prefill engines; default: one, with the pool's sizes."""

    @field_validator("sharing")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        if value not in mode_names():
            raise ValueError(f"unknown sharing mode {value!r}; allowed: {', '.join(mode_names())}")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> DecodePool:
        if bool(self.adapters) == bool(self.model):
            raise ValueError("give either `adapters` (LoRA on the base) or `model` (full weights), and not both")
        if self.name and not self.model:
            raise ValueError("`name` goes with `model`; adapters are named by their keys")
        if self.prefill and get_mode(self.sharing).shares_prefill:
            raise ValueError(f"`prefill` is for modes with prefill engines of their own; {self.sharing} uses the shared pool")
        return self

    def own_prefill(self) -> Engines:
        """Sizes of this pool's own prefill engines, in modes that have them."""
        return self.prefill or Engines(**{name: getattr(self, name) for name in Engines.model_fields} | {"replicas": 1})


class Router(_Node):
    """The ingress: HTTP and gRPC surfaces, sessions, placement."""

    replicas: int = Field(1, ge=1)
    """Router replicas. More than one needs a shared session store, which this version does not have."""
    host: str = "127.0.0.1"
    """Address both surfaces listen on; "0.0.0.0" for all."""
    http_port: int = Field(8000, ge=1, le=65535)
    """Port of the OpenAI-compatible HTTP surface."""
    grpc_port: int = Field(9000, ge=1, le=65535)
    """Port of the gRPC surface."""
    max_queued: int = Field(256, ge=1)
    """Most turns in progress at once; further ones are refused with RESOURCE_EXHAUSTED / 429 and a retry hint."""
    max_sessions: int = Field(10_000, ge=1)
    """Most sessions kept; creating another one is refused."""
    session_ttl_s: float = Field(3600, gt=0)
    """A session unused for so long is forgotten, seconds."""
    default_deadline_s: float = Field(300, gt=0)
    """Deadline of a turn whose client sets none, seconds."""
    max_resumes: int = Field(64, ge=0)
    """How often one turn may be resumed after preemption or a failed KV load before it fails."""

    @field_validator("replicas")
    @classmethod
    def _one_router(cls, value: int) -> int:
        if value != 1:
            raise ValueError("this version keeps sessions in the router's memory; use 1")
        return value


class Cluster(_Node):
    """The Ray cluster."""

    address: str | None = None
    """Address of a running Ray cluster ("auto", "ray://..."); unset: start a local one and end it on exit."""
    num_cpus: int | None = Field(None, ge=1)
    """Local cluster only: CPUs Ray may hand out; unset: all."""
    start_timeout_s: float = Field(600, gt=0)
    """How long all replicas may take to be ready, seconds."""
    kv_lease_s: int = Field(60, ge=6)
    """How long a prefill replica holds KV for a decode replica that has not read it yet, seconds."""


class Deployment(_Node):
    """One deployment: a base, its prefill pool, decode pools, the router."""

    base: Base
    prefill: Prefill = Field(default_factory=Prefill)
    """Ignored if no pool shares prefill."""
    decode: tuple[DecodePool, ...] = Field(min_length=1)
    router: Router = Field(default_factory=Router)
    cluster: Cluster = Field(default_factory=Cluster)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Deployment:
        pools = [p.pool for p in self.decode]
        if again := sorted({p for p in pools if pools.count(p) > 1}):
            raise ValueError(f"decode: pool name used twice: {', '.join(again)}")
        names = [n for p in self.decode for n in (p.adapters or [p.name or p.pool])]
        if again := sorted({n for n in names if names.count(n) > 1 or n == self.base.name}):
            raise ValueError(f"decode: decoder name used twice: {', '.join(again)}; the base is called {self.base.name!r}")
        return self

    @property
    def shares_prefill(self) -> bool:
        return any(get_mode(p.sharing).shares_prefill for p in self.decode)


def parse(data: Any, folder: Path | None = None) -> Deployment:
    """Check a deployment given as plain data. Model paths become absolute. Raises ConfigError naming every bad field."""
    if not isinstance(data, dict):
        raise ConfigError("a deployment file is a mapping with the keys base, prefill, decode, router, cluster")
    try:
        deployment = Deployment.model_validate(data)
    except ValidationError as error:
        raise _as_config_error(error) from None
    return _with_absolute_paths(deployment, folder or Path.cwd())


def load(path: str | Path) -> Deployment:
    """Read and check a deployment file."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no such deployment file: {path}", fix="deploy/configs/ holds one example per scenario") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    return parse(data, path.resolve().parent)


def _as_config_error(error: ValidationError) -> ConfigError:
    problems = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = re.sub(r"^Value error, ", "", item["msg"])
        if item["type"] == "extra_forbidden":
            message = f"unknown key{_did_you_mean(item['loc'])}"
        elif item["type"] != "missing" and not isinstance(item["input"], dict):
            message = f"{message}, got {item['input']!r}"
        problems.append((field, message))
    field, message = problems[0]
    rest = "".join(f"\n  {f}: {m}" if f else f"\n  {m}" for f, m in problems[1:])
    return ConfigError(message + rest, field=field or None)


def _did_you_mean(loc: tuple) -> str:
    import difflib

    nodes = {"base": Base, "prefill": Prefill, "decode": DecodePool, "router": Router, "cluster": Cluster}
    node = Deployment if len(loc) == 1 else nodes.get(str(loc[0]), Deployment)
    close = difflib.get_close_matches(str(loc[-1]), node.model_fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(node.model_fields)}"


def _with_absolute_paths(deployment: Deployment, folder: Path) -> Deployment:
    def resolve(field: str, text: str) -> str:
        for candidate in (Path(text).expanduser(), folder / text):
            if candidate.is_dir():
                return str(candidate.resolve())
        raise ConfigError(f"no such folder: {text!r}", field=field, fix="give the folder of a model in Hugging Face format")

    pools = []
    for number, pool in enumerate(deployment.decode):
        update: dict[str, Any] = {
            "adapters": {n: resolve(f"decode.{number}.adapters.{n}", p) for n, p in pool.adapters.items()}
        }
        if pool.model:
            update["model"] = resolve(f"decode.{number}.model", pool.model)
        pools.append(pool.model_copy(update=update))
    base = deployment.base.model_copy(update={"model": resolve("base.model", deployment.base.model)})
    return deployment.model_copy(update={"base": base, "decode": tuple(pools)})
