"""TensorBoard: the numbers and distributions of W&B, as event files in the run directory.

A start and a rollback begin a file of their own, which tells TensorBoard to forget what was drawn
from that step on.  Otherwise a line would run back and forth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from cpt.config import RunConfig
from cpt.telemetry.shown import Event, StepTable, StepTables, distributions, scalars

FOLDER = "tensorboard"
GOING_BACK = {"start": "step", "rollback": "to_step", "guard_rollback": "step"}
"""Events after which a run goes on from a step, with the field that holds it."""


class TensorBoardTracker:
    """Writes event files for TensorBoard to <run_dir>/tensorboard."""

    def __init__(self, run_dir: Path, config: RunConfig | None = None) -> None:
        self._folder = run_dir / FOLDER
        self._tables = StepTables()
        self._writer = self._open(None)
        if config is not None:
            text = yaml.safe_dump(config.to_plain(), sort_keys=False, allow_unicode=True)
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            self._writer.add_text("config", indented, 0)  # type: ignore[no-untyped-call]

    def _open(self, step: int | None):  # type: ignore[no-untyped-def]  # imported only here
        """Open a file; what was drawn after `step` is forgotten."""
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if step is None else step + 1
        return SummaryWriter(str(self._folder), purge_step=purge_step)  # type: ignore[no-untyped-call]

    def log(self, event: Event) -> None:
        """Show one event."""
        for table in self._tables.take(event):
            self._log_table(table)
        if "step" not in event:
            return
        kind, step = event["event"], event["step"]
        if kind in GOING_BACK:
            self._writer.close()
            self._writer = self._open(event[GOING_BACK[kind]])
        writer = self._writer
        if kind == "sample":
            text = f"**{event['prompt']}**{event['text']}"
            writer.add_text(f"sample/{event['number']}", text, step)
            return
        for name, value in scalars(event).items():
            writer.add_scalar(name, value, step)
        if "total_tokens" in event:
            writer.add_scalar("train/total_tokens", event["total_tokens"], step)
        for name, values in distributions(event).items():
            writer.add_histogram(name, np.asarray(values), step)
            writer.add_scalar(f"{name}/mean", sum(values) / len(values), step)
            writer.add_scalar(f"{name}/max", max(values), step)

    def _log_table(self, table: StepTable) -> None:
        if table.name != "samples":  # continuations are shown one by one
            self._writer.add_text(table.name, table.markdown(), table.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
