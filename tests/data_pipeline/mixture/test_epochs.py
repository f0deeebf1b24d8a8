"""Epochs become weights over a build: every source is read as often as it asks for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.__main__ import main
from data_pipeline.build.build import build
from data_pipeline.build.origin import fingerprint
from data_pipeline.config.language_limits import LanguageLimits
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.mixture.data_plan import DataPlan, make_data_plan
from data_pipeline.mixture.epochs import describe_weights, with_weights
from data_pipeline.mixture.ledger import Ledger, mix_hash, resume_ledger
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.mixture.settings import describe_changes, mix_settings
from data_pipeline.mixture.staged_plan import plan_mix, steps_of_one_pass
from data_pipeline.store.manifest import BuildManifest
from tests.data_pipeline.conftest import mix_maker
from tests.data_pipeline.inputs import MakeMix, make_texts
from tests.data_pipeline.mixture.test_mixture import Rows

TEXTS = {"ja": make_texts(200, "ja"), "en": make_texts(60, "en"), "off": make_texts(9, "x")}
ASKED = {"ja": {"epochs": 1}, "en": {"epochs": 2.5}, "off": {"weight": 0}}
ROWS = 8
"""Packed rows of a step."""


def mix_of(epochs: list[float], **keys: Any) -> MixConfig:
    sources = []
    for number, asked in enumerate(epochs):
        sources.append(
            SourceConfig(
                name=f"s{number}",
                language="en" if number % 2 else "ja",
                domain="web",
                format="mock",
                epochs=asked,
            )
        )
    return MixConfig(seq_len=64, seed=5, sources=tuple(sources), **keys)


def manifest_of(rows: Rows) -> BuildManifest:
    entries = []
    for number, name in enumerate(rows.source_names):
        tokens = int(rows.row_tokens(number).sum())
        entries.append(SimpleNamespace(name=name, predicted_tokens=tokens))
    return cast(BuildManifest, SimpleNamespace(sources=entries))


@st.composite
def mixes(draw: st.DrawFn) -> tuple[MixConfig, Rows]:
    """Up to six sources of a few rows of any size, read up to four times."""
    num_sources = draw(st.integers(1, 6))
    row_tokens = st.lists(st.integers(1, 64), min_size=1, max_size=12)
    rows = Rows({f"s{number}": draw(row_tokens) for number in range(num_sources)})
    epochs = draw(st.lists(st.floats(0.1, 4), min_size=num_sources, max_size=num_sources))
    return mix_of(epochs), rows


@settings(max_examples=60, deadline=None)
@given(mixes())
def test_when_the_tokens_of_all_epochs_are_drawn_each_source_was_read_as_often_as_it_asks(
    drawn: tuple[MixConfig, Rows],
) -> None:
    mix, rows = drawn
    mixture = Mixture(rows, Ledger.start(with_weights(mix, manifest_of(rows))), mix.seed)
    sizes = [rows.row_tokens(number) for number in range(len(mix.sources))]
    asked = []
    for source, tokens in zip(mix.sources, sizes, strict=True):
        assert source.epochs is not None
        asked.append(source.epochs * int(tokens.sum()))
    given_tokens = np.zeros(len(asked))
    step = 0
    while given_tokens.sum() < sum(asked):
        batch = mixture.global_batch(step, 1)
        given_tokens[batch.sources[0]] += batch.predicted_tokens[0]
        step += 1
    longest = max(int(tokens.max()) for tokens in sizes)
    # the account is within one row of its target, and its end within the last row of the run
    assert np.abs(given_tokens - np.array(asked)).max() <= 2 * longest


def test_another_length_of_the_run_draws_the_same_rows_and_is_no_edit() -> None:
    rows = Rows({"s0": [9] * 40, "s1": [64, 3] * 30})
    mix = with_weights(mix_of([1, 2]), manifest_of(rows))
    stored = Ledger.start(mix, total_steps=10).to_json()
    resumed = resume_ledger(
        json.loads(json.dumps(stored)), mix, 5, accept_change=False, total_steps=1000
    )
    assert resumed == Ledger.start(mix)


def test_an_edit_of_epochs_is_shown_with_the_weights_that_follow() -> None:
    rows = Rows({"s0": [10] * 40, "s1": [10] * 40})
    manifest = manifest_of(rows)
    old = with_weights(mix_of([1, 1]), manifest)
    new = with_weights(mix_of([1, 3]), manifest)
    with pytest.raises(ConfigError) as caught:
        resume_ledger(Ledger.start(old).to_json(), new, 5, accept_change=False)
    told = str(caught.value)
    assert "sources[s1].epochs: 1 -> 3" in told and "sources[s1].weight: 0.5 -> 0.75" in told
    edited = resume_ledger(Ledger.start(old).to_json(), new, 5, accept_change=True)
    assert [segment.weights["s1"] for segment in edited.segments] == [0.5, 0.75]
    by_weight = dataclasses.replace(
        old, sources=tuple(dataclasses.replace(source, epochs=None) for source in old.sources)
    )
    changes = describe_changes(mix_settings(old), mix_settings(by_weight))
    assert changes == [f"sources[s{number}].epochs: 1 -> none" for number in range(2)]


def test_a_mix_by_weights_is_left_alone_and_keeps_its_hash(make_mix: MakeMix) -> None:
    mix = make_mix(TEXTS)
    assert with_weights(mix, manifest_of(Rows({}))) is mix
    assert all("epochs" not in source for source in mix_settings(mix)["sources"].values())
    assert describe_weights(mix) == ""
    assert mix_hash(mix) == mix_hash(make_mix(TEXTS))


def test_a_ledger_without_the_weights_of_its_epochs_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="follow from its build"):
        Ledger.start(mix_of([1, 2]))


def test_bounds_that_the_epochs_break_are_refused_all_together_with_figures() -> None:
    rows = Rows({"s0": [10] * 30, "s1": [10] * 10})
    phase = SchedulePhase(name="all", share=1.0, languages={"en": LanguageLimits(min_share=0.5)})
    mix = mix_of([1, 1], languages={"ja": LanguageLimits(max_share=0.6)}, schedule=(phase,))
    with pytest.raises(ConfigError) as caught:
        with_weights(mix, manifest_of(rows))
    floor = "schedule[all].languages.en.min_share is 0.5, but the epochs (s1 1) give en 25.00%"
    ceiling = "languages.ja.max_share is 0.6, but the epochs (s0 1) give ja 75.00% of the tokens"
    assert floor in str(caught.value) and ceiling in str(caught.value)


def test_a_source_without_learned_tokens_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="source 's1' has epochs 2 but no learned tokens"):
        with_weights(mix_of([1, 2]), manifest_of(Rows({"s0": [4], "s1": []})))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix by epochs in `in`, and its build in `out`."""
    folder = tmp_path_factory.mktemp("epochs")
    mix = mix_maker(folder)(TEXTS, sources=ASKED, seq_len=128)
    build(mix, folder / "out", progress=False)
    return folder


