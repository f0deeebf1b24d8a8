"""`cpt export`: write a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import (
    base_problems,
    out_problems,
    own_run_dir_problems,
    refuse,
)
from cpt.commands.shared_options import (
    add_base,
    add_ranks,
    add_step,
    checkpoint_folder,
    located_base,
    rank_options,
)
from cpt.resilience.environment import rank_of_environment
from data_pipeline.console.say import say

FORMATS = ("bf16", "mxfp4", "fp32", "peft")
"""Whole models as `cpt.export.huggingface.export_checkpoint` writes them, or the adapter alone."""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("export", help="write a checkpoint as a Hugging Face directory")
    parser.add_argument("--run_dir", type=Path, required=True, help="run directory")
    add_step(parser)
    add_base(parser)
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument("--format", default="bf16", help=", ".join(FORMATS))
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        help="with --format peft: dtype of the adapter; default: bf16",
    )
    parser.add_argument(
        "--score",
        choices=("auto", "always", "never"),
        default="auto",
        help="with --format mxfp4: score the quantized weights on the run's held-out text; "
        "auto does it if the text is there and the model is small enough, in one process only",
    )
    add_ranks(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    problems = []
    if options.format not in FORMATS:
        problems.append(f"--format {options.format} is none of {', '.join(FORMATS)}.")
    if options.dtype is not None and options.format != "peft":
        problems.append("--dtype is for --format peft only: the other formats name their dtype.")
    if options.base is not None and options.format == "peft":
        problems.append("--base is for merged models: --format peft writes the adapter alone.")
    refuse(
        problems,
        own_run_dir_problems(options.run_dir),
        base_problems(options.base),
        out_problems(options.out),
    )
    from cpt.export.run_export import ExportForm, describe_export, export_run

    folder = checkpoint_folder(options.run_dir, options.step)
    form = ExportForm(
        format_name=options.format,
        adapter_dtype=options.dtype or "bf16",
        base=located_base(options.base),
    )
    out = export_run(
        options.run_dir, folder, options.out, form, options.score, rank_options(options)
    )
    if rank_of_environment() == 0:
        say(f"{describe_export(out)}{folder} -> {out}")
