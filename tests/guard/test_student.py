"""Quantiles of Student's t are those of the tables."""

from __future__ import annotations

import math

import pytest

from cpt.guard.student import student_quantile, student_tail


@pytest.mark.parametrize(
    ("tail", "degrees", "published"),
    [(0.025, 10, 2.228), (0.005, 30, 2.750), (0.001, 8, 4.501), (0.0005, 120, 3.373)],
)
def test_quantiles_are_those_of_the_tables(tail: float, degrees: int, published: float) -> None:
    """Abramowitz and Stegun, table 26.10."""
    assert student_quantile(tail, degrees) == pytest.approx(published, rel=3e-4)


@pytest.mark.parametrize("tail", [0.1, 0.01, 1e-3, 1e-5])
def test_few_degrees_of_freedom_have_their_closed_forms(tail: float) -> None:
    """With one degree it is Cauchy's distribution; with two, t^2 = 2 (1 - 2p)^2 / (4p (1 - p))."""
    assert student_quantile(tail, 1) == pytest.approx(1 / math.tan(math.pi * tail), rel=1e-9)
    two = (1 - 2 * tail) * math.sqrt(2 / (4 * tail * (1 - tail)))
    assert student_quantile(tail, 2) == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("degrees", [0.7, 3.0, 12.5, 400.0, 1e6])
def test_tail_of_a_quantile_is_its_probability(degrees: float) -> None:
    for tail in (0.4, 0.05, 1e-4):
        assert student_tail(student_quantile(tail, degrees), degrees) == pytest.approx(tail)


def test_many_degrees_of_freedom_give_the_normal_quantile() -> None:
    assert student_quantile(0.05, 1e7) == pytest.approx(1.644854, rel=1e-5)
