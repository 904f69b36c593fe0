"""The system that the tests of this folder share, and OpenAI's client for it."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
import yaml
from conftest import System, system

from prefillshare.kvshare.chat_template import text_of
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.seeded_adapters import make_seeded_adapters

ROOT = Path(__file__).parents[3]
DEPLOYMENT = ROOT / "examples/own_adapter/deployment.yaml"
#: The decoder of the deployment that is trained by the page on one's own adapter (test_examples.py), which adds it.
OWN = "own"


@pytest.fixture(scope="package")
def running(tmp_path_factory, smollm) -> System:
    data = yaml.safe_load(DEPLOYMENT.read_text())
    data["base"]["model"] = str(smollm)
    (pool,) = data["decode"]
    shipped = {name: str(ROOT / folder) for name, folder in pool["adapters"].items() if name != OWN}
    seeded = make_seeded_adapters(smollm, tmp_path_factory.mktemp("adapters"), names=("planner", "coder"))
    served = DecoderContract.of_base(smollm, template=text_of(data["base"]["chat_template"]))
    for name, folder in seeded.items():
        DecoderContract.of_base(smollm).with_template(served, name).write(folder)
    pool["adapters"] = shipped | {name: str(folder) for name, folder in seeded.items()}
    data["prefill"]["kv_cache_gib"] = pool["kv_cache_gib"] = 0.4
    data["router"]["max_queued"] = 12
    data["cluster"] = {"kv_lease_s": 20}
    with system(data) as it:
        yield it


@pytest.fixture(scope="package")
def http(running: System) -> openai.OpenAI:
    with openai.OpenAI(base_url=running.http_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
