"""`cpt guard audit` agrees with an honest log and finds every decision that was edited."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from cpt.cli import main
from cpt.config import GuardSection
from cpt.guard.audit import FORGOTTEN_BY_WARN, OLD_COUNTS, audit
from cpt.guard.baseline import BASELINE_FILE, DomainBaseline
from cpt.guard.decision import decide
from cpt.guard.guard import decision_event, judged, restarted
from cpt.guard.ladder import GuardState, evidence_at
from cpt.guard.lever_limits import LeverLimits, SourceLimits
from cpt.guard.score import DomainScore
from cpt.guard.text_judge import TextJudge
from cpt.guard.yardstick import Judge, Kind, Look
from tests.support.records import read_jsonl, write_jsonl

SETTINGS = GuardSection(interval_steps=10, tolerance_percent=1.0)
LIMITS = LeverLimits(
    shares={"english": (0.1, 0.5)},
    room=0.4,
    served_by={"english": ("en_web",)},
    sources={"en_web": SourceLimits(share=0.1, least=0.1, largest=0.5)},
    main_share=0.9,
)
OLD_STATE = {
    "shares",
    "lr_scale",
    "over",
    "hard",
    "idle",
    "green",
    "green_step",
    "paused",
    "rollbacks",
}
"""Fields of the guard's state before 0.2."""
NUM_DOCUMENTS = 100
FRESH_PER_LOOK = 100
LOSSES_PERCENT = (0.0, 4.0, 4.0)
"""Loss at each of the measurements."""
FRESH = np.random.default_rng(2).uniform(500, 900, FRESH_PER_LOOK * len(LOSSES_PERCENT))
"""Nats of the untouched model on the documents that one measurement each scores."""


