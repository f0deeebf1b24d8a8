"""The share of the main language that a run can take, from short probe runs with replay.

    probe runs (same model, steps, held-out text)
      -> change of each domain at each probe's share of replay
      -> a + b ln(share), weighted by the intervals
      -> the share at which the curve meets the tolerance

Each doubling of replay is taken to buy the same.  arXiv 2407.17467 fits a power law in the share;
over the range of a few probes a line in its logarithm needs one parameter less.  Nothing is
extrapolated beyond the probes, the interval grows with the misfit, and each probe between others is
left out in turn and predicted from the rest.
"""

from __future__ import annotations

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
"""Half a 95 % interval in standard errors."""
MIN_PROBES = 3
"""Different shares of replay that a curve needs."""
NUM_GRID_POINTS = 400
LEAST_ERROR_PERCENT = 0.02
"""Standard errors count as at least this: the order of the data alone moves a run by as much."""


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
    """A fitted line: change in percent = intercept + slope ln(share)."""

    coefficients: npt.NDArray[np.float64]
    """(2,) intercept and slope."""
    covariance: npt.NDArray[np.float64]
    """(2, 2), with the misfit of the curve in it."""
    misfit: float
    """Mean squared distance of the probes from the curve over their squared standard errors, at
    least 1.
    """
    degrees: int
    """Degrees of freedom: the number of probes less 2."""

    def at(self, share: float, own_error: float = 0.0) -> tuple[float, float]:
        """Return mean and half width of the 95 % interval of the change at a share of replay.

        Args:
            share: Share of replay, above 0 and at most 1.
            own_error: 0 for the curve itself; for a single run, the standard error of its
                measurement.
        """
        x = np.asarray([1.0, math.log(share)])
        quantile = student_quantile((1 - CONFIDENCE) / 2, max(1, self.degrees))
        variance = float(x @ self.covariance @ x) + self.misfit * own_error**2
        return float(x @ self.coefficients), quantile * math.sqrt(variance)


def fit(shares: Sequence[float], changes: Sequence[float], errors: Sequence[float]) -> Curve:
    """Fit a curve by weighted least squares.

    Where the points lie further off the curve than their errors say, the errors grow accordingly.
    """
    x = np.stack([np.ones(len(shares)), np.log(np.asarray(shares))], axis=1)
    y = np.asarray(changes)
    weight = 1 / np.maximum(np.asarray(errors), LEAST_ERROR_PERCENT) ** 2
    covariance = np.linalg.inv(x.T @ (weight[:, None] * x))
    coefficients = covariance @ (x.T @ (weight * y))
    degrees = len(shares) - 2
    misfit = 1.0
    if degrees:
        squares = weight * (y - x @ coefficients) ** 2
        misfit = max(1.0, float(squares.sum() / degrees))
    return Curve(
        coefficients=coefficients, covariance=covariance * misfit, misfit=misfit, degrees=degrees
    )


