"""Run YAML + DeepSpeed JSON + command line -> one validated `RunConfig`.

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

import dataclasses
from pathlib import Path

from cpt.config.engine_json import OWN_KEYS, REFUSED_KEYS, json_problems
from cpt.config.guard_section import DomainLimits, GuardSection
from cpt.config.resolve import resolve
from cpt.config.sections import (
    CheckpointSection,
    LaunchInfo,
    RunConfig,
    RunYaml,
    TrainSection,
    WatchdogSection,
)
from cpt.errors import ConfigError
from data_pipeline.config.strict_yaml import Located, Reader, load_json, load_yaml

__all__ = [
    "OWN_KEYS",
    "REFUSED_KEYS",
    "CheckpointSection",
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


def load(run_yaml: Path, ds_json: Path, overrides: dict[str, str]) -> tuple[RunYaml, Located]:
    """Read both files.

    Returns:
        The run YAML, and the DeepSpeed JSON with the line of each key.

    Raises:
        ConfigError: everything that is wrong in either file alone.
    """
    reader, problems = Reader(load_yaml(run_yaml).with_values(overrides)), []
    parsed = reader.read(RunYaml)
    problems += reader.problems
    json_file = load_json(ds_json)
    problems += json_problems(json_file)
    if problems:
        raise ConfigError(problems)
    assert parsed is not None
    return _with_paths_beside(parsed, run_yaml), json_file


def _with_paths_beside(parsed: RunYaml, run_yaml: Path) -> RunYaml:
    """Relative paths of the run YAML are relative to the file."""

    def beside(path: Path | None) -> Path | None:
        return None if path is None else (run_yaml.parent / path).resolve()

    data = dataclasses.replace(
        parsed.data,
        mix=(run_yaml.parent / parsed.data.mix).resolve(),
        build_dir=beside(parsed.data.build_dir),
    )
    model = dataclasses.replace(parsed.model, path=beside(parsed.model.path))
    train = dataclasses.replace(parsed.train, kl_targets=beside(parsed.train.kl_targets))
    return dataclasses.replace(parsed, model=model, data=data, train=train)
