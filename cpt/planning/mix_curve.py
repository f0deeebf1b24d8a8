"""The curve of a domain's change over the share of replay, as draws that carry its uncertainty.

    change(share) = level + fall * g(share),   g(share) = (share + epsilon)^-gamma, scaled

This is the part of the D-CPT law that depends on the mixture (arXiv 2406.01375, section 3: C / (r +
epsilon)^gamma).  g is scaled to 0 at the largest share that was tried and to 1 at the smallest; so
`level` is the change at the former, and `fall` is how much replay buys between the two.  gamma and
epsilon cannot be told from five or eight runs.  They stay unknown: every pair of a grid counts by
its likelihood, and with it the shapes from a straight line to a steep hyperbola.

Two errors stand between a measured change and the curve, and they are told apart:

    documents   The held-out documents are a sample.  All probes score the same ones, so this error
                is common to them: it moves the curve, and it does not show in the misfit.  The
                documents are drawn anew, once for all probes.
    runs        Another order of the data gives another change.  The two seeds at one share and the
                misfit of all runs tell its standard deviation.  Domains inform each other: their
                variances scatter around a common one.

With probes of several lengths, level and fall are lines in the length to a power that is as
unknown as the shape (arXiv 2407.17467 finds power laws in the length).

Letters: R draws, K shapes, N runs, D domains, P coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

GAMMAS = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0)
"""Exponents of the form; -1 is a straight line in the share, and 0 stands for its logarithm."""
EPSILONS = (0.002, 0.01, 0.03, 0.1, 0.3)
"""Offsets of the share; with them a run without replay has a finite change."""
LENGTH_EXPONENTS = (-0.5, -0.25, 0.0, 0.25, 0.5)
"""Exponents of the length of a run; 0 stands for its logarithm."""
RUN_SPREADS = np.geomspace(0.02, 2.0, 15)
"""Standard deviations between two runs, in percent, that the common one is looked for in.  It is at
least the first: the order of the data alone moves a run by as much.
"""
SPREAD_WEIGHT = 4.0
"""Degrees of freedom that the common standard deviation lends to that of one domain."""
NUM_RESAMPLES = 1000
"""Times that the documents are drawn."""
DRAWS_PER_RESAMPLE = 4
"""Curves that are drawn for each of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """The forms that a curve may have."""

    gamma: Floats
    """(K,) exponent of the share."""
    epsilon: Floats
    """(K,) offset of the share."""
    length_exponent: Floats
    """(K,) exponent of the length."""


def all_shapes(num_lengths: int) -> Shapes:
    """Return every combination; the exponent of the length only counts with several lengths."""
    lengths = LENGTH_EXPONENTS if num_lengths > 1 else (0.0,)
    axes = np.meshgrid(GAMMAS, EPSILONS, lengths, indexing="ij")
    gamma, epsilon, length_exponent = (axis.ravel() for axis in axes)
    return Shapes(gamma=gamma, epsilon=epsilon, length_exponent=length_exponent)


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveDraws:
    """Curves of every domain, each as likely as the next; R of them."""

    domains: tuple[str, ...]
    """The D domains."""
    smallest_share: float
    """Smallest share of replay among the probes."""
    largest_share: float
    """Largest share of replay among the probes."""
    level: Floats
    """(R, D) change in percent at the largest share."""
    fall: Floats
    """(R, D) how much higher the change is at the smallest share; at least 0, since more replay
    does not cost English.
    """
    gamma: Floats
    """(R, D) exponent of the share."""
    epsilon: Floats
    """(R, D) offset of the share."""
    run_spread: Floats
    """(R, D) standard deviation of a run around its curve, in percent."""

    def at(self, share: float) -> Floats:
        """Return the (R, D) change in percent at a share of replay between 0 and 1."""
        return self.level + self.fall * scaled_power(
            share, self.gamma, self.epsilon, self.smallest_share, self.largest_share
        )

    def needed_share(self, tolerance_percent: float) -> Floats:
        """Return the (R, D) share of replay from which on a curve stays within the tolerance.

        It is the smallest share that was tried if the whole curve is within, and infinite if no
        part of it is.
        """
        bottom = power(self.largest_share, self.gamma, self.epsilon)
        top = power(self.smallest_share, self.gamma, self.epsilon)
        fall = np.where(self.fall > 0, self.fall, 1.0)
        wanted = bottom + (top - bottom) * (tolerance_percent - self.level) / fall
        within = self.level + self.fall <= tolerance_percent
        beyond = self.level > tolerance_percent
        # where the curve meets no tolerance the inverse has no meaning, and is not used
        crosses = ~within & ~beyond
        share = inverse_power(np.where(crosses, wanted, bottom), self.gamma, self.epsilon)
        share = np.clip(share, self.smallest_share, self.largest_share)
        return np.where(beyond, math.inf, np.where(within, self.smallest_share, share))


