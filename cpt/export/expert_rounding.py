"""Experts rounded to MXFP4, one at a time, and the account of what that does to them.

The exported values are those of `mxfp4.encode` under a rule, whatever the base is. Where the base
is in MXFP4 and has a block with the very same values, the base's bytes are written for it: a block
that does not use its range has several codes for the same values, and only so an untouched release
comes out byte for byte. An export of an export has its bytes.

Shape letters: C inputs (columns), R output rows, b blocks of a row (C / 32).
"""

from __future__ import annotations

import torch

from cpt.config.precision_sections import ExponentRule
from cpt.errors import CheckpointError
from cpt.export.export_base import BaseExpert
from cpt.export.rounding_sums import RoundingSums
from cpt.model.kernels.block_rounding import round_blocks
from cpt.model.weights import mxfp4
from cpt.model.weights.values import MAX_TENSORS

Codes = tuple[torch.Tensor, torch.Tensor]
"""Blocks (1, R, b, 16) and scales (1, R, b)."""
_RULE_OF_CODES: dict[ExponentRule, ExponentRule] = {
    "floor": "floor",
    "ceil": "ceil",
    "least": "floor",
}
"""The rule that gives rounded values the codes that a rule gives them: nothing is lost with the
exponent of `floor`, and so `least` takes it.
"""


class ExpertRounder:
    """Rounds experts by one rule and counts what that does to each tensor."""

    def __init__(self, rule: ExponentRule) -> None:
        self.rule = rule
        self.sums: dict[str, RoundingSums] = {}
        """What was counted so far, by tensor."""

    def round(self, name: str, exact_1CR: torch.Tensor, base: BaseExpert | None) -> Codes:
        """Return the codes of an expert.

        Args:
            name: Name of its tensor.
            exact_1CR: The expert in bf16.
            base: The same expert of the base; None if there is none.
        """
        rounded_1CR = round_blocks(exact_1CR, self.rule)
        # The codes are those of the rounded values, whose largest one may use less of the range of
        # its block than the one before: then an export of the export has the same codes.
        codes = mxfp4.encode(rounded_1CR, _RULE_OF_CODES[self.rule])
        sums = self.sums.setdefault(name, RoundingSums())
        sums.add(exact_1CR, rounded_1CR)
        if base is None:
            return codes
        in_mxfp4_1CR = base.values_1CR
        if base.codes is None:
            in_mxfp4_1CR = round_blocks(base.values_1CR, self.rule)
        sums.compare(exact_1CR, rounded_1CR, base.values_1CR, in_mxfp4_1CR)
        if base.codes is None:
            return codes
        return _with_codes_of_base(codes, rounded_1CR, base.values_1CR, base.codes)


def _with_codes_of_base(
    codes: Codes, rounded_1CR: torch.Tensor, base_1CR: torch.Tensor, base_codes: Codes
) -> Codes:
    """Return codes with those of the base in every block that has the base's values bit for bit."""
    # bits, because 0 and -0 are equal as numbers and have different codes
    is_same_1CR = rounded_1CR.view(torch.int16) == base_1CR.view(torch.int16)
    is_same_1Rb = is_same_1CR.transpose(1, 2).unflatten(-1, (-1, mxfp4.BLOCK)).all(-1)
    blocks = torch.where(is_same_1Rb.unsqueeze(-1), base_codes[0], codes[0])
    scales = torch.where(is_same_1Rb, base_codes[1], codes[1])
    return blocks, scales


class FiniteCheck:
    """Counts values that are not finite in bf16, in which an MXFP4 export keeps what it keeps."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, int]] = {}

    def look(self, name: str, values: torch.Tensor) -> None:
        """Take a piece of a tensor into account, in bf16."""
        if values.isfinite().all():
            return
        num_nan = int(values.isnan().sum())
        num_infinite = int(values.isinf().sum())
        before = self._found.get(name, (0, 0))
        self._found[name] = (before[0] + num_nan, before[1] + num_infinite)

    def refuse(self, checkpoint: str) -> None:
        """Refuse what was found.

        Args:
            checkpoint: Name of the checkpoint.

        Raises:
            CheckpointError: values are not finite; it names tensors and counts.
        """
        if not self._found:
            return
        told = []
        for name, (num_nan, num_infinite) in sorted(self._found.items())[:MAX_TENSORS]:
            told.append(f"tensor '{name}' holds {num_nan:,} NaN and {num_infinite:,} infinite")
        left = len(self._found) - len(told)
        if left:
            told.append(f"{left} more tensors are so")
        raise CheckpointError(
            f"{checkpoint} is not exported to MXFP4, which has no code for such values: "
            f"{'; '.join(told)}. The model had diverged when it was saved: export an earlier "
            "checkpoint with --step (cpt checkpoints lists them)."
        )
