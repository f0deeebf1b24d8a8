"""`cpt plan` shows the phases of a run's mix, and the weights that follow from its epochs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.cli import main
from cpt.commands import plan_report
from cpt.commands.plan_mix import describe_mix
from cpt.config import DataSection
from data_pipeline.build import found_builds
from data_pipeline.build.build import build
from tests.data_pipeline.conftest import mix_maker
from tests.data_pipeline.inputs import make_texts
from tests.support.launcher import ROOT

TEXTS = {"ja": make_texts(30, "j"), "en": make_texts(20, "e")}
ASKED = {"ja": {"epochs": 1}, "en": {"epochs": 2}}
PHASES: list[dict[str, Any]] = [
    {"name": "main", "share": 0.9},
    {"name": "end", "share": "rest", "weights": {"en": 1.0}, "to_lr_factor": 0},
]


def settings_of(folder: Path, build_dir: Path | None = None) -> DataSection:
    return DataSection(mix=folder / "in" / "mix.yaml", build_dir=build_dir)


def test_weights_are_those_of_the_build_where_there_is_one(tmp_path: Path) -> None:
    mix = mix_maker(tmp_path)(TEXTS, sources=ASKED, schedule=PHASES)
    told = describe_mix(settings_of(tmp_path, tmp_path / "none"))
    assert "epochs: ja 1, en 2; the weights follow from the tokens of a build" in told
    assert re.search(r"main +90% of the steps +en +by 2 epochs", told)
    build(mix, tmp_path / "out", progress=False)
    told = describe_mix(settings_of(tmp_path, tmp_path / "out"))
    assert re.search(r"weights follow from epochs: ja 1 \([\d.]+%\), en 2", told)
    assert re.search(r"main +90% of the steps +en +[\d.]+% ", told)
    assert re.search(r"end +the rest +en +100.00% +- +1 -> 0", told)
    mix_maker(tmp_path)(TEXTS, sources=ASKED, languages={"en": {"min_share": 0.99}})
    assert "languages.en.min_share is 0.99" in describe_mix(settings_of(tmp_path, tmp_path / "out"))


def test_several_builds_of_a_mix_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mix_maker(tmp_path)(TEXTS, sources=ASKED)
    builds = [tmp_path / "data" / name for name in ("first", "second")]
    monkeypatch.setattr(found_builds, "matching_builds", lambda mix: builds)
    told = describe_mix(settings_of(tmp_path))
    assert f"has several builds, name one as data.build_dir: {builds[0]}, {builds[1]}" in told


def test_a_mix_by_weights_and_one_that_cannot_be_read_add_nothing(tmp_path: Path) -> None:
    mix_maker(tmp_path)(TEXTS)
    assert describe_mix(settings_of(tmp_path)) == ""
    (tmp_path / "in" / "mix.yaml").write_text("sources: 3", encoding="utf-8")
    assert describe_mix(settings_of(tmp_path)) == ""
    assert describe_mix(settings_of(tmp_path / "nowhere")) == ""


def test_the_command_prints_it_before_the_assumptions(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_report, "_plan_rows", lambda *_: None)
    mix_maker(tmp_path)(TEXTS, sources=ASKED)
    run = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    run["data"] = {"mix": str(tmp_path / "in" / "mix.yaml"), "build_dir": str(tmp_path / "none")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    files = ["--config", str(tmp_path / "run.yaml")]
    files += ["--ds_config", str(ROOT / "ds_configs" / "z3_ulysses.json")]
    assert main(["plan", *files, "--gpus", "1"]) == 0
    told = capsys.readouterr().out
    assert told.index("epochs: ja 1, en 2") < told.index("assumptions")
