"""What the benchmarks that run on two cores have in common: three LoRA decoders in one pool, and bars for long work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefillshare.kvshare.config import Deployment, parse
from prefillshare.kvshare.modes import get_mode

MODEL = "smollm2-135m-instruct"
DECODERS = ("planner", "coder", "caller")
BLOCK, VOCABULARY = 32, 40_000
HTTP_PORT, GRPC_PORT = 18_000, 19_000
ADDRESS = f"127.0.0.1:{GRPC_PORT}"


def deployment(
    model: Path, adapters: Mapping[str, Path], *, prefill: dict, decode: dict, router: dict, cluster: dict | None = None,
    max_model_len: int = 1024,
) -> Deployment:  # fmt: skip
    """A deployment with prefill engines on the first core and decode engines on the second; the rest is as given. Unless
    `decode` says otherwise, a prefill pool makes the KV of all prompts that it can make."""
    in_place = get_mode(decode.get("sharing", "prefillshare")).base_in_place
    return parse({
        "base": {"model": str(model), "dtype": "float32", "max_model_len": max_model_len, "block_size": BLOCK},
        "prefill": {"cpu_cores": "0", **prefill},
        "decode": [{
            "pool": "agents",
            "cpu_cores": "1",
            "max_lora_rank": 8,
            "serve_base": False,
            "local_prefill": "never" if in_place else None,
            "adapters": {name: str(path) for name, path in adapters.items()},
            **decode,
        }],
        "router": {"http_port": HTTP_PORT, "grpc_port": GRPC_PORT, **router},
        "cluster": cluster or {},
    })  # fmt: skip


def bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
