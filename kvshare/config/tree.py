"""The deployment file: one frozen tree, unknown keys refused, every field documented with meaning, range and default.

`kvshare.config.load(path)` reads and checks everything that can be known without starting an engine, except model files
(`kvshare.contract`) and the machine (`prefillshare.preflight`). Errors name the field's path, the value and the fix.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from prefillshare.kvshare.config.changes import BOTH, ENGINES, ROUTERS, TAKEN_OVER, Change, refused
from prefillshare.kvshare.config.router import Router
from prefillshare.kvshare.engine_settings import OUR_ENGINE_ARGS, SHARED_PREFILL, own_prefill
from prefillshare.kvshare.layer_group import layer_group
from prefillshare.kvshare.modes import get_mode, mode_names
from prefillshare.kvshare.yaml_tree import FieldError, Name
from prefillshare.kvshare.yaml_tree import Node as _Node

Folder = Annotated[str, Field(min_length=1)]
_ANOTHER = Change("the old one is removed, a new one is added", replaces_engines=True)
_UNDER_ITS_NAME = refused("it differs from that of the running pool of this name", fix="give the pool another name")
_ANOTHER_TRANSPORT = refused("engines of two transports cannot exchange KV", fix="start a second deployment")
_ANOTHER_NAME = refused("a running deployment keeps its name", fix="give the name of the one that runs, or start this one")
_ANOTHER_CLUSTER = refused("it runs on another cluster", fix="start a second deployment there")


class Base(_Node):
    """The frozen base model, which makes all shared KV."""

    CHANGE: ClassVar = refused("the base cannot change while it runs", fix="start a second deployment")

    model: Folder
    """Folder of the base model in Hugging Face format. Relative paths are tried from the current folder, then from the folder
    of the deployment file."""
    name: Name = "base"
    """Name under which the base itself is served beside its decoders."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of weights and KV, the same in every engine. bfloat16 is slow on CPUs without AVX-512: use float32 there."""
    max_model_len: int = Field(4096, ge=16)
    """Greatest length of prompt plus response, in tokens. At most the model's own limit."""
    block_size: int = Field(32, ge=1, le=256)
    """Tokens per KV block. CPU attention needs a multiple of 32; on GPUs 16 is usual."""
    tool_call_parser: str | None = None
    """vLLM's tool parser for the base's family ("hermes", "llama3_json", ...). Unset: requests with tools are refused,
    unless their tool_choice is "none"."""
    tool_strict_level: Literal["auto", "forced", "function", "parameter"] = "forced"
    """What tool calls are held to, beyond tools that a request marks as `strict`. auto: a forced call (tool_choice "required",
    or a tool's name) calls a tool that is offered; its arguments are free. forced: its arguments also obey the tool's schema,
    unless the tool says `strict: false`. function, parameter: as vLLM's --tool-strict-level: every call, also with tool_choice
    "auto", calls a tool that is offered (function), with arguments that obey its schema (parameter). A schema that engines
    cannot enforce in full is refused where it would have to be obeyed."""
    chat_template: str | None = Field(None, min_length=1)
    """Template that lays out conversations, over both surfaces, instead of the one in base.model: a Jinja file (relative paths
    are tried as for base.model), or the name of a template that comes with prefillshare ("smollm2_tools") or with vLLM
    ("template_chatml"). It is part of the KV contract: decoders in sharing pools are served only if they were trained with it
    (recipes' chat_template), or if somebody vouches for it (prefillshare contract write)."""


class Autoscale(_Node):
    """The number of replicas follows the load between two bounds (Ray Serve's autoscaling)."""

    CHANGE: ClassVar = TAKEN_OVER

    min_replicas: int = Field(1, ge=1, le=4096)
    """Fewest replicas."""
    max_replicas: int = Field(ge=1, le=4096)
    """Most replicas. Where the cluster has no room for them, its own autoscaler is asked for more machines."""
    target_calls: float = Field(8, gt=0)
    """Mean number of calls that a replica should have under way: turns at decode, prompts at prefill. Turns that wait in the
    router do not count, so keep this well below what one replica has room for."""
    upscale_delay_s: float = Field(30, ge=0)
    """Replicas are added when the load has been above the target for this long, seconds."""
    downscale_delay_s: float = Field(600, ge=0)
    """Replicas are removed when the load has been below the target for this long, seconds. Running calls end first; the
    replicas' caches are lost."""


