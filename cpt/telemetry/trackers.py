"""Weights & Biases and TensorBoard: the numbers of metrics.jsonl, as time series."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from cpt.config import RunConfig
from cpt.telemetry.metrics import Tracker


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """Flatten one event into named numbers.

    Names are such as `train/loss`, `loss_by_language/ja`, `guard/english/bits_per_byte`,
    `guard/maths_ja/accuracy/rate`.
    """
    kind = event["event"]
    if kind == "guard_decision":
        # its settings and states are for `cpt guard audit`
        after = event["after"]
        numbers = {"guard/lr_scale": after["lr_scale"]}
        for name, share in {**after["shares"], **after.get("replay", {})}.items():
            numbers[f"guard/replay_share/{name}"] = share
        return numbers
    prefix = {"step": "train", "guard": f"guard/{event.get('domain')}"}.get(kind, kind)
    if "measure" in event:
        prefix += f"/{event['measure']}"
    numbers = {}
    for key, value in event.items():
        if isinstance(value, dict):
            for name, item in value.items():
                if isinstance(item, (int, float)):
                    numbers[f"{key}/{name}"] = item
        elif isinstance(value, (int, float)) and key != "step":
            numbers[f"{prefix}/{key}"] = value
    return numbers


class WandbTracker:
    """Sends events to Weights & Biases."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=config.telemetry.wandb_project,
            mode=config.telemetry.wandb,  # type: ignore[arg-type]
            dir=str(run_dir),
            name=run_dir.name,
            config=config.to_plain(),
            settings=wandb.Settings(console="off"),
        )

    def log(self, event: dict[str, Any]) -> None:
        if event["event"] == "sample":
            import wandb

            page = f"<p><b>{html.escape(event['prompt'])}</b>{html.escape(event['text'])}</p>"
            self._run.log({f"sample/{event['number']}": wandb.Html(page)}, step=event["step"])
        elif "step" in event:
            self._run.log(scalars(event), step=event["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """Writes event files for TensorBoard to <run_dir>/tensorboard."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, event: dict[str, Any]) -> None:
        if event["event"] == "sample":
            text = f"**{event['prompt']}**{event['text']}"
            self._writer.add_text(f"sample/{event['number']}", text, event["step"])  # type: ignore[no-untyped-call]
            return
        if "step" not in event:
            return
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event["step"])  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


def trackers_for(config: RunConfig, run_dir: Path) -> list[Tracker]:
    """Open the trackers that the run YAML asks for; their libraries are imported only then."""
    trackers: list[Tracker] = []
    if config.telemetry.wandb != "disabled":
        trackers.append(WandbTracker(config, run_dir))
    if config.telemetry.tensorboard:
        trackers.append(TensorBoardTracker(run_dir))
    return trackers
