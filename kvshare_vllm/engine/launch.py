"""What an engine process is started with: arguments, environment, process layout.

Seam: vllm/engine/arg_utils.py; vllm/platforms/cpu.py (backend) and vllm/utils/ompmultiprocessing.py (thread binding)
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from vllm.config import StructuredOutputsConfig
from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager

from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.loopback import ADDRESS, INTERFACE, is_loopback
from prefillshare.kvshare.replica_info import KVEvents
from prefillshare.kvshare_vllm.grammars.grammars import BACKEND
from prefillshare.kvshare_vllm.models import families
from prefillshare.kvshare_vllm.patches import vllm_logging
from prefillshare.kvshare_vllm.transfer.transports import TRANSPORTS

#: vLLM chooses its V2 model runner on GPUs and its V1 runner on CPUs. All engines run the V1 runner: what is added to it for
#: shared KV (engine/worker.py, models/) is then the same code everywhere, and CPUs test what GPUs run.
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def engine_args(s: EngineSettings, events: KVEvents) -> dict[str, Any]:
    args: dict[str, Any] = {"scheduling_policy": "priority"}
    if s.role == "decode":
        args |= {
            "scheduler_cls": "prefillshare.kvshare_vllm.engine.scheduler.SharedKVScheduler",
            "worker_cls": "prefillshare.kvshare_vllm.engine.worker.SharedKVWorker",
        }
    else:
        args |= {"scheduler_cls": "prefillshare.kvshare_vllm.engine.retention.KeepingScheduler"}
    args |= families.of_engine(s).engine_args(s)
    if current_platform.is_cpu():
        args |= {"enforce_eager": True}
    if s.adapters:
        # While a deployment changes, the outgoing and the incoming adapters are kept side by side in the host's memory.
        args |= {"enable_lora": True, "max_loras": s.max_loras, "max_cpu_loras": 2 * s.max_loras}
        args |= {"max_lora_rank": s.max_lora_rank}
    if s.max_num_batched_tokens:
        args["max_num_batched_tokens"] = s.max_num_batched_tokens
    return (
        args
        | {
            "model": s.model,
            "served_model_name": s.pool,  # its name in vLLM's metrics
            "otlp_traces_endpoint": s.traces_endpoint,
            "logging_config": vllm_logging.config(s.log_level, s.log_format),
            "worker_extension_cls": "prefillshare.kvshare_vllm.engine.worker_calls.WorkerCalls",
            "dtype": s.dtype,
            "max_model_len": s.max_model_len,
            "block_size": s.block_size,
            "kv_cache_memory_bytes": s.kv_cache_bytes,
            "max_num_seqs": s.max_num_seqs,
            "tensor_parallel_size": s.tensor_parallel_size,
            "enable_prefix_caching": True,
            "kv_transfer_config": TRANSPORTS[s.kv_transport].kv_transfer_config(s),
            "kv_events_config": {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": events.endpoint,
                "replay_endpoint": events.replay_endpoint,
            },
            "disable_log_stats": False,
            "generation_config": "vllm",
            "structured_outputs_config": StructuredOutputsConfig(backend=BACKEND),
        }
        | dict(s.engine_args)
    )


@contextmanager
def one_process(config, s: EngineSettings) -> Iterator[None]:
    """Run scheduler and model of CPU engines without tensor parallelism in one process, threads bound as vLLM binds a worker's.

    vLLM would start two processes that wait for each other by spinning; on few cores this takes cores from the model.
    """
    if not current_platform.is_cpu() or s.tensor_parallel_size > 1:
        yield
        return
    config.parallel_config.distributed_executor_backend = "uni"
    with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
        yield


@dataclass(frozen=True)
class Ports:
    """Where an engine listens: for NIXL handshakes, KV events, replays of KV events."""

    handshakes: int
    events: int
    replays: int


@contextmanager
def reserved_ports(host: str, handshakes: int | None = None) -> Iterator[Ports]:
    """Reserve ports until the engine listens on them: it binds them only after it has loaded its model, and nobody may take
    them meanwhile. A socket that is bound but does not listen keeps others out, but not ZMQ, which reuses addresses."""
    with ExitStack() as held:
        ports = []
        for wanted in (handshakes or 0, 0, 0):
            holder = held.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((host, wanted))
            ports.append(holder.getsockname()[1])
        yield Ports(*ports)


def kv_events_on(host: str, ports: Ports) -> KVEvents:
    return KVEvents(f"tcp://{host}:{ports.events}", f"tcp://{host}:{ports.replays}")


def set_environment(s: EngineSettings, host: str, ports: Ports) -> None:
    """Set what vLLM reads at import or engine start; the replica's process belongs to this one engine. Raises ConfigError if
    the environment asks for the other model runner."""
    if os.environ.get(V2_RUNNER, "0") != "0":
        raise ConfigError(
            f"{V2_RUNNER} is {os.environ[V2_RUNNER]!r}: engines run vLLM's V1 model runner",
            fix="unset it where engines are started",
        )
    env = {
        V2_RUNNER: "0",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(ports.handshakes),
        # Block keys must agree between processes that exchange KV events.
        "PYTHONHASHSEED": "0",
    }
    if s.cpu_cores is not None and current_platform.is_cpu():
        env["VLLM_CPU_OMP_THREADS_BIND"] = s.cpu_cores
    if s.traces_endpoint:
        env |= {
            "OTEL_SERVICE_NAME": f"prefillshare-{s.pool}",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": s.traces_protocol,
            "OTEL_TRACES_SAMPLER": "parentbased_always_off",  # the router decides which turns are traced
        }
    for name, value in _own_network(host).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override this engine's own size
    os.environ.update(env)


def _own_network(host: str) -> dict[str, str]:
    """Environment that tells the libraries below vLLM where to listen, unless the operator sets it. An engine's processes are
    on one machine, so their traffic stays there; KV leaves the machine only if `host` can be reached from elsewhere."""
    env = {"VLLM_HOST_IP": ADDRESS, "GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}
    if is_loopback(host):
        env["UCX_NET_DEVICES"] = INTERFACE
    return env
