"""Pruning: the rule which checkpoints are kept, and the deletion of the others.

A checkpoint is deleted manifest first, so that a crash leaves nothing that looks complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.reader import list_steps, step_folder
from cpt.resilience.faults import fault_point

log = logging.getLogger("cpt.checkpoint")


def prune(
    run_dir: Path,
    *,
    newest: int,
    keep_last: int,
    keep_every_steps: int,
    protected: Collection[int],
    is_sound: Callable[[int], bool],
) -> None:
    """Delete the checkpoints that are no longer kept; a deletion that fails is a warning.

    Args:
        run_dir: The run directory.
        newest: The step that was just published.
        keep_last: Number of newest sound checkpoints to keep.
        keep_every_steps: Multiples of this step are kept for good; 0 keeps none.
        protected: Steps that are never deleted.
        is_sound: Whether a step's checkpoint may be counted; asked only where the answer decides.
    """
    sound = 0
    for step in list_steps(run_dir):
        folder = step_folder(run_dir, step)
        if not (folder / MANIFEST).is_file():
            # An earlier deletion was interrupted, or the checkpoint was damaged.
            if step < newest and step not in protected:
                _delete(folder, step)
        elif sound < keep_last:
            sound += is_sound(step)
        elif step not in protected and not (keep_every_steps and step % keep_every_steps == 0):
            _delete(folder, step)
    for aside in (run_dir / "checkpoints").glob(".*-step-*"):
        kind, _, rest = aside.name.removeprefix(".").partition("-step-")
        # A superseded folder is replaced once the run has come to its step again, and a damaged one
        # by any newer checkpoint.
        is_replaced = kind == "superseded" and int(rest[:8]) <= newest
        if is_replaced or kind == "rejected":
            _delete(aside, newest)


def _delete(folder: Path, step: int) -> None:
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        fault_point("prune", step)
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("could not delete %s: %s", folder, error.strerror)
