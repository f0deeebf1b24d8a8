"""A small mix for the tests of the data pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from tests.data_pipeline.inputs import MakeMix, write_jsonl

EXACT_ONLY = {"near_duplicates": 0, "decontaminate_tokens": 0}
"""The texts of these tests are near copies of each other."""


@pytest.fixture
def make_mix(tmp_path: Path) -> MakeMix:
    """Return a function that writes a mix over JSONL files and loads it.

    Call it as `make_mix({name: texts}, seq_len=32, weights=..., **keys)`.
    """
    return mix_maker(tmp_path)


def mix_maker(directory: Path) -> MakeMix:
    """Return the function of `make_mix`, which writes into a directory."""

    def make(
        texts: dict[str, list[str]],
        *,
        folder: str = "in",
        weights: dict[str, float] | None = None,
        held_out_share: float | dict[str, float] = 0.0,
        sources: dict[str, dict[str, Any]] | None = None,
        **keys: Any,
    ) -> MixConfig:
        base = directory / folder
        weights = weights or dict.fromkeys(texts, 1 / len(texts))
        if not isinstance(held_out_share, dict):
            held_out_share = dict.fromkeys(texts, held_out_share)
        listed = []
        for name, values in texts.items():
            write_jsonl(base / f"{name}.jsonl", values)
            source: dict[str, Any] = {
                "name": name,
                "language": "ja" if name.startswith("ja") else "en",
                "domain": "web",
                "path": f"{name}.jsonl",
                "held_out_share": held_out_share.get(name, 0.0),
                "weight": weights[name],
            }
            own = (sources or {}).get(name, {})
            if "epochs" in own:
                del source["weight"]  # a source has one of the two
            listed.append(source | own)
        content = {"seq_len": 32, "seed": 7, **EXACT_ONLY, **keys, "sources": listed}
        if keys.get("stages"):
            del content["seq_len"]  # each stage has its own
        content["guard"] = {"min_documents": 1, "min_tokens": 1, **keys.get("guard", {})}
        path = base / "mix.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_mix(path)

    return make
