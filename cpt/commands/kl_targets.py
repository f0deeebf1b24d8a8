"""`cpt kl_targets`: write the base model's likeliest next tokens, for `train.kl_targets`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import folder_problems, model_problems, out_problems, refuse
from cpt.commands.shared_options import add_ranks, rank_options, tell


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "kl_targets", help="write the base model's likeliest next tokens, for train.kl_targets"
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face directory of the base model"
    )
    parser.add_argument(
        "--build", type=Path, required=True, help="directory of built shards, as in data.build_dir"
    )
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        help="source of that build; may be given several times",
    )
    parser.add_argument("--top_k", type=int, default=32, help="tokens listed per predicted token")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    add_ranks(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    refuse(
        model_problems("--model", options.model),
        folder_problems("--build", options.build),
        out_problems(options.out),
    )
    from cpt.offline.kl_target_writer import TargetsRequest, write_targets

    request = TargetsRequest(
        model_dir=options.model,
        build_dir=options.build,
        sources=options.source,
        top_k=options.top_k,
        out=options.out,
    )
    tell(write_targets(request, rank_options(options)))
