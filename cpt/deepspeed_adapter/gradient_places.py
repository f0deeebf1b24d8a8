"""Where gradients add up while the optimizer state is offloaded: on the host, or on the device.

    ZeRO-3, host     DeepSpeed's buffer is on the host, and Adam reads it there (offload.py)
    ZeRO-3, device   the buffer is on the device; at the update a sub-group at a time is copied
    ZeRO 1 and 2,    what is reduced is added to the memory that Adam reads; DeepSpeed would add it
    host             up on the device and copy it at the end of a step
    ZeRO 1 and 2,    DeepSpeed's way: a sum on the device, and another fp32 number on the host
    device

Decisions
    The choice is the key `gradients` of the block `offload_optimizer`; the host is the default.
    Numbers are the same everywhere: sums are made in fp32 on the device, one micro step after
    another, and Adam reads what was clipped by the same factor.
    A factor of 1 is not multiplied by: on a host that reads and writes every gradient once more.
    DeepSpeed's norms of single gradients are left out, as nobody reads them (gradients.py).

Methods are replaced on one optimizer, after it is built. Their sources are compared with those that
were read (`RELIED_ON` in cpt/deepspeed_adapter/version.py).

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

MOST_BUFFERS = 2
"""Sub-groups on the host at a time: one is updated while the next one arrives."""


def clipping_factor(zero: Any, total_norm: torch.Tensor) -> torch.Tensor | float:
    """Return what DeepSpeed multiplies gradients by before an update (`unscale_and_clip_grads`)."""
    scale = zero.loss_scale
    if zero.clip_grad > 0.0:
        clip = ((total_norm / zero.loss_scale) + 1e-6) / zero.clip_grad
        scale = torch.clamp(clip, min=1.0) * zero.loss_scale
    return 1.0 / scale


class CopiesForUpdate:
    """Brings gradients of ZeRO-3 from the device to the host, each sub-group before its update.

    While the host updates a sub-group, the gradients of the next one are on their way.
    """

    def __init__(self, zero: Any, *, pin_memory: bool) -> None:
        """Reserve the memory on the host and take the place of DeepSpeed's methods.

        Args:
            zero: The ZeRO-3 optimizer, its gradients on the device.
            pin_memory: Whether the memory on the host is page-locked, so that copies run beside
                the update.
        """
        self._zero = zero
        self._masters: list[torch.Tensor] = list(zero.fp32_partitioned_groups_flat)
        self._parts: list[torch.Tensor] = []
        start = 0
        for master in self._masters:
            self._parts.append(zero.grad_partitions_flat_buffer.narrow(0, start, master.numel()))
            start += master.numel()
        largest = max(master.numel() for master in self._masters)
        self.buffers: list[torch.Tensor] = []
        for _ in range(min(MOST_BUFFERS, len(self._masters))):
            buffer = torch.empty(largest, dtype=torch.float32)
            self.buffers.append(get_accelerator().pin_memory(buffer) if pin_memory else buffer)
        self._arrivals: dict[int, Any] = {}
        zero._offload_grad_partition_at_boundary = _leave_out
        zero.unscale_and_clip_grads = self._clip
        zero._release_sub_group = self._release

    def parts(self) -> list[torch.Tensor]:
        """Return the gradients on the device, one flat tensor for each sub-group."""
        return self._parts

    def _clip(self, sub_group_id: int, total_norm: torch.Tensor) -> None:
        """Give Adam the gradients of a sub-group, and send the next one's after them."""
        factor = clipping_factor(self._zero, total_norm)
        if sub_group_id == 0:
            self._send(0, factor)
        arrival = self._arrivals.pop(sub_group_id)
        if arrival is not None:
            arrival.synchronize()
        master = self._masters[sub_group_id]
        master.grad = self._buffer(sub_group_id)
        if sub_group_id + 1 < len(self._masters):
            self._send(sub_group_id + 1, factor)

    def _send(self, sub_group_id: int, factor: torch.Tensor | float) -> None:
        """Clip the gradients of a sub-group on the device and begin to copy them."""
        part = self._parts[sub_group_id].to(torch.float32)
        if float(factor) != 1.0:
            part.mul_(factor)
        self._buffer(sub_group_id).copy_(part, non_blocking=True)
        self._arrivals[sub_group_id] = None
        if part.is_cuda:
            event = torch.cuda.Event()
            event.record()
            self._arrivals[sub_group_id] = event

    def _buffer(self, sub_group_id: int) -> torch.Tensor:
        buffer = self.buffers[sub_group_id % len(self.buffers)]
        return buffer[: self._masters[sub_group_id].numel()]

    def _release(self, sub_group_id: int, _: Any) -> None:
        self._masters[sub_group_id].grad = None