def opened(place: Path, **keys: Any) -> tuple[BuiltData, MixConfig]:
    """Return the build, and the mix by epochs with other keys, which no build depends on."""
    mix = mix_maker(place)(TEXTS, **{"sources": ASKED, "seq_len": 128, **keys})
    built = BuiltData.open(place / "out", mix=mix)
    return built, with_weights(mix, built.manifest)


def test_a_build_is_the_same_with_epochs_as_with_weights(place: Path) -> None:
    built, mix = opened(place)
    by_weight = mix_maker(place)(TEXTS, seq_len=128)
    assert fingerprint(by_weight) == fingerprint(mix) == built.manifest.fingerprint


def test_the_steps_of_the_epochs_read_each_source_as_often_as_it_asks(place: Path) -> None:
    built, mix = opened(place)
    steps = steps_of_one_pass(built, mix, ROWS)
    plan = make_data_plan(built, mix, steps, ROWS)
    for source in plan.sources[:2]:
        assert source.asked_epochs is not None
        assert source.epochs == pytest.approx(source.asked_epochs, abs=ROWS / source.rows)
    assert plan.sources[2].epochs == 0
    assert not any("epochs:" in line for line in plan.warnings)
    shown = plan.describe()
    assert "asked epochs" in shown and f"{mix.sources[1].weight:.2%}" in shown


def asked_warnings(plan: DataPlan) -> list[str]:
    return [line for line in plan.warnings if line.startswith("epochs:")]


