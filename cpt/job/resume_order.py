"""Remember that `--resume never` or `--resume STEP` was carried out, for starts of the same job.

A job that is queued again has the command line of its first start.  An order on it is carried out
once: afterwards the run goes on from its own newest checkpoint.  Until then the order stands,
however often a start ended before: while it waited for other nodes, or while it loaded.

`never` is carried out when what an earlier run left is set aside, and a step when its checkpoint is
loaded and newer ones are set aside.  From then on `auto` finds what the order asked for, or what
came of it.
"""

from __future__ import annotations

from pathlib import Path

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
    if not path.exists():
        return asked
    try:
        done = read_json(path, follow_links=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {error}. It tells whether an earlier start of this job has carried out "
            f"--resume {asked}. Submit the job anew: without --resume to go on from the newest "
            "checkpoint."
        ) from error
    return "auto" if done == _order(asked) else asked


def note_carried_out(run_dir: Path, asked: str) -> None:
    """Write down that this job has carried out an order.

    Raises:
        OSError: it cannot be written, so a start that follows would carry it out again.
    """
    write_json(run_dir / FILE, _order(asked))


def forget_order(run_dir: Path) -> None:
    """Remove the note of an earlier order, because another one stands."""
    (run_dir / FILE).unlink(missing_ok=True)


def _order(asked: str) -> dict[str, str]:
    return {"job": job_id(), "resume": asked}
