"""`router.auth` and `router.tls` in a deployment file, and what Ray Serve's HTTP server makes of the latter."""

import asyncio
import os
import ssl
from pathlib import Path

import httpx
import pytest
import uvicorn
from certificates import Authority

from prefillshare import demo, serve_http
from prefillshare.kvshare import config
from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import ConfigError, Unauthenticated
from prefillshare.router import tenants


@pytest.fixture
def root(tmp_path):
    return Authority(tmp_path, "root")


@pytest.fixture
def parse(model, tmp_path):
    """parse(router keys, other sections) -> deployment; relative files are looked for in tmp_path."""
    folder = str(model("base"))

    def make(router, **more):
        data = {"base": {"model": folder}, "decode": [{"pool": "d", "model": folder}], "router": router}
        return config.parse(data | more, tmp_path)

    return make


def test_without_either_there_are_no_keys_and_no_encryption(parse):
    router = parse({}).router
    assert (router.auth, router.tls) == (None, None)
    options = serve_http.http_options(router)
    assert (options.host, options.port, options.ssl_certfile) == ("127.0.0.1", 8000, None)


def test_files_are_found_beside_the_deployment_file(parse, root, tmp_path):
    root.certificate("router")
    (tmp_path / "keys.yaml").touch()
    tls = {"cert_file": "router.pem", "key_file": "router.key", "client_ca_file": "root.pem"}
    router = parse({"auth": {"keys_file": "keys.yaml"}, "tls": tls}).router
    assert router.auth.keys_file == str(tmp_path / "keys.yaml")
    assert router.tls.model_dump() == {name: str(tmp_path / file) for name, file in tls.items()}
    options = serve_http.http_options(router)
    assert (options.ssl_certfile, options.ssl_keyfile) == (router.tls.cert_file, router.tls.key_file)
    assert options.ssl_ca_certs == router.tls.client_ca_file


@pytest.mark.parametrize(
    ("auth", "text"),
    [
        ({}, "router.auth: give either `keys_file` or `keys_env`, and not both"),
        ({"keys_file": "k", "keys_env": "K"}, "router.auth: give either `keys_file` or `keys_env`, and not both"),
        ({"keys_env": "a-b"}, "router.auth.keys_env: String should match pattern"),
        ({"key_file": "k"}, "router.auth.key_file: unknown key; did you mean 'keys_file'?"),
        ({"keys_file": "none.yaml"}, "router.auth.keys_file: no such file: 'none.yaml' (looked for"),
        ({"keys_file": "."}, "router.auth.keys_file: cannot read .: Is a directory"),
    ],
)
def test_wrong_auth_is_refused_by_field(parse, auth, text):
    with pytest.raises(ConfigError) as caught:
        parse({"auth": auth})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"key_file": ...}, "router.tls.key_file: required, but not given"),
        ({"cert_file": "none.pem"}, "router.tls.cert_file: no such file: 'none.pem'"),
        ({"key_file": "none.key"}, "router.tls.key_file: no such file: 'none.key'"),
        ({"client_ca_file": "none.pem"}, "router.tls.client_ca_file: no such file: 'none.pem'"),
        ({"key_file": "other.key"}, "are not a certificate and its key: KEY_VALUES_MISMATCH"),
        ({"cert_file": "router.key"}, "router.tls.cert_file: "),
        ({"client_ca_file": "router.key"}, "router.tls.client_ca_file: "),
        ({"key_file": "locked.key"}, "locked.key is encrypted (fix: give a key without a password)"),
        ({"ca_file": "root.pem"}, "router.tls.ca_file: unknown key; did you mean 'cert_file'?"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_field(parse, root, tmp_path, changes, text):
    root.certificate("router")
    root.certificate("other")
    locked(tmp_path)
    tls = {"cert_file": "router.pem", "key_file": "router.key"} | changes
    with pytest.raises(ConfigError) as caught:
        parse({"tls": {name: file for name, file in tls.items() if file is not ...}})
    assert text in str(caught.value)


def locked(folder) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key((folder / "router.key").read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    (folder / "locked.key").write_bytes(text)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_refused_by_field(parse, root, tmp_path):
    own = root.certificate("router")
    (tmp_path / "router.key").chmod(0)
    with pytest.raises(ConfigError, match=r"router\.tls\.key_file: cannot read .*: Permission denied"):
        parse({"tls": {"cert_file": own.cert, "key_file": own.key}})


def test_the_demo_is_refused_before_engines_start_if_its_key_is_none(parse, root, tmp_path, monkeypatch):
    own = root.certificate("router")
    key, line = tenants.new_key()
    (tmp_path / "keys.yaml").write_text(f"tenants: {{research: {{keys: ['{line}']}}}}")
    deployment = parse({"auth": {"keys_file": "keys.yaml"}, "tls": {"cert_file": own.cert, "key_file": own.key}})
    monkeypatch.delenv("PREFILLSHARE_API_KEY", raising=False)
    with pytest.raises(Unauthenticated, match="PREFILLSHARE_API_KEY: the deployment has tenants"):
        demo.client_options(deployment)
    monkeypatch.setenv("PREFILLSHARE_API_KEY", f"{key}x")
    with pytest.raises(Unauthenticated, match="no tenant has this API key"):
        demo.client_options(deployment)
    monkeypatch.setenv("PREFILLSHARE_API_KEY", key)
    assert demo.client_options(deployment) == {"ca_file": own.cert}
    assert demo.client_options(deployment, root.file) == {"ca_file": root.file}
    assert demo.client_options(parse({})) == {}


@pytest.fixture
def serve(root, unused_tcp_port):
    """serve(client_ca_file) -> port of Serve's own HTTP server in this process, and the root it is trusted by."""
    from ray.serve._private.http_util import start_asgi_http_server

    servers = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"success"})

    async def start(client_ca_file=None):
        own = root.certificate("router")
        tls = {"cert_file": own.cert, "key_file": own.key, "client_ca_file": client_ca_file}
        options = serve_http.http_options(Router(http_port=unused_tcp_port, tls=tls))
        task, server = await start_asgi_http_server(app, options, event_loop=asyncio.get_running_loop())
        servers.append((task, server))
        listening, startup = asyncio.Event(), server.startup

        async def started(sockets):
            await startup(sockets)
            listening.set()

        server.startup = started  # its task has not run yet
        await listening.wait()
        return unused_tcp_port

    async def stop():
        for task, server in servers:
            server.should_exit = True
            await task

    start.stop = stop
    return start


