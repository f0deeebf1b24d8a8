"""Student's t distribution, for the bounds of the guard and of the mix curve.

SciPy has it, too, but is no dependency: it would add 100 MB to every installation and half a second
to every start for this, Clopper and Pearson's bounds and the binomial tails of McNemar's test.
tests/guard/test_yardstick_distributions.py holds all three against mpmath.
"""

from __future__ import annotations

import math
from functools import lru_cache

MAX_TERMS = 300
"""Terms of the continued fraction; it converges in tens."""
CONVERGED = 1e-15
TINY = 1e-300
BISECTIONS = 200


@lru_cache(maxsize=1024)
def student_quantile(tail: float, degrees: float) -> float:
    """Return the value that Student's t exceeds with probability `tail`.

    Args:
        tail: Probability above 0, at most one half.
        degrees: Degrees of freedom above 0, not necessarily whole.
    """
    assert 0 < tail <= 0.5
    assert degrees > 0
    low = 0.0
    high = 1.0
    while student_tail(high, degrees) > tail:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if student_tail(middle, degrees) > tail:
            low = middle
        else:
            high = middle
    return high


def student_tail(value: float, degrees: float) -> float:
    """Return the probability that Student's t exceeds a value that is not negative.

    It is half the regularized incomplete beta function at n / (n + t^2) (Abramowitz and Stegun,
    26.7.1).
    """
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + value**2)) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _continued_fraction(a, b, x) / a
    return 1 - front * _continued_fraction(b, a, 1 - x) / b


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of the incomplete beta function.

    Abramowitz and Stegun, 26.5.8, by the modified method of Lentz.
    """
    numerator = 1.0
    denominator = 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = denominator
    for term in range(1, MAX_TERMS):
        even = term * (b - term) * x / ((a + 2 * term - 1) * (a + 2 * term))
        odd = -(a + term) * (a + b + term) * x / ((a + 2 * term) * (a + 2 * term + 1))
        for coefficient in (even, odd):
            denominator = 1 / _nonzero(1 + coefficient * denominator)
            numerator = _nonzero(1 + coefficient / numerator)
            factor = numerator * denominator
            value *= factor
        if abs(factor - 1) < CONVERGED:
            break
    return value


def _nonzero(value: float) -> float:
    return value if abs(value) > TINY else TINY
