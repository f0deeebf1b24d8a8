"""What people are told when updates cannot be applied."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cpt.job.recovery import advice


def job(updates: int, path: Path | None = Path("base")) -> Any:
    return SimpleNamespace(
        progress=SimpleNamespace(updates=updates),
        config=SimpleNamespace(model=SimpleNamespace(path=path, init="tiny")),
    )


def test_first_steps_point_to_the_weights_and_to_no_checkpoint() -> None:
    told = advice(job(0), has_checkpoint=False)
    assert "look at its first weights (model.path base)" in told
    assert "SHA-256" in told and "checkpoint" not in told


def test_first_steps_of_a_drawn_model_point_to_its_preset() -> None:
    assert "(model.init tiny)" in advice(job(0, None), has_checkpoint=False)


def test_later_steps_point_to_the_rows_and_to_a_checkpoint_that_exists() -> None:
    told = advice(job(5), has_checkpoint=True)
    assert "rows named above" in told and "newest checkpoint is intact" in told


def test_without_a_checkpoint_none_is_called_intact() -> None:
    assert "intact" not in advice(job(5), has_checkpoint=False)
