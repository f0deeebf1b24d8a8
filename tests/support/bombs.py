"""Texts of some hundred bytes that stand for very much more."""

from __future__ import annotations

import itertools


def alias_bomb() -> str:
    """Return YAML whose aliases stand for 9^9 values, nine times as many from level to level."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for former, name in itertools.pairwise("abcdefghi"):
        nine_times = ", ".join([f"*{former}"] * 9)
        lines.append(f"{name}: &{name} [{nine_times}]")
    return "\n".join(lines)
