"""A run over three phases of a schedule takes the same batches however it is broken off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import step_folder
from cpt.telemetry.metrics import read_events
from tests.support.launcher import ROOT, free_port, rank_environment
from tests.support.launcher import start as start_ranks
from tests.support.service import SMALL_GUARD

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 6
HALF = 3
"""The run is broken off in the middle of the linear phase."""
LEARNING_RATE = 1e-3
MAIN = 1
"""Last step of the first phase."""
SHIFT = 4
"""Last step of the linear one."""
SCHEDULE = [
    {"name": "main", "until_step": MAIN},
    {
        "name": "shift",
        "share": 0.5,
        "weights": {"ja_essay": 0.8, "en_web": 0.2},
        "to": {"ja_essay": 0.3, "en_web": 0.2, "en_math": 0.5},
        "to_lr_factor": 0.4,
    },
    {"name": "anneal", "share": "rest", "weights": {"en_web": 0.4, "en_math": 0.6}},
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedule")
    sources = []
    for name, language, read in (
        ("ja_essay", "ja", {"epochs": 1}),
        ("en_web", "en", {"epochs": 0.5}),
        ("en_math", "math", {"weight": 0.0}),
    ):
        sources.append(
            {
                "name": name,
                "language": language,
                "domain": name,
                "path": str(ROOT / "data_pipeline" / "sample" / f"{name}.jsonl"),
                "held_out_share": 0.1,
                **read,
            }
        )
    mix = {"seq_len": 64, "seed": 1, "guard": SMALL_GUARD, "sources": sources}
    (folder / "mix.yaml").write_text(yaml.safe_dump({**mix, "schedule": SCHEDULE}))
    run = {
        "model": {"init": "tiny"},
        "data": {"mix": "mix.yaml"},
        "train": {
            "seq_len": 64,
            "global_batch_size": 4,
            "total_steps": STEPS,
            "lr": LEARNING_RATE,
            "min_lr_ratio": 0.0,
            "schedule": "wsd",
            "decay_phase": "anneal",
            "dtype": "fp32",
        },
        "guard": {"enabled": False},
        "checkpoint": {"interval_steps": 3, "async_save": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    zero = {"stage": 3, "stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder


def finish(workplace: Path, run_dir: str, world_size: int, *settings: str) -> tuple[int, str]:
    """Do a run; return the exit code that all ranks have and the first one's output."""
    arguments = ["--ds_config", "ds.json", "--config", "run.yaml", "--run_dir", run_dir]
    for setting in settings:
        arguments += ["--set", setting]
    port = free_port()
    environments = [rank_environment(rank, world_size, port) for rank in range(world_size)]
    launch = start_ranks(ROOT / "cpt" / "run.py", arguments, environments, workplace)
    codes, outputs = launch.wait()
    assert len(set(codes)) == 1, outputs[0]
    return codes[0], outputs[0]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir / "metrics.jsonl") if event["event"] == "step"]


def progress_at(run_dir: Path, step: int) -> dict[str, Any]:
    progress: dict[str, Any] = read_manifest(step_folder(run_dir, step)).state["progress"]
    return progress


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    """An unbroken run of two ranks."""
    code, output = finish(workplace, "whole", 2)
    assert code == 0, output
    return workplace / "whole"


def test_phases_draw_their_sources_and_the_rate_falls_with_the_last_one(whole: Path) -> None:
    steps = steps_of(whole)
    assert [one["phase"] for one in steps] == ["main"] + ["shift"] * 3 + ["anneal"] * 2
    tokens: dict[str, dict[str, int]] = {}
    for one in steps:
        of_phase = tokens.setdefault(one["phase"], {})
        for name, count in one["tokens_by_source"].items():
            of_phase[name] = of_phase.get(name, 0) + count
    assert tokens["main"]["en_math"] == 0 and tokens["anneal"]["ja_essay"] == 0
    total = sum(tokens["shift"].values())
    assert tokens["shift"]["en_math"] / total == pytest.approx(0.25, abs=63 / total)
    rates = [one["lr"] for one in steps]
    factors = [1.0, 0.8, 0.6, 0.4]  # a line from 1 that the last step of the phase ends
    assert rates[:SHIFT] == pytest.approx([LEARNING_RATE * factor for factor in factors])
    assert rates[SHIFT:] == pytest.approx([LEARNING_RATE * part / 2 for part in (1, 0)])


def test_resumed_in_the_linear_phase_by_one_rank_it_has_the_same_batches_and_losses(
    workplace: Path, whole: Path
) -> None:
    code, output = finish(workplace, "halves", 2, f"train.stop_at_step={HALF}")
    assert code == 0, output
    code, output = finish(workplace, "halves", 1)
    assert code == 0 and "resuming from" in output, output
    halves = workplace / "halves"
    chain = progress_at(halves, STEPS)["batch_chain"]
    assert chain == progress_at(whole, STEPS)["batch_chain"]
    for step, expected in zip(steps_of(halves), steps_of(whole), strict=True):
        for key in ("step", "lr", "phase", "tokens_by_source"):
            assert step[key] == expected[key], key
        # fp32 sums in another order, as in test_layout_parity
        assert step["loss"] == pytest.approx(expected["loss"], rel=2e-5)


def test_weights_of_the_first_phase_follow_from_the_epochs_and_the_build(whole: Path) -> None:
    ledger = read_manifest(step_folder(whole, STEPS)).state["ledger"]
    main = ledger["segments"][0]
    asked = {name: source.get("epochs") for name, source in main["settings"]["sources"].items()}
    assert asked == {"ja_essay": 1, "en_web": 0.5, "en_math": None}
    (built,) = (whole.parent / "data").glob("*/manifest.json")
    tokens = {}
    for source in json.loads(built.read_text())["sources"]:
        tokens[source["name"]] = source["predicted_tokens"]
    total = tokens["ja_essay"] + 0.5 * tokens["en_web"]
    assert main["weights"]["ja_essay"] == pytest.approx(tokens["ja_essay"] / total)
    assert main["weights"]["en_math"] == 0
