"""YAML that anybody may have written, read within limits: bytes, depth, values, aliases, digits.

Decisions
    Scalars follow YAML 1.2's core schema, not PyYAML's YAML 1.1: `no` is a string, `1e-5` is a
    number and `1:30:00` is a string, because each of these has silently changed somebody's training
    run.
    A tag other than those of the core schema is refused, whatever it stands for.
    Limits are looked at while the text is parsed: nested aliases multiply only afterwards.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.bounded.files import MalformedInput, decoded, read_small_file
from data_pipeline.bounded.json_text import MAX_DIGITS

MAX_BYTES = 2**20
"""Size of a file."""
MAX_DEPTH = 32
"""Levels of nesting; a deeper file is a mistake, or has an alias that contains itself."""
MAX_VALUES = 100_000
"""Values in one file."""
MAX_REPEATED = 10_000
"""Values that aliases add to a file when they are expanded."""
TOO_DEEP = f"nested too deeply. At most {MAX_DEPTH} levels are read"
TOO_MANY = f"more than {MAX_VALUES:,} values. Write less into one file"
TOO_MANY_REPEATED = f"its aliases add more than {MAX_REPEATED:,} values. Write less into one file"
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""How JSON writes a character beyond the first 65,536, such as an emoji: as two escapes."""
CORE_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
_TAG = "tag:yaml.org,2002:"
_FLOAT = (
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_SCALARS = {
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]),
    "int": (re.compile(r"^[-+]?(?:0|[1-9][0-9]*)(?:_[0-9]+)*$"), [*"-+0123456789"]),
    "float": (re.compile(_FLOAT), [*"-+0123456789."]),
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""]),
}
"""What a scalar of each tag looks like, and the characters that it may start with."""


def _joined(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")


class _PassedLimit(yaml.MarkedYAMLError):
    """A text that is YAML, but beyond one of the limits."""


class BoundedLoader(yaml.SafeLoader):
    """A safe loader that reads scalars as YAML 1.2 does, and stops at the limits of this module."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next value, or the one that an alias stands for.

        Raises:
            yaml.MarkedYAMLError: A limit is passed.
        """
        self._num_values += 1
        if self._depth > MAX_DEPTH:
            self._refuse(TOO_DEEP)
        if self._num_values > 2 * MAX_VALUES:  # a key is a value here, too
            self._refuse(TOO_MANY)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave merge keys alone, which YAML 1.2 does not have."""

    def _refuse(self, problem: str) -> None:
        raise _PassedLimit(None, None, problem, self.peek_event().start_mark)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return the text of a scalar.

        Raises:
            yaml.MarkedYAMLError: No file can have it as its name or in its content.
        """
        text = super().construct_scalar(node)
        if isinstance(text, str):
            text = _PAIR.sub(_joined, text)
        if isinstance(text, str) and _UNWRITABLE.search(text):
            problem = "a text has a NUL or half a surrogate pair"
            raise _PassedLimit(None, None, problem, node.start_mark)
        return text

    def construct_core(self, node: yaml.ScalarNode) -> Any:
        """Return the value of a scalar other than a text."""
        kind = node.tag.removeprefix(_TAG)
        text = self.construct_scalar(node)
        if not _SCALARS[kind][0].match(text):
            raise yaml.constructor.ConstructorError(
                None, None, f"'{text:.100}' is no {kind}", node.start_mark
            )
        if kind == "int" and len(text) > MAX_DIGITS:
            problem = f"a number has {len(text):,} digits, at most {MAX_DIGITS} are read"
            raise _PassedLimit(None, None, problem, node.start_mark)
        construct = yaml.SafeLoader.yaml_constructors[node.tag]
        return construct(self, node)


def _use_core_schema() -> None:
    """Replace PyYAML's rules for scalars and tags by those of YAML 1.2's core schema."""
    BoundedLoader.yaml_implicit_resolvers = {}
    known: dict[str | None, Any] = yaml.SafeLoader.yaml_constructors  # type: ignore[assignment]
    constructors: dict[str | None, Any] = {None: known[None]}
    for name in CORE_TAGS:
        constructors[_TAG + name] = known[_TAG + name]
    for name, (pattern, first) in _SCALARS.items():
        BoundedLoader.add_implicit_resolver(_TAG + name, pattern, first)
        constructors[_TAG + name] = BoundedLoader.construct_core
    BoundedLoader.yaml_constructors = constructors  # type: ignore[assignment]


_use_core_schema()


def repeated_values(root: yaml.Node) -> int:
    """Return the number of values that aliases add to a document, counted up to `MAX_REPEATED`."""
    seen: set[int] = set()
    waiting = [root]
    repeated = 0
    while waiting and repeated <= MAX_REPEATED:
        node = waiting.pop()
        if id(node) in seen:
            repeated += 1
        seen.add(id(node))
        for inner in node.value if isinstance(node, yaml.CollectionNode) else ():
            waiting.extend(inner if isinstance(inner, tuple) else [inner])
    return repeated


def read_yaml(path: Path, *, follow_links: bool = True) -> Any:
    """Return the content of a YAML file that anybody may have written.

    Raises:
        OSError: it cannot be read, or is a folder, a pipe or a device.
        MalformedInput: it is no YAML in UTF-8, or beyond a limit.
    """
    return plain_yaml(decoded(read_small_file(path, MAX_BYTES, follow_links=follow_links)))


def plain_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        MalformedInput: it is no YAML, or beyond a limit.
    """
    with loading(text) as loader:
        node = loader.get_single_node()
        if node is None:
            return None
        if repeated_values(node) > MAX_REPEATED:
            raise MalformedInput(TOO_MANY_REPEATED)
        return loader.construct_document(node)


@contextlib.contextmanager
def loading(text: str) -> Iterator[BoundedLoader]:
    """Yield a loader of a text, whose errors become one.

    Raises:
        MalformedInput: it is no YAML, or beyond a limit.
    """
    loader: BoundedLoader | None = None
    try:
        loader = BoundedLoader(text)
        yield loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if not isinstance(error, _PassedLimit):
            problem = f"not valid YAML: {problem}"
        raise MalformedInput(problem, mark.line + 1 if mark else None) from None
    except RecursionError:
        raise MalformedInput(TOO_DEEP) from None
    except (ValueError, OverflowError) as error:  # an escape such as \UFFFFFFFF in quotes
        if isinstance(error, MalformedInput):
            raise
        raise MalformedInput(f"a value cannot be read ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()
