"""Checks of the machine before engines start: ports, memory, cores, environment."""

from __future__ import annotations

import errno
import math
import os
import socket
from pathlib import Path

from prefillshare.kvshare import adapter_files, addresses, decoders, fingerprint
from prefillshare.kvshare.config import Deployment, load
from prefillshare.kvshare.contract import DTYPE_BYTES, KVShape
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.modes import get_mode
from prefillshare.platform import on_cpu

#: Memory of an engine beside weights and KV (Python, torch, buffers), GiB; measured on the CPU build.
ENGINE_OVERHEAD_GIB = 1.2


def check_machine(deployment: Deployment) -> None:
    """Raises ConfigError naming the field. Checks only local clusters: the machines of others cannot be seen from here."""
    if deployment.cluster.address is not None:
        return
    deployment.router.redis_password()
    _check_ports(deployment)
    _check_cores(deployment)
    _check_memory(deployment)


def _check_ports(deployment: Deployment) -> None:
    r = deployment.router
    if r.http_port == r.grpc_port:
        raise ConfigError(f"{r.grpc_port} is router.http_port as well", field="router.grpc_port", fix="choose two ports")
    for field, port in (("router.http_port", r.http_port), ("router.grpc_port", r.grpc_port)):
        with socket.socket(addresses.family(r.host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((r.host, port))
            except OSError as error:
                elsewhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
                raise ConfigError(
                    f"cannot listen on {addresses.joined(r.host, port)}: {error.strerror}",
                    field="router.host" if elsewhere else field,
                    fix="give an address of this machine" if elsewhere else "choose a free port, or end what uses this one",
                ) from None


def _check_cores(deployment: Deployment) -> None:
    here = os.sched_getaffinity(0)
    pools = [(f"decode.{n}", p) for n, p in enumerate(deployment.decode)]
    if prefill := deployment.shared_prefill:
        pools.insert(0, ("prefill", prefill))
    for field, engines in pools:
        for part in (engines.cpu_cores or "").split(","):
            if part:
                first, _, last = part.partition("-")
                if missing := set(range(int(first), int(last or first) + 1)) - here:
                    raise ConfigError(
                        f"core {min(missing)} is not available here",
                        field=f"{field}.cpu_cores",
                        fix=f"use cores among {sorted(here)}",
                    )


def _check_memory(deployment: Deployment) -> None:
    import psutil

    if not on_cpu():
        return  # on GPUs vLLM itself checks device memory
    scale = DTYPE_BYTES[deployment.base.dtype]
    need = []
    if prefill := deployment.shared_prefill:
        need.append(("prefill", prefill, deployment.base.model, 0.0))
    linear = adapter_files.linear_modules(deployment.base.model)
    for number, pool in enumerate(deployment.decode):
        model = pool.model or deployment.base.model
        places = pool.max_loras * adapter_files.place_elements(linear, pool.max_lora_rank) if pool.adapters else 0
        need.append((f"decode.{number}", pool, model, places * scale / 2**30))
        if not get_mode(pool.sharing).shares_prefill:
            need.append((f"decode.{number}.prefill", pool.own_prefill(), model, places * scale / 2**30))
    available = psutil.virtual_memory().available / 2**30
    total = 0.0
    for field, engines, model, places_gib in need:
        total += engines.most_replicas * (engines.kv_cache_gib + ENGINE_OVERHEAD_GIB + _weights_gib(model, scale) + places_gib)
        if total > available:
            raise ConfigError(
                f"with {engines.kv_cache_gib:g} GiB here the engines need about {total:.1f} GiB, but {available:.1f} are free",
                field=f"{field}.kv_cache_gib",
                fix="lower kv_cache_gib or replicas, or use a machine with more memory",
            )


def _weights_gib(folder: str, dtype_bytes: int) -> float:
    files = fingerprint.weight_files(Path(folder))
    elements = sum(math.prod(entry["shape"]) for file in files for entry in fingerprint.safetensors_header(file).values())
    return elements * dtype_bytes / 2**30


def ecache_cost(deployment: Deployment, shape: KVShape) -> list[str]:
    """Lines of text that say what keeping hidden states costs: one for the prefill pool, and one per group of layers of each
    decoder. Empty if no decoder recomputes layers."""
    kept, share = decoders.ecache_layers(deployment.decode), decoders.ecache_share(deployment.base.model, shape)
    kv_bytes = shape.bytes_per_token(deployment.base.dtype)
    if not any(pool.own_layers for pool in deployment.decode):
        return []
    lines = [f"prefill keeps the inputs of layers {', '.join(map(str, kept)) or 'none'}: "
             f"{kv_bytes * len(kept) * share:,.0f} bytes per token beside {kv_bytes:,} of KV"]  # fmt: skip
    for decoder in decoders.served(deployment).values():
        for group in filter(None, decoder.own_layers):
            read = kv_bytes * (1 - len(group) / shape.layers + (share if group.transition else 0))
            lines.append(f"{decoder.name} with layers {group}: reads {read:,.0f} bytes per token, computes "
                         f"{100 * len(group) / shape.layers:.0f} % of the layers")  # fmt: skip
    return lines


def base_kv_makers(deployment: Deployment) -> list[str]:
    """Lines of text that say who makes the base's KV of the prompts of each pool that shares it."""
    ways = {
        None: "the prefill pool",
        "never": "the prefill pool; its own engines while that cannot",
        "always": "its own engines",
        "auto": "its own engines, the prefill pool or other engines that have it, whichever is soonest",
    }
    alone = "its own engines or others that have it; there is no prefill pool, and the base is in memory once per engine"
    return [
        f"pool {pool.pool}: KV of prompts comes from {ways[pool.prefill_policy] if deployment.shared_prefill else alone}"
        for pool in deployment.decode
        if get_mode(pool.sharing).shares_prefill
    ]


def check_command(file: Path) -> None:
    """`prefillshare check FILE`: find everything that `serve` would refuse, without starting anything."""
    from rich.console import Console

    from prefillshare.argument_check import check_arguments
    from prefillshare.engines import kv_contract
    from prefillshare.kept_budget import kept_budget
    from prefillshare.router import tenants

    deployment = load(file)
    known = tenants.load(deployment.router.auth).by_name
    contract = kv_contract(deployment)
    check_machine(deployment)
    checked = check_arguments(deployment)
    console = Console()
    console.print(f"[green]ok[/]  contract {contract.digest}  base weights {contract.base.weights[:16]}")
    for decoder in decoders.served(deployment).values():
        own = f", computes a prompt's last {decoder.own_tokens} tokens itself" if decoder.own_tokens > 1 else ""
        console.print(f"  {decoder.name}: {decoder.kind}, pool {decoder.pool}, sharing {decoder.sharing}{own}")
    of_kv = (*base_kv_makers(deployment), *ecache_cost(deployment, contract.shape))
    for line in (*of_kv, *kept_budget(deployment, contract.shape, known)):
        console.print(f"  {line}")
    checked.warn(console)
    if checked.unchecked:
        console.print(f"  not checked: whether vLLM accepts the engines' arguments ({checked.unchecked})")
    console.print(f"  tenants: {', '.join(known)}" if known else "  no tenants (router.auth): anybody may call")
    if known and deployment.router.tls is None:
        console.print("  no TLS (router.tls): API keys are sent unencrypted")
