"""The card of an adapter says on which base to load it; `--base` takes what `model.path` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.checkpoint.manifest import TensorRecord
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.writer import write_alone
from cpt.cli import main
from cpt.commands.early_checks import base_problems
from cpt.commands.shared_options import located_base
from cpt.config.adapter_section import AdapterSection
from cpt.export.huggingface import export_checkpoint
from cpt.export.run_export import UNROUNDED, UNROUNDED_BASE
from cpt.model.weights.hf_layout import ADAPTER_CONFIG, holds_blocks
from tests.dist.cases import model_config, reference_model
from tests.support.adapters import write_adapter

SECTION = AdapterSection(kind="lora", rank=8, alpha=16.0)
ON_MXFP4 = "over the MXFP4 weights that it was trained on, without rounding anything again"


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint of a whole model."""
    run_dir = tmp_path_factory.mktemp("card") / "pretrained"
    tensors = {}
    records = {}
    for name, value in reference_model(expert_size=64).state_dict().items():
        tensors[f"master/{name}"] = value.float()
        records[name] = TensorRecord(shape=tuple(value.shape), dtype="float32", trained=False)
    state = RunState(model_config=model_config(expert_size=64).to_dict())
    write_alone(run_dir, 2, tensors, records, state.to_json())
    return run_dir


@pytest.fixture
def run_dir(base_run: Path, tmp_path: Path) -> Path:
    """A run of an adapter over that checkpoint."""
    write_adapter(
        tmp_path / "run",
        step_folder(base_run, 2),
        SECTION,
        model_config(expert_size=64),
        dtype="bf16",
    )
    return tmp_path / "run"


def exported(run_dir: Path, format_name: str, *options: str) -> tuple[int, Path]:
    """Export a run and return the exit code and the directory."""
    out = run_dir.with_name(f"{run_dir.name}-{format_name}")
    command = ["export", "--run_dir", str(run_dir), "--out", str(out), "--format", format_name]
    return main([*command, *options]), out


def test_base_that_is_a_checkpoint_is_to_be_exported_first(run_dir: Path) -> None:
    code, out = exported(run_dir, "peft")
    assert code == 0
    card = (out / "README.md").read_text()
    command = "cpt export --run_dir pretrained --step 2 --out BASE --format bf16"
    assert f"BASE is the bf16 export of `pretrained` at step 2: `{command}`." in card
    assert 'from_pretrained("BASE", dtype="bfloat16")' in card
    assert "vllm serve BASE --enable-lora" in card
    assert "MXFP4" not in card and "Mxfp4Config" not in card
    assert json.loads((out / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] is None


def test_base_may_be_a_run_or_a_checkpoint_wherever_it_lies(
    base_run: Path, run_dir: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    base_run.rename(moved)
    try:
        assert exported(run_dir, "bf16")[0] == 78
        for base in (moved, Path(f"{moved}@2"), step_folder(moved, 2)):
            assert base_problems(base) == []
            assert located_base(base) == step_folder(moved, 2)
        code, out = exported(run_dir, "bf16", "--base", f"{moved}@2")
        assert code == 0 and (out / "config.json").is_file()
    finally:
        moved.rename(base_run)


def test_card_of_a_rounded_model_names_the_base_of_its_adapter(run_dir: Path) -> None:
    code, out = exported(run_dir, "mxfp4", "--score", "never")
    assert code == 0
    card = (out / "README.md").read_text()
    assert UNROUNDED_BASE in card and UNROUNDED not in card
    lineage = json.loads((out / "lineage.json").read_text())["models"]
    assert lineage[-1]["format"] == "mxfp4"


@pytest.mark.parametrize("base", ["bf16", "mxfp4"])
def test_adapter_over_mxfp4_weights_is_served_over_them(
    base_run: Path, tmp_path: Path, base: str
) -> None:
    packed = export_checkpoint(step_folder(base_run, 2), tmp_path / "packed", "mxfp4")
    assert holds_blocks(packed) and not holds_blocks(base_run)
    section = AdapterSection(kind="lora", rank=8, alpha=16.0, base=base)
    write_adapter(tmp_path / "run", packed, section, model_config(expert_size=64), dtype="bf16")
    code, out = exported(tmp_path / "run", "peft")
    assert code == 0
    card = (out / "README.md").read_text()
    assert ON_MXFP4 in card and "Mxfp4Config(dequantize=True)" in card
    assert "vllm serve packed --enable-lora" in card
    assert json.loads((out / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == "packed"
