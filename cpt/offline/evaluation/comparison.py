"""`cpt evaluate`: run the tasks of a YAML on an export, and refuse it if one dropped too far.

task YAML -> checked, with the baseline -> model -> scores -> verdicts -> JSON, table, exit code
"""

from __future__ import annotations

from pathlib import Path

from cpt.errors import ConfigError
from cpt.offline.evaluation.harness import check_harness, score_harness
from cpt.offline.evaluation.local import local_contents, score_task
from cpt.offline.evaluation.scores import Result, Score, Verdict, read_result, write_result
from cpt.offline.evaluation.tasks import load_tasks
from cpt.offline.evaluation.verdict import (
    check_baseline,
    compare_with_baseline,
    refuse_drops,
    score_table,
)
from cpt.offline.plain_model import load_export


def evaluate(
    model_dir: Path, tasks_file: Path, out: Path, baseline_file: Path | None, batch_size: int = 1
) -> None:
    """Score an export on all tasks; everything known before it is checked before it is loaded.

    Args:
        model_dir: A Hugging Face directory that `cpt export` wrote.
        tasks_file: The task YAML.
        out: File for the result, as JSON.
        baseline_file: Result of the model before training; None if this is that model.
        batch_size: Batch size of lm-evaluation-harness.

    Raises:
        ConfigError: the tasks or the baseline cannot decide anything, or a task was not shown to be
            kept; in the latter case the result is written.
        DataError: a record cannot be used.
        EvaluationFailed: a drop is proven on a task; the result is written.
    """
    tasks = load_tasks(tasks_file)
    contents = local_contents(tasks)
    limits = {task.name: task.max_drop for task in tasks}
    baseline = read_result(baseline_file).scores if baseline_file is not None else None
    if baseline is not None:
        check_baseline(limits, contents, baseline)
    managers = check_harness(tasks)
    if baseline_file is not None and out.resolve() == baseline_file.resolve():
        raise ConfigError(f"--out {out} is the baseline. Choose another file.")
    model = load_export(model_dir)
    measured: dict[str, Score] = {}
    for task in tasks:
        if task.kind != "harness":
            measured[task.name] = score_task(task, model)
    measured |= score_harness(tasks, managers, model, model_dir, batch_size)
    scores = {task.name: measured[task.name] for task in tasks}
    verdicts: list[Verdict] = []
    if baseline is not None:
        verdicts = compare_with_baseline(limits, scores, baseline)
    write_result(out, Result(model=str(model_dir), scores=scores, verdicts=verdicts))
    print(f"{score_table(scores, verdicts)}\n-> {out}")
    refuse_drops(verdicts)
