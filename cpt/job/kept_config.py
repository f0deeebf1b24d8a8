"""The resolved configuration of every start, kept in the run directory.

    config.resolved.yaml        that of the newest start; other programs read this one
    configs/start-0003.yaml     that of the third start; never written again
    configs/start-0000.yaml     only in a run that an older version began: its newest start

All are UTF-8, with text as people write it.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from cpt.config import RunConfig
from cpt.errors import ConfigError
from data_pipeline.bounded.files import read_small_file
from data_pipeline.config.strict_yaml import load_yaml
from data_pipeline.store.files import make_folder, write_text

NEWEST = "config.resolved.yaml"
FOLDER = "configs"
_START = re.compile(r"start-(\d{4,})\.yaml")


def keep_config(run_dir: Path, config: RunConfig) -> Path:
    """Write the configuration of a start, beside those of the starts before.

    Args:
        run_dir: The run directory; this process alone holds it.
        config: The configuration, with no `auto` left.

    Returns:
        The file of this start.
    """
    text = yaml.safe_dump(config.to_plain(), sort_keys=False, allow_unicode=True)
    newest = run_dir / NEWEST
    folder = run_dir / FOLDER
    if not folder.exists() and newest.exists():
        make_folder(folder)
        write_text(folder / "start-0000.yaml", read_small_file(newest, follow_links=False).decode())
    make_folder(folder)
    file = folder / f"start-{_last_start(folder) + 1:04d}.yaml"
    write_text(file, text)
    write_text(newest, text)
    return file


def kept_models(run_dir: Path) -> dict[str, Path]:
    """Return the models that the newest start has named, by key of the run YAML.

    A file that is missing or cannot be read gives none: a start depends on it only where a path of
    the run YAML means one of several checkpoints.
    """
    try:
        values = load_yaml(run_dir / NEWEST).value
    except ConfigError:
        return {}
    found = {}
    for key in ("model.path", "guard.baseline_model"):
        section, _, name = key.partition(".")
        block = values.get(section) if isinstance(values, dict) else None
        text = block.get(name) if isinstance(block, dict) else None
        if isinstance(text, str):
            found[key] = Path(text)
    return found


def _last_start(folder: Path) -> int:
    """Return the number of the newest start that is kept; 0 if there is none."""
    numbers = [0]
    for entry in folder.iterdir():
        match = _START.fullmatch(entry.name)
        if match:
            numbers.append(int(match.group(1)))
    return max(numbers)
