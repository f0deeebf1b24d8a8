"""A model is named by its folder, and a checkpoint of a run by the run and its step."""

from __future__ import annotations

import pytest

from cpt.telemetry.model_label import model_label


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/models/gpt-oss-20b", "gpt-oss-20b"),
        ("/runs/cpt/checkpoints/step-00002000", "cpt@2000"),
        ("runs/cpt/checkpoints/step-00000000", "cpt@0"),
        ("/runs/cpt/checkpoints/step-2000", "step-2000"),
        ("/copies/step-00002000", "step-00002000"),
    ],
)
def test_name_of_a_model_is_short_and_tells_the_run(path: str, label: str) -> None:
    assert model_label(path) == label
