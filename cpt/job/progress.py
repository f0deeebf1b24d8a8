"""The position of a run: steps, batches consumed, batches given up.  Every checkpoint keeps it.

    step        optimizer steps done; the schedule and metrics.jsonl count these
    updates     the steps among them whose update was applied; Adam's bias correction counts these
    batch       the global batch of a step: step number `step` of those that no rollback gave up

Batches are numbered in the order of the mixture, so the rows of a step stay a pure function of (mix
ledger, seed, step, skip ranges).  Without a rollback, batch and step are the same number.

A rollback must not be forgotten when the run is killed before its next checkpoint: the run would
meet the same batches again.  So <run_dir>/rollbacks.json lists all of them, and it is written
before the first step is repeated.  Rollbacks of the guard give up no batch; they mix differently
from an earlier step on.  guard_rollbacks.json keeps the guard's state after each of them, and
guard_pause.json that of its last pause: the checkpoint of that step may be older than the pause.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoint.given_up_batches import FILE, Ranges, batch_of_step, merged, read_list
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.store.files import write_json

GUARD_FILE = "guard_rollbacks.json"
PAUSE_FILE = "guard_pause.json"


@dataclass(kw_only=True)
class Progress:
    """The position of a run; every checkpoint keeps it."""

    step: int = 0
    """Optimizer steps done."""
    updates: int = 0
    """Optimizer steps whose update was applied."""
    tokens: int = 0
    """Predicted tokens seen, those of skipped updates included."""
    batch_chain: str = ""
    """Hash chain over the row ids of all steps so far."""
    skip_ranges: Ranges = ()
    """Batches that rollbacks have given up."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Progress:
        """Read what `to_json` returned.

        A checkpoint without `updates` or `skip_ranges` was written by a run that skipped nothing.
        """
        ranges = [(int(first), int(last)) for first, last in plain.get("skip_ranges", [])]
        return cls(
            step=plain["step"],
            updates=plain.get("updates", plain["step"]),
            tokens=plain.get("tokens", 0),
            batch_chain=plain.get("batch_chain", ""),
            skip_ranges=merged(ranges),
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "skip_ranges": [list(pair) for pair in self.skip_ranges]}

    def restore(self, saved: Progress, skip_ranges: Ranges) -> None:
        """Go to where a checkpoint was saved, without the batches given up since."""
        self.step = saved.step
        self.updates = saved.updates
        self.tokens = saved.tokens
        self.batch_chain = saved.batch_chain
        self.skip_ranges = skip_ranges

    @property
    def next_batch(self) -> int:
        """The batch of the next step."""
        return batch_of_step(self.step, self.skip_ranges)


def write_rollbacks(run_dir: Path, rollbacks: list[dict[str, int]]) -> None:
    """Write all rollbacks of a run."""
    write_json(run_dir / FILE, rollbacks, indent=1)


def read_guard_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """Return the guard's state after each of its rollbacks, as `GuardState.to_json` gave it."""
    return read_list(run_dir / GUARD_FILE)


def write_guard_rollbacks(run_dir: Path, states: list[dict[str, Any]]) -> None:
    """Write the guard's state after each of its rollbacks."""
    write_json(run_dir / GUARD_FILE, states, indent=1)


def read_guard_pause(run_dir: Path, step: int) -> dict[str, Any] | None:
    """Return the guard's state at its last pause, if that was at this step."""
    path = run_dir / PAUSE_FILE
    if not path.exists():
        return None
    noted = read_json(path, LARGE_BYTES, follow_links=False)
    state: dict[str, Any] | None = noted["state"] if noted["step"] == step else None
    return state


def write_guard_pause(run_dir: Path, step: int, state: dict[str, Any]) -> None:
    """Write the guard's state at a pause, as `GuardState.to_json` gave it."""
    write_json(run_dir / PAUSE_FILE, {"step": step, "state": state}, indent=1)


def forget_guard_pause(run_dir: Path) -> None:
    """Remove the note of a pause that a start has gone on after."""
    (run_dir / PAUSE_FILE).unlink(missing_ok=True)


def newest_guard_state(
    saved: dict[str, Any] | None,
    rollbacks: list[dict[str, Any]],
    pause: dict[str, Any] | None = None,
    *,
    went_on: bool = False,
) -> dict[str, Any] | None:
    """Return the guard's state of a checkpoint, or a later one at the same step.

    A checkpoint that was saved before a pause or a rollback does not know of it; one that was saved
    after the look of its step does. The state of the pause itself is the newest one only if the run
    stayed there, or was killed on its way back: it goes on from the pause again.

    Args:
        saved: State in the checkpoint.
        rollbacks: State after each rollback of the guard.
        pause: State at the last pause, if that was at the step of the checkpoint.
        went_on: This start has gone on after a pause, if there was one, and trains.
    """
    known = (saved or {}).get("rollbacks", 0)
    if not went_on:
        if pause is not None and pause["rollbacks"] == known and not _has_look(saved, pause):
            saved = pause
        if (saved or {}).get("paused") and len(rollbacks) == known + 1:
            return saved
    if len(rollbacks) > known:
        return rollbacks[-1]
    if went_on and (saved or {}).get("paused"):  # a guard that only warns did not keep it
        return {**(saved or {}), "paused": ""}
    return saved


def _has_look(saved: dict[str, Any] | None, pause: dict[str, Any]) -> bool:
    """Return whether a checkpoint of the step of a pause knows of a look at that step."""
    step = max(reading["step"] for reading in pause["readings"].values())
    return any(reading["step"] == step for reading in (saved or {}).get("readings", {}).values())


def forgotten_levers(saved: Mapping[str, Any]) -> list[str]:
    """Return what a run that goes on without its guard no longer does, for people.

    Shares of replay are not among it: they stand in the ledger of the mix.

    Args:
        saved: State of the guard in the checkpoint.
    """
    forgotten = []
    if saved.get("lr_scale", 1.0) != 1.0:
        forgotten.append(f"the learning rate is {saved['lr_scale']:g} of the schedule's")
    if saved.get("kl_weight") is not None:
        forgotten.append(f"the weight of the divergence is {saved['kl_weight']:.3g}")
    if saved.get("routers_frozen"):
        forgotten.append("the routers are frozen")
    return forgotten


def known_at(
    step: int, state: dict[str, Any] | None, saved: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return what of the guard's state may be known at a step.

    A state after a rollback is of the step that the guard went back to. A run that goes back
    further has not measured that step yet, and has no checkpoint of it: it knows what its
    checkpoint does. Nobody has looked at one that was saved while the guard was switched off.

    Args:
        step: Optimizer steps done.
        state: What `newest_guard_state` returned.
        saved: State in the checkpoint; None if it was saved without a guard.
    """
    if saved is None and step > 0:
        state = {**(state or {}), "green": False}
    if state is None:
        return None
    readings = state.get("readings", {})
    known = {name: reading for name, reading in readings.items() if reading["step"] <= step}
    green_step = state.get("green_step")
    if known == readings and (green_step is None or green_step <= step):
        return state
    saved = saved or {}
    known = {**saved.get("readings", {}), **known}
    return {**state, "readings": known, "green": False, "green_step": saved.get("green_step")}
