"""Chat templates and tokenisers run off the router's event loop, and a short text never waits for a long one.

Short texts have one thread and long ones another, which tenants use in turns. A text that cannot fit the model is refused
before any work on it. Work that has not ended in time fails for its client; the thread goes on with it, and it keeps its place
at the gate until it ends, so that no more work is begun than there are threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import DeadlineExceeded, InvalidInput
from prefillshare.kvshare_vllm.fair_gate import FairGate

T = TypeVar("T")

#: Work on so few characters takes less time than handing it to a thread; work on a text this short takes a few milliseconds.
INLINE_CHARS, SHORT_CHARS = 256, 8 << 10
#: Characters that are counted for a message's role and its place in the template.
MESSAGE_CHARS = 16
MOST_WAITING = 64
TIMEOUT_S = 30.0


class TextWork:
    """`max_tokens`: the model's length. `chars_per_token`: characters of the longest token."""

    def __init__(self, max_tokens: int, chars_per_token: int, timeout_s: float = TIMEOUT_S):
        self.max_tokens, self.max_chars = max_tokens, max_tokens * chars_per_token
        self._timeout_s = timeout_s
        self._lanes = {
            long: (FairGate("a text to be tokenised", 1, MOST_WAITING), ThreadPoolExecutor(1, f"text-{long}"))
            for long in (False, True)
        }

    def check_chars(self, chars: int, field: str) -> None:
        """Raises InvalidInput for a text that cannot fit the model's length, however it is tokenised."""
        if chars > self.max_chars:
            raise InvalidInput(
                f"{chars} characters are more than {self.max_tokens} tokens can hold",
                field=field,
                fix="send less, or raise base.max_model_len",
            )

    async def run(self, chars: int, work: Callable[[], T]) -> T:
        """Run `work`, which processes `chars` characters. Raises Overloaded, DeadlineExceeded, or what `work` raises."""
        if chars <= INLINE_CHARS:
            return work()
        gate, threads = self._lanes[chars > SHORT_CHARS]

        def ended(done: asyncio.Future) -> None:
            gate.leave()
            if not done.cancelled():
                done.exception()  # retrieved: its client may be gone

        try:
            async with asyncio.timeout(self._timeout_s):
                await gate.join(current_caller.get().tenant)
                working = asyncio.get_running_loop().run_in_executor(threads, work)
                working.add_done_callback(ended)
                return await asyncio.shield(working)
        except TimeoutError:
            raise DeadlineExceeded(f"a text of {chars} characters was not worked on within {self._timeout_s:g} s") from None

    def close(self) -> None:
        for _, threads in self._lanes.values():
            threads.shutdown(wait=False, cancel_futures=True)


def chars_of(value: Any) -> int:
    """Characters of all texts in it; a message or other mapping counts MESSAGE_CHARS more."""
    chars, left = 0, [value]
    while left:
        match left.pop():
            case str() as text:
                chars += len(text)
            case dict() as mapping:
                chars += MESSAGE_CHARS
                left += mapping.values()
            case Iterable() as several:
                left += several
            case _:
                pass
    return chars
