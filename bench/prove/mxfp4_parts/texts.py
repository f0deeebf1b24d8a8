"""The texts of the proof, and the one build that all its trainings read.

    base_en, base_ja    what the release learns: 85 % English, 15 % Japanese
    new_ja              what it is trained on afterwards
    domain_*            held-out documents, of packages that nothing is trained on

The release knows some Japanese, as gpt-oss does: a model that has never seen a letter of the
language moves in another way.
The texts are those of the guard's behavior proof (Debian's documentation, guard_parts/packages.py);
the quick form takes the sample corpora of the repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from guard_parts.packages import write_texts
from guard_parts.text import cut, evenly, write_documents

from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from mxfp4_parts.scale import Scale

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "data_pipeline" / "sample"
SAMPLE_FILES = {
    "base_en": ("en_web", "en_reference"),
    "base_ja": ("ja_reference",),
    "new_ja": ("ja_story", "ja_practical"),
    "guide_en": ("en_math",),
    "held_ja": ("ja_essay",),
}
"""Files of the sample corpora for each use, in the quick form."""
DOMAINS = {"japanese": "held_ja", "english": "guide_en"}
"""The use whose documents every held-out domain has; its last letters are the language."""
RELEASE = {"base_en": 0.85, "base_ja": 0.15, "new_ja": 0.0}
JAPANESE = {"base_en": 0.0, "base_ja": 0.0, "new_ja": 1.0}
"""Shares of the sources in the training of a release, and in that after it."""
HELD_OUT_CHARACTERS = {"ja": 400, "en": 1200}
"""Characters of a held-out document, about: some 1,200 bytes in both languages."""


def write_all_texts(folder: Path, scale: Scale, *, from_sample: bool) -> None:
    """Write the texts of all uses, unless they are there.

    Raises:
        DataError: the packages cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if from_sample:
        for use, names in SAMPLE_FILES.items():
            lines = []
            for name in names:
                lines += (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            _write(folder / f"{use}.jsonl", _texts(lines))
    else:
        write_texts(folder, scale.text_bytes)
    for name, use in DOMAINS.items():
        lines = (folder / f"{use}.jsonl").read_text(encoding="utf-8").splitlines()
        pieces: list[str] = []
        for text in _texts(lines):
            pieces += cut(text, HELD_OUT_CHARACTERS[use[-2:]])
        _write(folder / f"domain_{name}.jsonl", evenly(pieces, scale.held_out_bytes))


def _texts(lines: list[str]) -> list[str]:
    return [json.loads(line)["text"] for line in lines]


def _write(path: Path, texts: list[str]) -> None:
    if not path.exists():
        write_documents(path, texts)


def write_mix(folder: Path, scale: Scale, seed: int, shares: dict[str, float]) -> Path:
    """Write a mix of the proof, and return its file.

    Args:
        folder: Folder of the proof.
        scale: Sizes.
        seed: Seed of the order of the data.
        shares: Share of each source; all are named, so that one build serves all mixes.
    """
    kind = "release" if shares == RELEASE else "japanese"
    sources = []
    for name, weight in shares.items():
        path = str(folder / "text" / f"{name}.jsonl")
        source: dict[str, Any] = {"name": name, "language": name[-2:], "domain": "text"}
        sources.append({**source, "path": path, "weight": weight})
    domains = []
    for name, use in DOMAINS.items():
        path = str(folder / "text" / f"domain_{name}.jsonl")
        domains.append({"name": name, "language": use[-2:], "path": path})
    mix = {
        "seq_len": scale.seq_len,
        "seed": seed,
        "near_duplicates": 0,
        "sources": sources,
        "guard": {"domains": domains},
    }
    path = folder / "mixes" / f"{kind}-{seed}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(mix, sort_keys=False), encoding="utf-8")
    return path


def open_texts(folder: Path, scale: Scale) -> BuiltData:
    """Build the texts unless that is done, and return the build."""
    mix = load_mix(write_mix(folder, scale, 0, RELEASE))
    build(mix, folder / "build", progress=False)
    return BuiltData.open(folder / "build", verify=False, mix=mix)


def read_mix(folder: Path, scale: Scale, seed: int, shares: dict[str, float]) -> MixConfig:
    """Return a mix of the proof."""
    return load_mix(write_mix(folder, scale, seed, shares))
