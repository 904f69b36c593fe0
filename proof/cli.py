"""The command `prefillshare prove`; the command line finds it by entry point."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prefillshare import platform
from prefillshare.arguments import checked
from prefillshare.kvshare import given_files
from prefillshare.kvshare.contract import DTYPE_BYTES
from prefillshare.kvshare.errors import ConfigError, InvalidInput

#: Eight minutes. That all stages fit into them on a GPU has not been measured.
LIMIT_S = 480.0


def prove(
    stage: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run only stages whose names begin with NAME; may be repeated.", show_default="all"),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a base model (Llama or Qwen3).", show_default="a small random one",
            callback=checked(given_files.model),
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype in which the base is served.", show_default="bfloat16 on GPUs, float32 on CPUs")
    ] = None,
    shape: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG_JSON", callback=checked(given_files.model_shape),
            help="Shape of the base whose decode step is measured with two streams; its weights are random.",
            show_default="Llama 3.1 8B on GPUs, the base on CPUs",
        ),
    ] = None,
    limit: Annotated[float, typer.Option(min=1, help="Most seconds for everything.")] = LIMIT_S,
    output: Annotated[
        Path,
        typer.Option(
            help="File for the results, written after each; logs go into a folder beside it.",
            callback=checked(given_files.writable),
        ),
    ] = Path("proof.json"),
    short: Annotated[bool, typer.Option("--short", help="As little as shows that everything works.")] = False,
    list_stages: Annotated[bool, typer.Option("--list", help="Only list the stages.")] = False,
) -> None:
    """Prove on this machine that serving is exact, and measure what it is worth.

    Starts engines of vLLM, hands KV from process to process over NIXL and compares every token's log-probability with plain
    transformers: on and beside block boundaries, from decoder to decoder, in mixed batches, after preemption. Then it measures
    how far answers in the served dtype are from float32, how fast KV moves, what turns cost beside one stock vLLM engine with
    the same adapters, and what the second stream of mode icarus costs. Where Ray is installed, a deployment is started as
    well, and its answers are compared. Needs no download.

    Ends with status 0 if all comparisons passed and nothing was left out, else with 1. The last line of output is one JSON
    object.
    """
    from prefillshare.proof import report, stages, supervisor
    from prefillshare.proof.asked import Asked, Machine

    if list_stages:
        for one in stages.stages().values():
            typer.echo(f"{one.name:<20} {one.about}")
        return
    chosen = stages.choose(stage or [])
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise InvalidInput(f"unknown dtype {dtype!r}", field="--dtype", fix=f"one of {', '.join(DTYPE_BYTES)}")
    importlib.import_module("peft")  # the comparison needs it: if it is missing, that is said before anything starts
    machine, console, began = Machine.here(), Console(stderr=True), time.monotonic()
    if not (machine.is_gpu or platform.on_cpu()):
        raise ConfigError(platform.NO_GPU, fix=platform.NO_GPU_FIX)
    if machine.is_gpu and dtype == "float32" and any(one.in_served_dtype for one in chosen):
        fix = "leave it out, or choose --stage exact: those stages compare in float32"
        raise InvalidInput("adapters are not served in float32 on GPUs", field="--dtype", fix=fix)
    results = report.Results(machine, dtype or machine.dtype, output)
    with tempfile.TemporaryDirectory(prefix="prefillshare-proof-") as folder, report.watched(console) as watch:
        asked = Asked(
            folder, str(base.resolve()) if base else None, results.dtype, str(shape.resolve()) if shape else None, short
        )
        for ending in (signal.SIGTERM, signal.SIGHUP):  # so that no stage is left behind
            signal.signal(ending, lambda number, _: sys.exit(128 + number))
        for of, told in supervisor.run(chosen, asked, limit, output.with_name(f"{output.stem}-logs")):
            watch(of, told)
            results.add(told, time.monotonic() - began)
    console.print(results.table())
    print(json.dumps(results.summary()))
    raise typer.Exit(0 if results.proven else 1)
