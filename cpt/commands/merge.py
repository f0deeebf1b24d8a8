"""`cpt merge`: interpolate between the weights before and after training."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import (
    file_problems,
    folder_problems,
    model_problems,
    out_problems,
    refuse,
)
from cpt.commands.shared_options import add_ranks, rank_options, tell


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "merge", help="interpolate between the weights before and after training"
    )
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        help="Hugging Face directory of the model before training",
    )
    parser.add_argument(
        "--tuned",
        type=Path,
        required=True,
        help="Hugging Face directory of the model after training",
    )
    parser.add_argument(
        "--alpha", default="0.0:1.0:0.1", help="shares of the tuned model: FROM:TO:STEP or A,B,C"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="new directory, with one model per alpha in it"
    )
    parser.add_argument(
        "--mix", type=Path, help="data-mix YAML whose held-out text is scored for every alpha"
    )
    parser.add_argument(
        "--build_dir", type=Path, help="where that mix is built; default: as in training"
    )
    parser.add_argument(
        "--max_documents", type=int, default=256, help="documents scored per held-out domain"
    )
    parser.add_argument(
        "--score_only", action="store_true", help="write scores and a plot, but no weights"
    )
    add_ranks(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    problems = []
    if options.score_only and options.mix is None:
        problems.append("--score_only needs --mix: there is nothing to score.")
    refuse(
        problems,
        model_problems("--base", options.base),
        model_problems("--tuned", options.tuned),
        file_problems("--mix", options.mix),
        folder_problems("--build_dir", options.build_dir),
        out_problems(options.out),
    )
    from cpt.export.merge_sweep import merge
    from cpt.offline.model import held_out_sets

    ranks = rank_options(options)
    sets = []
    if options.mix is not None:
        sets = held_out_sets(options.mix, options.build_dir, options.max_documents)
    text = merge(
        options.base,
        options.tuned,
        options.alpha,
        options.out,
        sets,
        score_only=options.score_only,
        options=ranks,
    )
    tell(f"{text}\n-> {options.out}")