async def get(port: int, root: Authority, own=None) -> str:
    trusted = ssl.create_default_context(cafile=root.file)
    if own:
        trusted.load_cert_chain(own.cert, own.key)
    async with httpx.AsyncClient(verify=trusted) as http:
        return (await http.get(f"https://127.0.0.1:{port}/")).text


async def test_serves_http_server_speaks_tls_with_these_options(serve, root):
    port = await serve()
    try:
        assert await get(port, root) == "success"
        assert await asyncio.to_thread(serve_http.serves_without_certificate, "127.0.0.1", port)
    finally:
        await serve.stop()


async def test_serve_alone_asks_nobody_for_a_certificate(serve, root, tmp_path):
    """Why there is a callback. Where this fails, Serve has learnt it: remove the callback."""
    port = await serve(Authority(tmp_path, "clients").file)
    try:
        assert await get(port, root) == "success"
    finally:
        await serve.stop()


async def test_with_our_callback_http_clients_must_show_a_certificate(serve, root, tmp_path, monkeypatch):
    clients = Authority(tmp_path, "clients")
    monkeypatch.setattr(uvicorn.Config, "__init__", uvicorn.Config.__init__)  # put back at the end
    assert serve_http.ask_for_client_certificates() == []
    port = await serve(clients.file)
    try:
        assert await get(port, root, clients.certificate("good")) == "success"
        for own in (None, Authority(tmp_path, "strangers").certificate("bad")):
            with pytest.raises(httpx.TransportError):
                await get(port, root, own)
        assert not await asyncio.to_thread(serve_http.serves_without_certificate, "127.0.0.1", port)
    finally:
        await serve.stop()


def test_a_local_clusters_proxies_are_told_of_the_callback(root, monkeypatch):
    from ray.serve._private.utils import call_function_from_import_path

    name = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    monkeypatch.delenv(name, raising=False)
    own = root.certificate("router")
    tls = {"cert_file": own.cert, "key_file": own.key}
    with serve_http.proxy_environment(Router(tls=tls)):
        assert name not in os.environ
    with serve_http.proxy_environment(Router(tls=tls | {"client_ca_file": root.file})):
        path = os.environ[name]
    assert name not in os.environ
    monkeypatch.setattr(uvicorn.Config, "__init__", uvicorn.Config.__init__)
    assert call_function_from_import_path(path) == []


def test_a_dead_proxy_is_replaced_within_seconds_unless_the_operator_says_otherwise(monkeypatch):
    from ray.serve._private import constants

    name = serve_http.HEALTH_CHECK_PERIOD
    assert name in Path(constants.__file__).read_text(), "Ray reads it"
    monkeypatch.delenv(name, raising=False)
    with serve_http.proxy_environment(Router()):
        assert float(os.environ[name]) * constants.PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD <= 6
    assert name not in os.environ
    monkeypatch.setenv(name, "7")
    with serve_http.proxy_environment(Router()):
        assert os.environ[name] == "7"
    assert os.environ[name] == "7"
