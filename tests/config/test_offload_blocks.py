"""Blocks that offload state are refused where they would do nothing, or not what they say."""

from __future__ import annotations

from typing import Any

import pytest

from cpt.config.engine_json import json_problems
from data_pipeline.config.strict_yaml import Located


def problems(stage: int, **zero: Any) -> list[str]:
    """Return what is refused of a DeepSpeed JSON with these keys of `zero_optimization`."""
    value = {"zero_optimization": {"stage": stage, **zero}}
    return json_problems(Located("ds.json", value, {}))


def of_optimizer(stage: int = 3, **block: Any) -> list[str]:
    return problems(stage, offload_optimizer={"device": "cpu", **block})


def test_gradients_may_be_where_the_zero_stage_can_hold_them() -> None:
    assert of_optimizer(3, gradients="device") == of_optimizer(3, gradients="host") == []
    assert of_optimizer(2, gradients="device") == of_optimizer(1, gradients="host") == []
    nvme = {"device": "nvme", "nvme_path": "disk", "gradients": "device"}
    assert problems(3, offload_optimizer=nvme) == []
    (told,) = of_optimizer(1, gradients="device")
    assert "ZeRO stage 1 reduces gradients once" in told
    (told,) = of_optimizer(3, gradients="gpu")
    assert 'gradients is "gpu", must be one of host, device' in told
    (told,) = problems(3, offload_param={"device": "cpu", "gradients": "device"})
    assert "belongs into offload_optimizer" in told


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("super_offload", True, "moments no save would see"),
        ("ratio", 0.5, "DeepSpeed splits the state"),
        ("cpuadam_cores_perc", 0.5, "belongs to super_offload"),
    ],
)
def test_other_ways_of_deepspeed_to_offload_are_refused_with_the_reason(
    key: str, value: Any, reason: str
) -> None:
    (told,) = of_optimizer(3, **{key: value})
    assert f"offload_optimizer.{key}" in told
    assert reason in told


def test_ways_that_are_switched_off_and_all_of_the_state_are_accepted() -> None:
    assert of_optimizer(3, super_offload=False, ratio=1.0) == []


def test_zenflow_is_refused_with_the_reason() -> None:
    (told,) = problems(3, zenflow={"topk_ratio": 0.1})
    assert "it updates before the ranks know the norm" in told
