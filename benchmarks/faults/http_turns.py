"""Turns over HTTP, one after the other, while faults strike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import httpx

from benchmarks.shared.beside import Beside
from benchmarks.shared.small import DECODERS, HTTP_PORT

URL = f"http://127.0.0.1:{HTTP_PORT}/v1/completions"
PROMPT = list(range(100, 160))
TOKENS = 16
TIMEOUT_S = 60


def _ask(client: httpx.Client) -> str:
    body = {"model": DECODERS[0], "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answer = client.post(URL, json=body, timeout=TIMEOUT_S)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


class HttpTurns(Beside):
    """Counts right, wrong and missing answers by fault. `fault()`: what strikes now."""

    def __init__(self, fault: Callable[[], str]):
        super().__init__()
        self._fault = fault
        self.right, self.wrong = 0, 0
        self.lost: Counter[str] = Counter()
        with httpx.Client() as client:
            self._expected = _ask(client)

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            before = self._fault()
            try:
                with httpx.Client() as client:  # a connection of its own: any proxy may take it
                    text = _ask(client)
            except httpx.HTTPError:
                self.lost[self._fault() or before] += 1
            else:
                self.right += text == self._expected
                self.wrong += text != self._expected
