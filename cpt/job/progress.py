"""Where a run is: steps done, rows consumed, rows given up.  All of it is in every checkpoint.

    step        optimizer steps done; the schedule and metrics.jsonl count these
    updates     of them, those whose update was applied; Adam's bias correction counts these
    batch       the global batch of a step: the step-th batch that no rollback has given up

Batches are numbered in the order of the mixture, so the rows of a step stay a pure function of (mix
ledger, seed, step, skip ranges).  Without a rollback, batch and step are the same number.

A rollback must not be forgotten when the run is killed before its next checkpoint, or it would meet
the same batches
again: <run_dir>/rollbacks.json holds all of them, written before the first step is repeated.  The
    guard's rollbacks
give up no batch, they mix anew from an earlier step on: guard_rollbacks.json holds what it knew
after each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.store.files import write_json

FILE = "rollbacks.json"
GUARD_FILE = "guard_rollbacks.json"
Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of batches, ascending and disjoint."""


@dataclass(kw_only=True)
class Progress:
    """Where the run is; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    updates: int = 0
    """Optimizer steps whose update was applied."""
    tokens: int = 0
    """Predicted tokens seen, those of skipped updates included."""
    batch_chain: str = ""
    """Hash chain over the row ids of all steps so far."""
    skip_ranges: Ranges = field(default=())
    """Batches that rollbacks have given up."""

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Progress:
        """Read what `to_json` gave; a checkpoint that knows of no skipped update has none."""
        ranges = merged([(int(first), int(last)) for first, last in plain.get("skip_ranges", [])])
        return cls(**{"updates": plain["step"], **plain, "skip_ranges": ranges})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **dataclasses.asdict(self),
            "skip_ranges": [list(pair) for pair in self.skip_ranges],
        }

    def restore(self, saved: Progress, skip_ranges: Ranges) -> None:
        """Go to where a checkpoint was saved, with what has been given up since."""
        for name in ("step", "updates", "tokens", "batch_chain"):
            setattr(self, name, getattr(saved, name))
        self.skip_ranges = skip_ranges

    @property
    def next_batch(self) -> int:
        """The batch of the step that comes next."""
        return batch_of_step(self.step, self.skip_ranges)


def batch_of_step(step: int, skip_ranges: Ranges) -> int:
    """The batch that step `step` (0-based) trains on."""
    batch = step
    for first, last in skip_ranges:
        if batch < first:
            break
        batch += last - first
    return batch


def merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """The same batches as ascending, disjoint ranges."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        elif first < last:
            result.append((first, last))
    return tuple(result)


def read_rollbacks(run_dir: Path) -> list[dict[str, int]]:
    """The rollbacks of a run so far; each has `from_step`, `to_step`, `first_batch` and
    `last_batch` (excluded).
    """
    path = run_dir / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_rollbacks(run_dir: Path, rollbacks: list[dict[str, int]]) -> None:
    """Replace the file as a whole."""
    _replace(run_dir, FILE, rollbacks)


def read_guard_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """The guard's state after each of its rollbacks so far, as `GuardState.to_json` gave it."""
    path = run_dir / GUARD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_guard_rollbacks(run_dir: Path, states: list[dict[str, Any]]) -> None:
    """Replace the file as a whole."""
    _replace(run_dir, GUARD_FILE, states)


def newest_guard_state(
    saved: dict[str, Any] | None, rollbacks: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The guard's state of a checkpoint, or that of a later guard's rollback to it which no
    checkpoint knows of yet.
    """
    known = (saved or {}).get("rollbacks", 0)
    return rollbacks[-1] if len(rollbacks) > known else saved


def _replace(run_dir: Path, name: str, content: Sequence[dict[str, Any]]) -> None:
    write_json(run_dir / name, content, indent=1)


def skipped_by(rollbacks: list[dict[str, int]]) -> list[tuple[int, int]]:
    """The batches that rollbacks have given up."""
    return [(rollback["first_batch"], rollback["last_batch"]) for rollback in rollbacks]
