from __future__ import annotations

from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.turn.sharing_credit import SharingCredit

BLOCK = 4
PROMPT = list(range(100, 140))


def ask(credit: SharingCredit, tokens: list[int], decoder: str, cached: int) -> int:
    return credit.ask(BlockKeys(tokens, BLOCK), decoder, cached)


def test_what_only_others_had_asked_for_is_saved():
    credit = SharingCredit(BLOCK)
    assert ask(credit, PROMPT[:20], "planner", 0) == 0
    assert ask(credit, PROMPT[:20], "coder", 20) == 20
    assert ask(credit, PROMPT[:20], "coder", 20) == 0  # its own cache would have held it by now
    assert ask(credit, PROMPT, "planner", 20) == 0
    assert ask(credit, PROMPT, "coder", 40) == 20


def test_what_was_computed_is_not_saved():
    credit = SharingCredit(BLOCK)
    ask(credit, PROMPT, "planner", 0)
    assert ask(credit, PROMPT, "coder", 10) == 8  # two whole blocks


def test_the_same_block_after_another_beginning_is_another():
    credit = SharingCredit(BLOCK)
    ask(credit, PROMPT[:8], "planner", 0)
    assert ask(credit, PROMPT[4:8], "coder", 4) == 0


def test_what_nobody_is_known_to_have_asked_for_is_nobodys():
    assert ask(SharingCredit(BLOCK), PROMPT, "coder", 40) == 0


def test_it_remembers_so_many_blocks_and_forgets_the_oldest():
    credit = SharingCredit(BLOCK, blocks=10)
    ask(credit, PROMPT, "planner", 0)
    ask(credit, list(range(20)), "planner", 0)
    assert ask(credit, PROMPT, "coder", 40) == 20
