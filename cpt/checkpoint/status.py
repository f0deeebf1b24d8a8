"""The question whether a run has reached its end, answered by its checkpoints: an exit code of 0 is
no proof.

Job scripts ask while ranks may still be running, so this imports no torch and answers in a fraction
of a second.
"""

from __future__ import annotations

from pathlib import Path

from cpt.checkpoint.manifest import read_manifest
from cpt.errors import InternalError
from data_pipeline.bounded.yaml_text import read_yaml


def check_finished(run_dir: Path) -> str:
    """Compare the newest manifest with the plan in config.resolved.yaml.

    The other files of the checkpoint are not read.

    Returns:
        One line for people.

    Raises:
        InternalError: the planned last step is not saved.
        CheckpointError: the newest manifest is missing or damaged.
    """
    plan = run_dir / "config.resolved.yaml"
    try:
        train = read_yaml(plan, follow_links=False)["train"]
        planned = train.get("stop_at_step")
        if planned is None:
            planned = train["total_steps"]
        planned = int(planned)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InternalError(
            f"{plan}: no plan to compare with ({error}); the run has not started."
        ) from error
    folders = sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8))
    saved = read_manifest(folders[-1]).step if folders else 0
    if not folders or saved < planned:
        raise InternalError(
            f"{run_dir}: not finished; saved is step {saved} of {planned}. Start it again to go on."
        )
    return f"{run_dir}: finished, step {saved} of {planned} is saved"
