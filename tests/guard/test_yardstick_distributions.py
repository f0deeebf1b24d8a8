"""Our own distributions are those of mpmath, which computes them in any precision.

mpmath comes with torch (by way of SymPy).
"""

from __future__ import annotations

import mpmath
import pytest

from cpt.guard.generation.outcomes import share_above, share_below
from cpt.guard.student import student_quantile, student_tail
from cpt.offline.evaluation.significance import mcnemar_p_value

mpmath.mp.dps = 50


def incomplete_beta(a: float, b: float, x: float) -> mpmath.mpf:
    return mpmath.betainc(a, b, 0, x, regularized=True)


@pytest.mark.parametrize("degrees", [0.7, 1, 2.5, 9, 63, 1500, 1e5])
@pytest.mark.parametrize("value", [1e-3, 0.4, 1.7, 3.3, 8.0])
def test_tail_of_student_is_that_of_mpmath(value: float, degrees: float) -> None:
    x = mpmath.mpf(degrees) / (mpmath.mpf(degrees) + mpmath.mpf(value) ** 2)
    expected = incomplete_beta(mpmath.mpf(degrees) / 2, mpmath.mpf(0.5), x) / 2
    # n / (n + t^2) is rounded where t^2 is far below n
    assert student_tail(value, degrees) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("degrees", [1, 4, 30, 2000])
@pytest.mark.parametrize("tail", [0.3, 0.05, 1e-3, 1e-6])
def test_quantile_of_student_is_that_of_mpmath(tail: float, degrees: int) -> None:
    quantile = mpmath.mpf(student_quantile(tail, degrees))
    x = degrees / (degrees + quantile**2)
    found = incomplete_beta(mpmath.mpf(degrees) / 2, mpmath.mpf(0.5), x) / 2
    assert float(found) == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize(
    ("count", "trials"), [(0, 1), (0, 60), (1, 60), (7, 60), (59, 60), (300, 320), (40, 4000)]
)
@pytest.mark.parametrize("error", [0.05, 1e-3, 1e-6])
def test_bounds_of_clopper_and_pearson_are_quantiles_of_the_beta_law(
    count: int, trials: int, error: float
) -> None:
    """P(at most k of n) is 1 - I_p(k + 1, n - k)."""
    above = mpmath.mpf(share_below(count, trials, error))
    assert float(1 - incomplete_beta(count + 1, trials - count, above)) == pytest.approx(
        error, rel=1e-8
    )
    if count:
        below = mpmath.mpf(share_above(count, trials, error))
        assert float(incomplete_beta(count, trials - count + 1, below)) == pytest.approx(
            error, rel=1e-6
        )


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (9, 2), (40, 61), (300, 240), (2100, 1900)])
def test_mid_p_of_mcnemar_is_an_exact_sum(lost: int, won: int) -> None:
    ways = sum(mpmath.binomial(lost + won, more) for more in range(lost + 1, lost + won + 1))
    ways += mpmath.binomial(lost + won, lost) / 2
    expected = float(ways / mpmath.mpf(2) ** (lost + won))
    assert mcnemar_p_value(lost, won) == pytest.approx(expected, rel=1e-9)
