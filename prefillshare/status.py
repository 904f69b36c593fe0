"""`prefillshare status`: what a running deployment consists of, and how its replicas are doing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial

from rich.console import Console, Group
from rich.table import Table

from prefillshare.kvshare import decoders
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError, Unavailable

ANSWER_S = 30.0
#: Number of characters of a fingerprint that tables show.
SHORT = 12


def seen(handle) -> dict:
    """{"decoders": [...], "replicas": [...]}, as plain data. Asks the router, which asks the replicas. Raises Unavailable."""
    try:
        deployment, info, stats = (
            call.remote().result(timeout_s=ANSWER_S) for call in (handle.deployment, handle.replica_info, handle.replica_stats)
        )
    except Exception as error:  # the router hangs, died or is being replaced: Ray has an exception for each
        raise Unavailable(f"the router does not answer: {type(error).__name__}: {error}", fix="look at its log") from error
    return {"decoders": list(_decoders(Deployment.model_validate(deployment))), "replicas": list(_replicas(info, stats))}


def _decoders(deployment: Deployment) -> Iterator[dict]:
    for name, decoder in decoders.served(deployment).items():
        (pool,) = [pool for pool in deployment.decode if pool.pool == decoder.pool]
        folder = {"base": deployment.base.model, "full": pool.model}.get(decoder.kind, pool.adapters.get(name))
        yield {
            "decoder": name,
            "pool": decoder.pool,
            "sharing": decoder.sharing,
            "kind": decoder.kind,
            "own_layers": [str(group) for group in decoder.own_layers if group],
            "base_fingerprint": _base_of(folder, decoder.kind),
        }


def _base_of(folder: str, kind: str) -> str | None:
    """Fingerprint of the base's weights in the decoder's contract; None if it has no contract, or its files are elsewhere."""
    try:
        contract = DecoderContract.of_base(folder) if kind == "base" else DecoderContract.read(folder)
    except ConfigError:
        return None
    return contract.base.weights


def _replicas(info: dict, stats: dict) -> Iterator[dict]:
    for pool, members in info.items():
        for replica, one in sorted(members.items()):
            known = {"pool": pool, "replica": replica, "node": one["node"], "pid": one["pid"], "usable": one["usable"]}
            yield known | {"reason": one["reason"], "stats": stats.get(pool, {}).get(replica)}


def tables(found: dict) -> Group:
    of_decoders = Table("decoder", "pool", "sharing", "kind", "own layers", "trained against", title="decoders")
    for decoder in found["decoders"]:
        fingerprint = decoder["base_fingerprint"]
        of_decoders.add_row(
            decoder["decoder"], decoder["pool"], decoder["sharing"], decoder["kind"], ", ".join(decoder["own_layers"]),
            fingerprint[:SHORT] if fingerprint else "",
        )  # fmt: skip
    of_replicas = Table("pool", "replica", "node", "pid", "state", "running", "waiting", "prefill queue", "KV blocks held",
                        "preempted", title="replicas")  # fmt: skip
    for replica in found["replicas"]:
        of_replicas.add_row(replica["pool"], replica["replica"], replica["node"], str(replica["pid"]), *_state(replica))
    return Group(of_decoders, of_replicas)


def _state(replica: dict) -> list[str]:
    stats = replica["stats"]
    state = "[green]usable[/]" if replica["usable"] else f"[red]ejected: {replica['reason']}[/]"
    if stats is None:
        return [f"{state}, [red]no answer[/]", "", "", "", "", ""]
    if stats["stalled_s"]:
        state += f", no step for {stats['stalled_s']:.0f} s"
    held = f"{stats['blocks_used']}/{stats['blocks_total']}"
    if stats["blocks_total"]:
        held += f" ({stats['blocks_used'] / stats['blocks_total']:.0%})"
    queued = f"{stats['queued_tokens']:,} tokens" if stats["queued_tokens"] else "0"
    return [state, str(stats["running"]), str(stats["waiting"]), queued, held, str(stats["preemptions"])]


def status_command(address: str, watch: float | None, as_json: bool) -> None:
    """Print the status. Raises ConfigError if nothing runs there."""
    from prefillshare.cluster import connected, running_handle

    console = Console()
    show, tell = (json.dumps, partial(print, flush=True)) if as_json else (tables, console.print)
    with connected(address):
        handle = running_handle()
        if watch is None:
            tell(show(seen(handle)))
            return
        for shown in _again(handle, show, watch):
            if not as_json:
                console.clear()
            tell(shown)


def _again(handle, show: Callable[[dict], object], watch: float) -> Iterator[object]:
    """What to show, without end. If the router does not answer, this is shown, and it is asked again."""
    while True:
        try:
            yield show(seen(handle))
        except Unavailable as error:
            yield str(error)
        time.sleep(watch)
