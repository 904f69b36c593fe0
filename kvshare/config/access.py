"""`router.auth` and `router.tls`: who may call, and how calls are encrypted. What a keys file says: router/tenants.py."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from prefillshare.kvshare.config.changes import ROUTERS, refused
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.yaml_tree import Node


class Auth(Node):
    """Who may call: tenants and their API keys, from a keys file (its format: "The keys file", below). Without
    `router.auth` anybody may call, as one anonymous tenant. The file is read when the deployment starts or is changed."""

    CHANGE: ClassVar = ROUTERS

    keys_file: str | None = Field(None, min_length=1)
    """The keys file. Relative paths are tried as for base.model."""
    keys_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable of `prefillshare serve` that holds the keys file's content, instead of `keys_file`. Processes that
    it starts inherit the variable, so it should hold digests only."""

    @model_validator(mode="after")
    def _one_source(self) -> Auth:
        if bool(self.keys_file) == bool(self.keys_env):
            raise ValueError("give either `keys_file` or `keys_env`, and not both")
        return self


class Tls(Node):
    """TLS for both surfaces; without `router.tls` they are not encrypted. The files are PEM files and must be at the same path
    on every machine that runs a router or an HTTP proxy. Relative paths are tried as for base.model. The files are read when
    the deployment starts."""

    CHANGE: ClassVar = refused("Ray Serve's proxies keep their certificates while they run", fix="start anew")

    cert_file: str = Field(min_length=1)
    """The server's certificate, followed by the certificates that lead to its root."""
    key_file: str = Field(min_length=1)
    """The certificate's private key, not encrypted."""
    client_ca_file: str | None = Field(None, min_length=1)
    """Clients must show a certificate that leads to one of these roots. Only with a local cluster (cluster.address
    unset)."""


def with_files(auth: Auth | None, tls: Tls | None, folder: Path) -> dict[str, Any]:
    """Both with absolute paths of files that can be used. Raises ConfigError naming the field."""
    if auth and auth.keys_file:
        auth = auth.model_copy(update={"keys_file": _readable("router.auth.keys_file", auth.keys_file, folder)})
    if tls:
        names = [name for name in Tls.model_fields if getattr(tls, name)]
        tls = tls.model_copy(update={name: _readable(f"router.tls.{name}", getattr(tls, name), folder) for name in names})
        _check_certificates(tls)
    return {"auth": auth, "tls": tls}


def _readable(field: str, text: str, folder: Path) -> str:
    candidates = (Path(text).expanduser(), folder / text)
    for candidate in candidates:
        try:
            with candidate.open("rb"):
                return str(candidate.resolve())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot read {candidate}: {error.strerror}", field=field, fix="give a file") from None
    tried = " or ".join(dict.fromkeys(str(c.absolute()) for c in candidates))
    raise ConfigError(f"no such file: {text!r} (looked for {tried})", field=field, fix="give a file that is there")


def _check_certificates(tls: Tls) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def no_password() -> str:  # without it OpenSSL would ask on the terminal
        raise ConfigError(f"{tls.key_file} is encrypted", field="router.tls.key_file", fix="give a key without a password")

    try:
        context.load_cert_chain(tls.cert_file, tls.key_file, no_password)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{tls.cert_file} and {tls.key_file} are not a certificate and its key: {error.reason}",
            field="router.tls.cert_file",
            fix="give PEM files that belong together",
        ) from None
    if tls.client_ca_file:
        try:
            context.load_verify_locations(tls.client_ca_file)
        except ssl.SSLError as error:
            raise ConfigError(
                f"{tls.client_ca_file} holds no certificate: {error.reason}",
                field="router.tls.client_ca_file",
                fix="give a PEM file of root certificates",
            ) from None
