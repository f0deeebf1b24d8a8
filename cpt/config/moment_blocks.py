"""Which layouts cut the blocks of 8-bit moments: the check of `train.optimizer_state`.

Blocks are consecutive elements of a whole parameter, all experts included. Each of R ranks holds
1/R of a matrix, whatever the ZeRO stage and the number of expert-parallel ranks are: under ZeRO-3 a
part of every matrix, under ZeRO 1 and 2 a part of the matrices that follow each other in a group.
If R parts of every matrix are whole blocks, so are the parts of a group.
"""

from __future__ import annotations

import math
from typing import Any

from cpt.config.layout import nearest_divisors
from cpt.storage.state_bytes import MOMENT_BLOCK, MomentForm


def moment_block_problems(form: MomentForm, model: Any, *, world_size: int) -> list[str]:
    """Return why moments in blocks cannot be shared by the ranks of a layout.

    Args:
        form: `train.optimizer_state`.
        model: The model's GptOssConfig.
        world_size: Number of ranks.
    """
    if form != "int8":
        return []
    sizes = matrix_sizes(model)
    for name, numel in sizes.items():
        if numel % MOMENT_BLOCK:
            return [
                f"train.optimizer_state is int8, but {name} has {numel:,} elements, and moments "
                f"are held in blocks of {MOMENT_BLOCK}. Give train.optimizer_state: bf16."
            ]
    blocks = math.gcd(*sizes.values()) // MOMENT_BLOCK
    if blocks % world_size == 0:
        return []
    return [
        f"train.optimizer_state is int8, but {world_size} ranks cannot share the matrices of this "
        f"model without cutting blocks of {MOMENT_BLOCK} moments. Nearest world sizes that can: "
        f"{nearest_divisors(blocks, world_size)}. train.optimizer_state: bf16 has no such "
        "condition."
    ]


def matrix_sizes(model: Any) -> dict[str, int]:
    """Return the elements of the matrices whose moments may be held in blocks, by name."""
    hidden = int(model.hidden_size)
    head_dim = int(model.head_dim)
    experts = int(model.num_local_experts)
    inner = int(model.intermediate_size)
    return {
        "embed_tokens, and lm_head,": int(model.vocab_size) * hidden,
        "q_proj, and o_proj,": int(model.num_attention_heads) * head_dim * hidden,
        "k_proj, and v_proj,": int(model.num_key_value_heads) * head_dim * hidden,
        "gate_up_proj": experts * hidden * 2 * inner,
        "down_proj": experts * inner * hidden,
    }
