"""One line for each turn: which decoder took it, how long its prompt was, and how much of that was found cached."""

from __future__ import annotations

import json


def print_head() -> None:
    print(f"{'decoder':<12} {'prompt':>7} {'cached':>7} {'computed':>9} {'generated':>10}  where")


def print_turn(decoder: str, prompt: int, cached: int, generated: int, where: str = "") -> None:
    """The first three numbers are tokens of the prompt: `cached` were there already, and the rest was computed for this turn.
    `where`: the engines that took part, if the answer tells."""
    print(f"{decoder:<12} {prompt:>7} {cached:>7} {prompt - cached:>9} {generated:>10}  {where}", flush=True)


def engines(usage: dict) -> str:
    """`usage`: what the server tells of a turn, over HTTP under `kv_transfer_params.prefillshare`."""
    return " -> ".join(filter(None, (usage.get("prefill_replica"), usage.get("decode_replica"))))


class Where:
    """The engines of the last answer. `read` and `aread` are event hooks of an HTTP client, so this works with every framework
    that lets you pass a client; streamed answers do not tell, and leave "streamed"."""

    def __init__(self) -> None:
        self.last = ""

    def read(self, response) -> None:
        if self._is_whole(response):
            self._note(response.read())

    async def aread(self, response) -> None:
        if self._is_whole(response):
            self._note(await response.aread())

    def _is_whole(self, response) -> bool:
        self.last = "streamed"
        return response.headers.get("content-type", "").startswith("application/json")

    def _note(self, body: bytes) -> None:
        self.last = engines((json.loads(body).get("kv_transfer_params") or {}).get("prefillshare", {}))
