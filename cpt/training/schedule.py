"""The learning rate: a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cpt.config import TrainSection
from cpt.config.sections import LARGEST_LR
from cpt.errors import ConfigError
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.mixture.phases import RateFactor, phases_of, rate_factor_at, rate_factors


def learning_rate(step: int, train: TrainSection, factors: Sequence[RateFactor] = ()) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    It is that of the run YAML (`_rate_of_section`) times the factor of the phase that the step is
    in.

    Args:
        step: The step.
        train: The `train` section.
        factors: Those of the phases of the mix (`RunConfig.lr_factors`); none if all are 1.
    """
    rate = _rate_of_section(step, train)
    return rate * rate_factor_at(step, factors) if factors else rate


def _rate_of_section(step: int, train: TrainSection) -> float:
    """Return the learning rate that the run YAML plans for a step.

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


def with_decay_steps(train: TrainSection, mix: MixConfig) -> TrainSection:
    """Return the section with the `decay_steps` that its `decay_phase` means, if it has one.

    The decay counts steps, and phases count batches: after a rollback that gave up n batches the
    phase begins n steps before the decay.

    Raises:
        ConfigError: the mix has no such phase, it begins during the warm-up, or the run cannot
            follow the schedule of the mix.
    """
    name = train.decay_phase
    if name is None or not train.total_steps:
        return train
    starts = {}
    for phase in phases_of(mix, train.total_steps):
        starts[phase.name] = phase.start_step
    if name not in starts:
        why = nearest(name, starts) if starts else " The mix has no schedule."
        raise ConfigError(f"train.decay_phase is '{name}', which is no phase of the mix.{why}")
    start = starts[name]
    if start < train.warmup_steps:
        raise ConfigError(
            f"train.decay_phase is '{name}', which begins after step {start}, but the warm-up "
            f"takes {train.warmup_steps} (train.warmup_steps). Shorten it, or name a later phase."
        )
    return replace(train, decay_steps=train.total_steps - start)


def factors_of_run(train: TrainSection, mix: MixConfig) -> tuple[RateFactor, ...]:
    """Return the factors of the phases of a mix on the learning rate; none if all are 1.

    Like the decay, they count steps.

    Raises:
        ConfigError: the run cannot follow the schedule of the mix, or a rate would be too large.
    """
    if not train.total_steps:
        return ()
    factors = rate_factors(mix, train.total_steps)
    problems = []
    for factor in factors:
        largest = max(factor.first, factor.last)
        if train.lr * largest > LARGEST_LR:
            problems.append(
                f"schedule[{factor.phase}] of the mix has a factor of {largest:g} on the learning "
                f"rate: {largest:g} x train.lr {train.lr:g} must be <= {LARGEST_LR:g}, because "
                "AdamW moves every weight by about the rate in a step. Lower one of them."
            )
    if problems:
        raise ConfigError(problems)
    return factors
