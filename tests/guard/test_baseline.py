"""A baseline that nothing can be compared with is never kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cpt.errors import ConfigError
from cpt.guard.baseline import DomainBaseline, check_finite, check_same_text
from cpt.guard.score import DomainScore


def score(*nats: float, fresh: tuple[float, ...] = ()) -> DomainBaseline:
    panel = DomainScore(
        name="web",
        language="en",
        nats=np.array(nats, dtype=np.float64),
        bytes=np.array([10] * len(nats)),
    )
    return DomainBaseline(
        panel=panel,
        clusters=np.arange(len(nats)),
        fresh=np.array(fresh, dtype=np.float64),
        fresh_per_look=len(fresh),
    )


def test_finite_scores_are_kept() -> None:
    check_finite({"web": score(3.0, 4.0), "wiki": score()}, "model", "Look.")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_domain(value: float) -> None:
    scores = {
        "web": score(3.0, value),
        "wiki": score(1.0, 2.0),
        "code": score(3.0, fresh=(value, value)),
    }
    with pytest.raises(ConfigError) as caught:
        check_finite(scores, "model.path base", "Look at the weights.")
    text = str(caught.value)
    assert caught.value.exit_code == 78
    assert "model.path base" in text and text.endswith("Look at the weights.")
    assert "web (1 of 2 documents), code (2 of 3 documents)" in text and "wiki" not in text


def test_baseline_of_other_documents_is_refused() -> None:
    stored = {"web": {"content_hash": "a", "fresh_content_hash": "b", "fresh_per_look": 5}}
    check_same_text(Path("f"), stored, {"web": {"content_hash": "a", "fresh_content_hash": "b"}})
    with pytest.raises(ConfigError, match="other held-out text of web"):
        check_same_text(
            Path("f"), stored, {"web": {"content_hash": "a", "fresh_content_hash": "x"}}
        )


def test_baseline_of_the_first_documents_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"before 0\.2.*--set guard\.enabled=false"):
        check_same_text(Path("f"), {"web": {"content_hash": "a"}}, {"web": {"content_hash": "a"}})


def test_baseline_survives_json() -> None:
    before = score(3.0, 4.0, fresh=(1.0, 2.0))
    again = DomainBaseline.from_json("web", json.loads(json.dumps(before.to_json())))
    assert again.to_json() == before.to_json()
    assert again.fresh_at(1).tolist() == [1.0, 2.0]
