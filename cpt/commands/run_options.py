"""The options of a run, for cpt/run.py and for `cpt train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands.project_files import project_files
from cpt.commands.shared_options import add_overrides


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run."""
    parser.add_argument("--ds_config", type=Path, required=True, help="DeepSpeed JSON")
    parser.add_argument("--config", type=Path, default=default_config(), help="run YAML")
    add_overrides(parser)
    parser.add_argument("--run_dir", type=Path, help="default: runs/<name of the run YAML>")
    parser.add_argument("--resume", default="auto", help="auto, never, or a step")
    parser.add_argument(
        "--dry_run", action="store_true", help="check and print everything, load nothing"
    )
    parser.add_argument(
        "--sample",
        action="append",
        metavar="TEXT",
        help="continue a text, on all ranks; do not train",
    )
    parser.add_argument(
        "--measure", action="store_true", help="score the held-out text once; do not train"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="refuse a layout that does not fit on this GPU (h100, h200, ...); default: the GPU of "
        "this machine, if there is one; any: do not check",
    )


def default_config() -> Path:
    """Return the run YAML of the sample: the repository's, else the one that `cpt init` wrote."""
    files = project_files()
    if files.is_repository:
        return files.folder / "configs" / "tiny.yaml"
    return Path("configs") / "tiny.yaml"
