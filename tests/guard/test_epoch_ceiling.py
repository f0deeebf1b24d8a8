"""A share is raised as far as the rows that are left of its source reach."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from cpt.guard.epoch_ceiling import largest_share
from cpt.guard.ladder import GuardState
from cpt.guard.replay_share import EPOCH_MARGIN, ReplayShares
from data_pipeline.config.mix_config import GuardConfig, GuardDomain, MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.mixture.ledger import Ledger, Segment
from data_pipeline.mixture.mixture import Mixture

ROWS = 4000
BATCH = 20
"""Rows of a batch."""


class Rows:
    """A build of two sources: English text, and conversations of which few tokens are learned."""

    source_names = ("chat", "en")
    languages = ("ja", "en")
    seq_len = 512

    def __init__(self, learned: int, english_rows: int) -> None:
        """Take the learned tokens of a row of conversations, and the rows of English."""
        self._tokens = (np.full(ROWS, learned), np.full(english_rows, self.seq_len))

    def row_tokens(self, source: int) -> Any:
        return self._tokens[source]

    def num_rows(self, source: int) -> int:
        return len(self._tokens[source])


def mix_of_two() -> MixConfig:
    chat = SourceConfig(name="chat", language="ja", domain="chat", format="mock", weight=0.8)
    english = SourceConfig(
        name="en",
        language="en",
        domain="web",
        format="mock",
        weight=0.2,
        max_epochs=1.0,
        held_out_share=0.1,
    )
    domain = GuardDomain(name="english", language="en", sources=("en",))
    return MixConfig(
        seq_len=512, seed=3, sources=(chat, english), guard=GuardConfig(domains=(domain,))
    )


@pytest.mark.parametrize("learned", [512, 41])
def test_replay_beside_conversations_is_raised_until_its_rows_are_used_up(learned: int) -> None:
    mix = mix_of_two()
    data: Any = Rows(learned, english_rows=ROWS // 4)
    mixture = Mixture(data, Ledger.start(mix), seed=1)
    limits = ReplayShares(mix, data, 0.9).limits(
        GuardState(), ["english"], mixture, 0, batches_left=ROWS // BATCH, batch_size=BATCH
    )
    largest = limits.sources["en"].largest
    weights = {"chat": 1 - largest, "en": largest}
    segment = Segment(start_step=0, weights=weights, max_epochs={}, mix_hash="")
    raised = Mixture(data, Ledger((segment,)), seed=1)
    drawn = raised.position(ROWS // BATCH, BATCH).drawn_rows[1]
    assert drawn == pytest.approx(EPOCH_MARGIN * ROWS / 4, rel=0.01)


def test_all_rows_are_taken_at_the_largest_share() -> None:
    rng = random.Random(5)
    for _ in range(200):
        names = [f"source{number}" for number in range(rng.randint(2, 5))]
        amounts = {name: rng.uniform(0.01, 1) for name in names}
        total = math.fsum(amounts.values())
        shares = {name: amount / total for name, amount in amounts.items()}
        row_tokens = {name: rng.choice([20.0, 300.0, 4096.0]) for name in names}
        side = set(names[: rng.randint(1, len(names) - 1)])
        largest = largest_share(names[0], 1000, 90, shares, row_tokens, side)
        factor = largest / shares[names[0]]
        rising = math.fsum(shares[name] for name in side)
        if factor * rising > 1:  # there are more rows than the whole run takes
            continue
        falling = (1 - factor * rising) / (1 - rising)
        rows = {}
        for name in names:
            moved = shares[name] * (factor if name in side else falling)
            rows[name] = moved / row_tokens[name]
        taken = 1000 * rows[names[0]] / math.fsum(rows.values())
        assert taken == pytest.approx(90)


def test_source_without_a_share_may_take_the_rows_that_it_has() -> None:
    shares = {"ja": 0.9, "en": 0.1, "code": 0.0}
    row_tokens = {"ja": 50.0, "en": 500.0, "code": 500.0}
    largest = largest_share("code", 1000, 30, shares, row_tokens, {"en", "code"})
    rows = {"ja": (0.9 - largest) / 50, "en": 0.1 / 500, "code": largest / 500}
    assert 1000 * rows["code"] / math.fsum(rows.values()) == pytest.approx(30)


def test_source_that_has_no_rows_left_is_not_raised() -> None:
    shares = {"ja": 0.8, "en": 0.2}
    row_tokens = {"ja": 40.0, "en": 500.0}
    assert largest_share("en", 1000, -20, shares, row_tokens, {"en"}) == 0
