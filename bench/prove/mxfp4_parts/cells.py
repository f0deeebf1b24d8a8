"""A cell of the proof: one release, trained on Japanese at one learning rate.

    release -> two thirds of the steps -+-> the last third in bf16's way    -> exported by each rule
                                        +-> the last third rounded by floor -> exported by floor
                                        +-> ... by ceil
                                        +-> ... by least

The two thirds are the same training, so they are made once.  What is compared on held-out text:

    trained         the model that was trained without rounding
    base experts    the same with the experts' matrices of the release: what is left if an export
                    loses all that they learned
    exported        what would be served

    survived = (base experts - exported) / (base experts - trained)

both for the export of the plain training and for the rounded one, so that they can be compared.

A second run is what the recipes for a last phase are: it begins from the model that a whole
training has made, with a rate and moments of its own, and is rounded from its first step on.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.config import TrainSection
from cpt.config.precision_sections import ExponentRule
from cpt.guard.score import ScoredSet
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from data_pipeline.store.files import atomic_write
from mxfp4_parts.kept import against_base
from mxfp4_parts.scale import Scale
from mxfp4_parts.training import (
    Rows,
    State,
    Trainer,
    Weights,
    rounded_experts,
)

SECOND_RUN = ", second run"
"""What the name of a second run ends with."""
METHODS = ("plain", "aware")
"""Training that knows nothing of the rounding, and training whose last third is rounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell."""

    arm: str
    seed: int
    lr: float
    is_second_run: bool = False
    """Whether it goes on from the trained model of the cell that has the same other values."""

    @property
    def name(self) -> str:
        """Its release, and that it is a second run if it is, for tables."""
        return f"{self.arm}{SECOND_RUN}" if self.is_second_run else self.arm

    @property
    def file_name(self) -> str:
        """Name of the file that holds its result."""
        return f"{self.name.replace(', ', '-')}-seed{self.seed}-lr{self.lr:.0e}.json"


def finished(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Return the result of a cell that is done; None if it is not."""
    path = folder / cell.file_name
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def run_cell(
    folder: Path,
    scale: Scale,
    trainer: Trainer,
    rows: Rows,
    sets: list[ScoredSet],
    cell: Cell,
    release: Weights,
) -> dict[str, Any]:
    """Train and score a cell, write its result and return it."""
    begin = time.process_time()
    section = finetuning(scale, cell.lr)
    start = State(step=0, weights=release, optimizer={})
    fork = trainer.train(start, rows, section, scale.aware_from)
    trained = trainer.train(fork, rows, section, scale.steps).weights
    if cell.is_second_run:
        rows = rows.after(scale.steps)
        fork = State(step=0, weights=trained, optimizer={})
        trained = trainer.train(fork, rows, section, scale.steps).weights
    result: dict[str, Any] = {
        "arm": cell.name,
        "seed": cell.seed,
        "lr": cell.lr,
        "moved": against_base(trained, trained, release)["moved"],
        "released": trainer.bits_per_byte(release, sets),
        "trained": trainer.bits_per_byte(trained, sets),
        "base_experts": trainer.bits_per_byte(with_experts_of(trained, release), sets),
        "plain": {},
        "aware": {},
    }
    for rule in EXPONENT_RULES:
        result["plain"][rule] = _exported(trainer, sets, trained, release, rule)
        aware = trainer.train(fork, rows, section, scale.steps, rule).weights
        result["aware"][rule] = _exported(trainer, sets, aware, release, rule)
    result["cpu_seconds"] = round(time.process_time() - begin, 1)
    with atomic_write(folder / cell.file_name) as file:
        file.write(json.dumps(result).encode())
    return result


def in_a_line(result: dict[str, Any]) -> str:
    """Return a cell's figures of Japanese in a line."""
    parts = [f"{result['arm']}, seed {result['seed']}, lr {result['lr']:g}:"]
    parts.append(f"moved {result['moved']:.2%}, trained {result['trained']['japanese']:.4f},")
    parts.append(f"base experts {result['base_experts']['japanese']:.4f}, exported")
    for method in METHODS:
        for rule, found in result[method].items():
            parts.append(f"{method} {rule} {found['held_out']['japanese']:.4f}")
    return " ".join([*parts, f"({result['cpu_seconds']} s)"])


def finetuning(scale: Scale, lr: float) -> TrainSection:
    """Return the schedule and the optimizer of the training on Japanese."""
    return TrainSection(
        seq_len=scale.seq_len,
        global_batch_size=scale.global_batch_size,
        total_steps=scale.steps,
        lr=lr,
        schedule="cosine",
        warmup_steps=scale.warmup_steps,
    )


def with_experts_of(weights: Weights, base: Weights) -> Weights:
    """Return weights whose experts' matrices are those of another model."""
    mixed = dict(weights)
    for name, values in weights.items():
        if is_expert_matrix(name, values.shape):
            mixed[name] = base[name]
    return mixed


def _exported(
    trainer: Trainer,
    sets: list[ScoredSet],
    masters: Weights,
    release: Weights,
    rule: ExponentRule,
) -> dict[str, Any]:
    """Return the scores of an export, and what it kept of the masters' movement."""
    exported = rounded_experts(masters, rule)
    scores = trainer.bits_per_byte(exported, sets)
    return {"held_out": scores, **against_base(exported, masters, release)}
