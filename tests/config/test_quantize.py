"""`train.quantize` is refused where it would round nothing, or cut blocks, with what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunConfig, load, resolve_stages
from cpt.config.block_parts import block_problems
from cpt.config.precision_sections import BLOCK, QuantizeSection
from cpt.errors import ConfigError
from cpt.model.configuration import PRESETS
from cpt.model.freezing import rounding_problems
from cpt.model.parameters import parameter_shapes

ON = QuantizeSection(experts="mxfp4", start_step=0)


def problems(
    folder: Path, *, world: int = 1, ep: int = 1, stage: int = 3, **sections: Any
) -> list[str]:
    """Return what is refused of a run of the tiny model."""
    try:
        configs(folder, world=world, ep=ep, stage=stage, **sections)
    except ConfigError as error:
        return list(error.problems)
    return []


def configs(
    folder: Path,
    *,
    world: int,
    ep: int,
    stage: int,
    quantize: dict[str, Any],
    preset: str = "tiny",
    model: dict[str, int] | None = None,
    **sections: Any,
) -> tuple[RunConfig, ...]:
    train = {"seq_len": 1024, "global_batch_size": 96, "total_steps": 40, "lr": 1e-5}
    train["quantize"] = {"experts": "mxfp4", **quantize}
    content = {"model": {"init": preset}, "data": {"mix": "mix.yaml"}, "train": train, **sections}
    (folder / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    engine: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    engine["expert_parallel"] = {"enabled": ep > 1, "autoep_size": ep}
    (folder / "ds.json").write_text(json.dumps(engine), encoding="utf-8")
    run, located = load(folder / "run.yaml", folder / "ds.json", {})
    launch = LaunchInfo(world_size=world, local_world_size=world)
    of_model = GptOssConfig(**{**PRESETS[preset], **(model or {})})
    return resolve_stages(run, located, of_model, launch)


@pytest.mark.parametrize("start_step", [40, 41])
def test_start_step_that_no_step_follows_is_refused(tmp_path: Path, start_step: int) -> None:
    (told,) = problems(tmp_path, quantize={"start_step": start_step})
    assert f"train.quantize.start_step is {start_step}, but train.total_steps is 40" in told
    assert "such as 26" in told
    assert problems(tmp_path, quantize={"start_step": 39}) == []


def test_adapter_together_with_rounding_is_refused_with_the_reason(tmp_path: Path) -> None:
    (told,) = problems(tmp_path, quantize={"start_step": 0}, adapter={"kind": "lora"})
    assert "an adapter rounds nothing and needs none of this" in told


def test_sizes_that_are_no_whole_blocks_are_refused_in_every_stage_of_zero(tmp_path: Path) -> None:
    for stage in (2, 3):
        (told,) = problems(
            tmp_path, quantize={"start_step": 0}, stage=stage, model={"intermediate_size": 80}
        )
        assert "intermediate_size of the model is 80" in told


def test_part_that_would_cut_a_block_is_refused_with_the_nearest_sizes(tmp_path: Path) -> None:
    """Eight experts of one block column each, as 64 and 96 inputs have 32 in common."""
    (told,) = problems(tmp_path, quantize={"start_step": 0}, world=6, ep=2)
    assert "6 ranks cannot share an expert matrix under ZeRO-3" in told
    assert "8 columns of blocks (32 inputs of all outputs of an expert)" in told
    assert "Nearest world sizes that can: 2, 4, 8." in told
    assert problems(tmp_path, quantize={"start_step": 0}, world=6, ep=2, stage=2) == []
    assert problems(tmp_path, quantize={"start_step": 0}, world=8, ep=2) == []


@pytest.mark.parametrize(
    ("preset", "world_size", "nearest"),
    [("gpt-oss-20b", 128, "96, 120, 144"), ("gpt-oss-120b", 512, "384, 480, 576")],
)
def test_released_models_are_divided_among_powers_of_two_up_to_a_limit(
    preset: str, world_size: int, nearest: str
) -> None:
    model = GptOssConfig(**PRESETS[preset])
    (told,) = block_problems(ON, model, zero_stage=3, world_size=world_size)
    found = told.split("that can: ")[1].split(".")[0].split(", ")
    assert set(found) == set(nearest.split(", "))
    assert block_problems(ON, model, zero_stage=3, world_size=world_size // 2) == []


@pytest.mark.parametrize("preset", ["tiny", "gpt-oss-20b", "gpt-oss-120b"])
def test_accepted_layouts_are_those_whose_parts_are_whole_block_columns(preset: str) -> None:
    """Both matrices, cut as ZeRO-3 does: equal parts of the flattened tensor."""
    model = GptOssConfig(**PRESETS[preset])
    sizes = {"gate_up": (model.hidden_size, 2 * model.intermediate_size)}
    sizes["down"] = (model.intermediate_size, model.hidden_size)
    for ep_size in (1, 2, 4, 8):
        for sharing in range(1, 65):
            is_whole = True
            for inputs, outputs in sizes.values():
                numel = model.num_local_experts // ep_size * inputs * outputs
                part = math.ceil(numel / sharing)
                is_whole &= part * sharing == numel and part % (BLOCK * outputs) == 0
            world_size = ep_size * sharing
            found = block_problems(ON, model, zero_stage=3, world_size=world_size)
            assert (found == []) == is_whole, (ep_size, sharing)


def test_every_stage_of_a_run_is_checked(tmp_path: Path) -> None:
    stages = [{"seq_len": 1024}, {"seq_len": 2048, "sequence_parallel_size": 2}]
    told = problems(tmp_path, quantize={"start_step": 0}, world=6, stages=stages)
    assert [problem.split(":")[0] for problem in told] == [
        "stages[0] (rows of 1024)",
        "stages[1] (rows of 2048)",
    ]


def test_experts_that_are_all_frozen_are_refused() -> None:
    shapes = parameter_shapes(GptOssConfig(**PRESETS["tiny"]))
    (told,) = rounding_problems(ON, ("experts",), shapes)
    assert "train.freeze keeps every expert matrix as it is" in told
    assert rounding_problems(ON, ("model.layers.0", "experts.*_bias"), shapes) == []
    assert rounding_problems(QuantizeSection(), ("experts",), shapes) == []
