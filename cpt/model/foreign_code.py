"""Code that a model's directory offers to the programs that serve and score it.

This project reads config.json, the weights and the control tokens of tokenizer.json, and runs none
of it.  vLLM and lm-evaluation-harness read the other files, too.  They run code of a directory only
when they are told to trust it, which nothing here does; a directory with code is refused all the
same before it is handed to them, so that one of their options or defaults cannot open the door.
"""

from __future__ import annotations

from pathlib import Path

from cpt.errors import ConfigError
from cpt.model.configuration_keys import key_problems
from cpt.model.missing_model import CONFIG, why_no_model
from cpt.model.weights.hf_layout import read_json

SETTINGS_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "adapter_config.json",
)
"""Files beside config.json that transformers looks into for classes."""
CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines")
"""Their keys that name Python files."""
CODE_FOLDER = "custom_generate"
"""Folder whose generate.py transformers takes for the one that writes replies."""


def refuse_foreign_code(path: Path, option: str) -> None:
    """Refuse a directory that holds code for the programs that serve it.

    Its weights may be quantized in ways that this project does not read.

    Args:
        path: The directory.
        option: What a person has named it with.

    Raises:
        ConfigError: it has no config.json, or with every file and key that names code.
    """
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{option}: {why_no_model(path)}")
    problems = []
    for problem in key_problems(read_json(path / CONFIG)):
        problems.append(f"{path / CONFIG}: {problem}")
    for name in SETTINGS_FILES:
        file = path / name
        if not file.exists():
            continue
        values = read_json(file)
        for key in CODE_KEYS:
            if values.get(key) is not None:
                problems.append(f"{file}: {key} names Python code. {_CURE}")
    if (path / CODE_FOLDER).exists():
        problems.append(f"{path / CODE_FOLDER}: is code that is to write the replies. {_CURE}")
    if problems:
        raise ConfigError(problems)


_CURE = (
    "gpt-oss needs none: remove it, or fetch the model from its makers. An export of this project "
    "never holds any."
)
