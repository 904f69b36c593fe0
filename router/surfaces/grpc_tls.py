"""TLS on the gRPC surface."""

from __future__ import annotations

from pathlib import Path

import grpc

from prefillshare.kvshare.config.access import Tls
from prefillshare.kvshare.errors import ConfigError


def credentials(tls: Tls) -> grpc.ServerCredentials:
    """If `client_ca_file` is given, clients must show a certificate whose chain leads to it. Raises ConfigError."""
    pair = (_read(tls, "key_file"), _read(tls, "cert_file"))
    roots = _read(tls, "client_ca_file") if tls.client_ca_file else None
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


def _read(tls: Tls, name: str) -> bytes:
    """The file was checked when the deployment file was loaded, but maybe on another machine."""
    try:
        return Path(getattr(tls, name)).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the router cannot read {getattr(tls, name)}: {error.strerror}",
            field=f"router.tls.{name}",
            fix="put the file at the same path on every machine",
        ) from None
