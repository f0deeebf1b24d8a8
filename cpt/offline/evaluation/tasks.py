"""The task YAML: which tasks are run on an export, and by how much each may drop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cpt.errors import ConfigError
from data_pipeline.config.strict_yaml import Reader, load_yaml


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    name: str
    """Unique; names the task in results."""
    language: str
    """What language it is in: en, ja."""
    kind: Literal["multiple_choice", "exact_match", "perplexity", "harness"]
    """`multiple_choice`: records {question, choices, answer: index}, the likeliest choice by byte;
    `exact_match`: records {prompt, answer: text or list}, greedy reply; `perplexity`: records
        {text}, bits per byte; `harness`: a task
    of lm-evaluation-harness, which fetches its data."""
    max_drop: float
    """Largest loss that passes: percentage points of right answers, or percent of bits per byte."""
    path: Path | None = None
    """JSONL file of the local kinds, relative to the YAML file."""
    separator: str = " "
    """Between question and choice; empty for Japanese."""
    chat: bool = False
    """Of exact_match: ask in the Harmony format and compare the final channel."""
    max_new_tokens: int = 32
    """Of exact_match: tokens of a reply; without `chat` it ends at its first line."""
    task: str | None = None
    """Of harness: its name there."""
    metric: str | None = None
    """Of harness: acc, acc_norm, exact_match, or with its filter "exact_match,flexible-extract": a
    share of right answers."""
    num_fewshot: int | None = None
    """Of harness: examples in the prompt; default: the task's own."""
    limit: int | None = None
    """Documents to score at most, from the first; default: all."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules within one task."""
        if not self.max_drop > 0:
            yield "max_drop", f"is {self.max_drop:g}, must be above 0: no measurement is exact."
        harness = self.kind == "harness"
        for key, wanted in (("path", not harness), ("task", harness), ("metric", harness)):
            if wanted and getattr(self, key) is None:
                yield key, f"is missing. kind: {self.kind} needs it."
            if not wanted and getattr(self, key) is not None:
                yield key, f"is given, but kind: {self.kind} has none. Remove it."
        if self.num_fewshot is not None and not harness:
            yield (
                "num_fewshot",
                "is given, but only kind: harness has one. Write the examples into the records.",
            )
        if self.chat and self.kind != "exact_match":
            yield "chat", "is given, but only kind: exact_match asks. Remove it."
        for key in ("max_new_tokens", "limit"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield key, f"is {value}, must be at least 1."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskFile:
    """The whole YAML."""

    tasks: tuple[Task, ...]
    """At least one."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules across tasks."""
        names = [task.name for task in self.tasks]
        if not names:
            yield "tasks", "is an empty list. Name at least one task."
        for index, name in enumerate(names):
            if name in names[:index]:
                yield (
                    f"tasks[{index}].name",
                    f"is '{name}', which the list already has. Give each its own name.",
                )


def load_tasks(path: Path) -> tuple[Task, ...]:
    """Read and check a task YAML.

    Raises:
        ConfigError: with every problem found, each as `file:line: key message`.
    """
    if not path.is_file():
        raise ConfigError(f"--tasks {path}: no such file. Start from configs/tasks/sample.yaml.")
    reader = Reader(load_yaml(path))
    file = reader.read(TaskFile)
    base = path.resolve().parent
    for index, task in enumerate(file.tasks if file else ()):
        if task.path is not None and not (base / task.path).is_file():
            reader.problem(
                ("tasks", index, "path"), f"is '{task.path}', which is no file (looked in {base})."
            )
    reader.finish()
    assert file is not None
    return tuple(
        task if task.path is None else dataclasses.replace(task, path=base / task.path)
        for task in file.tasks
    )
