"""The figures as a page."""

from __future__ import annotations

_WHY = {
    "smollm2_tools": "tools stand first; a call is laid out in the base's own form, other than it was generated here",
    "llama": "the same, in another form",
    "qwen": "thinking is taken out of earlier answers as soon as the next question comes",
    "mistral": "tools stand before the last question, and move with it",
}
_HEAD = """# Twelve turns of three decoders with tool calls

`python -m benchmarks.chats`: prompt tokens that are computed over all turns, by way of keeping the history and by kind of chat template. No
engine runs; the figures follow from the tokens alone. "new" counts the tokens behind the longest beginning whose KV was made before, and
"computed" rounds that beginning down to whole blocks of 32.

| template | by Responses: new, computed | by the header | by plain chat completions | why plain differs |
| --- | ---: | ---: | ---: | --- |
"""


def written(found: dict[str, dict[str, dict[str, int]]]) -> str:
    rows = []
    for family, ways in found.items():
        cells = [f"{ways[way]['new']}, {ways[way]['computed']}" for way in ("responses", "header", "plain")]
        rows.append(f"| {family} | {' | '.join(cells)} | {_WHY[family]} |")
    return _HEAD + "\n".join(rows) + "\n"
