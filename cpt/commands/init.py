"""`cpt init`: write a project to edit, where there is no clone of the repository.

    DIR/configs/       run YAMLs, data mixes, prompts of the guard
    DIR/ds_configs/    DeepSpeed JSON
    DIR/slurm/         job templates, and env.sh with the settings of a site
    DIR/sample/        small Japanese and English texts, for configs/tiny.yaml
    DIR/docs/          JSON schemas, by which editors check the YAML
    DIR/logs/          output of jobs
    DIR/README.md      the first commands

Paths in the files are those of the repository; only the sample lies elsewhere.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.project_files import project_files, sample_folder
from cpt.errors import ConfigError
from data_pipeline.console.say import say

FOLDERS = ("configs", "ds_configs", "slurm")
SAMPLE_IN_REPOSITORY = "../../data_pipeline/sample/"
SAMPLE = "../../sample/"
DS_CONFIG = re.compile(r"--ds_config (ds_configs/\S+)")
README = """# {name}

Continual pretraining of gpt-oss, begun from `{preset}`.

    # check everything, then train, then look at it
    cpt train {gpus}--ds_config {ds_config} --config {config} --dry_run
    cpt train {gpus}--ds_config {ds_config} --config {config}
    cpt watch --root runs

1. `{config}` says what is trained: model, steps, learning rate, guard, checkpoints.
2. `{mix}` says on what: sources, shares, held-out text.
3. `slurm/env.sh` holds the settings of your site. Then, from this folder: `sbatch
   slurm/train.sbatch`, `qsub slurm/pbs/train.pbs` or `qsub slurm/age/train.sh`.

A number of processes (`--num_gpus 2`) is needed only where there is no GPU.
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("init", help="write a project to edit: YAML, JSON, job templates")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--preset",
        default="tiny",
        help="name of the run YAML to begin from, such as tiny or gpt-oss-20b",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    write_project(options.folder, options.preset)
    say(f"{options.folder} is ready. Its README.md has the first commands.")


def write_project(folder: Path, preset: str) -> None:
    """Write a project.

    Args:
        folder: Where it goes.
        preset: Stem of a file in configs/.

    Raises:
        ConfigError: there is something in the folder, no such preset, or no templates.
    """
    source = project_files().folder
    for name in FOLDERS:
        if not (source / name).is_dir():
            raise ConfigError(
                f"{source / name} is not there, which cpt init copies. Install gpt-oss-cpt again, "
                "or copy that folder of the repository there."
            )
    config = source / "configs" / f"{preset}.yaml"
    if not config.is_file():
        names = sorted(path.stem for path in (source / "configs").glob("*.yaml"))
        raise ConfigError(f"--preset {preset}: there is none. There are: {', '.join(names)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty. cpt init writes into a new folder only.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        shutil.copytree(
            source / name,
            folder / name,
            ignore=shutil.ignore_patterns("env.sh", "__pycache__"),
            dirs_exist_ok=True,
        )
    shutil.copytree(sample_folder(), folder / "sample")
    (folder / "docs").mkdir()
    (folder / "logs").mkdir()
    for schema in (source / "docs").glob("*.schema.json"):
        shutil.copy(schema, folder / "docs")
    for path in (folder / "configs").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(SAMPLE_IN_REPOSITORY, SAMPLE), encoding="utf-8")
    _write_settings(folder, preset, config.read_text(encoding="utf-8"))


def _write_settings(folder: Path, preset: str, config: str) -> None:
    """Write README.md and slurm/env.sh for a preset, whose comment names its DeepSpeed JSON."""
    named = DS_CONFIG.search(config)
    ds_config = named[1] if named else "ds_configs/z3_ulysses.json"
    mix = re.search(r"^  mix: (\S+)", config, re.MULTILINE)
    assert mix is not None, f"configs/{preset}.yaml names no mix"
    yaml = f"configs/{preset}.yaml"
    readme = README.format(
        name=folder.resolve().name,
        preset=preset,
        config=yaml,
        ds_config=ds_config,
        mix=f"configs/{mix[1]}",
        gpus="--num_gpus 2 " if preset == "tiny" else "",
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
    settings = (folder / "slurm" / "env.example.sh").read_text(encoding="utf-8")
    values = {
        "CPT_RUN_DIR": f"runs/{preset}",
        "CPT_CONFIG": yaml,
        "CPT_DS_CONFIG": ds_config,
        # the environment that has this package
        "CPT_VENV": sys.prefix,
    }
    for name, value in values.items():
        head, found, rest = settings.partition(f': "${{{name}:=')
        assert found, f"env.example.sh does not set {name}"
        settings = head + found + value + rest[rest.index("}") :]
    (folder / "slurm" / "env.sh").write_text(settings, encoding="utf-8")
