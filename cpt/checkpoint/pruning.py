"""Which checkpoints are kept, and how one is deleted: its manifest first, so that a crash leaves no
half truth.
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
    """Delete what is no longer kept; a deletion that fails is a warning.

    Args:
        run_dir: The run directory.
        newest: The step that was just published.
        keep_last: Sound checkpoints to keep, the newest ones.
        keep_every_steps: Multiples of this are kept for good; 0: none.
        protected: Steps that are never deleted.
        is_sound: Whether a step's checkpoint may be counted; asked only where the answer decides.
    """
    sound = 0
    for step in list_steps(run_dir):
        folder = step_folder(run_dir, step)
        if not (folder / MANIFEST).is_file():
            if (
                step < newest and step not in protected
            ):  # an earlier deletion was interrupted, or it was damaged
                _delete(folder, step)
        elif sound < keep_last:
            sound += is_sound(step)
        elif step not in protected and not (keep_every_steps and step % keep_every_steps == 0):
            _delete(folder, step)
    for aside in (run_dir / "checkpoints").glob(".*-step-*"):
        kind, _, rest = aside.name.removeprefix(".").partition("-step-")
        replaced = (
            kind == "superseded" and int(rest[:8]) <= newest
        )  # the run has come to that step again
        if replaced or kind == "rejected":  # damaged, and now there is a newer one
            _delete(aside, newest)


def _delete(folder: Path, step: int) -> None:
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        fault_point("prune", step)
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("could not delete %s: %s", folder, error.strerror)
