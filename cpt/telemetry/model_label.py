"""Short names of models for people, from the paths in a resolved configuration."""

from __future__ import annotations

from pathlib import Path

from cpt.model.missing_model import run_of


def model_label(path: str) -> str:
    """Return the name of a model's folder, or RUN@STEP of a checkpoint of a run.

    Args:
        path: `model.path` or `guard.baseline_model` of a resolved configuration.
    """
    name = Path(path).name
    run_dir = run_of(Path(path))
    if run_dir is None:
        return name
    return f"{run_dir.name}@{int(name.removeprefix('step-'))}"
