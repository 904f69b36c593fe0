"""`router` of the deployment file: surfaces, queue, sessions, placement, who may call."""

from __future__ import annotations

import os
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from prefillshare.kvshare import host_names, origins, redis_url
from prefillshare.kvshare.config.access import Auth, Tls
from prefillshare.kvshare.config.changes import ROUTERS, TAKEN_OVER, refused
from prefillshare.kvshare.config.placement import Placement
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.yaml_tree import Node

#: What YAML makes of a bare `off`.
_OFF_IS_FALSE = BeforeValidator(
    lambda value: "off" if value is False else value, json_schema_input_type=Literal["off", "read", "full", False]
)
_OF_PROXIES = refused("Ray Serve's proxies keep listening where they do while they run", fix="start anew")


class Router(Node):
    """The ingress: HTTP and gRPC surfaces, sessions, placement."""

    CHANGE: ClassVar = ROUTERS

    replicas: Annotated[int, TAKEN_OVER] = Field(1, ge=1)
    """Number of router replicas. More than one needs redis_url and a machine for each replica, since all listen on the same
    ports."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources that a router takes, as for engines."""
    host: Annotated[str, _OF_PROXIES] = Field("127.0.0.1", pattern=r"^[^\[\]/\s]+$")
    """Address on which both surfaces listen, IPv4 or IPv6 (without brackets); "0.0.0.0" or "::" for all addresses. If it is a
    loopback address, a local Ray cluster and the engines listen on loopback, too."""
    http_port: Annotated[int, _OF_PROXIES] = Field(8000, ge=1, le=65535)
    """Port of the OpenAI-compatible HTTP surface."""
    grpc_port: int = Field(9000, ge=1, le=65535)
    """Port of the gRPC surface."""
    max_queued: Annotated[int, TAKEN_OVER] = Field(256, ge=1)
    """Most turns that are in progress or wait for room. Beyond that, the last turn in the longest line is refused with
    RESOURCE_EXHAUSTED / 429 and a retry hint."""
    max_wait_s: Annotated[float, TAKEN_OVER] = Field(30, gt=0)
    """Longest time that a turn waits for room, seconds. A turn that, by the measured rates, would wait longer, or too long to
    end before its deadline, is refused at once."""
    max_request_bytes: int | None = Field(None, ge=4096)
    """Largest body of an HTTP request and largest gRPC message, in bytes; larger ones are refused unread. Unset: 64 bytes per
    token of base.max_model_len, at least 1 MiB."""
    grammar_cpu_s: float = Field(5, gt=0)
    """Most CPU time that compiling the format of a response (JSON schema, regex, choice, grammar) may take, seconds; a format
    that takes longer is refused. It is tried in a process of its own, before the turn waits for room."""
    max_queued_prefill_tokens: int = Field(32768, ge=1)
    """While a prefill replica has this many tokens of admitted turns still to compute, no further turn starts there. It should
    be enough to keep a replica busy. With more, turns wait in the engine instead of in the router, and only the router's queue
    looks at priorities and tenants."""
    expected_output_tokens: Annotated[int, TAKEN_OVER] = Field(256, ge=1)
    """Number of tokens that a turn is expected to generate if its max_tokens is not lower: decode blocks are reserved for the
    prompt and this many tokens. If it is too low, turns outgrow what was reserved and engines preempt; if it is too high, room
    stays unused."""
    max_sessions: int = Field(10_000, ge=1)
    """Most sessions kept; with Redis, by all routers together. Beyond that, a new session is refused."""
    session_ttl_s: float = Field(3600, gt=0)
    """A session that is unused for this long is deleted, seconds, unless its client has given it a time to live of its own."""
    max_session_ttl_s: float | None = Field(None, gt=0)
    """Longest time to live, in seconds, that a client may give a session of its own. Unset: session_ttl_s, so that a client can
    only have its sessions forgotten earlier."""
    max_kept_share: float = Field(0.5, ge=0, le=1)
    """Share of the KV blocks, of the engines that make the base's KV, which may be kept because somebody asks for it
    (KeepSession, `cache_control`, prompt_cache_retention), by all tenants together. Kept blocks are given up when requests need
    the room, so they never hold up a turn, but they leave less room for caching what others use. 0: nothing may be kept."""
    max_kept_tokens: int | None = Field(None, ge=0)
    """Most tokens that all tenants together may keep, beside max_kept_share. Unset: as many as that allows."""
    max_responses: int = Field(4096, ge=1)
    """Most stored responses and conversations (OpenAI's APIs of these names) that a tenant has, counted by the threads that
    they form: responses that follow each other are one. Beyond that, the one that was unused for longest is forgotten."""
    response_ttl_s: float = Field(86400, gt=0)
    """A stored response or conversation that is unused for this long is forgotten, seconds."""
    own_prompt: Literal["behind", "first"] = "behind"
    """Where calls that go on from a session or an earlier response have what is the calling agent's own: its tools and, over
    HTTP, its system prompt (`instructions`). behind: after the shared context, right before the answer, so that agents with
    different ones share the context's KV; the context does not keep them. first: where the chat template puts them; then only
    calls with the same ones share."""
    redis_url: str | None = None
    """Redis server (6.2 or newer, or Valkey) that keeps sessions and accounts: "redis://[user@]host[:port][/db]",
    "rediss://..." (TLS), "unix://path". Options: ssl_*. Unset: both are kept in the router's memory and are lost when the
    router ends. Required for several routers."""
    redis_password_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the Redis password, on every machine where a router may run. The password itself never
    stands in this file, which others may see, because Ray shows what it deploys."""
    redis_prefix: str = Field("prefillshare", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Prefix of this deployment's keys in Redis. Deployments that share a server need different prefixes."""
    usage_days: int = Field(400, ge=1, le=10_000)
    """Days for which the ledger keeps what tenants have used (prefillshare usage). With redis_url the ledger is in Redis, and
    exact whatever ends; otherwise it is in the router's memory, and lost when the router ends."""
    default_deadline_s: Annotated[float, TAKEN_OVER] = Field(300, gt=0)
    """Deadline of a turn whose client sets none, seconds."""
    max_resumes: Annotated[int, TAKEN_OVER] = Field(64, ge=0)
    """How often one turn may be taken up again, for whatever reason, before it fails."""
    max_retries: Annotated[int, TAKEN_OVER] = Field(5, ge=0)
    """How often one turn may go on elsewhere because a replica failed, before the turn fails."""
    replica_wait_s: float = Field(60, ge=0)
    """How long a turn waits for a replica when no replica may be given work, seconds. The wait ends earlier if the turn's
    deadline does."""
    wedged_after_s: float = Field(30, gt=0)
    """If a replica leaves a question unanswered, or its engine makes no step, for this long, it is no longer waited for,
    seconds: its turns go on elsewhere, and it gets no further turns until a probe succeeds. Must be longer than the longest
    step of an engine: on CPUs a step of a few thousand prompt tokens takes ten seconds, on GPUs 5 is enough."""
    eager_prefill: bool = True
    """Let the prefill pool make a response's KV while the response streams and when it has ended, at the lowest priority, so
    that the next turn finds it there: that of its session, or a chat over HTTP that goes on from it."""
    eager_prefill_max: int = Field(8, ge=1)
    """Most eager prefills that one router runs at once."""
    eager_prefill_stride_tokens: int = Field(256, ge=1)
    """While a response streams, its KV is made each time that this many tokens have been added."""
    pull_back: Literal["cheaper", "always", "never"] = "cheaper"
    """Let the prefill pool pull a response's KV from the decode engine, in modes whose generated KV is base KV. cheaper: if
    that has lately taken less time than computing it; always: to spare the prefill pool; never: the KV is computed."""
    pull_back_max: int = Field(32, ge=1)
    """Most responses whose KV the prefill pool pulls at once for one router."""
    canary_share: float = Field(0.001, ge=0, le=1)
    """Share of the turns in mode droidspeak for which one token is predicted again with the decoder's own prefill, at the
    lowest priority; prefillshare_canary_divergence shows how far apart the two predictions are."""
    placement: Annotated[Placement, TAKEN_OVER] = Field(default_factory=Placement)
    """How replicas are chosen."""
    auth: Auth | None = None
    """Tenants and their API keys; unset: anybody may call, as one anonymous tenant."""
    tls: Annotated[Tls | None, Tls.CHANGE] = None
    """Certificates for both surfaces; unset: no encryption."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the HTTP surface from a browser (CORS), like "https://chat.example:8443"; "*": all
    origins. Empty: none."""
    ui: Annotated[Literal["off", "read", "full"], _OFF_IS_FALSE] = "read"
    """The page at /ui on the HTTP port. read: it shows pools, replicas and recent turns; full: it has a playground, too, which
    takes turns for whoever uses it; off: there is no page. With `router.auth`, the page asks for an API key and shows that
    tenant's turns only."""
    ui_hosts: tuple[str, ...] = ()
    """Further host names, without port, under which browsers may ask for the page: those of a load balancer, an ingress or this
    machine; "*": any. Without them the page answers to `router.host`, "localhost" and IP addresses only, so that no other web
    site can read it by pointing a name of its own at the router (DNS rebinding). Where the router listens on loopback and
    `auth` is unset, this holds for all of HTTP."""

    @field_validator("ui_hosts")
    @classmethod
    def _are_host_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if problem := host_names.problem(value):
            raise ValueError(problem)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if problem := origins.problem(value):
            raise ValueError(problem)
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: str | None) -> str | None:
        if problem := value is not None and redis_url.problem(value):
            raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _sessions_are_shared(self) -> Router:
        if self.replicas > 1 and not self.redis_url:
            raise ValueError(f"{self.replicas} router replicas need a session store they share; set redis_url or use 1")
        if self.redis_password_env and not self.redis_url:
            raise ValueError("redis_password_env goes with redis_url; set that too, or remove it")
        return self

    @model_validator(mode="after")
    def _sessions_may_live_as_long_as_usual(self) -> Router:
        if self.longest_session_ttl_s < self.session_ttl_s:
            raise ValueError(
                f"max_session_ttl_s is {self.max_session_ttl_s:g}, but sessions live for {self.session_ttl_s:g} (session_ttl_s)"
                " anyway; raise it, or leave it out"
            )
        return self

    @property
    def longest_session_ttl_s(self) -> float:
        """`max_session_ttl_s`, or what it is if it is unset."""
        return self.session_ttl_s if self.max_session_ttl_s is None else self.max_session_ttl_s

    @model_validator(mode="after")
    def _ports_differ(self) -> Router:
        if self.http_port == self.grpc_port:
            raise ValueError(f"http_port and grpc_port are both {self.http_port}; give each a port of its own")
        return self

    def redis_password(self) -> str | None:
        """What redis_password_env names, from this process's environment. Raises ConfigError if it is not there."""
        if self.redis_password_env is None:
            return None
        if not (password := os.environ.get(self.redis_password_env)):
            raise ConfigError(
                f"environment variable {self.redis_password_env} is not set, or empty",
                field="router.redis_password_env",
                fix="set it to the Redis password where the router runs",
            )
        return password
