"""A plan is what training will draw; what is impossible or unwise is said."""

from __future__ import annotations

import dataclasses
import json
import xml.dom.minidom
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.build.build import build
from data_pipeline.config.language_limits import LanguageLimits
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.data_plan import make_data_plan
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.mixture.plan_comparison import compare_plans
from data_pipeline.mixture.plan_figure import draw_plan
from data_pipeline.mixture.settings import describe_changes, mix_settings
from tests.data_pipeline.inputs import MakeMix, make_texts
from tests.support.records import write_jsonl

STEPS, ROWS = 37, 8


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    texts = {"ja": make_texts(200, "ja"), "en": make_texts(40, "en"), "unused": make_texts(9, "x")}
    limits = {"en": {"min_share": 0.3}, "ja": {"max_share": 0.7}}
    return make_mix(
        texts, weights={"ja": 0.7, "en": 0.3, "unused": 0.0}, languages=limits, seq_len=128
    )


@pytest.fixture
def built(mix: MixConfig, tmp_path: Path) -> BuiltData:
    build(mix, tmp_path / "out", progress=False)
    return BuiltData.open(tmp_path / "out", mix=mix)


def drawn_tokens(built: BuiltData, ledger: Ledger, mix: MixConfig) -> Counter[str]:
    mixture, tokens = Mixture(built, ledger, mix.seed), Counter[str]()
    for step in range(STEPS):
        batch = mixture.global_batch(step, ROWS)
        for source, count in zip(
            batch.sources.tolist(), batch.predicted_tokens.tolist(), strict=True
        ):
            tokens[built.source_names[source]] += count
    return tokens


def test_a_plan_counts_the_tokens_that_training_draws(built: BuiltData, mix: MixConfig) -> None:
    plan = make_data_plan(built, mix, STEPS, ROWS)
    expected = drawn_tokens(built, Ledger.start(mix), mix)
    assert {
        source.name: source.drawn_tokens for source in plan.sources if source.drawn_tokens
    } == expected
    assert plan.drawn_tokens == sum(expected.values())
    assert plan.language_shares()["en"] == pytest.approx(0.3, abs=2 * 128 / plan.drawn_tokens)


def test_a_plan_of_an_edited_run_counts_both_segments(built: BuiltData, mix: MixConfig) -> None:
    ledger = Ledger.start(mix).append(mix, 11).append(mix, 23)
    plan = make_data_plan(built, mix, STEPS, ROWS, ledger)
    assert {s.name: s.drawn_tokens for s in plan.sources if s.drawn_tokens} == drawn_tokens(
        built, ledger, mix
    )


@pytest.mark.case("B11", "said by build, plan and --dry_run, with the step")
def test_what_runs_out_is_named_with_its_step(built: BuiltData, mix: MixConfig) -> None:
    plan = make_data_plan(built, mix, STEPS, ROWS)
    mixture = Mixture(built, Ledger.start(mix), mix.seed)
    for number, source in enumerate(plan.sources):
        once = source.read_once_at_step
        if once is None:
            assert source.epochs < 1
        else:
            assert mixture.position(min(once + 1, STEPS), ROWS).drawn_rows[number] >= source.rows
            assert mixture.position(max(once - 2, 0), ROWS).drawn_rows[number] < source.rows
    assert plan.sources[1].read_once_at_step is not None


def test_over_repetition_is_a_warning_and_the_epoch_limit_a_problem(
    built: BuiltData, mix: MixConfig
) -> None:
    long = make_data_plan(built, mix, 400, ROWS)
    assert (
        any("source 'en' is read" in line and "from step" in line for line in long.warnings)
        and not long.problems
    )
    limited = tuple(
        s if s.name != "en" else dataclasses.replace(s, max_epochs=2.0) for s in mix.sources
    )
    problems = make_data_plan(built, dataclasses.replace(mix, sources=limited), 400, ROWS).problems
    assert len(problems) == 1 and "max_epochs is 2, which is used up near step" in problems[0]


