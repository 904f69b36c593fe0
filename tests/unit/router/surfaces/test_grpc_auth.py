"""API keys and TLS on the gRPC surface, over a real server on loopback with a servicer that tells who calls."""

import asyncio
import logging
from contextlib import asynccontextmanager

import grpc
import pytest
from certificates import Authority
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from ports import free_port

from prefillshare.client import Client
from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.config.access import Tls
from prefillshare.kvshare.errors import ConfigError, InvalidInput, Unauthenticated, Unavailable
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from prefillshare.router.surfaces.grpc_api import GrpcServer
from prefillshare.router.surfaces.grpc_auth import ApiKeys
from prefillshare.router.surfaces.grpc_errors import abort
from prefillshare.router.surfaces.grpc_tls import credentials
from prefillshare.router.tenants import KeysFile, Tenants

KEY, OTHER, WRONG = "psk-first-tenants-key", "psk-second-tenants-key", "psk-nobodys-key-at-all"
TWO = Tenants(KeysFile.model_validate({"tenants": {"research": {"keys": [KEY]}, "support": {"keys": [OTHER]}}}).tenants)


class Telltale(pb_grpc.PrefillShareServicer):
    """Answers with the caller's tenant, in streams once before and once after a task of its own has run."""

    async def CreateSession(self, request, context):
        try:
            return pb.Session(session_id=current_caller.get().in_domain(request.cache_domain).tenant)
        except Exception as error:
            await abort(context, error)

    async def Generate(self, request, context):
        async def tenant():
            await asyncio.sleep(0)
            return current_caller.get().tenant

        yield pb.GenerateResponse(text=f"{current_caller.get().tenant} ")
        yield pb.GenerateResponse(text=await asyncio.create_task(tenant()), done=pb.Done(finish_reason="stop"))


async def test_the_surface_listens_on_an_ipv6_address():
    port = free_port()
    surface = GrpcServer(Telltale(), "::1", port)
    await surface.start()
    try:
        async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
            made = await pb_grpc.PrefillShareStub(channel).CreateSession(pb.CreateSessionRequest(), timeout=10)
        assert made.session_id == ""
    finally:
        await surface.stop(0)


@asynccontextmanager
async def server(tenants: Tenants, tls: Tls | None = None):
    """Yields the address."""
    running = grpc.aio.server(interceptors=[ApiKeys(tenants)])
    pb_grpc.add_PrefillShareServicer_to_server(Telltale(), running)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, running)
    reflection.enable_server_reflection([reflection.SERVICE_NAME], running)
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    port = running.add_secure_port("127.0.0.1:0", credentials(tls)) if tls else running.add_insecure_port("127.0.0.1:0")
    await running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await running.stop(None)


async def calls(address: str, **options) -> tuple[str, str]:
    """Who the server says called: (a call with one answer, a stream)."""

    def both():
        with Client(address, timeout_s=20, retries=None, **options) as client:
            session = client.create_session()
            return session.session_id, session.turn("base", text="hi").text

    return await asyncio.to_thread(both)


@pytest.fixture(autouse=True)
def _no_key_of_the_environment(monkeypatch):
    monkeypatch.delenv("PREFILLSHARE_API_KEY", raising=False)


async def test_each_call_runs_as_its_keys_tenant_streams_too():
    async with server(TWO) as address:
        assert await calls(address, api_key=KEY) == ("research", "research research")
        assert await calls(address, api_key=OTHER) == ("support", "support support")


async def test_concurrent_calls_do_not_see_each_others_tenant():
    async with server(TWO) as address:
        found = await asyncio.gather(*(calls(address, api_key=key) for key in (KEY, OTHER) * 4))
    assert found == [("research", "research research"), ("support", "support support")] * 4


async def test_without_tenants_calls_need_no_key_and_any_is_ignored():
    async with server(Tenants()) as address:
        assert await calls(address) == ("", " ")
        assert await calls(address, api_key="unused") == ("", " ")


async def test_client_takes_its_key_from_the_environment(monkeypatch):
    monkeypatch.setenv("PREFILLSHARE_API_KEY", KEY)
    async with server(TWO) as address:
        assert (await calls(address))[0] == "research"
        assert (await calls(address, api_key=OTHER))[0] == "support"