def power(value: Floats | float, exponent: Floats, offset: Floats | float = 0.0) -> Floats:
    """Return ((value + offset)^-exponent - 1) / exponent, whose limit at 0 is a logarithm."""
    logarithm = np.log(np.asarray(value) + offset)
    safe = np.where(exponent == 0, 1.0, exponent)
    return np.where(exponent == 0, -logarithm, np.expm1(-safe * logarithm) / safe)


def inverse_power(result: Floats, exponent: Floats, offset: Floats) -> Floats:
    """Return the value of which `power` is `result`."""
    safe = np.where(exponent == 0, 1.0, exponent)
    logarithm = np.where(exponent == 0, -result, -np.log1p(safe * result) / safe)
    return np.exp(logarithm) - offset


def scaled_power(
    share: Floats | float, gamma: Floats, epsilon: Floats, smallest: float, largest: float
) -> Floats:
    """Return the form of a curve, which is 1 at the smallest share and 0 at the largest."""
    bottom = power(largest, gamma, epsilon)
    top = power(smallest, gamma, epsilon)
    return (power(share, gamma, epsilon) - bottom) / (top - bottom)


def resampled_changes(
    before: Floats, after: Floats, generator: np.random.Generator, num_resamples: int
) -> Floats:
    """Return the change of every run in percent over documents drawn anew.

    Args:
        before: (documents,) nats of the untouched model.
        after: (documents, N) nats of the same documents after each run.
        generator: Draws the documents, the same ones for all runs.
        num_resamples: How often they are drawn.

    Returns:
        (num_resamples, N) changes of the nats per byte.
    """
    documents = len(before)
    counts = generator.multinomial(documents, np.full(documents, 1 / documents), num_resamples)
    total_before = counts @ before
    return 100 * (counts @ after / total_before[:, None] - 1)


def draw_curves(
    shares: Sequence[float],
    steps: Sequence[int],
    changes: Mapping[str, Floats],
    planned_steps: int,
    generator: np.random.Generator,
) -> CurveDraws:
    """Draw curves that are as likely as the runs make them.

    Args:
        shares: Share of replay of each of the N runs.
        steps: Length of each run in optimizer steps.
        changes: (resamples, N) change in percent of each domain, over documents drawn anew.
        planned_steps: Length for which the curves are to hold.
        generator: Draws shapes, spreads and coefficients.
    """
    shapes = all_shapes(len(set(steps)))
    design_KNP = design(np.asarray(shares), np.asarray(steps), planned_steps, shapes)
    changes_RND = np.stack(list(changes.values()), axis=2)
    fits = _Fits.of(design_KNP, changes_RND)
    spread = np.repeat(fits.draw_spread(generator), DRAWS_PER_RESAMPLE)
    fits = fits.repeated(DRAWS_PER_RESAMPLE)
    by_shape = fits.log_likelihood(spread).transpose(0, 2, 1)
    shape = _draw_index(by_shape, generator)
    coefficients, run_spread = fits.draw_coefficients(spread, shape, generator)
    level = coefficients[..., 0]
    fall = coefficients[..., 1]
    # a curve that rises with the share is a flat one that was measured with errors
    level = np.where(fall < 0, level + fall / 2, level)
    return CurveDraws(
        domains=tuple(changes),
        smallest_share=min(shares),
        largest_share=max(shares),
        level=level,
        fall=np.maximum(fall, 0.0),
        gamma=shapes.gamma[shape],
        epsilon=shapes.epsilon[shape],
        run_spread=run_spread,
    )


