"""What do twelve turns of three decoders with tool calls compute, by each way of keeping the history and each template?

    python -m benchmarks.chats [--base FOLDER]

The first question comes with a brief that all agents read. Each agent has a system prompt and tools of its own, or all have the
same; who calls a tool gets its result. Answers are scripted, and laid out as a model would generate them. No engine runs, so
that the figures are exact and the same everywhere.

Prompt tokens are computed but for the whole blocks with which the prompt begins and that the base's KV was made of before:
those of earlier prompts, and of earlier answers behind the context that the next turn was expected to see. Writes
benchmarks/results/chats.json and chats.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from benchmarks.chats.report import written
from benchmarks.chats.ways import WAYS, play

TEMPLATES = Path(__file__).parent / "templates"
#: Shown as -> the base's chat_template, and what a thinking model writes before each answer.
FAMILIES = {
    "smollm2_tools": ("smollm2_tools", ""),
    "llama": (str(TEMPLATES / "llama.jinja"), ""),
    "qwen": (str(TEMPLATES / "qwen.jinja"), "<think>\nThe last result is what I need; I go on from there.\n</think>\n\n"),
    "mistral": (str(TEMPLATES / "mistral.jinja"), ""),
}
RESULTS = Path(__file__).parents[1] / "results"
#: Scenario -> family -> way -> {"prompt", "last_prompt", "computed", "continued"}: tokens of all prompts, of the last one,
#: those that are computed, and turns that went on from token ids.
Figures = dict[str, dict[str, dict[str, dict[str, int]]]]
#: Scenario -> whether the agents are alike.
SCENARIOS = {"own": False, "alike": True}


async def figures(base: str) -> Figures:
    return {
        scenario: {
            family: {way: await play(base, template, thinking, way, alike) for way in WAYS}
            for family, (template, thinking) in FAMILIES.items()
        }
        for scenario, alike in SCENARIOS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/smollm2-135m-instruct", help="folder of the model whose tokenizer is used")
    found = asyncio.run(figures(parser.parse_args().base))
    (RESULTS / "chats.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "chats.md").write_text(written(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
