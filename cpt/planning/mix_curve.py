"""How much of the main language a run can take: a curve through short probe runs at different
shares of replay.

    probe runs (same model, steps, held-out text) -> change of each domain at its replay share
      -> a + b ln(share), weighted by the intervals -> the share at which the curve meets the
      tolerance

Each doubling of replay is taken to buy the same.  arXiv 2407.17467 fits a power law in the share;
over the range of a few probes a line in its logarithm needs one parameter less.  Nothing is
extrapolated beyond the probes, the interval grows with the misfit, and each probe between others is
left out in turn and predicted from the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from cpt.errors import ConfigError
from cpt.guard.paired_test import CONFIDENCE, student_quantile
from cpt.telemetry.metrics import read_events
from data_pipeline.config.mix_file import load_mix
from data_pipeline.tables import table

Z = 1.96
LEAST_ERROR_PERCENT = 0.02
"""A standard error below this is not believed: the order of the data alone moves a run more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A short run at one share of replay."""

    name: str
    """Its run directory."""
    replay_share: float
    """Predicted tokens that are not in the main language, 0 to 1."""
    main_language: str
    """The language with the most predicted tokens."""
    steps: int
    """Optimizer steps at its last measurement."""
    baseline: dict[str, float]
    """Bits per byte of the untouched model by domain."""
    change: dict[str, tuple[float, float]]
    """Change of each domain outside the main language in percent, and its standard error."""
    gain_percent: float
    """Mean fall of bits per byte over the domains of the main language."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Change in percent = intercept + slope ln(share)."""

    coefficients: npt.NDArray[np.float64]
    """(2,) intercept and slope."""
    covariance: npt.NDArray[np.float64]
    """(2, 2), with the misfit of the curve in it."""
    misfit: float
    """Mean square of the probes' distances from the curve, in squares of their standard errors; at
    least 1.
    """
    degrees: int
    """Probes less 2."""

    def at(self, share: float, own_error: float = 0.0) -> tuple[float, float]:
        """Mean and half width of the 95 % interval of the change at a share of replay.

        Args:
            share: Of replay.
            own_error: 0 for the curve itself; for a single run, the standard error of its
                measurement.
        """
        x = np.asarray([1.0, math.log(share)])
        quantile = student_quantile((1 - CONFIDENCE) / 2, max(1, self.degrees))
        variance = float(x @ self.covariance @ x) + self.misfit * own_error**2
        return float(x @ self.coefficients), quantile * math.sqrt(variance)


def fit(shares: Sequence[float], changes: Sequence[float], errors: Sequence[float]) -> Curve:
    """Weighted least squares; where the points lie further off than their errors, the errors grow
    accordingly.
    """
    x = np.stack([np.ones(len(shares)), np.log(np.asarray(shares))], axis=1)
    y, weight = np.asarray(changes), 1 / np.maximum(np.asarray(errors), LEAST_ERROR_PERCENT) ** 2
    covariance = np.linalg.inv(x.T @ (weight[:, None] * x))
    coefficients = covariance @ (x.T @ (weight * y))
    degrees = len(shares) - 2
    misfit = float((weight * (y - x @ coefficients) ** 2).sum() / degrees) if degrees else 1.0
    misfit = max(1.0, misfit)
    return Curve(
        coefficients=coefficients, covariance=covariance * misfit, misfit=misfit, degrees=degrees
    )