def _leave_out(*_: Any) -> None:
    """Do nothing in place of a method of DeepSpeed."""


def clip_only_if_needed(zero: Any) -> None:
    """Leave out the multiplication of ZeRO-3's gradients on the host by 1."""
    multiply = zero.unscale_and_clip_grads

    def clip(sub_group_id: int, total_norm: torch.Tensor) -> None:
        if float(clipping_factor(zero, total_norm)) != 1.0:
            multiply(sub_group_id, total_norm)

    zero.unscale_and_clip_grads = clip


def offloaded_gradients(zero: Any, masters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the summed gradients of an optimizer with offloaded state, wherever they are.

    Args:
        zero: The ZeRO optimizer.
        masters: Its flat master weights on this rank.
    """
    copies: CopiesForUpdate | None = getattr(zero, "copies_for_update", None)
    if copies is not None:
        return copies.parts()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies to the host run on streams of their own
    return [master.grad for master in masters if master.grad is not None]


def forget_sums(zero: Any) -> None:
    """Drop the sums of ZeRO 1 and 2 after a step without an update.

    DeepSpeed keeps them where the state is offloaded, and would add the next step's to them.
    """
    for group in zero.averaged_gradients:
        zero.averaged_gradients[group] = None


def sum_on_device(zero: Any) -> None:
    """Let ZeRO 2 add gradients up on the device in every dtype, and copy them once a step."""
    zero._use_compact_grad_partition_buffer = _always
    _free_unused_buffers(zero)


def _free_unused_buffers(zero: Any) -> None:
    """Free what only serves sums of whole parameters: each is as large as the largest one."""
    zero.temp_grad_buffer_for_cpu_offload = torch.empty(0)
    zero.temp_grad_buffer_for_gpu_offload = torch.empty(0)


class SumsOnHost:
    """Adds up the reduced gradients of ZeRO 1 and 2 in the memory that Adam reads.

    Each sum is made on the device: its last value comes, the reduced gradient is added, and the
    result goes back. The host's own sums would be as exact, but its memory is slower than the link.
    """

    def __init__(self, zero: Any) -> None:
        """Take the place of DeepSpeed's methods and give back the buffers that they used."""
        self._zero = zero
        self._multiply = zero.unscale_and_clip_grads
        zero._use_compact_grad_partition_buffer = _always
        zero._build_compact_grad_partition_buffer = self._build
        zero._add_to_grad_partition_buffer = self._add
        zero.copy_grads_in_partition = self._finish
        zero.unscale_and_clip_grads = self._clip
        _free_unused_buffers(zero)

    def _build(self, group: int) -> GradPartitionBufferGroup:
        """Return the memory of a group, zero at the first reduction of a step."""
        sums = self._zero.single_partition_of_fp32_groups[group].grad.zero_()
        return GradPartitionBufferGroup([sums], sums)

    def _add(self, output: torch.Tensor | None, source: torch.Tensor) -> None:
        """Add a reduced gradient to its place on the host."""
        if output is None:
            return
        if self._zero.micro_step_id > 0:
            total = output.to(source.device, non_blocking=True)
            total = total.add_(source.to(output.dtype).view_as(output))
        else:
            # 0 + x, which is not x for a negative zero
            total = source.to(output.dtype, copy=True).view_as(output).add_(0.0)
        output.copy_(total, non_blocking=True)

    def _finish(self, parameter: Any, _: int | None = None) -> None:
        """Drop a gradient that has been added to its sum (`copy_grads_in_partition`)."""
        self._zero.clear_grad_attribute(parameter)

    def _clip(self, gradients: list[torch.Tensor], total_norm: torch.Tensor) -> None:
        if float(clipping_factor(self._zero, total_norm)) != 1.0:
            self._multiply(gradients, total_norm)


def _always(*_: Any) -> bool:
    return True
