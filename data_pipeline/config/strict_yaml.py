"""Configuration files -> frozen dataclasses; every problem is reported with file, line and key.

Decisions
    Scalars follow YAML 1.2's core schema, and every file has limits: see `bounded.yaml_text`.
    Duplicate and unknown keys are errors; an unknown key names the nearest valid one.
    JSON is read by the same code (it is a subset), so DeepSpeed files get line numbers, too.
    A dataclass may offer `check()`, a generator of (key, message) for rules that need several
    fields; it runs once the fields themselves have the right types.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import yaml

from data_pipeline.bounded.files import MalformedInput, read_small_text
from data_pipeline.bounded.json_text import parse_json
from data_pipeline.bounded.yaml_text import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_REPEATED,
    MAX_VALUES,
    TOO_DEEP,
    TOO_MANY,
    TOO_MANY_REPEATED,
    loading,
)
from data_pipeline.errors import ConfigError
from data_pipeline.escaping import escaped_line

T = TypeVar("T")
KeyPath = tuple[str | int, ...]
_SHOWN_CHARS = 200
"""Characters of a key or of a value that a message shows."""


@dataclass(frozen=True)
class Located:
    """A parsed file: plain Python values, and the line of every key."""

    source: str
    """Name of the file in messages."""
    value: Any
    """Content of the file."""
    lines: Mapping[KeyPath, int]
    """Line of each key, from 1."""

    def where(self, path: KeyPath) -> str:
        """Return `file:line: a.b[0]`; a key without a line of its own has that of its parent."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}: {dotted(path)}"
        return f"{self.source}: {dotted(path)}"

    def with_values(self, overrides: Mapping[str, str]) -> Located:
        """Return the file with each `--set key.path=value` applied.

        Args:
            overrides: Dotted key -> YAML scalar or flow collection.

        Raises:
            ConfigError: A key passes through a value that is not a section, or a value is not YAML.
        """
        if not overrides:
            return self
        value = {} if self.value is None else copy.deepcopy(self.value)
        lines = dict(self.lines)
        for key, text in overrides.items():
            *parents, last = key.split(".")
            section = _section_at(value, parents)
            if section is None:
                raise ConfigError(
                    f"--set {key}={text}: '{'.'.join(parents)}' is not a section. "
                    "Give section.key=value."
                )
            section[last] = parse_yaml(text, f"--set {key}").value
            replaced = (*parents, last)
            lines = {
                path: line for path, line in lines.items() if path[: len(replaced)] != replaced
            }
        return Located(f"{self.source} (with --set)", value, lines)


def _section_at(value: Any, path: list[str]) -> dict[str, Any] | None:
    """Return the mapping at a path, made where nothing is; None if something else is in the way."""
    section = value
    for key in path:
        if not isinstance(section, dict):
            return None
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
    return section if isinstance(section, dict) else None


