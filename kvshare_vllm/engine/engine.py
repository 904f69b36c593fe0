"""AsyncLLM as an engine of the system: what prefill engines (prefill_engine.py) and decode engines (decode_engine.py) have in
common.

Seam: vllm/v1/engine/async_llm.py
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerFactory

from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.errors import (
    EngineStartError,
    Internal,
    PrefillShareError,
    PrefixLost,
    ResumeReason,
    Unavailable,
)
from prefillshare.kvshare.handoff import Handoff, PrefillResult
from prefillshare.kvshare.keep import Keep
from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare.replica_info import KVEvents, ReplicaStats
from prefillshare.kvshare_vllm.engine import array_logprobs, quick_start, retention
from prefillshare.kvshare_vllm.engine.adapters import Adapters
from prefillshare.kvshare_vllm.engine.gauges import Gauges
from prefillshare.kvshare_vllm.engine.launch import engine_args, kv_events_on, one_process, reserved_ports, set_environment
from prefillshare.kvshare_vllm.engine.log_tail import LogTail
from prefillshare.kvshare_vllm.forkserver import spare
from prefillshare.kvshare_vllm.patches import gentle_grammars, vllm_logging
from prefillshare.kvshare_vllm.transfer import params
from prefillshare.kvshare_vllm.vllm_refusals import as_our_errors

logger = logging.getLogger(__name__)

#: Seconds within which an engine must generate its first token to count as started.
FIRST_TOKEN_S = 300.0


class Engine:
    """One vLLM engine. Made by `start`; `close` ends its processes. Not thread-safe: one event loop."""

    _probe_logprobs: int | None = None
    _probe_tokens = (0,)

    def __init__(self, settings: EngineSettings, llm: AsyncLLM, gauges: Gauges, log: LogTail, kv_events: KVEvents):
        self.settings, self.kv_events = settings, kv_events
        self.mode = get_mode(settings.mode)
        self._llm, self._gauges, self._log, self._has_died = llm, gauges, log, False
        self._adapters = Adapters(llm)
        self._active, self._busy_since = 0, 0.0

    @classmethod
    async def start(cls, settings: EngineSettings, host: str = "127.0.0.1", stat_loggers: Sequence[StatLoggerFactory] = ()):
        """Start an engine whose KV side channel listens on `host`. Raises EngineStartError with the log's end."""
        gauges: list[Gauges] = []

        def make_gauges(vllm_config, engine_index=0):
            gauges.append(Gauges(vllm_config, engine_index))
            return gauges[-1]

        log = LogTail()
        llm = None
        try:
            with log, reserved_ports(host, settings.side_channel_port) as ports:
                set_environment(settings, host, ports)
                gentle_grammars.trust_the_router()
                kv_events = kv_events_on(host, ports)
                config = AsyncEngineArgs(**engine_args(settings, kv_events)).create_engine_config()
                with one_process(config, settings), quick_start.of_spawned(), spare.become_what_is_spawned():
                    llm = AsyncLLM.from_vllm_config(config, stat_loggers=[make_gauges, *stat_loggers])
            array_logprobs.keep(llm.output_processor)
            engine = cls(settings, llm, gauges[0], log, kv_events)
            await engine.set_adapters(settings.adapters)
            if problems := engine.adapter_problems:
                raise ValueError("; ".join(f"adapter {name}: {problem}" for name, problem in problems.items()))
            async with asyncio.timeout(FIRST_TOKEN_S):  # what vLLM compiles at first use is compiled before it is ready
                await engine.probe()
                await engine.check_rows()
            return engine
        except Exception as error:
            if llm is not None:
                llm.shutdown()
            log.close()
            raise EngineStartError(
                f"the {settings.role} engine of pool {settings.pool!r} ({settings.model}) did not start: "
                f"{type(error).__name__}: {error}",
                log_tail=log.text(),
            ) from error

    @property
    def adapters(self) -> Collection[str]:
        return self._adapters.loaded.keys()

    @property
    def adapter_problems(self) -> Mapping[str, str]:
        """The adapters that could not be loaded: name -> reason."""
        return self._adapters.problems

    async def set_adapters(self, adapters: Mapping[str, str]) -> None:
        """Serve these adapters: name -> folder. Those that cannot be loaded are in `adapter_problems`. Raises Unavailable."""
        try:
            await self._adapters.serve(adapters)
        except EngineDeadError as error:
            raise self._dead() from error

    async def set_log_level(self, level: str) -> None:
        """Set the log level of this process and of the engine's own processes."""
        vllm_logging.set_level(level)
        await self._llm.collective_rpc("set_log_level", args=(level,))

    def close(self) -> None:
        self._llm.shutdown()
        self._log.close()

    async def check_health(self) -> None:
        """Raises Unavailable if the engine's processes have died."""
        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise self._dead() from error

    @property
    def blocks_total(self) -> int:
        """Blocks that requests can hold, without vLLM's null block."""
        return (self._llm.vllm_config.cache_config.num_gpu_blocks or 1) - 1

    def stats(self) -> ReplicaStats:
        gauges = self._gauges
        return ReplicaStats(
            active=self._active,
            running=gauges.running,
            waiting=gauges.waiting,
            blocks_used=round(gauges.kv_usage * self.blocks_total),
            blocks_total=self.blocks_total,
            preemptions=gauges.preemptions,
            stalled_s=time.monotonic() - max(gauges.stepped_at, self._busy_since) if self._active else 0.0,
        )

    async def nothing_held(self) -> None:
        """Wait until no request and no lease holds a block, at most for the length of a lease."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.lease_s):
                await self._gauges.nothing_held.wait()

    async def check_rows(self) -> None:
        """To be called after the first `probe`. Raises RuntimeError if the KV that it made would not be base KV (R1)."""

    async def probe(self) -> None:
        """Generate one token from a short prompt, as proof that the engine steps. Raises Unavailable."""
        logprobs = self._probe_logprobs if self._llm.model_config.max_logprobs else None
        sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=logprobs, detokenize=False)
        async for _ in self._generate(self._probe_tokens, sampling, f"probe-{uuid.uuid4().hex}", None, None):
            pass

    def _adapter(self, name: str | None) -> LoRARequest | None:
        if name is None:
            return None
        if name not in self.adapters:
            raise Internal(f"pool {self.settings.pool!r} holds no adapter {name!r}; it holds {sorted(self.adapters)}")
        return self._adapters.loaded[name]

    async def _generate(self, token_ids, sampling, request_id, adapter, cache_salt, priority=0, trace=None, hints=None):
        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        if cache_salt:
            prompt["cache_salt"] = cache_salt
        if not self._active:
            self._busy_since = time.monotonic()
        self._active += 1
        try:
            with as_our_errors():
                outputs = self._llm.generate(
                    prompt,
                    sampling,
                    request_id,
                    lora_request=self._adapter(adapter),
                    priority=priority,
                    trace_headers=trace,
                    kv_hints=hints,
                )
                async with aclosing(outputs):
                    async for output in outputs:
                        yield output
        except EngineDeadError as error:
            raise self._dead() from error
        finally:
            self._active -= 1

    async def prefill(
        self,
        token_ids: list[int],
        request_id: str,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        trace: Mapping[str, str] | None = None,
    ) -> PrefillResult:
        """Compute KV of all of `token_ids` and hold it for a decode engine until the lease ends. `trace`: W3C headers."""
        ask = params.to_hold()
        output, seconds = await self._prefill(token_ids, request_id, adapter, cache_salt, priority, ask, trace)
        if not output.kv_transfer_params:
            raise Internal(f"the prefill engine of pool {self.settings.pool!r} handed over nothing for {request_id}")
        handoff = self._handoff(output.kv_transfer_params, len(token_ids))
        return PrefillResult(handoff, len(token_ids), output.num_cached_tokens or 0, seconds)

    async def warm(
        self,
        token_ids: list[int],
        request_id: str,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        keep: Sequence[Keep] = (),
    ) -> PrefillResult:
        """Compute base KV of `token_ids` for the prefix cache, which keeps `keep` of it; nothing is handed over."""
        hints = retention.hints(keep)
        output, seconds = await self._prefill(token_ids, request_id, None, cache_salt, priority, None, hints=hints)
        return PrefillResult(None, len(token_ids), output.num_cached_tokens or 0, seconds)

    async def let_go(self, names: Sequence[str]) -> None:
        """What the prefix cache keeps under these names is kept no longer."""
        name = f"let-go-{uuid.uuid4().hex}"
        await self._prefill(self._probe_tokens, name, None, None, 0, None, hints=retention.hints(let_go=names))

    async def _prefill(
        self, token_ids, request_id: str, adapter, cache_salt, priority: int, ask: dict | None, trace=None, hints=None
    ):
        """(the engine's last output, seconds)"""
        extra = {"kv_transfer_params": ask} if ask else None
        sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False, extra_args=extra)
        started = time.perf_counter()
        output = None
        async for latest in self._generate(token_ids, sampling, request_id, adapter, cache_salt, priority, trace, hints):
            output = latest
        ended = output.outputs[0].finish_reason if output is not None else None
        if ended == "error" and params.Asked(ask).load_is_due:
            raise PrefixLost(f"the KV lent for {request_id} could not be read", reason=ResumeReason.KV_LOAD_FAILED)
        if ended not in ("length", "stop"):
            raise Unavailable(f"prefill of request {request_id} ended early")
        return output, time.perf_counter() - started

    def _handoff(self, transfer: dict[str, Any], tokens: int) -> Handoff:
        return Handoff(tokens, self.settings.contract, self.settings.lease_s, dict(transfer))

    async def release(self, handoff: Handoff, request_id: str) -> None:
        """Tell the engine that made this handoff that nobody will read it, so that it frees the blocks now."""
        await self._llm.notify_kv_transfer_request_rejected(request_id, params.to_be_released(handoff.transfer))

    async def _release_unseen(self, handoff: Handoff | None, request_id: str, error: PrefillShareError) -> None:
        """Release the handoff of a call that ended with `error` before its first output: if the request was refused before the
        engine saw it, nobody would read the handoff. An engine that saw the request frees the handoff itself, and one that
        is Unavailable cannot notify anybody."""
        if handoff is not None and not isinstance(error, Unavailable):
            await self.release(handoff, request_id)

    def _dead(self) -> Unavailable:
        """Its log's end is for the replica's log only, once: clients are told of the error."""
        engine = f"the {self.settings.role} engine of pool {self.settings.pool!r}"
        if not self._has_died:
            logger.error("%s has died:\n%s", engine, self._log.text())
        self._has_died = True
        return Unavailable(f"{engine} has died")
