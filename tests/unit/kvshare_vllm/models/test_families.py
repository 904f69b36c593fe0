"""What vLLM is told of models of ours exists, and a model that runs is told from those of other families."""

from importlib import import_module

import pytest

from prefillshare.kvshare.modes import modes
from prefillshare.kvshare_vllm.models import families

WITH_MODELS = [mode for mode in modes() if mode.models]


def test_every_registered_model_is_there():
    registered = dict(families.registered())
    assert len(registered) == sum(len(mode.architectures) for mode in WITH_MODELS)
    for architecture, where in registered.items():
        module, _, name = where.partition(":")
        assert name == architecture
        assert isinstance(getattr(import_module(module), name), type)


@pytest.mark.parametrize("mode", modes(), ids=lambda mode: mode.name)
def test_a_model_is_of_the_family_that_its_mode_runs(mode):
    family = families.of_decode(mode)
    model = type(f"{family.prefix}LlamaForCausalLM", (), {})()
    assert families.of_model(model) is family
    assert (family is families.STOCK) is (mode not in WITH_MODELS)
