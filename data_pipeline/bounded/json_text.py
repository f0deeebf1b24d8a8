"""JSON that anybody may have written, read within limits: bytes, depth, digits.

Python's `json` takes numbers of thousands of digits, which overflow where they become floats, and
nesting up to the interpreter's limit, at which whatever handles the value later fails.  It takes
bytes that are no UTF-8 for a lone surrogate, at which whatever writes the text later fails.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data_pipeline.bounded.files import SMALL_BYTES, MalformedInput, decoded, read_small_file

LARGE_BYTES = 2**28
"""Size of a file with a value for each of many documents, such as the scores of a yardstick."""
MAX_DEPTH = 64
"""Levels of nesting."""
MAX_DIGITS = 40
"""Digits of a whole number: those of 128 bits, which the state of a random generator has."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(
    path: Path,
    max_bytes: int = SMALL_BYTES,
    *,
    unique: bool = False,
    lone_surrogates: bool = False,
    follow_links: bool = True,
) -> Any:
    """Return the content of a JSON file that anybody may have written.

    Args:
        path: The file.
        max_bytes: Its largest size.
        unique: Refuse an object that gives a key twice.
        lone_surrogates: Take texts that are no Unicode, for a reader that only shows them.
        follow_links: Read what a symbolic link leads to; else it is an error.

    Raises:
        OSError: it cannot be read, or is a folder, a pipe or a device.
        MalformedInput: it is no JSON, or beyond a limit; see `parse_json`.
    """
    content = read_small_file(path, max_bytes, follow_links=follow_links)
    return parse_json(content, unique=unique, lone_surrogates=lone_surrogates)


def parse_json(
    content: bytes | str,
    *,
    max_depth: int = MAX_DEPTH,
    unique: bool = False,
    lone_surrogates: bool = False,
) -> Any:
    """Return the value of a JSON text.

    Args:
        content: The text; its size is for the caller to limit.
        max_depth: Levels of nesting.
        unique: Refuse an object that gives a key twice.
        lone_surrogates: Take texts that are no Unicode, for a reader that only shows them.

    Raises:
        MalformedInput: it is no JSON in UTF-8, is nested too deeply, has a number of more than
            `MAX_DIGITS` digits or a text that is no Unicode.
    """
    text = decoded(content) if isinstance(content, bytes) else content
    try:
        value = (_STRICT if unique else _PLAIN).decode(text)
        if not lone_surrogates and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        words = f"not valid JSON: {error.msg} (column {error.colno})"
        raise MalformedInput(words, error.lineno) from None
    except UnicodeEncodeError:
        raise MalformedInput("a text has half a surrogate pair") from None
    except RecursionError:
        raise _too_deep(max_depth) from None
    # most texts have fewer brackets than that, so that nothing needs to be counted
    if text.count("[") + text.count("{") > max_depth and depth_of(value) > max_depth:
        raise _too_deep(max_depth)
    return value


def depth_of(value: object) -> int:
    """Return the levels of lists and objects within one another; 0 for a single value."""
    depth = 0
    level = [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        inner: list[dict[str, Any] | list[Any]] = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            for item in items:
                if isinstance(item, dict | list):
                    inner.append(item)
        level = inner
    return depth


def _too_deep(max_depth: int) -> MalformedInput:
    return MalformedInput(f"nested deeper than {max_depth} levels")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise MalformedInput(f"a number has {len(digits):,} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise MalformedInput(f"the key '{key:.200}' is given twice")
        found[key] = value
    return found


_PLAIN = json.JSONDecoder(parse_int=_whole_number)
_STRICT = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_unique_keys)
