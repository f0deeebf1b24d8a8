"""Every stage of sequence length has a layout of its own, and all are checked together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunConfig, load, resolve_stages
from cpt.errors import ConfigError
from cpt.job.data import stage_problems
from cpt.model.configuration import PRESETS

STAGES: list[dict[str, Any]] = [
    {"seq_len": 1024, "micro_batch_size": 2},
    {"seq_len": 4096, "sequence_parallel_size": 2, "activation_checkpointing": True},
]


def configs(
    folder: Path,
    stages: list[dict[str, Any]],
    *,
    world: int = 4,
    json_keys: Any = None,
    **train: Any,
) -> tuple[RunConfig, ...]:
    content = {
        "model": {"init": "tiny"},
        "data": {"mix": "mix.yaml"},
        "train": {"seq_len": 1024, "global_batch_size": 16, "total_steps": 40, "lr": 1e-5, **train},
        "stages": stages,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    engine = {"zero_optimization": {"stage": 3}, **(json_keys or {})}
    (folder / "ds.json").write_text(json.dumps(engine), encoding="utf-8")
    run, located = load(folder / "run.yaml", folder / "ds.json", {})
    launch = LaunchInfo(world_size=world, local_world_size=world)
    return resolve_stages(run, located, GptOssConfig(**PRESETS["tiny"]), launch)


def test_stage_has_its_layout_and_what_it_leaves_out_is_as_without_stages(tmp_path: Path) -> None:
    first, second = configs(tmp_path, STAGES)
    assert (first.train.seq_len, first.train.global_batch_size) == (1024, 16)
    assert (first.sp_size, first.micro_batch_size, first.gradient_accumulation_steps) == (1, 2, 2)
    assert not first.model.activation_checkpointing
    # as many tokens in a step
    assert (second.train.seq_len, second.train.global_batch_size) == (4096, 4)
    assert (second.sp_size, second.micro_batch_size, second.gradient_accumulation_steps) == (
        2,
        1,
        2,
    )
    assert second.model.activation_checkpointing
    assert (first.stage, second.stage) == (0, 1)
    assert first.stages == second.stages
    assert [stage.global_batch_size for stage in first.stages] == [16, 4]
    assert second.measured_seq_len == 1024


def test_run_without_stages_has_one_configuration(tmp_path: Path) -> None:
    (only,) = configs(tmp_path, [])
    assert (only.stages, only.stage, only.measured_seq_len) == ((), 0, 1024)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seq_len": 3000}, "the 16384 tokens of a step of the first stage are no whole number of"),
        ({"sequence_parallel_size": 3}, "stages[1] (rows of 4096): "),
        ({"global_batch_size": 3}, "stages[1] (rows of 4096): train.global_batch_size=3 rows"),
        ({"offload_checkpoints": True, "activation_checkpointing": False}, "stages[1]"),
    ],
)
def test_stage_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configs(tmp_path, [STAGES[0], {**STAGES[1], **changes}])
    assert told in "\n".join(caught.value.problems)


def test_held_out_rows_can_be_cut_in_every_stage(tmp_path: Path) -> None:
    """They are rows of the first stage, also where a longer row is shared by more ranks."""
    stages = [{"seq_len": 1026}, {"seq_len": 4104, "sequence_parallel_size": 4}]
    with pytest.raises(ConfigError) as caught:
        configs(tmp_path, stages, seq_len=1026)
    assert "cannot cut the rows of 1026 tokens in which held-out text" in caught.value.problems[0]


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"seq_len": 2048}, "stages[0].seq_len is 1024, but train.seq_len is 2048"),
        ({"kl_targets": "targets", "kl_weight": 0.1}, "are for rows of one length"),
    ],
)
def test_keys_that_contradict_stages_are_refused(
    tmp_path: Path, train: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configs(tmp_path, STAGES, **train)
    assert told in "\n".join(caught.value.problems)


def test_run_and_mix_have_the_same_stages() -> None:
    mix = Path("mix.yaml")
    assert stage_problems(mix, [64, 128], [64, 128]) == []
    assert (
        "run YAML has none, mix.yaml has rows of 64, 128" in stage_problems(mix, [64, 128], [])[0]
    )
    assert "has rows of 64, 96, mix.yaml has none" in stage_problems(mix, [], [64, 96])[0]
