"""`cpt replay`: let the base model write text for a source of `kind: self_replay`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import file_problems, model_problems, out_problems, refuse
from cpt.commands.shared_options import (
    add_ranks,
    add_sampling,
    rank_options,
    sampling_of,
    tell,
)


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "replay", help="let the base model write replay text (kind: self_replay)"
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face directory of the base model"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="new folder for plain.jsonl, chat.jsonl and the sidecar",
    )
    parser.add_argument(
        "--prefixes", type=Path, help="JSONL with 'text': the first tokens of each are continued"
    )
    parser.add_argument(
        "--questions", type=Path, help="JSONL with 'prompt': each is asked in the Harmony format"
    )
    parser.add_argument(
        "--prefix_tokens", type=int, default=8, help="tokens of each text that are continued"
    )
    add_sampling(parser, max_new_tokens=1024, temperature=1.0)
    add_ranks(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from cpt.offline.replay_request import ReplayRequest

    request = ReplayRequest(
        model_dir=options.model,
        out=options.out,
        prefixes=options.prefixes,
        questions=options.questions,
        prefix_tokens=options.prefix_tokens,
        sampling=sampling_of(options),
    )
    request.check()
    refuse(
        model_problems("--model", options.model),
        file_problems("--prefixes", options.prefixes),
        file_problems("--questions", options.questions),
        out_problems(options.out),
    )
    from cpt.offline.self_replay import sample_replay

    tell(sample_replay(request, rank_options(options)))
