"""Adam reads offloaded gradients where they add up, unless the dtypes differ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.deepspeed_adapter.offload import place_gradients
from cpt.storage.file_memory import FileMemory
from cpt.storage.state_bytes import host_gradient_bytes

SIZES = (5, 3)


def optimizer_of(dtype: torch.dtype) -> Any:
    """Return what `place_gradients` uses of a ZeRO-3 optimizer with two groups of one parameter."""
    buffer = torch.zeros(sum(SIZES), dtype=dtype)
    views = {"first": buffer[:5], "second": buffer[5:]}
    return SimpleNamespace(
        device=torch.device("meta"),
        grad_partitions_flat_buffer=buffer,
        fp32_partitioned_groups_flat=[torch.zeros(size) for size in SIZES],
        _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition=views,
    )


def added_up(zero: Any) -> torch.Tensor:
    """Write other values to every parameter's part of the buffer, as a backward pass does."""
    views = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for number, view in enumerate(views.values()):
        view.copy_(torch.arange(view.numel()) + 10 * number)
    return zero.grad_partitions_flat_buffer


@pytest.mark.parametrize("in_files", [False, True])
def test_adam_reads_gradients_where_they_add_up(tmp_path: Path, *, in_files: bool) -> None:
    zero = optimizer_of(torch.float32)
    memory = FileMemory(tmp_path, 4 * sum(SIZES)) if in_files else None
    place_gradients(zero, memory)
    buffer = added_up(zero)
    first, second = zero.fp32_partitioned_groups_flat
    assert torch.equal(first.grad, buffer[:5])
    assert torch.equal(second.grad, buffer[5:])
    assert second.grad.tolist() == [10, 11, 12]
    first.grad.mul_(0.5)  # clipping
    assert buffer[4] == 2


@pytest.mark.parametrize("in_files", [False, True])
def test_gradients_that_add_up_in_bf16_are_copied_for_adam(
    tmp_path: Path, *, in_files: bool
) -> None:
    zero = optimizer_of(torch.bfloat16)
    memory = FileMemory(tmp_path, 6 * sum(SIZES)) if in_files else None
    place_gradients(zero, memory)
    added_up(zero)
    for master in zero.fp32_partitioned_groups_flat:
        assert master.grad.dtype == torch.float32
        assert not master.grad.any()


def test_bytes_of_a_gradient_are_those_that_are_held() -> None:
    zero3 = {"zero_optimization": {"stage": 3}}
    assert host_gradient_bytes(zero3) == 4
    assert host_gradient_bytes({**zero3, "data_types": {"grad_accum_dtype": "fp32"}}) == 4
    assert host_gradient_bytes({**zero3, "data_types": {"grad_accum_dtype": "bf16"}}) == 6
    in_bf16 = {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}
    assert host_gradient_bytes(in_bf16) == 4
