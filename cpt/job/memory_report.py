"""What a rank's memory really holds during one step, part by part, beside what
`cpt.planning.memory` predicts.

State (weights, gradients, optimizer) is the size of the tensors that the engine keeps.  Everything
else comes and goes within a step: its peak is what the allocator hands out above its level before
the step.  CUDA keeps that count; on a CPU torch's profiler follows every allocation, which slows
that one step down.
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
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from cpt.planning.memory import count_parameters, device_memory
from cpt.telemetry.mailbox import EventMailbox
from cpt.training.engine import TrainingEngine

log = logging.getLogger("cpt.planning.memory")

STATE = ("weights", "gradients", "optimizer")
PEAK = "peak of a step"


class Peak:
    """Highest level of the allocator above where it stood."""

    def __init__(self) -> None:
        self.num_bytes = 0


@contextmanager
def peak_within(device: torch.device) -> Iterator[Peak]:
    """Measure the block's peak of allocated memory; the result is there when the block is left."""
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
    """(time, address, size) of all allocations, and of all frees with a negative size, in order of
    time.
    """
    found, waiting = [], list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append(
                (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
            )
    return sorted(found)


def highest_level(allocations: list[tuple[int, int, int]]) -> int:
    """The largest sum of what is allocated at a time, above where it stood at the beginning.

    The profiler does not see what a thread of gloo frees, as it does when it is the last to let go
    of a tensor.  Memory that is handed out again has been freed: it would count twice, and more
    with every step.

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
    """The parts of `cpt.planning.memory`, grouped as they can be measured.

    ZeRO 1 and 2 make the gradients anew in every step, so there they belong to its peak.
    """
    counts = count_parameters(model, config.train.freeze)
    parts = device_memory(config, model, counts, device_type)
    kept = STATE if config.zero_stage == 3 else ("weights", "optimizer")
    groups = {name: parts[name] for name in kept}
    return {**groups, PEAK: sum(size for name, size in parts.items() if name not in kept)}


def measured(engine: TrainingEngine, peak: Peak) -> dict[str, int]:
    """The same groups of this rank, as they are; state that lies on another device is left out."""
    device = engine.topology.device.type
    held = state_tensors(engine.deepspeed)
    sizes = {
        name: sum(t.untyped_storage().nbytes() for t in unique(tensors) if t.device.type == device)
        for name, tensors in held.items()
    }
    return {**sizes, PEAK: peak.num_bytes}


def unique(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views of one storage count once."""
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())


@contextmanager
def report_memory(
    config: RunConfig, engine: TrainingEngine, mailbox: EventMailbox, step: int, *, due: bool
) -> Iterator[None]:
    """Measure the step inside the block, if it is due; the figures of all ranks go to the log and,
    through the mailbox, to metrics.jsonl.

    All ranks must agree on `due`.
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
    """The event as a table: predicted, and the largest and smallest measurement of the ranks, in
    MiB.
    """
    lines = [
        f"memory of a rank in step {event['step']}, MiB: predicted, measured (smallest to largest)"
    ]
    for name, expected in event["predicted"].items():
        found = [rank[name] / 2**20 for rank in event["measured_by_rank"]]
        lines.append(
            f"  {name:<16}{expected / 2**20:>12.1f}{min(found):>12.1f} to {max(found):.1f}"
        )
    return "\n".join(lines)
