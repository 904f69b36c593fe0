"""Checks, before engines start, that vLLM accepts the arguments that a deployment gives them; asks it in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from prefillshare.engines import engine_settings, fields
from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import ConfigError, EngineStartError
from prefillshare.platform import vllm_build

#: Seconds; many times what importing vLLM takes on idle cores. After that the engines themselves will show it.
LIMIT_S = 300.0
#: Number of answers that are remembered.
KEPT = 100
_MODULE = "prefillshare.kvshare_vllm.engine.argument_check"


def check_arguments(deployment: Deployment, command: tuple[str, ...] = (sys.executable, "-m", _MODULE)) -> str:
    """Returns why vLLM could not be asked; empty if it accepts the arguments of all engines of the deployment.

    Raises ConfigError naming the fields and what vLLM says, and as `engine_settings` does. Takes as long as importing vLLM,
    unless the same engines have been checked before.
    """
    if not vllm_build():
        return "vLLM is not installed here"
    engines = {name: asdict(settings) for name, (settings, _) in engine_settings(deployment).items()}
    asked = json.dumps({"engines": engines, "tool_call_parser": deployment.base.tool_call_parser}, default=str)
    key = fingerprint.of_json([vllm_build(), asked])
    if key in _good():
        return ""
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
        return f"vLLM has not answered within {LIMIT_S:g} s"
    if done.returncode:
        message = f"vLLM cannot be asked about the engines' arguments (status {done.returncode})"
        raise EngineStartError(message, log_tail=done.stderr)
    found = json.loads(done.stdout)
    if problems := found["problems"]:
        where = fields(deployment)
        named = [(".".join(filter(None, (where[p["engine"]], p["argument"]))), p["message"]) for p in problems]
        (field, message), *rest = dict.fromkeys(named)
        raise ConfigError(
            message + "".join(f"\n  {name}: {what}" for name, what in rest), field=field, fix="see vLLM's engine arguments"
        )
    if not found["unchecked"]:
        _remember(key)
    return found["unchecked"]


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
