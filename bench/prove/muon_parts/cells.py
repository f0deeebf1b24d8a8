"""A training of the comparison: from random weights, or from a base that another has made."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mxfp4_parts.scale import Scale
from mxfp4_parts.training import Rows, State, Trainer

from cpt.config import TrainSection
from cpt.guard.score import ScoredSet
from data_pipeline.store.files import write_json

Name = Literal["adamw", "muon"]
"""A value of `train.optimizer`."""
OPTIMIZERS: tuple[Name, ...] = ("adamw", "muon")
BASE = "random weights"
"""The base of a training that begins from random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One training."""

    base: str
    """`BASE`, or the optimizer that has made the weights from which it begins."""
    optimizer: Name
    seed: int
    lr: float

    @property
    def file_name(self) -> str:
        """Name of the file that holds its result."""
        base = self.base.replace(" ", "-")
        return f"{base}-{self.optimizer}-seed{self.seed}-lr{self.lr:.0e}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Sizes and rates of all trainings."""

    scale: Scale
    """Model, batch, and the learning rates of the trainings on Japanese."""
    base_lrs: tuple[float, ...]
    """Peaks of the learning rate from random weights; bases are of the last."""
    base_steps: int
    """Steps from random weights."""
    check_steps: int
    """Steps between two measurements there."""
    steps: int
    """Steps of Japanese."""

    def cells(self, seed: int) -> list[Cell]:
        """Return the trainings of a seed, bases before what begins from them."""
        found = []
        for lr in reversed(self.base_lrs):
            for optimizer in OPTIMIZERS:
                found.append(Cell(base=BASE, optimizer=optimizer, seed=seed, lr=lr))
        for base in OPTIMIZERS:
            for lr in self.scale.lrs:
                for optimizer in OPTIMIZERS:
                    found.append(Cell(base=base, optimizer=optimizer, seed=seed, lr=lr))
        return found

    def section(self, optimizer: Name, lr: float, steps: int) -> TrainSection:
        """Return the `train` section of a training."""
        return TrainSection(
            seq_len=self.scale.seq_len,
            global_batch_size=self.scale.global_batch_size,
            total_steps=steps,
            lr=lr,
            schedule="cosine",
            warmup_steps=self.scale.warmup_steps,
            optimizer=optimizer,
        )


def result_of(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Return the result of a training that is done; None if it is not."""
    path = folder / cell.file_name
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def from_random_weights(
    folder: Path, plan: Plan, trainer: Trainer, rows: Rows, sets: list[ScoredSet], cell: Cell
) -> dict[str, Any]:
    """Train a base, and measure it on the way."""
    begin = time.process_time()
    section = plan.section(cell.optimizer, cell.lr, plan.base_steps)
    state = trainer.initial(cell.seed)
    curve = []
    while state.step < plan.base_steps:
        state = trainer.train(state, rows, section, state.step + plan.check_steps)
        curve.append({"step": state.step, **trainer.bits_per_byte(state.weights, sets)})
    if cell.lr == plan.base_lrs[-1]:
        state.save(_base_file(folder, cell.optimizer, cell.seed))
    return _written(folder, cell, begin, {"curve": curve, "trained": curve[-1]})


def continued(
    folder: Path, plan: Plan, trainer: Trainer, rows: Rows, sets: list[ScoredSet], cell: Cell
) -> dict[str, Any]:
    """Go on from a base with Japanese; the moments begin at zero, as from any model."""
    begin = time.process_time()
    weights = State.load(_base_file(folder, cell.base, cell.seed)).weights
    section = plan.section(cell.optimizer, cell.lr, plan.steps)
    start = State(step=0, weights=weights, optimizer={})
    trained = trainer.train(start, rows, section, plan.steps).weights
    moved = 0.0
    size = 0.0
    for name, values in trained.items():
        moved += float((values - weights[name]).square().sum())
        size += float(weights[name].square().sum())
    facts = {
        "trained": trainer.bits_per_byte(trained, sets),
        "moved": (moved / size) ** 0.5,
    }
    return _written(folder, cell, begin, facts)


def _base_file(folder: Path, optimizer: str, seed: int) -> Path:
    return folder / f"base-{optimizer}-{seed}.pt"


def _written(folder: Path, cell: Cell, begin: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the result of a training, and return it."""
    result: dict[str, Any] = {
        "base": cell.base,
        "optimizer": cell.optimizer,
        "seed": cell.seed,
        "lr": cell.lr,
        **facts,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }
    write_json(folder / cell.file_name, result)
    return result
