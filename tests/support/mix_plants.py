"""Simulated probe runs, whose curves are known: what the planner of the mix is tried on.

Every domain has a curve of its own, documents that differ in how much they forget, and an error of
each run (the order of the data).  The shapes come from several laws, of which the planner's form is
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpt.planning.mix_probe import Probe, ProbeScores

Floats = npt.NDArray[np.float64]
Curve = Callable[[Floats], Floats]
"""Share of replay, 0 to 1 -> change in percent."""

TOLERANCE = 1.0
GRID = np.linspace(0.0, 1.0, 4001)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a set of probes is simulated."""

    law: str = "d_cpt"
    """One of LAWS."""
    shares: Sequence[float]
    """Share of replay of each probe."""
    run_spread: float = 0.15
    """Standard deviation of a run in percent."""
    uneven_runs: bool = False
    """Whether the domains differ in it, by up to a factor of 4."""
    correlation: float = 0.0
    """Correlation of the errors of two domains in one run."""
    document_spread: float = 2.0
    """Standard deviation of the change over documents in percent."""
    num_documents: int = 256
    num_domains: int = 4
    steps: Sequence[int] = ()
    """Length of each probe; by default 100."""
    planned_steps: int = 100
    """Length of the planned run."""
    length_exponent: float = 0.0
    """The change grows with length^exponent; 0 leaves it as it is."""


def d_cpt(generator: np.random.Generator) -> Curve:
    """C / (r + epsilon)^gamma - b (arXiv 2406.01375)."""
    epsilon = generator.uniform(0.02, 0.1)
    gamma = generator.uniform(0.3, 0.8)
    scale = generator.uniform(0.4, 0.9)
    level = scale / (1 + epsilon) ** gamma * generator.uniform(0.9, 1.1)
    return lambda share: scale / (share + epsilon) ** gamma - level


def d_cpt_with_gain(generator: np.random.Generator) -> Curve:
    """The same with the law's other term of the share, B r^eta."""
    curve = d_cpt(generator)
    gain = generator.uniform(0.2, 0.8)
    eta = generator.uniform(0.5, 2.0)
    return lambda share: curve(share) - gain * share**eta


def cmr(generator: np.random.Generator) -> Curve:
    """A power of the main language's share (arXiv 2407.17467)."""
    exponent = generator.uniform(1.0, 4.0)
    scale = generator.uniform(2.0, 6.0)
    level = generator.uniform(0.3, 1.0)
    return lambda share: scale * (1 - share) ** exponent - level


def logarithm(generator: np.random.Generator) -> Curve:
    """Each doubling of replay buys the same."""
    slope = generator.uniform(0.5, 2.0)
    crossing = generator.uniform(0.08, 0.45)
    return lambda share: TOLERANCE - slope * np.log(np.maximum(share, 1e-9) / crossing)


def exponential(generator: np.random.Generator) -> Curve:
    """Replay saturates."""
    decay = generator.uniform(0.08, 0.4)
    scale = generator.uniform(2.0, 6.0)
    level = generator.uniform(-0.3, 0.5)
    return lambda share: scale * np.exp(-share / decay) - level


LAWS: dict[str, Callable[[np.random.Generator], Curve]] = {
    "d_cpt": d_cpt,
    "d_cpt_with_gain": d_cpt_with_gain,
    "cmr": cmr,
    "logarithm": logarithm,
    "exponential": exponential,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plant:
    """Simulated probes, and the truth behind them."""

    probes: list[Probe]
    needed_share: float
    """Share of replay from which on all domains of the planned run are within TOLERANCE."""


def simulate(setting: Setting, generator: np.random.Generator) -> Plant:
    """Draw curves until their answer lies among the probes, then run the probes on them."""
    growth = _growth(setting, setting.planned_steps)
    while True:
        curves = [LAWS[setting.law](generator) for _ in range(setting.num_domains)]
        worst = growth * np.max([curve(GRID) for curve in curves], axis=0)
        needed = float(GRID[np.flatnonzero(worst > TOLERANCE)[-1]]) if worst[0] > TOLERANCE else 0
        if min(setting.shares) < needed < max(setting.shares):
            return Plant(probes=_probes(setting, curves, generator), needed_share=needed)


def _growth(setting: Setting, steps: float) -> float:
    return float((steps / 100) ** setting.length_exponent)


def _probes(
    setting: Setting, curves: Sequence[Curve], generator: np.random.Generator
) -> list[Probe]:
    shares = np.asarray(setting.shares)
    steps = np.asarray(setting.steps or [100] * len(shares))
    growth = (steps / 100) ** setting.length_exponent
    errors = _run_errors(setting, len(shares), generator)
    scores: list[dict[str, ProbeScores]] = [{} for _ in shares]
    for index, curve in enumerate(curves):
        before = generator.lognormal(mean=7.0, sigma=0.6, size=setting.num_documents)
        own = setting.document_spread * generator.normal(size=setting.num_documents)
        for run, mean in enumerate(growth * curve(shares) + errors[:, index]):
            scores[run][f"domain-{index}"] = ProbeScores(
                before=before,
                after=before * (1 + (mean + own) / 100),
                content=("text", "weights"),
            )
    probes = []
    for run, share in enumerate(setting.shares):
        probes.append(
            Probe(
                name=f"probe-{run}",
                replay_share=share,
                main_language="ja",
                replay_parts={"english": 1.0},
                steps=int(steps[run]),
                recipe={"train.lr": 1e-4},
                scores=scores[run],
                gain_percent=20.0,
            )
        )
    return probes


def _run_errors(setting: Setting, num_runs: int, generator: np.random.Generator) -> Floats:
    """Return the (runs, domains) errors in percent."""
    own = generator.normal(size=(num_runs, setting.num_domains))
    common = generator.normal(size=(num_runs, 1))
    errors = math.sqrt(1 - setting.correlation) * own + math.sqrt(setting.correlation) * common
    spread = np.full(setting.num_domains, setting.run_spread)
    if setting.uneven_runs:
        spread = spread * generator.uniform(0.5, 2.0, size=setting.num_domains)
    return np.asarray(errors * spread)
