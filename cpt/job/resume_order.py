"""Remember that `--resume never` or `--resume STEP` was carried out, for starts of the same job.

A job that is queued again has the command line of its first start.  An order on it is carried out
once: afterwards the run goes on from its own newest checkpoint.  Until then the order stands,
however often a start ended before: while it waited for other nodes, or while it loaded.

`never` is carried out when what an earlier run left is set aside, and a step when its checkpoint is
loaded and newer ones are set aside.  From then on `auto` finds what the order asked for, or what
came of it.  A note is of one job and one order: while a job waits, another one may follow an order
of its own in the same run directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpt.errors import ConfigError
from cpt.resilience.environment import job_id
from data_pipeline.bounded.json_text import read_json
from data_pipeline.store.files import write_json

FILE = "resume_order.json"


def resume_word(asked: str, restarts: int, run_dir: Path) -> str:
    """Return what a start resumes from: `auto`, `never` or a step.

    Args:
        asked: `--resume`.
        restarts: How often this job, or this process, was started before.
        run_dir: The run directory.

    Raises:
        ConfigError: an order was carried out, and the note of it cannot be read.
    """
    if asked == "auto" or restarts == 0:
        return asked
    path = run_dir / FILE
    try:
        done = _read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {error}. It tells whether an earlier start of this job has carried out "
            f"--resume {asked}. Submit the job anew: without --resume to go on from the newest "
            "checkpoint."
        ) from error
    return "auto" if order_of(asked) in done else asked


def orders_but(run_dir: Path, asked: str) -> list[Any]:
    """Return the notes in a run directory without this job's of an order, which stands anew.

    A damaged file tells of none.
    """
    try:
        done = _read(run_dir / FILE)
    except (OSError, ValueError):
        return []
    return [order for order in done if order != order_of(asked)]


def write_orders(run_dir: Path, done: list[Any]) -> None:
    """Write what jobs have carried out.

    Raises:
        OSError: it cannot be written, so a start that follows would carry out an order again.
    """
    write_json(run_dir / FILE, done)


def note_carried_out(run_dir: Path, asked: str) -> None:
    """Write down that this job has carried out an order.

    Raises:
        OSError: as `write_orders`.
    """
    write_orders(run_dir, [*orders_but(run_dir, asked), order_of(asked)])


def _read(path: Path) -> list[Any]:
    if not path.exists():
        return []
    done = read_json(path, follow_links=False)
    if not isinstance(done, list):
        raise ValueError("is no list")
    return done


def order_of(asked: str) -> dict[str, str]:
    """Return the note that this job has carried out an order."""
    return {"job": job_id(), "resume": asked}
