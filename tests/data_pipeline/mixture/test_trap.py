"""Mixing documents 50/50 is not mixing tokens 50/50: the trap, beside what this package does."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.reading.sources import read_texts
from data_pipeline.text.cleaning import Tally
from data_pipeline.text.tokenizer import encode
from tests.data_pipeline.inputs import MakeMix

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def real_texts() -> dict[str, list[str]]:
    """Japanese documents of about 2,000 tokens, as web pages and articles have, and short English
    ones.
    """
    mix = load_mix(ROOT / "configs" / "mixes" / "sample.yaml")
    texts = {s.name: list(read_texts(s, Tally())) for s in mix.sources}
    stories, essays = texts["ja_story"], texts["ja_essay"]
    return {
        "ja": [one + "\n\n" + other for one, other in zip(stories, essays, strict=False)],
        "en": texts["en_web"],
    }


def test_interleaving_documents_half_and_half_gives_four_fifths_of_the_tokens_to_japanese(
    real_texts: dict[str, list[str]],
) -> None:
    streams = [
        datasets.Dataset.from_dict(
            {"language": [name] * len(texts), "tokens": [len(encode(t)) for t in texts]}
        )
        for name, texts in real_texts.items()
    ]
    shares = []
    for seed in range(5):
        mixed = datasets.interleave_datasets(
            streams, probabilities=[0.5, 0.5], seed=seed, stopping_strategy="all_exhausted"
        )
        languages, tokens = np.array(mixed["language"]), np.array(mixed["tokens"])
        assert abs((languages == "ja").mean() - 0.5) < 0.15, "documents are mixed half and half"
        shares.append(tokens[languages == "ja"].sum() / tokens.sum())
    assert 0.74 < np.mean(shares) < 0.88, shares


def test_the_same_texts_at_weight_one_half_give_half_the_tokens_at_every_step(
    real_texts: dict[str, list[str]], make_mix: MakeMix, tmp_path: Path
) -> None:
    seq_len = 1024
    build(
        make_mix(real_texts, seq_len=seq_len, near_duplicates=0.8), tmp_path / "out", progress=False
    )
    built = BuiltData.open(tmp_path / "out")
    assert built.source_names == ("ja", "en")
    mixture = Mixture(built, Ledger.start(load_mix(tmp_path / "in" / "mix.yaml")), 1)
    drawn = np.zeros(2, np.int64)
    for step in range(60):
        batch = mixture.global_batch(step, 4)
        np.add.at(drawn, batch.sources, batch.predicted_tokens)
        assert abs(drawn[0] - drawn.sum() / 2) <= seq_len, f"step {step}: {drawn}"
