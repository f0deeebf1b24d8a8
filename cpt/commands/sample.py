"""`cpt sample`: continue a text, or answer a question, with an export or a checkpoint."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import base_problems, model_problems, own_run_dir_problems, refuse
from cpt.commands.shared_options import (
    add_base,
    add_device_map,
    add_sampling,
    add_step,
    checkpoint_folder,
    located_base,
    sampling_of,
)
from data_pipeline.console.say import say


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "sample", help="continue a text with an export or a checkpoint of a run"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run_dir", type=Path, help="run directory, for a checkpoint")
    where.add_argument("--model", type=Path, help="exported directory")
    add_step(parser)
    add_base(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="text to continue; may be given several times",
    )
    add_sampling(parser, max_new_tokens=64, temperature=0.0)
    parser.add_argument(
        "--chat", action="store_true", help="ask the prompt as a question, in the Harmony format"
    )
    parser.add_argument("--developer", help="with --chat: instructions for the model")
    parser.add_argument(
        "--effort", choices=("low", "medium", "high"), help="with --chat: reasoning effort"
    )
    add_device_map(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    sampling = sampling_of(options)
    problems = sampling.problems()
    if not all(options.prompt):
        problems.append("--prompt is empty. Give some text to continue.")
    if not options.chat and (options.developer or options.effort):
        problems.append("--developer and --effort are for --chat only.")
    if options.base is not None and options.run_dir is None:
        problems.append("--base is for the checkpoint of an adapter (--run_dir) only.")
    refuse(
        problems,
        own_run_dir_problems(options.run_dir),
        model_problems("--model", options.model),
        base_problems(options.base),
    )
    from cpt.offline.plain_model import load_checkpoint, load_export
    from cpt.offline.sampling import decode_channels, decode_tokens, generate
    from data_pipeline.text.harmony import encode_prompt
    from data_pipeline.text.tokenizer import encode

    if options.model is not None:
        model = load_export(options.model, options.device_map)
    else:
        folder = checkpoint_folder(options.run_dir, options.step)
        model = load_checkpoint(folder, options.device_map, located_base(options.base))
    for prompt in options.prompt:
        if options.chat:
            ids = encode_prompt(
                prompt,
                developer=options.developer,
                effort=options.effort or "medium",
                date=datetime.date.today(),
            )
            reply = decode_channels(generate(model, ids, sampling))
        else:
            reply = decode_tokens(generate(model, encode(prompt).tolist(), sampling))
        say(f"--- {prompt}\n{reply}")
