"""Tenants: who may call, identified by an API key (R7).

A keys file, or the environment variable in its place, maps tenants to keys. Keys are kept as SHA-256 digests only; no
error, log line or repr shows a key, or a value that could be a key written in the wrong place.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from prefillshare.kvshare.caller import ANONYMOUS, Caller
from prefillshare.kvshare.config.access import Auth
from prefillshare.kvshare.config.errors import as_config_error
from prefillshare.kvshare.errors import ConfigError, Unauthenticated
from prefillshare.kvshare.yaml_tree import Name, Node, from_yaml
from prefillshare.router.admission import grant

MIN_KEY_CHARS, MAX_KEY_CHARS = 16, 512
#: Characters that a header can hold without encoding.
_KEY_CHARS = frozenset(string.ascii_letters + string.digits + string.punctuation)
_DIGEST = "sha256:"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def new_key() -> tuple[str, str]:
    """A fresh key, and the line that stands for it in a keys file."""
    key = f"psk-{secrets.token_urlsafe(32)}"
    return key, f"{_DIGEST}{digest(key).hex()}"


def _as_digest(written: Any) -> bytes:
    if not isinstance(written, str):
        raise ValueError("a key is text; put it between quotes")
    if written.startswith(_DIGEST):
        number = written.removeprefix(_DIGEST)
        if len(number) != 64 or not set(number) <= set(string.hexdigits):
            raise ValueError("a digest is sha256: and 64 hexadecimal digits")
        return bytes.fromhex(number)
    if not written:
        raise ValueError("an empty key; remove it")
    if not set(written) <= _KEY_CHARS:
        raise ValueError("a key is made of ASCII letters, digits and punctuation, without spaces")
    if not MIN_KEY_CHARS <= len(written) <= MAX_KEY_CHARS:
        raise ValueError(f"{len(written)} characters; a key has {MIN_KEY_CHARS} to {MAX_KEY_CHARS}; make one: prefillshare key")
    return digest(written)


_Key = Annotated[bytes, BeforeValidator(_as_digest, json_schema_input_type=str)]


class Tenant(Node):
    """What one tenant may do, under its name in `tenants`. Names are shown in logs and metrics."""

    model_config = ConfigDict(hide_input_in_errors=True)

    keys: tuple[_Key, ...] = Field(min_length=1, repr=False)
    """The tenant's API keys, each either as it is (16 characters or more) or as "sha256:" and its SHA-256 in hexadecimal
    digits. `prefillshare key` prints both forms."""
    weight: float = Field(1, gt=0, le=1000)
    """The tenant's share where tenants wait for each other: a tenant of weight 2 gets twice as much as one of weight 1."""
    max_in_progress: int | None = Field(None, ge=1)
    """Most turns that the tenant may have in progress at once, waiting ones included; with Redis, over all routers. Unset: as
    many as router.max_queued."""
    tokens_per_minute: int | None = Field(None, ge=1, le=10**9)
    """Tokens that the tenant may use a minute: prompt tokens that were not found cached, and generated tokens. When a turn
    begins, it takes what it is expected to use; when it ends, what it has really used. A minute's allowance may be used at
    once; a turn that needs more than that begins when all of it is there. With Redis, over all routers. Unset: no limit."""
    turns_per_minute: int | None = Field(None, ge=1, le=10**9)
    """Turns that the tenant may begin a minute; a request for `n` responses is `n` turns. As for tokens_per_minute, all of them
    may begin at once. With Redis, over all routers. Unset: no limit."""
    max_sessions: int | None = Field(None, ge=1)
    """Most sessions that the tenant may hold at once; creating another one is refused. Unset: a part of router.max_sessions in
    proportion to its weight, at least 1. All tenants together never hold more than router.max_sessions."""
    max_kept_tokens: int | None = Field(None, ge=0)
    """Most tokens that the tenant may keep in the engines' caches at once (KeepSession, `cache_control`,
    prompt_cache_retention); what several kept contexts have in common at their beginning counts once. Keeping more is refused;
    0: nothing may be kept. Unset: a part of what all tenants together may keep (router.max_kept_share,
    router.max_kept_tokens), in proportion to its weight."""
    priority: int = Field(0, ge=-100, le=100)
    """Priority of the tenant's turns; lower is sooner, as in vLLM: turns of a lower number go before all turns of a higher
    number, in the router and in the engines. A request may add up to 100 to it, and so let others go first."""
    cache_domain: Name | None = None
    """The tenant's prompts share KV only with prompts of the same domain. Unset: a domain of its own, named like the tenant."""
    may_share: tuple[Name, ...] = ()
    """Further cache domains that the tenant may choose for a session or request. Anybody who shares a domain can find out, from
    response times, whether others in it have sent the same beginning of a prompt."""


class KeysFile(Node):
    """A keys file."""

    model_config = ConfigDict(hide_input_in_errors=True)

    tenants: dict[Name, Tenant] = Field(min_length=1)
    """Tenant name -> what it may do."""
    operator_keys: tuple[_Key, ...] = Field((), repr=False)
    """Keys of those who run the deployment, written like a tenant's. They show the figures of all tenants in `/metrics`, and
    open nothing else."""

    @model_validator(mode="after")
    def _keys_are_unique(self) -> KeysFile:
        seen: dict[bytes, str] = {}
        lists = {f"tenants.{name}.keys": tenant.keys for name, tenant in self.tenants.items()}
        for of, keys in (lists | {"operator_keys": self.operator_keys}).items():
            for number, key in enumerate(keys):
                place = f"{of}.{number}"
                if key in seen:
                    raise ValueError(f"{place} is the same key as {seen[key]}; a key belongs to one tenant, once")
                seen[key] = place
        return self


