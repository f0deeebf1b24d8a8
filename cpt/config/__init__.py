"""Read run YAML, DeepSpeed JSON and command line into one validated `RunConfig`.

Stages
    1. each file is parsed on its own (types, unknown keys, ranges), all problems gathered;
    2. `resolve` brings the two files, the model and the world size together: `auto` values get
    numbers, and what
       cannot be right (divisibility, batch arithmetic, two files that disagree) is refused, all in
       one message.

The DeepSpeed engine receives `RunConfig.engine_json`: the user's JSON without this project's own
keys (`sequence_parallel_size`, `expert_parallel`, `optimizer`) and with every `auto` resolved.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cpt.config.adapter_section import AdapterSection
from cpt.config.engine_json import OWN_KEYS, REFUSED_KEYS, json_problems
from cpt.config.guard_section import DomainLimits, GuardSection
from cpt.config.resolve import resolve
from cpt.config.sections import (
    CheckpointSection,
    DataSection,
    LaunchInfo,
    ModelSection,
    RunConfig,
    RunYaml,
    StageSection,
    TelemetrySection,
    TrainSection,
    WatchdogSection,
)
from cpt.config.stages import files_of_stage, resolve_stages
from cpt.errors import ConfigError
from data_pipeline.config.strict_yaml import Located, Reader, load_json, load_yaml

EXCLUSIVE_KEYS = {"model.path": "model.init", "model.init": "model.path"}
"""Keys of the run YAML of which a file has one: `--set` of either replaces the other."""

PATH_KEYS = (
    "model.path",
    "data.mix",
    "data.build_dir",
    "train.kl_targets",
    "guard.baseline_model",
)
"""Keys of the run YAML that are paths."""

__all__ = [
    "OWN_KEYS",
    "REFUSED_KEYS",
    "CheckpointSection",
    "DataSection",
    "DomainLimits",
    "GuardSection",
    "LaunchInfo",
    "ModelSection",
    "ReadableParts",
    "RunConfig",
    "RunYaml",
    "StageSection",
    "TelemetrySection",
    "TrainSection",
    "WatchdogSection",
    "files_of_stage",
    "load",
    "load_run_yaml",
    "readable_parts",
    "resolve",
    "resolve_stages",
]


def load(
    run_yaml: Path,
    ds_json: Path,
    overrides: dict[str, str],
    judge: Callable[[Located], list[str]] | None = None,
) -> tuple[RunYaml, Located]:
    """Read both files.

    Args:
        run_yaml: The run YAML.
        ds_json: The DeepSpeed JSON.
        overrides: Values of `--set` by dotted key.
        judge: Returns further problems of the DeepSpeed JSON; only rooms that import DeepSpeed can
            ask its own classes.

    Returns:
        The run YAML, and the DeepSpeed JSON with the line of each key.

    Raises:
        ConfigError: everything that is wrong in either file alone.
    """
    problems: list[str] = []
    parsed = None
    try:
        parsed = load_run_yaml(run_yaml, overrides)
    except ConfigError as error:
        problems += error.problems
    json_file = None
    try:
        json_file = load_json(ds_json)
        problems += json_problems(json_file)
        if judge is not None:
            problems += judge(json_file)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    assert parsed is not None and json_file is not None
    return parsed, json_file


def load_run_yaml(run_yaml: Path, overrides: dict[str, str]) -> RunYaml:
    """Read a run YAML without its DeepSpeed JSON.

    Args:
        run_yaml: The run YAML.
        overrides: Values of `--set` by dotted key.

    Raises:
        ConfigError: everything that is wrong in it alone.
    """
    reader = Reader(with_overrides(load_yaml(run_yaml), overrides, run_yaml.parent))
    parsed = reader.read(RunYaml)
    if reader.problems:
        raise ConfigError(reader.problems)
    assert parsed is not None
    return _with_paths_beside(parsed, run_yaml)


def with_overrides(file: Located, overrides: dict[str, str], folder: Path) -> Located:
    """Apply `--set`: a value replaces the file's, and one of `EXCLUSIVE_KEYS` replaces its rival.

    Args:
        file: The run YAML.
        overrides: Values of `--set` by dotted key.
        folder: That of the run YAML.

    Raises:
        ConfigError: an override names no section; see also `with_shell_paths`.
    """
    changed = file.with_values(overrides)
    if not isinstance(changed.value, dict):
        return changed  # the reader says what it should be
    changed = with_shell_paths(changed, overrides, folder)
    for key, rival in EXCLUSIVE_KEYS.items():
        section, _, name = key.partition(".")
        block = changed.value.get(section)
        if key not in overrides or rival in overrides or not isinstance(block, dict):
            continue
        if block.get(name) is not None:
            block.pop(rival.partition(".")[2], None)
    return changed


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadableParts:
    """The sections of a run YAML that are right by themselves; the others may be wrong."""

    model: ModelSection | None
    """None if something in it is wrong."""
    data: DataSection | None
    """None if something in it is wrong."""
    adapter: AdapterSection | None
    """None if something in it is wrong."""
    guard: GuardSection | None
    """None if something in it is wrong."""
    seq_len: int | None
    """`train.seq_len`; None if it is no whole number."""


def readable_parts(run_yaml: Path, overrides: dict[str, str]) -> ReadableParts:
    """Return what a run YAML that `load` refuses names all the same, so that it can be checked too.

    Raises:
        ConfigError: the file cannot be read at all.
    """
    located = with_overrides(load_yaml(run_yaml), overrides, run_yaml.parent)
    sections = located.value if isinstance(located.value, dict) else {}
    reader = Reader(located)
    model = reader.read(ModelSection, sections.get("model"), ("model",))
    data = reader.read(DataSection, sections.get("data"), ("data",))
    adapter = reader.read(AdapterSection, sections.get("adapter") or {}, ("adapter",))
    guard = reader.read(GuardSection, sections.get("guard") or {}, ("guard",))
    train = sections.get("train")
    seq_len = train.get("seq_len") if isinstance(train, dict) else None
    folder = run_yaml.parent
    return ReadableParts(
        model=None if model is None else _model_beside(model, folder),
        data=None if data is None else _data_beside(data, folder),
        adapter=adapter,
        guard=None if guard is None else _guard_beside(guard, folder),
        seq_len=seq_len if type(seq_len) is int else None,
    )


def _with_paths_beside(parsed: RunYaml, run_yaml: Path) -> RunYaml:
    """Read relative paths of the run YAML relative to the file."""
    folder = run_yaml.parent
    train = replace(parsed.train, kl_targets=_beside(parsed.train.kl_targets, folder))
    return replace(
        parsed,
        model=_model_beside(parsed.model, folder),
        data=_data_beside(parsed.data, folder),
        train=train,
        guard=_guard_beside(parsed.guard, folder),
    )


def _model_beside(model: ModelSection, folder: Path) -> ModelSection:
    return replace(model, path=_beside(model.path, folder))


def _guard_beside(guard: GuardSection, folder: Path) -> GuardSection:
    return replace(guard, baseline_model=_beside(guard.baseline_model, folder))


def _data_beside(data: DataSection, folder: Path) -> DataSection:
    mix = absolute(data.mix, folder)
    return replace(data, mix=mix, build_dir=_beside(data.build_dir, folder))


def _beside(path: Path | None, folder: Path) -> Path | None:
    return None if path is None else absolute(path, folder)


def absolute(path: Path, folder: Path) -> Path:
    """Return a path as one from the root; a relative one is taken as relative to a folder."""
    return (folder / os.path.expanduser(path)).resolve()


def with_shell_paths(file: Located, overrides: Mapping[str, str], folder: Path) -> Located:
    """Read paths of `--set` relative to the working directory, as those of all other options.

    Args:
        file: The run YAML, with the overrides.
        overrides: Values of `--set` by dotted key.
        folder: That of the run YAML, to which its own paths are relative.

    Raises:
        ConfigError: a path exists only relative to the run YAML.
    """
    value = copy.deepcopy(file.value)
    problems = []
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        block = value.get(section)
        text = block.get(name) if isinstance(block, dict) else None
        if not isinstance(text, str) or not {key, section} & overrides.keys():
            continue
        meant = absolute(Path(text), Path.cwd())
        beside_file = absolute(Path(text), folder)
        if not meant.exists() and beside_file.exists():
            problems.append(
                f"--set {key}={text}: {meant} does not exist, but {beside_file} does. Paths of "
                "--set are relative to the working directory, those in the run YAML to the file. "
                "Give the one that you mean from the root."
            )
        block[name] = str(meant)
    if problems:
        raise ConfigError(problems)
    return replace(file, value=value)
