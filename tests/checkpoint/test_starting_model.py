"""A run starts from one checkpoint of another run, whatever that run does meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.checkpoint.lineage import LINEAGE_FILE, lineage_of_run, lineage_text
from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.starting_model import (
    check_starting_weights,
    is_checkpoint,
    located,
    unfinished_warning,
    weight_files,
)
from cpt.config import ModelSection, RunConfig
from cpt.errors import CheckpointError, ConfigError
from tests.support.checkpoints import TENSORS, write_checkpoint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10 and 20, the newer of which lacks a file."""
    run_dir = tmp_path / "cpt"
    write_checkpoint(run_dir, 10)
    newest = write_checkpoint(run_dir, 20)
    (newest / "__1_0.distcp").unlink()
    return run_dir


def test_run_directory_means_its_newest_complete_checkpoint(run_dir: Path) -> None:
    assert located(run_dir) == step_folder(run_dir, 10)


def test_step_of_a_run_is_the_checkpoint_of_that_step(run_dir: Path) -> None:
    write_checkpoint(run_dir, 30)
    assert located(run_dir.with_name("cpt@10")) == step_folder(run_dir, 10)
    with pytest.raises(ConfigError, match=r"model\.path: .* no checkpoint of step 15"):
        located(run_dir.with_name("cpt@15"))
    with pytest.raises(ConfigError, match=r"guard\.baseline_model: .*__1_0\.distcp: missing"):
        located(run_dir.with_name("cpt@20"), "guard.baseline_model")


def test_later_start_keeps_the_checkpoint_of_the_first_one(run_dir: Path) -> None:
    kept = located(run_dir)
    write_checkpoint(run_dir, 30)
    assert located(run_dir) == step_folder(run_dir, 30)
    assert located(run_dir, kept=kept) == kept
    other = step_folder(run_dir.with_name("other"), 10)
    assert located(run_dir, kept=other) == step_folder(run_dir, 30)


def test_model_directory_is_no_run_though_its_name_looks_like_one(tmp_path: Path) -> None:
    folder = tmp_path / "model@7"
    folder.mkdir()
    assert located(folder) == folder and not is_checkpoint(folder)
    assert located(tmp_path / "absent@7") == tmp_path / "absent@7"


def test_run_that_has_saved_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"has no complete checkpoint .* saved none yet"):
        located(tmp_path)


def test_checkpoint_is_known_by_its_manifest_and_must_hold_the_tensors(run_dir: Path) -> None:
    folder = step_folder(run_dir, 10)
    assert weight_files(folder) == [folder / MANIFEST]
    shapes = {name: record.shape for name, record in TENSORS.items()}
    check_starting_weights(folder, shapes)
    with pytest.raises(CheckpointError, match=r"key 'model\.norm\.weight' is unknown"):
        check_starting_weights(folder, {"lm_head.weight": (96, 64)})
    (folder / "__0_0.distcp").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="3 bytes, manifest says"):
        check_starting_weights(folder, shapes)


def test_checkpoint_that_its_run_may_delete_is_told_with_the_cure(run_dir: Path) -> None:
    told = unfinished_warning(step_folder(run_dir, 10))
    assert f"cpt export --run_dir {run_dir} --step 10" in told
    assert unfinished_warning(run_dir) == ""


def config_of(path: Path) -> RunConfig:
    """Return a configuration of which only the model is looked at."""
    config: RunConfig = RunConfig.__new__(RunConfig)
    object.__setattr__(config, "model", ModelSection(path=path))
    return config


def test_lineage_goes_through_exports_and_runs(run_dir: Path, tmp_path: Path) -> None:
    lineage = lineage_of_run(config_of(step_folder(run_dir, 10)))
    assert lineage == [{"name": "cpt", "steps": 10, "tokens": 123}]
    export = tmp_path / "export"
    export.mkdir()
    assert lineage_of_run(config_of(export)) == [{"name": "export"}]
    models = [{"name": "gpt-oss-20b"}, *lineage]
    (export / LINEAGE_FILE).write_text(json.dumps({"models": models}))
    assert lineage_of_run(config_of(export)) == models
    told = "`cpt` (10 steps, 123 predicted tokens), which started from `gpt-oss-20b`"
    assert lineage_text(models, quote="`") == told


@pytest.mark.parametrize("models", [None, [], ["x"], [{"name": 1}], [{"name": "x", "steps": 1}]])
def test_lineage_of_others_that_is_none_is_refused(models: object, tmp_path: Path) -> None:
    (tmp_path / LINEAGE_FILE).write_text(json.dumps({"models": models}))
    with pytest.raises(ConfigError, match="'models' is no list of objects"):
        lineage_of_run(config_of(tmp_path))
