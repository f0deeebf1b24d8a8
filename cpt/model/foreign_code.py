"""What a model's directory offers to run or to fetch to the programs that serve and score it.

This project reads config.json, the weights and the control tokens of tokenizer.json, and runs none
of it.  vLLM and lm-evaluation-harness read the other files, too.  They run code of a directory only
when they are told to trust it, which nothing here does; a directory with code is refused all the
same before it is handed to them, so that one of their options or defaults cannot open the door.

Decisions
    Any architecture may be scored, so that results can be compared with those of other models. What
    a library does not know it refuses by itself, and what it knows is its own code.
    A Python file that no key names is never imported, and is left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpt.errors import ConfigError
from cpt.model.configuration_keys import implementation_problems, key_problems
from cpt.model.missing_model import CONFIG, why_no_model
from cpt.model.weights.hf_layout import ADAPTER_CONFIG, PICKLE_SUFFIXES, read_json
from data_pipeline.escaping import escaped_line

Json = dict[str, Any]

SETTINGS_FILES = "*_config.json"
"""Files beside config.json in which transformers may look for classes."""
CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines")
"""Their keys that name Python files."""
CODE_FOLDER = "custom_generate"
"""Folder whose generate.py transformers takes for the one that writes replies."""


def refuse_foreign_code(path: Path, option: str) -> None:
    """Refuse a directory that holds code for the programs that serve it, or has them fetch some.

    Its architecture may be another one, and its weights may be quantized in any way.

    Args:
        path: The directory.
        option: What a person has named it with.

    Raises:
        ConfigError: it has no config.json, or with every file and key that names code.
    """
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{option}: {why_no_model(path)}")
    values = read_json(path / CONFIG)
    problems = []
    for problem in [*key_problems(values), *_nested_problems(values)]:
        problems.append(f"{path / CONFIG}: {problem}")
    for file in sorted(path.glob(SETTINGS_FILES)):
        if file.name == ADAPTER_CONFIG or not file.exists():
            continue
        for problem in _code_problems(_objects_in(read_json(file))):
            problems.append(f"{escaped_line(file)}: {problem}")
    if (path / CODE_FOLDER).exists():
        problems.append(f"{path / CODE_FOLDER}: is code that is to write the replies. {_CURE}")
    if (path / ADAPTER_CONFIG).exists():
        problems.append(
            f"{path / ADAPTER_CONFIG}: is that of an adapter, for which another model is fetched. "
            "Merge it into its base model, and give the merged directory."
        )
    problems += _pickle_problems(path)
    if problems:
        raise ConfigError(problems)


def _nested_problems(values: Json) -> list[str]:
    """Return what the parts of a config.json name, such as the model of text in one of images."""
    parts = _objects_in(values)[1:]
    problems = _code_problems(parts)
    for part in parts:
        problems += implementation_problems(part)
    return list(dict.fromkeys(problems))


def _code_problems(objects: list[Json]) -> list[str]:
    """Return a problem for each key of any of the objects that names code."""
    problems = []
    for key in CODE_KEYS:
        if any(part.get(key) is not None for part in objects):
            problems.append(f"{key} names Python code. {_CURE}")
    return problems


def _objects_in(values: Json) -> list[Json]:
    """Return a JSON object and all those inside it; `read_json` has limited their number."""
    found = []
    waiting: list[Any] = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found.append(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return found


def _pickle_problems(path: Path) -> list[str]:
    """Return why a directory is refused whose weights are pickles only."""
    pickles = []
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            return []
        if file.suffix in PICKLE_SUFFIXES:
            pickles.append(escaped_line(file.name))
    if not pickles:
        return []
    return [f"{path}: its weights are pickles ({pickles[0]}), which can run code. {_SAFE_WEIGHTS}"]


_SAFE_WEIGHTS = "Convert them to safetensors, or fetch those of its makers."
_CURE = (
    "gpt-oss needs none: remove it, or fetch the model from its makers. An export of this project "
    "never holds any."
)
