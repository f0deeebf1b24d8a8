"""A run with rounded experts measures the untouched model first, and then what will be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.telemetry.metrics import read_events
from tests.support.launcher import ROOT, launch
from tests.support.service import make_workplace

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FROM_THE_START = {"experts": "mxfp4", "start_step": 0, "exponent": "floor"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workplace whose runs measure the guard after every step."""
    folder = make_workplace(tmp_path_factory.mktemp("quantized-run"))
    run = yaml.safe_load((folder / "run.yaml").read_text())
    run["guard"] = {"max_documents": 2, "interval_steps": 1, "policy": "warn"}
    run["train"]["total_steps"] = 2
    (folder / "plain.yaml").write_text(yaml.safe_dump(run))
    run["train"]["quantize"] = FROM_THE_START
    (folder / "rounded.yaml").write_text(yaml.safe_dump(run))
    for name in ("plain", "rounded"):
        arguments = ["--ds_config", str(folder / "ds.json")]
        arguments += ["--config", str(folder / f"{name}.yaml")]
        arguments += ["--run_dir", str(folder / name)]
        assert launch(ROOT / "cpt" / "run.py", 1, arguments) == [0]
    return folder


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir / "metrics.jsonl") if event["event"] == name]


def test_baseline_of_a_run_that_rounds_from_the_start_is_that_of_the_untouched_model(
    workplace: Path,
) -> None:
    """The weights of `model.init` are bf16 values that MXFP4 does not have."""
    baselines = []
    for name in ("plain", "rounded"):
        text = (workplace / name / "guard" / "baseline.json").read_text()
        baselines.append({domain: one["nats"] for domain, one in json.loads(text).items()})
    assert baselines[0] == baselines[1]


def test_first_step_and_the_measurements_after_it_are_of_rounded_weights(workplace: Path) -> None:
    plain, rounded = (events(workplace / name, "step") for name in ("plain", "rounded"))
    assert plain[0]["loss"] != rounded[0]["loss"]
    scores = {}
    for name in ("plain", "rounded"):
        for event in events(workplace / name, "guard"):
            scores[name, event["step"], event["domain"]] = event["bits_per_byte"]
    for (name, step, domain), value in scores.items():
        if name == "rounded":
            assert (value == scores["plain", step, domain]) == (step == 0)
