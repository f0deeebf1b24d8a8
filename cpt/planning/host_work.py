"""Traffic and time of state on the host or on NVMe in one optimizer step, for one rank.

Copies while the model computes (deepspeed 0.19.8, stage3.py and stage_1_and_2.py; this project's
gradient_places.py and activation_checkpointing.py), in bytes of a rank's own parameters:

    ZeRO-3, gradients on the host     sums out and back in every micro step: each is made on the
                                      device
    ZeRO 2, gradients on the host     sums out in every micro step, and back in all but the first
    ZeRO 1                            out once; back once if there are several micro steps
    ZeRO 2, gradients on the device   sums out once
    weights on the host               to the device twice in every micro step
    layer inputs                      out and back once in every micro step

They run on streams of their own if the memory is page-locked; if not, computing waits for them.

The update follows the last backward, and nothing else runs meanwhile:

    norm       gradients on the host are read once
    Adam       reads the gradient and the state, and writes the state: as fast as the host's memory,
               which the ranks of a node share, or as its cores, which they share, too: moments in
               fewer bytes take more arithmetic
    weights    are rounded on the host and copied to the device, one sub-group after the other
    gradients  of ZeRO-3 on the device come a sub-group ahead, beside Adam: only the time of the
               first one shows
    NVMe       pages of the state are read and written back; the page cache is not counted on
"""

from __future__ import annotations

from dataclasses import dataclass

from cpt.config import RunConfig
from cpt.planning.hardware import Gpu
from cpt.planning.host_memory import is_page_locked, largest_sub_group
from cpt.planning.matrix_updates import HOST_MUON_BYTES
from cpt.planning.memory import (
    ParameterCounts,
    offloads,
    optimizer_state,
    owned_per_rank,
    trained_per_rank,
)
from cpt.storage.state_bytes import (
    FP32_BYTES,
    MomentForm,
    gradient_place,
)

ADAM_CORE_SECONDS: dict[MomentForm, float] = {"fp32": 1.6e-9, "bf16": 5.7e-9, "int8": 15.8e-9}
"""Time in which a core updates a parameter, by the form of its moments: bench/optimizer.py with
--clock cpu on an Intel Xeon of which others used a part (27 November 2026, one thread).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Bytes between device and host in one step."""

    out: float
    """From the device to the host."""
    back: float
    """From the host to the device."""
    page_locked: bool
    """Whether they run beside computing."""

    def seconds(self, gpu: Gpu) -> float:
        """Return their time: the link has both directions at once, the host's memory has not."""
        link = max(self.out, self.back) / gpu.pcie_bytes_per_second
        memory = (self.out + self.back) / gpu.host_bytes_per_second
        return max(link, memory)


def copies(config: RunConfig, counts: ParameterCounts, host: dict[str, int]) -> Copies:
    """Return the copies of a step that run while the model computes.

    Args:
        config: The layout.
        counts: Parameters of the whole model.
        host: Bytes on the host by part.
    """
    micro_steps = config.gradient_accumulation_steps
    # layer inputs go out in the forward and come back in the backward
    out: float = micro_steps * host.get("layer inputs", 0)
    back: float = out
    if offloads(config, "param"):
        back += micro_steps * 2 * config.itemsize * owned_per_rank(config, counts)
    sums_out, sums_back = _sums(config)
    sum_bytes = FP32_BYTES * trained_per_rank(config, counts)
    return Copies(
        out=out + sums_out * sum_bytes,
        back=back + sums_back * sum_bytes,
        page_locked=all(is_page_locked(config, name) for name in ("optimizer", "param")),
    )


def _sums(config: RunConfig) -> tuple[int, int]:
    """Return how often the sum of a gradient goes to the host and back in a step."""
    micro_steps = config.gradient_accumulation_steps
    place = gradient_place(config.engine_json)
    if place is None or (place == "device" and config.zero_stage == 3):
        return 0, 0
    if place == "device":
        return 1, 0
    if config.zero_stage == 1:
        return 1, min(1, micro_steps - 1)
    if config.zero_stage == 2:
        return micro_steps, micro_steps - 1
    return micro_steps, micro_steps


def update_seconds(config: RunConfig, counts: ParameterCounts, gpu: Gpu) -> float:
    """Return the time of an update on the host, without that of the disks.

    Args:
        config: A layout whose optimizer state is offloaded.
        counts: Parameters of the whole model.
        gpu: The GPU with its shares of the node.
    """
    trained = trained_per_rank(config, counts)
    # What Muon's update moves is counted beyond AdamW's, whose second moment it lacks.
    by_muon = (HOST_MUON_BYTES + 2 * FP32_BYTES) * (counts.by_muon // config.world_size)
    memory = (update_bytes(config, counts) + by_muon) / gpu.host_bytes_per_second
    cores = trained * ADAM_CORE_SECONDS[config.train.optimizer_state] / gpu.host_cores
    link_bytes = 0.0
    if not offloads(config, "param"):
        link_bytes += config.itemsize * trained
    if gradient_place(config.engine_json) == "device" and config.zero_stage == 3:
        link_bytes += FP32_BYTES * largest_sub_group(config, counts)
    return max(memory, cores) + link_bytes / gpu.pcie_bytes_per_second


def update_bytes(config: RunConfig, counts: ParameterCounts) -> int:
    """Return the bytes of host memory that a rank's update reads and writes."""
    trained = trained_per_rank(config, counts)
    adam = FP32_BYTES * trained + 2 * optimizer_state(config, counts)
    # The norm reads a gradient on the host once; one from the device is written when it arrives.
    gradient = FP32_BYTES
    # The master weight is read and rounded to the working precision, and the link reads that.
    rounding = FP32_BYTES + 2 * config.itemsize
    return adam + (gradient + rounding) * trained


def nvme_bytes(config: RunConfig, counts: ParameterCounts) -> int:
    """Return the bytes that a rank reads from NVMe and writes there in a step."""
    trained = trained_per_rank(config, counts)
    zero = config.engine_json["zero_optimization"]
    moved = 0
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        moved += 2 * optimizer_state(config, counts)
        if gradient_place(config.engine_json) == "host":
            # a sum is read and written in every micro step, and read by the norm and by Adam
            moved += (2 * config.gradient_accumulation_steps + 2) * FP32_BYTES * trained
    if zero.get("offload_param", {}).get("device") == "nvme":
        # all are gathered twice in every micro step, and the update writes those that are trained
        gathered = 2 * config.gradient_accumulation_steps * owned_per_rank(config, counts)
        moved += config.itemsize * (gathered + trained)
    return moved
