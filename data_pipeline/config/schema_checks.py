"""Rules of a data mix that need several keys or the disk: sums, doubles, files, floors.

They read the parsed file itself, not the dataclasses, so that a typo in one source does not hide a
wrong sum.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.config.schema import MAX_SEQ_LEN, OWN_PREFIX, WEIGHT_SUM_TOLERANCE
from data_pipeline.config.source_config import LANGUAGES, SUFFIXES, expand, suffix_format
from data_pipeline.config.strict_yaml import KeyPath, Reader, nearest


def check_across(reader: Reader, raw: dict[str, Any], base: Path) -> None:
    """Rules that need several sources, read from the parsed file so that other problems do not hide
    them.
    """
    seq_len = raw.get("seq_len")
    if type(seq_len) is int and not 2 <= seq_len <= MAX_SEQ_LEN:
        reader.problem(
            ("seq_len",), f"is {seq_len}, must be from 2 to {MAX_SEQ_LEN} (the context of gpt-oss)."
        )
    listed = raw.get("sources")
    if listed == []:
        reader.problem(("sources",), "is an empty list. Add at least one source.")
    if not isinstance(listed, list) or not listed:
        return
    sources = {index: source for index, source in enumerate(listed) if isinstance(source, dict)}
    names = {
        index: source["name"]
        for index, source in sources.items()
        if isinstance(source.get("name"), str)
    }
    _check_unique(reader, {("sources", index, "name"): name for index, name in names.items()})
    _check_weights(reader, sources)
    for index, source in sources.items():
        if source.get("format") in ("huggingface", "build"):
            _check_folder(reader, source, ("sources", index, "path"), base)
        elif source.get("format") != "mock":
            _check_files(reader, source, ("sources", index, "path"), base)
    _check_languages(reader, raw.get("languages"), sources)
    _check_guard(
        reader, raw.get("guard"), {source.get("name"): source for source in sources.values()}
    )
    _check_guard_files(reader, raw, base)


def _check_unique(reader: Reader, names: dict[KeyPath, str]) -> None:
    counts = Counter(names.values())
    first: dict[str, KeyPath] = {}
    for path, name in names.items():
        if counts[name] > 1 and name in first:
            line = reader.located.lines.get(first[name], "?")
            reader.problem(
                path, f"is '{name}', which line {line} uses, too. Give each its own name."
            )
        first.setdefault(name, path)


def _check_weights(reader: Reader, sources: dict[int, dict[str, Any]]) -> None:
    weights = {index: source.get("weight") for index, source in sources.items()}
    numbers = {
        i: float(w)
        for i, w in weights.items()
        if isinstance(w, (int, float)) and not isinstance(w, bool)
    }
    negative = [index for index, weight in numbers.items() if weight < 0]
    for index in negative:
        reader.problem(
            ("sources", index, "weight"),
            f"is {numbers[index]:g}, must be >= 0. Remove the source or give it a share of the tokens.",
        )
    if len(numbers) < len(weights) or negative or not all(map(math.isfinite, numbers.values())):
        return
    total = math.fsum(numbers.values())
    if total == 0:
        reader.problem(
            ("sources",), "have weights that are all 0. Give at least one a share of the tokens."
        )
    elif abs(total - 1) > WEIGHT_SUM_TOLERANCE:
        names = (sources[index].get("name", f"sources[{index}]") for index in numbers)
        scaled = ", ".join(
            f"{name} {weight / total:.6g}"
            for name, weight in zip(names, numbers.values(), strict=True)
        )
        reader.problem(
            ("sources",), f"have weights that sum to {total:.9g}, must be 1. Scaled to 1: {scaled}."
        )


def _check_files(reader: Reader, source: dict[str, Any], path: KeyPath, base: Path) -> None:
    patterns = source.get("path")
    if patterns is None:
        reader.problem(path, "is missing. Give a file, a glob, or a list of them.")
    if patterns == []:
        reader.problem(path, "is an empty list. Give at least one file or glob.")
    patterns = (
        [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []
    )
    seen: set[Path] = set()
    for pattern in patterns:
        files = expand(str(base / pattern)) if isinstance(pattern, str) and pattern else []
        if isinstance(pattern, str) and not files:
            reader.problem(path, f"is '{pattern}', which matches no file (looked in {base}).")
        twice = [file for file in files if file in seen]
        if twice:
            reader.problem(path, f"names {twice[0]} twice. Remove one.")
        seen.update(files)
        unknown = [file for file in files if suffix_format(file) is None]
        if unknown and source.get("format", "auto") == "auto":
            known = ", ".join([*SUFFIXES, ".jsonl.gz", ".jsonl.zst"])
            reader.problem(
                path, f"names {unknown[0]}, whose suffix is not one of {known}. Set format."
            )


def _check_folder(reader: Reader, source: dict[str, Any], path: KeyPath, base: Path) -> None:
    place = source.get("path")
    if isinstance(place, str) and not (base / place).is_dir():
        reader.problem(path, f"is '{place}', which is no folder (looked in {base}).")


def _check_languages(reader: Reader, limits: Any, sources: dict[int, dict[str, Any]]) -> None:
    """Floors and ceilings are known, can be met together, and are met by the weights."""
    if not isinstance(limits, dict):
        return
    shares: dict[Any, float] = {}
    for source in sources.values():
        weight = source.get("weight")
        if isinstance(weight, (int, float)) and not isinstance(weight, bool):
            shares[source.get("language")] = shares.get(source.get("language"), 0.0) + weight
    for language, bounds in limits.items():
        path: KeyPath = ("languages", language)
        if language not in LANGUAGES:
            reader.problem(path, f"is not a known language.{nearest(str(language), LANGUAGES)}")
        if not isinstance(bounds, dict):
            continue
        share = shares.get(language, 0.0)
        low, high = bounds.get("min_share", 0.0), bounds.get("max_share", 1.0)
        if isinstance(low, (int, float)) and share < low - WEIGHT_SUM_TOLERANCE:
            reader.problem(
                (*path, "min_share"),
                f"is {low:g}, but the weights give {language} {share:g}. Raise them.",
            )
        if isinstance(high, (int, float)) and share > high + WEIGHT_SUM_TOLERANCE:
            reader.problem(
                (*path, "max_share"),
                f"is {high:g}, but the weights give {language} {share:g}. Lower them.",
            )


def _check_guard(reader: Reader, guard: Any, sources: dict[Any, dict[str, Any]]) -> None:
    domains = guard.get("domains") if isinstance(guard, dict) else None
    names: dict[KeyPath, str] = {}
    for number, domain in enumerate(domains if isinstance(domains, list) else []):
        if not isinstance(domain, dict):
            continue
        path: KeyPath = ("guard", "domains", number)
        if isinstance(domain.get("name"), str):
            names[(*path, "name")] = domain["name"]
        listed = domain.get("sources")
        members = listed if isinstance(listed, list) else []
        for index, member in enumerate(members):
            here = (*path, "sources", index)
            if member not in sources:
                reader.problem(
                    here,
                    f"is '{member}', which is no source.{nearest(str(member), map(str, sources))}",
                )
            elif not sources[member].get("held_out_share"):
                reader.problem(
                    here, f"is '{member}', which holds out nothing. Set its held_out_share above 0."
                )
            if member in members[:index]:
                reader.problem(here, f"is '{member}', which the list already has. Remove one.")
    _check_unique(reader, names)


def _check_guard_files(reader: Reader, raw: dict[str, Any], base: Path) -> None:
    """Files of guard domains are there, and training text that holds them will be found."""
    guard = raw.get("guard")
    domains = guard.get("domains") if isinstance(guard, dict) else None
    for number, domain in enumerate(domains if isinstance(domains, list) else []):
        if not isinstance(domain, dict) or domain.get("path") is None:
            continue
        path: KeyPath = ("guard", "domains", number)
        _check_files(reader, domain, (*path, "path"), base)
        own = f"{OWN_PREFIX}{domain.get('name')}"
        if any(isinstance(s, dict) and s.get("name") == own for s in raw["sources"]):
            reader.problem(
                (*path, "name"),
                f"needs the source name '{own}', which is taken. Rename one of the two.",
            )
        if raw.get("decontaminate_tokens") == 0:
            reader.problem(
                (*path, "path"),
                "names guard files, but decontaminate_tokens is 0: training text that holds them would stay. Remove "
                "decontaminate_tokens.",
            )