class Engines(_Node):
    """Replicas of one kind of engine, and what each of them gets."""

    CHANGE: ClassVar = ENGINES

    replicas: Annotated[int, TAKEN_OVER] = Field(1, ge=1, le=4096)
    """Number of engine replicas; with autoscale, the number at the start."""
    autoscale: Annotated[Autoscale | None, TAKEN_OVER] = None
    """Let the number of replicas follow the load; unset: it is fixed."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache per replica, GiB; with several GPUs per replica, on each of them. Must hold at least one sequence of
    base.max_model_len."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs per replica. Leave at 1 on CPUs."""
    gpu_share: float = Field(1.0, gt=0, le=1)
    """Part of a GPU on which one replica is placed. Below 1, several engines share one GPU. Each starts if 0.9 times its
    share of the memory is free (engine_args: gpu_memory_utilization); weights and kv_cache_gib must fit into that. Not with
    tensor_parallel_size above 1."""
    max_num_seqs: int = Field(64, ge=1)
    """Most sequences that one replica runs at once."""
    max_num_batched_tokens: int | None = Field(None, ge=16)
    """Most tokens that one replica processes per step, at least max_num_seqs; unset: vLLM's default."""
    cpu_cores: str | None = Field(None, pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$")
    """CPU build only: the cores on which every replica of this pool computes, like "0" or "0-3,6". Unset: vLLM chooses."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources that a replica takes, like {prefill-node: 0.01}: it is placed on machines that offer them. Unset: it
    is placed wherever there is room."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, e.g. {gpu_memory_utilization: 0.9}. Arguments that this system sets itself are refused."""

    @model_validator(mode="after")
    def _begins_within_its_bounds(self):
        if self.autoscale and not self.autoscale.min_replicas <= self.replicas <= self.autoscale.max_replicas:
            bounds = f"{self.autoscale.min_replicas} to {self.autoscale.max_replicas}"
            raise ValueError(f"replicas {self.replicas} is not within autoscale's {bounds}")
        return self

    @property
    def fewest_replicas(self) -> int:
        return self.autoscale.min_replicas if self.autoscale else self.replicas

    @property
    def most_replicas(self) -> int:
        return self.autoscale.max_replicas if self.autoscale else self.replicas

    @model_validator(mode="after")
    def _share_of_one_gpu(self):
        if self.gpu_share < 1 and self.tensor_parallel_size > 1:
            raise ValueError(f"gpu_share {self.gpu_share:g} needs tensor_parallel_size 1, got {self.tensor_parallel_size}")
        return self

    @model_validator(mode="after")
    def _room_for_every_sequence(self):
        if self.max_num_batched_tokens and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}, "
                f"and a step takes a token of each sequence; raise the one or lower the other"
            )
        return self

    @field_validator("cpu_cores", mode="before")
    @classmethod
    def _one_core(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value  # YAML reads an unquoted 0 as a number

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OUR_ENGINE_ARGS & value.keys()):
            raise ValueError(f"prefillshare sets {', '.join(taken)} itself; remove it here and use the deployment's own fields")
        return value


class Prefill(Engines):
    """The prefill pool. It runs the base and is shared by every pool whose mode shares prefill."""

    replicas: Annotated[int, TAKEN_OVER] = Field(1, ge=0, le=4096)
    """Number of prefill replicas; with autoscale, the number at the start. 0: there is no prefill pool, and decode engines
    compute the base's KV of prompts themselves. Only adapter pools in the modes prefillshare and icarus can do that."""


def _in_place() -> str:
    return ", ".join(name for name in mode_names() if get_mode(name).base_in_place)


