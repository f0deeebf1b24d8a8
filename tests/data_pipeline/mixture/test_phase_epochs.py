"""A phase of a schedule may limit how often a source is read within it."""

from __future__ import annotations

import dataclasses
import json
import random
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import DataError
from data_pipeline.mixture.data_plan import make_data_plan
from data_pipeline.mixture.ledger import Ledger, mix_hash
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.mixture.plan_figure import draw_plan
from data_pipeline.mixture.settings import describe_changes, describe_rates, mix_settings
from tests.data_pipeline.inputs import MakeMix, make_texts
from tests.data_pipeline.mixture.test_mixture import Rows, ids

BATCH = 3
"""Rows of a step."""


@dataclasses.dataclass(frozen=True)
class Case:
    rows: Rows
    ledger: Ledger
    starts: tuple[int, ...]
    """First step of each phase, and the end of the run."""
    ceilings: tuple[float, ...]
    """Epochs of the first source that each phase allows."""


@st.composite
def capped_runs(draw: st.DrawFn) -> Case:
    """Up to three phases, cut here and there as the guard and edits do, with ceilings."""
    rows = Rows({name: draw(st.lists(st.integers(1, 9), min_size=2, max_size=9)) for name in "ab"})
    lengths = draw(st.lists(st.integers(2, 12), min_size=1, max_size=3))
    ceilings = draw(st.lists(st.floats(0.2, 4), min_size=len(lengths), max_size=len(lengths)))
    shares = draw(st.lists(st.floats(0, 1), min_size=len(lengths), max_size=len(lengths)))
    phases = []
    for number, (share, ceiling) in enumerate(zip(shares, ceilings, strict=True)):
        phases.append(
            SchedulePhase(
                name=f"p{number}",
                until_step=sum(lengths[: number + 1]),
                weights={"a": share, "b": 1 - share},
                max_epochs={"a": ceiling},
            )
        )
    sources = []
    for name in "ab":
        sources.append(
            SourceConfig(name=name, language="en", domain="web", format="mock", weight=0.5)
        )
    mix = MixConfig(seq_len=16, seed=1, sources=tuple(sources), schedule=tuple(phases))
    ledger = Ledger.start(mix, total_steps=sum(lengths))
    for step in sorted(draw(st.sets(st.integers(1, sum(lengths) - 1), max_size=3))):
        ledger = ledger.adjust(mix, step, lambda _, planned: {"a": 0.5, "b": 0.5})
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return Case(rows, ledger, tuple(starts), tuple(ceilings))


def is_refused(case: Case, step: int) -> bool:
    """Return whether a step is refused, told by counting rows from the start of its phase."""
    number = max(index for index, start in enumerate(case.starts[:-1]) if start <= step)
    free = Ledger(
        tuple(dataclasses.replace(segment, settings={}) for segment in case.ledger.segments)
    )
    mixture = Mixture(case.rows, free, 1)
    drawn = 0
    for earlier in range(case.starts[number], step + 1):
        drawn += mixture.global_batch(earlier, BATCH).sources.tolist().count(0)
    return drawn / len(case.rows.row_tokens(0)) > case.ceilings[number]


@settings(max_examples=60, deadline=None)
@given(capped_runs(), st.integers(0, 2**32))
def test_a_step_is_refused_if_and_only_if_its_phase_has_read_too_much_by_then(
    case: Case, seed: int
) -> None:
    steps = list(range(case.starts[-1]))
    random.Random(seed).shuffle(steps)
    ledger = Ledger.from_json(json.loads(json.dumps(case.ledger.to_json())))
    mixture = Mixture(case.rows, ledger, 1)
    for step in steps[:6]:
        if is_refused(case, step):
            with pytest.raises(DataError, match="within phase 'p"):
                mixture.global_batch(step, BATCH)
        else:
            batch = mixture.global_batch(step, BATCH)
            assert ids(batch) == ids(Mixture(case.rows, ledger, 1).global_batch(step, BATCH))


def test_phases_with_ceilings_are_found_whole_however_they_are_cut() -> None:
    sources = [
        SourceConfig(name=name, language="en", domain="web", format="mock", weight=0.5)
        for name in "ab"
    ]
    phases = (
        SchedulePhase(name="main", until_step=10),
        SchedulePhase(name="end", share="rest", max_epochs={"a": 1}),
    )
    mix = MixConfig(seq_len=16, seed=1, sources=tuple(sources), schedule=phases)
    ledger = Ledger.start(mix, total_steps=30)
    for step in (4, 15, 22):
        share = step / 100
        ledger = ledger.adjust(mix, step, lambda *_, share=share: {"a": share, "b": 1 - share})
    assert len(ledger.segments) == 5
    assert [ledger.phase_start(step) for step in (0, 9, 10, 16, 29)] == [0, 0, 10, 10, 10]
    assert ledger.capped_spans(0, 30) == [(10, 30)]
    assert ledger.capped_spans(17, 25) == [(17, 25)]
    assert ledger.capped_spans(0, 10) == []


