"""`prefillshare status`: what a running deployment consists of, and how it is doing (its text: status_view.py).

The router tells what it serves and has counted, and asks the replicas; Ray Serve tells which replicas it runs, and since when.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from rich.console import Console

from prefillshare import status_view, which
from prefillshare.cluster import ROUTER
from prefillshare.kvshare import addresses, decoders
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError, Unavailable
from prefillshare.which import Found
from prefillshare.within import within

#: Seconds within which router and Ray Serve have to answer, together.
ANSWER_S = 6.0
#: Asked of one router, and of all routers.
_ASKED, _ASKED_OF_ALL = ("deployment", "replica_info", "replica_stats"), "figures"

Details = Callable[[float], Mapping]
#: Deployment of Serve -> its replicas (ray/serve/schema.py: ReplicaDetails).
Parts = Mapping[str, list[dict]]


def seen(handle, found: Found, details: Details, now: Callable[[], float] = time.time) -> dict:
    """{"deployment": {...}, "decoders": [...], "replicas": [...], "routers": [...]}, as plain data. `details`: what Serve's
    controller says of the application, asked with a deadline in seconds. Raises Unavailable."""
    until = time.monotonic() + ANSWER_S
    left = lambda: max(0.1, until - time.monotonic())  # noqa: E731
    try:
        asked = [getattr(handle, question).remote() for question in _ASKED]
        plain, info, stats = (answer.result(timeout_s=left()) for answer in asked)
        figures = handle.broadcast(_ASKED_OF_ALL).results(timeout_s=left())
    except Exception as error:  # the router hangs, died or is being replaced: Ray has an exception for each
        message = f"the router does not answer: {type(error).__name__}: {error}"
        raise Unavailable(message + _what_serve_says(details), fix="look at the logs of what does not run") from error
    deployment, parts, counted, now_s = Deployment.model_validate(plain), _parts_of(details, left()), _added(figures), now()
    replicas, routers = list(_engines(info, stats, parts, now_s)), list(_of_serve(ROUTER, parts, now_s))
    return {
        "deployment": _deployment(deployment, found, counted, [*replicas, *routers], now_s),
        "decoders": list(_decoders(deployment, counted["decoders"])),
        "replicas": replicas,
        "routers": routers,
    }


def _deployment(deployment: Deployment, found: Found, counted: dict, replicas: list[dict], now_s: float) -> dict:
    router, scheme = deployment.router, "https" if deployment.router.tls else "http"
    http, grpc = (addresses.joined(router.host, port) for port in (router.http_port, router.grpc_port))
    oldest = max((one["up_s"] for one in replicas if one["up_s"] is not None), default=None)
    tokens = {what: sum(one[what] for one in counted["decoders"].values()) for what in ("cached", "computed")}
    return {
        "name": deployment.name,
        "address": found.address,
        "http": f"{scheme}://{http}/v1",
        "grpc": grpc,
        "base": deployment.base.model,
        "dtype": deployment.base.dtype,
        "up_s": now_s - found.record.started if found.record else oldest,
        "sessions": counted["sessions"],
        "max_sessions": router.max_sessions,
        "turns": {
            "in_progress": counted["turns_in_progress"],
            "waiting": counted["turns_waiting"],
            "ended": sum(one["turns"] for one in counted["decoders"].values()),
            "failed": sum(one["failed"] for one in counted["decoders"].values()),
        },
        "prompt_tokens": tokens,
        "hit_ratio": _ratio(tokens),
    }


def _added(figures: list[dict]) -> dict:
    """What all routers together have counted. They all tell the same number of sessions, if there are several."""
    decoders: dict[str, dict[str, int]] = {}
    for one in figures:
        for name, counted in one["decoders"].items():
            before = decoders.get(name, {})
            decoders[name] = {what: value + before.get(what, 0) for what, value in counted.items()}
    summed = {what: sum(one[what] for one in figures) for what in ("turns_in_progress", "turns_waiting")}
    return {"sessions": max((one["sessions"] for one in figures), default=0), "decoders": decoders, **summed}


def _ratio(tokens: Mapping[str, int]) -> float | None:
    asked = tokens["cached"] + tokens["computed"]
    return round(tokens["cached"] / asked, 4) if asked else None


def _decoders(deployment: Deployment, counted: Mapping[str, dict[str, int]]) -> Iterator[dict]:
    for name, decoder in decoders.served(deployment).items():
        (pool,) = [pool for pool in deployment.decode if pool.pool == decoder.pool]
        folder = {"base": deployment.base.model, "full": pool.model}.get(decoder.kind, pool.adapters.get(name))
        own = counted.get(name, dict.fromkeys(("turns", "failed", "cached", "computed"), 0))
        yield {
            "decoder": name,
            "pool": decoder.pool,
            "sharing": decoder.sharing,
            "kind": decoder.kind,
            "own_layers": [str(group) for group in decoder.own_layers if group],
            "own_tokens": decoder.own_tokens,
            "base_fingerprint": _base_of(folder, decoder.kind),
            "turns": own["turns"],
            "failed": own["failed"],
            "prompt_tokens": {what: own[what] for what in ("cached", "computed")},
            "hit_ratio": _ratio(own),
        }


def _base_of(folder: str, kind: str) -> str | None:
    """Fingerprint of the base's weights in the decoder's contract; None if it has no contract, or its files are elsewhere."""
    try:
        contract = DecoderContract.of_base(folder) if kind == "base" else DecoderContract.read(folder)
    except ConfigError:
        return None
    return contract.base.weights


def _engines(info: dict, stats: dict, parts: Parts, now_s: float) -> Iterator[dict]:
    """Replicas of engines that the router knows, and those that only Serve knows, because they start or stop."""
    for pool, members in info.items():
        since = {one["replica_id"]: one["start_time_s"] for one in parts.get(pool, ())}
        for replica, one in sorted(members.items()):
            own = stats.get(pool, {}).get(replica)
            up_s = now_s - since[replica] if replica in since else None
            yield {
                "pool": pool,
                "replica": replica,
                "node": one["node"],
                "pid": one["pid"],
                "usable": one["usable"],
                "reason": one["reason"],
                "state": "ejected" if not one["usable"] else "usable" if own else "no answer",
                "up_s": up_s,
                "stats": own,
            }
        yield from (one for one in _of_serve(pool, parts, now_s) if one["replica"] not in members)


def _of_serve(part: str, parts: Parts, now_s: float) -> Iterator[dict]:
    for one in sorted(parts.get(part, ()), key=lambda one: one["start_time_s"]):
        is_router, state = part == ROUTER, _word(one["state"])
        yield {
            "pool": part,
            "replica": one["replica_id"],
            "node": one["node_ip"] or "",
            "pid": one["pid"] or 0,
            "usable": is_router and state == "running",
            "reason": "",
            "state": ("usable" if is_router else "starting") if state == "running" else state,
            "up_s": now_s - one["start_time_s"],
            "stats": None,
        }


def _parts_of(details: Details, timeout_s: float) -> Parts:
    """Empty while the controller does not answer."""
    try:
        return {name: part["replicas"] for name, part in details(timeout_s).get("deployments", {}).items()}
    except Exception:  # it is being replaced: turns go on, and so does what the router tells
        return {}


def _what_serve_says(details: Details) -> str:
    """What Serve says of the application's parts, a line each."""
    try:
        parts = details(1.0).get("deployments", {})
    except Exception as error:
        return f"\n  and Ray Serve does not answer either: {type(error).__name__}"
    said = [f"{name}: {_word(part['status'])} {part['message']}".rstrip() for name, part in sorted(parts.items())]
    return "".join(f"\n  {line}" for line in said)


