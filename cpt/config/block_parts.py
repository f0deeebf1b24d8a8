"""Which layouts cut the blocks of MXFP4: the check of `train.quantize` against sizes.

Under ZeRO-3 a rank holds consecutive elements of the flattened (experts, in, out) tensor of its
experts. 32 inputs of every output of an expert are consecutive there, a block column: a part is
whole if it consists of such columns. All ranks together hold every column once, however many of
them are ranks of expert parallelism, so the number of columns must be a multiple of their number.
"""

from __future__ import annotations

import math
from typing import Any

from cpt.config.layout import nearest_divisors
from cpt.config.precision_sections import BLOCK, QuantizeSection


def block_problems(
    section: QuantizeSection, model: Any, *, zero_stage: int, world_size: int
) -> list[str]:
    """Return why the experts of a model cannot be rounded in a layout.

    Args:
        section: The `train.quantize` section.
        model: The model's GptOssConfig.
        zero_stage: The ZeRO stage.
        world_size: Number of ranks.
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
    if problems or zero_stage != 3:
        return problems
    columns = block_columns(model)
    if columns % world_size == 0:
        return []
    return [
        f"train.quantize.experts is mxfp4, but {world_size} ranks cannot share an expert matrix "
        f"under ZeRO-3 without cutting its blocks: {columns} columns of blocks ({BLOCK} inputs of "
        f"all outputs of an expert) are no multiple of {world_size}, whatever autoep_size is. "
        f"Nearest world sizes that can: {nearest_divisors(columns, world_size)}. ZeRO stages 1 "
        "and 2 have no such condition."
    ]


def block_columns(model: Any) -> int:
    """Return what the world size must divide: the columns that both matrices of a layer have."""
    columns_of_an_expert = math.gcd(int(model.hidden_size), int(model.intermediate_size)) // BLOCK
    return int(model.num_local_experts) * columns_of_an_expert
