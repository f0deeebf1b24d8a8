"""`train.optimizer: muon` is refused where Muon would train nothing, or what it is not for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GptOssConfig

from cpt.config import LaunchInfo, load, resolve_stages
from cpt.errors import ConfigError
from cpt.model.configuration import PRESETS
from cpt.model.freezing import muon_problems
from cpt.model.parameters import parameter_shapes


def problems(
    folder: Path, train: dict[str, Any], json_keys: dict[str, Any] | None = None, **sections: Any
) -> list[str]:
    """Return what is refused of a run of the tiny model."""
    steps = {"seq_len": 1024, "global_batch_size": 8, "total_steps": 40, "lr": 1e-5}
    content = {"model": {"init": "tiny"}, "data": {"mix": "mix.yaml"}, "train": {**steps, **train}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**content, **sections}), encoding="utf-8")
    engine = {"zero_optimization": {"stage": 3}, **(json_keys or {})}
    (folder / "ds.json").write_text(json.dumps(engine), encoding="utf-8")
    try:
        run, located = load(folder / "run.yaml", folder / "ds.json", {})
        launch = LaunchInfo(world_size=1, local_world_size=1)
        resolve_stages(run, located, GptOssConfig(**PRESETS["tiny"]), launch)
    except ConfigError as error:
        return list(error.problems)
    return []


def test_muon_is_accepted_with_and_without_settings_of_its_own(tmp_path: Path) -> None:
    assert problems(tmp_path, {"optimizer": "muon"}) == []
    assert problems(tmp_path, {"optimizer": "muon", "muon": {"momentum": 0.9}}) == []


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("momentum", 1.0, "must be in [0, 1)"),
        ("newton_schulz_steps", 0, "must be between 1 and 20"),
        ("newton_schulz_steps", 500, "must be between 1 and 20"),
        ("update_rms", 0.0, "must be in (0, 1]"),
        ("update_rms", 2.0, "must be in (0, 1]"),
    ],
)
def test_settings_that_cannot_train_are_refused(
    tmp_path: Path, key: str, value: float, told: str
) -> None:
    (found,) = problems(tmp_path, {"optimizer": "muon", "muon": {key: value}})
    assert f"train.muon.{key} is {value}, {told}" in found


def test_settings_of_muon_without_muon_are_refused(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {"muon": {"update_rms": 0.3}})
    assert "train.muon.update_rms is 0.3, but train.optimizer is adamw" in found


def test_narrow_moments_are_not_for_muon(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {"optimizer": "muon", "optimizer_state": "bf16"})
    assert "matrices have one momentum, which is fp32" in found


def test_adapters_are_not_for_muon(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {"optimizer": "muon"}, adapter={"kind": "lora"})
    assert "Muon would orthogonalize the factors A and B" in found


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_an_optimizer_block_of_deepspeed_beside_muon_is_refused(tmp_path: Path, name: str) -> None:
    (found,) = problems(tmp_path, {"optimizer": "muon"}, {"optimizer": {"type": name}})
    assert "train.optimizer is muon, whose settings are in train.*" in found


def test_a_run_whose_matrices_are_all_frozen_is_refused() -> None:
    names = list(parameter_shapes(GptOssConfig(**PRESETS["tiny"])))
    (found,) = muon_problems("muon", ("experts", "attention"), names)
    assert "Muon trains nothing else" in found
    assert muon_problems("muon", ("experts",), names) == []
    assert muon_problems("adamw", ("experts", "attention"), names) == []