class DecodePool(Engines):
    """One decode pool: either LoRA adapters on the base (`adapters`), or one model with weights of its own (`model`)."""

    pool: Annotated[Name, _ANOTHER]
    """Name of the pool."""
    sharing: Annotated[str, _UNDER_ITS_NAME] = "prefillshare"
    """Sharing mode: it decides where this pool's prompt KV comes from."""
    adapters: Annotated[dict[Name, Folder], TAKEN_OVER] = Field(default_factory=dict)
    """Mapping from a decoder's name to the folder of its LoRA adapter in PEFT format."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 16
    """Highest LoRA rank for which this pool's engines reserve room."""
    max_loras: int = Field(8, ge=1)
    """Number of adapters for which this pool's engines reserve room: this many may run in one step, and this many may be
    served. Adapters can be added while the pool runs as long as there is room; a change of this number replaces the engines.
    Each place takes the memory of an adapter of max_lora_rank on every linear layer: for a base of 8 billion parameters 80 MiB
    at rank 16 in bfloat16."""
    serve_base: Annotated[bool, TAKEN_OVER] = True
    """Adapter pools only: also serve the plain base, under base.name. If several pools have this setting, the first one serves
    it."""
    model: Annotated[Folder | None, _UNDER_ITS_NAME] = None
    """Folder of a decoder with weights of its own."""
    name: Annotated[Name | None, _ANOTHER] = None
    """Name under which the decoder in `model` is served; default: the pool's name."""
    own_layers: Annotated[dict[Name, tuple[str, ...]], TAKEN_OVER] = Field(default_factory=dict)
    """Mode droidspeak only: mapping from a decoder's name to the groups of layers that it may compute itself over a prompt, the
    largest group first, like ["4-9", "4-7"], or to one group, "4-9". "none": all KV is taken from the base. Unset:
    quality_floor decides; without it, "none"."""
    own_tokens: Annotated[dict[Name, Annotated[int, Field(ge=1)]], TAKEN_OVER] = Field(default_factory=dict)
    """Mode prefillshare only: mapping from a decoder's name to how many of a prompt's last tokens it computes itself. Unset:
    what its KV contract says, which a number here must agree with; 1 unless its training recipe has own_tokens."""
    quality_floor: Annotated[float | None, TAKEN_OVER] = Field(None, gt=0)
    """Mode droidspeak only: largest allowed divergence from the decoder's own prefill, nats per token. A decoder without
    own_layers gets those groups from the layer_profile.json beside it (prefillshare profile) that are within this limit."""
    ttft_objective_s: Annotated[float | None, TAKEN_OVER] = Field(None, gt=0)
    """Mode droidspeak only: objective for the time to first token, seconds. If a decoder has several groups, a turn takes the
    largest one with which its first token is expected within this time. Unset: always the first group."""
    local_prefill: Annotated[Literal["auto", "always", "never"] | None, TAKEN_OVER] = None
    """For adapter pools in the modes prefillshare and icarus: whether this pool's engines compute the base's KV that a turn
    lacks themselves. auto: when that is expected to cost all turns less time than getting it from the prefill pool, or from
    another engine that has it; never: only while no prefill replica can get work. Unset: auto."""
    inter_token_objective_s: Annotated[float | None, TAKEN_OVER] = Field(None, gt=0)
    """With local_prefill auto: objective for the time between two tokens of a response, seconds. A prompt that would make a
    step of the engine take longer, while responses run there, goes to the prefill pool. Unset: only expected delays count."""
    prefill: Engines | None = None
    """Modes that do not share prefill only: the pool's own prefill engines. Default: one engine with the pool's sizes."""

    @field_validator("sharing")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        if value not in mode_names():
            raise ValueError(f"unknown sharing mode {value!r}; allowed: {', '.join(mode_names())}")
        return value

    @field_validator("own_layers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: [groups] if isinstance(groups, str) else groups for name, groups in value.items()}

    @field_validator("own_layers")
    @classmethod
    def _groups_of_layers(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, groups in value.items():
            sizes = [len(group or ()) for group in map(layer_group, groups)]
            if not groups or sizes != sorted(sizes, reverse=True):
                raise ValueError(f"{name}: give at least one group of layers, the one of most layers first; got {list(groups)}")
        return value

    @model_validator(mode="after")
    def _own_parts_have_decoders(self) -> DecodePool:
        if not get_mode(self.sharing).recomputes:
            for field in ("own_layers", "quality_floor", "ttft_objective_s"):
                if getattr(self, field):
                    raise ValueError(f"`{field}`: mode {self.sharing} computes no layers of a prompt again; remove it")
        if self.own_tokens and not get_mode(self.sharing).own_end:
            raise ValueError(f"`own_tokens`: mode {self.sharing} has a fixed boundary; remove it")
        for field in ("own_layers", "own_tokens"):
            if unknown := sorted(getattr(self, field).keys() - self.decoders):
                raise ValueError(f"`{field}` names {', '.join(unknown)}; this pool's decoders are {', '.join(self.decoders)}")
        return self

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of those with files of their own."""
        return tuple(self.adapters) or (self.name or self.pool,)

    @model_validator(mode="after")
    def _one_kind(self) -> DecodePool:
        if bool(self.adapters) == bool(self.model):
            raise ValueError("give either `adapters` (LoRA on the base) or `model` (full weights), and not both")
        if len(self.adapters) > self.max_loras:
            raise ValueError(
                f"`max_loras` makes room for {self.max_loras} adapters, and there are {len(self.adapters)}; "
                f"raise max_loras to {len(self.adapters)}"
            )
        if self.name and not self.model:
            raise ValueError(f"`name` ({self.name}) goes with `model`; adapters are named by their keys, so remove it")
        if self.model and not get_mode(self.sharing).full_weights:
            raise ValueError(f"sharing mode {self.sharing} serves adapters only; make `model` an adapter or change the mode")
        for field in ("local_prefill", "inter_token_objective_s"):
            if getattr(self, field) is not None and not self.makes_base_kv:
                raise ValueError(f"`{field}` is for adapter pools in modes {_in_place()}; remove it")
        if self.inter_token_objective_s is not None and self.local_prefill in ("always", "never"):
            raise ValueError(f"`inter_token_objective_s` is for local_prefill auto, and it is {self.local_prefill}; remove one")
        if self.prefill and get_mode(self.sharing).shares_prefill:
            raise ValueError(
                f"`prefill` is for modes with prefill engines of their own; {self.sharing} uses the shared pool, so remove it"
            )
        return self

    @property
    def prefill_policy(self) -> str | None:
        """As `local_prefill`; None: its engines cannot make the base's KV."""
        return (self.local_prefill or "auto") if self.makes_base_kv else None

    @property
    def makes_base_kv(self) -> bool:
        """Whether its engines hold the base and can compute the KV of shared prefixes themselves."""
        return bool(self.adapters) and get_mode(self.sharing).base_in_place

    def own_prefill(self) -> Engines:
        """Sizes of this pool's own prefill engines, in modes that have them."""
        sizes = {name: getattr(self, name) for name in Engines.model_fields} | {"replicas": 1, "autoscale": None}
        return self.prefill or Engines(**sizes)


class Cluster(_Node):
    """The Ray cluster."""

    CHANGE: ClassVar = ENGINES

    address: Annotated[str | None, _ANOTHER_CLUSTER] = None
    """Address of a running Ray cluster ("auto", "ray://..."). If other machines can reach it, it must ask for a token
    (RAY_AUTH_MODE=token). Unset: a local cluster is started, and ended on exit."""
    num_cpus: Annotated[int | None, _ANOTHER_CLUSTER] = Field(None, ge=1)
    """Local cluster only: number of CPUs that Ray may hand out; unset: all."""
    start_timeout_s: Annotated[float, TAKEN_OVER] = Field(600, gt=0)
    """How long it may take until all replicas are ready, seconds."""
    kv_transport: Annotated[Literal["nixl"], _ANOTHER_TRANSPORT] = "nixl"
    """How KV moves between engines. All engines of a deployment use the same transport; it is part of the KV contract."""
    kv_lease_s: int = Field(60, ge=6)
    """How long a prefill replica holds KV for a decode replica that has not read it yet, seconds."""
    kv_load_timeout_s: Annotated[float, ROUTERS] = Field(30, gt=0)
    """A decode call that has not returned its first token after this time is given up, seconds; the turn then gets its KV from
    elsewhere. Set it higher than the time that a load and a decode step may take under load."""


class Logs(_Node):
    """What routers and engines log. They log to standard output, which Ray keeps in the logs folder of its session."""

    CHANGE: ClassVar = BOTH

    level: Annotated[Literal["debug", "info", "warning", "error"], TAKEN_OVER] = "info"
    """Least severe level of messages that are written. It can change while the deployment runs (prefillshare apply)."""
    format: Literal["text", "json"] = "text"
    """json: one JSON object per line, with the id of the request if there is one."""


class Tracing(_Node):
    """OpenTelemetry traces from the router and the engines: one span per turn, and one for each of its stages."""

    CHANGE: ClassVar = BOTH

    otlp_endpoint: str = Field(pattern=r"^https?://[^/\s]+(/\S*)?$")
    """Collector that takes OTLP: "http://HOST:4317" for gRPC, "http://HOST:4318/v1/traces" for HTTP."""
    protocol: Literal["grpc", "http/protobuf"] = "grpc"
    """Protocol of the collector."""
    sample_share: Annotated[float, ROUTERS] = Field(1.0, ge=0, le=1)
    """Share of the turns that are traced. If a caller sends a W3C traceparent, its turn is traced exactly if that trace is
    sampled."""


class Deployment(_Node):
    """One deployment: a base, its prefill pool, decode pools, the router."""

    name: Annotated[Name, _ANOTHER_NAME] = "prefillshare"
    """Name by which commands tell deployments apart (prefillshare status --name). On one machine, a user runs at most one
    deployment of a name."""
    base: Annotated[Base, Base.CHANGE]
    """The frozen base model."""
    prefill: Annotated[Prefill | None, ENGINES] = None
    """The shared prefill pool. Unset: one replica, or none if every pool that shares prefill can compute the KV of prompts
    itself (adapter pools in the modes prefillshare and icarus). Ignored if no decode pool shares prefill."""
    decode: Annotated[tuple[DecodePool, ...], ENGINES] = Field(min_length=1)
    """The decode pools, at least one."""
    router: Router = Field(default_factory=Router)
    """The ingress."""
    cluster: Cluster = Field(default_factory=Cluster)
    """The Ray cluster on which everything runs."""
    logs: Logs = Field(default_factory=Logs)
    """What is logged, and how."""
    tracing: Annotated[Tracing | None, BOTH] = None
    """Where traces are sent; unset: no traces are made."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Deployment:
        pools = [p.pool for p in self.decode]
        if again := sorted({p for p in pools if pools.count(p) > 1}):
            raise FieldError("decode", f"pool name used twice: {', '.join(again)}; give each pool a name of its own")
        # Pools, the router and prefill engines are named in one space: logs, metrics and Ray Serve.
        if taken := sorted({"router", SHARED_PREFILL, *map(own_prefill, pools)} & set(pools)):
            raise FieldError("decode", f"pool name {', '.join(taken)} is taken by another part of the system; rename the pool")
        names = [n for p in self.decode for n in p.decoders]
        if self.base.name in names:
            raise FieldError("decode", f"decoder {self.base.name!r} is named like the base; rename it or set base.name")
        if again := sorted({n for n in names if names.count(n) > 1}):
            raise FieldError("decode", f"decoder name used twice: {', '.join(again)}; a name is served by one pool")
        return self

    @model_validator(mode="after")
    def _somebody_makes_the_kv(self) -> Deployment:
        if self.prefill and not self.prefill.replicas and (needed_by := self._need_prefill):
            raise FieldError(
                "prefill.replicas",
                f"0 leaves nobody to make the KV of pool {needed_by[0].pool!r}; only adapter pools in modes "
                f"{_in_place()} make it themselves. Set it to 1",
            )
        return self

    @property
    def shared_prefill(self) -> Prefill | None:
        """The shared prefill pool that the deployment has, or None."""
        if self.prefill is None:
            return Prefill() if self._need_prefill else None
        shares = any(get_mode(p.sharing).shares_prefill for p in self.decode)
        return self.prefill if shares and self.prefill.replicas else None

    @property
    def _need_prefill(self) -> list[DecodePool]:
        return [p for p in self.decode if get_mode(p.sharing).shares_prefill and not p.makes_base_kv]
