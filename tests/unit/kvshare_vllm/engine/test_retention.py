"""What an engine keeps, on vLLM's own cache manager and block pool. No engine runs."""

from __future__ import annotations

import random
from types import SimpleNamespace

import msgspec
import pytest
import torch
from vllm import SamplingParams
from vllm.distributed.kv_events import BlockRemoved
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from prefillshare.kvshare.keep import Keep
from prefillshare.kvshare_vllm.engine.kv_events import KeptChanged
from prefillshare.kvshare_vllm.engine.retention import Retention, hints

BLOCK = 4
#: vLLM's pool has one more, its null block.
BLOCKS = 16


class Engine:
    """A cache that requests fill, and what it keeps. `now`: its clock."""

    def __init__(self, blocks: int = BLOCKS):
        init_none_hash(sha256)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(
            config, max_model_len=1024, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_kv_cache_events=True
        )
        self.now, self.numbers = 0.0, iter(range(10_000))
        self.retention = Retention(self.manager, lambda: self.now)
        self.kept = self.retention.kept
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def request(self, prompt: list[int], asked=None, salt: str | None = None) -> Request:
        return Request(
            request_id=str(next(self.numbers)),
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            cache_salt=salt,
            block_hasher=self._hasher,
            kv_hints=asked,
        )

    def begin(self, prompt: list[int], asked=None, salt: str | None = None) -> Request | None:
        """The request, with the prompt's blocks; None if there is no room for them."""
        request = self.request(prompt, asked, salt)
        self.retention.begins(request)
        blocks, found = self.manager.get_computed_blocks(request)[:2]
        missing = len(prompt) - found
        if self.manager.allocate_slots(request, missing, found, blocks, full_sequence_must_fit=True) is None:
            return None
        return request

    def end(self, request: Request, status=RequestStatus.FINISHED_LENGTH_CAPPED) -> None:
        request.status = status
        self.retention.ended(request)
        self.manager.free(request)

    def run(self, prompt: list[int], asked=None, salt: str | None = None) -> None:
        request = self.begin(prompt, asked, salt)
        assert request is not None, "there is no room"
        self.end(request)

    def keep(self, name: str, prompt: list[int], ttl_s: float = 100, priority: int = 0, salt: str | None = None) -> None:
        self.run([*prompt, 0], hints([Keep(name, len(prompt), ttl_s, priority)]), salt)

    def cached(self, prompt: list[int], salt: str | None = None) -> int:
        """How many of the prompt's tokens are in the cache."""
        return self.manager.get_computed_blocks(self.request([*prompt, 0], salt=salt))[1]

    @property
    def free(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    def fill(self, blocks: int = BLOCKS) -> None:
        """Other prompts pass through all of the cache."""
        for _ in range(blocks):
            self.run(prompt(1))

    def told(self) -> list[KeptChanged]:
        return [event for event in self.manager.take_events() if isinstance(event, KeptChanged)]


_tokens = iter(range(1, 100_000))


def prompt(blocks: int) -> list[int]:
    """One of which no other begins with a block."""
    return [next(_tokens) for _ in range(blocks * BLOCK)]


def test_what_is_kept_outlives_all_other_prompts():
    engine, kept, other = Engine(), prompt(3), prompt(3)
    engine.keep("a", kept)
    engine.run(other)
    engine.fill()
    assert (engine.cached(kept), engine.cached(other)) == (3 * BLOCK, 0)


def test_only_the_named_beginning_is_kept_in_whole_blocks():
    engine, whole = Engine(), prompt(4)
    engine.run(whole, hints([Keep("a", 2 * BLOCK + 3, 100)]))
    engine.fill()
    assert engine.cached(whole) == 2 * BLOCK
    assert engine.kept.blocks == 2


def test_kept_blocks_count_as_free():
    engine = Engine()
    engine.keep("a", prompt(10))
    assert engine.free == BLOCKS
    assert engine.manager.usage == 0.0


def test_a_request_gets_all_blocks_although_all_are_kept():
    engine, kept = Engine(), prompt(BLOCKS - 1)
    engine.keep("a", kept)
    assert engine.begin(prompt(BLOCKS)) is not None
    assert (engine.free, engine.cached(kept), engine.kept.blocks) == (0, 0, 0)


def test_a_request_that_finds_kept_blocks_is_admitted_as_if_they_were_cached_only():
    """vLLM counts the cached blocks that a request finds among those that it takes from the free ones."""
    for keeps in (False, True):
        engine, kept = Engine(), prompt(10)
        if keeps:
            engine.keep("a", kept)
        else:
            engine.run(kept)
        assert engine.begin([*kept, *prompt(BLOCKS - 9)]) is None
        assert engine.begin([*kept, *prompt(BLOCKS - 10)]) is not None
        assert engine.free == 0


def test_tail_blocks_are_given_up_before_head_blocks():
    engine, kept = Engine(), prompt(6)
    engine.keep("a", kept)
    engine.begin(prompt(BLOCKS - 2))
    assert engine.cached(kept) == 2 * BLOCK
    assert engine.kept.blocks == 2


def test_lower_priority_is_given_up_first_then_what_ends_sooner():
    engine = Engine()
    kept = {name: prompt(4) for name in ("high", "low", "late", "soon")}
    engine.keep("high", kept["high"], ttl_s=10, priority=5)
    engine.keep("low", kept["low"], ttl_s=500, priority=-1)
    engine.keep("late", kept["late"], ttl_s=200)
    engine.keep("soon", kept["soon"], ttl_s=50)
    left = []
    for _ in range(4):
        engine.begin(prompt(4))
        left.append({name for name, tokens in kept.items() if engine.cached(tokens)})
    assert left == [{"high", "late", "soon"}, {"high", "late"}, {"high"}, set()]


def test_a_beginning_that_two_share_goes_with_the_higher_one():
    engine, shared = Engine(), prompt(4)
    low, high = [*shared, *prompt(2)], [*shared, *prompt(2)]
    engine.keep("low", low)
    engine.keep("high", high, priority=1)
    assert engine.kept.blocks == 8
    engine.begin(prompt(BLOCKS - 6))
    assert (engine.cached(low), engine.cached(high)) == (4 * BLOCK, 6 * BLOCK)
    engine.kept.let_go("high")
    engine.fill(6)
    assert engine.cached(low) == 4 * BLOCK, "the lower one still keeps what both shared"


def test_what_requests_use_is_not_given_up_and_stays_kept():
    engine, used, unused = Engine(), prompt(4), prompt(4)
    engine.keep("used", used, priority=-1)
    engine.keep("unused", unused)
    running = engine.begin([*used, 0])
    engine.begin(prompt(BLOCKS - 5 - 2))
    assert (engine.cached(used), engine.cached(unused)) == (4 * BLOCK, 2 * BLOCK)
    engine.end(running)
    engine.begin(prompt(2))
    assert engine.cached(used) == 4 * BLOCK - BLOCK


@pytest.mark.parametrize("how", ["let go", "expired", "let go by a request"])
def test_what_is_kept_no_longer_is_evicted_like_any_other(how):
    engine, kept = Engine(), prompt(3)
    engine.keep("a", kept, ttl_s=10)
    engine.now = 9.9
    engine.kept.expire()
    assert engine.kept.blocks == 3
    if how == "let go":
        engine.kept.let_go("a")
    elif how == "expired":
        engine.now = 10.0
        engine.kept.expire()
    else:
        engine.run(prompt(1), hints(let_go=["a"]))
    assert engine.cached(kept) == 3 * BLOCK
    engine.fill()
    assert (engine.cached(kept), engine.kept.blocks) == (0, 0)


def test_keeping_again_prolongs_and_grows():
    engine, first = Engine(), prompt(3)
    grown = [*first, *prompt(2)]
    engine.keep("a", first, ttl_s=10)
    engine.now = 8.0
    engine.keep("a", grown, ttl_s=10)
    engine.now = 12.0
    engine.kept.expire()
    engine.fill()
    assert engine.cached(grown) == 5 * BLOCK
    engine.keep("a", first, ttl_s=10)
    engine.fill()
    assert engine.cached(grown) == 3 * BLOCK


def test_nothing_is_left_of_what_is_replaced_by_less_than_a_block():
    engine, first, other = Engine(), prompt(3), prompt(3)
    engine.keep("a", first)
    engine.keep("b", other)
    engine.begin(prompt(BLOCKS - 5))
    assert engine.cached(first) == 2 * BLOCK
    engine.run([*first[:BLOCK], 0], hints([Keep("a", BLOCK - 1, 100)]))
    assert (engine.kept.blocks, engine.cached(other)) == (3, 3 * BLOCK)
    assert engine.begin(prompt(5)) is not None
    assert engine.kept.blocks == 0


def test_a_request_that_failed_keeps_nothing():
    engine, tokens = Engine(), prompt(3)
    request = engine.begin([*tokens, 0], hints([Keep("a", len(tokens), 100)]))
    engine.end(request, RequestStatus.FINISHED_ABORTED)
    assert engine.kept.blocks == 0


def test_salted_keys_stay_apart():
    engine, tokens = Engine(), prompt(3)
    engine.keep("a", tokens, salt="one")
    engine.fill()
    assert (engine.cached(tokens, "one"), engine.cached(tokens, "two"), engine.cached(tokens)) == (3 * BLOCK, 0, 0)


def test_a_block_whose_content_is_invalid_is_kept_no_longer():
    engine, tokens = Engine(), prompt(4)
    engine.keep("a", tokens)
    request = engine.begin([*tokens, 0])
    second = engine.manager.get_block_ids(request.request_id)[0][1]
    engine.manager.evict_blocks({second})
    engine.end(request)
    assert (engine.cached(tokens), engine.kept.blocks) == (BLOCK, 1)
    assert engine.free == BLOCKS


def test_nothing_is_kept_when_the_cache_is_reset():
    engine = Engine()
    engine.keep("a", prompt(3))
    assert engine.manager.reset_prefix_cache()
    engine.kept.clear()
    assert (engine.kept.blocks, engine.free) == (0, BLOCKS)


def test_changes_are_told_beside_the_blocks():
    engine, kept = Engine(), prompt(3)
    engine.keep("a", kept)
    (told,) = engine.told()
    assert (told.name, told.tokens, told.blocks, told.given_up) == ("a", 3 * BLOCK, 3, 0)
    engine.begin(prompt(BLOCKS - 1))
    events = engine.manager.take_events()
    (told,) = (event for event in events if isinstance(event, KeptChanged))
    assert (told.name, told.tokens, told.blocks, told.given_up, told.why) == ("a", BLOCK, 1, 2, "pressure")
    removed = [event for event in events if isinstance(event, BlockRemoved)]
    assert len(removed) == 2
    engine.kept.let_go("a")
    (told,) = engine.told()
    assert (told.tokens, told.blocks, told.given_up, told.why) == (0, 0, 1, "let_go")


def test_hints_of_others_are_not_ours():
    engine, tokens = Engine(), prompt(3)
    asked = hints([Keep("a", len(tokens), 100)])
    for change in ({"action_type": "pin"}, {"action_version": "2"}):
        action = msgspec.structs.replace(asked.actions[0], **change)
        engine.run([*tokens, 0], SimpleNamespace(actions=[action]))
        assert engine.kept.blocks == 0


def test_blocks_are_given_up_although_the_end_of_their_prompt_is_in_use():
    """The same content may be in two blocks: a request that has made one of them may use what follows the other."""
    engine, tokens, more = Engine(), prompt(2), prompt(1)
    first, second = engine.begin(tokens), engine.begin(tokens)
    second.num_computed_tokens = len(tokens)
    second.append_output_token_ids(more)
    assert engine.manager.allocate_slots(second, len(more)) is not None
    engine.end(first)
    engine.keep("a", [*tokens, *more])
    assert engine.kept.blocks == 3
    assert engine.begin(prompt(engine.free)) is not None
    assert (engine.free, engine.kept.blocks) == (0, 1)


def test_no_block_is_lost_whatever_happens():
    """Requests with common beginnings come and go, are kept, let go, expire; every block is always free or held, and a request
    for which there is room gets it."""
    rng, engine = random.Random(7), Engine(24)
    trunks = [prompt(6) for _ in range(3)]
    running: list[Request] = []
    for step in range(4_000):
        engine.now += rng.random()
        engine.kept.expire()
        trunk = rng.choice(trunks)[: rng.randrange(1, 7) * BLOCK]
        tokens = [*trunk, *(rng.randrange(3) for _ in range(rng.randrange(9)))]
        name = f"n{rng.randrange(8)}"
        action = rng.random()
        if action < 0.5:
            asked = hints([Keep(name, rng.randrange(1, len(tokens) + 1), rng.uniform(1, 40), rng.randrange(3))])
            if request := engine.begin(tokens, asked if rng.random() < 0.6 else None):
                running.append(request)
        elif action < 0.9 and running:
            engine.end(running.pop(rng.randrange(len(running))))
        elif action < 0.95:
            engine.kept.let_go(name)
        elif running:
            request = rng.choice(running)
            blocks = engine.manager.get_block_ids(request.request_id)[0]
            engine.manager.evict_blocks({rng.choice(blocks)})
        held = {block for request in running for block in engine.manager.get_block_ids(request.request_id)[0]}
        free = {block.block_id for block in engine.manager.block_pool.free_block_queue.get_all_free_blocks()}
        assert not held & free, step
        assert (len(held) + len(free), engine.free) == (24, len(free)), step
    for request in running:
        engine.end(request)
    assert engine.begin(prompt(24)) is not None
    assert engine.kept.blocks == 0
