"""A run starts from one checkpoint of another run, whatever that run does meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpt.checkpoint.lineage import LINEAGE_FILE, lineage_of_run, lineage_text, lineage_with
from cpt.checkpoint.manifest import MANIFEST, read_manifest
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.starting_model import (
    check_starting_weights,
    located,
    masters_warning,
    own_checkpoint_problems,
    unfinished_warning,
    weight_files,
)
from cpt.config import ModelSection, RunConfig
from cpt.errors import CheckpointError, ConfigError
from cpt.model.missing_model import is_checkpoint
from tests.support.checkpoints import TENSORS, sign_again, write_checkpoint


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
    for name in ("checkpoints", "config.resolved.yaml", "metrics.jsonl"):
        run_dir = tmp_path / name
        (run_dir / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match=r"has no complete checkpoint .* saved none yet"):
            located(run_dir)
        with pytest.raises(ConfigError, match="has no checkpoint of step 7; it has none at all"):
            located(tmp_path / f"{name}@7")


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
    assert (
        "Before this run trains, either raise checkpoint.keep_last of that run, or export" in told
    )
    assert f"as model.path: cpt export --run_dir {run_dir} --step 10" in told
    assert unfinished_warning(run_dir) == ""


def test_a_run_that_rounded_its_experts_is_told_to_be_read_by_its_masters(run_dir: Path) -> None:
    folder = step_folder(run_dir, 10)
    assert masters_warning("model.path", folder) == ""
    assert masters_warning("model.path", run_dir) == ""
    sign_again(folder, lambda manifest: manifest["state"].update(quantize={"exponent": "ceil"}))
    told = masters_warning("guard.baseline_model", folder)
    assert told.startswith(f"guard.baseline_model: the run of {folder} rounded its experts")
    assert f"cpt export --run_dir {run_dir} --step 10 --out DIRECTORY --format mxfp4" in told


def test_copy_of_a_checkpoint_belongs_to_no_run(run_dir: Path, tmp_path: Path) -> None:
    folder = step_folder(run_dir, 10)
    copy = tmp_path / "somewhere" / "kept"
    shutil.copytree(folder, copy)
    assert located(copy) == copy and is_checkpoint(copy)
    assert unfinished_warning(copy) == ""
    assert lineage_of_run(config_of(copy)) == [{"name": "kept", "steps": 10, "tokens": 123}]

    def adapted(manifest: dict[str, Any]) -> None:
        manifest["state"]["adapter"] = {}

    sign_again(copy, adapted)
    with pytest.raises(ConfigError, match="cpt export --run_dir RUN --step 10"):
        check_starting_weights(copy, {})
    sign_again(folder, adapted)
    with pytest.raises(ConfigError, match=f"cpt export --run_dir {run_dir} --step 10"):
        check_starting_weights(folder, {})


def test_checkpoint_of_the_run_itself_is_no_beginning(run_dir: Path) -> None:
    folder = step_folder(run_dir, 10)
    assert own_checkpoint_problems("model.path", folder, run_dir.with_name("other")) == []
    (problem,) = own_checkpoint_problems("model.path", folder, run_dir)
    assert problem.startswith(f"model.path: {folder} is a checkpoint of this run itself")


def config_of(path: Path) -> RunConfig:
    """Return a configuration of which only the model is looked at."""
    config: RunConfig = RunConfig.__new__(RunConfig)
    object.__setattr__(config, "model", ModelSection(path=path))
    return config


def test_lineage_tells_that_a_base_was_rounded(run_dir: Path, tmp_path: Path) -> None:
    manifest = read_manifest(step_folder(run_dir, 10))
    models = lineage_with(manifest, "cpt", is_rounded=True)
    assert models == [{"name": "cpt", "steps": 10, "tokens": 123, "format": "mxfp4"}]
    (tmp_path / LINEAGE_FILE).write_text(json.dumps({"models": models}))
    assert lineage_of_run(config_of(tmp_path)) == models
    assert lineage_text(models) == "cpt (10 steps, 123 predicted tokens, rounded to MXFP4)"
    (tmp_path / LINEAGE_FILE).write_text(json.dumps({"models": [models[0] | {"format": [1]}]}))
    assert "format" not in lineage_of_run(config_of(tmp_path))[0]


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
