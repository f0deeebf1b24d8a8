"""Write the reference of every configuration key: a page for people, JSON schemas for editors.

Everything comes from the dataclasses that read the files: names, types and defaults from their
fields, meanings and units from the docstring below each field.

    python -m cpt.config.reference      # in the repository: writes docs/configuration.md,
                                        # docs/run.schema.json and docs/mix.schema.json
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cpt.config.engine_json import (
    KNOWN_KEYS,
    KNOWN_ZERO_KEYS,
    OWN_KEYS,
    REFUSED_KEYS,
    REFUSED_ZERO_KEYS,
)
from cpt.config.guard_section import DomainLimits
from cpt.config.muon_section import MuonSection
from cpt.config.precision_sections import ProductsSection, QuantizeSection
from cpt.config.sections import ExpertParallelJson, RunYaml, StageSection
from data_pipeline.config.decontamination_config import DecontaminationConfig
from data_pipeline.config.generation_config import GenerationDomain
from data_pipeline.config.language_limits import LanguageLimits
from data_pipeline.config.mix_config import GuardConfig, GuardDomain, MixConfig
from data_pipeline.config.record_filters import FilterRule
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import LANGUAGES, SourceConfig
from data_pipeline.config.stage_config import StageConfig
from data_pipeline.config.traces_config import TraceDomain
from data_pipeline.console.say import say

PAGE = Path("docs/configuration.md")
RUN_SCHEMA = Path("docs/run.schema.json")
MIX_SCHEMA = Path("docs/mix.schema.json")

SEQUENCE_PARALLEL_SIZE = (
    "Ranks that share one packed row. auto takes the largest size that divides the ranks of a "
    "node, the query heads and `seq_len`, and that fits the key/value heads."
)
"""Meaning of a key of ours in the DeepSpeed JSON that no dataclass holds."""
GRADIENTS = (
    "Where gradients add up if the optimizer state is offloaded: beside it on the host, or on the "
    "device, which needs ZeRO stage 2 or 3."
)
"""Likewise."""

SCALARS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "boolean"),
    int: ("whole number", "integer"),
    float: ("number", "number"),
    str: ("text", "string"),
    Path: ("path", "string"),
}
"""Types of single values: what the page calls them, and what JSON Schema calls them."""

INTRODUCTION = """\
# Configuration

<!-- Written by `python -m cpt.config.reference` from the docstrings in the code. Edit those. -->

A run reads three files: the **run YAML** (`--config`), the **data-mix YAML** that its `data.mix`
names, and the **DeepSpeed JSON** (`--ds_config`). An unknown key, a duplicate key, a wrong type and
an impossible value are refused when the program starts, each with file, line and the nearest valid
key; see [troubleshooting](troubleshooting.md).

* `--set section.key=value` replaces one value of the run YAML; the value is YAML, as in
  `--set train.lr=2e-5`.
* YAML is read by version 1.2: `no` is text, `1e-5` is a number, `1:30:00` is text.
* Relative paths are relative to the file that names them.
* What a run decided, with no `auto` left, is in `<run_dir>/config.resolved.yaml`.

Editors that understand JSON Schema complete keys, show these descriptions and mark mistakes. The
first line of a file names its schema, relative to the file:

    # yaml-language-server: $schema=../docs/run.schema.json      # a run YAML in configs/
    # yaml-language-server: $schema=../../docs/mix.schema.json   # a data mix in configs/mixes/
