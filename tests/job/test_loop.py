"""A run that could not be measured trains no step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import ConfigError
from cpt.job.loop import train


def test_guard_that_cannot_measure_is_refused_before_a_step() -> None:
    asked: list[int] = []

    def refuse(step: int) -> None:
        asked.append(step)
        raise ConfigError("baseline.json is missing")

    job: Any = SimpleNamespace(
        config=SimpleNamespace(train=None),
        progress=SimpleNamespace(step=7),
        last_step=9,
        guard=SimpleNamespace(open_untouched=refuse),
    )
    with pytest.raises(ConfigError, match="is missing"):
        train(job)
    assert asked == [7]
