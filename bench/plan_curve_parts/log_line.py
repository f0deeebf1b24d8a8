"""A straight line over the logarithm of the share: the planner before November 2026.

It stays here as what the curve of cpt/planning/mix_curve.py is compared with.  Each domain has a
line by weighted least squares; its errors grow with the misfit; the printed share is where the line
itself meets the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cpt.guard.student import student_quantile
from cpt.planning.mix_probe import Probe, ProbeScores

Floats = npt.NDArray[np.float64]

LEAST_ERROR_PERCENT = 0.02
GRID_POINTS = 400
RESAMPLES = 200


def needed_shares(probes: Sequence[Probe], tolerance: float) -> tuple[float, float, float]:
    """Return the share of replay that was printed, and the ends of its 95 % interval.

    Infinity stands for more than was tried.

    Returns:
        Printed share, end with the least replay, end with the most.
    """
    shares = np.asarray([probe.replay_share for probe in probes])
    grid = np.geomspace(shares.min(), shares.max(), GRID_POINTS)
    ends = []
    for domain in probes[0].scores:
        changes = np.asarray([probe.scores[domain].change_percent for probe in probes])
        errors = np.asarray([bootstrap_error(probe.scores[domain]) for probe in probes])
        mean, half = line_at(grid, shares, changes, errors)
        lines = (mean, mean - half, mean + half)
        ends.append([first_within(line, grid, tolerance) for line in lines])
    printed, least, most = np.max(ends, axis=0).tolist()
    return printed, least, most


def bootstrap_error(score: ProbeScores) -> float:
    """Return the standard error of a change in percent over the documents."""
    count = len(score.before)
    picks = np.random.default_rng(0).integers(0, count, size=(RESAMPLES, count))
    return float((100 * score.after[picks].sum(1) / score.before[picks].sum(1)).std())


def line_at(grid: Floats, shares: Floats, changes: Floats, errors: Floats) -> tuple[Floats, Floats]:
    """Return the line at the points of a grid, and half its 95 % interval."""
    x = np.stack([np.ones(len(shares)), np.log(shares)], axis=1)
    weight = 1 / np.maximum(errors, LEAST_ERROR_PERCENT) ** 2
    covariance = np.linalg.inv(x.T @ (weight[:, None] * x))
    coefficients = covariance @ (x.T @ (weight * changes))
    degrees = len(shares) - 2
    squares = weight * (changes - x @ coefficients) ** 2
    misfit = max(1.0, float(squares.sum() / degrees))
    at = np.stack([np.ones(len(grid)), np.log(grid)], axis=1)
    variance = np.einsum("gi,ij,gj->g", at, covariance * misfit, at)
    return at @ coefficients, student_quantile(0.025, degrees) * np.sqrt(variance)


def first_within(line: Floats, grid: Floats, tolerance: float) -> float:
    """Return the first grid point behind the last one at which the line is above the tolerance."""
    above = np.flatnonzero(line > tolerance)
    if len(above) == 0:
        return float(grid[0])
    last = int(above[-1])
    return math.inf if last + 1 == len(grid) else float(grid[last + 1])
