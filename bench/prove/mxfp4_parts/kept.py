"""What an export keeps of the movement of the experts, over all matrices together.

The figures are those of cpt/export/rounding_sums.py, which an export reports of itself.
"""

from __future__ import annotations

from cpt.export.rounding_sums import RoundingSums
from cpt.model.weights.hf_layout import is_expert_matrix
from mxfp4_parts.training import Weights


def against_base(exported: Weights, trained: Weights, base: Weights) -> dict[str, float]:
    """Return what an export kept.

    Args:
        exported: The values that are served.
        trained: The values that were trained, which were rounded.
        base: The values that the training began with, of which MXFP4 has all.

    Returns:
        `kept`, `noise`, `changed` (share of values that are not the base's), `error` (relative l2
        error of the exported values) and `moved` (movement as a share of the base's norm).
    """
    sums = RoundingSums()
    for name, values in exported.items():
        if is_expert_matrix(name, values.shape):
            step_end = trained[name].bfloat16()
            sums.add(step_end, values)
            sums.compare(step_end, values, base[name], base[name])
    figures = sums.figures()
    names = {
        "kept": "kept",
        "noise": "noise",
        "changed": "changed_codes",
        "error": "relative_l2_error",
        "moved": "movement",
    }
    return {own: float(figures[name] or 0.0) for own, name in names.items()}
