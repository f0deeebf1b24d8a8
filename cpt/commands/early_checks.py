"""Checks of a command's arguments that need no library: they come before imports, which take
seconds.

Each returns problems as sentences; `refuse` tells all of a command's in one message.  What needs
the content of a large file is checked later, by the code that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpt.errors import ConfigError
from cpt.model.missing_model import CONFIG, is_checkpoint, run_and_step, why_no_model
from cpt.resilience.environment import is_launched
from data_pipeline.store.ownership import RUN_FOLDERS, foreign_problems


def refuse(*problems: Sequence[str]) -> None:
    """Refuse a command line.

    Raises:
        ConfigError: there are problems; it carries all of them.
    """
    found: list[str] = []
    for some in problems:
        found += some
    if found:
        raise ConfigError(found)


def run_dir_problems(run_dir: Path | None) -> list[str]:
    """Return the problem of a run directory that is not there; None was not given."""
    if run_dir is None or run_dir.is_dir():
        return []
    return [f"--run_dir {run_dir} does not exist."]


def own_run_dir_problems(run_dir: Path | None) -> list[str]:
    """Return why a command may not read back, or write to, a run directory; None was not given.

    Commands that only show a run (status, watch, compare, checkpoints, guard audit) take those of
    other users, too.
    """
    if run_dir is None or not run_dir.is_dir():
        return run_dir_problems(run_dir)
    return foreign_problems(run_dir, "run directory", RUN_FOLDERS)


def model_problems(option: str, path: Path | None) -> list[str]:
    """Return the problem of a directory without a model's config.json; None was not given."""
    if path is None or (path / CONFIG).is_file():
        return []
    return [f"{option}: {why_no_model(path)}"]


def base_problems(path: Path | None) -> list[str]:
    """Return the problem of a --base that is neither a model, nor a run or checkpoint of one; None
    was not given.
    """
    if path is not None and (run_and_step(path)[0] is not None or is_checkpoint(path)):
        return []
    return model_problems("--base", path)


def file_problems(option: str, file: Path | None) -> list[str]:
    """Return the problem of an input file that is not there; None was not given."""
    if file is None or file.is_file():
        return []
    return [f"{option} {file}: no such file."]


def folder_problems(option: str, folder: Path | None) -> list[str]:
    """Return the problem of an input folder that is not there; None was not given."""
    if folder is None or folder.is_dir():
        return []
    return [f"{option} {folder}: no such folder."]


def out_problems(out: Path) -> list[str]:
    """Return the problem of an output that would overwrite something.

    Under a launcher the first rank looks later: it may have written it before another rank looks.
    """
    if is_launched() or not out.exists():
        return []
    return [f"{out} exists already and is not overwritten. Remove it or give another --out."]