def test_a_run_of_another_length_is_warned_of_with_what_it_reads_and_the_steps(
    place: Path,
) -> None:
    built, mix = opened(place)
    steps = steps_of_one_pass(built, mix, ROWS)
    for length in (steps // 2, 2 * steps):
        plan = make_data_plan(built, mix, length, ROWS)
        (told,) = asked_warnings(plan)
        read = [f"{source.drawn_tokens / source.tokens:.2f}" for source in plan.sources[:2]]
        assert f"{length:,} steps read ja {read[0]} times of 1, en {read[1]} times of 2.5" in told
        assert f"takes {steps:,} steps" in told
        assert not plan.problems
    assert asked_warnings(make_data_plan(built, mix, steps + 1, ROWS)) == []


def test_under_a_schedule_epochs_count_in_the_phases_without_weights(place: Path) -> None:
    schedule = [
        {"name": "main", "share": 0.5},
        {"name": "anneal", "share": 0.5, "weights": {"en": 1.0}},
    ]
    _, alone = opened(place)
    built, mix = opened(place, schedule=schedule)
    steps = steps_of_one_pass(built, alone, ROWS)
    assert steps_of_one_pass(built, mix, ROWS) in (2 * steps - 1, 2 * steps)  # half of a run
    plan = make_data_plan(built, mix, 2 * steps, ROWS)
    main, anneal = plan.phases
    assert asked_warnings(plan) == []
    assert main.epochs["en"] == pytest.approx(2.5, abs=0.5)
    assert plan.sources[1].epochs == pytest.approx(main.epochs["en"] + anneal.epochs["en"])
    (told,) = asked_warnings(make_data_plan(built, mix, steps, ROWS))
    assert f"takes {steps:,} steps in the phases that have no weights of their own" in told


def test_a_phase_of_fixed_length_that_is_too_short_for_the_epochs_is_told(place: Path) -> None:
    schedule = [
        {"name": "main", "until_step": 5},
        {"name": "rest", "share": "rest", "weights": {"en": 1.0}},
    ]
    built, mix = opened(place, schedule=schedule)
    steps = steps_of_one_pass(built, mix, ROWS)
    (told,) = asked_warnings(make_data_plan(built, mix, steps, ROWS))
    assert told.startswith("epochs: 5 steps in the phases")


def test_stages_divide_the_epochs_and_are_warned_of_once(tmp_path: Path) -> None:
    stages = [{"seq_len": 64, "share": 0.5}, {"seq_len": 128, "share": 0.5}]
    mix = mix_maker(tmp_path)(TEXTS, sources=ASKED, stages=stages)
    build(mix, tmp_path / "out", progress=False)
    built = BuiltData.open(tmp_path / "out", mix=mix)
    mix = with_weights(mix, built.manifest)
    steps = steps_of_one_pass(built, mix, ROWS)
    plan = plan_mix(built, mix, steps, ROWS).whole()
    assert not asked_warnings(plan)
    for source in plan.sources[:2]:
        assert source.epochs == pytest.approx(source.asked_epochs, rel=0.1)
    half = plan_mix(built, mix, steps // 2, ROWS)
    assert len(asked_warnings(half.whole())) == 1
    assert half.describe().count("warning: epochs:") == 1


def test_build_plan_and_diff_show_weights_and_that_they_follow_from_epochs(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, mix = opened(place)
    path = place / "in" / "mix.yaml"
    out = ["--out", str(tmp_path / "again")]
    assert main(["build", str(path), *out, "--no_cache"]) == 0
    share = f"{mix.sources[1].weight:.2%}"
    assert f"en 2.5 ({share})" in capsys.readouterr().out
    assert main(["plan", str(path), *out, "--global_batch_size", str(ROWS)]) == 0
    shown = capsys.readouterr().out
    assert "asked epochs" in shown and share in shown and "warning: epochs" not in shown
    edited = place / "in" / "edited.yaml"
    edited.write_text(path.read_text().replace("epochs: 2.5", "epochs: 5"))
    both = ["--old_out", str(tmp_path / "again"), "--new_out", str(tmp_path / "again")]
    assert main(["diff", str(path), str(edited), *both]) == 0
    shown = capsys.readouterr().out
    assert "sources[en].epochs: 2.5 -> 5" in shown
    assert "sources[en].weight: 0." in shown
