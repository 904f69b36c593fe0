"""docs/agents.md's table of what each way of keeping a history computes, by kind of chat template. No engine runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.chats.__main__ import FAMILIES, RESULTS, SCENARIOS
from benchmarks.chats.report import written
from benchmarks.chats.ways import BLOCK, TURNS, WAYS, agents, play

pytestmark = pytest.mark.engine

FIGURES = json.loads((RESULTS / "chats.json").read_text())
PAGE = Path(__file__).parents[2] / "docs" / "agents.md"


@pytest.mark.asyncio
@pytest.mark.parametrize("family", ["smollm2_tools", "qwen", "mistral"])
async def test_the_figures_are_what_is_computed_now(smollm, family):
    template, thinking = FAMILIES[family]
    for way in WAYS:
        assert await play(str(smollm), template, thinking, way, alike=False) == FIGURES["own"][family][way]


def test_every_scenario_family_and_way_is_in_the_figures_and_on_the_page():
    assert FIGURES.keys() == SCENARIOS.keys()
    page = PAGE.read_text()
    for line in written(FIGURES).splitlines():
        if line.startswith("| `"):
            assert line in page


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_session_no_token_of_the_context_is_computed_twice_and_all_ways_but_plain_agree(family):
    """Agents that are alike compute, over all turns, what their last prompt has, and at most a block a turn more."""
    alike = FIGURES["alike"][family]
    assert alike["responses"] == alike["header"]
    assert alike["header"]["continued"] == TURNS - 1
    last = alike["header"]["last_prompt"]
    assert alike["header"]["computed"] <= 1.05 * last + TURNS * BLOCK
    assert FIGURES["own"][family]["header"]["computed"] < FIGURES["own"][family]["plain"]["computed"]
    assert len({agent.prompt for agent in agents(alike=False)}) == 3
