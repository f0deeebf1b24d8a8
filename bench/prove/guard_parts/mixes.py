"""The data mixes of the behavior proof.

A base learns English, Japanese and tasks.  Continual pretraining mixes Japanese that it has not
seen, English of other packages, and own traces: what the base itself answers to task questions.
Every mix names all sources, some with a weight of 0, so that one build serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from guard_parts.scale import Scale
from guard_parts.tasks import FAMILIES, LANGUAGES

JAPANESE = "japanese"
ENGLISH = "english"
OWN = "own"
JAPANESE_LIMITS = {"tolerance_percent": 50.0, "hard_limit_percent": 100.0}
"""Japanese is measured, and decides nothing: English alone must be allowed to lose it."""
TEXT_DOMAINS = {"guide": "guide_en", "manual": "manual_en", JAPANESE: "held_ja"}
"""Guard domains of whole packages, with the files that hold them."""
ENGLISH_DOMAINS = ("guide", "manual")


def write_base_mix(path: Path, work_dir: Path, scale: Scale, seed: int, *, tasks: float) -> Path:
    """Write the mix of a base, of which `tasks` are tasks; of the rest 5/7 are English."""
    shares = {"base_en": (1 - tasks) * 5 / 7, "base_ja": (1 - tasks) * 2 / 7}
    sources = []
    for name, share in shares.items():
        sources.append(_text(work_dir, name, name, name[-2:], share))
    each = tasks / (len(FAMILIES) * len(LANGUAGES))
    for family in FAMILIES:
        for language in LANGUAGES:
            name = f"{family}_{language}"
            source = {
                "name": name,
                "language": language,
                "domain": "tasks",
                "format": "harmony",
                "path": str(work_dir / "tasks" / f"{name}.jsonl"),
                "weight": each,
            }
            sources.append(source)
    return _write(path, scale, seed, sources, {"domains": _text_domains(work_dir)})


def write_mix(
    path: Path,
    work_dir: Path,
    own_dir: Path,
    scale: Scale,
    seed: int,
    shares: Mapping[str, float],
    *,
    behavior: bool,
) -> Path:
    """Write a mix of continual pretraining.

    Args:
        path: Where it goes.
        work_dir: Folder of the proof.
        own_dir: Folder of the base's own traces.
        scale: Sizes.
        seed: Seed of the order of the data.
        shares: Shares of English and of own traces; the rest is Japanese.
        behavior: Whether the guard has prompts and traces, too.
    """
    english = shares.get(ENGLISH, 0.0)
    own = shares.get(OWN, 0.0)
    sources = [
        _text(work_dir, JAPANESE, "new_ja", "ja", max(0.0, 1 - english - own)),
        _text(work_dir, ENGLISH, "replay_en", "en", english),
        {
            "name": OWN,
            "language": "mixed",
            "domain": "own",
            "kind": "self_replay",
            "format": "harmony",
            "path": str(own_dir / "chat.jsonl"),
            "weight": own,
        },
    ]
    guard: dict[str, Any] = {"domains": _text_domains(work_dir)}
    for domain in guard["domains"]:
        if domain["name"] in ENGLISH_DOMAINS:
            domain["served_by"] = [ENGLISH]
    if behavior:
        guard["generation"] = _prompts(work_dir, "asked", scale.generation)
        guard["traces"] = _prompts(work_dir, "own", scale.traces)
    return _write(path, scale, seed, sources, guard)


def _text(work_dir: Path, name: str, file: str, language: str, weight: float) -> dict[str, Any]:
    return {
        "name": name,
        "language": language,
        "domain": "text",
        "path": str(work_dir / "text" / f"{file}.jsonl"),
        "weight": weight,
    }


def _text_domains(work_dir: Path) -> list[dict[str, Any]]:
    domains = []
    for name, file in TEXT_DOMAINS.items():
        domains.append(
            {
                "name": name,
                "language": file[-2:],
                "path": str(work_dir / "text" / f"{file}.jsonl"),
            }
        )
    return domains


def _prompts(work_dir: Path, prefix: str, keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one domain of prompts for each language, which own traces serve."""
    domains = []
    for language in LANGUAGES:
        domain = {
            "name": f"{prefix}_{language}",
            "language": language,
            "path": str(work_dir / "tasks" / f"prompts_{language}.jsonl"),
            "sources": [OWN],
            **keys,
        }
        domains.append(domain)
    return domains


def _write(
    path: Path, scale: Scale, seed: int, sources: list[dict[str, Any]], guard: dict[str, Any]
) -> Path:
    mix = {
        "seq_len": scale.seq_len,
        "seed": seed,
        "near_duplicates": 0,  # tasks resemble each other by design
        "sources": sources,
        "guard": guard,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(mix, sort_keys=False))
    return path
