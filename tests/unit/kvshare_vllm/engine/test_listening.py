"""Where a deployment listens: on loopback alone if its surfaces are there; elsewhere only with a key for its channels."""

import os
from dataclasses import replace

import pytest
import ray
from ray._private import services
from ray._private.authentication import authentication_utils
from ray.serve._private import replica

from prefillshare.kvshare import channel_keys
from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare_vllm.engine import launch, ray_node
from prefillshare.local_ray import loopback_kept

OUTSIDE = "192.0.2.7"
SETTINGS = EngineSettings(
    role="decode", pool="agents", model="m", mode="prefillshare", contract="c", dtype="float32", max_model_len=64,
    block_size=32, kv_cache_bytes=1,
)  # fmt: skip


class FakeTokens:
    """In place of Ray's loader of tokens."""

    @classmethod
    def instance(cls):
        return cls()

    def get_raw_token(self) -> str:
        return "the cluster's token"


@pytest.fixture
def node(monkeypatch):
    """A Ray node with this address, that asks for tokens or not."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop(channel_keys.ENVIRONMENT, None)
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, address: server.append(address))
    monkeypatch.setattr(ray._raylet, "AuthenticationTokenLoader", FakeTokens)

    def at(address: str, tokens: bool):
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
        monkeypatch.setattr(authentication_utils, "is_token_auth_enabled", lambda: tokens)

    return at


def serves_calls_between_replicas_on() -> str:
    opened = []
    replica.add_port_to_grpc_server(opened, "[::]:0")
    return opened[0]


@pytest.mark.parametrize("address", ["127.0.0.1", OUTSIDE])
def test_a_replica_takes_the_key_of_its_channels_from_rays_token(node, address):
    node(address, tokens=True)
    assert ray_node.join() == address
    assert os.environ[channel_keys.ENVIRONMENT] == channel_keys.derive_secret("the cluster's token")


def test_a_replica_that_others_can_reach_does_not_start_without_a_key(node):
    node(OUTSIDE, tokens=False)
    with pytest.raises(ConfigError, match="authentication is off") as refused:
        ray_node.join()
    assert "RAY_AUTH_MODE=token" in refused.value.fix


def test_on_loopback_a_replica_starts_without_a_key(node):
    node("127.0.0.1", tokens=False)
    assert ray_node.join() == "127.0.0.1"
    assert channel_keys.ENVIRONMENT not in os.environ


def test_serves_own_port_of_a_replica_is_where_the_replica_is(node):
    node(OUTSIDE, tokens=True)
    ray_node.join()
    assert serves_calls_between_replicas_on() == "[::]:0"
    node("127.0.0.1", tokens=True)
    ray_node.join()
    ray_node.join()
    assert serves_calls_between_replicas_on() == "127.0.0.1:0"


def test_ray_takes_a_loopback_address_as_it_is_where_the_surfaces_are_on_loopback(monkeypatch):
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda _: OUTSIDE)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = dict(os.environ)
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        with loopback_kept(host):
            assert services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
        assert services.resolve_ip_for_localhost("127.0.0.1") == OUTSIDE
        assert os.environ == before
    for host in ("0.0.0.0", OUTSIDE, "a-machine", None):
        with loopback_kept(host):
            assert services.resolve_ip_for_localhost("127.0.0.1") == OUTSIDE


@pytest.mark.parametrize("host", ["127.0.0.1", OUTSIDE])
def test_what_an_engines_processes_say_to_each_other_stays_on_the_machine(monkeypatch, host):
    monkeypatch.setattr(os, "environ", {})
    launch.set_environment(SETTINGS, host, launch.Ports(1, 2, 3))
    assert os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == host
    assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert os.environ.get("UCX_NET_DEVICES") == ("lo" if host == "127.0.0.1" else None)


def test_an_operators_own_network_goes_first(monkeypatch):
    monkeypatch.setattr(os, "environ", {"UCX_NET_DEVICES": "mlx5_0:1", "NCCL_SOCKET_IFNAME": "eth1"})
    launch.set_environment(SETTINGS, "127.0.0.1", launch.Ports(1, 2, 3))
    assert os.environ["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth1"


@pytest.mark.parametrize("before", [{}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}])
def test_all_engines_run_the_same_model_runner(monkeypatch, before):
    monkeypatch.setattr(os, "environ", dict(before))
    for settings in (SETTINGS, replace(SETTINGS, role="decode")):
        launch.set_environment(settings, "127.0.0.1", launch.Ports(1, 2, 3))
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_another_model_runner_is_refused(monkeypatch):
    monkeypatch.setattr(os, "environ", {"VLLM_USE_V2_MODEL_RUNNER": "1"})
    with pytest.raises(ConfigError, match=r"VLLM_USE_V2_MODEL_RUNNER is '1': engines run vLLM's V1 .* \(fix: unset it"):
        launch.set_environment(SETTINGS, "127.0.0.1", launch.Ports(1, 2, 3))
