"""Zero gradients for experts without rows, as an operator.

A grouped product with one matrix per group as its result does not promise what it leaves where a
group is empty: CUTLASS leaves it unwritten on compute capability 10 (pytorch#172439, cutlass#2674).
Programs of experts that have rows end at once, so this costs nothing where none is empty.

Shape letters: E experts, K and N the two sizes of a matrix.
"""

from __future__ import annotations

import torch

from cpt.model.kernels.availability import fused_kernels_run_on


@torch.library.custom_op("cpt::clear_empty_experts", mutates_args=("matrices_EKN",))
def clear_empty_experts(matrices_EKN: torch.Tensor, counts_E: torch.Tensor) -> None:
    """Fill the matrices of experts without rows with zeros; the host does not wait.

    Args:
        matrices_EKN: One matrix per expert; contiguous.
        counts_E: Rows of each expert.
    """
    if fused_kernels_run_on(matrices_EKN):
        from cpt.model.kernels import triton_empty_experts

        triton_empty_experts.clear(matrices_EKN, counts_E)
    else:
        matrices_EKN.masked_fill_((counts_E == 0)[:, None, None], 0)


@clear_empty_experts.register_fake
def _clear_empty_experts_shape(matrices_EKN: torch.Tensor, counts_E: torch.Tensor) -> None:
    return None