@pytest.fixture(params=["two_way", "ladder"])
def run_dir(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run directory as a guard of three measurements leaves it."""
    return make_run(tmp_path, request.param)


def make_run(
    tmp_path: Path,
    controller: Literal["two_way", "ladder"],
    hard_limit_percent: float = 5.0,
    policies: Sequence[Literal["act", "warn"]] = ("act", "act", "act"),
) -> Path:
    settings = replace(SETTINGS, controller=controller, hard_limit_percent=hard_limit_percent)
    folder = tmp_path / "guard"
    folder.mkdir()
    generator = np.random.default_rng(1)
    before = DomainScore(
        name="english",
        language="en",
        nats=generator.uniform(500, 900, NUM_DOCUMENTS),
        bytes=np.full(NUM_DOCUMENTS, 1000.0),
    )
    baseline = DomainBaseline(
        panel=before, clusters=np.arange(NUM_DOCUMENTS), fresh=FRESH, fresh_per_look=FRESH_PER_LOOK
    )
    (folder / BASELINE_FILE).write_text(json.dumps({"english": baseline.to_json()}))
    judges: dict[Kind, Judge] = {"text": TextJudge({"english": baseline})}
    events: list[dict[str, Any]] = []
    state = GuardState()
    for number, (loss, policy) in enumerate(zip(LOSSES_PERCENT, policies, strict=True), 1):
        settings = replace(settings, policy=policy)
        nats = before.nats * (1 + (loss + generator.normal(0, 1, NUM_DOCUMENTS)) / 100)
        fresh = baseline.fresh_at(number)
        fresh = fresh * (1 + (loss + generator.normal(0, 1, FRESH_PER_LOOK)) / 100)
        counts = {"number": number, "num_looks": 4, "num_domains": 1}
        look = Look(step=10 * number, last=False, settings=settings, **counts)
        scores: dict[Kind, Any] = {
            "text": {"nats": {"english": nats.tolist()}, "fresh": {"english": fresh.tolist()}}
        }
        seen, _ = judged(judges, scores, state, look)
        evidence = evidence_at(look.step, ["english"], seen.readings, LIMITS)
        decided, decision = decide(seen, evidence, settings, LIMITS)
        next_state = restarted(judges, decided, decision)
        event = decision_event(look, decision, evidence, state, next_state, LIMITS)
        name = f"scores-{look.step:08d}.json"
        (folder / name).write_text(json.dumps({"look": counts, "yardsticks": scores}))
        events.append({**event, "scores": name})
        state = next_state
    write_jsonl(tmp_path / "metrics.jsonl", events)
    return tmp_path


def edit(run_dir: Path, number: int, **changes: Any) -> None:
    """Change fields of one decision in the log."""
    events = read_jsonl(run_dir / "metrics.jsonl")
    events[number] |= changes
    write_jsonl(run_dir / "metrics.jsonl", events)


def run_audit(run_dir: Path) -> int:
    return main(["guard", "audit", "--run_dir", str(run_dir)])


def test_honest_log_agrees_with_scores_states_and_decisions(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_audit(run_dir) == 0
    printed = capsys.readouterr().out
    assert "3 decisions, all follow from their evidence" in printed
    audited = audit(run_dir)
    assert [one.action for one in audited] == ["none", "raise_replay", "raise_replay"]
    assert all(one.bounds_checked for one in audited)


def test_warning_guard_of_an_older_version_kept_what_its_law_remembered(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "two_way", policies=("act", "act", "warn"))
    assert not any(one.problems for one in audit(run_dir))
    event = read_jsonl(run_dir / "metrics.jsonl")[2]
    kept = {name: event["before"][name] for name in FORGOTTEN_BY_WARN}
    assert kept["smoothed"] and not event["after"]["smoothed"]
    edit(run_dir, 2, after={**event["after"], **kept})
    assert not any(one.problems for one in audit(run_dir))
    edit(run_dir, 2, after={**event["after"], **kept, "smoothed": {"english": 9.0}})
    assert audit(run_dir)[2].problems


def test_action_that_does_not_follow_is_named_with_its_step(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run_dir, 1, action="warn", actions={"english": "warn"})
    assert run_audit(run_dir) == 70
    told = capsys.readouterr().err
    assert "DOES NOT AGREE" in told and "1 disagreements:" in told
    assert "step 20: the action was {'english': 'warn'}" in told


def test_state_that_no_decision_left_is_found(run_dir: Path) -> None:
    invented = {**GuardState().to_json(), "lr_scale": 0.5}
    edit(run_dir, 2, before=invented)
    assert "does not follow any earlier decision" in " ".join(audit(run_dir)[2].problems)


def test_bound_that_does_not_follow_from_its_scores_is_found(run_dir: Path) -> None:
    file = run_dir / "guard" / "scores-00000020.json"
    scores = json.loads(file.read_text())
    scores["yardsticks"]["text"]["nats"]["english"][0] *= 2
    scores["yardsticks"]["text"]["fresh"]["english"] = FRESH[:FRESH_PER_LOOK].tolist()
    file.write_text(json.dumps(scores))
    problems = " ".join(audit(run_dir)[1].problems)
    assert "the lower_bound of english was" in problems
    assert "the delta of english was" in problems


def test_bounds_are_taken_from_the_log_where_the_scores_are_gone(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "guard" / "scores-00000010.json").unlink()
    assert run_audit(run_dir) == 0
    assert "the scores of 1 are gone" in capsys.readouterr().out


def test_sequential_state_that_was_edited_is_found(run_dir: Path) -> None:
    events = read_jsonl(run_dir / "metrics.jsonl")
    state = events[1]["after"]
    # the lever that was pulled began the bets anew, on documents that are left
    assert state["yardsticks"]["text"] == {"english": {"used": 2}}
    edit(run_dir, 1, after={**state, "yardsticks": {"text": {"english": {"0.5": [9.0] * 6}}}})
    assert "yardsticks became" in " ".join(audit(run_dir)[1].problems)


def test_log_that_does_not_note_used_documents_agrees(run_dir: Path) -> None:
    events = read_jsonl(run_dir / "metrics.jsonl")
    for event in events:
        for state in (event["before"], event["after"]):
            text = state["yardsticks"].get("text", {})
            for name in list(text):
                del text[name]["used"]
                if not text[name]:
                    del text[name]
    write_jsonl(run_dir / "metrics.jsonl", events)
    assert [one.problems for one in audit(run_dir)] == [[], [], []]


def test_decisions_before_the_three_states_are_made_again_from_their_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their bounds were of another test, so they are taken from the log."""
    run_dir = make_run(tmp_path, "ladder")
    events = read_jsonl(run_dir / "metrics.jsonl")
    kept = ("domain", "lower_bound", "share", "largest_share")
    for event in events:
        old = []
        for one in event["evidence"]:
            limits = {"tolerance_percent": 1.0, "hard_limit_percent": 5.0}
            old.append({**{name: one[name] for name in kept}, **limits})
        event["evidence"] = old
        for state in (event["before"], event["after"]):
            for name in state.keys() - OLD_STATE:
                del state[name]
            state["hard"] = max(state["hard"].values(), default=0)
        del event["limits"], event["settings"]["controller"]
        event["before"]["green"] = event["before"]["over"] == {}
        event["after"]["green"] = event["after"]["over"] == {}
        file = run_dir / "guard" / event["scores"]
        scores = json.loads(file.read_text())
        file.write_text(json.dumps({"num_tests": 4, **scores["yardsticks"]["text"]}))
    write_jsonl(run_dir / "metrics.jsonl", events)
    assert [one.problems for one in audit(run_dir)] == [[], [], []]
    assert run_audit(run_dir) == 0
    assert "the scores of 3 are gone" in capsys.readouterr().out


@pytest.mark.parametrize("controller", ["two_way", "ladder"])
def test_log_that_counts_the_hard_limit_for_all_domains_together_agrees(
    tmp_path: Path, controller: Literal["two_way", "ladder"]
) -> None:
    run_dir = make_run(tmp_path, controller, hard_limit_percent=1.0)
    events = read_jsonl(run_dir / "metrics.jsonl")
    for event in events:
        for state in (event["before"], event["after"]):
            state["hard"] = max(state["hard"].values(), default=0)
    assert [event["after"]["hard"] for event in events] == [0, 1, 2]
    write_jsonl(run_dir / "metrics.jsonl", events)
    assert [one.problems for one in audit(run_dir)] == [[], [], []]
    edit(run_dir, 2, after={**events[2]["after"], "hard": 5})
    (problem,) = audit(run_dir)[2].problems
    assert problem.startswith("hard became") and problem.endswith(OLD_COUNTS)


def test_directory_without_decisions_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_audit(tmp_path) == 78
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert run_audit(tmp_path) == 78
    assert "holds no decision" in capsys.readouterr().err
