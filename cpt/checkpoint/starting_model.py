"""The model that a run starts from: a Hugging Face directory, or a checkpoint of another run.

    models/gpt-oss-20b          a directory with config.json and safetensors
    runs/cpt                    a run directory: its newest complete checkpoint
    runs/cpt@2000               the checkpoint of one step
    runs/cpt/checkpoints/step-00002000    the same

`located` turns the second and third form into the fourth before anything else looks at the path, so
that the configuration of a run names one checkpoint. Of a checkpoint the fp32 master weights are
read, and nothing of its optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import GptOssConfig

from cpt.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_hashes,
    check_listing,
    fp32_records,
    read_manifest,
    share_of_files,
)
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.reader import (
    candidates,
    check_same_tensors,
    list_steps,
    refusal_unread,
    step_folder,
)
from cpt.checkpoint.run_state import RunState, quantized_by
from cpt.checkpoint.weights import CheckpointWeights
from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.model.missing_model import is_checkpoint, run_and_step, run_of
from cpt.model.weights.directory import check_directory
from cpt.model.weights.hf_layout import tensor_files
from cpt.parallel.agreement import together
from cpt.parallel.topology import Topology


def located(path: Path, key: str = "model.path", kept: Path | None = None) -> Path:
    """Return the directory that a path of the run YAML means: of a run, one checkpoint.

    Args:
        path: What the run YAML names.
        key: Its key, for the message.
        kept: What an earlier start of the same run has made of the path; None if there was none. A
            run directory means that checkpoint then, also if it has newer ones by now.

    Returns:
        The path itself, unless it names a run.

    Raises:
        ConfigError: the run has no complete checkpoint, or not that of the step asked for.
    """
    run_dir, step = run_and_step(path)
    if run_dir is None:
        return path
    if step is None and kept is not None and kept.parent == run_dir / "checkpoints":
        return kept
    try:
        steps = candidates(run_dir, "auto" if step is None else str(step))
    except ConfigError as error:
        raise ConfigError([f"{key}: {problem}" for problem in error.problems]) from error
    rejected = []
    for candidate in steps:
        folder = step_folder(run_dir, candidate)
        reason = refusal_unread(folder)
        if reason is None:
            return folder
        rejected.append(reason)
    found = "; ".join(rejected) or "it has saved none yet"
    raise ConfigError(
        f"{key}: the run {run_dir} has no complete checkpoint to start from ({found}). Wait for "
        "one, or give another model."
    )


def own_checkpoint_problems(key: str, path: Path, run_dir: Path) -> list[str]:
    """Return the problem of a located path that is a checkpoint of the run that is to start.

    Args:
        key: Its key in the run YAML, for the message.
        path: The located path.
        run_dir: The run directory of the start.
    """
    own = run_of(path)
    if own is None or own.resolve() != run_dir.resolve():
        return []
    return [
        f"{key}: {path} is a checkpoint of this run itself, whose --run_dir is {run_dir}. To go on "
        f"with the run, give the {key} that it began with; to start another run from the "
        "checkpoint, give a new --run_dir."
    ]


def starting_config(path: Path | None, preset: str | None) -> GptOssConfig:
    """Return the architecture of a located path, or of a preset.

    Raises:
        ConfigError: see `cpt.model.configuration.load_config`.
        CheckpointError: the manifest of a checkpoint is damaged, or holds no sound configuration.
    """
    if path is not None and is_checkpoint(path):
        return model_config_of(read_manifest(path))
    return load_config(path, preset)


def check_starting_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a located path with those of a model, without reading them.

    Raises:
        ConfigError: see `cpt.model.weights.directory.check_directory`.
        CheckpointError: a file of a checkpoint is missing or has another size, or its tensors are
            others.
    """
    if is_checkpoint(path):
        manifest = read_manifest(path)
        check_listing(path, manifest)
        _check_tensors(path, manifest, shapes)
    else:
        check_directory(path, shapes)


def _check_tensors(path: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if RunState.of(manifest).adapter is not None:
        run_dir = run_of(path)
        raise ConfigError(
            f"{path} holds an adapter alone, without the model below it. Write the merged model, "
            f"and give that: cpt export --run_dir {run_dir or 'RUN'} --step {manifest.step} --out "
            "DIRECTORY"
        )
    check_same_tensors(str(path), manifest.tensors, fp32_records(shapes))


def weight_files(path: Path) -> list[Path]:
    """Return the files by which the weights of a located path are known (`weights_identity`).

    Of a checkpoint that is its manifest, which holds the hashes of all others.

    Raises:
        ConfigError: see `cpt.model.weights.hf_layout.tensor_files`.
    """
    if is_checkpoint(path):
        return [path / MANIFEST]
    return sorted(set(tensor_files(path).values()))


class StartingCheckpoint:
    """The `WeightSource` of a checkpoint of another run: its fp32 master weights."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Read what the checkpoint holds.

        Raises:
            CheckpointError: it is damaged, or its tensors are not those of the model.
        """
        self.folder = folder
        self._manifest = read_manifest(folder)
        _check_tensors(folder, self._manifest, shapes)
        self._weights = CheckpointWeights(folder, self._manifest, torch.float32)

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the values piece by piece; see `cpt.model.weights.source.WeightSource`."""
        yield from self._weights.pieces(name, start, stop)

    def verify(self, topology: Topology) -> int:
        """Hash all files, each on one rank; all ranks call it together.

        Returns:
            The number of files.

        Raises:
            CheckpointError: on all ranks: a file is not the one that was written.
        """
        files = self._manifest.files
        mine = share_of_files(files, topology.rank, topology.world_size)
        together(topology.control_group, lambda: check_hashes(self.folder, mine))
        return len(files)


def unfinished_warning(path: Path) -> str:
    """Return what to say of a checkpoint that its run may delete; empty if there is nothing.

    A run that goes on deletes old checkpoints, and one that started from them is then refused. An
    export has another hash than its checkpoint, so a run that has begun cannot change over to it.
    """
    run_dir = run_of(path)
    if run_dir is None or not is_checkpoint(path):
        return ""
    newest = list_steps(run_dir)[:1]
    manifest = read_manifest(path)
    train = (manifest.state.get("config") or {}).get("train") or {}
    last_step = train.get("total_steps")
    if newest == [manifest.step] and manifest.step == last_step:
        return ""
    return (
        f"model.path is the checkpoint of step {manifest.step} of {run_dir}, which is not the last "
        "of that run. If that run goes on, it deletes old checkpoints (checkpoint.keep_last), and "
        "this run cannot be resumed without the one that it began with. Before this run trains, "
        "either raise checkpoint.keep_last of that run, or export the checkpoint and give the "
        f"export as model.path: cpt export --run_dir {run_dir} --step {manifest.step} --out "
        "DIRECTORY --format fp32"
    )


def masters_warning(key: str, path: Path) -> str:
    """Return what to say of a checkpoint whose experts were rounded in training; empty for others.

    Args:
        key: The key of the run YAML that names it.
        path: The located path.

    Raises:
        CheckpointError: its manifest is damaged.
    """
    if not is_checkpoint(path):
        return ""
    manifest = read_manifest(path)
    rule = quantized_by(manifest)
    if rule is None:
        return ""
    return (
        f"{key}: the run of {path} rounded its experts (train.quantize, {rule}). The master "
        "weights are read, with which no forward pass has computed. For the model that was "
        f"trained, name its export: cpt export --run_dir {run_of(path) or 'RUN'} --step "
        f"{manifest.step} --out DIRECTORY --format mxfp4"
    )