def test_floors_are_reported_as_met_or_not(built: BuiltData, mix: MixConfig) -> None:
    plan = make_data_plan(built, mix, STEPS, ROWS)
    assert [(one.language, one.met) for one in plan.limits] == [("en", True), ("ja", True)]
    broken = dataclasses.replace(mix, languages={"en": LanguageLimits(min_share=0.5)})
    (problem,) = make_data_plan(built, broken, STEPS, ROWS, Ledger.start(mix)).problems
    assert "language 'en': has" in problem and "must have from 50.00%" in problem


def test_floor_beside_conversations_may_be_missed_by_learned_tokens_of_a_row_only(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    sources = {}
    for name in ("ja", "en"):
        records = []
        for number, question in enumerate(make_texts(60, name)):
            asked = {"role": "user", "content": f"{number} {question} " * 3}
            answer = {"role": "assistant", "content": f"{number}"}
            records.append({"messages": [asked, answer]})
        path = tmp_path / f"{name}-chat.jsonl"
        write_jsonl(path, records)
        sources[name] = {
            "path": str(path),
            "format": "harmony",
            "loss": "assistant",
            "loss_weight": 0.5 if name == "en" else 1,
        }
    texts = {"ja": ["x"], "en": ["x"]}
    weights = {"ja": 0.7, "en": 0.3}
    mix = make_mix(texts, weights=weights, sources=sources, seq_len=512)
    build(mix, tmp_path / "out", progress=False)
    built = BuiltData.open(tmp_path / "out", mix=mix)
    broken = dataclasses.replace(mix, languages={"en": LanguageLimits(min_share=0.4)})
    plan = make_data_plan(built, broken, 100, ROWS, Ledger.start(mix))
    assert [limit.met for limit in plan.limits] == [False]
    assert "en: each of its tokens counts 0.5 times in the loss" in plan.describe()
    assert "ja: each of its tokens counts" not in plan.describe()


def test_japanese_tokens_are_weighed_by_what_they_say(built: BuiltData, mix: MixConfig) -> None:
    plan = make_data_plan(built, mix, STEPS, ROWS)
    tokens, content = plan.language_shares(), plan.content_shares()
    assert content["ja"] < tokens["ja"] and sum(content.values()) == pytest.approx(1)
    assert "1.32 times the tokens in Japanese" in plan.describe()


def test_the_command_writes_a_table_json_and_a_plot(
    mix: MixConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tmp_path / "plan.json", tmp_path / "plan.svg"
    arguments = [
        "plan",
        "--build",
        str(tmp_path / "in" / "mix.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    assert main([*arguments, "--json", str(paths[0]), "--plot", str(paths[1])]) == 0
    shown, value = capsys.readouterr().out, json.loads(paths[0].read_text())
    assert "limit: en from 30% to 100%: met" in shown
    assert value["language_shares"].keys() == {"ja", "en"} and len(value["sources"]) == 3
    xml.dom.minidom.parse(str(paths[1]))


SCHEDULE = [
    {"name": "main", "until_step": 10},
    {
        "name": "shift",
        "share": 0.5,
        "weights": {"ja": 0.7, "en": 0.3},
        "to": {"ja": 0.4, "en": 0.3, "unused": 0.3},
    },
    {
        "name": "anneal",
        "share": "rest",
        "weights": {"en": 0.8, "ja": 0.2},
        "languages": {"en": {"min_share": 0.8}, "ja": {"max_share": 0.2}},
    },
]


def test_a_plan_tells_tokens_epochs_and_bounds_of_every_phase(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    texts = {"ja": make_texts(90, "ja"), "en": make_texts(40, "en"), "unused": make_texts(19, "x")}
    weights = {"ja": 0.7, "en": 0.3, "unused": 0.0}
    mix = make_mix(texts, weights=weights, schedule=SCHEDULE)
    build(mix, tmp_path / "out", progress=False)
    built = BuiltData.open(tmp_path / "out", mix=mix)
    plan = make_data_plan(built, mix, STEPS, ROWS)
    spans = [(phase.name, phase.start_step, phase.stop_step) for phase in plan.phases]
    assert spans == [("main", 0, 10), ("shift", 10, 29), ("anneal", 29, STEPS)]
    expected = drawn_tokens(built, Ledger.start(mix, total_steps=STEPS), mix)
    for source in plan.sources:
        tokens = [phase.drawn_tokens[source.name] for phase in plan.phases]
        assert sum(tokens) == source.drawn_tokens == expected[source.name]
        epochs = [phase.epochs[source.name] for phase in plan.phases]
        assert sum(epochs) == pytest.approx(source.epochs)
    (english, japanese) = plan.limits
    assert (english.phase, english.language, english.met) == ("anneal", "en", True)
    assert english.share == pytest.approx(0.8, abs=0.1) and japanese.met
    text = plan.describe()
    assert "11 to 29" in text and "0.00% -> 30.00%" in text
    assert "limit: en in phase anneal from 80% to 100%: met" in text
    stored = plan.to_json()["phases"]
    assert stored[1]["end_weights"] == {"ja": 0.4, "en": 0.3, "unused": 0.3}
    assert "Weights over the run: main, shift, anneal" in draw_plan(plan)
    assert "phases" not in make_data_plan(built, _unscheduled(mix), STEPS, ROWS).to_json()


def _unscheduled(mix: MixConfig) -> MixConfig:
    return dataclasses.replace(mix, schedule=())


def test_two_schedules_are_compared_phase_by_phase(make_mix: MakeMix, tmp_path: Path) -> None:
    texts = {"ja": make_texts(90, "ja"), "en": make_texts(40, "en"), "unused": make_texts(19, "x")}
    mix = make_mix(texts, weights={"ja": 0.7, "en": 0.3, "unused": 0.0}, schedule=SCHEDULE)
    build(mix, tmp_path / "out", progress=False)
    built = BuiltData.open(tmp_path / "out", mix=mix)
    longer = dataclasses.replace(mix.schedule[0], until_step=15)
    edited = dataclasses.replace(mix, schedule=(longer, *mix.schedule[1:]))
    changes = describe_changes(mix_settings(mix), mix_settings(edited))
    assert changes == ["schedule[main].until_step: 10 -> 15"]
    swapped = dataclasses.replace(mix, schedule=(mix.schedule[1], mix.schedule[0]))
    assert "schedule[anneal]: removed" in describe_changes(mix_settings(mix), mix_settings(swapped))
    old = make_data_plan(built, mix, STEPS, ROWS)
    new = make_data_plan(built, edited, STEPS, ROWS)
    lines = [line.split() for line in compare_plans(old, new).splitlines()]
    assert ["main", "ja", "1", "to", "10", "1", "to", "15"] in [line[:8] for line in lines]
    before = old.phases[2].drawn_tokens["en"]
    after = new.phases[2].drawn_tokens["en"]
    row = ["anneal", "en", "30", "to", "37", "35", "to", "37", f"{before:,}", f"{after:,}"]
    assert row in [line[:10] for line in lines]


def test_diff_shows_settings_tokens_epochs_and_shares(
    make_mix: MakeMix,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {"ja": make_texts(90, "ja"), "en": make_texts(60, "en")}
    make_mix(texts, folder="old", weights={"ja": 0.5, "en": 0.5})
    make_mix(
        texts | {"new": make_texts(50, "n")},
        folder="new",
        weights={"ja": 0.7, "en": 0.2, "new": 0.1},
    )
    run = ["--steps", "20", "--global_batch_size", "4", "--workers", "1", "--build"]
    assert main(["diff", "old/mix.yaml", "new/mix.yaml", *run]) == 0
    whole = capsys.readouterr().out
    assert (
        "sources[ja].weight: 0.5 -> 0.7" in whole
        and "sources[new]: added (weight 0.1, language en)" in whole
    )
    assert "share of en: 50.00% -> 30.00% of the tokens (-20.00 points)" in whole
    assert main(["diff", "old/mix.yaml", "new/mix.yaml", *run, "--at_step", "10"]) == 0
    half = capsys.readouterr().out
    assert "the edit made at step 10" in half and _after(half, "ja") < _after(whole, "ja")
    assert main(["diff", "new/mix.yaml", "old/mix.yaml", *run, "--at_step", "10"]) == 78
    assert "source 'new' was trained on and is no longer in the mix" in capsys.readouterr().err


def _after(text: str, source: str) -> int:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [source] and "," in line)
    return int(line.split()[2].replace(",", ""))