def read_probe(run_dir: Path) -> Probe:
    """Read what a finished probe run has found.

    Raises:
        ConfigError: the run holds no measurement after step 0, or its mix cannot be read.
    """
    try:
        events = read_events(run_dir / "metrics.jsonl")
        config = yaml.safe_load((run_dir / "config.resolved.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"probe {run_dir}: {error.strerror}: {error.filename}. Is it a run directory?"
        ) from error
    language = {source.name: source.language for source in load_mix(config["data"]["mix"]).sources}
    guard = {}
    steps = []
    for event in events:
        is_text = event.get("kind", "text") == "text"
        if event["event"] == "guard" and is_text and event["step"] > 0:
            guard[event["domain"]] = event
        if event["event"] == "step":
            steps.append(event)
    if not guard or not steps:
        raise ConfigError(
            f"probe {run_dir}: the guard has measured nothing after step 0. Let the run finish."
        )
    tokens = _tokens_by_language(steps, language)
    main = max(tokens, key=tokens.__getitem__)
    change = {}
    gains = []
    for name, event in guard.items():
        if event["language"] == main:
            gains.append(-event["delta_percent"])
        else:
            standard_error = (event["ci_high"] - event["ci_low"]) / (2 * Z)
            change[name] = (event["delta_percent"], standard_error)
    return Probe(
        name=run_dir.name,
        replay_share=1 - tokens[main] / sum(tokens.values()),
        main_language=main,
        steps=max(event["step"] for event in guard.values()),
        baseline={name: event["baseline"] for name, event in guard.items()},
        change=change,
        gain_percent=float(np.mean(gains)) if gains else math.nan,
    )


def _tokens_by_language(
    steps: Sequence[dict[str, Any]], language: dict[str, str]
) -> dict[str, float]:
    """Sum the predicted tokens of a run, given the language of each source."""
    tokens: dict[str, float] = {}
    for event in steps:
        for name, count in event["tokens_by_source"].items():
            tokens[language[name]] = tokens.get(language[name], 0) + count
    return tokens


def check_probes(probes: Sequence[Probe]) -> None:
    """Refuse probes that cannot be compared.

    Raises:
        ConfigError: the probes differ in what must be the same; the message has every reason.
    """
    problems = []
    first = probes[0]
    shares = {round(probe.replay_share, 4) for probe in _with_replay(probes)}
    if len(shares) < MIN_PROBES:
        problems.append(
            f"{len(shares)} different shares of replay above 0, at least {MIN_PROBES} are needed "
            "for a curve."
        )
    for probe in probes[1:]:
        if probe.main_language != first.main_language:
            problems.append(
                f"{probe.name}: main_language is {probe.main_language}, {first.name} has "
                f"{first.main_language}."
            )
        if probe.steps != first.steps:
            problems.append(
                f"{probe.name}: steps is {probe.steps}, {first.name} has {first.steps}."
            )
        if probe.baseline != first.baseline:
            problems.append(
                f"{probe.name}: other held-out text, or another untouched model, than {first.name}."
            )
    if problems:
        raise ConfigError(problems)


def _with_replay(probes: Sequence[Probe]) -> list[Probe]:
    """Return the probes that a curve can use, in ascending order of replay."""
    usable = [probe for probe in probes if probe.replay_share > 0]
    return sorted(usable, key=lambda probe: probe.replay_share)


def largest_main_share(probes: Sequence[Probe], tolerance_percent: float) -> dict[str, Any]:
    """Find the largest share of the main language at which every domain stays within tolerance.

    Returns:
        `main_share` with `low` and `high` (ends of the 95 % interval), the `domain` that decides,
        `bounded` (`none`: the curve meets the tolerance among the probes; `above`, `below`: all
        probes are within, or none is), `curves`, and `checks`, one per probe left out that lies
        between others.
    """
    usable = _with_replay(probes)
    grid = np.geomspace(usable[0].replay_share, usable[-1].replay_share, NUM_GRID_POINTS)
    curves = {name: _fit(usable, name) for name in usable[0].change}
    crossings = {}
    for name, curve in curves.items():
        crossings[name] = _crossings(curve, grid, tolerance_percent)
    domain = max(crossings, key=lambda name: crossings[name].mean)
    low = max(crossing.low for crossing in crossings.values())
    middle = crossings[domain].mean
    high = max(crossing.high for crossing in crossings.values())
    bounded = "none"
    if middle <= grid[0]:
        bounded = "above"
    elif math.isinf(middle):
        bounded = "below"
    return {
        "main_share": 1 - min(middle, grid[-1]),
        "low": 1 - min(high, grid[-1]),
        "high": 1 - min(low, grid[-1]),
        "domain": domain,
        "bounded": bounded,
        "curves": curves,
        "checks": _checks(usable),
    }


def _fit(probes: Sequence[Probe], domain: str) -> Curve:
    shares = [probe.replay_share for probe in probes]
    changes = [probe.change[domain][0] for probe in probes]
    errors = [probe.change[domain][1] for probe in probes]
    return fit(shares, changes, errors)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Crossings:
    """Shares of replay from which on a curve stays within the tolerance; infinite if none does."""

    low: float
    """For the lower end of the curve's interval."""
    mean: float
    high: float
    """For the upper end."""


def _crossings(curve: Curve, grid: npt.NDArray[np.float64], tolerance: float) -> _Crossings:
    means, halves = np.asarray([curve.at(share) for share in grid]).T
    return _Crossings(
        low=_first_within(means - halves, grid, tolerance),
        mean=_first_within(means, grid, tolerance),
        high=_first_within(means + halves, grid, tolerance),
    )


def _first_within(
    line: npt.NDArray[np.float64], grid: npt.NDArray[np.float64], tolerance: float
) -> float:
    """Return the first grid point behind the last one at which the line is above the tolerance."""
    above = np.flatnonzero(line > tolerance)
    if len(above) == 0:
        return float(grid[0])
    last = int(above[-1])
    if last + 1 == len(grid):
        return math.inf
    return float(grid[last + 1])


def _checks(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """Predict each probe that lies between others from the rest."""
    if len(probes) <= MIN_PROBES:
        return []
    checks = []
    for probe in probes[1:-1]:
        checks += _left_out(probes, probe)
    return checks


def _left_out(probes: Sequence[Probe], one: Probe) -> list[dict[str, Any]]:
    """Compare one probe with what the curves through all others say of a run at its share."""
    others = [probe for probe in probes if probe is not one]
    checks = []
    for domain, (measured, error) in one.change.items():
        own_error = max(error, LEAST_ERROR_PERCENT)
        mean, half = _fit(others, domain).at(one.replay_share, own_error=own_error)
        checks.append(
            {
                "probe": one.name,
                "share": one.replay_share,
                "domain": domain,
                "predicted": mean,
                "half": half,
                "measured": measured,
            }
        )
    return checks


def describe(probes: Sequence[Probe], tolerance_percent: float) -> str:
    """Return the plan for people.

    Raises:
        ConfigError: the probes cannot be compared.
    """
    check_probes(probes)
    found = largest_main_share(probes, tolerance_percent)
    lines = [_probe_table(probes), "", _answer(found, probes[0].main_language, tolerance_percent)]
    for check in found["checks"]:
        off = abs(check["measured"] - check["predicted"])
        judgement = "inside" if off <= check["half"] else "OUTSIDE"
        lines.append(
            f"  left out {check['probe']}: {check['domain']} predicted "
            f"{check['predicted']:+.2f} +- {check['half']:.2f}, measured "
            f"{check['measured']:+.2f}: {judgement}"
        )
    return "\n".join(lines)


def _probe_table(probes: Sequence[Probe]) -> str:
    language = probes[0].main_language
    order = sorted(probes, key=lambda probe: probe.replay_share)
    domains = list(order[0].change)
    rows = []
    for probe in order:
        main_percent = 100 * (1 - probe.replay_share)
        row = [probe.name, f"{main_percent:.1f}", f"{probe.gain_percent:.2f}"]
        row += [f"{probe.change[domain][0]:+.2f}" for domain in domains]
        rows.append(row)
    return table(["probe", f"{language} %", f"{language} gain %", *domains], rows)


def _answer(found: dict[str, Any], language: str, tolerance_percent: float) -> str:
    share = 100 * found["main_share"]
    tolerance = f"{tolerance_percent:g} %"
    if found["bounded"] == "above":
        return f"Every probe is within {tolerance}: {language} may have {share:.1f} % and more."
    if found["bounded"] == "below":
        domain = found["domain"]
        return f"No probe is within {tolerance}: {domain} needs more replay than was tried."
    interval = f"95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f} %"
    return (
        f"Within {tolerance}: {language} may have {share:.1f} % ({interval}); "
        f"{found['domain']} decides."
    )
