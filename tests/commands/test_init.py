"""`cpt init` writes a project that works where there is no repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from cpt.cli import main
from cpt.commands.project_files import ProjectFiles, project_files
from data_pipeline.config.mix_file import load_mix

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "project"
    assert main(["init", str(folder)]) == 0
    return folder


def test_every_template_is_there_and_no_settings_of_a_site(project: Path) -> None:
    for folder in ("configs", "ds_configs", "slurm"):
        expected = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        expected.discard(Path("slurm/env.sh"))
        found = {path.relative_to(project) for path in (project / folder).rglob("*")}
        assert expected <= found
    assert (project / "logs").is_dir()  # Slurm does not make the folder of its output


def test_mixes_name_the_sample_where_it_was_put(project: Path) -> None:
    mix = load_mix(project / "configs" / "mixes" / "sample.yaml")
    for source in mix.sources:
        for path in source.path if isinstance(source.path, tuple) else (source.path,):
            assert Path(path).resolve().is_relative_to(project.resolve())
            assert Path(path).is_file()
    for path in project.rglob("*.yaml"):
        assert "data_pipeline" not in re.sub(r"^ *#.*$", "", path.read_text(), flags=re.MULTILINE)


def test_schemas_lie_where_the_first_line_of_each_yaml_says(project: Path) -> None:
    for path in (project / "configs").rglob("*.yaml"):
        named = re.match(r"# yaml-language-server: \$schema=(\S+)", path.read_text())
        if named:
            assert (path.parent / named[1]).is_file(), path


@pytest.mark.parametrize(
    ("preset", "ds_config"),
    [("tiny", "ds_configs/z3_ulysses.json"), ("gpt-oss-20b-32k", "ds_configs/z3_ulysses_sp4.json")],
)
def test_commands_and_settings_are_those_of_the_preset(
    preset: str, ds_config: str, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    assert main(["init", str(folder), "--preset", preset]) == 0
    readme = (folder / "README.md").read_text()
    assert f"--ds_config {ds_config} --config configs/{preset}.yaml --dry_run" in readme
    settings = (folder / "slurm" / "env.sh").read_text()
    for name, value in (
        ("CPT_CONFIG", f"configs/{preset}.yaml"),
        ("CPT_DS_CONFIG", ds_config),
        ("CPT_RUN_DIR", f"runs/{preset}"),
        ("CPT_VENV", sys.prefix),
    ):
        assert f': "${{{name}:={value}}}"' in settings
    run = yaml.safe_load((folder / "configs" / f"{preset}.yaml").read_text())
    mix = f"configs/{run['data']['mix']}"
    assert (folder / mix).is_file() and mix in readme


def test_folder_with_something_in_it_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert main(["init", str(tmp_path)]) == 78
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_installation_without_templates_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("configs", "ds_configs"):
        (tmp_path / "image" / name).mkdir(parents=True)
    files = ProjectFiles(folder=tmp_path / "image", is_repository=True)
    monkeypatch.setattr("cpt.commands.init.project_files", lambda: files)
    assert main(["init", str(tmp_path / "project")]) == 78
    assert "image/slurm is not there" in capsys.readouterr().err
    assert not (tmp_path / "project").exists()


def test_unknown_preset_names_those_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "project"), "--preset", "huge"]) == 78
    assert "gpt-oss-120b-4k-16gpu" in capsys.readouterr().err
    assert not (tmp_path / "project").exists()


def test_repository_is_its_own_template() -> None:
    files = project_files()
    assert files.is_repository and files.folder == ROOT
