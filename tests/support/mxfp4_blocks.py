"""Blocks of 32 values on which roundings to MXFP4 could differ."""

from __future__ import annotations

import torch

from cpt.model.weights.mxfp4 import BLOCK

FIRST_NOT_FINITE = 0x7F80
"""The pattern of infinity in bf16."""
BINADES = 10
"""Powers of two below the largest value of a block at which a value may lie; all lower ones are
rounded to 0."""

EXPONENTS_AT_THE_ENDS = (0, 1, 2, 3, 5, 252, 254)
"""Exponent fields of bf16 beside which a block has other code values: denormal ones, clamped ones.
"""
MANTISSAS_AT_BORDERS = (0, 1, 63, 64, 65, 127)
"""Mantissas around that of 6, from which on `ceil` takes the next exponent, and at both ends."""


def every_pattern_below(largest: int) -> torch.Tensor:
    """Return blocks (b, 32) in bf16 that hold a largest pattern and each one below it.

    They go down to BINADES powers of two below it; signs take turns.
    """
    lowest = max(0, largest - BINADES * 128)
    others = torch.arange(lowest, largest + 1)
    filler = torch.full((-len(others) % (BLOCK - 1),), lowest)
    others = torch.cat([others, filler]).view(-1, BLOCK - 1)
    patterns = torch.cat([torch.full((len(others), 1), largest), others], dim=1)
    signs = torch.arange(patterns.numel()).view_as(patterns) % 2
    return (patterns - signs * 0x8000).to(torch.int16).view(torch.bfloat16)


def hard_blocks(num_largest: int, seed: int = 0) -> torch.Tensor:
    """Return blocks (b, 32) in bf16 whose largest value has any exponent and mantissa.

    Args:
        num_largest: Largest values that are drawn, beside those at both ends of the range.
        seed: Of the draw, and of blocks of Gaussian values at every power of two.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = []
    for exponent in EXPONENTS_AT_THE_ENDS:
        for mantissa in MANTISSAS_AT_BORDERS:
            ends.append((exponent << 7) + mantissa)
    drawn = torch.randint(0, FIRST_NOT_FINITE, (num_largest,), generator=generator)
    blocks = [every_pattern_below(largest) for largest in [*ends, *drawn.tolist()]]
    gaussian = torch.randn(254, 1, BLOCK, generator=generator)
    powers = torch.arange(-133, 121).view(-1, 1, 1)
    blocks.append(torch.ldexp(gaussian, powers).bfloat16().flatten(0, 1))
    # multiples of a quarter: ties, and blocks whose errors are equal
    quarters = torch.randint(-28, 29, (256, BLOCK), generator=generator) / 4
    blocks.append(quarters.bfloat16())
    return torch.cat(blocks)


def as_matrices(blocks: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return blocks as the values (n, 32, outputs) of matrices, without those that fill none."""
    whole = len(blocks) // outputs * outputs
    return blocks[:whole].view(-1, outputs, BLOCK).transpose(1, 2).contiguous()


def bits(values: torch.Tensor) -> torch.Tensor:
    """Return the patterns of bf16 or fp32 values, on the host."""
    return values.cpu().view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)
