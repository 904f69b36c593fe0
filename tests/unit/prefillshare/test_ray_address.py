"""Whatever answers at an address, or does not, is told within seconds, before Ray is asked."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from ray._private.authentication import authentication_token_setup
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc, ray_client_pb2, ray_client_pb2_grpc

from prefillshare import ray_address
from prefillshare.kvshare.errors import ConfigError


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(ray_address, "ANSWER_S", 0.5)
    monkeypatch.setattr(ray_address, "on_this_machine", lambda: ["10.0.0.1:6379"])
    monkeypatch.setattr(authentication_token_setup, "maybe_enable_token_auth_if_token_available", lambda **kw: True)


class Gcs(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    def __init__(self, code: grpc.StatusCode | None, hangs: threading.Event | None = None):
        self.code, self.hangs = code, hangs

    def GetClusterId(self, request, context):
        if self.hangs:
            self.hangs.wait(10)
        if self.code:
            context.abort(self.code, "no")
        return gcs_service_pb2.GetClusterIdReply()


class RaysClient(ray_client_pb2_grpc.RayletDriverServicer):
    def ClusterInfo(self, request, context):
        return ray_client_pb2.ClusterInfoResponse(json="{}")


@contextmanager
def serves(*add):
    """-> its address. `add`: functions that add services to a gRPC server."""
    server = grpc.server(ThreadPoolExecutor(2))
    for one in add:
        one(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def gcs(code: grpc.StatusCode | None = None, hangs: threading.Event | None = None):
    return lambda server: gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Gcs(code, hangs), server)


def test_a_cluster_that_answers_is_fine():
    with serves(gcs()) as address:
        ray_address.check(address)
    with serves(lambda server: ray_client_pb2_grpc.add_RayletDriverServicer_to_server(RaysClient(), server)) as address:
        ray_address.check(f"ray://{address}")


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_what_accepts_connections_and_never_answers_is_told(form):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address, began = f"127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(ConfigError, match=rf"cluster\.address: nothing answers at {address} within 0\.5 s"):
            ray_address.check(form.format(address), "cluster.address")
        assert time.monotonic() - began < 5


def test_where_connections_are_not_even_accepted_is_told():
    """As where a firewall drops what is sent there: the kernel answers nobody any more."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        with pytest.raises(ConfigError, match="nothing answers at"):
            ray_address.check(f"127.0.0.1:{full.getsockname()[1]}")


def test_a_cluster_that_hangs_is_told():
    hangs = threading.Event()
    with serves(gcs(hangs=hangs)) as address:
        with pytest.raises(ConfigError, match="nothing answers at"):
            ray_address.check(address)
        hangs.set()


def test_where_nobody_listens_is_told_at_once():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"no Ray cluster answers at .*: Connection refused"):
            ray_address.check(f"127.0.0.1:{closed.getsockname()[1]}")


def test_other_servers_are_told_from_a_cluster():
    """Such as the router's gRPC and HTTP ports."""
    with serves() as address, pytest.raises(ConfigError, match=f"what answers at {address} is no Ray cluster .UNIMPLEMENTED."):
        ray_address.check(address)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        with pytest.raises(ConfigError, match=r"is no Ray cluster .*the router's HTTP and gRPC ports are none"):
            ray_address.check(f"127.0.0.1:{http.server_port}")
        http.shutdown()


def test_without_the_clusters_token_the_fix_is_to_give_it():
    refused = pytest.raises(ConfigError, match=r"does not let this user in \(fix: give the cluster's token \(RAY_AUTH_TOKEN,")
    with serves(gcs(grpc.StatusCode.UNAUTHENTICATED)) as address, refused:
        ray_address.check(address)


def test_a_cluster_without_a_node_here_is_not_waited_for(monkeypatch):
    """Ray would look for one for a minute."""
    monkeypatch.setattr(ray_address, "on_this_machine", list)
    with serves(gcs()) as address, pytest.raises(ConfigError, match=r"no node of the .*fix: run this on .*ray://127.0.0.1:10001"):
        ray_address.check(address)


def test_a_cluster_is_asked_with_the_token_that_there_is(monkeypatch):
    """Ray itself would do so only for clusters that it finds by itself."""
    enabled = []
    monkeypatch.setattr(
        authentication_token_setup, "maybe_enable_token_auth_if_token_available", lambda **kw: enabled.append(kw)
    )
    with serves(gcs()) as address:
        ray_address.check(address)
    assert enabled == [{"warn_if_disabled": False}]


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("[::1]:6379", ("::1", 6379)),
        ("head", None),
        ("http://head:6379", None),
    ],
)
def test_an_address_names_host_and_port(address, named):
    assert ray_address.named(address) == named
    if named is None:
        with pytest.raises(ConfigError, match=r"is no address \(fix: give HOST:PORT, or ray://HOST:PORT"):
            ray_address.check(address)