def dotted(path: KeyPath) -> str:
    """Return ('sources', 2, 'weight') as 'sources[2].weight'."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{escaped_line(part, _SHOWN_CHARS)}"
    return text.lstrip(".") or "the file"


def load_yaml(path: Path | str) -> Located:
    """Read a YAML file.

    Raises:
        ConfigError: The file is missing, unreadable, not UTF-8 or not YAML, gives a key twice, or
            has a tag that names a Python object.
    """
    return parse_yaml(_read(path), str(path))


def load_json(path: Path | str) -> Located:
    """Read a JSON file.

    Raises:
        ConfigError: See `load_yaml`; also if the file is YAML but not JSON.
    """
    text = _read(path)
    try:
        parse_json(text)
    except MalformedInput as error:
        raise ConfigError(error.of(path)) from None
    return parse_yaml(text.replace("\t", "    "), str(path))


def _read(path: Path | str) -> str:
    try:
        return read_small_text(Path(path), MAX_BYTES)
    except MalformedInput as error:
        raise ConfigError(error.of(path)) from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from error


def parse_yaml(text: str, source: str) -> Located:
    """Parse YAML text; `source` is its name in messages.

    Raises:
        ConfigError: See `load_yaml`.
    """
    locator = _Locator(source)
    value = None
    try:
        with loading(text) as loader:
            node = loader.get_single_node()
            if node is not None:
                locator.visit(node, ())
                value = loader.construct_document(node)
    except MalformedInput as error:
        raise ConfigError(error.of(source)) from None
    if locator.problems:
        raise ConfigError(locator.problems)
    return Located(source, value, locator.lines)


class _Locator:
    """Notes the line of every key of a parsed file, and the keys that are given twice."""

    def __init__(self, source: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self._source = source
        self._seen: set[int] = set()
        self._num_repeated = 0

    def visit(self, node: yaml.Node, path: KeyPath) -> None:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if len(path) > MAX_DEPTH:
            raise MalformedInput(TOO_DEEP, line)
        if len(self.lines) > MAX_VALUES:
            raise MalformedInput(TOO_MANY)
        self._num_repeated += id(node) in self._seen
        self._seen.add(id(node))
        if self._num_repeated > MAX_REPEATED:
            raise MalformedInput(TOO_MANY_REPEATED)
        if isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, (*path, index))

    def _visit_mapping(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            here: KeyPath = (*path, key)
            if key in first_lines:
                self.problems.append(
                    f"{self._source}:{line}: {dotted(here)} is given twice "
                    f"(first in line {first_lines[key]}). Remove one."
                )
            first_lines[key] = line
            self.lines[here] = line
            self.visit(value_node, here)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return a suggestion to put behind a message about an unknown word.

    It is ` Did you mean 'x'?` if a valid word is close, else the list of the valid words.
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Valid: {', '.join(valid)}."


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a parsed value is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Reader:
    """Turns a `Located` file into dataclasses, and gathers the problems on the way."""

    def __init__(self, located: Located) -> None:
        self.located = located
        self.problems: list[str] = []

    def problem(self, path: KeyPath, message: str) -> None:
        """Record `file:line: key message`."""
        self.problems.append(f"{self.located.where(path)} {message}")

    def finish(self) -> None:
        """Raise what was recorded.

        Raises:
            ConfigError: There are problems; it carries all of them.
        """
        if self.problems:
            raise ConfigError(self.problems)

    def read(self, cls: type[T], value: Any = None, path: KeyPath = ()) -> T | None:
        """Build `cls` from a mapping, by default the whole file; return None if it has problems.

        Args:
            cls: A dataclass; a field without a default is a key that must be given.
            value: The mapping; an empty section means all defaults.
            path: Where in the file it stands.
        """
        if value is None and not path:
            value = self.located.value
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.problem(path, f"is {_show(value)}, must be a mapping of keys to values.")
            return None
        num_before = len(self.problems)
        arguments = self._read_fields(cls, value, path)
        if len(self.problems) > num_before:
            return None
        built = cls(**arguments)
        self._check(built, path)
        return built if len(self.problems) == num_before else None

    def _read_fields(self, cls: type[Any], value: dict[Any, Any], path: KeyPath) -> dict[str, Any]:
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for key in value:
            if key not in fields:
                self.problem((*path, key), f"is not a known key.{nearest(str(key), fields)}")
        arguments = {}
        for name, field in fields.items():
            if name in value:
                arguments[name] = self._convert(hints[name], value[name], (*path, name))
            elif field.default is MISSING and field.default_factory is MISSING:
                self.problem((*path, name), "is missing. It has no default: add it.")
        return arguments

    def _check(self, built: Any, path: KeyPath) -> None:
        """Record what the dataclass itself finds wrong, if it has a `check`."""
        if not hasattr(built, "check"):
            return
        for key, message in built.check():
            self.problem((*path, *_split(key)), message)

    def _convert(self, hint: Any, value: Any, path: KeyPath) -> Any:
        """Return `value` as the type that a field's annotation asks for."""
        origin = typing.get_origin(hint)
        arguments = typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return self._convert_union(arguments, value, path)
        if origin is typing.Literal:
            return self._convert_literal(arguments, value, path)
        if origin is tuple:
            return self._convert_list(arguments[0], value, path)
        if origin is dict:
            return self._convert_mapping(arguments[1], value, path)
        if dataclasses.is_dataclass(hint):
            section = {} if value is None else value
            return self.read(typing.cast("type[Any]", hint), section, path)
        return self._convert_scalar(hint, value, path)

    def _convert_union(self, options: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        if value is None and type(None) in options:
            return None
        options = tuple(option for option in options if option is not type(None))
        if len(options) == 1:
            return self._convert(options[0], value, path)
        for option in options:
            attempt = Reader(self.located)
            converted = attempt._convert(option, value, path)
            if not attempt.problems:
                return converted
        names = " or ".join(_type_name(option) for option in options)
        self.problem(path, f"is {_show(value)}, must be {names}.")
        return None

    def _convert_literal(self, valid: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        # In Python True equals 1, so a boolean is valid only among booleans.
        has_booleans = any(isinstance(option, bool) for option in valid)
        if value not in valid or isinstance(value, bool) != has_booleans:
            names = ", ".join(map(str, valid))
            self.problem(path, f"is {_show(value)}, must be one of: {names}.")
        return value

    def _convert_list(self, hint: Any, value: Any, path: KeyPath) -> tuple[Any, ...]:
        if not isinstance(value, list):
            self.problem(path, f"is {_show(value)}, must be a list.")
            return ()
        return tuple(self._convert(hint, item, (*path, i)) for i, item in enumerate(value))

    def _convert_mapping(self, hint: Any, value: Any, path: KeyPath) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.problem(path, f"is {_show(value)}, must be a mapping.")
            return {}
        converted = {}
        for key, item in value.items():
            converted[str(key)] = self._convert(hint, item, (*path, key))
        return converted

    def _convert_scalar(self, hint: Any, value: Any, path: KeyPath) -> Any:
        if hint is Any:
            return value
        if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                self.problem(path, f"is {value}, must be a finite number.")
            return float(value)
        if hint is Path and isinstance(value, str):
            return Path(value)
        if hint is int and type(value) is int and abs(value) >= 2**63:
            self.problem(path, f"is {value}, must be less than 2^63 in size.")
            return None
        if hint in (int, str, bool) and type(value) is hint:
            return value
        self.problem(path, f"is {_show(value)}, must be {_type_name(hint)}.")
        return None


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
}


def _type_name(hint: Any) -> str:
    """Return how a message calls the type of a field."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(f"'{value}'" for value in typing.get_args(hint))
    if hint in _TYPE_NAMES:
        return _TYPE_NAMES[hint]
    return "a list" if origin is tuple else "a mapping"


def _show(value: Any) -> str:
    """Return a value as a message shows it."""
    if value is None:
        return "empty"
    if isinstance(value, str):
        return f"'{escaped_line(value, _SHOWN_CHARS)}'"
    return escaped_line(json.dumps(value, default=str), _SHOWN_CHARS)


def _split(key: str) -> Iterator[str | int]:
    """Yield the parts of a dotted key: 'sources', 2, 'weight' of 'sources[2].weight'."""
    for part in re.findall(r"[^.\[\]]+|\[\d+\]", key):
        yield int(part[1:-1]) if part.startswith("[") else part


def read_file(cls: type[T], located: Located) -> T:
    """Build `cls` from a whole file.

    Raises:
        ConfigError: The file has problems; it carries all of them.
    """
    reader = Reader(located)
    built = reader.read(cls)
    reader.finish()
    assert built is not None
    return built
