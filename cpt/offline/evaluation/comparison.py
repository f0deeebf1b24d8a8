"""Run the tasks of a YAML on an export, compare them with a baseline, write the result, and refuse
what dropped.

task YAML -> checked, with the baseline -> model -> scores -> verdicts -> JSON, table -> exit code
"""

from __future__ import annotations

from pathlib import Path

from cpt.errors import ConfigError
from cpt.offline.evaluation.harness import check_harness, score_harness
from cpt.offline.evaluation.local import local_contents, score_task
from cpt.offline.evaluation.tasks import load_tasks
from cpt.offline.evaluation.verdict import (
    Score,
    check_baseline,
    judge,
    read_scores,
    refuse_drops,
    table,
    write_scores,
)
from cpt.offline.sampling import load_for_sampling


def evaluate(
    model_dir: Path, tasks_file: Path, out: Path, baseline_file: Path | None, batch_size: int = 1
) -> None:
    """Score an export on all tasks; all refusals come before the model is loaded, but those that
    need its scores.

    Args:
        model_dir: A Hugging Face directory that `cpt export` wrote.
        tasks_file: Task YAML.
        out: Gets the result as JSON.
        baseline_file: Result of the model before training; None makes one.
        batch_size: Of the harness.

    Raises:
        ConfigError: the tasks, or the baseline, cannot decide anything.
        DataError: records that cannot be used.
        EvaluationFailed: a task dropped by more than its limit; the result is written.
    """
    tasks = load_tasks(tasks_file)
    contents = local_contents(tasks)
    baseline = read_scores(baseline_file) if baseline_file is not None else None
    if baseline is not None:
        check_baseline(tasks, contents, baseline)
    check_harness(tasks)
    if baseline_file is not None and out.resolve() == baseline_file.resolve():
        raise ConfigError(f"--out {out} is the baseline. Choose another file.")
    model = load_for_sampling(model_dir, None)
    measured: dict[str, Score] = {
        task.name: score_task(task, model) for task in tasks if task.kind != "harness"
    }
    measured |= score_harness(tasks, model, model_dir, batch_size)
    scores = {task.name: measured[task.name] for task in tasks}
    verdicts = judge(tasks, scores, baseline) if baseline is not None else []
    write_scores(out, str(model_dir), scores, verdicts)
    print(f"{table(scores, verdicts)}\n-> {out}")
    refuse_drops(verdicts)
