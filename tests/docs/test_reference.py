"""The reference of every key is the one that the code gives, and its schemas accept what ships."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cpt.config.guard_section import DomainLimits
from cpt.config.reference import (
    configuration_page,
    field_docstrings,
    mix_schema,
    run_schema,
    written_files,
)
from cpt.config.sections import ExpertParallelJson, StageSection
from data_pipeline.config.decontamination_config import DecontaminationConfig
from data_pipeline.config.language_limits import LanguageLimits
from data_pipeline.config.mix_config import GuardConfig, GuardDomain, MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.config.stage_config import StageConfig
from data_pipeline.config.strict_yaml import load_yaml

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted((ROOT / "configs").glob("*.yaml"))
MIX_FILES = sorted((ROOT / "configs" / "mixes").glob("*.yaml"))
DATACLASSES = [
    ExpertParallelJson,
    DomainLimits,
    MixConfig,
    SourceConfig,
    DecontaminationConfig,
    GuardConfig,
    GuardDomain,
    LanguageLimits,
    StageConfig,
    StageSection,
    SchedulePhase,
]
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


@pytest.mark.parametrize("path", written_files(), ids=str)
def test_written_file_is_current(path: Path) -> None:
    current = (ROOT / path).read_text(encoding="utf-8")
    assert current == written_files()[path], "run: python -m cpt.config.reference"


@pytest.mark.parametrize("cls", DATACLASSES, ids=lambda cls: cls.__name__)
def test_every_key_has_a_docstring_that_the_page_shows(cls: type) -> None:
    page = " ".join(configuration_page().split())
    meanings = field_docstrings(cls)
    for field in dataclasses.fields(cls):
        assert meanings[field.name] in page


def test_every_key_of_the_run_yaml_is_on_the_page() -> None:
    page = configuration_page()
    keys = []
    for name, section in run_schema()["properties"].items():
        for key in section.get("items", section)["properties"]:
            keys.append(f"{name}[].{key}" if "items" in section else f"{name}.{key}")
    assert len(keys) > 60
    assert [key for key in keys if f"**`{key}`**" not in page] == []


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_schema_accepts_every_shipped_run_yaml(path: Path) -> None:
    assert mistakes(load_yaml(path).value, run_schema()) == []


@pytest.mark.parametrize("path", MIX_FILES, ids=lambda path: path.stem)
def test_schema_accepts_every_shipped_mix(path: Path) -> None:
    assert mistakes(load_yaml(path).value, mix_schema()) == []


@pytest.mark.parametrize("path", [*RUN_FILES, *MIX_FILES], ids=lambda path: path.stem)
def test_shipped_yaml_names_its_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    schema = "run.schema.json" if path in RUN_FILES else "mix.schema.json"
    assert (path.parent / named).resolve() == ROOT / "docs" / schema


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"data": {}, "train": {}}, "$: model is missing"),
        ({"modle": {}}, "$: modle is unknown"),
        ({"model": {"init": "large"}}, "$.model.init"),
        ({"train": {"lr": "fast"}}, "$.train.lr"),
        ({"train": {"freeze": "router"}}, "$.train.freeze"),
        ({"guard": {"domains": {"code": {"tolerance": 1}}}}, "$.guard.domains.code"),
    ],
)
def test_schema_marks_mistakes(wrong: dict[str, Any], where: str) -> None:
    assert any(mistake.startswith(where) for mistake in mistakes(wrong, run_schema()))


def mistakes(value: Any, schema: dict[str, Any], path: str = "$") -> list[str]:
    """Return what a JSON schema finds wrong, for the words of it that the reference uses."""
    if "anyOf" in schema:
        attempts = [mistakes(value, option, path) for option in schema["anyOf"]]
        return [] if [] in attempts else [f"{path}: {value!r} fits no option"]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{path}: {value!r} is not listed"]
    types = JSON_TYPES[schema["type"]]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        return [f"{path}: {value!r} is no {schema['type']}"]
    if isinstance(value, list):
        parts = [mistakes(item, schema["items"], f"{path}[]") for item in value]
        return [mistake for part in parts for mistake in part]
    return object_mistakes(value, schema, path) if isinstance(value, dict) else []


def object_mistakes(value: dict[str, Any], schema: dict[str, Any], path: str) -> list[str]:
    """Return what is wrong with a mapping."""
    missing = [key for key in schema.get("required", []) if key not in value]
    found = [f"{path}: {key} is missing" for key in missing]
    for key, item in value.items():
        allowed = schema.get("properties", {}).get(key, schema["additionalProperties"])
        if allowed is False:
            found.append(f"{path}: {key} is unknown")
        else:
            found += mistakes(item, allowed, f"{path}.{key}")
    return found
