"""A rank that dies, hangs or lags is named, and nothing is left running."""

from __future__ import annotations

import pytest

from cpt.state.stored import list_steps
from tests.support.service import run_to_end

pytestmark = pytest.mark.dist


@pytest.mark.quick
@pytest.mark.case("C1", "others exit, no orphan, newest checkpoint intact")
def test_killed_rank_takes_the_run_down_and_leaves_its_checkpoints(workplace) -> None:
    code, run = run_to_end(workplace, "killed", fault="forward:1:4:kill")
    assert code != 0 and "fault injected: forward rank=1 step=4 action=kill" in run.output, run.output
    assert [event["step"] for event in run.steps()] == [1, 2, 3] and list_steps(run.run_dir) == [2]
