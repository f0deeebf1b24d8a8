"""Orthogonalized matrices: the update that Muon makes of a momentum.

For a matrix G = U S V^T the result is near U V^T: the matrix of the same size whose singular values
are all about 1. A quintic Newton-Schulz iteration gives it from products alone:

    X <- G / |G|          A = X X^T          X <- a X + (b A + c A A) X

Its coefficients are chosen so that small singular values grow fast. They then end between 0.7 and
1.2, which trains as well as 1 does (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

A singular value that is tiny next to |G| grows by at most a^steps, 485 for 5 steps. So a difference
in the last digit of G, as another order of summation makes, stays small in the result.

Shape letters: N matrices, R rows, C columns, S the smaller of both, L the larger.
"""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c (Jordan et al. 2024)."""
SMALLEST_NORM = 1e-7
"""Norm below which a matrix is not scaled up: one that is zero stays zero."""


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the precision of the iteration: bf16 where products in it are fast, else fp32.

    The iteration forgives rounding, because it only needs singular values near 1.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalize(matrices_NRC: torch.Tensor, steps: int) -> torch.Tensor:
    """Return matrices with the singular vectors of the given ones and singular values near 1.

    Args:
        matrices_NRC: The matrices; products are computed in their dtype.
        steps: Steps of the iteration.
    """
    is_tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x_NSL = matrices_NRC.mT if is_tall else matrices_NRC
    # by rows first: one sum over a whole matrix would lose digits on a CPU
    norms_NS1 = torch.linalg.vector_norm(x_NSL, dim=-1, keepdim=True, dtype=torch.float32)
    norms_N11 = torch.linalg.vector_norm(norms_NS1, dim=-2, keepdim=True)
    x_NSL = x_NSL / norms_N11.clamp(min=SMALLEST_NORM).to(x_NSL.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram_NSS = x_NSL @ x_NSL.mT
        factor_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c)
        x_NSL = torch.baddbmm(x_NSL, factor_NSS, x_NSL, beta=a)
    return x_NSL.mT if is_tall else x_NSL


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """Return the floating-point operations of one matrix."""
    small = min(rows, columns)
    large = max(rows, columns)
    # two products of (S, L) with the other side, and one of (S, S) with itself
    return steps * (4 * small * small * large + 2 * small**3)
