"""Loss weights of sources make the mean loss of a batch a weighted mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpt.job.job import Job
from cpt.training.engine import loss_factors

WEIGHTS = st.one_of(st.just(0.0), st.floats(0.01, 100))
SOURCES = st.lists(st.tuples(WEIGHTS, st.integers(0, 10_000)), min_size=1, max_size=6)


@given(sources=SOURCES)
def test_factors_are_those_of_the_mean_of_torch_with_weights(
    sources: list[tuple[float, int]],
) -> None:
    weights = [weight for weight, _ in sources]
    tokens = [count for _, count in sources]
    factors = loss_factors(weights, tokens)
    if sum(weight * count for weight, count in sources) == 0:
        assert factors.tolist() == [0.0] * len(sources)
        return
    mean = float((factors * torch.tensor(tokens)).sum()) / sum(tokens)
    assert mean == pytest.approx(1.0)
    for (weight, _), factor in zip(sources, factors.tolist(), strict=True):
        assert factor * sum(w * t for w, t in sources) == pytest.approx(weight * sum(tokens))


def test_equal_weights_of_any_size_change_nothing() -> None:
    assert loss_factors([3.0, 3.0], [10, 30]).tolist() == [1.0, 1.0]


def job_of(*weights: float) -> Any:
    job: Any = object.__new__(Job)
    sources = [SimpleNamespace(loss_weight=weight) for weight in weights]
    job.context = SimpleNamespace(mix=SimpleNamespace(sources=sources))
    return job


def test_run_without_loss_weights_takes_the_path_without_them() -> None:
    assert job_of(1.0, 1.0).loss_weights is None
    assert job_of(1.0, 0.25).loss_weights == (1.0, 0.25)
