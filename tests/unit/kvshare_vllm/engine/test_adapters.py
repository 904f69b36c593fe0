"""Adapters of an engine that cannot load one of them: the others stay, and it says which and why."""

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from prefillshare.kvshare_vllm.engine.adapters import Adapters

GOOD = {"a": "/adapters/a", "b": "/adapters/b"}


class LLM:
    """Loads what is not called after what is wrong with it. `kept`: numbers of the adapters it holds."""

    def __init__(self):
        self.kept: dict[int, str] = {}

    async def add_lora(self, lora) -> bool:
        if "dead" in lora.lora_path:
            raise EngineDeadError
        self.kept[lora.lora_int_id] = lora.lora_name
        if "dora" in lora.lora_path:
            raise Exception("Call to add_lora method failed: vLLM does not yet support DoRA.")
        return True

    async def remove_lora(self, number: int) -> bool:
        return self.kept.pop(number, None) is not None

    async def collective_rpc(self, method: str, args) -> list[list[str]]:
        """Of two ranks; each has some of the model's modules."""
        (number,) = args
        dropped = ["model.layers.9.mlp.up_proj"] if self.kept[number] == "beyond" else []
        return [[*dropped, "model.layers.0.mlp.up_proj"], [*dropped, "model.layers.1.mlp.up_proj"]]


@pytest.fixture
async def adapters():
    made = Adapters(LLM())
    await made.serve(GOOD)
    assert made.loaded.keys() == GOOD.keys()
    return made


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dora", "vLLM does not yet support DoRA."),
        ("beyond", "the engine's model has no module for 1 of its weights, model.layers.9.mlp.up_proj among them"),
    ],
)
async def test_one_that_cannot_be_loaded_leaves_the_others_and_nothing_of_itself(adapters, name, why):
    before = dict(adapters.loaded)
    await adapters.serve({name: f"/adapters/{name}", **GOOD, "c": "/adapters/c"})
    assert adapters.problems == {name: why}
    assert adapters.loaded.keys() == {"a", "b", "c"}
    assert {n: adapters.loaded[n] for n in GOOD} == before
    assert sorted(adapters._llm.kept.values()) == ["a", "b", "c"]


async def test_going_back_leaves_no_problem_behind(adapters):
    await adapters.serve({**GOOD, "dora": "/adapters/dora"})
    await adapters.serve(GOOD)
    assert (adapters.problems, adapters.loaded.keys()) == ({}, GOOD.keys())


async def test_what_has_been_mended_is_loaded_the_next_time(adapters):
    await adapters.serve({**GOOD, "c": "/adapters/dora"})
    await adapters.serve({**GOOD, "c": "/adapters/c"})
    assert (adapters.problems, adapters.loaded["c"].lora_path) == ({}, "/adapters/c")


async def test_an_engine_that_has_died_is_no_problem_of_an_adapter(adapters):
    with pytest.raises(EngineDeadError):
        await adapters.serve({"c": "/adapters/dead"})
