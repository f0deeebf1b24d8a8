"""Adapters in whole runs: trained, exported, imported and gone on with, as users start them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import list_steps, step_folder
from cpt.cli import main
from cpt.model.adapters.layout import is_adapter_name
from cpt.model.weights.hf_layout import ADAPTER_CONFIG, ADAPTER_FILE
from tests.support.launcher import ROOT, free_port, rank_environment, start

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RUN = ROOT / "cpt" / "run.py"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter-run")
    sources = []
    for name, language in (("ja_essay", "ja"), ("en_web", "en")):
        source = {"name": name, "language": language, "domain": name, "weight": 0.5}
        source["path"] = str(ROOT / "data_pipeline" / "sample" / f"{name}.jsonl")
        sources.append({**source, "held_out_share": 0})
    mix = {"seq_len": 128, "seed": 1, "sources": sources}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    run: dict[str, Any] = {
        "model": {"init": "tiny"},
        "data": {"mix": "mix.yaml"},
        "adapter": {"kind": "lora", "rank": 16, "alpha": 32.0},
        "train": {"seq_len": 128, "global_batch_size": 2, "total_steps": 2, "lr": 1e-2},
        "guard": {"enabled": False},
        "telemetry": {"export_at_end": True},
    }
    run["train"] |= {"weight_decay": 0.0, "schedule": "constant"}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    ds = {"zero_optimization": {"stage": 3}, "expert_parallel": {"enabled": True, "autoep_size": 2}}
    (folder / "two.json").write_text(json.dumps(ds))
    (folder / "one.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    return folder


def finish(workplace: Path, run_dir: str, num_ranks: int, *settings: str) -> tuple[list[int], str]:
    """Do a run on one or two ranks; return exit codes and the first rank's output."""
    words = ["--ds_config", {1: "one.json", 2: "two.json"}[num_ranks]]
    words += ["--config", "run.yaml", "--run_dir", run_dir]
    for setting in settings:
        words += ["--set", setting]
    port = free_port()
    places = [rank_environment(rank, num_ranks, port) for rank in range(num_ranks)]
    codes, outputs = start(RUN, words, places, workplace).wait()
    return codes, outputs[0]


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    codes, output = finish(workplace, "trained", 2)
    assert codes == [0, 0], output
    return workplace / "trained"


def test_checkpoint_holds_the_adapter_alone_and_the_export_is_it(trained: Path) -> None:
    tensors = read_manifest(step_folder(trained, 2)).tensors
    assert tensors and all(map(is_adapter_name, tensors))
    assert (trained / "export" / "step-00000002" / ADAPTER_CONFIG).is_file()


def test_an_import_without_a_step_of_training_is_exported_as_the_same_bytes(
    workplace: Path, trained: Path
) -> None:
    source = trained / "export" / "step-00000002"
    config = str(workplace / "run.yaml")
    imported = str(workplace / "imported")
    assert main(["import-adapter", str(source), "--config", config, "--run_dir", imported]) == 0
    codes, output = finish(workplace, "imported", 2, "train.total_steps=0")
    assert codes == [0, 0], output
    again = workplace / "imported" / "export" / "step-00000000" / ADAPTER_FILE
    assert again.read_bytes() == (source / ADAPTER_FILE).read_bytes()
    codes, output = finish(workplace, "imported", 1, "train.total_steps=1")
    assert codes == [0], output
    assert list_steps(workplace / "imported") == [1, 0]
    trained_on = workplace / "imported" / "export" / "step-00000001" / ADAPTER_FILE
    assert trained_on.read_bytes() != again.read_bytes()


def test_another_base_or_adapter_is_refused_before_weights_are_read(
    workplace: Path, trained: Path
) -> None:
    codes, output = finish(workplace, "trained", 1, "train.seed=5", "adapter.rank=32")
    assert codes == [78]
    assert "is an adapter of another base" in output
    assert "has adapter.rank 16, now it is 32." in output


def test_run_goes_on_in_another_layout(workplace: Path, trained: Path) -> None:
    codes, output = finish(workplace, "trained", 1, "train.total_steps=3")
    assert codes == [0], output
    assert list_steps(trained)[0] == 3
