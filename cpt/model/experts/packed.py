"""Frozen expert matrices that stay as released: MXFP4 codes, decoded inside each product.

Decisions
    - A product decodes as many experts as fit in a scratch of `SCRATCH_BYTES`, multiplies, and lets
      go of it. Values and their order in memory are those of a matrix in the working precision, so
      the result is the same bit for bit.
    - On a GPU, decoding is an operator of its own before the grouped product (see
      `cpt.model.kernels.packed_weights`), not a part of it. That moves 4.53 bytes a weight in place
      of 0.53, but a product that decodes by itself would do so once for every tile of rows, sum up
      in another order than the grouped product, and differ from the run with a decoded base.
    - Experts without rows are not decoded where the host knows them: always on a CPU, and on a GPU
      where rows are fewer than experts, as while text is generated.

Shape letters: R rows sorted by expert, E experts, K and N the two sizes of a matrix, b blocks of 32
of the K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.model.kernels.packed_weights import decode_mxfp4
from cpt.model.weights.mxfp4 import BLOCK

SCRATCH_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Bytes of decoded experts that a product holds at a time, but always one expert."""


@dataclass(frozen=True, slots=True)
class PackedMatrices:
    """One matrix per expert, (E, K, N), as codes."""

    blocks_ENb16: torch.Tensor
    """Two codes a byte, of the K inputs of each output."""
    scales_ENb: torch.Tensor
    """Exponent of each block of 32 inputs."""
    transposed: bool = False
    """Whether these are the matrices (E, N, K) of the same codes."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device | str) -> PackedMatrices:
        """Allocate codes of matrices (E, K, N) without values.

        Raises:
            ValueError: the number of inputs is not a multiple of 32.
        """
        experts, inputs, outputs = shape
        if inputs % BLOCK:
            raise ValueError(f"MXFP4 needs a multiple of {BLOCK} inputs, got {inputs}.")
        scales_shape = (experts, outputs, inputs // BLOCK)
        return cls(
            torch.empty(*scales_shape, BLOCK // 2, dtype=torch.uint8, device=device),
            torch.empty(scales_shape, dtype=torch.uint8, device=device),
        )

    @property
    def num_experts(self) -> int:
        """How many matrices there are."""
        return self.scales_ENb.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes: 4.25 bits a weight."""
        return self.blocks_ENb16.nbytes + self.scales_ENb.nbytes

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the decoded matrices."""
        experts, outputs, num_blocks = self.scales_ENb.shape
        if self.transposed:
            return experts, outputs, num_blocks * BLOCK
        return experts, num_blocks * BLOCK, outputs

    def __getitem__(self, experts: slice | torch.Tensor) -> PackedMatrices:
        """Return some of the experts: a view of a slice, a copy of the codes at indices."""
        return PackedMatrices(self.blocks_ENb16[experts], self.scales_ENb[experts], self.transposed)

    def transpose(self, first: int, second: int) -> PackedMatrices:
        """Return the transposed matrices, as `torch.Tensor.transpose` does."""
        assert (first, second) == (1, 2), f"experts are no matrix axis: {first}, {second}"
        return PackedMatrices(self.blocks_ENb16, self.scales_ENb, not self.transposed)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values, exact in bf16, fp32 and float64.

        Returns:
            The matrices as contiguous (E, K, N), or a transposed view of them.
        """
        values_EKN = decode_mxfp4(self.blocks_ENb16, self.scales_ENb, dtype)
        if self.transposed:
            return values_EKN.transpose(1, 2)
        return values_EKN

    def experts_at_a_time(self, dtype: torch.dtype) -> int:
        """Return how many experts a product decodes at a time."""
        return experts_in_scratch(self.shape[1] * self.shape[2], dtype, self.scales_ENb.device.type)


def packed_bytes(numel: int) -> int:
    """Return the bytes of the codes of this many weights."""
    return numel * (BLOCK // 2 + 1) // BLOCK


def experts_in_scratch(numel: int, dtype: torch.dtype, device_type: str) -> int:
    """Return how many decoded experts with this many weights the scratch holds, at least one."""
    return max(1, SCRATCH_BYTES[device_type] // (numel * dtype.itemsize))


Matrices = torch.Tensor | PackedMatrices
"""One matrix per expert, (E, K, N)."""
