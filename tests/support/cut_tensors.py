"""Tensors that are joined and cut among ranks."""

from __future__ import annotations

import itertools

from cpt.parallel.whole_blocks import HeldRange


def cut(numels: list[int], cuts: list[int]) -> list[dict[int, HeldRange]]:
    """Return what each rank holds of tensors that are joined and then cut at some elements."""
    bounds = [0, *cuts, sum(numels)]
    spans: list[dict[int, HeldRange]] = [{} for _ in bounds[1:]]
    first = 0
    for tensor, numel in enumerate(numels):
        for rank, (start, end) in enumerate(itertools.pairwise(bounds)):
            low = max(first, start)
            high = min(first + numel, end)
            if low < high:
                spans[rank][tensor] = HeldRange(
                    offset=low - first, start=low - start, numel=high - low
                )
        first += numel
    return spans
