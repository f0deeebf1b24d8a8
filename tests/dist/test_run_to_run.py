"""A run goes on from the checkpoint of another one, and is judged against a third model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.checkpoint.lineage import LINEAGE_FILE
from cpt.checkpoint.reader import step_folder
from cpt.export.run_export import ExportForm, export_run
from cpt.telemetry.metrics import read_events
from tests.support.launcher import ROOT, free_port, rank_environment
from tests.support.launcher import start as start_ranks
from tests.support.service import SMALL_GUARD

pytestmark = [pytest.mark.dist, pytest.mark.slow]
FIRST = {
    "model": {"init": "tiny"},
    "data": {"mix": "mix.yaml"},
    "train": {
        "seq_len": 256,
        "global_batch_size": 2,
        "total_steps": 2,
        "lr": 1e-3,
        "dtype": "fp32",
    },
    "guard": {"max_documents": 2, "policy": "warn", "interval_steps": 1},
    "checkpoint": {"interval_steps": 1},
    "telemetry": {"export_at_end": False},
}


def run(folder: Path, name: str) -> tuple[list[int], str]:
    """Do the run of NAME.yaml with one process; return its exit code and what it said."""
    arguments = ["--ds_config", "ds.json", "--config", f"{name}.yaml", "--run_dir", name]
    environments = [rank_environment(0, 1, free_port())]
    codes, outputs = start_ranks(ROOT / "cpt" / "run.py", arguments, environments, folder).wait()
    return codes, outputs[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs: `pretrained`, and `tuned`, which starts where the other one ended."""
    folder = tmp_path_factory.mktemp("run_to_run")
    source = {"name": "en_web", "language": "en", "domain": "web", "weight": 1.0}
    source |= {"path": str(ROOT / "data_pipeline/sample/en_web.jsonl"), "held_out_share": 0.1}
    mix = {"seq_len": 256, "seed": 1, "guard": SMALL_GUARD, "sources": [source]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    tuned = {
        **FIRST,
        "model": {"path": "pretrained"},
        "guard": {**FIRST["guard"], "baseline_model": "pretrained@1"},
        "train": {**FIRST["train"], "total_steps": 1},
    }
    for name, content in {"pretrained": FIRST, "tuned": tuned}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        codes, output = run(folder, name)
        assert codes == [0], output
    return folder


def measured(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the `guard` line of every step of a run."""
    found = {}
    for event in read_events(run_dir / "metrics.jsonl"):
        if event["event"] == "guard":
            found[event["step"]] = event
    return found


def test_run_begins_with_the_weights_at_which_another_one_ended(workplace: Path) -> None:
    before = measured(workplace / "pretrained")
    after = measured(workplace / "tuned")
    assert after[0]["bits_per_byte"] == pytest.approx(before[2]["bits_per_byte"], rel=1e-6)
    resolved = yaml.safe_load((workplace / "tuned" / "config.resolved.yaml").read_text())
    assert resolved["model"]["path"] == str(step_folder(workplace / "pretrained", 2))


def test_baseline_is_that_of_the_model_that_the_guard_names(workplace: Path) -> None:
    before = measured(workplace / "pretrained")
    after = measured(workplace / "tuned")
    for step in (0, 1):
        assert after[step]["baseline"] == pytest.approx(before[1]["bits_per_byte"], rel=1e-6)
    assert abs(after[0]["delta_percent"]) > 1e-3
    assert after[0]["action"] == "none"
    kept = json.loads((workplace / "tuned" / "guard" / "baseline.json").read_text())
    assert kept["en_web"]["model"] == str(step_folder(workplace / "pretrained", 1))


def test_export_says_what_the_model_came_from(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    form = ExportForm(format_name="bf16")
    export_run(workplace / "tuned", step_folder(workplace / "tuned", 1), out, form)
    models = json.loads((out / LINEAGE_FILE).read_text())["models"]
    assert [one["name"] for one in models] == ["random weights (tiny)", "pretrained", "tuned"]
    assert [one.get("steps") for one in models] == [None, 2, 1]
    card = (out / "README.md").read_text()
    assert "Started from `pretrained` (2 steps, " in card
    assert str(workplace) not in card
