"""What engines do on GPUs and not on CPUs, as far as a CPU can show it. docs/operations.md lists what it cannot."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import random_sample

from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.replica_info import KVEvents
from prefillshare.kvshare_vllm.engine import argument_check, launch, worker
from prefillshare.kvshare_vllm.transfer.nixl import profile

SETTINGS = EngineSettings(
    role="decode", pool="agents", model="m", mode="prefillshare", contract="c", dtype="float32", max_model_len=64,
    block_size=32, kv_cache_bytes=1, cpu_cores="0-1",
)  # fmt: skip


@pytest.fixture
def gpus(monkeypatch):
    """Platform code takes this machine for one with two GPUs."""
    platform = SimpleNamespace(is_cpu=lambda: False, device_count=lambda: 2)
    for module in (argument_check, launch, worker, profile):
        monkeypatch.setattr(module, "current_platform", platform)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_models_run_as_vllm_runs_them_and_kv_stays_on_the_device(gpus, role):
    args = launch.engine_args(replace(SETTINGS, role=role), KVEvents("tcp://127.0.0.1:1", "tcp://127.0.0.1:2"))
    assert "enforce_eager" not in args
    assert "kv_buffer_device" not in args["kv_transfer_config"]


def test_an_engine_has_the_processes_that_vllm_gives_it(gpus):
    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend="mp"))
    with launch.one_process(config, SETTINGS):
        assert config.parallel_config.distributed_executor_backend == "mp"


def test_cores_are_not_bound(gpus, monkeypatch):
    environment: dict[str, str] = {}
    monkeypatch.setattr(launch.os, "environ", environment)
    launch.set_environment(SETTINGS, "127.0.0.1", launch.Ports(1, 2, 3))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment


@pytest.mark.parametrize(("ranks", "checked_with"), [(1, 1), (2, 2), (4, 1)])
def test_arguments_are_checked_with_as_many_ranks_as_there_are_gpus(gpus, ranks, checked_with):
    assert argument_check._here(replace(SETTINGS, tensor_parallel_size=ranks)).tensor_parallel_size == checked_with


def test_an_argument_that_needs_the_other_model_runner_is_refused_by_name(gpus, monkeypatch):
    """On CPUs vLLM refuses it itself."""

    class Arguments:
        def __init__(self, **arguments):
            self.arguments = arguments

        def create_engine_config(self):
            return SimpleNamespace(use_v2_model_runner="watermark_config" in self.arguments)

    monkeypatch.setattr(argument_check, "AsyncEngineArgs", Arguments)
    settings = replace(SETTINGS, engine_args={"seed": 1, "watermark_config": {"key": 1}})
    (problem,) = argument_check.problems({"agents": settings})
    assert problem["argument"] == "engine_args.watermark_config"
    assert problem["message"] == "it needs vLLM's V2 model runner, and engines run the V1 runner"


@pytest.mark.parametrize("drawn", [0, 1, 5])
def test_a_resumed_requests_generator_goes_on_after_as_many_draws_as_vllm_makes(gpus, drawn):
    vocabulary, undisturbed = 50, torch.Generator()
    undisturbed.manual_seed(7)
    for _ in range(drawn):
        random_sample(torch.rand(1, vocabulary), {0: undisturbed})
    runner = SimpleNamespace(device="cpu", input_batch=SimpleNamespace(vocab_size=vocabulary))
    resumed = worker.SharedKVWorker._generator_after(SimpleNamespace(model_runner=runner), SamplingParams(seed=7), drawn)
    assert torch.equal(resumed.get_state(), undisturbed.get_state())


def test_the_other_model_runner_is_refused_before_a_model_is_loaded():
    with pytest.raises(RuntimeError, match="no effect on the V2 runner"):
        worker.SharedKVWorker.load_model(SimpleNamespace(use_v2_model_runner=True))
