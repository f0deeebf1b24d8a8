"""Expert matrices of a directory as MXFP4 codes: read as they are stored, or packed without loss.

A matrix that is stored in floating point is taken if decode(encode(w)) = w, as it is in a model
that was decoded for other programs. Nothing is ever rounded here.

Shape letters: R output rows, C inputs (columns), b blocks of a row (C / 32).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch

from cpt.errors import ConfigError
from cpt.model.weights import mxfp4
from cpt.model.weights.values import ValuesSeen

CURE = (
    "Give adapter.base: bf16, or a model.path that is MXFP4: the released model, or what "
    "cpt export --format mxfp4 writes."
)
"""What to do about a base that is not MXFP4."""
SURELY_FINITE = 252
"""The largest scale with which the largest code, 6, is finite in bf16."""


class CodeSource(Protocol):
    """A place that the codes of experts come from."""

    def codes(self, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return blocks (R, b, 16) and scales (R, b) of an expert of the matrices `name`."""
        ...


def packed_exactly(
    values_CR: torch.Tensor, name: str, expert: int, file: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of an expert that is stored in floating point.

    Args:
        values_CR: The matrix.
        name: Name of the tensor, for messages.
        expert: Which of its experts this is.
        file: The file that it is in.

    Raises:
        ConfigError: MXFP4 does not have all of these values.
    """
    exact = torch.promote_types(values_CR.dtype, torch.float32)
    values_1CR = values_CR.to(exact)[None]
    blocks_1Rb16, scales_1Rb = mxfp4.encode(values_1CR)
    decoded_CR = mxfp4.decode(blocks_1Rb16, scales_1Rb, exact)[0]
    wrong = (decoded_CR != values_1CR[0]).flatten().nonzero().flatten()
    if wrong.numel():
        first = int(wrong[0])
        value = float(values_CR.flatten()[first])
        nearest = float(decoded_CR.flatten()[first])
        raise ConfigError(
            f"{file}: tensor '{name}' is not MXFP4: {wrong.numel():,} of {values_CR.numel():,} "
            f"values of expert {expert} have no code, the first is {value:g} (nearest {nearest:g}) "
            f"at element {expert * values_CR.numel() + first}. adapter.base: mxfp4 rounds no "
            f"weights. {CURE}"
        )
    return blocks_1Rb16[0], scales_1Rb[0]


def look_at_codes(
    seen: ValuesSeen, position: int, blocks_Rb16: torch.Tensor, scales_Rb: torch.Tensor
) -> None:
    """Take an expert into account without decoding it, unless it may hold what is not finite.

    Args:
        seen: What was seen of the tensor. Its largest magnitude becomes right within a factor of 8.
        position: First element of the expert in the flattened tensor (E, C, R).
        blocks_Rb16: Its blocks.
        scales_Rb: Their scales.
    """
    if int(scales_Rb.max()) > SURELY_FINITE:
        values = mxfp4.decode(blocks_Rb16[None], scales_Rb[None])
        seen.look(position, values.flatten())
        return
    has_magnitude_Rb = (blocks_Rb16 & 0x77).amax(-1) > 0
    largest_scale = int((scales_Rb * has_magnitude_Rb).max())
    seen.largest = max(seen.largest, math.ldexp(1.0, largest_scale - 127))
