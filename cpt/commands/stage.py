"""`cpt stage`: copy what a run reads to a disk of this node; slurm/node.sh calls it on each."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.commands import Commands
from cpt.commands.shared_options import add_overrides, overrides_of
from cpt.errors import CptError
from data_pipeline.console.say import say

if TYPE_CHECKING:
    from cpt.config import DataSection, GuardSection

log = logging.getLogger("cpt.stage")


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "stage", help="copy build and weights of a run to a disk of this node (job templates do)"
    )
    parser.add_argument("--config", type=Path, required=True, help="run YAML")
    add_overrides(parser)
    parser.add_argument("--run_dir", type=Path, required=True, help="run directory")
    parser.add_argument("--to", type=Path, required=True, help="folder on a disk of this node")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    """Print a JSON object from paths on shared storage to those of the copies.

    What cannot be copied is told and left out.
    """
    overrides = overrides_of(options)
    from cpt.checkpoint.reader import list_steps
    from cpt.config import readable_parts
    from cpt.storage.local_copies import alone_in

    parts = readable_parts(options.config, overrides)
    staged: dict[str, str] = {}

    def attempt(stage_input: Callable[[], tuple[Path, Path] | None]) -> None:
        try:
            found = stage_input()
        except CptError as error:
            log.warning("%s It is read from shared storage.", error)
            return
        if found is not None:
            source, copy = found
            staged[str(source.resolve())] = str(copy)
            log.info("%s is read from %s", source, copy)

    with alone_in(options.to):
        data = parts.data
        if data is not None:
            attempt(lambda: _stage_build(data, options.to))
        path = parts.model.path if parts.model is not None else None
        adapter = parts.adapter
        has_adapter = adapter is not None and adapter.is_on
        # a checkpoint holds all weights, but not what lies below an adapter
        if path is not None and (has_adapter or not list_steps(options.run_dir)):
            attempt(lambda: _stage_model(path, options.to))
        baseline = _baseline_to_read(parts.guard, options.run_dir)
        if baseline is not None and baseline != path:
            attempt(lambda: _stage_model(baseline, options.to))
    say(json.dumps(staged))


def _baseline_to_read(guard: GuardSection | None, run_dir: Path) -> Path | None:
    """Return the model that the guard measures before the first step, unless that is over."""
    from cpt.checkpoint.reader import list_steps

    if guard is None or not guard.enabled or any(list_steps(run_dir)):
        return None  # the checkpoint of step 0 is an imported adapter, before the first step
    return guard.baseline_model


def _stage_build(settings: DataSection, root: Path) -> tuple[Path, Path] | None:
    """Copy the build of a mix; nothing if it is still to be built."""
    from cpt.storage.local_copies import stage
    from data_pipeline.build.found_builds import load_built_mix, only_build
    from data_pipeline.store.manifest import FILE_NAME, read_manifest

    folder = settings.build_dir
    if folder is None:
        folder = only_build(load_built_mix(settings.mix, None), settings.mix)
    if folder is None or not (folder / FILE_NAME).is_file():
        log.info("%s is not built yet: there is nothing to copy", settings.mix)
        return None
    return folder, stage(folder, [FILE_NAME, *read_manifest(folder).files], root)


def _stage_model(path: Path, root: Path) -> tuple[Path, Path] | None:
    """Copy a model; nothing of a checkpoint, of which a rank reads a third, and its part only."""
    from cpt.checkpoint.starting_model import located
    from cpt.model.missing_model import is_checkpoint

    found = located(path)
    if is_checkpoint(found):
        log.info("%s is read from where it lies", found)
        return None
    return _stage_weights(found, root)


def _stage_weights(path: Path, root: Path) -> tuple[Path, Path]:
    """Copy what is read of a Hugging Face directory, and compare the known hashes.

    Raises:
        ConfigError: the directory holds no weights, or the copy is damaged.
        StorageError: it cannot be copied.
    """
    import shutil

    from cpt.errors import ConfigError
    from cpt.model.weights.checksums import SUMS_FILE, damaged, known_sums
    from cpt.model.weights.hf_layout import INDEX_FILE, tensor_files
    from cpt.storage.local_copies import stage

    weights = sorted({file.name for file in tensor_files(path).values()})
    names = list(weights)
    for name in (INDEX_FILE, SUMS_FILE):
        if (path / name).is_file():
            names.append(name)
    copy = stage(path, names, root)
    sums = known_sums(copy, [copy / name for name in weights])
    problems = damaged(sums, sums)
    if problems:
        shutil.rmtree(copy)
        raise ConfigError(problems)
    return path, copy
