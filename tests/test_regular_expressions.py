"""No regular expression of the project takes more than linear time, whatever text it meets."""

from __future__ import annotations

import ast
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cpt", "data_pipeline")
METHODS = ("compile", "sub", "subn", "search", "match", "fullmatch", "findall", "finditer", "split")
LENGTH = 5_000
MOST_SECONDS = 0.05
"""CPU time for LENGTH characters: of a linear search a hundredth, of a quadratic one more."""
SAMPLES = "a1 \n\t\"'\\{}[]():.,;-_/<>`$#@=+*!\u3000\u3042\u4e00\u0301\uff76\uff9e\u3099"


def patterns() -> Iterator[tuple[str, str, bool]]:
    """Yield (place, pattern, whether it is searched for) of every pattern in the code."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if "import re" not in source:
                continue
            for node in ast.walk(ast.parse(source)):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = node.func.value
                is_re = isinstance(owner, ast.Name) and owner.id == "re"
                if not is_re or node.func.attr not in METHODS:
                    continue
                pattern = node.args[0]
                if isinstance(pattern, ast.Constant):
                    text = pattern.value
                    if isinstance(text, bytes):
                        text = text.decode("latin-1")
                    place = f"{path.relative_to(ROOT).as_posix()}: {text!a}"
                    yield place, text, _is_searched(source, node)


def _is_searched(source: str, node: ast.Call) -> bool:
    """Return whether a pattern is looked for at every place of a text."""
    assert isinstance(node.func, ast.Attribute)
    if node.func.attr != "compile":
        return node.func.attr not in ("match", "fullmatch")
    line = source.splitlines()[node.lineno - 1]
    name = re.match(r"(\w+)(: [^=]+)? = re\.compile\(", line)
    if name is None:
        return True
    return (
        re.search(rf"\b{name[1]}\.(search|sub|subn|findall|finditer|split)\(", source) is not None
    )


PATTERNS = list(patterns())


def literals(pattern: str) -> list[str]:
    """Return the words that a pattern spells out, which lead a search deep into it."""
    words = re.findall(r"[A-Za-z ]{2,}", pattern)
    return sorted({word for word in words if word.strip()})[:4]


def adversaries(pattern: str) -> Iterator[str]:
    """Yield texts of LENGTH characters: runs of one character, of two, and of the words."""
    starts = ["", *literals(pattern)]
    units = [*SAMPLES, *literals(pattern), "\\boxed{", "```", "a1", " \n", "1,", "1.", "a:", "-1"]
    for start, unit in itertools.product(starts, units):
        run = start + unit * (LENGTH // len(unit))
        yield run
        yield f"{run}\0"


def seconds(pattern: re.Pattern[str], text: str, is_searched: bool = True) -> float:
    """Return the CPU time of all matches, or of one at the start: the best of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        if is_searched:
            for _ in pattern.finditer(text):
                pass
        else:
            pattern.match(text)
            pattern.fullmatch(text)
        times.append(time.process_time() - start)
        if times[-1] < MOST_SECONDS:
            break
    return min(times)


@pytest.mark.parametrize(
    ("text", "is_searched"), [facts[1:] for facts in PATTERNS], ids=[facts[0] for facts in PATTERNS]
)
def test_no_search_takes_more_than_linear_time(text: str, is_searched: bool) -> None:
    pattern = re.compile(text, re.DOTALL) if "```" in text else re.compile(text)
    for adversary in adversaries(text):
        taken = seconds(pattern, adversary, is_searched)
        assert taken < MOST_SECONDS, ascii(adversary[:40])


def test_the_texts_find_what_is_not_linear() -> None:
    pattern = re.compile(r" +(?=\n|\Z)")
    assert any(seconds(pattern, adversary) >= MOST_SECONDS for adversary in adversaries(" "))
