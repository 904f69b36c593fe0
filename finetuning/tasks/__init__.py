"""Task suites: where the questions come from, what a training transcript looks like, and when an answer is right."""

import json
from collections.abc import Sequence
from pathlib import Path

from finetuning.tasks.arithmetic import Arithmetic
from finetuning.tasks.base import SPLITS, Question, Task, check_disjoint
from finetuning.tasks.tool_calls import ToolCalls

TASKS: dict[str, Task] = {task.name: task for task in (ToolCalls("simple_python"), ToolCalls("multiple"), Arithmetic())}

__all__ = ["SPLITS", "TASKS", "Question", "Task", "write_transcripts"]


def write_transcripts(tasks: Sequence[Task], file: Path, count: int, seed: int = 0, split: str = "train") -> int:
    """Training data of at most `count` transcripts per task; returns how many there are. Raises ConfigError if they ask what
    any suite's test questions ask."""
    made = [transcript for task in tasks for transcript in task.transcripts(count, seed, split)]
    for task in TASKS.values():
        check_disjoint(made, task.questions())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(transcript) + "\n" for transcript in made))
    return len(made)
