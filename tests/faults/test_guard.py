"""The guard acts on a run that forgets: more replay, a lower rate, a pause, and back to where all
was well.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import list_steps, step_folder
from cpt.cli import main
from tests.support.service import SAMPLE, Service, make_workplace, run_to_end

pytestmark = pytest.mark.dist

ENGLISH_STEPS = 40
"""Steps on English alone, from which the guarded run starts."""
TOLERANCE_PERCENT = 12.0
PIECE_CHARACTERS = 250
"""Characters of an English document: enough documents to prove a loss of the tolerance."""


def write_english_pieces(path: Path) -> None:
    """Write the English sample in many short documents."""
    lines = []
    for line in (SAMPLE / "en_web.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        for start in range(0, len(text), PIECE_CHARACTERS):
            lines.append(json.dumps({"text": text[start : start + PIECE_CHARACTERS]}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the English sample, and a run that goes on with Japanese."""
    folder = make_workplace(tmp_path_factory.mktemp("guard"))
    mix = yaml.safe_load((folder / "mix.yaml").read_text())
    run = yaml.safe_load((folder / "run.yaml").read_text())
    write_english_pieces(folder / "en_web.jsonl")
    for source in mix["sources"]:
        if source["name"] == "en_web":
            source["path"] = "en_web.jsonl"
        source["held_out_share"] = 0.3
        source["weight"] = {"ja_essay": 0.0, "en_web": 1.0}[source["name"]]
    mix["guard"] = {"domains": [{"name": "en_web", "language": "en", "sources": ["en_web"]}]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    run["train"] |= {
        "global_batch_size": 4,
        "total_steps": ENGLISH_STEPS,
        "lr": 5e-3,
        "dtype": "fp32",
    }
    run["checkpoint"] = {"async_save": False}
    run["telemetry"] = {"export_at_end": True}
    del run["data"]["build_dir"]
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    code, english = run_to_end(folder, "english", ranks=1)
    assert code == 0, english.output
    (export,) = (english.run_dir / "export").glob("step-*")
    for source in mix["sources"]:
        source["weight"] = {"ja_essay": 0.99, "en_web": 0.01}[source["name"]]
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    run["model"] = {"path": str(export)}
    run["train"] |= {"total_steps": 80, "lr": 5e-3, "warmup_steps": 20}
    run["checkpoint"] |= {"interval_steps": 4}
    run["guard"] = {
        "controller": "ladder",
        "interval_steps": 2,
        "max_documents": 70,
        "tolerance_percent": TOLERANCE_PERCENT,
        "hard_limit_percent": 13.0,
        "max_replay_share": 0.1,
        "patience": 1,
        "pause_after": 2,
    }
    run["telemetry"] = {}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="module")
def paused(workplace: Path) -> Service:
    code, run = run_to_end(workplace, "guarded")
    assert code == 75 and "paused by the guard after step" in run.output, run.output
    return run


@pytest.mark.case(
    "M2", "replay raised, rate lowered, paused with 75; every decision can be made again"
)
def test_run_that_forgets_is_steered_and_then_paused(workplace: Path, paused: Service) -> None:
    decisions = paused.events("guard_decision")
    assert decisions[-1]["action"] == "pause" and decisions[-1]["after"]["paused"] in paused.output
    newest = step_folder(paused.run_dir, list_steps(paused.run_dir)[0])
    ledger = read_manifest(newest).state["ledger"]["segments"]
    raised = next(decision for decision in decisions if decision["after"]["shares"])
    assert [segment["start_step"] for segment in ledger][:2] == [0, raised["step"]]
    assert ledger[1]["weights"]["en_web"] == pytest.approx(raised["after"]["shares"]["en_web"])
    lowered = next(decision for decision in decisions if decision["after"]["lr_scale"] < 1)
    rates = {event["step"]: event["lr"] for event in paused.steps()}
    # The rate is halved, while the warm-up still raises it.
    assert rates[lowered["step"] + 1] < 0.7 * rates[lowered["step"]]
    assert main(["guard", "audit", "--run_dir", str(paused.run_dir)]) == 0


def test_decision_that_was_tampered_with_is_found(paused: Service, tmp_path: Path) -> None:
    lines = (paused.run_dir / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    for event in events:
        if event["event"] == "guard_decision":
            event["evidence"][0]["lower_bound"] += 0.5
            break
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "guard").symlink_to(paused.run_dir / "guard")
    assert main(["guard", "audit", "--run_dir", str(tmp_path)]) == 70


@pytest.mark.case(
    "M2",
    "started again: back at the last green checkpoint with more replay; "
    "the next pause ends with 78",
)
def test_paused_run_goes_back_to_where_all_was_well(workplace: Path, paused: Service) -> None:
    decisions = paused.events("guard_decision")
    green = decisions[-1]["before"]["green_step"]
    last, before = decisions[-1]["step"], decisions[-1]["after"]
    assert green is not None and green < last
    # the tolerance of the second start is one that no English text can break: it would only pause
    # again
    wide = ("--set", "guard.tolerance_percent=900", "--set", "guard.hard_limit_percent=900")
    more = ("--set", "guard.max_replay_share=0.4", "--set", f"train.stop_at_step={green + 2}")
    code, run = run_to_end(workplace, "guarded", *wide, *more)
    assert code == 0, run.output
    (rollback,) = run.events("guard_rollback")
    assert (rollback["step"], rollback["from_step"]) == (green, last)
    assert rollback["after"]["shares"]["en_web"] > before["shares"]["en_web"]
    state = read_manifest(step_folder(run.run_dir, green + 2)).state
    assert state["guard"]["rollbacks"] == 1 and state["guard"]["lr_scale"] == before["lr_scale"]
    assert state["ledger"]["segments"][-1]["start_step"] == green
    assert state["progress"]["step"] == green + 2 and list_steps(run.run_dir)[0] == green + 2
    assert main(["guard", "audit", "--run_dir", str(run.run_dir)]) == 0


@pytest.mark.case(
    "N3", "guard and mix go back with the weights: what the lost steps decided is decided anew"
)
def test_rollback_takes_back_what_the_guard_did_since_the_checkpoint(
    workplace: Path, paused: Service
) -> None:
    raised = next(
        decision for decision in paused.events("guard_decision") if decision["after"]["shares"]
    )["step"]
    saved = ("--set", f"checkpoint.interval_steps={raised - 2}")
    fault = ",".join(f"forward:1:{step}:nan" for step in (raised + 1, raised + 2, raised + 3))
    code, run = run_to_end(
        workplace, "lost", *saved, "--set", f"train.stop_at_step={raised + 4}", fault=fault
    )
    assert code == 0, run.output
    (rollback,) = run.events("rollback")
    assert (rollback["from_step"], rollback["to_step"]) == (raised + 3, raised - 2)
    first, second = (
        decision for decision in run.events("guard_decision") if decision["step"] == raised
    )
    assert [first[key] for key in ("before", "evidence", "after")] == [
        second[key] for key in ("before", "evidence", "after")
    ]
    segments = read_manifest(step_folder(run.run_dir, raised + 4)).state["ledger"]["segments"]
    assert [segment["start_step"] for segment in segments][:2] == [
        0,
        raised + 3,
    ]  # the first batch not given up
    code, run = run_to_end(workplace, "lost", *saved, "--set", f"train.stop_at_step={raised + 5}")
    assert code == 0, run.output
    assert main(["guard", "audit", "--run_dir", str(run.run_dir)]) == 0
