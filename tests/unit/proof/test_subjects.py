"""What a proof is done on: a shape without weights, and bases that do not fit."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.modes import get_mode
from prefillshare.proof import oracle, served, stages, steps, system
from prefillshare.proof.asked import Asked, Machine
from prefillshare.proof.found import Status
from prefillshare.proof.subject import Subject

CPU = Machine("cpu", "2 cores", 8 << 30)
GPU = Machine("cuda", "a GPU", 80 << 30)
SHAPE = steps.LARGE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}  # fmt: skip


def test_a_shape_is_a_base_without_weights(tmp_path):
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    asked = Asked(str(tmp_path), shape=str(tmp_path / "shape.json"))
    subject = steps._of_shape(asked, get_mode("prefillshare"), CPU)
    assert json.loads((subject.base / "config.json").read_text()) == SHAPE
    assert not list(subject.base.glob("*.safetensors"))
    assert subject.linear["model.layers.1.mlp.down_proj"] == (64, 96)
    assert len(subject.linear) == 2 * 7
    assert subject.layers == 2
    assert all((folder / "adapter_model.safetensors").is_file() for folder in subject.adapters.values())


def test_steps_whose_base_does_not_fit_are_left_out_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: Machine("cuda", "a small GPU", 1 << 10)))
    monkeypatch.setattr(steps, "LARGE", SHAPE)
    told = []
    asyncio.run(steps.run(Asked(str(tmp_path), dtype="bfloat16"), told.append))
    (part,) = told
    assert (part.status, "--shape" in part.found) == (Status.SKIPPED, True)


def subject(gib: float) -> Subject:
    return SimpleNamespace(weight_bytes=lambda dtype: int(gib * 2**30), kv_bytes=lambda dtype: 1 << 17)


def test_engines_have_room_for_all_sessions_or_for_what_fits():
    load = served.ON_GPUS
    assert served._kv_tokens(load, subject(1), "bfloat16", Machine("cuda", "", 1 << 40), 4) == 2 * load.held
    assert 2 * load.longest <= served._kv_tokens(load, subject(10), "bfloat16", GPU, 4) < 2 * load.held
    with pytest.raises(ConfigError, match=r"--base: 4 engines with this base do not fit into 80 GiB"):
        served._kv_tokens(load, subject(16), "bfloat16", GPU, 4)


@pytest.mark.parametrize(("machine", "free_gib", "device"), [(CPU, 0, "cpu"), (GPU, 40, "cuda"), (GPU, 20, "cpu")])
def test_plain_transformers_run_where_there_is_room(monkeypatch, machine, free_gib, device):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free_gib << 30, 80 << 30))
    assert oracle.device(machine, 16 << 30) == device


def test_the_whole_system_is_proven_where_ray_is(monkeypatch):
    names = list(stages.stages())
    assert names.index("served") < names.index("system") < names.index("steps")
    monkeypatch.setattr(stages, "find_spec", lambda name: None)
    assert "system" not in stages.stages()


@pytest.mark.parametrize(("machine", "gpus", "share"), [(CPU, 0, 1.0), (GPU, 1, 0.5), (GPU, 2, 1.0)])
def test_two_engines_share_the_only_gpu(tmp_path, monkeypatch, machine, gpus, share):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    base = Subject.of(Asked(str(tmp_path), short=True), get_mode(system.MODE))
    system.give_tokenizer(base.base)
    made = system.deployment(base, "float32", machine)
    assert [pool.gpu_share for pool in (made.prefill, *made.decode)] == [share, share]
    assert made.router.http_port != made.router.grpc_port


def test_every_mode_that_shares_is_compared_in_the_served_dtype():
    served_ones = [name for name in stages.stages() if name.startswith("served")]
    assert served_ones == ["served", "served-droidspeak"]
