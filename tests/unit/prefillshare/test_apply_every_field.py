"""`apply` returns when what runs is what the file says, whichever field has changed, and whatever dies later.

Ray Serve's part is played by a model of it: a deployment keeps its replicas while its version and their Ray options are the
same and is told the new user config; else replicas are made anew from the constructor's arguments.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from certificates import Authority
from pydantic import BaseModel

from prefillshare import app
from prefillshare import apply as applying
from prefillshare.engines import engine_settings
from prefillshare.kvshare import config
from prefillshare.kvshare.config import Deployment, changes
from prefillshare.kvshare.errors import ConfigError, EngineStartError
from prefillshare.kvshare.live_changes import taken_over


class Routers:
    """As router.ingress.RouterIngress."""

    def __init__(self, deployment, handles, tenants):
        self.deployment, self.tenants = deployment, tenants

    def reconfigure(self, user_config):
        self.deployment = taken_over(self.deployment, Deployment.model_validate(user_config))


class Engines:
    """As kvshare_vllm.engine.replica.EngineReplica."""

    def __init__(self, settings):
        self.settings = settings

    def reconfigure(self, user_config):
        self.adapters, self.log_level = user_config["adapters"], user_config["log_level"]


class Serve:
    def __init__(self):
        self.parts, self.running, self.starts = {}, {}, []

    def deploy(self, application):
        ingress = application._bound_deployment
        parts = {part._bound_deployment.name: part._bound_deployment for part in ingress.init_args[1].values()}
        parts[ingress.name] = ingress
        for name, part in parts.items():
            before = self.parts.get(name)
            if before is None or (before._version, before.ray_actor_options) != (part._version, part.ray_actor_options):
                self.starts.append(name)
                self._start(name, part)
            else:
                self.running[name].reconfigure(part.user_config)
        self.parts, self.running = parts, {name: self.running[name] for name in parts}

    def _start(self, name, part):
        kind = Routers if name == "router" else Engines
        self.running[name] = kind(*part.init_args)
        self.running[name].reconfigure(part.user_config)

    def everything_dies(self):
        for name, part in self.parts.items():
            self._start(name, part)

    def handle(self):
        def call(answer):
            return SimpleNamespace(remote=lambda *_: SimpleNamespace(result=lambda timeout_s: answer(self.running["router"])))

        def broadcast(method):
            replicas = self.parts["router"].num_replicas
            return SimpleNamespace(
                results=lambda timeout_s: [self.running["router"].deployment.model_dump(mode="json")] * replicas
            )

        return SimpleNamespace(
            deployment=call(lambda router: router.deployment.model_dump(mode="json")),
            tenants=call(lambda router: router.tenants),
            adapter_problems=call(lambda router: {}),
            broadcast=broadcast,
        )


@pytest.fixture
def served(monkeypatch):
    serve = Serve()
    monkeypatch.setattr(applying, "deploy", serve.deploy)
    monkeypatch.setattr(applying, "wait_until_running", lambda deployment, progress, ailing: None)
    monkeypatch.setattr(applying, "ailing", frozenset)
    monkeypatch.setattr(applying, "running_handle", serve.handle)
    monkeypatch.setattr("prefillshare.serve_config.is_from_config", lambda application: False)
    # Of every deployment Ray pickles the class that routes to it, looking through all modules there are; nobody reads it here.
    monkeypatch.setattr("ray.serve.config.RequestRouterConfig._serialize_request_router_cls", lambda self: None)
    return serve


KEYS = "tenants: {ferry: {keys: [0123456789abcdef0123456789abcdef]}}"

#: Another value of each field. Those of POOL go for the prefill pool, too, where it has them.
POOL = {
    "replicas": 2,
    "autoscale": {"max_replicas": 4},
    "kv_cache_gib": 0.5,
    "tensor_parallel_size": 2,
    "gpu_share": 0.5,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "cpu_cores": "0",
    "resources": {"node": 0.1},
    "engine_args": {"seed": 3},
}
OTHER = {
    "prefill": POOL,
    "decode": POOL | {
        "adapters": {},
        "local_prefill": "auto",
        "inter_token_objective_s": 0.1,
        "max_lora_rank": 32,
        "max_loras": 16,
        "serve_base": False,
    },
    "router": {
        "replicas": 2,
        "resources": {"node": 0.1},
        "grpc_port": 9001,
        "max_queued": 7,
        "max_wait_s": 3,
        "max_request_bytes": 100_000,
        "grammar_cpu_s": 3,
        "max_queued_prefill_tokens": 99,
        "expected_output_tokens": 9,
        "max_sessions": 5,
        "session_ttl_s": 7,
        "max_session_ttl_s": 70_000,
        "max_kept_share": 0.25,
        "max_kept_tokens": 1000,
        "max_responses": 6,
        "response_ttl_s": 8,
        "own_prompt": "first",
        "usage_days": 30,
        "redis_url": "redis://other",
        "redis_password_env": "OTHER",
        "redis_prefix": "other",
        "cors_origins": ["https://chat.example"],
        "ui": "full",
        "ui_hosts": ["agents.example"],
        "default_deadline_s": 9,
        "max_resumes": 3,
        "max_retries": 2,
        "replica_wait_s": 1,
        "wedged_after_s": 5,
        "eager_prefill": False,
        "eager_prefill_max": 3,
        "eager_prefill_stride_tokens": 64,
        "pull_back": "never",
        "pull_back_max": 3,
        "canary_share": 0.5,
        "placement": {"policy": "round_robin"},
    },
    "cluster": {"start_timeout_s": 5, "kv_lease_s": 90, "kv_load_timeout_s": 3},
    "logs": {"level": "debug", "format": "json"},
    "tracing": {"otlp_endpoint": "http://collector:4317", "protocol": "http/protobuf", "sample_share": 0.5},
}  # fmt: skip
TREES = {
    "prefill": config.Prefill,
    "decode": config.DecodePool,
    "router": config.Router,
    "cluster": config.Cluster,
    "logs": config.Logs,
    "tracing": config.Tracing,
}
REFUSED = {
    "base": None,
    "router": {"host": "0.0.0.0", "http_port": 8001, "tls": None},
    "cluster": {"address": "10.0.0.1:6379", "num_cpus": 3},
}
#: Tested elsewhere or below: they need files, or other pools.
BY_THEMSELVES = {
    "decode": {"pool", "model", "sharing", "name", "own_layers", "own_tokens", "quality_floor", "ttft_objective_s", "prefill"},
    "router": {"auth"},
    "cluster": {"kv_transport"},  # it has one value so far
}


@pytest.fixture
def deploy(model, adapter):
    """deploy(section, field, value) -> a deployment in which that is another one."""
    base = model("base")
    folders = {name: str(adapter(name, base=base)) for name in ("a", "b")}

    def make(section=None, field=None, value=None):
        plain = {
            "base": {"model": str(base), "dtype": "float32", "max_model_len": 64},
            "prefill": {},
            "decode": [{"pool": "agents", "adapters": {"a": folders["a"]}}],
            "router": {"redis_url": "redis://one"},
            "cluster": {},
            "logs": {},
            "tracing": {"otlp_endpoint": "http://one:4317"},
        }
        if section is not None:
            target = plain["decode"][0] if section == "decode" else plain[section]
            target[field] = folders if field == "adapters" else value
        return config.parse(plain)

    return make


def fields():
    for section, values in OTHER.items():
        for field, value in values.items():
            yield pytest.param(section, field, value, id=f"{section}.{field}")


def test_every_field_of_the_file_is_applied_refused_or_tested_by_itself():
    for section, info in Deployment.model_fields.items():
        if section == "name" or REFUSED.get(section, ...) is None:  # the name: test_apply.py
            continue
        kind = info.annotation
        models = [part for part in (kind, *getattr(kind, "__args__", ())) if isinstance(part, type)]
        (tree,) = [part for part in models if issubclass(part, BaseModel)]
        known = {*OTHER.get(section, ()), *REFUSED.get(section, ()), *BY_THEMSELVES.get(section, ())}
        assert set(tree.model_fields) <= known, section


def is_what_the_file_says(serve: Serve, wanted: Deployment) -> None:
    assert serve.running["router"].deployment == wanted
    assert serve.parts["router"].num_replicas == wanted.router.replicas
    engines = engine_settings(wanted)
    assert serve.running.keys() - {"router"} == engines.keys()
    for name, (settings, _) in engines.items():
        fixed = vars(settings) | {"adapters": {}, "log_level": ""}
        assert vars(serve.running[name].settings) | {"adapters": {}, "log_level": ""} == fixed
        assert serve.running[name].adapters == settings.adapters
        assert serve.running[name].log_level == settings.log_level


@pytest.mark.parametrize(("section", "field", "value"), list(fields()))
def test_what_runs_after_apply_is_what_the_file_says_and_stays_so(served, deploy, monkeypatch, section, field, value):
    monkeypatch.setenv("OTHER", "secret")
    before, after = deploy(), deploy(section, field, value)
    assert before != after
    served.deploy(app.build(before))
    is_what_the_file_says(served, before)
    monkeypatch.setattr(app, "on_cpu", lambda: False)  # where an engine takes a share of a GPU
    served.deploy(app.build(before))
    starts = len(served.starts)
    applying.apply(after)
    is_what_the_file_says(served, after)
    started, change = served.starts[starts:], changes.of(TREES[section])[field]
    assert started.count("router") == change.replaces_routers, "once at most"
    assert bool(set(started) - {"router"}) == change.replaces_engines
    served.everything_dies()
    is_what_the_file_says(served, after)


@pytest.mark.parametrize(("replicas", "wanted"), [(0, 1), (1, 0)])
def test_a_prefill_pool_comes_and_goes_while_decode_engines_and_routers_stay(served, deploy, replicas, wanted):
    before, after = deploy("prefill", "replicas", replicas), deploy("prefill", "replicas", wanted)
    served.deploy(app.build(before))
    starts = len(served.starts)
    applying.apply(after)
    is_what_the_file_says(served, after)
    assert set(served.starts[starts:]) <= {"prefill"}
    assert ("prefill" in served.running) is bool(wanted)


REFUSALS = [(section, field) for section, names in REFUSED.items() for field in names or ("name", "block_size")]


@pytest.mark.parametrize(("section", "field"), REFUSALS)
def test_what_cannot_change_is_refused_and_nothing_happens(served, deploy, tmp_path, section, field):
    value = {"name": "other", "block_size": 16}.get(field) or (REFUSED[section] or {}).get(field)
    if field == "tls":
        files = Authority(tmp_path, "root").certificate("server")
        value = {"cert_file": files.cert, "key_file": files.key}
    before = deploy()
    served.deploy(app.build(before))
    starts = list(served.starts)
    with pytest.raises(ConfigError, match=rf"{section}(\.{field})?:"):
        applying.apply(deploy(section, field, value))
    assert served.starts == starts
    is_what_the_file_says(served, before)


def test_a_keys_file_whose_content_has_changed_replaces_routers_once(served, deploy, tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text(KEYS)
    before = deploy("router", "auth", {"keys_file": str(file)})
    served.deploy(app.build(before))
    file.write_text(KEYS.replace("ferry", "harbour"))
    applying.apply(before)
    assert list(served.running["router"].tenants.by_name) == ["harbour"]
    assert served.starts.count("router") == 2


def test_apply_says_so_if_a_router_does_not_serve_what_the_file_says(served, deploy, monkeypatch):
    served.deploy(app.build(deploy()))
    monkeypatch.setattr(applying, "CONFIRM_S", -1.0)
    monkeypatch.setattr(Routers, "reconfigure", lambda self, user_config: None)
    with pytest.raises(EngineStartError, match=r"router\.max_queued"):
        applying.apply(deploy("router", "max_queued", 7))
