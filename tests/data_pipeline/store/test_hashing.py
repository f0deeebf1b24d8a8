"""The hash of integers is the published one, so orders derived from it never change."""

from __future__ import annotations

import numpy as np

from data_pipeline.store.hashing import splitmix64


def test_splitmix64_matches_the_published_sequence() -> None:
    # first outputs for seed 1234567 of the reference implementation, prng.di.unimi.it/splitmix64.c
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
