"""The linear maps that parameters of gpt-oss hold: what Muon takes for one matrix.

Decisions
    One linear map is one matrix, however it is stored. Muon's update depends on which numbers form
    a matrix, so it would change with the storage otherwise: fused matrices are known to train worse
    (verenalabs.com/posts/evaluating_muon__moe_in_llms), and Megatron-Core splits fused q, k and v
    for Muon. Here each expert is by itself, and so are gate and up, although the released model
    stores them in one tensor, their outputs interleaved. q, k, v and o are stored apart.
    Embeddings and the output head are tables of one row per token, not maps between activations;
    AdamW trains them, as everywhere (kellerjordan.github.io/posts/muon). So are the routers: a row
    belongs to one expert. Practice differs there: Moonlight, which trains every matrix but
    embedding and head with Muon, does not except them, others do. In a trained model the choice of
    experts is what must not move fast: an orthogonalized update moves all directions of a router
    alike, also those along which tokens hardly differ.
    Biases, norms and sinks are no matrices. gpt-oss stores the biases of experts as a matrix with a
    row for each expert, so names decide, not the number of dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpt.model.weights.hf_layout import is_expert_name

ATTENTION_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Modules of attention whose weights are linear maps."""
EXPERT_MAPS = ("gate_up_proj", "down_proj")
"""Parameters of experts that are linear maps, the first of them two in one."""
GATE_AND_UP = 2
"""Maps whose outputs alternate in `gate_up_proj`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearMaps:
    """The linear maps of one parameter.

    The parameter consists of blocks of consecutive elements, (rows, columns * interleaved); column
    j of map i of a block is column j * interleaved + i of the block.
    """

    blocks: int
    """Blocks of the parameter: 1, or its experts."""
    rows: int
    """Rows of a map."""
    columns: int
    """Columns of a map."""
    interleaved: int = 1
    """Maps of a block."""

    @property
    def block_numel(self) -> int:
        """Number of elements of a block."""
        return self.rows * self.columns * self.interleaved

    @property
    def numel(self) -> int:
        """Number of elements of the parameter."""
        return self.blocks * self.block_numel

    def of_part(self, ep_size: int) -> LinearMaps:
        """Return the maps of the experts that one of so many ranks holds."""
        return replace(self, blocks=self.blocks // ep_size)

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Shape of a block: (rows, columns, interleaved)."""
        return self.rows, self.columns, self.interleaved

    def is_like(self, other: LinearMaps) -> bool:
        """Return whether the blocks of another parameter have the same shape."""
        return self.block_shape == other.block_shape


def is_for_muon(name: str) -> bool:
    """Return whether a parameter of this name holds linear maps that Muon trains."""
    parents = name.split(".")
    last = parents.pop()
    if is_expert_name(name):
        return last in EXPERT_MAPS
    return last == "weight" and bool(parents) and parents[-1] in ATTENTION_MAPS


def linear_maps(name: str, shape: Sequence[int]) -> LinearMaps | None:
    """Return the linear maps of a parameter that Muon trains; None if AdamW does.

    Args:
        name: Name of the parameter.
        shape: Its shape, or that of the part of it that a rank would hold without ZeRO.
    """
    if not is_for_muon(name):
        return None
    if len(shape) == 2:
        return LinearMaps(blocks=1, rows=shape[0], columns=shape[1])
    experts, rows, columns = shape
    interleaved = GATE_AND_UP if name.endswith(EXPERT_MAPS[0]) else 1
    return LinearMaps(
        blocks=experts, rows=rows, columns=columns // interleaved, interleaved=interleaved
    )
