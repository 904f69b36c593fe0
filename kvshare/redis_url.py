"""Checks a Redis URL, and shows it without secrets. It may hold a password, even in a wrong place."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit, urlunsplit

SCHEMES = ("redis", "rediss", "unix")


def problem(url: str) -> str:
    """Empty if it is the URL of a Redis server, else what is wrong. The text repeats no part of the URL, as any part may belong
    to a password."""
    try:
        parts = urlsplit(url)
        where = parts.path if parts.scheme == "unix" else parts.hostname
        right = parts.scheme in SCHEMES and bool(where) and parts.port != 0 and not parts.fragment
        right = right and (parts.scheme == "unix" or bool(re.fullmatch(r"(/\d*)?", parts.path)))
        options = parse_qs(parts.query, keep_blank_values=True)
    except ValueError:
        right, options = False, {}
    if not right:
        return (
            "not the URL of a Redis server; allowed: redis://[user@]host[:port][/db], the same with rediss:// (TLS), "
            "unix://path; a password goes into the environment variable that redis_password_env names"
        )
    if parts.password:
        return "holds a password; put that into an environment variable, and the variable's name into redis_password_env"
    if not all(name.startswith("ssl_") for name in options) or "ssl_password" in options:
        return "options after the `?` must begin with ssl_, and may not be ssl_password; remove the others"
    return ""


def shown(url: str) -> str:
    """The URL without password and options."""
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    user = credentials.partition(":")[0]
    return urlunsplit((parts.scheme, f"{user}@{host}" if user else host, parts.path, "", ""))