def _word(state) -> str:
    """Of one of Serve's enums, or its value."""
    return str(getattr(state, "value", state)).lower()


def status_command(name: str | None, address: str | None, watch: float | None, as_json: bool) -> None:
    """Print the status. Raises ConfigError if nothing runs there, or if it is not clear which deployment is meant."""
    from prefillshare.cluster import APP, joined, running_handle
    from prefillshare.serve_config import details

    def of_serve(timeout_s: float) -> Mapping:
        return within(timeout_s, partial(details, APP, timeout_s))

    console = Console(soft_wrap=True, highlight=False)
    tell = partial(print, flush=True) if as_json else console.print
    show = json.dumps if as_json else partial(status_view.text, width=console.width)
    found = which.found(name, address)
    with joined(found.address):
        ask = partial(_asked, running_handle(), found, of_serve, name)
        if watch is None:
            tell(show(ask()))
            return
        for shown in _again(ask, show, watch):
            if not as_json:
                console.clear()
            tell(shown)


def _asked(handle, found: Found, details: Details, name: str | None) -> dict:
    told = seen(handle, found, details)
    if name not in (None, told["deployment"]["name"]):
        raise ConfigError(f"the deployment at {found.address} is called {told['deployment']['name']}", field="--name")
    return told


def _again(ask: Callable[[], dict], show: Callable[[dict], object], watch: float) -> Iterator[object]:
    """What to show, without end. If the router does not answer, this is shown, and it is asked again."""
    while True:
        try:
            yield show(ask())
        except Unavailable as error:
            yield str(error)
        time.sleep(watch)
