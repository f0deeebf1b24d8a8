"""Batches that rollbacks have given up, and the batch that a step trains on.

Batches are numbered in the order of the mixture. Without a rollback, batch and step are the same
number; cpt/job/progress.py says what rollbacks do to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.bounded.json_text import LARGE_BYTES, read_json

FILE = "rollbacks.json"
Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of batches, ascending and disjoint."""


def batch_of_step(step: int, skip_ranges: Ranges) -> int:
    """Return the batch that a step trains on; steps count from 0 here."""
    batch = step
    for first, last in skip_ranges:
        if batch < first:
            break
        batch += last - first
    return batch


def merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Return the same batches as ascending, disjoint ranges."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        elif first < last:
            result.append((first, last))
    return tuple(result)


def skipped_by(rollbacks: list[dict[str, int]]) -> list[tuple[int, int]]:
    """Return the batches that rollbacks have given up."""
    return [(rollback["first_batch"], rollback["last_batch"]) for rollback in rollbacks]


def read_rollbacks(run_dir: Path) -> list[dict[str, int]]:
    """Return the rollbacks of a run so far.

    Each has `from_step`, `to_step`, `first_batch` and `last_batch` (excluded).
    """
    return read_list(run_dir / FILE)


def read_list(path: Path) -> list[dict[str, Any]]:
    """Return the list in a file of a run directory; empty if there is no such file."""
    if not path.exists():
        return []
    content: list[dict[str, Any]] = read_json(path, LARGE_BYTES, follow_links=False)
    return content
