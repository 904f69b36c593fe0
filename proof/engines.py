"""Engines without Ray and without a router: turns taken as the router takes them, and one stock vLLM engine to compare with.

Seam: vllm/v1/engine/async_llm.py
"""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.errors import PrefixLost, ResumeReason
from prefillshare.kvshare.handoff import PrefillResult, TokenChunk
from prefillshare.kvshare.layer_group import LayerGroup

#: Of one turn. More are no accident: the KV cannot be read.
MOST_RESUMES = 20


def sampling(n: int, **fields):
    """For exactly n tokens, the likeliest ones, with their log-probabilities; unless `fields` say otherwise."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=n, ignore_eos=True, logprobs=0, **({"temperature": 0.0} | fields))


def new_id() -> str:
    return uuid.uuid4().hex


@dataclass
class Taken:
    """A turn. `own_tokens`: how many of the prompt's last tokens the decoder computed itself. `token_s`: when each token came,
    on the clock of `began_s`. `prefills`: what was prefilled for it, once per attempt. `resumed`: why it was taken up again."""

    prompt: list[int]
    own_tokens: int = 1
    began_s: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    prefills: list[PrefillResult] = field(default_factory=list)
    resumed: list[ResumeReason] = field(default_factory=list)
    last: TokenChunk | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.began_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


#: What was taken, and by which adapter; None: by the base.
Turn = tuple[Taken, str | None]


def pace(turns: Iterable[Taken]) -> dict[str, float]:
    """Medians, in seconds."""
    turns = list(turns)
    return {
        "ttft_s": statistics.median(turn.ttft_s for turn in turns),
        "inter_token_s": statistics.median(gap for turn in turns for gap in turn.gaps_s),
    }


def in_words(pace: Mapping[str, float]) -> str:
    return f"first token after {1e3 * pace['ttft_s']:.0f} ms, then one every {1e3 * pace['inter_token_s']:.1f} ms"


class Pair:
    """A decode engine with the prefill engine that makes its base KV; None: it makes it itself."""

    def __init__(self, prefill, decode):
        self.prefill, self.decode = prefill, decode

    async def hand_over(
        self, prompt: list[int], generated: list[int] = [], own_tokens: int = 1  # noqa: B006
    ) -> PrefillResult | None:
        """Prefill the part of a prompt, and of the tokens generated after it, that the mode hands over."""
        shared = (prompt + generated)[: self.decode.mode.handoff_tokens(len(prompt), len(generated), own_tokens)]
        return await self.prefill.prefill(shared, new_id()) if self.prefill and shared else None

    async def take(
        self,
        prompt: list[int],
        n: int,
        adapter: str | None,
        *,
        group: LayerGroup | None = None,
        lend: bool = False,
        own_tokens: int = 1,
        **fields,
    ) -> Taken:
        """Take a turn of n tokens, resumed if it loses its KV. `fields`: of the sampling parameters. Raises PrefixLost if that
        happens again and again."""
        taken = Taken(prompt, own_tokens)
        while True:
            made = await self.hand_over(prompt, taken.tokens, own_tokens)
            taken.prefills += [made] if made else []
            request = DecodeRequest(
                new_id(),
                prompt + taken.tokens,
                made.handoff if made else None,
                sampling(n, **fields),
                adapter=adapter,
                replay=len(taken.tokens),
                lend=lend,
                own_layers=group,
                own_tokens=own_tokens,
            )
            try:
                async for chunk in self.decode.decode(request):
                    taken.last = chunk
                    taken.tokens += chunk.token_ids
                    taken.logprobs += chunk.logprobs.values[:, 0].tolist()
                    taken.token_s += [time.perf_counter()] * len(chunk.token_ids)
                return taken
            except PrefixLost as lost:
                taken.resumed.append(lost.reason)
                if len(taken.resumed) > MOST_RESUMES:
                    raise


class Stock:
    """One vLLM engine as it comes, with a LoRA adapter per decoder and its own prefix cache. Made by `start`."""

    def __init__(self, llm, adapters: Mapping[str, str]):
        from vllm.lora.request import LoRARequest

        self._llm = llm
        self._adapters = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), 1)}

    @classmethod
    async def start(cls, settings: EngineSettings) -> Stock:
        """`settings`: of the decode engine that it stands beside; what concerns sharing is left out."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from prefillshare.kvshare_vllm.engine import launch, quick_start
        from prefillshare.kvshare_vllm.forkserver import spare

        os.environ.pop(launch.V2_RUNNER, None)
        if settings.cpu_cores:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = settings.cpu_cores
        config = AsyncEngineArgs(
            model=settings.model,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            block_size=settings.block_size,
            kv_cache_memory_bytes=settings.kv_cache_bytes,
            max_num_seqs=settings.max_num_seqs,
            enable_lora=True,
            max_loras=settings.max_loras,
            max_lora_rank=settings.max_lora_rank,
            generation_config="vllm",
            disable_log_stats=True,
            **settings.engine_args,
        ).create_engine_config()
        with launch.one_process(config, settings), quick_start.of_spawned(), spare.become_what_is_spawned():
            return cls(AsyncLLM.from_vllm_config(config), settings.adapters)

    async def take(self, prompt: list[int], n: int, adapter: str | None) -> Taken:
        taken = Taken(prompt)
        chosen = self._adapters[adapter] if adapter else None
        outputs = self._llm.generate({"prompt_token_ids": prompt}, sampling(n), new_id(), lora_request=chosen)
        async for output in outputs:
            tokens = output.outputs[0].token_ids[len(taken.tokens) :]
            taken.tokens += tokens
            taken.token_s += [time.perf_counter()] * len(tokens)
        return taken

    def close(self) -> None:
        self._llm.shutdown()


@asynccontextmanager
async def started(*settings: EngineSettings) -> AsyncIterator[list]:
    """Start engines, one after the other, and end them."""
    from prefillshare.kvshare_vllm.engine.decode_engine import DecodeEngine
    from prefillshare.kvshare_vllm.engine.prefill_engine import PrefillEngine

    engines: list = []
    try:
        for one in settings:
            engines.append(await (PrefillEngine if one.role == "prefill" else DecodeEngine).start(one))
        yield engines
    finally:
        for engine in reversed(engines):
            engine.close()
