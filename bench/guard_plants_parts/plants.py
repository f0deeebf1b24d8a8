"""Simulated runs that forget English: eighteen plants, what the guard reads of them, and its laws.

    replay, rate -> Plant.step -> true loss -> reading (noise, bounds, state) -> decision -> replay

A plant is a first-order lag towards an equilibrium that falls with replay and with the learning
rate. The equilibrium is that of the fixed shares in docs/guard.md ("The proof", worst domain of any
seed), times a gain. A shock is the bump of a rate that starts again: it peaks at the third look and
is gone after some twelve, half as high at three quarters of replay. The decisions are those of the
product (cpt/guard/decision.py), the rate is a cosine over 125 looks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cpt.config import GuardSection
from cpt.guard.betting import Detector
from cpt.guard.decision import decide
from cpt.guard.ladder import LEVERS, GuardState
from cpt.guard.lever_limits import LeverLimits, SourceLimits
from cpt.guard.text_judge import lines_of
from cpt.guard.yardstick import Evidence, Look, state_of

SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.6, 0.75, 1.0)
LOSSES = (10.3, 9.07, 5.93, 3.72, 2.38, 1.0, 0.72, 0.4, 0.0)
"""Loss in percent at which English ends with these shares of replay, at gain 1."""
GAINS = (0.3, 1.0, 2.0)
LAGS = (2, 10, 40)
"""Looks after which a change has shown to two thirds, at the peak rate."""
SHOCKS = (0.0, 2.5)
"""Height in percent of the shock at gain 1 and up to half replay."""
SHOCK_LOOKS = 3.0
NUM_LOOKS = 125
TOLERANCE = 1.0
START_SHARE = 0.25
MAX_REPLAY = 0.75
SOURCE = "english_text"
DOMAIN = "english"

Evidences = Literal["bets", "normal", "fresh"]
"""How a loss becomes evidence; see `STATISTICS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plant:
    """How one model forgets."""

    gain: float
    """Factor on the loss at which English ends."""
    lag: float
    """Looks, at the peak rate."""
    shock: float
    """Height of the shock in percent, at gain 1."""

    @property
    def name(self) -> str:
        """Name for people and for tests."""
        return f"gain {self.gain:g}, lag {self.lag:g}, shock {self.shock:g}"

    def settled(self, share: float, rate: float) -> float:
        """Return the loss in percent to which a share of replay leads at a rate.

        Args:
            share: Share of replay.
            rate: Learning rate as a part of its peak.
        """
        return self.gain * float(np.interp(share, SHARES, LOSSES)) * math.sqrt(rate)

    def shocked(self, look: int, share: float) -> float:
        """Return what the shock adds to the loss at a look."""
        time = look / SHOCK_LOOKS
        height = self.shock * self.gain * min(1.0, 2 * (1 - share))
        return height * time * math.exp(1 - time)


PLANTS = tuple(
    Plant(gain=gain, lag=lag, shock=shock) for gain in GAINS for lag in LAGS for shock in SHOCKS
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What the guard can tell of a loss."""

    error: float
    """Standard error of one estimate in percent."""
    persistent: float
    """Standard deviation of the part of the error that stays over the run."""
    passing: float
    """Standard deviation of the part that is drawn anew at each look."""
    quantile: float | None
    """Standard errors between the estimate and the lower bound; None for bets on fresh documents.
    """


STATISTICS: dict[Evidences, Statistics] = {
    # a panel of 256 documents that count as 190, with a spread of 2 %, and the product's bets
    "bets": Statistics(error=0.145, persistent=0.138, passing=0.05, quantile=None),
    # the same panel with the normal bound over 500 tests that the guard had before
    "normal": Statistics(error=0.145, persistent=0.138, passing=0.05, quantile=4.35),
    # 100 others at each look, as for prompts, with a bound that is valid over all looks
    "fresh": Statistics(error=0.2, persistent=0.0, passing=0.2, quantile=3.5),
}
UPPER_QUANTILE = 1.645
"""Standard errors between the estimate and the one-sided 95 % upper bound."""
SPREAD = 2.0
"""Standard deviation of the change of one document in percent."""
FRESH_DOCUMENTS = 100
NUM_DOMAINS = 4
"""Domains of the guard, among which the false alarms are divided."""


class Reader:
    """The guard's eyes: it makes evidence of the true loss of one run."""

    def __init__(
        self, kind: Evidences, settings: GuardSection, generator: np.random.Generator
    ) -> None:
        """Draw what stays over the run.

        Args:
            kind: How a loss becomes evidence.
            settings: The guard's settings.
            generator: Source of the noise.
        """
        self._statistics = STATISTICS[kind]
        self._settings = settings
        self._generator = generator
        self._persistent = self._statistics.persistent * generator.normal()
        self._detector: dict[str, Any] = {}

    def read(self, loss: float, look: Look) -> Evidence:
        """Return the evidence on a true loss in percent."""
        statistics = self._statistics
        noise = self._persistent + statistics.passing * self._generator.normal()
        delta = loss + noise
        if statistics.quantile is None:
            lower = self._bet(loss, look)
        else:
            lower = delta - statistics.quantile * statistics.error
        upper = delta + UPPER_QUANTILE * statistics.error
        line = self._settings.act_at * TOLERANCE
        return Evidence(
            domain=DOMAIN,
            state=state_of(lower, upper, line=line, tolerance=TOLERANCE),
            delta=delta,
            lower_bound=lower,
            upper_bound=upper,
            tolerance=TOLERANCE,
            hard_limit=self._settings.hard_limit_percent,
        )

    def _bet(self, loss: float, look: Look) -> float:
        """Place the bets of one look on fresh documents and return the bound."""
        detector = Detector(lines_of(DOMAIN, look), self._detector)
        changes = loss + SPREAD * self._generator.normal(size=FRESH_DOCUMENTS)
        lower = detector.add(changes, look.alarm_threshold)
        self._detector = detector.to_json()
        return lower

    def begin_anew(self) -> None:
        """Forget the bets, as the guard does after a lever was pulled."""
        self._detector = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a simulated run has given and paid."""

    japanese: float
    """Share of Japanese, each token weighted by its rate as a part of the schedule's, in percent
    of what a run without replay has."""
    end: float
    """True loss at the end in percent."""
    over: float
    """Share of the looks at which the true loss was over the tolerance, in percent."""
    moves: int
    """Changes of the share of replay."""
    turns: int
    """Changes of its direction."""
    paused: bool
    shares: tuple[float, ...]
    """Share of replay at each look."""
    losses: tuple[float, ...]
    """True loss at each look."""


def schedule(look: int) -> float:
    """Return the learning rate at a look as a part of its peak: a cosine down to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * look / NUM_LOOKS))


def look_at(number: int, settings: GuardSection) -> Look:
    """Return a look of a run with as many domains as usual."""
    return Look(
        step=number,
        number=number + 1,
        num_looks=NUM_LOOKS,
        num_domains=NUM_DOMAINS,
        last=False,
        settings=settings,
    )


def limits_at(state: GuardState, start_share: float, settings: GuardSection) -> LeverLimits:
    """Return how far replay may move, as `ReplayShares.limits` does for a mix of two sources."""
    share = state.replay.get(SOURCE, state.shares.get(DOMAIN, start_share))
    source = SourceLimits(
        share=share, least=min(share, settings.least_replay * start_share), largest=MAX_REPLAY
    )
    return LeverLimits(
        shares={DOMAIN: (share, MAX_REPLAY)},
        room=MAX_REPLAY - share,
        served_by={DOMAIN: (SOURCE,)},
        sources={SOURCE: source},
        main_share=1 - share,
    )


def simulate(
    plant: Plant,
    settings: GuardSection,
    seed: int,
    *,
    evidences: Evidences = "bets",
    start_share: float = START_SHARE,
) -> Outcome:
    """Let the guard steer one run of a plant.

    Args:
        plant: How the model forgets.
        settings: The guard's settings; `policy: warn` keeps the first share.
        seed: Of the noise of the readings.
        evidences: How the guard reads the loss.
        start_share: Share of replay in the mix.
    """
    generator = np.random.default_rng(seed)
    reader = Reader(evidences, settings, generator)
    state = GuardState()
    japanese = possible = lagging = 0.0
    shares: list[float] = []
    losses: list[float] = []
    paused = False
    for look in range(NUM_LOOKS):
        limits = limits_at(state, start_share, settings)
        share = limits.sources[SOURCE].share
        japanese += (1 - share) * schedule(look) * state.lr_scale
        possible += schedule(look)
        rate = schedule(look) * state.lr_scale
        part = min(1.0, math.sqrt(rate) / plant.lag)
        lagging += part * (plant.settled(share, rate) - lagging)
        loss = lagging + plant.shocked(look + 1, share)
        shares.append(share)
        losses.append(loss)
        evidence = dataclasses.replace(
            reader.read(loss, look_at(look, settings)), share=share, largest_share=MAX_REPLAY
        )
        state, decision = decide(state, [evidence], settings, limits)
        if decision.actions[DOMAIN] in LEVERS:
            reader.begin_anew()
        if decision.action == "pause":
            paused = True
            state = dataclasses.replace(state, paused="")
    changes = np.diff(shares)
    directions = np.sign(changes[changes != 0])
    return Outcome(
        japanese=100 * japanese / possible,
        end=losses[-1],
        over=100 * float(np.mean(np.array(losses) > TOLERANCE)),
        moves=len(directions),
        turns=int(np.count_nonzero(np.diff(directions))),
        paused=paused,
        shares=tuple(shares),
        losses=tuple(losses),
    )


def best_fixed_share(plant: Plant, *, from_look: int) -> float | None:
    """Return the least fixed share with which the loss is tolerable from a look on.

    Args:
        plant: How the model forgets.
        from_look: First look that counts; the last one asks for the end only.

    Returns:
        The share, in steps of 1 %; None if the largest is too small.
    """
    settings = GuardSection(policy="warn")
    for percent in range(1, round(100 * MAX_REPLAY) + 1):
        run = simulate(plant, settings, 0, evidences="normal", start_share=percent / 100)
        if max(run.losses[from_look:]) <= TOLERANCE:
            return percent / 100
    return None
