"""Small inputs that the data tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.schema import MixConfig, load_mix

WORDS = ("river", "stone", "lamp", "seven", "quiet", "market", "\u6c34", "\u5c71\u9053", "\u304a\u8336", "\u65e5\u8a18")
Write = Callable[..., Path]
MakeMix = Callable[..., MixConfig]


def make_texts(count: int, salt: str, mean_words: int = 40) -> list[str]:
    """Different texts of different lengths, always the same ones."""
    texts = []
    for number in range(count):
        length = 1 + (number * 7919 + len(salt) * 31) % (2 * mean_words)
        words = (WORDS[(number * 31 + i * i + len(salt)) % len(WORDS)] for i in range(length))
        texts.append(f"{salt} {number}: " + " ".join(words))
    return texts


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """One record per text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": str(number), "title": "t", "text": text}) for number, text in enumerate(texts))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def make_mix(tmp_path: Path) -> MakeMix:
    """Writes a mix over JSONL files and loads it: `make_mix({name: texts}, seq_len=32, weights=..., **keys)`."""

    def make(
        texts: dict[str, list[str]],
        *,
        folder: str = "in",
        weights: dict[str, float] | None = None,
        held_out_share: float | dict[str, float] = 0.0,
        sources: dict[str, dict[str, Any]] | None = None,
        **keys: Any,
    ) -> MixConfig:
        base = tmp_path / folder
        listed = []
        for name, values in texts.items():
            write_jsonl(base / f"{name}.jsonl", values)
            share = held_out_share.get(name, 0.0) if isinstance(held_out_share, dict) else held_out_share
            source = {"name": name, "language": "ja" if name.startswith("ja") else "en", "domain": "web"}
            source |= {"path": f"{name}.jsonl", "held_out_share": share}
            source |= {"weight": 1 / len(texts) if weights is None else weights[name], **(sources or {}).get(name, {})}
            listed.append(source)
        path = base / "mix.yaml"
        path.write_text(yaml.safe_dump({"seq_len": 32, "seed": 7, **keys, "sources": listed}), encoding="utf-8")
        return load_mix(path)

    return make
