"""What the router has tried is not tried again in an engine, and is compiled behind its steps."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import StructuredOutputManager

from prefillshare.kvshare_vllm.grammars.grammars import BACKEND
from prefillshare.kvshare_vllm.patches import gentle_grammars


@pytest.fixture
def as_stock(monkeypatch):
    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", SamplingParams._validate_structured_outputs)
    monkeypatch.setattr(StructuredOutputManager, "_create_grammar", StructuredOutputManager._create_grammar)


def own_priority(*_) -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.parametrize(("in_its_own_thread", "nicer"), [(True, gentle_grammars.NICENESS), (False, 0)])
def test_a_grammar_is_compiled_at_a_lower_priority_than_steps_run_at(as_stock, in_its_own_thread, nicer):
    StructuredOutputManager._create_grammar = own_priority
    gentle_grammars.compile_behind_steps()
    gentle_grammars.compile_behind_steps()
    manager = SimpleNamespace(_use_async_grammar_compilation=in_its_own_thread)
    with ThreadPoolExecutor(1) as thread:
        before = thread.submit(own_priority).result()
        assert thread.submit(StructuredOutputManager._create_grammar, manager, None).result() == min(before + nicer, 19)
    assert own_priority() == before


def test_only_what_names_no_backend_is_checked_again(as_stock):
    gentle_grammars.trust_the_router()
    gentle_grammars.trust_the_router()
    config, model = SimpleNamespace(backend="auto"), SimpleNamespace(is_diffusion=False)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(VLLMValidationError):
        params._validate_structured_outputs(model, config, object())
    params.structured_outputs = StructuredOutputsParams(regex="(")
    params.structured_outputs._backend = BACKEND
    params._validate_structured_outputs(model, config, object())
