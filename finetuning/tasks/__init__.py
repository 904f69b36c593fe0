"""Task suites: where the questions come from, what a training transcript looks like, and when an answer is right."""

from finetuning.tasks.arithmetic import Arithmetic
from finetuning.tasks.base import SPLITS, Question, Task
from finetuning.tasks.tool_calls import ToolCalls

TASKS: dict[str, Task] = {task.name: task for task in (ToolCalls("simple_python"), ToolCalls("multiple"), Arithmetic())}

__all__ = ["SPLITS", "TASKS", "Question", "Task"]
