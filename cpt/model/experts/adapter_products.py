"""Low-rank adapters of expert matrices, in products grouped as those of the experts are.

    out     = x W + s (x A) B
    d_inner = s d_out B^T
    dx      = d_out W^T + d_inner A^T
    dA      = x^T d_inner                   dB = s (x A)^T d_out

Decisions
    - W + s A B is never formed: for all experts of a layer it would take the memory of their
      weights again, and the work of products that no row asks for.
    - x A, with r values a row, is computed again in the backward pass and not kept.
    - An adapter that all experts share has no axis of experts, so its products are plain ones over
      all rows, and its gradient is a sum over the rows of all experts of this rank. The engine adds
      up those of all ranks, as for every parameter that all ranks hold.

Shape letters: R rows sorted by expert, E experts, K and N the sizes of a matrix, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cpt.model.experts.grouped import Groups, outer, product


class ExpertAdapter(NamedTuple):
    """The adapter of one matrix per expert."""

    a: torch.Tensor
    """(E, K, r), or (K, r) if the experts share it."""
    b: torch.Tensor
    """(E, r, N), or (r, N)."""
    scale: float
    """The factor s."""

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.b.shape[-2]

    def of_experts(self, experts: slice) -> ExpertAdapter:
        """Return the adapter of some of the experts."""
        if self.a.ndim == 2:
            return self
        return ExpertAdapter(self.a[experts], self.b[experts], self.scale)

    def add_to(
        self, out_RN: torch.Tensor, rows_RK: torch.Tensor, groups: Groups, *, grouped: bool
    ) -> None:
        """Add s (x A) B to the products of the rows with their matrices."""
        inner_Rr = _product(rows_RK, self.a, groups, grouped=grouped)
        out_RN.add_(_product(inner_Rr.mul_(self.scale), self.b, groups, grouped=grouped))

    def inner_gradient(
        self, d_out_RN: torch.Tensor, groups: Groups, *, grouped: bool
    ) -> torch.Tensor:
        """Return s d_out B^T, (R, r)."""
        b_transposed = self.b.transpose(-2, -1)
        return _product(d_out_RN, b_transposed, groups, grouped=grouped).mul_(self.scale)

    def add_gradient_of_rows(
        self, d_rows_RK: torch.Tensor, d_inner_Rr: torch.Tensor, groups: Groups, *, grouped: bool
    ) -> None:
        """Add the adapter's part, d_inner A^T, to the gradient of the rows."""
        d_rows_RK.add_(_product(d_inner_Rr, self.a.transpose(-2, -1), groups, grouped=grouped))

    def gradients(
        self,
        rows_RK: torch.Tensor,
        d_inner_Rr: torch.Tensor,
        d_out_RN: torch.Tensor,
        groups: Groups,
        *,
        grouped: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of A and B; zero for an expert without rows."""
        inner_Rr = _product(rows_RK, self.a, groups, grouped=grouped).mul_(self.scale)
        if self.a.ndim == 2:
            return rows_RK.t() @ d_inner_Rr, inner_Rr.t() @ d_out_RN
        d_a_EKr = outer(rows_RK, d_inner_Rr, groups, grouped=grouped)
        d_b_ErN = outer(inner_Rr, d_out_RN, groups, grouped=grouped)
        return d_a_EKr, d_b_ErN


def _product(
    rows_RK: torch.Tensor, matrices: torch.Tensor, groups: Groups, *, grouped: bool
) -> torch.Tensor:
    if matrices.ndim == 2:
        return rows_RK @ matrices
    return product(rows_RK, matrices, groups, grouped=grouped)


class ExpertAdapters(NamedTuple):
    """The adapters of the experts of a layer."""

    gate_up: ExpertAdapter | None = None
    """That of the first product, if it has one."""
    down: ExpertAdapter | None = None
    """That of the second."""

    def of_experts(self, experts: slice) -> ExpertAdapters:
        """Return the adapters of some of the experts."""
        gate_up = None if self.gate_up is None else self.gate_up.of_experts(experts)
        down = None if self.down is None else self.down.of_experts(experts)
        return ExpertAdapters(gate_up, down)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return A and B of the first product and of the second; None where there is no adapter."""
        found: list[torch.Tensor | None] = []
        for adapter in self:
            if adapter is None:
                found += [None, None]
            else:
                found += [adapter.a, adapter.b]
        return tuple(found)

    def ranks(self) -> list[int]:
        """Return the ranks that there are."""
        return [adapter.rank for adapter in self if adapter is not None]


NO_ADAPTERS = ExpertAdapters()
