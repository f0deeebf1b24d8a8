"""The releases: small gpt-oss models that learned English, with experts on the grid of MXFP4.

    random weights -> steady learning rate -> falling rate, and rounded in its last third -> release
                         |
                         +-- after `short_steps`:                        the short release
                         +-- after `long_steps`:                         the long releases
                         +-- where held-out English no longer falls:     the converged release

The released gpt-oss was trained so, too: "post-trained with MXFP4 quantization of the MoE weights"
(model card, arXiv 2508.10925).  The arms differ in how long a release was trained, and in the rule
by which it was rounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cpt.config import TrainSection
from cpt.config.precision_sections import ExponentRule
from cpt.guard.score import ScoredSet
from data_pipeline.store.files import atomic_write
from mxfp4_parts.cells import Cell
from mxfp4_parts.scale import Scale
from mxfp4_parts.training import Rows, State, Trainer, Weights, rounded_experts

LEAST_FALL = 0.005
"""The fall of held-out English, as a share, below which ..."""
PATIENCE = 3
"""... in so many measurements a release counts as converged."""


Length = Literal["short", "long", "converged"]
"""How long a release is trained at a steady rate."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A kind of release."""

    length: Length
    """How long it was trained."""
    rule: ExponentRule
    """The rule by which it was rounded."""
    num_seeds: int
    """Seeds, from 0 on, that have one."""
    has_second_run: bool = False
    """Whether the middle learning rate is followed by a second run."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.length}, {self.rule}"


ARMS = (
    Arm("short", "floor", 1),
    Arm("long", "floor", 3),
    Arm("long", "ceil", 3, has_second_run=True),
    Arm("converged", "ceil", 1),
)


def cells_of_seed(scale: Scale, seed: int) -> Iterator[tuple[Arm, list[Cell]]]:
    """Yield the arms that a seed has, with their cells."""
    for arm in ARMS:
        if seed >= min(arm.num_seeds, scale.num_seeds):
            continue
        cells = [Cell(arm=arm.name, seed=seed, lr=lr) for lr in scale.lrs]
        if arm.has_second_run:
            second = Cell(arm=arm.name, seed=seed, lr=scale.middle_lr, is_second_run=True)
            cells.append(second)
        yield arm, cells


def has_converged(values: list[float]) -> bool:
    """Return whether a series no longer falls: its last values are hardly below the best before."""
    if len(values) <= PATIENCE:
        return False
    return min(values[-PATIENCE:]) > (1 - LEAST_FALL) * min(values[:-PATIENCE])


def make_release(
    folder: Path,
    scale: Scale,
    trainer: Trainer,
    rows: Rows,
    sets: list[ScoredSet],
    arm: Arm,
    seed: int,
) -> Weights:
    """Return the weights of a release; what is done is not done again."""
    path = _file(folder, arm, seed)
    if path.exists():
        return State.load(path).weights
    steady = _steady(folder, scale, trainer, rows, sets, seed, arm.length)
    before = steady.step + scale.decay_steps - scale.decay_steps // 3
    stop = steady.step + scale.decay_steps
    section = _section(scale, stop, scale.decay_steps)
    state = trainer.train(steady, rows, section, before)
    state = trainer.train(state, rows, section, stop, arm.rule)
    weights = rounded_experts(state.weights, arm.rule)
    facts = {
        "steady_steps": steady.step,
        "limit_steps": scale.most_steps,
        "steps": stop,
        "tokens": stop * scale.step_tokens,
        "held_out": trainer.bits_per_byte(weights, sets),
        "held_out_before_rounding": trainer.bits_per_byte(state.weights, sets),
    }
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(json.dumps(facts).encode())
    State(step=stop, weights=weights, optimizer={}).save(path)
    print(f"release {arm.name}, seed {seed}: {facts}", flush=True)
    return weights


def read_release(folder: Path, arm: Arm, seed: int) -> Weights:
    """Return the weights of a release that was made."""
    return State.load(_file(folder, arm, seed)).weights


def all_facts(folder: Path, num_seeds: int) -> list[dict[str, Any]]:
    """Return the length of every release's training and its scores, of those that are made."""
    found = []
    for seed in range(num_seeds):
        for arm in ARMS:
            path = _file(folder, arm, seed).with_suffix(".json")
            if path.exists():
                facts = json.loads(path.read_text())
                found.append({"arm": arm.name, "seed": seed, **facts})
    return found


def _file(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / f"release-{arm.name.replace(', ', '-')}-{seed}.pt"


def _steady(
    folder: Path,
    scale: Scale,
    trainer: Trainer,
    rows: Rows,
    sets: list[ScoredSet],
    seed: int,
    length: Length,
) -> State:
    """Return the state at the end of the steady part, and go on from the last one that was kept."""
    end = folder / f"steady-{length}-{seed}.pt"
    if end.exists():
        return State.load(end)
    latest = folder / f"steady-latest-{seed}.pt"
    history = latest.with_suffix(".json")
    state = State.load(latest) if latest.exists() else trainer.initial(seed)
    section = _section(scale, scale.most_steps, 0)
    values: list[float] = json.loads(history.read_text()) if history.exists() else []
    values = values[: state.step // scale.check_steps]
    while not _is_at_end(scale, state.step, values, length):
        state = trainer.train(state, rows, section, state.step + scale.check_steps)
        values.append(trainer.bits_per_byte(state.weights, sets)["english"])
        print(f"seed {seed}, step {state.step}: English {values[-1]:.4f}", flush=True)
        with atomic_write(history) as file:
            file.write(json.dumps(values).encode())
        state.save(latest)
    state.save(end)
    return state


def _is_at_end(scale: Scale, step: int, values: list[float], length: Length) -> bool:
    if length == "short":
        return step >= scale.short_steps
    if length == "long":
        return step >= scale.long_steps
    return step >= scale.most_steps or (step >= scale.long_steps and has_converged(values))


def _section(scale: Scale, total_steps: int, decay_steps: int) -> TrainSection:
    return TrainSection(
        seq_len=scale.seq_len,
        global_batch_size=scale.global_batch_size,
        total_steps=total_steps,
        lr=scale.release_lr,
        schedule="wsd" if decay_steps else "constant",
        decay_steps=decay_steps,
        warmup_steps=scale.warmup_steps,
    )
