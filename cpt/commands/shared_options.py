"""Options that several subcommands have in common, and how their values are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.errors import CheckpointError, ConfigError
from cpt.resilience.environment import rank_of_environment, restore_gpu_ids
from data_pipeline.console.say import complain, say

if TYPE_CHECKING:
    from cpt.offline.rank_options import RankOptions
    from cpt.training.sampling_settings import Sampling


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, which overrides values of the run YAML."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a YAML value"
    )


def overrides_of(options: argparse.Namespace) -> dict[str, str]:
    """Return the values of `--set` by key.

    Raises:
        ConfigError: one of them has no '='.
    """
    overrides = {}
    for item in options.set:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set {item} has no '='. Write --set section.key=value.")
        overrides[key] = value
    return overrides


def add_step(parser: argparse.ArgumentParser) -> None:
    """Add `--step`, the number of a checkpoint."""
    parser.add_argument("--step", type=int, help="default: the newest complete checkpoint")


def add_base(parser: argparse.ArgumentParser, further_use: str = "") -> None:
    """Add `--base`, the model below the adapter of a checkpoint.

    Args:
        parser: The parser.
        further_use: What else a subcommand reads it for, as a clause.
    """
    parser.add_argument(
        "--base",
        type=Path,
        help=f"of an adapter's checkpoint: the model below it, as model.path names one{further_use}"
        "; default: where it was in training",
    )


def located_base(path: Path | None) -> Path | None:
    """Return the directory or the checkpoint that `--base` means; None was not given.

    Raises:
        ConfigError: see `cpt.checkpoint.starting_model.located`.
    """
    from cpt.checkpoint.starting_model import located

    return None if path is None else located(path, "--base")


def checkpoint_folder(run_dir: Path, step: int | None) -> Path:
    """Return the folder of a verified checkpoint; print on stderr why newer ones were rejected.

    Args:
        run_dir: The run directory.
        step: Step of the checkpoint; None for the newest complete one.

    Raises:
        ConfigError: the run directory does not exist.
        CheckpointError: it holds no checkpoint, or the one of `step` is damaged.
    """
    from cpt.checkpoint.reader import find_checkpoint, step_folder

    if not run_dir.is_dir():
        raise ConfigError(f"--run_dir {run_dir} does not exist.")
    found, rejected = find_checkpoint(run_dir, "auto" if step is None else str(step))
    for reason in rejected:
        complain(f"checkpoint rejected: {reason}")
    if found is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint yet.")
    return step_folder(run_dir, found)


def add_sampling(
    parser: argparse.ArgumentParser, *, max_new_tokens: int, temperature: float
) -> None:
    """Add the options that say how tokens are drawn, with the defaults of a subcommand."""
    parser.add_argument(
        "--max_new_tokens", type=int, default=max_new_tokens, help="tokens to generate at most"
    )
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="0: always the likeliest token"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the smallest set of tokens with this total probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Return the sampling settings of a command line."""
    from cpt.training.sampling_settings import Sampling

    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )


def add_device_map(parser: argparse.ArgumentParser) -> None:
    """Add `--device_map`, for a model that one process computes."""
    parser.add_argument(
        "--device_map",
        choices=("one", "auto"),
        default="one",
        help="one GPU, or the processors if there is none; auto: over all GPUs of this machine, "
        "its memory, and a temporary folder, for a model that is larger than one GPU",
    )


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that all ranks of a launcher do together."""
    parser.add_argument(
        "--ep_size",
        type=int,
        help="under a launcher: ranks that share one set of experts; default: the largest that "
        "divides the ranks of a node, or more if the model does not fit otherwise",
    )
    parser.add_argument(
        "--save_every",
        type=int,
        default=64,
        help="rows, texts or prompts of a rank after which results are kept; a command that was "
        "killed goes on from there",
    )


def rank_options(options: argparse.Namespace) -> RankOptions:
    """Return how the ranks of a command work together."""
    from cpt.offline.rank_options import RankOptions

    restore_gpu_ids()
    return RankOptions(ep_size=options.ep_size, save_every=options.save_every)


def tell(text: str) -> None:
    """Print on the first rank."""
    if rank_of_environment() == 0:
        say(text)
