"""Warnings about settings that are right for whole weights and seldom for adapters."""

from __future__ import annotations

import logging

from cpt.config import RunYaml

log = logging.getLogger("cpt.job.adapter_advice")

LOW_LR = 5e-5
"""Below half of the lowest rate in published recipes of adapters for gpt-oss (1e-4 to 2e-4)."""


def warn_of_settings(run: RunYaml) -> None:
    """Log what to change in the `train` section of a run with adapters; nothing without them.

    Sources: Schulman et al., LoRA Without Regret (2025), finds ten times the rate of full training
    best. AdamW's decay reaches adapters without gradients, too: those of experts that no token has
    chosen.
    """
    if not run.adapter.is_on:
        return
    train = run.train
    if train.lr < LOW_LR:
        log.warning(
            "train.lr is %g, the rate of full training. Adapters want about ten times as much: "
            "published recipes for gpt-oss have 1e-4 to 2e-4.",
            train.lr,
        )
    if train.weight_decay > 0:
        log.warning(
            "train.weight_decay is %g, which shrinks adapters in every step, also those of experts "
            "that get no tokens. Give 0.",
            train.weight_decay,
        )
