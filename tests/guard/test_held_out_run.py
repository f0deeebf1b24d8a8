"""A whole guard over a real build, and a model that loses what it is told to."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from cpt.cli import main
from cpt.config import GuardSection
from cpt.errors import ConfigError
from cpt.guard import held_out_text
from cpt.guard.drawing import fresh_per_look
from cpt.guard.guard import Guard
from cpt.guard.held_out_text import HeldOutText
from cpt.guard.ladder import GuardState
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.yardstick import Judgement, Look, Reading
from cpt.telemetry.metrics import Telemetry
from cpt.training.loader import MicroBatch
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import IGNORED_LABEL, BuiltData
from tests.support.records import read_jsonl

STEPS = 6
SETTINGS = GuardSection(
    interval_steps=1, tolerance_percent=5.0, hard_limit_percent=10.0, max_documents=40
)


@pytest.fixture(scope="module")
def topology() -> Iterator[Any]:
    """One rank that knows as much as scoring asks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layout = {"dp_size": 1, "dp_rank": 0, "sp_size": 1, "sp_rank": 0, "rank": 0, "world_size": 1}
    place = SimpleNamespace(enter=lambda *_: None)
    yield SimpleNamespace(
        **layout, control_group=dist.group.WORLD, device=torch.device("cpu"), place=place
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> BuiltData:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(900):
        text = f"Document {number} says that {number * 7919} is {number} times 7919, no more."
        lines.append(json.dumps({"text": text}) + "\n")
    (folder / "web.jsonl").write_text("".join(lines))
    source = {"name": "web", "language": "en", "domain": "web", "path": "web.jsonl", "weight": 1.0}
    mix = {"seq_len": 64, "seed": 1, "near_duplicates": 0, "decontaminate_tokens": 0}
    mix |= {"sources": [{**source, "held_out_share": 0.8}]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    build(load_mix(folder / "mix.yaml"), folder / "built", progress=False)
    return BuiltData.open(folder / "built")


class Model:
    """Gives every label about one nat, and more the more it has lost."""

    def __init__(self) -> None:
        self.loss_percent = 0.0

    def score(self, batch: MicroBatch) -> torch.Tensor:
        labels = batch.labels
        noise = 0.04 * torch.sin(labels.double() * (1 + self.loss_percent))
        nats = (1 + noise) * (1 + self.loss_percent / 100)
        return torch.where(labels == IGNORED_LABEL, 0.0, nats)


class Run:
    """A run of a guard, as the loop of training would call it."""

    def __init__(
        self, data: BuiltData, topology: Any, run_dir: Path, *, observe: bool = False
    ) -> None:
        self.config: Any = SimpleNamespace(
            guard=SETTINGS,
            model=SimpleNamespace(path=None, init="tiny"),
            train=SimpleNamespace(total_steps=STEPS, seed=1),
            micro_batch_size=3,
        )
        self.model = Model()
        self.run_dir = run_dir
        yardstick = HeldOutText(data, self.config, topology, run_dir, observe=observe)
        self.guard = Guard([yardstick], self.config, topology, run_dir)
        self.telemetry = Telemetry(run_dir / "metrics.jsonl")

    def look(self, step: int, loss_percent: float) -> str:
        """Measure after a step at which the model has lost so much; return the state."""
        self.model.loss_percent = loss_percent
        limits = LeverLimits(room=0.0)
        model: Any = self.model
        decision = self.guard.measure(step, model, self.telemetry, replay=lambda: limits)
        assert decision is not None
        (event,) = self.guard.latest["text"]
        return str(event["state"])


@pytest.fixture
def run(data: BuiltData, topology: Any, tmp_path: Path) -> Run:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    return Run(data, topology, run_dir)


def test_states_follow_the_loss_and_every_decision_can_be_made_again(run: Run) -> None:
    losses = (0.0, 0.0, 1.0, 8.0, 8.0)
    states = [run.look(step, loss) for step, loss in enumerate(losses)]
    assert states[:3] == ["green"] * 3
    assert states[-1] == "red" and not run.guard.state.green
    assert main(["guard", "audit", "--run_dir", str(run.run_dir)]) == 0
    decisions = [one for one in read_jsonl(run.run_dir / "metrics.jsonl") if "evidence" in one]
    assert [one["evidence"][0]["state"] for one in decisions] == states[1:]


def test_each_look_scores_the_panel_and_documents_of_its_own(run: Run) -> None:
    for step in range(3):
        run.look(step, 0.0)
    baseline = json.loads((run.run_dir / "guard" / "baseline.json").read_text())["web"]
    per_look = fresh_per_look(SETTINGS, "web", 10**6, 1 + STEPS, 1)
    assert baseline["fresh_per_look"] <= per_look
    assert len(baseline["nats"]) == 40
    assert len(baseline["fresh"]) == baseline["fresh_per_look"] * (1 + STEPS) > 0
    scores = json.loads((run.run_dir / "guard" / "scores-00000002.json").read_text())
    second = baseline["fresh"][baseline["fresh_per_look"] :][: baseline["fresh_per_look"]]
    assert scores["yardsticks"]["text"]["fresh"]["web"] == pytest.approx(second)
    assert scores["yardsticks"]["text"]["nats"]["web"] == pytest.approx(baseline["nats"])


def test_run_that_is_resumed_goes_on_with_the_evidence_it_had(
    data: BuiltData, topology: Any, tmp_path: Path
) -> None:
    losses = (0.0, 3.0, 3.0, 3.5, 4.0)
    after = {}
    for name, stops in (("whole", False), ("stopped", True)):
        run_dir = tmp_path / name
        run_dir.mkdir()
        run = Run(data, topology, run_dir)
        for step, loss in enumerate(losses):
            run.look(step, loss)
            if stops:
                saved = json.loads(json.dumps(run.guard.state.to_json()))
                run = Run(data, topology, run_dir)
                run.guard.state = GuardState.from_json(saved)
        after[name] = run.guard.state.to_json()
    assert after["stopped"] == after["whole"]
    assert after["whole"]["yardsticks"]["text"]["web"]


def test_loss_against_the_best_look_so_far_is_amber_and_never_red(run: Run) -> None:
    """The text gets 6 % easier, then all of that is forgotten: no loss against the baseline."""
    assert [run.look(step, loss) for step, loss in enumerate((0.0, -6.0, -6.0))] == ["green"] * 3
    assert run.look(3, -0.5) == "amber"
    (event,) = run.guard.latest["text"]
    assert event["best_step"] in (1, 2)
    # 5.9 %, and the noise of words that all documents have in common
    assert 3 < event["delta_from_best_percent"] < 9
    assert event["delta_percent"] < 3 and event["lower_bound"] < 2.5


def test_run_that_goes_back_compares_with_the_best_look_before_that_step(run: Run) -> None:
    for step, loss in enumerate((0.0, -2.0, -2.0, -8.0)):
        run.look(step, loss)
    run.look(2, -2.0)
    (event,) = run.guard.latest["text"]
    assert event["best_step"] == 1


def test_measurement_apart_leaves_the_best_look_and_the_baseline_alone(
    data: BuiltData, topology: Any, run: Run
) -> None:
    run.look(0, 0.0)
    run.look(1, -1.0)
    best = (run.run_dir / "guard" / "best.json").read_bytes()
    apart = Run(data, topology, run.run_dir, observe=True)
    apart.model.loss_percent = -9.0
    model: Any = apart.model
    apart.guard.measure_apart(2, model)
    assert (run.run_dir / "guard" / "best.json").read_bytes() == best
    other = run.run_dir / "other"
    other.mkdir()
    before = Run(data, topology, other, observe=True)
    model = before.model
    before.guard.measure_apart(0, model)
    assert not (other / "guard").joinpath("baseline.json").exists()


@pytest.mark.parametrize(("loss", "is_green"), [(0.0, True), (8.0, False)])
def test_start_that_has_lost_too_much_since_the_release_is_not_green(
    run: Run, monkeypatch: pytest.MonkeyPatch, loss: float, is_green: bool
) -> None:
    monkeypatch.setattr(held_out_text, "untouched_weights", lambda *_: "release")
    run.config.guard = replace(SETTINGS, baseline_model=Path("release"))
    model: Any = run.model
    assert run.guard.keep_untouched(model, None)
    run.look(0, loss)
    state = run.guard.state
    assert state == GuardState(green=is_green, readings=state.readings)
    assert state.readings["web"]["step"] == 0
    assert (state.readings["web"]["state"] == "green") == is_green
    run.look(1, 0.0)
    assert run.guard.state.green
    assert main(["guard", "audit", "--run_dir", str(run.run_dir)]) == 0


class Replies:
    """A yardstick of one domain that has lost its form, and is measured less often than text."""

    kind = "generation"
    domain_names = ("chat",)

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def is_due(self, look: Look) -> bool:
        return look.step == 0 or (self.interval > 0 and look.step % self.interval == 0)

    def keep_untouched(self, *_: Any) -> bool:
        return True

    def measure(self, *_: Any) -> dict[str, Any]:
        return {}

    def judge(self, scores: Any, state: Any, look: Look) -> Judgement:
        limits = {"tolerance": 2.0, "hard_limit": 10.0}
        reading = Reading(
            domain="chat", kind="generation", step=look.step, state="red", lower_bound=4.0, **limits
        )
        return Judgement(readings=[reading], state={}, events=[{"domain": "chat"}])


@pytest.mark.parametrize(("interval", "is_green"), [(2, False), (0, True)])
def test_what_was_lost_at_the_start_is_not_forgotten_before_it_is_measured_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, interval: int, is_green: bool
) -> None:
    """Replies that no look on the way measures bar no checkpoint."""
    monkeypatch.setattr(held_out_text, "untouched_weights", lambda *_: "release")
    run.config.guard = replace(SETTINGS, baseline_model=Path("release"))
    replies: Any = Replies(interval)
    run.guard._yardsticks = [*run.guard._yardsticks, replies]
    run.guard.domain_names.append("chat")
    model: Any = run.model
    assert run.guard.keep_untouched(model, None)
    run.look(0, 0.0)
    assert not run.guard.state.green
    assert run.look(1, 0.0) == "green"
    assert run.guard.state.green == is_green


def test_start_that_is_compared_with_itself_is_green(run: Run) -> None:
    run.look(0, 8.0)
    assert run.guard.state == GuardState()


def test_return_to_a_checkpoint_keeps_its_bets_and_not_its_documents(run: Run) -> None:
    for step, loss in enumerate((0.0, 1.0, 1.0)):
        run.look(step, loss)
    saved = run.guard.state
    bets = dict(saved.yardsticks["text"]["web"])
    assert bets["used"] == 2 and len(bets) > 1
    for step in (3, 4):
        run.look(step, 1.0)
    run.guard.return_to(2, run.guard.state, saved)
    state = run.guard.state
    assert state.yardsticks["text"]["web"] == {**bets, "used": 4}
    event = {"event": "guard_rollback", "step": 2, "after": state.to_json()}
    run.telemetry.log(event)
    run.look(3, 1.0)  # by the panel alone: its fresh documents were bet on before the return
    assert run.guard.state.yardsticks["text"]["web"] == {**bets, "used": 4}
    run.look(5, 1.0)
    after = run.guard.state.yardsticks["text"]["web"]
    assert after["used"] == 5 and after != {**bets, "used": 5}
    assert main(["guard", "audit", "--run_dir", str(run.run_dir)]) == 0


def test_documents_that_were_bet_on_are_not_bet_on_again(run: Run) -> None:
    """A larger interval on resumption repeats the numbers of looks."""
    run.look(0, 0.0)
    for step in (1, 2, 3):
        run.look(step, 1.0)
    bets = run.guard.state.yardsticks["text"]["web"]
    assert bets["used"] == 3
    run.config.guard = replace(SETTINGS, interval_steps=2)
    run.look(4, 1.0)  # number 2 again
    assert run.guard.state.yardsticks["text"]["web"] == bets
    assert run.look(6, 9.0) == "red"  # the panel alone proves it
    assert run.guard.state.yardsticks["text"]["web"]["used"] == 3
    assert main(["guard", "audit", "--run_dir", str(run.run_dir)]) == 0


def test_other_documents_under_the_same_baseline_are_refused(
    data: BuiltData, topology: Any, run: Run
) -> None:
    run.look(0, 0.0)
    file = run.run_dir / "guard" / "baseline.json"
    content = json.loads(file.read_text())
    content["web"]["fresh_content_hash"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="other held-out text of web"):
        Run(data, topology, run.run_dir).look(1, 0.0)


def test_domain_that_is_added_before_the_first_step_is_measured(
    data: BuiltData, topology: Any, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.look(0, 0.0)
    file = run.run_dir / "guard" / "baseline.json"
    stored = json.loads(file.read_text())
    late = copy.copy(data.held_out[0])
    late.name = "late"
    more: Any = SimpleNamespace(held_out=(data.held_out[0], late))
    again = Run(more, topology, run.run_dir)
    model: Any = again.model
    limits = LeverLimits(room=0.0)
    again.guard.measure(0, model, again.telemetry, replay=lambda: limits)
    measured = json.loads(file.read_text())
    assert measured["web"] == stored["web"] and measured["late"]["nats"]
    assert [event["domain"] for event in again.guard.latest["text"]] == ["web", "late"]
    assert not caplog.text
    file.write_text(json.dumps(stored))
    # later the untouched model is gone
    two = Run(data, topology, run.run_dir)
    text: Any = two.guard._yardsticks[0]
    text.domain_names = ["web", "late"]
    assert two.look(1, 0.0) == "green"
    assert "held-out domains late are left out" in caplog.text


def test_missing_baseline_is_refused_before_a_step_is_trained(
    data: BuiltData, topology: Any, run: Run
) -> None:
    run.look(0, 0.0)
    run.guard.open_untouched(1)
    file = run.run_dir / "guard" / "baseline.json"
    Run(data, topology, run.run_dir).guard.open_untouched(1)
    file.unlink()
    resumed = Run(data, topology, run.run_dir)
    with pytest.raises(ConfigError, match="at step 1 the untouched model is gone"):
        resumed.guard.open_untouched(1)
    resumed.guard.open_untouched(0)


def test_stop_while_the_baseline_is_measured_keeps_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out_text, "agreed_reason", lambda *_: "SIGTERM")
    stop: Any = object()
    model: Any = run.model
    look = run.guard.look_at(0, last=False)
    assert run.guard._yardsticks[0].measure(look, model, stop) is None
    assert not (run.run_dir / "guard" / "baseline.json").exists()


def test_start_owes_the_untouched_model_and_the_look_in_which_the_run_was_stopped(
    data: BuiltData, topology: Any, run: Run
) -> None:
    run.config.guard = replace(SETTINGS, interval_steps=2)
    assert run.guard.is_owed(0) and not run.guard.is_owed(1)
    run.look(0, 0.0)
    assert run.guard.is_owed(2)
    run.look(2, 0.0)
    resumed = Run(data, topology, run.run_dir)
    resumed.config.guard = run.config.guard
    resumed.guard.state = GuardState.from_json(json.loads(json.dumps(run.guard.state.to_json())))
    assert not resumed.guard.is_owed(2) and resumed.guard.is_owed(4)
