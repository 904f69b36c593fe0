"""Stage: as deployments would serve it. How far answers in the served dtype are from plain transformers, how fast KV moves from
process to process, and what turns cost beside one stock vLLM engine with the same adapters."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.modes import get_mode
from prefillshare.proof.asked import Asked, Machine
from prefillshare.proof.engines import Pair, Stock, Taken, Turn, in_words, pace, started
from prefillshare.proof.found import Part, Progress, Status, Tell
from prefillshare.proof.oracle import Oracle
from prefillshare.proof.prompts import ids
from prefillshare.proof.subject import ADAPTERS, BLOCK, Subject, in_place

#: Answers may be this many times as far from float32 as those of plain transformers in the same dtype. In float32 that would be
#: zero, and another bound holds.
TIMES, BOUND_FLOAT32 = 3.0, 1e-3
STOCK = "stock vLLM"
#: Seconds that ending the engines, and comparing, may take.
END_S = 45.0

Take = Callable[[list[int], int, str | None], Awaitable[Taken]]


@dataclass(frozen=True)
class Load:
    """Sessions that are played at once: `context` tokens, then turns of `given` new tokens and `answer` generated ones, each by
    the next decoder. `moved`: tokens of KV that are moved at once to measure how fast."""

    sessions: int
    context: int
    turns: int
    given: int
    answer: int
    repeats: int
    moved: int

    @property
    def longest(self) -> int:
        return max(self.context + self.turns * (self.given + self.answer), self.moved) + 1

    @property
    def held(self) -> int:
        """Tokens of KV that the sessions hold at most."""
        return self.sessions * self.longest


SHORT = Load(sessions=2, context=100, turns=2, given=20, answer=8, repeats=1, moved=150)
ON_CPUS = Load(sessions=2, context=256, turns=4, given=32, answer=16, repeats=2, moved=1000)
ON_GPUS = Load(sessions=16, context=2500, turns=6, given=200, answer=40, repeats=3, moved=4000)


async def run(asked: Asked, tell: Tell) -> None:
    machine = Machine.here()
    load = SHORT if asked.short else ON_GPUS if machine.is_gpu else ON_CPUS
    chosen = in_place()
    subjects = {mode.name: Subject.of(asked, mode) for mode in chosen}
    names, engines, first = list(subjects), len(subjects) + 2, next(iter(subjects.values()))
    kv_tokens = _kv_tokens(load, first, asked.dtype, machine, engines)
    sizes = {"max_tokens": load.longest, "engines": engines, "kv_tokens": kv_tokens, "max_num_seqs": max(8, load.sessions)}
    settings = [one.settings("decode", asked.dtype, **sizes) for one in subjects.values()]
    settings.insert(0, first.settings("prefill", asked.dtype, **sizes))
    tell(Progress(0, 1, f"starting {len(settings)} engines, and one of stock vLLM"))
    async with started(*settings) as (prefill, *decodes):
        pairs = {name: Pair(prefill, decode) for name, decode in zip(names, decodes, strict=True)}
        answers = {}
        for name, pair in pairs.items():
            tell(Progress(0, 1, f"{name}: answers in {asked.dtype}"))
            answers[name] = await _answers(pair, subjects[name])
        tell(Progress(0, 1, "moving KV between processes"))
        tell(await _moved(next(iter(pairs.values())), load, first.kv_bytes(asked.dtype)))
        stock = await Stock.start(settings[1])
        try:
            systems = {STOCK: stock.take}
            systems |= {f"{name}, prefill and decode apart": pair.take for name, pair in pairs.items()}
            systems |= {f"{name}, one engine": Pair(None, pair.decode).take for name, pair in pairs.items()}
            for part in await _speed(systems, load, asked.until - END_S, tell):
                tell(replace(part, figures={**part.figures, "kv_tokens_per_engine": kv_tokens}))
        finally:
            stock.close()
    for name, turns in answers.items():  # now that the engines' memory is free
        tell(Progress(0, 1, f"{name}: comparing"))
        tell(compared(f"{asked.dtype} {name}", turns, subjects[name], asked.dtype))


async def run_apart(asked: Asked, tell: Tell, mode: str) -> None:
    """Answers alone, in a mode whose engines cannot do without a prefill pool."""
    subject = Subject.of(asked, get_mode(mode))
    sizes = {"max_tokens": 8 * BLOCK, "kv_tokens": 64 * BLOCK, "engines": 2, "max_num_seqs": 8}
    tell(Progress(0, 1, "starting a prefill and a decode engine"))
    async with started(*(subject.settings(role, asked.dtype, **sizes) for role in ("prefill", "decode"))) as engines:
        tell(Progress(0, 1, f"answers in {asked.dtype}"))
        turns = await _answers(Pair(*engines), subject)
    tell(Progress(0, 1, "comparing"))
    tell(compared(f"{asked.dtype} {mode}", turns, subject, asked.dtype))


def _kv_tokens(load: Load, subject: Subject, dtype: str, machine: Machine, engines: int) -> int:
    """Tokens for which each engine has room: twice those of all sessions, or as many as fit. Raises ConfigError."""
    free = 0.8 * machine.memory_bytes - engines * subject.weight_bytes(dtype)
    fit = int(free / engines / subject.kv_bytes(dtype)) if machine.is_gpu else 2 * load.held
    if fit < 2 * load.longest:
        gib = f"{machine.memory_bytes / 2**30:.0f} GiB"
        raise ConfigError(f"{engines} engines with this base do not fit into {gib}", field="--base", fix="give a smaller one")
    return min(2 * load.held, fit)


async def _answers(pair: Pair, subject: Subject) -> list[Turn]:
    """A context that goes from decoder to decoder, then prompts of other lengths at once."""

    async def take(prompt: list[int], adapter: str) -> Turn:
        return await pair.take(prompt, 16, adapter, group=subject.group), adapter

    turns, context = [], ids(90, 3)
    for adapter in ADAPTERS[:3]:
        turns.append(await take(context, adapter))
        context = [*context, *turns[-1][0].tokens, 11]
    turns += await asyncio.gather(*(take(ids(60 + 7 * n, 40 + n), adapter) for n, adapter in enumerate(ADAPTERS)))
    return turns


def compared(name: str, turns: Sequence[Turn], subject: Subject, dtype: str) -> Part:
    """Compare answers that were served in `dtype` with float32. What plain transformers loses by the dtype is the measure."""
    exact = Oracle(subject)
    right = _says(exact, turns)
    alone = _says(exact, turns, alone=True)
    where = exact.device
    del exact
    lossy = right if dtype == "float32" else _says(Oracle(subject, dtype), turns)
    served = [taken.logprobs for taken, _ in turns]
    part = verdict(name, dtype, _mean_diff(served, right), _mean_diff(lossy, right), _mean_diff(alone, right))
    return replace(part, figures={**part.figures, "transformers_on": where})


def _says(oracle: Oracle, turns: Sequence[Turn], *, alone: bool = False) -> list[list[float]]:
    return [oracle.says(*turn, alone=alone) for turn in turns]


def verdict(name: str, dtype: str, off: float, plain: float, to_own_kv: float) -> Part:
    """All are mean differences from float32: of the answers, of plain transformers in `dtype`, and of what the decoders would
    have said over KV of their own. If that is within the bound, the comparison could not have failed."""
    bound = TIMES * plain or BOUND_FLOAT32
    found = f"log-probabilities are {off:.1e} from float32 on average"
    if plain:
        found += f", those of plain transformers in {dtype} {plain:.1e}"
    if not off <= bound:
        found += f"; the bound is {bound:.1e}"
    if not to_own_kv > bound:
        found += "; the decoders' own KV would be as near, so this shows nothing"
    figures = {"mean_abs_diff": off, "of_transformers": plain, "bound": bound, "of_own_kv": to_own_kv}
    return Part(name, Status.PASSED if off <= bound < to_own_kv else Status.FAILED, found, figures)


def _mean_diff(some: list[list[float]], others: list[list[float]]) -> float:
    pairs = [(a, b) for one, other in zip(some, others, strict=True) for a, b in zip(one, other, strict=True)]
    return statistics.fmean(abs(a - b) for a, b in pairs)


async def _moved(pair: Pair, load: Load, token_bytes: int, times: int = 5) -> Part:
    rates, seconds, nbytes = [], [], 0
    for n in range(times):
        last = (await pair.take(ids(load.moved, 500 + n), 1, None)).last
        nbytes = last.kv_bytes
        seconds.append(last.load_s)
        rates.append(nbytes / max(last.load_s, 1e-9))
    figures = {
        "bytes": nbytes, "tokens": load.moved, "seconds": statistics.median(seconds), "bytes_per_s": statistics.median(rates)
    }  # fmt: skip
    if nbytes < token_bytes * (load.moved - 1):
        return Part("transfer", Status.FAILED, f"only {nbytes} bytes were read for {load.moved} tokens", figures)
    found = f"{nbytes / 2**20:.1f} MiB of KV in {1e3 * figures['seconds']:.1f} ms: {figures['bytes_per_s'] / 1e9:.2f} GB/s"
    return Part("transfer", Status.MEASURED, found, figures)


async def _speed(systems: Mapping[str, Take], load: Load, until: float, tell: Tell) -> list[Part]:
    """The systems play sessions of the same sizes in turn; each ratio is the median of the repeats'. `until`: no repeat begins
    that would end later."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    order, total = list(systems), (1 + load.repeats) * len(systems)
    for repeat in range(1 + load.repeats):  # the first warms up
        began = time.monotonic()
        if began > until:
            break
        for number, name in enumerate(order):
            tell(Progress(repeat * len(order) + number, total, f"{load.sessions} sessions at once: {name}"))
            # Other prompts for each system: two of them share an engine, and with it a cache.
            figures = await _play(systems[name], load, 10_000 + 1000 * repeat + 100 * list(systems).index(name))
            if repeat:
                rounds[name].append(figures)
        order = order[1:] + order[:1]
        if repeat and time.monotonic() + (time.monotonic() - began) > until:
            break
    if not all(rounds.values()):
        return [Part("speed", Status.UNFINISHED, "there was no time to play the sessions")]
    parts = []
    for name, own in rounds.items():
        figures = {key: statistics.median(one[key] for one in own) for key in own[0]}
        found = f"{figures['tokens_per_s']:.0f} tokens/s, {in_words(figures)}"
        if name != STOCK:
            pairs = list(zip(own, rounds[STOCK], strict=True))
            ratios = {key: statistics.median(a[key] / b[key] for a, b in pairs) for key in own[0]}
            figures["to_stock"] = ratios
            found = f"x{ratios['tokens_per_s']:.2f} stock vLLM's throughput: {found}"
        parts.append(Part(f"speed: {name}", Status.MEASURED, found, figures))
    return parts


async def _play(take: Take, load: Load, salt: int) -> dict[str, float]:
    async def session(number: int) -> list[Taken]:
        context, turns = ids(load.context, salt + number), []
        for turn in range(load.turns):
            context = context + ids(load.given, salt + 7 * turn + 1)
            turns.append(await take(context, load.answer, ADAPTERS[(number + turn) % len(ADAPTERS)]))
            context = context + turns[-1].tokens
        return turns

    began = time.perf_counter()
    turns = [turn for one in await asyncio.gather(*map(session, range(load.sessions))) for turn in one]
    took = time.perf_counter() - began
    return {"tokens_per_s": sum(len(turn.tokens) for turn in turns) / took, **pace(turns)}