def design(shares: Floats, steps: Integers, planned_steps: int, shapes: Shapes) -> Floats:
    """Return the (K, N, P) columns whose coefficients are level, fall and their slopes in length.

    The length is scaled so that it is 0 for the planned run.  Level and fall are therefore those of
    the planned run, and no other coefficient enters the answer.
    """
    form = scaled_power(
        shares, shapes.gamma[:, None], shapes.epsilon[:, None], shares.min(), shares.max()
    )
    columns = [np.ones_like(form), form]
    if len(set(steps.tolist())) > 1:
        # rising with the length, as `power` falls with its argument
        length = -power(steps / planned_steps, -shapes.length_exponent[:, None])
        length = length / (length.max(axis=1) - length.min(axis=1))[:, None]
        columns += [length, length * form]
    return np.stack(columns, axis=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fits:
    """Least squares of every shape to every resample."""

    inverse: Floats
    """(K, P, P) inverse of the normal equations."""
    coefficients: Floats
    """(R, K, D, 2) level and fall."""
    squares: Floats
    """(R, K, D) sum of the squared residuals."""
    degrees: int
    """Degrees of freedom of the residuals: N - P."""

    @classmethod
    def of(cls, design_KNP: Floats, changes_RND: Floats) -> _Fits:
        normal_KPP = np.einsum("kni,knj->kij", design_KNP, design_KNP)
        inverse_KPP = np.linalg.inv(normal_KPP)
        solve_KPN = np.einsum("kij,knj->kin", inverse_KPP, design_KNP)
        num_runs, num_coefficients = design_KNP.shape[1:]
        rest_KNN = np.eye(num_runs) - np.einsum("kni,kim->knm", design_KNP, solve_KPN)
        residuals_RKND = np.einsum("knm,rmd->rknd", rest_KNN, changes_RND)
        return cls(
            inverse=inverse_KPP,
            coefficients=np.einsum("kin,rnd->rkdi", solve_KPN[:, :2], changes_RND),
            squares=(residuals_RKND**2).sum(axis=2),
            degrees=num_runs - num_coefficients,
        )

    def repeated(self, times: int) -> _Fits:
        """Return the fits with every resample several times in a row."""
        return replace(
            self,
            coefficients=np.repeat(self.coefficients, times, axis=0),
            squares=np.repeat(self.squares, times, axis=0),
        )

    def log_likelihood(self, spread: Floats) -> Floats:
        """Return the (R, K, D) log likelihood of each shape, up to a constant.

        Level and fall have a flat prior.  The variance of a domain has a scaled inverse chi-squared
        prior around spread^2 (Gelman et al., Bayesian Data Analysis, 3rd edition, 14.2 and 2.6).
        All three are integrated out.

        Args:
            spread: (R,) common standard deviation in percent.
        """
        prior = (SPREAD_WEIGHT * spread**2)[:, None, None]
        # the determinant of the inverse is one over that of the normal equations
        volume = np.linalg.slogdet(self.inverse)[1] / 2
        tail = (SPREAD_WEIGHT + self.degrees) / 2 * np.log(prior + self.squares)
        return volume[:, None] + SPREAD_WEIGHT / 2 * np.log(prior) - tail

    def draw_spread(self, generator: np.random.Generator) -> Floats:
        """Draw the (R,) common standard deviation, given all domains."""
        num_resamples = len(self.squares)
        by_spread = []
        for spread in RUN_SPREADS:
            over_shapes = _log_sum(self.log_likelihood(np.full(num_resamples, spread)), axis=1)
            by_spread.append(over_shapes.sum(axis=1))
        return RUN_SPREADS[_draw_index(np.stack(by_spread, axis=1), generator)]

    def draw_coefficients(
        self, spread: Floats, shape: Integers, generator: np.random.Generator
    ) -> tuple[Floats, Floats]:
        """Draw the (R, D, 2) level and fall, and the (R, D) spread of each domain.

        Args:
            spread: (R,) common standard deviation.
            shape: (R, D) shape of each domain's curve.
            generator: Draws.
        """
        draw = np.arange(len(spread))[:, None]
        domain = np.arange(shape.shape[1])
        scale = SPREAD_WEIGHT * spread[:, None] ** 2 + self.squares[draw, shape, domain]
        chi_squared = generator.chisquare(SPREAD_WEIGHT + self.degrees, shape.shape)
        own_spread = np.sqrt(scale / chi_squared)
        factor_K22 = np.linalg.cholesky(self.inverse[:, :2, :2])
        normal = generator.normal(size=(*shape.shape, 2))
        error = own_spread[:, :, None] * np.einsum("rdij,rdj->rdi", factor_K22[shape], normal)
        return self.coefficients[draw, shape, domain] + error, own_spread


def _log_sum(logarithms: Floats, axis: int) -> Floats:
    """Return the logarithm of a sum, given the logarithms of its terms."""
    largest = logarithms.max(axis=axis, keepdims=True)
    total: Floats = np.log(np.exp(logarithms - largest).sum(axis=axis))
    return total + largest.squeeze(axis)


def _draw_index(logarithms: Floats, generator: np.random.Generator) -> Integers:
    """Draw an index along the last axis, as likely as the logarithms say."""
    weight = np.exp(logarithms - logarithms.max(axis=-1, keepdims=True))
    up_to = np.cumsum(weight, axis=-1)
    point = generator.uniform(size=up_to.shape[:-1]) * up_to[..., -1]
    index: Integers = (up_to < point[..., None]).sum(axis=-1)
    return index
