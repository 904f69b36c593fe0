"""What a decode step and a prompt cost: plain model, the same with an adapter per request, and two streams with an adapter per
request.

Each is an engine in a process of its own on the same cores; they take turns, so that only one computes at a time.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path

from prefillshare.platform import engine_environment

ADAPTERS = 4
START_TIMEOUT_S, MEASURE_TIMEOUT_S, STOP_TIMEOUT_S = 240, 300, 20
#: System -> (with adapters, with a decoder stream).
SYSTEMS = {"plain": (False, False), "plain with adapters": (True, False), "two streams": (True, True)}


class Stepper:
    """An engine whose decode steps and prompts are timed; lives in a child process."""

    def __init__(self, model: str, adapters: dict[str, str], two_streams: bool, cores: str, context: int, batch: int):
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_LOGGING_LEVEL": "ERROR"}
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.utils.ompmultiprocessing import OMPProcessManager
        from vllm.v1.engine.llm_engine import LLMEngine

        from prefillshare.kvshare_vllm.models.families import TwoStreams

        options = {"hf_overrides": {"architectures": [TwoStreams.prefix + "LlamaForCausalLM"]}} if two_streams else {}
        if adapters:
            options |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 8}
        args = EngineArgs(
            model=model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=context + 512, max_num_seqs=batch,
            kv_cache_memory_bytes=2 << 30, enable_prefix_caching=False, disable_log_stats=True,
            worker_cls="prefillshare.kvshare_vllm.engine.worker.SharedKVWorker", **options,
        )  # fmt: skip
        config = args.create_engine_config()
        config.parallel_config.distributed_executor_backend = "uni"
        with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
            self._engine = LLMEngine.from_vllm_config(config)
        self._adapters = [LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), 1)]
        self._context, self._count = context, 0

    def step_s(self, batch: int, steps: int) -> float:
        """Median seconds of a decode step of `batch` requests, each with a context of `context` tokens and more."""
        from vllm import SamplingParams

        engine = self._engine
        sampling = SamplingParams(max_tokens=steps + 4, temperature=0, ignore_eos=True, detokenize=False)
        for number in range(batch):
            self._add(self._context, number, sampling)
        began: dict[str, bool] = {}
        while len(began) < batch:
            began |= {output.request_id: True for output in engine.step() if output.outputs[0].token_ids}
        times = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:-4])

    def prompt_s(self, tokens: int) -> float:
        """Seconds from a prompt of `tokens` tokens to the token after it."""
        from vllm import SamplingParams

        self._add(tokens, self._count, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False))
        start = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - start

    def _add(self, tokens: int, adapter: int, sampling) -> None:
        self._count += 1
        prompt = [(7 * i + 13 * self._count) % 40_000 for i in range(tokens)]
        chosen = self._adapters[adapter % len(self._adapters)] if self._adapters else None
        self._engine.add_request(str(self._count), {"prompt_token_ids": prompt}, sampling, lora_request=chosen)


def _serve(pipe, *args) -> None:
    try:
        stepper = Stepper(*args)
        pipe.send("ready")
        while (asked := pipe.recv()) is not None:
            what, *arguments = asked
            pipe.send(getattr(stepper, what)(*arguments))
    except EOFError:
        pass


class Child:
    def __init__(self, pipe, process):
        self._pipe, self._process = pipe, process

    def step_s(self, batch: int, steps: int) -> float:
        self._pipe.send(("step_s", batch, steps))
        return self.answer(MEASURE_TIMEOUT_S)

    def prompt_s(self, tokens: int) -> float:
        self._pipe.send(("prompt_s", tokens))
        return self.answer(MEASURE_TIMEOUT_S)

    def answer(self, timeout_s: float):
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"the engine process {self._process.pid} does not answer within {timeout_s} s")
        return self._pipe.recv()


@contextmanager
def children(model: Path, adapters: dict[str, Path], cores: str, context: int, batch: int):
    """System -> Child, all started."""
    spawn = get_context("spawn")
    os.environ |= engine_environment()
    with ExitStack() as until_the_end:
        started = {}
        for name, (with_adapters, two_streams) in SYSTEMS.items():
            ours, theirs = spawn.Pipe()
            folders = {key: str(path) for key, path in adapters.items()} if with_adapters else {}
            process = spawn.Process(target=_serve, args=(theirs, str(model), folders, two_streams, cores, context, batch))
            process.start()
            theirs.close()
            until_the_end.callback(_end, ours, process)
            started[name] = Child(ours, process)
            started[name].answer(START_TIMEOUT_S)
        yield started


def _end(pipe, process) -> None:
    pipe.close()
    process.join(STOP_TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
