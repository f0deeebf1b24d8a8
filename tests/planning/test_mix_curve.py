"""Curves are drawn as the runs and the documents make them likely."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpt.planning.mix_curve import (
    CurveDraws,
    Floats,
    all_shapes,
    design,
    draw_curves,
    inverse_power,
    power,
    resampled_changes,
    scaled_power,
)

SHARES = (0.05, 0.15, 0.15, 0.35, 0.7)


def d_cpt(share: Floats | float) -> Floats:
    return np.asarray(0.6 / (np.asarray(share) + 0.05) ** 0.5 - 0.6)


def drawn(
    changes: Floats,
    shares: tuple[float, ...] = SHARES,
    steps: tuple[int, ...] = (100,) * 5,
    planned_steps: int = 100,
) -> CurveDraws:
    """Return curves through changes that have no error of documents."""
    repeated = {"english": np.tile(changes, (100, 1))}
    return draw_curves(shares, steps, repeated, planned_steps, np.random.default_rng(0))


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 0.25, 2.0])
def test_power_is_undone_by_its_inverse_and_falls_with_the_share(exponent: float) -> None:
    shares = np.linspace(0.01, 1, 50)
    exponents = np.full(50, exponent)
    offsets = np.full(50, 0.03)
    values = power(shares, exponents, offsets)
    # float64: the worst loss is that of (0.04)^-2 - 1, six digits of sixteen
    np.testing.assert_allclose(inverse_power(values, exponents, offsets), shares, rtol=1e-10)
    assert (np.diff(values) < 0).all()


def test_power_near_0_is_the_logarithm() -> None:
    shares = np.linspace(0.01, 1, 50)
    almost = power(shares, np.full(50, 1e-7))
    np.testing.assert_allclose(almost, power(shares, np.zeros(50)), rtol=1e-6)


def test_form_is_1_at_the_smallest_share_and_0_at_the_largest() -> None:
    shapes = all_shapes(1)
    for share, value in ((0.05, 1.0), (0.7, 0.0)):
        form = scaled_power(share, shapes.gamma, shapes.epsilon, 0.05, 0.7)
        np.testing.assert_allclose(form, value, atol=1e-12)


def test_run_without_replay_can_be_drawn_through() -> None:
    shares = (0.0, 0.1, 0.1, 0.3, 0.6)
    curves = drawn(d_cpt(np.asarray(shares)), shares)
    assert np.isfinite(curves.at(0.0)).all()
    assert float(np.median(curves.at(0.0))) == pytest.approx(float(d_cpt(0.0)), abs=0.1)


def test_exact_runs_give_the_curve_back() -> None:
    curves = drawn(d_cpt(np.asarray(SHARES)))
    for share in (0.05, 0.1, 0.25, 0.5, 0.7):
        # the spread of a run is never taken to be less than 0.02 %
        assert float(np.median(curves.at(share))) == pytest.approx(float(d_cpt(share)), abs=0.06)


def test_needed_share_is_where_the_curve_meets_the_tolerance() -> None:
    curves = drawn(d_cpt(np.asarray(SHARES)))
    shares = curves.needed_share(0.5)
    inside = np.flatnonzero((shares[:, 0] > 0.05) & np.isfinite(shares[:, 0]))
    assert len(inside) > 350
    for draw in inside[:50]:
        assert curves.at(float(shares[draw, 0]))[draw, 0] == pytest.approx(0.5, abs=1e-9)


def test_needed_share_is_marked_where_nothing_was_tried() -> None:
    curves = drawn(d_cpt(np.asarray(SHARES)))
    assert (curves.needed_share(50.0) == 0.05).all()
    assert np.isinf(curves.needed_share(-50.0)).all()


def test_change_that_rises_with_replay_counts_as_flat() -> None:
    curves = drawn(np.asarray([0.1, 0.2, 0.2, 0.3, 0.4]))
    assert (curves.fall >= 0).all()
    assert float(np.median(curves.at(0.3))) == pytest.approx(0.24, abs=0.1)


def test_two_seeds_that_differ_widen_the_curve() -> None:
    exact = d_cpt(np.asarray(SHARES))
    apart = exact + np.asarray([0, 0.4, -0.4, 0, 0])
    narrow = np.std(drawn(exact).at(0.3))
    assert np.std(drawn(apart).at(0.3)) > 3 * narrow


def test_domains_inform_each_other_about_the_spread_of_a_run() -> None:
    """One domain alone knows the spread from three degrees of freedom, six domains know it well."""
    generator = np.random.default_rng(1)
    exact = d_cpt(np.asarray(SHARES))
    changes = {}
    for index in range(6):
        changes[str(index)] = np.tile(exact + 0.15 * generator.normal(size=5), (400, 1))
    together = draw_curves(SHARES, (100,) * 5, changes, 100, np.random.default_rng(0))
    spreads = []
    for name, change in changes.items():
        alone = draw_curves(SHARES, (100,) * 5, {name: change}, 100, np.random.default_rng(0))
        spreads.append(np.quantile(alone.run_spread, 0.99))
    assert np.quantile(together.run_spread, 0.99) < 0.8 * np.mean(spreads)
    assert float(np.median(together.run_spread)) == pytest.approx(0.15, rel=0.35)


def test_documents_are_drawn_once_for_all_runs() -> None:
    """Documents that differ alike in all runs move the curve and leave the runs' distances."""
    generator = np.random.default_rng(0)
    before = generator.lognormal(7, 0.5, size=200)
    own = generator.normal(size=200)
    after = np.stack([before * (1 + (own + mean) / 100) for mean in (3.0, 2.0, 1.0)], axis=1)
    changes = resampled_changes(before, after, generator, 2000)
    ratio = own @ before / before.sum()
    residuals = before * (own - ratio)
    expected = math.sqrt(float((residuals**2).sum())) / before.sum()
    assert changes[:, 0].std() == pytest.approx(expected, rel=0.1)
    # all runs move together, to the last digits of a float64
    assert (changes[:, 0] - changes[:, 1]).std() < 1e-9
    np.testing.assert_allclose(changes[:, 0] - changes[:, 2], 2.0, atol=1e-9)


