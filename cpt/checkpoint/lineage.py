"""The models that a run's first weights came from, the oldest first.

A checkpoint keeps them in its state, and an export in `lineage.json`, so that a model that was
pretrained and then fine-tuned says so in its model card. They hold names of folders and numbers
only: paths of the training machine stay out of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt.checkpoint.manifest import Manifest, read_manifest
from cpt.checkpoint.run_state import RunState
from cpt.config import RunConfig
from cpt.errors import ConfigError
from cpt.model.missing_model import is_checkpoint, run_of
from cpt.model.weights.hf_layout import read_json
from data_pipeline.escaping import escaped_line

LINEAGE_FILE = "lineage.json"
MAX_ANCESTORS = 100
ROUNDED = "mxfp4"
"""`format` of a run whose trained weights were rounded before the next run started from them."""
Json = dict[str, Any]


def lineage_of_run(config: RunConfig) -> list[Json]:
    """Return the models that the first weights of a run came from.

    Returns:
        For each `name`, and of a run of this project also `steps` and `tokens`, and `format` if an
        export of it was rounded.

    Raises:
        CheckpointError: the checkpoint that the run starts from is damaged.
        ConfigError: the lineage of an export is not readable.
    """
    path = config.model.path
    if path is None:
        return [{"name": f"random weights ({config.model.init})"}]
    if is_checkpoint(path):
        run_dir = run_of(path)
        return lineage_with(read_manifest(path), path.name if run_dir is None else run_dir.name)
    file = path / LINEAGE_FILE
    if file.is_file():
        return _checked(read_json(file).get("models"), file)
    return [{"name": path.name}]


def lineage_of_checkpoint(manifest: Manifest) -> list[Json]:
    """Return what the first weights of a checkpoint's run came from; empty if it does not say."""
    state = RunState.of(manifest)
    if state.lineage:
        return [dict(one) for one in state.lineage]
    model = (state.config or {}).get("model") or {}
    if model.get("path"):
        return [{"name": Path(model["path"]).name}]
    if model.get("init"):
        return [{"name": f"random weights ({model['init']})"}]
    return []


def lineage_with(manifest: Manifest, name: str, *, is_rounded: bool = False) -> list[Json]:
    """Return the lineage of what starts from a checkpoint: that of its run, and the run itself.

    Args:
        manifest: The checkpoint's manifest.
        name: Name of the run.
        is_rounded: Whether it starts from an export in MXFP4.
    """
    tokens = (RunState.of(manifest).progress or {}).get("tokens", 0)
    last: Json = {"name": name, "steps": manifest.step, "tokens": tokens}
    if is_rounded:
        last["format"] = ROUNDED
    return [*lineage_of_checkpoint(manifest), last]


def lineage_text(lineage: Sequence[Mapping[str, Any]], quote: str = "") -> str:
    """Return a lineage in words, the newest model first.

    Args:
        lineage: See `lineage_of_run`.
        quote: Stands before and after every name.
    """
    parts = []
    for one in reversed(lineage):
        text = f"{quote}{one['name']}{quote}"
        if "steps" in one:
            text += f" ({one['steps']:,} steps, {one['tokens']:,} predicted tokens"
            text += ", rounded to MXFP4)" if one.get("format") == ROUNDED else ")"
        parts.append(text)
    return ", which started from ".join(parts)


def _checked(models: Any, file: Path) -> list[Json]:
    """Return the models that a file of others names, after a check of their types.

    Raises:
        ConfigError: it is no list of objects with `name`, `steps` and `tokens`.
    """
    is_list = isinstance(models, list) and 0 < len(models) <= MAX_ANCESTORS
    found = []
    for one in models if is_list else []:
        name = one.get("name") if isinstance(one, dict) else None
        counts = {}
        for key in ("steps", "tokens"):
            if isinstance(one, dict) and key in one:
                counts[key] = one[key]
        is_counted = all(type(count) is int and count >= 0 for count in counts.values())
        if not isinstance(name, str) or len(counts) == 1 or not is_counted:
            is_list = False
            break
        told = {"name": escaped_line(name, 200), **counts}
        if counts and one.get("format") == ROUNDED:
            told["format"] = ROUNDED
        found.append(told)
    if not is_list:
        raise ConfigError(
            f"{file}: 'models' is no list of objects with name, steps and tokens. Remove the file, "
            "or fetch it again."
        )
    return found
