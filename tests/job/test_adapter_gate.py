"""A run with an adapter goes on from the adapter that it was configured for, on the same base."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cpt.checkpoint.adapter_state import AdapterBase
from cpt.checkpoint.manifest import read_manifest, write_manifest
from cpt.config.adapter_section import AdapterSection
from cpt.model.configuration import load_config
from tests.job.test_gate import DryRun, dry_run, workplace
from tests.support.adapters import write_adapter

__all__ = ["dry_run", "workplace"]
SECTION = AdapterSection(kind="lora", rank=8, alpha=4.0)
SETTINGS = ("adapter.kind=lora", "adapter.rank=8", "adapter.alpha=4.0", "guard.enabled=false")


@pytest.fixture
def imported(workplace: Path) -> Iterator[Path]:
    """The folder of an imported adapter, which is the checkpoint of step 0."""
    config = load_config(workplace / "weights", None)
    write_adapter(workplace / "run", workplace / "weights", SECTION, config, step=0, imported=True)
    yield workplace / "run" / "checkpoints" / "step-00000000"
    shutil.rmtree(workplace / "run")


def test_run_begins_with_an_imported_adapter(dry_run: DryRun, imported: Path, capsys: Any) -> None:
    assert dry_run(*SETTINGS) == 0
    printed = capsys.readouterr().out
    assert "resolved configuration" in printed and "drawn tokens" in printed


def test_other_adapter_and_other_base_are_refused_with_both_values(
    dry_run: DryRun, imported: Path, workplace: Path, capsys: Any
) -> None:
    other = workplace / "other"
    shutil.copytree(workplace / "weights", other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert dry_run(*SETTINGS, "adapter.rank=16", f"model.path={other}") == 78
    told = capsys.readouterr().err
    assert "step-00000000 has adapter.rank 8, now it is 16." in told
    config = load_config(other, None)
    for path in (other, workplace / "weights"):
        assert AdapterBase.of(path, 0, config).hash in told


def test_copy_of_the_base_is_the_base(dry_run: DryRun, imported: Path, workplace: Path) -> None:
    shutil.copytree(workplace / "weights", workplace / "copy")
    assert dry_run(*SETTINGS, f"model.path={workplace / 'copy'}") == 0


def test_adapter_under_a_run_without_one_and_the_reverse_are_refused(
    dry_run: DryRun, imported: Path, capsys: Any
) -> None:
    assert dry_run("guard.enabled=false") == 78
    assert "step-00000000 holds an adapter, and adapter.kind is none." in capsys.readouterr().err
    manifest = read_manifest(imported)
    manifest.state["adapter"] = None
    write_manifest(imported, manifest)
    assert dry_run(*SETTINGS) == 78
    assert "holds a whole model, and the run has an adapter." in capsys.readouterr().err


def test_trained_adapter_under_another_dtype_is_refused(
    dry_run: DryRun, workplace: Path, capsys: Any
) -> None:
    config = load_config(workplace / "weights", None)
    write_adapter(workplace / "run", workplace / "weights", SECTION, config, dtype="bf16")
    codes = [dry_run(*SETTINGS, f"train.dtype={dtype}") for dtype in ("fp32", "bf16")]
    shutil.rmtree(workplace / "run")
    told = capsys.readouterr().err
    assert codes[0] == 78
    assert told.count("has train.dtype bf16") == 1 and "Give train.dtype: bf16." in told
