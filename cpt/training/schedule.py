"""The learning rate: a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from cpt.config import TrainSection


def learning_rate(step: int, train: TrainSection) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Linear warm-up reaches the peak at step `warmup_steps`. Then the rate is `constant`, falls with
    `cosine` to the floor at `total_steps`, or with `wsd` stays at the peak until the last
    `decay_steps` steps and falls linearly to the floor (arXiv 2404.06395).
    """
    floor = train.lr * train.min_lr_ratio
    if step < train.warmup_steps:
        return train.lr * (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "cosine":
        progress = (step - train.warmup_steps) / max(1, train.total_steps - train.warmup_steps)
        return floor + (train.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if train.schedule == "wsd":
        decayed = step - (train.total_steps - train.decay_steps)
        return train.lr - (train.lr - floor) * max(
            0.0, min(1.0, (decayed + 1) / max(1, train.decay_steps))
        )
    return train.lr
