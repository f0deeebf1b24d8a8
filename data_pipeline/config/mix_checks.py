"""Rules of a data mix that need several keys or the disk: sums, doubles, files, floors, ceilings.

Decisions
    The rules read the parsed file, not the dataclasses, so a typo in one source does not hide a
    wrong sum of weights. A value of a wrong type is left to the reader of the dataclasses, which
    reports it.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from data_pipeline.config.document_hook import hook_problem
from data_pipeline.config.file_patterns import absolute_pattern, expand
from data_pipeline.config.generation_config import read_prompts
from data_pipeline.config.guard_cleaning import check_guard_cleaning
from data_pipeline.config.language_limits import WEIGHT_SUM_TOLERANCE
from data_pipeline.config.links import dangling_link
from data_pipeline.config.mix_config import OWN_PREFIX
from data_pipeline.config.schedule_config import check_schedule
from data_pipeline.config.source_config import LANGUAGES, SUFFIXES, suffix_format
from data_pipeline.config.stage_config import MAX_SEQ_LEN
from data_pipeline.config.strict_yaml import KeyPath, Reader, is_number, nearest
from data_pipeline.config.weight_checks import check_weights, give_epochs
from data_pipeline.errors import unnamable
from data_pipeline.objects.object_paths import address_problem, is_address

RawSection = dict[str, Any]
"""A section of the file as it was parsed."""
PROMPT_LISTS = ("generation", "traces")
"""Lists of the guard section whose entries name files of prompts."""
_ADDRESS = re.compile(r"([a-z][a-z0-9+]*)://", re.IGNORECASE)


def check_across(reader: Reader, raw: RawSection, base: Path, need_files: bool = True) -> None:
    """Report every broken rule that spans several keys of a data mix.

    Args:
        reader: Takes the problems.
        raw: The parsed file.
        base: Folder that the paths in the file are relative to.
        need_files: Whether the files that the mix names must be here.
    """
    _check_seq_len(reader, raw)
    _check_given_once(reader, raw)
    listed = raw.get("sources")
    if listed == []:
        reader.problem(("sources",), "is an empty list. Add at least one source.")
    sources = _sections(listed)
    if not sources:
        return
    _check_unique(reader, sources, ("sources",))
    check_weights(reader, sources, _sections(raw.get("schedule")).values())
    _check_loss_weights(reader, raw, sources)
    if need_files:
        for index, source in sources.items():
            _check_place(reader, source, ("sources", index, "path"), base)
    _check_hooks(reader, sources, base, need_files)
    _check_languages(reader, raw.get("languages"), list(sources.values()))
    domains = _guard_domains(raw)
    _check_packing(reader, raw, [*sources.values(), *domains.values()])
    _check_unique(reader, domains, ("guard", "domains"))
    by_name = _by_name(sources)
    check_schedule(reader, raw, by_name)
    _check_prompt_domains(reader, raw, domains, by_name)
    if need_files:
        _check_prompts(reader, raw, base)
    for index, domain in domains.items():
        path: KeyPath = ("guard", "domains", index)
        _check_members(reader, domain, path, by_name)
        _check_serving(reader, domain, path, by_name)
        if domain.get("path") is not None:
            if need_files:
                _check_files(reader, domain, (*path, "path"), base)
            _check_own_source(reader, domain, path, by_name)
            check_guard_cleaning(reader, domain, path, by_name)
            _check_decontamination(reader, raw, path)


def _check_seq_len(reader: Reader, raw: RawSection) -> None:
    """Check that the length of a row is given once, and that gpt-oss reads rows of that length."""
    seq_len = raw.get("seq_len")
    stages = raw.get("stages")
    if seq_len is None and not stages:
        reader.problem(("seq_len",), "is missing. It has no default: add it.")
    if seq_len is not None and stages:
        reader.problem(
            ("seq_len",), "is given together with stages, each of which has its own. Remove one."
        )
    if type(seq_len) is int and not 2 <= seq_len <= MAX_SEQ_LEN:
        reader.problem(
            ("seq_len",), f"is {seq_len}, must be from 2 to {MAX_SEQ_LEN} (the context of gpt-oss)."
        )


def _sections(listed: Any) -> dict[int, RawSection]:
    """Return the sections of a list by their index, without what is no section."""
    sections: dict[int, RawSection] = {}
    if isinstance(listed, list):
        for index, item in enumerate(listed):
            if isinstance(item, dict):
                sections[index] = item
    return sections


def _guard_domains(raw: RawSection, key: str = "domains") -> dict[int, RawSection]:
    """Return the sections of a list in the guard section, by their index."""
    guard = raw.get("guard")
    if not isinstance(guard, dict):
        return {}
    return _sections(guard.get(key))


def _by_name(sections: dict[int, RawSection]) -> dict[str, RawSection]:
    named: dict[str, RawSection] = {}
    for section in sections.values():
        if _has_name(section):
            named[section["name"]] = section
    return named


def _has_name(section: RawSection) -> bool:
    return isinstance(section.get("name"), str)


def _check_unique(reader: Reader, sections: dict[int, RawSection], parent: KeyPath) -> None:
    """Check that the sections of a list have different names."""
    first: dict[str, KeyPath] = {}
    for index, section in sections.items():
        if not _has_name(section):
            continue
        name = section["name"]
        path: KeyPath = (*parent, index, "name")
        if name in first:
            line = reader.located.lines.get(first[name], "?")
            reader.problem(
                path, f"is '{name}', which line {line} uses, too. Give each its own name."
            )
        first.setdefault(name, path)


def _check_loss_weights(reader: Reader, raw: RawSection, sources: dict[int, RawSection]) -> None:
    """Check that some source is learned from, in the whole mix or in each phase of a schedule."""
    by_name = _by_name(sources)
    planned = {name: _weight_or_some(source) for name, source in by_name.items()}
    places: list[tuple[KeyPath, list[Any]]] = []
    for index, phase in _sections(raw.get("schedule")).items():
        ends = [phase.get("weights") or planned, phase.get("to") or {}]
        places.append((("schedule", index), ends))
    for place, ends in places or [(("sources",), [planned])]:
        learned = []
        for name, source in by_name.items():
            weights = [end.get(name) for end in ends if isinstance(end, dict)]
            if any(is_number(weight) and weight > 0 for weight in weights):
                learned.append(source.get("loss_weight", 1.0) != 0)
        if learned and not any(learned):
            reader.problem(
                place,
                "trains on sources of loss_weight 0 alone: nothing would be learned. Remove it "
                "from one of them.",
            )


def _weight_or_some(source: RawSection) -> Any:
    """Return the weight of a source, or in place of epochs any weight above 0."""
    return source.get("weight") if source.get("epochs") is None else 1.0


def _check_hooks(
    reader: Reader, sources: dict[int, RawSection], base: Path, need_files: bool
) -> None:
    for index, source in sources.items():
        hook = source.get("hook")
        if not isinstance(hook, str):
            continue
        problem = hook_problem(base, hook, need_file=need_files)
        if problem is not None:
            reader.problem(("sources", index, "hook"), problem)


def _check_place(reader: Reader, source: RawSection, path: KeyPath, base: Path) -> None:
    """Check the files or the folder that a source names, as its format asks."""
    if source.get("format") in ("huggingface", "build"):
        _check_folder(reader, source, path, base)
    elif source.get("format") != "mock":
        _check_files(reader, source, path, base)


def _check_folder(reader: Reader, source: RawSection, path: KeyPath, base: Path) -> None:
    folder = source.get("path")
    if not isinstance(folder, str):
        return
    try:
        os.fsencode(folder)
        if not (base / folder).is_dir():
            reader.problem(path, f"is '{folder}', {_why_no_folder(folder, base)}.")
            return
        _check_links(reader, sorted((base / folder).rglob("*")), path)
    except UnicodeEncodeError:
        reader.problem(path, f"names a folder that cannot be opened: {unnamable(folder)}")
    except OSError as error:
        reader.problem(path, f"is '{folder}', which cannot be looked at: {error.strerror}.")


def _why_no_folder(folder: str, base: Path) -> str:
    if is_address(folder):
        return "which is an address, and this format reads a folder of a disk. Copy it here"
    if (base / folder).exists():
        return "which is a file, and the folder that holds it is asked for"
    reason = why_no_file(folder, base)
    return reason.replace("which matches no file", "which is no folder")


def _check_links(reader: Reader, files: list[Path], path: KeyPath) -> None:
    """Report the first file that is a link to nothing."""
    for file in files:
        problem = dangling_link(file)
        if problem:
            reader.problem(path, f"names a file that is not there: {problem}")
            return


def _check_files(reader: Reader, section: RawSection, path: KeyPath, base: Path) -> None:
    """Check that each file or glob matches, that no file is named twice, and each has a format."""
    patterns = section.get("path")
    if patterns is None:
        reader.problem(path, "is missing. Give a file, a glob, or a list of them.")
    if patterns == []:
        reader.problem(path, "is an empty list. Give at least one file or glob.")
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, list):
        return
    of_objects = {is_address(pattern) for pattern in patterns if isinstance(pattern, str)}
    if len(of_objects) > 1:
        reader.problem(path, "names both files and objects (s3://). Make a source of each.")
        return
    by_suffix = section.get("format", "auto") == "auto"
    seen: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            continue
        problem = address_problem(pattern) if is_address(pattern) else None
        if problem is not None:
            reader.problem(path, problem)
            continue
        files = _expand(reader, pattern, path, base)
        if files is None:
            continue
        if not files:
            reader.problem(path, f"is '{pattern}', {why_no_file(pattern, base)}.")
        _check_twice(reader, files, seen, path)
        _check_links(reader, files, path)
        if by_suffix:
            _check_suffixes(reader, files, path)


def _check_twice(
    reader: Reader, files: list[Path], seen: dict[tuple[int, int], Path], path: KeyPath
) -> None:
    """Report the first file that was named before, also under another name that is a link to it.

    Args:
        reader: Takes the problem.
        files: Files of a pattern.
        seen: Files of the patterns before it, by device and number; those of this one are added.
        path: The key.
    """
    reported = False
    for file in files:
        try:
            status = file.stat()
        except OSError:  # a link to nothing, which is reported as such
            continue
        before = seen.setdefault((status.st_dev, status.st_ino), file)
        if reported or before is file:
            continue
        reported = True
        if before == file:
            reader.problem(path, f"names {file} twice. Remove one.")
        else:
            reader.problem(
                path,
                f"names {before} and {file}, which are one file under two names. Leave one out.",
            )


def _expand(reader: Reader, pattern: str, path: KeyPath, base: Path) -> list[Path] | None:
    """Return the files of a pattern; None if it cannot be looked for, which is reported."""
    try:
        os.fsencode(pattern)
        return expand(absolute_pattern(pattern, base)) if pattern else []
    except UnicodeEncodeError:
        reader.problem(path, f"names a file that cannot be opened: {unnamable(pattern)}")
    except OSError as error:
        reader.problem(path, f"is '{pattern:.200}', which cannot be looked for: {error.strerror}.")
    return None


def why_no_file(pattern: str, base: Path) -> str:
    """Return why a path or glob of a mix names no file, and what to write instead.

    Args:
        pattern: The path as it is written.
        base: Folder that it is relative to.
    """
    if is_address(pattern):
        inside = pattern.rstrip("/")
        return (
            "which matches no object. A folder alone names none: name its objects, as in "
            f"'{inside}/*.jsonl', or '{inside}/**/*.jsonl'"
        )
    path = base / pattern
    if path.is_dir():
        inside = pattern.rstrip("/") or "."
        return (
            "which is a folder. Name its files: "
            f"'{inside}/*.jsonl', or '{inside}/**/*.jsonl' for those in folders below it as well"
        )
    if path.exists():
        return "which is a pipe, a socket or a device. Only regular files are read"
    address = _ADDRESS.match(pattern)
    if address:
        return (
            f"which is an address. {address[1]}:// is not read: copy the files here, and name them"
        )
    if pattern.startswith("~"):
        return "but ~ is not replaced in a mix. Write the whole path of the home folder"
    if "$" in pattern:
        return "but variables are not replaced in a mix. Write the whole path"
    looked = f"which matches no file (looked in {base})"
    if "[" in pattern:
        return f"{looked}. Brackets match one character of those inside: write [[] for a bracket"
    return looked


def _check_suffixes(reader: Reader, files: list[Path], path: KeyPath) -> None:
    """Report the first file whose format `format: auto` cannot tell."""
    for file in files:
        if suffix_format(file) is None:
            known = ", ".join([*SUFFIXES, ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".jsonl.bz2"])
            reader.problem(path, f"names {file}, whose suffix is not one of {known}. Set format.")
            return


def _check_languages(reader: Reader, limits: Any, sources: list[RawSection]) -> None:
    """Check that the bounds on languages name known ones and hold for the weights."""
    if not isinstance(limits, dict):
        return
    shares: dict[str, float] = defaultdict(float)
    for source in sources:
        language = source.get("language")
        weight = source.get("weight")
        if isinstance(language, str) and is_number(weight):
            shares[language] += weight
    for language, bounds in limits.items():
        path: KeyPath = ("languages", language)
        if language not in LANGUAGES:
            reader.problem(path, f"is not a known language.{nearest(str(language), LANGUAGES)}")
        if not isinstance(bounds, dict) or give_epochs(sources):
            continue  # what the epochs give is known with the build (`mixture.epochs`)
        share = shares[language]
        low = bounds.get("min_share", 0.0)
        high = bounds.get("max_share", 1.0)
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


def _check_packing(reader: Reader, raw: RawSection, sections: list[RawSection]) -> None:
    """Check that no conversation is cut wherever a row ends."""
    formats = [section.get("format") for section in sections]
    if raw.get("packing") == "concatenate" and "harmony" in formats:
        reader.problem(
            ("packing",),
            "is concatenate, which cuts documents wherever a row ends: the rest of a conversation "
            "would have no beginning. Remove packing, or the sources with format: harmony.",
        )


def _check_members(
    reader: Reader, domain: RawSection, path: KeyPath, by_name: dict[str, RawSection]
) -> None:
    """Check that a guard domain names sources that hold documents out, each once."""
    members = domain.get("sources")
    if not isinstance(members, list):
        return
    for index, member in enumerate(members):
        here: KeyPath = (*path, "sources", index)
        if not isinstance(member, str):
            continue
        if member not in by_name:
            suggestion = nearest(member, by_name)
            reader.problem(here, f"is '{member}', which is no source.{suggestion}")
        elif not by_name[member].get("held_out_share"):
            reader.problem(
                here, f"is '{member}', which holds out nothing. Set its held_out_share above 0."
            )
        if member in members[:index]:
            reader.problem(here, f"is '{member}', which the list already has. Remove one.")


def _check_prompt_domains(
    reader: Reader,
    raw: RawSection,
    domains: dict[int, RawSection],
    by_name: dict[str, RawSection],
) -> None:
    """Check that prompt domains have names of their own, and name sources of the mix, each once."""
    taken = dict.fromkeys(_by_name(domains).keys() or by_name.keys(), "a domain of held-out text")
    for key in PROMPT_LISTS:
        asked = _guard_domains(raw, key)
        _check_unique(reader, asked, ("guard", key))
        for index, domain in asked.items():
            path: KeyPath = ("guard", key, index)
            if _has_name(domain) and domain["name"] in taken:
                reader.problem(
                    (*path, "name"),
                    f"is '{domain['name']}', which {taken[domain['name']]} has, too. Give each its "
                    "own name.",
                )
            _check_prompt_sources(reader, domain, path, by_name)
        taken |= dict.fromkeys(_by_name(asked), f"a domain of guard.{key}")


def _check_prompt_sources(
    reader: Reader, domain: RawSection, path: KeyPath, by_name: dict[str, RawSection]
) -> None:
    members = domain.get("sources")
    if not isinstance(members, list):
        return
    for position, member in enumerate(members):
        here: KeyPath = (*path, "sources", position)
        if isinstance(member, str) and member not in by_name:
            suggestion = nearest(member, by_name)
            reader.problem(here, f"is '{member}', which is no source.{suggestion}")
        if member in members[:position]:
            reader.problem(here, f"is '{member}', which the list already has. Remove one.")


def _check_prompts(reader: Reader, raw: RawSection, base: Path) -> None:
    """Check that every line of every file of prompts can be used."""
    for key in PROMPT_LISTS:
        for index, domain in _guard_domains(raw, key).items():
            given = domain.get("path")
            if not isinstance(given, str):
                continue
            for problem in prompt_problems(base, given):
                reader.problem(("guard", key, index, "path"), f"cannot be used: {problem}")


def prompt_problems(base: Path, given: str) -> list[str]:
    """Return what is wrong with a file of prompts.

    Args:
        base: Folder that a relative path is relative to.
        given: The path.
    """
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        return [unnamable(given)]
    _, problems = read_prompts(base / given)
    return problems


def _check_serving(
    reader: Reader, domain: RawSection, path: KeyPath, by_name: dict[str, RawSection]
) -> None:
    """Check that a guard domain is served by sources of the mix, each named once."""
    serving = domain.get("served_by")
    if not isinstance(serving, list):
        return
    for index, name in enumerate(serving):
        here: KeyPath = (*path, "served_by", index)
        if not isinstance(name, str):
            continue
        if name not in by_name:
            reader.problem(here, f"is '{name}', which is no source.{nearest(name, by_name)}")
        if name in serving[:index]:
            reader.problem(here, f"is '{name}', which the list already has. Remove one.")


def _check_own_source(
    reader: Reader, domain: RawSection, path: KeyPath, by_name: dict[str, RawSection]
) -> None:
    own = f"{OWN_PREFIX}{domain.get('name')}"
    if own in by_name:
        reader.problem(
            (*path, "name"),
            f"needs the source name '{own}', which is taken. Rename one of the two.",
        )


def _check_decontamination(reader: Reader, raw: RawSection, path: KeyPath) -> None:
    section = raw.get("decontamination")
    by_key = {"decontaminate_tokens": raw.get("decontaminate_tokens")}
    if isinstance(section, dict):
        by_key["decontamination.tokens"] = section.get("tokens")
    for key, tokens in by_key.items():
        if tokens == 0:
            reader.problem(
                (*path, "path"),
                f"names guard files, but {key} is 0: training text that holds them would stay. "
                f"Remove {key}.",
            )


def _check_given_once(reader: Reader, raw: RawSection) -> None:
    section = raw.get("decontamination")
    is_old = raw.get("decontaminate_tokens") is not None
    if is_old and isinstance(section, dict) and "tokens" in section:
        reader.problem(
            ("decontaminate_tokens",),
            "is an older name of decontamination.tokens, which is given, too. Remove it.",
        )
