"""Replay grows at the cost of the main language alone, and within every limit of the mix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpt.guard.replay_share import EPOCH_MARGIN, ReplayShares

WEIGHTS = {"ja_web": 0.6, "ja_books": 0.1, "en_web": 0.2, "code": 0.1}
LANGUAGES = {"ja_web": "ja", "ja_books": "ja", "en_web": "en", "code": "code"}
ROW_TOKENS = 10
NUM_ROWS = 50


def shares_of(
    *, max_epochs: float | None = None, min_share: float = 0.0, max_share: float = 1.0
) -> ReplayShares:
    """Return the shares of a mix that is for Japanese and replays English and code."""
    sources = []
    for name, weight in WEIGHTS.items():
        epochs = max_epochs if name == "en_web" else None
        source = SimpleNamespace(
            name=name, language=LANGUAGES[name], weight=weight, max_epochs=epochs
        )
        sources.append(source)
    domains = (
        SimpleNamespace(name="english", sources=("en_web",)),
        SimpleNamespace(name="japanese", sources=("ja_web",)),
    )
    mix: Any = SimpleNamespace(
        sources=tuple(sources),
        languages={
            "ja": SimpleNamespace(min_share=min_share, max_share=1.0),
            "en": SimpleNamespace(min_share=0.0, max_share=max_share),
        },
        serving_sources=lambda: {domain.name: domain.sources for domain in domains},
    )
    data: Any = SimpleNamespace(
        source_names=tuple(WEIGHTS),
        row_tokens=lambda _: np.full(NUM_ROWS, ROW_TOKENS),
        seq_len=ROW_TOKENS,
    )
    return ReplayShares(mix, data, max_replay_share=0.75)


def largest_share(shares: ReplayShares, rows_left: int, rows_drawn: int = 0) -> float:
    """Return the largest share of English when so many rows of the run are left."""
    position = SimpleNamespace(drawn_rows=[rows_drawn] * len(WEIGHTS))
    mixture: Any = SimpleNamespace(position=lambda batch, batch_size: position)
    return shares.largest_share("english", {}, mixture, 0, rows_left, 1)


def test_main_language_gives_what_replay_gains_in_proportion_to_its_sources() -> None:
    weights = shares_of().weights({"english": 0.34})
    assert weights == pytest.approx({"ja_web": 0.48, "ja_books": 0.08, "en_web": 0.34, "code": 0.1})


def test_mix_without_a_raise_is_the_configured_one() -> None:
    assert shares_of().weights({}) == pytest.approx(WEIGHTS)


def test_domain_of_the_main_language_cannot_be_replayed() -> None:
    shares = shares_of()
    assert shares.share("japanese", {}) is None
    assert shares.share("english", {"english": 0.3}) == pytest.approx(0.3)


def test_room_is_what_the_floor_of_the_main_language_leaves() -> None:
    assert shares_of().room({}) == pytest.approx(0.75 - 0.3)
    assert shares_of(min_share=0.5).room({}) == pytest.approx(0.5 - 0.3)


def test_share_is_bounded_by_its_language_and_never_below_the_present_one() -> None:
    assert largest_share(shares_of(max_share=0.4), rows_left=100) == pytest.approx(0.4)
    assert largest_share(shares_of(max_share=0.1), rows_left=100) == pytest.approx(0.2)


def test_share_is_bounded_by_the_epochs_that_are_left() -> None:
    shares = shares_of(max_epochs=1.0)
    expected = EPOCH_MARGIN * (NUM_ROWS - 10) / 100
    assert largest_share(shares, rows_left=100, rows_drawn=10) == pytest.approx(expected)
    assert largest_share(shares, rows_left=0) == 1.0
