"""What prefill, decode steps and KV transfers cost in a running system, measured turn by turn, for the simulation.

Prefill: single turns of one agent with short and long contexts, new and continued. The time is the router's for the prefill
leg, so that its own overhead is in the fixed cost. Decode steps: the median time between tokens with several turns at once. KV:
bytes over the time for which the decode side waited for them, in the half of the turns that load most.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.agents import driver, fit
from benchmarks.agents.simulation import Costs
from benchmarks.agents.systems import Running
from benchmarks.agents.workload import Session, Turn
from benchmarks.shared.small import VOCABULARY
from prefillshare.client import Client
from prefillshare.kvshare.contract import KVShape

#: Tokens of contexts that are prefilled whole, and of the input that is then added to them.
CONTEXTS, GIVEN = (64, 256, 512, 1024), (32, 256)
#: Bytes a second if the system does not report what it moves (mode none): transfers then cost practically nothing.
UNKNOWN_LINK = 1e12
#: Turns at once, and their contexts and generated tokens, to measure decode steps.
AT_ONCE, STEP_CONTEXTS, STEP_TOKENS = (1, 4, 8), (64, 512), 16


@dataclass(frozen=True)
class Measured:
    """`errors`: the median relative error of each fit."""

    costs: Costs
    errors: dict[str, float]


def measured(system: Running, names: list[str], shape: KVShape, own_layers: float, advance: Callable[[], None]) -> Measured:
    """Costs of one of our systems that nobody else uses. `own_layers`: share of the layers that decoders compute themselves."""
    prefills, loads = _prefills(system.client, names[0], advance)
    prefill, step = fit.prefill(prefills), fit.step(_steps(system, len(names), advance))
    kv_bytes = shape.bytes_per_token("float32")
    largest = sorted(loads)[len(loads) // 2 :]
    link = statistics.median(size / seconds for size, seconds in largest) if largest else UNKNOWN_LINK
    costs = Costs(
        **prefill.costs, **step.costs, kv_bytes=kv_bytes, own_layers=own_layers, link_bytes_per_s=link,
    )  # fmt: skip
    return Measured(costs, {"prefill": round(prefill.error, 4), "step": round(step.error, 4)})


def _prefills(client: Client, name: str, advance) -> tuple[list[fit.PrefillTime], list[tuple[int, float]]]:
    """(prefill times, loads): per turn that loaded KV, its bytes and the seconds that it took."""
    rng = random.Random("prefills")
    found, loads = [], []
    for context in CONTEXTS:
        for given in GIVEN:
            session = client.create_session(token_ids=[rng.randrange(VOCABULARY) for _ in range(context)])
            for count in (1, given):
                tokens = [rng.randrange(VOCABULARY) for _ in range(count)]
                usage = session.turn(name, token_ids=tokens, max_tokens=1, ignore_eos=True).usage
                found.append(fit.PrefillTime(usage.computed_tokens, usage.prompt_tokens - usage.own_tokens, usage.prefill_s))
                if usage.kv_bytes_transferred and (seconds := max(usage.kv_load_s, usage.kv_rest_load_s)):
                    loads.append((usage.kv_bytes_transferred, seconds))
            session.delete()
            advance()
    return found, loads


def _steps(system: Running, agents: int, advance) -> list[fit.StepTime]:
    found = []
    for context in STEP_CONTEXTS:
        for count in AT_ONCE:
            played = [Session(number, context, (Turn(number % agents, 1, STEP_TOKENS),)) for number in range(count)]
            # Played twice: the second time all contexts are cached, so that all turns decode at once.
            for _ in range(2):
                records = driver.closed(played, system.converse, count, seed=f"steps {context} {count}")
            gaps = [gap for record in records for gap in record.inter_token_s[2:-2]]
            found.append(fit.StepTime(count, count * (context + STEP_TOKENS // 2), statistics.median(gaps)))
            advance()
    return found


MEASUREMENTS = len(CONTEXTS) * len(GIVEN) + len(AT_ONCE) * len(STEP_CONTEXTS)
