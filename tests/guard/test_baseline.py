"""A baseline that nothing can be compared with is never kept."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpt.errors import ConfigError
from cpt.guard.baseline import check_finite
from cpt.guard.score import DomainScore


def score(*nats: float) -> DomainScore:
    return DomainScore(
        name="web",
        language="en",
        nats=np.array(nats, dtype=np.float64),
        bytes=np.array([10] * len(nats)),
    )


def test_finite_scores_are_kept() -> None:
    check_finite({"web": score(3.0, 4.0), "wiki": score()}, "model", "Look.")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_domain(value: float) -> None:
    scores = {"web": score(3.0, value), "wiki": score(1.0, 2.0), "code": score(value, value)}
    with pytest.raises(ConfigError) as caught:
        check_finite(scores, "model.path base", "Look at the weights.")
    text = str(caught.value)
    assert caught.value.exit_code == 78
    assert "model.path base" in text and text.endswith("Look at the weights.")
    assert "web (1 of 2 documents), code (2 of 2 documents)" in text and "wiki" not in text
