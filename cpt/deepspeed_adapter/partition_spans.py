"""Which elements of which parameters lie where in this rank's flat partitions.

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py,
utils/tensor_fragment.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cpt.deepspeed_adapter.shards import flat_partitions, parameters_of_partitions, place_of
from cpt.parallel.whole_blocks import HeldRange


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatPartition:
    """A flat partition of the fp32 master weights, and the parameters that it is a part of."""

    flat: torch.Tensor
    """This rank's part of the parameters, joined; its `grad` and its optimizer state are as
    long."""
    group: dist.ProcessGroup
    """The ranks whose partitions together hold the parameters."""
    parameters: dict[str, Any]
    """All of them by name, also those of which this rank holds nothing, in the same order on all
    ranks of the group."""
    spans: dict[str, HeldRange]
    """What this rank holds of them."""


def partitions(engine: Any) -> list[FlatPartition]:
    """Return this rank's flat partitions, in the order in which the engine updates them."""
    zero = engine.optimizer
    is_stage3 = engine.zero_optimization_stage() == 3
    members = parameters_of_partitions(engine)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found = []
    for index, flat in enumerate(flat_partitions(engine)):
        parameters = {names[id(parameter)]: parameter for parameter in members[index]}
        if is_stage3:
            group = members[index][0].ds_process_group
        else:
            group = zero.real_dp_process_group[index]
        spans = {}
        for name, parameter in parameters.items():
            place = place_of(engine, parameter)
            if place is not None:
                spans[name] = HeldRange(offset=place.offset, start=place.start, numel=place.numel)
        found.append(FlatPartition(flat=flat, group=group, parameters=parameters, spans=spans))
    return found
