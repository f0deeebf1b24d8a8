"""The wheel alone trains: no clone of the repository is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.launcher import ROOT, free_port

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of a copy of the repository, which building must not touch."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in files.stdout.decode().split("\0"):
        if name and not name.startswith(("tests/", "bench/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(source)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_brings_the_templates_and_what_the_packages_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "ds_configs", "slurm"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and name != "slurm/env.sh":
                assert f"cpt/project/{name}" in names
    for package in ("cpt", "data_pipeline"):
        for path in (ROOT / package).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in name:
                assert name in names
    assert not [name for name in names if name.startswith(("tests/", "bench/"))]


@pytest.mark.slow
def test_project_of_an_installed_wheel_trains(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def cpt(folder: Path, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cpt.cli", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    cpt(tmp_path, "init", "project")
    project = tmp_path / "project"
    words = ["train", "--num_gpus", "1", "--master_port", str(free_port())]
    words += ["--ds_config", "ds_configs/z3_ulysses.json", "--set", "train.total_steps=4"]
    assert "is not built yet" in cpt(project, *words, "--dry_run")
    cpt(project, *words)
    assert "finished" in cpt(project, "status", "--run_dir", "runs/tiny")
    assert not (site / "runs").exists()
