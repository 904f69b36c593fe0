"""A tiny Qwen3: another architecture through the same system."""

from __future__ import annotations

import pytest
from conftest import System, system
from oracle import Oracle
from test_system_llama import deployment, ids

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    data = deployment(tmp_path_factory.mktemp("qwen3"), smollm, "qwen3")
    with system(data | {"decode": data["decode"][:2]}) as it:
        yield it


def test_qwen3_adapters_full_weights_and_base_are_exact_over_turns(running: System):
    oracle = Oracle(running.deployment)
    session = running.client.create_session(token_ids=ids(70, salt=3))
    for number, name in enumerate(("a", "coder", "b", "base", "a")):
        result, _ = oracle.turn(session, name, token_ids=ids(9, salt=number + 20), max_tokens=20, ignore_eos=True)
        assert result.usage.completion_tokens == 20
