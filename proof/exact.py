"""Stage: in float32, every log-probability is what plain transformers says, whatever happens to a turn."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from prefillshare import reference
from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare_vllm.plugin import TORCH_ADAPTERS
from prefillshare.proof.asked import Asked, Machine
from prefillshare.proof.engines import Pair, Turn, started
from prefillshare.proof.found import Part, Progress, Status, Tell
from prefillshare.proof.oracle import Oracle
from prefillshare.proof.prompts import ids
from prefillshare.proof.subject import BLOCK, Subject

BOUND = 1e-3
#: Adapter -> how many of a prompt's last tokens it computes itself, in modes where it may: more than a block.
OWN_TOKENS = {"b": 40}
#: One longest sequence fits into a decode engine's cache, several long ones do not.
MAX_TOKENS, KV_BLOCKS = 10 * BLOCK, 16
_WHERE = {False: "handed over", True: "made in place"}

Case = Callable[[], Awaitable[list[Turn]]]


async def run(asked: Asked, tell: Tell, mode: str) -> None:
    """Prompts on and beside block boundaries, a context that goes from decoder to decoder, several decoders in one batch,
    preemption; each handed over, and made in place if the mode can. `mode`: a sharing mode's name."""
    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # else float32 products are TF32 on GPUs
    os.environ[TORCH_ADAPTERS] = "1"  # vLLM's kernels for adapters take no float32 on GPUs
    subject = Subject.of(asked, get_mode(mode))
    eager = {"engine_args": {"enforce_eager": True}} if Machine.here().is_gpu else {}
    sizes = {"max_tokens": MAX_TOKENS, "engines": 2, "max_num_seqs": 16, "max_num_batched_tokens": 2 * BLOCK, **eager}
    tell(Progress(0, 1, "starting a prefill and a decode engine"))
    async with started(
        subject.settings("prefill", "float32", kv_tokens=8 * KV_BLOCKS * BLOCK, **sizes),
        subject.settings("decode", "float32", kv_tokens=KV_BLOCKS * BLOCK, **sizes),
    ) as (prefill, decode):
        turns: list[Turn] = []
        ways = [Pair(prefill, decode)] + ([Pair(None, decode)] if subject.mode.base_in_place else [])
        cases = [(way, name, case) for way in ways for name, case in _cases(way, subject, asked.short).items()]
        for number, (way, name, case) in enumerate(cases):
            tell(Progress(number, len(cases), f"{name}, {_WHERE[way.prefill is None]}"))
            turns += await case()
        preempted = decode.stats().preemptions
    off, to_own_kv, oracle = [], [], Oracle(subject)  # now that the engines' memory is free
    for number, (taken, adapter) in enumerate(turns):
        tell(Progress(number, len(turns), "comparing"))
        off.append(reference.max_abs_diff(taken.logprobs, oracle.says(taken, adapter)))
        if adapter:
            to_own_kv.append(reference.max_abs_diff(taken.logprobs, oracle.says(taken, adapter, alone=True)))
    tokens, resumes = sum(len(taken.tokens) for taken, _ in turns), sum(len(taken.resumed) for taken, _ in turns)
    more = {"turns": len(turns), "tokens": tokens, "resumes": resumes}
    tell(verdict(mode, reference.largest(off), preempted, reference.largest(to_own_kv), **more))


def verdict(mode: str, worst: float, preemptions: int, to_own_kv: float, *, turns: int, tokens: int, resumes: int) -> Part:
    """`worst`: largest difference from plain transformers; `to_own_kv`: from what the decoders would have said over KV of their
    own. If that is no larger than the bound, the comparison could not have failed."""
    found = f"{tokens} tokens of {turns} turns within {worst:.1e} of plain transformers; {preemptions} preemptions"
    wrong = [
        text
        for text, is_so in (
            (f"the bound is {BOUND:g}", not worst <= BOUND),
            ("nothing was preempted", not preemptions),
            ("the decoders' own KV would have given the same, so this shows nothing", not to_own_kv > BOUND),
        )
        if is_so
    ]
    figures = {
        "max_abs_diff": worst, "bound": BOUND, "max_abs_diff_to_own_kv": to_own_kv, "preemptions": preemptions,
        "resumes": resumes, "turns": turns, "tokens": tokens,
    }  # fmt: skip
    return Part(f"exact {mode}", Status.FAILED if wrong else Status.PASSED, "; ".join([found, *wrong]), figures)


def _cases(pair: Pair, subject: Subject, short: bool) -> dict[str, Case]:
    salt = 1000 * (pair.prefill is None)

    async def take(prompt: list[int], n: int, adapter: str | None) -> Turn:
        own_tokens = OWN_TOKENS.get(adapter, 1) if subject.mode.own_end else 1
        group = subject.group if len(prompt) > 1 else None
        return await pair.take(prompt, n, adapter, group=group, own_tokens=own_tokens), adapter

    async def lengths():
        around = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1, 150)
        return [await take(ids(n, salt + n), 6, ("a", "b", None)[n % 3]) for n in (around[2:5] if short else around)]

    async def switches():
        context, turns = ids(40, salt + 7), []
        for adapter in ("a", "b", None, "a")[: 3 if short else 4]:
            turns.append(await take(context, 20, adapter))
            context = [*context, *turns[-1][0].tokens, 11]
        return turns

    async def batch():
        prompts = [ids(70, salt + 9) if n % 2 else ids(50 + 9 * n, salt + 10 + n) for n in range(6)]
        return list(await asyncio.gather(*(take(p, 24, ("a", "b", None)[n % 3]) for n, p in enumerate(prompts))))

    async def preemption():
        return list(await asyncio.gather(*(take(ids(100, salt + 20 + n), 110, "ab"[n % 2]) for n in range(6))))

    return {
        "prompts of all lengths": lengths,
        "a context from decoder to decoder": switches,
        "several decoders in one batch": batch,
        "preemption": preemption,
    }
