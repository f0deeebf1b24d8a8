"""Which elements of which parameters this rank's flat partitions hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cpt.deepspeed_adapter.experts import is_expert
from cpt.deepspeed_adapter.partition import full_local_numel
from cpt.deepspeed_adapter.partition_spans import partitions


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """Consecutive elements of one parameter in a flat partition."""

    name: str
    """Name of the parameter."""
    start: int
    """First element in the flat partition."""
    numel: int
    """Number of elements, without ZeRO padding."""
    offset: int
    """First element in the whole flattened parameter, all experts included."""


def fragments_of(engine: Any, ep_rank: int) -> dict[torch.Tensor, list[Fragment]]:
    """Return the fragments of every flat partition of this rank, in no particular order.

    Args:
        engine: The DeepSpeed engine.
        ep_rank: This rank's number among those that share the experts of a layer.
    """
    found: dict[torch.Tensor, list[Fragment]] = {}
    for partition in partitions(engine):
        fragments = []
        for name, span in partition.spans.items():
            offset = global_offset(partition.parameters[name], span.offset, ep_rank)
            fragment = Fragment(name=name, start=span.start, numel=span.numel, offset=offset)
            fragments.append(fragment)
        found[partition.flat] = fragments
    return found


def global_offset(parameter: Any, offset: int, ep_rank: int) -> int:
    """Return the place of an element in the whole flattened parameter.

    Args:
        parameter: The parameter.
        offset: Its place in the flattened tensor that this rank would hold without ZeRO.
        ep_rank: As in `fragments_of`.
    """
    if is_expert(parameter):
        return offset + ep_rank * full_local_numel(parameter)
    return offset
