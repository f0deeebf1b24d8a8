"""The trackers of a run: Weights & Biases and TensorBoard, each in a thread of its own."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from cpt.config import RunConfig, RunYaml
from cpt.telemetry.background import CLOSE_SECONDS, BackgroundTracker
from cpt.telemetry.tensorboard_tracker import TensorBoardTracker
from cpt.telemetry.wandb_settings import WandbSettings, mode_of, wandb_problems
from cpt.telemetry.wandb_tracker import WandbTracker, end_service, kept_id

log = logging.getLogger("cpt.telemetry.trackers")


def tracker_problems(config: RunConfig | RunYaml) -> list[str]:
    """Return what would keep the trackers of a run from working, as sentences for people.

    One rank calls it, before anything is loaded.  It reads the login of W&B and asks the server,
    for some seconds at most, if the run is to record online; no secret is part of a sentence.
    """
    problems = wandb_problems(config.telemetry)
    if config.telemetry.tensorboard and importlib.util.find_spec("tensorboard") is None:
        problems.append(
            "telemetry.tensorboard is true, but tensorboard is not installed. Install it with "
            "`pip install tensorboard`, or use --set telemetry.tensorboard=false."
        )
    return problems


def trackers_for(
    config: RunConfig, run_dir: Path, close_seconds: float = CLOSE_SECONDS
) -> list[BackgroundTracker]:
    """Open the trackers that the run asks for; their libraries are imported only then.

    Args:
        config: The run.
        run_dir: Where they write.
        close_seconds: Longest wait for each at the end.
    """
    trackers = []
    if mode_of(config.telemetry) != "disabled":
        settings = WandbSettings.of(config.telemetry, run_dir)
        log.info("%s", settings.describe())
        run_id = kept_id(run_dir, settings)
        trackers.append(
            BackgroundTracker(
                "W&B",
                lambda: WandbTracker(config, run_dir, run_id),
                cut_off=end_service,
                close_seconds=close_seconds,
            )
        )
    if config.telemetry.tensorboard:
        trackers.append(
            BackgroundTracker(
                "TensorBoard",
                lambda: TensorBoardTracker(run_dir, config),
                close_seconds=close_seconds,
            )
        )
    return trackers
