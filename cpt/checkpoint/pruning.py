"""Pruning: the rule which checkpoints are kept, and the deletion of the others.

A checkpoint is deleted manifest first, so that a crash leaves nothing that looks complete, and the
process may end at any moment.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.reader import list_steps, refusal_of, refusal_unread, step_folder
from cpt.config import CheckpointSection
from cpt.resilience.faults import fault_point

log = logging.getLogger("cpt.checkpoint")


class ReadingInterrupted(Exception):
    """An older checkpoint is not read to its end, because there is no time for it."""


class Retention:
    """What is kept of a run's checkpoints; the first rank deletes the others in the background."""

    def __init__(self, run_dir: Path, settings: CheckpointSection) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._thread: threading.Thread | None = None
        self._is_in_haste = False
        self._sound: set[int] = set()
        self._loaded: int | None = None
        self.kept: int | None = None
        """A step that is kept besides those of the rule."""

    def trust(self, step: int) -> None:
        """Note a step whose checkpoint was verified and loaded; it is never deleted."""
        self._sound.add(step)
        self._loaded = step

    def note_published(self, step: int) -> None:
        """Begin to delete what is no longer kept, now that a step was published."""
        self._sound.add(step)
        thread = threading.Thread(target=self._prune, args=(step,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no thread; the next save tries again
            log.warning("older checkpoints are not deleted now: %s", error)
            return
        self._thread = thread

    def close(self, max_seconds: float | None = None) -> None:
        """Wait for deletions, for so long at most."""
        if self._thread is not None:
            self._thread.join(max_seconds)

    def hurry(self, max_seconds: float | None = None) -> None:
        """Wait for deletions, for so long at most, and read no older checkpoint for them.

        One that is not read to its end is taken for sound if its files have the sizes that its
        manifest says. The one that was just published, and the one that was loaded, were verified.
        """
        self._is_in_haste = True
        self.close(max_seconds)
        self._is_in_haste = False

    def _prune(self, newest: int) -> None:
        protected = {newest}
        for step in (self._loaded, self.kept):
            if step is not None:
                protected.add(step)
        prune(
            self._run_dir,
            newest=newest,
            keep_last=self._settings.keep_last,
            keep_every_steps=self._settings.keep_every_steps,
            protected=protected,
            is_sound=self._is_sound,
        )

    def _is_sound(self, step: int) -> bool:
        """Return whether a checkpoint is sound.

        Those that this run wrote or loaded are. Others are read once, in the background.
        """
        if step not in self._sound:
            folder = step_folder(self._run_dir, step)
            try:
                reason = refusal_of(folder, self._check_time)
            except ReadingInterrupted:
                return refusal_unread(folder) is None
            if reason is not None:
                log.warning("an older checkpoint is damaged and does not count as kept: %s", reason)
                return False
            self._sound.add(step)
        return True

    def _check_time(self) -> None:
        if self._is_in_haste:
            raise ReadingInterrupted


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
