"""Every start of a run keeps its configuration, in text that people can read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import yaml

from cpt.config import RunConfig
from cpt.job.kept_config import keep_config


def config_of(**train: Any) -> RunConfig:
    plain = {"train": train, "telemetry": {"sample_prompts": ["\u6614\u3005"]}}
    return cast(RunConfig, SimpleNamespace(to_plain=lambda: plain))


def lr_in(path: Path) -> float:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["lr"]


def test_each_start_keeps_its_configuration_and_the_newest_has_the_known_name(
    tmp_path: Path,
) -> None:
    first = keep_config(tmp_path, config_of(lr=3e-3))
    second = keep_config(tmp_path, config_of(lr=1e-4))
    assert [first.name, second.name] == ["start-0001.yaml", "start-0002.yaml"]
    assert lr_in(first) == 3e-3
    assert lr_in(second) == lr_in(tmp_path / "config.resolved.yaml") == 1e-4


def test_configuration_of_a_run_that_an_older_version_began_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.resolved.yaml").write_text("train: {lr: 0.5}\n", encoding="utf-8")
    keep_config(tmp_path, config_of(lr=1e-4))
    keep_config(tmp_path, config_of(lr=1e-5))
    found = sorted((tmp_path / "configs").iterdir())
    assert [lr_in(file) for file in found] == [0.5, 1e-4, 1e-5]


def test_number_of_a_start_is_never_used_again(tmp_path: Path) -> None:
    keep_config(tmp_path, config_of(lr=1e-3))
    keep_config(tmp_path, config_of(lr=1e-4))
    (tmp_path / "configs" / "start-0001.yaml").unlink()
    assert keep_config(tmp_path, config_of(lr=1e-5)).name == "start-0003.yaml"


def test_japanese_is_written_as_people_read_it(tmp_path: Path) -> None:
    text = keep_config(tmp_path, config_of(lr=1e-3)).read_text(encoding="utf-8")
    assert "\u6614\u3005" in text and "\\u" not in text