"""


def configuration_page() -> str:
    """Return docs/configuration.md."""
    parts = [INTRODUCTION, "## Run YAML\n"]
    for name, section in typing.get_type_hints(RunYaml).items():
        if name == "stages":
            parts.append(_section("`stages[]`: rows of several lengths", StageSection, "stages[]."))
            continue
        parts.append(_section(f"`{name}`", section, f"{name}."))
        if name == "train":
            parts.append(_section("`train.muon`", MuonSection, "train.muon."))
            parts.append(_section("`train.quantize`", QuantizeSection, "train.quantize."))
            parts.append(_section("`train.products`", ProductsSection, "train.products."))
        if name == "guard":
            title = "`guard.domains.NAME`: limits of one domain"
            parts.append(_section(title, DomainLimits, "guard.domains.NAME."))
    parts.append("## Data-mix YAML\n")
    parts.append(_section("Top level", MixConfig, ""))
    parts.append(_section("`sources[]`: one source", SourceConfig, "sources[]."))
    parts.append(_section("`sources[].filters[]`: one condition", FilterRule, "filters[]."))
    parts.append(_wrapped(f"Languages: {_code_list(LANGUAGES)}.") + "\n")
    parts.append(_section("`decontamination`", DecontaminationConfig, "decontamination."))
    parts.append(_section("`stages[]`: rows of several lengths", StageConfig, "stages[]."))
    parts.append(_section("`languages.LANGUAGE`: limits", LanguageLimits, "languages.LANGUAGE."))
    parts.append(_section("`schedule[]`: one phase", SchedulePhase, "schedule[]."))
    parts.append(_section("`guard`: held-out text", GuardConfig, "guard."))
    parts.append(_section("`guard.domains[]`: one domain", GuardDomain, "guard.domains[]."))
    parts.append(_section("`guard.generation[]`: prompts", GenerationDomain, "guard.generation[]."))
    parts.append(_section("`guard.traces[]`: own traces", TraceDomain, "guard.traces[]."))
    parts.append(_deepspeed_json())
    return "\n".join(parts)


def run_schema() -> dict[str, Any]:
    """Return the JSON schema of the run YAML."""
    return _document("Run YAML of gpt-oss-cpt", RunYaml)


def mix_schema() -> dict[str, Any]:
    """Return the JSON schema of the data-mix YAML."""
    return _document("Data-mix YAML of gpt-oss-cpt", MixConfig)


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _section(title: str, cls: type, prefix: str) -> str:
    """Return one heading with a list of the keys of a dataclass."""
    docstring = inspect.getdoc(cls) or ""
    lines = [f"### {title}\n", " ".join(docstring.split()) + "\n"]
    meanings = field_docstrings(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = f"{_type_text(hints[field.name])}; {_default_text(field)}"
        lines.append(f"- **`{prefix}{field.name}`** ({kind})  ")
        lines.append(_meaning(meanings[field.name]))
    return "\n".join(lines) + "\n"


def _type_text(hint: Any) -> str:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(option) for option in arguments if option is not type(None))
    if origin is tuple:
        return f"list of {_plural(arguments[0])}"
    if origin is dict:
        return f"mapping from text to {_type_text(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "mapping"
    return SCALARS[hint][0]


def _plural(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "mappings"
    if hint is str:
        return "texts"
    return f"{_type_text(hint)}"


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = _default(field)
    if default is dataclasses.MISSING:
        return "required"
    if default is None:
        return "optional"
    if dataclasses.is_dataclass(default):
        return "default: that of its keys"
    return f"default: `{json.dumps(_plain(default), ensure_ascii=False)}`"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _deepspeed_json() -> str:
    """Return the part on the DeepSpeed JSON: our keys, accepted keys, refused keys."""
    meanings = field_docstrings(ExpertParallelJson)
    hints = typing.get_type_hints(ExpertParallelJson)
    lines = [
        "## DeepSpeed JSON\n",
        "A DeepSpeed configuration with three additional keys. Batch sizes and `gradient_clipping`",
        'may be `"auto"`: they then follow the run YAML. A number must agree with it.\n',
        "### Keys of this project\n",
        "- **`sequence_parallel_size`** (whole number or `auto`; default: `1`)  ",
        _meaning(SEQUENCE_PARALLEL_SIZE),
    ]
    for field in dataclasses.fields(ExpertParallelJson):
        kind = f"{_type_text(hints[field.name])}; {_default_text(field)}"
        lines.append(f"- **`expert_parallel.{field.name}`** ({kind})  ")
        lines.append(_meaning(meanings[field.name]))
    lines.append(
        "- **`zero_optimization.offload_optimizer.gradients`** (`host` \\| `device`; default: "
        '`"host"`)  '
    )
    lines.append(_meaning(GRADIENTS))
    lines.append("\n### Keys of DeepSpeed that are accepted\n")
    lines.append("They keep DeepSpeed's meaning; every other key is refused as unknown.\n")
    accepted = [key for key in KNOWN_KEYS if key not in OWN_KEYS]
    lines.append(_wrapped(f"Top level: {_code_list(accepted)}.") + "\n")
    lines.append(_wrapped(f"`zero_optimization`: {_code_list(KNOWN_ZERO_KEYS)}."))
    lines.append("\n### Keys of DeepSpeed that are refused\n")
    lines += [f"- `{key}`: {reason}" for key, reason in REFUSED_KEYS.items()]
    for key, reason in REFUSED_ZERO_KEYS.items():
        lines.append(f"- `zero_optimization.{key}`: {reason}")
    return "\n".join(lines) + "\n"


def _code_list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _meaning(text: str) -> str:
    """Return the wrapped text that continues a list entry."""
    return _wrapped(text, indent="  ")


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        100,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _document(title: str, cls: type) -> dict[str, Any]:
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": title, **_schema(cls)}


def _schema(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a type that the strict reader can build."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(option) for option in arguments]}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _object_schema(hint)
    if hint is type(None):
        return {"type": "null"}
    return {"type": SCALARS[hint][1]}


def _object_schema(cls: type) -> dict[str, Any]:
    properties = {name: schema for name, schema in _properties(cls)}
    required = [f.name for f in dataclasses.fields(cls) if _default(f) is dataclasses.MISSING]
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False}
    if required:
        schema["required"] = required
    return {**schema, "properties": properties}


def _properties(cls: type) -> Iterator[tuple[str, dict[str, Any]]]:
    meanings = field_docstrings(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        schema = _schema(hints[field.name])
        section = hints[field.name]
        meaning = meanings.get(field.name) or " ".join((inspect.getdoc(section) or "").split())
        schema["description"] = meaning
        default = _default(field)
        if isinstance(default, (bool, int, float, str, tuple)) and default != ():
            schema["default"] = _plain(default)
        yield field.name, schema


def written_files() -> dict[Path, str]:
    """Return the content of every file that this module writes, by path in the repository."""
    return {
        PAGE: configuration_page(),
        RUN_SCHEMA: json.dumps(run_schema(), indent=1, ensure_ascii=False) + "\n",
        MIX_SCHEMA: json.dumps(mix_schema(), indent=1, ensure_ascii=False) + "\n",
    }


def main() -> None:
    """Write all files below the current directory, which is the repository."""
    for path, content in written_files().items():
        path.write_text(content, encoding="utf-8")
        say(f"-> {path}")


if __name__ == "__main__":
    main()
