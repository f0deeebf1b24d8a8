"""Judge the values of the DeepSpeed JSON with the classes that DeepSpeed reads them with.

Decisions
    DeepSpeed's classes take `"1000"` and `true` for numbers.  This project reads the same values,
    so a number has to be a number here.
    What the classes say is told with file, line and key; their own log lines are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger
from pydantic import ValidationError

from data_pipeline.config.strict_yaml import KeyPath, Located, nearest

JUDGES: dict[str, type[DeepSpeedConfigModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
}
"""DeepSpeed's class of each block that has one."""
_TOLD_ELSEWHERE = ("stage", "device", "nvme_path", "gradients")
"""Keys of `zero_optimization` and of its blocks that `cpt.config` checks."""


def block_problems(file: Located) -> list[str]:
    """Return the values of a DeepSpeed JSON that DeepSpeed's own classes refuse.

    Keys that are unknown under `zero_optimization`, and blocks that are no mapping, are told by
    `cpt.config.engine_json`.
    """
    problems: list[str] = []
    if not isinstance(file.value, dict):
        return problems
    for name, judge in JUDGES.items():
        block = file.value.get(name)
        if isinstance(block, dict):
            problems += _problems_of_block(file, name, judge, block)
    return problems


def _problems_of_block(
    file: Located, name: str, judge: type[DeepSpeedConfigModel], block: dict[str, Any]
) -> list[str]:
    problems, told = _wrong_types(file, name, judge, block)
    rest = {}
    for key, value in block.items():
        if key not in told:
            rest[key] = value
    try:
        with _quiet():
            judge(**rest)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problem = _problem(file, name, judge, detail)
            if problem is not None:
                problems.append(problem)
    except Exception as error:  # whatever the class raises now, it would raise after loading
        problems.append(f"{file.where((name,))}: DeepSpeed refuses the block ({error}).")
    return problems


def _problem(
    file: Located, name: str, judge: type[DeepSpeedConfigModel], detail: Any
) -> str | None:
    """Return one finding of pydantic for people; None if it is told elsewhere."""
    path = tuple(key for key in detail["loc"] if isinstance(key, (str, int)))
    is_unknown = detail["type"] == "extra_forbidden"
    is_zero = name == "zero_optimization" and bool(path)
    if is_zero and (path[-1] in _TOLD_ELSEWHERE or (is_unknown and len(path) == 1)):
        return None
    where = file.where((name, *path))
    if is_unknown:
        return f"{where} is not a known key.{_suggestion(judge, path)}"
    reason = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not path:
        return f"{where}: DeepSpeed refuses the block ({reason})."
    return f"{where} is {_shown(detail.get('input'))}, but DeepSpeed says: {reason}."


def _suggestion(judge: type[DeepSpeedConfigModel], path: KeyPath) -> str:
    if len(path) != 1:
        return ""
    return nearest(str(path[0]), judge.model_fields)


def _wrong_types(
    file: Located, name: str, judge: type[DeepSpeedConfigModel], block: dict[str, Any]
) -> tuple[list[str], set[str]]:
    """Return problems with values of another JSON type than their field, and their keys."""
    problems = []
    told = set()
    for field_name, field in judge.model_fields.items():
        key = field.alias or field_name
        value = block.get(key, "auto")
        if value == "auto" or key in _TOLD_ELSEWHERE:
            continue
        wanted = _why_not(field.annotation, value)
        if wanted:
            told.add(key)
            problems.append(f"{file.where((name, key))} is {_shown(value)}, must be {wanted}.")
    return problems, told


def _why_not(annotation: Any, value: Any) -> str:
    """Return what a value should be, or an empty string if it may be one for its field."""
    if annotation is bool and not isinstance(value, bool):
        return "true or false"
    if annotation is not int:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "a number"
    if not abs(value) < 2**63:
        return "a number below 2^63"
    return ""


def _shown(value: Any) -> str:
    try:
        return f"{json.dumps(value):.80}"
    except (TypeError, ValueError):
        return f"{value!r:.80}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's log lines off the terminal."""
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was_disabled
