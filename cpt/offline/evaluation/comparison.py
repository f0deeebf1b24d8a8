"""`cpt evaluate`: run the tasks of a YAML on a model, and refuse it if one dropped too far.

task YAML -> checked, with the baseline -> model -> scores -> verdicts -> JSON, table, exit code
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError
from cpt.offline.evaluation.harness import check_harness, score_harness
from cpt.offline.evaluation.local import local_contents
from cpt.offline.evaluation.local_scoring import score_local
from cpt.offline.evaluation.scored_model import ScoredModel
from cpt.offline.evaluation.scores import (
    Result,
    Score,
    Verdict,
    read_result,
    refuse_same_file,
    write_result,
)
from cpt.offline.evaluation.tasks import Task, load_tasks
from cpt.offline.evaluation.verdict import (
    check_baseline,
    compare_with_baseline,
    refuse_drops,
    score_table,
)
from cpt.offline.model import OfflineModel
from cpt.offline.pieces import kept_pieces, partial_folder
from cpt.offline.plain_model import DeviceMap
from cpt.offline.rank_options import RankOptions
from cpt.offline.ranks import offline_ranks
from cpt.resilience.environment import is_launched
from cpt.resilience.faults import fault_point
from data_pipeline.console.say import say

Conclude = Callable[[dict[str, Score]], list[dict[str, Any]]]
"""Takes the scores of all tasks; returns the verdicts as JSON values."""


def evaluate(
    scored: ScoredModel,
    tasks_file: Path,
    out: Path,
    baseline_file: Path | None,
    batch_size: int = 1,
    options: RankOptions | None = None,
    device_map: DeviceMap = "one",
) -> None:
    """Score a model on all tasks; everything known before it is checked before it is loaded.

    All ranks of a launcher call it together, if no task is lm-evaluation-harness's. What another
    start has computed is not computed again.

    Args:
        scored: The model: what `cpt export` wrote, or a checkpoint.
        tasks_file: The task YAML.
        out: File for the result, as JSON.
        baseline_file: Result of the model before training; None if this is that model.
        batch_size: Batch size of lm-evaluation-harness.
        options: How the ranks work together.
        device_map: Where the model of lm-evaluation-harness goes; the ranks share that of others.

    Raises:
        ConfigError: `out` is one of the inputs, the tasks or the baseline cannot decide anything,
            or a task was not shown to be kept; in the last case the result is written.
        DataError: a record cannot be used.
        EvaluationFailed: a drop is proven on a task; the result is written.
        RequeueRequested: a stop was asked for; what is computed stays for the next start.
    """
    refuse_same_file(out, {"--tasks": tasks_file, "--baseline": baseline_file})
    tasks = load_tasks(tasks_file)
    contents = local_contents(tasks)
    limits = {task.name: task.max_drop for task in tasks}
    baseline = read_result(baseline_file).scores if baseline_file is not None else None
    if baseline is not None:
        check_baseline(limits, contents, baseline)
    managers = check_harness(tasks)

    def conclude(measured: dict[str, Score]) -> list[dict[str, Any]]:
        """Write the result, and return the verdicts as JSON values."""
        scores = {task.name: measured[task.name] for task in tasks}
        verdicts: list[Verdict] = []
        if baseline is not None:
            verdicts = compare_with_baseline(limits, scores, baseline)
        write_result(out, Result(model=str(scored.path), scores=scores, verdicts=verdicts))
        say(f"{score_table(scores, verdicts)}\n-> {out}")
        return [asdict(verdict) for verdict in verdicts]

    local = [task for task in tasks if task.kind != "harness"]
    measured: dict[str, Score] = {}
    if len(local) < len(tasks):
        _refuse_ranks(tasks)
        plain_model = scored.plain(device_map)
        measured = score_harness(tasks, managers, plain_model, scored, batch_size)
    if local:
        verdicts = _on_ranks(scored, local, out, options or RankOptions(), measured, conclude)
    else:
        verdicts = conclude(measured)
    refuse_drops([Verdict(**verdict) for verdict in verdicts])


def _refuse_ranks(tasks: Sequence[Task]) -> None:
    """Refuse to run lm-evaluation-harness on several ranks.

    Raises:
        ConfigError: with the tasks.
    """
    if is_launched():
        names = ", ".join([task.name for task in tasks if task.kind == "harness"])
        raise ConfigError(
            f"tasks {names} run in lm-evaluation-harness, which works in one process here. Start "
            "without the launcher, or put the local tasks into a file of their own."
        )


def _on_ranks(
    scored: ScoredModel,
    tasks: Sequence[Task],
    out: Path,
    options: RankOptions,
    measured: dict[str, Score],
    conclude: Conclude,
) -> list[dict[str, Any]]:
    """Score local tasks on all ranks; the first one concludes, and all get its answer."""
    config = scored.config()
    weights = scored.weights()
    with offline_ranks(config, partial_folder(out), options) as ranks:
        ranks.refuse_different(scored.path.name)
        model = OfflineModel(config, ranks.topology)
        identity = {
            "command": "evaluate",
            "model": ranks.on_first(scored.identity),
            "tasks": list(local_contents(tasks).values()),
            "computed_in": str(model.dtype).removeprefix("torch."),
        }
        with kept_pieces(out, identity, ranks) as pieces:
            scores = measured | score_local(tasks, model, weights, pieces)

            def conclude_once() -> list[dict[str, Any]]:
                fault_point("offline_publish", 0)
                return conclude(scores)

            return ranks.on_first(conclude_once)
