"""Costs that are fitted to times made by known costs are those costs; and the GPU's prefill computes what its steps compute."""

from __future__ import annotations

import pytest
import torch

from benchmarks.agents import fit
from benchmarks.agents.gpu_costs import prefill
from benchmarks.agents.simulation import Costs
from benchmarks.icarus.shapes import Model, Shapes, step

COSTS = Costs(0.01, 2e-4, 3e-8, 0.02, 1e-3, 2e-6, 100, 1e9)


def test_the_costs_come_back():
    cases = [(computed, computed + before) for computed in (16, 256, 1024) for before in (0, 512, 4096)]
    found = fit.prefill([fit.PrefillTime(*case, COSTS.prefill(*case)) for case in cases])
    assert found.costs == pytest.approx(
        {"prefill_s": 0.01, "prefill_token_s": 2e-4, "prefill_token_context_s": 3e-8}, rel=1e-6
    )
    assert found.worst < 1e-6
    found = fit.step([fit.StepTime(n, n * c, COSTS.step(n, n * c)) for n in (1, 4, 16) for c in (10, 1000)])
    assert found.costs == pytest.approx({"step_s": 0.02, "step_request_s": 1e-3, "step_context_token_s": 2e-6}, rel=1e-6)


def test_a_cost_is_never_negative_and_the_error_says_how_well_it_fits():
    found = fit.step([fit.StepTime(n, n, seconds) for n, seconds in ((1, 0.030), (2, 0.020), (4, 0.010))])
    assert min(found.costs.values()) >= 0
    assert found.worst > 0.2


def test_too_few_measurements_are_refused():
    with pytest.raises(ValueError, match="3 costs cannot be fitted to 2 measurements"):
        fit.step([fit.StepTime(1, 1, 0.1), fit.StepTime(2, 2, 0.2)])


def test_a_prefill_computes_what_single_steps_compute():
    shapes = Shapes(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head=8, vocabulary=50)
    model = Model(shapes, "cpu", torch.float32)
    tokens = torch.tensor([3, 14, 15, 9, 2])
    cache = [(keys * 0, values * 0) for keys, values in model.cache(1, len(tokens))]
    whole = prefill(model, tokens, cache)
    for number in range(len(tokens)):
        seen = [(keys[:, :, : number + 1].clone(), values[:, :, : number + 1].clone()) for keys, values in cache]
        one = step(model, "plain", tokens[number : number + 1], seen)[0]
    torch.testing.assert_close(whole, one, rtol=1e-4, atol=1e-4)
    part = prefill(model, tokens[3:], cache)
    torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)
