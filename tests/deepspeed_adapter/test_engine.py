"""What DeepSpeed is given besides the user's JSON."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.config import get_timers_config
from torch import nn

from cpt.deepspeed_adapter.engine import initialize
from cpt.deepspeed_adapter.experts import experts_may_be_frozen, mark_expert


def test_the_clock_that_waits_for_the_device_in_every_micro_step_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []

    def record(*, config: dict[str, Any], **_: Any) -> tuple[Any, None]:
        given.append(config)
        return SimpleNamespace(), None

    monkeypatch.setattr(deepspeed, "initialize", record)
    engine_json = {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}
    initialize(None, None, engine_json, {})  # type: ignore[arg-type]
    assert given[0].items() >= engine_json.items() and "timers" not in engine_json
    assert not get_timers_config(given[0]).enabled


def test_page_locked_memory_that_building_an_engine_leaves_goes_back_to_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch keeps what is freed; partitions that were copied to flat buffers would stay."""
    done: list[str] = []

    def build(**_: Any) -> tuple[Any, None]:
        done.append("built")
        return SimpleNamespace(), None

    def release() -> None:
        done.append("released")

    monkeypatch.setattr(deepspeed, "initialize", build)
    monkeypatch.setattr(torch._C, "_host_emptyCache", release, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine_json = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    initialize(None, None, engine_json, {})  # type: ignore[arg-type]
    assert done == ["built", "released"]


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_groups_of_experts_are_looked_for_only_if_experts_are_trained(is_trained: bool) -> None:
    """DeepSpeed refuses a model with expert layers that has no such group."""
    model = nn.Linear(2, 2)
    mark_expert(model.weight, ep_size=1)
    model.weight.requires_grad_(is_trained)
    own = DeepSpeedZeroOptimizer._configure_moe_settings
    with experts_may_be_frozen(model):
        assert (DeepSpeedZeroOptimizer._configure_moe_settings is own) == is_trained
    assert DeepSpeedZeroOptimizer._configure_moe_settings is own
