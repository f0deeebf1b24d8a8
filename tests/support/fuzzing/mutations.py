"""Change good files into hostile ones: by value where they are JSON, and by byte everywhere.

A changed file that is still nearly right gets further into a reader than random bytes do.
Everything depends on the random generator that is handed in, so a case can be made again.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP = "@@deep@@"
DIGITS = "@@digits@@"
DEEP_TEXT = "[" * 30_000 + "]" * 30_000
"""What `DEEP` stands for: nested further than Python's recursion limit."""
DIGITS_TEXT = "9" * 6000
"""What `DIGITS` stands for: more digits than Python converts."""

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**300,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "1",
    "auto",
    "..",
    "../victim/file",
    "/dev/zero",
    "/dev/stdin",
    "a/b\0c",
    "\x1b]0;owned\x07\x1b[2J\nFAKE: verified ok",
    "\ud800",
    "not UTF-8: \udcff\udc80",
    "\u202e\u2066right to left",
    "%s%n{0.__class__}{x!r:>1000000000}",
    "x" * 200_000,
    " " * 50_000,
    [],
    {},
    [[]],
    {"": None},
    [None] * 1000,
    {"__class__": "os.system", "auto_map": {"AutoConfig": "evil.Evil"}},
    DEEP,
    DIGITS,
)
"""Values that take the place of others."""

TOKENS: tuple[bytes, ...] = (
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b"\r",
    b"\t",
    b"\n\n",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[" * 5000,
    b"{a: " * 3000,
    b"- " * 3000,
    b"&a [*a, *a]",
    b"*a",
    b"<<: *a\n",
    b"!!python/object/apply:os.system [id]",
    b"? ",
    b": ",
    b"---\n",
    b"%YAML 9.9\n",
    b"9" * 6000,
    b"1e999999999",
    b"0x" + b"f" * 6000,
    b"NaN",
    b" " * 50_000,
    b"\xe3\x80\x80" * 2000,
)
"""Bytes that are put into files."""


def changed_bytes(random_source: random.Random, content: bytes) -> bytes:
    """Return content with one to four changes: a flip, a cut, a copy, a splice, a token."""
    for _ in range(random_source.randint(1, 4)):
        content = _change_bytes(random_source, content)
    return content


def _change_bytes(random_source: random.Random, content: bytes) -> bytes:
    start = random_source.randint(0, len(content))
    end = min(len(content), start + random_source.choice((1, 2, 7, 40, 300, 5000)))
    kind = random_source.choice(("flip", "cut", "end", "copy", "token", "token", "zero"))
    if kind == "flip" and start < len(content):
        flipped = content[start] ^ (1 << random_source.randrange(8))
        return content[:start] + bytes([flipped]) + content[start + 1 :]
    if kind == "cut":
        return content[:start] + content[end:]
    if kind == "end":
        return content[:start]
    if kind == "copy":
        place = random_source.randint(0, len(content))
        return content[:place] + content[start:end] * random_source.randint(1, 3) + content[place:]
    if kind == "zero":
        return content[:start] + b"\0" * (end - start) + content[end:]
    return content[:start] + random_source.choice(TOKENS) + content[start:]


def changed_tree(random_source: random.Random, tree: Any) -> Any:
    """Return a copy of a JSON value with up to three values replaced, moved, renamed or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(random_source.randint(1, 3)):
        tree = _change_tree(random_source, tree)
    return tree


def _change_tree(random_source: random.Random, tree: Any) -> Any:
    places = _places(tree)
    if not places or random_source.random() < 0.02:
        return copy.deepcopy(random_source.choice(VALUES))
    holder, key = random_source.choice(places)
    kind = random_source.choice(("replace", "replace", "replace", "remove", "move", "wrap", "name"))
    if kind == "replace":
        holder[key] = copy.deepcopy(random_source.choice(VALUES))
    elif kind == "remove":
        del holder[key]
    elif kind == "move":
        other, other_key = random_source.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    elif kind == "wrap":
        holder[key] = random_source.choice(([holder[key]], {"": holder[key]}))
    elif isinstance(holder, dict):
        name = random_source.choice([value for value in VALUES if isinstance(value, str)])
        holder[name] = holder.pop(key)
    else:
        holder.insert(key, copy.deepcopy(holder[key]))
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return the holder and the key of every value below the top."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        keys: list[Any] = []
        if isinstance(holder, dict):
            keys = list(holder)
        elif isinstance(holder, list):
            keys = list(range(len(holder)))
        for key in keys:
            found.append((holder, key))
            waiting.append(holder[key])
    return found


def text_of(tree: Any) -> str:
    """Return the JSON of a changed value, with what the stand-ins stand for."""
    text = json.dumps(tree)
    return text.replace(f'"{DEEP}"', DEEP_TEXT).replace(f'"{DIGITS}"', DIGITS_TEXT)
