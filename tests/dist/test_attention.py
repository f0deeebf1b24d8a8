"""Attention under sequence parallelism has the right values and gradients.

The start-up probe refuses sinks that are not sliced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.attention.yardstick import LIMITS
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of each of four ranks."""
    file = tmp_path_factory.mktemp("attention") / "found.json"
    assert launch(ROOT / "tests" / "dist" / "attention_worker.py", 4, [str(file)]) == [0] * 4
    found: list[dict[str, Any]] = json.loads(Path(file).read_text())
    return found


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "layout", ["SP 1, no exchange", "SP 2, ulysses", "SP 2, halo", "SP 4, ulysses", "SP 4, halo"]
)
def test_output_and_every_gradient_are_those_of_the_definition(
    ranks: list[dict[str, Any]], layout: str, dtype: torch.dtype
) -> None:
    for rank, found in enumerate(ranks):
        cases = {}
        above = {}
        for case, errors in found["errors"].items():
            if not (case.startswith(layout + ",") and case.endswith(str(dtype))):
                continue
            cases[case] = errors
            if not all(error <= LIMITS[dtype] for error in errors.values()):
                above[case] = errors
        assert len(cases) == 2 * 2 * 2, list(cases)  # rows, heads, layers
        assert not above, (rank, above)


@pytest.mark.parametrize("fault", ["first_slice_everywhere", "all_sinks"])
def test_sinks_that_are_not_sliced_are_refused_by_the_probe_on_every_rank(
    ranks: list[dict[str, Any]], fault: str
) -> None:
    """Rank 0 of a group has the right slice by chance, and must stop with the others."""
    messages = {
        "first_slice_everywhere": "attention is wrong on cpu",
        "all_sinks": "attention does not run on cpu",
    }
    expected = messages[fault]
    for found in ranks:
        assert found["refusals"]["nothing"] == ""
        assert expected in found["refusals"][fault], found["refusals"]
