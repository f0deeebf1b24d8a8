"""`cpt import-adapter`: a PEFT directory as the first checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import file_problems, folder_problems, refuse
from cpt.commands.shared_options import add_overrides, overrides_of
from data_pipeline.console.say import say


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "import-adapter", help="write a PEFT directory as the checkpoint of step 0 of a new run"
    )
    parser.add_argument("adapter", type=Path, help="directory that PEFT's save_pretrained wrote")
    parser.add_argument("--config", type=Path, required=True, help="run YAML, with its adapter")
    add_overrides(parser)
    parser.add_argument("--run_dir", type=Path, required=True, help="new run directory")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    refuse(folder_problems("ADAPTER", options.adapter), file_problems("--config", options.config))
    overrides = overrides_of(options)
    from cpt.checkpoint.starting_model import located, starting_config
    from cpt.config import load_run_yaml
    from cpt.export.adapter_import import ImportRequest, import_adapter

    run = load_run_yaml(options.config, overrides)
    base = None if run.model.path is None else located(run.model.path)
    request = ImportRequest(
        source=options.adapter,
        run_dir=options.run_dir,
        section=run.adapter,
        base_path=base,
        seed=run.train.seed,
        dtype=run.train.dtype,
        config=starting_config(base, run.model.init),
    )
    say(f"{options.adapter} -> {import_adapter(request)}")