TEXTS = {"ja": make_texts(60, "j"), "en": make_texts(30, "e")}
SCHEDULE: list[dict[str, Any]] = [
    {"name": "main", "share": 0.5},
    {
        "name": "anneal",
        "share": "rest",
        "weights": {"ja": 0.2, "en": 0.8},
        "max_epochs": {"en": 2},
        "lr_factor": 0.5,
        "to_lr_factor": 0.1,
    },
]


def planned(make_mix: MakeMix, tmp_path: Path, **anneal: Any) -> tuple[BuiltData, MixConfig]:
    mix = make_mix(TEXTS, schedule=[SCHEDULE[0], SCHEDULE[1] | anneal])
    if not (tmp_path / "out").exists():
        build(mix, tmp_path / "out", progress=False)
    return BuiltData.open(tmp_path / "out", mix=mix), mix


def test_a_plan_refuses_what_a_step_would_refuse_and_names_phase_and_figures(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    built, mix = planned(make_mix, tmp_path)
    rows = built.num_rows(1)
    ledger = Ledger.start(mix, built.manifest.row_hashes(), 2 * rows)
    (told,) = make_data_plan(built, mix, 2 * rows, 8, ledger).problems
    assert told.startswith("source 'en': phase 'anneal' takes ") and "max_epochs" in told
    mixture = Mixture(built, ledger, mix.seed)
    with pytest.raises(DataError, match="phase 'anneal', whose max_epochs is 2"):
        mixture.global_batch(2 * rows - 1, 8)
    enough = (2 * rows) // 8
    assert not make_data_plan(built, mix, enough, 8).problems
    Mixture(built, Ledger.start(mix, total_steps=enough), mix.seed).global_batch(enough - 1, 8)


def test_a_plan_shows_epochs_at_the_end_of_each_phase_and_its_factor(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    built, mix = planned(make_mix, tmp_path)
    plan = make_data_plan(built, mix, 20, 8)
    main, anneal = plan.phases
    for name in ("ja", "en"):
        assert main.end_epochs[name] == main.epochs[name]
        total = main.epochs[name] + anneal.epochs[name]
        assert anneal.end_epochs[name] == pytest.approx(total)
    assert (main.lr_factor, main.last_lr_factor) == (1, 1)
    assert anneal.lr_factor == pytest.approx(0.5 - 0.4 / 10) and anneal.last_lr_factor == 0.1
    shown = plan.describe()
    assert "epochs at its end" in shown and "0.46 -> 0.1" in shown
    figure = draw_plan(plan)
    xml.dom.minidom.parseString(figure)
    assert "Factor of the phases on the learning rate" in figure
    plain, plain_mix = planned(make_mix, tmp_path, lr_factor=1, to_lr_factor=1)
    assert "Factor of the phases" not in draw_plan(make_data_plan(plain, plain_mix, 20, 8))


def test_factors_on_the_rate_are_no_edit_of_the_mix_and_ceilings_are(make_mix: MakeMix) -> None:
    old = make_mix(TEXTS, schedule=SCHEDULE)
    faster = make_mix(TEXTS, schedule=[SCHEDULE[0], SCHEDULE[1] | {"lr_factor": 0.7}])
    assert mix_hash(old) == mix_hash(faster)
    assert describe_rates(old, faster) == ["schedule[anneal].lr_factor: 0.5 -> 0.7"]
    longer = make_mix(TEXTS, schedule=[SCHEDULE[0], SCHEDULE[1] | {"max_epochs": {"en": 3}}])
    changes = describe_changes(mix_settings(old), mix_settings(longer))
    assert changes == ['schedule[anneal].max_epochs: {"en": 2.0} -> {"en": 3.0}']
    bare = {"name": "main", "share": 1.0}
    settings_of_phase = mix_settings(make_mix(TEXTS, schedule=[bare]))["schedule"][0]
    assert settings_of_phase.keys() == {
        "name",
        "share",
        "until_step",
        "weights",
        "to",
        "languages",
    }
