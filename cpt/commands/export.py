"""`cpt export`: write a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

import argparse
import shlex
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
    tell,
)
from cpt.resilience.environment import rank_of_environment
from data_pipeline.console.say import complain, say

FORMATS = ("bf16", "mxfp4", "fp32", "peft", "trained")
"""Whole models as `cpt.export.huggingface.export_checkpoint` writes them, or the adapter alone.
`trained` is bf16 or mxfp4, whichever a forward pass of training computed with.
"""
EXPONENTS = ("floor", "ceil", "least")
"""`cpt.model.weights.mxfp4.EXPONENT_RULES`, which is not imported to parse a command line."""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("export", help="write a checkpoint as a Hugging Face directory")
    parser.add_argument("--run_dir", type=Path, required=True, help="run directory")
    add_step(parser)
    add_base(
        parser,
        "; with --format mxfp4 also of a whole model: the one that it started from, to tell how "
        "much of the training is kept",
    )
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument(
        "--format",
        default="bf16",
        help=f"{', '.join(FORMATS)} (mxfp4 if training rounded the experts, else bf16)",
    )
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
    _add_rules(parser)
    add_ranks(parser)
    parser.set_defaults(run=_run)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    """Add the options on the exponents of MXFP4."""
    parser.add_argument(
        "--exponent",
        choices=EXPONENTS,
        help="with --format mxfp4: rule for the exponent of a block of 32 weights; default: that "
        "of training if it rounded (train.quantize), else floor",
    )
    parser.add_argument(
        "--accept_rule_change",
        action="store_true",
        help="with --exponent: export a run that rounded in training by another rule",
    )
    parser.add_argument(
        "--score_rules",
        action="store_true",
        help="with --format mxfp4: score every exponent rule on the run's held-out text and print "
        "a table; exports only with --exponent",
    )


def _run(options: argparse.Namespace) -> None:
    refuse(
        _option_problems(options),
        own_run_dir_problems(options.run_dir),
        base_problems(options.base),
        out_problems(options.out),
    )
    from cpt.checkpoint.manifest import read_manifest
    from cpt.export.run_export import (
        ExportForm,
        export_run,
        export_with_rules,
        format_of_training,
    )

    folder = checkpoint_folder(options.run_dir, options.step)
    format_name = options.format
    if format_name == "trained":
        format_name = format_of_training(read_manifest(folder))
    form = ExportForm(
        format_name=format_name,
        adapter_dtype=options.dtype or "bf16",
        base=located_base(options.base),
        exponent=options.exponent,
        accepts_rule_change=options.accept_rule_change,
    )
    ranks = rank_options(options)
    if options.score_rules:
        tell(export_with_rules(options.run_dir, folder, options.out, form, ranks))
        if options.exponent is None:
            tell(how_to_export(options, folder))
            return
    else:
        export_run(options.run_dir, folder, options.out, form, options.score, ranks)
    if rank_of_environment() == 0:
        _describe(folder, options.out, format_name)


def _option_problems(options: argparse.Namespace) -> list[str]:
    """Return what options do not go together."""
    problems = []
    if options.format not in FORMATS:
        problems.append(f"--format {options.format} is none of {', '.join(FORMATS)}.")
    if options.dtype is not None and options.format != "peft":
        problems.append("--dtype is for --format peft only: the other formats name their dtype.")
    if options.base is not None and options.format == "peft":
        problems.append("--base is for merged models: --format peft writes the adapter alone.")
    if options.format != "mxfp4":
        for name in ("exponent", "accept_rule_change", "score_rules"):
            if getattr(options, name):
                problems.append(f"--{name} is for --format mxfp4: no other format has exponents.")
    if options.accept_rule_change and options.exponent is None:
        problems.append("--accept_rule_change needs --exponent: without it no rule is changed.")
    if options.score_rules and options.score == "never":
        problems.append("--score_rules scores, and --score never does not. Remove one of the two.")
    return problems


def how_to_export(options: argparse.Namespace, folder: Path) -> str:
    """Return how to go on after a comparison of the rules.

    The command names the step, because the run may save newer ones. It asks for the scores, because
    `--score auto` uses none for a large model on a CPU, and is refused on several ranks.
    """
    from cpt.checkpoint.manifest import read_manifest
    from cpt.checkpoint.run_state import quantized_by
    from cpt.export.exponent_choice import ACCEPT_OPTION

    manifest = read_manifest(folder)
    command = ["cpt", "export", "--run_dir", str(options.run_dir), "--step", str(manifest.step)]
    if options.base is not None:
        command += ["--base", str(options.base)]
    command += ["--format", "mxfp4", "--exponent", "RULE", "--score", "always"]
    command += ["--out", str(options.out)]
    trained = quantized_by(manifest)
    other = "" if trained is None else f" Any rule but {trained} needs {ACCEPT_OPTION}, too."
    return (
        "Nothing is exported yet. With RULE being one of these, this exports without scoring again "
        f"(add --score_rules to keep the table with the export).{other}\n    {shlex.join(command)}"
    )


def _describe(folder: Path, out: Path, format_name: str) -> None:
    """Say what to know of an export, and on stderr what to do something about."""
    from cpt.checkpoint.manifest import read_manifest
    from cpt.export.run_export import describe_export, warnings_of, warnings_of_masters

    say(f"{describe_export(out)}{folder} -> {out}")
    for warning in warnings_of(out) + warnings_of_masters(read_manifest(folder), format_name):
        complain(f"warning: {warning}")
