"""Steps of the last stage that a killed build does not repeat.

    tasks of a step -> one file each -> the result of the step, one array

Decisions
    The folder of a step has a name that is a hash of all that goes into the step, so what another
    build left there is never taken for its own.
    A task is done if and only if its file is there, and a step if and only if its result is. Both
    appear when they are complete. The files of the tasks go when the result is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from data_pipeline.console.progress import show_progress
from data_pipeline.engine.executor import Executor
from data_pipeline.store.files import atomic_write, make_folder

STEPS_FOLDER = "last_stage"
"""Folder of all steps in the work directory of a build."""
_RESULT_FILE = "result.npy"
_TASKS_FOLDER = "tasks"
_SEPARATOR = "@"
"""Stands in no name of a source, so the steps of one are not taken for those of another."""
Result = npt.NDArray[Any]
"""An array: one byte a document in the order of the mix, or a few counts."""


class StepTask(Protocol):
    """A piece of a step, which writes one file."""

    @property
    def output(self) -> Path:
        """The file."""


AnyTask = TypeVar("AnyTask", bound=StepTask)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the last stage, and its folder."""

    folder: Path

    @classmethod
    def begin(cls, work_dir: Path, name: str, inputs: Any) -> Step:
        """Open the folder of a step, and remove those that other inputs left.

        Args:
            work_dir: Folder of the build in progress.
            name: Name of the step, without '@'.
            inputs: JSON values that tell all that goes into the step.
        """
        text = json.dumps(inputs, sort_keys=True)
        digest = xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
        folder = work_dir / STEPS_FOLDER / f"{name}{_SEPARATOR}{digest}"
        if (folder / _RESULT_FILE).exists():
            # left by a build that was killed just behind the result
            shutil.rmtree(folder / _TASKS_FOLDER, ignore_errors=True)
        make_folder(folder / _TASKS_FOLDER)
        for other in folder.parent.glob(f"{name}{_SEPARATOR}*"):
            if other != folder:
                shutil.rmtree(other)
        return cls(folder)

    @property
    def tasks_folder(self) -> Path:
        """Folder for the files of the tasks."""
        return self.folder / _TASKS_FOLDER

    def result(self) -> Result | None:
        """Return the result of the step; None if it is not done."""
        try:
            return np.asarray(np.load(self.folder / _RESULT_FILE, allow_pickle=False))
        except FileNotFoundError:
            return None

    def run(
        self,
        executor: Executor,
        work: Callable[[AnyTask], None],
        tasks: Sequence[AnyTask],
        title: str,
    ) -> None:
        """Do those of the tasks whose files are not there."""
        missing = []
        for task in tasks:
            if not task.output.exists():
                missing.append(task)
        num_done = len(tasks) - len(missing)
        with show_progress(len(tasks), title, "task", initial=num_done) as bar:
            for _ in executor.run(work, missing):
                bar.update()

    def finish(self, result: Result) -> None:
        """Keep the result, and remove the files of the tasks."""
        with atomic_write(self.folder / _RESULT_FILE) as file:
            np.save(file, result, allow_pickle=False)
        shutil.rmtree(self.tasks_folder)
