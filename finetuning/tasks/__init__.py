"""Task suites: where the questions come from, what a training transcript looks like, and when an answer is right."""

import json
from collections.abc import Sequence
from pathlib import Path

from prefillshare.finetuning.tasks.arithmetic import Arithmetic
from prefillshare.finetuning.tasks.base import SPLITS, Question, Task, check_disjoint, in_company, together
from prefillshare.finetuning.tasks.home_commands import HomeCommands
from prefillshare.finetuning.tasks.tool_calls import ToolCalls

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ToolCalls("simple_python"),
        ToolCalls("multiple"),
        Arithmetic(),
        ToolCalls("simple_python", offers_tools=True),
        ToolCalls("multiple", offers_tools=True),
        HomeCommands(),
    )
}

__all__ = ["SPLITS", "TASKS", "Question", "Task", "write_transcripts"]


def write_transcripts(
    tasks: Sequence[Task], file: Path, count: int, seed: int = 0, split: str = "train", others: int = 0, in_one: int = 1
) -> int:
    """Write training data of at most `count` transcripts per task; returns how many lines there are. `others`: most
    transcripts, of any suite, that precede each as other decoders' turns. `in_one`: most transcripts, of different tasks, that
    become one, whose responses are all learnt. Raises ConfigError if one asks what any suite's test question asks."""
    by_task = [task.transcripts(count, seed, split) for task in tasks]
    made = together(by_task, in_one, seed) if in_one > 1 else [transcript for of in by_task for transcript in of]
    if others:
        company = [task for task in TASKS.values() if task.precedes_others]
        made = in_company(made, [t for task in company for t in task.transcripts(count, seed + 1, split)], others, seed)
    for task in TASKS.values():
        check_disjoint(made, task.questions())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(transcript) + "\n" for transcript in made))
    return len(made)
