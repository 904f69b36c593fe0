"""The figures as a page."""

from __future__ import annotations

_TITLES = {
    "own": "Each agent has a system prompt and tools of its own",
    "alike": "All agents have the same system prompt and tools",
}
_HEAD = """# Twelve turns of three decoders with tool calls

`python -m benchmarks.chats`: prompt tokens that are computed over all turns, of all prompt tokens, by way of keeping the
history and by kind of chat template ([what is behind these names](../chats/templates/README.md)). The first question comes with
a brief of some 1,900 tokens. No engine runs; the figures follow from the tokens alone, in blocks of 32.
"""
_TABLE = """
## {}

| template | Responses | chat completions with the header | plain chat completions |
| --- | ---: | ---: | ---: |
"""


def written(found: dict[str, dict[str, dict[str, dict[str, int]]]]) -> str:
    page = _HEAD
    for scenario, families in found.items():
        page += _TABLE.format(_TITLES[scenario])
        for family, ways in families.items():
            cells = [f"{ways[way]['computed']:,} of {ways[way]['prompt']:,}" for way in ("responses", "header", "plain")]
            page += f"| `{family}` | {' | '.join(cells)} |\n"
    return page
