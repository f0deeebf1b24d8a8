"""What an export keeps of the movement of the experts, over all matrices together.

With the base w, the trained values t (in bf16, which an export rounds) and the exported values q:

    step  = t - w
    kept  = <q - w, step> / <step, step>     1 if all is kept, 0 if the base comes back
    noise = |q - w - step| / |step|          what was added across or along the step
    moved = |step| / |w|
"""

from __future__ import annotations

import math

import torch

from mxfp4_parts.training import Weights, is_expert_matrix


def against_base(exported: Weights, trained: Weights, base: Weights) -> dict[str, float]:
    """Return what an export kept.

    Args:
        exported: The values that are served.
        trained: The values that were trained, which were rounded.
        base: The values that the training began with.

    Returns:
        `kept`, `noise`, `changed` (share of values that are not the base's) and `error`
        (relative l2 error of the exported values).
    """
    sums = dict.fromkeys(("along", "step", "rest", "error", "trained"), 0.0)
    changed = 0
    count = 0
    for name, values in exported.items():
        if not is_expert_matrix(name):
            continue
        w = base[name].double()
        t = trained[name].bfloat16().double()
        q = values.double()
        step = t - w
        sums["along"] += float(((q - w) * step).sum())
        sums["step"] += float(step.square().sum())
        sums["rest"] += float((q - t).square().sum())
        sums["trained"] += float(t.square().sum())
        changed += int((q != w).sum())
        count += q.numel()
    return {
        "kept": sums["along"] / sums["step"],
        "noise": math.sqrt(sums["rest"] / sums["step"]),
        "changed": changed / count,
        "error": math.sqrt(sums["rest"] / sums["trained"]),
    }


def movement(trained: Weights, base: Weights) -> float:
    """Return the movement of the experts' matrices as a share of their norm."""
    moved = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    for name, values in trained.items():
        if is_expert_matrix(name):
            w = base[name].double()
            moved += (values.bfloat16().double() - w).square().sum()
            size += w.square().sum()
    return math.sqrt(float(moved / size))
