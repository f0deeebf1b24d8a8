"""`cpt evaluate`: run tasks on a model and compare the scores with those of a baseline."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import (
    base_problems,
    file_problems,
    model_problems,
    own_run_dir_problems,
    refuse,
)
from cpt.commands.shared_options import (
    add_base,
    add_device_map,
    add_ranks,
    add_step,
    checkpoint_folder,
    located_base,
    rank_options,
)
from cpt.errors import ConfigError


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "evaluate",
        help="run tasks on an export or a checkpoint; exit code 65 if a drop is proven, 78 if not "
        "all is kept",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="exported directory")
    where.add_argument("--run_dir", type=Path, help="run directory, for a checkpoint")
    add_step(parser)
    add_base(parser)
    parser.add_argument(
        "--tasks", type=Path, required=True, help="task YAML, such as configs/tasks/sample.yaml"
    )
    parser.add_argument("--out", type=Path, required=True, help="file for the result, as JSON")
    baseline = parser.add_mutually_exclusive_group()
    baseline.add_argument("--baseline", type=Path, help="result of the model before training")
    baseline.add_argument(
        "--no_baseline", action="store_true", help="this is the model before training: only measure"
    )
    parser.add_argument(
        "--batch_size", type=int, default=1, help="batch size of lm-evaluation-harness's tasks"
    )
    add_device_map(parser)
    add_ranks(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    problems = _baseline_problems(options)
    if options.run_dir is None and (options.step, options.base) != (None, None):
        problems.append("--step and --base are for the checkpoint of a run (--run_dir) only.")
    refuse(
        problems,
        own_run_dir_problems(options.run_dir),
        base_problems(options.base),
        model_problems("--model", options.model),
        file_problems("--tasks", options.tasks),
    )
    from cpt.offline.evaluation.tasks import load_tasks

    load_tasks(options.tasks)  # what is wrong there is told before the imports that follow
    from cpt.offline.evaluation.comparison import evaluate
    from cpt.offline.evaluation.scored_model import ExportedModel, ModelOfCheckpoint, ScoredModel

    scored: ScoredModel
    if options.model is not None:
        scored = ExportedModel(options.model)
    else:
        folder = checkpoint_folder(options.run_dir, options.step)
        scored = ModelOfCheckpoint(folder, located_base(options.base))
    evaluate(
        scored,
        options.tasks,
        options.out,
        options.baseline,
        options.batch_size,
        rank_options(options),
        options.device_map,
    )


def _baseline_problems(options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the result to compare with."""
    if options.baseline is not None:
        from cpt.offline.evaluation.scores import read_result

        try:
            read_result(options.baseline)
        except ConfigError as error:
            return error.problems
    elif not options.no_baseline:
        return [
            "--baseline is missing. Give the result of the model before training, or --no_baseline "
            "if this is that model."
        ]
    return []
