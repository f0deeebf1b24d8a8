"""No group of a watched run ends a waiting rank before the watchdog has named who is at fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launcher import launch

WORKER = Path(__file__).with_name("group_timeout_worker.py")
HOUR = 3600.0
MARGIN = 600.0
CONTROL = 6 * HOUR


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Limits without a watchdog, then with one that waits for 3 and for 30 hours."""
    folder = tmp_path_factory.mktemp("limits")
    assert launch(WORKER, 1, [str(folder)]) == [0]
    return json.loads((folder / "limits.json").read_text())


def test_groups_of_deepspeed_and_those_made_later_wait_longer_than_the_watchdog(
    limits: list[dict[str, float]],
) -> None:
    for hours, found in ((3, limits[1]), (30, limits[2])):
        longer = {"short": 60.0, "control": max(CONTROL, hours * HOUR + MARGIN)}
        expected = dict.fromkeys(found, hours * HOUR + MARGIN)
        assert found == {**expected, **longer}


def test_without_a_watchdog_limits_stay_what_they_are(limits: list[dict[str, float]]) -> None:
    off = limits[0]
    assert off["later"] == off["sequence"] == off["data of experts"] == 1800  # gloo's
    assert off["world"] == off["store"] == 600  # DeepSpeed's
    assert (off["control"], off["short"]) == (CONTROL, 60)
