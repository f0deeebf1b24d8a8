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

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cpt.config.engine_json import OWN_KEYS, REFUSED_KEYS, json_problems
from cpt.config.guard_section import DomainLimits, GuardSection
from cpt.config.resolve import resolve
from cpt.config.sections import (
    CheckpointSection,
    DataSection,
    LaunchInfo,
    RunConfig,
    RunYaml,
    TrainSection,
    WatchdogSection,
)
from cpt.errors import ConfigError
from data_pipeline.config.strict_yaml import Located, Reader, load_json, load_yaml

EXCLUSIVE_KEYS = {"model.path": "model.init", "model.init": "model.path"}
"""Keys of the run YAML of which a file has one: `--set` of either replaces the other."""

__all__ = [
    "OWN_KEYS",
    "REFUSED_KEYS",
    "CheckpointSection",
    "DataSection",
    "DomainLimits",
    "GuardSection",
    "LaunchInfo",
    "RunConfig",
    "RunYaml",
    "TrainSection",
    "WatchdogSection",
    "load",
    "resolve",
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
    reader = Reader(with_overrides(load_yaml(run_yaml), overrides))
    parsed = reader.read(RunYaml)
    problems = list(reader.problems)
    json_file = load_json(ds_json)
    problems += json_problems(json_file)
    if judge is not None:
        problems += judge(json_file)
    if problems:
        raise ConfigError(problems)
    assert parsed is not None
    return _with_paths_beside(parsed, run_yaml), json_file


def with_overrides(file: Located, overrides: dict[str, str]) -> Located:
    """Apply `--set`: a value replaces the file's, and one of `EXCLUSIVE_KEYS` replaces its rival.

    Raises:
        ConfigError: an override names no section.
    """
    changed = file.with_values(overrides)
    for key, rival in EXCLUSIVE_KEYS.items():
        section, _, name = key.partition(".")
        block = changed.value.get(section)
        if key not in overrides or rival in overrides or not isinstance(block, dict):
            continue
        if block.get(name) is not None:
            block.pop(rival.partition(".")[2], None)
    return changed


def _with_paths_beside(parsed: RunYaml, run_yaml: Path) -> RunYaml:
    """Read relative paths of the run YAML relative to the file."""
    folder = run_yaml.parent

    def beside(path: Path | None) -> Path | None:
        return None if path is None else (folder / path).resolve()

    mix = (folder / parsed.data.mix).resolve()
    data = replace(parsed.data, mix=mix, build_dir=beside(parsed.data.build_dir))
    model = replace(parsed.model, path=beside(parsed.model.path))
    train = replace(parsed.train, kl_targets=beside(parsed.train.kl_targets))
    return replace(parsed, model=model, data=data, train=train)
