"""What both clients have in common with a connection: how it is set up, and what every call carries."""

from __future__ import annotations

import os
from pathlib import Path

import grpc

from prefillshare.client import settings
from prefillshare.kvshare import errors

try:  # if the calling code is traced, it has this package
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    TraceContextTextMapPropagator = None

API_KEY_VARIABLE = "PREFILLSHARE_API_KEY"
_MAX_MESSAGE_BYTES = 64 << 20

OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # else a process's channels share a connection, to one router
    # To find routers at once that are back after an outage; gRPC's own pause between tries grows to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # To notice during a silent turn that a router is gone, and to have load balancers in between keep idle connections.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


class Connection:
    """`open`: makes the channel, of gRPC's sync or async kind, given what is to be trusted (None: no TLS)."""

    def __init__(
        self,
        address: str,
        api_key: str | None,
        tls: bool,
        ca_file: str | Path | None,
        cert_file: str | Path | None,
        key_file: str | Path | None,
    ):
        self.address = settings.text(address, "address", 'write "HOST:PORT"')
        settings.one_of(tls, bool, "tls", "give True or False")
        self._key = _key_metadata(os.environ.get(API_KEY_VARIABLE) if api_key in (None, "") else api_key)
        files = (ca_file, cert_file, key_file)
        self.credentials = _credentials(*files) if tls or any(file is not None for file in files) else None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call: the key, and the current OpenTelemetry trace, which the server continues."""
        trace: dict[str, str] = {}
        if TraceContextTextMapPropagator is not None:
            TraceContextTextMapPropagator().inject(trace)
        return (*self._key, *trace.items())


def _key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    if api_key in (None, ""):
        return ()
    if not isinstance(api_key, str):  # not shown: it may be a key
        raise errors.InvalidInput(f"a key is text, not {type(api_key).__name__}", field="api_key", fix="give it as a str")
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise errors.InvalidInput("a key is ASCII text without spaces", field="api_key", fix="check it for a line break")
    return (("authorization", f"Bearer {api_key}"),)


def _credentials(*files: str | Path | None) -> grpc.ChannelCredentials:
    def content(name: str, file: str | Path | None) -> bytes | None:
        if file is None:
            return None
        if not isinstance(file, str | os.PathLike):
            raise errors.ConfigError(f"{type(file).__name__} is no path", field=name, fix="give the path of a PEM file")
        try:
            return Path(file).read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            # What is behind a line's end is a key in a path's place.
            path = str(file).partition("\n")[0][:200] or "an empty path"
            raise errors.ConfigError(f"cannot read {path}: {reason}", field=name, fix="give a PEM file") from None

    roots, certificate, key = map(content, ("ca_file", "cert_file", "key_file"), files)
    if (certificate is None) != (key is None):
        raise errors.ConfigError("cert_file and key_file go together", field="cert_file", fix="give both, or neither")
    return grpc.ssl_channel_credentials(roots, key, certificate)
