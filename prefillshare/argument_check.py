"""Checks, before engines start, that vLLM accepts the arguments that a deployment gives them, and that its chat template can
lay out conversations; asks in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from prefillshare.engines import engine_settings, fields
from prefillshare.kvshare import chat_template, fingerprint
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import ConfigError, EngineStartError
from prefillshare.platform import vllm_build

#: Seconds; many times what importing vLLM takes on idle cores. After that the engines themselves will show it.
LIMIT_S = 300.0
#: Number of answers that are remembered.
KEPT = 100
_MODULE = "prefillshare.kvshare_vllm.engine.argument_check"


@dataclass(frozen=True)
class Checked:
    """`unchecked`: why vLLM could not be asked; empty if it accepts the arguments of all engines. `warnings`: what engines
    would start with, but what hardly anybody wants."""

    unchecked: str = ""
    warnings: tuple[str, ...] = ()

    def warn(self, console: Console) -> None:
        for warning in self.warnings:
            console.print(Text.assemble(("warning", "yellow"), f"  {warning}"), soft_wrap=True)


def check_arguments(deployment: Deployment, command: tuple[str, ...] = (sys.executable, "-m", _MODULE)) -> Checked:
    """Asks vLLM about the arguments of all engines of the deployment, and tries its chat template.

    Raises ConfigError naming the fields and what vLLM says, and as `engine_settings` does. Takes as long as importing vLLM,
    unless the same engines have been checked before.
    """
    if not vllm_build():
        return Checked("vLLM is not installed here")
    base = {
        "model": deployment.base.model,
        "tool_call_parser": deployment.base.tool_call_parser,
        "chat_template": chat_template.text_of(deployment.base.chat_template),
    }
    engines = {name: asdict(settings) for name, (settings, _) in engine_settings(deployment).items()}
    asked = json.dumps({"engines": engines, "base": base}, default=str)
    key = fingerprint.of_json([vllm_build(), asked])
    if key in _good():
        return Checked()
    try:
        done = subprocess.run(
            command,
            input=asked,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        )
    except subprocess.TimeoutExpired:
        return Checked(f"vLLM has not answered within {LIMIT_S:g} s")
    if done.returncode:
        message = f"vLLM cannot be asked about the engines' arguments (status {done.returncode})"
        raise EngineStartError(message, log_tail=done.stderr)
    found = json.loads(done.stdout)
    if problems := found["problems"]:
        where = fields(deployment)
        named = [(".".join(filter(None, (where[p["engine"]], p["argument"]))), p["message"]) for p in problems]
        (field, message), *rest = dict.fromkeys(named)
        raise ConfigError(
            message + "".join(f"\n  {name}: {what}" for name, what in rest),
            field=field,
            fix=problems[0].get("fix", "see vLLM's engine arguments"),
        )
    checked = Checked(found["unchecked"], tuple(found["warnings"]))
    if checked == Checked():
        _remember(key)
    return checked


def _file() -> Path:
    return fingerprint.cache_folder() / "arguments.txt"


def _good() -> list[str]:
    """Digests of arguments that vLLM has accepted, the newest last."""
    try:
        return _file().read_text().split()[-KEPT:]
    except OSError:
        return []


def _remember(key: str) -> None:
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        part = _file().with_suffix(f".{os.getpid()}.part")
        part.write_text("\n".join([*_good(), key]))
        part.replace(_file())
    except OSError:
        pass  # a read-only home only costs time
