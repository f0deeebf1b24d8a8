"""The `stages` of the run YAML: one layout for each length of rows, one after the other in a run.

    run YAML, DeepSpeed JSON -> both as one stage reads them -> RunConfig of every stage

Decisions
    A stage is a run of its own as far as sizes are concerned: `resolve` sees files without stages.
    So whatever is refused of a run is refused of each of its stages, all together and at start.
    A key that a stage does not give has the value that it has without stages. Only the rows of a
    step differ: as many tokens as in the first stage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cpt.config.resolve import resolve
from cpt.config.sections import LaunchInfo, RunConfig, RunYaml, StageSection
from cpt.errors import ConfigError
from data_pipeline.config.strict_yaml import Located


def resolve_stages(
    run: RunYaml, json_file: Located, model_config: Any, launch: LaunchInfo
) -> tuple[RunConfig, ...]:
    """Bring files, model and world size together for each stage; a run without stages has one.

    Args:
        run: The run YAML.
        json_file: The DeepSpeed JSON.
        model_config: The model's GptOssConfig.
        launch: World size and ranks per node.

    Raises:
        ConfigError: everything that does not fit together, in whichever stage.
    """
    if not run.stages:
        return (resolve(run, json_file, model_config, launch),)
    configs = []
    problems: list[str] = []
    for number, stage in enumerate(run.stages):
        of_run, of_json = files_of_stage(run, json_file, number)
        try:
            configs.append(resolve(of_run, of_json, model_config, launch, run.stages[0].seq_len))
        except ConfigError as error:
            for problem in error.problems:
                problems.append(f"stages[{number}] (rows of {stage.seq_len}): {problem}")
    if problems:
        raise ConfigError(problems)
    stages = tuple(_resolved(config) for config in configs)
    return tuple(
        replace(config, stages=stages, stage=number) for number, config in enumerate(configs)
    )


def files_of_stage(run: RunYaml, json_file: Located, number: int) -> tuple[RunYaml, Located]:
    """Return the run YAML and the DeepSpeed JSON as one stage reads them, without `stages`."""
    stage = run.stages[number]
    train = replace(run.train, seq_len=stage.seq_len, global_batch_size=run.rows_of_stage(number))
    if stage.micro_batch_size is not None:
        train = replace(train, micro_batch_size=stage.micro_batch_size)
    value = dict(json_file.value)
    if stage.sequence_parallel_size is not None:
        value["sequence_parallel_size"] = stage.sequence_parallel_size
    of_stage = replace(run, train=train, model=run.model_of_stage(number), stages=())
    return of_stage, replace(json_file, value=value)


def _resolved(config: RunConfig) -> StageSection:
    """Return a stage with nothing left open."""
    return StageSection(
        seq_len=config.train.seq_len,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        sequence_parallel_size=config.sp_size,
        activation_checkpointing=config.model.activation_checkpointing,
        offload_checkpoints=config.model.offload_checkpoints,
    )