def read_probe(run_dir: Path) -> Probe:
    """What a finished probe run has found.

    Raises:
        ConfigError: it holds no measurement after step 0, or its mix cannot be read.
    """
    try:
        events = read_events(run_dir / "metrics.jsonl")
        config = yaml.safe_load((run_dir / "config.resolved.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"probe {run_dir}: {error.strerror}: {error.filename}. Is it a run directory?"
        ) from error
    language = {source.name: source.language for source in load_mix(config["data"]["mix"]).sources}
    guard = {e["domain"]: e for e in events if e["event"] == "guard" and e["step"] > 0}
    steps = [e for e in events if e["event"] == "step"]
    if not guard or not steps:
        raise ConfigError(
            f"probe {run_dir}: the guard has measured nothing after step 0. Let the run finish."
        )
    tokens: dict[str, float] = {}
    for event in steps:
        for name, count in event["tokens_by_source"].items():
            tokens[language[name]] = tokens.get(language[name], 0) + count
    main = max(tokens, key=tokens.__getitem__)
    gains = [-e["delta_percent"] for e in guard.values() if e["language"] == main]
    return Probe(
        name=run_dir.name,
        replay_share=1 - tokens[main] / sum(tokens.values()),
        main_language=main,
        steps=max(e["step"] for e in guard.values()),
        baseline={name: e["baseline"] for name, e in guard.items()},
        change={
            name: (e["delta_percent"], (e["ci_high"] - e["ci_low"]) / (2 * Z))
            for name, e in guard.items()
            if e["language"] != main
        },
        gain_percent=float(np.mean(gains)) if gains else math.nan,
    )


def check_probes(probes: Sequence[Probe]) -> None:
    """Refuse probes that cannot be compared.

    Raises:
        ConfigError: with every reason.
    """
    problems, first = [], probes[0]
    usable = {round(probe.replay_share, 4) for probe in probes if probe.replay_share > 0}
    if len(usable) < 3:
        problems.append(
            f"{len(usable)} different shares of replay above 0, at least 3 are needed for a curve."
        )
    for probe in probes[1:]:
        for what in ("main_language", "steps"):
            if getattr(probe, what) != getattr(first, what):
                known = getattr(first, what)
                problems.append(
                    f"{probe.name}: {what} is {getattr(probe, what)}, {first.name} has {known}."
                )
        if probe.baseline != first.baseline:
            problems.append(
                f"{probe.name}: other held-out text, or another untouched model, than {first.name}."
            )
    if problems:
        raise ConfigError(problems)


def largest_main_share(probes: Sequence[Probe], tolerance_percent: float) -> dict[str, Any]:
    """The largest share of the main language at which every domain stays within the tolerance.

    Returns:
        `main_share` with `low` and `high` (ends of the 95 % interval), the `domain` that decides,
        `bounded` (`none`: the curve meets the tolerance among the probes; `above`, `below`: all
        probes are within, or none is), `curves`, and `checks`, one per probe left out that lies
        between others.
    """
    usable = sorted(
        (probe for probe in probes if probe.replay_share > 0), key=lambda probe: probe.replay_share
    )
    grid = np.geomspace(usable[0].replay_share, usable[-1].replay_share, 400)
    curves = {name: _fit(usable, name) for name in usable[0].change}
    found = {name: _crossings(curve, grid, tolerance_percent) for name, curve in curves.items()}
    domain = max(found, key=lambda name: found[name][1])
    low, middle, high = (max(crossing[index] for crossing in found.values()) for index in range(3))
    beyond = "above" if middle <= grid[0] else "below" if math.isinf(middle) else "none"
    return {
        "main_share": 1 - min(middle, grid[-1]),
        "low": 1 - min(high, grid[-1]),
        "high": 1 - min(low, grid[-1]),
        "domain": domain,
        "bounded": beyond,
        "curves": curves,
        "checks": [check for probe in usable[1:-1] for check in _left_out(usable, probe)]
        if len(usable) > 3
        else [],
    }


def _fit(probes: Sequence[Probe], domain: str) -> Curve:
    shares = [probe.replay_share for probe in probes]
    return fit(shares, *zip(*(probe.change[domain] for probe in probes), strict=True))


def _crossings(
    curve: Curve, grid: npt.NDArray[np.float64], tolerance: float
) -> tuple[float, float, float]:
    """Replay share from which on the lower end, the mean, the upper end of the curve are within the
    tolerance.
    """
    means, halves = (
        np.asarray(values) for values in zip(*(curve.at(share) for share in grid), strict=True)
    )

    def first_within(line: npt.NDArray[np.float64]) -> float:
        above = np.flatnonzero(line > tolerance)
        if len(above) == 0:
            return float(grid[0])
        return float(grid[above[-1] + 1]) if above[-1] + 1 < len(grid) else math.inf

    return first_within(means - halves), first_within(means), first_within(means + halves)


def _left_out(probes: Sequence[Probe], one: Probe) -> list[dict[str, Any]]:
    others = [probe for probe in probes if probe is not one]
    checks = []
    for domain in one.change:
        error = max(one.change[domain][1], LEAST_ERROR_PERCENT)
        mean, half = _fit(others, domain).at(one.replay_share, own_error=error)
        checks.append({"probe": one.name, "share": one.replay_share, "domain": domain, "predicted": mean, "half": half,
                       "measured": one.change[domain][0]})  # fmt: skip
    return checks


def describe(probes: Sequence[Probe], tolerance_percent: float) -> str:
    """The plan for people."""
    check_probes(probes)
    found = largest_main_share(probes, tolerance_percent)
    language = probes[0].main_language
    order = sorted(probes, key=lambda probe: probe.replay_share)
    domains = list(order[0].change)
    rows = [
        [
            *(p.name, f"{100 * (1 - p.replay_share):.1f}", f"{p.gain_percent:.2f}"),
            *(f"{p.change[domain][0]:+.2f}" for domain in domains),
        ]
        for p in order
    ]
    lines = [table(["probe", f"{language} %", f"{language} gain %", *domains], rows), ""]
    share = 100 * found["main_share"]
    interval = f"95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f} %"
    if found["bounded"] == "above":
        lines.append(
            f"Every probe is within {tolerance_percent:g} %: {language} may have {share:.1f} % and more."
        )
    elif found["bounded"] == "below":
        lines.append(
            f"No probe is within {tolerance_percent:g} %: {found['domain']} needs more replay than was tried."
        )
    else:
        decides = f"{found['domain']} decides"
        lines.append(
            f"Within {tolerance_percent:g} %: {language} may have {share:.1f} % ({interval}); {decides}."
        )
    for check in found["checks"]:
        inside = abs(check["measured"] - check["predicted"]) <= check["half"]
        lines.append(
            f"  left out {check['probe']}: {check['domain']} predicted {check['predicted']:+.2f} +- "
            f"{check['half']:.2f}, measured {check['measured']:+.2f}: {'inside' if inside else 'OUTSIDE'}"
        )
    return "\n".join(lines)


def to_json(probes: Sequence[Probe], tolerance_percent: float) -> str:
    """The same for programs."""
    found = largest_main_share(probes, tolerance_percent)
    curves = {name: curve.coefficients.tolist() for name, curve in found["curves"].items()}
    return json.dumps({**found, "curves": curves, "tolerance_percent": tolerance_percent}, indent=1)
