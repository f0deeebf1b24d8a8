"""The task YAML: the tasks that are run on an export, and by how much each may drop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cpt.errors import ConfigError
from data_pipeline.config.strict_yaml import KeyPath, Reader, load_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task of the YAML."""

    name: str
    """Unique name of the task in results."""
    language: str
    """Language of the task: en, ja."""
    kind: Literal["multiple_choice", "exact_match", "perplexity", "harness"]
    """Kind of task.

    `multiple_choice`: records {question, choices, answer: index}, the likeliest choice by byte.
    `exact_match`: records {prompt, answer: text or list}, a greedy reply.
    `perplexity`: records {text}, bits per byte.
    `harness`: a task of lm-evaluation-harness, which fetches its data.
    """
    max_drop: float
    """Largest loss that passes: percentage points of right answers, or percent of bits per byte."""
    path: Path | None = None
    """JSONL file of the local kinds, relative to the YAML file."""
    separator: str = " "
    """Text between question and choice; empty for Japanese."""
    chat: bool = False
    """With exact_match: ask in the Harmony format and compare the final channel."""
    max_new_tokens: int = 32
    """With exact_match: tokens of a reply; without `chat` the reply ends at its first line."""
    task: str | None = None
    """With harness: its name there."""
    metric: str | None = None
    """With harness: the metric, which must be a share of right answers: acc, acc_norm, exact_match,
    or with its filter "exact_match,flexible-extract".
    """
    num_fewshot: int | None = None
    """With harness: examples in the prompt; default: the task's own."""
    include_path: Path | None = None
    """With harness: folder of task files of your own, relative to the YAML file; the harness's own
    tasks are then not known.
    """
    limit: int | None = None
    """Documents to score at most, from the first; default: all."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within the task."""
        if not self.max_drop > 0:
            yield "max_drop", f"is {self.max_drop:g}, must be above 0: no measurement is exact."
        is_harness = self.kind == "harness"
        yield from self._check_presence("path", self.path, is_wanted=not is_harness)
        yield from self._check_presence("task", self.task, is_wanted=is_harness)
        yield from self._check_presence("metric", self.metric, is_wanted=is_harness)
        if self.num_fewshot is not None and not is_harness:
            yield (
                "num_fewshot",
                "is given, but only kind: harness has one. Write the examples into the records.",
            )
        if self.include_path is not None and not is_harness:
            yield "include_path", "is given, but only kind: harness has one. Remove it."
        if self.chat and self.kind != "exact_match":
            yield "chat", "is given, but only kind: exact_match asks. Remove it."
        if self.max_new_tokens < 1:
            yield "max_new_tokens", f"is {self.max_new_tokens}, must be at least 1."
        if self.limit is not None and self.limit < 1:
            yield "limit", f"is {self.limit}, must be at least 1."

    def _check_presence(
        self, key: str, value: object, *, is_wanted: bool
    ) -> Iterator[tuple[str, str]]:
        if is_wanted and value is None:
            yield key, f"is missing. kind: {self.kind} needs it."
        if not is_wanted and value is not None:
            yield key, f"is given, but kind: {self.kind} has none. Remove it."


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFile:
    """The whole YAML."""

    tasks: tuple[Task, ...]
    """At least one task."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule across tasks."""
        if not self.tasks:
            yield "tasks", "is an empty list. Name at least one task."
        seen = set()
        for index, task in enumerate(self.tasks):
            if task.name in seen:
                yield (
                    f"tasks[{index}].name",
                    f"is '{task.name}', which the list already has. Give each its own name.",
                )
            seen.add(task.name)


def existing_path(
    reader: Reader, key: KeyPath, base: Path, path: Path, *, is_folder: bool = False
) -> Path:
    """Return a path of a YAML file, and record a problem if nothing is there.

    Args:
        reader: Reader of the file.
        key: Where the path stands in it.
        base: Folder that the path is relative to.
        path: The path.
        is_folder: Whether it must be a folder rather than a file.
    """
    found = base / path
    if not (found.is_dir() if is_folder else found.is_file()):
        kind = "folder" if is_folder else "file"
        reader.problem(key, f"is '{path}', which is no {kind} (looked in {base}).")
    return found


def load_tasks(path: Path) -> tuple[Task, ...]:
    """Read and check a task YAML.

    Raises:
        ConfigError: the file is missing, or breaks a rule; every problem found is named, each as
            `file:line: key message`.
    """
    if not path.is_file():
        raise ConfigError(f"--tasks {path}: no such file. Start from configs/tasks/sample.yaml.")
    reader = Reader(load_yaml(path))
    file = reader.read(TaskFile)
    base = path.resolve().parent
    tasks = []
    for index, task in enumerate(file.tasks if file else ()):
        if task.path is not None:
            found = existing_path(reader, ("tasks", index, "path"), base, task.path)
            task = replace(task, path=found)
        if task.include_path is not None:
            key = ("tasks", index, "include_path")
            found = existing_path(reader, key, base, task.include_path, is_folder=True)
            task = replace(task, include_path=found)
        tasks.append(task)
    reader.finish()
    return tuple(tasks)
