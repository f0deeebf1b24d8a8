"""The yardstick over a model that replies as it is told: baseline, looks, resumption, audit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from cpt.config import GuardSection
from cpt.errors import ConfigError
from cpt.guard.generation import yardstick
from cpt.guard.generation.judge import GenerationJudge
from cpt.guard.generation.yardstick import Generation
from cpt.guard.yardstick import Judgement, Look
from cpt.resilience.phase import PhaseClock
from cpt.training.generate import GenerationStopped
from data_pipeline.config.generation_config import GenerationDomain
from data_pipeline.config.mix_config import GuardConfig, MixConfig
from data_pipeline.text.harmony import CHANNEL, END, MESSAGE, RETURN, START
from data_pipeline.text.tokenizer import encode, encoding

INTERVAL = 10
TOTAL_STEPS = 60
PROMPTS_PER_LOOK = 60


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def text(words: str) -> list[int]:
    return encode(words).tolist()


def reply_of(answer: str, thinks: bool = True) -> list[int]:
    final = [CHANNEL, *text("final"), MESSAGE, *text(answer), RETURN]
    if not thinks:
        return final
    thought = [CHANNEL, *text("analysis"), MESSAGE, *text("One more."), END]
    return [*thought, START, *text("assistant"), *final]


class FakeModel:
    """Answers `What is N plus 1?`, as well as it is told to."""

    def __init__(self) -> None:
        self.num_wrong = 0
        """Of every 100 replies, how many are wrong."""
        self.num_thoughtless = 0
        """Of every 100 replies, how many do not think."""
        self.asked: list[str] = []
        self.stops_after: int | None = None
        """Calls after which a stop is requested."""

    def generate(
        self, engine: Any, prompts: Sequence[Sequence[int]], sampling: Any, **others: Any
    ) -> list[list[int]]:
        if self.stops_after == 0:
            raise GenerationStopped
        if self.stops_after is not None:
            self.stops_after -= 1
        replies = []
        for place, prompt in enumerate(prompts):
            question = encoding().decode(list(prompt)).rsplit("What is ", 1)[1]
            self.asked.append(question)
            answer = int(question.split(" ")[0]) + 1
            wrong = place % 100 < self.num_wrong
            thinks = place % 100 >= self.num_thoughtless
            replies.append(reply_of(f"It is {answer + wrong}.", thinks))
        return replies


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(yardstick, "generate", fake.generate)
    # a place in a call is one in the domain
    monkeypatch.setattr(yardstick, "PART_OF_A_RANK", 1000)
    return fake


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    write_prompts(tmp_path, "maths", 150)
    write_prompts(tmp_path, "sums", 150)
    return tmp_path


def write_prompts(folder: Path, name: str, count: int) -> None:
    """Write a file of prompts; those of `maths` have answers."""
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            record = {"prompt": f"What is {number} plus 1?"}
            if name == "maths":
                record["answer"] = str(number + 1)
            file.write(json.dumps(record) + "\n")


def guard_section(**changes: Any) -> GuardSection:
    keys = {"interval_steps": 5, "generation_interval_steps": INTERVAL, **changes}
    return GuardSection(**keys)


def open_yardstick(
    workplace: Path,
    *,
    seed: int = 1,
    total_steps: int = TOTAL_STEPS,
    names: Sequence[str] = ("maths", "sums"),
    **changes: Any,
) -> Generation:
    domains = []
    for name in names:
        domains.append(
            GenerationDomain(
                name=name,
                language={"maths": "en", "sums": "ja"}[name],
                path=str(workplace / f"{name}.jsonl"),
                prompts_per_look=PROMPTS_PER_LOOK,
                format_tolerance_points=8.0,
                accuracy_tolerance_points=20.0,
                hard_limit_points=40.0,
                **changes,
            )
        )
    mix = MixConfig(seq_len=64, seed=1, sources=(), guard=GuardConfig(generation=tuple(domains)))
    config: Any = SimpleNamespace(
        guard=guard_section(),
        train=SimpleNamespace(seed=seed, total_steps=total_steps),
        model=SimpleNamespace(path=None, init="tiny"),
    )
    topology: Any = SimpleNamespace(rank=0, world_size=1, control_group=dist.group.WORLD)
    return Generation(mix, config, topology, workplace, PhaseClock())


def look(step: int, *, last: bool = False) -> Look:
    return Look(
        step=step,
        number=step // 5,
        num_looks=13,
        num_domains=2,
        last=last,
        settings=guard_section(),
    )


def judged(of: Generation, step: int, state: Any = None, *, last: bool = False) -> Judgement:
    """Measure and judge one look, through JSON as the scores files hold it."""
    at = look(step, last=last)
    engine: Any = None
    scores = of.measure(at, engine, None)
    return of.judge(json.loads(json.dumps(scores)), state or {}, at)


def states(judgement: Judgement) -> dict[str, str]:
    return {reading.domain: reading.state for reading in judgement.readings}


def line(judgement: Judgement, domain: str, measure: str) -> dict[str, Any]:
    (found,) = [
        event
        for event in judgement.events
        if event["domain"] == domain and event["measure"] == measure
    ]
    return found


def test_an_unchanged_model_is_green_at_every_look(workplace: Path, model: FakeModel) -> None:
    generation = open_yardstick(workplace)
    first = judged(generation, 0)
    assert states(first) == {"maths": "green", "sums": "green"}
    assert first.state == {}
    state: Any = {}
    for step in range(INTERVAL, TOTAL_STEPS + 1, INTERVAL):
        judgement = judged(generation, step, state, last=step == TOTAL_STEPS)
        state = judgement.state
        assert states(judgement) == {"maths": "green", "sums": "green"}
        assert all(reading.delta == 0 for reading in judgement.readings)
    accuracy = line(judgement, "maths", "accuracy")
    assert (accuracy["rate"], accuracy["baseline"], accuracy["prompts"]) == (1.0, 1.0, 60)
    assert (accuracy["lost"], accuracy["won"], accuracy["language"]) == (0, 0, "en")


def test_a_lost_ability_is_red_at_once_and_named(workplace: Path, model: FakeModel) -> None:
    generation = open_yardstick(workplace, names=["maths"])
    judged(generation, 0)
    model.num_thoughtless = 100
    judgement = judged(generation, INTERVAL)
    (reading,) = judgement.readings
    assert reading.state == "red" and reading.delta == 100.0
    assert reading.lower_bound is not None and reading.lower_bound > reading.hard_limit
    assert line(judgement, "maths", "thinks")["rate"] == 0.0
    assert line(judgement, "maths", "thinks")["lost"] == 60
    assert line(judgement, "maths", "closes_thinking")["lost"] == 0
    assert line(judgement, "maths", "accuracy")["state"] == "green"
    thinking = line(judgement, "maths", "thinking_tokens")
    assert thinking["rate"] == 0.0 and thinking["baseline"] == len(text("One more."))


def test_a_loss_that_one_look_cannot_prove_is_amber_and_then_red(
    workplace: Path, model: FakeModel
) -> None:
    write_prompts(workplace, "maths", 400)
    generation = open_yardstick(workplace, names=["maths"])
    judged(generation, 0)
    model.num_wrong = 15
    state: Any = {}
    seen = []
    for step in range(INTERVAL, TOTAL_STEPS + 1, INTERVAL):
        judgement = judged(generation, step, state)
        state = judgement.state
        seen.append(states(judgement)["maths"])
    assert seen == ["amber", "amber", "red", "red", "red", "red"]
    assert line(judgement, "maths", "accuracy")["lost"] > 0


def test_a_look_that_is_repeated_counts_once_and_a_new_pass_begins_anew(
    workplace: Path, model: FakeModel
) -> None:
    generation = open_yardstick(workplace, names=["maths"])
    judged(generation, 0)
    model.num_wrong = 24
    once = judged(generation, INTERVAL).state
    again = judged(generation, INTERVAL, once).state
    assert again == once
    second = judged(generation, 2 * INTERVAL, once).state["maths"]
    assert second["before"] == once["maths"]["after"] and second["pass"] == 0
    third = judged(generation, 3 * INTERVAL, {"maths": second}).state["maths"]
    assert third["pass"] == 1 and third["before"] == {}
    back = judged(generation, INTERVAL, {"maths": second}).state["maths"]
    assert back["before"] == {} and back["after"] == once["maths"]["after"]
    assert generation.restarted(once, ["maths"])["maths"]["after"] == {}


def test_a_run_that_goes_back_to_a_checkpoint_bets_anew_on_prompts_that_it_asks_again(
    workplace: Path, model: FakeModel
) -> None:
    generation = open_yardstick(workplace, names=["maths"])
    judged(generation, 0)
    model.num_wrong = 24
    saved = judged(generation, INTERVAL).state
    lost = judged(generation, 2 * INTERVAL, saved).state
    after = generation.returned(saved, lost)
    again = judged(generation, 2 * INTERVAL, after).state["maths"]
    assert again["before"] == {} and again["after"] != lost["maths"]["after"]
    assert generation.returned(saved, saved) == saved
    assert generation.returned({}, lost) == {}


def test_the_untouched_model_is_asked_once_and_read_after_that(
    workplace: Path, model: FakeModel
) -> None:
    judged(open_yardstick(workplace), 0)
    assert len(model.asked) == 300
    stored = workplace / "guard" / "generation" / "untouched-maths.json"
    content = stored.read_bytes()
    resumed = open_yardstick(workplace)
    model.num_wrong = 100
    judgement = judged(resumed, INTERVAL)
    assert len(model.asked) == 420
    assert line(judgement, "maths", "accuracy")["baseline"] == 1.0
    assert stored.read_bytes() == content


def test_looks_that_were_added_later_ask_the_answered_prompts_again(
    workplace: Path, model: FakeModel
) -> None:
    judged(open_yardstick(workplace, names=["maths"], total_steps=INTERVAL), 0)
    longer = open_yardstick(workplace, names=["maths"], total_steps=2 * INTERVAL)
    state = judged(longer, INTERVAL).state
    second = judged(longer, 2 * INTERVAL, state)
    assert states(second) == {"maths": "green"}
    assert second.state["maths"]["pass"] == 1 and second.state["maths"]["before"] == {}


def test_replies_to_prompts_that_the_run_would_not_ask_are_refused(
    workplace: Path, model: FakeModel
) -> None:
    judged(open_yardstick(workplace, names=["maths"]), 0)
    file = workplace / "guard" / "generation" / "untouched-maths.json"
    content = json.loads(file.read_text())
    content["prompts"].reverse()
    file.write_text(json.dumps(content))
    engine: Any = None
    with pytest.raises(ConfigError, match="150 prompts that this run would not ask"):
        open_yardstick(workplace, names=["maths"]).measure(look(10), engine, None)


def test_an_untouched_model_with_little_to_lose_is_told(
    workplace: Path, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.num_wrong = 90
    judged(open_yardstick(workplace, names=["maths"]), 0)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "passes accuracy in 10 of 150 replies" in told


def test_a_stop_keeps_the_domains_that_are_done(workplace: Path, model: FakeModel) -> None:
    model.stops_after = 1
    engine: Any = None
    assert open_yardstick(workplace).measure(look(0), engine, None) is None
    assert len(model.asked) == 150
    model.stops_after = None
    judged(open_yardstick(workplace), 0)
    assert len(model.asked) == 300
    model.stops_after = 1
    assert open_yardstick(workplace).measure(look(INTERVAL), engine, None) is None
    folder = workplace / "guard" / "generation"
    assert not list(folder.glob("replies-*"))


def test_a_stop_within_a_domain_keeps_the_replies_that_are_there(
    workplace: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = None
    folder = workplace / "guard" / "generation"
    kept = folder / "untouched-maths.json"
    judged(open_yardstick(workplace, names=["maths"]), 0)
    in_one_go = kept.read_bytes()
    asked_in_one_go = list(model.asked)
    kept.unlink()
    model.asked.clear()

    monkeypatch.setattr(yardstick, "PART_OF_A_RANK", 40)
    model.stops_after = 2
    assert open_yardstick(workplace, names=["maths"]).measure(look(0), engine, None) is None
    assert len(model.asked) == 80 and not kept.exists()
    model.stops_after = None
    judged(open_yardstick(workplace, names=["maths"]), 0)
    assert model.asked == asked_in_one_go
    assert kept.read_bytes() == in_one_go
    assert not list(folder.glob("answered-*"))


def test_replies_to_other_prompts_are_not_continued(
    workplace: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = None
    monkeypatch.setattr(yardstick, "PART_OF_A_RANK", 40)
    model.stops_after = 2
    assert open_yardstick(workplace, names=["maths"]).measure(look(0), engine, None) is None
    model.stops_after = None
    model.asked.clear()
    judged(open_yardstick(workplace, names=["maths"], max_new_tokens=7), 0)
    assert len(model.asked) == 150


def test_other_prompts_another_model_and_a_missing_file_are_refused(
    workplace: Path, model: FakeModel
) -> None:
    judged(open_yardstick(workplace, names=["maths"]), 0)
    engine: Any = None
    with pytest.raises(ConfigError, match="replies to other prompts"):
        open_yardstick(workplace, names=["maths"], effort="low").measure(look(10), engine, None)
    with pytest.raises(ConfigError, match="another untouched model"):
        open_yardstick(workplace, names=["maths"], seed=2).measure(look(10), engine, None)
    resumed = open_yardstick(workplace, names=["maths"])
    resumed.open_untouched(10)
    assert list(resumed.untouched) == ["maths"]
    with pytest.raises(ConfigError, match="replies to other prompts"):
        open_yardstick(workplace, names=["maths"], effort="low").open_untouched(10)
    (workplace / "guard" / "generation" / "untouched-maths.json").unlink()
    with pytest.raises(ConfigError, match="at step 10 the untouched model is gone"):
        open_yardstick(workplace, names=["maths"]).open_untouched(10)
    with pytest.raises(ConfigError, match="at step 10 the untouched model is gone"):
        open_yardstick(workplace, names=["maths"]).measure(look(10), engine, None)


def test_a_domain_that_was_added_later_is_left_out(workplace: Path, model: FakeModel) -> None:
    judged(open_yardstick(workplace, names=["maths"]), 0)
    judgement = judged(open_yardstick(workplace), INTERVAL)
    assert [reading.domain for reading in judgement.readings] == ["maths"]


def test_it_measures_at_its_own_interval_and_at_the_end(workplace: Path) -> None:
    generation = open_yardstick(workplace)
    assert [step for step in range(0, 31, 5) if generation.is_due(look(step))] == [0, 10, 20, 30]
    assert generation.is_due(look(25, last=True))


def test_an_audit_computes_measures_from_the_replies(workplace: Path, model: FakeModel) -> None:
    generation = open_yardstick(workplace)
    judged(generation, 0)
    model.num_wrong = 30
    engine: Any = None
    at = look(INTERVAL)
    scores = generation.measure(at, engine, None)
    assert scores is not None
    live = generation.judge(scores, {}, at)
    stored = GenerationJudge.stored(workplace / "guard")
    assert stored.judge(scores, {}, at) == live
    forged = json.loads(json.dumps(scores))
    forged["domains"]["maths"]["now"]["right"] = [1] * PROMPTS_PER_LOOK
    assert generation.judge(forged, {}, at) != live
    assert stored.judge(forged, {}, at) == live


def test_the_worst_changes_are_kept_before_and_after(workplace: Path, model: FakeModel) -> None:
    generation = open_yardstick(workplace, names=["maths"])
    judged(generation, 0)
    model.num_wrong = 3
    model.num_thoughtless = 1
    judgement = judged(generation, INTERVAL)
    name = line(judgement, "maths", "accuracy")["examples"]
    stored = json.loads((workplace / "guard" / "generation" / name).read_text())
    examples = stored["domains"]["maths"]
    assert [example["lost"] for example in examples] == [["accuracy", "thinks"], ["accuracy"]]
    worst = examples[0]
    assert worst["prompt"].startswith("What is ")
    assert "<|channel|>analysis" in worst["before"] and "analysis" not in worst["now"]
    assert worst["answers"][0] in worst["before"] and worst["answers"][0] not in worst["now"]


def test_the_table_names_states_and_losses(workplace: Path, model: FakeModel) -> None:
    generation = open_yardstick(workplace, names=["maths"])
    judged(generation, 0)
    model.num_thoughtless = 100
    table = generation.table(judged(generation, INTERVAL).events)
    (form,) = [row for row in table.splitlines() if " format " in row]
    assert "100.0 %" in form and "red" in form
