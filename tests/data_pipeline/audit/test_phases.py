"""An audit shows the phases of a mix: shares, tokens, and the epochs at the end of each."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.__main__ import main
from data_pipeline.audit.audit import Audit
from data_pipeline.audit.page import audit_page
from data_pipeline.audit.phases import AuditedPhases, audited_phases
from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError
from data_pipeline.mixture.data_plan import make_data_plan
from data_pipeline.mixture.epochs import with_weights
from tests.data_pipeline.conftest import mix_maker
from tests.data_pipeline.inputs import make_texts

TEXTS = {
    "ja_web": make_texts(120, "ja"),
    "en_web": make_texts(60, "en"),
    "en_best": make_texts(30, "best"),
}
ASKED = {"ja_web": {"epochs": 2}, "en_web": {"epochs": 3}, "en_best": {"weight": 0}}
WEIGHTS = {"ja_web": 0.6, "en_web": 0.3, "en_best": 0.1}
SCHEDULE: list[dict[str, Any]] = [
    {"name": "main", "share": 0.6},
    {"name": "harden", "share": 0.2, "weights": WEIGHTS, "to": {"ja_web": 0.5, "en_web": 0.5}},
    {
        "name": "anneal",
        "share": "rest",
        "weights": {"ja_web": 0.2, "en_web": 0.3, "en_best": 0.5},
        "max_epochs": {"en_best": 4},
        "lr_factor": 0.5,
        "to_lr_factor": 0.0,
    },
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix in `in`, and its build in `data/built`."""
    folder = tmp_path_factory.mktemp("phases")
    mix = mix_maker(folder)(TEXTS, sources=ASKED, seq_len=64)
    build(mix, folder / "data" / "built", progress=False)
    return folder


def mix_in(place: Path, schedule: Sequence[Any], **keys: Any) -> MixConfig:
    return mix_maker(place)(
        TEXTS, **{"sources": ASKED, "seq_len": 64, "schedule": list(schedule), **keys}
    )


def page_of(phases: AuditedPhases) -> str:
    empty = Audit(mix="a mix", max_mislabelled_share=0.05, sources=())
    page = audit_page(empty, phases=phases)
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_phases_of_a_built_mix_have_the_figures_of_its_plan(place: Path) -> None:
    mix = mix_in(place, SCHEDULE)
    built = BuiltData.open(place / "data" / "built", mix=mix)
    shown = audited_phases(mix, built, 40, 4)
    plan = make_data_plan(built, with_weights(mix, built.manifest), 40, 4)
    told = shown.describe()
    assert told.startswith("weights follow from epochs: ja_web 2 (")
    assert "phases over 40 steps of 4 rows" in told
    for phase in plan.phases:
        for name, tokens in phase.drawn_tokens.items():
            cells = [phase.name, name, f"{tokens:,}", f"{phase.end_epochs[name]:.2f}"]
            line = r" .*\b".join(map(re.escape, cells))
            assert bool(re.search(line, told)) == (tokens > 0)
    page = html.unescape(page_of(shown))
    assert "weights follow from epochs" in page and "epochs at its end" in page
    assert page.count("<td>anneal</td>") == 3 and page.count("<td>harden</td>") == 3


def test_a_mix_that_is_not_built_shows_its_phases_without_tokens(place: Path) -> None:
    shown = audited_phases(mix_in(place, SCHEDULE), None, None, 8)
    told = shown.describe()
    assert "the weights follow from the tokens of a build" in told
    assert re.search(r"main +60% of the steps +ja_web +by 2 epochs +- +1\n", told)
    assert re.search(r"harden +20% of the steps +en_best +10.00% -> 0.00% +- +1\n", told)
    assert re.search(r"anneal +the rest +en_best +50.00% +4 +0.5 -> 0\n", told)
    assert "known with a build" in told
    assert "<td>by 3 epochs</td>" in page_of(shown)


def test_a_run_that_cannot_follow_the_phases_is_told_and_the_audit_goes_on(place: Path) -> None:
    schedule = [{"name": "main", "until_step": 10_000}, {"name": "end", "share": "rest"}]
    mix = mix_in(place, schedule)
    built = BuiltData.open(place / "data" / "built", mix=mix)
    told = audited_phases(mix, built, None, 8).describe()
    assert "phase 'main' ends at step 10000" in told and "given with --steps" in told
    assert "until step 10,000" in told
    floor = {"en": {"min_share": 0.99}}
    mix = mix_in(place, [*SCHEDULE[:1], {"name": "end", "share": "rest"}], languages=floor)
    told = audited_phases(mix, built, None, 8).describe()
    assert "languages.en.min_share is 0.99" in told


def test_a_mix_without_phases_and_epochs_shows_nothing_of_them(place: Path) -> None:
    mix = mix_maker(place)(TEXTS, seq_len=64)
    built = BuiltData.open(place / "data" / "built", mix=mix)
    for shown in (audited_phases(mix, built, None, 8), audited_phases(mix, None, None, 8)):
        assert shown.describe() == ""
        assert "Over a run" not in page_of(shown)


def test_stages_have_a_table_each(tmp_path: Path) -> None:
    stages = [{"seq_len": 64, "share": 0.5}, {"seq_len": 128, "share": 0.5}]
    mix = mix_maker(tmp_path)(TEXTS, stages=stages, schedule=[{"name": "all", "share": 1.0}])
    build(mix, tmp_path / "out", progress=False)
    shown = audited_phases(mix, BuiltData.open(tmp_path / "out", mix=mix), None, 8)
    assert [table.title.split("; ")[1] for table in shown.tables] == [
        "stage 1, rows of 64",
        "stage 2, rows of 128",
    ]


def test_the_command_finds_the_build_and_shows_phases_on_terminal_and_page(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    mix_in(place, SCHEDULE)
    options = ["--documents", "3", "--workers", "1", "--steps", "40", "--out", "audit.html"]
    main(["audit", "in/mix.yaml", *options])  # its texts are in no language
    told = capsys.readouterr().out
    assert "phases over 40 steps of 8 rows" in told and "epochs at its end" in told
    page = (place / "audit.html").read_text(encoding="utf-8")
    assert "Factor of the phases on the learning rate" in page
    assert "phases over 40 steps of 8 rows" in page


def test_the_command_ends_where_two_builds_may_be_meant(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    mix_in(place, SCHEDULE)

    def find_build(*_: object) -> Path:
        raise ConfigError("data/first, data/second: each is a build.")

    monkeypatch.setattr("data_pipeline.__main__.notes_for_reading", lambda folder: object())
    monkeypatch.setattr("data_pipeline.__main__.find_build", find_build)
    main(["audit", "in/mix.yaml", "--documents", "3", "--workers", "1", "--out", "audit.html"])
    told = capsys.readouterr().out
    assert "each is a build. Nothing is known of what a build drops." in told
    assert (place / "audit.html").is_file()
