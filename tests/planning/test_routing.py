"""The imbalance of a plan is that of a run, if one is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt.cli import main
from cpt.errors import ConfigError
from cpt.planning.hardware import Assumptions
from cpt.planning.routing import read_routing
from tests.support.launcher import ROOT


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two layers that measured its routers three times."""
    folder = tmp_path / "a-run"
    folder.mkdir()
    events = [{"event": "step", "step": 1}]
    for step, loads in ((10, [2.0, 3.0]), (20, [3.0, 5.0]), (30, [4.0, 7.0])):
        events.append({"event": "router", "step": step, "load_max_over_mean": loads})
    lines = [json.dumps(event) for event in events]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_load_of_the_busiest_expert_is_averaged_over_measurements(run_dir: Path) -> None:
    routing = read_routing(run_dir)
    assert routing.busiest == (3.0, 5.0)
    assert routing.steps == (10, 30)


def test_rank_with_one_expert_is_as_busy_as_its_expert(run_dir: Path) -> None:
    assert read_routing(run_dir).rank_imbalance(1, 32) == pytest.approx(4.0)


def test_rank_with_several_experts_has_average_ones_beside_the_busiest(run_dir: Path) -> None:
    """Four experts of 32: (3 + 3 x 29/31) / 4 and (5 + 3 x 27/31) / 4."""
    by_layer = [(3 + 3 * 29 / 31) / 4, (5 + 3 * 27 / 31) / 4]
    assert read_routing(run_dir).rank_imbalance(4, 32) == pytest.approx(sum(by_layer) / 2)
    assert read_routing(run_dir).rank_imbalance(32, 32) == pytest.approx(1.0)


def test_one_rank_of_experts_has_no_busiest(run_dir: Path) -> None:
    assumed = Assumptions(routing=read_routing(run_dir))
    assert assumed.rank_imbalance(1, 32) == 1.0
    assert assumed.rank_imbalance(32, 32) == pytest.approx(4.0)


def test_run_without_measured_routers_is_refused(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="has no router event"):
        read_routing(run_dir)
    with pytest.raises(ConfigError, match="Is it a run directory"):
        read_routing(run_dir / "nothing")


PLAN = [
    "plan",
    "--config",
    str(ROOT / "configs" / "gpt-oss-20b.yaml"),
    "--ds_config",
    str(ROOT / "ds_configs" / "z3_ep.json"),
    "--gpus",
    "8",
    "--model",
    "gpt-oss-20b",
]


def test_plan_names_the_run_whose_routing_it_takes(run_dir: Path, capsys: Any) -> None:
    assert main([*PLAN, "--routing_of", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert (
        "routing: as in a-run, steps 10 to 30: the busiest expert of a layer has 4.00 x" in printed
    )
