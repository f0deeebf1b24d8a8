"""The run YAML's `guard` section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainLimits:
    """Limits of one held-out domain that differ from those of `guard`."""

    tolerance_percent: float | None = None
    """Tolerated rise of this domain's bits per byte in percent; the default is
    `guard.tolerance_percent`."""
    hard_limit_percent: float | None = None
    """Rise of this domain in percent that pauses the run if it persists; the default is
    `guard.hard_limit_percent`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardSection:
    """The `guard` section: when the model is measured, and what a loss causes
    (cpt/guard/controller.py, cpt/guard/ladder.py)."""

    enabled: bool = True
    """Measure held-out bits per byte before step 0, every `interval_steps` and at the end."""
    baseline_model: Path | None = None
    """Model that every measurement is compared with, as `model.path` names one, relative to the run
    YAML; the default is the model that the run starts from. Fine-tuning after continual pretraining
    names the original release here, so that English is judged against it through both."""
    interval_steps: int = 0
    """Optimizer steps between measurements; 0 measures only before step 0 and at the end."""
    generation_interval_steps: int = 0
    """Optimizer steps between measurements of the model's replies to the prompts of the mix
    (`guard.generation`), a multiple of `interval_steps`; 0 measures them only before step 0 and at
    the end."""
    tolerance_percent: float = 1.0
    """Tolerated rise of bits per byte over the untouched model, in percent, for each domain."""
    hard_limit_percent: float = 5.0
    """Rise of bits per byte in percent that pauses the run if it persists."""
    domains: dict[str, DomainLimits] = field(default_factory=dict)
    """Limits of single domains, by name of the domain."""
    max_documents: int = 256
    """Documents of the panel of a domain, each scored as a whole at every measurement."""
    fresh_documents: int = 100
    """Documents of a domain that one measurement alone scores: at least so many if enough are held
    out, more if the run has few measurements. Where fewer are held out, each measurement takes its
    part of them, if together they show a loss of the tolerance within half of the run. 0 scores the
    panel alone, which then needs more documents."""
    policy: Literal["act", "warn"] = "act"
    """act moves replay and the learning rate, pauses and rolls back; warn only writes a warning."""
    controller: Literal["two_way", "ladder"] = "two_way"
    """two_way moves replay and the learning rate up and down with the measured loss; ladder only
    raises replay and lowers the rate, one rung at a time."""
    set_point: float = 0.6
    """Loss, as a share of the tolerance, that the two-way controller steers every domain to."""
    least_replay: float = 1.0
    """Smallest share to which the two-way controller may lower a replayed source, as a part of the
    share that the mix gives it; 1 never goes below the mix."""
    act_at: float = 0.5
    """Share of the tolerance from which on a statistically certain rise counts, above 0 and at most
    1. Held-out text is refused near 1, where no number of documents tells the two apart."""
    replay_factor: float = 1.5
    """Raising replay by the ladder multiplies the share of a domain's sources by this factor."""
    replay_step: float = 0.03
    """Raising replay by the ladder adds at least this share of all tokens."""
    max_replay_share: float = 0.75
    """Largest total share of the sources that are not in the main language, which is the one with
    the largest share of the mix."""
    lr_factor: float = 0.5
    """Lowering the learning rate multiplies it by this factor."""
    min_lr_scale: float = 0.25
    """Smallest product of all these factors."""
    kl_lever: Literal["off", "before", "beside"] = "off"
    """Whether the two-way controller also moves `train.kl_weight`: before replay, which then waits
    until the weight is at `max_kl_weight`, or beside it. It needs `train.kl_targets`."""
    max_kl_weight: float = 1.0
    """Largest weight of the divergence to which the guard may raise `train.kl_weight`."""
    router_lever: Literal["off", "freeze", "raise_replay"] = "off"
    """Action if `least_router_overlap` is not reached: freeze the routers for the rest of the run,
    or raise replay until it is. It needs `telemetry.router_interval_steps`."""
    least_router_overlap: float = 0.8
    """Share of the routing choices that the untouched routers would make too, mean over the layers;
    below it `router_lever` acts."""
    patience: int = 2
    """Measurements to wait after an action before the learning rate is lowered."""
    pause_after: int = 4
    """Measurements with no action left, or in a row over the hard limit, before the run pauses."""
    max_rollbacks: int = 1
    """How many pauses are followed by a return to the last green checkpoint; the next pause ends
    the run with exit code 78."""

    def limits(self, domain: str) -> tuple[float, float]:
        """Tolerance and hard limit of a domain in percent."""
        own = self.domains.get(domain, DomainLimits())
        tolerance = (
            self.tolerance_percent if own.tolerance_percent is None else own.tolerance_percent
        )
        return (
            tolerance,
            self.hard_limit_percent if own.hard_limit_percent is None else own.hard_limit_percent,
        )

    def check(self) -> Iterator[tuple[str, str]]:
        at_least = {
            "interval_steps": 0,
            "generation_interval_steps": 0,
            "max_documents": 1,
            "fresh_documents": 0,
            "patience": 1,
            "pause_after": 1,
            "max_rollbacks": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                yield name, f"is {getattr(self, name)}, must be >= {least}."
        yield from self._check_generation_interval()
        for name in ("act_at", "lr_factor", "min_lr_scale"):
            if not 0 < getattr(self, name) <= 1:
                yield name, f"is {getattr(self, name)}, must be above 0 and at most 1."
        yield from self._check_controller()
        if self.replay_factor < 1:
            yield (
                "replay_factor",
                f"is {self.replay_factor}, must be >= 1: the ladder never lowers replay.",
            )
        if not 0 < self.replay_step < 1:
            yield (
                "replay_step",
                f"is {self.replay_step}, must be between 0 and 1 (a share of the tokens).",
            )
        if not 0 <= self.max_replay_share < 1:
            yield (
                "max_replay_share",
                f"is {self.max_replay_share}, must be >= 0 and below 1 (a share of the tokens).",
            )
        for domain in ("", *self.domains):
            tolerance, hard = self.limits(domain)
            key = f"domains.{domain}.tolerance_percent" if domain else "tolerance_percent"
            if not 0 < tolerance <= hard:
                yield (
                    key,
                    f"is {tolerance:g}, must be above 0 and at most the hard limit ({hard:g}).",
                )

    def _check_generation_interval(self) -> Iterator[tuple[str, str]]:
        own = self.generation_interval_steps
        if own <= 0:
            return
        if self.interval_steps <= 0 or own % self.interval_steps:
            yield (
                "generation_interval_steps",
                f"is {own}, must be a multiple of interval_steps ({self.interval_steps}): replies "
                "are measured when held-out text is, so that one decision sees both.",
            )

    def _check_controller(self) -> Iterator[tuple[str, str]]:
        if not 0 < self.set_point < 1:
            yield "set_point", f"is {self.set_point}, must be between 0 and 1 (of the tolerance)."
        for name in ("least_replay", "least_router_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                yield name, f"is {getattr(self, name)}, must be from 0 to 1."
        if not 0 < self.max_kl_weight < float("inf"):
            yield "max_kl_weight", f"is {self.max_kl_weight}, must be above 0."
        if self.controller == "two_way":
            return
        if self.kl_lever != "off":
            yield "kl_lever", f"is {self.kl_lever}, which needs guard.controller: two_way."
        if self.router_lever == "raise_replay":
            yield "router_lever", "is raise_replay, which needs guard.controller: two_way."
