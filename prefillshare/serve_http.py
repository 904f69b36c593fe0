"""The HTTP proxies of Ray Serve: where they listen, and their TLS.

Serve passes a CA file on to its HTTP server, but not the setting that clients must show a certificate, so that no client is
asked for one. Its proxies call a function of ours before they start, which adds the setting. A test connection shows whether it
works.

Seam: ray/serve/config.py, ray/serve/_private/http_util.py (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH), uvicorn/config.py;
ray/serve/_private/proxy_state.py (PROXY_HEALTH_CHECK_PERIOD_S)
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import ConfigError, EngineStartError

_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
#: In seconds. The controller replaces a proxy after three failed checks; with Ray's 10 s nothing would listen for 30 s.
HEALTH_CHECK_PERIOD = "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"
_PROBE_TIMEOUT_S = 10.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def http_options(router: Router):
    from ray.serve.config import HTTPOptions

    if router.tls is None:
        return HTTPOptions(host=router.host, port=router.http_port)
    return HTTPOptions(
        host=router.host,
        port=router.http_port,
        ssl_keyfile=router.tls.key_file,
        ssl_certfile=router.tls.cert_file,
        ssl_ca_certs=router.tls.client_ca_file,
    )


@contextmanager
def proxy_environment(router: Router) -> Iterator[None]:
    """Start a local Ray cluster within this context: its processes inherit the environment variables that its proxies and their
    controller need. Variables that are already set stay as they are."""
    wanted = {HEALTH_CHECK_PERIOD: "2"}
    if router.tls is not None and router.tls.client_ca_file is not None:
        wanted[_CALLBACK] = f"{__name__}.{ask_for_client_certificates.__name__}"
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def ask_for_client_certificates() -> list:
    """Serve's callback in a proxy's process: makes HTTP servers with a CA file require client certificates from now on."""
    import uvicorn

    init = uvicorn.Config.__init__

    def asking(self, *args, **kwargs):
        if kwargs.get("ssl_ca_certs"):
            kwargs.setdefault("ssl_cert_reqs", ssl.CERT_REQUIRED)
        init(self, *args, **kwargs)

    uvicorn.Config.__init__ = asking
    return []  # no middleware


def check_proxies(router: Router) -> None:
    """To be called after Serve's start: raises if HTTP is not served as `router.tls` says, because a Serve that was already
    running keeps its own settings."""
    from ray.serve.context import _get_global_client

    if router.tls is None:
        return
    there, wanted = _get_global_client().http_config, http_options(router)
    if any(getattr(there, name) != getattr(wanted, name) for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")):
        raise ConfigError(
            "Ray Serve already runs on this cluster, with other certificates or none",
            field="router.tls",
            fix="end it there first (serve shutdown), or use the same files",
        )
    if router.tls.client_ca_file and serves_without_certificate(router.host, router.http_port):
        raise EngineStartError(
            "the HTTP surface serves clients that show no certificate, although router.tls.client_ca_file is set",
            fix=f"start Ray on every machine with {_CALLBACK}={__name__}.{ask_for_client_certificates.__name__}",
        )


def serves_without_certificate(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((_ANY.get(host, host), port), _PROBE_TIMEOUT_S) as plain,
            context.wrap_socket(plain) as connection,
        ):
            connection.sendall(b"GET /-/healthz HTTP/1.0\r\n\r\n")
            return bool(connection.recv(1))
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
        return False
