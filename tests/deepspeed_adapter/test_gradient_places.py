"""Offloaded gradients: sums on the host, copies from the device, and what a dropped step leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.deepspeed_adapter.gradient_places import (
    CopiesForUpdate,
    SumsOnHost,
    clip_only_if_needed,
    offloaded_gradients,
)
from cpt.deepspeed_adapter.gradients import discard_gradients
from cpt.deepspeed_adapter.offload import on_host
from cpt.storage.state_bytes import device_gradient_bytes, gradient_place, host_gradient_bytes

SIZES = (5, 3, 4)


def multiply(zero: Any, sub_group_id: int, norm: torch.Tensor) -> None:
    """Clip as DeepSpeed's ZeRO-3 does."""
    scale = torch.clamp((norm / zero.loss_scale + 1e-6) / zero.clip_grad, min=1.0)
    zero.fp32_partitioned_groups_flat[sub_group_id].grad.mul_(1.0 / (scale * zero.loss_scale))


def zero3(dtype: torch.dtype = torch.float32) -> Any:
    """Return what is used of a ZeRO-3 optimizer, with gradients 0, 1, 2, ... in three groups."""
    zero = SimpleNamespace(
        loss_scale=1.0,
        clip_grad=1.0,
        grad_partitions_flat_buffer=torch.arange(float(sum(SIZES))).to(dtype),
        fp32_partitioned_groups_flat=[torch.zeros(size) for size in SIZES],
    )
    zero.unscale_and_clip_grads = lambda group, norm: multiply(zero, group, norm)
    return zero


@pytest.mark.parametrize("norm", [0.5, 3.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_reads_the_gradients_of_each_sub_group_clipped_as_on_the_host(
    norm: float, dtype: torch.dtype
) -> None:
    total_norm = torch.tensor(norm, dtype=torch.float64)
    host = zero3(dtype)
    device = zero3(dtype)
    start = 0
    for master in host.fp32_partitioned_groups_flat:
        master.grad = host.grad_partitions_flat_buffer[start : start + master.numel()].float()
        start += master.numel()
    CopiesForUpdate(device, pin_memory=False)
    masters = zip(
        host.fp32_partitioned_groups_flat, device.fp32_partitioned_groups_flat, strict=True
    )
    for group, (expected, found) in enumerate(masters):
        host.unscale_and_clip_grads(group, total_norm)
        device.unscale_and_clip_grads(group, total_norm)
        assert torch.equal(found.grad, expected.grad)
        device._release_sub_group(group, None)
        assert found.grad is None


def test_two_buffers_of_the_largest_sub_group_hold_what_is_on_its_way() -> None:
    copies = CopiesForUpdate(zero3(), pin_memory=False)
    assert [buffer.numel() for buffer in copies.buffers] == [max(SIZES)] * 2


def test_the_norm_is_of_the_gradients_on_the_device() -> None:
    zero = zero3()
    zero.copies_for_update = CopiesForUpdate(zero, pin_memory=False)
    parts = offloaded_gradients(zero, zero.fp32_partitioned_groups_flat)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]


def test_gradients_that_need_no_clipping_are_left_alone() -> None:
    zero = zero3()
    calls: list[int] = []
    zero.unscale_and_clip_grads = lambda group, _: calls.append(group)
    clip_only_if_needed(zero)
    zero.unscale_and_clip_grads(0, torch.tensor(0.999))
    zero.unscale_and_clip_grads(1, torch.tensor(1.5))
    assert calls == [1]


def zero2() -> Any:
    """Return what is used of a ZeRO 1 or 2 optimizer with one group of four gradients."""
    master = torch.zeros(4)
    master.grad = torch.full((4,), 7.0)  # what the step before has left
    return SimpleNamespace(
        single_partition_of_fp32_groups=[master],
        averaged_gradients={0: "sums of the step"},
        micro_step_id=0,
        unscale_and_clip_grads=None,
        clear_grad_attribute=lambda parameter: setattr(parameter, "grad", None),
    )


def test_gradients_add_up_where_adam_reads_them_and_begin_anew_with_a_step() -> None:
    zero = zero2()
    SumsOnHost(zero)
    sums = zero._build_compact_grad_partition_buffer(0).flat_partition
    parts = (sums.narrow(0, 0, 2), sums.narrow(0, 2, 2))
    zero._add_to_grad_partition_buffer(parts[0], torch.tensor([-0.0, 1.0]).bfloat16())
    zero._add_to_grad_partition_buffer(None, torch.ones(2))
    zero.micro_step_id = 1
    zero._add_to_grad_partition_buffer(parts[0], torch.tensor([2.0, 3.0]).bfloat16())
    zero._add_to_grad_partition_buffer(parts[1], torch.tensor([5.0, 6.0]).bfloat16())
    grad = zero.single_partition_of_fp32_groups[0].grad
    assert grad.tolist() == [2, 4, 5, 6]
    assert grad.data_ptr() == sums.data_ptr()


def test_sums_on_the_host_are_clipped_if_the_norm_asks_for_it() -> None:
    zero = zero2()
    zero.loss_scale = zero.clip_grad = 1.0
    clipped: list[float] = []
    zero.unscale_and_clip_grads = lambda _, norm: clipped.append(float(norm))
    SumsOnHost(zero)
    zero.unscale_and_clip_grads([], torch.tensor(0.5))
    zero.unscale_and_clip_grads([], torch.tensor(1.5))
    assert clipped == [1.5]


def test_first_gradient_is_added_to_zero_as_on_the_device() -> None:
    zero = zero2()
    SumsOnHost(zero)
    sums = zero._build_compact_grad_partition_buffer(0).flat_partition
    zero._add_to_grad_partition_buffer(sums, torch.full((4,), -0.0))
    assert not torch.signbit(sums).any()


def test_sums_of_a_dropped_step_are_forgotten() -> None:
    zero = zero2()
    zero.cpu_offload = True
    engine = SimpleNamespace(
        optimizer=zero,
        zero_optimization_stage=lambda: 2,
        step=lambda: None,
        was_step_applied=lambda: False,
    )
    discard_gradients(engine)
    assert zero.averaged_gradients == {0: None}


def engine_json(stage: int, **block: Any) -> dict[str, Any]:
    offload = {"device": "cpu", **block}
    return {"zero_optimization": {"stage": stage, "offload_optimizer": offload}}


def test_place_of_gradients_is_the_host_unless_the_block_says_otherwise() -> None:
    assert gradient_place({"zero_optimization": {"stage": 3}}) is None
    assert gradient_place(engine_json(3)) == "host"
    chosen = engine_json(3, gradients="device", pin_memory=True)
    assert gradient_place(chosen) == "device"
    block = on_host(chosen)["zero_optimization"]["offload_optimizer"]
    assert block == {"device": "cpu", "pin_memory": True}, "DeepSpeed does not know the key"


def test_bytes_of_a_gradient_are_those_of_its_place() -> None:
    found = {}
    for stage in (2, 3):
        for place in ("host", "device"):
            chosen = engine_json(stage, gradients=place)
            found[stage, place] = (host_gradient_bytes(chosen), device_gradient_bytes(chosen))
    assert found == {
        (2, "host"): (4, 0),
        (2, "device"): (4, 4),
        (3, "host"): (4, 0),
        (3, "device"): (0, 4),
    }
    assert device_gradient_bytes({"zero_optimization": {"stage": 2}}) == 4
