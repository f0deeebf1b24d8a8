"""One run over two stages of sequence length, each in a layout of its own, as users start it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import list_steps, step_folder
from cpt.telemetry.metrics import read_events
from cpt.telemetry.report.starts import marks
from tests.support.launcher import ROOT, free_port, rank_environment, start
from tests.support.service import SMALL_GUARD

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS = 6
BORDER = 3
"""Steps of the first stage: both have half of the tokens, and steps of equally many."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    sources = []
    for name, language, weight in (("ja_essay", "ja", 0.6), ("en_web", "en", 0.4)):
        path = str(ROOT / "data_pipeline" / "sample" / f"{name}.jsonl")
        sources.append(
            {"name": name, "language": language, "path": path, "weight": weight}
            | {"domain": name, "held_out_share": 0.1}
        )
    stages = [{"seq_len": 64, "share": 0.5}, {"seq_len": 128, "share": 0.5}]
    mix = {"stages": stages, "seed": 1, "guard": SMALL_GUARD, "sources": sources}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    run: dict[str, Any] = {
        "model": {"init": "tiny"},
        "data": {"mix": "mix.yaml"},
        "train": {"seq_len": 64, "global_batch_size": 8, "total_steps": STEPS, "lr": 1e-3}
        | {"dtype": "fp32", "threads": 1},
        "guard": {"max_documents": 1, "interval_steps": 3, "policy": "warn"},
        "checkpoint": {"interval_steps": 2, "async_save": False, "keep_last": 9},
        "stages": [
            {"seq_len": 64, "micro_batch_size": 2},
            {"seq_len": 128, "sequence_parallel_size": 2, "activation_checkpointing": True},
        ],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    zero = {"stage": 3, "stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder


def train(workplace: Path, run_dir: str, *arguments: str) -> list[str]:
    """Run both ranks to the end and return what they print."""
    port = free_port()
    environments = [rank_environment(rank, 2, port) for rank in range(2)]
    command = ["--ds_config", "ds.json", "--config", "run.yaml", "--run_dir", run_dir, *arguments]
    codes, outputs = start(ROOT / "cpt" / "run.py", command, environments, workplace).wait(500)
    assert codes == [0, 0]
    return outputs


def steps_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    events = read_events(run_dir / "metrics.jsonl")
    return {event["step"]: event for event in events if event["event"] == "step"}


def results(steps: dict[int, dict[str, Any]]) -> dict[int, tuple[float, float, float]]:
    return {n: (event["loss"], event["grad_norm"], event["lr"]) for n, event in steps.items()}


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    outputs = train(workplace, "unbroken")
    assert "after step 3 the run goes on in stage 2 of 2: rows of 128 tokens" in outputs[0]
    return workplace / "unbroken"


def test_run_changes_rows_and_layout_at_the_border(unbroken: Path) -> None:
    steps = steps_of(unbroken)
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert [steps[step]["stage"] for step in sorted(steps)] == [1, 1, 1, 2, 2, 2]
    assert [steps[step]["seq_len"] for step in sorted(steps)] == [64] * 3 + [128] * 3
    assert list_steps(unbroken) == [6, 4, 3, 2]
    events = read_events(unbroken / "metrics.jsonl")
    starts = [event for event in events if event["event"] == "start"]
    assert [event["step"] for event in starts] == [0, BORDER]
    (border,) = [event for event in events if event["event"] == "stage"]
    assert (border["step"], border["stage"], border["seq_len"]) == (BORDER, 2, 128)
    assert [(mark.step, mark.kind) for mark in marks(events)] == [(BORDER, "stage")]
    state = read_manifest(step_folder(unbroken, STEPS)).state
    assert state["config"]["sp_size"] == 2
    assert state["identity"]["stages"] == [
        {"first_batch": 0, "seq_len": 64, "global_batch_size": 8},
        {"first_batch": BORDER, "seq_len": 128, "global_batch_size": 4},
    ]
    # the guard measures rows of the first stage throughout, so its figures can be compared
    rows = {e["domain"]: e for e in events if e["event"] == "guard" and e["step"] == STEPS}
    before = {e["domain"]: e for e in events if e["event"] == "guard" and e["step"] == 0}
    assert rows.keys() == before.keys()


@pytest.mark.parametrize("step", [2, 4])
def test_run_that_is_resumed_in_a_stage_has_the_losses_of_one_that_never_stopped(
    workplace: Path, unbroken: Path, step: int
) -> None:
    """From step 4 on this is an ordinary start in the layout of the second stage.

    From step 2 on it crosses the border once more, which takes another start of two processes.
    """
    name = f"resumed-{step}"
    folder = step_folder(workplace / name, step)
    shutil.copytree(step_folder(unbroken, step), folder)
    shutil.copytree(unbroken / "guard", workplace / name / "guard")
    (workplace / name).chmod(0o700)
    train(workplace, name)
    expected = results(steps_of(unbroken))
    found = results(steps_of(workplace / name))
    assert found == {number: expected[number] for number in range(step + 1, STEPS + 1)}
    chains = []
    for run_dir in (unbroken, workplace / name):
        chains.append(read_manifest(step_folder(run_dir, STEPS)).state["progress"]["batch_chain"])
    assert chains[0] == chains[1]
