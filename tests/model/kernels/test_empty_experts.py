"""Matrices of experts without rows are cleared, and no others are touched."""

from __future__ import annotations

import pytest
import torch

from cpt.model.kernels.empty_experts import clear_empty_experts


@pytest.mark.parametrize("counts", [(0, 3, 0), (1, 2, 3), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_clears_what_the_operator_clears(
    counts: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_empty_experts

    counts_E = torch.tensor(counts, device=kernel_device)
    matrices = torch.randn(3, 129, 70, device=kernel_device).to(dtype)
    matrices[0, 0, 0] = float("nan")
    expected = matrices.clone()
    clear_empty_experts(expected, counts_E)
    triton_empty_experts.clear(matrices, counts_E)
    assert torch.equal(matrices.nan_to_num(7), expected.nan_to_num(7))
    for matrix, count in zip(matrices, counts, strict=True):
        assert (matrix == 0).all() == (count == 0)
