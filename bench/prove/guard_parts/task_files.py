"""Files of task items: what the base trains on, what the guard asks, and what is asked at the end.

<family>_<language>.jsonl   conversations that the base trains on
questions.jsonl             questions of training items, for own traces
prompts_<language>.jsonl    held-out items that the guard asks
items.jsonl                 held-out items of the end; none is among those of the guard
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.store.files import atomic_write
from guard_parts.scale import Scale
from guard_parts.tasks import FAMILIES, LANGUAGES, Item, items

MAX_REPEATS = 300
"""Items in a row that were drawn before, after which a family counts as used up."""
_GUARD_SEED = 1
_FINAL_SEED = 2
_TRAINING_SEED = 3
_QUESTION_SEED = 4


def write_tasks(folder: Path, scale: Scale) -> None:
    """Write all files, unless they are there."""
    if (folder / "items.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    final: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    per_family = -(-scale.num_prompts // len(FAMILIES))
    for language in LANGUAGES:
        prompts: list[dict[str, Any]] = []
        for family in FAMILIES:
            asked = unique_items(family, language, _GUARD_SEED, per_family, held_out=True)
            prompts += [item.prompt() for item in asked]
            used = {item.question for item in asked}
            wanted = scale.num_items // len(LANGUAGES)
            for item in unique_items(
                family, language, _FINAL_SEED, wanted, held_out=True, without=used
            ):
                final.append({**item.prompt(), "family": family, "language": language})
            trained = unique_items(
                family, language, _TRAINING_SEED, scale.num_training_items, held_out=False
            )
            _write(folder / f"{family}_{language}.jsonl", [item.conversation() for item in trained])
            num_asked = scale.num_own // (len(FAMILIES) * len(LANGUAGES))
            for item in unique_items(family, language, _QUESTION_SEED, num_asked, held_out=False):
                questions.append({"prompt": item.question})
        _write(folder / f"prompts_{language}.jsonl", prompts)
    _write(folder / "questions.jsonl", questions)
    _write(folder / "items.jsonl", final)  # last: it says that all files are there


def unique_items(
    family: str,
    language: str,
    seed: int,
    wanted: int,
    *,
    held_out: bool,
    without: set[str] | None = None,
) -> list[Item]:
    """Return different items, `wanted` or as many as there are.

    Args:
        family: One of FAMILIES.
        language: One of LANGUAGES.
        seed: Seed of the draws.
        wanted: Number of items.
        held_out: Whether they are those that are never trained on.
        without: Questions that may not be among them.
    """
    found: dict[str, Item] = {}
    repeats = 0
    for item in items(family, language, seed, held_out=held_out):
        is_old = item.question in found or item.question in (without or ())
        repeats = repeats + 1 if is_old else 0
        if len(found) == wanted or repeats > MAX_REPEATS:
            break
        if not is_old:
            found[item.question] = item
    return list(islice(found.values(), wanted))


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        for line in _lines(records):
            file.write(line)


def _lines(records: Sequence[dict[str, Any]]) -> Iterator[bytes]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
