"""`cpt stage` copies what a run reads, says where it is, and leaves out what cannot be copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file
from transformers import GptOssConfig

from cpt.cli import main
from cpt.config import DataSection
from cpt.job import data as job_data
from cpt.job import engine_setup
from cpt.model.weights.checksums import write_sums
from cpt.model.weights.directory import DirectoryWeights
from cpt.storage.local_copies import VARIABLE, local_copy
from data_pipeline.build import found_builds
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.store.verification import NOTE_FILE


@pytest.fixture(scope="module", autouse=True)
def control_group() -> Iterator[Any]:
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with built data and a model that it starts from; its weights have known hashes."""
    folder = tmp_path_factory.mktemp("stage")
    texts = [json.dumps({"text": f"A text with the number {number}."}) for number in range(20)]
    (folder / "en.jsonl").write_text("\n".join(texts))
    source = {"name": "en", "language": "en", "path": "en.jsonl", "weight": 1.0, "domain": "en"}
    mix = {"seq_len": 64, "seed": 1, "sources": [source]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    build(load_mix(folder / "mix.yaml"), folder / "built")
    run = {"model": {"path": "model"}, "data": {"mix": "mix.yaml", "build_dir": "built"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    model = folder / "model"
    model.mkdir()
    save_file({"a": torch.ones(64)}, str(model / "model.safetensors"))
    write_sums(model, ["model.safetensors"])
    return folder


def staged(
    workplace: Path, to: Path, capsys: pytest.CaptureFixture[str], run_dir: str = "run"
) -> tuple[dict[str, str], str]:
    """Run the command; return what it printed and what it logged."""
    words = ["stage", "--config", str(workplace / "run.yaml"), "--to", str(to)]
    assert main([*words, "--run_dir", str(workplace / run_dir)]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def opened_by_a_run(workplace: Path, control_group: Any) -> BuiltData:
    """Open the data as a run does, on one rank."""
    section = DataSection(mix=workplace / "mix.yaml", build_dir=workplace / "built")
    context: Any = SimpleNamespace(
        config=SimpleNamespace(data=section, stage=0),
        mix=load_mix(workplace / "mix.yaml"),
        control_group=control_group,
    )
    return job_data.open_data(context)


def test_build_and_weights_are_read_from_the_copies_and_are_the_same(
    workplace: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, control_group: Any
) -> None:
    found, _ = staged(workplace, tmp_path, capsys)
    build, model = workplace / "built", workplace / "model"
    assert set(found) == {str(build), str(model)}
    monkeypatch.setenv(VARIABLE, json.dumps(found))
    opened = opened_by_a_run(workplace, control_group)
    assert opened.directory == local_copy(build) and opened.directory.is_relative_to(tmp_path)
    assert opened.manifest == BuiltData.open(build).manifest
    # a copy has no note of its own until it was verified
    assert (local_copy(build) / NOTE_FILE).is_file()
    names = {path.name for path in local_copy(model).iterdir()}
    assert names == {"model.safetensors", "SHA256SUMS"}
    # as a run opens its first weights, on one rank
    monkeypatch.setattr(engine_setup, "together", lambda group, call: call())
    monkeypatch.setattr(engine_setup, "parameter_shapes", lambda config: {"a": (64,)})
    run: Any = SimpleNamespace(model=SimpleNamespace(path=model))
    topology: Any = SimpleNamespace(control_group=None)
    weights = engine_setup.weight_source(run, GptOssConfig(), topology)
    assert isinstance(weights, DirectoryWeights) and weights.path == local_copy(model)
    ((_, values),) = weights.pieces("a", 0, 64)
    assert values.tolist() == [1.0] * 64


def test_damaged_copy_of_a_build_is_told_and_the_build_itself_is_read(
    workplace: Path,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    control_group: Any,
) -> None:
    found, _ = staged(workplace, tmp_path, capsys)
    monkeypatch.setenv(VARIABLE, json.dumps(found))
    (shard,) = local_copy(workplace / "built").rglob("*.tokens")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    opened = opened_by_a_run(workplace, control_group)
    assert opened.directory == workplace / "built"
    assert f"{shard}: content differs from the manifest" in caplog.text
    assert "All nodes read the build from shared storage" in caplog.text


def test_run_that_goes_on_from_a_checkpoint_copies_no_weights(
    workplace: Path, tmp_path: Path, capsys
) -> None:
    (workplace / "resumed" / "checkpoints" / "step-00000002").mkdir(parents=True)
    found, _ = staged(workplace, tmp_path, capsys, "resumed")
    assert set(found) == {str(workplace / "built")}


def test_mix_with_several_builds_is_told_which_they_are(
    workplace: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = yaml.safe_load((workplace / "run.yaml").read_text())
    del run["data"]["build_dir"]
    (workplace / "unnamed.yaml").write_text(yaml.safe_dump(run))
    builds = [tmp_path / "data" / name for name in ("first", "second")]
    monkeypatch.setattr(found_builds, "matching_builds", lambda mix: builds)
    words = ["stage", "--config", str(workplace / "unnamed.yaml"), "--to", str(tmp_path / "copy")]
    assert main([*words, "--run_dir", str(workplace / "run")]) == 0
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)) == {str(workplace / "model")}
    assert "mix.yaml has several builds, name one as data.build_dir: " in printed.err
    assert all(str(path) in printed.err for path in builds)


def test_model_of_the_guard_is_copied_until_it_is_measured(
    workplace: Path, tmp_path: Path, capsys
) -> None:
    run = yaml.safe_load((workplace / "run.yaml").read_text())
    shutil.copytree(workplace / "model", workplace / "release")
    (workplace / "run.yaml").write_text(
        yaml.safe_dump(run | {"guard": {"baseline_model": "release"}})
    )
    both = {str(workplace / "release"), str(workplace / "built")}
    found, _ = staged(workplace, tmp_path, capsys)
    assert set(found) == both | {str(workplace / "model")}
    # an imported adapter, which the run begins with
    step = workplace / "guarded" / "checkpoints" / "step-00000000"
    step.mkdir(parents=True)
    found, _ = staged(workplace, tmp_path, capsys, "guarded")
    assert set(found) == both
    step.rename(step.with_name("step-00000002"))
    found, _ = staged(workplace, tmp_path, capsys, "guarded")
    (workplace / "run.yaml").write_text(yaml.safe_dump(run))
    assert set(found) == {str(workplace / "built")}


def test_damaged_weights_are_told_and_left_to_the_run_on_shared_storage(
    workplace: Path, tmp_path: Path, capsys
) -> None:
    sums = workplace / "model" / "SHA256SUMS"
    right = sums.read_text()
    sums.write_text("0" * 64 + right[64:])
    found, said = staged(workplace, tmp_path, capsys)
    sums.write_text(right)
    assert set(found) == {str(workplace / "built")}
    assert "SHA-256 is" in said and "It is read from shared storage." in said
    assert not list(tmp_path.glob("model-*"))
