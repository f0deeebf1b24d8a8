"""Measure the memory of a rank during one step, beside the prediction of `cpt.planning.memory`.

State (weights, gradients, optimizer) is measured as the size of the tensors that the engine keeps.
Everything else lives within a step; its peak is how far the allocator rises above its level before
the step.  CUDA counts that.  On a CPU, torch's profiler follows every allocation, which slows that
one step down.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._profiler import _EventType
from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.deepspeed_adapter.shards import state_tensors
from cpt.model.experts.packed_base import packed_matrices
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from cpt.planning.memory import counts_of, device_memory
from cpt.telemetry.mailbox import EventMailbox
from cpt.training.engine import TrainingEngine

log = logging.getLogger("cpt.job.memory_report")

STATE = ("weights", "gradients", "optimizer")
PEAK = "peak of a step"


class Peak:
    """The largest rise of allocated memory within a block."""

    def __init__(self) -> None:
        self.num_bytes = 0


@contextmanager
def peak_within(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of allocated memory within the block; read the result after the block."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        yield peak
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    assert results is not None, "torch's profiler kept no events"
    peak.num_bytes = highest_level(_allocations(results.experimental_event_tree()))


def _allocations(tree: list[Any]) -> list[tuple[int, int, int]]:
    """Return (time, address, size) of all allocations and frees by time; a free is negative."""
    found = []
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return sorted(found)


def highest_level(allocations: list[tuple[int, int, int]]) -> int:
    """Return the largest amount allocated at one time, above the level at the beginning.

    The profiler does not see a free by a thread of gloo, which happens when that thread is the last
    to hold a tensor.  An address that is handed out again must have been freed; without that rule
    its memory would count twice, and more with every step.

    Args:
        allocations: (time, address, size) in order of time; a free has a negative size.
    """
    sizes: dict[int, int] = {}
    level = highest = 0
    for _, address, size in allocations:
        level += size
        if size > 0:
            level -= sizes.get(address, 0)
            sizes[address] = size
        else:
            sizes.pop(address, None)
        highest = max(highest, level)
    return highest


def predicted(config: RunConfig, model: GptOssConfig, device_type: str) -> dict[str, int]:
    """Return the prediction of `cpt.planning.memory`, grouped as it can be measured.

    ZeRO 1 and 2 allocate the gradients and the buffers of reductions in every step, so there they
    belong to its peak; those buffers of ZeRO-3 are there before.
    """
    counts = counts_of(config, model)
    parts = device_memory(config, model, counts, device_type)
    kept: tuple[str, ...] = ("weights", "optimizer")
    if config.zero_stage == 3:
        kept = STATE
        del parts["reduce buffers"]
    parts["weights"] += parts.pop("packed experts", 0)
    groups = {name: parts[name] for name in kept}
    groups[PEAK] = sum(parts.values()) - sum(groups.values())
    return groups


def measured(engine: TrainingEngine, peak: Peak) -> dict[str, int]:
    """Return the same groups as this rank holds them; state on another device is left out."""
    device = engine.topology.device.type
    sizes = {}
    state = state_tensors(engine.deepspeed)
    for matrices in packed_matrices(engine.deepspeed.module).values():
        state["weights"] += [matrices.blocks_ENb16, matrices.scales_ENb]
    for name, tensors in state.items():
        sizes[name] = bytes_on(device, tensors)
    sizes[PEAK] = peak.num_bytes
    return sizes


def bytes_on(device_type: str, tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the storages of tensors on a device; a shared storage counts once."""
    storages = {}
    for tensor in tensors:
        if tensor.device.type == device_type:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def report_memory(
    config: RunConfig, engine: TrainingEngine, mailbox: EventMailbox, step: int, *, due: bool
) -> Iterator[None]:
    """Measure the step inside the block, if it is due; all ranks must agree on that.

    The figures of all ranks go to the log and, through the mailbox, to metrics.jsonl.
    """
    if not due:
        yield
        return
    topology: Topology = engine.topology
    with peak_within(topology.device) as peak:
        yield
    ranks = gather_json(measured(engine, peak), topology.control_group)
    expected = predicted(config, engine.deepspeed.module.config, topology.device.type)
    event = {"event": "memory", "step": step, "predicted": expected, "measured_by_rank": ranks}
    mailbox.post(event)
    log.info("%s", memory_lines(event))


def memory_lines(event: dict[str, Any]) -> str:
    """Return the event as a table in MiB: prediction, smallest and largest rank."""
    lines = [
        f"memory of a rank in step {event['step']}, MiB: predicted, measured (smallest to largest)"
    ]
    for name, expected in event["predicted"].items():
        found = [rank[name] / 2**20 for rank in event["measured_by_rank"]]
        lines.append(
            f"  {name:<16}{expected / 2**20:>12.1f}{min(found):>12.1f} to {max(found):.1f}"
        )
    return "\n".join(lines)
