"""The groups of parameters that DeepSpeed updates one after the other."""

from __future__ import annotations

SUB_GROUP_SIZE = 10**9
"""Parameters after which ZeRO-3 begins another group for the update, unless the DeepSpeed JSON says
otherwise.
"""
EXPERT_GROUP_SIZE = 178_956_971
"""Parameters of an optimizer group of experts, at most, unless it is a single one (deepspeed
0.19.8, moe/utils.py).
"""


def expert_groups(numels: list[int]) -> list[list[int]]:
    """Divide experts' parameters as DeepSpeed does: a group ends before it is too large."""
    groups: list[list[int]] = [[]]
    for numel in numels:
        if sum(groups[-1]) + numel > EXPERT_GROUP_SIZE:
            groups.append([])
        groups[-1].append(numel)
    return groups


def sub_groups(numels: list[int], size: int) -> list[list[int]]:
    """Divide a group as ZeRO-3 does: a part ends as soon as it has reached the size."""
    parts: list[list[int]] = [[]]
    for numel in numels:
        if sum(parts[-1]) >= size:
            parts.append([])
        parts[-1].append(numel)
    return parts
