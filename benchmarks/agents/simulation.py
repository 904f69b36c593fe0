"""Simulates agent sessions on pools of replicas: what a deployment of any size would do, at measured costs.

Discrete events (simpy). The choice of replicas (router/pools/placement.py) and what a sharing mode keeps for whom
(kvshare/modes) are the product's own code. Everything else is a model:
 - A prefill replica computes one prompt at a time: a fixed time, a time per token, and one per token and context token.
 - A decode replica runs its requests side by side: a step takes a fixed time, one per request and one per token of their
   contexts.
 - Without prefill replicas, decode replicas compute prompts themselves, one at a time: each step has up to CHUNK tokens of one.
   Mode `none` is then stock vLLM with an adapter per model.
 - KV crosses a link at a constant rate, beside everything else.
 - A cache holds a number of tokens and evicts the contexts that were least recently asked for. No two contexts share a part.
Not modelled: chunked prefill in prefill replicas (a prompt that has begun is not interrupted, not even an eager one), failures,
preemption (a request waits until there is room for its whole context), queue limits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import simpy

from benchmarks.agents.driver import Cost, TurnRecord
from benchmarks.agents.workload import Session
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.modes import get_mode
from prefillshare.router.pools.placement import POLICIES, Call, Candidate, place, shortlist

#: Tokens of a prompt that a decode replica computes in one step, at most (vLLM's default for a server).
CHUNK = 2048


def attended(computed: int, prompt: int) -> float:
    """Pairs of tokens in attention: each of the last `computed` of a prompt attends to those before it, and to itself."""
    return computed * (prompt - (computed - 1) / 2)


@dataclass(frozen=True)
class Costs:
    """Costs of one replica of each kind, in seconds. `kv_bytes`: of a token in all layers. `second_stream`: time of a decode
    step with two streams relative to one (ICaRus). `own_layers`: share of layers that the decode side computes (DroidSpeak)."""

    prefill_s: float
    prefill_token_s: float
    prefill_token_context_s: float
    step_s: float
    step_request_s: float
    step_context_token_s: float
    kv_bytes: int
    link_bytes_per_s: float
    second_stream: float = 1.0
    own_layers: float = 0.0

    def prefill(self, computed: int, prompt: int) -> float:
        """Seconds for the last `computed` tokens of a prompt."""
        seen = attended(computed, prompt)
        return self.prefill_s + computed * self.prefill_token_s + seen * self.prefill_token_context_s

    def step(self, requests: int, context_tokens: float) -> float:
        return self.step_s + requests * self.step_request_s + context_tokens * self.step_context_token_s


@dataclass(frozen=True)
class Site:
    """Replicas, KV tokens for which each has room, and most requests that a decode replica runs. `prefill` 0: decode replicas
    compute prompts themselves."""

    prefill: int
    decode: int
    kv_tokens: int
    max_running: int = 64
    block: int = 32
    eager_prefill: bool = True
    policy: str = "prefix_aware"


class _Cache:
    """Contexts by key, the least recently asked for first. `reserved`: tokens of running requests, which are not evicted."""

    def __init__(self, tokens: int):
        self._room, self._held, self._used, self.reserved = tokens, OrderedDict(), 0, 0

    def held(self, key: Hashable) -> int:
        return self._held.get(key, 0)

    def touch(self, key: Hashable) -> None:
        if key in self._held:
            self._held.move_to_end(key)

    def put(self, key: Hashable, tokens: int) -> None:
        self._used += max(tokens, self.held(key)) - self.held(key)
        self._held[key] = max(tokens, self.held(key))
        self._held.move_to_end(key)
        self.evict()

    def evict(self) -> None:
        while self._used + self.reserved > self._room and self._held:
            self._used -= self._held.popitem(last=False)[1]


@dataclass(kw_only=True)
class _Replica:
    """What placement needs to know about a replica."""

    id: str
    cache: _Cache
    queued_tokens: int = 0
    active: int = 0
    filled_tokens: float = 0.0

    @property
    def load(self) -> tuple[int, float]:
        return self.active + self.queued_tokens, self.filled_tokens


@dataclass(kw_only=True)
class _Prefill(_Replica):
    computes: simpy.PriorityResource


@dataclass
class _Prompt:
    """A prompt of `whole` tokens of which the last `left` are to be computed."""

    whole: int
    left: int
    done: simpy.Event


@dataclass
class _Request:
    left: float
    context: float
    done: simpy.Event
    first_s: float = 0.0


@dataclass(kw_only=True)
class _Decode(_Replica):
    """`active`: requests that have been given room, whether they are `running` or on their way there. `prompt`: the one that is
    being computed, if prompts are computed here."""

    computes: simpy.PriorityResource
    changed: simpy.Event
    prompt: _Prompt | None = None
    running: list[_Request] = field(default_factory=list)


class Simulation:
    """`run` plays the sessions by their arrivals; its records have the same times and costs as benchmarks.agents.driver's.
    Raises ConfigError for a site without prefill replicas in a mode whose decode engines cannot do without."""

    def __init__(self, mode: str, site: Site, costs: Costs):
        self._mode, self._site, self._costs = get_mode(mode), site, costs
        if not site.prefill and self._mode.recomputes:
            raise ConfigError(f"mode {mode} needs a prefill pool", field="prefill", fix="give it at least one replica")
        self._env = env = simpy.Environment()
        self._prefill = [
            _Prefill(id=f"prefill-{n:05}", cache=_Cache(site.kv_tokens), computes=simpy.PriorityResource(env))
            for n in range(site.prefill)
        ]
        self._decode = [
            _Decode(
                id=f"decode-{n:05}",
                cache=_Cache(site.kv_tokens),
                computes=simpy.PriorityResource(env),
                changed=env.event(),
            )
            for n in range(site.decode)
        ]
        self._by_id = {replica.id: replica for replica in (*self._prefill, *self._decode)}
        self._prefill_weights, self._decode_weights = POLICIES[site.policy]
        self._freed = env.event()
        #: Key of a context -> replicas that may hold it: what the router's index knows.
        self._holders: dict[Hashable, set[str]] = {}
        #: Context -> the last pull of its response, for which its next turn waits, as in the product.
        self._pulls: dict[Hashable, simpy.Process] = {}
        self._records: list[TurnRecord] = []
        for replica in self._decode:
            env.process(self._steps(replica))

    def run(self, sessions: Sequence[Session], at_once: int | None = None) -> list[TurnRecord]:
        """Play in an open loop, or with `at_once` sessions under way (closed loop)."""
        places = simpy.Resource(self._env, at_once or len(sessions))
        everything = self._env.all_of([self._env.process(self._session(session, places)) for session in sessions])
        self._env.run(everything)
        return sorted(self._records, key=lambda record: (record.session, record.turn))

    def _session(self, session: Session, places: simpy.Resource):
        env, context, last = self._env, session.context_tokens, (None, None)
        yield env.timeout(session.arrival_s)
        with places.request() as place_taken:
            yield place_taken
            for number, turn in enumerate(session.turns):
                if number:
                    yield env.timeout(turn.pause_s)
                record = TurnRecord(session.number, number, turn.agent, env.now)
                prompt = context + turn.given_tokens
                last = yield env.process(self._turn(record, session.number, prompt, turn.answer_tokens, last))
                context = prompt + turn.answer_tokens
                self._records.append(record)

    def _turn(self, record: TurnRecord, session: int, prompt: int, answer: int, last: tuple):
        env, mode, costs, whole = self._env, self._mode, self._costs, prompt + answer
        handed = mode.handoff_tokens(prompt)
        base_key = session if mode.shares_prefill else (record.agent, session)
        decode_key = session if mode.adapters_share_blocks else (record.agent, session)

        while not any(self._fits(replica, whole) for replica in self._decode):
            yield self._freed
        decode = self._place(self._decode, decode_key, handed, self._decode_weights, last[1], whole)
        decode.active += 1
        decode.cache.reserved += whole
        decode.cache.evict()

        if base_key in self._pulls:
            yield self._pulls.pop(base_key)
        prefill = decode
        if self._prefill:
            prefill = self._place(self._prefill, base_key, handed, self._prefill_weights, last[0])
        record.cost = yield env.process(self._computed(prefill, base_key, handed))

        lacking = max(0, handed - self._cached(decode.cache, decode_key, handed)) if self._prefill else 0
        record.cost.kv_bytes = lacking * costs.kv_bytes
        own_s = costs.own_layers * costs.prefill(lacking, handed) if mode.recomputes and lacking else 0.0
        yield env.timeout(record.cost.kv_bytes / costs.link_bytes_per_s + own_s)

        request = _Request(answer, prompt, env.event())
        self._change(decode, request)
        yield request.done
        record.end_s = env.now
        spread = (record.end_s - request.first_s) / max(1, answer - 1)
        record.token_s = [request.first_s + spread * n for n in range(answer)]

        decode.active -= 1
        decode.cache.reserved -= whole
        self._keep(decode, decode_key, mode.cacheable_tokens(prompt, whole - 1))
        freed, self._freed = self._freed, env.event()
        freed.succeed()
        if mode.lends_responses and self._prefill:
            self._pulls[base_key] = env.process(self._pulled_back(prefill, base_key, whole - 1, answer))
        elif mode.shares_prefill and not mode.lends_responses and self._site.eager_prefill:
            env.process(self._computed(prefill, base_key, whole - 1, priority=1))
        return prefill.id, decode.id

    def _fits(self, replica: _Decode, tokens: int) -> bool:
        """Whether there is room. An idle replica also takes a context larger than its room, which would fit nowhere else."""
        room = replica.cache.reserved + tokens <= self._site.kv_tokens or not replica.active
        return room and replica.active < self._site.max_running

    def _place(self, replicas: Sequence, key: Hashable, tokens: int, weights, last: str | None, whole: int = 0):
        """Choose a replica. `whole`: tokens that need room there; 0 if none do."""
        kind, call = type(replicas[0]), Call(tokens, last)
        holders = (self._by_id[holder] for holder in self._holders.get(key, ()))
        overlaps = {r.id: self._cached(r.cache, key, tokens) for r in holders if type(r) is kind}

        def fits(replica: str) -> bool:
            return not whole or self._fits(self._by_id[replica], whole)

        candidates = [
            Candidate(r.id, overlaps.get(r.id, 0), r.queued_tokens, r.active, r.filled_tokens, fits(r.id))
            for r in shortlist(replicas, overlaps, call, fits)
        ]
        return self._by_id[place(candidates, call, weights).replica]

    def _cached(self, cache: _Cache, key: Hashable, tokens: int) -> int:
        """Cached tokens, in whole blocks."""
        return min(tokens, cache.held(key)) // self._site.block * self._site.block

    def _keep(self, replica, key: Hashable, tokens: int) -> None:
        replica.cache.put(key, tokens)
        self._holders.setdefault(key, set()).add(replica.id)

    def _computed(self, replica: _Prefill | _Decode, key: Hashable, tokens: int, priority: int = 0):
        """Compute what this replica lacks of the prompt, when it is this prompt's turn."""
        expected = max(0, tokens - self._cached(replica.cache, key, tokens))
        replica.queued_tokens += expected
        replica.filled_tokens += expected
        with replica.computes.request(priority) as turn:
            yield turn
            replica.cache.touch(key)
            cached = self._cached(replica.cache, key, tokens)
            yield self._time_of(replica, tokens - cached, tokens)
        replica.queued_tokens -= expected
        self._keep(replica, key, tokens)
        return Cost(cached, tokens - cached)

    def _time_of(self, replica: _Prefill | _Decode, computed: int, prompt: int) -> simpy.Event:
        if not isinstance(replica, _Decode):
            return self._env.timeout(self._costs.prefill(computed, prompt))
        replica.prompt = _Prompt(prompt, max(1, computed), self._env.event())
        self._wake(replica)
        return replica.prompt.done

    def _pulled_back(self, replica: _Prefill, key: Hashable, tokens: int, answer: int):
        yield self._env.timeout(answer * self._costs.kv_bytes / self._costs.link_bytes_per_s)
        self._keep(replica, key, tokens)

    def _change(self, replica: _Decode, request: _Request) -> None:
        replica.running.append(request)
        self._wake(replica)

    def _wake(self, replica: _Decode) -> None:
        changed, replica.changed = replica.changed, self._env.event()
        changed.succeed()

    def _steps(self, replica: _Decode):
        """All running requests gain a token per step, until one of them has all its tokens or something else comes. Steps that
        compute a part of a prompt are taken one by one."""
        env = self._env
        while True:
            if not replica.running and not replica.prompt:
                yield replica.changed
            batch = list(replica.running)
            step = self._costs.step(len(batch), sum(request.context for request in batch))
            step *= self._costs.second_stream if self._mode.lends_responses else 1.0
            part = self._part_s(replica.prompt)
            if part and not batch:
                step = part
            elif part:
                step += part - self._costs.prefill_s  # the weights are read once for both
            began, changed = env.now, replica.changed
            for request in batch:
                request.first_s = request.first_s or began + step
            if part:
                yield env.timeout(step)
                self._part_done(replica)
            else:
                yield env.timeout(step * min(request.left for request in batch)) | changed
            gained = (env.now - began) / step
            for request in batch:
                request.left -= gained
                request.context += gained
                if request.left < 1e-6:
                    replica.running.remove(request)
                    request.done.succeed()

    def _part_s(self, prompt: _Prompt | None) -> float:
        """Seconds for the next part of a prompt; 0.0 without one."""
        if prompt is None:
            return 0.0
        part = min(CHUNK, prompt.left)
        return self._costs.prefill(part, prompt.whole - prompt.left + part) or 1e-9

    def _part_done(self, replica: _Decode) -> None:
        prompt = replica.prompt
        prompt.left -= min(CHUNK, prompt.left)
        if not prompt.left:
            replica.prompt = None
            prompt.done.succeed()
