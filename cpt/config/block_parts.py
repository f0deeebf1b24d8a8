"""Which layouts cut the blocks of MXFP4: the check of `train.quantize` against sizes.

Under ZeRO-3 a rank holds consecutive elements of the flattened (experts, in, out) tensor of its
experts. 32 inputs of every output of an expert are consecutive there, a block column: a part is
whole if it consists of such columns.
"""

from __future__ import annotations

import math
from typing import Any

from cpt.config.precision_sections import BLOCK, QuantizeSection

NUM_SUGGESTIONS = 3
"""Sizes that a refusal names."""


def block_problems(
    section: QuantizeSection, model: Any, *, zero_stage: int, world_size: int, ep_size: int
) -> list[str]:
    """Return why the experts of a model cannot be rounded in a layout.

    Args:
        section: The `train.quantize` section.
        model: The model's GptOssConfig.
        zero_stage: The ZeRO stage.
        world_size: Number of ranks.
        ep_size: Ranks that together hold all experts of a layer.
    """
    if not section.is_on:
        return []
    problems = []
    for key in ("hidden_size", "intermediate_size"):
        size = int(getattr(model, key))
        if size % BLOCK:
            problems.append(
                f"train.quantize.experts is mxfp4, but {key} of the model is {size}, and MXFP4 has "
                f"blocks of {BLOCK} weights. Give train.quantize.experts: none."
            )
    if problems or zero_stage != 3 or _is_whole(model, world_size, ep_size):
        return problems
    sharing = world_size // ep_size
    columns = block_columns(model) * (model.num_local_experts // ep_size)
    return [
        f"train.quantize: {sharing} ranks share the experts of a rank (world size {world_size} / "
        f"expert_parallel.autoep_size {ep_size}) under ZeRO-3, and their {columns} columns of "
        f"blocks of {BLOCK} inputs cannot be divided among them. "
        f"{_cures(model, world_size, ep_size)}"
    ]


def block_columns(model: Any) -> int:
    """Return the number that the parts of one expert must divide: columns of both its matrices."""
    return math.gcd(int(model.hidden_size), int(model.intermediate_size)) // BLOCK


def _is_whole(model: Any, world_size: int, ep_size: int) -> bool:
    """Return whether no part of ZeRO-3 cuts a block."""
    columns = block_columns(model) * (model.num_local_experts // ep_size)
    return columns % (world_size // ep_size) == 0


def _cures(model: Any, world_size: int, ep_size: int) -> str:
    """Return what to change, with the nearest sizes that cut no block."""
    experts = model.num_local_experts
    sizes = [
        size
        for size in range(1, experts + 1)
        if experts % size == 0 and world_size % size == 0 and _is_whole(model, world_size, size)
    ]
    worlds = [
        size
        for size in range(ep_size, 2 * world_size + 1, ep_size)
        if _is_whole(model, size, ep_size)
    ]
    cures = []
    if sizes:
        cures.append(f"autoep_size {_nearest(sizes, ep_size)} with this world size")
    cures.append(f"a world size of {_nearest(worlds, world_size)} with this autoep_size")
    return f"Sizes that fit: {'; '.join(cures)}. ZeRO stage 1 or 2 has no such condition."


def _nearest(sizes: list[int], wanted: int) -> str:
    nearest = sorted(sizes, key=lambda size: abs(size - wanted))[:NUM_SUGGESTIONS]
    return " or ".join(str(size) for size in sorted(nearest))