def test_error_of_the_documents_does_not_pass_for_that_of_the_runs() -> None:
    exact = d_cpt(np.asarray(SHARES))
    common = np.random.default_rng(0).normal(size=(1000, 1))
    curves = draw_curves(
        SHARES, (100,) * 5, {"english": exact + common}, 100, np.random.default_rng(0)
    )
    assert float(np.median(curves.run_spread)) < 0.1
    assert float(np.std(curves.at(0.3))) == pytest.approx(1.0, rel=0.1)


def test_two_lengths_give_the_curve_of_a_third() -> None:
    shares = (0.05, 0.15, 0.15, 0.35, 0.7, 0.05, 0.3, 0.7)
    steps = (100,) * 5 + (200,) * 3
    growth = (np.asarray(steps) / 100) ** 0.25
    changes = growth * d_cpt(np.asarray(shares))
    for planned in (100, 150, 200, 300):
        curves = drawn(changes, shares, steps, planned)
        expected = (planned / 100) ** 0.25 * float(d_cpt(0.3))
        assert float(np.median(curves.at(0.3))) == pytest.approx(expected, abs=0.05)


def test_extrapolation_over_the_length_widens_the_curve() -> None:
    shares = (0.05, 0.15, 0.15, 0.35, 0.7, 0.05, 0.3, 0.7)
    steps = (100,) * 5 + (200,) * 3
    changes = d_cpt(np.asarray(shares))
    spreads = [
        np.std(drawn(changes, shares, steps, planned).at(0.3)) for planned in (150, 400, 800)
    ]
    assert spreads[0] < spreads[1] < spreads[2]


def test_only_level_and_fall_of_the_planned_run_enter_the_answer() -> None:
    shapes = all_shapes(2)
    columns = design(np.asarray([0.05, 0.7, 0.3]), np.asarray([100, 200, 150]), 150, shapes)
    np.testing.assert_allclose(columns[:, 2, 2:], 0.0, atol=1e-12)
