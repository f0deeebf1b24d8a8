"""Short names of models for people, from the paths in a resolved configuration."""

from __future__ import annotations

import re
from pathlib import Path

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def model_label(path: str) -> str:
    """Return the name of a model's folder, or RUN@STEP of a checkpoint of a run.

    Args:
        path: `model.path` or `guard.baseline_model` of a resolved configuration.
    """
    parts = Path(path).parts
    match = _STEP_FOLDER.fullmatch(parts[-1]) if parts else None
    if match and len(parts) > 2 and parts[-2] == "checkpoints":
        return f"{parts[-3]}@{int(match.group(1))}"
    return Path(path).name