class Tenants:
    """The tenants of a deployment; without any, every caller is the anonymous tenant. Read-only; passed between processes.
    `operator_keys`: digests."""

    def __init__(self, tenants: Mapping[str, Tenant] | None = None, operator_keys: Sequence[bytes] = ()):
        self.by_name = dict(tenants or {})
        self._digests = tuple((key, name) for name, tenant in self.by_name.items() for key in tenant.keys)
        self.operator_keys = tuple(operator_keys)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name) or (ANONYMOUS.tenant,)

    @property
    def are_all_anonymous(self) -> bool:
        """Whether no keys are needed."""
        return not self.by_name

    @property
    def fingerprint(self) -> str:
        """Changes with everything a keys file says, keys included."""
        everything = [(name, tenant.model_dump()) for name, tenant in self.by_name.items()]
        return hashlib.sha256(repr((everything, self.operator_keys)).encode()).hexdigest()

    def identify(self, key: str | None) -> Caller:
        """The caller that presents this key. Raises Unauthenticated. A wrong key takes as long to check as a right one."""
        if self.are_all_anonymous:
            return ANONYMOUS
        if not key:
            raise Unauthenticated("no API key is given", fix='send it as "authorization: Bearer KEY"')
        presented, found = digest(key), None
        for stored, name in self._digests:
            if hmac.compare_digest(presented, stored):
                found = name
        if found is None:
            raise Unauthenticated("no tenant has this API key", fix="use a key of this deployment's keys file")
        tenant = self.by_name[found]
        return Caller(found, tenant.cache_domain or found, tenant.may_share, tenant.priority)

    def shows_all(self, key: str | None) -> bool:
        """Whether whoever presents this key, or none, may see figures of all tenants: operators, and everybody where there are
        no keys at all. Raises Unauthenticated for a key that is neither an operator's nor a tenant's."""
        if self.are_all_anonymous:
            return True
        if not key:
            return False
        presented, found = digest(key), False
        for stored in self.operator_keys:
            found |= hmac.compare_digest(presented, stored)
        if not found:
            self.identify(key)
        return found

    def shares(self) -> dict[str, grant.TenantShare]:
        """Tenant name -> what the queue and the limits know of the tenant."""
        return {
            name: grant.TenantShare(name, t.weight, t.max_in_progress, t.tokens_per_minute, t.turns_per_minute)
            for name, t in self.by_name.items()
        }

    def max_sessions(self, in_all: int) -> dict[str, int]:
        """Tenant name -> most sessions it may hold of the `in_all` that the store keeps."""
        weights = sum(tenant.weight for tenant in self.by_name.values())
        return {
            name: tenant.max_sessions or max(1, int(in_all * tenant.weight / weights)) for name, tenant in self.by_name.items()
        }

    def max_kept_tokens(self, tenant: str, in_all: int) -> int | None:
        """Most tokens that the tenant keeps, of the `in_all` that all of them may keep; None: it has no limit of its own."""
        if not (own := self.by_name.get(tenant)):
            return None
        if own.max_kept_tokens is not None:
            return own.max_kept_tokens
        return int(in_all * own.weight / sum(one.weight for one in self.by_name.values()))


def bearer(authorization: str | None) -> str | None:
    """The key in the value of an `authorization` header."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def load(auth: Auth | None) -> Tenants:
    """The tenants of the keys file that `auth` names. Raises ConfigError, which shows no value of the file."""
    if auth is None:
        return Tenants()
    if auth.keys_env:
        field, where, text = "router.auth.keys_env", f"environment variable {auth.keys_env}", os.environ.get(auth.keys_env)
        if text is None:
            raise ConfigError(f"{where} is not set", field=field, fix="put the keys file's content there, or use keys_file")
    else:
        field, where = "router.auth.keys_file", auth.keys_file
        text, reason = _read(Path(where))
        if reason:
            raise ConfigError(f"cannot read {where}: {reason}", field=field)
    file = _parse(text, field, where)
    return Tenants(file.tenants, file.operator_keys)


def _parse(text: str, field: str, where: str) -> KeysFile:
    # Raised outside the handlers: the errors of pydantic and YAML quote the file and must not become this error's context.
    try:
        data = from_yaml(text)
        if isinstance(data, dict):
            return KeysFile.model_validate(data)
        wrong = "a keys file is a mapping with the key tenants; deploy/keys/ holds an example"
    except yaml.YAMLError as error:
        wrong = f"not YAML{_line(error)} (not shown: it may hold a key)"
    except ValidationError as error:
        wrong = str(as_config_error(error, KeysFile, secret=True))
    raise ConfigError(f"{where}: {wrong}", field=field)


def _read(path: Path) -> tuple[str, str]:
    """(content, ""), or ("", why the file cannot be read)."""
    try:
        return path.read_text(), ""
    except OSError as error:
        return "", error.strerror or type(error).__name__
    except UnicodeDecodeError:
        return "", "it is not UTF-8 text"


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
