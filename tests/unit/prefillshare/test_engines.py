"""What engines are started with, from the deployment file."""

from __future__ import annotations

from prefillshare.engines import engine_settings
from prefillshare.kvshare import config


def test_engines_that_share_a_gpu_claim_their_share_of_its_memory(model, adapter):
    base = model()
    pool = {"pool": "agents", "adapters": {"a": str(adapter("a", base=base))}}
    deployment = config.parse({
        "base": {"model": str(base), "max_model_len": 64},
        "prefill": {"gpu_share": 0.4},
        "decode": [
            pool | {"gpu_share": 0.5, "engine_args": {"gpu_memory_utilization": 0.3, "enforce_eager": True}},
            {"pool": "whole", "adapters": {"b": str(adapter("b", base=base))}, "engine_args": {"enforce_eager": True}},
        ],
    })
    arguments = {name: dict(settings.engine_args) for name, (settings, _) in engine_settings(deployment).items()}
    assert arguments == {
        "prefill": {"gpu_memory_utilization": 0.36},
        "agents": {"gpu_memory_utilization": 0.3, "enforce_eager": True},
        "whole": {"enforce_eager": True},
    }