@pytest.mark.parametrize(("key", "message"), [(WRONG, "no tenant has this API key"), (None, "no API key is given")])
@pytest.mark.parametrize("streams", [False, True])
async def test_refusal_has_its_code_and_the_detail_of_other_errors_and_not_the_key(key, message, streams, caplog):
    caplog.set_level(logging.DEBUG)
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    async with server(TWO) as address, grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.PrefillShareStub(channel)
        if streams:
            answer = anext(aiter(stub.Generate(pb.GenerateRequest(), metadata=metadata)))
        else:
            answer = stub.CreateSession(pb.CreateSessionRequest(), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
        with pytest.raises(Unauthenticated, match=message) as typed:
            await calls(address, api_key=key)
    error = caught.value
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    status, detail = rpc_status.from_call(error), pb.ErrorDetail()
    assert status.details[0].Unpack(detail)
    assert (detail.kind, detail.message) == ("Unauthenticated", message)
    assert detail.fix
    assert WRONG not in f"{error} {error!r} {detail} {typed.value} {caplog.text}"


@pytest.mark.parametrize("header", [f"Basic {KEY}", KEY, "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer x{KEY}"])
async def test_only_the_whole_key_as_bearer_is_taken(header):
    async with server(TWO) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.PrefillShareStub(channel).ListDecoders(
                pb.ListDecodersRequest(), metadata=(("authorization", header),)
            )
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_and_reflection_take_no_key():
    async with server(TWO) as address, grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        assert (await anext(aiter(stream))).list_services_response.service


async def test_a_method_nobody_knows_is_unimplemented_as_before():
    async with server(TWO) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/prefillshare.v1.PrefillShare/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_domain_of_others_is_permission_denied_to_the_client():
    def ask(address):
        with Client(address, api_key=KEY) as client:
            client.create_session(cache_domain="support")

    async with server(TWO) as address:
        with pytest.raises(Exception, match="cache domain 'support'") as caught:
            await asyncio.to_thread(ask, address)
    assert (type(caught.value).__name__, caught.value.field) == ("PermissionDenied", "cache_domain")


async def test_tls_is_spoken_to_clients_that_trust_the_root(tmp_path):
    root = Authority(tmp_path, "root")
    own = root.certificate("router")
    async with server(TWO, Tls(cert_file=own.cert, key_file=own.key)) as address:
        assert (await calls(address, api_key=KEY, ca_file=root.file))[0] == "research"
        for options in ({}, {"ca_file": Authority(tmp_path, "stranger").file}, {"tls": True}):
            with pytest.raises(Unavailable):
                await calls(address, api_key=KEY, **options)


async def test_client_certificates_are_demanded_where_the_deployment_says_so(tmp_path):
    root, clients, strangers = (Authority(tmp_path, name) for name in ("root", "clients", "strangers"))
    own, good, bad = root.certificate("router"), clients.certificate("good"), strangers.certificate("bad")
    async with server(TWO, Tls(cert_file=own.cert, key_file=own.key, client_ca_file=clients.file)) as address:
        trusting = {"api_key": KEY, "ca_file": root.file}
        assert (await calls(address, **trusting, cert_file=good.cert, key_file=good.key))[0] == "research"
        for shown in ({}, {"cert_file": bad.cert, "key_file": bad.key}):
            with pytest.raises(Unavailable):
                await calls(address, **trusting, **shown)


def test_a_file_the_router_cannot_read_is_named(tmp_path):
    own = Authority(tmp_path, "root").certificate("router")
    with pytest.raises(ConfigError, match=r"router\.tls\.key_file: the router cannot read .*No such file"):
        credentials(Tls(cert_file=own.cert, key_file=str(tmp_path / "none.key")))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ca_file": "none.pem"}, "ca_file: cannot read none.pem: No such file"),
        ({"cert_file": __file__}, "cert_file: cert_file and key_file go together"),
    ],
)
def test_client_names_the_file_that_is_wrong(options, text):
    with pytest.raises(ConfigError, match=text):
        Client(**options)


@pytest.mark.parametrize("key", ["psk-with-a-line-break\n", "psk-with a-space-in-it", "psk-with-an-umlaut-ä"])
def test_client_refuses_a_key_that_fits_no_header_without_showing_it(key):
    with pytest.raises(InvalidInput) as caught:
        Client(api_key=key)
    assert "psk" not in str(caught.value)
