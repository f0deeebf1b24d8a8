"""Configuration files -> frozen dataclasses, with every problem reported at once by file, line and
key.

Decisions
    Scalars follow YAML 1.2's core schema, not PyYAML's YAML 1.1: `no` is a string, `1e-5` is a
    number and `1:30:00` is a string, because each of these has silently changed somebody's training
    run. Duplicate and unknown keys are errors; an unknown key names the nearest valid one.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data_pipeline.errors import ConfigError

T = TypeVar("T")
KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 scalars."""


_Loader.yaml_implicit_resolvers = {}


def _resolve(tag: str, pattern: str, first: list[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF"))
_resolve("int", r"^[-+]?(?:0|[1-9][0-9]*)(?:_[0-9]+)*$", list("-+0123456789"))
_resolve(
    "float",
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    list("-+0123456789."),
)
_resolve("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""])

MAX_DEPTH = 32
"""Levels of nesting; a deeper file is a mistake or an alias that contains itself."""
MAX_VALUES = 100_000
"""Values in one file, aliases expanded; stops files that aliases blow up exponentially."""


@dataclasses.dataclass(frozen=True)
class Located:
    """A parsed file: plain Python values, and the line of every key."""

    source: str
    value: Any
    lines: Mapping[KeyPath, int]

    def where(self, path: KeyPath) -> str:
        """`file:line: a.b[0]`, using the nearest known line above a key that has none of its
        own.
        """
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}: {dotted(path)}"
        return f"{self.source}: {dotted(path)}"

    def with_values(self, overrides: Mapping[str, str]) -> Located:
        """The file with `--set key.path=value` applied; values are YAML scalars or flow
        collections.
        """
        value, lines = copy.deepcopy(self.value) if self.value is not None else {}, dict(self.lines)
        for key, text in overrides.items():
            node = value
            *parents, last = key.split(".")
            for parent in parents:
                if isinstance(node, dict) and node.get(parent) is None:
                    node[parent] = {}
                node = node[parent] if isinstance(node, dict) else None
            if not isinstance(node, dict):
                raise ConfigError(
                    f"--set {key}={text}: '{'.'.join(parents)}' is not a section. Give section.key=value."
                )
            node[last] = parse_yaml(text, f"--set {key}").value
            for known in [
                known for known in lines if known[: len(parents) + 1] == (*parents, last)
            ]:
                del lines[known]
        return Located(
            self.source if not overrides else f"{self.source} (with --set)", value, lines
        )


def dotted(path: KeyPath) -> str:
    """('sources', 2, 'weight') -> 'sources[2].weight'."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".") or "the file"


def load_yaml(path: Path | str) -> Located:
    """Read a YAML file.

    Raises:
        ConfigError: missing or unreadable file, not UTF-8, not YAML, duplicate keys, tags that name
            Python objects.
    """
    return parse_yaml(_read(path), str(path))


def load_json(path: Path | str) -> Located:
    """Read a JSON file; the errors are those of `load_yaml`."""
    text = _read(path)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})."
        ) from error
    return parse_yaml(text.replace("\t", "    "), str(path))


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 at byte {error.start}. Save the file as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from error


def parse_yaml(text: str, source: str) -> Located:
    """Parse YAML text; `source` is what error messages call it."""
    lines: dict[KeyPath, int] = {}
    problems: list[str] = []
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _note_lines(node, (), lines, problems, source)
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{source}{line}: not valid YAML: {getattr(error, 'problem', None) or error}."
        ) from error
    except RecursionError:
        raise ConfigError(
            f"{source}: nested too deeply. At most {MAX_DEPTH} levels are read."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{source}: a value cannot be read: {error}.") from error
    finally:
        if loader is not None:
            loader.dispose()
    if problems:
        raise ConfigError(problems)
    return Located(source, value, lines)


def _note_lines(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[str], source: str
) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if len(path) > MAX_DEPTH:
        raise ConfigError(
            f"{source}:{node.start_mark.line + 1}: nested too deeply. At most {MAX_DEPTH} levels are read."
        )
    if len(lines) > MAX_VALUES:
        raise ConfigError(
            f"{source}: more than {MAX_VALUES} values, aliases expanded. Write less into one file."
        )
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                name = dotted((*path, key))
                problems.append(
                    f"{source}:{line}: {name} is given twice (first in line {seen[key]}). Remove one."
                )
            seen[key] = line
            lines[(*path, key)] = line
            _note_lines(value_node, (*path, key), lines, problems, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, (*path, index), lines, problems, source)


def nearest(word: str, valid: typing.Iterable[str]) -> str:
    """' Did you mean 'x'?' for the closest valid word, else the list of valid ones."""
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Valid: {', '.join(valid)}."


class Reader:
    """Turns a `Located` file into dataclasses and gathers the problems on the way."""

    def __init__(self, located: Located) -> None:
        self.located = located
        self.problems: list[str] = []

    def problem(self, path: KeyPath, message: str) -> None:
        """Record `file:line: key message`."""
        self.problems.append(f"{self.located.where(path)} {message}")

    def finish(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self.problems:
            raise ConfigError(self.problems)

    def read(self, cls: type[T], value: Any = None, path: KeyPath = ()) -> T | None:
        """Build `cls` from the mapping at `path` (the whole file by default); None if it had
        problems.
        """
        value = self.located.value if value is None and not path else value
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.problem(path, f"is {_show(value)}, must be a mapping of keys to values.")
            return None
        before = len(self.problems)
        hints, arguments = typing.get_type_hints(cls), {}
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        for key in value:
            if key not in fields:
                self.problem((*path, key), f"is not a known key.{nearest(str(key), fields)}")
        for name, field in fields.items():
            if name in value:
                arguments[name] = self._convert(hints[name], value[name], (*path, name))
            elif (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                self.problem((*path, name), "is missing. It has no default: add it.")
        if len(self.problems) > before:
            return None
        built = cls(**arguments)
        for key, message in getattr(built, "check", lambda: ())():
            self.problem((*path, *_split(key)), message)
        return built if len(self.problems) == before else None

    def _convert(self, hint: Any, value: Any, path: KeyPath) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return self._convert_union(arguments, value, path)
        if origin is typing.Literal:
            if value not in arguments or isinstance(value, bool) != any(
                isinstance(a, bool) for a in arguments
            ):
                names = ", ".join(map(str, arguments))
                self.problem(path, f"is {_show(value)}, must be one of: {names}.")
            return value
        if origin is tuple:
            if not isinstance(value, list):
                self.problem(path, f"is {_show(value)}, must be a list.")
                return ()
            return tuple(
                self._convert(arguments[0], item, (*path, i)) for i, item in enumerate(value)
            )
        if origin is dict:
            if not isinstance(value, dict):
                self.problem(path, f"is {_show(value)}, must be a mapping.")
                return {}
            return {
                str(key): self._convert(arguments[1], item, (*path, key))
                for key, item in value.items()
            }
        if dataclasses.is_dataclass(hint):
            return self.read(typing.cast("type[Any]", hint), {} if value is None else value, path)
        return self._convert_scalar(hint, value, path)

    def _convert_union(self, arguments: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
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

    def _convert_scalar(self, hint: Any, value: Any, path: KeyPath) -> Any:
        if hint is Any:
            return value
        if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                self.problem(path, f"is {value}, must be a finite number.")
            return float(value)
        if hint is Path and isinstance(value, str):
            return Path(value)
        if hint in (int, str, bool) and type(value) is hint:
            return value
        self.problem(path, f"is {_show(value)}, must be {_type_name(hint)}.")
        return None


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"'{a}'" for a in typing.get_args(hint))
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        Path: "a path",
    }
    if hint in names:
        return names[hint]
    return "a list" if typing.get_origin(hint) is tuple else "a mapping"


def _show(value: Any) -> str:
    if value is None:
        return "empty"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)


def _split(key: str) -> Iterator[str | int]:
    """'sources[2].weight' -> 'sources', 2, 'weight'."""
    for part in re.findall(r"[^.\[\]]+|\[\d+\]", key):
        yield int(part[1:-1]) if part.startswith("[") else part


def read_file(cls: type[T], located: Located) -> T:
    """Parse a whole file into `cls` or raise ConfigError with every problem."""
    reader = Reader(located)
    built = reader.read(cls)
    reader.finish()
    assert built is not None
    return built
