"""In a real run replay falls when English gains, the routers freeze when they drift, and a resumed
run goes on from the same state of the guard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import read_weights, step_folder
from cpt.cli import main
from tests.support.service import SAMPLE, Service, make_workplace, run_to_end

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PIECE_CHARACTERS = 240
STEPS = 6
HALF = 3
ENGLISH_SHARE = 0.4
LEAST_REPLAY = 0.5


def write_pieces(path: Path) -> None:
    """Write the English sample in many short documents, which are scored in no time."""
    lines = []
    for line in (SAMPLE / "en_web.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = {"text": text[start : start + PIECE_CHARACTERS]}
            lines.append(json.dumps(piece) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that learns English and Japanese, so that English only gains."""
    folder = make_workplace(tmp_path_factory.mktemp("two_way"))
    mix = yaml.safe_load((folder / "mix.yaml").read_text())
    write_pieces(folder / "en_web.jsonl")
    for source in mix["sources"]:
        if source["name"] == "en_web":
            source["path"] = "en_web.jsonl"
            source["held_out_share"] = 0.2
    mix["guard"] = {"domains": [{"name": "english", "language": "en", "sources": ["en_web"]}]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    run = yaml.safe_load((folder / "run.yaml").read_text())
    del run["data"]["build_dir"]
    run["train"] |= {
        "global_batch_size": 2,
        "total_steps": STEPS,
        "warmup_steps": 0,
        "lr": 5e-3,
        "dtype": "fp32",
    }
    run["checkpoint"] = {"interval_steps": HALF, "async_save": False}
    run["telemetry"] = {"router_interval_steps": 1}
    run["guard"] = {
        "interval_steps": 1,
        "max_documents": 24,
        # so few documents show no less; English gains anyway
        "tolerance_percent": 40.0,
        "hard_limit_percent": 50.0,
        "least_replay": LEAST_REPLAY,
        "router_lever": "freeze",
        "least_router_overlap": 1.0,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Service:
    code, first = run_to_end(workplace, "run", "--set", f"train.stop_at_step={HALF}", ranks=2)
    assert code == 0, first.output
    code, run = run_to_end(workplace, "run", ranks=2)
    assert code == 0, run.output
    return run


def state_at(run: Service, step: int) -> dict[str, Any]:
    return read_manifest(step_folder(run.run_dir, step)).state


def weights_at(run: Service, step: int) -> dict[str, torch.Tensor]:
    folder = step_folder(run.run_dir, step)
    manifest = read_manifest(folder)
    return read_weights(folder, list(manifest.tensors), manifest)


def test_replay_falls_when_english_gains_as_new_segments_of_the_ledger(finished: Service) -> None:
    decisions = finished.events("guard_decision")
    lowered = [one for one in decisions if one["actions"]["english"] == "lower_replay"]
    assert lowered and {one["action"] for one in lowered} <= {"lower_replay", "freeze_routers"}
    shares = [one["after"]["replay"]["en_web"] for one in lowered]
    assert shares == sorted(shares, reverse=True)
    assert LEAST_REPLAY * ENGLISH_SHARE <= shares[-1] < ENGLISH_SHARE
    segments = state_at(finished, STEPS)["ledger"]["segments"]
    assert [one["weights"]["en_web"] for one in segments] == [ENGLISH_SHARE, *shares]
    assert [one["start_step"] for one in segments[1:]] == [one["step"] for one in lowered]
    for one in segments:
        assert sum(one["weights"].values()) == pytest.approx(1)


def test_resumed_run_goes_on_from_the_saved_state(finished: Service) -> None:
    decisions = finished.events("guard_decision")
    by_step = {one["step"]: one for one in decisions}
    assert list(by_step) == list(range(1, STEPS + 1))
    saved = state_at(finished, HALF)["guard"]
    for name in ("asked", "replay", "smoothed", "headings", "routers_frozen"):
        assert by_step[HALF + 1]["before"][name] == saved[name]


def test_drifted_routers_are_frozen_bit_for_bit_from_the_next_step_on(finished: Service) -> None:
    decisions = finished.events("guard_decision")
    (frozen,) = [one for one in decisions if "(routers)" in one["actions"]]
    assert frozen["limits"]["router_overlap"] < 1 and frozen["step"] < HALF
    half = weights_at(finished, HALF)
    end = weights_at(finished, STEPS)
    for name, tensor in half.items():
        is_router = ".mlp.router." in name
        assert torch.equal(tensor, end[name]) == is_router, name


def test_every_decision_can_be_made_again(
    finished: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["guard", "audit", "--run_dir", str(finished.run_dir)]) == 0
    lines = (finished.run_dir / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    for event in events:
        if event["event"] == "guard_decision" and event["after"]["replay"]:
            event["limits"]["sources"]["en_web"]["least"] = ENGLISH_SHARE
            break
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "guard").symlink_to(finished.run_dir / "guard")
    capsys.readouterr()
    assert main(["guard", "audit", "--run_dir", str(tmp_path)]) == 70
    assert "asked became" in capsys.readouterr().err
